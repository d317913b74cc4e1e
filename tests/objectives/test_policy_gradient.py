"""Methods on groups by hand: ratios and where they stop, aggregation, KL, weights for the sampler, and their traps."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from prefopt.batch import Batch, Outputs, parts
from prefopt.loop import Models
from prefopt.objectives import (
    BNPO,
    CISPO,
    DAPO,
    GRPO,
    GSPO,
    RLOO,
    SAPO,
    DrGRPO,
    LitePPO,
    MaxRL,
    ReinforcePP,
)
from prefopt.objectives.facts import fitted
from prefopt.objectives.policy_gradient import Rollout, clipped_loss, correction_weight, kl_loss
from prefopt.records import Example

METHODS: dict[str, Any] = {
    method.facts.name: fitted(method, 8, 2)
    for method in (
        GRPO(),
        DrGRPO(),
        DAPO(),
        GSPO(),
        CISPO(),
        BNPO(),
        LitePPO(),
        RLOO(beta=0.0),
        ReinforcePP(beta=0.0),
        SAPO(),
        MaxRL(),
    )
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
DOUBLE = torch.float64


def rollout(*lengths: int, score: list[float] | None = None, untrained: tuple[int, ...] = ()) -> Batch:
    """One prompt whose completions have these lengths; untrained: numbers of tokens, laid end to end."""
    scores = [float(i % 2) for i in range(len(lengths))] if score is None else score
    batch = Batch.of([Example([1], [[2] * n for n in lengths], scores, [[True] * n for n in lengths])])
    batch.trained[list(untrained)] = False
    return replace(batch, score=batch.score.double())


def step(method: Any, batch: Batch, ratio: Any, advantage: Any = None) -> tuple[float, list[float], dict[str, Tensor]]:
    """Loss sum, its derivative by each token's log-prob, and metrics, where the policy has moved by `ratio` [K].

    advantage [K]: in place of that of the rewards.
    """
    old = torch.full((len(batch.trained),), -2.0, dtype=DOUBLE)
    if advantage is None:
        with torch.no_grad():
            advantage = method.targets(batch, Models(lambda part: Outputs(old))).advantage
    targets = Rollout(torch.as_tensor(advantage, dtype=DOUBLE), old)
    logp = (old + torch.as_tensor(ratio, dtype=DOUBLE).log()).requires_grad_()
    loss, seen = method.loss(batch, Outputs(logp), targets)
    loss.backward()
    assert logp.grad is not None
    return float(loss.detach()), logp.grad.tolist(), seen


# ---------------------------------------------------------------- ratios


def test_clipping_by_hand() -> None:
    """Ratios 0.5, 0.9, 1.1, 1.5 with clipping at 0.8 and 1.3, A of 2 and of -2.

    A = 2:   min(1, 1.6)    min(1.8, 1.8)    min(2.2, 2.2)    min(3, 2.6)
    A = -2:  min(-1, -1.6)  min(-1.8, -1.8)  min(-2.2, -2.2)  min(-3, -2.6)
    """
    ratio = torch.tensor([0.5, 0.9, 1.1, 1.5])
    assert clipped_loss(ratio, torch.tensor(2.0), 0.2, 0.3).tolist() == pytest.approx([-1.0, -1.8, -2.2, -2.6])
    assert clipped_loss(ratio, torch.tensor(-2.0), 0.2, 0.3).tolist() == pytest.approx([1.6, 1.8, 2.2, 3.0])


def test_a_second_bound_stops_what_is_to_fall_and_has_risen() -> None:
    """Where A is -2, a ratio of 4 counts as 3; where A is 2 it is clipped before."""
    ratio = torch.tensor([2.0, 4.0])
    assert clipped_loss(ratio, torch.tensor(-2.0), 0.2, 0.3, bound=3.0).tolist() == pytest.approx([4.0, 6.0])
    assert clipped_loss(ratio, torch.tensor(2.0), 0.2, 0.3, bound=3.0).tolist() == pytest.approx([-2.6, -2.6])
    one, many = rollout(1, 1), [4.0, 4.0]
    _, bounded, seen = step(GRPO(dual_clip=3.0), one, many, [-2.0, 2.0])
    assert bounded == [0.0, 0.0] and seen["clip_fraction/high"].tolist() == [1.0, 1.0]
    assert step(GRPO(), one, many, [-2.0, 2.0])[1] == pytest.approx([8.0, 0.0])


def test_the_gradient_stops_on_the_side_that_the_reward_has_already_moved_to() -> None:
    """A token's gradient is -A r, or 0. Ratios 0.7 and 1.25 are beyond 0.8 and 1.2, and 1.25 is within DAPO's 1.28."""
    batch, ratio = rollout(2, 2), [0.7, 1.25, 0.7, 1.25]
    advantage = [1.0, 1.0, -1.0, -1.0]
    _, gradient, seen = step(GRPO(), batch, ratio, advantage)
    assert gradient == pytest.approx([-0.7 / 2, 0.0, 0.0, 1.25 / 2])
    assert seen["clip_fraction/low"].tolist() == [0, 0, 1, 0] and seen["clip_fraction/high"].tolist() == [0, 1, 0, 0]
    assert seen["ratio"].tolist() == pytest.approx(ratio)
    _, gradient, seen = step(DAPO(), batch, ratio, advantage)
    assert gradient == pytest.approx([-0.7, -1.25, 0.0, 1.25])
    assert seen["clip_fraction/high"].tolist() == [0, 0, 0, 0]


def test_gspo_moves_and_stops_a_completion_as_one() -> None:
    """Geometric means sqrt(1.21) = 1.1 and 0.5: the first has risen beyond 1.05, where A is 2 it stops.

    Loss -(1.05 x 2 + 0.5 x 2); a token's gradient is that of the mean over its completion, -A s / |y|.
    """
    batch, ratio = rollout(2, 1), [1.21, 1.0, 0.5]
    loss, gradient, seen = step(GSPO(clip_low=0.1, clip_high=0.05), batch, ratio, [2.0, 2.0, 2.0])
    assert loss == pytest.approx(-(1.05 + 0.5) * 2)
    assert gradient == pytest.approx([0.0, 0.0, -1.0])
    assert seen["ratio"].tolist() == pytest.approx([1.1, 1.1, 0.5])
    loss, gradient, _ = step(GSPO(clip_low=0.1, clip_high=0.2), batch, ratio, [2.0, 2.0, 2.0])
    assert loss == pytest.approx(-(1.1 + 0.5) * 2)
    assert gradient == pytest.approx([-1.1, -1.1, -1.0])


def test_cispo_weights_every_token_and_stops_none() -> None:
    """w = 0.5, 5, 0.5, 5 of ratios 0.5, 9, 0.5, 9: gradient -w A, value -w A log p. K = 4."""
    batch, ratio, advantage = rollout(2, 2), [0.5, 9.0, 0.5, 9.0], [1.0, 1.0, -1.0, -1.0]
    loss, gradient, seen = step(CISPO(), batch, ratio, advantage)
    assert gradient == pytest.approx([-0.5, -5.0, 0.5, 5.0])
    assert loss == pytest.approx(0.0)
    assert seen["clip_fraction/high"].tolist() == [0, 1, 0, 1] and seen["clip_fraction/low"].tolist() == [0] * 4
    _, gradient, seen = step(CISPO(lowest=0.8), batch, ratio, advantage)
    assert gradient == pytest.approx([-0.8, -5.0, 0.8, 5.0])
    assert seen["clip_fraction/low"].tolist() == [1, 0, 1, 0]
    assert step(CISPO(), batch, ratio, [1.0] * 4)[0] == pytest.approx(
        -sum(w * (math.log(r) - 2) for w, r in zip([0.5, 5, 0.5, 5], ratio, strict=True))
    )


def test_rloo_weights_a_completion_by_the_product_of_its_ratios() -> None:
    """r = 2 x 1.5 = 3 and 0.5: loss -(3 - 0.5 x 2), gradient -A r at each token of the completion."""
    batch, ratio, advantage = rollout(2, 1), [2.0, 1.5, 0.5], [1.0, 1.0, -2.0]
    loss, gradient, seen = step(RLOO(), batch, ratio, advantage)
    assert loss == pytest.approx(-(3.0 - 1.0))
    assert gradient == pytest.approx([-3.0, -3.0, 1.0])
    assert seen["ratio"].tolist() == pytest.approx([3.0, 0.5]) and "clip_fraction/low" not in seen
    loss, gradient, seen = step(RLOO(clip=0.2), batch, ratio, advantage)
    assert loss == pytest.approx(-(1.2 - 0.8 * 2))
    assert gradient == [0.0, 0.0, 0.0]
    assert seen["clip_fraction/high"].tolist() == [1, 1, 0] and seen["clip_fraction/low"].tolist() == [0, 0, 1]


def test_sapos_gate_by_hand() -> None:
    """4/t sigmoid(t (r - 1)): at r = 1 the value is 2/t and the slope 1; at r = 2 with t = 1 the slope in r is
    4 s (1 - s), s = sigmoid(1) = 0.731059, so 0.786448, and that in the log-prob twice as much.
    """
    batch = rollout(1, 1)
    loss, gradient, _ = step(SAPO(), batch, [1.0, 1.0], [3.0, -3.0])
    assert loss == pytest.approx(-3 * 2 + 3 * 2 / 1.05)
    assert gradient == pytest.approx([-3.0, 3.0])
    assert step(SAPO(), batch, [2.0, 1.0], [3.0, -3.0])[1][0] == pytest.approx(-3 * 2 * 0.7864477, rel=1e-6)
    faster = step(SAPO(temperature_falling=5.0), batch, [1.0, 2.0], [3.0, -3.0])[1][1]
    slope = 1 / (1 + math.exp(-5.0))
    assert faster == pytest.approx(3 * 2 * 4 * slope * (1 - slope), rel=1e-9)


@pytest.mark.parametrize("name", ["gspo", "sapo"])
def test_at_a_ratio_of_one_the_gradient_is_grpos(name: str) -> None:
    """Neither differs before a second update of the same rollout."""
    batch = rollout(1, 3, 2, untrained=(2,))
    expected = step(METHODS["grpo"], batch, [1.0] * 6)[1]
    assert step(METHODS[name], batch, [1.0] * 6)[1] == pytest.approx(expected, rel=1e-12)
    apart = step(METHODS["grpo"], batch, [1.1] * 6)[1]
    assert step(METHODS[name], batch, [1.1] * 6)[1] != pytest.approx(apart, rel=1e-3)


# ---------------------------------------------------------------- aggregation


# Rewards 0 and 1 of completions with one and three tokens, one of these untrained: A is -1/2 and 1/2, for GRPO divided
# by sqrt(1/2) + 1e-4; for RLOO -1 and 1; for MaxRL divided by 1/2; for BNPO, of one prompt, -1/2 and 1/2. Lite PPO's
# spread is that of the one group. Over tokens 0, 1, 1: mean 2/3, squared distances 4/9 + 1/9 + 1/9 over 2, so 1/3.
GRPOS = 0.5 / (math.sqrt(0.5) + 1e-4)
PLUS = math.sqrt(1 / 3) + 1e-4
FIRST_SECOND_COUNT = {
    "grpo": (GRPOS, -GRPOS / 2, 2),
    "gspo": (GRPOS, -GRPOS / 2, 2),
    "sapo": (GRPOS, -GRPOS / 2, 2),
    "dr_grpo": (0.5 / 8, -0.5 / 8, 2),
    "dapo": (GRPOS, -GRPOS, 3),
    "lite_ppo": (GRPOS, -GRPOS, 3),
    "cispo": (GRPOS, -GRPOS, 3),
    "bnpo": (0.5, -0.5, 2),
    "rloo": (1.0, -1.0, 2),
    "maxrl": (1.0, -1.0, 2),
    "reinforce_pp": (2 / 3 / PLUS, -1 / 3 / PLUS, 3),
}


@pytest.mark.parametrize("name", METHODS)
def test_each_method_by_hand(name: str) -> None:
    """The derivative at the first completion's token and at each of the second's, and what the sum is divided by."""
    first, second, count = FIRST_SECOND_COUNT[name]
    batch = rollout(1, 3, untrained=(2,))
    _, gradient, _ = step(METHODS[name], batch, [1.0] * 4)
    assert gradient == pytest.approx([first, second, 0.0, second], rel=1e-9)
    assert int(METHODS[name].count(batch)) == count


@every_method
def test_a_mean_of_the_means_of_parts_is_not_what_is_taken(method: Any) -> None:
    """Two prompts, of two and of six tokens: the sums and counts of the parts are those of the whole."""
    batch = Batch.of(
        [
            Example([1], [[2], [2]], [0.0, 1.0], [[True], [True]]),
            Example([1], [[2] * 3, [2] * 3], [1.0, 0.0], [[True] * 3, [True] * 3]),
        ]
    )
    logp = torch.linspace(-3, -1, 8, dtype=DOUBLE)
    old = logp - torch.linspace(-0.1, 0.3, 8, dtype=DOUBLE)
    targets = method.targets(batch, Models(lambda part: Outputs(old)))._replace(old_logp=old)
    whole = method.loss(batch, Outputs(logp), targets)[0]
    losses, counts, at = [], [], 0
    for part, goal in parts(batch, targets, 1):
        size = len(part.trained)
        losses.append(float(method.loss(part, Outputs(logp[at : at + size]), goal)[0]))
        counts.append(int(method.count(part)))
        at += size
    assert sum(losses) == pytest.approx(float(whole), rel=1e-9) and sum(counts) == int(method.count(batch))
    means = sum(loss / count for loss, count in zip(losses, counts, strict=True)) / 2
    assert abs(means - float(whole) / sum(counts)) > 1e-3 or counts[0] == counts[1]


@every_method
def test_a_rollout_without_any_reward_teaches_nothing_and_counts_nothing(method: Any) -> None:
    batch = rollout(2, 3, score=[math.nan, math.nan])
    loss, gradient, seen = step(method, batch, [1.5] * 5)
    assert loss == 0.0 and gradient == [0.0] * 5 and int(method.count(batch)) == 0
    assert all(len(x) == 0 for x in seen.values())


@pytest.mark.parametrize("name", [name for name in METHODS if name != "reinforce_pp"])
def test_a_solved_prompt_gets_exactly_no_gradient(name: str) -> None:
    """Eleven rewards of 0.7, whose float32 mean is off by a rounding."""
    batch = rollout(*[2] * 11, score=[0.7] * 11)
    batch = replace(batch, score=batch.score.float())
    assert set(step(METHODS[name], batch, [1.3] * 22)[1]) == {0.0}


def test_an_untrained_token_far_from_where_it_was_leaves_a_finite_gradient() -> None:
    """Its ratio is infinite: text of a tool, say, that has become certain."""
    batch = rollout(2, 2, untrained=(1,))
    old = torch.tensor([-1.0, -2000.0, -1.0, -1.0], dtype=DOUBLE)
    logp = torch.tensor([-1.0, -0.1, -1.0, -1.0], dtype=DOUBLE, requires_grad=True)
    method = GRPO(beta=0.1, kl="k3_weighted", correction="token_mask")
    targets = Rollout(torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=DOUBLE), old, old)
    loss, _ = method.loss(replace(batch, rollout_logp=old), Outputs(logp), targets)
    loss.backward()
    assert logp.grad is not None and logp.grad.isfinite().all() and logp.grad[1] == 0


# ---------------------------------------------------------------- KL


def differences(kind: str, d: list[float]) -> list[float]:
    """Derivative of the KL loss by each token's log-prob at log-ratios d to the reference, policy unmoved."""
    batch = rollout(len(d), 1, score=[0.0, 1.0])
    reference = torch.zeros(len(d) + 1, dtype=DOUBLE)
    x = torch.tensor([*d, 0.0], dtype=DOUBLE, requires_grad=True)
    kl_loss(kind, batch, x, x - x.detach(), reference).sum().backward()
    assert x.grad is not None
    return x.grad[:-1].tolist()


