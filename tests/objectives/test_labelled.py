"""KTO and BCO by hand, their gradients on paper, and what they measure over a whole update on several processes."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from laws import apart, batch_of, far, one_update, rows, shuffled, together
from torch import Tensor

from prefopt import ranks
from prefopt.batch import Batch, Outputs
from prefopt.data.source import Offline
from prefopt.loop import Models
from prefopt.objectives import BCO, KTO, update
from prefopt.objectives.facts import settled
from prefopt.objectives.kto import Zero, balanced, drift, mismatched
from prefopt.objectives.pairwise import Reference
from prefopt.records import Example, InputError


def row(prompt: list[int], completion: list[int], good: float, trained: list[bool] | None = None) -> Example:
    return Example(prompt, [completion], [good], [trained or [True] * len(completion)])


# beta 0.5, drift 0.6.            logp             sum   reference   h      r = h / 2
# good  [1, 2]                    -1.0 -0.5       -1.5    -2.5       1.0      0.5
# bad   [3]                       -2.0            -2.0    -1.0      -1.0     -0.5
# good  [4, 5]                    -0.1 (-9.0)     -0.1    -0.5       0.4      0.2     (-9.0): not trained
BY_HAND = Batch.of([row([7], [1, 2], 1.0), row([8], [3], 0.0), row([9], [4, 5], 1.0, [True, False])])
LOGP = [-1.0, -0.5, -2.0, -0.1, -9.0]
REFERENCE = torch.tensor([-2.5, -1.0, -0.5], dtype=torch.float64)


def both(objective: Any, targets: Any) -> tuple[float, list[float], dict[str, list[float]]]:
    """Loss, its gradient by token, and metrics, on the rows above."""
    logp = torch.tensor(LOGP, dtype=torch.float64, requires_grad=True)
    loss, seen = objective.loss(BY_HAND, Outputs(logp), targets)
    loss.backward()
    assert logp.grad is not None
    return loss.item(), logp.grad.tolist(), {name: [round(v, 6) for v in x.tolist()] for name, x in seen.items()}


def s(u: float) -> float:
    return 1 / (1 + math.exp(-u))


def zero(value: float = 0.6) -> Zero:
    return Zero(REFERENCE, torch.tensor(value, dtype=torch.float64))


def test_kto_by_hand():
    # good: 1 - s(0.5 - 0.3) = 0.450166 and 1 - s(0.2 - 0.3) = 0.524979; bad: 1 - s(0.3 + 0.5) = 0.310026
    loss, _, seen = both(KTO(beta=0.5), zero())
    assert loss == pytest.approx(0.450166 + 0.524979 + 0.310026, abs=2e-6)
    assert seen == {
        "rewards/chosen": [0.5, 0.2],
        "rewards/rejected": [-0.5],
        "rewards/accuracies": [1.0, 1.0, 0.0],
        "logps/chosen": [-1.5, -0.1],
        "logps/rejected": [-2.0],
        "kl": [0.6, 0.6, 0.6],
    }


def test_kto_with_class_weights_by_hand():
    loss, _, _ = both(KTO(beta=0.5, desirable_weight=2.0, undesirable_weight=3.0), zero())
    assert loss == pytest.approx(2 * (0.450166 + 0.524979) + 3 * 0.310026, abs=1e-5)


def test_the_gradient_of_kto_is_the_coefficient_on_paper():
    """-w beta s(r - beta z) (1 - s(r - beta z)) on a good completion's tokens, plus on a bad one's."""
    _, found, _ = both(KTO(beta=0.5, desirable_weight=2.0, undesirable_weight=3.0), zero())
    first, bad, second = (0.5 * w * s(r - 0.3) * (1 - s(r - 0.3)) for w, r in ((2, 0.5), (3, -0.5), (2, 0.2)))
    assert found == pytest.approx([-first, -first, bad, -second, 0.0], rel=1e-6)


def test_bco_by_hand():
    # middle ((0.5 + 0.2) / 2 - 0.5) / 2 = -0.075, not the mean of all three, 0.066667
    # good: ln(1 + e^-0.575) = 0.446418 and ln(1 + e^-0.275) = 0.565071; bad: ln(1 + e^-0.425) = 0.503057
    models = Models(
        lambda part: Outputs(torch.tensor(LOGP, dtype=torch.float64)),
        lambda part: torch.tensor([-1.25, -1.25, -1.0, -0.5, -4.0], dtype=torch.float64),
    )
    targets = BCO(beta=0.5).targets(BY_HAND, models)
    assert targets.logp.tolist() == REFERENCE.tolist()
    assert float(targets.drift) == pytest.approx(-0.075, abs=1e-12)
    loss, found, seen = both(BCO(beta=0.5), targets)
    assert loss == pytest.approx(0.446418 + 0.565071 + 0.503057, abs=3e-6)
    assert seen["delta"] == [-0.075] * 3 and seen["rewards/accuracies"] == [1.0, 1.0, 1.0]
    first, bad, second = (0.5 * s(-gap) for gap in (0.575, 0.425, 0.275))  # a constant middle: beta s(-gap)
    assert found == pytest.approx([-first, -first, bad, -second, 0.0], rel=1e-6)


def test_an_update_of_one_class_is_divided_at_its_own_mean():
    good = Batch.of([row([7], [1], 1.0), row([8], [2], 1.0)])
    logp = torch.tensor([-1.0, -2.0])
    models = Models(lambda part: Outputs(logp), lambda part: torch.zeros(2))
    assert float(BCO(beta=1.0).targets(good, models).drift) == -1.5


@pytest.mark.parametrize("objective", [KTO(), BCO()])
@pytest.mark.parametrize("far_off", [-1e4, 1e4])
def test_far_rewards_stay_finite(objective, far_off):
    logp = torch.tensor([far_off, far_off], requires_grad=True)
    batch = Batch.of([row([7], [1], 1.0), row([8], [2], 0.0)])
    targets: Any = (Zero if isinstance(objective, KTO) else Reference)(torch.zeros(2), torch.tensor(0.0))
    loss, _ = objective.loss(batch, Outputs(logp), targets)
    loss.backward()
    assert loss.isfinite() and logp.grad is not None and logp.grad.isfinite().all()


@pytest.mark.parametrize("objective", [KTO(), BCO()])
@pytest.mark.parametrize("score", [0.5, math.nan, -1.0])
def test_a_score_that_is_no_label_is_refused(objective, score):
    batch = Batch.of([row([7], [1], 1.0), row([8], [2], score)])
    targets: Any = Reference(torch.zeros(2), torch.tensor(0.0))
    with pytest.raises(ValueError, match=r"completion 1 has score .* and needs 1"):
        objective.loss(batch, Outputs(torch.zeros(2)), targets)


# ---------------------------------------------------------------- KTO's drift


def pairings(examples: Sequence[Example]) -> list[tuple[list[int], list[int]]]:
    return [(e.prompt, e.completions[0]) for e in mismatched(as_rows(examples))]


def as_rows(examples: Sequence[Example]) -> list[Any]:
    return [(tuple(e.prompt), tuple(e.completions[0]), tuple(e.trained[0])) for e in examples]


def test_every_prompt_gets_the_completion_of_another():
    """Also where a prompt has several rows, and its next ones in any order are its own."""
    examples = [row([1 + n // 4], [10 + n], float(n % 2)) for n in range(12)]
    found = pairings(examples)
    assert sorted(prompt[0] for prompt, _ in found) == sorted(e.prompt[0] for e in examples)
    for prompt, completion in found:
        assert (completion[0] - 10) // 4 + 1 != prompt[0]


def test_neighbours_in_the_data_are_not_partners_more_than_by_chance():
    """Rows sorted by prompt, as from a file of topics: about 1 in 200 pairs may join rows that lie side by side."""
    found = pairings([row([n], [1000 + n], 1.0) for n in range(200)])
    steps = [(completion[0] - 1000 - prompt[0]) % 200 for prompt, completion in found]
    assert len(set(steps)) > 100  # no one distance that all pairs have
    assert sum(step in (1, 199) for step in steps) <= 8


def test_neither_order_nor_copies_change_the_pairs():
    examples = rows("labels", num=9)
    assert pairings(shuffled(examples)) == pairings(examples)
    assert pairings([*examples, examples[0], examples[0]]) == pairings(examples)


def test_trained_tokens_go_with_the_completion():
    found = mismatched(as_rows([row([1], [5, 6], 1.0, [True, False]), row([2], [7], 0.0)]))
    assert {(e.prompt[0], *e.trained[0]) for e in found} == {(2, True, False), (1, True)}


def test_no_pair_is_longer_than_the_longest_row():
    """A long prompt with a long answer would leave the model's context; the answer is cut."""
    found = mismatched(as_rows([row([1] * 9, [3], 1.0), row([2], [4] * 9, 0.0)]))
    assert sorted((len(e.prompt), len(e.completions[0]), len(e.trained[0])) for e in found) == [(1, 1, 1), (9, 1, 1)]


