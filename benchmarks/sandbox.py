"""What it costs to run one small program in the sandbox, at each level this machine can enforce.

    python benchmarks/sandbox.py

A run is a process, confined, a program that defines a function, and two calls; the process is forked while the run
before it goes on. Beside it, what a new interpreter costs that does nothing. Written to
benchmarks/results/sandbox.json. On a machine that others use too, `chrt -r 5` before the command measures without them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefopt.records import InputError
from prefopt.sandbox import Call, Calls, Sandbox

RESULTS = Path(__file__).parent / "results" / "sandbox.json"
PROGRAM = Calls("def add(a, b):\n    return a + b\n", (Call("add", (2, 3), 5), Call("add", (1, 1), 2)))


def milliseconds(run: Callable[[], Any], times: int) -> dict[str, float]:
    """Median and 95th percentile of single runs, after one that is not timed."""
    run()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        taken.append(1e3 * (time.perf_counter() - start))
    return {"median_ms": round(statistics.median(taken), 2), "p95_ms": round(sorted(taken)[int(0.95 * times)], 2)}


def measure(level: str, times: int) -> dict[str, Any]:
    """One level: single runs, and runs a second on all zygotes; where it cannot be enforced, why."""
    try:
        sandbox = Sandbox(level)
    except InputError as error:
        return {"median_ms": None, "why": str(error)}
    with sandbox:
        alone = milliseconds(lambda: sandbox.judge([PROGRAM]), times)
        start = time.perf_counter()
        sandbox.judge([PROGRAM] * times)
        rate = times / (time.perf_counter() - start)
        return {**alone, "runs_per_second": round(rate), "zygotes": sandbox.workers}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=500)
    times = parser.parse_args().times
    python = os.path.realpath(sys.executable)
    found: dict[str, Any] = {level: measure(level, times) for level in ("standard", "strict", "unsafe")}
    found["a new interpreter"] = milliseconds(lambda: subprocess.run([python, "-I", "-S", "-c", ""], check=True), 50)
    priority = "normal" if os.sched_getscheduler(0) == os.SCHED_OTHER else "real time"
    where = {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1), "priority": priority}
    where |= {"linux": platform.release(), "times": times}
    RESULTS.write_text(json.dumps({**found, "machine": where}, indent=2) + "\n", encoding="utf-8")
    for name, numbers in found.items():
        print(f"{name}: {numbers}")


if __name__ == "__main__":
    main()
