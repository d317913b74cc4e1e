"""Asks a model about the rows of a table. The one part of an audit that imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prefopt import ranks
from prefopt.audit.classifier import Floats
from prefopt.audit.table import Asked, Table, fitted
from prefopt.evaluate.rewards import completion_scores
from prefopt.evaluate.scoring import sampled, score
from prefopt.models.adapters import LoraOptions, adapt
from prefopt.models.load import ModelOptions, head_of, keep_freed_memory, load
from prefopt.models.policy import Policy, choose
from prefopt.models.sampler import Local
from prefopt.models.sampling import Sampling
from prefopt.records import Example, InputError

TOKENS = 64  # of a completion that the model writes itself


class Ready(NamedTuple):
    """A model in memory: its policy, its tokenizer, and whether it scores answers or writes them."""

    policy: Policy
    tokenizer: Any
    scores: bool


def ready(source: str | Path, options: ModelOptions) -> Ready:
    """Load a language model or a reward model. InputError for a model of steps, whose scores are no answer's."""
    head = head_of(source, options)
    if head == "steps":
        raise InputError(f"{source}: a model of steps; give a language model, or a reward model of whole answers")
    if ranks.device().type == "cpu":
        keep_freed_memory()
    loaded = load(source, options, ranks.device(), head)
    policy = Policy(adapt(loaded.model, LoraOptions(), loaded.adapter))
    choose(policy, options.layout)
    return Ready(policy, loaded.tokenizer, head == "completion")


def ask(model: Ready, table: Table, rows: int | None, samples: int, seed: int = 0) -> Asked:
    """What the model makes of the first `rows` items' completions, and `samples` completions of its own.

    Items without tokens, or that do not fit in max_length, have NaN.
    """
    each = max(1, table.num_answers)
    per_token = np.full(each * len(table.items), np.nan)
    scores = np.full(each * len(table.items), np.nan) if model.scores else None
    total = np.full(each * len(table.items), np.nan)
    kept: list[tuple[int, Example]] = []
    for number, item in enumerate(table.items[:rows]):
        example = fitted(item, table.options)[0]
        if example is not None and len(example.completions) == each:
            kept.append((number, example))
    where = np.array([each * number + place for number, _ in kept for place in range(each)], dtype=np.int64)
    examples = [example for _, example in kept]
    if scores is not None:
        scores[where] = completion_scores(model.policy, examples).numpy()
        return Asked(per_token, total, scores, None)
    found = score(model.policy, examples)
    total[where] = found.logp.numpy()
    per_token[where] = found.logp.numpy() / np.maximum(found.tokens.numpy(), 1)
    return Asked(per_token, total, None, _own(model, examples, samples, seed))


def _own(model: Ready, examples: list[Example], samples: int, seed: int) -> Floats | None:
    """Log-probability per token of what the model writes to some of the prompts."""
    step = max(1, len(examples) // max(1, samples))
    prompts = [example.prompt for example in examples[::step]][:samples]
    if not prompts:
        return None
    inner = model.policy.inner
    ends = {model.tokenizer.eos_token_id}
    configured = getattr(inner.generation_config, "eos_token_id", None)
    ends |= set(configured if isinstance(configured, list) else [configured]) - {None}
    writer = Local(inner, sorted(ends), model.tokenizer)
    try:
        written = writer.sample(prompts, 1, Sampling(max_tokens=TOKENS), [seed + n for n in range(len(prompts))])
    finally:
        writer.close()
    found = score(model.policy, sampled(prompts, [[one.tokens for one in own] for own in written]))
    return np.asarray(found.logp.numpy() / np.maximum(found.tokens.numpy(), 1))
