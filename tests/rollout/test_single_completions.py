"""One completion of each prompt: no group can vary, so nothing is said of groups, and successes alone tell a stall."""

from __future__ import annotations

import pytest
from test_rollout_source import PROMPTS, WORD, Counting, Dice, Says, online, take

from prefopt.budget import Budget
from prefopt.rollout.attempts import Attempts
from prefopt.rollout.options import RolloutOptions
from prefopt.rollout.prompts import Stream
from prefopt.rollout.source import Online

GROUPED = {"effective_groups", "zero_variance/solved", "zero_variance/failed"}


def test_groups_of_one_have_no_variance_to_be_zero():
    single, several = online(num_completions=1), online(num_completions=2)
    take(single, 1), take(several, 1)
    assert not GROUPED & single.seen.keys() and GROUPED <= several.seen.keys()
    assert "reward" in single.seen


def test_a_rare_success_is_no_stall():
    """One prompt of twelve is solved, so that 11 of 12 groups of one fail, and every rollout of all holds a success."""
    source = online(lambda s: float(s.columns["at"] == 0), batch_size=12, num_completions=1, stall_window=3)
    take(source, 5)
    assert source.watch.found is None


def test_no_success_at_all_is_a_stall():
    said: list[str] = []
    source = online(lambda s: 0.0, num_completions=1, stall_window=3, said=said)
    take(source, 4)
    assert len(said) == 1 and "in 100% of the rollouts no completion was rewarded" in said[0]
    assert source.watch.found is not None and source.watch.found.failed == 1.0


def test_there_is_nothing_to_search_for_among_groups_of_one():
    with pytest.raises(ValueError, match=r"num_completions=1 leaves nothing to differ; give 2 or more"):
        RolloutOptions(num_completions=1, dynamic_sampling=True)


@pytest.mark.parametrize(("share", "updates"), [(0.25, 4), (0.5, 6), (0.75, 12)])
def test_an_epoch_is_over_when_each_main_prompt_came_once(share, updates):
    """12 prompts, updates of 4, of which the easier ones take their share."""
    options = RolloutOptions(num_completions=2, max_tokens=4, easier_data="x", easier_share=share)
    stream = Stream(PROMPTS, 0, easier=PROMPTS[:3], easier_share=share)
    attempts = Attempts(Dice(), Says(lambda sample: 1.0), WORD, options)
    source = Online(stream, attempts, Counting(), options, batch_size=4, budget=Budget(10**6))
    assert source.steps_per_epoch == updates
    take(source, updates)
    assert stream.drawn == 12 and source.seen["epoch"] == 1.0
