"""The training loop: one for every objective and every source of batches."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from prefopt import ranks
from prefopt.batch import Batch
from prefopt.budget import Budget
from prefopt.optimizer import Updater
from prefopt.records import NotFinite

log = logging.getLogger("prefopt")


@dataclass(frozen=True)
class LoopOptions:
    """How the weights are updated."""

    # peak step size; None: the objective's default, ten times it with an adapter
    learning_rate: float | None = None
    # prompts per update, over all processes and forward passes
    batch_size: int = 32
    # passes over the training data
    epochs: float = 1.0
    # updates in all; None: as many as the epochs have
    max_steps: int | None = None
    # shape of the learning rate after warm-up
    schedule: Literal["cosine", "linear", "constant", "inverse_sqrt"] = "cosine"
    # share of the updates over which the learning rate rises from zero
    warmup: float = 0.1
    # gradient norm above which the gradient is scaled down; None: never
    max_grad_norm: float | None = 1.0
    # decoupled weight decay, on matrices
    weight_decay: float = 0.0
    # decay of AdamW's first moment
    adam_beta1: float = 0.9
    # decay of AdamW's second moment
    adam_beta2: float = 0.999
    # added to AdamW's denominator
    adam_eps: float = 1e-8
    # tokens in one forward pass: bounds memory, never changes the result, halves itself when memory runs out;
    # None: 2048 on a CPU, 8192 on a GPU
    tokens_per_forward: int | None = None
    # evaluate on the held-out split every so many updates; None: at the start and the end
    eval_every: int | None = None
    # updates in a row with a gradient that is not finite before the run stops
    max_bad_steps: int = 5

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_steps", "eval_every", "tokens_per_forward", "max_bad_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("learning_rate", "epochs", "max_grad_norm", "adam_eps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup must be a share of the updates, 0 to 1, got {self.warmup}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")


# told of every update (step, metrics) and every evaluation (metrics named eval/...)
Listener = Callable[[int, dict[str, float]], None]


@dataclass
class Models:
    """What objectives see: `policy(batch) -> Outputs` and, where one is needed, `reference(batch) -> [K] nats`.

    budget: of the run, for passes that an objective takes itself. several: the batch serves more than one update.
    """

    policy: Callable[[Batch], Any]
    reference: Callable[[Batch], Tensor] | None = None
    budget: Budget | None = None
    several: bool = False


def budget_for(options: LoopOptions, device: torch.device, together: bool = False, repeat: bool = False) -> Budget:
    """The token budget of a run on `device`; together and repeat as `Budget` has them."""
    return Budget(options.tokens_per_forward or (8192 if device.type == "cuda" else 2048), together, repeat)


def rate(options: LoopOptions, peak: float, step: int, steps: int) -> float:
    """The learning rate of update `step` (from 0) of `steps`: linear warm-up, then the schedule."""
    warm = math.ceil(options.warmup * steps)
    if step < warm:
        return peak * (step + 1) / warm
    if options.schedule == "constant":
        return peak
    if options.schedule == "inverse_sqrt":
        return peak * math.sqrt(max(warm, 1) / (step + 1))
    done = (step - warm) / max(steps - warm, 1)
    return peak * (1 - done if options.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


def update(
    models: Models, objective: Any, batch: Batch, weight: float, updater: Updater, budget: Budget, settings: Step
) -> dict[str, float] | None:
    """One optimiser step on this process's share of a batch; metrics averaged over all of it, on all processes.

    The loss of every forward pass is a sum and is divided by a total known beforehand, so neither the token budget nor
    the number of processes changes the gradient. None, with nothing updated, when the gradient is not finite.
    """
    targets = targets_of(models, objective, batch, budget)
    total = ranks.all_sum(objective.count(batch).double() * weight)

    def passes(tokens: int) -> Sums:
        sums = Sums()
        for part, goal, counts in budget.passes(batch, targets, tokens):
            share = weight if counts else 0.0
            loss, seen = objective.loss(part, models.policy(part), goal)
            (loss * (share / total)).backward()
            if share:
                sums.add(loss, seen)
        return sums

    sums = budget.run(passes, smallest=budget.smallest(batch), undo=updater.zero)
    updater.sum_over_processes()
    norm = updater.step(settings.learning_rate, settings.max_grad_norm)
    if norm is None:
        return None
    tokens = ranks.all_sum(
        torch.tensor(sum(batch.tokens_per_prompt()) * weight, dtype=torch.float64, device=total.device)
    )
    return {"loss": sums.mean_loss(total), **sums.means(), "grad_norm": norm, "tokens": float(tokens)}


def targets_of(models: Models, objective: Any, batch: Batch, budget: Budget) -> Any:
    """The objective's constants of a batch: those it brings along, or computed now, without gradient."""
    if batch.targets is not None:
        return batch.targets
    with torch.no_grad():
        return objective.targets(batch, replace(models, budget=budget))


@dataclass(frozen=True)
class Step:
    """Settings of one update."""

    learning_rate: float
    max_grad_norm: float | None


