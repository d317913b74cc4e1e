"""What a check is, and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from prefopt.audit.table import Table
from prefopt.evaluate.statistics import Estimate

Severity = Literal["error", "warning", "note"]
Needs = Literal["text", "scores", "tokens", "held", "answers", "model"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """What a check found.

    rows: index of a row in the table -> what is wrong with it, or "" where the check's name says it all.
    items: the items it is about, where it is about items; a row may hold several of which others are fine.
    fired: whether it matters. measured: a quantity of the whole set, where the check has one. said: it in words.
    ranked: rows by how suspicious they are, the most first, with their score; for those who look by hand.
    skipped: why nothing could be measured; "" where it was.
    """

    rows: dict[int, str] = field(default_factory=dict)
    items: frozenset[int] = frozenset()
    fired: bool = False
    measured: Estimate | None = None
    said: str = ""
    ranked: list[tuple[int, float]] = field(default_factory=list)
    skipped: str = ""


@dataclass(frozen=True)
class Check:
    """One thing that can be wrong with data.

    name: for the command line. severity: error where training would be wrong or stop, warning where it would be worse,
    note where someone should know. counts: what a count of it counts. why: what it does to training. remedy: what to
    do. source: where the rule or its threshold comes from. kinds: what it can be asked of. removal: whether its rows
    may be removed, and whether that is safe without a look.
    """

    name: str
    severity: Severity
    counts: str
    why: str
    remedy: str
    source: str
    find: Callable[[Table], Finding]
    kinds: tuple[str, ...] = ("pairs", "labels", "ratings", "demonstrations", "steps", "prompts")
    needs: Needs = "text"
    removal: Literal["safe", "named", "never"] = "named"


def of_items(table: Table, found: Mapping[int, str], said: str = "") -> Finding:
    """A finding about items, by their number; their rows are named. It fires with the first."""
    rows: dict[int, str] = {}
    for number, why in found.items():
        rows.setdefault(table.items[number].line, why)
    return Finding(rows=rows, items=frozenset(found), fired=bool(found), said=said)


def of_rows(rows: dict[int, str], said: str = "") -> Finding:
    """A finding about whole rows. It fires with the first."""
    return Finding(rows=rows, fired=bool(rows), said=said)


def skipped(why: str) -> Finding:
    """A finding that could not be made."""
    return Finding(skipped=why)
