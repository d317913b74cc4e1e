"""Rows in a file that grows batch by batch, and a record beside it from which an interrupted run goes on exactly."""

from __future__ import annotations

import fcntl
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from prefopt.records import InputError, plain

REASONS = 20  # of each kind that are told apart; a reason may hold what differs from row to row
OTHERS = "other reasons"


@dataclass
class Tally:
    """What became of prompts and completions.

    kept: completions that are in rows. ties: comparisons that came out equal. scored, total, lowest, highest: number
    and sum of the rewards, and their extremes. labels: rows by label. By reason: left_out, completions that were not
    written or not taken; unscored, completions; dropped, prompts that gave no row.
    """

    prompts: int = 0
    completions: int = 0
    rows: int = 0
    kept: int = 0
    ties: int = 0
    scored: int = 0
    total: float = 0.0
    lowest: float | None = None
    highest: float | None = None
    labels: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    unscored: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Tally:
        read: dict[str, Any] = {name: Counter(v) if isinstance(v, dict) else v for name, v in values.items()}
        return cls(**read)

    def see(self, reward: float) -> None:
        """Count a reward."""
        self.scored += 1
        self.total += reward
        self.lowest = reward if self.lowest is None else min(self.lowest, reward)
        self.highest = reward if self.highest is None else max(self.highest, reward)

    def add(self, other: Tally) -> None:
        """Count what another one counted."""
        for name in ("prompts", "completions", "rows", "kept", "ties", "scored", "total"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name, pick in (("lowest", min), ("highest", max)):
            known = [value for value in (getattr(self, name), getattr(other, name)) if value is not None]
            setattr(self, name, pick(known, default=None))
        for name in ("labels", "left_out", "unscored", "dropped"):
            _count(getattr(self, name), getattr(other, name))

    def summary(self) -> dict[str, Any]:
        """The same for a reader: plain numbers; a mean of nothing is None."""
        mean = self.total / self.scored if self.scored else None
        reward = {"mean": mean, "lowest": self.lowest, "highest": self.highest, "scored": self.scored}
        counted = {name: dict(getattr(self, name)) for name in ("labels", "left_out", "unscored", "dropped")}
        names = ("prompts", "completions", "rows", "kept", "ties")
        return {**{name: getattr(self, name) for name in names}, "reward": reward, **counted}


def _count(into: Counter[str], reasons: Mapping[str, int]) -> None:
    for reason, number in reasons.items():
        known = reason in into or len(into) < REASONS
        into[reason if known else OTHERS] += number


class Ledger:
    """The rows' file and its record, `OUT.progress`: settings, then a line for every batch that is wholly written.

    What a killed run left half-way is cut off. done: the keys of prompts that need no more work. tally: of all batches.
    InputError where the file was begun with other settings, by something else, or was changed since; and where another
    process writes it now.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        self.out, self.record = out, out.with_name(out.name + ".progress")
        self.settings = json.loads(json.dumps(plain(dict(settings)), default=str))
        self.done: set[str] = set()
        self.tally = Tally()
        self._end = 0  # bytes of the file that the record vouches for
        try:
            self._record, self._rows = self._open()
        except OSError as error:
            raise InputError(f"{out}: cannot write: {error.strerror or error}") from None

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._rows.close()
        self._record.close()

    def add(self, keys: Sequence[str], rows: Sequence[Mapping[str, Any]], tally: Tally) -> None:
        """Write a batch: its rows, and once they are on disk the line that vouches for them."""
        text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows).encode()
        try:
            _write(self._rows, text)
            self._end += len(text)
            said = {"keys": list(keys), "end": self._end, "tally": vars(tally)}
            _write(self._record, json.dumps(said).encode() + b"\n")
        except OSError as error:
            raise InputError(f"{self.out}: cannot write: {error.strerror or error}; {AGAIN}") from None
        self.done.update(keys)
        self.tally.add(tally)

    # -- what a run before left

    def _open(self) -> tuple[IO[bytes], IO[bytes]]:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        size = self.out.stat().st_size if self.out.exists() else 0
        if size and not self.record.exists():
            raise InputError(f"{self.out} is there and was not begun by this command; give another --out")
        record = self.record.open("a+b")
        try:
            self._lock(record)
            record.seek(0)
            whole = record.read()
            whole = whole[: whole.rfind(b"\n") + 1]  # a line without its end was cut while being written
            record.truncate(len(whole))
            self._take(whole.split(b"\n")[:-1], size)
            if not whole:
                _write(record, json.dumps({"settings": self.settings}).encode() + b"\n")
            rows = self.out.open("ab")
            rows.truncate(self._end)
        except BaseException:
            record.close()
            raise
        return record, rows

    def _lock(self, record: IO[bytes]) -> None:
        try:
            fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.out}: another process is writing it; wait for it, or give another --out") from None

    def _take(self, lines: Sequence[bytes], size: int) -> None:
        """What the record says."""
        try:
            before, *batches = [json.loads(line) for line in lines] or [{"settings": self.settings}]
            differences = _differences(before["settings"], self.settings)
            for batch in batches:
                self.done.update(batch["keys"])
                self.tally.add(Tally.of(batch["tally"]))
                self._end = int(batch["end"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.record} cannot be read ({error}); {self._anew()}") from None
        if differences:
            listed = "\n".join(f"  {line}" for line in differences)
            raise InputError(
                f"{self.out} was begun with other settings:\n{listed}\n"
                f"give the old ones to go on with it, or another --out; {self._anew()}"
            )
        if size < self._end or (size and not lines):
            raise InputError(f"{self.out} was changed since it was written; restore it, or {self._anew()}")

    def _anew(self) -> str:
        return f"to begin anew, delete {self.out.name} and {self.record.name} in {self.out.parent}"


AGAIN = "the same command goes on from here"


def _write(file: IO[bytes], data: bytes) -> None:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`name: old -> new` for every setting that is not the same."""
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return [f"{name}: {json.dumps(old.get(name))} -> {json.dumps(new.get(name))}" for name in names]