def test_kl_terms_by_hand() -> None:
    """d of 1 and -2. k3: e^-d - 1 + d, slope 1 - e^-d. k2: (1 - 2)^2 / 2 of the completion, slope -1 at each token.

    Weighted: slope of the ratio 1 as well, so 1 - e^-d + (e^-d - 1 + d) = d.
    """
    d = torch.tensor([1.0, -2.0, 0.0])
    batch = rollout(2, 1)
    value = kl_loss("k3", batch, d, torch.zeros(3), torch.zeros(3))
    assert value.tolist() == pytest.approx([math.exp(-1), math.exp(2) - 3, 0.0], rel=1e-6)
    assert differences("k3", [1.0, -2.0]) == pytest.approx([1 - math.exp(-1), 1 - math.exp(2)])
    assert float(kl_loss("k2", batch, d, torch.zeros(3), torch.zeros(3)).sum()) == pytest.approx(0.5)
    assert differences("k2", [1.0, -2.0]) == pytest.approx([-1.0, -1.0])
    assert differences("k3_weighted", [1.0, -2.0]) == pytest.approx([1.0, -2.0])


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_a_token_far_below_the_reference_is_still_pulled_back(kind: str) -> None:
    """At d = -25 a term that is cut at some size would have no slope."""

    def value(d: float) -> float:
        batch, at = rollout(1, 1), torch.tensor([d, 0.0], dtype=DOUBLE)
        move = at - torch.tensor([-25.0, 0.0], dtype=DOUBLE)
        return float(kl_loss(kind, batch, at, move, torch.zeros(2, dtype=DOUBLE))[0])

    [slope] = differences(kind, [-25.0])
    assert slope == pytest.approx((value(-25 + 1e-5) - value(-25 - 1e-5)) / 2e-5, rel=1e-6)
    assert slope <= -25
    assert differences("k3_weighted", [-25.0]) == [-25.0]


