"""The one tensor type every objective sees: flat, ragged, no padding and no mask.

Letters used in shapes, here and everywhere: G prompts, N completions, K completion tokens laid end to end, V
vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from prefopt.records import Example

Targets = TypeVar("Targets", bound=tuple[Any, ...])


@dataclass(frozen=True)
class Ragged:
    """Sequences of unequal length laid end to end: values [total], lengths [n] int64."""

    values: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> Ragged:
        return cls(
            torch.tensor([token for row in rows for token in row], dtype=torch.int64),
            torch.tensor([len(row) for row in rows], dtype=torch.int64),
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def rows(self) -> list[Tensor]:
        """The sequences, as views."""
        return list(self.values.split(self.lengths.tolist()))

    def cut(self, start: int, stop: int) -> Ragged:
        """Sequences start to stop."""
        first, last = int(self.lengths[:start].sum()), int(self.lengths[:stop].sum())
        return Ragged(self.values[first:last], self.lengths[start:stop])


@dataclass(frozen=True)
class Batch:
    """Prompts that own scored completions.

    prompts [G sequences], completions [N sequences], group [N] int64 non-decreasing: the prompt each completion
    answers; trained [K] bool, False on tokens the policy did not write; score [N] float32, label or reward, NaN =
    not scored; rollout_logp [K] log-prob under the sampler in nats, None offline; steps [K] float32, the label of a
    step at its last token (1 right, 0 wrong, or a share) and NaN elsewhere, None where nothing is labelled by steps.
    filler: a copy of another process's prompt, for a process that has none of its own; it must count nothing.
    targets: the objective's constants of these prompts, where they were computed for more than this update (a whole
    rollout); None: `Objective.targets` is asked at every update.
    Every prompt has at least one token and one completion; every completion has at least one token.
    """

    prompts: Ragged
    completions: Ragged
    group: Tensor
    trained: Tensor
    score: Tensor
    rollout_logp: Tensor | None = None
    steps: Tensor | None = None
    filler: bool = False
    targets: Any = None

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Batch:
        """Examples as one batch, in their order.

        ValueError, naming the row, on an empty prompt or completion, and on scores, flags or labels that are not one
        for each completion or token.
        """
        for example in examples:
            if not example.prompt or not example.completions or not all(example.completions):
                raise ValueError(f"{example.where or 'an example'}: an empty prompt or completion cannot be scored")
            _check_sizes(example)
        owners = [g for g, example in enumerate(examples) for _ in example.completions]
        return cls(
            prompts=Ragged.of([example.prompt for example in examples]),
            completions=Ragged.of([tokens for example in examples for tokens in example.completions]),
            group=torch.tensor(owners, dtype=torch.int64),
            trained=torch.tensor(
                [flag for example in examples for flags in example.trained for flag in flags], dtype=torch.bool
            ),
            score=torch.tensor([s for example in examples for s in example.scores], dtype=torch.float32),
            steps=_steps(examples),
        )

    @property
    def num_prompts(self) -> int:
        return len(self.prompts)

    @property
    def num_completions(self) -> int:
        return len(self.completions)

    @property
    def owner(self) -> Tensor:
        """The completion each token belongs to, [K] int64."""
        lengths = self.completions.lengths
        return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)

    def spread(self, x: Tensor) -> Tensor:
        """A value per completion, given to each of its tokens: [N] -> [K]."""
        return check(x, self.num_completions, "spread")[self.owner]

    def sum_tokens(self, x: Tensor) -> Tensor:
        """Sum over each completion's trained tokens: [K] -> [N]."""
        x = check(x, len(self.trained), "sum_tokens").masked_fill(~self.trained, 0)
        return x.new_zeros(self.num_completions).index_add(0, self.owner, x)

    def mean_tokens(self, x: Tensor) -> Tensor:
        """Mean over each completion's trained tokens: [K] -> [N]. A completion without a trained token gives 0."""
        return self.sum_tokens(x) / self.sum_tokens(torch.ones_like(x)).clamp(min=1)

    def pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Values of the better and the worse scored completion of each prompt: [N] -> [G], [G].

        ValueError, naming the prompt, unless each prompt has two completions with different scores.
        """
        x = check(x, self.num_completions, "pairs")
        count = torch.bincount(self.group, minlength=self.num_prompts)  # [G]
        if (count != 2).any():
            g = int((count != 2).nonzero()[0])
            raise ValueError(f"pairs: prompt {g} has {int(count[g])} completions and needs exactly two")
        score = self.score.view(-1, 2)  # [G, 2]
        wrong = ~(score[:, 0] != score[:, 1]) | score.isnan().any(1)  # [G]
        if wrong.any():
            raise ValueError(f"pairs: prompt {int(wrong.nonzero()[0])} has tied or missing scores; drop it")
        better = score.argmax(1, keepdim=True)  # [G, 1]
        both = x.view(-1, 2)  # [G, 2]
        return both.gather(1, better)[:, 0], both.gather(1, 1 - better)[:, 0]

    def take(self, start: int, stop: int) -> Batch:
        """Prompts start to stop, with their completions."""
        n0, n1 = torch.searchsorted(self.group, torch.tensor([start, stop], device=self.group.device)).tolist()
        k0, k1 = (int(self.completions.lengths[:n].sum()) for n in (n0, n1))
        return Batch(
            self.prompts.cut(start, stop),
            self.completions.cut(n0, n1),
            self.group[n0:n1] - start,
            self.trained[k0:k1],
            self.score[n0:n1],
            None if self.rollout_logp is None else self.rollout_logp[k0:k1],
            None if self.steps is None else self.steps[k0:k1],
            self.filler,
            None if self.targets is None else cut_targets(self, self.targets, start, stop),
        )

    def tokens_per_prompt(self, repeat: bool = False) -> list[int]:
        """What each prompt costs in a forward pass, [G]: its own tokens, once or for each completion, and theirs."""
        times = torch.bincount(self.group, minlength=self.num_prompts) if repeat else 1
        cost = self.prompts.lengths * times
        tokens: list[int] = cost.index_add(0, self.group, self.completions.lengths).tolist()
        return tokens

    def to(self, device: torch.device | str) -> Batch:
        def there(x: Ragged) -> Ragged:
            return Ragged(x.values.to(device), x.lengths.to(device))

        return Batch(
            there(self.prompts),
            there(self.completions),
            self.group.to(device),
            self.trained.to(device),
            self.score.to(device),
            None if self.rollout_logp is None else self.rollout_logp.to(device),
            None if self.steps is None else self.steps.to(device),
            self.filler,
            self.targets,
        )


class Outputs(NamedTuple):
    """What the policy says of a batch.

    logp [K]: log p(token | prompt, tokens before), nats, float32 (float64 for a float64 model); [0] of a model without
    a language-model head.
    entropy [K]: of the distribution each token was drawn from, nats; None when the objective does not read it.
    value [K]: critic or reward head; None without one.
    collision [K]: log of the sum over the vocabulary of p squared, nats, without gradient; None when not read.
    """

    logp: Tensor
    entropy: Tensor | None = None
    value: Tensor | None = None
    collision: Tensor | None = None


def _check_sizes(example: Example) -> None:
    """ValueError, naming the row: laid end to end, a missing score would shift those of every row after it."""
    sizes = [len(tokens) for tokens in example.completions]
    found = {"trained flags": example.trained} | ({} if example.steps is None else {"labels of steps": example.steps})
    where = example.where or "an example"
    if len(example.scores) != len(sizes):
        raise ValueError(f"{where}: {len(sizes)} completions, {len(example.scores)} scores; give one score each")
    for name, values in found.items():
        if [len(own) for own in values] != sizes:
            own = [len(value) for value in values]
            raise ValueError(f"{where}: completions of {sizes} tokens, {name} for {own}; give one for each token")


def _steps(examples: Sequence[Example]) -> Tensor | None:
    """Labels of steps laid end to end, [K]; None if no example has any."""
    if all(example.steps is None for example in examples):
        return None
    labels = []
    for example in examples:
        own = example.steps or [[math.nan] * len(tokens) for tokens in example.completions]
        labels += [label for completion in own for label in completion]
    return torch.tensor(labels, dtype=torch.float32)


def check(x: Tensor, size: int, where: str) -> Tensor:
    """`x`, refused unless it is [size]: a silent broadcast of [N] with [K] or [N, 1] is the bug this stops."""
    if x.shape != (size,):
        raise ValueError(f"{where}: expected a tensor of shape [{size}], got {list(x.shape)}")
    return x


def parts(batch: Batch, targets: Targets, max_tokens: int, repeat: bool = False) -> Iterator[tuple[Batch, Targets]]:
    """Cut a batch and its targets into forward passes of at most `max_tokens` tokens, a prompt never apart from its
    completions.

    repeat: the layout computes a prompt anew for each of its completions.
    A prompt that alone exceeds the budget is a pass of its own. Each tensor of `targets` is [G], [N], [K] or []
    (kept whole).
    """
    costs, start = batch.tokens_per_prompt(repeat), 0
    while start < len(costs):
        stop, total = start + 1, costs[start]
        while stop < len(costs) and total + costs[stop] <= max_tokens:
            total, stop = total + costs[stop], stop + 1
        yield batch.take(start, stop), cut_targets(batch, targets, start, stop)
        start = stop


def cut_targets(batch: Batch, targets: Targets, start: int, stop: int) -> Targets:
    """The targets of prompts start to stop. G <= N <= K with equality only where the cuts coincide, so sizes tell."""
    n0, n1 = torch.searchsorted(batch.group, torch.tensor([start, stop], device=batch.group.device)).tolist()
    k0, k1 = (int(batch.completions.lengths[:n].sum()) for n in (n0, n1))
    spans = {len(batch.trained): (k0, k1), batch.num_completions: (n0, n1), batch.num_prompts: (start, stop)}

    def cut(x: Tensor | None) -> Tensor | None:
        if x is None or x.ndim == 0:
            return x
        if len(x) not in spans:
            raise ValueError(f"a target of shape {list(x.shape)} is neither [G], [N], [K] nor a scalar of this batch")
        first, last = spans[len(x)]
        return x[first:last]

    kind: Any = type(targets)
    return kind(*map(cut, targets))
