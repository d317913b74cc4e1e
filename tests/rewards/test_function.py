"""A function of a user: what it may return, how it may fail, and what becomes of its processes."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hostile
import numpy as np
import pytest
import torch
from hostile import one_by_one, samples

from prefopt.records import InputError, Sample, Score
from prefopt.rewards import ABSTAINED, FunctionReward, Limits

GIB = 1 << 30
Make = Callable[..., FunctionReward]


@pytest.fixture
def make() -> Iterator[Make]:
    """Rewards that are closed with the test."""
    made: list[FunctionReward] = []

    def build(function: Any, **limits: Any) -> FunctionReward:
        made.append(FunctionReward(function, Limits(**{"seconds": 20.0, "memory": GIB, **limits})))
        return made[-1]

    yield build
    for reward in made:
        reward.close()


def processes_of(group: int) -> list[int]:
    """Processes of a session, zombies left out."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue
            if int(session) == group and state != "Z":
                found.append(int(entry.name))
    return found


def pids(reward: FunctionReward) -> list[int]:
    return [worker.process.pid for worker in reward._pool._workers]


# ---------------------------------------------------------------- what is returned


NO_NUMBERS: dict[str, Any] = {
    "nan": float("nan"),
    "infinity": float("inf"),
    "more than single precision holds": 1e39,
    "an int without end": 10**400,
    "text": "1.0",
    "bytes": b"1",
    "a list": [1.0],
    "two numbers": np.ones(2),
    "a tensor of nan": torch.tensor(float("nan")),
    "a complex number": 1j,
    "an object": object,
}


@pytest.mark.parametrize("name", NO_NUMBERS)
@pytest.mark.fault(17)
def test_what_is_no_number_is_no_score_and_is_counted(name: str) -> None:
    from prefopt.rewards.channel import number

    value, why = number(NO_NUMBERS[name])
    assert value is None and why.startswith("returned")


@pytest.mark.parametrize(
    "value", [0.125, 1, True, np.float16(2), np.bool_(False), torch.tensor(0.5), torch.tensor([3])]
)
def test_one_number_is_a_score_whatever_holds_it(value: Any) -> None:
    from prefopt.rewards.channel import number

    assert number(value) == (float(value), "")


@pytest.mark.fault(17)
def test_of_a_batch_only_the_samples_without_a_number_are_lost(make: Make) -> None:
    def function(completions: list[str]) -> list[Any]:
        return [float("nan"), "1.0", 0.5, None, True, np.float32(0.25), np.ones(1) / 8, 10**400]

    reward = make(function)
    scores = reward(samples(*"abcdefgh"))
    assert [score.value for score in scores] == [None, None, 0.5, None, 1.0, 0.25, 0.125, None]
    assert scores[3].why == ABSTAINED
    assert reward.counts == {"scored": 4, "abstained": 1, "value": 3}
    assert "returned nan" in reward.failures.first


@pytest.mark.parametrize("returned", [[1.0], [1.0] * 3, [], 1.0, None, "11", {"a": 1.0, "b": 2.0}])
@pytest.mark.fault(17)
def test_a_wrong_number_of_values_scores_nothing(make: Make, returned: Any) -> None:
    reward = make(lambda completions: returned)
    scores = reward([*samples("a", "b")])
    if returned == [1.0]:  # right for each sample alone
        assert [score.value for score in scores] == [1.0, 1.0]
    else:
        assert [score.value for score in scores] == [None, None]
        assert all("returned" in score.why for score in scores) and reward.counts == {"length": 2}


def test_a_generator_is_read_as_far_as_needed(make: Make) -> None:
    assert [score.value for score in make(lambda completions: hostile.endless())(samples("a"))] == [None]
    assert [score.value for score in make(lambda completions: (1.0 for _ in completions))(samples("a", "b"))] == [1, 1]


# ---------------------------------------------------------------- how it fails


