"""How labels are spread: between good and bad, and how many rows there are to learn from."""

from __future__ import annotations

import math

from prefopt.audit.check import Check, Finding, skipped
from prefopt.audit.table import Table
from prefopt.evaluate.statistics import wilson

LOPSIDED = 0.2  # share of the rarer class below which labels are lopsided
FEW = 500


def classes(table: Table) -> Finding:
    """Share of good answers among labels or steps, and the weight that makes the two classes count alike."""
    marks = [score for item in table.items for score in item.record.scores if not math.isnan(score)]
    good = sum(mark > 0.5 for mark in marks)
    share = wilson(good, len(marks))
    if share.value is None:
        return skipped(share.why)
    bad = len(marks) - good
    if not good or not bad:
        return Finding(fired=True, measured=share, said=f"all {len(marks):,} labels are {'good' if good else 'bad'}")
    ratio = good / bad
    name, weight = ("undesirable_weight", ratio) if ratio > 1 else ("desirable_weight", 1 / ratio)
    said = f"{good:,} good, {bad:,} bad"
    if table.kind == "labels":
        said += f"; {name}={weight:.3g} makes both count alike"
    return Finding(fired=min(share.value, 1 - share.value) < LOPSIDED, measured=share, said=said)


def size(table: Table) -> Finding:
    """How many rows there are to learn from."""
    total, prompts = len(table.items), set(table.keys) - {""}
    said = f"{total:,} {table.kind}" + (f", from {len(prompts):,} prompts" if prompts else "")
    return Finding(fired=total < FEW, said=said)


CHECKS = (
    Check(
        "imbalance",
        "warning",
        "the share of good answers among labels (fires where one class has less than 20 %)",
        "an objective on labels follows the larger class; with one class alone it cannot train",
        "add answers of the rarer class, or set the weight that is said, which kto takes",
        "Ethayarajh et al. 2024, arXiv:2402.01306: weights times numbers of the two classes about equal",
        classes,
        kinds=("labels", "steps"),
        removal="never",
    ),
    Check(
        "few-rows",
        "note",
        "how many rows there are (fires below 500)",
        "held-out numbers have wide intervals: with 50 held-out pairs an accuracy is known to 14 points",
        "add rows, or train few epochs and believe only large differences",
        "Wilson's interval",
        size,
        removal="never",
    ),
)
