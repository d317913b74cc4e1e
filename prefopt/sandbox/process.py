"""The trusted end: starts a zygote, has it fork a process for a program, and talks with that.

Whatever comes back is read with limits on bytes, depth and time. What the other side does is an outcome (Irregular);
what the sandbox itself fails to do is SandboxError, and says nothing about the program.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from typing import Any

from prefopt.sandbox import codec

START_SECONDS = 5.0  # for a zygote, or a program's process, to say that it is there
LATE_SECONDS = 0.2  # in which an answer sent in time is still read, where this side comes late
STOP_SECONDS = 0.6  # for a zygote to say that a process it was told to kill has ended
SOURCES = ("codec", "confine", "signs", "inside", "zygote")
ENVIRONMENT = {"PYTHONHASHSEED": "0", "TZ": "UTC", "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1"}
# -s -S: no packages of the user or the site. Not -I, which would ignore the seed of hashes.
FLAGS = ("-s", "-S", "-B", "-c")
BOOT = """
import json, socket, sys, types
control = socket.socket(fileno=0)
sources, settings = json.loads(control.recv(1 << 18))
for name, text in sources:
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = []
    exec(compile(text, name, "exec"), module.__dict__)
sys.modules["prefopt.sandbox.zygote"].serve(control, settings)
"""


class SandboxError(RuntimeError):
    """The sandbox failed, not the program in it."""


class Irregular(Exception):
    """What a process did instead of answering: `outcome` is `timeout`, `protocol` or `gone`."""

    def __init__(self, outcome: str, why: str) -> None:
        super().__init__(why)
        self.outcome = outcome


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    # seconds a program may take by the clock; a program that waits longer is a timeout
    seconds: float = 6.0
    # seconds of processor time, whole: what decides about slow programs, however busy the machine is
    cpu_seconds: int = 4
    # bytes of address space; Python itself takes about 40 MiB
    memory_bytes: int = 512 << 20
    # bytes a program may print where its output is judged
    output_bytes: int = 1 << 20
    # bytes of all its answers together
    answer_bytes: int = 1 << 20
    # files open at once
    num_files: int = 32

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if not isinstance(self.cpu_seconds, int):
            raise ValueError(f"cpu_seconds must be whole, got {self.cpu_seconds}")


@dataclass(frozen=True)
class Host:
    """How zygotes are started.

    command: what stands before the interpreter, such as bubblewrap. interpreter: its path. user: the user and group id
    they get, None for the caller's own. confined: programs confine themselves. packages, folders, readable: packages
    that programs may import, where they lie, and what of that they may read.
    """

    interpreter: str
    command: tuple[str, ...] = ()
    user: int | None = None
    confined: bool = True
    packages: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    readable: tuple[str, ...] = ()

    def settings(self, limits: Limits) -> dict[str, Any]:
        """What a zygote is told."""
        allowed = {
            "memory": limits.memory_bytes,
            "cpu_seconds": limits.cpu_seconds,
            "file_bytes": limits.output_bytes,
            "num_files": limits.num_files,
        }
        packages = {"packages": self.packages, "folders": self.folders, "readable": self.readable}
        return {"confined": self.confined, "limits": allowed, **packages}


@dataclass(frozen=True)
class End:
    """How a process ended. signal: that killed it, 0 if none did. stopped: it was killed on request.

    cpu: seconds of processor time. memory: bytes at most in memory.
    """

    code: int
    signal: int
    stopped: bool
    cpu: float
    memory: int


def _keeper() -> ThreadPoolExecutor:
    """The thread that starts zygotes. They die with it, and it lives as long as the process: a zygote started by a
    thread that ends earlier would be killed then."""
    global _keeper_of
    if _keeper_of is None or _keeper_of[0] != os.getpid():
        _keeper_of = (os.getpid(), ThreadPoolExecutor(1, thread_name_prefix="sandbox"))
    return _keeper_of[1]


_keeper_of: tuple[int, ThreadPoolExecutor] | None = None


class Zygote:
    """A running zygote. seconds: that its next program may take, at most those of limits.

    SandboxError, with what it said, if it does not start, by `until` where that is given.
    """

    def __init__(self, host: Host, limits: Limits, until: float = math.inf) -> None:
        self.limits, self.runs, self.seconds = limits, 0, limits.seconds
        self.spare: Run | None = None
        self.endings: dict[int, dict[str, Any]] = {}
        self.said = os.memfd_create("zygote-errors")
        self.control, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with there:
                self.process = _keeper().submit(self._popen, host, there).result()
            names = ["prefopt", "prefopt.sandbox", *(f"prefopt.sandbox.{name}" for name in SOURCES)]
            texts = ["", "", *map(_source, SOURCES)]
            self.control.send(json.dumps([list(zip(names, texts, strict=True)), host.settings(limits)]).encode())
            self.version = self._hear("ready", min(time.monotonic() + START_SECONDS, until))["version"]
        except (OSError, SandboxError, RuntimeError) as error:
            why = self._errors() or str(error)
            self.close()
            raise SandboxError(f"no zygote with {' '.join((*host.command[:1], host.interpreter))}: {why}") from None

    def _popen(self, host: Host, control: socket.socket) -> subprocess.Popen[bytes]:
        user: dict[str, Any] = {"user": host.user, "group": host.user, "extra_groups": []}
        return subprocess.Popen(
            [*host.command, host.interpreter, *FLAGS, BOOT],
            stdin=control.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=self.said,
            env=ENVIRONMENT,
            cwd="/",
            start_new_session=True,
            **(user if host.user is not None else {}),
        )

    def _errors(self) -> str:
        """The last line a zygote that failed has said."""
        lines = os.pread(self.said, 1 << 16, 0).decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def run(self, stdin: int | None = None, stdout: int | None = None) -> Run:
        """A new process, confined and ready for a request. stdin, stdout: descriptors for it.

        Without them it is one that was forked ahead, while another ran: forking is most of what a run costs.
        """
        if stdin is not None or stdout is not None:
            return self._fork(stdin, stdout)
        run = self.spare or self._fork()
        self.spare = None
        self.spare = self._fork()
        return run

    def _fork(self, stdin: int | None = None, stdout: int | None = None) -> Run:
        self.runs += 1
        ours, theirs = socket.socketpair()
        descriptors = [theirs.fileno(), *(fd for fd in (stdin, stdout) if fd is not None)]
        with theirs:
            try:
                self.control.settimeout(START_SECONDS)
                socket.send_fds(self.control, [json.dumps({"run": self.runs}).encode()], descriptors)
            except OSError as error:
                ours.close()
                raise SandboxError(f"the zygote is gone: {error}") from None
        return Run(self, self.runs, ours)

    def ended(self, number: int, until: float) -> dict[str, Any] | None:
        """How run `number` ended; None if it has not by then."""
        with contextlib.suppress(TimeoutError):
            while number not in self.endings:
                message = self._hear("ended", until)
                self.endings[message["ended"]] = message
        return self.endings.pop(number, None)

    def _hear(self, what: str, until: float) -> dict[str, Any]:
        self.control.settimeout(max(until - time.monotonic(), 1e-4))
        try:
            text = self.control.recv(4096)
        except TimeoutError:
            if what == "ended":
                raise
            raise SandboxError(f"not {what} in time") from None
        except OSError as error:
            raise SandboxError(f"the zygote is gone: {error}") from None
        message = json.loads(text) if text else {}
        if what not in message:
            raise SandboxError(f"the zygote is gone{': ' + self._errors() if self._errors() else ''}")
        return dict(message)

    def tell(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # gone: noticed where its answer is waited for
            self.control.settimeout(STOP_SECONDS)
            self.control.send(json.dumps(message).encode())

    def close(self) -> None:
        """Kill it, and with it what it has forked."""
        self.control.close()
        if self.spare is not None:
            self.spare.channel.close()
        process = getattr(self, "process", None)
        if process is not None:
            with contextlib.suppress(OSError):
                process.kill()
            process.wait()
        if self.said >= 0:
            os.close(self.said)
            self.said = -1


def _source(name: str) -> str:
    return resources.files("prefopt.sandbox").joinpath(f"{name}.py").read_text(encoding="utf-8")


class Run:
    """The conversation with one process."""

    def __init__(self, zygote: Zygote, number: int, channel: socket.socket) -> None:
        self.zygote, self.number, self.channel = zygote, number, channel
        self.left = zygote.limits.answer_bytes
        self.until = time.monotonic() + START_SECONDS

    def begin(self, request: dict[str, Any], until: float) -> float:
        """Give it what to run, once it is confined; the time by which it must be done: its seconds from now, or
        `until` if that is earlier. SandboxError if it is not confined soon."""
        self.until = min(time.monotonic() + START_SECONDS, until)
        try:
            message = self.receive()
        except Irregular as problem:
            raise SandboxError(f"no process for a program: {problem}") from None
        if message != ["ready"]:
            raise SandboxError(f"a process could not confine itself: {message[-1]}")
        self.until = min(time.monotonic() + self.zygote.seconds, until)
        self.send(request)
        return self.until

    def send(self, message: Any) -> None:
        body = json.dumps(message).encode()
        self._wait()
        try:
            self.channel.sendall(struct.pack("!I", len(body)) + body)
        except TimeoutError:
            raise Irregular("timeout", "it did not read a call in time") from None
        except OSError:
            raise Irregular("gone", "it ended before it read a call") from None

    def receive(self) -> list[Any]:
        """The next message, a list that begins with a word. Irregular if there is none."""
        size = struct.unpack("!I", self._exactly(4))[0]
        self.left -= size
        if self.left < 0:
            raise Irregular("protocol", f"it sent more than {self.zygote.limits.answer_bytes} bytes, or no message")
        try:
            message = codec.parse(self._exactly(size))
        except ValueError as error:
            raise Irregular("protocol", f"it sent what is no message: {plain(error)}") from None
        if not isinstance(message, list) or not message or not isinstance(message[0], str):
            raise Irregular("protocol", "it sent what is no message: a list that begins with a word was due")
        return message

    def _exactly(self, size: int) -> bytes:
        pieces, missing = [], size
        while missing:
            self._wait()
            try:
                piece = self.channel.recv(min(missing, 1 << 16))
            except TimeoutError:
                raise Irregular("timeout", "it did not answer in time") from None
            except OSError:
                piece = b""
            if not piece:
                raise Irregular("gone", "it ended without an answer")
            pieces.append(piece)
            missing -= len(piece)
        return b"".join(pieces)

    def _wait(self) -> None:
        """Let the next operation take what time is left. Irregular once that is over, and a moment for what is late."""
        left = self.until - time.monotonic()
        if left < -LATE_SECONDS:
            raise Irregular("timeout", "it did not answer in time")
        self.channel.settimeout(max(left, 1e-3))

    def stop(self, patience: float = 0.0) -> End:
        """End the process, after `patience` seconds in which it may end by itself, and say how it ended.

        SandboxError if the zygote does not say; it is of no use then.
        """
        now = time.monotonic()
        said = self.zygote.ended(self.number, now + patience) if patience else None
        told = said is None
        if said is None:
            self.zygote.tell(stop=self.number)
            said = self.zygote.ended(self.number, time.monotonic() + STOP_SECONDS)
        self.channel.close()
        if said is None:
            raise SandboxError(f"the zygote did not answer for {STOP_SECONDS:g} seconds")
        if "refused" in said:
            raise SandboxError(str(said["refused"]))
        code = os.waitstatus_to_exitcode(said["status"])
        stopped = told and code == -signal.SIGKILL
        return End(max(code, 0), max(-code, 0), stopped, said["cpu"], said["memory"])


def plain(what: object) -> str:
    """Text that can be logged anywhere, whatever it holds."""
    return str(what).encode("ascii", "backslashreplace").decode()[:300]


def base_interpreter() -> str:
    """The interpreter that runs this, outside of its virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
