"""What the tests of training share: tiny models and rows built in code, and one update looked at from outside."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
    GPTNeoXForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from prefopt.batch import Batch
from prefopt.budget import Budget
from prefopt.loop import Models, Step, update
from prefopt.models.critic import ActorCritic, value_model
from prefopt.models.policy import Policy
from prefopt.objectives.facts import extras as extra_outputs
from prefopt.records import Example

VOCABULARY = 29
EVERYTHING = 10**9  # a token budget that no batch reaches


# how many numbers a model says of a token or text, by what it is for
LABELS = {"language": 0, "completion": 1, "steps": 2}
GPT_NEOX = {
    "language": GPTNeoXForCausalLM,
    "completion": GPTNeoXForSequenceClassification,
    "steps": GPTNeoXForTokenClassification,
}


def gpt_neox(seed: int, dtype: torch.dtype = torch.float64, head: str = "language", **changes: Any) -> PreTrainedModel:
    """Two layers with a real rotary embedding; LayerNorm keeps float64 all the way (Llama's norm does not)."""
    torch.manual_seed(seed)
    changes = {"num_labels": LABELS[head], **changes} if LABELS[head] else changes
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY, rotary_pct=1.0, max_position_embeddings=64, initializer_range=0.4, **sizes, **changes
    )
    return GPT_NEOX[head](config).to(dtype)


def gpt2(seed: int, dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=64,
        initializer_range=0.3,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config).to(dtype)


def llama(seed: int, dtype: torch.dtype = torch.float32, vocabulary: int = VOCABULARY) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(dtype)


ARCHITECTURES = {"gpt_neox": gpt_neox, "gpt2": gpt2, "llama": llama}


# ---------------------------------------------------------------- rows

# scores of a prompt's completions by the shape of the data; the worse one is first every other time
SCORES = {
    "demonstrations": [(1.0,), (1.0,)],
    "pairs": [(0.0, 1.0), (1.0, 0.0)],
    "labels": [(1.0,), (0.0,)],
    "ratings": [(0.25, 3.0, 1.0), (2.0, 0.5)],
    "steps": [(1.0,), (0.0,)],
    # rewards of completions that the policy wrote
    "prompts": [(0.0, 1.0, 0.25), (1.0, 0.0)],
}


def rows(data: str, num: int = 5, seed: int = 0, untrained: bool = True) -> list[Example]:
    """Examples of unequal length for an objective's data shape, a few tokens of some completions untrained."""
    draw = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [draw.randrange(VOCABULARY) for _ in range(draw.randint(low, high))]

    def flags(size: int) -> list[bool]:
        return [True] + [not untrained or draw.random() > 0.3 for _ in range(size - 1)]

    examples = []
    for number in range(num):
        scores = SCORES[data][number % 2]
        completions = [tokens(2, 9) for _ in scores]
        trained = [flags(len(completion)) for completion in completions]
        examples.append(Example(tokens(1, 8), completions, list(scores), trained, f"row {number}"))
    if data == "steps":
        examples = [replace(example, steps=step_labels(example)) for example in examples]
    if untrained:  # at least one, whatever was drawn
        examples[0].trained[0][1] = False
    return examples


