"""What there is to choose from, in words: each objective with formula, needs, options and failures, and each metric.

All of it is read from the objectives' source and from the registry of metrics, without importing torch. The command
line prints it, and docs/generate.py writes the same text as pages.
"""

from __future__ import annotations

import ast
import re
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from prefopt import config
from prefopt.metrics import METRICS, find
from prefopt.records import InputError

DATA = {
    "demonstrations": "a prompt and an answer to imitate, or a conversation",
    "pairs": "a prompt with a better and a worse answer",
    "labels": "a prompt and one answer, marked good or bad",
    "ratings": "a prompt with two or more answers, each with a score",
    "steps": "a prompt and a solution whose steps are each marked right or wrong",
    "prompts": "a prompt alone; the policy writes answers, and a reward scores them",
}

HEADS = {
    "language": "the language model itself",
    "completion": "a model with one score per answer",
    "steps": "a model with one score per step of an answer",
}

BETTER = {"higher": "higher", "lower": "lower", "neither": "neither way by itself"}


class Choice(NamedTuple):
    """What a reader has, the objectives that fit it, the usual one first, and why."""

    have: str
    names: tuple[str, ...]
    why: str


CHOICES = (
    Choice(
        "good answers",
        ("sft",),
        "The model learns to answer like them. Also the usual first step before any other objective.",
    ),
    Choice(
        "pairs, and a model that already answers in their form",
        ("dpo",),
        "The best studied. The reference, usually the model as it was after SFT, keeps the policy near what it can do.",
    ),
    Choice(
        "pairs, one pass, no SFT before",
        ("orpo",),
        "Learns the answers and the preference together. With few rows (some thousands or less) SFT first is safer.",
    ),
    Choice(
        "pairs whose label is certain",
        ("ipo",),
        "On a pair that is always answered the same way DPO's optimum has no end; this loss stops at a set margin.",
    ),
    Choice(
        "pairs, and no reference wanted",
        ("simpo", "cpo"),
        "Less memory and one pass less. Nothing holds the policy back but the learning rate, so keep that low.",
    ),
    Choice(
        "better and worse answers, to be compared as two sets",
        ("aot",),
        "Asks that the better answers' log-ratios lie above the worse ones' at every quantile, not pair by pair.",
    ),
    Choice(
        "single answers, each marked good or bad",
        ("kto", "bco"),
        "No pairs needed, such as thumbs up and down; both marks must occur.",
    ),
    Choice(
        "rated or ranked answers, and a score is wanted",
        ("reward",),
        "A model that scores answers: to rank samples, to filter data, to make pairs. "
        "Rated answers also serve `dpo` and its family, as the best against the worst.",
    ),
    Choice(
        "solutions with marked steps",
        ("prm",),
        "A model that scores each step, to find where a solution goes wrong.",
    ),
    Choice(
        "prompts, and a program that checks answers",
        ("grpo", "dr_grpo", "dapo", "lite_ppo"),
        "Several answers of the model are compared with each other. `grpo` is the best known; `dr_grpo` divides by "
        "neither length nor spread, `dapo` lets every token weigh the same, `lite_ppo` scales by the whole rollout.",
    ),
    Choice(
        "prompts, and a reward that a model or a person's taste gives",
        ("rloo", "reinforce_pp"),
        "The reference's pull is part of the reward, so that the policy stays where the reward can be trusted; "
        "`reinforce_pp` also learns from one answer per prompt.",
    ),
    Choice(
        "prompts, a reward model, and memory for a second model that is trained",
        ("ppo",),
        "A critic, best started from the reward model, says at every token what was to be expected, so that one answer "
        "per prompt is enough and credit goes to the tokens that earned it.",
    ),
    Choice(
        "prompts, and a judge or reward that can only rank answers",
        ("online_dpo",),
        "The best and the worst of several answers of the model make a pair for DPO; how far apart their rewards are "
        "does not matter.",
    ),
    Choice(
        "prompts, a reward, and several updates per rollout",
        ("gspo", "cispo", "sapo"),
        "They differ from `grpo` in what they do with a policy that has moved since it wrote the answers.",
    ),
    Choice(
        "prompts that are rarely solved, and answers that are right or wrong",
        ("maxrl", "bnpo"),
        "They weigh prompts by how rarely they are solved: towards the likelihood of success, or by a fitted spread.",
    ),
)

