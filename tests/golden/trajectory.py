"""Twenty updates of a toy model, from weights and rows given by formulas: the same numbers wherever they are computed.

`PYTHONPATH=tests python tests/golden/trajectory.py` writes the losses beside this file. Do so only when a change is
meant to move them, and say why in the commit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from laws import VOCABULARY, batch_from, gpt_neox, step_labels
from variants import ALL

from prefopt.batch import Batch
from prefopt.budget import Budget
from prefopt.data.source import Offline
from prefopt.loop import LoopOptions, Models, train
from prefopt.models.critic import ActorCritic, value_model
from prefopt.models.policy import Policy
from prefopt.models.reference import Copied
from prefopt.objectives.facts import extras
from prefopt.optimizer import Updater
from prefopt.records import Example

HERE = Path(__file__).parent
STEPS = 20
PEAK = {"prompts": 4e-3}  # ratios of whole completions grow fast


def formula_model(head: str = "language") -> Any:
    """A model whose weights do not depend on any library's random numbers."""
    model = gpt_neox(0, head=head)
    with torch.no_grad():
        for number, (name, p) in enumerate(sorted(model.named_parameters())):
            wave = 0.4 * torch.sin(torch.arange(p.numel(), dtype=torch.float64) * (1.7 + 0.1 * number))
            p.copy_(wave.view_as(p) + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return model


def formula_rows(data: str, num: int = 12) -> list[Example]:
    """Rows whose tokens are multiples of 7 and 11, of unequal length, some tokens untrained, worse first at times."""
    scores = {"pairs": [1.0, 0.0], "ratings": [2.0, 0.5, -1.0], "prompts": [1.0, 0.0, 0.5]}.get(data, [1.0])
    examples = []
    for n in range(num):
        prompt = [(7 * n + i) % VOCABULARY for i in range(1 + n % 5)]
        completions = [
            [(11 * n + 3 * i + 5 * k) % VOCABULARY for i in range(2 + (n + 2 * k) % 4)] for k in range(len(scores))
        ]
        trained = [[i != 1 or n % 3 > 0 for i in range(len(c))] for c in completions]
        flipped = scores[::-1] if n % 2 and len(scores) == 2 else [float(n % 2)] if data == "labels" else scores
        if data == "prompts":  # one in four could not be scored
            flipped = [math.nan if n % 4 == 3 and k == 2 else scores[(n + k) % 3] for k in range(3)]
        examples.append(Example(prompt, completions, flipped, trained, f"row {n}"))
    return [replace(each, steps=step_labels(each)) for each in examples] if data == "steps" else examples


class Rollout:
    """One rollout of three updates, used over and over: its constants are those of the policy before the first."""

    def __init__(self, objective: Any, batch: Batch) -> None:
        self.objective, self.batch = objective, batch
        self.steps_per_epoch, self.seen = 3, {}

    def batches(self, models: Models) -> Iterator[tuple[Batch, float]]:
        with torch.no_grad():
            targets = self.objective.targets(self.batch, replace(models, several=True))
        whole = replace(self.batch, targets=targets)
        while True:
            for start in range(0, whole.num_prompts, 4):
                yield whole.take(start, start + 4), 1.0


def source(objective: Any) -> Any:
    examples = formula_rows(objective.facts.data)
    if objective.facts.data == "prompts":
        return Rollout(objective, batch_from("prompts", examples))
    return Offline(examples, batch_size=4, epochs=10, shuffle=False)


def formula_policy(objective: Any) -> tuple[Policy, Any]:
    """The policy, and what is trained: with a critic where the objective has one."""
    policy = Policy(formula_model(objective.facts.head), **dict.fromkeys(extras(objective), True))
    if not objective.facts.critic:
        return policy, policy
    return policy, ActorCritic(policy, value_model(formula_model("completion"), policy.layout))


def losses(name: str, tokens: int = 40) -> list[float]:
    """Loss of each update of the objective `name` of `variants.ALL`."""
    objective = ALL[name]
    actor, policy = formula_policy(objective)
    models = Models(policy, Copied.of(actor, Budget(tokens)) if objective.facts.reference else None)
    found: list[float] = []

    def listen(step: int, metrics: dict[str, float]) -> None:
        found.append(metrics["loss"])

    train(
        models,
        objective,
        source(objective),
        Updater(policy.model.parameters()),
        LoopOptions(),
        peak=PEAK.get(objective.facts.data, 1e-2),
        steps=STEPS,
        budget=Budget(tokens),
        listeners=[listen],
    )
    return found


def path(name: str) -> Path:
    return HERE / f"{name}.json"


if __name__ == "__main__":
    for each in ALL:
        path(each).write_text(json.dumps(losses(each), indent=1) + "\n", encoding="utf-8")
        print(path(each))