def log_ratio_by_hand(models: Models, examples: Sequence[Example]) -> float:
    ratios = []
    for example in mismatched(as_rows(examples)):
        batch = Batch.of([example])
        with torch.no_grad():
            ratios.append(float(batch.sum_tokens(models.policy(batch).logp - models.reference(batch))[0]))
    return sum(ratios) / len(ratios)


@pytest.mark.parametrize("swapped", [False, True])
def test_the_drift_is_the_mean_log_ratio_of_mismatched_pairs_and_never_negative(swapped):
    models, examples = apart(), rows("labels", num=6)
    if swapped:
        policy, reference = models.policy, models.reference
        models = Models(lambda part: Outputs(reference(part)), lambda part: policy(part).logp.detach())
    by_hand = log_ratio_by_hand(models, examples)
    assert (by_hand < -0.1) if swapped else (by_hand > 0.1)
    assert float(drift(Batch.of(examples), models)) == pytest.approx(max(by_hand, 0.0), rel=1e-12)


def test_the_drift_has_no_gradient_and_is_one_number_for_all_forward_passes():
    models, batch = far(KTO()), batch_of("labels", num=6)
    targets = KTO().targets(batch, models)
    assert targets.drift.ndim == 0 and not targets.drift.requires_grad and not targets.logp.requires_grad
    metrics = [one_update(KTO(), batch, models, tokens).metrics["kl"] for tokens in (1, 10**6)]
    assert metrics == [pytest.approx(float(targets.drift), rel=1e-12)] * 2


