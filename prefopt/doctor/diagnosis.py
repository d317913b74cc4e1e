"""A log through the detectors, and what they say in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefopt.detectors import EVERY, Finding, Watch, every
from prefopt.detectors.finding import LEVELS, rank
from prefopt.doctor.logs import Log

MEANING = {"sick": "going on is a waste", "warn": "probably wrong", "info": "worth a look"}
LOST = (
    "unless that update was skipped the weights are lost: go on from a checkpoint before it, with a lower learning_rate"
)


@dataclass(frozen=True)
class Diagnosis:
    """findings: those that last first, worst first. judged: the detectors that had something to read."""

    log: Log
    findings: list[Finding]
    judged: list[str]

    @property
    def worst(self) -> Finding | None:
        """The worst of what lasts, that a recipe should mend."""
        return next((finding for finding in self.findings if finding.lasts), None)

    @property
    def verdict(self) -> str | None:
        """The worst level of what lasts, at least a warning where numbers are not finite; healthy where nothing is.

        None where nothing could be judged.
        """
        worst = self.worst.level if self.worst else "healthy" if self.judged else None
        return "warn" if self.log.lost and worst in ("healthy", "info", None) else worst

    def summary(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        run = self.log.run
        return {
            "log": str(self.log.path),
            "source": run.source,
            "objective": run.objective,
            "steps": self.log.last,
            "finished": self.log.finished,
            "verdict": self.verdict,
            "not_finite": self.log.lost or None,
            "findings": [finding.summary() for finding in self.findings],
            "judged": self.judged,
            "notes": self.log.notes,
        }

    def text(self) -> str:
        """For a reader: what the log is, the verdict, and each finding with its evidence and its remedy."""
        return "\n".join([*self._head(), *(line for finding in self.findings for line in _paragraph(finding))])

    def _head(self) -> list[str]:
        run, log = self.log.run, self.log
        of = f" of {run.steps:,}" if run.steps else ""
        state = {True: "finished", False: "not finished", None: "end unknown"}[log.finished]
        what = f"{run.source}, {run.objective or 'objective unknown'}, {log.last:,}{of} updates, {state}"
        lines = [f"{log.path}: {what}", *(f"note: {note}" for note in log.notes)]
        lasting = [finding for finding in self.findings if finding.lasts]
        if log.lost:
            lines += [f"not finite: {log.lost}", f"  {LOST}"]
        if not self.judged:
            return [*lines, "nothing in this log can be judged: it has none of the metrics that detectors read"]
        if not lasting:
            what = f"none of {len(self.judged)} detectors finds anything"
            return [*lines, f"{what} else that lasts" if log.lost else f"healthy: {what} that lasts"]
        counts = [f"{sum(f.level == level for f in lasting)} {level}" for level in reversed(LEVELS)]
        return [*lines, "findings: " + ", ".join(c for c in counts if not c.startswith("0 "))]


def diagnose(log: Log) -> Diagnosis:
    """Every line of the log through every detector."""
    watch = Watch(log.run, every())
    for step, values in log.lines:
        watch.listen(step, values)
    order = sorted(watch.findings, key=lambda finding: (not finding.lasts, -rank(finding.level), finding.step))
    return Diagnosis(log, order, [name for name in EVERY if watch.votes.get(name)])


def _paragraph(finding: Finding) -> list[str]:
    title = EVERY[finding.name].title
    over = f", over since step {finding.recovered}" if finding.recovered is not None else ""
    held = f"steps {finding.since} to {finding.last}" if finding.last > finding.since else f"step {finding.since}"
    lines = ["", f"{finding.level} ({MEANING[finding.level]}): {title} [{finding.name}, {held}{over}]"]
    lines.append(f"  found     {finding.reason}")
    if finding.value is not None and finding.threshold is not None:
        lines.append(f"  measured  {_figure(finding.value)}, threshold {_figure(finding.threshold)}")
    evidence = {name: value for name, value in finding.evidence.items() if value is not None}
    if evidence:
        lines.append("  evidence  " + ", ".join(f"{name} {_figure(value)}" for name, value in evidence.items()))
    if finding.remedy:
        lines.append(f"  remedy    {finding.remedy}")
    if finding.before or finding.change:
        lines.append(f"  recipe    {_recipe(finding.before, finding.change)}")
    return lines


def _recipe(before: Mapping[str, Any], change: Mapping[str, Any]) -> str:
    first = f"first {_options(before)}; then from its model: " if before else ""
    return first + (_options(change) or "as before")


def _options(options: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in options.items())


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
