"""The command line. Results go to stdout, everything else to stderr; a user's error is one message and exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from prefopt import catalogue, config
from prefopt.recipes.signals import EXIT_CODE, Paused
from prefopt.records import InputError, plain

STOPPED, USER_ERROR, INTERRUPTED = 1, 2, 130

ABOUT = """\
Preference optimisation of language models.

  prefopt quickstart                     a model from nothing, SFT, then DPO, and what changed; a few minutes
  prefopt quickstart grpo                the same with rewards: a task it learns, one that stalls, and the way out
  prefopt train OBJECTIVE|RECIPE ...     train a model on a preference file
  prefopt sample --model DIR ...         what a model says
  prefopt score --model DIR --data FILE  what a reward model says of answers
  prefopt objectives [NAME]              what there is to train with, and which to choose; all about one
  prefopt explain [METRIC]               what a logged number means, and what healthy looks like
  prefopt --version

`prefopt train dpo --help` lists the options of a run."""

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

SAMPLE = """\
prefopt sample --model DIR --prompt TEXT [--prompt TEXT ...] [key=value ...]
prefopt sample --model DIR --data FILE --as pairs --reward NAME --n 8 --out FILE [key=value ...]

Without --as: what the model says. With --as: rows of training data made of what it says, and what that is worth.

  --model DIR            a model or adapter directory, or a hub name; with --sampler URL, a model of the server
  --adapter DIR          an adapter on that model
  --sampler URL          an OpenAI-compatible server that writes in place of a model here
  --prompt TEXT          a user's turn if the model has a chat template, else the text to go on from
  --data FILE            the prompts of a file, in any form that `prefopt train` reads
  --map prompt=question  read the column `question` as `prompt`
  --n N                  completions per prompt (1; with --as pairs, labels, ranked or best 8)
  --max-tokens N         longest completion (128)
  --temperature T        0 takes the likeliest token each time (1.0)
  --top-k K              keep so many of the likeliest tokens; 0 keeps all (0)
  --top-p P              keep the likeliest tokens that make up this share (1.0)
  --min-p P              keep tokens at least this share as likely as the likeliest (0.0)
  --stop TEXT            a text that ends a completion and stays in it; \\n is a line break; repeat for more
  --seed N               equal seeds give equal samples (0)
  --as KIND              the rows to write, see below
  --reward NAME          what completions are rewarded for: math, exact, code, judge, ..., a function as
                         file.py:function, or a reward model's directory; repeat to add up several
  --out FILE             write JSON lines, which `prefopt train` reads
  --json                 print only the result on stdout as JSON: rows, or with --as the summary

KIND, what a row holds, and what it trains:
  pairs     the best completion against the worst (pair=all: every two that differ)              prefopt train dpo
  labels    each completion, good or bad by threshold=X, or by the mean of its prompt            prefopt train kto
  ranked    all completions of a prompt with their scores                                        prefopt train reward
  best      the best one; keep=N of them; with threshold=X rejection sampling                    prefopt train sft
  revised   a completion, and what a judge makes of it after a critique by principles=FILE       prefopt train dpo

AI feedback is `--as pairs --reward judge judge_mode=pairwise principles=FILE judge_url=URL`.

With --as, the same command goes on where it was interrupted, to the same rows; FILE.progress holds how far it
came. Ties, cut completions and those without a score are left out and counted, never taken as 0. Every row says
where it is from under `provenance`.

Options such as dtype=bfloat16 or chat_template=FILE are those of `prefopt train`; options of rewards and judges
those of `prefopt train grpo`."""

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

# Flag -> the option it is another spelling of.
TRAIN_FLAGS = {"model": "model", "data": "data", "eval_data": "eval_data", "out": "out"}
RECIPE_SUFFIXES = (".yaml", ".yml")


class Stopped(Exception):
    """A run that was stopped because going on would have wasted it. The message says why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit code: 0 fine, 1 stopped by a check, 2 a user's error, 75 asked to stop and can go on, 130
    interrupted.

    A traceback is a bug of ours.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    steady_streams()
    try:
        return dispatch(words)
    except InputError as error:
        complain(f"error: {error}")
        return USER_ERROR
    except Stopped as error:
        complain(f"stopped: {error}")
        return STOPPED
    except KeyboardInterrupt:
        complain("interrupted")
        return INTERRUPTED
    except Paused as error:
        complain(str(error))
        return EXIT_CODE
    finally:
        flush()


