"""What an audit found: as data, and as a page to read."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.audit.check import SEVERITIES, Check, Finding, Severity
from prefopt.audit.table import Table
from prefopt.records import plain

HEADS = {"error": "errors", "warning": "warnings", "note": "notes"}


@dataclass(frozen=True)
class Report:
    """The findings of every check, in the order of the table of checks."""

    table: Table
    findings: list[tuple[Check, Finding]]

    @property
    def fired(self) -> list[tuple[Check, Finding]]:
        """What fired, the worst first, and within a severity what concerns most rows."""
        fired = [(check, finding) for check, finding in self.findings if finding.fired]
        return sorted(fired, key=lambda pair: (SEVERITIES.index(pair[0].severity), -len(pair[1].rows)))

    def at_least(self, severity: Severity) -> list[str]:
        """Names of the checks that fired and are as severe as that, or more."""
        worst = SEVERITIES[: SEVERITIES.index(severity) + 1]
        return [check.name for check, _ in self.fired if check.severity in worst]

    def share(self, finding: Finding) -> float:
        """How much of the set a finding is about: of what is learnt, else of the rows."""
        if len(finding.items) == len(finding.rows) or not finding.items:
            return len(finding.rows) / max(1, len(self.table.lines))
        return len(finding.items) / max(1, len(self.table.items))

    def data(self) -> dict[str, Any]:
        """Everything, for JSON."""
        table = self.table
        found: dict[str, Any] = plain(
            {
                "source": table.source,
                "shape": table.shape,
                "kind": table.kind,
                "rows": len(table.lines),
                "items": len(table.items),
                "fired": {level: self._named(level) for level in SEVERITIES},
                "checks": [self._check(check, finding) for check, finding in self.findings],
            }
        )
        return found

    def _named(self, severity: str) -> list[str]:
        return [check.name for check, _ in self.fired if check.severity == severity]

    def _check(self, check: Check, finding: Finding) -> dict[str, Any]:
        table = self.table
        rows = [{"where": table.place(line), "what": what} for line, what in sorted(finding.rows.items())]
        ranked = [{"where": table.place(line), "score": score} for line, score in finding.ranked]
        return {
            "name": check.name,
            "severity": check.severity,
            "fired": finding.fired,
            "count": None if finding.skipped else len(finding.rows),
            "share": None if finding.skipped else self.share(finding),
            "measured": finding.measured.summary() if finding.measured else None,
            "said": finding.said,
            "not_made": finding.skipped or None,
            "counts": check.counts,
            "why": check.why,
            "remedy": check.remedy,
            "source": check.source,
            "rows": rows,
            "ranked": ranked,
        }

    def page(self, width: int = 100, examples: int = 3) -> str:
        """A page for a reader: what fired, the worst first, with rows to look at; then what is fine, and not known."""
        table, lines = self.table, []
        lines.append(f"{table.source}: {table.shape}")
        lines.append(f"{len(table.lines):,} rows, {len(table.items):,} {table.kind}")
        for severity in SEVERITIES:
            fired = [(check, finding) for check, finding in self.fired if check.severity == severity]
            if fired:
                lines += ["", HEADS[severity]]
            for check, finding in fired:
                lines += self._block(check, finding, width, examples)
        lines += self._rest(width)
        return "\n".join(lines)

    def _block(self, check: Check, finding: Finding, width: int, examples: int) -> Iterator[str]:
        count, share = len(finding.rows), ""
        if count:
            share = f"{count:,} row{'s' * (count > 1)}, {100 * self.share(finding):.1f} %"
        yield f"  {check.name:<18} {share}".rstrip()
        for label, text in (("", finding.said or check.counts), ("why", check.why), ("do", check.remedy)):
            yield from _wrapped(label, text, width)
        for line, what in list(finding.rows.items())[:examples]:
            yield _cut(f"      {Path(self.table.place(line)).name}  {self._short(line, what)}".rstrip(), width)
        if count > examples > 0:
            yield f"      and {count - examples:,} more; --json lists them"

    def _short(self, line: int, what: str) -> str:
        """What is said about a row, with the places of others short: by their line in its file, else as `file:line`."""
        # only whole places: a.jsonl is also the end of data.jsonl and of held/a.jsonl
        own = self.table.place(line).rpartition(":")[0]
        what = re.sub(rf"(?<!\S){re.escape(own)}:(?=\d)", "line ", what)
        other = rf"(?!{re.escape(Path(own).name)}:)[^/]*:\d"
        for table in (self.table, self.table.held):
            if table is not None and table.lines:
                folder = Path(table.place(0)).parent
                what = re.sub(rf"(?<!\S){re.escape(str(folder))}/(?={other})", "", what)
                what = re.sub(rf"(?<!\S){re.escape(str(folder.parent))}/(?=[^/]*/[^/]*:\d)", "", what)
        return what

    def _rest(self, width: int) -> Iterator[str]:
        fine = [check.name for check, finding in self.findings if not finding.fired and not finding.skipped]
        if fine:
            yield "\nnothing found by"
            yield from textwrap.wrap(", ".join(fine), width, initial_indent="  ", subsequent_indent="  ")
        measured = [(check, f) for check, f in self.findings if not f.fired and not f.skipped and f.said]
        if measured:
            yield "\nmeasured"
            for check, finding in measured:
                yield from _wrapped(check.name, finding.said, width, 18)
        left: dict[str, list[str]] = {}
        for check, finding in self.findings:
            if finding.skipped:
                left.setdefault(finding.skipped, []).append(check.name)
        if left:
            yield "\nnot made"
        for why, names in left.items():
            yield from textwrap.wrap(f"{', '.join(names)}: {why}", width, initial_indent="  ", subsequent_indent="    ")


def _wrapped(label: str, text: str, width: int, room: int = 3) -> list[str]:
    start = f"    {label:<{room}} " if label else "    "
    return textwrap.wrap(text, width, initial_indent=start, subsequent_indent=" " * len(start), break_long_words=False)


def _cut(text: str, width: int) -> str:
    text = " ".join(text.split("\n"))
    return text if len(text) <= width else text[: width - 3] + "..."
