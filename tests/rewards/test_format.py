"""Tags and patterns."""

from __future__ import annotations

import time

import pytest

from prefopt.records import InputError, Sample
from prefopt.rewards import RewardOptions, build
from prefopt.rewards.format import tags


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        ("\n<think>\na\n</think>\n\n<answer>b</answer> ", 1.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think>a</think>b", 0.0),
        ("<think>a</think><answer>b", 0.0),
        ("<think></think><answer>b</answer>", 0.0),
        ("<think>a</think><answer> </answer>", 0.0),
        ("x<think>a</think><answer>b</answer>", 0.0),
        ("<think>a</think>x<answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer>x", 0.0),
        ("<think>a<answer>c</answer></think><answer>b</answer>", 0.0),
        ("<think>a<answer></think>b</answer>", 0.0),
        ("<think>a</think><think>a</think><answer>b</answer>", 0.0),
        ("</think>a<think><answer>b</answer>", 0.0),
        ("", 0.0),
        ("<think>" * 1_000_000, 0.0),
        ("<think>" + "<" * 10_000_000 + "</think><answer>\x00\ud800</answer>", 1.0),
    ],
    ids=lambda value: (
        None if isinstance(value, str) and len(value) < 60 else "long" if isinstance(value, str) else None
    ),
)
def test_tags_stand_once_each_in_their_order_with_nothing_beside_them(text: str, value: float) -> None:
    (score,) = tags(["think", "answer"])([Sample("p", text)])
    assert score.value == value and bool(score.why) == (value == 0)


def test_a_pattern_matches_the_whole_completion_and_is_stopped_where_it_never_ends() -> None:
    options = RewardOptions(reward="format", format_pattern=r"(a+)+b?", sample_deadline=0.5, reward_workers=1)
    reward = build(options)
    try:
        start = time.monotonic()
        scores = reward([Sample("p", text) for text in ("aaab", "xaab", "a" * 60 + "!", "aab\n", "a")])
        assert time.monotonic() - start < 5
    finally:
        reward.close()
    assert [score.value for score in scores] == [1.0, 0.0, None, 0.0, 1.0]


def test_a_pattern_that_is_none_is_refused_at_once() -> None:
    with pytest.raises(InputError, match="no regular expression"):
        build(RewardOptions(reward="format", format_pattern="(a"))
