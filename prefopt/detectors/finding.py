"""What a detector is given and what it says: a line of metrics, a check of it, and what becomes a finding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

Level = Literal["info", "warn", "sick"]
LEVELS: tuple[Level, ...] = ("info", "warn", "sick")  # from the mildest on
State = dict[str, Any]  # what a detector remembers: plain values, so that JSON and checkpoints hold it


@dataclass(frozen=True)
class Run:
    """What is known of a run besides its metrics; None or empty where it is not.

    objective and options: by prefopt's names, whatever wrote the metrics. steps: updates in all. rows: of the training
    data. source: what wrote the metrics.
    """

    objective: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None
    rows: int | None = None
    source: str = "prefopt"

    def number(self, name: str) -> float | None:
        """An option that is a number."""
        value = self.options.get(name)
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


class Line(NamedTuple):
    """The metrics of an update or an evaluation, and what run they are of."""

    step: int
    values: Mapping[str, float]
    run: Run

    def get(self, *names: str) -> float | None:
        """The first of these metrics that is here and finite."""
        for name in names:
            value = self.values.get(name)
            if value is not None and math.isfinite(value):
                return value
        return None


@dataclass(frozen=True)
class Check:
    """What a detector makes of one line. level: None where nothing is wrong.

    value, threshold: what was measured and what it was compared with. reason: what was found, in words, with no full
    stop. remedy: what to do, in words. change: the same as options of a recipe, as far as options can do it. before:
    options of a run that should come first, of which the changed one takes the model. since: the update from which it
    holds, where that is not this one. evidence: other numbers that the reason rests on.
    """

    level: Level | None
    value: float | None = None
    threshold: float | None = None
    reason: str = ""
    remedy: str = ""
    change: Mapping[str, Any] = field(default_factory=dict)
    before: Mapping[str, Any] = field(default_factory=dict)
    since: int | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)


FINE = Check(None)


class Detector(Protocol):
    """One sign of trouble: a frozen dataclass whose fields are its thresholds, with a comment above each.

    name, title: for machines and for readers. needed, among: so many of its last checks must agree before it is a
    finding.
    """

    name: ClassVar[str]
    title: ClassVar[str]

    @property
    def needed(self) -> int: ...

    @property
    def among(self) -> int: ...

    def see(self, state: State, line: Line) -> Check | None:
        """Take a line in and judge; None where it says nothing on this, which is no vote. `state` is changed in place
        and is empty at the start of a run.
        """
        ...


@dataclass(frozen=True)
class Finding:
    """Something that a detector found often enough to say it.

    level: info for what is worth a look, warn for what is probably wrong, sick for what makes going on a waste. step:
    the update at which it was said. since: from which it holds. last: the latest at which it held. recovered: at which
    it was over, None while it lasts. The others as `Check` has them.
    """

    name: str
    level: Level
    value: float | None
    threshold: float | None
    reason: str
    step: int
    since: int
    last: int
    remedy: str
    change: Mapping[str, Any]
    before: Mapping[str, Any]
    evidence: Mapping[str, Any]
    recovered: int | None = None

    @property
    def lasts(self) -> bool:
        return self.recovered is None

    def words(self) -> str:
        """A line for a log."""
        return f"step {self.step}: {self.level}: {self.reason}. {self.remedy}".rstrip()

    def summary(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dict(vars(self))


def rank(level: Level | None) -> int:
    """0 for nothing wrong, then 1 for the mildest level."""
    return 0 if level is None else LEVELS.index(level) + 1