OVERVIEW_NOTES = (
    "reference: `yes` is asked about the rows only, so one pass is cached on disk, and `reference_sync_steps` lets it "
    "move; `live` is asked about other texts too, so it stays in memory.",
    "extra passes: forward passes over the data per update besides the one that carries the gradient and the cached "
    "reference's.",
    "strength: the option that weighs the preference, at its default. rate: default peak learning rate for all "
    "weights; ten times that with an adapter.",
)


# ---------------------------------------------------------------- objectives, as data


def names() -> list[str]:
    """Every objective, by the data it learns from."""
    order = list(DATA)
    return sorted(config.objectives(), key=lambda name: (order.index(config.objectives()[name].facts["data"]), name))


def objective(name: str) -> dict[str, Any]:
    """Everything there is to say of an objective. InputError, with the nearest, if there is none of this name."""
    section = config.sections(name)["objective"]
    source = config.objectives()[name]
    options = [
        {
            "name": option.key,
            "type": kind_in_words(option.type),
            "default": written(option.default),
            "text": reader_words(option.comment),
        }
        for option in config.describe({"objective": section})
    ]
    return {**source.facts, "formula": source.formula, "options": options, "start": start(name)}


def objective_data(name: str | None) -> dict[str, Any]:
    """One objective, or all by name, for machines."""
    return objective(name) if name else {name: objective(name) for name in names()}


def start(name: str) -> str:
    """The command to begin with."""
    facts = config.objectives()[name].facts
    model = "runs/sft/model" if facts["reference"] else "Qwen/Qwen2.5-0.5B-Instruct"
    return f"prefopt train {name} --model {model} --data {facts['data']}.jsonl --out runs/{name}"


def reference_kind(facts: Any) -> str:
    """Whether an objective needs a reference, as the overview says it."""
    if facts["live"]:
        return "live"
    return "yes" if facts["reference"] else "no"


def strength(name: str) -> str:
    """The option that says how strongly the preference or the reference pulls, at its default; `-` without one."""
    found = (option for option in objective(name)["options"] if option["name"] in STRENGTHS)
    first = next(found, None)
    return f"{first['name']}={first['default']}" if first else "-"


def rate(value: float) -> str:
    """A learning rate as people write it: `1e-6`."""
    return re.sub(r"e-0*", "e-", f"{value:g}")


STRENGTHS = ("beta", "odds_weight")

HEADINGS = ("name", "data", "reference", "head", "extra passes", "strength", "rate", "what it is, and its source")


def overview_rows() -> list[tuple[str, ...]]:
    """One row of text per objective, under `HEADINGS`."""
    rows: list[tuple[str, ...]] = []
    for name in names():
        facts = config.objectives()[name].facts
        rows.append(
            (
                name,
                facts["data"],
                reference_kind(facts),
                facts["head"],
                str(facts["forwards"]),
                strength(name),
                rate(facts["learning_rate"]),
                f"{facts['title']}, {facts['source']}",
            )
        )
    return rows


def needs(facts: Any) -> list[tuple[str, str]]:
    """What an objective needs, as (name, words)."""
    reference = {
        "no": "none",
        "yes": "asked about the rows only: one pass, cached on disk. It is the model as it was before training unless "
        "`reference_model` names another, and `reference_sync_steps` lets it move.",
        "live": "asked about texts that are in no row too, so it stays in memory and no cache can serve.",
    }
    extra = facts["forwards"]
    passes = f"{extra} besides the one that carries the gradient" if extra else "one, which carries the gradient"
    if facts["reference"]:
        passes += "; the reference's are not counted"
    rows = [
        ("data", f"{facts['data']}: {DATA[facts['data']]}."),
        ("reference", reference[reference_kind(facts)]),
        ("trains", HEADS[facts["head"]] + (", and a critic that foresees the reward." if facts["critic"] else ".")),
        ("passes per update", passes + "."),
        ("learning rate", f"{rate(facts['learning_rate'])} for all weights, ten times that with an adapter."),
    ]
    if facts["least"] > 1:
        rows.insert(4, ("smallest update", f"{facts['least']} prompts."))
    return rows


