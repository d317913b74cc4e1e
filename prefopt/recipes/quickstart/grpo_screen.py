"""What a person sees of the quickstart of GRPO besides its phases: an example, answers, what changed, what is next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from prefopt.recipes.quickstart.screen import Screen
from prefopt.recipes.quickstart.sheets import Sheet

SHOWN = {"grpo": 6, "hard": 2}
NAMES = {"sft": "SFT says", "grpo": "GRPO says", "hard": "alone", "mixed": "with easier sheets"}

Range = Mapping[str, Any]  # an estimate as summary.json has it: value, low, high, n


def example(screen: Screen, sheet: Sheet) -> None:
    """One sheet with its answer."""
    screen.say(f"{sheet.prompt}   right: {sheet.answer}")


def samples(screen: Screen, task: str, sheets: Sequence[Sheet], answers: Mapping[str, Sequence[str]]) -> None:
    """The first held-out sheets, with each model's answer: not a selection."""
    count = min(SHOWN[task], len(sheets))
    title = f"The first {count} of {len(sheets)} sheets of {len(sheets[0].sums)} sums, one answer of each model"
    table = Table(title=title, title_style="bold", show_lines=count < max(SHOWN.values()))
    table.add_column("sheet")
    for name in answers:
        table.add_column(NAMES[name])
    for at, sheet in enumerate(sheets[:count]):
        said = [f"{escape(own[at])}  {verdict(sheet, own[at])}" for own in answers.values()]
        table.add_row(escape(sheet.prompt), *said)
    screen.out.print()
    screen.out.print(table)


def verdict(sheet: Sheet, answer: str) -> str:
    """Whether an answer is right, else how many of its sums are, marked up."""
    if answer == sheet.answer:
        return "[green]right[/]"
    labels, wanted = sheet.answer.split()[::2], sheet.answer.split()[1::2]
    given = dict(zip(answer.split()[::2], answer.split()[1::2], strict=False))
    found = sum(given.get(label) == total for label, total in zip(labels, wanted, strict=True))
    return f"[red]{found} of {len(wanted)}[/]" if found < len(wanted) else "[red]not in this form[/]"


def findings(screen: Screen, summary: Mapping[str, Any]) -> None:
    """The table of what changed, and what can be said of it."""
    table = Table(title="Share of held-out sheets that are right throughout", title_style="bold")
    for name in ("", "SFT", "after GRPO", "gain, 95 % interval", "stalled"):
        table.add_column(name, justify="left" if name in ("", "stalled") else "right", no_wrap=True)
    hard = summary["hard"]
    table.add_row(f"[bold]{summary['sums']} sums[/]", *_change(summary["accuracy"]), "")
    for name, key in (
        (f"{hard['sums']} sums, alone", "alone"),
        (f"{hard['sums']} sums, easier too", "easier_mixed_in"),
    ):
        table.add_row(name, *_change(hard[key]["accuracy"]), stalled(hard[key]["stalled"]))
    screen.out.print()
    screen.out.print(table)
    for line in conclusions(summary):
        screen.out.print(line)


def stalled(found: Mapping[str, Any] | None) -> str:
    """Whether and when the run itself reported a stall."""
    if found is None:
        return "no"
    until = "" if found["recovered"] is None else f" to {found['recovered']}"
    return f"from update {found['since']}{until}"


def conclusions(summary: Mapping[str, Any]) -> list[str]:
    """What the numbers allow to say, and no more."""
    hard = summary["hard"]
    alone, mixed = hard["alone"], hard["easier_mixed_in"]
    lines = [f"{summary['sums']} sums: {_rise(summary['accuracy'])}"]
    if alone["stalled"] is not None and alone["stalled"]["recovered"] is None:
        lines.append(f"{hard['sums']} sums alone: [yellow]reported as stalled[/]; {_rise(alone['accuracy'])}")
    else:
        lines.append(f"{hard['sums']} sums alone: not stalled at its end; {_rise(alone['accuracy'])}")
    lines.append(f"{hard['sums']} sums with easier sheets mixed in: {_rise(mixed['accuracy'])}")
    return lines


def _rise(accuracy: Mapping[str, Range]) -> str:
    low, high = accuracy["gain"]["low"], accuracy["gain"]["high"]
    if low is None or high is None:
        return f"no gain can be claimed ({accuracy['gain'].get('why', 'not measured')})."
    if low > 0:
        return f"[green]right more often, by at least {100 * low:.0f} points (95 %).[/]"
    if high < 0:
        return f"[red]right less often, by at least {-100 * high:.0f} points (95 %).[/]"
    return "no gain can be claimed: its interval holds 0."


def _change(accuracy: Mapping[str, Range]) -> tuple[str, str, str]:
    return interval(accuracy["start"]), interval(accuracy["end"]), interval(accuracy["gain"])


def interval(estimate: Range) -> str:
    """`0.70 [0.66, 0.74]`, or what is missing."""
    if estimate["value"] is None:
        return "not measured"
    text = f"{estimate['value']:.3f}"
    return text if estimate["low"] is None else escape(f"{text} [{estimate['low']:.3f}, {estimate['high']:.3f}]")


def farewell(screen: Screen, folder: Path, summary: Mapping[str, Any]) -> None:
    """What is where, and what to do next."""
    data, model = folder / "data", summary["hard"]["easier_mixed_in"]["model"]
    again = f"--model {summary['sft_model']} --data {data / 'hard.jsonl'} --eval-data {data / 'hard_held_out.jsonl'}"
    lines = [
        f"[bold]Done in {summary['seconds']:.0f} s.[/] All of it is in {folder}: data/ holds the rows, grpo/,",
        "hard/ and mixed/ the runs with their completions.jsonl, samples.jsonl answers, summary.json these numbers.",
        "",
        "[bold]Next[/]",
        "  Give it a sheet:",
        f'    prefopt sample --model {model} --n 3 --prompt "a 7 + 5 b 3 + 9 ="',
        "  What the numbers of a run mean, and what else helps a run that stalls:",
        "    prefopt explain zero_variance/failed",
        "    prefopt objectives grpo",
        "  Another way to use the easier sheets, or another objective (rloo, dr_grpo, gspo, ...):",
        f"    prefopt train rloo {again} \\",
        f"      --reward exact --out runs/easier easier_data={data / 'easier.jsonl'} learning_rate=1e-3 max_tokens=41",
        "  Your own prompts with answers, one JSON object a line,",
        '    {"prompt": "What is 17 * 23?", "answer": "391"}',
        "  on a model of your choice; first look at what the model would see:",
        "    prefopt train grpo --model MODEL --data mine.jsonl --reward math --out runs/mine --dry-run",
    ]
    screen.out.print()
    for line in lines:
        screen.out.print(line, soft_wrap=True, highlight=False)
