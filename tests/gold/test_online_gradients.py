"""The expected update of methods on groups against the gradient of what they are meant to optimise.

The language has 31 texts of one to four tokens; the policy is a table of logits for its 15 prefixes, away from the
reference. Every expectation is a sum over all texts, or over all pairs of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from enumerated import Composed, Expected, Language, cosine, kl_gradient, to_go, true_gradient
from torch import Tensor

from prefopt.batch import Batch
from prefopt.objectives import BNPO, CISPO, DAPO, GRPO, GSPO, PPO, RLOO, SAPO, DrGRPO, LitePPO, MaxRL, ReinforcePP
from prefopt.objectives.advantages import Advantage, centred, leave_one_out
from prefopt.objectives.gae import gae
from prefopt.objectives.policy_gradient import (
    SEQUENCE_MEAN,
    SEQUENCE_SUM,
    TOKEN_MEAN,
    Aggregation,
    Method,
    Surrogate,
    clipped,
    clipped_by_completion,
    weighted,
)

TEXTS = Language(3, length=4, end=2)
DRAW = torch.Generator().manual_seed(3)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=DRAW)


REFERENCE = normal(15, 3)
POLICY = REFERENCE + 0.8 * normal(15, 3)
REWARD = normal(31)
EARLIER = POLICY + 0.3 * normal(15, 3)  # a policy that drew the texts before the last updates
NOTHING = torch.zeros(31)
PAIRS, ALONE = TEXTS.groups(2, REWARD), TEXTS.groups(1, NOTHING)
TRUE = true_gradient(TEXTS, POLICY, REWARD)
KL_TRUE = kl_gradient(TEXTS, POLICY, REFERENCE)
EXACT = 1e-15


def size(gradient: Tensor) -> float:
    return float(gradient.abs().max())


# ---------------------------------------------------------------- estimates of KL(policy || reference)


def penalty(kind: Any) -> Tensor:
    """The expected gradient of a KL term of the package, where no text is rewarded."""
    batch, members = (TEXTS.groups(2, NOTHING), 2) if kind == "reward" else (ALONE, 1)
    return Expected(RLOO(beta=1.0, kl=kind), TEXTS, batch, REFERENCE).gradient(POLICY) / members


def test_the_log_ratio_in_the_reward_and_half_its_square_in_the_loss_have_the_gradient_of_kl() -> None:
    assert size(penalty("reward") - KL_TRUE) < EXACT
    assert size(penalty("k2") - KL_TRUE) < 1e-8  # shared out over a text's tokens by a float32 number


@pytest.mark.parametrize(("kind", "direction"), [("k3", 0.559), ("k3_weighted", 0.626)])
def test_token_level_k3_in_the_loss_is_another_direction(kind: str, direction: float) -> None:
    assert cosine(penalty(kind), KL_TRUE) == pytest.approx(direction, abs=5e-4)


def estimated(loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The expected gradient of loss(d, move) -> [N] with texts drawn from the policy. d [K]: the log-ratio to the
    reference; move [K]: that to the policy that drew them, 0 with a gradient.
    """
    logits = POLICY.clone().requires_grad_()
    logp = TEXTS.outputs(logits, ALONE).logp
    each = loss(logp - TEXTS.outputs(REFERENCE, ALONE).logp, logp - logp.detach())
    return torch.autograd.grad((each * TEXTS.logp(POLICY).exp()).sum(), logits)[0]


total = ALONE.sum_tokens


def k3(d: Tensor) -> Tensor:
    return torch.expm1(-d) + d


def analytic() -> Tensor:
    """Gradient of the KL of each next-token distribution, texts up to there as they were drawn."""
    logits = POLICY.clone().requires_grad_()
    logp = logits.log_softmax(-1)
    each = (logp.exp() * (logp - REFERENCE.log_softmax(-1))).sum(-1)  # [X]
    return torch.autograd.grad((each[TEXTS.at(ALONE)] * ALONE.spread(TEXTS.logp(POLICY).exp())).sum(), logits)[0]


def forward_kl() -> Tensor:
    """Gradient of KL(reference || policy)."""
    logits, reference = POLICY.clone().requires_grad_(), TEXTS.logp(REFERENCE)
    return torch.autograd.grad((reference.exp() * (reference - TEXTS.logp(logits))).sum(), logits)[0]


def test_the_log_ratio_as_a_loss_does_nothing() -> None:
    assert size(estimated(lambda d, move: total(d))) < EXACT


