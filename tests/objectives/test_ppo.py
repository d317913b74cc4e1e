"""PPO by hand: rewards of tokens, whitening, both clippings, and what a rollout keeps over several updates."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from laws import apart, batch_of, far, one_update, together, with_critic

from prefopt import ranks
from prefopt.batch import Batch, Outputs
from prefopt.loop import Models
from prefopt.models.critic import ActorCritic, new_value_head
from prefopt.objectives import PPO
from prefopt.objectives.ppo import Experience, foresight, moments, token_rewards, whitened
from prefopt.records import Example


def wide(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def batch_with(scores: list[float], trained: list[list[bool]]) -> Batch:
    return Batch.of([Example([1], [[1] * len(flags) for flags in trained], scores, trained)])


# two completions, of three tokens and of two; the second's last token is not the policy's
BATCH = batch_with([2.0, -1.0], [[True] * 3, [True, False]])


def says(logp: torch.Tensor, value: torch.Tensor, reference: torch.Tensor | None = None, several: bool = True) -> Any:
    """Models that say what they are told."""
    out = Outputs(logp, value=value)
    return SimpleNamespace(policy=lambda batch: out, reference=lambda batch: reference, several=several)


# ---------------------------------------------------------------- what a rollout is turned into


def test_the_score_comes_with_the_last_token_that_the_policy_wrote_and_the_pull_with_each():
    # -0.1 x log-ratio at each trained token; 2 at the third token, -1 at the fourth, whose successor is tool output
    log_ratio = wide(1.0, -2.0, 0.5, 3.0, 100.0)
    found = token_rewards(BATCH, log_ratio, 0.1)
    assert found.tolist() == pytest.approx([-0.1, 0.2, 1.95, -1.3, 0.0])
    assert token_rewards(BATCH, None, 0.1).tolist() == [0.0, 0.0, 2.0, -1.0, 0.0]


def test_targets_by_hand():
    # gamma 1, lambda 1, no whitening: rewards to come less values. log-ratios 1, 0, 0 and 2 at beta 0.5
    # first: -0.5 + 0 + 2 = 1.5, 2, 2; second: -1 - 1 = -2
    logp, reference = wide(-1.0, -1.0, -1.0, -1.0, -1.0), wide(-2.0, -1.0, -1.0, -3.0, -9.0)
    value = wide(0.5, 1.0, 3.0, -1.0, 7.0)
    found = PPO(beta=0.5, gae_lambda=1.0, whiten="none").targets(BATCH, says(logp, value, reference))
    assert found.advantage.tolist() == [1.0, 1.0, -1.0, -1.0, 0.0]
    assert found.returns[:4].tolist() == [1.5, 2.0, 2.0, -2.0]
    assert torch.equal(found.value, value) and torch.equal(found.old_logp, logp)
    assert found.kl.tolist() == [1.0, 2.0]


def test_advantages_are_whitened_and_returns_are_not():
    """The critic must learn the rewards' own size: returns are advantages before whitening plus values."""
    logp, value = wide(*[0.0] * 5), wide(0.5, 1.0, 3.0, -1.0, 7.0)
    plain = PPO(beta=0.0, gae_lambda=1.0, whiten="none").targets(BATCH, says(logp, value))
    found = PPO(beta=0.0, gae_lambda=1.0).targets(BATCH, says(logp, value))
    assert torch.equal(found.returns, plain.returns)
    assert plain.returns[:4].tolist() == [2.0, 2.0, 2.0, -1.0]
    # advantages 1.5, 1, -1, 0 over the four tokens that are trained: mean 0.375, variance 17/16 - 9/64 = 0.921875
    wanted = [(x - 0.375) / math.sqrt(0.921875) for x in (1.5, 1.0, -1.0, 0.0)] + [0.0]
    assert found.advantage.tolist() == pytest.approx(wanted, rel=1e-6)


def test_whitened_rewards_have_standard_deviation_one_and_their_old_mean():
    # rewards of the trained tokens 0, 0, 2, -1: mean 0.25, variance 5/4 - 1/16 = 1.1875
    logp, value = wide(*[0.0] * 5), wide(*[0.0] * 5)
    found = PPO(beta=0.0, gae_lambda=0.0, gamma=1.0, whiten="rewards").targets(BATCH, says(logp, value))
    wanted = [0.25 + (x - 0.25) / math.sqrt(1.1875) for x in (0.0, 0.0, 2.0, -1.0)] + [0.0]
    assert found.advantage.tolist() == pytest.approx(wanted, rel=1e-6)


