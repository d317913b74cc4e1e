"""One completion of each prompt: no group can vary, so nothing is said of groups, and successes alone tell a stall."""

from __future__ import annotations

import pytest
from test_rollout_source import PROMPTS, WORD, Counting, Dice, Says, online, take

from prefopt.budget import Budget
from prefopt.detectors import Run, Watch
from prefopt.detectors.sparse_reward import SparseReward
from prefopt.loop import Models
from prefopt.rollout.attempts import Attempts
from prefopt.rollout.options import RolloutOptions
from prefopt.rollout.prompts import Stream
from prefopt.rollout.source import Online

GROUPED = {"effective_groups", "zero_variance/solved", "zero_variance/failed"}


def watched(source, updates):
    """A watch that was told of so many updates."""
    watch = Watch(Run(options={"stall_window": 3}), [SparseReward()])
    batches = source.batches(Models(policy=None))
    for step in range(1, updates + 1):
        next(batches)
        watch.listen(step, source.seen)
    return watch


def test_groups_of_one_have_no_variance_to_be_zero():
    single, several = online(num_completions=1), online(num_completions=2)
    take(single, 1), take(several, 1)
    assert not GROUPED & single.seen.keys() and GROUPED <= several.seen.keys()
    assert "reward" in single.seen


def test_a_rare_success_is_no_stall():
    """One prompt of twelve is solved, so that 11 of 12 groups of one fail, and every rollout of all holds a success."""
    source = online(lambda s: float(s.columns["at"] == 0), batch_size=12, num_completions=1)
    assert watched(source, 5).find("sparse_reward") is None


def test_no_success_at_all_is_a_stall():
    found = watched(online(lambda s: 0.0, num_completions=1), 4).find("sparse_reward")
    assert found is not None and found.value == 1.0 and found.since == 1
    assert "in 100% of the rollouts no completion was rewarded" in found.reason


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
