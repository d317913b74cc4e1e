"""Log-probabilities of whole examples through a policy: what perplexity, KL and preference accuracy are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from prefopt.batch import Batch, Outputs
from prefopt.records import Example

TOKENS_PER_BATCH = 16_384


class Scorer(Protocol):
    """A policy, or anything that scores a batch as one does."""

    def __call__(self, batch: Batch) -> Outputs: ...


class Scored(NamedTuple):
    """One number per completion, in the examples' order, on the CPU.

    logp [N] float64: sum of log p over trained tokens, nats. tokens [N] int64: how many those are.
    """

    logp: Tensor
    tokens: Tensor


def score(policy: Scorer, examples: Sequence[Example], tokens_per_batch: int = TOKENS_PER_BATCH) -> Scored:
    """Log-probabilities of every completion, without gradient and with dropout off."""
    logps, counts = [torch.zeros(0, dtype=torch.float64)], [torch.zeros(0, dtype=torch.int64)]
    with evaluating(policy), torch.no_grad():
        for batch in batches(examples, tokens_per_batch):
            logp = policy(batch).logp.cpu().double()  # [K]
            logps.append(batch.sum_tokens(logp))
            counts.append(batch.sum_tokens(torch.ones_like(logp)).long())
    return Scored(torch.cat(logps), torch.cat(counts))


def batches(examples: Sequence[Example], tokens_per_batch: int) -> Iterator[Batch]:
    """Examples in their order, as batches of at most so many tokens and at least one example."""
    start = total = 0
    for at, example in enumerate(examples):
        if at > start and total + example.num_tokens > tokens_per_batch:
            yield Batch.of(examples[start:at])
            start, total = at, 0
        total += example.num_tokens
    if start < len(examples):
        yield Batch.of(examples[start:])


def sampled(prompts: Sequence[list[int]], completions: Sequence[Sequence[list[int]]]) -> list[Example]:
    """Prompts and their sampled completions, [prompt][sample] -> token ids, as examples without scores."""
    return [
        Example(prompt, list(own), [float("nan")] * len(own), [[True] * len(tokens) for tokens in own])
        for prompt, own in zip(prompts, completions, strict=True)
    ]


@contextmanager
def evaluating(policy: Scorer) -> Iterator[None]:
    """The policy's model in eval mode; each module's mode is put back afterwards."""
    model = getattr(policy, "model", None)
    modes = [] if model is None else [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