@dataclass
class Place:
    """Where a run is. step: updates taken, those skipped among them. bad: gradients in a row that were not finite.
    skipped: all of these so far.
    """

    step: int = 0
    bad: int = 0
    skipped: int = 0

    def skip(self) -> None:
        """Count an update that was not taken."""
        self.bad, self.skipped = self.bad + 1, self.skipped + 1
        log.warning("step %d: the gradient is not finite; the update was skipped", self.step)

    def give_up(self, most: int, learning_rate: float) -> None:
        """NotFinite after `most` skipped updates in a row."""
        if self.bad >= most:
            raise NotFinite(
                f"{self.bad} gradients in a row were not finite; lower learning_rate (now {learning_rate:g})"
            )

    def state_dict(self) -> dict[str, int]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, int]) -> None:
        vars(self).update(state)


class Sums:
    """Sums and counts of the loss and of per-item metrics over forward passes, and then over processes."""

    def __init__(self) -> None:
        self.loss: Tensor | float = 0.0
        self.totals: dict[str, tuple[Tensor, int]] = {}

    def add(self, loss: Tensor, seen: dict[str, Tensor]) -> None:
        self.loss = self.loss + loss.detach().double()
        for name, x in seen.items():
            total, count = self.totals.get(name, (torch.zeros((), dtype=torch.float64, device=x.device), 0))
            self.totals[name] = (total + x.detach().double().sum(), count + x.numel())

    def mean_loss(self, total: Tensor) -> float:
        """The loss per item; `total` is already summed over processes."""
        return float(ranks.all_sum(torch.as_tensor(self.loss, dtype=torch.float64, device=total.device)) / total)

    def means(self) -> dict[str, float]:
        """Each metric averaged over its items on all processes; a process that saw none adds nothing.

        A metric without an item anywhere is left out: nothing was measured.
        """
        names = sorted(set().union(*ranks.gather(list(self.totals))))
        result = {}
        for name in names:
            total, count = self.totals.get(name, (torch.zeros((), dtype=torch.float64), 0))
            both = ranks.all_sum(torch.tensor([float(total), float(count)], dtype=torch.float64, device=ranks.device()))
            if both[1]:
                result[name] = float(both[0] / both[1])
        return result


def evaluate(
    models: Models, objective: Any, batches: Iterable[tuple[Batch, float]], budget: Budget
) -> dict[str, float]:
    """The objective's loss and metrics on held-out batches, without gradient, as eval/... on all processes."""
    sums, count = Sums(), torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for batch, weight in batches:
            targets = targets_of(models, objective, batch, budget)

            def passes(tokens: int, batch: Batch = batch, targets: Any = targets, weight: float = weight) -> Sums:
                part_sums = Sums()
                for part, goal, counts in budget.passes(batch, targets, tokens):
                    loss, seen = objective.loss(part, models.policy(part), goal)
                    if weight and counts:
                        part_sums.add(loss, seen)
                return part_sums

            done = budget.run(passes, smallest=budget.smallest(batch))
            sums.loss = sums.loss + done.loss
            for name, (total, number) in done.totals.items():
                before, items = sums.totals.get(name, (torch.zeros_like(total), 0))
                sums.totals[name] = (before + total, items + number)
            count += objective.count(batch).double().cpu() * weight
    found = {"loss": sums.mean_loss(ranks.all_sum(count.to(ranks.device()))), **sums.means()}
    # comparisons of what is no number are all false: a share of 0 that was not measured
    broken = not math.isfinite(found["loss"])
    return {f"eval/{name}": math.nan if broken else value for name, value in found.items()}


def train(
    models: Models,
    objective: Any,
    source: Any,
    updater: Updater,
    options: LoopOptions,
    *,
    peak: float,
    steps: int,
    budget: Budget,
    evaluation: Callable[[], dict[str, float]] | None = None,
    listeners: Sequence[Listener] = (),
    place: Place | None = None,
    between: Callable[[], None] = lambda: None,
) -> None:
    """Run `steps` updates. NotFinite after `max_bad_steps` gradients in a row that are not finite.

    source: has `batches(models)`, `steps_per_epoch` and `seen`, metrics of how the last batch came about. evaluation:
    measures, named eval/..., at the start, every `eval_every` updates and at the end. place: where the run is; one that
    goes on from a checkpoint begins where it was. between: called after everything that belongs to an update; it may
    save the run, and stop it by raising.
    """

    def tell(step: int, metrics: dict[str, float]) -> None:
        for listen in listeners:
            listen(step, metrics)

    def measure(step: int) -> None:
        if evaluation is not None:
            tell(step, evaluation())

    place = place or Place()
    if not place.step:
        measure(0)
    for step, (batch, weight) in zip(range(place.step, steps), source.batches(models), strict=False):
        began, now = time.perf_counter(), rate(options, peak, step, steps)
        metrics = update(
            models,
            objective,
            batch.to(ranks.device()),
            weight,
            updater,
            budget,
            Step(now, options.max_grad_norm),
        )
        place.step = step + 1
        if metrics is None:
            place.skip()
            tell(step + 1, {"skipped": float(place.skipped)})
            place.give_up(options.max_bad_steps, now)
            between()
            continue
        place.bad = 0
        speed = metrics["tokens"] / (time.perf_counter() - began)
        epoch = (step + 1) / source.steps_per_epoch
        tell(step + 1, {**metrics, "learning_rate": now, "tokens_per_second": speed, "epoch": epoch, **source.seen})
        if options.eval_every and (step + 1) % options.eval_every == 0 and step + 1 < steps:
            measure(step + 1)
        between()
    measure(steps)