def test_a_completion_without_a_score_takes_no_part():
    """Neither in the loss, the count and the metrics, nor in what others are whitened by."""
    three = batch_with([2.0, math.nan, -1.0], [[True] * 3, [True] * 2, [True]])
    two = batch_with([2.0, -1.0], [[True] * 3, [True]])
    objective, keep = PPO(beta=0.1), torch.tensor([True, True, True, False, False, True])
    logp, value, reference = wide(*[-1.0] * 6), wide(0.5, 1.0, 3.0, 8.0, -8.0, 0.5), wide(*[-2.0] * 6)
    logp, value = logp.requires_grad_(), value.requires_grad_()
    models = says(logp.detach(), value.detach(), reference)
    targets = objective.targets(three, models)
    loss, seen = objective.loss(three, Outputs(logp, value=value), targets)
    loss.backward()
    fewer = says(logp.detach()[keep], value.detach()[keep], reference[keep])
    wanted, metrics = objective.loss(two, fewer.policy(two), objective.targets(two, fewer))
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    assert seen.keys() == metrics.keys()
    for name, x in seen.items():
        torch.testing.assert_close(x.detach(), metrics[name], msg=name)
    assert int(objective.count(three)) == int(objective.count(two)) == 4
    assert (logp.grad[~keep] == 0).all() and (value.grad[~keep] == 0).all()
    assert (logp.grad[keep] != 0).all()


def test_what_varies_not_is_whitened_to_nothing():
    at = torch.ones(3, dtype=torch.bool)
    assert whitened(batch_with([0.0], [[True] * 3]), torch.full((3,), 0.1), at).abs().max() < 1e-3


def test_moments_are_those_of_all_processes_and_a_filler_adds_nothing(monkeypatch):
    x, at = wide(1.0, 2.0, 6.0), torch.tensor([True, True, False])
    batch = batch_with([0.0], [[True] * 3])
    monkeypatch.setattr(ranks, "gather", lambda own: [own, wide(3.0)])
    mean, variance = moments(batch, x, at)
    assert mean.item() == 2.0 and variance.item() == pytest.approx(2 / 3)
    mean, variance = moments(replace(batch, filler=True), x, at)
    assert mean.item() == 3.0 and variance.item() == 0.0


def test_foresight_is_the_explained_variance():
    # came 1, 2, 3, 6: mean 3, variance 14/4. value 0, 2, 2, 4 errs by 1, 0, 1, 2: mean 1, variance 2/4
    batch = batch_with([0.0], [[True] * 4])
    found = foresight(batch, wide(1.0, 2.0, 3.0, 6.0), wide(0.0, 2.0, 2.0, 4.0), batch.trained)
    assert found.mean().item() == pytest.approx(1 - 2 / 14)
    assert foresight(batch, wide(*[3.0] * 4), wide(0.0, 2.0, 2.0, 4.0), batch.trained) is None


def test_explained_variance_is_of_rewards_that_came_not_of_returns_that_hold_the_critics_own_values():
    """At lambda 0 returns lean on the values themselves: one that foresees nothing would seem to explain them."""
    value = wide(5.0, -5.0, 5.0, -5.0, 0.0)
    one = PPO(beta=0.0, gae_lambda=0.0).targets(BATCH, says(wide(*[0.0] * 5), value))
    two = PPO(beta=0.0, gae_lambda=1.0).targets(BATCH, says(wide(*[0.0] * 5), value))
    assert torch.equal(one.foresight, two.foresight)
    # 2, 2, 2 and -1 came, and 5, -5, 5 and -5 were foreseen
    assert one.foresight[:4].mean().item() < 0


# ---------------------------------------------------------------- the loss


def experience(advantage: torch.Tensor, returns: torch.Tensor, value: torch.Tensor, old: torch.Tensor) -> Experience:
    return Experience(advantage, returns, value, None, old, None)


ONE = batch_with([1.0], [[True] * 4])
ZERO = wide(*[0.0] * 4)


