"""The exact optimum of an objective's population loss, in float64: the policy is a table of logits.

The objective's own `targets` and `loss` are called on one batch that holds every row that can be drawn; each row then
counts with its probability. Letters: P prompts, R responses to each, B rows of the population, D = P R logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefopt.batch import Batch, Outputs
from prefopt.bench import measures
from prefopt.loop import Models
from prefopt.records import Example


class Row(NamedTuple):
    """What can be drawn: probability (or any weight), responses by number, their scores, the prompt by number."""

    weight: float
    responses: Sequence[int]
    scores: Sequence[float]
    prompt: int = 0


class Population:
    """Rows as one batch. lengths: tokens of each response, one unless given.

    A response's first token is its number and the others are certain, so that its log-prob stands in the table.
    """

    def __init__(self, rows: Sequence[Row], lengths: Sequence[int] | None = None) -> None:
        def tokens(response: int) -> list[int]:
            return [response] * (lengths[response] if lengths else 1)

        self.batch = Batch.of([example(row, [tokens(y) for y in row.responses]) for row in rows])
        self.first = self.batch.completions.lengths.cumsum(0) - self.batch.completions.lengths  # [N]
        self.responses = self.batch.completions.values[self.first]  # [N]
        self.prompts = self.batch.prompts.values[self.batch.group]  # [N]
        weight = torch.tensor([row.weight for row in rows], dtype=torch.float64)  # [B]
        self.weight = self.batch.spread(weight[self.batch.group])  # [K]

    def outputs(self, logits: Tensor) -> Outputs:
        """What the policy with these logits [P, R] says of the batch."""
        logp = logits.log_softmax(-1)[self.prompts, self.responses]  # [N]
        return Outputs(logp.new_zeros(len(self.weight)).index_put((self.first,), logp))


def example(row: Row, completions: list[list[int]]) -> Example:
    return Example([row.prompt], completions, list(row.scores), [[True] * len(tokens) for tokens in completions])


def models(population: Population, policy: Tensor, reference: Tensor) -> Models:
    """Two tables of logits [P, R] as what objectives ask for their targets."""
    return Models(lambda batch: population.outputs(policy), lambda batch: population.outputs(reference).logp)


@dataclass(frozen=True)
class Task:
    """An objective on a population. reference: logits [P, R]. constants: the targets that belong to a policy's logits,
    where the objective's own are an estimate of what is known here exactly.
    """

    objective: Any
    population: Population
    reference: Tensor
    constants: Callable[[Tensor], Any] | None = None

    def targets(self, logits: Tensor) -> Any:
        if self.constants:
            return self.constants(logits)
        return self.objective.targets(self.population.batch, models(self.population, logits, self.reference))

    def gradient(self, logits: Tensor) -> Tensor:
        """Of the population loss, [P, R], differentiable once more.

        The loss is a sum and every row has log-probs of its own, so the derivative with respect to those is the row's
        own: it is weighted there.
        """
        with torch.no_grad():
            targets = self.targets(logits)
        out = self.population.outputs(logits)
        loss = self.objective.loss(self.population.batch, out, targets)[0]
        (credit,) = torch.autograd.grad(loss, out.logp, create_graph=True)  # [K]
        return torch.autograd.grad(out.logp, logits, credit * self.population.weight, create_graph=True)[0]


# ---------------------------------------------------------------- solvers

Gradient = Callable[[Tensor], Tensor]  # logits [P, R], which require one, -> [P, R], differentiable


def optimum(objective: Any, population: Population, reference: Tensor) -> Tensor:
    """Logits [P, R] that minimise the population loss, found from the reference's."""
    return minimum(Task(objective, population, reference).gradient, reference)


def minimum(gradient: Gradient, start: Tensor, steps: int = 50) -> Tensor:
    """Logits [P, R] of the minimum that Newton's method finds from `start`.

    Directions in which the loss is flat are left as they are. AssertionError where the gradient does not vanish or the
    point is no minimum.
    """
    logits = start.clone()
    for _ in range(steps):
        slope, hessian = derivatives(gradient, logits)
        step = newton_step(slope, hessian)
        moved = backtrack(gradient, logits, slope, step)
        if moved is None or step.norm() < 1e-12:
            break
        logits = moved
    slope, hessian = derivatives(gradient, logits)
    values = torch.linalg.eigvalsh(hessian)
    assert slope.norm() < 1e-11 * values[-1], f"the gradient is {float(slope.norm()):g}, not 0"
    assert values[0] > -1e-10 * values[-1], f"no minimum: the loss curves by {float(values[0]):g}"
    return logits


