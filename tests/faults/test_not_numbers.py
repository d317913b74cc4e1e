"""Fault 13: weights or gradients that are not numbers in whole runs, and learning rates that make them so."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import save_model, write_rows
from safetensors.torch import load_file

import prefopt
from prefopt import cli, loop
from prefopt.checkpoint import read
from prefopt.checkpoint.commit import found
from prefopt.objectives import DPO, GRPO, SFT
from prefopt.preflight import PreflightError
from prefopt.recipes import results
from prefopt.records import InputError

FAST = {"batch_size": 8, "eval_fraction": 0.25, "learning_rate": 1e-2, "dtype": "float32"}


@pytest.fixture
def model_dir(tmp_path):
    return save_model(tmp_path / "model")


@pytest.fixture
def pairs(tmp_path):
    return write_rows(tmp_path / "pairs.jsonl", "pairs")


def run(model: Path, data: Path, out: Path, objective: Any = None, **options: Any) -> Any:
    return prefopt.train(objective=objective or DPO(), model=model, data=data, out=out, **{**FAST, **options})


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def poison(monkeypatch: pytest.MonkeyPatch, updates: set[int], what: str = "gradient") -> None:
    """One weight, or one gradient, is no number from an update on, or at some updates."""
    plain, seen = loop.update, [0]

    def update(models: Any, objective: Any, batch: Any, weight: float, updater: Any, *rest: Any) -> Any:
        seen[0] += 1
        pair = updater.pairs[0]
        if seen[0] in updates and what == "weight":
            with torch.no_grad():
                pair.master.view(-1)[0] = math.nan
        if seen[0] in updates and what == "gradient":
            step = updater.step

            def poisoned(*given: Any) -> Any:
                pair.master.grad.view(-1)[0] = math.inf
                return step(*given)

            monkeypatch.setattr(updater, "step", poisoned)
            done = plain(models, objective, batch, weight, updater, *rest)
            monkeypatch.setattr(updater, "step", step)
            return done
        return plain(models, objective, batch, weight, updater, *rest)

    monkeypatch.setattr(loop, "update", update)


@pytest.mark.fault(13)
def test_a_gradient_that_is_no_number_is_skipped_and_counted_and_the_run_goes_on(
    model_dir, pairs, tmp_path, monkeypatch
):
    poison(monkeypatch, {2, 4})
    result = run(model_dir, pairs, tmp_path / "run", max_steps=5, max_bad_steps=2)
    seen = [line for line in lines(tmp_path / "run") if "eval/loss" not in line]
    assert [(line["step"], line.get("skipped"), "loss" in line) for line in seen] == [
        *((1, None, True), (2, 1.0, False), (3, None, True), (4, 2.0, False), (5, None, True)),
    ]
    assert all(line["loss"] > 0 for line in seen if "loss" in line)
    assert result.summary["end"]["skipped"] == 2.0
    assert all(bool(torch.isfinite(x).all()) for x in load_file(result.model_dir / "model.safetensors").values())


@pytest.mark.fault(13)
@pytest.mark.parametrize("save_async", [False, True])
def test_a_weight_that_becomes_no_number_stops_the_run_and_is_in_no_checkpoint(
    save_async, model_dir, pairs, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    poison(monkeypatch, {3}, "weight")
    with pytest.raises(InputError, match=r"3 gradients in a row were not finite; lower learning_rate .* from update 2"):
        run(model_dir, pairs, out, max_steps=20, max_bad_steps=3, save_every=1, save_async=save_async)
    told = [line for line in lines(out) if line["step"] > 2]
    assert [(line["step"], line["skipped"]) for line in told] == [(3, 1.0), (4, 2.0), (5, 3.0)]
    assert [path.name for path in found(out / "checkpoints")] == ["step-00000001", "step-00000002"]
    for path in found(out / "checkpoints"):
        assert all(bool(torch.isfinite(x).all()) for x in read(path, "rank-0")["updater"]["masters"])
    assert not (out / "model").exists() and not (out / "summary.json").exists()


@pytest.mark.fault(13)
def test_a_weight_that_becomes_no_number_beside_the_rows_is_not_saved_as_the_result(model_dir, tmp_path, monkeypatch):
    """An embedding that no row reads: every loss and gradient is a number, and the model is broken all the same."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(model_dir)
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "red cat :", "chosen": " good", "rejected": " bad"}\n' * 8)
    poison(monkeypatch, {2}, "weight")  # the first weight is that of the first token of the first embedding, `</s>`
    with pytest.raises(InputError, match=r"the trained weights are no longer numbers \(the first: model.embed_tokens"):
        run(model_dir, data, tmp_path / "run", max_steps=3, eval_fraction=0.0)
    assert not (tmp_path / "run" / "model").exists() and not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.fault(13)
