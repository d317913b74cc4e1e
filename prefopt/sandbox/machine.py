"""What this machine can enforce, found by trying it: the level of a sandbox, and why it is not higher.

strict: standard, inside namespaces of bubblewrap. standard: resource limits, Landlock and seccomp, as an unprivileged
user. unsafe: resource limits only; never chosen, only asked for. Below the level asked for nothing runs.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import platform
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefopt.records import InputError
from prefopt.sandbox import codec
from prefopt.sandbox.process import Host, Irregular, Limits, SandboxError, Zygote, base_interpreter

log = logging.getLogger("prefopt")

LEVELS = ("strict", "standard", "unsafe")
NOBODY = 65534  # user and group that programs run as where the caller is root
SYSTEM_FOLDERS = ("/usr", "/bin", "/lib", "/lib64")  # what bubblewrap shows of the machine, beside the interpreter

# What a program tries, to show that it is confined; its answer names what worked. STRICT is filled in.
PROBE = """
import ctypes, os, socket
library = ctypes.CDLL(None, use_errno=True)
def attempt():
    worked = []
    def attack(name, action):
        try:
            action()
        except OSError:
            return
        worked.append(name)
    def fork():
        if os.fork() == 0:
            os._exit(0)
    def unshare():
        if library.unshare(0x10000000) != 0:
            raise OSError
    def truncate(call):
        try:
            call()
        except IsADirectoryError:  # it was let through to the file
            pass
    attack("fork a process", fork)
    attack("run a program", lambda: os.posix_spawn("/bin/true", ["true"], {}))
    attack("signal the process that started it", lambda: os.kill(os.getppid(), 0))
    attack("open a network socket", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    attack("open a Unix socket", lambda: socket.socket(socket.AF_UNIX))
    attack("make a user namespace", unshare)
    attack("read a file anyone may read", lambda: open("/etc/passwd").read())
    attack("open a folder anyone may write to", lambda: os.open("/tmp", os.O_TMPFILE | os.O_RDWR))
    attack("truncate a file", lambda: truncate(lambda: os.truncate("/", 0)))
    attack("truncate a file that it opens", lambda: truncate(lambda: os.open("/", os.O_TRUNC)))
    attack("list processes", lambda: os.listdir("/proc"))
    if STRICT:
        attack("see that a file exists", lambda: os.stat("/etc/passwd"))
    if os.getuid() == 0:
        worked.append("be root")
    return worked
"""


@dataclass(frozen=True)
class Machine:
    """A level with what runs it, and for each level above the reason why it is not that one.

    version: of the Python that programs run in. passed_over: why it is not the trainer's own, "" if it is.
    """

    level: str
    host: Host
    version: str
    reasons: dict[str, str]
    passed_over: str = ""

    def describe(self) -> list[str]:
        """Lines for a person: level, interpreter, user, and what stands in the way of a higher level."""
        user = f"user {self.host.user}" if self.host.user is not None else f"your own user ({os.getuid()})"
        lines = [f"level: {self.level}", f"programs run in {self.host.interpreter} ({self.version}) as {user}"]
        lines += [f"not in another Python: {self.passed_over}"] if self.passed_over else []
        return [*lines, *(f"not {level}: {reason}" for level, reason in self.reasons.items())]


def find(level: str = "best", packages: tuple[str, ...] = ()) -> Machine:
    """The machine at a level: `best` takes strict where that works, else standard.

    packages: names of installed packages that programs may import beside the standard library.
    InputError, with the reason of each level, if the level cannot be enforced here: nothing runs then.
    """
    if level not in ("best", *LEVELS):
        raise InputError(f"sandbox level {level!r} is none; take one of best, {', '.join(LEVELS)}")
    reasons: dict[str, str] = {}
    for wanted in LEVELS[:2] if level == "best" else (level,):
        try:
            return replace(_try(wanted, packages), reasons=reasons)
        except SandboxError as error:
            reasons[wanted] = str(error)
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise InputError(
        f"model-written code is not run here, because its confinement cannot be enforced ({why}). "
        "`python -m prefopt.sandbox` checks a machine; the level unsafe runs programs with resource limits only"
    )


@functools.cache
def _try(level: str, packages: tuple[str, ...]) -> Machine:
    """The machine at this level, after a program that tries to escape has run in it. SandboxError with the reason."""
    if sys.platform != "linux":
        raise SandboxError(f"needs Linux, this is {sys.platform}")
    from prefopt.sandbox import confine  # needs Linux

    if level == "unsafe":
        log.warning("sandbox: level unsafe. Model-written code runs with your rights: it can read, write and connect")
    elif platform.machine() != "x86_64":
        raise SandboxError(f"the table of system calls is for x86_64, this machine is {platform.machine()}")
    elif confine.landlock_version() == 0:
        raise SandboxError(
            "the kernel has no Landlock (Linux 5.13 or newer, with `landlock` among its security modules)"
        )
    problems: list[str] = []
    for interpreter in _interpreters():
        host = _host(level, interpreter, packages)
        try:
            return Machine(level, host, _prove(host, level), {}, "; ".join(problems))
        except SandboxError as error:
            problems.append(str(error))
    raise SandboxError("; ".join(problems))


def _interpreters() -> list[str]:
    """The trainer's own, then the system's: one in root's home folder is out of reach of another user."""
    found = [base_interpreter(), "/usr/local/bin/python3", "/usr/bin/python3"]
    return list(dict.fromkeys(os.path.realpath(path) for path in found if os.path.exists(path)))


def _host(level: str, interpreter: str, packages: tuple[str, ...]) -> Host:
    folders, readable = _places(packages)
    return Host(
        interpreter,
        command=_bubblewrap(interpreter, readable) if level == "strict" else (),
        user=NOBODY if os.geteuid() == 0 and level != "unsafe" else None,
        confined=level != "unsafe",
        packages=packages,
        folders=folders,
        readable=readable,
    )


def _places(packages: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The folders in which packages lie, and what of them belongs to the packages."""
    folders, readable = [], []
    for name in packages:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:
            raise InputError(f"package {name!r} is not installed; programs cannot be allowed to import it")
        inside = bool(found.submodule_search_locations)
        place = Path(found.origin).resolve().parent if inside else Path(found.origin).resolve()
        folders.append(str(place.parent))
        readable += [str(path) for path in (place, place.parent / f"{name}.libs") if path.exists()]
    return tuple(dict.fromkeys(folders)), tuple(readable)


def _bubblewrap(interpreter: str, readable: tuple[str, ...]) -> tuple[str, ...]:
    """The command that puts a zygote into namespaces of its own, with the interpreter's files and nothing else.

    SandboxError if bubblewrap is not installed.
    """
    program = shutil.which("bwrap")
    if program is None:
        raise SandboxError("bubblewrap is not installed (`bwrap` is not on the path)")
    shown = [*SYSTEM_FOLDERS, *readable]
    prefix = str(Path(interpreter).parent.parent)
    shown += [] if prefix.startswith("/usr") else [prefix]
    command = [program, "--unshare-all", "--unshare-user", "--disable-userns", "--cap-drop", "ALL"]
    command += ["--die-with-parent", "--new-session", "--hostname", "sandbox", "--dev", "/dev"]
    for path in shown:
        if os.path.islink(path) and path in SYSTEM_FOLDERS:
            command += ["--symlink", os.readlink(path), path]
        elif os.path.exists(path):
            command += ["--ro-bind", path, path]
    return (*command, "--remount-ro", "/", "--chdir", "/", "--")


def _prove(host: Host, level: str) -> str:
    """Run the probe; the interpreter's version. SandboxError, naming what worked, if anything did."""
    zygote = Zygote(host, Limits(seconds=10.0))
    try:
        worked = _ask(zygote, PROBE.replace("STRICT", str(level == "strict")))
    finally:
        zygote.close()
    if worked and level != "unsafe":
        raise SandboxError(f"a program could {', '.join(worked)}")
    return str(zygote.version)


def _ask(zygote: Zygote, code: str) -> list[str]:
    """What a program's `attempt()` gives. SandboxError if it gives nothing."""
    run = zygote.run()
    try:
        run.begin({"role": "functions", "code": code}, time.monotonic() + 20.0)
        heard: list[Any] = [run.receive(), run.receive()]
        run.send(["attempt", [], []])
        heard.append(run.receive())
    except Irregular as problem:
        raise SandboxError(f"the probe's program failed: {problem}") from None
    finally:
        run.stop()
    if heard[-1][0] != "value":
        raise SandboxError(f"the probe's program failed: {heard[-1][1:]}")
    return list(codec.decode(codec.check(heard[-1][1])))
