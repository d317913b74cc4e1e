"""TRL's online trainers beside prefopt's objectives: the same completions, rewards and weights.

TRL's trainer is built as its users build it. Where it would generate it is given completions, with the log-probs that a
sampler would have told; its own scoring, advantages, reference, corrections and loss run unchanged. Several updates of
a rollout are one loss after the policy has moved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from laws import Seen, llama, one_update
from peer import END, POLICY, REFERENCE, SETTINGS, Ours, Said, distance, examples, text, trl, word_tokenizer
from torch import Tensor

from prefopt.batch import Batch
from prefopt.loop import Models
from prefopt.models.policy import Policy
from prefopt.records import Example

LONGEST = 12  # what both take for the longest completion that may be drawn
REWARDS = [(1.0, 0.0, 0.25, 3.0), (0.5, 0.5, 0.5, 0.0), (-1.0, 2.0, 0.0, 0.3)]
ROWS = examples(REWARDS, seed=4)


def with_scores(rows: Sequence[Example], scores: Sequence[Sequence[float]]) -> list[Example]:
    return [replace(row, scores=list(own)) for row, own in zip(rows, scores, strict=True)]


def cut_off(row: Example, place: int) -> Example:
    """The row with one completion that has no end: as long as was allowed."""
    completions = [[t if t != END else 2 for t in c] if n == place else c for n, c in enumerate(row.completions)]
    return replace(row, completions=completions)


def told(rows: Sequence[Example], seed: int = 8) -> list[list[float]]:
    """Log-probs that a sampler says of every completion: the policy's own, and some noise."""
    batch = Batch.of(rows)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        logp = Policy(llama(POLICY))(batch).logp
    logp = logp + 0.5 * torch.randn(len(logp), generator=draw)
    return [own.tolist() for own in logp.split(batch.completions.lengths.tolist())]


def move(model: Any) -> Any:
    """The model after some updates: its weights, elsewhere."""
    draw = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.03 * torch.randn(p.shape, generator=draw))
    return model


# ---------------------------------------------------------------- TRL's side


@dataclass
class OnlinePeer:
    """A trainer of TRL that was given completions; inputs: what it made of them."""

    trainer: Any
    inputs: Any

    def said(self) -> Said:
        """TRL's loss and gradient of the completions as one batch."""
        model = self.trainer.model
        model.zero_grad()
        loss = self.trainer.compute_loss(model, self.inputs)
        loss.backward()
        return Said(loss.item(), torch.cat([gradient(p) for p in model.parameters()]))

    def logged(self, name: str) -> float:
        return float(self.trainer._metrics["train"][name][-1])


def gradient(p: torch.nn.Parameter) -> Tensor:
    return (torch.zeros_like(p) if p.grad is None else p.grad).flatten().clone()


def peer(
    kind: str,
    rows: Sequence[Example],
    folder: Path,
    moved: bool = False,
    sampler: Sequence[Sequence[float]] | None = None,
    **options: Any,
) -> OnlinePeer:
    """GRPO or RLOO of TRL on these completions. moved: the policy has been updated since they were drawn. sampler: the
    log-probs that an engine beside the trainer told.
    """
    trainer = build(kind, rows, folder, num_iterations=2 if moved else 1, **options)
    give(trainer, kind, rows, sampler)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    size = len(rows[0].completions)
    inputs = trainer._prepare_inputs([{"prompt": text(row.prompt)} for row in rows for _ in range(size)])
    if moved:
        move(trainer.model)
    return OnlinePeer(trainer, inputs)


