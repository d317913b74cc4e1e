"""Estimates with confidence intervals. numpy only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

RESAMPLES = 4000
BLOCK = 4_000_000  # numbers drawn at once in a bootstrap: bounds its memory


@dataclass(frozen=True)
class Estimate:
    """A measured value with its confidence interval, over n independent items.

    What could not be measured is None, and `why` says so.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    why: str = ""

    def summary(self) -> dict[str, Any]:
        """value, low, high and n, for JSON; `why` too where something is missing."""
        numbers = {"value": self.value, "low": self.low, "high": self.high, "n": self.n}
        return {**numbers, "why": self.why} if self.why else numbers


def wilson(successes: float, n: int, confidence: float = 0.95) -> Estimate:
    """Interval of a proportion: (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), p = successes / n.

    successes: 0 to n; halves allowed (ties), which makes the interval wider than needed, never narrower. z: the normal
    quantile, 1.96 at 95 %. n = 0 gives None with a reason. ValueError on successes outside 0 to n.
    Wilson 1927, Journal of the American Statistical Association 22.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} is no proportion")
    if n == 0:
        return Estimate(None, None, None, 0, "nothing was measured")
    z, p = _quantile(confidence), successes / n
    middle = p + z * z / (2 * n)
    width = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    shrink = 1 + z * z / n
    return Estimate(p, max(0.0, (middle - width) / shrink), min(1.0, (middle + width) / shrink), n)


def mean(x: Sequence[float], *, seed: int = 0, confidence: float = 0.95) -> Estimate:
    """Mean of independent items x [n] with a percentile bootstrap interval: n items drawn anew, 4,000 times.

    Pairing is kept by giving one number per pair (a difference, or who won). One item, or items that are all equal,
    have a mean but no interval: resampling them shows no spread. None at all, or a value that is not finite: see `why`.
    Efron 1979, Annals of Statistics 7; Efron and Tibshirani 1993, section 13.3.
    """
    items = np.asarray(x, dtype=np.float64)
    if items.size == 0:
        return Estimate(None, None, None, 0, "nothing was measured")
    if not np.isfinite(items).all():
        return Estimate(None, None, None, len(items), f"{(~np.isfinite(items)).sum()} of {len(items)} are not finite")
    if (items == items[0]).all():
        why = (
            "one item has no spread" if len(items) == 1 else f"all {len(items)} items are equal: no spread to resample"
        )
        return Estimate(float(items[0]), None, None, len(items), why)
    tail = (1 - confidence) / 2
    low, high = np.quantile(_resampled_means(items, seed), [tail, 1 - tail])
    return Estimate(float(items.mean()), float(low), float(high), len(items))


def _resampled_means(items: np.ndarray, seed: int) -> np.ndarray:
    """Means of n items drawn with replacement, [RESAMPLES]."""
    random, n = np.random.default_rng(seed), len(items)
    rows = max(1, BLOCK // n)
    sizes = [min(rows, RESAMPLES - start) for start in range(0, RESAMPLES, rows)]
    return np.concatenate([items[random.integers(n, size=(size, n))].mean(1) for size in sizes])


def standard_error(x: Sequence[float]) -> float | None:
    """Of the mean of independent items: sqrt(sum (x - mean)^2 / (n - 1) / n). None below two items."""
    items = np.asarray(x, dtype=np.float64)
    return float(items.std(ddof=1) / math.sqrt(len(items))) if len(items) > 1 else None


def _quantile(confidence: float) -> float:
    """z with `confidence` of the standard normal between -z and z."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    return NormalDist().inv_cdf((1 + confidence) / 2)
