"""Faults 15 to 18, 22 and 26 in whole runs: rewards that raise, hang, lie, die or are not there."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fake_server import closed_port
from laws import save_model, write_rows

import prefopt
from prefopt import cli
from prefopt.objectives import GRPO
from prefopt.recipes import train as recipe
from prefopt.records import InputError

FAST = {
    "batch_size": 4,
    "max_steps": 3,
    "num_completions": 4,
    "max_tokens": 4,
    "learning_rate": 1e-2,
    "eval_fraction": 0.0,
    "dtype": "float32",
    "save_completions": None,
}


@pytest.fixture
def model_dir(tmp_path):
    return save_model(tmp_path / "model")


@pytest.fixture
def prompts(tmp_path):
    return write_rows(tmp_path / "prompts.jsonl", "prompts")


def run(model: Path, data: Path, out: Path, reward: Any, **options: Any) -> Any:
    return prefopt.train(objective=GRPO(), model=model, data=data, out=out, reward=reward, **{**FAST, **options})


def lines(out: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name).read_text(encoding="utf-8").splitlines()]


def untimed(out: Path) -> list[dict[str, Any]]:
    timed = ("tokens_per_second", "seconds/")
    return [{name: x for name, x in line.items() if not name.startswith(timed)} for line in lines(out)]


def mine(folder: Path, body: str) -> str:
    """A reward in a file: `values` are right ones, `rollout` counts from 1, `spoil` says what it gives in a rollout."""
    text = f"""\
import os, signal, time
from pathlib import Path
rollout = 0

def mine(completions, answer, **columns):
    global rollout
    rollout += len(completions) == 16
    values = [said.split().count(word) / 4 for said, word in zip(completions, answer, strict=True)]
{body}
    return values
