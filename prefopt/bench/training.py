"""One training run in a world, through the package's own loop, measured exactly along the way."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPTNeoXForSequenceClassification, GPTNeoXForTokenClassification

from prefopt.bench.measures import Measure, measure
from prefopt.bench.online import Rollouts
from prefopt.bench.space import exact_logp, exact_values
from prefopt.bench.worlds import World
from prefopt.budget import Budget
from prefopt.data.source import Offline
from prefopt.loop import Listener, LoopOptions, Models, train
from prefopt.models.critic import ActorCritic, copied, value_model
from prefopt.models.heads import HeadKind, fresh
from prefopt.models.policy import Policy
from prefopt.models.reference import Copied
from prefopt.objectives.facts import extras, fitted, settled
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
    # online: completions of each of the 16 prompts in a rollout; more give a better baseline and cost more
    completions: int = 8
    # online: passes over a rollout; more use each completion more often, further from the policy that drew it
    updates: int = 1
    # online: parts that each pass is cut into, every part an update
    minibatches: int = 1


DEFAULT = Training()


@dataclass(frozen=True)
class Run:
    """model: as trained. points: (updates done, measure), the reference first."""

    model: Any
    points: list[tuple[int, Measure]]

    @property
    def end(self) -> Measure:
        return self.points[-1][1]


def run(
    world: World,
    objective: Any,
    examples: Sequence[Example] | None = None,
    training: Training = DEFAULT,
    reward: Tensor | None = None,
    scorer: Any = None,
) -> Run:
    """Train a copy of the reference on rows of this world or, online, on its own completions and their true rewards.

    examples: None for objectives that learn from completions of their own. reward [P, C]: of those; None: the true one.
    The result is the same for the same
    arguments, and so is that of more threads but for rounding. scorer: the reward model that a critic starts from,
    which stays as it is; None: the reference with a head that says 0.
    """
    wanted: Any = dict.fromkeys(extras(objective), True)
    policy = Policy(world.policy_model(), "padded", **wanted)
    actor = _with_critic(policy, scorer) if objective.facts.critic else policy
    moving = training.reference_sync_steps
    reference: Any = Copied.of(policy, Budget(EVERYTHING)) if moving else world.lookup()
    points = [(0, measure(world, exact_logp(policy.model, world.space)))]

    def listen(step: int, metrics: dict[str, float]) -> None:
        if moving and step % moving == 0:
            reference.follow(policy, training.reference_mixup)
        if step % training.every == 0 or step == training.steps:
            points.append((step, measure(world, exact_logp(policy.model, world.space))))

    if objective.facts.data == "prompts":
        objective, source = _online(world, objective, training, reward)
    else:
        objective, source = _offline(objective, examples or [], training)
    _train(Models(actor, reference), objective, source, training, listen)
    return Run(policy.model, points)


def _with_critic(policy: Policy, scorer: Any) -> ActorCritic:
    classifier = copied(policy) if scorer is None else copy.deepcopy(scorer)
    return ActorCritic(policy, value_model(classifier, "padded"))


def learn_scorer(world: World, objective: Any, examples: Sequence[Example], training: Training = DEFAULT) -> Any:
    """A reward model that starts from the reference with a new head."""
    model = _scorer(world, objective.facts.head, training.seed)
    objective, source = _offline(objective, examples, training)
    _train(Models(Policy(model, "padded")), objective, source, training, lambda step, metrics: None)
    return model


def reward_of(scorer: Any, world: World) -> Tensor:
    """What a reward model says of every completion, [P, C]."""
    value = exact_values(scorer, world.space)  # [P, C, L]
    return value[:, torch.arange(len(world.space.tokens)), world.space.lengths - 1]


def learn_reward(world: World, objective: Any, examples: Sequence[Example], training: Training = DEFAULT) -> Tensor:
    """The reward of every completion as a model learns it that starts from the reference with a new head, [P, C].

    The policy that any amount of reinforcement learning on it could at best come to is `tilted(reference, reward, b)`.
    Of a process reward model: the log of the probability that all steps are right.
    """
    model = learn_scorer(world, objective, examples, training)
    if objective.facts.head == "steps":
        return (F.logsigmoid(exact_values(model, world.space)) * world.space.real).sum(2)
    return reward_of(model, world)


def _online(world: World, objective: Any, training: Training, reward: Tensor | None) -> tuple[Any, Any]:
    """The objective with what follows from the world filled in, and its source."""
    objective = fitted(objective, world.space.tokens.shape[1], training.completions)
    cut = {"updates": training.updates, "minibatches": training.minibatches}
    return objective, Rollouts(world, objective, training.completions, seed=training.seed, reward=reward, **cut)


def _offline(objective: Any, examples: Sequence[Example], training: Training) -> tuple[Any, Any]:
    """The objective with what follows from the rows filled in, and its source."""
    objective, size = settled(objective, examples), training.batch_size
    epochs = math.ceil(training.steps * size / len(examples)) + 1
    return objective, Offline(examples, size, epochs=epochs, seed=training.seed, least=objective.facts.least)


def _train(models: Any, objective: Any, source: Any, training: Training, listen: Listener) -> None:
    train(
        models,
        objective,
        source,
        Updater(models.policy.model.parameters()),
        LoopOptions(schedule="linear", warmup=min(1.0, WARM / training.steps)),
        peak=training.learning_rate,
        steps=training.steps,
        budget=Budget(EVERYTHING, repeat=True),
        listeners=[listen],
    )


def _scorer(world: World, kind: HeadKind, seed: int) -> Any:
    """The reference with a new score head in place of its own."""
    config = copy.deepcopy(world.model.config)
    config.num_labels = 2 if kind == "steps" else 1
    classifier: Any = GPTNeoXForTokenClassification if kind == "steps" else GPTNeoXForSequenceClassification
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = classifier(config)
        fresh(model, kind)
    model.base_model.load_state_dict(world.model.base_model.state_dict())
    return model.to(next(world.model.parameters()).dtype).eval()