def test_every_token_level_loss_has_the_same_part_of_the_gradient() -> None:
    """It leaves out that a token changes which tokens follow."""
    part = estimated(lambda d, move: total(0.5 * d.square()))
    assert cosine(part, KL_TRUE) == pytest.approx(0.626, abs=5e-4)
    for same in (analytic(), penalty("k3_weighted"), estimated(lambda d, move: total(move.exp() * k3(d)))):
        assert size(same - part) < EXACT


def test_k3_of_a_whole_text_in_the_loss_is_the_other_kl() -> None:
    found = estimated(lambda d, move: k3(total(d)))
    assert size(found - forward_kl()) < EXACT
    assert cosine(found, KL_TRUE) == pytest.approx(0.50, abs=5e-3)


@pytest.mark.parametrize("estimate", [k3, lambda d: d])
def test_weighted_by_the_ratio_of_the_whole_text_token_losses_are_exact(estimate: Callable[[Tensor], Tensor]) -> None:
    found = estimated(lambda d, move: total(move).exp() * total(estimate(d)))
    assert size(found - KL_TRUE) < EXACT


def test_k3_in_the_reward_is_biased_and_the_log_ratio_of_later_tokens_alone_is_not() -> None:
    def in_reward(estimate: Callable[[Tensor], Tensor]) -> Tensor:
        return estimated(lambda d, move: total(to_go(ALONE, estimate(d.detach())) * move))

    assert size(in_reward(lambda d: d) - KL_TRUE) < EXACT
    assert cosine(in_reward(k3), KL_TRUE) == pytest.approx(0.62, abs=5e-3)


# ---------------------------------------------------------------- the policy gradient, one update per rollout


def composed(advantage: Advantage, surrogate: Surrogate, aggregation: Aggregation) -> Composed:
    return Composed(parts=Method(advantage, surrogate, aggregation))


RIGHT = (REWARD > 0.3).double()  # of pairs, those with one right text all have the same mean and spread
RIGHT_PAIRS = TEXTS.groups(2, RIGHT)
RIGHT_TRUE = true_gradient(TEXTS, POLICY, RIGHT)
# a completion is part of its own baseline where that is the mean, so a pair gives half the gradient; divided by the
# standard deviation of 0 and 1
DIVIDED = 0.5 / (math.sqrt(0.5) + 1e-4)
SHARES = {
    RLOO(beta=0.0): 1.0,
    RLOO(beta=0.0, clip=0.2): 1.0,
    DrGRPO(length=4.0): 0.5 / 4,
    DAPO(): DIVIDED,
    CISPO(): DIVIDED,
    MaxRL(): 1.0,
}
# scaled by numbers of the whole rollout
PARALLEL = [BNPO(), LitePPO(), ReinforcePP(beta=0.0), ReinforcePP(beta=0.0, baseline="group")]
PER_TOKEN_OF_TEXT = [GRPO(), GSPO(), SAPO(temperature_rising=1.0, temperature_falling=2.0)]


def name(objective: Any) -> str:
    return str(objective.facts.name)


def update(objective: Any, batch: Batch = RIGHT_PAIRS) -> Tensor:
    """Expected over pairs of texts, of each text, uphill."""
    return -Expected(objective, TEXTS, batch, REFERENCE).gradient(POLICY) / 2


@pytest.mark.parametrize("objective", SHARES, ids=name)
def test_summed_over_tokens_the_update_is_the_gradient_of_the_expected_reward(objective: Any) -> None:
    assert size(update(objective) - SHARES[objective] * RIGHT_TRUE) < EXACT


@pytest.mark.parametrize("objective", PARALLEL, ids=name)
def test_scaled_by_the_rollout_it_has_the_direction_of_the_gradient(objective: Any) -> None:
    found = update(objective)
    assert cosine(found, RIGHT_TRUE) > 1 - 1e-12
    assert float(found.norm() / RIGHT_TRUE.norm()) > 0.1


@pytest.mark.parametrize("objective", PER_TOKEN_OF_TEXT, ids=name)
def test_divided_by_each_texts_length_it_is_another_direction_and_one_for_all_ratios(objective: Any) -> None:
    """Sequence ratios and soft gates change nothing while the ratio is 1."""
    assert cosine(update(objective), RIGHT_TRUE) < 0.99
    assert size(update(objective) - update(GRPO())) < EXACT