class Fixed:
    """A policy and a reference with these log-probs, and how often each was asked."""

    def __init__(self, logp: list[float], reference: list[float], several: bool = False) -> None:
        self.logp, self.reference = (torch.tensor(x, dtype=DOUBLE) for x in (logp, reference))
        self.asked = 0
        self.models = Models(self._policy, lambda part: self.reference, several=several)

    def _policy(self, part: Batch) -> Outputs:
        self.asked += 1
        return Outputs(self.logp)


def test_in_a_group_of_equal_rewards_the_log_ratio_is_taken_off_as_it_is() -> None:
    """There is no spread to divide it by, and its own would blow it up.

    Two equal rewards, log-ratios of 3 and 1 nats, beta 0.1: 0.3 and 0.1, less their mean 0.2. RLOO: twice that.
    """
    batch, seen = rollout(2, 1, score=[1.0, 1.0]), Fixed([-1.0, -1.0, -1.0], [-2.0, -3.0, -2.0])
    for method in (GRPO, DrGRPO, DAPO, GSPO, CISPO, BNPO, LitePPO, SAPO, MaxRL):
        targets = fitted(method(beta=0.1), 8, 2).targets(batch, seen.models)
        assert targets.advantage.tolist() == pytest.approx([-0.1, -0.1, 0.1]), method
        assert targets.kl is not None and targets.kl.tolist() == [3.0, 1.0]
    assert RLOO(beta=0.1).targets(batch, seen.models).advantage.tolist() == pytest.approx([-0.2, -0.2, 0.2])


