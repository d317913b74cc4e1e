"""Printing that never ends a run: what nobody can read any more is dropped. Standard library only."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import IO, Any, cast


def note(text: str) -> None:
    """A line for the reader of stderr, if there is one."""
    stream = errors()
    stream.write(f"{text}\n")
    stream.flush()


def errors() -> IO[str]:
    """Stderr as it is now, made steady."""
    return cast(IO[str], Steady(sys.stderr))


def output() -> IO[str]:
    """Stdout as it is now, made steady."""
    return cast(IO[str], Steady(sys.stdout))


def is_terminal() -> bool:
    """Whether stderr is shown on a terminal, where bars can be drawn."""
    return errors().isatty()


class Steady:
    """A text stream that drops what cannot be written: its reader, its terminal or the room on its disk is gone.

    stream: None where it was closed from the start.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        if self.stream is not None:
            # RuntimeError: a signal came in the middle of a write, and its handler writes too
            with contextlib.suppress(OSError, ValueError, RuntimeError):
                try:
                    self.stream.write(text)
                except UnicodeEncodeError:
                    self.stream.write(text.encode("ascii", "backslashreplace").decode("ascii"))
        return len(text)

    def flush(self) -> None:
        if self.stream is not None:
            with contextlib.suppress(OSError, ValueError, RuntimeError):
                self.stream.flush()

    def isatty(self) -> bool:
        with contextlib.suppress(OSError, ValueError):
            return self.stream is not None and bool(self.stream.isatty())
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def fill() -> None:
    """Open standard descriptors that are closed on nothing, for this process and those that it starts.

    The next file that is opened would get their numbers, and whatever prints would print into it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            os.set_inheritable(number, True)
