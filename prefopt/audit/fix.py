"""The rows without those that findings name, and a record of every row that was left out."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prefopt.audit.report import Report
from prefopt.records import InputError


class Cleaned(NamedTuple):
    """kept: the rows as the file has them. removed: where each other row stood, which checks named it and why, and
    the row. counts: rows removed by check. partial: rows that stay, since only some of what they hold was named.
    """

    kept: list[dict[str, Any]]
    removed: list[dict[str, Any]]
    counts: dict[str, int]
    partial: int


def clean(report: Report, names: Sequence[str] = ()) -> Cleaned:
    """Leave out the rows that safe checks name, and the checks in `names`.

    A row that holds several items, such as a tree of ranked answers, is removed where all of them are named.
    InputError for a check that names no rows, and for messages one per row.
    """
    table = report.table
    if table.loose:
        raise InputError(f"{table.source}: messages one per row cannot be removed alone; give one tree per row")
    chosen = {check.name: finding for check, finding in report.findings if check.removal == "safe"}
    for name in names:
        check, finding = next(((c, f) for c, f in report.findings if c.name == name), (None, None))
        if check is None or finding is None:
            raise InputError(f"remove: {name!r} was not among the checks made")
        if check.removal == "never":
            raise InputError(f"remove: {name} is about the whole set, and names no rows to remove")
        chosen[name] = finding
    why: dict[int, dict[str, str]] = defaultdict(dict)
    for name, finding in chosen.items():
        for line, what in finding.rows.items():
            why[line][name] = what
    named = {number for finding in chosen.values() for number in finding.items}
    whole = Counter(item.line for number, item in enumerate(table.items) if number not in named)
    gone = {line for line in why if not whole[line]}
    # a line that is no row at all cannot be written, whoever asks
    unread = {fault.line: fault.message for fault in table.faults if not table.lines[fault.line].values}
    for line, message in unread.items():
        why[line].setdefault("wrong-row", message)
    gone |= unread.keys()
    removed = [
        {"where": table.place(line), "checks": list(why[line]), "why": list(why[line].values()), "row": row.values}
        for line, row in enumerate(table.lines)
        if line in gone
    ]
    kept = [row.values for line, row in enumerate(table.lines) if line not in gone]
    counts = Counter(name for line in gone for name in why[line])
    return Cleaned(kept, removed, dict(counts), len(why.keys() - gone))


def log_path(out: Path) -> Path:
    """Where the removed rows of OUT are written: OUT.removed.jsonl."""
    return out.with_name(out.name.removesuffix(".jsonl") + ".removed.jsonl")
