"""What a run writes and shows while it goes: config, metrics.jsonl, a progress bar, lines for the log."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from prefopt import config, metrics, ranks, streams
from prefopt.checkpoint.commit import write_synced
from prefopt.recipes.lines import Lines
from prefopt.recipes.signals import Paused
from prefopt.recipes.trackers import Trackers
from prefopt.records import InputError, discreet, text_of

log = logging.getLogger("prefopt")
QUIET_SECONDS = 10.0  # without a terminal, one line in so many seconds
SAMPLE_SECONDS = 20.0  # between completions that are shown
SHOWN = 300  # characters of a prompt's end and a completion's beginning


@contextlib.contextmanager
def progress(title: str, total: int, unit: str = "") -> Iterator[Callable[[int], None]]:
    """A bar on stderr where there is a terminal, else a line every ten seconds; yields advance(number).

    unit: what is counted, to show how many of it are done in a second.
    """
    if not ranks.is_main() or not total:
        yield lambda number: None
        return
    if streams.is_terminal():
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[rate]}"), console=_console(), transient=True) as bar:
            task = bar.add_task(title, total=total, rate="")
            began = time.monotonic()

            def draw(number: int) -> None:
                bar.advance(task, number)
                bar.update(task, rate=rate(bar.tasks[task].completed, began, unit))

            yield draw
        return
    done, said = 0, time.monotonic()
    started = said

    def advance(number: int) -> None:
        nonlocal done, said
        done += number
        if time.monotonic() - said > QUIET_SECONDS:
            said = time.monotonic()
            speed = rate(done, started, unit)
            streams.note(f"{title}: {min(done, total):,} of {total:,}  {speed}".rstrip())

    yield advance


def _console() -> Any:
    """Where bars are drawn."""
    from rich.console import Console

    return Console(file=streams.errors())


def rate(done: float, began: float, unit: str) -> str:
    """`3.2 prompts/s` since `began`, a reading of the monotonic clock; empty without a unit."""
    return f"{done / max(time.monotonic() - began, 1e-9):.3g} {unit}/s" if unit else ""


class Journal:
    """Keeps a run's record in its folder and shows its progress; on the first process only.

    first, last: the metrics of the first and the latest update and evaluation, merged.
    """

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        self.metrics, self.rows = Lines(out / "metrics.jsonl"), Lines(out / "completions.jsonl")
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.steps, self.said, self.shown = 0, 0.0, -SAMPLE_SECONDS
        self.stack = contextlib.ExitStack()
        self.bar: Any = None
        self.out, self.settings = out, settings
        names = settings["run"].services if ranks.is_main() else []
        self.trackers = Trackers(names, out, config.recorded(settings), self.say)

    def keep_settings(self) -> None:
        """Write config.yaml, which --resume reads: whole, or as it was. InputError where the disk does not take it."""
        if not ranks.is_main():
            return
        try:
            write_synced(self.out / "config.yaml", config.to_yaml(self.settings))
        except OSError as error:
            raise InputError(
                f"{self.out}: cannot write there ({error.strerror}); make room, or choose another out"
            ) from None

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failed = error is not None and not isinstance(error, Paused)
        for lines in (self.metrics, self.rows):
            lines.close()
        with self.stack:
            self.trackers.close(failed)

    def say(self, text: str) -> None:
        """Lines for the reader of the log."""
        if ranks.is_main():
            for line in text.splitlines():
                self._print(line)

    def say_all(self, topic: str, lines: list[str]) -> None:
        """Each line with its topic in front."""
        self.say("\n".join(f"{topic}: {line}" for line in lines))

    @property
    def files(self) -> list[Path]:
        """What it appends to."""
        return [self.metrics.path, self.rows.path]

    def clear(self) -> None:
        """Begin the files anew."""
        self.metrics.clear()
        self.rows.clear()
        self.trackers.forget()

    def state_dict(self) -> dict[str, Any]:
        files = {"metrics": self.metrics.state_dict(), "rows": self.rows.state_dict()}
        return {"first": self.first, "last": self.last, **files}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.first, self.last = state["first"], state["last"]
        if ranks.is_main():
            self.metrics.load_state_dict(state["metrics"])
            self.rows.load_state_dict(state["rows"])

    def begin(self, steps: int) -> None:
        """Show progress over so many updates from here on."""
        self.steps = steps
        if ranks.is_main() and streams.is_terminal():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self.bar = self.stack.enter_context(Progress(*columns, console=_console()))
            self.task = self.bar.add_task("training", total=steps, text="")

    def listen(self, step: int, values: dict[str, float]) -> None:
        """Record the metrics of an update or an evaluation. KeyError for a name that is not registered."""
        for name in values:
            metrics.known(name)
        self.first = {**values, **self.first}
        self.last = {**self.last, **values}
        if not ranks.is_main():
            return
        self.metrics.append({"step": step, **values})
        self.trackers.listen(step, values)
        self._show(step, values)

    def completions(self, step: int, rows: list[dict[str, Any]], num: int | None) -> None:
        """Keep the first `num` rows of a rollout, or all of every process, and show one now and then."""
        own = rows if num is None else rows[:num]
        kept = [row for share in ranks.gather(own) for row in share][: num if num is not None else None]
        if not ranks.is_main():
            return
        for row in kept:
            self.rows.append(row)
        if kept and time.monotonic() - self.shown > SAMPLE_SECONDS:
            self.shown = time.monotonic()
            self._print(completion_line(step, kept[0]))

    def _print(self, text: str) -> None:
        text = discreet(text)
        if self.bar is not None:
            self.bar.console.print(text, markup=False, highlight=False)
        else:
            streams.note(text)

    def _show(self, step: int, values: dict[str, float]) -> None:
        shown = (
            "loss",
            "reward",
            "rewards/margins",
            "rewards/accuracies",
            "accuracy",
            "grad_norm",
            "tokens_per_second",
        )
        evaluation = any(name.startswith("eval/") for name in values)
        text = "  ".join(
            f"{name} {value:.4g}"
            for name, value in values.items()
            if name in shown or (evaluation and name.startswith("eval/"))
        )
        if self.bar is not None:
            if not evaluation:
                self.bar.update(self.task, completed=step, text=text)
            else:
                self.bar.console.print(f"step {step}  {text}")
        elif evaluation or step == self.steps or time.monotonic() - self.said > QUIET_SECONDS:
            self.said = time.monotonic()
            streams.note(f"step {step}/{self.steps}  {text}")


def completion_line(step: int, row: dict[str, Any]) -> str:
    """A completion for a reader: what it is worth, the end of its prompt, and how it begins."""
    prompt, said = (text_of(row[name]).strip() for name in ("prompt", "completion"))
    worth = "no score" if row["reward"] is None else f"reward {row['reward']:.4g}"
    asked = prompt if len(prompt) <= SHOWN else f"...{prompt[-SHOWN:]}"
    said = said if len(said) <= SHOWN else f"{said[:SHOWN]}..."
    return f"step {step}  {worth}\n> {asked}\n{said}"
