"""Rows that are there twice: to the letter, or nearly."""

from __future__ import annotations

from collections import Counter

import numpy as np

from prefopt.audit.check import Check, Finding, of_items
from prefopt.audit.similar import SIMILARITY, Sets, candidates, least, signature
from prefopt.audit.table import Table, given

LEE = "Lee et al. 2022, arXiv:2107.06499: Jaccard index of 0.8"


def _exact(table: Table) -> dict[int, int]:
    """Items that repeat an earlier one: number -> the earlier one's number."""
    first: dict[tuple[object, ...], int] = {}
    again = {}
    for number, item in enumerate(table.items):
        key = (table.keys[number], table.answer_keys[number], tuple(map(str, item.record.scores)))
        if first.setdefault(key, number) != number:
            again[number] = first[key]
    return again


def exact(table: Table) -> Finding:
    """Items whose prompt, completions and labels were there before."""
    again = _exact(table)
    return of_items(table, {n: f"the same as {table.place(table.items[m].line)}" for n, m in again.items()})


def near(table: Table) -> Finding:
    """Items of which prompt and every completion are nearly those of an earlier one, but not to the letter.

    Labels are the same, and what a chat template is given.
    """
    each = table.num_answers
    if not each and table.kind != "prompts":
        return Finding(skipped="the rows hold different numbers of completions")
    signs = signature(table.asked_corpus)
    answers = signature(table.corpus)
    for place in range(each):
        signs = np.minimum(signs, answers[place::each])
    asked, answered = Sets(table.asked_corpus), Sets(table.corpus)
    labels: dict[tuple[object, ...], int] = {}
    kinds = [(tuple(item.record.scores), given(item.record)) for item in table.items]
    label = np.array([labels.setdefault(kind, len(labels)) for kind in kinds])
    found: dict[int, str] = {}
    done = np.zeros(len(signs), bool)
    done[list(_exact(table))] = True
    for pairs in candidates(signs):
        first, second = pairs[~done[pairs[:, 1]] & (label[pairs[:, 0]] == label[pairs[:, 1]])].T
        parts = [(answered, each * first + p, each * second + p) for p in range(each)]
        index = least([*parts, (asked, first, second)], SIMILARITY)
        close = index >= SIMILARITY
        for one, other, how in zip(first[close], second[close], index[close], strict=True):
            found.setdefault(int(other), f"nearly {table.place(table.items[one].line)} (index {how:.2f})")
        done[second[close]] = True
    return of_items(table, found)


def one_prompt(table: Table) -> Finding:
    """Prompts that own more than 2 % of the rows, and at least 20 of them."""
    counts = Counter(key for key in table.keys if key)
    many = {key for key, count in counts.items() if count >= max(20, 0.02 * len(table.items))}
    rows = {n: f"one of {counts[key]:,} rows with this prompt" for n, key in enumerate(table.keys) if key in many}
    return of_items(table, rows)


CHECKS = (
    Check(
        "duplicate",
        "warning",
        "rows that repeat an earlier row: prompt, completions and labels",
        "a copy counts twice, is learnt by heart, and may end up on both sides of a split",
        "remove the copies (--fix does)",
        "equality of texts, less white space and Unicode form",
        exact,
        removal="safe",
    ),
    Check(
        "near-duplicate",
        "warning",
        "rows whose prompt and completions are nearly those of an earlier row",
        "as copies, and no exact comparison finds them",
        "look at a few, then remove them with --remove near-duplicate",
        LEE,
        near,
    ),
    Check(
        "one-prompt",
        "note",
        "rows of a prompt that owns more than 2 % of all rows, and at least 20",
        "the run is about that prompt; held-out rows are taken by prompt, so the split is lumpy",
        "keep a few rows of it, unless it is meant to weigh that much",
        "a rule of thumb, not measured",
        one_prompt,
        kinds=("pairs", "labels", "demonstrations", "steps"),
        removal="never",
    ),
)