def test_how_far_the_division_by_length_turns_the_update_of_real_rewards() -> None:
    found = update(composed(centred, clipped(0.2, 0.2), SEQUENCE_MEAN), PAIRS)
    assert cosine(found, TRUE) == pytest.approx(0.969, abs=5e-4)
    assert size(update(composed(centred, clipped(0.2, 0.2), SEQUENCE_SUM), PAIRS) - 0.5 * TRUE) < EXACT


def test_gspo_times_the_length_is_the_gradient() -> None:
    times_length = composed(centred, clipped_by_completion(0.2, 0.2), SEQUENCE_SUM)
    assert size(update(times_length, PAIRS) - 0.5 * TRUE) < EXACT


def test_kl_in_the_reward_is_exact_where_nothing_divides_it() -> None:
    assert size(update(RLOO(beta=0.3)) - (RIGHT_TRUE - 0.3 * KL_TRUE)) < EXACT
    assert size(update(DrGRPO(length=4.0, beta=0.3)) - (RIGHT_TRUE - 0.3 * KL_TRUE) / 8) < EXACT


@pytest.mark.parametrize("batch", [RIGHT_PAIRS, PAIRS], ids=["right or wrong", "continuous"])
@pytest.mark.parametrize(
    ("objective", "price"),
    [
        (LitePPO(beta=0.3), 0.3),
        (ReinforcePP(beta=0.3), 0.3),
        # a pair gives half the reward's gradient, and all of what is taken off token by token
        (ReinforcePP(beta=0.3, baseline="group"), 0.6),
    ],
)
def test_divided_by_the_rollouts_spread_reward_and_kl_have_the_direction_of_the_gradient(
    objective: Any, price: float, batch: Batch
) -> None:
    true = RIGHT_TRUE if batch is RIGHT_PAIRS else TRUE
    assert cosine(update(objective, batch), true - price * KL_TRUE) > 1 - 1e-12
    assert cosine(update(objective, TEXTS.groups(2, NOTHING)), -KL_TRUE) > 1 - 1e-12


@pytest.mark.parametrize(("rewards", "direction"), [(RIGHT_PAIRS, 0.9967), (PAIRS, 0.8746)], ids=["0/1", "continuous"])
def test_divided_by_the_spread_of_few_completions_kl_in_the_reward_is_another_direction(
    rewards: Batch, direction: float
) -> None:
    """The spread of a pair is chance: a text's log-ratio is divided by how far the other's reward happens to be away.

    In an endless group the spread is one number, and the optimum is exact (test_online_optima.py).
    """
    pulled = update(DAPO(beta=0.3), rewards) - update(DAPO(beta=0.0), rewards)
    assert cosine(pulled, -KL_TRUE) == pytest.approx(direction, abs=5e-4)


# ---------------------------------------------------------------- several updates per rollout


def off_policy(objective: Any) -> Expected:
    return Expected(objective, TEXTS, PAIRS, REFERENCE, drawn=EARLIER)


def test_off_policy_the_ratio_of_the_whole_text_is_exact_and_that_of_each_token_is_not() -> None:
    assert size(off_policy(RLOO(beta=0.0)).gradient(POLICY) / 2 + TRUE) < EXACT
    by_token = composed(leave_one_out, clipped(1.0, math.inf), SEQUENCE_SUM)
    found = off_policy(by_token).gradient(POLICY) / 2
    assert cosine(found, -TRUE) < 0.999 and size(found + TRUE) > 0.01


def moved() -> tuple[Tensor, Tensor]:
    """Ratio and centred advantage of every token of PAIRS, [K], [K]."""
    ratio = (TEXTS.outputs(POLICY, PAIRS).logp - TEXTS.outputs(EARLIER, PAIRS).logp).exp()
    return ratio, PAIRS.spread(centred(PAIRS, PAIRS.score))


def test_clipped_tokens_have_no_gradient_and_the_others_that_of_advantage_times_ratio() -> None:
    credit, _ = off_policy(composed(centred, clipped(0.1, 0.2), SEQUENCE_SUM)).credit(POLICY)
    ratio, advantage = moved()
    rose, fell = (ratio > 1.2) & (advantage > 0), (ratio < 0.9) & (advantage < 0)
    assert rose.any() and fell.any()
    assert not credit[rose | fell].any()
    free = ~(rose | fell)
    assert (ratio[free] > 1.2).any() and (ratio[free] < 0.9).any()  # beyond the edges, on their way back
    assert size(credit[free] + (advantage * ratio)[free]) < EXACT


