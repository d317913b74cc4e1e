"""`prefopt audit`: what is wrong with data, before it is trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefopt import catalogue, config
from prefopt.commands.given import readable
from prefopt.records import InputError
from prefopt.terminal import Parser, Stopped, as_json, complain, libraries, say

AUDIT = """\
prefopt audit DATA [--tokenizer DIR] [--model DIR] [--eval FILE] [--fix OUT] [--json] [key=value ...]

  DATA                   the rows, in any form that `prefopt train` reads
  --tokenizer DIR        the tokenizer of the model to train, or a hub name: checks what shows only as tokens
  --model DIR            the model to train, or a reward model: asks it about the rows, too; its tokenizer is taken
  --eval FILE            held-out rows: looks for training rows among them
  --map chosen=good      read the column `good` as `chosen`; repeat for more
  --fix OUT              write the rows without those that must not stay, and OUT.removed.jsonl with each row that was
                         left out and why: copies, contradictions, empty or equal answers, leaked rows
  --remove CHECK         with --fix: leave out the rows of this check, too; repeat for more
  --fail-on LEVEL        exit with code 1 where a finding is an error (default), a warning or worse, a note or worse,
                         or never
  --list                 every check: what it counts, why it matters, what to do, where its threshold comes from
  --json                 print only the findings, as JSON, on stdout, with every row that is named

Errors are what would stop training or teach the wrong thing, warnings what makes it worse, notes what to know.
A row named is a row to look at: only --fix removes, and only what is safe to remove unseen."""

SECTIONS = {
    "audit": "prefopt.audit.options:AuditOptions",
    "answers": "prefopt.audit.options:AnswerOptions",
    "data": config.SECTIONS["data"],
    "model": config.SECTIONS["model"],
}
LEVELS = ("error", "warning", "note", "never")


def audit(words: list[str]) -> None:
    """Look data over, show what was found, and write what is left after removing rows."""
    given = audit_parser().read(words)
    if given.help:
        return say(audit_help())
    if given.list:
        return say(as_json(checks_data()) if given.json else checks_page(catalogue.terminal_width()))
    source, typed = source_of(given.words)
    if given.remove and given.fix is None:
        raise InputError("--remove is read with --fix OUT only; give that too, or leave it out")
    if given.fix is not None:
        from prefopt.audit.fix import refuse_place

        refuse_place(given.fix, source, given.eval)
    if given.fail_on not in LEVELS:
        raise InputError(f"--fail-on {given.fail_on}: choose one of {', '.join(LEVELS)}")
    layer = config.parse_overrides([*(f"map.{word}" for word in given.map), *typed])
    if given.model is None and (unread := [key for key in ("model_rows", "model_samples") if key in layer]):
        raise InputError(f"{unread[0]} is read with --model DIR only; give that too, or leave it out")
    sections = SECTIONS if given.model or given.tokenizer else {k: v for k, v in SECTIONS.items() if k != "model"}
    with readable():
        report = _report(given, source, config.resolve(sections, layer))
    width = catalogue.terminal_width()
    say(as_json(report.data()) if given.json else report.page(width, report_examples(layer)))
    if given.fix is not None:
        _fix(report, given.fix, given.remove)
    failed = [] if given.fail_on == "never" else report.at_least(given.fail_on)
    if failed:
        raise Stopped(f"{source}: {', '.join(failed)}")


def audit_parser() -> Parser:
    parser = Parser("audit", AUDIT)
    parser.add_argument("words", nargs="*")
    for flag in ("--model", "--tokenizer", "--eval"):
        parser.add_argument(flag)
    for flag in ("--map", "--remove"):
        parser.add_argument(flag, action="append", default=[])
    parser.add_argument("--fix", type=Path)
    parser.add_argument("--fail-on", default="error")
    for flag in ("--json", "--list"):
        parser.add_argument(flag, action="store_true")
    return parser


def audit_help() -> str:
    """The flags, then the options with their comments."""
    lines, width = [AUDIT], catalogue.terminal_width()
    for section in ("audit", "answers"):
        lines += ["", section]
        for option in config.describe({section: SECTIONS[section]}):
            lines += catalogue.option_lines(option, width)
    return "\n".join([*lines, "", "Options of data and model are those of `prefopt train`."])


def report_examples(layer: config.Layer) -> int:
    """Rows of a finding that the page shows."""
    found: Any = config.resolve({"audit": SECTIONS["audit"]}, {k: v for k, v in layer.items() if k == "examples"})
    return int(found["audit"].examples)


def source_of(words: list[str]) -> tuple[str, list[str]]:
    """The data, and the options typed after it."""
    sources = [word for word in words if "=" not in word]
    if len(sources) != 1:
        found = "none is given" if not sources else f"got {' '.join(sources)}"
        raise InputError(f"audit needs one file of rows, {found}; `prefopt audit --help` shows how")
    return sources[0], [word for word in words if "=" in word]


def _report(given: Any, source: str, options: dict[str, Any]) -> Any:
    from prefopt.audit import audit as look

    if given.model is None and given.tokenizer is None:
        return look(source, options["data"], options["audit"], options["answers"], held=given.eval)
    with libraries(given.json):
        asked = tokenizer = None
        if given.model is not None:
            from prefopt.audit.asking import ready

            asked = ready(given.model, options["model"])
        else:
            from prefopt.models.load import load_tokenizer

            tokenizer = load_tokenizer(given.tokenizer, options["model"])
        return look(source, options["data"], options["audit"], options["answers"], tokenizer, given.eval, asked)


def _fix(report: Any, out: Path, names: list[str]) -> None:
    from prefopt.audit.fix import clean, log_path, texts

    cleaned = clean(report, names)
    for file, text in zip((out, log_path(out)), texts(cleaned, out), strict=True):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(text.encode())
        except OSError as error:
            raise InputError(f"{file}: cannot write: {error.strerror or error}") from None
    counts = ", ".join(f"{count:,} {name}" for name, count in cleaned.counts.items()) or "none"
    complain(f"wrote {len(cleaned.rows):,} rows to {out}; removed {len(cleaned.removed):,} ({counts}), listed with the")
    complain(f"reason in {log_path(out)}")
    if cleaned.partial:
        complain(f"rows that are kept, since only some of what they hold was named: {cleaned.partial:,}")


def checks_data() -> list[dict[str, Any]]:
    """Every check without what it finds, for JSON."""
    from prefopt.audit import CHECKS

    fields = ("name", "severity", "counts", "why", "remedy", "source", "kinds", "needs", "removal")
    return [{name: getattr(check, name) for name in fields} for check in CHECKS]


def checks_page(width: int) -> str:
    """Every check, for a reader."""
    import textwrap

    lines = []
    for check in checks_data():
        lines.append(f"{check['name']} ({check['severity']})")
        for label in ("counts", "why", "remedy", "source"):
            start = f"  {label:<7} "
            lines += textwrap.wrap(check[label], width, initial_indent=start, subsequent_indent=" " * len(start))
    return "\n".join(lines)