def test_reinforce_pp_takes_off_what_is_to_come_and_compares_over_all_tokens() -> None:
    """beta 0.1, rewards 1 and 0, log-ratios 1, 2 | 1: returns 1 - 0.3, 1 - 0.2, 0 - 0.1.

    Mean 1.4 / 3, and the spread of 0.7, 0.8, -0.1. With the group's baseline rewards are 1/2 and -1/2.
    """
    batch, seen = rollout(2, 1, score=[1.0, 0.0]), Fixed([-1.0, -1.0, -1.0], [-2.0, -3.0, -2.0])

    def normal(values: list[float]) -> list[float]:
        x = torch.tensor(values, dtype=DOUBLE)
        return ((x - x.mean()) / (x.std() + 1e-4)).tolist()

    found = ReinforcePP(beta=0.1).targets(batch, seen.models).advantage
    assert found.tolist() == pytest.approx(normal([0.7, 0.8, -0.1]), rel=1e-9)
    found = ReinforcePP(beta=0.1, baseline="group").targets(batch, seen.models).advantage
    assert found.tolist() == pytest.approx(normal([0.2, 0.3, -0.6]), rel=1e-9)


def test_the_pull_is_in_the_reward_or_in_the_loss_and_not_in_both() -> None:
    batch, seen = rollout(2, 1), Fixed([-1.0, -1.0, -1.0], [-2.0, -3.0, -2.0], several=True)
    free = GRPO().targets(batch, seen.models)
    reward, loss = (GRPO(beta=0.1, kl=kind).targets(batch, seen.models) for kind in ("reward", "k3"))
    assert reward.reference_logp is None and not torch.equal(reward.advantage, free.advantage)
    assert loss.reference_logp is not None and torch.equal(loss.advantage, free.advantage)
    distance = [
        GRPO(beta=0.1, kl=kind).loss(batch, Outputs(seen.logp), targets)[1]["kl_reference"].tolist()
        for kind, targets in (("reward", reward), ("k3", loss))
    ]
    assert distance == [[3.0, 1.0], [3.0, 1.0]]