def failures(facts: Any) -> list[str]:
    """The failure modes, one each: a sentence with a colon starts a new one, any other belongs to the one before."""
    modes: list[str] = []
    for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z`])", facts["failures"]):
        if modes and ": " not in sentence:
            modes[-1] += f" {sentence}"
        elif sentence:
            modes.append(sentence)
    return modes


def passages(docstring: str) -> list[tuple[bool, str]]:
    """A docstring's passages: (True, lines as they are) where indented, such as a formula, else (False, one line)."""
    found: list[tuple[bool, list[str]]] = []
    for part in re.split(r"\n\s*\n", docstring.strip("\n")):
        for number, line in enumerate(part.splitlines()):
            indented = line.startswith((" ", "\t"))
            if number and found[-1][0] == indented:
                found[-1][1].append(line)
            else:
                found.append((indented, [line]))
    return [(indented, textwrap.dedent("\n".join(lines)) if indented else " ".join(lines)) for indented, lines in found]


# ---------------------------------------------------------------- objectives, for the terminal


def objective_page(name: str | None, width: int) -> str:
    """One objective, or how to choose one, for a reader at a terminal."""
    return objective_text(name, width) if name else overview(width)


def terminal_width() -> int:
    return min(shutil.get_terminal_size().columns, 110)


def wrapped(text: str, indent: int, width: int, first: str | None = None) -> list[str]:
    """`text` in lines of at most `width`, `indent` spaces in front; `first` stands before the first line instead."""
    return textwrap.wrap(
        text,
        max(width, indent + 20),
        initial_indent=" " * indent if first is None else first,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def table(lines: Sequence[Sequence[str]], width: int) -> list[str]:
    """Columns two spaces apart; the last one is wrapped into what the others leave of `width`."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]) - 1)]
    shown = []
    for line in lines:
        head = "".join(f"{cell:<{size}}  " for cell, size in zip(line, widths, strict=False))
        shown += wrapped(line[-1], len(head), width, head)
    return shown


def overview(width: int) -> str:
    """Which objective for what, and the table of all of them."""
    lines = ["Which one? What you have, and what fits it:", ""]
    for choice in choices():
        lines += wrapped(f"{choice.have}: {', '.join(choice.names) or 'none yet'}. {choice.why}", 4, width, "  ")
    rows = overview_rows()
    heading, *facts = table([row[:-1] for row in (HEADINGS, *rows)], width)
    lines += ["", heading]
    for row, shown in zip(rows, facts, strict=True):
        lines += [shown, *wrapped(row[-1], 4, width)]
    lines.append("")
    for note in OVERVIEW_NOTES:
        lines += wrapped(note, 2, width, "")
    more = "`prefopt objectives dpo` has the formula, options, healthy metrics and failures of one."
    return "\n".join([*lines, "", *wrapped(more, 0, width)])


def choices() -> list[Choice]:
    """The choices between objectives that there are."""
    there = config.objectives()
    known = [choice._replace(names=tuple(name for name in choice.names if name in there)) for choice in CHOICES]
    return [now for now, written in zip(known, CHOICES, strict=True) if now.names or not written.names]


def objective_text(name: str, width: int) -> str:
    """All of an objective, for a reader at a terminal."""
    facts = objective(name)
    lines = [f"{name}: {facts['title']} ({facts['source']})", ""]
    for verbatim, text in passages(facts["formula"]):
        lines += textwrap.indent(text, "      ").splitlines() if verbatim else wrapped(text, 2, width)
        lines.append("")
    lines.append("What it needs")
    rows = needs(facts)
    size = max(len(label) for label, _ in rows)
    for label, text in rows:
        lines += wrapped(text, size + 4, width, f"  {label:<{size}}  ")
    lines += ["", *wrapped(f"Options of its own; `prefopt train {name} --help` adds those of every run", 0, width)]
    for option in config.describe({"objective": config.objectives()[name].section}):
        lines += option_lines(option, width)
    if not facts["options"]:
        lines.append("  none of its own")
    lines += ["", "Healthy", *wrapped(facts["healthy"], 2, width), "", "How it goes wrong"]
    for mode in failures(facts):
        lines += wrapped(mode, 4, width, "  - ")
    return "\n".join([*lines, "", "Start with", f"  {facts['start']}"])


def option_lines(option: config.Option, width: int) -> list[str]:
    """`key=default   type` and the comment below, wrapped to the terminal."""
    head = f"  {option.key}={written(option.default)}"
    line = f"{head:<40}  {kind_in_words(option.type)}" + ("" if option.default else ", required")
    return [line, *wrapped(reader_words(option.comment), 6, width)]


def reader_words(comment: str) -> str:
    """A comment of the source as a reader of help would write it."""
    return re.sub(r"\bNone\b", "null", comment)


def written(default: str) -> str:
    """A default as one would type it: Python's `None`, `'linear'` become `null`, `linear`; nothing where required."""
    try:
        value = ast.literal_eval(default)
    except (ValueError, SyntaxError):
        return default
    if value is None or isinstance(value, bool):
        return config.shown(value)
    return value if isinstance(value, str) else default


def kind_in_words(kind: str) -> str:
    """A type's source in a reader's words: `float | None` is `number or null`."""
    kind = re.sub(r"Literal\[(.*?)\]", lambda found: found[1].replace("'", "").replace('"', ""), kind)
    kind = kind.replace(" | ", " or ")
    words = {"float": "number", "int": "whole number", "str": "text", "bool": "true or false", "None": "null"}
    words |= {"Path": "path", "dict": "mapping", "tuple": "list", "...": "any number"}
    return re.sub(r"\w+|\.\.\.", lambda found: words.get(found[0], found[0]), kind)


# ---------------------------------------------------------------- metrics


def metric(name: str) -> dict[str, Any]:
    """Everything there is to say of a metric, `eval/NAME` too. InputError, with the nearest, if there is none."""
    held_out = name.startswith("eval/")
    plain = name.removeprefix("eval/")
    try:
        return {"name": name, **asdict(find(name)), "held_out": held_out}
    except KeyError:
        near = nearest_metric(plain)
    hint = f"did you mean {near}?" if near else "`prefopt explain` lists them all"
    raise InputError(f"metric: {name!r} is not one; {hint}")


def metric_data(name: str | None) -> dict[str, Any]:
    """One metric, or all by name, for machines."""
    return metric(name) if name else {name: metric(name) for name in METRICS}


def metric_page(name: str | None, width: int) -> str:
    """One metric, or all of them, for a reader at a terminal."""
    return metric_text(name, width) if name else metrics_text(width)


def nearest_metric(name: str) -> str | None:
    """The metric most like `name`, by its whole name or by what follows the `/`."""
    endings = {known.rpartition("/")[2]: known for known in reversed(METRICS)}
    if name in endings:
        return endings[name]
    return config.nearest(name, METRICS) or endings.get(config.nearest(name, endings) or "")


def metric_text(name: str, width: int) -> str:
    """All of a metric, for a reader at a terminal."""
    found = metric(name)
    of = ", on held-out rows" if found["held_out"] else ""
    rows = [("what", found["definition"] + of), ("unit", found["unit"] or "none"), ("better", BETTER[found["sign"]])]
    rows.append(("healthy", found["healthy"]))
    lines = [name]
    for label, text in rows:
        lines += wrapped(text, 11, width, f"  {label:<7}  ")
    for paragraph in found["more"].split("\n\n") if found["more"] else []:
        lines += ["", *wrapped(paragraph, 2, width)]
    return "\n".join(lines)


def metrics_text(width: int) -> str:
    """Every metric, one line each."""
    rows = [
        (name, BETTER[known.sign].split()[0], known.unit or "-", known.definition) for name, known in METRICS.items()
    ]
    note = "`prefopt explain NAME` says more; `eval/NAME` is the same on held-out rows."
    return "\n".join([*table([("name", "better", "unit", "what it is"), *rows], width), "", *wrapped(note, 0, width)])
