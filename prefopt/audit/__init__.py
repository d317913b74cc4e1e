"""Preference data looked over before it is trained on: what is wrong, where, why it matters, what to do.

A check is a pure function of a `Table`: the rows of a source as text and as tokens. Nothing here imports torch, but
`asking`, which is loaded where a model is to be asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.audit import (
    answers,
    balance,
    contradictions,
    duplicates,
    leakage,
    lengths,
    model,
    pairs,
    surface,
    texts,
    tokens,
    verifiable,
)
from prefopt.audit.check import Check, Finding, skipped
from prefopt.audit.fix import clean
from prefopt.audit.options import AnswerOptions, AuditOptions
from prefopt.audit.report import Report
from prefopt.audit.table import Table, read_table
from prefopt.data import DataOptions
from prefopt.records import InputError

if TYPE_CHECKING:
    from prefopt.audit.asking import Ready

# Every check, in the order of a report.
CHECKS: tuple[Check, ...] = (
    *answers.CHECKS,
    *duplicates.CHECKS,
    *contradictions.CHECKS,
    *leakage.CHECKS,
    *pairs.CHECKS,
    *texts.CHECKS,
    *tokens.CHECKS,
    *balance.CHECKS,
    *lengths.CHECKS,
    *surface.CHECKS,
    *verifiable.CHECKS,
    *model.CHECKS,
)
BY_NAME = {check.name: check for check in CHECKS}

__all__ = ["CHECKS", "AnswerOptions", "AuditOptions", "Check", "Finding", "Report", "Table", "audit", "clean"]


def audit(
    source: str | Path,
    data: DataOptions | None = None,
    options: AuditOptions | None = None,
    where: AnswerOptions | None = None,
    tokenizer: Any = None,
    held: str | Path | None = None,
    asked: Ready | None = None,
) -> Report:
    """Look a source over.

    data: how it is read. where: where rows and answers give the right answer. tokenizer: the one training uses, for
    what shows only as tokens. held: rows that are evaluated on. asked: a model from `prefopt.audit.asking.ready`, whose
    tokenizer is then taken. InputError where the source cannot be read, or a check is named that there is not.
    """
    data, options = data or DataOptions(), options or AuditOptions()
    wanted = chosen(options.checks, options.skip)
    other = None if held is None else read_table(held, data, options.kind)
    table = read_table(source, data, options.kind, asked.tokenizer if asked else tokenizer, other)
    table = replace(table, answers=where or AnswerOptions())
    if asked is not None:
        from prefopt.audit.asking import ask

        table = replace(table, asked=ask(asked, table, options.model_rows, options.model_samples))
    return Report(table, [(check, find(check, table)) for check in wanted])


def chosen(only: Sequence[str], skip: Sequence[str]) -> list[Check]:
    """The checks to make. InputError, with the nearest name, for one that there is not."""
    import difflib

    for name in [*only, *skip]:
        if name not in BY_NAME:
            near = difflib.get_close_matches(name, BY_NAME, 1)
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(BY_NAME)}"
            raise InputError(f"{name!r} is not a check; {hint}")
    return [check for check in CHECKS if (not only or check.name in only) and check.name not in skip]


def find(check: Check, table: Table) -> Finding:
    """What one check finds, or why it cannot be made of these rows."""
    if table.kind not in check.kinds:
        return skipped(f"not for {table.kind}")
    if not table.items and check.name not in ("wrong-row", "empty", "identical", "tied-scores"):
        return skipped("no row is left to look at")
    if check.needs == "tokens" and table.encoder is None:
        return skipped("tokens are needed: give --tokenizer DIR or --model DIR")
    if check.needs == "model" and table.asked is None:
        return skipped("a model is needed: give --model DIR")
    if check.needs == "scores" and not any(item.scores for item in table.items) and check.name != "tied-scores":
        return skipped("the rows have no ratings (score_chosen, score_rejected)")
    return check.find(table)