def test_a_completion_without_a_reward_leaves_the_baseline_of_the_log_ratios() -> None:
    batch = rollout(1, 1, 1, score=[1.0, 1.0, math.nan])
    seen = Fixed([-1.0, -1.0, -1.0], [-4.0, -2.0, -90.0])
    assert GRPO(beta=0.1).targets(batch, seen.models).advantage.tolist() == pytest.approx([-0.1, 0.1, 0.0])


# ---------------------------------------------------------------- the policy that drew, and the sampler


@pytest.mark.parametrize(
    ("method", "several", "passes"),
    [
        (GRPO(), False, 0),
        (GRPO(), True, 1),
        (GRPO(beta=0.1, kl="k3"), False, 0),
        (GRPO(beta=0.1), False, 1),
        (GRPO(correction="sequence"), False, 0),
    ],
)
def test_a_rollout_costs_a_pass_of_its_own_only_where_something_reads_it(
    method: GRPO, several: bool, passes: int
) -> None:
    seen = Fixed([-1.0, -1.0, -1.0], [-2.0, -3.0, -2.0], several)
    batch = replace(rollout(2, 1), rollout_logp=torch.zeros(3))
    targets = method.targets(batch, seen.models)
    assert seen.asked == passes and (targets.old_logp is not None) == several


