"""Runs of several processes on one machine, forked from one that has imported everything. No launcher watches over
them: what one learns of another's end it learns by itself.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lives import Moments, arguments, shake, watch

HUNG = 90.0  # seconds after the first end at which the others are taken for hung, and killed


class Ended(NamedTuple):
    """codes: exit code of each process, below zero for a signal. seconds: from the first one's end to the last one's.
    said: what each printed. moments: what passed in each that came to its end by itself.
    """

    codes: list[int]
    seconds: float
    said: list[str]
    moments: list[dict[str, int]]


# ---------------------------------------------------------------- within a run's processes


class Fate(Moments):
    """At its moment the process is sent a signal, twice if `echo`, or, without one, an exception is raised there."""

    def __init__(self, name: str | None, number: int, sent: int | None, echo: bool) -> None:
        super().__init__(name, number)
        self.sent, self.echo = sent, echo

    def pass_by(self, name: str, on_death: Callable[[], None] = lambda: None) -> None:
        self.seen[name] += 1
        if name != self.name or self.seen[name] != self.number:
            return
        if self.sent is None:
            raise RuntimeError("fell over")
        if self.sent == signal.SIGKILL:
            on_death()
        for _ in range(1 + self.echo):
            os.kill(os.getpid(), self.sent)


def words_of(order: dict[str, Any]) -> list[str]:
    """The command line of an order."""
    folder = Path(order["folder"])
    given = {**arguments(order["kind"], folder), **order["options"], "out": order["out"]}
    given.pop("objective")
    values = {name: str(x) if isinstance(x, (str, Path)) else json.dumps(x) for name, x in given.items()}
    return ["train", order["kind"], *(f"{name}={value}" for name, value in values.items())]


def live(order: dict[str, Any], rank: int) -> int:
    """One process of a run, to its exit code."""
    from prefopt import cli

    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": order["port"], "LOCAL_WORLD_SIZE": order["processes"]}
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": order["processes"], **here}
    os.environ.update({name: str(value) for name, value in numbers.items()})
    os.environ["PREFOPT_CACHE"] = str(Path(order["folder"]) / "cache")
    chosen = order["ranks"] is None or rank in order["ranks"]
    fate = Fate(order["moment"] if chosen else None, order["number"], order["sent"], order["echo"])
    shake()
    watch(fate)
    code = cli.main(words_of(order))
    Path(order["said"][rank]).with_suffix(".moments").write_text(json.dumps(fate.seen))
    return code


def born(order: dict[str, Any], rank: int) -> int:
    """Fork one process of a run, and return its id."""
    child = os.fork()
    if child:
        return child
    said = os.open(order["said"][rank], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(said, number)
    try:
        code = live(order, rank)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)


def reaped(children: list[int], patience: float) -> tuple[list[int], float]:
    """Every process's exit code once all have ended, and the seconds between the first end and the last.

    Those that are still there `patience` seconds after the first end are killed.
    """
    codes: dict[int, int] = {}
    first = last = 0.0
    while len(codes) < len(children):
        for child in set(children) - codes.keys():
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child], last = os.waitstatus_to_exitcode(status), time.monotonic()
                first = first or last
        if first and time.monotonic() - first > patience:
            for child in set(children) - codes.keys():
                os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[child] for child in children], last - first


def serve() -> None:
    """Read orders, a line of JSON each, and answer with how the run's processes ended."""
    import accelerate  # noqa: F401  once for all runs
    import torch
    from transformers.models.llama import modeling_llama  # noqa: F401

    import prefopt.commands.train
    import prefopt.recipes.train  # noqa: F401
    from prefopt.rollout import source  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        children = [born(order, rank) for rank in range(order["processes"])]
        stopped = order["sent"] == signal.SIGSTOP  # and will not end by itself
        print(json.dumps(reaped(children, 1.0 if stopped else HUNG)), flush=True)


# ---------------------------------------------------------------- in the test's process


class Groups:
    """The other end of `serve`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(
        self,
        kind: str,
        out: Path,
        options: dict[str, Any],
        *,
        processes: int = 2,
        moment: str | None = None,
        number: int = 0,
        sent: int | None = None,
        echo: bool = False,
        ranks: list[int] | None = None,
    ) -> Ended:
        """A run to its end. moment, number: when the processes `ranks`, or all, are `sent` a signal; see `Fate`."""
        assert self.process.stdin and self.process.stdout
        said = [self.folder / f"{rank}.said" for rank in range(processes)]
        for path in said:
            path.with_suffix(".moments").unlink(missing_ok=True)
        order = {"kind": kind, "folder": str(self.folder), "out": str(out), "options": options, "port": free_port()}
        order |= {"processes": processes, "moment": moment, "number": number, "sent": sent, "echo": echo}
        order |= {"ranks": ranks, "said": [str(path) for path in said]}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        codes, seconds = json.loads(self.process.stdout.readline())
        passed = [path.with_suffix(".moments") for path in said]
        moments = [json.loads(path.read_text()) if path.exists() else {} for path in passed]
        return Ended(codes, seconds, [path.read_text(errors="replace") for path in said], moments)

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    serve()
