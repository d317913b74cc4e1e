"""RLOO beside TRL's: loss and gradient on the same completions, and what TRL's differ by."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from online_peer import REWARDS, ROWS, assert_differ_in_gradient, ours, peer, seen, with_scores
from peer import TOLERANCE, assert_differ, assert_equal

from prefopt.objectives import RLOO


@pytest.mark.parametrize("moved", [False, True], ids=["first update", "later update"])
@pytest.mark.parametrize("beta", [0.0, 0.05, 0.5])
def test_loss_and_gradient_are_trls(beta: float, moved: bool, tmp_path: Path) -> None:
    theirs = peer("RLOO", ROWS, tmp_path, moved=moved, beta=beta).said()
    assert theirs.gradient.norm() > 1e-3
    assert_equal(ours(RLOO(beta=beta, clip=0.2), ROWS, moved=moved), theirs)


def test_while_the_policy_has_not_moved_clipping_is_nothing_and_then_it_is(tmp_path: Path) -> None:
    first = peer("RLOO", ROWS, tmp_path, beta=0.05).said()
    assert_equal(ours(RLOO(), ROWS), first)
    later = peer("RLOO", ROWS, tmp_path, moved=True, beta=0.05).said()
    assert_differ(ours(RLOO(), ROWS, moved=True), later)


def test_wide_open_trl_has_the_unclipped_gradient_too(tmp_path: Path) -> None:
    theirs = peer("RLOO", ROWS, tmp_path, moved=True, beta=0.05, epsilon=1e6).said()
    assert_equal(ours(RLOO(), ROWS, moved=True), theirs)


def test_the_logged_distance_is_trls_in_nats_of_a_completion_and_not_of_a_token(tmp_path: Path) -> None:
    theirs = peer("RLOO", ROWS, tmp_path, beta=0.05)
    lengths = [len(completion) for row in ROWS for completion in row.completions]
    per_token = seen(RLOO(), ROWS).metrics["kl_reference"] * len(lengths) / sum(lengths)
    assert per_token == pytest.approx(theirs.logged("kl"), rel=TOLERANCE)


def test_completions_without_a_reward_are_counted_by_trl_and_not_here(tmp_path: Path) -> None:
    """Both leave them out of the others' baseline; TRL divides by all the same."""
    rows = with_scores(ROWS, [(1.0, math.nan, 0.25, 3.0), *REWARDS[1:]])
    theirs, mine = peer("RLOO", rows, tmp_path, beta=0.05).said(), ours(RLOO(clip=0.2), rows)
    assert_equal(mine.times(11 / 12), theirs)
    assert_differ_in_gradient(mine, theirs)
