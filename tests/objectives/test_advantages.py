"""Baselines and scales, by hand: rewards that are missing, alone or all equal, and rollouts shared by processes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prefopt import ranks
from prefopt.batch import Batch
from prefopt.objectives.advantages import (
    batch_moments,
    batch_scaled,
    beta_density,
    beta_normalised,
    beta_parameters,
    centred,
    group_std,
    leave_one_out,
    normalised,
    over_mean,
)
from prefopt.records import Example, InputError

MISSING = math.nan


def rollout(*groups: list[float]) -> Batch:
    """One prompt for each list of rewards; completions of one and two tokens in turn."""
    return Batch.of(
        [
            Example(
                [1],
                [[2] * (1 + i % 2) for i in range(len(group))],
                group,
                [[True] * (1 + i % 2) for i in range(len(group))],
            )
            for group in groups
        ]
    )


def found(advantage: Any, *groups: list[float]) -> list[float]:
    batch = rollout(*groups)
    result = advantage(batch, batch.score)
    assert result.shape == batch.score.shape and result.dtype == batch.score.dtype
    return [float(x) for x in result]


# Means 2 and 1. Squared distances 4 + 1 + 9 = 14 over 3 - 1, so 7; 1 + 1 over 2 - 1, so 2.
GROUPS = ([0.0, 1.0, 5.0], [0.0, 2.0])


def test_centred_by_hand() -> None:
    assert found(centred, *GROUPS) == [-2.0, -1.0, 3.0, -1.0, 1.0]


def test_normalised_by_hand() -> None:
    three, two = math.sqrt(7) + 1e-4, math.sqrt(2) + 1e-4
    expected = [-2 / three, -1 / three, 3 / three, -1 / two, 1 / two]
    assert found(normalised, *GROUPS) == pytest.approx(expected, rel=1e-6)


def test_leave_one_out_by_hand() -> None:
    """0 - (1 + 5)/2, 1 - (0 + 5)/2, 5 - (0 + 1)/2; 0 - 2, 2 - 0."""
    assert found(leave_one_out, *GROUPS) == pytest.approx([-3.0, -1.5, 4.5, -2.0, 2.0])


def test_over_mean_by_hand() -> None:
    assert found(over_mean, *GROUPS) == pytest.approx([-1.0, -0.5, 1.5, -1.0, 1.0])


def test_batch_scaled_by_hand() -> None:
    """All five: mean 8/5, squared distances 2.56 + 0.36 + 11.56 + 2.56 + 0.16 = 17.2 over 4."""
    scale = math.sqrt(4.3) + 1e-4
    assert found(batch_scaled, *GROUPS) == pytest.approx([x / scale for x in (-2, -1, 3, -1, 1)], rel=1e-6)


# Shares of success 1/4 and 3/4: mean 1/2, variance 1/8. 1/4 / (1/8) - 1 = 1, so a = b = 1/2, and both parameters 7/6.
BINARY = ([1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0])


def test_beta_normalised_by_hand() -> None:
    # B(7/6, 7/6) = gamma(7/6)^2 / gamma(7/3)
    density = (0.25 * 0.75) ** (1 / 6) / (math.gamma(7 / 6) ** 2 / math.gamma(7 / 3))
    expected = [x / density for x in (0.75, -0.25, -0.25, -0.25, 0.25, 0.25, -0.75, 0.25)]
    assert found(beta_normalised(0.0, 1.0), *BINARY) == pytest.approx(expected, rel=1e-6)


def test_beta_normalised_reads_rewards_as_shares_of_their_range() -> None:
    stretched = [[2 * reward - 1 for reward in group] for group in BINARY]
    expected = found(beta_normalised(0.0, 1.0), *BINARY)
    assert found(beta_normalised(-1.0, 1.0), *stretched) == pytest.approx(expected, rel=1e-6)


def test_a_beta_of_three_halves_is_grpos_scale_and_of_one_is_none() -> None:
    """Beta(3/2, 3/2) at p is sqrt(p (1 - p)) / B(3/2, 3/2), and B(3/2, 3/2) is pi / 8."""
    p = torch.tensor([0.1, 0.5, 0.9]).double()
    halves, one = torch.tensor(1.5).double(), torch.tensor(1.0).double()
    assert torch.allclose(beta_density(p, halves, halves), (p * (1 - p)).sqrt() * 8 / math.pi, rtol=1e-12)
    assert torch.allclose(beta_density(p, one, one), torch.ones(3).double(), rtol=1e-12)


def test_prompts_of_one_success_rate_are_left_as_they_are_and_so_are_widely_spread_ones() -> None:
    """No variance: nothing to fit. Rates of 0 and 1 only: the fit is below Beta(1, 1), which is the least."""
    assert found(beta_normalised(0.0, 1.0), [1.0, 0.0], [0.0, 1.0]) == pytest.approx([0.5, -0.5, -0.5, 0.5])
    parameters = beta_parameters(torch.tensor(0.5).double(), torch.tensor(0.7).double())
    assert [float(x) for x in parameters] == [1.0, 1.0]


def test_nearly_equal_success_rates_give_finite_advantages() -> None:
    assert all(map(math.isfinite, found(beta_normalised(0.0, 1.0), [0.2, 0.8], [0.2, 0.8 + 1e-6])))


@pytest.mark.parametrize("reward", [-0.5, 1.5])
def test_a_reward_outside_the_range_is_refused(reward: float) -> None:
    with pytest.raises(InputError, match=rf"a reward of {reward:g} is not within 0 to 1; set lowest and highest"):
        found(beta_normalised(0.0, 1.0), [0.0, reward])


def test_a_reward_below_zero_is_refused_where_it_would_be_divided_by() -> None:
    with pytest.raises(InputError, match="a reward of -1 is below 0: maxrl divides by the mean reward"):
        found(over_mean, [0.0, -1.0])


# ---------------------------------------------------------------- missing, alone, equal

EVERY = {
    "centred": centred,
    "normalised": normalised,
    "leave_one_out": leave_one_out,
    "over_mean": over_mean,
    "batch_scaled": batch_scaled,
    "beta_normalised": beta_normalised(0.0, 1.0),
}
every_advantage = pytest.mark.parametrize("advantage", EVERY.values(), ids=EVERY)


@every_advantage
def test_a_completion_without_a_reward_has_none_and_changes_no_other(advantage: Any) -> None:
    """It leaves means, spreads and counts, whether it is first, in the middle, or all that a prompt has."""
    expected = found(advantage, [0.0, 1.0, 0.5], [0.25, 1.0])
    given = found(advantage, [MISSING, 0.0, 1.0, MISSING, 0.5], [MISSING, MISSING], [0.25, 1.0, MISSING])
    assert [given[i] for i in (1, 2, 4, 7, 8)] == expected
    assert [given[i] for i in (0, 3, 5, 6, 9)] == [0.0] * 5


@every_advantage
def test_a_lone_scored_completion_has_nothing_to_be_compared_with(advantage: Any) -> None:
    assert found(advantage, [0.75, MISSING], [0.25, 1.0])[:2] == [0.0, 0.0]


@every_advantage
@pytest.mark.parametrize("reward", [0.0, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("size", [2, 7, 11])
def test_equal_rewards_give_exactly_nothing(advantage: Any, reward: float, size: int) -> None:
    """A mean of float32 numbers is off by a rounding, which a spread of the same size would blow up."""
    assert found(advantage, [reward] * size) == [0.0] * size
    assert found(advantage, [reward] * size, [0.0, 1.0])[:size] == [0.0] * size


def test_the_spread_of_one_is_zero() -> None:
    batch = rollout([3.0], [1.0, MISSING])
    assert group_std(batch, batch.score).tolist() == [0.0, 0.0, 0.0]


# ---------------------------------------------------------------- several processes


def on_ranks(monkeypatch: Any, shares: list[tuple[Batch, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """The moments that each of several processes computes, each holding a batch and numbers."""
    sent: list[Tensor] = []
    monkeypatch.setattr(ranks, "gather", lambda value: sent.append(value) or [value])
    for batch, x in shares:
        batch_moments(batch, x)
    monkeypatch.setattr(ranks, "gather", lambda value: list(sent))
    return [batch_moments(batch, x) for batch, x in shares]


def test_moments_are_those_of_all_processes_without_copies_and_missing_numbers(monkeypatch: Any) -> None:
    """1, 2 and 6: mean 3, squared distances 4 + 1 + 9 over 2."""
    first, second = rollout([1.0, 2.0]), rollout([6.0, MISSING])
    filler = Batch(**{**vars(first), "filler": True})
    shares = [(first, first.score), (second, second.score), (filler, filler.score)]
    for mean, std in on_ranks(monkeypatch, shares):
        assert float(mean) == pytest.approx(3.0, rel=1e-12) and float(std) == pytest.approx(math.sqrt(7), rel=1e-12)


def test_moments_of_nothing_and_of_one() -> None:
    batch = rollout([MISSING, MISSING])
    assert [float(x) for x in batch_moments(batch, batch.score)] == [0.0, 0.0]
    assert [float(x) for x in batch_moments(batch, torch.tensor([4.0]))] == [4.0, 0.0]


JOB = """
import json, multiprocessing, sys
from dataclasses import replace
import torch
import torch.distributed as dist
from prefopt.loop import Models
from prefopt.objectives import BNPO, LitePPO, ReinforcePP
from laws import apart, batch_from, rows

