"""Whether learning from rewards has stalled: no completion is ever rewarded, so that no gradient says anything."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

FAILED = 0.9  # share of groups without any success above which a window counts as stalled
SURE = 0.05  # the bound on the success rate fails to hold in this share of cases


@dataclass(frozen=True)
class Seen:
    """A rollout: groups, those that failed throughout, completions that were judged and that succeeded, mean reward.

    With one completion of each prompt the whole rollout is a group: in it they are compared.
    """

    step: int
    groups: int
    failed: int
    judged: int
    successes: int
    reward: float


@dataclass(frozen=True)
class Stall:
    """A stall, from update `since` on. recovered: the update at which it was over, None while it lasts.

    failed: share of groups in which every completion failed. p_upper: upper bound (95 %) of the chance that a
    completion succeeds. num_completions: so many of a prompt would give one success in half the groups at that chance.
    among: what those groups are, in words.
    """

    since: int
    step: int
    failed: float
    p_upper: float
    num_completions: int
    among: str = "groups"
    recovered: int | None = None

    def summary(self) -> dict[str, Any]:
        return {**vars(self), "advice": advice(self)}


def advice(stall: Stall) -> str:
    """What was found and what to do, in words."""
    return (
        f"learning has stalled: in {stall.failed:.0%} of the {stall.among} no completion was rewarded and the reward "
        f"does not rise; a completion succeeds with a chance of at most {stall.p_upper:.2g} (95 %), so that half the "
        f"groups would hold a success only with num_completions={stall.num_completions:,} or more. Mix in easier "
        "prompts (easier_data), start from a model that solves some, or give partial credit"
    )


class Watch:
    """Told of every rollout; `found` is the latest stall, None if there was none. among: what its groups are."""

    def __init__(self, window: int, among: str = "groups") -> None:
        self.among = among
        self.window: deque[Seen] = deque(maxlen=window)
        self.found: Stall | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"window": [vars(one) for one in self.window], "found": vars(self.found) if self.found else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.window.clear()
        self.window.extend(Seen(**one) for one in state["window"])
        self.found = Stall(**state["found"]) if state["found"] else None

    def see(self, seen: Seen) -> str | None:
        """Take in a rollout; a line for the log when a stall begins or is over."""
        self.window.append(seen)
        if len(self.window) < (self.window.maxlen or 0):
            return None
        groups = sum(one.groups for one in self.window)
        failed = sum(one.failed for one in self.window) / groups if groups else 0.0
        now = failed > FAILED and is_flat([one.reward for one in self.window])
        before = self.found is not None and self.found.recovered is None
        if now:
            since = self.found.since if before and self.found else self.window[0].step
            self.found = _stall(since, failed, list(self.window), self.among)
            return None if before else f"step {seen.step}: {advice(self.found)}"
        if before and self.found and failed <= FAILED:
            self.found = Stall(**{**vars(self.found), "recovered": seen.step})
            return f"step {seen.step}: learning goes on: some completions are rewarded again"
        return None


def _stall(since: int, failed: float, window: list[Seen], among: str) -> Stall:
    bound = upper_bound(sum(one.successes for one in window), sum(one.judged for one in window))
    return Stall(since, window[-1].step, failed, bound, needed(bound), among)


def upper_bound(successes: int, n: int) -> float:
    """The chance of success above which so few of n would be seen in 5 % of cases only.

    Without a success 1 - 0.05^(1/n), which is 3 / n (Hanley and Lippman-Hand 1983, JAMA 249); else the upper end of
    the one-sided Wilson interval. 1 for n = 0.
    """
    if not n:
        return 1.0
    if not successes:
        return 1 - SURE ** (1 / n)
    z, p = 1.6449, successes / n
    return (p + z * z / (2 * n) + z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))) / (1 + z * z / n)


def needed(p: float) -> int:
    """Completions of a prompt of which at least one succeeds in half the groups: ln 0.5 / ln(1 - p), rounded up."""
    return math.ceil(math.log(0.5) / math.log1p(-p)) if 0 < p < 1 else 1


def is_flat(x: list[float]) -> bool:
    """Whether the slope of x over its place is within two standard errors of 0, or not above it. x: at least 3."""
    n = len(x)
    middle, level = (n - 1) / 2, sum(x) / n
    spread = sum((place - middle) ** 2 for place in range(n))
    slope = sum((place - middle) * (value - level) for place, value in enumerate(x)) / spread
    rest = sum((value - level - slope * (place - middle)) ** 2 for place, value in enumerate(x))
    return slope <= 2 * math.sqrt(rest / (n - 2) / spread)