def step_labels(example: Example) -> list[list[float]]:
    """Steps of two tokens and the rest, right and wrong in turn, labelled at their last tokens."""
    return [
        [float(n // 2 % 2) if n % 2 or n == len(c) - 1 else math.nan for n in range(len(c))]
        for c in example.completions
    ]


# ---------------------------------------------------------------- one update, seen from outside


@dataclass
class Watcher:
    """Stands in for the optimiser: keeps the gradient that an update would be taken with, and takes none."""

    parameters: list[torch.nn.Parameter]
    gradient: Tensor = field(default_factory=lambda: torch.empty(0))

    def sum_over_processes(self) -> None:
        pass

    def step(self, learning_rate: float, max_norm: float | None) -> float:
        self.gradient = torch.cat([flat_gradient(p) for p in self.parameters])
        self.zero()
        return float(self.gradient.norm())

    def zero(self) -> None:
        for p in self.parameters:
            p.grad = None


def flat_gradient(p: torch.nn.Parameter) -> Tensor:
    return (torch.zeros_like(p) if p.grad is None else p.grad).flatten().clone()


class Seen(NamedTuple):
    """gradient [parameters]; metrics as the loop reports them."""

    gradient: Tensor
    metrics: dict[str, float]


def one_update(objective: Any, batch: Batch, models: Models, tokens: int = EVERYTHING) -> Seen:
    """Gradient and metrics of one update of the loop at a token budget; the weights stay as they are."""
    policy: Any = models.policy
    watcher: Any = Watcher(list(policy.model.parameters()))
    metrics = update(models, objective, batch, 1.0, watcher, Budget(tokens), Step(0.0, None))
    assert metrics is not None
    return Seen(watcher.gradient, metrics)


def apart(seed: int = 0, layout: Any = "tree", extras: Sequence[str] = (), head: str = "language") -> Models:
    """A policy and a reference that are far from each other: two differently drawn models. head: the policy's."""
    other = Policy(gpt_neox(seed + 100), layout)

    def reference(batch: Batch) -> Tensor:
        with torch.no_grad():
            return other(batch).logp

    return Models(Policy(gpt_neox(seed, head=head), layout, **dict.fromkeys(extras, True)), reference)


def far(objective: Any, **options: Any) -> Models:
    """A policy, with the head and the critic that the objective trains, and a reference that is far from it."""
    models = apart(extras=extra_outputs(objective), head=objective.facts.head, **options)
    return with_critic(models) if objective.facts.critic else models


def with_critic(models: Models, seed: int = 200) -> Models:
    """The models with a critic of its own, drawn differently, beside the policy."""
    policy: Any = models.policy
    critic = value_model(gpt_neox(seed, head="completion"), policy.layout)
    return replace(models, policy=ActorCritic(policy, critic))


def together(seed: int = 0, extras: Sequence[str] = (), head: str = "language") -> Models:
    """A policy that is its own reference: the start of training."""
    policy = Policy(gpt_neox(seed, head=head), **dict.fromkeys(extras, True))
    return Models(policy, lambda batch: policy(batch).logp.detach())


def logp_by_hand(model: Any, example: Example) -> list[Tensor]:
    """Each completion's token log-probs from an ordinary forward pass of one unpadded sequence: the yardstick."""
    found = []
    for completion in example.completions:
        ids = torch.tensor([[*example.prompt, *completion]])
        logp = model(input_ids=ids).logits[0].log_softmax(-1)  # [tokens, V]
        first = len(example.prompt)
        found.append(torch.stack([logp[first + i - 1, token] for i, token in enumerate(completion)]))
    return found


def scores_by_hand(model: Any, example: Example) -> list[Tensor]:
    """A classifier's own answers to each completion, unpadded: the score of the whole text [1], or of each token."""
    found = []
    for completion in example.completions:
        logits = model.eval()(input_ids=torch.tensor([[*example.prompt, *completion]])).logits[0]
        found.append(logits if logits.ndim == 1 else (logits[:, 1] - logits[:, 0])[len(example.prompt) :])
    return found


# ---------------------------------------------------------------- directories for whole runs

WORDS = ["red", "blue", "cat", "dog", "runs", "sleeps", "here", "there", "good", "bad", "yes", "no", "one", "two"]


def word_tokenizer() -> Any:
    """One token a word, with `</s>` (id 0) at the end of a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["</s>", "<unk>", ":", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>", unk_token="<unk>")


def save_model(folder: Path, seed: int = 0, architecture: str = "llama") -> Path:
    """A tiny random model and its tokenizer as a Hugging Face directory."""
    model = ARCHITECTURES[architecture](seed, torch.float32)
    model.resize_token_embeddings(len(word_tokenizer()), mean_resizing=False)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def write_rows(path: Path, data: str, num: int = 24, seed: int = 0) -> Path:
    """Text rows in the usual columns. The good answer says `good`, the bad one `bad`; demonstrations are good.

    Ratings: a third answer says nothing of either. Steps: right ones end in `good`, wrong ones in `bad`. Prompts: which
    of the two words is the answer stands in a column of its own.
    """
    draw = random.Random(seed)

    def words(count: int) -> str:
        return " ".join(draw.choice(WORDS[:8]) for _ in range(count))

    lines = []
    for number in range(num):
        prompt = words(draw.randint(1, 4)) + " :"
        chosen, rejected = f" good {words(draw.randint(0, 3))}".rstrip(), f" bad {words(draw.randint(0, 5))}".rstrip()
        forms: dict[str, dict[str, Any]] = {
            "pairs": {"chosen": chosen, "rejected": rejected},
            "demonstrations": {"completion": chosen},
            "labels": {"completion": rejected if number % 2 else chosen, "label": not number % 2},
            "ratings": {"completions": [rejected, f" one {words(2)}", chosen], "scores": [1, 2, 4]},
            "steps": {
                "completions": [f" {words(1)} {said}" for said in ("good", "bad", "good")],
                "labels": [True, False, True],
            },
            "prompts": {"answer": "bad" if number % 2 else "good"},
        }
        lines.append(json.dumps({"prompt": prompt, **forms[data]}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def weights(model: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def largest_difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Largest absolute difference between two sets of weights. AssertionError unless they have the same names."""
    assert left.keys() == right.keys()
    return max(float((left[name].double() - right[name].double()).abs().max()) for name in left)


def batch_of(data: str, **options: Any) -> Batch:
    return batch_from(data, rows(data, **options))


def batch_from(data: str, examples: Sequence[Example]) -> Batch:
    """The rows as a batch; where the policy draws completions, with log-probs of a sampler, by a formula of tokens."""
    return drawn(Batch.of(examples)) if data == "prompts" else Batch.of(examples)


def drawn(batch: Batch) -> Batch:
    """The batch with a sampler's log-probs."""
    return replace(batch, rollout_logp=-3 - batch.completions.values % 5 / 4.0)


def nudged(models: Models, size: float = 0.02) -> Models:
    """The models with a policy some updates further on: ratios of 0.5 to 2."""
    policy = copy.deepcopy(models.policy)
    random_numbers = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in policy.model.parameters():
            p += size * torch.randn(p.shape, generator=random_numbers, dtype=p.dtype)
    return replace(models, policy=policy)


def shuffled(examples: Sequence[Example], seed: int = 1) -> list[Example]:
    return random.Random(seed).sample(list(examples), len(examples))
