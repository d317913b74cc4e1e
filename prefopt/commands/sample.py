"""`prefopt sample`: what a model says, or rows of training data made of it."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefopt import catalogue, config, streams
from prefopt.records import InputError
from prefopt.terminal import Parser, as_json, complain, libraries, say, summary_lines, write_rows

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
        shows = given.kind is None and streams.is_terminal()
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
