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

from prefopt.sandbox import machine
from prefopt.sandbox.machine import Machine
from prefopt.sandbox.process import Limits, SandboxError, Zygote, plain
from prefopt.sandbox.programs import Outcome, Program, Verdict, judge

log = logging.getLogger("prefopt")

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

        What could not be run by then, or because the sandbox failed twice, is an infra_error.
        """
        if self.owner != os.getpid():  # a fork: the zygotes are the parent's
            self._fill()
        until = time.monotonic() + seconds
        return list(self.threads.map(lambda program: self._judge(program, until), programs))

    def _judge(self, program: Program, until: float) -> Verdict:
        why = ""
        for again in (False, True):
            if time.monotonic() >= until:
                why = why or "the time of the whole batch was up before it ran"
                break
            try:
                with self._zygote(again, until) as zygote:
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