@pytest.mark.parametrize(
    ("objective", "options"),
    [(SFT(), {}), (DPO(), {"save_every": 1}), (DPO(), {"keep": "best", "eval_every": 1}), (GRPO(), {})],
    ids=["sft", "dpo with checkpoints", "dpo with the best", "grpo"],
)
def test_a_learning_rate_of_1e30_stops_with_advice_and_saves_nothing(objective, options, model_dir, tmp_path, capsys):
    shape, out = objective.facts.data, tmp_path / "run"
    data = write_rows(tmp_path / f"{shape}.jsonl", shape)
    online = ["--reward", "exact", "num_completions=4", "max_tokens=4"] if shape == "prompts" else []
    given = [f"{name}={value}" for name, value in {**FAST, "learning_rate": 1e30, "max_steps": 30, **options}.items()]
    words = ["--model", str(model_dir), "--data", str(data), "--out", str(out), *online, *given]
    assert cli.main(["train", objective.facts.name, *words]) == 2
    said = capsys.readouterr().err
    assert "lower learning_rate" in said and "Traceback" not in said
    seen = lines(out)
    if shape != "prompts":  # advantages of a group add up to 0, and so does the loss of a rollout's first update
        assert all(line["loss"] != 0 for line in seen if "loss" in line)
    if not options and shape != "prompts":  # nothing can be drawn from such weights, so nothing is skipped either
        assert [line["skipped"] for line in seen if "skipped" in line] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert not found(out / "checkpoints") and not (out / "model").exists() and not (out / "summary.json").exists()


@pytest.mark.fault(13)
def test_a_run_of_skipped_updates_alone_is_no_result(model_dir, pairs, tmp_path, monkeypatch):
    poison(monkeypatch, {1, 2, 3})
    with pytest.raises(InputError, match="none of 3 updates could be taken: no gradient was finite"):
        run(model_dir, pairs, tmp_path / "run", max_steps=3)
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.fault(13)
def test_the_best_weights_from_before_are_the_result_where_later_ones_broke(model_dir, pairs, tmp_path, monkeypatch):
    out = tmp_path / "run"
    plain, seen = results.save, []

    def save(actor: Any, tokenizer: Any, folder: Path, make_room: Any) -> Path:
        seen.append(all(bool(torch.isfinite(p).all()) for p in actor.model.parameters()))
        return plain(actor, tokenizer, folder, make_room)

    monkeypatch.setattr(results, "save", save)
    poison(monkeypatch, {4}, "weight")
    result = run(model_dir, pairs, out, max_steps=5, keep="best", eval_every=1)
    assert all(seen) and result.summary["best_step"] <= 3
    assert [line["eval/loss"] is None for line in lines(out) if "eval/loss" in line] == [False] * 4 + [True]
    assert all(bool(torch.isfinite(x).all()) for x in load_file(result.model_dir / "model.safetensors").values())


@pytest.mark.fault(13)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_holds_what_is_no_number_is_refused_before_the_first_update(value, model_dir, pairs, tmp_path):
    from safetensors.torch import save_file

    file = model_dir / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(PreflightError, match="log-probs are not finite"):
        run(model_dir, pairs, tmp_path / "run", max_steps=3)
    assert not (tmp_path / "run" / "model").exists()
