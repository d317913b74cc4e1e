"""Logs of prefopt, TRL, verl and OpenRLHF are read into one form; what is none is refused with what to give."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from prefopt.doctor import diagnose, read
from prefopt.records import InputError

HERE = Path(__file__).parent / "logs"


def write(path: Path, rows: list[dict[str, Any]], tail: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail, encoding="utf-8")
    return path


def own_run(folder: Path, rows: list[dict[str, Any]], recipe: str = "objective: dpo\nbeta: 0.1\n", **more: Any) -> Path:
    write(folder / "metrics.jsonl", rows, more.pop("tail", ""))
    (folder / "config.yaml").write_text(recipe, encoding="utf-8")
    if more:
        (folder / "summary.json").write_text(json.dumps(more), encoding="utf-8")
    return folder


# ---------------------------------------------------------------- ours


def test_a_run_of_ours_is_read_with_its_options(tmp_path):
    rows = [{"step": 0, "eval/loss": 0.69}, {"step": 1, "loss": 0.7, "reward/manners": None}]
    log = read(own_run(tmp_path / "run", rows, steps=9, data={"rows": 300}, learning_rate=1e-6))
    assert log.lines == [(0, {"eval/loss": 0.69}), (1, {"loss": 0.7})]
    assert (log.run.objective, log.run.options["beta"], log.run.steps, log.run.rows) == ("dpo", 0.1, 9, 300)
    assert log.run.options["learning_rate"] == 1e-6 and log.recipe == {"beta": 0.1} and log.finished


def test_a_run_that_goes_on_may_be_writing_its_last_line(tmp_path):
    log = read(own_run(tmp_path / "run", [{"step": 1, "loss": 0.7}], tail='{"step": 2, "lo'))
    assert len(log.lines) == 1 and "last line" in log.notes[0] and not log.finished


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    write(tmp_path / "metrics.jsonl", [{"step": 1}], 'oops\n{"step": 2}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: not JSON"):
        read(tmp_path)


def test_a_run_without_an_update_yet_says_so(tmp_path):
    with pytest.raises(InputError, match="holds no metrics yet"):
        read(own_run(tmp_path / "run", []))
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text("objective: dpo\n")
    with pytest.raises(InputError, match="no metrics yet"):
        read(tmp_path / "begun")


# ---------------------------------------------------------------- TRL


@pytest.mark.parametrize(
    ("name", "objective", "expected"),
    [
        ("dpo_healthy", "dpo", {}),
        ("dpo_surface", "dpo", {"hollow_margin": "warn"}),
        ("grpo_stalled", "grpo", {"sparse_reward": "sick"}),
    ],
)
def test_real_logs_of_trl_are_judged_rightly(name, objective, expected):
    """Made by tests/parity/trl_runs.py with TRL 1.16."""
    log = read(HERE / name)
    found = {one.name: one.level for one in diagnose(log).findings if one.lasts and one.level != "info"}
    assert found == expected
    assert log.run.source == "TRL" and log.run.objective == objective and log.finished


def test_the_newest_checkpoint_of_a_trainer_is_read(tmp_path):
    for step in (500, 1000):
        state = {"log_history": [{"step": step, "loss": 0.5, "rewards/margins": 0.1}], "max_steps": 2000}
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    log = read(tmp_path)
    assert log.last == 1000 and not log.finished
    assert read(tmp_path / "checkpoint-500" / "trainer_state.json").last == 500


def test_names_of_trl_become_ours(tmp_path):
    history = [
        {
            "step": 1,
            "completions/clipped_ratio": 0.25,
            "completions/mean_length": 40.0,
            "frac_reward_zero_std": 0.5,
            "clip_ratio/low_mean": 0.1,
            "kl": 0.3,
            "reward": 0.2,
        },
        {"step": 1, "eval_reward": 0.1, "eval_loss": 0.4},
    ]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (_, values), (_, evaluation) = read(tmp_path).lines
    assert values == {
        "finished": 0.75,
        "completion_length": 40.0,
        "zero_variance": 0.5,
        "clip_fraction/low": 0.1,
        "reward": 0.2,
    }
    assert evaluation == {"eval/reward": 0.1, "eval/loss": 0.4}


def states(*rows: dict[str, Any], **more: Any) -> str:
    return json.dumps({"log_history": list(rows), **more})


PAIR = {"rewards/margins": 0.1, "rewards/accuracies": 0.5, "logps/chosen": -9.0}


def test_a_run_whose_loss_is_no_number_is_not_called_healthy(tmp_path):
    rows = [{"step": step, "loss": 0.7 if step < 30 else float("nan"), **PAIR} for step in range(1, 51)]
    (tmp_path / "trainer_state.json").write_text(states(*rows, max_steps=50))
    found = diagnose(read(tmp_path))
    assert found.log.lost == "loss in 21 lines, first at step 30" and found.verdict == "warn"
    assert "not finite: loss" in found.text() and "healthy" not in found.text()
    rows = [{"step": n, "data": {**verl(n), "actor/grad_norm": float("inf") if n == 8 else 1.0}} for n in range(1, 9)]
    assert read(write(tmp_path / "verl.jsonl", rows)).lost == "grad_norm in 1 line, first at step 8"


def test_numbers_that_are_finite_again_say_that_the_weights_are_not_lost(tmp_path):
    """float16 begins with updates that overflow and are skipped; a held-out loss of no rows is NaN."""
    rows = [
        {"step": step, "loss": 0.7, "grad_norm": 1.0 if step > 2 else float("inf"), **PAIR} for step in range(1, 51)
    ]
    (tmp_path / "trainer_state.json").write_text(states(*rows, {"step": 50, "eval_loss": float("nan")}, max_steps=50))
    found = diagnose(read(tmp_path))
    assert (found.log.lost, found.verdict) == ("", "healthy")
    assert "note: not finite, and finite again since: grad_norm in 2 lines, first at step 1" in found.text()
    # a loss that is averaged over NaN can look well: the gradient tells
    for row in rows[20:]:
        row["grad_norm"] = float("nan")
    (tmp_path / "trainer_state.json").write_text(states(*rows, max_steps=50))
    found = diagnose(read(tmp_path))
    assert (found.log.lost, found.verdict) == ("grad_norm in 32 lines, first at step 1", "warn")


def test_what_cannot_be_judged_is_not_called_healthy(tmp_path):
    found = diagnose(read(write(tmp_path / "short.jsonl", [{"step": 1, "loss": 1.0, "epoch": 1, "entropy": 1}])))
    assert found.judged == [] and found.verdict is None
    assert "healthy" not in found.text() and "nothing in this log can be judged" in found.text()


def test_kto_of_trl_is_not_taken_for_dpo(tmp_path):
    row = {"loss": 0.5, "rewards/chosen": 0.1, "rewards/rejected": 0.0, "rewards/margins": 0.1, "kl": 0.2}
    (tmp_path / "trainer_state.json").write_text(states(*({"step": step, **row} for step in (1, 2))))
    assert read(tmp_path).run.objective is None


def test_a_state_with_values_of_other_types_is_read(tmp_path):
    odd = [7, {"step": "x", "loss": 1}, {"step": 1, "loss": 0.5, "rewards/margins": [1]}]
    (tmp_path / "trainer_state.json").write_text(states(*odd, max_steps="many", num_train_epochs="x"))
    log = read(tmp_path)
    assert (log.lines, log.run.steps, log.run.options) == ([(1, {"loss": 0.5})], None, {})
    assert diagnose(log).text()


def test_a_long_cell_of_a_table_is_read(tmp_path):
    (tmp_path / "log.csv").write_text("step,rewards/margins,config\n1,0.5," + "x" * 200_000 + "\n")
    assert read(tmp_path / "log.csv").lines == [(1, {"rewards/margins": 0.5})]


# ---------------------------------------------------------------- others


def verl(step: int) -> dict[str, float]:
    return {
        "critic/score/mean": 0.5,
        "critic/rewards/mean": 0.4,
        "actor/entropy": 1.0,
        "actor/pg_clipfrac": 0.6,
        "actor/grad_norm": 1.0,
        "response_length/mean": 100.0,
        "response_length/clip_ratio": 0.4,
        "training/global_step": step,
    }


def test_verls_file_logger_is_read(tmp_path):
    log = read(write(tmp_path / "verl.jsonl", [{"step": step, "data": verl(step)} for step in range(1, 21)]))
    assert log.run.source == "verl" and log.lines[0][1]["task_reward"] == 0.5 and log.lines[0][1]["finished"] == 0.6
    names = {finding.name: finding.level for finding in diagnose(log).findings}
    assert names == {"clipping": "warn", "truncation": "info"}


def test_an_export_as_csv_is_read(tmp_path):
    """As Weights & Biases exports a run's history: empty cells where a line lacks a metric."""
    path = tmp_path / "wandb.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["_step", "train/rewards/margins", "train/loss", "eval/loss", "_runtime"])
        writer.writeheader()
        writer.writerow({"_step": 10, "train/rewards/margins": 0.1, "train/loss": 0.65, "_runtime": 3})
        writer.writerow({"_step": 5, "eval/loss": 0.69})
    log = read(path)
    assert log.run.source == "TRL"
    assert log.lines == [(5, {"eval/loss": 0.69}), (10, {"rewards/margins": 0.1, "loss": 0.65})]