def dispatch(words: list[str]) -> int:
    """Run the command that `words` names."""
    if not words or words[0] in ("-h", "--help", "help"):
        say(ABOUT)
        return 0
    if words[0] in ("--version", "-V"):
        from prefopt import __version__

        say(f"prefopt {__version__}")
        return 0
    command = COMMANDS.get(words[0])
    if command is None:
        near = config.nearest(words[0], COMMANDS)
        hint = f"did you mean {near}?" if near else f"choose one of {', '.join(COMMANDS)}"
        raise InputError(f"{words[0]!r} is not a command; {hint}")
    command(words[1:])
    return 0


# ---------------------------------------------------------------- writing


def steady_streams() -> None:
    """Make printing safe: a stream closed from the start goes nowhere, a character it cannot show is escaped."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            # Also keeps files opened later from getting the descriptor that libraries print to.
            setattr(sys, name, open(os.devnull, "w"))
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Print to stdout; a reader that has gone away (`| head`) is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        drop_stdout()


def complain(text: str) -> None:
    """Print to stderr, if anyone still reads it."""
    with contextlib.suppress(BrokenPipeError):
        print(text, file=sys.stderr, flush=True)


def drop_stdout() -> None:
    """Send what is still to be written to nowhere, so that closing stdout at exit does not fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def flush() -> None:
    """Write out what is buffered, so that a reader that has gone away is noticed here and not at exit."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        drop_stdout()


@contextlib.contextmanager
def libraries(machine: bool) -> Iterator[None]:
    """Work with the heavy libraries loaded: they report nothing to anyone, and draw bars on terminals only.

    machine: what they print goes to stderr, so that stdout holds the result alone.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        from transformers.utils import logging

        logging.disable_progress_bar()
    with contextlib.redirect_stdout(sys.stderr) if machine else contextlib.nullcontext():
        yield


def as_json(value: Any) -> str:
    # ASCII: a machine reads this whatever the locale's encoding is.
    return json.dumps(plain(value), indent=2)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are InputErrors, that guesses no abbreviations, and whose help is ours."""

    def __init__(self, command: str, help_text: str) -> None:
        super().__init__(prog=f"prefopt {command}", add_help=False, allow_abbrev=False)
        self.help_text = help_text
        self.add_argument("-h", "--help", action="store_true")

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message}")

    def read(self, words: list[str]) -> argparse.Namespace:
        """The flags and words given. InputError on a flag that does not exist."""
        found, rest = self.parse_known_intermixed_args(words)
        if rest:
            raise InputError(f"{rest[0]}: {self.stray(rest[0])}; `{self.prog} --help` shows what there is")
        return found

    def stray(self, word: str) -> str:
        """Why a word is not understood, and what was perhaps meant."""
        name = word.lstrip("-").partition("=")[0].replace("-", "_")
        flags = [flag.lstrip("-").replace("-", "_") for flag in self._option_string_actions]
        near = config.nearest(name, flags)
        if near and near != name:
            return f"no such flag; did you mean --{near.replace('_', '-')}?"
        return f"no such flag; options are written without dashes, such as {name}=VALUE"


# ---------------------------------------------------------------- train


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
    if (folder / "summary.json").exists():
        raise InputError(f"--resume {folder}: that run is finished; its summary.json is there")
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
        except PreflightError as error:
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


def summary_lines(summary: Mapping[str, Any], indent: str = "") -> list[str]:
    """A summary as `name  value` lines, inner mappings indented; what is None or empty is left out."""
    shown = {key: value for key, value in summary.items() if value is not None and value != {}}
    width = max((len(key) for key, value in shown.items() if not isinstance(value, Mapping)), default=0)
    lines = []
    for key, value in shown.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{key}", *summary_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key:<{width}}  {figure(value)}")
    return lines


def figure(value: Any) -> str:
    """A value in a table: numbers to four digits, `-` for what was not measured."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------- help that teaches


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


# ---------------------------------------------------------------- objectives and metrics, explained


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


# ---------------------------------------------------------------- dry run


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


# ---------------------------------------------------------------- sample


