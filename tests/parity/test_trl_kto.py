"""KTOTrainer beside `KTO`.

| TRL | prefopt |
|---|---|
| `loss_type="kto"` | `KTO()`, but for the pairs that the drift is measured on |
| `desirable_weight`, `undesirable_weight` | the same; left out, they follow from the rows |

TRL alone has `apo_zero_unpaired`; it has no BCO on labels.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from laws import one_update
from peer import (
    LOGPS,
    TOLERANCE,
    Fed,
    Ours,
    Peer,
    assert_differ,
    assert_equal,
    demonstration,
    each,
    examples,
    mean_of,
    on_labels,
    step,
)
from torch import Tensor

from prefopt.batch import Batch
from prefopt.objectives import KTO
from prefopt.objectives.kto import Zero, mismatched
from prefopt.records import Example

LABELS = [(1.0,), (0.0,), (1.0,), (1.0,), (0.0,), (1.0,)]
ROWS = examples(LABELS, seed=9)
EQUAL = KTO(desirable_weight=1.0, undesirable_weight=1.0)


def drift_on_trls_pairs(peer: Peer, rows: Sequence[int], ours: Ours) -> Tensor:
    """[] nats: the mean log-ratio of TRL's own mismatched pairs, by prefopt's models."""
    table = peer.trainer.train_dataset.select(rows)
    batch = Batch.of([demonstration(row["prompt_ids"], row["KL_completion_ids"]) for row in table])
    with torch.no_grad():
        ratio = ours.models.policy(batch).logp - ours.models.reference(batch)
    return batch.sum_tokens(ratio).mean().clamp(min=0)


def prefopts_pairs(rows: Sequence[Example]) -> list[tuple[list[int], list[int]]]:
    """The mismatched prompts and completions that prefopt measures its drift on."""
    table = [(tuple(e.prompt), tuple(e.completions[0]), tuple(e.trained[0])) for e in rows]
    return [(example.prompt, example.completions[0]) for example in mismatched(table)]


def fed(drift: Tensor) -> Callable[[Zero], Zero]:
    return lambda targets: targets._replace(drift=drift)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.3, 0.6)])
def test_given_trls_mismatched_pairs_loss_and_gradient_are_its_own(
    weights: tuple[float, float], tmp_path: Path
) -> None:
    good, bad = weights
    peer = on_labels(ROWS, tmp_path, beta=0.2, desirable_weight=good, undesirable_weight=bad)
    objective, ours, drifts = KTO(beta=0.2, desirable_weight=good, undesirable_weight=bad), Ours(), []
    for rows in each(len(ROWS)):
        theirs, drift = peer.said(rows), drift_on_trls_pairs(peer, rows, ours)
        assert float(drift) == pytest.approx(peer.logged("kl"), rel=TOLERANCE, abs=TOLERANCE)
        assert_equal(ours.said(Fed(objective, fed(drift)), [ROWS[row] for row in rows]), theirs, f"rows {rows}")
        drifts.append(float(drift))
    assert min(drifts) == 0 < max(drifts)  # clamped and not


@pytest.mark.parametrize(("seed", "positive"), [(9, True), (0, False)])
def test_given_prefopts_mismatched_pairs_trl_has_its_drift_and_loss(seed: int, positive: bool, tmp_path: Path) -> None:
    rows, ours = examples(LABELS, seed=seed), Ours()
    peer, answers = on_labels(rows, tmp_path), {tuple(prompt): answer for prompt, answer in prefopts_pairs(rows)}
    peer.trainer.train_dataset = [
        row | {"KL_completion_ids": answers[tuple(row["prompt_ids"])]} for row in peer.trainer.train_dataset
    ]
    assert_equal(ours.said(EQUAL, rows), peer.said())
    drift = one_update(EQUAL, Batch.of(rows), ours.models).metrics["kl"]
    assert drift == pytest.approx(peer.logged("kl"), rel=TOLERANCE, abs=TOLERANCE)
    assert (drift > 0) == positive


def test_metrics_of_one_name_have_one_value(tmp_path: Path) -> None:
    peer, ours = on_labels(ROWS, tmp_path), Ours()
    peer.said()
    drift = drift_on_trls_pairs(peer, range(len(ROWS)), ours)
    metrics = one_update(Fed(EQUAL, fed(drift)), Batch.of(ROWS), ours.models).metrics
    for name in ("kl", "rewards/chosen", "rewards/rejected", *LOGPS):
        assert metrics[name] == pytest.approx(peer.logged(name), rel=TOLERANCE, abs=TOLERANCE), name


# ---------------------------------------------------------------- intended differences


def test_the_order_of_rows_decides_trls_mismatched_pairs_and_not_prefopts(tmp_path: Path) -> None:
    """TRL gives a prompt the completion of the row before it, so that data sorted by prompt or label meets its own
    neighbours; here the pairs follow from a shuffle of the whole step that the rows' content decides.
    """
    other = random.Random(1).sample(ROWS, len(ROWS))
    ours = [Ours().said(EQUAL, rows) for rows in (ROWS, other)]
    assert_equal(ours[1], ours[0])
    theirs = [on_labels(rows, tmp_path).said() for rows in (ROWS, other)]
    assert_differ(theirs[1], theirs[0])
    assert_differ(ours[0], theirs[0])


def test_a_completion_for_the_same_prompt_is_no_mismatch_here_and_is_one_in_trl(tmp_path: Path) -> None:
    """In data made from pairs rows come in twos of one prompt: TRL gives the second one the answer of the first."""
    first, second, third = examples([(1.0,)] * 3, seed=5)
    rows = [first, demonstration(first.prompt, second.completions[0]), third]
    own = [completion for example in rows[:2] for completion in example.completions]
    trls = on_labels(rows, tmp_path).trainer.train_dataset
    assert any(row["prompt_ids"] == first.prompt and row["KL_completion_ids"] in own for row in trls)
    pairs = prefopts_pairs(rows)
    assert len(pairs) == 3 and not any(prompt == first.prompt and answer in own for prompt, answer in pairs)


def test_the_drift_is_measured_once_a_step_where_trl_measures_it_in_every_forward_pass(tmp_path: Path) -> None:
    """With passes of two rows TRL's drift is a mean of two, clamped at 0 by itself; here it is that of the step, in
    however many passes.
    """
    ours = Ours()
    assert_equal(ours.said(EQUAL, ROWS, tokens=16), ours.said(EQUAL, ROWS))
    peer = on_labels(ROWS, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    theirs, passes = step(peer), []
    for rows in ([0, 1], [2, 3], [4, 5]):
        drift = drift_on_trls_pairs(peer, rows, ours)
        passes.append(ours.said(Fed(EQUAL, fed(drift)), [ROWS[row] for row in rows]))
    assert_equal(mean_of(passes), theirs)
    whole = drift_on_trls_pairs(peer, range(len(ROWS)), ours)
    assert_differ(ours.said(Fed(EQUAL, fed(whole)), ROWS), theirs)


def test_a_step_of_one_row_is_refused_by_both_and_a_pass_of_one_that_is_left_over_by_neither(tmp_path: Path) -> None:
    """Alone, a row is its own mismatch: the drift is then its own log-ratio, and whatever the row gained counts as
    nothing. TRL refuses passes of one row, but the last pass of a data set can be one; here it is part of a step.
    """
    with pytest.raises(ValueError, match="batch size must be > 1"):
        on_labels(ROWS, tmp_path, per_device_train_batch_size=1)
    assert KTO.facts.least == 2
    rows = ROWS[:3]
    peer = on_labels(rows, tmp_path, per_device_train_batch_size=2)
    last = peer.trainer.train_dataset[2]
    assert last["KL_completion_ids"] == last["completion_ids"]
    ours = Ours()
    mismatches = prefopts_pairs(rows)
    assert len(mismatches) == 3 and (last["prompt_ids"], last["completion_ids"]) not in mismatches
    assert_equal(ours.said(EQUAL, rows, tokens=1), ours.said(EQUAL, rows))


def test_class_weights_follow_from_the_rows_where_trl_takes_one_and_warns(tmp_path: Path) -> None:
    """Four good rows to one bad: with the weights that prefopt settles on, TRL gives the same."""
    rows = examples([(1.0,), (1.0,), (0.0,), (1.0,), (1.0,)], seed=2)
    settled, ours = KTO().settled(rows), Ours()
    good, bad = settled.weights
    assert (good, bad) != (1.0, 1.0) and 1 <= 4 * good / bad <= 4 / 3 + 1e-9
    weighted = on_labels(rows, tmp_path, desirable_weight=good, undesirable_weight=bad)
    drift = drift_on_trls_pairs(weighted, range(len(rows)), ours)
    assert_equal(ours.said(Fed(settled, fed(drift)), rows), weighted.said())
    plain = on_labels(rows, tmp_path)
    assert_differ(ours.said(Fed(settled, fed(drift)), rows), plain.said())
    assert_equal(ours.said(Fed(EQUAL, fed(drift)), rows), plain.said())
