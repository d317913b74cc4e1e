"""Which of a prompt's completions become rows of training data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from prefopt.data.columns import LARGEST
from prefopt.records import InputError

Kind = Literal["pairs", "labels", "ranked", "best", "revised"]
# kind of row -> the objective that such rows are made for
TRAINS: Mapping[str, str] = {"pairs": "dpo", "labels": "kto", "ranked": "reward", "best": "sft", "revised": "dpo"}
# option -> the kinds of row that read it; the others are read by every kind
READ_BY: Mapping[str, tuple[str, ...]] = {
    "pair": ("pairs",),
    "margin": ("pairs", "revised"),
    "threshold": ("labels", "best"),
    "keep": ("best",),
    "rounds": ("revised",),
}


@dataclass(frozen=True)
class RowOptions:
    """Which completions become rows."""

    # pairs. best: the best completion against the worst; all: every two of them that score differently
    pair: Literal["best", "all"] = "best"
    # reward by which the chosen completion must at least be ahead; larger makes fewer and clearer pairs. Equal scores
    # never make one
    margin: float = 0.0
    # reward from which a completion is good (labels) or good enough (best, then called rejection sampling). None:
    # labels compare with the mean of the prompt's completions, best takes the best whatever it is worth
    threshold: float | None = None
    # best: completions of each prompt that are kept, the best ones; more keep variety and let worse ones in
    keep: int = 1
    # revised: rounds of critique and revision, one after the other; each costs a call of the judge
    rounds: int = 1
    # completions cut at max-tokens. ignore: left out and counted, since training would teach to end where they were
    # cut; keep: taken like others
    unfinished: Literal["ignore", "keep"] = "ignore"
    # prompts sampled, scored and written together: more keep sampler and judge busy, fewer lose less when interrupted
    prompts_at_once: int = 16

    def __post_init__(self) -> None:
        if not 0 <= self.margin <= LARGEST:
            raise ValueError(f"margin must be at least 0 and at most {LARGEST:g}, got {self.margin}")
        if self.threshold is not None and not abs(self.threshold) <= LARGEST:
            raise ValueError(f"threshold must be a number, {LARGEST:g} at most, got {self.threshold}")
        for name in ("keep", "rounds", "prompts_at_once"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def refuse_unread(self, kind: Kind) -> None:
        """InputError, naming the option, where one is changed that such rows do not read."""
        for name, readers in READ_BY.items():
            if kind not in readers and getattr(self, name) != getattr(RowOptions, name):
                raise InputError(f"{name} is read with --as {' or '.join(readers)} only; leave it out")
