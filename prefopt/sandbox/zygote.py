"""The process that programs are forked from: started anew, never a copy of the trainer, and small.

It reads no program. A request hands it the descriptors of one, it forks, and the child confines itself before it reads
what to run. It ends, and with it whatever it started, when the other end of its control socket is closed.
Standard library only, and Python 3.9: the sandbox runs a copy of this file, with the path set to the interpreter's own.
"""

from __future__ import annotations

import builtins
import fcntl
import gc
import json
import os
import random
import select
import signal
import socket
import sys
from typing import Any

from prefopt.sandbox import confine, inside

# what programs often import: loaded once here instead of by each of them
COMMON = (
    "abc bisect cmath collections copy dataclasses datetime decimal enum fractions functools hashlib heapq io itertools"
    " json math numbers operator queue random re statistics string sys textwrap threading time typing"
).split()
NULL = 1  # this process's standard output is the null device
RULES = 4  # where a child finds the Landlock rules

# folders of shared libraries, of which only the libraries are readable
LIBRARIES = ("/lib64", "/usr/lib64", "/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu")
HIDDEN = {"site-packages", "dist-packages", "test", "idlelib", "ensurepip"}  # in the standard library's folder


class Zygote:
    """children: pidfd -> (id of the run, process id)."""

    def __init__(self, control: socket.socket, settings: dict[str, Any]) -> None:
        self.control, self.settings, self.own = control, settings, os.getpid()
        self.children: dict[int, tuple[int, int]] = {}
        self.filter = confine.seccomp_program()
        self.rules = confine.landlock_rules(*readable(settings)) if settings["confined"] else -1

    def serve(self) -> None:
        """Answer requests until the control socket ends."""
        self.say(ready=os.getpid(), version=sys.version.split()[0])
        while True:
            waiting = select.poll()
            for descriptor in (self.control.fileno(), *self.children):
                waiting.register(descriptor, select.POLLIN)
            for descriptor, _ in waiting.poll():
                if descriptor in self.children:
                    self.bury(descriptor)
                elif not self.obey():
                    return

    def say(self, **message: Any) -> None:
        try:
            self.control.send(json.dumps(message).encode())
        except OSError:
            os._exit(0)

    def obey(self) -> bool:
        """Read one request; False at the end."""
        try:
            text, descriptors, _, _ = socket.recv_fds(self.control, 4096, 3)
        except OSError:
            return False
        if not text:
            return False
        request = json.loads(text)
        if "run" in request:
            self.fork(request["run"], descriptors)
        for pidfd, (number, _) in self.children.items():
            if number == request.get("stop"):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        return True

    def fork(self, number: int, descriptors: list[int]) -> None:
        try:
            child = os.fork()
        except OSError as error:
            self.say(ended=number, refused=f"fork: {error}")
            child = -1
        if child == 0:
            try:
                self.become(descriptors)
            finally:
                os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)
        if child > 0:
            self.children[os.pidfd_open(child)] = (number, child)

    def bury(self, pidfd: int) -> None:
        """Reap a child that has ended and say how."""
        number, child = self.children.pop(pidfd)
        _, status, used = os.wait4(child, 0)
        os.close(pidfd)
        self.say(ended=number, status=status, cpu=used.ru_utime + used.ru_stime, memory=used.ru_maxrss * 1024)

    def become(self, descriptors: list[int]) -> None:
        """In the child: keep the program's descriptors only, confine the process, run what is asked."""
        confine.process_control(confine.DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != self.own:
            os._exit(0)
        os.setsid()
        channel, given, taken = [*descriptors, NULL, NULL][:3]
        self.keep({inside.CHANNEL: channel, 0: given, 1: taken, 2: NULL, RULES: self.rules})
        try:
            self.confine()
        except OSError as error:
            inside.send(["refused", f"{type(error).__name__}: {error}"])
            os._exit(0)
        inside.send(["ready"])
        inside.run(inside.receive())

    def keep(self, places: dict[int, int]) -> None:
        """Move descriptors to their places and close all others: none of the zygote's reaches a program."""
        moved = {place: fcntl.fcntl(source, fcntl.F_DUPFD, 64) for place, source in places.items() if source >= 0}
        for place, source in moved.items():
            os.dup2(source, place)
        confine.close_from(max(moved) + 1)

    def confine(self) -> None:
        confine.limit_resources(**self.settings["limits"])
        if self.rules >= 0:
            confine.landlock(RULES)
            os.close(RULES)
            confine.seccomp(self.filter)


def readable(settings: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Paths that programs may read, and folders whose names they may list: the standard library without what is
    installed in it, shared libraries, and the packages that are allowed."""
    folders = [folder for folder in sys.path if os.path.isdir(folder) and folder not in settings["folders"]]
    paths = [entry.path for folder in folders for entry in os.scandir(folder) if entry.name not in HIDDEN]
    for folder in (*LIBRARIES, os.path.join(sys.base_prefix, "lib")):
        if os.path.isdir(folder):
            paths += [entry.path for entry in os.scandir(folder) if ".so" in entry.name]
    paths += [path for path in sys.path if path.endswith(".zip")]
    return [*paths, "/etc/ld.so.cache", "/dev/urandom", *settings["readable"]], [*folders, *settings["folders"]]


def serve(control: socket.socket, settings: dict[str, Any]) -> None:
    """Be a zygote.

    settings: confined; limits (see confine.limit_resources); packages to import, the folders they lie in and what of
    these is readable.
    """
    # the thread that started this one lives as long as its process: its end is noticed where the socket has copies too
    confine.process_control(confine.DEATH_SIGNAL, signal.SIGKILL)
    confine.process_control(confine.NO_NEW_PRIVILEGES, 1)
    confine.process_control(confine.DUMPABLE, 0)
    os.chdir("/")
    os.umask(0o077)
    sys.path[:] = [*filter(None, sys.path), *settings["folders"]]
    for name in (*COMMON, *settings["packages"]):
        __import__(name)
    random.seed(0)
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]  # site, which is left out, would define them
    for name in [name for name in sys.modules if name.partition(".")[0] == "prefopt"]:
        del sys.modules[name]
    gc.collect()
    gc.freeze()
    Zygote(control, settings).serve()
