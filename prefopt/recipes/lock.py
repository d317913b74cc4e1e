"""One run in a folder at a time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from pathlib import Path

from prefopt.records import InputError

NAME = ".lock"
_held: set[int] = set()


def _let_go() -> None:
    """In a fork, which would otherwise hold the folder for as long as it lives, whatever becomes of the run."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)


class Lock:
    """Holds a folder until it is closed or the process ends, however it ends. InputError while another run holds it.

    On file systems without locks it holds nothing.
    """

    def __init__(self, folder: Path) -> None:
        self.descriptor = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = _holder(self.descriptor)
            os.close(self.descriptor)
            raise InputError(
                f"{folder}: another run is writing there ({who}); wait for it, or choose another out"
            ) from None
        except OSError:
            pass
        _held.add(self.descriptor)
        mine = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
        with contextlib.suppress(OSError):  # a full disk: the lock holds, only its holder is not named
            os.ftruncate(self.descriptor, 0)
            os.pwrite(self.descriptor, mine.encode(), 0)

    def close(self) -> None:
        if self.descriptor in _held:
            _held.remove(self.descriptor)
            os.close(self.descriptor)


def _holder(descriptor: int) -> str:
    try:
        who = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {who['pid']} on {who['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "it has not said which"