def test_one_prompt_alone_measures_nothing(caplog):
    """NaN, not 0: the step's loss is taken with a drift of 0, and `kl` has no value."""
    examples = [row([7], [1, 2], 1.0), row([7], [3], 0.0)]
    with caplog.at_level(logging.WARNING, "prefopt"):
        found = one_update(KTO(), Batch.of(examples), together()).metrics
    assert "kl" not in found or math.isnan(found["kl"])
    assert found["loss"] == pytest.approx(0.5, rel=1e-12)
    assert "all rows of this update have the same prompt" in caplog.text


def test_passes_are_bounded(monkeypatch):
    monkeypatch.setattr(update, "PASS_TOKENS", 40)
    models, batch, seen = apart(), batch_of("labels", num=12), []

    def policy(part: Batch) -> Any:
        seen.append(sum(part.tokens_per_prompt()))
        return Outputs(torch.zeros(len(part.trained)))

    drift(batch, Models(policy, models.reference))
    assert len(seen) > 2 and max(seen) <= 40


# ---------------------------------------------------------------- several processes


def on_ranks(monkeypatch: Any, objective: Any, shares: Sequence[Batch], models: Models) -> list[Any]:
    """The targets of each of several processes.

    What they exchange is played in two rounds: first each says what it would send, then all get the whole.
    """
    gathered: list[list[Any]] = []
    summed: list[list[Tensor]] = []

    def run(rank: int, hear: bool) -> Any:
        places = {"gather": 0, "sum": 0}

        def gather(value: Any) -> list[Any]:
            place, places["gather"] = places["gather"], places["gather"] + 1
            if not hear:
                while len(gathered) <= place:
                    gathered.append([None] * len(shares))
                gathered[place][rank] = value
            # a first round that has not heard all yet goes on with what there is
            return [value if one is None else one for one in gathered[place]]

        def all_sum(x: Tensor) -> Tensor:
            place, places["sum"] = places["sum"], places["sum"] + 1
            while len(summed) <= place:
                summed.append([torch.zeros(())] * len(shares))
            summed[place][rank] = x.clone()
            return torch.stack([one.to(x) for one in summed[place]]).sum(0)

        with monkeypatch.context() as patch:
            patch.setattr(ranks, "gather", gather)
            patch.setattr(ranks, "all_sum", all_sum)
            patch.setattr(ranks, "rank", lambda: rank)
            patch.setattr(ranks, "world", lambda: len(shares))
            with torch.no_grad():
                return objective.targets(shares[rank], models)

    for hear in (False, True):  # what is gathered; then the sums that follow from all of it
        for rank in range(len(shares)):
            run(rank, hear)
    return [run(rank, True) for rank in range(len(shares))]


def dealt(examples: list[Example], world: int) -> list[Batch]:
    """The update's share of each process."""
    sources = [Offline(examples, len(examples), shuffle=False, rank=rank, world=world) for rank in range(world)]
    return [next(source.batches())[0] for source in sources]


@pytest.mark.parametrize("objective", [KTO(), BCO()])
def test_an_answer_that_is_there_twice_counts_twice_on_several_processes(objective, monkeypatch):
    """The last process's own row has the texts of the first one's, and another label."""
    models, twice = apart(), ([7, 2], [1, 2])
    examples = [row(*twice, 1.0), row([7, 3], [3, 4, 5], 0.0), row(*twice, 0.0)]
    alone = objective.targets(Batch.of(examples), models)
    for found in on_ranks(monkeypatch, objective, dealt(examples, 3), models):
        assert float(found.drift) == pytest.approx(float(alone.drift), rel=1e-12)