def test_the_clipped_loss_by_hand_and_no_gradient_where_it_is_clipped():
    # ratios 1.1, 1.5, 0.5, 1.5 with A = 2, 2, -1, -1: -2.2; clipped -2 x 1.2; clipped 0.8; 1.5, not clipped
    logp = wide(1.1, 1.5, 0.5, 1.5).log().requires_grad_()
    targets = experience(wide(2.0, 2.0, -1.0, -1.0), ZERO, ZERO, ZERO)
    loss, seen = PPO(beta=0.0).loss(ONE, Outputs(logp, value=ZERO), targets)
    loss.backward()
    assert seen["policy/loss"].tolist() == pytest.approx([-2.2, -2.4, 0.8, 1.5])
    assert loss.item() == pytest.approx(-2.2 - 2.4 + 0.8 + 1.5)
    # the gradient of r A is r A
    assert logp.grad.tolist() == pytest.approx([-2.2, 0.0, 0.0, 1.5])
    assert seen["clip_fraction/high"].tolist() == [0, 1, 0, 0]
    assert seen["clip_fraction/low"].tolist() == [0, 0, 1, 0]
    # r - 1 - log r
    wanted = [r - 1 - math.log(r) for r in (1.1, 1.5, 0.5, 1.5)]
    assert seen["kl_old"].tolist() == pytest.approx(wanted)


def test_the_value_loss_by_hand_and_no_gradient_where_it_is_clipped():
    # old values 0, kept within 0.2. V = 0.1, R = 1: (0.9)^2 / 2 either way. V = 0.5, R = 1: kept 0.2, 0.8^2 / 2 is
    # larger than 0.5^2 / 2, no gradient. V = 0.5, R = -1: 1.5^2 / 2 is larger than 1.2^2 / 2. V = -0.3, R = 0: 0.3^2 /
    # 2 is larger than 0.2^2 / 2
    value = wide(0.1, 0.5, 0.5, -0.3).requires_grad_()
    targets = experience(ZERO, wide(1.0, 1.0, -1.0, 0.0), ZERO, ZERO)
    loss, seen = PPO(beta=0.0, value_weight=0.5).loss(ONE, Outputs(ZERO, value=value), targets)
    loss.backward()
    assert seen["value/loss"].tolist() == pytest.approx([0.405, 0.32, 1.125, 0.045])
    assert loss.item() == pytest.approx(0.5 * (0.405 + 0.32 + 1.125 + 0.045))
    # value_weight x (V - R)
    assert value.grad.tolist() == pytest.approx([-0.45, 0.0, 0.75, -0.15])
    assert seen["value/clip_fraction"].tolist() == [0, 1, 0, 0]


def test_without_value_clip_the_error_alone_counts():
    value = wide(0.1, 0.5, 0.5, -0.3).requires_grad_()
    targets = experience(ZERO, wide(1.0, 1.0, -1.0, 0.0), ZERO, ZERO)
    loss, seen = PPO(beta=0.0, value_weight=1.0, value_clip=None).loss(ONE, Outputs(ZERO, value=value), targets)
    loss.backward()
    assert value.grad.tolist() == pytest.approx([-0.9, -0.5, 1.5, -0.3])
    assert seen["value/clip_fraction"].tolist() == [0, 0, 0, 0]


def test_entropy_is_rewarded():
    entropy = wide(1.0, 2.0, 3.0, 4.0).requires_grad_()
    targets = experience(ZERO, ZERO, ZERO, ZERO)
    loss, seen = PPO(entropy_bonus=0.25).loss(ONE, Outputs(ZERO, entropy, ZERO), targets)
    loss.backward()
    assert loss.item() == -2.5 and entropy.grad.tolist() == [-0.25] * 4
    assert PPO(entropy_bonus=0.25).extras == ("entropy",) and PPO().extras == ()


def test_dual_clip_stops_a_token_that_did_worse_than_expected():
    logp = wide(4.0, 2.0, 4.0, 1.0).log().requires_grad_()
    targets = experience(wide(-1.0, -1.0, 1.0, 1.0), ZERO, ZERO, ZERO)
    PPO(dual_clip=3.0).loss(ONE, Outputs(logp, value=ZERO), targets)[0].backward()
    assert logp.grad.tolist() == pytest.approx([0.0, 2.0, 0.0, -1.0])


