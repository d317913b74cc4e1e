"""Faults 28 to 30 in whole runs: an engine beside the trainer that fails, keeps old weights, or counts otherwise."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from laws import save_model, write_rows
from torch import Tensor
from transformers import AutoModelForCausalLM

import prefopt
from prefopt.models.sampler import Local
from prefopt.models.sampling import Sampling
from prefopt.models.vllm import Drawn, EngineError, Vllm, VllmOptions
from prefopt.models.weights import fingerprint
from prefopt.objectives import GRPO
from prefopt.recipes import online

FAST = {
    "batch_size": 4,
    "max_steps": 4,
    "num_completions": 4,
    "max_tokens": 4,
    "learning_rate": 1e-2,
    "eval_fraction": 0.0,
    "dtype": "float32",
    "sampler": "vllm",
}
REWARD = """\
def says_answer(completions, answer, **columns):
    return [said.split().count(word) / 4 for said, word in zip(completions, answer, strict=True)]
"""


class Engine:
    """An engine with a model of its own. From the third rollout on it has a fault."""

    def __init__(self, model: Path, fault: str = "") -> None:
        self.model, self.fault = AutoModelForCausalLM.from_pretrained(model), fault
        self.taken = self.drawn = 0
        self.has = {"version": "", "fingerprint": "", "dtype": "float32"}

    @property
    def broken(self) -> str:
        return self.fault if self.taken >= 3 else ""

    def state(self) -> Mapping[str, Any]:
        return self.has

    def take(self, weights: Iterator[tuple[str, Tensor]], version: str) -> Mapping[str, Any]:
        self.taken += 1
        given = dict(weights)
        if self.broken == "half the weights":
            given = dict(list(given.items())[: len(given) // 2])
        if self.broken != "old weights":
            self.model.load_state_dict(given, strict=False)
        self.has = {**self.has, "version": version, "fingerprint": fingerprint(self.model.state_dict().values())}
        if self.broken == "a restart":
            self.has["version"] = ""
        return {**self.has, "version": version}

    def draw(self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, seeds: Sequence[int]) -> list[Drawn]:
        self.drawn += 1
        if self.broken == "dies":
            raise RuntimeError("EngineCore died")
        found = Local(self.model, [0]).sample(prompts, n, sampling, seeds)
        drawn = [Drawn(prompt, list(own)) for prompt, own in zip(prompts, found, strict=True)]
        if self.broken == "one short":
            drawn[0].completions.pop()
        if self.broken == "nothing":
            drawn = [Drawn(one.prompt, [], "no completions in time") for one in drawn]
        if self.broken == "other numbers":
            for one in drawn:
                one.completions[:] = [c._replace(logp=[x - 0.25 for x in c.logp]) for c in one.completions]
        return drawn

    def close(self) -> None:
        pass


@pytest.fixture
def model_dir(tmp_path):
    return save_model(tmp_path / "model")


def run(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, fault: str | Engine, objective: Any = None) -> Any:
    sampler = Vllm(fault if isinstance(fault, Engine) else Engine(model, fault), VllmOptions())
    monkeypatch.setattr(online, "build_sampler", lambda *given: (sampler, "an engine of this test"))
    data = write_rows(folder / "prompts.jsonl", "prompts")
    (folder / "mine.py").write_text(REWARD)
    given = {"model": model, "data": data, "out": folder / "run", "reward": f"{folder / 'mine.py'}:says_answer"}
    return prefopt.train(objective=objective or GRPO(), **given, **FAST)


def updates(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if "loss" in line]


def test_an_engine_without_a_fault_serves_a_whole_run(model_dir, tmp_path, monkeypatch):
    run(model_dir, tmp_path, monkeypatch, "")
    assert len(updates(tmp_path)) == 4 and all(line["sampler_gap"] < 1e-5 for line in updates(tmp_path))


@pytest.mark.fault(28)
@pytest.mark.parametrize(
    ("fault", "said"),
    [("dies", "EngineCore died"), ("one short", "3 completions where 4"), ("nothing", "no completions in time")],
)
def test_an_engine_that_fails_ends_the_run_and_nothing_is_learnt_from_it(fault, said, model_dir, tmp_path, monkeypatch):
    with pytest.raises(EngineError, match=f"vLLM gave no completions for . prompts in 3 tries: .*{said}"):
        run(model_dir, tmp_path, monkeypatch, fault)
    assert [line["step"] for line in updates(tmp_path)] == [1, 2]
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.fault(29)
@pytest.mark.parametrize("fault", ["old weights", "half the weights", "a restart"])
def test_an_engine_with_other_weights_than_the_policys_ends_the_run_before_it_draws(
    fault, model_dir, tmp_path, monkeypatch
):
    said = "was it restarted" if fault == "a restart" else "it holds other values than the policy"
    engine = Engine(model_dir, fault)
    with pytest.raises(EngineError, match=said):
        run(model_dir, tmp_path, monkeypatch, engine)
    assert [line["step"] for line in updates(tmp_path)] == [1, 2] and engine.drawn == 2


@pytest.mark.fault(30)
def test_an_engine_that_counts_otherwise_is_measured_and_weighed(model_dir, tmp_path, monkeypatch):
    for name, objective in (("plain", GRPO()), ("weighed", GRPO(correction="token"))):
        (tmp_path / name).mkdir()
        run(model_dir, tmp_path / name, monkeypatch, "other numbers", objective)
        gaps = [line["sampler_gap"] for line in updates(tmp_path / name)]
        assert max(gaps[:2]) < 1e-5 and gaps[2:] == pytest.approx([0.25, 0.25], abs=1e-3)
    plain, weighed = (updates(tmp_path / name) for name in ("plain", "weighed"))
    assert weighed[1]["grad_norm"] == pytest.approx(plain[1]["grad_norm"], rel=1e-4)
    assert weighed[2]["grad_norm"] > 1.2 * plain[2]["grad_norm"]  # e^0.25 = 1.28 each
