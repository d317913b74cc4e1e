"""The watch inside a run of TRL, or of any trainer of transformers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from transformers import TrainerCallback

from prefopt import detectors
from prefopt.detectors import Detector, Finding, Run
from prefopt.doctor.diagnosis import LOST
from prefopt.doctor.names import not_finite, objective_of, ours
from prefopt.records import append_json

log = logging.getLogger("prefopt")


class Watch(TrainerCallback):
    """Looks for signs of trouble in what a trainer logs, and says each once.

        trainer = DPOTrainer(..., callbacks=[Watch()])

    on_sick: warn, or stop the run where going on is a waste. out: a folder for findings.jsonl; None: the run's
    output_dir. watched: detectors, all of them unless given. say: takes a line for the log; the logger `prefopt` unless
    given. found: the findings so far. Set logging_steps low enough (1 to 10): only what is logged can be judged. Needs
    transformers alone.
    """

    def __init__(
        self,
        on_sick: Literal["warn", "stop"] = "warn",
        out: str | Path | None = None,
        watched: Sequence[Detector] | None = None,
        say: Callable[[str], None] = log.warning,
    ) -> None:
        if on_sick not in ("warn", "stop"):
            raise ValueError(f"on_sick must be warn or stop, got {on_sick!r}")
        self.on_sick, self.out, self.say = on_sick, Path(out) if out is not None else None, say
        every = detectors.every() if watched is None else list(watched)
        self.watch = detectors.Watch(Run(source="TRL"), every, self._tell)
        self.seen: list[dict[str, float]] = []
        self.lost = False

    @property
    def found(self) -> list[Finding]:
        return self.watch.findings

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Note what is known of the run."""
        self.out = self.out or Path(args.output_dir)
        options = {name: getattr(args, name) for name in OPTIONS if getattr(args, name, None) is not None}
        renamed = {OPTIONS[name]: value for name, value in options.items()}
        rows = getattr(others.get("train_dataloader"), "dataset", None)
        num_rows = len(rows) if rows is not None and hasattr(rows, "__len__") else None
        self.watch.run = Run(None, renamed, state.max_steps or None, num_rows, source="TRL")

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **others: Any) -> None:
        """Take in what was logged; every process logs, the first one speaks."""
        if not logs or not state.is_world_process_zero:
            return
        if not self.lost and (names := not_finite(logs, "TRL")):
            self.lost = True
            self.say(f"step {state.global_step}: not finite: {' and '.join(names)}; {LOST}")
        values = ours({**logs, "epoch": state.epoch}, "TRL")
        if values.keys() <= {"epoch"}:
            return
        run = self.watch.run
        if run.objective is None and len(self.seen) < FEW:
            self.seen.append(values)
            objective = objective_of(self.seen)
            self.watch.run = Run(objective, run.options, run.steps, run.rows, source="TRL")
        self.watch.listen(state.global_step, values)
        if self.on_sick == "stop" and self.watch.sick() is not None:
            control.should_training_stop = True

    def _tell(self, finding: Finding) -> None:
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            append_json(self.out / "findings.jsonl", finding.summary())
        if finding.level != "info":
            over = f"step {finding.recovered}: over: {finding.reason}"
            self.say(finding.words() if finding.lasts else over)


FEW = 5  # lines of a log that tell the objective
# the trainer's arguments that detectors read, and our names for them
OPTIONS = {
    "beta": "beta",
    "learning_rate": "learning_rate",
    "num_train_epochs": "epochs",
    "num_generations": "num_completions",
    "max_completion_length": "max_tokens",
}
