"""Online DPO beside TRL's: loss and gradient on the same two completions of each prompt, and what TRL's differ by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from laws import llama
from online_peer import assert_differ_in_gradient, gradient, ours
from peer import PADDING, POLICY, REFERENCE, SETTINGS, Said, assert_equal, examples, text, word_tokenizer
from torch import Tensor

from prefopt.objectives import OnlineDPO
from prefopt.records import Example

online_dpo = pytest.importorskip("trl.experimental.online_dpo")

ROWS = examples([(1.0, 0.0), (0.2, 0.7), (-1.0, 3.0), (0.5, 0.4)], seed=4)


def padded(sequences: Sequence[Sequence[int]], left: bool) -> tuple[Tensor, Tensor]:
    """Token ids and which of them are no padding, [sequences, longest] each."""
    longest = max(map(len, sequences))
    ids, mask = [], []
    for sequence in sequences:
        gap, own = [PADDING] * (longest - len(sequence)), list(sequence)
        ids.append(gap + own if left else own + gap)
        mask.append([0] * len(gap) + [1] * len(own) if left else [1] * len(own) + [0] * len(gap))
    return torch.tensor(ids), torch.tensor(mask)


def theirs(rows: Sequence[Example], folder: Path, **options: Any) -> Said:
    """TRL's training step, given the completions that it would generate: first one of each prompt, then the other."""
    completions = [row.completions[place] for place in range(2) for row in rows]
    scores = [row.scores[place] for place in range(2) for row in rows]
    settings = {**SETTINGS, "output_dir": str(folder), "per_device_train_batch_size": len(rows), **options}
    settings.pop("train_sampling_strategy")
    trainer = online_dpo.OnlineDPOTrainer(
        model=llama(POLICY),
        ref_model=llama(REFERENCE),
        reward_funcs=lambda **_: [None if math.isnan(score) else score for score in scores],
        args=online_dpo.OnlineDPOConfig(**settings),
        train_dataset=datasets.Dataset.from_list([{"prompt": text(row.prompt)} for row in rows]),
        processing_class=word_tokenizer(),
    )
    given = (*padded([row.prompt for row in rows] * 2, left=True), *padded(completions, left=False), None)
    trainer._generate = lambda *_: given
    loss = trainer.training_step(trainer.model, {"prompt": [text(row.prompt) for row in rows]})
    return Said(loss.item(), torch.cat([gradient(p) for p in trainer.model.parameters()]))


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_loss_and_gradient_are_trls(loss_type: Any, beta: float, tmp_path: Path) -> None:
    mine = ours(OnlineDPO(beta=beta, loss_type=loss_type), ROWS)
    assert_equal(mine, theirs(ROWS, tmp_path, beta=beta, loss_type=loss_type))


# ---------------------------------------------------------------- intended differences


def scored(first: tuple[float, float]) -> list[Example]:
    return [Example(ROWS[0].prompt, ROWS[0].completions, list(first), ROWS[0].trained), *ROWS[1:]]


def test_of_two_equally_good_completions_trl_prefers_the_first_and_here_none_is(tmp_path: Path) -> None:
    tied = theirs(scored((0.5, 0.5)), tmp_path, beta=0.1)
    assert_equal(ours(OnlineDPO(beta=0.1), scored((0.6, 0.5))), tied)
    mine, others = ours(OnlineDPO(beta=0.1), scored((0.5, 0.5))), ours(OnlineDPO(beta=0.1), ROWS[1:])
    assert_equal(mine, others.times(3 / 4))
    assert_differ_in_gradient(mine, tied)


def test_a_reward_that_is_missing_is_a_zero_in_trl_and_no_reward_here(tmp_path: Path) -> None:
    missing = theirs(scored((math.nan, -1.0)), tmp_path, beta=0.1)
    assert_equal(ours(OnlineDPO(beta=0.1), scored((0.0, -1.0))), missing)
    mine = ours(OnlineDPO(beta=0.1), scored((math.nan, -1.0)))
    assert_equal(mine, ours(OnlineDPO(beta=0.1), ROWS[1:]).times(3 / 4))
    assert_differ_in_gradient(mine, missing)


def test_the_temperature_that_completions_are_drawn_at_is_read_here_and_not_by_trl(tmp_path: Path) -> None:
    """TRL draws at 0.9 unless told otherwise, and scores as if at 1."""
    said = theirs(ROWS, tmp_path, beta=0.1, temperature=0.7)
    assert_equal(ours(OnlineDPO(beta=0.1), ROWS), said)
    assert_differ_in_gradient(ours(OnlineDPO(beta=0.1), ROWS, temperature=0.7), said)
