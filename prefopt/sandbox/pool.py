"""Many programs at once, on a few zygotes that are replaced when they fail or have forked often."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from prefopt.sandbox import machine
from prefopt.sandbox.machine import Machine
from prefopt.sandbox.process import Limits, SandboxError, Zygote, plain
from prefopt.sandbox.programs import Outcome, Program, Verdict, judge

log = logging.getLogger("prefopt")

SPARE = 1.05  # of the programs' seconds: what starting and ending them may add
SHORTEST = 0.1  # seconds: below, a program that is right may be cut off by a busy machine
RUNS_PER_ZYGOTE = 2000  # then it is replaced, whatever it may have gathered


class Sandbox:
    """Runs programs of a model and says how each fared.

    level: `best`, `strict`, `standard` or `unsafe` (see `machine`). limits: of one program. workers: programs at once;
    0 takes one for each processor. packages: installed packages that programs may import.
    InputError if the level cannot be enforced on this machine.
    """

    def __init__(
        self, level: str = "best", limits: Limits | None = None, workers: int = 0, packages: Sequence[str] = ()
    ) -> None:
        self.machine: Machine = machine.find(level, tuple(packages))
        self.limits = limits or Limits()
        self.workers = workers or len(os.sched_getaffinity(0))
        self._fill()

    def _fill(self) -> None:
        """Zygotes are started when they are first needed: None stands for one."""
        self.owner, self.closed = os.getpid(), False
        self.idle: queue.SimpleQueue[Zygote | None] = queue.SimpleQueue()
        self.threads = ThreadPoolExecutor(self.workers, thread_name_prefix="sandbox")
        self.zygotes: set[Zygote] = set()
        self.lock = threading.Lock()
        for _ in range(self.workers):
            self.idle.put(None)

    def judge(self, programs: Sequence[Program], seconds: float = 120.0) -> list[Verdict]:
        """A verdict for each program, in their order, after at most `seconds` and a moment.

        Where these may not do for all at their limit, all are first run with less, and those that took longer again:
        programs that hang cannot take the time of the others.
        What could not be run by then, or because the sandbox failed twice, is an infra_error.
        """
        if self.owner != os.getpid():  # a fork: the zygotes are the parent's
            self._fill()
        until = time.monotonic() + seconds
        verdicts: dict[int, Verdict] = {}
        left = list(range(len(programs)))
        patience = 0.0
        while left:
            patience = self._patience(patience, len(left), until)
            judged = self.threads.map(partial(self._judge, until=until, seconds=patience), [programs[n] for n in left])
            verdicts |= zip(left, judged, strict=True)
            short = patience < self.limits.seconds
            left = [n for n in left if verdicts[n].outcome is Outcome.TIMEOUT] if short else []
        return [verdicts[n] for n in range(len(programs))]

    def _patience(self, before: float, num_programs: int, until: float) -> float:
        """Seconds for each of the programs that are left: their limit, if the time that is left would do for that.

        Else a fair share of a quarter of that time. Where that is not even twice what they had before, most of them
        hang: they get their limit, as many as there is time for.
        """
        each = max(until - time.monotonic(), 0.0) * self.workers / num_programs
        if each >= SPARE * self.limits.seconds:
            return self.limits.seconds
        share = max(each / 4, SHORTEST)
        return share if 2 * before < share < self.limits.seconds else self.limits.seconds

    def _judge(self, program: Program, until: float, seconds: float) -> Verdict:
        why = ""
        for again in (False, True):
            if time.monotonic() >= until:
                why = why or "the time of the whole batch was up before it ended"
                break
            try:
                with self._zygote(again, until) as zygote:
                    zygote.seconds = seconds
                    return judge(zygote, program, until)
            except SandboxError as error:
                why = str(error)
            except Exception as error:  # a fault of this package's: it must not lose the others' verdicts
                why = plain(f"{type(error).__name__}: {error}")
                log.warning("sandbox: a program was not judged: %s", why)
                break
        return Verdict(Outcome.INFRA_ERROR, 0, 0, why)

    @contextlib.contextmanager
    def _zygote(self, new: bool, until: float) -> Iterator[Zygote]:
        """An idle zygote, or a new one in its place. One that fails is not used again."""
        zygote = self.idle.get()
        worn = True
        try:
            if zygote is not None and new:
                self._drop(zygote)
                zygote = None
            if zygote is None:
                zygote = Zygote(self.machine.host, self.limits, until)
                with self.lock:
                    self.zygotes.add(zygote)
            yield zygote
            worn = zygote.runs >= RUNS_PER_ZYGOTE
        finally:
            if zygote is not None and worn:
                self._drop(zygote)
            self.idle.put(None if worn else zygote)

    def _drop(self, zygote: Zygote) -> None:
        zygote.close()
        with self.lock:
            self.zygotes.discard(zygote)

    def close(self) -> None:
        """End every process of the sandbox."""
        if self.owner != os.getpid():
            return
        self.threads.shutdown(wait=True, cancel_futures=True)
        for zygote in list(self.zygotes):
            self._drop(zygote)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