def test_with_one_update_per_rollout_the_ratio_is_exactly_one() -> None:
    """Even if the same policy gives other roundings in another pass, as it does in 16 bits."""
    seen = Fixed([-1.0, -1.0, -1.0], [-2.0, -3.0, -2.0])
    method, batch = GRPO(beta=0.1), rollout(2, 1)
    targets = method.targets(batch, seen.models)
    metrics = method.loss(batch, Outputs(seen.logp + 1e-3), targets)[1]
    assert metrics["ratio"].tolist() == [1.0, 1.0, 1.0] and metrics["clip_fraction/high"].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.fault(30)
def test_weights_for_the_sampler_by_hand() -> None:
    """Trainer over sampler: 1.5, 4 and 0.5 of tokens, 6 and 0.5 of completions; the cap is 2."""
    batch = rollout(2, 1)
    old = torch.tensor([1.5, 4.0, 0.5], dtype=DOUBLE).log() - 3
    batch = replace(batch, rollout_logp=torch.full((3,), -3.0, dtype=DOUBLE))
    expected = {
        "token": [1.5, 2.0, 0.5],
        "sequence": [2.0, 2.0, 0.5],
        "token_mask": [1.5, 0.0, 0.5],
        "sequence_mask": [0.0, 0.0, 0.5],
    }
    for kind, weights in expected.items():
        assert correction_weight(kind, 2.0, batch, old).tolist() == pytest.approx(weights), kind


