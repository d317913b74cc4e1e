"""The optimum of DPO's population loss, against its closed form, for each option that has one.

KL is in nats, mean over the prompts; D is the log-ratio of the first response minus that of the second.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from tabular import (
    Population,
    Row,
    Task,
    bradley_terry,
    descend,
    draws,
    duel,
    kl,
    logit,
    margin,
    matches,
    minimum,
    optimum,
    pairs,
    sigmoid,
    tilted,
)
from torch import Tensor

from prefopt.objectives import DPO

PROMPTS, RESPONSES = 2, 5
REFERENCE = draws(PROMPTS, RESPONSES, seed=1)
REWARD = draws(PROMPTS, RESPONSES, seed=2)
LENGTHS = [1, 4, 2, 7, 3]
TWO = torch.tensor([[0.3, -0.4]], dtype=torch.float64)  # a reference for two responses


def asked(kind: str, prompt: int) -> Tensor:
    """How often each pair of responses is compared, symmetric, [R, R]."""
    if kind == "uniform":
        return torch.ones(RESPONSES, RESPONSES, dtype=torch.float64)
    if kind == "on-policy":
        share = REFERENCE[prompt].softmax(-1)
        return share[:, None] * share[None, :]
    share = (3 * draws(RESPONSES, seed=3 + prompt)).softmax(-1)
    skewed = share[:, None] * share[None, :]
    return skewed.tril(1).triu(-1) if kind == "path" else skewed  # path: with its two neighbours only


def labelled(kind: str, flip: float = 0.0, lengths: Sequence[int] | None = None) -> Population:
    """Bradley-Terry labels of REWARD, each then turned round with probability `flip`."""
    rows = []
    for prompt, reward in enumerate(REWARD):
        win = bradley_terry(reward)
        rows += pairs((1 - flip) * win + flip * win.T, asked(kind, prompt), prompt)
    return Population(rows, lengths)


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("kind", ["uniform", "on-policy", "skewed", "path"])
def test_optimum_is_the_tilted_reference_whichever_pairs_are_compared(kind, beta):
    found = optimum(DPO(beta=beta), labelled(kind, lengths=LENGTHS), REFERENCE)
    assert kl(found, tilted(REFERENCE, REWARD, beta)) < 1e-10
    assert kl(found, REFERENCE) > 1e-3


def test_only_log_ratios_between_compared_responses_are_learnt():
    """Responses 0, 1, 2 are compared with each other and 3, 4 too, but none of the one set with one of the other."""
    sets = [[0, 1, 2], [3, 4]]
    together = torch.zeros(RESPONSES, RESPONSES, dtype=torch.float64)
    for members in sets:
        together[[[i] for i in members], members] = 1.0
    rows = [row for p in range(PROMPTS) for row in pairs(bradley_terry(REWARD[p]), together, p)]
    gradient = Task(DPO(beta=0.5), Population(rows), REFERENCE).gradient
    found = [minimum(gradient, start) for start in (REFERENCE, draws(PROMPTS, RESPONSES, seed=9))]
    ratios = [(x - tilted(REFERENCE, REWARD, 0.5)) for x in found]  # [P, R], 0 up to a constant where learnt
    for ratio in ratios:
        for members in sets:
            assert (ratio[:, members] - ratio[:, members[:1]]).abs().max() < 1e-6
    between = [ratio[:, 0] - ratio[:, 3] for ratio in ratios]
    assert (between[0] - between[1]).abs().max() > 0.1


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_a_pair_that_is_always_labelled_the_same_is_driven_apart_without_end(beta):
    start = torch.zeros(1, 2, dtype=torch.float64)
    path = descend(Task(DPO(beta=beta), duel(1.0), start).gradient, start, rate=5.0 / beta, steps=300)
    rejected = [float(x.log_softmax(-1)[0, 1]) for x in path]
    assert all(later < earlier for earlier, later in itertools.pairwise(rejected))
    assert margin(path[-1], start) > 1 / (2 * beta)  # where IPO stops


# ---------------------------------------------------------------- noisy labels


@pytest.mark.parametrize("share", [0.6, 0.8, 1.0])
@pytest.mark.parametrize("smoothing", [0.05, 0.2])
def test_label_smoothing_stops_at_the_log_odds_of_a_smoothed_label(share, smoothing):
    found = optimum(DPO(beta=0.1, label_smoothing=smoothing), duel(share), TWO)
    expected = logit((1 - smoothing) * share + smoothing * (1 - share))
    assert 0.1 * margin(found, TWO) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("flip", [0.1, 0.3, 0.45])
def test_robust_loss_over_flipped_labels_is_the_clean_loss(flip):
    """E over flips of the robust loss equals the loss of the unflipped pair, pair by pair."""
    logits = 20 * draws(1, 2, seed=7)

    def loss(objective: DPO, scores: Sequence[float]) -> float:
        population = Population([Row(1.0, [0, 1], scores)])
        task = Task(objective, population, TWO)
        return float(objective.loss(population.batch, population.outputs(logits), task.targets(logits))[0])

    robust = DPO(beta=0.3, loss_type="robust", label_smoothing=flip)
    for scores in ([1, 0], [0, 1]):
        mean = (1 - flip) * loss(robust, scores) + flip * loss(robust, scores[::-1])
        assert mean == pytest.approx(loss(DPO(beta=0.3), scores), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("flip", [0.1, 0.3])
def test_robust_optimum_on_flipped_labels_is_the_clean_one(flip):
    noisy = labelled("skewed", flip)
    expected = tilted(REFERENCE, REWARD, 0.5)
    assert kl(optimum(DPO(beta=0.5, loss_type="robust", label_smoothing=flip), noisy, REFERENCE), expected) < 1e-10
    assert kl(optimum(DPO(beta=0.5), noisy, REFERENCE), expected) > 1e-3  # what the flips do to plain DPO


# ---------------------------------------------------------------- length


@pytest.mark.parametrize("penalty", [0.05, 0.3])
def test_length_penalty_is_a_price_per_token_on_the_reward(penalty):
    """Optimum: reference x exp((reward - penalty length) / beta) / Z."""
    found = optimum(DPO(beta=0.5, length_penalty=penalty), labelled("skewed", lengths=LENGTHS), REFERENCE)
    priced = REWARD - penalty * torch.tensor(LENGTHS, dtype=torch.float64)
    assert kl(found, tilted(REFERENCE, priced, 0.5)) < 1e-10


def test_log_ratios_per_token_are_rewards_per_token():
    """log-ratio(y) / |y| = reward(y) / beta + a constant of the prompt, so a long answer moves further."""
    found = optimum(DPO(beta=2.0, log_ratio="mean"), labelled("uniform", lengths=LENGTHS), REFERENCE)
    per_token = (found.log_softmax(-1) - REFERENCE.log_softmax(-1)) / torch.tensor(LENGTHS)
    left = 2.0 * per_token - REWARD  # [P, R]
    assert (left - left.mean(-1, keepdim=True)).abs().max() < 1e-8


# ---------------------------------------------------------------- other divergences and losses

# slope f' of each divergence's generator at the ratio u = policy / reference: its reward is beta f'(u).
# Wang et al. 2024, arXiv:2309.16240, table 1, constants left out
SLOPES = {
    "reverse_kl": lambda u: u.log(),
    "forward_kl": lambda u: -1 / u,
    "js": lambda u: (u / (1 + u)).log(),
    "alpha": lambda u: -(u**-0.3) / 0.3,
}


@pytest.mark.parametrize("divergence", sorted(SLOPES))
def test_reward_of_an_f_divergence_is_its_slope_at_the_optimum(divergence):
    options = {"f_alpha": 0.3} if divergence == "alpha" else {}
    found = optimum(DPO(beta=0.5, f_divergence=divergence, **options), labelled("uniform"), REFERENCE)
    ratio = (found.log_softmax(-1) - REFERENCE.log_softmax(-1)).exp()
    left = 0.5 * SLOPES[divergence](ratio) - REWARD  # [P, R]
    assert (left - left.mean(-1, keepdim=True)).abs().max() < 1e-8


@pytest.mark.parametrize("share", [0.6, 0.9, 1.0])
def test_exo_stops_in_proportion_to_how_often_the_first_response_wins(share):
    """With s = s(beta D), the loss is s log s + (1 - s) log(1 - s) plus a line in s of slope -(2 p - 1) logit(1 - e):
    least where beta D = (2 p - 1) logit(1 - e).
    """
    found = optimum(DPO(beta=0.2, loss_type="exo", label_smoothing=0.1), duel(share), TWO)
    assert 0.2 * margin(found, TWO) == pytest.approx((2 * share - 1) * logit(0.9), abs=1e-8)


def test_hinge_stops_at_a_margin_of_one_for_any_majority():
    """p max(0, 1 - beta D) + (1 - p) max(0, 1 + beta D) falls up to beta D = 1 and rises beyond, for p above 1/2."""
    gradient = Task(DPO(beta=0.2, loss_type="hinge"), duel(0.6), TWO).gradient
    stop = torch.tensor([[1 / 0.2, 0.0]], dtype=torch.float64)
    for by, expected in ((-1e-9, -0.2 * (0.6 - 0.4)), (1e-9, 0.2 * 0.4)):
        slope = gradient((TWO + (1 + by) * stop).requires_grad_())
        assert slope[0, 0].item() == pytest.approx(expected)


def test_nca_optimum_on_pairs_from_the_reference_is_the_win_rate():
    """Completions drawn from the reference, beta 1: policy = reference x 2 P(y beats a draw).

    A response is chosen with probability mu P and rejected with mu (1 - P), so its reward r has the loss
    mu (P softplus(-r) + softplus(r) / 2), least at e^r = 2 P; these ratios already make a distribution.
    """
    rows, wins = [], []
    for prompt in range(PROMPTS):
        share = REFERENCE[prompt].softmax(-1)
        beats = torch.sigmoid(draws(RESPONSES, RESPONSES, seed=20 + prompt))
        beats = beats.triu(1) + (1 - beats.T).tril(-1) + torch.eye(RESPONSES) / 2  # no reward explains it
        rows += matches(beats, share, prompt)
        wins.append(beats @ share)
    found = optimum(DPO(beta=1.0, loss_type="nca"), Population(rows), REFERENCE)
    expected = REFERENCE.log_softmax(-1) + (2 * torch.stack(wins)).log()
    assert expected.exp().sum(-1).tolist() == pytest.approx([1.0, 1.0])
    assert kl(found, expected) < 1e-10
    assert kl(found, REFERENCE) > 1e-3


@pytest.mark.parametrize("share", [0.6, 0.9])
def test_likelihood_of_the_chosen_pulls_the_policy_itself_towards_the_win_rate(share):
    """One token each, x the policy's log-odds, x0 the reference's, w the weight:
    beta (s(beta (x - x0)) - p) + w (s(x) - p) = 0.
    """
    found = optimum(DPO(beta=0.5, sft_weight=0.4), duel(share), TWO)
    x, start = float(found[0, 0] - found[0, 1]), float(TWO[0, 0] - TWO[0, 1])
    left = 0.5 * (sigmoid(0.5 * (x - start)) - share) + 0.4 * (sigmoid(x) - share)
    assert abs(left) < 1e-8