def derivatives(gradient: Gradient, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient [D] and Hessian [D, D]."""
    logits = logits.detach().requires_grad_()
    slope = gradient(logits).flatten()
    lines = [torch.autograd.grad(g, logits, retain_graph=True)[0].flatten() for g in slope]
    return slope.detach(), torch.stack(lines)


def newton_step(slope: Tensor, hessian: Tensor) -> Tensor:
    """Downhill [D]: each direction by the size of its curvature, none along directions without any."""
    values, vectors = torch.linalg.eigh(hessian)
    seen = values.abs() > 1e-13 * values.abs().max()
    return -(vectors[:, seen] / values[seen].abs()) @ (vectors[:, seen].T @ slope)


def backtrack(gradient: Gradient, logits: Tensor, slope: Tensor, step: Tensor) -> Tensor | None:
    """The logits after the longest of the steps 1, 1/2, 1/4, ... that does not overshoot: where the loss does not rise
    along the step as steeply as it fell at its start. None if there is none but for rounding.
    """
    for halvings in range(20):
        moved = (logits + step.view_as(logits) / 2**halvings).requires_grad_()
        if float(gradient(moved).detach().flatten() @ step) < 0.9 * abs(float(slope @ step)):
            return moved.detach()
    return None


def descend(gradient: Gradient, start: Tensor, rate: float, steps: int) -> list[Tensor]:
    """Logits [P, R] before and after each step of plain gradient descent."""
    path = [start.clone()]
    for _ in range(steps):
        slope = gradient(path[-1].clone().requires_grad_()).detach()
        path.append(path[-1] - rate * slope)
    return path


def descend_in_probability(gradient: Gradient, start: Tensor, rate: float, steps: int) -> Tensor:
    """Logits [P, R] after steps along gradient / probability, of at most half a nat: natural gradient descent, up to a
    constant, which in the logits does nothing. What vanishes does so in dozens of steps, not in a power law.
    """
    logits = start.clone()
    for _ in range(steps):
        slope = gradient(logits.requires_grad_()).detach()
        logits = logits.detach() - (rate * slope / logits.detach().softmax(-1)).clamp(-0.5, 0.5)
    return logits


# ---------------------------------------------------------------- populations


def pairs(win: Tensor, weight: Tensor, prompt: int = 0) -> list[Row]:
    """Every ordered pair of different responses: y beats y' with probability weight[y, y'] win[y, y'], both [R, R];
    weight is symmetric. The rejected response stands first in every other row.
    """
    found = []
    for i in range(len(win)):
        for j in range(len(win)):
            if i != j and weight[i, j] > 0:
                share = float(weight[i, j] * win[i, j])
                found.append(Row(share, [i, j], [1, 0], prompt) if i < j else Row(share, [j, i], [0, 1], prompt))
    return found


def matches(win: Tensor, share: Tensor, prompt: int = 0) -> list[Row]:
    """Two responses drawn from `share` [R], each by itself, so that both may be the same."""
    different = pairs(win, 2 * share[:, None] * share[None, :], prompt)  # twice: either may be drawn first
    return different + [Row(float(share[i] ** 2), [i, i], [1, 0], prompt) for i in range(len(share))]


def labels(share: Tensor, good: Tensor, prompt: int = 0) -> list[Row]:
    """A response drawn from `share` [R] and called good with probability `good` [R]."""
    found = []
    for y in range(len(share)):
        found.append(Row(float(share[y] * good[y]), [y], [1], prompt))
        found.append(Row(float(share[y] * (1 - good[y])), [y], [0], prompt))
    return found


def bradley_terry(reward: Tensor) -> Tensor:
    """Probability [R, R] that the row's response beats the column's: sigmoid of the difference of rewards [R]."""
    return torch.sigmoid(reward[:, None] - reward[None, :])


def duel(share: float, lengths: Sequence[int] | None = None) -> Population:
    """Two responses to one prompt, of which the first is preferred with probability `share`."""
    return Population([Row(share, [0, 1], [1, 0]), Row(1 - share, [0, 1], [0, 1])], lengths)


# ---------------------------------------------------------------- yardsticks


def tilted(reference: Tensor, reward: Tensor, beta: float) -> Tensor:
    """Logits of reference x exp(reward / beta) / Z; reference in logits, all [P, R]."""
    return measures.tilted(reference.log_softmax(-1), reward, beta)


def kl(logits: Tensor, other: Tensor) -> float:
    """KL(softmax(logits) || softmax(other)) in nats, mean over prompts."""
    return measures.kl(logits.log_softmax(-1), other.log_softmax(-1))


def margin(logits: Tensor, reference: Tensor) -> float:
    """Log-ratio of response 0 minus that of response 1, nats, at the first prompt."""
    ratio = logits.log_softmax(-1) - reference.log_softmax(-1)
    return float(ratio[0, 0] - ratio[0, 1])


def logit(share: float) -> float:
    return math.log(share / (1 - share))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def draws(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in float64, the same on every call."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