METHODS = {"bnpo": BNPO(), "lite_ppo": LitePPO(), "reinforce_pp": ReinforcePP(), "group": ReinforcePP(baseline="group")}

def advantages(batch, models):
    with torch.no_grad():
        return {name: each.targets(batch, models).advantage.tolist() for name, each in METHODS.items()}

def process(rank, store, out):
    # two prompts, three processes: the last holds a copy
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
    shares = [whole.take(0, 1), whole.take(1, 2), replace(whole.take(0, 1), filler=True)]
    out[rank] = advantages(shares[rank], models)
    dist.barrier()
    dist.destroy_process_group()

torch.set_num_threads(1)
whole, models = batch_from("prompts", rows("prompts", num=2)), apart()
alone = advantages(whole, models)
context = multiprocessing.get_context("fork")
with context.Manager() as manager:
    out = manager.dict()
    children = [context.Process(target=process, args=(rank, sys.argv[1], out)) for rank in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    print(json.dumps([alone, *(out[rank] for rank in range(3))]))
"""


def test_processes_have_the_advantages_of_one(tmp_path: Path) -> None:
    """Over gloo, for the methods that look at the whole rollout."""
    here = str(Path(__file__).parent.parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": here}
    command = [sys.executable, "-c", JOB, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    alone, first, second, copy = json.loads(done.stdout.splitlines()[-1])
    for name, expected in alone.items():
        assert first[name] + second[name] == pytest.approx(expected, rel=1e-9), name
        assert copy[name] == pytest.approx(first[name], rel=1e-9), name
        assert max(map(abs, expected)) > 0.1
