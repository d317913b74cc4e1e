"""The watch in a trainer of transformers: told through the trainer's own callbacks, with metrics as TRL logs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import llama
from transformers import Trainer, TrainerCallback, TrainingArguments

from prefopt.detectors.sparse_reward import SparseReward
from prefopt.integrations.trl import Watch

STATES = Path(__file__).parent.parent / "doctor" / "logs"


class Replays(Trainer):  # type: ignore[misc]
    """A trainer that logs what a real run of TRL logged, update for update."""

    def __init__(self, history: list[dict[str, Any]], **options: Any) -> None:
        self.history = {row["step"]: row for row in history if "loss" in row}
        super().__init__(**options)

    def log(self, logs: dict[str, float], *others: Any) -> None:
        own = self.history.get(self.state.global_step, {}) if "loss" in logs else {}
        super().log({**logs, **own}, *others)


def replayed(name: str, out: Path, watch: Watch, steps: int = 60) -> Trainer:
    """A run of real updates on a tiny model whose log is that of a recorded run."""
    history = json.loads((STATES / name / "trainer_state.json").read_text())["log_history"]
    rows = [{"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor([1, 2, 3])} for _ in range(steps)]
    settings = {"report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    args = TrainingArguments(
        output_dir=str(out), max_steps=steps, per_device_train_batch_size=1, logging_strategy="steps", **settings
    )
    trainer = Replays(history, model=llama(0), args=args, train_dataset=rows, callbacks=[watch])
    trainer.train()
    return trainer


def test_it_is_a_callback_of_transformers():
    assert issubclass(Watch, TrainerCallback)


def test_a_stalled_run_is_said_once_and_kept(tmp_path):
    said: list[str] = []
    watch = Watch(say=said.append)
    trainer = replayed("grpo_stalled", tmp_path / "out", watch, steps=30)
    assert trainer.state.global_step == 30
    assert [line for line in said if "learning has stalled" in line] == said and len(said) == 1
    kept = [json.loads(line) for line in (tmp_path / "out" / "findings.jsonl").read_text().splitlines()]
    assert [one["name"] for one in kept if one["level"] != "info"] == ["sparse_reward"]
    assert watch.watch.run.objective == "grpo" and watch.watch.run.steps == 30


def test_a_sick_run_is_stopped_where_that_is_asked_for(tmp_path):
    watch = Watch(on_sick="stop", say=lambda text: None, out=tmp_path, watched=[SparseReward(window=20)])
    trainer = replayed("grpo_stalled", tmp_path / "out", watch, steps=30)
    assert trainer.state.global_step == watch.watch.sick().step == 20


def test_a_healthy_run_is_left_alone(tmp_path):
    said: list[str] = []
    trainer = replayed("dpo_healthy", tmp_path / "out", Watch(on_sick="stop", say=said.append))
    assert trainer.state.global_step == 60 and said == []


def test_pairs_told_apart_by_a_mark_are_a_warning(tmp_path):
    said: list[str] = []
    replayed("dpo_surface", tmp_path / "out", Watch(say=said.append))
    assert len(said) == 1 and "hollow margin, unverified" in said[0]


def test_a_loss_that_is_no_number_is_said_once(tmp_path):
    from transformers import TrainerControl, TrainerState

    said: list[str] = []
    watch = Watch(say=said.append, out=tmp_path)
    for step in range(1, 4):
        state = TrainerState(global_step=step, epoch=step / 9)
        watch.on_log(None, state, TrainerControl(), {"loss": float("nan"), "grad_norm": "nan", "learning_rate": 1e-5})
    assert len(said) == 1 and said[0].startswith("step 1: not finite: grad_norm and loss; ")


def test_what_it_does_is_one_of_two():
    with pytest.raises(ValueError, match="warn or stop"):
        Watch(on_sick="fix")  # type: ignore[arg-type]
