from __future__ import annotations

import math

import numpy as np
import pytest

from prefopt.evaluate.statistics import mean, standard_error, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17:857-872, table I, method 3 (score without continuity correction)
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_intervals(successes, n, low, high):
    estimate = wilson(successes, n)
    assert estimate.value == successes / n
    assert (estimate.low, estimate.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_wilson_bounds_solve_the_score_equation():
    # a bound b satisfies (p - b)^2 = z^2 b (1 - b) / n
    estimate, z = wilson(7.5, 10, confidence=0.9), 1.6448536269514722
    for bound in (estimate.low, estimate.high):
        assert (0.75 - bound) ** 2 == pytest.approx(z * z * bound * (1 - bound) / 10, rel=1e-9)


def test_wilson_of_nothing_is_none_with_a_reason_and_of_a_non_proportion_refused():
    assert wilson(0, 0).summary() == {"value": None, "low": None, "high": None, "n": 0, "why": "nothing was measured"}
    with pytest.raises(ValueError, match="5 successes of 4"):
        wilson(5, 4)
    with pytest.raises(ValueError, match="confidence"):
        wilson(1, 2, confidence=95)


def test_bootstrap_agrees_with_the_normal_interval_on_many_items():
    x = np.random.default_rng(0).exponential(size=2000)
    estimate = mean(x.tolist())
    half = 1.96 * standard_error(x)
    assert estimate.value == pytest.approx(x.mean())
    assert estimate.low == pytest.approx(x.mean() - half, abs=half / 10)
    assert estimate.high == pytest.approx(x.mean() + half, abs=half / 10)
    assert estimate.n == 2000 and estimate.why == ""


def test_bootstrap_interval_covers_the_true_mean_about_as_often_as_it_says():
    random = np.random.default_rng(1)
    covered = 0
    for trial in range(300):
        estimate = mean(random.integers(0, 2, size=60).tolist(), seed=trial)
        covered += estimate.low <= 0.5 <= estimate.high
    assert 0.90 <= covered / 300 <= 0.98


def test_a_seed_fixes_the_bootstrap_and_small_blocks_draw_the_same_distribution(monkeypatch):
    x = [0.0, 1.0, 1.0, 3.0, 7.0]
    assert mean(x, seed=3) == mean(x, seed=3)
    whole = mean(x, seed=3)
    monkeypatch.setattr("prefopt.evaluate.statistics.BLOCK", 1)
    pieces = mean(x, seed=4)
    assert (pieces.low, pieces.high) == (pytest.approx(whole.low, abs=0.3), pytest.approx(whole.high, abs=0.3))


@pytest.mark.parametrize(
    ("x", "value", "why"),
    [
        ([], None, "nothing was measured"),
        ([2.0], 2.0, "one item"),
        ([1.0, 1.0, 1.0], 1.0, "all 3 items are equal"),
        ([1.0, math.nan], None, "1 of 2 are not finite"),
    ],
)
def test_what_has_no_interval_says_why(x, value, why):
    estimate = mean(x)
    assert (estimate.value, estimate.low, estimate.high) == (value, None, None)
    assert why in estimate.why and estimate.n == len(x)


def test_standard_error_by_hand():
    # deviations -1, 0, 1: variance 2 / 2 = 1; sqrt(1 / 3)
    assert standard_error([1.0, 2.0, 3.0]) == pytest.approx(math.sqrt(1 / 3))
    assert standard_error([1.0]) is None