@pytest.mark.parametrize(
    ("fails", "kind", "why"),
    [
        (hostile.raises, "raised", "on purpose"),
        (hostile.leaves, "raised", "SystemExit"),
        (hostile.recurses, "raised", "RecursionError"),
        (hostile.eats_memory, "raised", "MemoryError"),
        (hostile.dies, "died", "exited with 0"),
        (hostile.crashes, "died", "SIGSEGV"),
        (hostile.kills_itself, "died", "SIGKILL"),
        (hostile.answers_for_another, "died", "no reply"),
    ],
)
@pytest.mark.fault(15, 26)
def test_a_failure_loses_its_own_sample_and_no_other(make: Make, fails: Callable[[], Any], kind: str, why: str) -> None:
    reward = make(one_by_one(fails), memory=GIB // 4)
    scores = reward(samples("good", "bad", "good"))
    assert [score.value for score in scores] == [1.0, None, 1.0]
    assert why in scores[1].why
    assert reward.counts == {"scored": 2, kind: 1}
    assert "completion: 'bad'" in reward.failures.first
    assert [score.value for score in reward(samples("good"))] == [1.0]


@pytest.mark.parametrize(
    "hangs",
    [
        hostile.sleeps,
        hostile.spins,
        hostile.matches_for_ever,
        hostile.ignores_signals,
        hostile.stops_itself,
        hostile.starts_a_process_that_stays,
    ],
)
@pytest.mark.fault(16)
def test_a_call_ends_at_its_deadline_whatever_the_function_does(make: Make, hangs: Callable[[], Any]) -> None:
    reward = make(one_by_one(hangs), seconds=0.6)
    (old,) = pids(reward)
    start = time.monotonic()
    scores = reward(samples("good", "bad"))
    assert time.monotonic() - start < 0.6 + 1
    assert scores[1].value is None and "deadline" in scores[1].why
    assert reward.counts["deadline"] + reward.counts["scored"] == 2
    assert processes_of(old) == []
    reward.limits = Limits(seconds=20)
    assert [score.value for score in reward(samples("good"))] == [1.0]


@pytest.mark.fault(16)
def test_a_hang_without_a_time_for_each_sample_loses_one_where_time_allows(make: Make) -> None:
    reward = make(one_by_one(hostile.spins), seconds=8.0)
    start = time.monotonic()
    scores = reward(samples("good", "good", "bad", "good"))
    assert time.monotonic() - start < 8 + 1
    assert [score.value for score in scores] == [1.0, 1.0, None, 1.0]
    assert reward.counts == {"scored": 3, "deadline": 1}


@pytest.mark.fault(16)
def test_a_coroutine_that_hangs_ends_at_the_deadline(make: Make) -> None:
    start = time.monotonic()
    assert make(hostile.awaits_for_ever, seconds=0.5)(samples("a"))[0].value is None
    assert time.monotonic() - start < 1.5


@pytest.mark.fault(16)
def test_with_a_time_for_each_sample_a_hang_loses_one(make: Make) -> None:
    reward = make(one_by_one(hostile.spins), sample_seconds=0.5, workers=2)
    values = [score.value for score in reward(samples("good", "bad", "good", "bad", "good"))]
    assert values == [1.0, None, 1.0, None, 1.0]
    assert reward.counts == {"scored": 3, "deadline": 2}


@pytest.mark.fault(15)
def test_the_traceback_begins_in_the_function(make: Make) -> None:
    reward = make(one_by_one(hostile.raises))
    reward(samples("bad"))
    assert "RuntimeError: on purpose" in reward.failures.first
    assert "hostile.py" in reward.failures.first and "worker.py" not in reward.failures.first


def test_a_batch_is_split_by_prompt_where_the_function_compares(make: Make) -> None:
    """Ranks within a call: right only if a prompt's completions come together, even after a failure."""

    def rank(completions: list[str]) -> list[float]:
        if "bad" in completions:
            raise RuntimeError
        return [float(sorted(completions).index(text)) for text in completions]

    reward = make(rank, unit="group", workers=2)
    scores = reward(samples("b", "a", "bad", "x", "c", "d"))
    assert [score.value for score in scores] == [1.0, 0.0, None, None, 0.0, 1.0]


def test_samples_that_cannot_be_sent_are_lost_alone(make: Make) -> None:
    lock: Any = threading.Lock()
    scores = make(lambda completions, x: [1.0] * len(completions))(samples("a", "b", x=[1, lock]))
    assert [score.value for score in scores] == [1.0, None] and "cannot be sent" in scores[1].why


def test_what_it_prints_writes_and_forks_does_not_reach_the_protocol(make: Make) -> None:
    assert make(one_by_one(hostile.writes_everywhere))(samples("bad", "good"))[0].value == 1.0
    reward = make(one_by_one(hostile.forks_and_returns))
    for _ in range(3):
        assert [score.value for score in reward(samples("bad", "good"))] == [1.0, 1.0]


@pytest.mark.parametrize(
    "text",
    ["\x00", "\ud800", "\U0001d518" * 100, "x" * 10_000_000, "[" * 100_000],
    ids=["nul", "surrogate", "wide", "10 MB", "deep"],
)
def test_hostile_text_arrives_as_it_is(make: Make, text: str) -> None:
    reward = make(lambda completions, expected: [float(a == b) for a, b in zip(completions, expected, strict=True)])
    assert reward(samples(text, expected=[text]))[0].value == 1.0


def test_an_empty_batch_has_no_scores(make: Make) -> None:
    assert make(one_by_one(hostile.raises))([]) == []


# ---------------------------------------------------------------- where it comes from


def test_a_file_is_imported_in_its_process_with_its_neighbours(make: Make, tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("VALUE = 7.0\n")
    (tmp_path / "json.py").write_text(
        "import os, neighbour\ndef mine(completions, **columns):\n    return [neighbour.VALUE] * len(completions)\n"
        "def process(completions):\n    return [float(os.getpid())] * len(completions)\n"
    )
    assert make(f"{tmp_path}/json.py:mine")(samples("a", "b"))[1].value == 7.0
    assert make(f"{tmp_path}/json.py:process")(samples("a"))[0].value != os.getpid()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def other(): pass\ndef more(): pass", "there is no 'mine' in"),
        ("from json import loads\ndef other(): pass\ndef _no(): pass", "its functions: other"),
        ("mine = 3", "'mine' is 3 in"),
        ("raise ImportError('no such module')", "no such module"),
        ("import os; os._exit(4)", "exited with 4"),
        ("def mine(:", "SyntaxError"),
    ],
)
def test_what_cannot_be_loaded_is_an_error_at_once(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(InputError, match="cannot be loaded") as error:
        FunctionReward(f"{tmp_path}/broken.py:mine")
    assert said in str(error.value)
    assert "Error" in said or "no such" in said or "worker.py" not in str(error.value)


def test_a_missing_file_and_a_function_that_cannot_be_sent_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no file .*absent\.py"):
        FunctionReward(f"{tmp_path}/absent.py:f")
    lock = threading.Lock()

    def holds_a_lock(completions: list[str]) -> list[float]:
        return [float(lock.locked())]

    with pytest.raises(InputError, match="write it in a file"):
        FunctionReward(holds_a_lock)


def test_closures_partials_and_callable_objects_are_functions(make: Make) -> None:
    class Long:
        def __init__(self, least: int) -> None:
            self.least = least

        def __call__(self, completions: list[str], **others: Any) -> list[bool]:
            return [len(text) >= self.least for text in completions]

    def scaled(completions: list[str], by: float) -> list[float]:
        return [by * len(text) for text in completions]

    assert [score.value for score in make(Long(2))(samples("a", "bb"))] == [0.0, 1.0]
    assert [score.value for score in make(functools.partial(scaled, by=0.5))(samples("a", "bb"))] == [0.5, 1.0]
    assert make(Long(2)).name == "Long" and make(functools.partial(scaled, by=1.0)).name == "scaled"


# ---------------------------------------------------------------- processes


def test_closing_ends_every_process_and_calls_after_it_are_errors(make: Make) -> None:
    reward = make(one_by_one(hostile.raises), workers=3)
    reward(samples("a"))
    before = pids(reward)
    assert len(before) == 3
    reward.close()
    reward.close()
    assert [processes_of(pid) for pid in before] == [[], [], []]
    with pytest.raises(RuntimeError, match="closed"):
        reward(samples("a"))


def test_no_descriptor_is_left_behind(make: Make) -> None:
    reward = make(one_by_one(hostile.dies))
    reward(samples("bad"))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        reward(samples("bad"))
    assert len(os.listdir("/proc/self/fd")) <= before


TRAINER = """
import sys, threading, time
from prefopt.records import Sample
from prefopt.rewards import FunctionReward
def f(completions):
    while True: pass
made = []
def build():  # from a thread that ends: its processes must outlive it
    made.append(FunctionReward(f))
thread = threading.Thread(target=build); thread.start(); thread.join(); time.sleep(0.3)
(worker,) = made[0]._pool._workers
assert worker.process.poll() is None
threading.Thread(target=made[0], args=([Sample("p", "c")],), daemon=True).start()
time.sleep(0.3)
print(worker.process.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the death of a parent is told on Linux only")
def test_killing_the_trainer_ends_a_busy_process() -> None:
    with subprocess.Popen([sys.executable, "-c", TRAINER], stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout
        pid = int(trainer.stdout.readline())
        assert processes_of(pid)
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()
        until = time.monotonic() + 10
        while processes_of(pid) and time.monotonic() < until:
            time.sleep(0.02)
    assert processes_of(pid) == []


@pytest.mark.fault(26)
@pytest.mark.parametrize("limits", [{}, {"sample_seconds": 20.0}, {"unit": "group"}], ids=str)
def test_a_sample_whose_process_is_killed_once_is_scored_again(make: Make, limits: Any, tmp_path: Path) -> None:
    """Alone in its job too: the system takes whichever process it likes where memory runs out."""
    mark = tmp_path / "killed"

    def is_killed_once(completions: list[str]) -> list[float]:
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return [1.0] * len(completions)

    reward = make(is_killed_once, **limits)
    assert reward(samples("a")) == [Score(1.0)]
    assert reward.counts == {"scored": 1}


@pytest.mark.fault(26)
def test_a_process_that_was_killed_between_calls_is_replaced(make: Make) -> None:
    reward = make(one_by_one(hostile.raises))
    reward(samples("a"))
    (pid,) = pids(reward)
    os.kill(pid, signal.SIGKILL)
    until = time.monotonic() + 10
    while processes_of(pid) and time.monotonic() < until:
        time.sleep(0.01)
    assert reward(samples("a")) == [Score(1.0)]


def test_what_a_process_started_ends_with_it_even_where_it_died_between_calls(make: Make) -> None:
    def dies_soon_and_leaves_a_process(completions: list[str]) -> list[float]:
        subprocess.Popen(["sleep", "3600"])
        threading.Timer(0.1, os._exit, [3]).start()
        return [1.0] * len(completions)

    reward = make(dies_soon_and_leaves_a_process)
    reward(samples("a"))
    (pid,) = pids(reward)
    until = time.monotonic() + 10
    while len(processes_of(pid)) > 1 and time.monotonic() < until:
        time.sleep(0.01)
    assert len(processes_of(pid)) == 1  # the one that stays
    assert reward(samples("a")) == [Score(1.0)]
    assert processes_of(pid) == []


def test_a_fork_has_processes_of_its_own_and_leaves_those_of_its_parent(make: Make) -> None:
    """In a process of its own, without the threads of this one."""
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["child 1.0 1.0 2.0", "status 0", "parent 1.0"], done.stderr


FORK = """
import os, signal
from prefopt.records import Sample
from prefopt.rewards import FunctionReward, Mixture
def one(completions): return [1.0] * len(completions)
def two(completions): return [1.0] * len(completions)
first = FunctionReward(one)
both = Mixture([first, FunctionReward(two)])
samples = [Sample("p", "c")]
both(samples)
pids = [worker.process.pid for worker in first._pool._workers]
child = os.fork()
if child == 0:
    signal.alarm(30)
    new = FunctionReward(one)
    print("child", first(samples)[0].value, new(samples)[0].value, both(samples)[0].value, flush=True)
    assert not {worker.process.pid for worker in first._pool._workers} & set(pids)
    new.close()
    both.close()
    os._exit(0)
print("status", os.waitpid(child, 0)[1], flush=True)
print("parent", first(samples)[0].value)
assert [worker.process.pid for worker in first._pool._workers] == pids
both.close()
"""


def test_a_function_that_can_no_longer_be_loaded_is_said_and_does_not_loop(make: Make, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("import os\ndef f(completions):\n    os._exit(1)\n")
    reward = make(f"{file}:f")
    file.write_text("raise ValueError('broken since')\n")
    scores = reward([Sample("p", "a"), Sample("p", "b")])
    assert [score.value for score in scores] == [None, None]
    assert "broken since" in scores[0].why and reward.counts == {"start": 2}
