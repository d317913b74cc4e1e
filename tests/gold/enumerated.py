"""What an online objective expects over every group that can be drawn, exactly, in float64.

The policy is a table of logits, one row for each prefix of a small language whose texts are all enumerated. The
objective's own `targets` and `loss` see one batch with every group; each then counts with the probability that the
policy draws it. Letters: X prefixes, V vocabulary, R texts, L tokens of the longest, N completions, K their tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefopt.batch import Batch, Outputs, Ragged
from prefopt.loop import Models
from prefopt.objectives.policy_gradient import Method, PolicyGradient


class Language:
    """Every text of at most `length` tokens, which its first `end` token ends; without `end` all are of that length.

    texts: R tuples of tokens. prefixes: the X places where a token is drawn, as tuples, and their rows in a table.
    """

    def __init__(self, vocabulary: int, length: int = 1, end: int | None = None) -> None:
        self.vocabulary, self.length, self.end = vocabulary, length, end
        self.texts: list[tuple[int, ...]] = []
        self.prefixes: dict[tuple[int, ...], int] = {}
        self._walk(())
        self.lengths = torch.tensor([len(text) for text in self.texts])  # [R]
        padded = [text + (0,) * (length - len(text)) for text in self.texts]
        self.tokens = torch.tensor(padded)  # [R, L]
        self.row = torch.zeros(sum(vocabulary**n for n in range(length)), dtype=torch.int64)
        for prefix, number in self.prefixes.items():
            self.row[self._place(prefix)] = number

    def _walk(self, prefix: tuple[int, ...]) -> None:
        if len(prefix) == self.length or (prefix and prefix[-1] == self.end):
            self.texts.append(prefix)
            return
        self.prefixes[prefix] = len(self.prefixes)
        for token in range(self.vocabulary):
            self._walk((*prefix, token))

    def _place(self, prefix: Sequence[int]) -> int:
        """A number for each prefix: children of place n are n V + 1 to n V + V."""
        place = 0
        for token in prefix:
            place = place * self.vocabulary + token + 1
        return place

    def batch(self, texts: Tensor, size: int, reward: Tensor) -> Batch:
        """Texts by number [N], `size` for each prompt, with their rewards of reward [R] in float64."""
        lengths = self.lengths[texts]
        written = torch.arange(self.length) < lengths[:, None]  # [N, L]
        groups = len(texts) // size
        tokens = self.tokens[texts][written]
        return Batch(
            Ragged(torch.zeros(groups, dtype=torch.int64), torch.ones(groups, dtype=torch.int64)),
            Ragged(tokens, lengths),
            torch.arange(groups).repeat_interleave(size),
            torch.ones(len(tokens), dtype=torch.bool),
            reward.double()[texts],
        )

    def groups(self, size: int, reward: Tensor) -> Batch:
        """Every group of `size` texts, in every order."""
        numbers = list(itertools.product(range(len(self.texts)), repeat=size))
        return self.batch(torch.tensor(numbers).flatten(), size, reward)

    def repeated(self, counts: Sequence[int], reward: Tensor) -> Batch:
        """One group with text i counts[i] times: what an endless group is made of, up to rounding."""
        texts = torch.arange(len(self.texts)).repeat_interleave(torch.tensor(counts))
        return self.batch(texts, len(texts), reward)

    def at(self, batch: Batch) -> Tensor:
        """The row of the table that each token was drawn from, [K]."""
        lengths = batch.completions.lengths
        written = torch.arange(self.length) < lengths[:, None]  # [N, L]
        tokens = torch.zeros(written.shape, dtype=torch.int64).masked_scatter(written, batch.completions.values)
        place = torch.zeros_like(tokens)  # [N, L]
        for t in range(1, self.length):
            place[:, t] = place[:, t - 1] * self.vocabulary + tokens[:, t - 1] + 1
        return self.row[place[written]]

    def outputs(self, logits: Tensor, batch: Batch, value: Tensor | None = None) -> Outputs:
        """What the policy with these logits [X, V], and a critic with these values [X], say of a batch."""
        at = self.at(batch)
        logp = logits.log_softmax(-1)[at, batch.completions.values]  # [K]
        return Outputs(logp, value=None if value is None else value[at])

    def logp(self, logits: Tensor) -> Tensor:
        """Log-probs of all texts, [R] nats."""
        batch = self.batch(torch.arange(len(self.texts)), 1, torch.zeros(len(self.texts)))
        return batch.sum_tokens(self.outputs(logits, batch).logp)


@dataclass(frozen=True)
class Composed(PolicyGradient):
    """A method put together here from parts of the package."""

    parts: Method | None = None

    @property
    def method(self) -> Method:
        assert self.parts is not None
        return self.parts


@dataclass(frozen=True)
class Expected:
    """An objective's expectation over the groups of a batch. reference: logits [X, V].

    drawn: the logits that the groups are drawn from, where the policy has moved since; None: the policy's own.
    value: a critic's values [X]. share: each group's probability [G] where it is not that of `drawn`.
    """

    objective: Any
    language: Language
    batch: Batch
    reference: Tensor
    drawn: Tensor | None = None
    value: Tensor | None = None
    share: Tensor | None = None

    def models(self, drawn: Tensor) -> Models:
        return Models(
            lambda part: self.language.outputs(drawn, part, self.value),
            lambda part: self.language.outputs(self.reference, part).logp,
            several=self.drawn is not None,
        )

    def chance(self, drawn: Tensor) -> Tensor:
        """The probability of each group, [G]."""
        if self.share is not None:
            return self.share
        whole = self.batch.sum_tokens(self.language.outputs(drawn, self.batch).logp)  # [N]
        return whole.new_zeros(self.batch.num_prompts).index_add(0, self.batch.group, whole).exp()

    def credit(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Derivative of the loss sum by the log-prob of each token, and the chance of its group: [K], [K]."""
        drawn = (logits if self.drawn is None else self.drawn).detach()
        with torch.no_grad():
            targets = self.objective.targets(self.batch, self.models(drawn))
            chance = self.chance(drawn)
        out = self.language.outputs(logits.detach(), self.batch, self.value)
        out = out._replace(logp=out.logp.requires_grad_())
        loss = self.objective.loss(self.batch, out, targets)[0]
        if not loss.requires_grad:
            return torch.zeros_like(out.logp), self.batch.spread(chance[self.batch.group])
        return torch.autograd.grad(loss, out.logp)[0], self.batch.spread(chance[self.batch.group])

    def gradient(self, logits: Tensor) -> Tensor:
        """Of the loss sum of a group, expected over groups: [X, V]. A row's loss holds no other row's log-probs, so
        each counts with its own chance.
        """
        credit, chance = self.credit(logits)
        logits = logits.detach().requires_grad_()
        logp = self.language.outputs(logits, self.batch).logp
        return torch.autograd.grad(logp, logits, credit * chance)[0]