@pytest.mark.parametrize("objective", [KTO(), BCO()])
@pytest.mark.parametrize(("num", "world"), [(6, 2), (5, 3), (2, 4)])
def test_processes_find_the_number_that_one_process_finds(objective, num, world, monkeypatch):
    """Every world-th row, and the first row again where there is none left."""
    models, examples = apart(), rows("labels", num=num)
    alone = objective.targets(Batch.of(examples), models)
    shares = dealt(examples, world)
    for rank, found in enumerate(on_ranks(monkeypatch, objective, shares, models)):
        assert float(found.drift) == pytest.approx(float(alone.drift), rel=1e-12)
        assert torch.allclose(found.logp, alone.logp[rank::world] if rank < num else alone.logp[:1])


# ---------------------------------------------------------------- class weights


@pytest.mark.parametrize(
    ("good", "bad", "weights"),
    [
        (10, 10, (1.0, 1.0)),
        (12, 10, (1.0, 1.0)),  # 1.2 is within 1 to 4/3
        (5, 10, (2.0, 1.0)),  # 2 x 5 : 10 is 1
        (40, 10, (1.0, 3.0)),  # 40 : 3 x 10 is 4/3
    ],
)
def test_weights_follow_from_the_numbers_of_rows(good, bad, weights):
    examples = [row([n], [n + 1], float(n < good)) for n in range(good + bad)]
    done = KTO(beta=0.3).settled(examples)
    assert (done.desirable_weight, done.undesirable_weight) == pytest.approx(weights)
    assert done.beta == 0.3


@pytest.mark.parametrize("ratio", [0.05, 0.5, 1.0, 1.2, 2.0, 30.0])
@pytest.mark.parametrize(("good", "bad"), [(None, None), (2.0, None), (0.1, None), (None, 2.0), (None, 0.1)])
def test_a_weight_that_is_given_stays_and_the_other_balances(good, bad, ratio):
    mine, its = balanced(good, bad, ratio)
    assert (good is None or mine == good) and (bad is None or its == bad)
    assert 1 - 1e-12 <= ratio * mine / its <= 4 / 3 + 1e-12
    if good is None and bad is None:
        assert min(mine, its) == 1.0


def test_weights_that_are_far_from_balanced_are_said(caplog):
    examples = [row([n], [n + 1], float(n < 9)) for n in range(10)]
    with caplog.at_level(logging.WARNING, "prefopt"):
        assert KTO(desirable_weight=1.0, undesirable_weight=7.0).settled(examples).undesirable_weight == 7.0
        assert not caplog.text  # 9 : 7 is 1.29
        KTO(desirable_weight=1.0, undesirable_weight=1.0).settled(examples)
    assert "good rows weigh 9.00 times what bad rows do" in caplog.text


@pytest.mark.parametrize(
    ("good", "word"), [(1.0, "all 3 training rows are good"), (0.0, "all 3 training rows are bad")]
)
@pytest.mark.parametrize("objective", [KTO(), BCO()])
def test_training_rows_of_one_class_are_refused(objective, good, word):
    """The file may have both, and those of one class be held out."""
    examples = [row([n], [1], good) for n in range(3)]
    with pytest.raises(InputError, match=f"{objective.facts.name} .* {word}; add rows of the other kind"):
        settled(objective, examples)
    assert isinstance(settled(objective, [*examples, row([9], [1], 1 - good)]), type(objective))


def test_rows_of_one_prompt_are_refused():
    with pytest.raises(InputError, match="answers to other prompts, and all rows have one; use bco"):
        KTO().settled([row([5], [n], float(n % 2)) for n in range(4)])


def test_before_the_first_update_the_loss_is_half_the_weight():
    assert KTO().at_start()["loss"] == 0.5
    assert "loss" not in KTO(desirable_weight=2.0).at_start()
    found = one_update(KTO(desirable_weight=3.0, undesirable_weight=3.0), batch_of("labels"), together()).metrics
    assert found["loss"] == pytest.approx(1.5, rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (KTO, {"beta": 0.0}, "beta must be above 0"),
        (BCO, {"beta": -0.1}, "beta must be above 0"),
        (KTO, {"desirable_weight": 0.0}, "desirable_weight must be above 0, got 0.0; leave it out"),
        (KTO, {"desirable_weight": math.inf}, "desirable_weight must be finite; leave it out"),
        (KTO, {"undesirable_weight": math.nan}, "undesirable_weight must be above 0, got nan"),
    ],
)
def test_options_out_of_range_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)