def build(kind: str, rows: Sequence[Example], folder: Path, **options: Any) -> Any:
    completions = [completion for row in rows for completion in row.completions]
    scores = [score for row in rows for score in row.scores]

    def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
        assert completion_ids == completions
        return [None if math.isnan(score) else score for score in scores]

    model = llama(POLICY)
    if options.get("beta"):
        llama(REFERENCE).save_pretrained(folder / "reference")
        model.config._name_or_path = str(folder / "reference")  # where TRL looks for its reference
    settings = {
        **SETTINGS,
        "output_dir": str(folder),
        "per_device_train_batch_size": len(completions),
        "num_generations": len(rows[0].completions),
        "max_completion_length": LONGEST,
        **options,
    }
    settings.pop("train_sampling_strategy")
    return getattr(trl, f"{kind}Trainer")(
        model=model,
        reward_funcs=reward,
        args=getattr(trl, f"{kind}Config")(**settings),
        train_dataset=datasets.Dataset.from_list([{"prompt": text(row.prompt)} for row in rows]),
        processing_class=word_tokenizer(),
    )


def give(trainer: Any, kind: str, rows: Sequence[Example], sampler: Sequence[Sequence[float]] | None) -> None:
    """The rows' completions in place of generated ones. AssertionError where TRL's prompts are others."""
    completions = [completion for row in rows for completion in row.completions]
    prompts = [row.prompt for row in rows for _ in row.completions]
    trained = [[int(flag) for flag in flags] for row in rows for flags in row.trained]

    def generate(prompt_ids: list[list[int]], *_: Any) -> Any:
        assert prompt_ids == prompts
        return (completions, None) if kind == "GRPO" else completions

    def roll_out(*_: Any) -> dict[str, Any]:
        said = {"prompt_ids": prompts, "completion_ids": completions, "logprobs": sampler}
        return said if all(map(all, trained)) else said | {"env_mask": trained}

    trainer._generate_single_turn = generate
    if kind == "GRPO" and (sampler is not None or not all(map(all, trained))):
        trainer.rollout_func = roll_out
    if sampler is not None:  # as with an engine whose weights are those of the trainer
        trainer.use_vllm, trainer._last_loaded_step = True, trainer.state.global_step


# ---------------------------------------------------------------- prefopt's side


@dataclass(frozen=True)
class Drawn:
    """An objective whose constants are of the policy that drew the completions, not of the one that has moved since."""

    objective: Any
    models: Models

    def count(self, batch: Batch) -> Tensor:
        return self.objective.count(batch)

    def targets(self, batch: Batch, models: Any) -> Any:
        return self.objective.targets(batch, self.models)

    def loss(self, batch: Batch, out: Any, targets: Any) -> Any:
        return self.objective.loss(batch, out, targets)


def seen(
    objective: Any,
    rows: Sequence[Example],
    moved: bool = False,
    sampler: Sequence[Sequence[float]] | None = None,
    tokens: int = 10**9,
    temperature: float = 1.0,
) -> Seen:
    """One update of prefopt's loop on the same completions."""
    batch = Batch.of(rows)
    drawn = replace(Ours().models, policy=Policy(llama(POLICY), temperature=temperature))
    if sampler is not None:
        batch = replace(batch, rollout_logp=torch.tensor([logp for own in sampler for logp in own]))
    if not moved:
        return one_update(objective, batch, drawn, tokens)
    since = replace(drawn, policy=Policy(move(llama(POLICY)), temperature=temperature))
    return one_update(Drawn(objective, replace(drawn, several=True)), batch, since, tokens)


def ours(objective: Any, rows: Sequence[Example], **how: Any) -> Said:
    """Loss and gradient of that update."""
    update = seen(objective, rows, **how)
    return Said(update.metrics["loss"], update.gradient)


def total(passes: Sequence[Said]) -> Said:
    """The sum of what forward passes say."""
    found = passes[0]
    for said in passes[1:]:
        found = found + said
    return found


def assert_differ_in_gradient(ours: Said, theirs: Said) -> None:
    """As `assert_differ`, where the losses are 0 or equal because the ratios are 1."""
    gap = distance(ours, theirs)[1]
    assert gap > 1e-3, f"no difference: gradients {gap:.1e} apart"
