"""The command line in processes whose streams, memory and clock can be taken away, forked from one that has imported
everything.
"""

from __future__ import annotations

import json
import os
import pty
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

MIB = 2**20
SECONDS = 120  # a run takes about one; a hang must not hold up the suite


class Ended(NamedTuple):
    """code: the exit code, below zero for a signal. said: what the run printed, if anyone heard it."""

    code: int
    said: str


# ---------------------------------------------------------------- in the process that is forked


def streams_to(where: str, path: Path) -> None:
    """Stdout and stderr to a file, to a terminal, to a reader that takes one line, or to one that has gone."""
    if where == "file":
        writing = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    elif where == "terminal":
        reading, writing = pty.openpty()
        threading.Thread(target=drain, args=(reading, path), daemon=True).start()
    elif where == "lost terminal":
        reading, writing = pty.openpty()
        os.close(reading)
    else:
        reading, writing = os.pipe()
        if where == "head":
            subprocess.Popen(["head", "-1"], stdin=reading, stdout=path.open("wb"), stderr=subprocess.DEVNULL)
        os.close(reading)
    for number in (1, 2):
        os.dup2(writing, number)
    os.close(writing)
    # as an interpreter that starts makes them
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)


def drain(reading: int, path: Path) -> None:
    """Keep what a terminal shows."""
    with path.open("wb", buffering=0) as file:
        while True:
            file.write(os.read(reading, 1 << 16))


def jumping() -> Callable[[], float]:
    """A clock that is an hour ahead, a day behind, and back before the epoch in turn."""
    plain, calls = time.time, [0]

    def jumps() -> float:
        calls[0] += 1
        return (plain() + 3600, plain() - 86400, -1.0)[calls[0] % 3]

    return jumps


def starve(update: int, room: float) -> None:
    """From update number `update` on, no more than `room` MiB can be had, whatever this process holds by then."""
    import torch

    from prefopt import loop

    whole, seen, leak = loop.update, [0], []

    def call(*given: Any) -> Any:
        seen[0] += 1
        if seen[0] == update:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + int((room + 64) * MIB)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            spared = torch.empty(int(room * MIB), dtype=torch.uint8)
            size = 16 * MIB
            while size >= 4096:
                try:
                    leak.append(torch.empty(size, dtype=torch.uint8))
                except RuntimeError:
                    size //= 2
            del spared
        return whole(*given)

    loop.update = call


def run(order: dict[str, Any]) -> int:
    """The command of an order."""
    from prefopt import cli

    signal.alarm(SECONDS)
    streams_to(order["streams"], Path(order["said"]))
    if order["clock"]:
        time.time = jumping()
    if order["starve"]:
        starve(*order["starve"])
    return cli.main(order["words"])


def serve() -> None:
    """Read orders, a line of JSON each, and answer with how each one's process ended."""
    import torch
    from transformers.models.llama import modeling_llama  # noqa: F401

    import prefopt.commands.train  # noqa: F401  once for all runs
    from prefopt.rollout import source  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if not child:
            try:
                code = run(order)
            except BaseException:
                import traceback

                Path(order["said"]).with_suffix(".traceback").write_text(traceback.format_exc())
                code = 99
            os._exit(code)
        _, status = os.waitpid(child, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)


# ---------------------------------------------------------------- in the test's process


class Forks:
    """The other end of `serve`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 0
        cache = {"PREFOPT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        environment = {**os.environ, **cache, "PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(
        self, words: list[Any], streams: str = "file", clock: bool = False, starve: tuple[int, float] | None = None
    ) -> Ended:
        """`prefopt WORDS`. streams: where it prints to, see `streams_to`. clock: it jumps. starve: see there."""
        assert self.process.stdin and self.process.stdout
        self.number += 1
        said = self.folder / f"{self.number}.said"
        order = {"words": [str(word) for word in words], "streams": streams, "clock": clock, "starve": starve}
        self.process.stdin.write(json.dumps({**order, "said": str(said)}) + "\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        traceback = said.with_suffix(".traceback")
        assert not traceback.exists(), traceback.read_text()
        return Ended(code, said.read_text(errors="replace") if said.exists() else "")

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


if __name__ == "__main__":
    serve()
