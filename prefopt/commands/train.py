"""`prefopt train`: train, or say what would be trained."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefopt import catalogue, config
from prefopt.recipes.signals import Paused
from prefopt.records import InputError
from prefopt.terminal import Parser, Stopped, as_json, figure, libraries, say, summary_lines

TRAIN = """\
prefopt train OBJECTIVE --model DIR --data FILE --out RUN [key=value ...]
prefopt train RECIPE.yaml [key=value ...]
prefopt train --resume RUN

  --model DIR            a model directory or hub name
  --data FILE            JSONL, JSON, Parquet, CSV, a dataset directory or a hub name
  --eval-data FILE       held-out rows
  --reward NAME          what completions are rewarded for, where the model writes them: math, exact, code, judge, ...,
                         a function as file.py:function, or a reward model's directory; repeat to add up several
  --out RUN              the run's folder; the same command goes on where a run in it was stopped or killed
  --resume RUN           go on with an unfinished run, from its own config.yaml
  --allow-inexact        go on although data, options, versions or processes have changed
  --map chosen=good      read the column `good` as `chosen`; repeat for more
  --skip-bad             count bad rows and go on, instead of stopping at the first
  --print-config         print every option as it would be used, as a recipe, and stop
  --dry-run              read and tokenise the data, show counts, rows and steps, and stop
  --json                 print only the summary, as JSON, on stdout"""

# Flag -> the option it is another spelling of.
TRAIN_FLAGS = {"model": "model", "data": "data", "eval_data": "eval_data", "out": "out"}
RECIPE_SUFFIXES = (".yaml", ".yml")


def train(words: list[str]) -> None:
    """Train, or say what would be trained."""
    parser = Parser("train", TRAIN)
    parser.add_argument("words", nargs="*")
    for flag in TRAIN_FLAGS:
        parser.add_argument(f"--{flag.replace('_', '-')}")
    parser.add_argument("--reward", action="append")
    parser.add_argument("--map", action="append", default=[])
    parser.add_argument("--resume")
    for flag in ("--skip-bad", "--allow-inexact", "--print-config", "--dry-run", "--json"):
        parser.add_argument(flag, action="store_true")
    given = parser.read(words)
    if given.help:
        return say(train_help(given.words[0]) if given.words else train_overview())
    objective, layers = train_layers(given)
    if given.dry_run:
        layers.insert(0, config.Layer({"out": ""}))  # nothing is written, so none need be named
    resolved = config.resolve(config.sections(objective), *layers)
    if given.print_config:
        return say(config.to_yaml(resolved).rstrip())
    run(resolved, dry=given.dry_run, machine=given.json)


def train_layers(given: argparse.Namespace) -> tuple[str, list[config.Layer]]:
    """The objective's name and the layers of options: the recipe if there is one, then the command line."""
    if given.resume:
        given.words, given.out = [resumable(given), *given.words], given.resume
    if not given.words or ("=" in given.words[0] and not given.words[0].endswith(RECIPE_SUFFIXES)):
        raise InputError(f"train what? `prefopt train OBJECTIVE ...` ({known()}) or `prefopt train RECIPE.yaml ...`")
    first, *overrides = given.words
    mapped = [f"map.{word}" for word in given.map]
    typed = config.parse_overrides([*mapped, *overrides])
    flags = config.Layer({option: getattr(given, flag) for flag, option in TRAIN_FLAGS.items() if getattr(given, flag)})
    if given.resume:  # neither is asked for because it once was, when this run began
        flags.update(overwrite=False, allow_inexact=False)
    for flag in ("skip_bad", "allow_inexact"):
        if getattr(given, flag):
            flags[flag] = True
    if given.reward:
        flags["reward"] = given.reward
    if not first.endswith(RECIPE_SUFFIXES):
        typed.pop("objective", None)
        return first, [flags, typed]
    recipe = config.read_recipe(first)
    objective = typed.pop("objective", recipe.pop("objective", None))
    if not isinstance(objective, str):
        raise InputError(f"{first}: objective: missing; add a line such as `objective: dpo` ({known()})")
    return objective, [recipe, flags, typed]