@every_method
@pytest.mark.fault(30)
def test_a_weight_for_the_sampler_scales_each_tokens_own_gradient(method: Any) -> None:
    """Also where one ratio serves a whole completion."""
    batch, ratio = rollout(2, 1), [1.01, 1.02, 0.99]
    weights = torch.tensor([1.5, 0.25, 0.5], dtype=DOUBLE)
    plain = step(method, batch, ratio, [0.5, 0.5, -0.5])[1]
    sampled = replace(batch, rollout_logp=-2.0 - weights.log())
    corrected = step(replace(method, correction="token"), sampled, ratio, [0.5, 0.5, -0.5])
    assert corrected[1] == pytest.approx([float(w) * g for w, g in zip(weights, plain, strict=True)], rel=1e-9)
    assert corrected[2]["sampler_gap"].tolist() == pytest.approx(weights.log().abs().tolist())


def test_a_sampler_without_log_probs_cannot_be_corrected_for() -> None:
    with pytest.raises(ValueError, match="correction needs the sampler's log-probs, and it gave none"):
        GRPO(correction="token").targets(rollout(1, 1), Fixed([0.0, 0.0], [0.0, 0.0]).models)


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GRPO(kl="k3"), "kl: k3 does nothing while beta is 0; set beta above 0 or leave kl out"),
        (lambda: GRPO(correction_cap=3.0), "correction_cap does nothing without correction"),
        (lambda: GRPO(beta=-0.1), "beta must not be negative"),
        (lambda: GRPO(clip_low=-0.1), "clip_low must not be negative"),
        (lambda: GRPO(dual_clip=1.1), r"dual_clip must be above 1 \+ clip_high, 1.2, got 1.1"),
        (lambda: CISPO(lowest=1.5), "lowest 1.5 and highest 5 must have 1 between them"),
        (lambda: BNPO(lowest=1.0), "lowest must be below highest, got 1 and 1"),
        (lambda: SAPO(temperature_rising=0.0), "temperature_rising must be above 0"),
        (lambda: DrGRPO(length=0), "length must be above 0"),
        (lambda: RLOO(clip=-1.0), "clip must not be negative"),
        (lambda: MaxRL(clip=-1.0), "clip must not be negative"),
        (lambda: ReinforcePP(baseline="group").fitted(8, 1), "baseline: group needs two completions of a prompt"),
    ],
)
def test_options_that_cannot_be_or_do_nothing_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_dr_grpos_length_is_the_longest_completion_unless_it_is_given() -> None:
    assert fitted(DrGRPO(), 64, 8).length == 64 and fitted(DrGRPO(length=10.0), 64, 8).length == 10
    with pytest.raises(ValueError, match="dr_grpo: length is not known; give the longest completion"):
        DrGRPO().count(rollout(1, 1))
