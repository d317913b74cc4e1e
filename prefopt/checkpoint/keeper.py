"""When checkpoints are written, by whom, and what happens when they cannot be."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

from prefopt import ranks
from prefopt.checkpoint import commit
from prefopt.checkpoint.tensors import hasher
from prefopt.checkpoint.tree import Tree
from prefopt.records import InputError

MOST = 0.05  # share of the time in which checkpoints may be on their way to the disk, where the clock asks for them
ROUND = 1.0  # seconds that a process waits for its own part before it meets the others, which shows that all are alive
LAST = 20.0  # seconds in which the other processes of a run that failed may still finish their parts
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class CheckpointOptions:
    """When a run's whole state is saved, so that it goes on from there after whatever stopped it."""

    # minutes between checkpoints, more where writing one takes long; None: none by the clock
    save_minutes: float | None = 10.0
    # a checkpoint every so many updates as well; None: by the clock alone
    save_every: int | None = None
    # whole checkpoints that are kept, the newest ones; all go when the run is finished
    keep_checkpoints: int = 2
    # write a checkpoint while training goes on, from a copy of the state in memory; false: training waits, without a
    # copy
    save_async: bool = True
    # checkpoints in a row that cannot be written before the run stops
    max_failed_saves: int = 5
    # go on from a checkpoint although something that decides the result has changed; the summary then says what
    allow_inexact: bool = False

    def __post_init__(self) -> None:
        for name in ("save_every", "keep_checkpoints", "max_failed_saves"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.save_minutes is not None and not self.save_minutes > 0:
            raise ValueError(f"save_minutes must be above 0, got {self.save_minutes}")


class Keeper:
    """Writes the checkpoints of a run into `folder`, one at a time.

    state: () -> this process's state, a tree (see `Tree`). files: whose content the state counts on, synced with it.
    say: lines for the log. committed: told of the facts of every checkpoint that is kept, after each commit. whole:
    step of the newest checkpoint that is known to be whole, None where there is none. again: what goes on from it.
    """

    def __init__(
        self,
        folder: Path,
        options: CheckpointOptions,
        state: Callable[[], Any],
        *,
        files: Sequence[Path] = (),
        say: Callable[[str], None] = lambda text: None,
        committed: Callable[[list[Mapping[str, Any]]], None] = lambda facts: None,
        whole: int | None = None,
        again: str = "the same command",
    ) -> None:
        self.folder, self.options, self.state, self.files = folder, options, state, files
        self.say, self.committed, self.whole, self.again = say, committed, whole, again
        self.last_step, self.last_time = 0, time.monotonic()
        self.failed = 0  # saves in a row
        self.took = 0.0  # seconds that the latest one was written in
        self.problem = ""
        self.short = False  # whether memory was too short for a copy, which is said once
        self.ends = math.inf  # when the other processes' parts are waited for no more
        self.writing: Future[None] | None = None
        self.removing: list[Future[None]] = []  # what goes in the hashing thread, which nobody has waited for
        # of several processes each writes in a thread, so that it can meet the others meanwhile. Started now: where
        # memory is short, a thread that is to start may never say that it did
        threaded = options.save_async or ranks.world() > 1
        self.thread = ThreadPoolExecutor(1, "prefopt-checkpoint") if threaded else None
        if self.thread is not None:
            self.thread.submit(int).result()
        hasher()

    def __enter__(self) -> Keeper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for what is being written; where the run failed, for other processes' parts only LAST seconds, and not
        at all where one of them is gone: it finishes its own part before it goes.
        """
        try:
            if error is None:
                self._await_all()
        except BaseException as lost:
            error = lost
            raise
        finally:
            if error is not None:
                self.ends = time.monotonic() + (0.0 if ranks.is_lost(error) else LAST)
            self.close()

    def due(self, step: int) -> bool:
        """Whether a checkpoint should be written after update `step`; one that is still being written is waited for
        only where `save_every` asks for the next.
        """
        every, minutes = self.options.save_every, self.options.save_minutes
        if every is not None and step % every == 0 and step != self.last_step:
            return True
        if minutes is None or self.busy:
            return False
        return time.monotonic() - self.last_time >= max(60 * minutes, self.took / MOST)

    @property
    def busy(self) -> bool:
        return self.writing is not None and not self.writing.done()

    def save(self, step: int, facts: Mapping[str, Any], wait: bool = False) -> None:
        """Save the state as of now; all processes together. wait: until it is on the disk.

        A save that fails is said and counted, and training goes on. InputError once `max_failed_saves` in a row did.
        """
        self.finish()
        if self.failed and ranks.is_main():  # what a slower process wrote when the others had given up
            commit.sweep(self.folder)
        attempt = ranks.from_main(f"{os.getpid()}-{time.monotonic_ns()}")
        later, tree = self._taken(step, self.options.save_async and not wait)
        self.last_step, self.last_time = step, time.monotonic()
        # now, as best weights are kept for what is in it; where it cannot be made, writing says so
        with contextlib.suppress(OSError):
            commit.make_place(self.folder)
        if self.thread is not None and (later or ranks.world() > 1):
            self.writing = self.thread.submit(self._write, step, tree, dict(facts), attempt)
        else:
            self._write(step, tree, dict(facts), attempt)
        if not later:
            self.finish()

    def _taken(self, step: int, later: bool) -> tuple[bool, Callable[[], Tree]]:
        """Whether training goes on while the state is written, the same on all processes, and what takes it apart.

        later: whether it should; it does not where memory is too short for a copy.
        """
        state, problem = self.state(), ""
        if later:
            try:
                tree = Tree(state, copy=True)
            except (MemoryError, RuntimeError) as error:  # the second is torch's own
                problem = (str(error) or type(error).__name__).splitlines()[0]
            later = not ranks.all_max(int(bool(problem)))
            if not later and not self.short:
                self.short = True
                why = problem or "in another process"
                self.say(
                    f"step {step}: no memory for a copy of the state ({why}); training waits while checkpoints are "
                    "written, as with save_async=false"
                )
        return (True, lambda: tree) if later else (False, lambda: Tree(state, copy=False))

    def finish(self) -> None:
        """Wait for what is being written, by all processes. InputError as for `save`, on all of them."""
        self._await_all()
        most = ranks.all_max(self.failed)
        if most >= self.options.max_failed_saves:
            problem = next(one for one in ranks.gather(self.problem) if one)
            raise InputError(
                f"{self.folder}: {most} checkpoints in a row could not be written (the last: {problem}); "
                f"make room there or choose another out; {self.again} goes on from the newest whole checkpoint, if "
                "there is one"
            )

    def _await_all(self) -> None:
        """Wait until every process has written its part, however long one takes: they meet every ROUND seconds."""
        while self.writing is not None:
            wait([self.writing], timeout=ROUND)
            if not ranks.all_max(int(self.busy)):
                self.writing = None

    def keep_one(self) -> bool:
        """Make room for weights, once no checkpoint is being written; whether there may be more than before.

        Once by waiting for what is being removed, then by removing all checkpoints but the newest whole one. On the
        first process alone, while the others wait: its part of a checkpoint ends with the commit, which waits for
        theirs, or with a failure of all; what they may then still write is in a hidden folder, and not touched here.
        """
        if self.writing is not None:
            wait([self.writing])
        if self._await_removed():
            return True
        stay = self._prune_to_one()
        if not stay:
            return False
        self.committed([commit.manifest_of(path)["facts"] for path in stay])
        self.say(f"no room for the best weights; all checkpoints but that of step {self.whole} were removed")
        return True

    def make_room(self) -> None:
        """Before a result is written: older checkpoints go where the disk has less room than the newest one takes."""
        if self.whole is None or not ranks.is_main():
            return
        self._await_removed()
        newest = self.folder / commit.name_of(self.whole)
        short = shutil.disk_usage(self.folder).free < sum(file.stat().st_size for file in newest.iterdir())
        if short and self._prune_to_one():
            self.say(f"little room is left for the result; all checkpoints but that of step {self.whole} were removed")

    def _await_removed(self) -> bool:
        """Wait for what is being removed; whether anything was, since this was last asked."""
        removing, self.removing = self.removing, []
        wait(removing)
        return bool(removing)

    def _prune_to_one(self) -> list[Path]:
        """Remove all checkpoints but the newest whole one, and return it; empty where there are no others."""
        if self.whole is None or len(commit.found(self.folder)) < 2:
            return []
        return commit.prune(self.folder, 1, self.whole)

    def close(self) -> None:
        """Wait for what is being written, whatever became of the run."""
        if self.thread is not None:
            self.thread.shutdown()

    # ---------------------------------------------------------------- in the thread that writes

    def _write(self, step: int, tree: Callable[[], Tree], facts: dict[str, Any], attempt: str) -> None:
        began = time.monotonic()
        try:
            self._written(step, tree, facts, attempt)
        except Exception as error:  # whatever it is, training must not end for it
            self.failed += 1
            self.problem = str(error) or type(error).__name__
            self.say(
                f"step {step}: the checkpoint could not be written ({self.problem}); training goes on, "
                f"failure {self.failed} of {self.options.max_failed_saves} in a row"
            )
            return
        self.failed, self.problem, self.took, self.whole = 0, "", time.monotonic() - began, step
        if ranks.is_main():
            self._tidy(step)
            self.say(f"step {step}: checkpoint written in {self.took:.1f} s")

    def _tidy(self, step: int) -> None:
        """What follows a commit. The checkpoint is there whatever becomes of it, so nothing is written again."""
        try:
            stay = commit.prune(self.folder, self.options.keep_checkpoints, step, self._remove_later)
            commit.point(self.folder, stay[-1])
            self.committed([commit.manifest_of(path)["facts"] for path in stay])
        except Exception as error:
            self.say(f"step {step}: the checkpoint is written, but older ones could not be removed ({error})")

    def _remove_later(self, path: Path) -> None:
        """Removing a large file takes a while, for which nobody need wait but where there is no room. The interpreter
        waits before it ends; what a killed process leaves is swept when the run goes on.
        """
        self.removing.append(hasher().submit(commit.discard, path))

    def _written(self, step: int, tree: Callable[[], Tree], facts: dict[str, Any], attempt: str) -> None:
        self.removing = [one for one in self.removing if not one.done()]
        for number in count():
            try:
                return self._attempt(step, tree, facts, f"{attempt}-{number}")
            except OSError as error:
                # the other processes have no part in a second try: the next one has room
                if error.errno not in FULL or not ranks.is_main() or not self._found_room(step) or ranks.world() > 1:
                    raise

    def _found_room(self, step: int) -> bool:
        """Whether there may be more room on a full disk: what is being removed goes first, then older checkpoints."""
        if self._await_removed():
            return True
        if not self._prune_to_one():
            return False
        self.say(f"step {step}: no room for the checkpoint; all but that of step {self.whole} were removed")
        return True

    def _attempt(self, step: int, tree: Callable[[], Tree], facts: dict[str, Any], attempt: str) -> None:
        rank, world = ranks.rank(), ranks.world()
        writing = commit.hidden(self.folder, step, attempt)
        try:
            commit.make(writing)
            parts = tree()
            commit.seal(writing, rank, parts.write(writing, f"rank-{rank}"), parts.hashes)
            if rank:
                return
            for file in self.files:
                if file.exists():
                    commit.sync(file)
            commit.commit(writing, step, world, facts, useless=lambda: time.monotonic() > self.ends)
        except Exception as error:
            commit.give_up(writing, rank, error)
            if not rank:
                commit.discard(writing)
            raise
