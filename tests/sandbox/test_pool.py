"""Many programs, and everything that can go wrong with what runs them."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_attacks import tree

from prefopt.records import InputError
from prefopt.sandbox import Call, Calls, Limits, Outcome, Program, Sandbox, Script, Verdict, machine, pool, process
from prefopt.sandbox.pool import RUNS_PER_ZYGOTE
from prefopt.sandbox.programs import judge

ROOT = Path(__file__).parents[2]
CALLS = (Call("add", (2, 3), 5), Call("add", (1, 1), 2))
RIGHT = Calls("def add(a, b): return a + b", CALLS)
WRONG = Calls("def add(a, b): return a - b", CALLS)
MIXED = [
    RIGHT,
    Calls("import os; os._exit(0)", CALLS),
    Calls("def add(", CALLS),
    Calls("x = bytearray(1 << 40)", CALLS),
    Script("print(int(input()) * 2)", ("4",), ("8",)),
]
MIXED_OUTCOMES = [Outcome.PASSED, Outcome.FAILED, Outcome.FAILED, Outcome.MEMORY, Outcome.PASSED]


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    try:
        made = Sandbox(limits=Limits(seconds=1.5, cpu_seconds=1), workers=2)
    except InputError as error:
        pytest.skip(str(error))
    with made:
        yield made


def outcomes(sandbox: Sandbox, *programs: Calls, seconds: float = 60.0) -> list[Outcome]:
    return [verdict.outcome for verdict in sandbox.judge(programs, seconds)]


def test_256_programs_at_once_get_their_own_verdicts(sandbox: Sandbox) -> None:
    verdicts = sandbox.judge([RIGHT, WRONG] * 128)
    assert [verdict.outcome for verdict in verdicts] == [Outcome.PASSED, Outcome.FAILED] * 128


@pytest.mark.fault(27)
def test_runs_leave_no_process_descriptor_or_file(sandbox: Sandbox) -> None:
    sandbox.judge(MIXED * 2)  # both zygotes are there
    before = len(tree(os.getpid())), len(os.listdir("/proc/self/fd")), sorted(os.listdir("/tmp"))
    verdicts = sandbox.judge(MIXED * 60)
    assert [verdict.outcome for verdict in verdicts] == MIXED_OUTCOMES * 60
    gc.collect()
    assert len(tree(os.getpid())) == before[0]
    assert len(os.listdir("/proc/self/fd")) == before[1]
    assert [name for name in os.listdir("/tmp") if name not in before[2] and "prefopt" in name] == []


def test_a_worn_zygote_is_replaced(sandbox: Sandbox) -> None:
    outcomes(sandbox, RIGHT, RIGHT)
    old = set(sandbox.zygotes)
    for zygote in old:
        zygote.runs = RUNS_PER_ZYGOTE
    assert outcomes(sandbox, *[RIGHT] * 8) == [Outcome.PASSED] * 8
    assert len(sandbox.zygotes) <= 2 and not old <= sandbox.zygotes


@pytest.mark.fault(27)
def test_a_killed_zygote_is_replaced_and_its_program_run_again(sandbox: Sandbox) -> None:
    outcomes(sandbox, RIGHT, RIGHT)
    for zygote in sandbox.zygotes:
        os.kill(zygote.process.pid, signal.SIGKILL)
    assert outcomes(sandbox, *[RIGHT] * 4) == [Outcome.PASSED] * 4


@pytest.mark.fault(27)
def test_a_stopped_zygote_is_replaced_and_its_program_run_again(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes(sandbox, RIGHT, RIGHT)
    stopped = {pid for zygote in sandbox.zygotes for pid in {zygote.process.pid, *tree(zygote.process.pid)}}
    monkeypatch.setattr(process, "START_SECONDS", 1.0)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    assert outcomes(sandbox, *[RIGHT] * 4) == [Outcome.PASSED] * 4
    assert not stopped & tree(os.getpid())


def test_what_cannot_be_run_in_time_is_not_scored(sandbox: Sandbox) -> None:
    slow = Calls("import time\ndef add(a, b): time.sleep(1.0); return a + b", CALLS[:1])
    start = time.monotonic()
    found = sandbox.judge([slow] * 6, seconds=2.4)  # 0.6 of them to find that all are slow
    assert time.monotonic() - start < 3.4
    assert [verdict.outcome for verdict in found] == [Outcome.PASSED] * 2 + [Outcome.INFRA_ERROR] * 4
    assert "time of the whole batch" in found[-1].why and found[-1].total == 0


def test_an_error_in_one_verdict_does_not_lose_the_others(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(zygote: process.Zygote, program: Program, until: float) -> Verdict:
        if program is WRONG:
            raise MemoryError("no memory")
        return judge(zygote, program, until)

    monkeypatch.setattr(pool, "judge", broken)
    found = sandbox.judge([RIGHT, WRONG, RIGHT])
    assert [verdict.outcome for verdict in found] == [Outcome.PASSED, Outcome.INFRA_ERROR, Outcome.PASSED]
    assert found[1].why == "MemoryError: no memory"


def test_programs_that_hang_do_not_take_the_time_of_those_behind_them(sandbox: Sandbox) -> None:
    """Limit 1.5 seconds: the first six alone would take 4.5."""
    hanging = Calls("import time; time.sleep(99)", CALLS)
    start = time.monotonic()
    found = [verdict.outcome for verdict in sandbox.judge([hanging] * 6 + [RIGHT, WRONG] * 3, seconds=4.0)]
    assert time.monotonic() - start < 5.0
    assert found[6:] == [Outcome.PASSED, Outcome.FAILED] * 3
    assert found[:2] == [Outcome.TIMEOUT] * 2
    assert set(found[2:6]) <= {Outcome.TIMEOUT, Outcome.INFRA_ERROR}


def test_a_program_is_judged_by_its_own_seconds(sandbox: Sandbox) -> None:
    """Limit 1.5 seconds: 1 is in time and 2 is not, every time."""
    code = "import time\ndef add(a, b): time.sleep({}); return a + b"
    found = outcomes(sandbox, *[Calls(code.format(seconds), CALLS[:1]) for seconds in (1.0, 2.0) * 2])
    assert found == [Outcome.PASSED, Outcome.TIMEOUT] * 2


def test_a_sandbox_works_in_a_fork_of_its_process(sandbox: Sandbox) -> None:
    outcomes(sandbox, RIGHT, RIGHT)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if outcomes(sandbox, RIGHT, WRONG) == [Outcome.PASSED, Outcome.FAILED] else 1
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert outcomes(sandbox, RIGHT, WRONG) == [Outcome.PASSED, Outcome.FAILED]


TRAINER = """
import os, sys, threading, time
from run_attacks import tree
from prefopt.sandbox import Call, Calls, Limits, Sandbox
sandbox = Sandbox({level!r}, Limits(seconds=60.0), workers=2)
sleeping = Calls("import time; time.sleep(60)", [Call("f", (), 1)])
threading.Thread(target=sandbox.judge, args=([sleeping] * 2,), daemon=True).start()
while len(found := tree(os.getpid())) < {processes}:
    time.sleep(0.05)
