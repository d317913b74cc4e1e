"""`prefopt score`: what a reward model says of answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefopt import config
from prefopt.records import InputError
from prefopt.terminal import Parser, as_json, complain, figure, libraries, say, summary_lines, write_rows

SCORE = """\
prefopt score --model DIR --data FILE [--out FILE] [key=value ...]

  --model DIR            a reward model: what `prefopt train reward` or `prefopt train prm` wrote, another directory
                         of a sequence classifier with one label, an adapter on one, or a hub name
  --data FILE            the answers, in any form that `prefopt train` reads
  --map chosen=good      read the column `good` as `chosen`; repeat for more
  --out FILE             write every row with its scores as JSON lines, which `prefopt train` reads
  --json                 print only the summary, as JSON, on stdout

What a row gains, by what it holds:
  pairs           score_chosen and score_rejected; those it had become rating_chosen and rating_rejected
  several answers scores, in the order of completions; those it had become ratings
  other answers   score
  steps           step_scores, the probability that each step is right, and of the whole answer min, product and
                  last (a process reward model; min is the usual one to choose by)

A score compares answers to one prompt; across prompts, or alone, it says little. The summary says how often the
answer labelled better scores more, with a 95 % interval.
Rows longer than the model's context are left out and counted; set max_length, or overlong=truncate.
Options such as dtype=bfloat16, skip_bad=true or chat_template=FILE are those of `prefopt train`."""


def score(words: list[str]) -> None:
    """Score the answers of a file with a reward model; show a summary and write the rows."""
    given = score_parser().read(words)
    if given.help:
        return say(SCORE)
    if given.model is None or given.data is None:
        raise InputError("score needs --model and --data; `prefopt score --help` shows how")
    layer = config.parse_overrides([*(f"map.{word}" for word in given.map), *given.words])
    sections = {name: config.SECTIONS[name] for name in ("model", "data")}
    options = config.resolve(sections, config.Layer({"max_length": None}), layer)
    with libraries(given.json):
        from prefopt.recipes import score as recipe

        found = recipe.score(given.model, given.data, options["model"], options["data"])
    for note in found.notes:
        complain(note)
    if given.out is not None:
        write_rows(given.out, found.rows)
        complain(f"wrote {len(found.rows):,} rows with their scores to {given.out}")
    say(as_json(found.summary) if given.json else "\n".join(score_lines(found.summary)))


def score_parser() -> Parser:
    parser = Parser("score", SCORE)
    parser.add_argument("words", nargs="*")
    for flag in ("--model", "--data"):
        parser.add_argument(flag)
    parser.add_argument("--map", action="append", default=[])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", action="store_true")
    return parser


def score_lines(summary: Mapping[str, Any]) -> list[str]:
    """A summary of scores for a reader: what was scored, the spread of the scores, and how often they are right."""
    spreads = {key: value for key, value in summary.items() if isinstance(value, Mapping) and "mean" in value}
    rates = {key: value for key, value in summary.items() if isinstance(value, Mapping) and "low" in value}
    about = {key: value for key, value in summary.items() if key not in (*spreads, *rates)}
    head = f"{'':<12}  {'mean':>10}  {'lowest':>10}  {'highest':>10}"
    columns = ("mean", "lowest", "highest")
    table = [f"{name:<12}  " + "  ".join(f"{figure(x[c]):>10}" for c in columns) for name, x in spreads.items()]
    return [*summary_lines(about), "", head, *table, *(f"\n{rate_in_words(name, x)}" for name, x in rates.items())]


def rate_in_words(name: str, rate: Mapping[str, Any]) -> str:
    """`ranked as labelled: 72 % (63 to 80 % at 95 % confidence, n = 160)`, or why it was not measured."""
    name = name.replace("_", " ")
    if rate["value"] is None:
        return f"{name}: not measured ({rate['why']})"
    value, low, high = (100 * rate[key] for key in ("value", "low", "high"))
    return f"{name}: {value:.1f} % ({low:.1f} to {high:.1f} % at 95 % confidence, n = {rate['n']:,})"
