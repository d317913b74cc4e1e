"""TRL's own trainers beside prefopt's loop: the same token ids, the same weights, loss and gradient of every row.

A trainer of TRL is built as its users build it, from rows of text and a configuration; its dataset preparation,
collator and `compute_loss` run unchanged. prefopt runs its own update on the same rows as `Example`s.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from laws import VOCABULARY, flat_gradient, llama, one_update
from torch import Tensor
from transformers import LlamaForSequenceClassification, TrainerCallback

from prefopt.batch import Batch
from prefopt.loop import Models
from prefopt.models.policy import Policy
from prefopt.objectives.facts import extras
from prefopt.records import Example

trl = pytest.importorskip("trl", reason="parity needs TRL 1.16: make parity")
if not trl.__version__.startswith("1.16."):
    pytest.skip(f"parity is with TRL 1.16, found {trl.__version__}: make parity", allow_module_level=True)

TOLERANCE = 1e-5  # of the loss, and of the gradient's norm; both sides compute in float32
POLICY, REFERENCE = 0, 1  # seeds of two models that are far from each other
END, PADDING = 0, 1
datasets.disable_progress_bars()


# ---------------------------------------------------------------- rows: token ids, and the text that has them


def word_tokenizer() -> Any:
    """A tokenizer whose token number i is the word `w<i>`, so that any token ids but 1, padding, can be text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"</s>": END, "<pad>": PADDING} | {f"w{i}": i for i in range(2, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


def text(tokens: Sequence[int]) -> str:
    """The words of token ids, without the end of text: every trainer of TRL adds that itself."""
    return "".join(f" w{token}" for token in tokens if token != END)


def examples(scores: Sequence[tuple[float, ...]], seed: int = 0, prompt: int | None = None) -> list[Example]:
    """Random rows of unequal length, one for each tuple of scores; prompt: the length of every prompt."""
    draw = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(2, VOCABULARY) for _ in range(count)]

    made = []
    for number, own in enumerate(scores):
        completions = [[*tokens(draw.randint(1, 9)), END] for _ in own]
        trained = [[True] * len(completion) for completion in completions]
        asked = tokens(prompt or draw.randint(1, 8))
        made.append(Example(asked, completions, list(own), trained, f"row {number}"))
    return made


def pairs(num: int = 5, **options: Any) -> list[Example]:
    """Rows with a better and a worse completion; the worse one comes first in every other."""
    return examples([(1.0, 0.0) if number % 2 else (0.0, 1.0) for number in range(num)], **options)


def chosen(example: Example) -> list[int]:
    return example.completions[0 if example.scores[0] > example.scores[1] else 1]


def rejected(example: Example) -> list[int]:
    return example.completions[1 if example.scores[0] > example.scores[1] else 0]


def pair_row(example: Example) -> dict[str, Any]:
    sides = {"chosen": text(chosen(example)), "rejected": text(rejected(example))}
    return {"prompt": text(example.prompt), **sides}


def completion_row(example: Example) -> dict[str, Any]:
    return {"prompt": text(example.prompt), "completion": text(example.completions[0])}


def label_row(example: Example) -> dict[str, Any]:
    return completion_row(example) | {"label": example.scores[0] > 0}


def demonstration(prompt: list[int], completion: list[int]) -> Example:
    return Example(prompt, [completion], [1.0], [[True] * len(completion)])


def as_demonstrations(rows: Sequence[Example]) -> list[Example]:
    """The chosen completions of pairs."""
    return [demonstration(example.prompt, chosen(example)) for example in rows]


def with_prompt(rows: Sequence[Example]) -> list[Example]:
    """The chosen completions of pairs with their prompts, all tokens but the first, as completions."""
    return [demonstration(example.prompt[:1], example.prompt[1:] + chosen(example)) for example in rows]


# ---------------------------------------------------------------- what both say


@dataclass(frozen=True)
class Said:
    """loss [] and gradient [parameters] of one batch."""

    loss: float
    gradient: Tensor

    def __sub__(self, other: Said) -> Said:
        return Said(self.loss - other.loss, self.gradient - other.gradient)

    def __add__(self, other: Said) -> Said:
        return Said(self.loss + other.loss, self.gradient + other.gradient)

    def times(self, factor: float) -> Said:
        return Said(self.loss * factor, self.gradient * factor)


def mean_of(passes: Sequence[Said]) -> Said:
    """The mean of forward passes, each of which is a mean already."""
    total = passes[0]
    for said in passes[1:]:
        total = total + said
    return total.times(1 / len(passes))


def distance(ours: Said, theirs: Said) -> tuple[float, float]:
    """Of the losses, relative where they exceed 1, and of the gradients, relative to TRL's norm."""
    norm = float(theirs.gradient.norm())
    gap = float((ours.gradient - theirs.gradient).norm())
    return abs(ours.loss - theirs.loss) / max(1.0, abs(theirs.loss)), gap / norm if norm else gap


def assert_equal(ours: Said, theirs: Said, what: str = "") -> None:
    loss, gradient = distance(ours, theirs)
    assert loss <= TOLERANCE and gradient <= TOLERANCE, (
        f"{what}: loss {ours.loss:.7g}, TRL's {theirs.loss:.7g} (apart {loss:.1e}); gradients {gradient:.1e} apart"
    )


def assert_differ(ours: Said, theirs: Said) -> None:
    """An intended difference must be visible, far above rounding."""
    loss, gradient = distance(ours, theirs)
    assert loss > 1e-3 and gradient > 1e-3, f"no difference: losses {loss:.1e}, gradients {gradient:.1e} apart"


# ---------------------------------------------------------------- TRL's side

# metrics of pairs that both log under one name
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
LOGPS = ("logps/chosen", "logps/rejected")


def same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


@dataclass
class Peer:
    """A trainer of TRL and the rows it was given."""

    trainer: Any
    examples: list[Example]

    def inputs(self, rows: Sequence[int]) -> Any:
        return self.trainer.data_collator([self.trainer.train_dataset[row] for row in rows])

    def said(self, rows: Sequence[int] | None = None) -> Said:
        """TRL's loss and gradient of some rows as one batch; None: all of them."""
        model = self.trainer.model
        model.zero_grad()
        loss = self.trainer.compute_loss(model, self.inputs(range(len(self.examples)) if rows is None else rows))
        loss.backward()
        return Said(loss.item(), torch.cat([flat_gradient(p) for p in model.parameters()]))

    def logged(self, name: str) -> float:
        """TRL's latest value of a metric."""
        store = getattr(self.trainer, "_metrics", None) or self.trainer._stored_metrics
        return float(store["train"][name][-1])


SETTINGS = {
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "disable_tqdm": True,
    "train_sampling_strategy": "sequential",
    "max_grad_norm": 0.0,
}


def classifier(padding: int = PADDING) -> Any:
    """A reward model: a Llama that ends in one score."""
    torch.manual_seed(POLICY)
    config = llama(POLICY).config
    config.num_labels, config.pad_token_id = 1, padding
    return LlamaForSequenceClassification(config)


def build(kind: str, rows: list[dict[str, Any]], folder: Path, model: Any = None, **options: Any) -> Any:
    """A trainer of TRL, "DPO" for `DPOTrainer` with `DPOConfig`; options are those of its configuration."""
    home = trl
    if not hasattr(trl, f"{kind}Trainer"):
        home = pytest.importorskip(f"trl.experimental.{kind.lower()}")
    settings = {**SETTINGS, "max_length": 128, "output_dir": str(folder), **options}
    given = {"ref_model": llama(REFERENCE)} if kind in ("DPO", "KTO") else {}
    return getattr(home, f"{kind}Trainer")(
        model=model or llama(POLICY),
        args=getattr(home, f"{kind}Config")(**settings),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=word_tokenizer(),
        **given,
    )


class Gradient(TrainerCallback):  # type: ignore[misc]
    """Keeps the gradient that the optimiser is about to be given."""

    gradient: Tensor

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        self.gradient = torch.cat([flat_gradient(p) for p in model.parameters()])


def step(peer: Peer) -> Said:
    """Loss and gradient of the first step of TRL's own training, with its accumulation of gradients."""
    trainer, watch = peer.trainer, Gradient()
    trainer.add_callback(watch)
    trainer.args.max_steps = trainer.args.logging_steps = 1
    loss = trainer.train().training_loss
    return Said(loss, watch.gradient)


def on_pairs(kind: str, rows: list[Example], folder: Path, **options: Any) -> Peer:
    """A trainer on pairs. AssertionError unless TRL's token ids are those of the rows."""
    peer = Peer(build(kind, [pair_row(example) for example in rows], folder, **options), rows)
    for row, example in zip(peer.trainer.train_dataset, rows, strict=True):
        if kind == "DPO":
            assert (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) == (
                example.prompt,
                chosen(example),
                rejected(example),
            )
        else:
            assert row["chosen_input_ids"] == example.prompt + chosen(example)
            assert row["rejected_input_ids"] == example.prompt + rejected(example)
            assert row["chosen_labels"].count(-100) == len(example.prompt)
    return peer


def on_ratings(rows: list[Example], folder: Path, margins: Sequence[float] = (), **options: Any) -> Peer:
    """The reward trainer; margins: its column of that name."""
    table = [pair_row(example) for example in rows]
    if margins:
        table = [row | {"margin": margin} for row, margin in zip(table, margins, strict=True)]
    tokenizer = word_tokenizer()
    padding = tokenizer.convert_tokens_to_ids(options.get("pad_token", "<pad>"))
    peer = Peer(build("Reward", table, folder, classifier(padding), **options), rows)
    for row, example in zip(peer.trainer.train_dataset, rows, strict=True):
        assert row["chosen_ids"] == example.prompt + chosen(example)
        assert row["rejected_ids"] == example.prompt + rejected(example)
    return peer


def on_completions(rows: list[Example], folder: Path, **options: Any) -> Peer:
    """The SFT trainer, which trains on the completions alone."""
    peer = Peer(build("SFT", [completion_row(example) for example in rows], folder, **options), rows)
    for row, example in zip(peer.trainer.train_dataset, rows, strict=True):
        assert row["input_ids"] == example.prompt + example.completions[0]
        assert row["labels"].count(-100) == len(example.prompt)
    return peer


def on_labels(rows: list[Example], folder: Path, **options: Any) -> Peer:
    """The KTO trainer, with all rows in one batch unless `options` has another size."""
    settings = {"per_device_train_batch_size": len(rows), **options}
    peer = Peer(build("KTO", [label_row(example) for example in rows], folder, **settings), rows)
    for row, example in zip(peer.trainer.train_dataset, rows, strict=True):
        assert (row["prompt_ids"], row["completion_ids"]) == (example.prompt, example.completions[0])
    return peer


# ---------------------------------------------------------------- prefopt's side


@dataclass
class Ours:
    """prefopt with TRL's weights: a policy, and another model as the reference."""

    extras: Sequence[str] = ()
    model: Any = None
    models: Models = field(init=False)

    def __post_init__(self) -> None:
        frozen = Policy(llama(REFERENCE))

        def reference(batch: Batch) -> Tensor:
            with torch.no_grad():
                return frozen(batch).logp

        self.models = Models(Policy(self.model or llama(POLICY), **dict.fromkeys(self.extras, True)), reference)

    def said(self, objective: Any, rows: Sequence[Example], tokens: int = 10**9) -> Said:
        """Loss and gradient of one update on the rows, in passes of at most so many tokens."""
        seen = one_update(objective, Batch.of(rows), self.models, tokens)
        return Said(seen.metrics["loss"], seen.gradient)


def assert_same_metrics(peer: Peer, objective: Any, names: Mapping[str, str], model: Any = None) -> None:
    """On all rows as one batch, prefopt's metrics are TRL's; names: prefopt's name -> TRL's."""
    peer.said()
    models = Ours(extras(objective), model).models
    ours = one_update(objective, Batch.of(peer.examples), models).metrics
    theirs = {name: peer.logged(its) for name, its in names.items()}
    assert {name: ours[name] for name in names} == pytest.approx(theirs, rel=TOLERANCE, abs=TOLERANCE)


@dataclass(frozen=True)
class Fed:
    """An objective whose targets are changed before its loss sees them."""

    objective: Any
    change: Callable[[Any], Any]

    def count(self, batch: Batch) -> Tensor:
        return self.objective.count(batch)

    def targets(self, batch: Batch, models: Any) -> Any:
        return self.change(self.objective.targets(batch, models))

    def loss(self, batch: Batch, out: Any, targets: Any) -> Any:
        return self.objective.loss(batch, out, targets)


def each(num: int) -> Iterator[list[int]]:
    """Batches of one row, and then all rows as one batch."""
    yield from ([row] for row in range(num))
    yield list(range(num))


def assert_parity(
    peer: Peer, objective: Any, batches: Sequence[Sequence[int]] | None = None, ours: Ours | None = None
) -> None:
    """Loss and gradient are TRL's on every row alone and on all of them; batches: on these instead."""
    ours = ours or Ours(extras(objective))
    for rows in batches or list(each(len(peer.examples))):
        said = ours.said(objective, [peer.examples[row] for row in rows])
        assert_equal(said, peer.said(rows), f"rows {rows}")


def alone(num: int) -> list[list[int]]:
    """Batches of one row."""
    return [[row] for row in range(num)]
