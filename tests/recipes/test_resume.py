"""A run that is stopped and goes on ends, to the last bit, like one that was never stopped, whatever its options."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from laws import save_model, write_rows

import prefopt
from prefopt import loop, ranks
from prefopt.checkpoint import Checkpoint
from prefopt.checkpoint.tree import Tree, state_of_random
from prefopt.objectives import EVERY
from prefopt.optimizer import Updater
from prefopt.recipes.resume import RunState
from prefopt.recipes.signals import Paused
from prefopt.records import InputError, Sample, Score

ALL = {
    "batch_size": 4,
    "max_steps": 8,
    "eval_fraction": 0.25,
    "learning_rate": 1e-2,
    "dtype": "float32",
    "preflight": "off",
    "save_minutes": None,
}
ONLINE = {**ALL, "num_completions": 4, "max_tokens": 4, "rollout_batches": 2, "rollout_passes": 2}
BEST = {"keep": "best", "eval_every": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora-bfloat16": ("dpo", {"lora_rank": 2, "dtype": "bfloat16"}),
    "bfloat16": ("dpo", {"dtype": "bfloat16"}),
    "moving-reference-bfloat16": ("dpo", {"reference_sync_steps": 2, "dtype": "bfloat16"}),
    "keep-best": ("sft", {**BEST, "learning_rate": 0.5}),  # far too high: the best are the weights of the start
    "orpo": ("orpo", {}),
    "ipo": ("ipo", {}),
    "bco": ("bco", {}),
    "reward-model": ("reward", {}),
    "decay-and-momentum": ("dpo", {"weight_decay": 0.1, "adam_beta1": 0.5, "schedule": "linear", "warmup": 0.5}),
    "several-epochs": ("sft", {"batch_size": 7, "epochs": 4, "max_steps": None}),
    "online-keep-best": ("grpo", BEST),
    # every prompt was drawn once when it is stopped the second time, so that what was learnt of them decides
    "curriculum": ("grpo", {"curriculum": "success", "rollout_batches": 1, "rollout_passes": 1, "max_steps": 9}),
    "dynamic-sampling": ("grpo", {"dynamic_sampling": True}),
    "easier-data": ("grpo", {"easier_data": "easier.jsonl"}),
    "shared-critic": ("ppo", {"critic": "shared"}),
    "online-dpo": ("online_dpo", {}),
    "moving-reference-online": ("online_dpo", {"reference_sync_steps": 3}),
    "all-of-it": (
        "ppo",
        {"critic": "shared", "lora_rank": 2, "dynamic_sampling": True, "curriculum": "success", **BEST},
    ),
}


class SaysAnswer:
    """The share of words that are the row's answer; scored in this process."""

    name = "says_answer"

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        return [Score(one.text.split().count(one.columns["answer"]) / 4) for one in samples]

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("resume")
    save_model(made / "model")
    for data in ("demonstrations", "pairs", "labels", "ratings", "prompts"):
        write_rows(made / f"{data}.jsonl", data)
    write_rows(made / "easier.jsonl", "prompts", 5, seed=1)
    return made


def train(folder: Path, out: Path, name: str, **options: Any) -> Any:
    objective: Any = EVERY[name]()
    data = objective.facts.data
    given = {**ONLINE, "reward": SaysAnswer()} if data == "prompts" else dict(ALL)
    if "easier_data" in options:
        options["easier_data"] = str(folder / options["easier_data"])
    given = {**given, "model": folder / "model", "data": folder / f"{data}.jsonl", "out": out, **options}
    return prefopt.train(objective=objective, **given)


def left(out: Path) -> dict[str, Any]:
    """What a run leaves, without how long anything took."""
    timed = ("tokens_per_second", "seconds")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((out / "summary.json").read_text())
    weights = sorted((*(out / "model").glob("*.safetensors"), *(out / "critic").glob("*.safetensors")))
    for name in ("seconds", "resumed_at", "model"):
        summary.pop(name)
    for part in ("start", "end"):
        summary[part] = {name: x for name, x in summary[part].items() if not name.startswith(timed)}
    rows = out / "completions.jsonl"
    return {
        **{str(path.relative_to(out)): path.read_bytes() for path in weights},
        "metrics": [{name: x for name, x in line.items() if not name.startswith(timed)} for line in lines],
        "completions": rows.read_text().splitlines() if rows.exists() else [],
        "summary": summary,
    }


