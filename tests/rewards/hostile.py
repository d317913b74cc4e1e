"""Reward functions that misbehave on a completion that says so, and are right on all others: 1.0."""

from __future__ import annotations

import asyncio
import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from prefopt.records import Sample


def samples(*completions: str, **columns: Sequence[Any]) -> list[Sample]:
    rows = [{name: values[n] for name, values in columns.items()} for n in range(len(completions))]
    return [
        Sample("p", text, columns=row, group=n // 2)
        for n, (text, row) in enumerate(zip(completions, rows, strict=True))
    ]


def one_by_one(value_of: Callable[[], Any]) -> Callable[..., list[Any]]:
    """A function that returns `value_of()` for the completion "bad"."""

    def function(completions: list[str], **others: Any) -> list[Any]:
        return [value_of() if completion == "bad" else 1.0 for completion in completions]

    return function


def raises() -> None:
    raise RuntimeError("on purpose")


def leaves() -> None:
    sys.exit(0)


def recurses() -> None:
    recurses()


def dies() -> None:
    os._exit(0)


def crashes() -> None:
    ctypes.string_at(0)


def kills_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def eats_memory() -> None:
    held = []
    while True:
        held.append(bytearray(1 << 26))


def sleeps() -> None:
    time.sleep(3600)


def spins() -> None:
    while True:
        pass


def matches_for_ever() -> None:
    """In C, and it does not let go of the interpreter."""
    re.match(r"(a+)+$", "a" * 60 + "b")


def ignores_signals() -> None:
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    spins()


def stops_itself() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def starts_a_process_that_stays() -> None:
    subprocess.Popen(["sleep", "3600"])
    sleeps()


def writes_everywhere() -> float:
    """To every open descriptor but the ones Python itself needs, as a stray print or a hostile answer might."""
    for descriptor in (1, 2):
        os.write(descriptor, b"")
    print("printed", end="")
    os.system("echo from a shell >/dev/null")
    return 1.0


def answers_for_another() -> None:
    """Writes into the protocol what no reply is."""
    for descriptor in range(3, 64):
        try:
            os.write(descriptor, b"\xff" * 64)
        except OSError:
            pass


def forks_and_returns() -> float:
    if os.fork() == 0:
        return 2.0
    return 1.0


def endless() -> Iterator[float]:
    while True:
        yield 1.0


async def awaits(completions: list[str], **others: Any) -> list[float]:
    await asyncio.sleep(0)
    return [float(len(text)) for text in completions]


async def awaits_for_ever(completions: list[str]) -> list[float]:
    await asyncio.sleep(3600)
    return []
