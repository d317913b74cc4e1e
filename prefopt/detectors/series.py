"""Arithmetic on short series of numbers, and on counts of successes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

SURE = 0.05  # a one-sided bound fails to hold in this share of cases
Z_ONE_SIDED, Z_TWO_SIDED = 1.6449, 1.96
T = TypeVar("T")


def keep(values: list[T], value: T, most: int) -> list[T]:
    """Append and forget the oldest beyond `most`; the same list."""
    values.append(value)
    del values[:-most]
    return values


def upper_bound(successes: int, n: int) -> float:
    """The chance of success above which so few of n would be seen in 5 % of cases only.

    Without a success 1 - 0.05^(1/n), which is 3 / n (Hanley and Lippman-Hand 1983, JAMA 249); else the upper end of
    the one-sided Wilson interval. 1 for n = 0.
    """
    if not n:
        return 1.0
    if not successes:
        return 1 - SURE ** (1 / n)
    return wilson_upper(successes / n, n, Z_ONE_SIDED)


def wilson_upper(share: float, n: float, z: float = Z_TWO_SIDED) -> float:
    """The upper end of Wilson's interval of a share of n; 95 % as it is."""
    middle = share + z * z / (2 * n)
    return (middle + z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))) / (1 + z * z / n)


def needed(p: float) -> int:
    """Completions of a prompt of which at least one succeeds in half the groups: ln 0.5 / ln(1 - p), rounded up."""
    return math.ceil(math.log(0.5) / math.log1p(-p)) if 0 < p < 1 else 1


def is_flat(x: Sequence[float]) -> bool:
    """Whether the slope of x over its place is within two standard errors of 0, or not above it. x: at least 3."""
    n = len(x)
    middle, level = (n - 1) / 2, sum(x) / n
    spread = sum((place - middle) ** 2 for place in range(n))
    slope = sum((place - middle) * (value - level) for place, value in enumerate(x)) / spread
    left = [value - level - slope * (place - middle) for place, value in enumerate(x)]
    rest = sum(value * value for value in left)  # of a huge value too, where ** 2 would raise
    return slope <= 2 * math.sqrt(rest / (n - 2) / spread)