class Stops:
    """Sends the process SIGTERM in so many updates of the runs that follow, each counted from the start of its run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wait: list[int] = []
        plain = loop.update

        def update(*given: Any, **named: Any) -> Any:
            if self.wait:
                self.wait[0] -= 1
                if not self.wait[0]:
                    self.wait.pop(0)
                    signal.raise_signal(signal.SIGTERM)
            return plain(*given, **named)

        monkeypatch.setattr(loop, "update", update)


@pytest.fixture
def stops(monkeypatch: pytest.MonkeyPatch) -> Stops:
    return Stops(monkeypatch)


def equal(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name] == value, f"{name} differ"


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_was_stopped_twice_ends_like_one_that_never_was(case, folder, stops, tmp_path):
    """After three updates and after two more: within a rollout, before and after its second pass began."""
    name, options = CASES[case]
    train(folder, tmp_path / "whole", name, **options)
    for number in (3, 2):
        stops.wait = [number]
        with pytest.raises(Paused):
            train(folder, tmp_path / "stopped", name, **options)
    resumed = train(folder, tmp_path / "stopped", name, **options)
    assert resumed.summary["resumed_at"] == [3, 5] and resumed.summary["inexact"] == []
    equal(left(tmp_path / "stopped"), left(tmp_path / "whole"))


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Gradients of these learning rates, so of these updates, are infinite."""
    rates: list[float] = []
    plain = Updater.step

    def step(updater: Updater, learning_rate: float, max_norm: float | None) -> float | None:
        if learning_rate in rates:
            updater.pairs[0].master.grad.fill_(torch.inf)  # type: ignore[union-attr]
        return plain(updater, learning_rate, max_norm)

    monkeypatch.setattr(Updater, "step", step)
    yield rates


@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_a_run_that_was_stopped_at_a_skipped_update_goes_on_exactly(name, folder, stops, poisoned, tmp_path):
    """The third and the fourth update are skipped, and it is stopped between the two."""
    options = loop.LoopOptions(schedule="linear", warmup=0.0)
    poisoned += [loop.rate(options, 1e-2, step, 8) for step in (2, 3)]
    given = {"schedule": "linear", "warmup": 0.0, "max_bad_steps": 3}
    train(folder, tmp_path / "whole", name, **given)
    stops.wait = [3]
    with pytest.raises(Paused):
        train(folder, tmp_path / "stopped", name, **given)
    train(folder, tmp_path / "stopped", name, **given)
    wanted = left(tmp_path / "whole")
    assert [line["skipped"] for line in wanted["metrics"] if "skipped" in line] == [1.0, 2.0]
    equal(left(tmp_path / "stopped"), wanted)


def test_best_weights_that_are_gone_are_missed_before_training_goes_on(folder, stops, tmp_path):
    stops.wait = [3]
    with pytest.raises(Paused):
        train(folder, tmp_path / "run", "dpo", **BEST)
    shutil.rmtree(tmp_path / "run" / "best")
    with pytest.raises(InputError, match=r"best/step-0000000\d: is gone"):
        train(folder, tmp_path / "run", "dpo", **BEST)


def test_a_checkpoint_of_the_last_update_needs_no_other_one(folder, stops, tmp_path):
    train(folder, tmp_path / "whole", "dpo")
    stops.wait = [8]
    with pytest.raises(Paused, match="stopped after update 8 of 8"):
        train(folder, tmp_path / "stopped", "dpo")
    train(folder, tmp_path / "stopped", "dpo")
    equal(left(tmp_path / "stopped"), left(tmp_path / "whole"))


@pytest.mark.parametrize(("now", "wanted"), [(1, [7]), (2, [5, 2]), (4, [1, 2, 4, 0])])
def test_each_sample_of_a_reward_is_counted_once_by_any_number_of_processes(now, wanted, tmp_path, monkeypatch):
    for rank, count in enumerate((1, 2, 4)):
        own = {"source": {}, "rewards": {"mine": {"scored": count}}, "updater": None, "random": state_of_random()}
        Tree({**own, "updater": {}} if rank == 0 else own, copy=False).write(tmp_path, f"rank-{rank}")
    checkpoint = Checkpoint(tmp_path, 5, {"surroundings": {"processes": 3}, "options": {"shard": False}})
    updater: Any = SimpleNamespace(sharded=False, load_state_dict=lambda state: None)
    monkeypatch.setattr(ranks, "world", lambda: now)
    found = []
    for rank in range(now):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        reward, source = SimpleNamespace(load_state_dict=found.append), SimpleNamespace(load_state_dict=lambda x: None)
        RunState(updater, {"source": source, "rewards": reward}).restore(checkpoint)  # type: ignore[dict-item]
    assert [counts.get("mine", {}).get("scored", 0) for counts in found] == wanted
