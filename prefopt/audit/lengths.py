"""Whether the longer answer is the better one: a policy that finds out writes longer, and no better."""

from __future__ import annotations

import math

import numpy as np

from prefopt.audit.check import Check, Finding, skipped
from prefopt.audit.classifier import Floats
from prefopt.audit.table import Table
from prefopt.evaluate.statistics import Estimate, wilson

DECIDES = 0.8  # area under the curve from which length alone tells good from bad
FEWEST = 20


def lengths(table: Table) -> Finding:
    """How well the number of words, or of tokens where there is a tokenizer, tells better from worse."""
    sizes, unit = sizes_of(table)
    if len(sizes) < FEWEST:
        return skipped(f"fewer than {FEWEST} rows")
    if table.kind == "labels":
        good = np.array([item.record.scores[0] > 0.5 for item in table.items])
        estimate = area(sizes[good, 0], sizes[~good, 0])
        said = "a good answer is longer than a bad one"
    else:
        longer = (sizes[:, 0] > sizes[:, 1]).sum() + (sizes[:, 0] == sizes[:, 1]).sum() / 2
        estimate = wilson(float(longer), len(sizes))
        said = (
            f"chosen is longer than rejected by {np.median(sizes[:, 0] - sizes[:, 1]):+.0f} {unit} (median), and longer"
        )
    if estimate.value is None:
        return skipped(estimate.why)
    fired = max(estimate.value, 1 - estimate.value) > DECIDES
    return Finding(fired=fired, measured=estimate, said=f"{said} in {100 * estimate.value:.0f} % of pairs")


def sizes_of(table: Table) -> tuple[Floats, str]:
    """Length of each item's completions, [n, 2] for pairs and [n, 1] for labels, and its unit."""
    each = max(1, table.num_answers)
    examples = [item.example for item in table.items]
    if all(examples) and examples:
        own = [[len(ids) for ids in example.completions] for example in examples if example]
        return np.array(own, dtype=float).reshape(-1, each), "tokens"
    return np.array(table.answer_words, dtype=float).reshape(-1, each), "words"


def area(good: Floats, bad: Floats) -> Estimate:
    """Probability that a good one is larger than a bad one, a tie counted half, with a normal interval.

    Area under the curve; its variance after Hanley and McNeil 1982, Radiology 143.
    """
    n, m = len(good), len(bad)
    if not n or not m:
        return Estimate(None, None, None, n + m, "one class has no rows")
    both = np.concatenate([good, bad])
    _, inverse, counts = np.unique(both, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # ties share their mean rank
    value = float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))
    first, second = value / (2 - value), 2 * value * value / (1 + value)
    variance = value * (1 - value) + (n - 1) * (first - value**2) + (m - 1) * (second - value**2)
    error = 1.96 * math.sqrt(max(0.0, variance) / (n * m))
    return Estimate(value, max(0.0, value - error), min(1.0, value + error), n + m)


CHECKS = (
    Check(
        "length",
        "warning",
        "how often the better answer is the longer one (fires above 80 % or below 20 %)",
        "length is the first thing a policy learns from such pairs: answers grow, or shrink, and win rates follow",
        "match lengths, use a loss that divides by length (simpo) or R-DPO's penalty, and compare at equal length",
        "0.8: a rule of this project's pilots; Park et al. 2024, arXiv:2403.19159, on length in DPO",
        lengths,
        kinds=("pairs", "labels"),
        removal="never",
    ),
)
