"""The cheapest options that make a run fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from prefopt.advice.memory import Memory, Setup, memory
from prefopt.advice.passes import Row, Updates, updates
from prefopt.advice.sizes import Net

ROOM = 0.9  # share of what is free that a run may take: the estimate is not exact, and other programs grow


@dataclass(frozen=True)
class Run:
    """What memory follows from. rows: of an epoch, in order. repeat: prompts are computed anew for each completion."""

    net: Net
    rows: tuple[Row, ...]
    batch_size: int
    budget: int
    setup: Setup
    repeat: bool = False

    def epoch(self) -> Updates:
        """The updates of an epoch."""
        return updates(self.rows, self.batch_size, self.budget, self.net.head_width, self.repeat)

    def memory(self) -> Memory:
        """What it holds; gradients are added up where an update has several passes."""
        epoch = self.epoch()
        return memory(self.net, epoch.largest, replace(self.setup, several=epoch.most > 1))

    @property
    def smallest(self) -> int:
        """Tokens that a forward pass cannot do without."""
        return max(row.cost(self.repeat) for row in self.rows)


@dataclass(frozen=True)
class Way:
    """One way to need less. options: what to write. cost: how much worse the run gets, to rank ways by. words: what it
    costs. change: the run with it; None where it does not apply.
    """

    options: Mapping[str, Any]
    cost: float
    words: str
    change: Callable[[Run], Run | None]


def _smaller(run: Run) -> Run | None:
    return replace(run, budget=run.smallest) if run.smallest < run.budget else None


def _with(wanted: Callable[[Setup], bool], **changes: Any) -> Callable[[Run], Run | None]:
    """The run with these fields of its setup, where `wanted` says that it applies."""
    return lambda run: replace(run, setup=replace(run.setup, **changes)) if wanted(run.setup) else None


# what costs least first; the costs rank sums of ways, they are no measurement
WAYS: tuple[Way, ...] = (
    Way(
        {"reference": "cache"},
        0.1,
        "nothing: one pass before training, kept on disk",
        _with(lambda setup: setup.reference == "copy" and setup.sampling is None, reference="cache"),
    ),
    Way({"tokens_per_forward": "smallest"}, 1.0, "smaller products; the result is the same", _smaller),
    Way(
        {"save_async": False},
        1.5,
        "training waits while a checkpoint is written",
        _with(lambda setup: setup.saved, saved=False),
    ),
    Way(
        {"gradient_checkpointing": True},
        2.0,
        "about a third more time; the result is the same",
        _with(lambda setup: not setup.checkpointing, checkpointing=True),
    ),
    Way(
        {"dtype": "bfloat16"},
        3.0,
        "rounding: weights in 16 bits, with float32 masters where they are trained",
        _with(lambda setup: setup.size > 2, dtype="bfloat16"),
    ),
    Way(
        {"critic": "shared"},
        4.0,
        "the critic's loss moves the policy's weights too",
        _with(lambda setup: setup.critic == "own", critic="shared"),
    ),
    Way(
        {"lora_rank": 16},
        6.0,
        "an adapter of rank 16 in place of all weights",
        _with(lambda setup: not setup.lora_rank, lora_rank=16),
    ),
)


@dataclass(frozen=True)
class Fit:
    """Ways taken together, and what the run then holds at most. options: as they are written."""

    ways: tuple[Way, ...]
    options: Mapping[str, Any]
    run: Run
    peak: int


def fits(peak: int, room: int) -> bool:
    return peak <= ROOM * room


def cheapest(run: Run, room: int) -> Fit | None:
    """The cheapest ways whose run fits into `room` bytes; none of them if it fits already; None if nothing helps."""
    every = [some for number in range(len(WAYS) + 1) for some in combinations(WAYS, number)]
    for some in sorted(every, key=lambda ways: sum(way.cost for way in ways)):
        found = applied(run, some)
        if found is not None and fits(found.peak, room):
            return found
    return None


def applied(run: Run, ways: Sequence[Way]) -> Fit | None:
    """The run with all of these ways; None if one does not apply."""
    options: dict[str, Any] = {}
    for way in ways:
        changed = way.change(run)
        if changed is None:
            return None
        run = changed
        options |= {name: run.budget if value == "smallest" else value for name, value in way.options.items()}
    if run.setup.lora_rank and run.setup.reference == "copy":
        run = replace(run, setup=replace(run.setup, reference="adapter"))
    return Fit(tuple(ways), options, run, run.memory().peak.total)
