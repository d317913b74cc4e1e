"""`prefopt doctor` says what is found with its numbers, and writes recipes that run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_doctor_logs import HERE, own_run

from prefopt import cli, config
from prefopt.detectors import Finding
from prefopt.doctor.mend import check, mended
from prefopt.records import InputError

PATHS = {"model": "m", "data": "d", "out": "runs/x"}
RECIPE = "objective: dpo\nmodel: m\ndata: d\nout: runs/x\nbeta: 0.02\nlearning_rate: 1.0e-5\n"
DRIFT = [{"step": 0, "eval/probe_nll": 2.0}, {"step": 10, "eval/probe_nll": 2.1}, {"step": 20, "eval/probe_nll": 3.4}]


def finding(level: str = "sick", **more: object) -> Finding:
    values = {"change": {}, "before": {}, "recovered": None, **more}
    return Finding("drift", level, 1.0, 0.5, "it drifts", 1, 1, 1, "do this", evidence={}, **values)


def test_findings_are_said_with_value_threshold_steps_and_remedy(tmp_path, capsys):
    assert cli.main(["doctor", str(own_run(tmp_path / "run", DRIFT, RECIPE))]) == 0
    text = capsys.readouterr().out
    assert "findings: 1 info" in text and "[drift, step 20]" in text
    assert "measured  1.4, threshold 1" in text and "from 2.00 to 3.40" in text and "fine_at 10" in text
    assert "recipe    beta=0.1" in text


def test_a_healthy_run_is_called_healthy(tmp_path, capsys):
    assert cli.main(["doctor", str(HERE / "dpo_healthy")]) == 0
    assert "healthy: none of" in capsys.readouterr().out


def test_machines_get_json(tmp_path, capsys):
    assert cli.main(["doctor", str(HERE / "grpo_stalled"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["verdict"], found["source"], found["finished"]) == ("sick", "TRL", True)
    assert found["findings"][0]["name"] == "sparse_reward" and found["findings"][0]["since"] == 1


def test_the_recipe_that_mends_a_run_is_written_beside_its_own(tmp_path, capsys):
    folder = own_run(tmp_path / "run", DRIFT, RECIPE)
    assert cli.main(["doctor", str(folder), "--apply"]) == 0
    assert f"wrote {folder / 'fixed.yaml'}" in capsys.readouterr().err
    recipe = config.read_recipe(folder / "fixed.yaml")
    assert (recipe["beta"], recipe["out"], recipe["learning_rate"]) == (0.1, "runs/x-fixed", 1e-5)
    assert cli.main(["train", str(folder / "fixed.yaml"), "--print-config"]) == 0


def test_options_after_apply_go_first(tmp_path, capsys):
    folder = own_run(tmp_path / "run", DRIFT, RECIPE)
    assert cli.main(["doctor", str(folder), "--apply", "beta=0.7", "out=there"]) == 0
    recipe = config.read_recipe(folder / "fixed.yaml")
    assert recipe["beta"] == 0.7 and recipe["out"] == "there"


def test_orpo_from_a_base_model_is_mended_by_two_runs(tmp_path, capsys):
    rows = [
        {"step": step, "nll": 4 - 0.1 * step, "rewards/accuracies": 1.0, "epoch": step / 30, "loss": 1.0}
        for step in range(1, 31)
    ]
    recipe = "objective: orpo\nmodel: base\ndata: d\nout: runs/x\nodds_weight: 0.3\nlearning_rate: 5.0e-6\n"
    folder = own_run(tmp_path / "run", rows, recipe)
    assert cli.main(["doctor", str(folder), "--apply"]) == 0
    first, then = (config.read_recipe(folder / name) for name in ("fixed-first.yaml", "fixed.yaml"))
    assert (first["objective"], first["model"], first["out"]) == ("sft", "base", "runs/x-first")
    assert "learning_rate" not in first and "odds_weight" not in first
    assert (then["objective"], then["model"], then["odds_weight"]) == ("orpo", "runs/x-first/model", 0.3)
    assert check(first) == check(then) == []


def test_another_trainers_log_gives_a_recipe_to_be_completed(tmp_path, capsys):
    shutil.copy(HERE / "grpo_stalled" / "trainer_state.json", tmp_path)
    assert cli.main(["doctor", str(tmp_path), "--apply", "easier_data=easy.jsonl"]) == 0
    err = capsys.readouterr().err
    assert "--model DIR --data FILE`" in err
    recipe = config.read_recipe(tmp_path / "fixed.yaml")
    assert recipe == {"objective": "grpo", "easier_data": "easy.jsonl", "out": "run-fixed"}


def test_the_command_to_run_can_be_pasted_where_the_path_has_spaces(tmp_path, capsys):
    folder = own_run(tmp_path / "my run", DRIFT, RECIPE)
    assert cli.main(["doctor", str(folder), "--apply", "beta=0.3"]) == 0
    assert f"run `prefopt train '{folder}/fixed.yaml'`" in capsys.readouterr().err


def test_what_no_option_mends_says_what_to_give(tmp_path, capsys):
    shutil.copy(HERE / "grpo_stalled" / "trainer_state.json", tmp_path)
    assert cli.main(["doctor", str(tmp_path), "--apply"]) == 2
    assert "no option alone mends this" in capsys.readouterr().err and not (tmp_path / "fixed.yaml").exists()


def test_a_healthy_run_has_nothing_to_mend(capsys):
    assert cli.main(["doctor", str(HERE / "dpo_healthy"), "--apply"]) == 2
    assert "nothing to mend" in capsys.readouterr().err


def test_the_worst_finding_has_the_last_word_and_notes_none_beside_it():
    findings = [finding(change={"beta": 0.5}), finding("warn", change={"beta": 0.2, "epochs": 1.0})]
    notes = [finding("info", change={"max_length": 9}), finding(change={"beta": 0.9}, recovered=4)]
    [recipe] = mended("dpo", PATHS, [*findings, *notes], {})
    assert (recipe["beta"], recipe["epochs"]) == (0.5, 1.0) and "max_length" not in recipe
    [note] = mended("dpo", PATHS, notes, {})
    assert note["max_length"] == 9 and "beta" not in note


def test_another_objective_takes_none_of_the_old_ones_options():
    change = {"objective": "online_dpo", "reward": "math"}
    [recipe] = mended(
        "dpo", {**PATHS, "beta": 0.5, "learning_rate": 1e-4, "probe": 8, "seed": 3}, [finding(change=change)], {}
    )
    assert recipe == {
        "objective": "online_dpo",
        "model": "m",
        "data": "d",
        "seed": 3,
        "out": "runs/x-fixed",
        "reward": "math",
    }
    assert check(recipe) == []


def test_options_that_cannot_be_are_refused(tmp_path, capsys):
    folder = own_run(tmp_path / "run", DRIFT, RECIPE)
    assert cli.main(["doctor", str(folder), "--apply", "beta=much"]) == 2
    assert "expected a number" in capsys.readouterr().err and not (folder / "fixed.yaml").exists()
    assert cli.main(["doctor", str(folder), "--apply", "betta=0.1"]) == 2
    assert "did you mean beta" in capsys.readouterr().err and not (folder / "fixed.yaml").exists()
    assert cli.main(["doctor", str(folder), "beta=1"]) == 2
    assert "add --apply" in capsys.readouterr().err
    assert cli.main(["doctor"]) == 2


def test_a_finding_without_a_cure_is_refused_with_its_remedy():
    with pytest.raises(InputError, match="no option alone mends this: do this"):
        mended("dpo", PATHS, [finding()], {})


def test_doctor_needs_no_torch():
    import subprocess
    import sys

    code = "import sys, prefopt.commands.doctor; print('torch' in sys.modules, 'transformers' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert said.stdout.split() == ["False", "False"]


def test_a_name_that_no_file_can_have_is_one_line(capsys):
    assert cli.main(["doctor", "a" * 300 + ".jsonl"]) == 2
    assert "cannot be read: File name too long" in capsys.readouterr().err
