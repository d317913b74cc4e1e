"""Writes the generated parts of the documentation from the text that `prefopt objectives` and `prefopt explain` print.

`make docs` runs it. A part stands between `<!-- begin NAME, written by make docs -->` and `<!-- end NAME -->`; what is
outside is written by hand.
"""

from __future__ import annotations

import ast
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefopt import catalogue
from prefopt.audit import CHECKS
from prefopt.audit.check import SEVERITIES
from prefopt.metrics import METRICS

FOLDER = Path(__file__).parent
TESTS = FOLDER.parent / "tests"
PART = re.compile(r"<!-- begin (\w+), written by make docs -->\n(.*?)<!-- end \1 -->", re.DOTALL)


def prose(text: str) -> str:
    """Plain text as Markdown: what would be read as markup is escaped outside backticks, papers become links."""
    pieces = re.split(r"(`[^`]*`)", text)
    for number in range(0, len(pieces), 2):
        plain = re.sub(r"[*~<]", lambda found: {"<": "&lt;"}.get(found[0], f"\\{found[0]}"), pieces[number])
        pieces[number] = re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", plain)
    return "".join(pieces)


def row(cells: list[str]) -> str:
    """One line of a table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def grid(headings: list[str], rows: list[list[str]]) -> str:
    return "\n".join([row(headings), "|" + "---|" * len(headings), *map(row, rows)])


# ---------------------------------------------------------------- objectives


def choices() -> str:
    rows = [
        [choice.have, ", ".join(f"[`{name}`](#{name})" for name in choice.names) or "-", prose(choice.why)]
        for choice in catalogue.choices()
    ]
    return grid(["you have", "use", "why"], rows)


def overview() -> str:
    rows = [[f"[`{name}`](#{name})", *map(prose, facts)] for name, *facts in catalogue.overview_rows()]
    notes = [f"- {prose(note)}" for note in catalogue.OVERVIEW_NOTES]
    return "\n".join([grid(list(catalogue.HEADINGS), rows), "", *notes])


def objectives() -> str:
    return "\n\n".join(objective(name) for name in catalogue.names())


def objective(name: str) -> str:
    """The section of one objective."""
    facts = catalogue.objective(name)
    formula = [
        re.sub(r"^(?=.)", "    ", text, flags=re.MULTILINE) if verbatim else prose(text)
        for verbatim, text in catalogue.passages(facts["formula"])
    ]
    needs = [[label, prose(text)] for label, text in catalogue.needs(facts)]
    options = [
        [f"`{option['name']}`", default(option), option["type"], prose(option["text"])] for option in facts["options"]
    ]
    return "\n\n".join(
        [
            f"## {name.upper()}",
            prose(f"{facts['title']}, {facts['source']}."),
            *formula,
            grid(["needs", ""], needs),
            grid(["option", "default", "value", ""], options) if options else "No options of its own.",
            f"**Healthy.** {prose(facts['healthy'])}",
            "**How it goes wrong.**\n\n" + "\n".join(f"- {prose(mode)}" for mode in catalogue.failures(facts)),
            f"```sh\n{facts['start']}\n```",
        ]
    )


def default(option: dict[str, str]) -> str:
    return f"`{option['default']}`" if option["default"] else "required"


# ---------------------------------------------------------------- metrics


def metrics() -> str:
    rows = [
        [
            f"`{name}`",
            prose(metric.definition),
            catalogue.BETTER[metric.sign],
            metric.unit or "-",
            prose(metric.healthy),
        ]
        for name, metric in METRICS.items()
    ]
    return grid(["name", "what it is", "better", "unit", "healthy"], rows)


def reading() -> str:
    """A section for each long answer, headed by all the metrics whose answer it is."""
    answers: dict[str, list[str]] = {}
    for name, metric in METRICS.items():
        if metric.more:
            answers.setdefault(metric.more, []).append(name)
    return "\n\n".join(f"### {', '.join(names)}\n\n{prose(more)}" for more, names in answers.items())


# ---------------------------------------------------------------- faults


def faults() -> str:
    """Every fault with what a run does then and the tests that inject it."""
    tested = injected()
    rows = [
        [str(number), prose(fault.what), prose(fault.expected), "<br>".join(map(linked, tested.get(number, []))) or "-"]
        for number, fault in fault_table().items()
    ]
    return grid(["", "what goes wrong", "what happens", "tests that inject it"], rows)


def untested() -> str:
    missing = [f"- {prose(fault.what)}: {prose(fault.untested)}" for fault in fault_table().values() if fault.untested]
    return "\n".join(missing)


def fault_table() -> dict[int, Any]:
    return dict(runpy.run_path(str(TESTS / "faults" / "table.py"))["FAULTS"])


def injected() -> dict[int, list[tuple[Path, str]]]:
    """Fault -> file and name of each test that is marked with its number."""
    found: dict[int, list[tuple[Path, str]]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for mark in getattr(node, "decorator_list", []):
                if ast.unparse(mark).startswith("pytest.mark.fault("):
                    for number in mark.args:
                        found.setdefault(ast.literal_eval(number), []).append((path, node.name))
    return found


def linked(test: tuple[Path, str]) -> str:
    path, name = test
    return f"[{name.removeprefix('test_').replace('_', ' ')}](../{path.relative_to(FOLDER.parent)})"


# ---------------------------------------------------------------- audit


def checks() -> str:
    """Every check of `prefopt audit`, by severity."""
    rows = [
        [f"`{check.name}`", check.severity, *map(prose, (check.counts, check.why, check.remedy, check.source))]
        for severity in SEVERITIES
        for check in CHECKS
        if check.severity == severity
    ]
    return grid(["check", "", "counts", "why it matters", "what to do", "where the rule comes from"], rows)


# ---------------------------------------------------------------- pages


PARTS: dict[str, Callable[[], str]] = {
    "choices": choices,
    "overview": overview,
    "objectives": objectives,
    "metrics": metrics,
    "reading": reading,
    "faults": faults,
    "untested": untested,
    "checks": checks,
}


def written(page: str) -> str:
    """A page with its generated parts as they should be. KeyError for a part that nothing writes."""
    return PART.sub(
        lambda found: f"<!-- begin {found[1]}, written by make docs -->\n{PARTS[found[1]]()}\n<!-- end {found[1]} -->",
        page,
    )


def main() -> None:
    for path in sorted(FOLDER.glob("*.md")):
        before = path.read_text(encoding="utf-8")
        after = written(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
