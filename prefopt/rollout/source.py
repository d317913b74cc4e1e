"""The training source of online objectives: prompts are sampled, scored, made into one batch, and learnt from."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar, get_type_hints

import torch

from prefopt import ranks
from prefopt.batch import Batch, Ragged
from prefopt.budget import Budget
from prefopt.records import Example, InputError
from prefopt.rollout.attempts import Attempts
from prefopt.rollout.groups import (
    Group,
    GroupFacts,
    Kinds,
    Range,
    group_metrics,
    most_useful,
    reward_metrics,
    shape_metrics,
    task_metrics,
)
from prefopt.rollout.options import RolloutOptions
from prefopt.rollout.prompts import Draw, Stream

log = logging.getLogger("prefopt")
T = TypeVar("T")

Told = Callable[[int, Sequence[Group]], None]  # number of the first update that a rollout serves, and its groups


class Rollout(NamedTuple):
    """groups: of this process, which `batch` holds. sizes: how many of its prompts each update gets. facts: of the
    groups of all processes, before any were left out. metrics: of the rollout.
    """

    groups: list[Group]
    batch: Batch
    sizes: list[int]
    facts: list[GroupFacts]
    metrics: dict[str, float]


@dataclass
class Buffer:
    """A rollout that is being learnt from. batch: with its targets. cuts: the prompts of each update, first and last
    plus 1. told: metrics of the rollout, until its first update has told them. place: the next update.
    """

    batch: Batch
    cuts: list[tuple[int, int]]
    told: dict[str, float]
    place: int = 0

    def state_dict(self) -> dict[str, Any]:
        batch = {field.name: getattr(self.batch, field.name) for field in fields(self.batch)}
        for name in ("prompts", "completions"):
            batch[name] = vars(batch[name])
        return {"batch": batch, "cuts": self.cuts, "told": self.told, "place": self.place}

    @classmethod
    def of(cls, state: dict[str, Any], objective: Any) -> Buffer:
        """The buffer that was saved. objective: whose targets it holds."""
        batch = dict(state["batch"])
        for name in ("prompts", "completions"):
            batch[name] = Ragged(**batch[name])
        kind = get_type_hints(objective.targets)["return"]
        batch["targets"] = kind(*(None if x is None else x.to(ranks.device()) for x in batch["targets"]))
        return cls(Batch(**batch).to(ranks.device()), state["cuts"], state["told"], state["place"])


class Online:
    """Rollouts without end, each cut into updates.

    The objective's targets are computed once for a whole rollout, by the policy that drew it, and cut with it.
    batch_size: prompts of an update over all processes, of which rank r takes every `world`-th from its r-th on. steps:
    updates of the run, for rewards that ask how far it is.
    seen: metrics of how the last batch came about; those of a rollout are told with its first update.
    tell: told of every rollout's groups. say: lines for the log.
    InputError where a batch has fewer prompts than there are processes.
    """

    def __init__(
        self,
        stream: Stream,
        attempts: Attempts,
        objective: Any,
        options: RolloutOptions,
        *,
        batch_size: int,
        budget: Budget,
        steps: int = 0,
        seed: int = 0,
        tell: Told = lambda step, groups: None,
        say: Callable[[str], None] = log.warning,
    ) -> None:
        if batch_size < ranks.world():
            raise InputError(f"batch_size is {batch_size} and there are {ranks.world()} processes; give each a prompt")
        self.stream, self.attempts, self.objective, self.options = stream, attempts, objective, options
        self.batch_size, self.budget, self.steps, self.seed = batch_size, budget, steps, seed
        self.tell, self.say = tell, say
        self.steps_per_epoch = len(stream.prompts) / stream.main_share * options.rollout_passes / batch_size
        self.seen: dict[str, float] = {}
        self.updates, self.rollouts, self.unscored = 0, 0, 0
        self.range = Range()
        self.ready: Rollout | None = None
        self.buffer: Buffer | None = None

    def first(self, policy: Any) -> Batch:
        """The first rollout, drawn now and kept, to look at before training."""
        self.ready = self._rollout(policy)
        return self.ready.batch

    def batches(self, models: Any) -> Iterator[tuple[Batch, float]]:
        """This process's share of every update, with the constants of its rollout, and its weight, 1.

        InputError after `max_unscored` rollouts in a row in which nothing could be scored. Such a rollout, and an
        update without a score, is left out.
        """
        while True:
            if self.buffer is None:
                rollout = self.ready or self._rollout(models.policy)
                self.ready = None
                if self._without_scores(rollout):
                    continue
                self.tell(self.updates + 1, rollout.groups)
                self.buffer = self._buffered(rollout, models)
            yield from self._updates(self.buffer)
            self.buffer = None

    def _buffered(self, rollout: Rollout, models: Any) -> Buffer:
        """A rollout with the constants that all its updates share."""
        batch = rollout.batch.to(ranks.device())
        several = replace(models, budget=self.budget, several=self.options.updates > 1)
        with torch.no_grad():
            batch = replace(batch, targets=self.objective.targets(batch, several))
        return Buffer(batch, list(self._cuts(rollout.sizes)), rollout.metrics)

    def _updates(self, buffer: Buffer) -> Iterator[tuple[Batch, float]]:
        while buffer.place < len(buffer.cuts):
            part = buffer.batch.take(*buffer.cuts[buffer.place])
            buffer.place += 1
            if not float(ranks.all_sum(self.objective.count(part).double())):
                continue
            self.updates += 1
            self.seen, buffer.told = {**buffer.told, **self._progress()}, {}
            yield part, 1.0

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, and the rollout that is being learnt from, with how far its updates have come."""
        return {
            "stream": self.stream.state_dict(),
            "range": self.range.state_dict(),
            "updates": self.updates,
            "rollouts": self.rollouts,
            "unscored": self.unscored,
            "buffer": self.buffer.state_dict() if self.buffer and self.buffer.place < len(self.buffer.cuts) else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state["stream"])
        self.range.load_state_dict(state["range"])
        self.updates, self.rollouts, self.unscored = state["updates"], state["rollouts"], state["unscored"]
        self.buffer = Buffer.of(state["buffer"], self.objective) if state["buffer"] is not None else None
        self.ready = None

    def _progress(self) -> dict[str, float]:
        return {"epoch": self.stream.drawn / len(self.stream.prompts)}

    def _cuts(self, sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Where each update's prompts begin and end, for every pass over the rollout, in an order of its own."""
        edges = [sum(sizes[:number]) for number in range(len(sizes) + 1)]
        spans = list(pairwise(edges))
        for number in range(self.options.rollout_passes):
            order = list(spans)
            if number:
                random.Random(f"{self.seed}/{self.rollouts}/{number}").shuffle(order)
            yield from order

    # ---------------------------------------------------------------- one rollout

    def _rollout(self, policy: Any) -> Rollout:
        self.rollouts += 1
        self.attempts.begin(self.updates, self.steps)
        self.attempts.sampler.update(getattr(policy, "policy", policy))  # a critic writes nothing
        draws = self.stream.take(self.batch_size * self.options.rollout_batches)
        shares = self._shares(draws)
        sizes = [len(share) for share in shares]
        groups = kept = self._attempted([draw for share in shares for draw in share])
        if self.options.dynamic_sampling:
            groups, kept = self._refilled(draws, groups)
        facts = [fact for share in ranks.gather([group.facts() for group in groups]) for fact in share]
        trained = sum(ranks.gather(sum(group.useful for group in kept)))
        return Rollout(kept, batch_of(kept), sizes, facts, self._measured(facts, trained))

    def _shares(self, whole: Sequence[T]) -> list[list[T]]:
        """This process's part of each update, of a rollout in the order it was drawn."""
        size = self.batch_size
        return [list(whole[at : at + size][ranks.rank() :: ranks.world()]) for at in range(0, len(whole), size)]

    def _attempted(self, draws: Sequence[Draw]) -> list[Group]:
        return self.attempts.at(draws, self.options.num_completions, self.options.sampling)

    def _refilled(self, draws: Sequence[Draw], groups: Sequence[Group]) -> tuple[list[Group], list[Group]]:
        """More groups until as many teach something as were drawn at first, or the rounds are over.

        All that this process attempted, and its part of those that are trained on, which are chosen among the groups of
        all processes in the order of their draws, so that updates do not depend on the number of processes.
        Yu et al. 2025, arXiv:2503.14476 (dynamic sampling).
        """
        wanted, order, groups = len(draws), list(draws), list(groups)
        for _ in range(self.options.dynamic_rounds):
            missing = wanted - sum(ranks.gather(sum(group.useful for group in groups)))
            if missing <= 0:
                break
            more = self.stream.take(missing)
            order += more
            groups += self._attempted(more[ranks.rank() :: ranks.world()])
        everyone = {group.draw.seed: group for share in ranks.gather(groups) for group in share}
        chosen = most_useful([everyone[draw.seed] for draw in order], wanted)
        return groups, [group for share in self._shares(chosen) for group in share]

    def _measured(self, facts: Sequence[GroupFacts], trained: int) -> dict[str, float]:
        """Metrics of the groups of all processes; the curriculum learns of them too."""
        self.range.see(value for fact in facts for value in fact.known)
        solved = [[self.range.solved(value) for value in fact.known] for fact in facts]
        measured = zip(facts, solved, strict=True)
        self.stream.learn((fact.number, sum(own) / len(own)) for fact, own in measured if own and not fact.easier)
        kinds = Kinds.of(facts, self.range)
        seconds = {f"seconds/{name}": spent for name, spent in self.attempts.seconds.items()}
        said = {f"reward/{name}": value for name, value in self.attempts.logged().items()}
        grouped = {} if self.options.num_completions == 1 else group_metrics(kinds, trained)
        task = task_metrics(facts, solved)
        return {**reward_metrics(facts), **task, **said, **grouped, **shape_metrics(facts), **seconds}

    def _without_scores(self, rollout: Rollout) -> bool:
        """Whether nothing in a rollout has a score; said, and an InputError after some in a row."""
        if any(not math.isnan(value) for fact in rollout.facts for value in fact.rewards):
            self.unscored = 0
            return False
        self.unscored += 1
        why = next((fact.why for fact in rollout.facts if fact.why), "all were cut at max_tokens (unfinished: ignore)")
        self.say(f"no completion of rollout {self.rollouts} has a score, so nothing is learnt from it: {why}")
        if self.unscored >= self.options.max_unscored:
            raise InputError(
                f"{self.unscored} rollouts in a row without a single score; the first reason: {why}. "
                "Check the reward on a few completions, and the columns that it reads"
            )
        return True


def batch_of(groups: Sequence[Group]) -> Batch:
    """Groups as one batch, in their order, with their rewards and the sampler's log-probs."""
    examples = [
        Example(
            list(group.draw.prompt.tokens),
            [completion.tokens for completion in group.completions],
            list(group.rewards),
            [[True] * len(completion.tokens) for completion in group.completions],
            group.draw.prompt.where,
        )
        for group in groups
    ]
    logp = [value for group in groups for completion in group.completions for value in completion.logp]
    return replace(Batch.of(examples), rollout_logp=torch.tensor(logp, dtype=torch.float32))
