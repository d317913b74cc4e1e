"""GRPO and its family beside TRL's: loss and gradient on the same completions, and what TRL's differ by."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from online_peer import (
    LONGEST,
    REWARDS,
    ROWS,
    assert_differ_in_gradient,
    cut_off,
    ours,
    peer,
    seen,
    told,
    total,
    with_scores,
)
from peer import TOLERANCE, Said, assert_differ, assert_equal

from prefopt.objectives import BNPO, CISPO, DAPO, GRPO, GSPO, SAPO, DrGRPO, LitePPO
from prefopt.records import Example

PLAIN_K3 = {"beta": 0.2, "use_bias_correction_kl": False}
SAME: dict[str, tuple[dict[str, Any], Any]] = {
    "grpo": ({"loss_type": "grpo"}, GRPO()),
    "grpo with k3": ({"loss_type": "grpo", **PLAIN_K3}, GRPO(beta=0.2, kl="k3")),
    "grpo with weighted k3": ({"loss_type": "grpo", "beta": 0.2}, GRPO(beta=0.2, kl="k3_weighted")),
    "grpo, clipped wider above": (
        {"loss_type": "grpo", "epsilon": 0.1, "epsilon_high": 0.3},
        GRPO(clip_low=0.1, clip_high=0.3),
    ),
    "grpo, clipped twice": ({"loss_type": "grpo", "delta": 1.5}, GRPO(dual_clip=1.5)),
    "dr_grpo": ({"loss_type": "dr_grpo", "scale_rewards": "none"}, DrGRPO(length=LONGEST)),
    "dapo": ({"loss_type": "dapo", "epsilon_high": 0.28}, DAPO()),
    "dapo with k3": ({"loss_type": "dapo", "epsilon_high": 0.28, **PLAIN_K3}, DAPO(beta=0.2, kl="k3")),
    "bnpo": ({"loss_type": "bnpo"}, DAPO(clip_high=0.2)),
    "lite_ppo": ({"loss_type": "dapo", "scale_rewards": "batch"}, LitePPO(clip_high=0.2)),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 1.1}, CISPO(highest=1.1)),
    "gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
        GSPO(),
    ),
    "sapo": ({"loss_type": "sapo"}, SAPO()),
}


@pytest.mark.parametrize("moved", [False, True], ids=["first update", "later update"])
@pytest.mark.parametrize("name", SAME)
def test_loss_and_gradient_are_trls(name: str, moved: bool, tmp_path: Path) -> None:
    options, objective = SAME[name]
    theirs = peer("GRPO", ROWS, tmp_path, moved=moved, **options).said()
    assert theirs.gradient.norm() > 1e-3
    assert_equal(ours(objective, ROWS, moved=moved), theirs, name)


def test_the_temperature_that_completions_are_drawn_at_divides_the_logits_of_both(tmp_path: Path) -> None:
    theirs = peer("GRPO", ROWS, tmp_path, moved=True, loss_type="dapo", temperature=0.7).said()
    assert_equal(ours(DAPO(clip_high=0.2), ROWS, moved=True, temperature=0.7), theirs)
    assert_differ(ours(DAPO(clip_high=0.2), ROWS, moved=True), theirs)


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "dr_grpo"])
def test_tokens_that_the_policy_did_not_write_count_nothing_in_either(name: str, tmp_path: Path) -> None:
    options, objective = SAME[name]
    flags = [[[place % 3 != 1 for place in range(len(c))] for c in row.completions] for row in ROWS]
    rows = [replace(row, trained=own) for row, own in zip(ROWS, flags, strict=True)]
    theirs = peer("GRPO", rows, tmp_path, moved=True, **options).said()
    assert_equal(ours(objective, rows, moved=True), theirs, name)
    assert_differ(ours(objective, ROWS, moved=True), theirs)


# what TRL calls it, here
CORRECTIONS = {
    "token_truncate": "token",
    "sequence_truncate": "sequence",
    "token_mask": "token_mask",
    "sequence_mask": "sequence_mask",
}


@pytest.mark.parametrize("moved", [False, True], ids=["first update", "later update"])
@pytest.mark.parametrize("mode", CORRECTIONS)
def test_corrections_for_the_engine_that_drew_the_completions_are_trls(mode: str, moved: bool, tmp_path: Path) -> None:
    said = told(ROWS)
    modes = {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_max": 1.4}
    theirs = peer("GRPO", ROWS, tmp_path, moved=moved, sampler=said, loss_type="dapo", **modes).said()
    objective = DAPO(clip_high=0.2, correction=CORRECTIONS[mode], correction_cap=1.4)
    assert_equal(ours(objective, ROWS, moved=moved, sampler=said), theirs, mode)
    assert_differ(ours(DAPO(clip_high=0.2), ROWS, moved=moved, sampler=said), theirs)


def test_shares_of_clipped_tokens_are_trls(tmp_path: Path) -> None:
    theirs = peer("GRPO", ROWS, tmp_path, moved=True, loss_type="dapo", epsilon_high=0.28)
    theirs.said()
    metrics = seen(DAPO(), ROWS, moved=True).metrics
    for side in ("low", "high"):
        assert metrics[f"clip_fraction/{side}"] == pytest.approx(
            theirs.logged(f"clip_ratio/{side}_mean"), abs=TOLERANCE
        )
        assert metrics[f"clip_fraction/{side}"] > 0


# ---------------------------------------------------------------- intended differences


def without_score(place: int) -> list[Example]:
    return with_scores(ROWS, [[*ROWS[0].scores[:place], math.nan, *ROWS[0].scores[place + 1 :]], *REWARDS[1:]])


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo"])
def test_completions_without_a_reward_are_counted_by_trl_and_not_here(name: str, tmp_path: Path) -> None:
    """Both leave them out of the group's mean and spread and give them no advantage; TRL divides by all the same."""
    rows, (options, objective) = without_score(2), SAME[name]
    lengths = [len(completion) for row in rows for completion in row.completions]
    missing = len(rows[0].completions[2])
    part = (sum(lengths) - missing) / sum(lengths) if name == "dapo" else (len(lengths) - 1) / len(lengths)
    theirs, mine = peer("GRPO", rows, tmp_path, **options).said(), ours(objective, rows)
    assert_equal(mine.times(part), theirs, name)
    assert_differ_in_gradient(mine, theirs)


