"""One training run in a world, through the package's own loop, measured exactly along the way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefopt.bench.measures import Measure, measure
from prefopt.bench.space import exact_logp
from prefopt.bench.worlds import World
from prefopt.budget import Budget
from prefopt.data.source import Offline
from prefopt.loop import LoopOptions, Models, train
from prefopt.models.policy import Policy
from prefopt.models.reference import Copied
from prefopt.objectives.facts import extras, settled
from prefopt.optimizer import Updater
from prefopt.records import Example

EVERYTHING = 10**9  # a token budget that no batch of a world reaches
WARM = 20  # updates over which the learning rate rises


@dataclass(frozen=True)
class Training:
    """Settings of a run. Learning rate: AdamW, 20 updates of warm-up, then linear to zero."""

    # updates: more move further and fit the rows more closely
    steps: int = 400
    # prompts per update: larger is less noisy and slower
    batch_size: int = 64
    # peak step size: larger moves further; much above 3e-3 is unstable here
    learning_rate: float = 1e-3
    # order of the rows
    seed: int = 0
    # measure every so many updates, and at the start and the end
    every: int = 50
    # updates after which the reference moves towards the policy (TR-DPO); None: it stays
    reference_sync_steps: int | None = None
    # share of the policy in a reference that moves
    reference_mixup: float = 0.6


DEFAULT = Training()


@dataclass(frozen=True)
class Run:
    """model: as trained. points: (updates done, measure), the reference first."""

    model: Any
    points: list[tuple[int, Measure]]

    @property
    def end(self) -> Measure:
        return self.points[-1][1]


def run(world: World, objective: Any, examples: Sequence[Example], training: Training = DEFAULT) -> Run:
    """Train a copy of the reference on rows of this world.

    The result is the same for the same arguments, and so is that of more threads but for rounding.
    """
    wanted: Any = dict.fromkeys(extras(objective), True)
    policy = Policy(world.policy_model(), "padded", **wanted)
    objective = settled(objective, examples)
    moving = training.reference_sync_steps
    reference: Any = Copied.of(policy, Budget(EVERYTHING)) if moving else world.lookup()
    points = [(0, measure(world, exact_logp(policy.model, world.space)))]

    def listen(step: int, metrics: dict[str, float]) -> None:
        if moving and step % moving == 0:
            reference.follow(policy, training.reference_mixup)
        if step % training.every == 0 or step == training.steps:
            points.append((step, measure(world, exact_logp(policy.model, world.space))))

    source = Offline(
        examples,
        training.batch_size,
        epochs=math.ceil(training.steps * training.batch_size / len(examples)) + 1,
        seed=training.seed,
        least=objective.facts.least,
    )
    train(
        Models(policy, reference),
        objective,
        source,
        Updater(policy.model.parameters()),
        LoopOptions(schedule="linear", warmup=min(1.0, WARM / training.steps)),
        peak=training.learning_rate,
        steps=training.steps,
        budget=Budget(EVERYTHING, repeat=True),
        listeners=[listen],
    )
    return Run(policy.model, points)
