"""experiments/objectives on a small scale: what it keeps, leaves out and writes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from prefopt import bench
from prefopt.objectives import EVERY

SCRIPT = Path(__file__).resolve().parents[2] / "experiments/objectives/run.py"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, with few rows."""
    spec = importlib.util.spec_from_file_location("offline_experiment", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROWS", dict.fromkeys(module.ROWS, 200))
    return module


def test_every_objective_has_a_method(offline: Any) -> None:
    assert EVERY.keys() <= {method.objective for method in offline.METHODS.values()}


@pytest.mark.parametrize("name", ["dpo", "reward"])
def test_a_run_is_measured_and_kept_until_a_setting_changes(name: str, offline: Any, tmp_path: Path) -> None:
    task = offline.Task(name, 0.5, 0, steps=3)
    found = offline.perform(task)
    assert found["gold"] <= found["best"] and found["kl"] > 0
    assert found["scaled"].keys() == found["along"].keys() == {"0.5", "1.0", "2.0"}
    assert found["scaled"]["1.0"] <= 1
    path = task.path(tmp_path)
    path.write_text(json.dumps(found), encoding="utf-8")
    assert offline.kept(task, tmp_path)["gold"] == found["gold"]
    offline.ROWS["pairs"] = 201
    assert offline.kept(task, tmp_path) is None
    path.write_text("{", encoding="utf-8")
    assert offline.kept(task, tmp_path) is None


def test_what_cannot_run_is_left_out_with_the_reason(offline: Any) -> None:
    offline.METHODS["odd"] = offline.Method("dpo", "reference", {"no_such_option": 1})
    offline.METHODS["absent"] = offline.Method("nothing", "reference")
    able, missing = offline.usable(["dpo", "odd", "absent"])
    assert able == ["dpo"] and "no_such_option" in missing["odd"] and "nothing" in missing["absent"]


def test_efficiency_at_a_distance_that_a_run_passes(offline: Any, small: bench.World) -> None:
    """Gold 0.6 at KL 0.36 and 0.8 at 0.64: at 0.49 halfway in the root of the distance, 0.7; passed again at 0.5."""
    points = [(0, 0.0, 0.0), (20, 0.36, 0.6), (40, 0.64, 0.8), (60, 0.36, 0.2)]
    assert offline.along(small, points, 0.49) == pytest.approx(0.7 / bench.best_at(small, 0.49))
    assert offline.along(small, points, 2.0) is None


def test_the_right_direction_scaled_is_on_the_frontier(offline: Any, small: bench.World) -> None:
    assert offline.scaled(small, 0.1 * small.gold, 1.0) == pytest.approx(1.0, abs=1e-9)
    assert offline.scaled(small, -small.gold, 1.0) < 0
    assert offline.scaled(small, torch.zeros_like(small.gold), 1.0) is None


def test_the_table_has_a_row_for_each_method_and_says_how_many_runs_came_far_enough(offline: Any) -> None:
    def result(seed: int, far: float | None) -> dict[str, Any]:
        numbers = dict.fromkeys(("kl", "efficiency", "regret", "forward_kl", "entropy"), 0.5 + 0.01 * seed)
        along = {"0.5": 0.7 + 0.01 * seed, "1.0": 0.6 + 0.01 * seed, "2.0": far}
        return {"settings": {"seed": seed}, "gold": 1.0 + 0.1 * seed, **numbers, "along": along, "scaled": along}

    found = {offline.Task("dpo", 0.5, seed): result(seed, None if seed else 0.9) for seed in range(4)}
    made = offline.report(found, {"dpo": 0.5}, {"odd": "why"})
    row = offline.table(made["methods"], {"dpo": 0.5}).splitlines()[2]
    assert row.startswith("| dpo | beta 0.5 | 1.15 [1.0") and "0.90 (1)" in row
    assert made["missing"] == {"odd": "why"} and made["methods"]["dpo"]["seeds"] == [0, 1, 2, 3]
