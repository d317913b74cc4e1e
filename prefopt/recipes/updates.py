"""The updates and evaluations of a run, from its start or from where an earlier one stopped, with checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt import ranks
from prefopt.budget import Budget
from prefopt.checkpoint import Keeper
from prefopt.data import Dataset
from prefopt.data.source import Offline, steps_per_epoch
from prefopt.loop import Listener, LoopOptions, Models, Place, evaluate
from prefopt.loop import train as run_loop
from prefopt.models.policy import Policy
from prefopt.models.reference import ReferenceOptions
from prefopt.optimizer import Updater
from prefopt.recipes import online
from prefopt.recipes.folder import CHECKPOINTS
from prefopt.recipes.journal import Journal
from prefopt.recipes.results import Best
from prefopt.recipes.resume import Earlier, RunState
from prefopt.recipes.signals import Paused, Signals
from prefopt.recipes.watching import Ended, Probe, Watching
from prefopt.records import InputError, NotFinite


class Clock:
    """Seconds spent in each part of a run, for summary.json; of training, those before a resume too."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.last = time.perf_counter()

    def state_dict(self) -> dict[str, float]:
        return {"training": time.perf_counter() - self.last}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.last = time.perf_counter() - state["training"]

    def lap(self, name: str) -> None:
        """Everything since the last lap was `name`."""
        now = time.perf_counter()
        self.laps[name], self.last = round(now - self.last, 3), now


class Following:
    """Moves a copied reference towards the policy every so many updates (TR-DPO, arXiv:2404.09656)."""

    def __init__(self, options: ReferenceOptions, reference: Any, policy: Policy) -> None:
        self.options, self.reference, self.policy = options, reference, policy
        self.moved = 0

    def state_dict(self) -> dict[str, int]:
        return {"moved": self.moved}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.moved = state["moved"]

    def listen(self, step: int, metrics: dict[str, float]) -> None:
        every = self.options.reference_sync_steps
        # an update, not an evaluation; the one that a move is due at may have been skipped
        if every and step - self.moved >= every and "loss" in metrics:
            self.reference.follow(self.policy, self.options.reference_mixup)
            self.moved = step


@dataclass
class Work:
    """What the updates of a run are made of."""

    plan: Any
    settings: dict[str, Any]
    models: Models
    budget: Budget
    peak: float
    rollouts: online.Rollouts | None
    journal: Journal
    best: Best | None
    following: Following | None
    clock: Clock
    watching: Watching | None
    probe: Probe | None

    @property
    def listeners(self) -> list[Listener]:
        return [one.listen for one in (self.journal, self.best, self.following, self.watching) if one is not None]

    def evaluation(self) -> Callable[[], dict[str, float]] | None:
        """Measures what is held out; None where nothing is."""
        held_out, objective = self.plan.held_out, self.plan.objective
        if self.rollouts:
            return self.rollouts.evaluation()
        if held_out is None:
            return None
        size, least = self.settings["loop"].batch_size, objective.facts.least
        probe = self.probe or dict
        return lambda: evaluate(self.models, objective, _held_out(held_out, size, least), self.budget) | probe()

    def state(self, updater: Updater, source: Any, place: Place, earlier: Earlier) -> RunState:
        """Everything of it that changes."""
        rollouts, moving = self.rollouts, self.following is not None
        parts = {
            "place": place,
            "source": source,
            "budget": self.budget,
            "journal": self.journal,
            "best": self.best,
            "following": self.following,
            "reference": self.models.reference if moving else None,
            "held_out": rollouts.check if rollouts else None,
            "rewards": rollouts.reward if rollouts else None,
            "clock": self.clock,
            "earlier": earlier,
            "watching": self.watching,
            "probe": self.probe,
        }
        return RunState(updater, parts)


def run_updates(work: Work, earlier: Earlier, out: Path) -> None:
    """Every update and evaluation of the run, from where an earlier one stopped, with checkpoints."""
    plan, loop, journal, policy = work.plan, work.settings["loop"], work.journal, work.models.policy
    own = work.rollouts.source if work.rollouts else None
    source = own or source_of(plan.data, loop, work.settings["run"].seed, plan.objective.facts.least)
    updater, place = _updater(policy, loop), Place()  # type: ignore[arg-type]
    state = work.state(updater, source, place, earlier)
    if earlier.checkpoint is not None:
        state.restore(earlier.checkpoint)
    keeper = Keeper(
        out / CHECKPOINTS,
        work.settings["checkpoint"],
        state.take,
        files=[*journal.files, *([work.watching.lines.path] if work.watching else [])],
        say=journal.say,
        committed=work.best.forget if work.best else lambda kept: None,
        whole=earlier.checkpoint.step if earlier.checkpoint else None,
        again=_again(work),
    )
    if work.best is not None:
        work.best.make_room = keeper.keep_one
    try:
        with Signals(journal.say) as signals, keeper:
            _loop(work, source, updater, place, lambda: _between(place, keeper, signals, updater, earlier, work))
    except NotFinite as error:
        raise InputError(f"{error}.{_advice(keeper, work, changed=True)}") from None
    if place.step and place.skipped == place.step:
        raise InputError(
            f"none of {place.step} updates could be taken: no gradient was finite; lower learning_rate, or look at the "
            "rows and the model"
        )
    keeper.make_room()


