"""Fault 14: a loss that jumps or diverges in whole runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import save_model, write_rows
from safetensors.torch import load_file

import prefopt
from prefopt import loop
from prefopt.objectives import DPO, SFT
from prefopt.optimizer import Updater

FAST = {"batch_size": 4, "eval_fraction": 0.25, "learning_rate": 1e-3, "dtype": "float32", "preflight": "off"}
HEALTHY = 24  # updates: detectors compare with what came before


def found(folder: Path, objective: Any, name: str, **options: Any) -> list[dict[str, Any]]:
    """What the findings.jsonl of a run says of a name."""
    data = write_rows(folder / "rows.jsonl", objective.facts.data)
    model = save_model(folder / "model")
    prefopt.train(objective=objective, model=model, data=data, out=folder / "run", **FAST, **options)
    file = folder / "run" / "findings.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [line for line in lines if line["name"] == name]


def at_updates(monkeypatch: pytest.MonkeyPatch, change: Callable[[int, Any, Any], Any]) -> None:
    """`change` is asked for the settings of every update, given its number, the updater and the settings."""
    plain, seen = loop.update, [0]

    def update(models: Any, objective: Any, batch: Any, weight: float, updater: Any, budget: Any, step: Any) -> Any:
        seen[0] += 1
        return plain(models, objective, batch, weight, updater, budget, change(seen[0], updater, step))

    monkeypatch.setattr(loop, "update", update)


def scale(updater: Updater, times: float) -> Updater:
    """The updater, with gradients as of a batch whose loss is so many times larger."""
    for pair in updater.pairs:
        if pair.master.grad is not None:
            pair.master.grad.mul_(times)
    return updater


@pytest.mark.fault(14)
def test_a_learning_rate_that_is_too_high_from_an_update_on_is_reported_at_the_next_evaluation(tmp_path, monkeypatch):
    at_updates(monkeypatch, lambda number, updater, step: replace(step, learning_rate=1.0) if number > 6 else step)
    seen = found(tmp_path, DPO(), "drift", max_steps=10, eval_every=4)
    assert seen[0]["step"] == 8 and seen[0]["reason"].startswith("drift: the start model's own answers")


@pytest.mark.fault(14)
@pytest.mark.parametrize("times", [1, 100], ids=["healthy", "scaled"])
def test_gradients_that_jump_again_and_again_are_noted(times, tmp_path, monkeypatch):
    def scaled(number: int, updater: Any, step: Any) -> Any:
        plain = Updater.norm
        monkeypatch.setattr(updater, "norm", lambda: plain(scale(updater, times if number > HEALTHY else 1)))
        return step

    at_updates(monkeypatch, scaled)
    seen = found(tmp_path, SFT(), "gradients", max_steps=HEALTHY + 6)
    assert [one["since"] > HEALTHY for one in seen] == ([] if times == 1 else [True])
    clipped = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(bool(torch.isfinite(x).all()) for x in clipped.values())
