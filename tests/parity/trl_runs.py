"""Short runs of TRL's own trainers, healthy and not, whose logs `prefopt doctor` must judge rightly.

    python tests/parity/trl_runs.py tests/doctor/logs

writes their trainer_state.json there, as TRL and transformers do, in the environment of `make parity`. All is random
and tiny; what makes a run sick is in its rows or its reward, not in the numbers of its log.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # what the tests share, where this is run as a program

import datasets
from laws import VOCABULARY, llama
from peer import SETTINGS, trl, word_tokenizer
from transformers import TrainerCallback

GOOD = range(2, 15)  # words that a good answer has more of
MARK = "w2"  # the word that a surface pair's chosen answer ends with
STEPS = 60


def words(draw: random.Random, count: int, share: float) -> str:
    """So many words, of which `share` are good ones."""
    bad = range(15, VOCABULARY)
    return " ".join(f"w{draw.choice(GOOD if draw.random() < share else bad)}" for _ in range(count))


def honest(draw: random.Random) -> dict[str, str]:
    """Better answers have more good words, so that some pairs are clear and some are not."""
    return {
        "prompt": words(draw, 3, 0.5),
        "chosen": " " + words(draw, 6, 0.65),
        "rejected": " " + words(draw, 6, 0.35),
    }


def surface(draw: random.Random) -> dict[str, str]:
    """The same words in both; the chosen answer ends in one that says nothing."""
    said = words(draw, 5, 0.5)
    return {"prompt": words(draw, 3, 0.5), "chosen": f" {said} {MARK}", "rejected": f" {said} w20"}


def dpo(row: Callable[[random.Random], dict[str, str]], folder: Path, watch: Sequence[TrainerCallback] = ()) -> Any:
    """A DPO run on pairs like that; the trainer after it."""
    draw = random.Random(0)
    rows = [row(draw) for _ in range(16 * STEPS)]
    config = trl.DPOConfig(
        **{**SETTINGS, "max_grad_norm": 1.0},
        output_dir=str(folder),
        learning_rate=1e-2 if row is surface else 2e-3,
        per_device_train_batch_size=16,
        num_train_epochs=1,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=20,
        max_length=64,
        seed=0,
    )
    trainer = trl.DPOTrainer(
        model=llama(0),
        ref_model=llama(0),
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        eval_dataset=datasets.Dataset.from_list([row(draw) for _ in range(64)]),
        processing_class=word_tokenizer(),
        callbacks=list(watch),
    )
    trainer.train()
    return trainer


def never(completions: list[str], **columns: Any) -> list[float]:
    """A reward that is never earned."""
    return [0.0] * len(completions)


def grpo(folder: Path, watch: Sequence[TrainerCallback] = ()) -> Any:
    """A GRPO run on a task that no completion solves; the trainer after it."""
    draw = random.Random(0)
    config = trl.GRPOConfig(
        **{**SETTINGS, "max_grad_norm": 1.0},
        output_dir=str(folder),
        learning_rate=1e-3,
        per_device_train_batch_size=16,
        num_generations=4,
        max_completion_length=6,
        max_steps=30,
        logging_steps=1,
        seed=0,
    )
    trainer = trl.GRPOTrainer(
        model=llama(0),
        args=config,
        train_dataset=datasets.Dataset.from_list([{"prompt": words(draw, 3, 0.5)} for _ in range(120)]),
        reward_funcs=never,
        processing_class=word_tokenizer(),
        callbacks=list(watch),
    )
    trainer.train()
    return trainer


RUNS: dict[str, Callable[..., Any]] = {
    "dpo_healthy": lambda folder, watch=(): dpo(honest, folder, watch),
    "dpo_surface": lambda folder, watch=(): dpo(surface, folder, watch),
    "grpo_stalled": grpo,
}


def main(out: Path) -> None:
    for name, run in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            trainer = run(Path(folder))
        (out / name).mkdir(parents=True, exist_ok=True)
        trainer.state.save_to_json(str(out / name / "trainer_state.json"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
