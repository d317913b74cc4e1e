"""What the rest of the package needs to know of an objective, as data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from torch import Tensor

from prefopt.batch import Batch, Outputs
from prefopt.records import Example


@dataclass(frozen=True)
class Facts:
    """Read by the recipes, the data reader, the command line, the docs and the tests' parametrisation.

    data: the shape of a row. source: paper and equation. learning_rate: default peak for full training of a pretrained
    model. head: what is trained, a language model, a score of a whole completion ("completion") or of its steps
    ("steps"). reference: needs log-probs of a frozen policy. live: asks the reference about texts that are in no row: a
    cache cannot serve. forwards: passes over the data per update besides the one that carries the gradient, not
    counting a cached reference. least: fewest prompts an update can be computed from. least_completions: fewest of each
    prompt, where the policy writes them (data: prompts; their scores are rewards, NaN where one could not be given).
    critic: reads `Outputs.value`, what a critic expects before each token, and trains the critic along with the policy.
    healthy, failures: for users, in words: what good metrics look like; how it goes wrong and what to change.
    """

    name: str
    title: str
    data: Literal["demonstrations", "pairs", "labels", "ratings", "steps", "prompts"]
    source: str
    learning_rate: float
    head: Literal["language", "completion", "steps"] = "language"
    reference: bool = False
    live: bool = False
    forwards: int = 0
    least: int = 1
    least_completions: int = 1
    critic: bool = False
    healthy: str = ""
    failures: str = ""


class Nothing(NamedTuple):
    """The targets of an objective that needs none."""


class Models(Protocol):
    """What an objective may ask for when it computes its targets; always under no_grad.

    Two attributes may be left out: `budget`, the run's token budget per forward pass, and `several`, whether the batch
    serves more than one update, so that the policy will have moved away from what drew it.
    """

    def policy(self, batch: Batch) -> Outputs: ...

    def reference(self, batch: Batch) -> Tensor:
        """Log-probs of the completion tokens under the frozen reference, [K] nats."""
        ...


class Objective(Protocol):
    """A training objective: a frozen dataclass whose fields are its options.

    Attributes may be left out: `extras`, the optional `Outputs` it reads ("entropy", "collision"), `settled` and
    `fitted`, see there.
    """

    facts: ClassVar[Facts]

    def count(self, batch: Batch) -> Tensor:
        """[] What the mean is taken over; from the batch alone."""
        ...

    def targets(self, batch: Batch, models: Any) -> Any:
        """A NamedTuple of constants for this step: reference log-probs, advantages. No gradient.

        Called on every process, each with its share of the step, so it may gather over processes.
        """
        ...

    def loss(self, batch: Batch, out: Outputs, targets: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """[] a SUM over items (the loop divides once per step), and per-item metric vectors."""
        ...

    def at_start(self) -> dict[str, float]:
        """Values that hold exactly while the policy equals the reference; checked before the first update."""
        ...


def extras(objective: Any) -> tuple[str, ...]:
    """The optional fields of `Outputs` that the objective reads."""
    named: tuple[str, ...] = getattr(objective, "extras", ())
    return named


def fitted(objective: Any, max_tokens: int, num_completions: int) -> Any:
    """The objective with options that follow from how completions are drawn filled in, by its own method `fitted`.

    max_tokens: the longest completion. num_completions: of each prompt.
    """
    return objective.fitted(max_tokens, num_completions) if hasattr(objective, "fitted") else objective


def needs_reference(objective: Any) -> bool:
    """Whether this run reads a reference: an online objective with a beta of 0 does not."""
    facts: Facts = objective.facts
    return facts.reference and (facts.data != "prompts" or bool(getattr(objective, "beta", 1.0)))


def check_ranges(options: Any, *names: str, above_zero: tuple[str, ...] = ()) -> None:
    """ValueError, naming the default, unless the named options are finite, at least 0, and above 0 where it is said.

    One that is None follows from something else, and is none of these.
    """
    for name in (*names, *above_zero):
        value, usual = getattr(options, name), getattr(type(options), name)
        todo = "leave it out for the usual choice" if usual is None else f"{usual} is the usual start"
        if value is None:
            continue
        if value == math.inf:
            raise ValueError(f"{name} must be finite; {todo}")
        if not value >= 0 or (name in above_zero and not value):
            words = "must be above 0" if name in above_zero else "must not be negative"
            raise ValueError(f"{name} {words}, got {value}; {todo}")


def settled(objective: Any, examples: Sequence[Example]) -> Any:
    """The objective with options that follow from the training rows filled in, by its own method `settled(examples)`.

    InputError, naming the row, where the rows cannot serve.
    """
    return objective.settled(examples) if hasattr(objective, "settled") else objective