def test_completions_without_a_reward_are_pulled_to_the_reference_by_trl_and_not_here(tmp_path: Path) -> None:
    rows, (options, objective) = without_score(2), SAME["grpo with k3"]
    theirs = peer("GRPO", rows, tmp_path, **options).said().times(12)
    mine = ours(objective, rows).times(11)
    alone = replace(rows[0], completions=[rows[0].completions[2]], scores=[0.0], trained=[rows[0].trained[2]])
    assert_equal(mine + ours(objective, [alone]), theirs)


@pytest.mark.parametrize("name", ["grpo", "dapo"])
def test_a_completion_that_was_cut_off_is_a_part_of_trls_baseline_and_not_of_the_one_here(
    name: str, tmp_path: Path
) -> None:
    """With mask_truncated_completions TRL trains on no token of it but keeps its reward and, in a mean over
    completions, its place; here, ignored, it has no score.
    """
    rows, (options, objective) = [cut_off(ROWS[0], 3), *ROWS[1:]], SAME[name]
    theirs = peer("GRPO", rows, tmp_path, mask_truncated_completions=True, **options).said()
    silent = [*rows[0].trained[:3], [False] * len(rows[0].completions[3])]
    assert_equal(ours(objective, [replace(rows[0], trained=silent), *rows[1:]]), theirs)
    ignored = with_scores(rows, [(*REWARDS[0][:3], math.nan), *REWARDS[1:]])
    assert_differ_in_gradient(ours(objective, ignored), theirs)


def accumulated(rows: list[Example], folder: Path, **options: Any) -> Said:
    """TRL's loss and gradient of a step of one pass for each prompt."""
    passes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "steps_per_generation": 3}
    theirs = peer("GRPO", rows, folder, **passes, **options)
    theirs.trainer.current_gradient_accumulation_steps = 3
    return total([replace(theirs, inputs=inputs).said() for inputs in theirs.trainer._buffered_inputs])


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo"])
def test_the_number_of_passes_changes_nothing_in_either_where_trl_counts_the_step(name: str, tmp_path: Path) -> None:
    options, objective = SAME[name]
    assert_equal(ours(objective, ROWS, tokens=1), accumulated(ROWS, tmp_path, **options), name)


def test_trls_bnpo_is_a_mean_over_the_tokens_of_a_pass_and_the_mean_here_over_those_of_the_update(
    tmp_path: Path,
) -> None:
    """What TRL calls BNPO has no Beta normalisation, which is the method of that name, and depends on memory."""
    options, objective = SAME["bnpo"]
    theirs = accumulated(ROWS, tmp_path, **options)
    assert_equal(ours(objective, ROWS, tokens=1), ours(objective, ROWS))
    assert_differ_in_gradient(ours(objective, ROWS), theirs)
    assert_differ_in_gradient(
        ours(BNPO(lowest=-1.0, highest=3.0), ROWS), peer("GRPO", ROWS, tmp_path, **options).said()
    )


def test_gspo_with_a_weighted_k3_weights_tokens_by_their_own_ratio_here_and_by_the_completions_in_trl(
    tmp_path: Path,
) -> None:
    options = {**SAME["gspo"][0], "beta": 0.2}
    for moved in (False, True):
        theirs = peer("GRPO", ROWS, tmp_path, moved=moved, **options).said()
        assert_differ_in_gradient(ours(GSPO(beta=0.2, kl="k3_weighted"), ROWS, moved=moved), theirs)
