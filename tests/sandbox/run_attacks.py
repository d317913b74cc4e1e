"""Runs every hostile program at one level, as whoever starts it, and prints what came of each as JSON.

    python tests/sandbox/run_attacks.py standard

Standard library and the sandbox only: it must run as a user who cannot read the tests' environment.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from attacks import Attack, Place, attacks

from prefopt.sandbox import Call, Calls, Limits, Sandbox
from prefopt.sandbox.machine import NOBODY
from prefopt.sandbox.process import Irregular, Zygote

CALLS = (Call("add", (2, 3), 5), Call("add", (1, 1), 2))
LIMITS = Limits(seconds=1.1, cpu_seconds=1, memory_bytes=256 << 20)


class Target:
    """What programs aim at, and what would show that one got there."""

    def __init__(self, stack: ExitStack) -> None:
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hostile-")))
        self.folder.chmod(0o777)
        self.secret = self.folder / "secret"
        self.secret.write_text("TOPSECRET123")
        self.secret.chmod(0o644)
        user: dict[str, Any] = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
        self.victim = subprocess.Popen(["sleep", "600"], env={"KEY": "TOPSECRET123"}, **user)
        stack.callback(self.victim.wait)
        stack.callback(self.victim.kill)
        self.heard: list[str] = []
        abstract = f"hostile-{os.getpid()}"
        tcp = self._listen(stack, socket.AF_INET, ("127.0.0.1", 0))
        self._listen(stack, socket.AF_UNIX, str(self.folder / "socket"))
        self._listen(stack, socket.AF_UNIX, f"\0{abstract}")
        os.chmod(self.folder / "socket", 0o777)
        self.place = Place(str(self.folder), tcp.getsockname()[1], abstract, self.victim.pid)
        self.state = self._state()

    def _listen(self, stack: ExitStack, family: int, address: Any) -> socket.socket:
        server = socket.socket(family)
        server.bind(address)
        server.listen(50)
        stack.callback(server.close)

        def accept() -> None:
            while True:
                try:
                    server.accept()[0].close()
                except OSError:
                    return
                self.heard.append(str(address))

        threading.Thread(target=accept, daemon=True).start()
        return server

    def _state(self) -> dict[str, Any]:
        stat = self.secret.stat()
        left = sorted(path.name for path in self.folder.iterdir())
        return {"files": left, "mode": stat.st_mode, "time": stat.st_mtime}

    def damage(self) -> list[str]:
        """What is not as it was."""
        found = [f"connected: {address}" for address in self.heard]
        found += ["the victim was killed"] if self.victim.poll() is not None else []
        now = self._state()
        return found + [f"{name}: {now[name]}" for name in now if now[name] != self.state[name]]


def said(zygote: Zygote, code: str) -> str:
    """What a program's `R` is, or why it did not answer."""
    run = zygote.run()
    try:
        run.begin({"role": "functions", "code": code}, time.monotonic() + 20)
        messages = [run.receive(), run.receive()]
        run.send(["add", [0, 0], []])
        messages.append(run.receive())
        return str(messages[-1][1])
    except Irregular as problem:
        return f"Refused: {problem.outcome}"
    finally:
        run.stop(0.1)


def tree(root: int) -> set[int]:
    """The ids of a process's descendants, itself left out."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found: set[int] = set()
    while more := {child for child, parent in parents.items() if parent in found | {root}} - found:
        found |= more
    return found


def run(level: str) -> dict[str, Any]:
    """number -> what came of the attack, and what is wrong beside."""
    with ExitStack() as stack:
        target = Target(stack)
        before = tree(os.getpid())
        sandbox = stack.enter_context(Sandbox(level, LIMITS, workers=2))
        todo = attacks(target.place)
        sandbox.judge([Calls("import builtins; builtins.LEAK = 1", CALLS)] * 2)
        results = {
            attack.number: _result(attack, verdict) for attack, verdict in zip(todo, judged(sandbox, todo), strict=True)
        }
        zygote = Zygote(sandbox.machine.host, LIMITS)
        for attack in todo:
            if attack.tries:
                results[attack.number]["said"] = said(zygote, attack.code)
        zygote.close()
        hashes = [_hash(sandbox) for _ in range(2)]
        sandbox.close()
        left = sorted(tree(os.getpid()) - before)
        return {"results": results, "damage": target.damage(), "left": left, "hashes": hashes}


def judged(sandbox: Sandbox, todo: list[Attack]) -> list[Any]:
    """A verdict on each attack. One that should not take long is asked again, twice at most, where it ran out of time:
    the limit is short, and a busy machine can stop a harmless program for as long.
    """
    verdicts: list[Any] = list(sandbox.judge([Calls(attack.code, CALLS) for attack in todo]))
    for _ in range(2):
        late = [
            number
            for number, (attack, verdict) in enumerate(zip(todo, verdicts, strict=True))
            if verdict.outcome == "timeout" and attack.outcomes and "timeout" not in attack.outcomes
        ]
        again = sandbox.judge([Calls(todo[number].code, CALLS) for number in late]) if late else []
        for number, verdict in zip(late, again, strict=True):
            verdicts[number] = verdict
    return verdicts


def _result(attack: Attack, verdict: Any) -> dict[str, Any]:
    fields = ("outcome", "passed", "total", "why", "signs", "cpu_seconds")
    return {"name": attack.name, **{name: getattr(verdict, name) for name in fields}}


def _hash(sandbox: Sandbox) -> str:
    """What depends on the hashes of texts, in a process whose interpreter was started anew."""
    zygote = Zygote(sandbox.machine.host, LIMITS)
    try:
        code = "def add(a, b): return repr((hash('prefopt'), list({'a', 'b', 'c', 'd', 'e', 'f'}), hash(b'x')))"
        return said(zygote, code)
    finally:
        zygote.close()


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1])))
