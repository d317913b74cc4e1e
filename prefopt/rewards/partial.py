"""Partial credit: shares in place of all or nothing, for rewards of your own.

A reward that is 0 for every sample teaches nothing; a share of the way does, as long as the whole way pays most: a
policy can settle on what earns a part. Results are shares from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any


def share_passed(results: Iterable[bool | None], bonus: float = 0.0) -> float | None:
    """The share of tests that passed; None, which is a test that could not be run, counts as not passed.

    bonus: share of the reward that only all tests together earn: 0 pays each alike, 1 is all or nothing.
    None without any test, or where none could be run. ValueError unless 0 <= bonus <= 1.
    """
    if not 0 <= bonus <= 1:
        raise ValueError(f"bonus must be from 0 to 1, got {bonus}")
    found = list(results)
    if all(result is None for result in found):
        return None
    share = sum(result is True for result in found) / len(found)
    return (1 - bonus) * share + bonus * (share == 1)


def steps_right(
    given: Sequence[Any], expected: Sequence[Any], same: Callable[[Any, Any], bool] | None = None
) -> float | None:
    """The share of expected steps that are given in their order, others between them allowed (longest common
    subsequence), of the longer of the two: padding an answer with steps earns nothing.

    same: when two steps are equal; by default `==`. None where no step is expected.
    """
    if not expected:
        return None
    equal = same or (lambda left, right: bool(left == right))
    row = [0] * (len(expected) + 1)
    for step in given:
        before = 0  # the row above, one to the left
        for position, wanted in enumerate(expected, 1):
            before, row[position] = (
                row[position],
                before + 1 if equal(step, wanted) else max(row[position], row[position - 1]),
            )
    return row[-1] / max(len(given), len(expected))


def prefix_right(given: Sequence[Any], expected: Sequence[Any]) -> float | None:
    """How far the given sequence agrees with the expected one from its start, as a share of the longer of the two.

    Text counts by character. 1 only where they are equal. None where nothing is expected.
    """
    if not expected:
        return None
    right = 0
    for left, wanted in zip(given, expected, strict=False):
        if left != wanted:
            break
        right += 1
    return right / max(len(given), len(expected))
