"""Runs of several processes: killed together or one alone, failing on one alone, asked to stop, of another number."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from groups import Groups
from lives import prepare, result

SAVING = {"save_every": 1, "save_minutes": None}
# name -> kind of run and its options
RUNS = {
    "dpo": ("dpo", {"reference": "cache"}),
    "sft sharded": ("sft", {"shard": True}),
    "grpo": ("grpo", {"save_async": False}),
}
GIVES_UP = '''\
import os

def gives_up(completions, **columns):
    """Fails on the second process only."""
    assert os.environ["RANK"] != "1", "no judge on this machine"
    return [0.5 * len(said) for said in completions]
'''


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    folder = tmp_path_factory.mktemp("groups")
    prepare(folder)
    (folder / "gives_up.py").write_text(GIVES_UP)
    made = Groups(folder)
    yield made
    made.close()


@pytest.fixture(scope="module")
def whole(groups):
    """name of a run -> how it ended on two processes and what it left, unharmed."""
    done = {}

    def of(name):
        if name not in done:
            kind, options = RUNS[name]
            out = groups.folder / f"{name} whole"
            ended = groups.run(kind, out, {**SAVING, **options})
            assert ended.codes == [0, 0], ended.said
            done[name] = ended, result(out)
        return done[name]

    return of


def same(found, wanted):
    for name, value in wanted.items():
        assert found[name] == value, f"{name} differ"


def summary_of(out):
    return json.loads((out / "summary.json").read_text())


def checkpoints(out):
    return sorted(path.name for path in (out / "checkpoints").glob("step-*"))


@pytest.mark.fault(1, 2, 35)
@pytest.mark.parametrize("name", RUNS)
def test_killed_together_and_each_alone_the_run_ends_like_one_that_never_was(name, groups, whole):
    kind, options = RUNS[name]
    unharmed, wanted = whole(name)
    out, draw = groups.folder / f"{name} killed", random.Random(name)
    for victims in ([0, 1], [1], [0]):
        passed = sorted(unharmed.moments[victims[0]])
        # of a life's first moments: there must be some left in the third
        moment, number = ("before update", 3) if len(victims) == 2 else (draw.choice(passed), draw.randint(1, 2))
        at = {"moment": moment, "number": number, "sent": signal.SIGKILL, "ranks": victims}
        ended = groups.run(kind, out, {**SAVING, **options}, **at)
        for rank in range(2):
            assert ended.codes[rank] == (-signal.SIGKILL if rank in victims else 1), ended.said
        if len(victims) == 1:
            assert ended.seconds < 60
            (left,) = {0, 1} - set(victims)
            assert f"stopped: process {left} of 2 lost another" in ended.said[left]
    ended = groups.run(kind, out, {**SAVING, **options})
    assert ended.codes == [0, 0], ended.said
    same(result(out), wanted)
    if kind == "grpo":
        # 3 rollouts of 8 prompts and 4 evaluations of 6, 4 completions each, of both processes and all lives
        assert summary_of(out)["rewards"] == {"says_answer": {"scored": 4 * (3 * 8 + 4 * 6)}}


@pytest.mark.fault(36)
def test_a_reward_that_gives_up_on_one_process_stops_all_with_its_words(groups):
    options = {**SAVING, "reward": f"{groups.folder / 'gives_up.py'}:gives_up"}
    ended = groups.run("grpo", groups.folder / "gives up", options)
    assert ended.codes == [2, 2] and ended.seconds < 60
    assert all("no judge on this machine" in said for said in ended.said)


@pytest.mark.fault(36)
@pytest.mark.parametrize(("moment", "rank"), [("before update", 1), ("before update", 0), ("before reward", 0)])
def test_what_one_process_alone_runs_into_ends_all_and_is_what_all_name(moment, rank, groups):
    out = groups.folder / f"falls {moment} {rank}"
    ended = groups.run("grpo", out, SAVING, moment=moment, number=2, ranks=[rank])
    assert ended.codes == [1, 1] and ended.seconds < 60
    assert "RuntimeError: fell over" in ended.said[rank] and "lost another" not in ended.said[rank]
    other = ended.said[1 - rank]
    told = f"since another had: process {rank}: RuntimeError: fell over"
    if rank or moment == "before reward":
        assert told in other and "Traceback" not in other
    else:  # the notes that processes leave each other went with it
        assert told in other or "process 1 of 2 lost another" in other


@pytest.mark.fault(35)
def test_a_process_that_hangs_is_waited_for_no_longer_than_was_asked_for(groups):
    out, at = groups.folder / "hangs", {"moment": "before update", "number": 3, "ranks": [1]}
    ended = groups.run("sft", out, {**SAVING, "max_wait_minutes": 0.05}, sent=signal.SIGSTOP, **at)
    assert ended.codes[0] == 1
    # in `train`: what these tests put around an update waits first
    assert "process 0 of 2 waited in vain for the others in train (loop.py:" in ended.said[0]


@pytest.mark.fault(3)
@pytest.mark.parametrize(("asked", "echo"), [([0, 1], True), ([1], False)])
def test_sigterm_to_all_or_to_one_pauses_all_at_one_checkpoint(asked, echo, groups, whole):
    out, options = groups.folder / f"paused {asked}", {**SAVING, **RUNS["grpo"][1], "save_every": None}
    at = {"moment": "before update", "number": 5, "sent": signal.SIGTERM, "echo": echo, "ranks": asked}
    ended = groups.run("grpo", out, options, **at)
    assert ended.codes == [75, 75], ended.said
    assert checkpoints(out) == ["step-00000005"] and not (out / "summary.json").exists()
    assert "stopped after update 5 of 12" in ended.said[0]
    if echo:
        assert groups.run("grpo", out, options).codes == [0, 0]
        same(result(out), whole("grpo")[1])


@pytest.mark.fault(31)
@pytest.mark.parametrize(("before", "now"), [(2, 1), (1, 2)])
def test_another_number_of_processes_is_refused_and_allowed_where_asked(before, now, groups):
    out, at = (
        groups.folder / f"{before} to {now}",
        {"moment": "before update", "number": 5, "sent": signal.SIGTERM},
    )
    assert groups.run("grpo", out, SAVING, processes=before, **at).codes == [75] * before
    refused = groups.run("grpo", out, SAVING, processes=now)
    assert refused.codes == [2] * now
    assert f"processes: {before} then, {now} now" in refused.said[0]
    gone_on = groups.run("grpo", out, {**SAVING, "allow_inexact": True}, processes=now)
    assert gone_on.codes == [0] * now, gone_on.said
    summary = summary_of(out)
    assert f"processes: {before} then, {now} now" in summary["inexact"] and summary["resumed_at"] == [5]
    # the half of a rollout that this process had is left out, and another one drawn
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "reward" in line] == [1, 5, 6, 10]
    # 4 rollouts of 8 prompts, 4 evaluations of 6, of all processes that there were
    assert summary["rewards"] == {"says_answer": {"scored": 4 * (4 * 8 + 4 * 6)}}


@pytest.mark.fault(31)
def test_sharded_weights_are_taken_up_by_as_many_processes_only(groups):
    out, at = groups.folder / "shards", {"moment": "before update", "number": 2, "sent": signal.SIGTERM}
    assert groups.run("sft", out, {**SAVING, "shard": True}, **at).codes == [75, 75]
    refused = groups.run("sft", out, {**SAVING, "shard": False, "allow_inexact": True}, processes=1)
    assert refused.codes == [2]
    assert "its weights are sharded over 2 processes and here they are whole" in refused.said[0]
    refused = groups.run("sft", out, {**SAVING, "shard": False})
    assert refused.codes == [2, 2] and "shard: true then, false now" in refused.said[0]


# ---------------------------------------------------------------- with a launcher


def workers(launcher):
    """Ids of the processes that a launcher has started."""
    return [int(child) for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]


def awaited(what, process, said):
    """What `what()` gives once it is true. AssertionError where the process ends before."""
    while not (found := what()):
        assert process.poll() is None, said.read_text()[-3000:]
        time.sleep(0.02)
    return found


@pytest.mark.fault(3, 35)
def test_torchrun_starts_a_run_again_where_a_process_died_and_passes_sigterm_on(groups, tmp_path):
    out, said = tmp_path / "run", tmp_path / "said"
    given = {"model": groups.folder / "model", "data": groups.folder / "demonstrations.jsonl", "out": out}
    given |= {"batch_size": 4, "max_steps": 100_000, "save_every": 20, "save_minutes": "null"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    # the second variable: without it the processes of a second start look for those of the first (torch issue 135712)
    environment = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    run = ["-m", "prefopt", "train", "sft", *(f"{name}={value}" for name, value in given.items())]
    with said.open("w") as file:
        process = subprocess.Popen([*launcher, *run], stdout=file, stderr=file, env={**os.environ, **environment})
    try:
        awaited(lambda: checkpoints(out), process, said)
        os.kill(workers(process.pid)[1], signal.SIGKILL)
        awaited(lambda: "resuming after update" in said.read_text(), process, said)
        before = checkpoints(out)[-1]
        awaited(lambda: checkpoints(out)[-1] > before, process, said)
        process.terminate()
        assert process.wait(60) == 1  # whatever its processes end with
    finally:
        process.kill()
    stopped = re.findall(
        r"stopped after update (\d+) of 100000. The same command goes on from update \1\.", said.read_text()
    )
    assert len(stopped) == 2 and len(set(stopped)) == 1, said.read_text()[-5000:]
    assert checkpoints(out)[-1] == f"step-{int(stopped[0]):08d}"
