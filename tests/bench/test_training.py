from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from prefopt import bench
from prefopt.bench.measures import expected
from prefopt.objectives import DPO, SFT, ProcessReward, RewardModel

SHORT = bench.Training(steps=12, batch_size=16, every=5)


def numbers(run: bench.Run) -> list[tuple[int, float, float]]:
    return [(step, found.kl, found.gold) for step, found in run.points]


def test_dpo_comes_close_to_the_frontier(small: bench.World) -> None:
    """The gate: 30,000 Bradley-Terry pairs, beta 1. It takes all of policy, reference, loss, loop and optimiser."""
    found = bench.run(small, DPO(beta=1.0), bench.pairs(small, 30_000, seed=1), bench.Training(steps=240, every=240))
    assert found.end.efficiency is not None and found.end.efficiency >= 0.75
    target = bench.frontier(small, 1.0)
    assert found.end.kl < 1.2 * target.kl and found.end.gold > 0.6 * target.gold


def test_a_run_is_measured_at_the_start_along_the_way_and_at_the_end(ended: bench.World) -> None:
    found = bench.run(ended, DPO(), bench.pairs(ended, 200), SHORT)
    assert [step for step, _ in found.points] == [0, 5, 10, 12]
    assert found.points[0][1].kl == pytest.approx(0.0, abs=1e-12)
    assert found.end == bench.measure(ended, bench.exact_logp(found.model, ended.space))
    assert found.end.kl > 1e-4


def test_a_run_is_a_function_of_its_arguments(ended: bench.World) -> None:
    rows = bench.pairs(ended, 200)
    first = bench.run(ended, DPO(), rows, SHORT)
    torch.rand(3)
    assert numbers(first) == numbers(bench.run(ended, DPO(), rows, SHORT))
    assert numbers(first) != numbers(bench.run(ended, DPO(), rows, dataclasses.replace(SHORT, seed=1)))
    assert torch.equal(bench.exact_logp(ended.model, ended.space), ended.reference)


def test_the_table_serves_as_well_as_a_copy_of_the_reference(ended: bench.World) -> None:
    rows = bench.pairs(ended, 200)
    looked_up = bench.run(ended, DPO(beta=0.5), rows, SHORT)
    copied = bench.run(ended, DPO(beta=0.5), rows, dataclasses.replace(SHORT, reference_sync_steps=10**9))
    for (_, one), (_, other) in zip(looked_up.points, copied.points, strict=True):
        assert one.kl == pytest.approx(other.kl, rel=1e-3, abs=1e-7)


def test_a_moving_reference_lets_the_policy_go_further(ended: bench.World) -> None:
    rows, long = bench.pairs(ended, 400), dataclasses.replace(SHORT, steps=40)
    still = bench.run(ended, DPO(beta=1.0), rows, long)
    moving = bench.run(ended, DPO(beta=1.0), rows, dataclasses.replace(long, reference_sync_steps=10))
    assert moving.end.kl > 1.2 * still.end.kl


def test_fewer_rows_than_a_batch_are_gone_through_again_and_again(ended: bench.World) -> None:
    found = bench.run(ended, SFT(), bench.demonstrations(ended, 5), SHORT)
    assert [step for step, _ in found.points] == [0, 5, 10, 12]


@pytest.mark.parametrize("objective", [RewardModel(), ProcessReward()], ids=["reward", "prm"])
def test_a_reward_model_learns_the_reward(ended: bench.World, objective: object) -> None:
    made = bench.ratings(ended, 5000, k=2) if isinstance(objective, RewardModel) else bench.steps(ended, 5000)
    learnt = bench.learn_reward(ended, objective, made, bench.Training(steps=100, batch_size=32))
    p = ended.reference.exp()
    centred = learnt - (p * learnt).sum(1, keepdim=True)
    spread = math.sqrt(expected(ended.reference, centred.square()))
    assert expected(ended.reference, centred * ended.gold) / spread > 0.3  # correlation
    beta = bench.price(ended.reference, learnt, 0.5)
    found = bench.measure(ended, bench.tilted(ended.reference, learnt, beta))
    assert found.kl == pytest.approx(0.5, abs=1e-9) and found.gold > 0.2


def test_values_are_those_of_the_policy(ended: bench.World) -> None:
    from prefopt.batch import Batch
    from prefopt.bench.training import _scorer
    from prefopt.models.policy import Policy

    rows = bench.ratings(ended, 6, k=3, seed=3)
    model = _scorer(ended, "completion", seed=0)
    with torch.no_grad():
        value = Policy(model, "tree")(Batch.of(rows)).value
    table, batch = bench.exact_values(model, ended.space), Batch.of(rows)
    prompt, completion = ended.space.find(batch)
    by_table = table[prompt[batch.group], completion][ended.space.real[completion]]
    assert value is not None and torch.allclose(value.double(), by_table, rtol=0, atol=1e-5)
    assert value.std() > 1e-3
