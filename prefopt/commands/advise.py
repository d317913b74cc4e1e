"""`prefopt advise`: which objective fits data, model and machine, why, and a recipe that runs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefopt import catalogue, config
from prefopt.commands.given import memory_of, readable
from prefopt.records import InputError
from prefopt.terminal import Parser, as_json, libraries, say, summary_lines

ADVISE = """\
prefopt advise --data FILE [--model DIR] [--out recipe.yaml] [key=value ...]

Which objective fits: looks at the data (what the rows hold, how many, wrong labels, length, answers that a program can
check), at the model (whether it answers in their form, how far the rows are from what it writes) and at the memory
here, and ranks SFT, DPO, IPO, KTO, ORPO, SimPO, a reward model with RLOO, GRPO or PPO, and GRPO or RLOO with a checker:
why, why not, and what would change the answer.

  --data FILE     the rows, in any form that `prefopt train` reads
  --model DIR     the model to train; with it its answers are sampled, and a recipe can be written
  --reward NAME   a reward that you have for new answers: math, exact, code, judge, file.py:function, a reward model
  --out FILE      write the recipe of the first method, several where it takes several runs
  --memory GB     memory that a run may take; what is free here unless given
  --map chosen=good
                  read the column `good` as `chosen`; repeat for more
  --json          the same as JSON, on stdout

Each reason says what it rests on: measured here (experiments of this project), published (a paper), or convention.
Options such as dtype=bfloat16, skip_bad=true or max_length=512 are those of `prefopt train`."""

SHOWN = 4  # methods that are explained; the others are named


def advise(words: list[str]) -> None:
    """Rank the methods, and write the recipes of the first where that is asked for."""
    given = advise_parser().read(words)
    if given.help:
        return say(ADVISE)
    if given.data is None:
        raise InputError("advise needs --data; `prefopt advise --help` shows how")
    if given.out is not None and given.model is None:
        raise InputError("--out writes a recipe, and a recipe names a model; give --model DIR")
    if given.out is not None and given.out.suffix not in (".yaml", ".yml"):
        raise InputError(f"--out {given.out}: `prefopt train` takes a recipe by its suffix; name a file.yaml")
    layer = config.parse_overrides([*(f"map.{word}" for word in given.map), *given.words])
    sections = {name: config.SECTIONS[name] for name in ("model", "data")}
    options = config.resolve(sections, layer)
    with libraries(given.json), readable():
        from prefopt.recipes import advise as recipe

        found = recipe.advise(
            given.data,
            given.model,
            options["data"],
            options["model"],
            reward=given.reward,
            room=memory_of(given.memory),
            folder=str(Path("runs") / (given.out.stem if given.out else "advised")),
            typed=layer,
        )
        files = recipe.write(found.stages, given.out) if given.out and found.stages else []
    if given.json:
        return say(as_json(as_data(found, files)))
    say("\n".join(page(found, files, catalogue.terminal_width())))


def advise_parser() -> Parser:
    parser = Parser("advise", ADVISE)
    parser.add_argument("words", nargs="*")
    for flag in ("--data", "--model", "--reward"):
        parser.add_argument(flag)
    parser.add_argument("--map", action="append", default=[])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory", type=float)
    parser.add_argument("--json", action="store_true")
    return parser


# ---------------------------------------------------------------- for a reader


def page(found: Any, files: Sequence[Path], width: int) -> list[str]:
    """The advice for a reader at a terminal."""
    able = [advice for advice in found.ranking if not advice.refused]
    lines = [*seen(found, width), ""]
    if not able:
        steps = found.case.data.kind == "steps"
        other = ", which learn from whole answers; `prefopt train prm` learns from steps:" if steps else " as they are:"
        lines += catalogue.wrapped(f"These rows can serve none of the methods{other}", 0, width)
    for number, advice in enumerate(able[:SHOWN], 1):
        lines += [f"{number}. {advice.title}", *reasons(advice, width)]
    if rest := ", ".join(advice.title for advice in able[SHOWN:]):
        lines += ["", *catalogue.wrapped(f"After these: {rest}.", 0, width)]
    for advice in found.ranking:
        if advice.refused:
            lines += catalogue.wrapped(f"not {advice.title}: {advice.refused}", 2, width, "")
    lines += ["", "What would change the answer", *(line for words in found.changes for line in bullet(words, width))]
    return [*lines, "", *next_steps(found, files)]


def seen(found: Any, width: int) -> list[str]:
    """The figures, of data and model; what was not measured is left out."""
    data = {name: value for name, value in vars(found.case.data).items() if name != "notes"}
    lines = ["data", *summary_lines(data, "  ")]
    lines += [line for note in found.case.data.notes for line in catalogue.wrapped(note, 4, width, "  ")]
    if found.case.model is not None:
        model = {name: value for name, value in vars(found.case.model).items() if name != "notes"}
        lines += ["model", *summary_lines(model, "  ")]
    if found.case.room is not None:
        lines += ["machine", f"  {found.case.room / 1e9:.1f} GB free on the {found.case.device}"]
    return lines


def reasons(advice: Any, width: int) -> list[str]:
    """Why and why not, each with what it rests on."""
    lines = []
    for sign, own in (("+", advice.why), ("-", advice.why_not)):
        for reason in own:
            rests = f"{reason.evidence}: {reason.source}" if reason.source else reason.evidence
            lines += catalogue.wrapped(f"{reason.words} [{rests}]", 5, width, f"   {sign} ")
    return lines


def bullet(words: str, width: int) -> list[str]:
    return catalogue.wrapped(words, 4, width, "  - ")


def next_steps(found: Any, files: Sequence[Path]) -> list[str]:
    """The commands to run."""
    if files:
        return ["Run", *(f"  prefopt train {shlex.quote(str(file))}" for file in files)]
    if found.stages:
        return ["Runs of the first: " + ", then ".join(stage.name for stage in found.stages) + "; --out writes recipes"]
    if all(advice.refused for advice in found.ranking):
        return ["No recipe can be written"]
    return ["With --model and --out a recipe is written"]


# ---------------------------------------------------------------- for machines


def as_data(found: Any, files: Sequence[Path]) -> dict[str, Any]:
    """The advice as plain values."""
    case = found.case
    return {
        "data": vars(case.data),
        "model": None if case.model is None else vars(case.model),
        "machine": {"device": case.device, "free": case.room, "needed": case.memory},
        "ranking": [
            {**advice._asdict(), "reasons": [reason._asdict() for reason in advice.reasons]} for advice in found.ranking
        ],
        "changes": found.changes,
        "stages": [vars(stage) for stage in found.stages],
        "files": [str(file) for file in files],
    }