def test_openrlhf_is_read(tmp_path):
    rows = [
        {"train/global_step": step, "train/acc": 0.5, "train/chosen_reward": 0.2, "train/reject_reward": 0.1}
        for step in range(1, 101)
    ]
    log = read(write(tmp_path / "openrlhf.jsonl", rows))
    assert log.run.source == "OpenRLHF" and log.lines[0][1]["rewards/margins"] == pytest.approx(0.1)
    assert [finding.name for finding in diagnose(log).findings] == ["no_preference"]


def test_metrics_of_ours_are_known_without_their_recipe(tmp_path):
    log = read(write(tmp_path / "copied.jsonl", [{"step": 1, "loss": 0.7, "rewards/accuracies": 0.5, "tokens": 9}]))
    assert log.run.source == "prefopt" and len(log.lines) == 1


def test_tensorboard_events_are_read_or_it_is_said_what_is_missing(tmp_path):
    (tmp_path / "events.out.tfevents.1.machine").write_bytes(b"")
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        expected = "pip install tensorboard"
    else:
        expected = "is empty"
    with pytest.raises(InputError, match=expected):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("trainer_state.json", '{"log_history": [', "not a JSON object; a copy that was cut short"),
        ("trainer_state.json", "[1, 2]", "not a JSON object"),
        ("model.json", '{"weights": 1}', "has no log_history"),
        (
            "trainer_state.json",
            '{"log_history": [{"step": 1, "wer": 3}]}',
            r"none of its metrics is known \(step, wer\)",
        ),
        ("log.jsonl", '{"step": 1, "wer": 3}\n', r"none of its columns tells which trainer wrote it \(step, wer\)"),
        ("log.jsonl", '{"rewards/margins": 3}\n', "no column says the step"),
        ("log.jsonl", "", "is empty"),
        ("log.jsonl", "7\n", "expected an object of metrics, got 7"),
        ("log.csv", "a,b\n1,2\n", "none of its columns tells"),
        ("log.csv", "a\x1b[31m,b\n1,2\n", r"none of its columns tells .*\(a\\x1b\[31m, b\)"),  # no escape to the screen
        ("log.csv", "步,損失\n1,2\n", "none of its columns tells .*(損失, 步)"),
        ("log.txt", "step 1", "not a log that is known"),
        ("log.jsonl", "[" * 100_000 + "\n7\n", "log.jsonl:1: not JSON"),
        ("trainer_state.json", "[" * 100_000, "not a JSON object"),
    ],
)
def test_what_is_no_log_is_refused_with_what_to_give(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read(tmp_path / name)


def test_a_folder_without_a_log_and_a_path_that_is_none_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"no log of a run is there; expected metrics\.jsonl"):
        read(tmp_path)
    with pytest.raises(InputError, match="no such file or folder"):
        read(tmp_path / "gone")