@pytest.mark.fault(30)
def test_the_samplers_gap_is_corrected_for():
    """Weights trainer / sampler of e^0.5, and of e^2 cut at 2, on the policy's part of the loss alone."""
    batch = replace(ONE, rollout_logp=wide(-0.5, -2.0, 0.0, 0.0))
    targets = experience(wide(1.0, 1.0, 1.0, 1.0), wide(*[1.0] * 4), ZERO, ZERO)
    found = PPO(correction="token", value_weight=0.0).loss(batch, Outputs(ZERO, value=ZERO), targets)[0]
    assert found.item() == pytest.approx(-(math.exp(0.5) + 2 + 1 + 1))
    with pytest.raises(ValueError, match="correction needs the sampler's log-probs"):
        PPO(correction="token").loss(ONE, Outputs(ZERO, value=ZERO), targets)


# ---------------------------------------------------------------- with models


def test_advantages_and_old_values_stay_those_of_the_rollout():
    """The second update sees a policy and a critic that have moved, and what the first one was given."""
    objective, batch = PPO(), batch_of("prompts")
    models = replace(far(objective), several=True)
    with torch.no_grad():
        targets = objective.targets(batch, models)
    moved = replace(batch, targets=targets)
    other = with_critic(apart(seed=7), seed=300)
    first, second = one_update(objective, moved, models), one_update(objective, moved, other)
    assert first.metrics["ratio"] == pytest.approx(1.0, abs=1e-12)
    assert second.metrics["ratio"] != pytest.approx(1.0, abs=0.1) and second.metrics["kl_old"] > 0.1
    for name in ("value/returns", "value/explained_variance", "kl_reference"):
        assert first.metrics[name] == pytest.approx(second.metrics[name], rel=1e-12)


def test_one_update_finds_the_policy_as_it_was():
    objective, batch = PPO(), batch_of("prompts")
    with torch.no_grad():
        targets = objective.targets(batch, far(objective))
    assert targets.old_logp is None


def test_parts_of_a_rollout_hold_what_was_measured_over_all_of_it():
    """Cut into updates, prompts keep the advantages that were whitened together."""
    objective, batch = PPO(), batch_of("prompts")
    with torch.no_grad():
        whole = replace(batch, targets=objective.targets(batch, replace(far(objective), several=True)))
    pieces = [whole.take(g, g + 1).targets for g in range(batch.num_prompts)]
    for field in ("advantage", "returns", "value", "old_logp", "foresight", "kl"):
        assert torch.equal(torch.cat([getattr(piece, field) for piece in pieces]), getattr(whole.targets, field))


@pytest.mark.parametrize("tokens", [1, 40])
def test_a_shared_trunk_keeps_the_laws_of_an_own_critic(tokens):
    """Any token budget and either layout give the same update."""
    objective, batch = PPO(), batch_of("prompts")

    def shared(layout: Any) -> Models:
        models = apart(layout=layout)
        policy: Any = models.policy
        policy.value = new_value_head(policy)
        with torch.no_grad():
            policy.value.linear.weight.copy_(torch.sin(torch.arange(16.0)))
        return replace(models, policy=ActorCritic(policy))

    whole = one_update(objective, batch, shared("tree"))
    for found in (one_update(objective, batch, shared("tree"), tokens), one_update(objective, batch, shared("padded"))):
        assert torch.allclose(found.gradient, whole.gradient, rtol=1e-9, atol=1e-12)
        assert found.metrics == pytest.approx(whole.metrics, rel=1e-9, abs=1e-12)


def test_without_a_critic_it_says_which_model_to_take():
    with pytest.raises(ValueError, match="score with prefopt"):
        PPO().targets(batch_of("prompts"), together())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta": -1.0}, "beta"),
        ({"value_clip": 0.0}, "value_clip must be above 0"),
        ({"gamma": 0.0}, "gamma must be above 0"),
        ({"gamma": 1.1}, "gamma"),
        ({"gae_lambda": -0.1}, "gae_lambda must be between 0 and 1"),
        ({"dual_clip": 1.1}, "dual_clip must be above 1"),
        ({"correction_cap": 3.0}, "correction_cap does nothing without correction"),
    ],
)
def test_options_out_of_range_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        PPO(**options)
