"""What goes wrong around a training run, each as `with NAME(order, moments):` in the run's own process.

File systems are mounted where no other process sees them; what a test wants to look at is copied to `order["keep"]`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000  # of unshare(2)
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18  # of mount(2)
LIBC = ctypes.CDLL(None, use_errno=True)
PAGE = 4096  # bytes; a tmpfs gives room by pages


def check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def alone() -> None:
    """Mounts are this process's own from here on. OSError where that is not allowed."""
    user, group = os.geteuid(), os.getegid()
    try:
        check(LIBC.unshare(CLONE_NEWNS))
    except PermissionError:
        check(LIBC.unshare(CLONE_NEWNS | CLONE_NEWUSER))
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    check(LIBC.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))


def mount_disk(folder: Path, size: int) -> None:
    """A file system of `size` bytes at `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    alone()
    check(LIBC.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()))


@cache
def can_mount() -> bool:
    """Whether a process here may have mounts of its own."""
    return subprocess.run([sys.executable, __file__], capture_output=True).returncode == 0


@contextlib.contextmanager
def small_disk(order: dict[str, Any], moments: Any) -> Iterator[None]:
    """The run's folder has room for so many bytes and no more."""
    out = Path(order["out"])
    mount_disk(out, order["bytes"])
    try:
        yield
    finally:
        shutil.copytree(out, order["keep"])


@contextlib.contextmanager
def full_for_a_while(order: dict[str, Any], moments: Any) -> Iterator[None]:
    """The run's folder is full from one update to another."""
    first, last = order["updates"]
    ballast = Path(order["out"]) / "ballast"

    def change(update: int) -> None:
        if update == first:
            fill(ballast)
        if update == last:
            ballast.unlink()

    with small_disk(order, moments), before_updates(change):
        yield


@contextlib.contextmanager
def no_room(order: dict[str, Any], moments: Any) -> Iterator[None]:
    """The run's folder has the settings of a run that was begun there, and is full."""
    out = Path(order["out"])
    mount_disk(out, 4 * PAGE)
    (out / "config.yaml").write_text("objective: dpo\n")
    fill(out / "ballast")
    try:
        yield
    finally:
        shutil.copytree(out, order["keep"])


def fill(path: Path) -> None:
    """Write to a file until there is no room for one more byte."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(PAGE))


@contextlib.contextmanager
def small_files(order: dict[str, Any], moments: Any) -> Iterator[None]:
    """No file may be larger than so many bytes before a certain update."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (order["bytes"], hard))

    def change(update: int) -> None:
        if update == order["until"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    with before_updates(change):
        yield


@contextlib.contextmanager
def read_only(order: dict[str, Any], moments: Any) -> Iterator[None]:
    """The folder that the run's is in cannot be written, by root neither."""
    folder = os.fsencode(Path(order["out"]).parent)
    alone()
    check(LIBC.mount(folder, folder, None, MS_BIND, None))
    check(LIBC.mount(folder, folder, None, MS_BIND | MS_REMOUNT | MS_RDONLY, None))
    yield


@contextlib.contextmanager
def rival(order: dict[str, Any], moments: Any) -> Iterator[None]:
    """In the midst of the run the same command is given a second time; what becomes of it is written to `keep`."""
    from lives import arguments

    import prefopt

    def start(update: int) -> None:
        if update != 3:
            return
        child = os.fork()
        if not child:
            try:
                prefopt.train(**arguments(order["kind"], Path(order["folder"])), out=order["out"], **order["options"])
                ended = "it ran"
            except BaseException as error:
                ended = f"{type(error).__name__}: {error}"
            Path(order["keep"]).write_text(json.dumps([os.getppid(), ended]))
            os._exit(0)
        os.waitpid(child, 0)

    with before_updates(start):
        yield


@contextlib.contextmanager
def before_updates(work: Callable[[int], None]) -> Iterator[None]:
    """Do this before every update of this process, told which it is, from 1 on."""
    from prefopt import loop

    plain, number = loop.update, count(1)

    def update(*given: Any, **named: Any) -> Any:
        work(next(number))
        return plain(*given, **named)

    loop.update = update
    try:
        yield
    finally:
        loop.update = plain


if __name__ == "__main__":
    alone()
