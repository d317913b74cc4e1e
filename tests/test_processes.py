"""Several processes take the same updates as one, and stop together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from laws import largest_difference, save_model, weights, write_rows

from prefopt.models.heads import AUTO
from prefopt.models.load import head_of
from prefopt.objectives import EVERY

SECONDS = 120  # a run takes about ten; a hang must not hold up the suite

JOB = """
import json, sys
import prefopt
from prefopt import ranks
from prefopt.models.policy import Policy
from prefopt.objectives import EVERY
from prefopt.recipes import train as recipe

def outage(at):
    # on the second process, forward pass number `at` of this run finds no memory
    plain, passes = Policy.__call__, []
    def call(policy, batch):
        passes.append(batch)
        if len(passes) - 1 == at and ranks.rank() == 1:
            raise MemoryError
        return plain(policy, batch)
    Policy.__call__ = call

wanted, runs = json.loads(sys.argv[1])
for given in runs:
    if "outage" in given:
        outage(given.pop("outage"))
    if given.pop("fail", None):
        def policy(*arguments):
            if ranks.rank() == 1:
                raise RuntimeError("rank 1 fell over")
            return plain(*arguments)
        plain, recipe._policy = recipe._policy, policy
    prefopt.train(objective=EVERY[given.pop("objective")](**given.pop("settings", {})), **given)
assert ranks.world() == wanted, ranks.world()
ranks.stop()
"""


def launch(processes: int, folder: Path, runs: list[dict[str, Any]]) -> subprocess.CompletedProcess[str]:
    """The runs, one after the other, on so many processes of one thread each. TimeoutExpired if they hang.

    `--multi_gpu` is how `accelerate launch` is told to start several; without a GPU they meet over gloo on the CPU.
    (Its `--cpu` starts one process, whatever it is asked for, unless there is an MPI.)
    """
    job = folder / "job.py"
    job.write_text(JOB, encoding="utf-8")
    several = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    several += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [sys.executable, *(several if processes > 1 else []), str(job)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    given = json.dumps([processes, runs], default=str)
    started = subprocess.Popen(
        [*command, given], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        out, error = started.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        started.terminate()  # not kill: the launcher ends its processes first
        started.communicate()
        raise
    return subprocess.CompletedProcess(command, started.returncode, out, error)


def options_for(objective: str, folder: Path) -> dict[str, Any]:
    """Three epochs of nine rows, four an update: the last batch of an epoch has one row, so one rank has none.

    In float64, since AdamW turns the rounding of a gradient near zero into a step of full size.
    """
    shape = EVERY[objective].facts.data
    data = write_rows(folder / f"{objective}.jsonl", shape, 9)
    held_out = write_rows(folder / f"{objective} held out.jsonl", shape, 5, seed=1)
    model = save_model(folder / f"{objective} start", architecture="gpt_neox")
    given = {"model": model, "data": data, "eval_data": held_out, "batch_size": 4}
    given |= {"epochs": 3.0, "learning_rate": 1e-2, "dtype": "float64", "eval_every": 4}
    return given


def outcome(out: Path) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Weights and the metrics of every update and evaluation, without those of the clock."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for line in lines:
        line.pop("tokens_per_second", None)
        if line["step"] < 2:  # margins are 0 up to rounding, which alone decides what counts as positive
            for name in ("rewards/accuracies", "eval/rewards/accuracies"):
                line.pop(name, None)
    return saved(out / "model"), lines


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a language model or a reward model."""
    return weights(getattr(transformers, AUTO[head_of(folder)]).from_pretrained(folder, dtype="float64"))


def same_run(one: Path, two: Path) -> None:
    (left, first), (right, second) = outcome(one), outcome(two)
    assert largest_difference(left, right) < 1e-8
    assert len(first) == len(second) >= 9
    for ours, theirs in zip(first, second, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-9)


# name of the run with one process -> objective and its own options
ALONE: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", {}),
    "dpo": ("dpo", {}),
    # these read numbers of the whole update, on all processes
    "dpo with a drift": ("dpo", {"loss_type": {"sigmoid": 0.5, "bco": 0.5}}),
    "aot": ("aot", {}),
    "kto": ("kto", {}),
    "bco": ("bco", {}),
    # score heads
    "reward": ("reward", {}),
    "prm": ("prm", {}),
}

# name of the run with two processes -> the one with one process, and the options in which it differs
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", {}),
    "dpo": ("dpo", {}),
    "dpo in small passes, reference in memory": ("dpo", {"reference": "copy", "tokens_per_forward": 20}),
    # without the step-0 identities the first passes are those of the evaluation, of two batches
    "sft, no memory in an evaluation": ("sft", {"preflight": "off", "outage": 1}),
    "sft, no memory in an update": ("sft", {"preflight": "off", "outage": 2}),
    "sft sharded": ("sft", {"shard": True}),
    "dpo sharded": ("dpo", {"shard": True, "tokens_per_forward": 20}),
    "dpo with a drift": ("dpo with a drift", {}),
    "aot": ("aot", {"tokens_per_forward": 20}),
    "aot sharded": ("aot", {"shard": True, "tokens_per_forward": 20}),
    "kto": ("kto", {"tokens_per_forward": 20}),
    "kto sharded": ("kto", {"shard": True, "tokens_per_forward": 20}),
    "bco": ("bco", {}),
    "reward": ("reward", {"tokens_per_forward": 20}),
    "reward sharded": ("reward", {"shard": True, "tokens_per_forward": 20}),
    "prm": ("prm", {}),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """All runs on one process and on two, in folders named after them; the folder they lie in."""
    folder = tmp_path_factory.mktemp("processes")
    given = {
        name: {**options_for(objective, folder), "objective": objective, "settings": settings}
        for name, (objective, settings) in ALONE.items()
    }
    alone = [{**given[name], "out": folder / "one" / name} for name in ALONE]
    both = [{**given[same], **changes, "out": folder / "two" / name} for name, (same, changes) in RUNS.items()]
    for processes, runs in ((1, alone), (2, both)):
        done = launch(processes, folder, runs)
        assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("sharding: 2 decoder layers over 2 processes") == 5
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_take_the_same_updates_as_one(name, finished):
    alone = RUNS[name][0]
    same_run(finished / "one" / alone, finished / "two" / name)
    start, end = saved(finished / f"{ALONE[alone][0]} start"), outcome(finished / "two" / name)[0]
    same = {part for part in start if part in end and start[part].shape == end[part].shape}  # a head may be new
    assert largest_difference(*({part: one[part] for part in same} for one in (start, end))) > 1e-2


def test_a_process_that_fails_stops_the_others(tmp_path):
    options = options_for("sft", tmp_path)
    done = launch(2, tmp_path, [{**options, "objective": "sft", "out": tmp_path / "run", "fail": True}])
    assert done.returncode != 0
    assert "rank 1 fell over" in done.stderr
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_refusal_stops_all_processes(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text("{}")
    done = launch(2, tmp_path, [{**options_for("sft", tmp_path), "objective": "sft", "out": tmp_path / "run"}])
    assert done.returncode != 0
    assert "already holds a run" in done.stderr
