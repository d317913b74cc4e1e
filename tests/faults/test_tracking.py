"""Fault 37: tracking services that fail, hang and work, and a run that ends as if there were none."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from laws import save_model, write_rows

import prefopt
from prefopt.recipes import trackers

SERVICES = """\
import json, time


def failing(step, metrics):
    raise ConnectionError("the service is down")


def hanging(step, metrics):
    time.sleep(60)


def working(step, metrics):
    with open(__file__ + ".seen", "a") as file:
        file.write(json.dumps({"step": step, **metrics}) + "\\n")
"""


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def untimed(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in found]


@pytest.mark.fault(37)
def test_a_run_neither_waits_for_its_trackers_nor_ends_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "LAST", 0.5)
    services = tmp_path / "services.py"
    services.write_text(SERVICES)
    model, data = save_model(tmp_path / "model"), write_rows(tmp_path / "pairs.jsonl", "pairs")

    def run(name: str, **options: Any) -> Path:
        given = {"batch_size": 8, "max_steps": 4, "eval_fraction": 0.25, "dtype": "float32", **options}
        prefopt.train(objective=prefopt.DPO(), model=model, data=data, out=tmp_path / name, **given)
        return tmp_path / name

    alone = run("alone")
    began = time.monotonic()
    tracked = run("tracked", track=[f"{services}:{name}" for name in ("failing", "hanging", "working")])
    assert time.monotonic() - began < 30  # one call of the hanging service alone takes 60
    said = capsys.readouterr().err
    found = lines(tracked / "metrics.jsonl")
    assert untimed(found) == untimed(lines(alone / "metrics.jsonl"))
    assert lines(Path(f"{services}.seen")) == found
    assert said.count("the service is down); training goes on") == 1
    for name in ("failing", "hanging"):
        assert f"{name} did not get {len(found)} of {len(found)} lines" in said
    assert "working did not" not in said
    assert (alone / "model/model.safetensors").read_bytes() == (tracked / "model/model.safetensors").read_bytes()


def test_only_the_first_process_tracks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefopt import ranks
    from prefopt.recipes import journal

    settings = {"objective": prefopt.DPO(), "run": prefopt.recipes.train.RunOptions("m", "d", "o", track="nowhere")}
    monkeypatch.setattr(ranks, "is_main", lambda: False)
    assert journal.Journal(tmp_path, settings).trackers.senders == []