def test_cispo_keeps_a_gradient_where_the_ratio_is_beyond_its_bound() -> None:
    credit, _ = off_policy(composed(centred, weighted(0.0, 1.2), TOKEN_MEAN)).credit(POLICY)
    ratio, advantage = moved()
    assert (ratio > 1.2).any()
    assert size(credit + advantage * ratio.clamp(max=1.2)) < EXACT
    assert credit[(ratio > 1.2) & (advantage != 0)].all()


def test_gspo_clips_all_tokens_of_a_text_together() -> None:
    credit, _ = off_policy(composed(centred, clipped_by_completion(0.05, 0.05), SEQUENCE_SUM)).credit(POLICY)
    ratio, advantage = moved()
    mean = PAIRS.spread(PAIRS.mean_tokens(ratio.log()).exp())
    out = ((mean > 1.05) & (advantage > 0)) | ((mean < 0.95) & (advantage < 0))
    assert out.any() and not credit[out].any()
    assert size(credit[~out] + (advantage * mean)[~out]) < EXACT


# ---------------------------------------------------------------- a critic


def values(reward: Tensor) -> Tensor:
    """The expected reward [R] of what is still to be written after each prefix, [X], from the last prefixes up."""
    probability, found = POLICY.softmax(-1), torch.zeros(15, dtype=torch.float64)
    number = {text: at for at, text in enumerate(TEXTS.texts)}
    for prefix in sorted(TEXTS.prefixes, key=len, reverse=True):
        after = [(*prefix, token) for token in range(3)]
        worth = [found[TEXTS.prefixes[at]] if at in TEXTS.prefixes else reward[number[at]] for at in after]
        found[TEXTS.prefixes[prefix]] = probability[TEXTS.prefixes[prefix]] @ torch.stack(worth)
    return found


TRUE_VALUE, OTHER_VALUE = values(REWARD), values(REWARD) + normal(15)
REWARDED = TEXTS.groups(1, REWARD)


def ppo(value: Tensor, gae_lambda: float, beta: float = 0.0) -> Tensor:
    """The expected update of the policy by PPO with a critic of these values [X], [X, V]."""
    objective = PPO(beta=beta, gae_lambda=gae_lambda, whiten="none")
    return Expected(objective, TEXTS, REWARDED, REFERENCE, value=value).gradient(POLICY)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.95, 1.0])
def test_with_the_true_values_ppo_has_the_exact_gradient_at_every_lambda(gae_lambda: float) -> None:
    assert size(ppo(TRUE_VALUE, gae_lambda) + TRUE) < EXACT


def test_with_other_values_only_lambda_one_is_exact() -> None:
    assert size(ppo(OTHER_VALUE, 1.0) + TRUE) < EXACT
    for gae_lambda in (0.0, 0.95):
        assert size(ppo(OTHER_VALUE, gae_lambda) + TRUE) > 0.01
    assert size(ppo(OTHER_VALUE, 0.0) + TRUE) > size(ppo(OTHER_VALUE, 0.95) + TRUE)


def test_ppos_kl_in_the_reward_of_each_token_is_exact() -> None:
    assert size(ppo(OTHER_VALUE, 1.0, beta=0.3) + TRUE - 0.3 * KL_TRUE) < EXACT


def test_at_lambda_one_an_advantage_is_the_reward_less_the_value() -> None:
    value = TEXTS.outputs(POLICY, REWARDED, OTHER_VALUE).value
    assert value is not None
    last = torch.zeros(len(value), dtype=torch.float64)
    last[REWARDED.completions.lengths.cumsum(0) - 1] = REWARD
    found = gae(REWARDED, last, value, 1.0, 1.0).advantage
    assert size(found - (REWARDED.spread(REWARD) - value)) < 1e-14


def test_clipped_tokens_of_ppo_have_no_gradient() -> None:
    objective = PPO(beta=0.0, whiten="none", clip_low=0.1, clip_high=0.2, gae_lambda=1.0)
    expected = Expected(objective, TEXTS, REWARDED, REFERENCE, drawn=EARLIER, value=TRUE_VALUE)
    credit, _ = expected.credit(POLICY)
    ratio = (TEXTS.outputs(POLICY, REWARDED).logp - TEXTS.outputs(EARLIER, REWARDED).logp).exp()
    advantage = REWARDED.spread(REWARD) - TRUE_VALUE[TEXTS.at(REWARDED)]
    out = ((ratio > 1.2) & (advantage > 0)) | ((ratio < 0.9) & (advantage < 0))
    assert out.any() and not credit[out].any()
    assert size(credit[~out] + (advantage * ratio)[~out]) < EXACT