# What `--as` has besides the sections of a model and its data.
SAMPLED: dict[str, str] = {
    "rows": "prefopt.recipes.sample.options:RowOptions",
    "server": "prefopt.models.server:ServerOptions",
    **{name: config.ONLINE[name] for name in ("reward", "judge", "reward_model")},
}
DRAWN = ("max_tokens", "temperature", "top_k", "top_p", "min_p")
ROWS = ("pairs", "labels", "ranked", "best", "revised")


def sample(words: list[str]) -> None:
    """Sample completions and print them, or write them as rows that can be trained on."""
    given = sample_parser().read(words)
    if given.help:
        return say(sample_help())
    local = given.sampler in (None, "local")
    if (given.model is None and local) or (given.prompt is None) == (given.data is None):
        raise InputError("sample needs --model, and either --prompt or --data; `prefopt sample --help` shows how")
    options = sample_options(given, local)
    with libraries(given.json):
        text = sample_plainly(given, options) if given.kind is None else sample_rows(given, options)
    if text:
        say(text)


def sample_help() -> str:
    """The flags, then the options of rows and servers with their comments."""
    lines, width = [SAMPLE], catalogue.terminal_width()
    for section, title in (("rows", "rows (with --as)"), ("server", "server (with --sampler URL)")):
        lines += ["", title]
        for option in config.describe({section: SAMPLED[section]}):
            lines += catalogue.option_lines(option, width)
    return "\n".join(lines)


def sample_options(given: argparse.Namespace, local: bool) -> dict[str, Any]:
    """Every section's options. InputError for one that this command would not read."""
    typed = config.parse_overrides([*(f"map.{word}" for word in given.map), *given.words])
    flags = config.Layer({"reward": given.reward} if given.reward else {})
    if not local:
        if not given.sampler.startswith(("http://", "https://")):
            raise InputError(f"--sampler {given.sampler}: give a server's address, such as http://127.0.0.1:8000/v1")
        flags |= {"server_url": given.sampler, "server_model": given.model or ""}
    if given.kind is not None and given.out is None:
        raise InputError(f"--as {given.kind}: no file is named; give --out FILE")
    found = config.resolve({**{n: config.SECTIONS[n] for n in ("model", "data")}, **SAMPLED}, flags, typed)
    refuse_unread(given, {**flags, **typed}, found, local)
    return found


def refuse_unread(given: argparse.Namespace, layer: Mapping[str, Any], found: Mapping[str, Any], local: bool) -> None:
    """InputError, naming the option, where one is set that nothing would read."""
    names = [] if given.kind is None else found["reward"].names
    read = {
        "rows": ("with --as", given.kind is not None),
        "reward": ("with --as", given.kind is not None),
        "judge": ("with --reward judge or --as revised", "judge" in names or given.kind == "revised"),
        "reward_model": ("with a reward model's directory as --reward", any(Path(name).is_dir() for name in names)),
        "server": ("with --sampler URL", not local),
    }
    owner = config.owners({name: type(section) for name, section in found.items()})
    for key in layer:
        words, is_read = read.get(owner[key], ("", True))
        if not is_read:
            raise InputError(f"{key} is read {words} only; give that too, or leave {key} out")
    for key in ("adapter", "max_length", "overlong", "chat_template", "revision"):
        if not local and (key in layer or getattr(given, key, None) is not None):
            raise InputError(f"{key} is of no use with --sampler URL, where the server has the model; leave it out")


def sample_writer(given: argparse.Namespace, options: Mapping[str, Any]) -> Any:
    """The model or the server that writes."""
    from prefopt.recipes.sample import LocalWriter, ServerWriter

    if given.sampler in (None, "local"):
        shows = given.kind is None and sys.stderr.isatty()
        return LocalWriter(given.model, given.adapter, options["model"], progress=shows)
    return ServerWriter(options["server"])


def sampling(given: argparse.Namespace) -> Any:
    """The distribution to draw from. InputError for a number that cannot be."""
    from prefopt.models.sampling import Sampling

    stop = tuple(text.replace("\\n", "\n") for text in given.stop)
    try:
        return Sampling(**{name: getattr(given, name) for name in DRAWN}, stop=stop)
    except ValueError as error:
        raise InputError(f"sample: {error}") from None


