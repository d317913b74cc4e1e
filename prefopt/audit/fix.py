"""The rows without those that findings name, and a record of every row that was left out."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from prefopt.audit.report import Report
from prefopt.data.read import Row
from prefopt.records import InputError, plain

TABLES = {".csv": ",", ".tsv": "\t"}
LINES = (".jsonl", ".ndjson", ".json")


class Cleaned(NamedTuple):
    """rows: those that stay, as the file has them. removed: where each other row stood, which checks named it and why,
    and the row. counts: rows removed by check. partial: rows that stay, since only some of what they hold was named.
    """

    rows: list[Row]
    removed: list[dict[str, Any]]
    counts: dict[str, int]
    partial: int

    @property
    def kept(self) -> list[dict[str, Any]]:
        """The columns of the rows that stay."""
        return [row.values for row in self.rows]


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
    kept = [row for line, row in enumerate(table.lines) if line not in gone]
    counts = Counter(name for line in gone for name in why[line])
    return Cleaned(kept, removed, dict(counts), len(why.keys() - gone))


def log_path(out: Path) -> Path:
    """Where the removed rows of OUT are written: OUT.removed.jsonl."""
    return out.with_name(out.name.removesuffix(".jsonl") + ".removed.jsonl")


# ---------------------------------------------------------------- files


def refuse_place(out: Path, *read: str | None) -> None:
    """InputError where the rows or the record of the removed ones would take the place of what is read, or of a part
    of it, and where no reader would know the file by its suffix.
    """
    if out.suffix.lower() not in (*LINES, *TABLES):
        raise InputError(f"--fix {out}: the rows are written as text; name a file that ends in .jsonl, .csv or .tsv")
    taken = {Path(name).resolve() for whole in read if whole for name in (whole, whole.rpartition("@")[0]) if name}
    for file in (out, log_path(out)):
        place = file.resolve()
        if place in taken:
            raise InputError(f"--fix {out}: would write over the data itself, {file}; give another file")
        if place.parent in taken or (place.parent.name == "data" and place.parent.parent in taken):
            raise InputError(f"--fix {out}: {file} would become a part of the data; give a file in another folder")


def texts(cleaned: Cleaned, out: Path) -> tuple[str, str]:
    """The rows that stay, as `out` is read by its suffix, and the record of the others as JSON lines.

    InputError where the rows cannot be written so that they are read as what they were.
    """
    rows, suffix = cleaned.rows, out.suffix.lower()
    removed = "".join(_line(row["where"], row) for row in cleaned.removed)
    if len({row.untyped for row in rows}) > 1 or (suffix in TABLES and len({tuple(row.values) for row in rows}) > 1):
        raise InputError(f"--fix {out}: the files of the data have different columns or forms; give one at a time")
    if any(row.untyped != (suffix in TABLES) for row in rows):
        # a cell is text, which only in CSV may stand for a number, a label or messages
        known, wanted = ("CSV", ".csv") if rows[0].untyped else ("not CSV", ".jsonl")
        raise InputError(f"--fix {out}: the rows are {known}; name a file that ends in {wanted}")
    if suffix not in TABLES:
        return "".join(_line(row.where, row.values) for row in rows), removed
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=TABLES[suffix]).writerows(
        [list(rows[0].values), *(row.values.values() for row in rows)] if rows else []
    )
    return text.getvalue(), removed


def _line(where: str, values: dict[str, Any]) -> str:
    """One row as JSON: a number that is none as null, dates as text, half of a surrogate pair as its escape."""
    try:
        text = json.dumps(plain(values), ensure_ascii=False, default=_text)
    except TypeError as error:
        raise InputError(f"{where}: cannot be written as JSON: {error}; leave the column out") from None
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(json.loads(text))
    return text + "\n"


def _text(value: Any) -> str:
    if isinstance(value, (date, time, Decimal)):
        return str(value)
    raise TypeError(f"a column holds {type(value).__name__}")