"""
    (folder / "mine.py").write_text(text, encoding="utf-8")
    return f"{folder / 'mine.py'}:mine"


SPOILT = {
    "NaN": "[float('nan')] * len(values)",
    "text": "['very good'] * len(values)",
    "too few": "values[:-1]",
    "none": "[None] * len(values)",
    "an exception": "1 / 0",
}


@pytest.mark.fault(15, 17)
@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_rollout_without_any_score_is_left_out_loudly_and_the_run_goes_on(
    spoilt, model_dir, prompts, tmp_path, capsys
):
    reward = mine(tmp_path, f"    if rollout == 2:\n        return {SPOILT[spoilt]}")
    out = tmp_path / "run"
    result = run(model_dir, prompts, out, reward, reward_failures=1.0)
    said = capsys.readouterr().err
    assert said.count("has a score, so nothing is learnt from it") == 1
    assert "no completion of rollout 2 has a score, so nothing is learnt from it: " in said
    steps = [line for line in lines(out) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    kept = [row["reward"] for row in lines(out, "completions.jsonl")]
    assert len(kept) == 48 and None not in kept
    for number, line in enumerate(steps):
        assert line["reward"] == pytest.approx(sum(kept[16 * number : 16 * (number + 1)]) / 16)
    counts = result.summary["rewards"]["mine"]
    assert counts.pop("scored") == 48 and sum(counts.values()) == 16


@pytest.mark.fault(15, 17)
@pytest.mark.parametrize("spoilt", ["NaN", "an exception"])
def test_a_reward_that_mostly_fails_stops_the_run_with_the_first_failure(spoilt, model_dir, prompts, tmp_path, capsys):
    reward = mine(tmp_path, f"    if rollout == 2:\n        return {SPOILT[spoilt]}")
    words = [f"{name}={'null' if value is None else value}" for name, value in FAST.items()]
    given = ["--model", str(model_dir), "--data", str(prompts), "--out", str(tmp_path / "run"), "--reward", reward]
    assert cli.main(["train", "grpo", *given, *words]) == 2
    said = capsys.readouterr().err
    assert "error: reward: 16 of 16 samples could not be scored, more than reward_failures=0.5 allows" in said
    assert "completion: " in said and ("ZeroDivisionError" in said) == (spoilt == "an exception")
    assert [line["step"] for line in lines(tmp_path / "run") if "loss" in line] == [1]


@pytest.mark.fault(17)
def test_samples_whose_score_is_no_number_take_no_part_and_are_never_0(model_dir, prompts, tmp_path):
    body = """\
    spoilt = [float("nan"), float("inf"), -float("inf"), "0.5"]
    values = [spoilt[n // 4] if n % 4 == 0 else value for n, value in enumerate(values)]"""
    result = run(model_dir, prompts, tmp_path / "run", mine(tmp_path, body))
    rows = lines(tmp_path / "run", "completions.jsonl")
    assert [row["reward"] is None for row in rows] == [True, False, False, False] * 12
    known = [row["reward"] for row in rows[:16] if row["reward"] is not None]
    first = next(line for line in lines(tmp_path / "run") if "loss" in line)
    assert first["reward"] == pytest.approx(sum(known) / 12)
    assert result.summary["rewards"]["mine"] == {"scored": 36, "value": 12}


@pytest.mark.fault(16)
def test_a_reward_that_hangs_is_killed_and_the_run_goes_on(model_dir, prompts, tmp_path, capsys):
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    prompts.write_text("\n".join(json.dumps({**row, "number": n}) for n, row in enumerate(rows)))
    note = tmp_path / "hangs"  # the rows that the first rollout after the first update drew
    body = f"""\
    note = Path({str(note)!r})
    if columns["trainer_state"].global_step == 1 and not note.exists():
        note.write_text(" ".join(map(str, columns["number"])))
    while note.exists() and str(columns["number"][0]) in note.read_text().split():
        pass"""
    result = run(model_dir, prompts, tmp_path / "run", mine(tmp_path, body), reward_deadline=1.0, reward_failures=1.0)
    assert [line["step"] for line in lines(tmp_path / "run") if "loss" in line] == [1, 2, 3]
    assert "of rollout 2 has a score" in capsys.readouterr().err
    assert result.summary["rewards"]["mine"] == {"scored": 48, "deadline": 16}


@pytest.mark.fault(18)
def test_rewards_that_are_all_the_same_are_counted_and_teach_nothing(model_dir, prompts, tmp_path):
    from laws import largest_difference, weights
    from transformers import AutoModelForCausalLM

    result = run(model_dir, prompts, tmp_path / "run", mine(tmp_path, "    values = [0.0] * len(values)"))
    steps = [line for line in lines(tmp_path / "run") if "loss" in line]
    assert [line["zero_variance/failed"] for line in steps] == [1.0] * 3
    assert [line["grad_norm"] for line in steps] == [0.0] * 3
    ends = [weights(AutoModelForCausalLM.from_pretrained(folder)) for folder in (model_dir, result.model_dir)]
    assert largest_difference(*ends) == 0


@pytest.mark.fault(22)
@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}/v1", "http://no-such-host.invalid:8000/v1"])
def test_a_judge_that_is_down_is_said_with_its_address_before_any_weights_are_read(
    url, model_dir, prompts, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(recipe, "load_model", lambda *given: pytest.fail("weights were read"))
    url = url.format(port=closed_port())
    words = [f"{name}={'null' if value is None else value}" for name, value in FAST.items()]
    given = ["--model", str(model_dir), "--data", str(prompts), "--out", str(tmp_path / "run"), "--reward", "judge"]
    assert cli.main(["train", "grpo", *given, *words, f"judge_url={url}", "judge_model=wise"]) == 2
    said = capsys.readouterr().err
    assert "error: the judge does not answer: " in said and url in said and "start it, or change judge_url" in said


def kill_the_worker(note: Path, times: int) -> threading.Thread:
    """A thread that sends SIGKILL to the process that writes its number to `note`, as the system does for memory."""

    def work() -> None:
        for _ in range(times):
            until = time.monotonic() + 60
            while not note.exists() or not note.read_text().isdigit():
                if time.monotonic() > until:
                    return
                time.sleep(0.005)
            pid = int(note.read_text())
            note.unlink()
            os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


@pytest.mark.fault(26)
@pytest.mark.parametrize("options", [{}, {"reward_workers": 2}], ids=str)
def test_a_reward_killed_while_it_works_scores_again_and_the_run_ends_the_same(options, model_dir, prompts, tmp_path):
    note = tmp_path / "working"
    body = f"""\
    killed = Path({str(tmp_path / "killed")!r})
    if columns["trainer_state"].global_step == 1 and not killed.exists():
        killed.touch()
        Path({str(note)!r}).write_text(str(os.getpid()))
        time.sleep(60)"""
    reward = mine(tmp_path, body)
    thread = kill_the_worker(note, 1)
    began = time.monotonic()
    killed = run(model_dir, prompts, tmp_path / "killed-run", reward, **options)
    assert time.monotonic() - began < 50  # noticed at once, not at the reward's deadline
    thread.join()
    whole = run(model_dir, prompts, tmp_path / "whole-run", reward, **options)
    assert untimed(tmp_path / "killed-run") == untimed(tmp_path / "whole-run")
    assert killed.summary["rewards"] == whole.summary["rewards"] == {"mine": {"scored": 48}}
    ends = [(result.model_dir / "model.safetensors").read_bytes() for result in (killed, whole)]
    assert ends[0] == ends[1]


@pytest.mark.fault(26)
def test_a_reward_that_is_killed_every_time_stops_the_run_and_says_so(model_dir, prompts, tmp_path):
    body = '    if columns["trainer_state"].global_step == 1:\n        os.kill(os.getpid(), signal.SIGKILL)'
    with pytest.raises(InputError, match="4 x mine: its process was ended by SIGKILL"):
        run(model_dir, prompts, tmp_path / "run", mine(tmp_path, body), batch_size=2, num_completions=2)