def sample_plainly(given: argparse.Namespace, options: Mapping[str, Any]) -> str:
    """Completions as they come: the text to print, or nothing where they go to a file."""
    from prefopt.recipes import sample as recipe

    drawing = sampling(given)
    writer = sample_writer(given, options)
    with contextlib.closing(writer):
        source, n = given.prompt or given.data, 1 if given.n is None else given.n
        found = recipe.sample(writer, source, options["data"], n=n, sampling=drawing, seed=given.seed)
    for note in found.notes:
        complain(note)
    rows = found.rows
    if given.out is not None:
        write_rows(given.out, rows)
        complain(f"wrote {len(rows):,} completions to {given.out}")
        return ""
    return "\n".join(map(json.dumps, rows)) if given.json else "\n\n".join(map(sample_text, rows))


def sample_rows(given: argparse.Namespace, options: Mapping[str, Any]) -> str:
    """Write rows of training data; the summary to print."""
    from prefopt.recipes import sample as recipe
    from prefopt.recipes.sample.options import TRAINS

    n = given.n if given.n is not None else 1 if given.kind == "revised" else 8
    settings = {name: section for name, section in options.items() if name != "server"}
    task = recipe.Task(given.kind, n, sampling(given), given.seed, settings)
    source = given.prompt or given.data
    summary = recipe.preferences(lambda: sample_writer(given, options), source, given.out, task, say=complain)
    complain(f"next: prefopt train {TRAINS[given.kind]} --data {given.out} --model MODEL --out RUN")
    return as_json(summary) if given.json else "\n".join(summary_lines(summary))


def sample_parser() -> Parser:
    parser = Parser("sample", SAMPLE)
    parser.add_argument("words", nargs="*")
    for flag in ("--model", "--adapter", "--sampler", "--data"):
        parser.add_argument(flag)
    for flag in ("--prompt", "--reward"):
        parser.add_argument(flag, action="append")
    for flag in ("--map", "--stop"):
        parser.add_argument(flag, action="append", default=[])
    parser.add_argument("--as", dest="kind", choices=ROWS)
    parser.add_argument("--n", type=int)
    for flag, whole in (("--max-tokens", 128), ("--top-k", 0), ("--seed", 0)):
        parser.add_argument(flag, type=int, default=whole)
    for flag, number in (("--temperature", 1.0), ("--top-p", 1.0), ("--min-p", 0.0)):
        parser.add_argument(flag, type=float, default=number)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", action="store_true")
    return parser


def sample_text(row: dict[str, Any]) -> str:
    """A row for a reader: the prompt, the completion, and a note where it was cut."""
    prompt, completion = row["prompt"], row["completion"]
    asked = prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
    answer = completion if isinstance(completion, str) else completion[0]["content"]
    return f"> {asked}\n{answer}" + ("" if row["finished"] else f"  [cut at {row['tokens']} tokens]")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines. InputError where the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot write: {error.strerror or error}") from None


# ---------------------------------------------------------------- score


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


# ---------------------------------------------------------------- quickstart


def quickstart(words: list[str]) -> None:
    """Build, train and compare a small model."""
    help_text = """\
prefopt quickstart [grpo] [--out DIR] [--seed N] [--json]

Builds a small tokenizer and model, teaches it a task whose true reward is known (SFT), then prefers better
answers (DPO), and shows what changed on held-out prompts. A few minutes on two CPU cores, no network.

With `grpo` the model learns from rewards: sheets of sums, a point only where all of a sheet is right. Longer sheets
are too hard to earn a single point; the run says so, and easier prompts mixed in solve them.

  --out DIR    the run's folder (runs/quickstart, runs/quickstart-grpo)
  --seed N     of everything random (0)
  --json       print only the summary, as JSON, on stdout"""
    parser = Parser("quickstart", help_text)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    given = parser.read(words)
    if given.help:
        return say(parser.help_text)
    if given.words not in ([], ["grpo"]):
        raise InputError(f"quickstart {' '.join(given.words)}: there is `prefopt quickstart`, alone or with `grpo`")
    with libraries(given.json):
        from prefopt.recipes import quickstart as recipe

        rewarded = bool(given.words)
        folder = given.out or Path("runs/quickstart-grpo" if rewarded else "runs/quickstart")
        summary = (recipe.run_grpo if rewarded else recipe.run)(folder, given.seed)
    if given.json:
        say(as_json(summary))


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train,
    "sample": sample,
    "score": score,
    "objectives": objectives,
    "explain": explain,
    "quickstart": quickstart,
}
