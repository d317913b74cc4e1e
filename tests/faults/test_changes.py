"""Faults 31 and 32: what changed between two lives of a run is named, and the run refused or gone on with as asked."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import save_model, write_rows
from lives import arguments, prepare

import prefopt
from prefopt.objectives import IPO
from prefopt.recipes import train as recipe
from prefopt.recipes import updates
from prefopt.recipes.signals import EXIT_CODE
from prefopt.records import InputError

ASKED = {"save_minutes": None, "preflight": "off"}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def stopped(server, tmp_path_factory):
    """A folder with model, data, reward, and runs of DPO and GRPO that were stopped after three updates."""
    folder = tmp_path_factory.mktemp("changes")
    prepare(folder)
    for kind in ("dpo", "grpo"):
        code = server.run(kind, folder / kind, ASKED, signals=[("before update", 3, signal.SIGTERM)])
        assert code == EXIT_CODE, server.said
    return folder


@pytest.fixture
def folder(stopped, tmp_path, monkeypatch):
    """A copy of it that a test may change; paths are not compared."""
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(stopped, tmp_path / "all"))


@pytest.fixture
def nothing_loads(monkeypatch):
    def refuse(*given: Any, **named: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(recipe, "load_model", refuse)


def go_on(folder: Path, kind: str = "dpo", **changed: Any) -> dict[str, Any]:
    """Give the same command again, but for what changed; the summary."""
    return prefopt.train(**{**arguments(kind, folder), **ASKED, "out": folder / kind, **changed}).summary


def refused(folder: Path, kind: str = "dpo", **changed: Any) -> str:
    with pytest.raises(InputError, match="holds an unfinished run, at update 3, and this is not the same") as error:
        go_on(folder, kind, **changed)
    for remedy in ("--allow-inexact", "overwrite=true", "another out"):
        assert remedy in str(error.value)
    return str(error.value)


def differences(said: str) -> list[str]:
    return [line.strip() for line in said.splitlines() if line.startswith("  ")]


@pytest.mark.fault(31)
@pytest.mark.parametrize(
    ("changed", "lines"),
    [
        ({"learning_rate": 2e-2}, ["learning_rate: 0.01 then, 0.02 now"]),
        ({"batch_size": 8, "seed": 1}, ["batch_size: 4 then, 8 now", "seed: 0 then, 1 now"]),
        ({"lora_rank": 2}, ["lora_rank: 0 then, 2 now"]),
        ({"objective": prefopt.DPO(beta=0.2)}, ["beta: 0.1 then, 0.2 now"]),
        ({"eval_fraction": 0.5}, ["eval_fraction: 0.25 then, 0.5 now"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_changed_options_are_refused_with_what_they_were(changed, lines, folder, nothing_loads):
    assert differences(refused(folder, **changed)) == lines


@pytest.mark.fault(31)
def test_another_objective_is_refused(folder, nothing_loads):
    assert "objective: 'dpo' then, 'ipo' now" in differences(refused(folder, objective=IPO()))


@pytest.mark.fault(31)
def test_options_that_decide_nothing_may_change(folder):
    summary = go_on(folder, save_every=2, keep_checkpoints=1, save_async=False, max_failed_saves=1)
    assert summary["resumed_at"] == [3] and summary["inexact"] == []


@pytest.mark.fault(31)
def test_another_model_is_refused(folder):
    save_model(folder / "model", seed=1)
    (line,) = differences(refused(folder))
    assert line.startswith("model: ")


@pytest.mark.fault(31)
def test_another_reference_model_is_refused_and_named_where_that_is_allowed(folder, server):
    save_model(folder / "reference", seed=1)
    options = {**ASKED, "reference_model": str(folder / "reference")}
    stop = [("before update", 3, signal.SIGTERM)]
    out = folder / "referred"
    assert server.run("dpo", out, {**options, "model": str(folder / "model")}, signals=stop) == EXIT_CODE, server.said
    save_model(folder / "reference", seed=2)
    (line,) = differences(refused(folder, **options, out=out))
    assert line.startswith("reference_model: ")
    assert go_on(folder, **options, out=out, allow_inexact=True)["inexact"] == [line]


@pytest.mark.fault(31)
def test_other_versions_and_other_threads_are_refused(folder, nothing_loads, monkeypatch):
    now = str(torch.__version__)
    monkeypatch.setattr(torch, "__version__", "9.9")
    torch.set_num_threads(2)
    assert differences(refused(folder)) == ["threads: 1 then, 2 now", f"torch: '{now}' then, '9.9' now"]


@pytest.mark.fault(31)
def test_a_changed_reward_is_refused(folder, nothing_loads):
    with (folder / "reward.py").open("a") as file:
        file.write("# a comment, which might as well be code\n")
    (line,) = differences(refused(folder, "grpo"))
    assert "reward.py" in line


@pytest.mark.fault(32)
@pytest.mark.parametrize("change", ["append", "edit", "swap"])
def test_changed_rows_are_refused_before_the_model_is_loaded(change, folder, nothing_loads):
    path = folder / "pairs.jsonl"
    rows = path.read_text().splitlines()
    if change == "append":
        rows.append(rows[0])
    elif change == "edit":
        rows[5] = json.dumps({**json.loads(rows[5]), "chosen": " good cat"})
    else:
        rows[1], rows[2] = rows[2], rows[1]
    path.write_text("\n".join(rows) + "\n")
    lines = differences(refused(folder))
    assert lines and all(line.startswith(("data: ", "eval_data: ")) for line in lines)


@pytest.mark.fault(32)
def test_a_changed_column_that_only_the_reward_reads_is_refused(folder, nothing_loads):
    path = folder / "prompts.jsonl"
    path.write_text(path.read_text().replace('"answer": "good"', '"answer": "bad"'))
    lines = differences(refused(folder, "grpo"))
    assert lines and all(line.startswith(("data: ", "eval_data: ")) for line in lines)


@pytest.mark.fault(31, 32)
@pytest.mark.parametrize("what", ["data", "model"])
def test_a_refused_command_leaves_the_settings_that_resume_reads(what, folder):
    before = (folder / "dpo" / "config.yaml").read_text()
    (folder / "other").mkdir()
    other = save_model(folder / "other", seed=1) if what == "model" else folder / "other" / "pairs.jsonl"
    if what == "data":
        write_rows(other, "pairs", seed=1)
    refused(folder, **{what: other})
    assert (folder / "dpo" / "config.yaml").read_text() == before


@pytest.mark.fault(31, 32)
def test_allow_inexact_goes_on_and_the_summary_keeps_every_difference_of_every_life(folder, capsys):
    plain, taken = updates.run_loop, []

    def stop(*given: Any, **named: Any) -> None:
        between = named["between"]

        def also() -> None:
            taken.append(named["place"].step)
            signal.raise_signal(signal.SIGTERM)
            between()

        plain(*given, **{**named, "between": also})

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(updates, "run_loop", stop)
        go_on(folder, learning_rate=2e-2, allow_inexact=True)
    assert taken == [4]
    assert "not exactly, as asked:\n  learning_rate: 0.01 then, 0.02 now" in capsys.readouterr().err
    save_model(folder / "model", seed=1)
    summary = go_on(folder, learning_rate=2e-2, allow_inexact=True)
    first, second = summary["inexact"]
    said = capsys.readouterr().err
    assert f"resuming after update 4, not exactly, as asked:\n  {second}" in said and ", exactly" not in said
    assert first == "learning_rate: 0.01 then, 0.02 now" and second.startswith("model: ")
    assert summary["resumed_at"] == [3, 4]
    assert json.loads((folder / "dpo" / "summary.json").read_text())["inexact"] == [first, second]


@pytest.mark.fault(31)
def test_a_reward_by_another_name_goes_on_where_that_is_allowed(folder):
    text = (folder / "reward.py").read_text()
    (folder / "reward.py").write_text(text.replace("def says_answer", "def answers"))
    summary = go_on(folder, "grpo", reward=f"{folder / 'reward.py'}:answers", allow_inexact=True)
    assert list(summary["rewards"]) == ["answers"] and len(summary["inexact"]) == 3
