"""Scores of whole examples through a reward model, or of their steps through a process reward model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import permutations

import torch
from torch import Tensor

from prefopt.batch import Batch
from prefopt.evaluate.scoring import TOKENS_PER_BATCH, Scorer, batches, evaluating
from prefopt.evaluate.statistics import Estimate, mean, wilson
from prefopt.records import Example


def completion_scores(
    model: Scorer,
    examples: Sequence[Example],
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """The score of every completion, read at its last token, in the examples' order; [N] float64, on the CPU.

    progress: told how many examples were scored since it was last told. ValueError for a model without a score head.
    """
    found = [torch.zeros(0, dtype=torch.float64)]
    for batch, value in _values(model, examples, tokens_per_batch, progress):
        found.append(value[batch.completions.lengths.cumsum(0) - 1])
    return torch.cat(found)


def step_scores(
    model: Scorer,
    examples: Sequence[Example],
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[float]]:
    """The probability that each step is right, one list per example, in their order. Steps end at labelled tokens.

    ValueError for a model without a score head, or an example without steps.
    """
    found: list[list[float]] = []
    for batch, value in _values(model, examples, tokens_per_batch, progress):
        if batch.steps is None:
            raise ValueError("no example has steps, so there is nothing to score")
        ends = ~batch.steps.isnan()  # [K]
        owner = batch.group[batch.owner[ends]]  # [steps]
        right = value[ends].sigmoid()
        found += [right[owner == g].tolist() for g in range(batch.num_prompts)]
    return found


def _values(
    model: Scorer, examples: Sequence[Example], tokens_per_batch: int, progress: Callable[[int], None]
) -> Iterator[tuple[Batch, Tensor]]:
    """Batches of the examples with the value of each token, [K] float64 on the CPU."""
    with evaluating(model), torch.no_grad():
        for batch in batches(examples, tokens_per_batch):
            value = model(batch).value
            if value is None:
                raise ValueError("the model has no score head")
            yield batch, value.cpu().double()
            progress(batch.num_prompts)


def ranked_rightly(labels: Sequence[Sequence[float]], scores: Sequence[Sequence[float]]) -> Estimate:
    """How often the better labelled of two completions of a prompt has the higher score, a tie counted half.

    labels, scores: [prompt][completion]. Completions with equal labels are not compared, prompts without two different
    ones left out. Prompts are what is independent (n): each gives its share, with Wilson's interval where every prompt
    is one comparison, a bootstrap over prompts otherwise.
    """
    shares, pairs = [], 0
    for label, score in zip(labels, scores, strict=True):
        won = [
            (score[i] > score[j]) + (score[i] == score[j]) / 2
            for i, j in permutations(range(len(label)), 2)
            if label[i] > label[j]
        ]
        pairs += len(won)
        shares += [math.fsum(won) / len(won)] if won else []
    if not shares:
        return Estimate(None, None, None, 0, "no prompt has two completions with different labels")
    return wilson(math.fsum(shares), len(shares)) if pairs == len(shares) else _mean(shares)


def steps_rightly(labels: Sequence[Sequence[float]], scores: Sequence[Sequence[float]]) -> Estimate:
    """How often a step's probability lies on its label's side of one half; [answer][step].

    Answers are what is independent (n), so the interval is a bootstrap over the answers' shares.
    """
    shares = []
    for label, score in zip(labels, scores, strict=True):
        right = [(probability > 0.5) == (each > 0.5) for each, probability in zip(label, score, strict=True)]
        shares += [sum(right) / len(right)] if right else []
    return _mean(shares)


def _mean(shares: Sequence[float]) -> Estimate:
    """A bootstrap's interval; Wilson's where all shares are equal and there is nothing to resample."""
    found = mean(shares)
    return found if found.low is not None or not shares else wilson(math.fsum(shares), len(shares))
