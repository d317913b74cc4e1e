"""What the rest of the package needs to know of an objective, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from torch import Tensor

from prefopt.batch import Batch, Outputs


@dataclass(frozen=True)
class Facts:
    """Read by the recipes, the data reader, the command line, the docs table and the tests' parametrisation.

    data: the shape of a row. learning_rate: default peak for full training of a pretrained model.
    reference: needs log-probs of a frozen policy. entropy: reads `Outputs.entropy`.
    """

    name: str
    title: str
    data: Literal["demonstrations", "pairs", "labels"]
    source: str
    learning_rate: float
    reference: bool = False
    entropy: bool = False


class Nothing(NamedTuple):
    """The targets of an objective that needs none."""


class Models(Protocol):
    """What an objective may ask for when it computes its targets; always under no_grad."""

    def policy(self, batch: Batch) -> Outputs: ...

    def reference(self, batch: Batch) -> Tensor:
        """Log-probs of the completion tokens under the frozen reference, [K] nats."""
        ...


class Objective(Protocol):
    """A training objective: a frozen dataclass whose fields are its options."""

    facts: ClassVar[Facts]

    def count(self, batch: Batch) -> Tensor:
        """[] What the mean is taken over; from the batch alone."""
        ...

    def targets(self, batch: Batch, models: Any) -> Any:
        """A NamedTuple of constants for this step: reference log-probs, advantages. No gradient."""
        ...

    def loss(self, batch: Batch, out: Outputs, targets: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """[] a SUM over items (the loop divides once per step), and per-item metric vectors."""
        ...

    def at_start(self) -> dict[str, float]:
        """Values that hold exactly while the policy equals the reference; checked before the first update."""
        ...
