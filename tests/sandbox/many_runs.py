"""Thousands of mixed programs, and what they leave behind: nothing.

    python tests/sandbox/many_runs.py [--runs 10000] [--level best]

Prints the numbers and ends with 1 if a process, a descriptor or a file is left or an outcome is not as it must be.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import sys
import time
from collections import Counter

from run_attacks import tree

from prefopt.sandbox import Call, Calls, Limits, Outcome, Program, Sandbox, Script

CALLS = (Call("add", (2, 3), 5), Call("add", (1, 1), 2))
MIXED: list[tuple[Program, Outcome]] = [
    (Calls("def add(a, b): return a + b", CALLS), Outcome.PASSED),
    (Calls("import os; os._exit(0)", CALLS), Outcome.FAILED),
    (Calls("def add(", CALLS), Outcome.FAILED),
    (Calls("x = bytearray(1 << 40)", CALLS), Outcome.MEMORY),
    (Calls("import os\ndef add(a, b): return os.fork()", CALLS), Outcome.FAILED),
    (Calls("import ctypes\ndef add(a, b): ctypes.string_at(0)", CALLS), Outcome.KILLED),
    (Calls("import os\nos.write(3, b'x' * 99)", CALLS), Outcome.PROTOCOL),
    (Calls("import threading, time\nthreading.Thread(target=time.sleep, args=(9,)).start()", CALLS), Outcome.FAILED),
    (Calls("open('/tmp/prefopt-left', 'w')", CALLS), Outcome.FAILED),
    (Script("print(int(input()) * 2)", ("4",), ("8",)), Outcome.PASSED),
]


def state() -> dict[str, object]:
    """What could be left behind."""
    gc.collect()
    return {
        "processes": sorted(tree(os.getpid())),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "files in /tmp": sorted(name for name in os.listdir("/tmp") if "prefopt" in name),
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--level", default="best")
    options = parser.parse_args()
    empty = state()
    with Sandbox(options.level, Limits(seconds=5.0, cpu_seconds=2)) as sandbox:
        print("\n".join(sandbox.machine.describe()))
        todo = [MIXED[number % len(MIXED)] for number in range(options.runs)]
        start = time.monotonic()
        verdicts = sandbox.judge([program for program, _ in todo], seconds=600.0)
        seconds = time.monotonic() - start
    pairs = zip(todo, verdicts, strict=True)
    wrong = Counter(
        (right, verdict.outcome, verdict.why) for (_, right), verdict in pairs if verdict.outcome is not right
    )
    left = {name: value for name, value in state().items() if value != empty[name]}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    each = 1e3 * seconds / options.runs
    print(f"{options.runs} runs in {seconds:.1f} s on {sandbox.workers} zygotes, {each:.2f} ms each")
    print(f"left behind: {left or 'nothing'}; wrong outcomes: {dict(wrong) or 'none'}; peak memory {memory:.0f} MiB")
    return int(bool(left or wrong))


if __name__ == "__main__":
    sys.exit(main())
