"""`prefopt objectives` and `prefopt explain`: what there is to train with, and what numbers mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prefopt import catalogue
from prefopt.records import InputError
from prefopt.terminal import Parser, as_json, say

OBJECTIVES = """\
prefopt objectives [NAME] [--json]

Without a name: which objective fits what you have, and a table of all of them. With one: its formula, what it needs,
its options, what healthy metrics look like, how it goes wrong, and the command to start with.

  --json    the same as JSON, on stdout"""

EXPLAIN = """\
prefopt explain [METRIC] [--json]

What a number in metrics.jsonl is: definition, unit, which way is better, what healthy looks like, and how to read it.
`eval/NAME` is NAME on held-out rows. Without a name: all of them, one line each.

  --json    the same as JSON, on stdout"""


def objectives(words: list[str]) -> None:
    """Show all objectives, or one."""
    look_up("objectives", OBJECTIVES, words, catalogue.objective_data, catalogue.objective_page)


def explain(words: list[str]) -> None:
    """Show all metrics, or one."""
    look_up("explain", EXPLAIN, words, catalogue.metric_data, catalogue.metric_page)


def look_up(
    command: str,
    help_text: str,
    words: list[str],
    data: Callable[[str | None], dict[str, Any]],
    page: Callable[[str | None, int], str],
) -> None:
    """Print the page of a name, or of all without one; with --json its data."""
    parser = Parser(command, help_text)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--json", action="store_true")
    given = parser.read(words)
    if given.help:
        return say(help_text)
    if len(given.words) > 1:
        raise InputError(f"{parser.prog}: one name at a time, got {' '.join(given.words)}")
    name = given.words[0] if given.words else None
    say(as_json(data(name)) if given.json else page(name, catalogue.terminal_width()))