if os.fork() == 0:  # holds copies of all sockets, as a data loader's process would
    time.sleep(30)
    os._exit(0)
print(*found, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(("level", "processes"), [("standard", 6), ("strict", 10)])
@pytest.mark.fault(27)
def test_a_killed_trainer_leaves_no_process(level: str, processes: int) -> None:
    try:
        machine.find(level)
    except InputError as error:
        pytest.skip(str(error))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    code = TRAINER.format(level=level, processes=processes)
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert trainer.stdout is not None
    started = set(map(int, trainer.stdout.readline().split()))
    assert len(started) >= processes
    helper = tree(trainer.pid) - started
    trainer.kill()
    trainer.wait()
    until = time.monotonic() + 5.0
    while (alive := {pid for pid in started if running(pid)}) and time.monotonic() < until:
        time.sleep(0.02)
    for pid in helper:
        os.kill(pid, signal.SIGKILL)
    trainer.stdout.close()
    assert alive == set()


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_full_disk_is_no_obstacle() -> None:
    """In a mount namespace of its own whose /tmp is full."""
    code = f"""
from prefopt.sandbox import *
with Sandbox(workers=1) as sandbox:
    print(*[verdict.outcome for verdict in sandbox.judge([{RIGHT!r}, {MIXED[-1]!r}])])
"""
    script = 'mount -t tmpfs -o size=16k none /tmp && { yes > /tmp/full 2> /dev/null; exec "$0" -c "$1"; }'
    command = ["unshare", "-m" if os.geteuid() == 0 else "-rm", "sh", "-c", script, sys.executable, code]
    try:
        probe = subprocess.run([*command[:2], "mount", "-t", "tmpfs", "none", "/tmp"], capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"no unshare: {error}")
    if probe.returncode != 0:
        pytest.skip(f"no mount namespace here: {probe.stderr.strip()}")
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.split() == ["passed", "passed"], done.stderr