def _loop(work: Work, source: Any, updater: Updater, place: Place, between: Callable[[], None]) -> None:
    """The updates from `place` on, until they are over or, where that is asked for, the run is found to be sick."""

    def end_where_sick() -> None:
        if work.watching is not None and work.watching.sick() is not None:
            raise Ended

    def after() -> None:
        between()
        end_where_sick()

    evaluation = work.evaluation()
    try:
        if place.step:  # it may have been stopped between the update that it was found sick at and its end
            end_where_sick()
        run_loop(
            work.models,
            work.plan.objective,
            source,
            updater,
            work.settings["loop"],
            peak=work.peak,
            steps=work.plan.steps,
            budget=work.budget,
            evaluation=evaluation,
            listeners=work.listeners,
            place=place,
            between=after,
        )
    except Ended:
        assert work.watching is not None
        work.watching.end(place.step)
        if evaluation is not None and work.watching.evaluated != place.step:
            metrics = evaluation()
            for listen in work.listeners:
                listen(place.step, metrics)


def _between(place: Place, keeper: Keeper, signals: Signals, updater: Updater, earlier: Earlier, work: Work) -> None:
    """After an update: a checkpoint where one is due, or, where the run was asked to stop, one and Paused."""
    due = ranks.is_main() and place.bad == 0 and keeper.due(place.step)
    wanted = ranks.all_max(2 if signals.asked else int(due))
    if not wanted:
        return
    if ranks.all_max(int(not updater.is_finite())):
        raise InputError(
            f"after update {place.step} some weights are not numbers, so no checkpoint was written; lower "
            f"learning_rate or max_grad_norm.{_advice(keeper, work, changed=True)}"
        )
    facts = {**earlier.facts, "best": work.best.step if work.best else None}
    keeper.save(place.step, facts, wait=wanted == 2)
    if wanted == 2:
        raise Paused(f"stopped after update {place.step} of {work.plan.steps}.{_advice(keeper, work)}")


def _advice(keeper: Keeper, work: Work, changed: bool = False) -> str:
    """How to go on from the newest checkpoint, where there is one; changed: with other options, or it ends the same."""
    whole = ranks.from_main(keeper.whole)  # the others know of their own part only
    how = _again(work, changed)
    return "" if whole is None else f" {how[0].upper()}{how[1:]} goes on from update {whole}."


def _again(work: Work, changed: bool = False) -> str:
    """What goes on from the newest checkpoint; changed: with other options."""
    first, run = "with that changed, " if changed else "", work.settings["run"]
    if run.overwrite:  # the same command would remove the checkpoint and begin anew
        resume = f"`prefopt train --resume {run.out}{' --allow-inexact' if changed else ''}`"
        return f"{first}{resume}, not the same command with overwrite=true,"
    return f"{first}--allow-inexact (allow_inexact=true)" if changed else "the same command"


def _updater(policy: Policy, loop: LoopOptions) -> Updater:
    return Updater(
        policy.model.parameters(),
        betas=(loop.adam_beta1, loop.adam_beta2),
        eps=loop.adam_eps,
        weight_decay=loop.weight_decay,
    )


def source_of(data: Dataset, loop: LoopOptions, seed: int, least: int = 1) -> Offline:
    epochs = loop.epochs
    if loop.max_steps is not None:
        epochs = max(epochs, math.ceil(loop.max_steps / steps_per_epoch(len(data), loop.batch_size, least)))
    return Offline(
        data.examples, loop.batch_size, epochs=epochs, seed=seed, rank=ranks.rank(), world=ranks.world(), least=least
    )


def _held_out(data: Dataset, batch_size: int, least: int = 1) -> Any:
    source = Offline(data.examples, batch_size, shuffle=False, rank=ranks.rank(), world=ranks.world(), least=least)
    return ((batch.to(ranks.device()), weight) for batch, weight in source.batches())
