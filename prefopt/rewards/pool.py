"""Processes that work on jobs and are killed at their deadline; nothing here waits without one."""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from prefopt import streams
from prefopt.rewards.channel import (
    DEADLINE,
    DIED,
    HEADER,
    HELLO,
    LARGEST_REPLY,
    RAISED,
    START,
    BadReply,
    Given,
    Refused,
    frame,
    read_given,
)

START_SECONDS = 120.0  # for a process to start and import what its function needs
STARTS = 3  # failed starts in a row after which a call gives up

_starter_of: tuple[int, ThreadPoolExecutor] | None = None


def _starter() -> ThreadPoolExecutor:
    """Linux ends a process with the *thread* that started it: one starts them all and lives as long as the trainer.

    A fork has none of its parent's threads, and gets one of its own.
    """
    global _starter_of
    if _starter_of is None or _starter_of[0] != os.getpid():
        _starter_of = (os.getpid(), ThreadPoolExecutor(1, "prefopt-rewards"))
    return _starter_of[1]


@dataclass(frozen=True, eq=False)
class Job:
    """units: what may be tried apart, each a tuple of samples' positions. content: the pickle that a process is sent,
    or why there is none. seconds: what this job may take; None: all that is left. share: of the time that is left when
    it starts, what it may take, so that others have their turn where it hangs. again: it was tried before.
    """

    units: tuple[tuple[int, ...], ...]
    content: bytes | str
    seconds: float | None = None
    share: float = 1.0
    again: bool = False

    @property
    def positions(self) -> list[int]:
        return [position for unit in self.units for position in unit]


class Gone(Exception):
    """The process is not there any more (no message), or writes what is no reply."""


class Worker:
    """One process. It starts in the background; `ready` once it has loaded the function."""

    def __init__(self, function: bytes | tuple[str, ...], memory: int | None) -> None:
        self.process, self.socket = _starter().submit(_start).result()
        self.ready = False
        self.job: Job | None = None
        self.number = HELLO
        self.until = time.monotonic() + START_SECONDS
        self._got = bytearray()
        hello = {"path": [str(Path(entry).absolute()) for entry in sys.path], "function": function, "memory": memory}
        self._rest = memoryview(frame(HELLO, pickle.dumps(hello)))

    def give(self, job: Job, content: bytes, until: float) -> None:
        self.job, self.until, self.number = job, until, self.number + 1
        self._rest = memoryview(frame(self.number, content))

    @property
    def waits_for(self) -> int:
        return select.POLLIN | (select.POLLOUT if self._rest else 0)

    def move(self) -> bytes | None:
        """Send what can be sent and receive what is there; the reply, once it is whole. Gone if there will be none."""
        try:
            while self._rest:
                self._rest = self._rest[self.socket.send(self._rest) :]
        except BlockingIOError:
            pass
        except OSError:
            self._rest = memoryview(b"")  # what it said before it went may still be there to read
        try:
            while part := self.socket.recv(1 << 16):
                self._got += part
                if (content := self._reply()) is not None:
                    return content
        except BlockingIOError:
            return None
        except OSError:
            pass
        raise Gone

    def _reply(self) -> bytes | None:
        if len(self._got) < HEADER.size:
            return None
        size, number = HEADER.unpack_from(self._got)
        if size > LARGEST_REPLY or number != self.number:
            raise Gone("its process wrote what is no reply")
        if len(self._got) < HEADER.size + size:
            return None
        content = bytes(self._got[HEADER.size :])
        self._got.clear()
        if len(content) != size:
            raise Gone("its process wrote more than a reply")
        return content

    @property
    def alive(self) -> bool:
        """Told without waiting for it: until then its number, and that of its group, cannot be another's."""
        if self.process.returncode is not None:
            return False
        try:
            return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        except ChildProcessError:
            return False

    def end(self) -> str:
        """Kill the process and what it started in its group, which may outlive it; how it ended."""
        if self.process.returncode is None:
            with contextlib.suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL)
            with contextlib.suppress(OSError):
                self.process.kill()
        self.socket.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1)
        return _ending(self.process.returncode)


def _start() -> tuple[subprocess.Popen[bytes], socket.socket]:
    streams.fill()  # the process prints to 1 and 2: they must not be the socket
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    # found wherever the trainer found it: the package may not be installed
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", f"{__package__}.worker", str(theirs.fileno()), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )
    return process, ours


def _ending(code: int | None) -> str:
    if code is None:
        return "its process cannot be ended"
    if code >= 0:
        return f"its process exited with {code}"
    try:
        return f"its process was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"its process was ended by signal {-code}"