def resumable(given: argparse.Namespace) -> str:
    """The recipe of the unfinished run that --resume names. InputError where it is none, or is named twice."""
    folder = Path(given.resume)
    if given.out or (given.words and "=" not in given.words[0]):
        raise InputError(f"--resume {folder}: the run has its objective, recipe and out; leave them out here")
    if not (folder / "config.yaml").is_file():
        raise InputError(f"--resume {folder}: holds no run (no config.yaml); name the folder that was its --out")
    return str(folder / "config.yaml")


def known() -> str:
    return f"objectives: {', '.join(config.objectives())}"


def run(resolved: dict[str, Any], dry: bool, machine: bool) -> None:
    """Train and show the summary; or, dry, show what would happen."""
    objective = resolved["objective"]
    options = config.flat({name: section for name, section in resolved.items() if name != "objective"})
    with libraries(machine):
        from prefopt import ranks
        from prefopt.preflight import PreflightError
        from prefopt.recipes.train import plan, train

        try:
            if dry:
                planned = plan(objective=objective, **options)
            else:
                summary = train(objective=objective, **options).summary
        except (PreflightError, ranks.PeerError) as error:
            raise Stopped(error) from None
        except Paused:  # on all processes
            ranks.stop()
            raise
    if dry:
        show_plan(planned, machine)
    elif ranks.is_main():
        say(as_json(summary) if machine else "\n".join(report_lines(summary)))
    ranks.stop()


def report_lines(summary: Mapping[str, Any]) -> list[str]:
    """A training summary for a reader: start beside end, of held-out metrics if there are any, then the rest."""
    start, end = summary["start"], summary["end"]
    names = [name for name in end if name.startswith("eval/")] or list(end)
    width = max(map(len, names), default=0)
    table = [f"{name:<{width}}  {figure(start.get(name)):>10}  {figure(end[name]):>10}" for name in names]
    rest = {key: value for key, value in summary.items() if key not in ("start", "end")}
    return [f"{'':<{width}}  {'start':>10}  {'end':>10}", *table, "", *summary_lines(rest)]


def train_overview() -> str:
    there = config.objectives()
    rows = [f"  {name:<8} {there[name].facts['title']} ({there[name].facts['data']})" for name in catalogue.names()]
    listed = "Objectives; `prefopt objectives` helps to choose, `prefopt train NAME --help` lists the options of one:"
    return "\n".join([TRAIN, "", listed, *rows])


def train_help(objective: str) -> str:
    """What an objective is, what it needs, and every option with its default and comment."""
    if objective.endswith(RECIPE_SUFFIXES):
        return train_overview()
    sections = config.sections(objective)
    facts, width = config.objectives()[objective].facts, catalogue.terminal_width()
    lines = [
        f"{facts['title']} ({facts['source']})",
        *catalogue.wrapped(f"Learns from {facts['data']}: {catalogue.DATA[facts['data']]}.", 0, width),
        f"Learning rate unless set: {catalogue.rate(facts['learning_rate'])}.",
        f"`prefopt objectives {objective}` has the formula, healthy metrics and known failures.",
        "",
        TRAIN.replace("OBJECTIVE", objective, 1),
    ]
    section = ""
    for option in config.describe(sections):
        if option.section != section:
            section = option.section
            lines += ["", section]
        lines += catalogue.option_lines(option, width)
    return "\n".join(lines)


def show_plan(plan: Any, machine: bool) -> None:
    """What would be trained: counts by reason, token totals, steps, and the first three rows as the model sees them."""
    if machine:
        data, held_out = counts(plan.data), counts(plan.held_out)
        return say(as_json({"steps": plan.steps, "settled": plan.settled, "data": data, "held_out": held_out}))
    say(plan.data.describe())
    if plan.held_out is not None:
        say(f"\nheld out\n{plan.held_out.describe()}")
    for name, value in plan.settled.items():
        say(f"\n{name}: {value}, from the training rows")
    say(f"\n{plan.data.show(plan.tokenizer, num=3)}\n\n{plan.steps:,} steps would be taken; nothing was trained")


def counts(dataset: Any) -> dict[str, Any] | None:
    """A dataset's numbers for machines; None without one."""
    if dataset is None:
        return None
    trained = sum(flag for example in dataset.examples for flags in example.trained for flag in flags)
    return {
        "source": dataset.source,
        "shape": dataset.shape,
        "rows": len(dataset),
        "dropped": dataset.dropped,
        "truncated": dataset.truncated,
        "notes": dataset.notes,
        "tokens": sum(example.num_tokens for example in dataset.examples),
        "trained_tokens": trained,
    }
