from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from prefopt import bench
from prefopt.bench.online import Rollouts, draw
from prefopt.loop import Models
from prefopt.models.policy import Policy
from prefopt.objectives import GRPO, RLOO

SHORT = bench.Training(steps=12, every=6, completions=4)


def test_rloo_with_kl_in_the_reward_comes_close_to_the_frontier(small: bench.World) -> None:
    """The gate: beta 0.5, 128 completions an update. It takes all of sampling, advantage, KL, loss, loop, optimiser."""
    found = bench.run(small, RLOO(beta=0.5), None, bench.Training(steps=300, every=300))
    assert found.end.efficiency is not None and found.end.efficiency >= 0.90
    target = bench.frontier(small, 0.5)
    assert found.end.kl == pytest.approx(target.kl, rel=0.15) and found.end.gold == pytest.approx(target.gold, rel=0.15)


@pytest.mark.parametrize("fixture", ["small", "ended"])
def test_completions_are_drawn_as_often_as_the_policy_says(fixture: str, request: pytest.FixtureRequest) -> None:
    world: bench.World = request.getfixturevalue(fixture)
    prompt = torch.zeros(20_000, dtype=torch.int64)
    tokens, logp = draw(Policy(world.model), world.space, prompt, torch.Generator().manual_seed(0))
    first = torch.bincount(tokens[:, 0], minlength=world.space.num_tokens) / len(tokens)
    exact = bench.exact_logp(world.model, world.space)[0].exp()
    expected = torch.zeros(world.space.num_tokens, dtype=torch.float64).index_add(0, world.space.tokens[:, 0], exact)
    assert torch.allclose(first.double(), expected, atol=4 * 0.5 / len(tokens) ** 0.5)
    assert logp.sum(1).exp().max() <= exact.max() + 1e-5


def test_a_rollout_knows_the_log_probs_and_rewards_of_what_it_drew(ended: bench.World) -> None:
    batch = Rollouts(ended, GRPO(), 3, seed=1).rollout(Policy(ended.model))
    prompt, completion = ended.space.find(batch)
    assert batch.num_prompts == 16 and batch.num_completions == 48
    assert torch.allclose(batch.score, ended.gold[prompt[batch.group], completion].float())
    exact = ended.reference[prompt[batch.group], completion].float()
    assert torch.allclose(batch.sum_tokens(batch.rollout_logp), exact, atol=1e-4)
    other = -ended.gold
    assert torch.allclose(
        Rollouts(ended, GRPO(), 3, seed=1, reward=other).rollout(Policy(ended.model)).score, -batch.score
    )


def test_several_updates_of_a_rollout_keep_the_policy_that_drew_it(ended: bench.World) -> None:
    source = Rollouts(ended, GRPO(), 4, updates=2, minibatches=2)
    policy = Policy(ended.policy_model(), "padded")
    batches = source.batches(Models(policy, ended.lookup()))
    first = [next(batches)[0] for _ in range(4)]
    assert [batch.num_prompts for batch in first] == [8, 8, 8, 8]
    assert torch.equal(first[0].completions.values, first[2].completions.values)
    assert torch.equal(first[0].targets.old_logp, first[2].targets.old_logp)
    assert torch.allclose(first[0].targets.old_logp, first[0].rollout_logp, atol=1e-4)
    with torch.no_grad():
        for p in policy.model.parameters():
            p.mul_(1.5)
    assert torch.equal(first[1].completions.values, first[3].completions.values)
    again, _ = next(batches)
    assert not torch.equal(again.targets.old_logp, first[0].targets.old_logp)


def test_an_online_run_is_a_function_of_its_arguments(ended: bench.World) -> None:
    first, again = (bench.run(ended, RLOO(), None, SHORT) for _ in range(2))
    other = bench.run(ended, RLOO(), None, replace(SHORT, seed=1))
    assert first.end == again.end != other.end
    assert [step for step, _ in first.points] == [0, 6, 12]