def true_gradient(language: Language, logits: Tensor, value: Tensor) -> Tensor:
    """Of the expectation of value [R], [X, V]."""
    logits = logits.detach().requires_grad_()
    return torch.autograd.grad((language.logp(logits).exp() * value).sum(), logits)[0]


def kl_gradient(language: Language, logits: Tensor, reference: Tensor) -> Tensor:
    """Of KL(policy || reference), [X, V]; as its log-ratio, held constant, is the value of a text."""
    return true_gradient(language, logits, language.logp(logits.detach()) - language.logp(reference))


def ascend(expected: Expected, rate: float, steps: int) -> Tensor:
    """Logits after steps along gradient / probability from the reference, for texts of one token: natural gradient
    descent up to a constant, which in the logits does nothing.
    """
    logits = expected.reference.clone()
    for _ in range(steps):
        logits = logits - rate * expected.gradient(logits) / logits.softmax(-1)
    return logits


def cosine(left: Tensor, right: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(left.flatten(), right.flatten(), 0))


def to_go(batch: Batch, x: Tensor) -> Tensor:
    """Sum over a completion's tokens from each token to its end, [K] -> [K]."""
    rows = x.split(batch.completions.lengths.tolist())
    return torch.cat([row.flip(0).cumsum(0).flip(0) for row in rows])
