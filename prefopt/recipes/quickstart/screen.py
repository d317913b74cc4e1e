"""What a person sees of the quickstart: what each phase does and why on stderr, what changed on stdout."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prefopt import streams
from prefopt.recipes.quickstart.task import Instruction, Stars, stars

if TYPE_CHECKING:
    from prefopt.evaluate.statistics import Estimate
    from prefopt.recipes.quickstart.files import Pair
    from prefopt.recipes.quickstart.measure import Answers, BeforeAfter, Findings

PHASES = 6
SHOWN = 6
RULES = {
    "who": "names whom it was asked for, nobody else",
    "where": "names the asked place, no other",
    "mood": "words of the asked mood, of no other",
    "length": "has the asked number of words",
    "form": "is a sentence, says nothing twice",
}


class Screen:
    """Writes to the terminal; to files and pipes, the same without colour."""

    def __init__(self) -> None:
        self.log, self.out = _console(stderr=True), _console(stderr=False)
        self.number, self.began = 0, time.perf_counter()

    def phase(self, name: str, why: str) -> None:
        self.number += 1
        seconds = time.perf_counter() - self.began
        self.log.print(f"\n[bold cyan]{self.number}/{PHASES} {name}[/]  {why}  [dim]({seconds:.0f} s)[/]")

    def say(self, text: str) -> None:
        self.log.print(f"  {escape(text)}")

    def wrote(self, path: Path, rows: int) -> None:
        self.say(f"{rows:,} rows in {path}")

    def demonstration(self, instruction: Instruction, line: str) -> None:
        """One row of the demonstrations with its stars."""
        self.say(f"{instruction.text}")
        self.log.print(f"  -> {escape(line)}  {verdict(stars(instruction, line))}")

    def pair(self, pair: Pair) -> None:
        """One judged pair."""
        self.say(pair.instruction.text)
        for name, line in (("chosen  ", pair.chosen), ("rejected", pair.rejected)):
            self.log.print(f"  {name} {escape(line)}  {verdict(stars(pair.instruction, line))}")

    def findings(self, found: Findings) -> None:
        """The table of what changed."""
        table = Table(title="What DPO changed", title_style="bold", caption_justify="left")
        table.add_column("on instructions that no training saw")
        for name in ("SFT", "DPO"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("how to read it", style="dim")
        rate, accuracy, kl = found.win_rate, found.preference_accuracy, found.kl
        table.add_row(
            "[bold]win rate against SFT[/]", "", f"[bold]{interval(rate)}[/]", "with 95 % interval; 0.5: no better"
        )
        table.add_row("stars of 5", *_two(found.reward, "{:.2f}"), "the gold reward, the sum of the five rules:")
        for rule in fields(Stars):
            old, new = found.rules.before[rule.name], found.rules.after[rule.name]
            table.add_row(f"  {rule.name}", f"{old:.2f}", f"{new:.2f}", RULES[rule.name])
        table.add_row(
            "words a line",
            f"{found.words.before:.1f}",
            f"{found.words.after:.1f}",
            "no rule rewards longer or shorter lines",
        )
        table.add_row("preference accuracy", "", interval(accuracy), "held-out pairs it ranks as the gold reward does")
        distance = number(kl.value) + ("" if kl.standard_error is None else f" ± {kl.standard_error:.2f}")
        table.add_row("KL from SFT, nats a line", "0", distance, "how far it moved; beta holds it back")
        table.add_row(
            "perplexity, held-out lines", *_two(found.perplexity, "{:.2f}"), "writers' lines, mistakes included"
        )
        clean = _two(found.perplexity_without_mistakes, "{:.2f}")
        table.add_row("perplexity, faultless lines", *clean, "lines that break no rule")
        self.out.print()
        self.out.print(table)
        self.out.print(conclusion(rate))

    def samples(self, instructions: Sequence[Instruction], before: Answers, after: Answers) -> None:
        """The first held-out instructions, with each model's first answer: not a selection."""
        title = f"The first {min(SHOWN, len(instructions))} of {len(instructions)}, first answer of each"
        table = Table(title=title, title_style="bold", show_lines=True)
        for name in ("instruction", "SFT says", "DPO says"):
            table.add_column(name, ratio=1)
        for number_of, one in enumerate(instructions[:SHOWN]):
            said = [
                f"{escape(answers.lines[number_of][0])}\n{verdict(answers.stars[number_of][0])}"
                for answers in (before, after)
            ]
            table.add_row(escape(one.text), *said)
        self.out.print()
        self.out.print(table)

    def farewell(self, folder: Path, summary: dict[str, Any]) -> None:
        """What is where, and what to do next."""
        model, sft = summary["model"], summary["sft_model"]
        question = "Write a spooky line about an owl on the moon in 8 words."
        again = f"--model {sft} --data {folder / 'data' / 'pairs.jsonl'} --out runs/bolder"
        lines = [
            f"[bold]Done in {summary['seconds']:.0f} s.[/] All of it is in {folder}: data/ holds the rows,",
            "samples.jsonl every answer, metrics.jsonl every step, summary.json these numbers.",
            "The model is an ordinary Hugging Face directory:",
            f"  {model}",
            "",
            "[bold]Next[/]",
            "  Ask it something:",
            f'    prefopt sample --model {model} --n 3 --prompt "{question}"',
            "  Hold it back less (a smaller beta) and see KL, stars and perplexity change:",
            f"    prefopt train dpo {again} beta=0.03 learning_rate=1e-4 epochs=2",
            "  Your own preferences, one JSON object a line,",
            '    {"prompt": "...", "chosen": "the better answer", "rejected": "the worse one"}',
            "  on a model of your choice; first look at what the model would see:",
            "    prefopt train dpo --model MODEL --data mine.jsonl --out runs/mine --dry-run",
        ]
        self.out.print()
        for line in lines:
            self.out.print(line, soft_wrap=True, highlight=False)


def verdict(earned: Stars) -> str:
    """Stars earned and the rules broken, marked up."""
    broken = [rule.name for rule in fields(earned) if getattr(earned, rule.name) < 1]
    tail = f" [dim]not {', '.join(broken)}[/]" if broken else ""
    return f"[yellow]{earned.total:.1f} stars[/]{tail}"


def conclusion(win_rate: Estimate) -> str:
    """What the win rate's interval allows to say."""
    if win_rate.low is None or win_rate.high is None:
        return f"The win rate has no interval ({win_rate.why}): nothing can be said of it."
    if win_rate.low > 0.5:
        return "[green]DPO's answers are better than the SFT model's: the whole interval lies above 0.5.[/]"
    if win_rate.high < 0.5:
        return "[red]DPO's answers are worse than the SFT model's: the whole interval lies below 0.5.[/]"
    return "[yellow]No difference can be claimed: the interval holds 0.5.[/]"


def interval(estimate: Estimate) -> str:
    """`0.70 [0.66, 0.74]`, or what is missing."""
    if estimate.value is None or estimate.low is None:
        return number(estimate.value)
    return escape(f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]")


def number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}"


def _two(both: BeforeAfter, form: str) -> tuple[str, str]:
    texts = ["not measured" if one.value is None else form.format(one.value) for one in (both.before, both.after)]
    return texts[0], texts[1]


def _console(stderr: bool) -> Console:
    file = streams.errors() if stderr else streams.output()
    console = Console(file=file, highlight=False)
    # a file or pipe has no width of its own; 80 columns would fold the table
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(file=file, highlight=False, width=120)