class Pool:
    """Processes that load one function and answer jobs.

    function: a pickle of it, or ("file", path, name). size: processes. memory: bytes of data that each may use, None
    for no limit. A process that is killed or dies is replaced.
    """

    def __init__(self, function: bytes | tuple[str, ...], size: int, memory: int | None) -> None:
        self._function, self._size, self._memory = function, size, memory
        self._workers: list[Worker] = []
        self._failed_starts = 0
        self._start_error = Refused(START, "its process did not start")
        self._closed = False
        self._own()

    def _own(self) -> None:
        self._owner = os.getpid()
        self._end = weakref.finalize(self, _end_all, self._workers, self._owner)

    def _leave_to_parent(self) -> None:
        """In a fork: processes of its own, since those it knows answer the parent."""
        for worker in self._workers:
            worker.socket.close()
        self._workers = []
        self._end.detach()
        self._own()

    def start(self) -> Refused | None:
        """Wait for a first process; the error where none can load the function."""
        self._fill()
        until = time.monotonic() + START_SECONDS
        while self._failed_starts == 0 and not any(worker.ready for worker in self._workers):
            self._wait(until)
        return self._start_error if self._failed_starts else None

    def run(self, queue: deque[Job], until: float) -> Iterator[tuple[Job, Given | Refused]]:
        """Each job with its answer, as they come. Jobs may be added to the queue meanwhile.

        until: on the monotonic clock; what is not answered by then is refused, and its process killed.
        """
        if self._closed:
            raise RuntimeError("this reward was closed")
        if self._owner != os.getpid():
            self._leave_to_parent()
        self._failed_starts = 0
        try:
            while queue or self._busy:
                if time.monotonic() >= until:
                    break
                yield from self._assign(queue, until)
                if self._busy or not any(worker.ready for worker in self._workers):
                    yield from self._wait(until)
            yield from self._late(queue)
        finally:
            for worker in self._busy:
                self._drop(worker)

    def close(self) -> None:
        self._closed = True
        self._end()

    @property
    def _busy(self) -> list[Worker]:
        return [worker for worker in self._workers if worker.job]

    def _fill(self) -> None:
        while len(self._workers) < self._size:
            self._workers.append(Worker(self._function, self._memory))

    def _drop(self, worker: Worker) -> str:
        self._workers.remove(worker)
        return worker.end()

    def _assign(self, queue: deque[Job], until: float) -> Iterator[tuple[Job, Refused]]:
        """Give waiting jobs to waiting processes; refuse those that cannot be done."""
        for worker in [worker for worker in self._workers if not worker.job and not worker.alive]:
            if worker.ready:  # else its error is still to be read
                self._drop(worker)
        if self._failed_starts < STARTS:
            self._fill()
        elif not self._workers:
            while queue:
                yield queue.popleft(), self._start_error
        for worker in self._workers:
            if worker.ready and not worker.job:
                while queue and isinstance(queue[0].content, str):
                    job = queue.popleft()
                    yield job, Refused(RAISED, str(job.content))
                if queue:
                    job = queue.popleft()
                    assert isinstance(job.content, bytes)
                    worker.give(job, job.content, _limit(job, until))

    def _wait(self, until: float) -> list[tuple[Job, Given | Refused]]:
        """Wait until a process says something or one's time is up; the answers."""
        poll, by_descriptor = select.poll(), {}
        limits = [until]
        for worker in self._workers:
            if worker.job or not worker.ready:
                poll.register(worker.socket, worker.waits_for)
                by_descriptor[worker.socket.fileno()] = worker
                limits.append(worker.until)
        if not by_descriptor:
            return []
        seconds = max(0.0, min(limits) - time.monotonic())
        answers = []
        for descriptor, _ in poll.poll(seconds * 1000):
            answers += self._hear(by_descriptor.pop(descriptor))
        now = time.monotonic()
        for worker in by_descriptor.values():
            if now >= worker.until:
                answers += self._stop(worker)
        return answers

    def _hear(self, worker: Worker) -> list[tuple[Job, Given | Refused]]:
        job, ready = worker.job, worker.ready
        try:
            content = worker.move()
            if content is None:
                return []
            if not ready:
                self._loaded(worker, content)
                return []
            assert job
            worker.job = None
            return [(job, read_given(content, len(job.positions)))]
        except (Gone, BadReply) as error:
            ending = self._drop(worker)
            why = str(error) or ending
            if not ready:
                self._not_started(Refused(START, f"its process did not start: {why}"))
            return [(job, Refused(DIED, why))] if job else []

    def _loaded(self, worker: Worker, content: bytes) -> None:
        """A process's first word: that it has loaded the function, or why it cannot."""
        found = read_given(content, 0) if b'"ready"' not in content[:10] else None
        if isinstance(found, Refused):
            self._drop(worker)
            self._not_started(found)
        else:
            worker.ready, self._failed_starts = True, 0

    def _not_started(self, error: Refused) -> None:
        self._failed_starts += 1
        self._start_error = Refused(START, f"its function cannot be loaded: {error.why}", error.traceback)

    def _stop(self, worker: Worker) -> list[tuple[Job, Given | Refused]]:
        """Kill a process whose time is up."""
        job = worker.job
        self._drop(worker)
        if job is None:
            self._not_started(Refused(START, f"not loaded within {START_SECONDS:.0f} seconds"))
            return []
        return [(job, Refused(DEADLINE, _overdue(job)))]

    def _late(self, queue: deque[Job]) -> Iterator[tuple[Job, Refused]]:
        """Refuse what is left when the call's time is up."""
        for worker in self._busy:
            assert worker.job
            job = worker.job
            self._drop(worker)
            yield job, Refused(DEADLINE, _overdue(job))
        while queue:
            yield queue.popleft(), Refused(DEADLINE, "the deadline passed before its turn")
        # what was killed starts again while the trainer works on
        self._fill()


def _limit(job: Job, until: float) -> float:
    """When, on the monotonic clock, a job that starts now is killed."""
    now = time.monotonic()
    seconds = job.share * max(0.0, until - now)
    return now + (seconds if job.seconds is None else min(seconds, job.seconds))


def _overdue(job: Job) -> str:
    if job.seconds is not None:
        return f"no answer within {job.seconds:g} seconds"
    return "no answer within the deadline" if job.share == 1 else "no answer within its share of the deadline"


def _end_all(workers: list[Worker], owner: int) -> None:
    # a fork of the trainer that exits must not take the trainer's processes along
    while workers and os.getpid() == owner:
        workers.pop().end()
