"""Training runs as processes that can be killed at any moment, and forked so quickly that many can be.

A server imports everything once and forks a process for each run. A run counts its moments, each with a name: before
and after every write of a checkpoint, within one, at every update, sampling and reward. Told a name and a number, it
kills itself with SIGKILL at that moment.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

KINDS = ("sft", "dpo", "kto", "grpo", "ppo")
OFFLINE = {
    "batch_size": 4,
    "max_steps": 12,
    "eval_fraction": 0.25,
    "eval_every": 4,
    "learning_rate": 1e-2,
    "dtype": "float32",
}
ONLINE = {
    **OFFLINE,
    "num_completions": 4,
    "max_tokens": 4,
    "rollout_batches": 2,
    "rollout_passes": 2,  # four updates of each rollout
    "save_completions": None,
    "reward_deadline": 60.0,
}
REWARD = '''\
def says_answer(completions, answer, **columns):
    """The share of words that are the row's answer."""
    return [said.split().count(word) / 4 for said, word in zip(completions, answer, strict=True)]
'''


def prepare(folder: Path) -> None:
    """The model and the rows that every run here reads."""
    from laws import save_model, write_rows

    save_model(folder / "model")
    for data in ("demonstrations", "pairs", "labels", "prompts"):
        write_rows(folder / f"{data}.jsonl", data)
    (folder / "reward.py").write_text(REWARD)


def arguments(kind: str, folder: Path) -> dict[str, Any]:
    """What `prefopt.train` is given for a run of this kind, but for `out`."""
    from prefopt.objectives import EVERY

    objective: Any = EVERY[kind]()
    given = {"objective": objective, "model": folder / "model", "data": folder / f"{objective.facts.data}.jsonl"}
    if objective.facts.data == "prompts":
        return {**given, **ONLINE, "reward": f"{folder / 'reward.py'}:says_answer"}
    return {**given, **OFFLINE}


def result(out: Path) -> dict[str, Any]:
    """Everything of a finished run that has to be the same whether it was killed or not."""
    timed = ("tokens_per_second", "seconds/")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows = out / "completions.jsonl"
    return {
        "weights": (out / "model" / "model.safetensors").read_bytes(),
        "metrics": [{name: x for name, x in line.items() if not name.startswith(timed)} for line in lines],
        "completions": rows.read_bytes() if rows.exists() else b"",
    }


# ---------------------------------------------------------------- within a run's process


class Moments:
    """Counts what passes, and kills the process at the moment it was told.

    signals: name and number of other moments, and what is then sent to the process and those of its group, as a
    terminal does.
    """

    def __init__(self, name: str | None, number: int, signals: Sequence[tuple[str, int, int]] = ()) -> None:
        self.name, self.number = name, number
        self.signals = {(moment, at): which for moment, at, which in signals}
        self.seen: Counter[str] = Counter()

    def pass_by(self, name: str, on_death: Callable[[], None] = lambda: None) -> None:
        self.seen[name] += 1
        if which := self.signals.get((name, self.seen[name])):
            os.killpg(os.getpgrp(), which)
        if name == self.name and self.seen[name] == self.number:
            on_death()
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, owner: Any, attribute: str, name: str) -> None:
        """Before and after every call."""
        whole = getattr(owner, attribute)

        def call(*given: Any, **named: Any) -> Any:
            self.pass_by(f"before {name}")
            done = whole(*given, **named)
            self.pass_by(f"after {name}")
            return done

        setattr(owner, attribute, call)

    def within(self, owner: Any, attribute: str, name: str, seconds: float) -> None:
        """So long after a call began, whatever it is doing."""
        whole = getattr(owner, attribute)

        def call(*given: Any, **named: Any) -> Any:
            self.seen[f"within {name}"] += 1
            if self.name == f"within {name}" and self.seen[self.name] == self.number:
                threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
            return whole(*given, **named)

        setattr(owner, attribute, call)


def watch(moments: Moments) -> None:
    """Put a moment at everything that a kill could tear apart."""
    from prefopt import loop
    from prefopt.checkpoint import tree
    from prefopt.models import sampler
    from prefopt.rewards import Mixture
    from prefopt.rollout.attempts import Attempts

    moments.around(loop, "update", "update")
    for call in ("fsync", "rename", "replace", "unlink"):
        moments.around(os, call, call)
    moments.around(Attempts, "_sampled", "sampling")
    moments.around(Mixture, "__call__", "reward")
    moments.within(Mixture, "__call__", "reward", 0.002)
    moments.within(sampler.Local, "sample", "sampling", 0.01)
    moments.within(loop, "update", "update", 0.004)
    save_file = tree.save_file

    def torn(tensors: Any, path: Path) -> str:
        known = save_file(tensors, path)
        moments.pass_by("within a write", lambda: os.truncate(path, path.stat().st_size // 2))
        return known

    tree.save_file = torn


def shake() -> None:
    """Every update's learning rate is drawn anew, by every generator of every process: what a run draws, and of what
    state a generator is after a resume, shows in its weights. By itself a run here draws from none of them.
    """
    from dataclasses import replace

    import numpy
    import torch

    from prefopt import loop, ranks

    plain, number = loop.update, int(os.environ.get("RANK", "0"))
    random.seed(number)  # a resume comes later; torch's is the run's
    numpy.random.seed(number)

    def update(*given: Any) -> Any:
        *others, settings = given
        drawn = random.random() + numpy.random.random() + torch.rand((), dtype=torch.float64) * (1 + number)
        rate = settings.learning_rate * (0.9 + 0.01 * float(ranks.all_sum(drawn)))
        return plain(*others, replace(settings, learning_rate=rate))

    loop.update = update


def live(order: dict[str, Any]) -> None:
    """One run, from its start or from where it was, to its end or its death."""
    import prefopt

    folder = Path(order["folder"])
    os.environ["PREFOPT_CACHE"] = str(folder / "cache")
    os.setpgrp()
    if order.get("shaken"):
        shake()
    moments = Moments(order.get("kill"), order.get("number", 0), order.get("signals", ()))
    watch(moments)
    with staged(order, moments) if "scene" in order else contextlib.nullcontext():
        prefopt.train(**{**arguments(order["kind"], folder), "out": order["out"], **order["options"]})
    Path(order["out"]).with_suffix(".moments").write_text(json.dumps(moments.seen))


def staged(order: dict[str, Any], moments: Moments) -> AbstractContextManager[None]:
    """What goes wrong around a run besides kills: the function of `scenes` that is named in its order."""
    import scenes

    stage: AbstractContextManager[None] = getattr(scenes, order["scene"])(order, moments)
    return stage


def serve() -> None:
    """Read orders, a line of JSON each, and answer with how each run's process ended."""
    import torch
    from transformers.models.llama import modeling_llama  # noqa: F401

    import prefopt.recipes.train  # noqa: F401  once for all runs
    from prefopt.rollout import source  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if not child:
            errors = os.open(order["errors"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(errors, 1)
            os.dup2(errors, 2)
            try:
                live(order)
            except SystemExit as error:
                print(error, file=sys.stderr, flush=True)
                os._exit(error.code)
            except KeyboardInterrupt:
                os._exit(130)
            except BaseException:
                import traceback

                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            os._exit(0)
        if order.get("after") is not None:
            time.sleep(order["after"])
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)


class Server:
    """The other end of `serve`, for tests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, kind: str, out: Path, options: dict[str, Any], **kill: Any) -> int:
        """A run's exit code, minus the signal that ended it. kill: `kill` and `number` of a moment, or `after` in
        seconds; `signals` as `Moments` has them; `scene`: see `staged`; `shaken`: see `shake`.
        """
        assert self.process.stdin and self.process.stdout
        order = {"kind": kind, "folder": str(self.folder), "out": str(out), "options": options, **kill}
        order["errors"] = str(self.folder / "errors.txt")
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    @property
    def said(self) -> str:
        """What the latest run printed."""
        return (self.folder / "errors.txt").read_text(errors="replace")

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


if __name__ == "__main__":
    serve()
