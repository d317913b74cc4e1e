"""Whether learning from rewards has stalled: no completion is ever rewarded, so that no gradient says anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from prefopt.detectors.finding import FINE, Check, Line, State
from prefopt.detectors.series import is_flat, keep, needed, upper_bound

LEAST_LINES = 5  # of logs that have a line for many updates


class Seen(NamedTuple):
    """A rollout: share of its groups that failed throughout, completions judged, those that succeeded, mean reward.

    judged: 0 where the log does not say.
    """

    step: int
    failed: float
    judged: int
    successes: int
    reward: float


@dataclass(frozen=True)
class SparseReward:
    """Nearly all groups fail throughout and the reward does not rise: learning has stalled.

    With one completion of each prompt the whole rollout is a group: in it they are compared. Groups that are solved
    throughout teach nothing either, and are no stall.
    """

    # rollouts that are judged together; the option stall_window of a run goes before it. Fewer speak sooner, and take
    # a slow start for a stall
    window: int = 30
    # share of groups without any success above which they count as stalled
    failed: float = 0.9
    needed: int = 1
    among: int = 1

    name: ClassVar[str] = "sparse_reward"
    title: ClassVar[str] = "no completion is ever rewarded"

    def see(self, state: State, line: Line) -> Check | None:
        seen = rollout(line)
        if seen is None:
            return None
        window = int(line.run.number("stall_window") or self.window)
        rows = [Seen(*row) for row in keep(state.setdefault("seen", []), list(seen), window)]
        if not _is_full(rows, window, line.run.source):
            return None
        weight = sum(max(row.judged, 1) for row in rows)
        failed = sum(row.failed * max(row.judged, 1) for row in rows) / weight
        if failed <= self.failed:
            return FINE
        if not is_flat([row.reward for row in rows]):
            return None  # no stall, and no proof that one is over
        return self._stall(state, rows, failed, line)

    def _stall(self, state: State, rows: list[Seen], failed: float, line: Line) -> Check:
        judged, successes = sum(row.judged for row in rows), sum(row.successes for row in rows)
        among = "rollouts" if "success" in line.values and "zero_variance/failed" not in line.values else "groups"
        bound = upper_bound(successes, judged) if judged else None
        wanted = needed(bound) if bound is not None else None
        return Check(
            "sick",
            failed,
            self.failed,
            _reason(failed, among, bound, wanted),
            "Mix in easier prompts (easier_data), start from a model that solves some, or give partial credit",
            _change(line, wanted),
            since=rows[0].step,
            evidence={"p_upper": bound, "num_completions": wanted, "among": among, "judged": judged or None},
        )


def rollout(line: Line) -> Seen | None:
    """What a line says of a rollout; None where it says nothing, or not whether equal rewards are high or low."""
    reward = line.get("task_reward", "reward")
    failed = line.get("zero_variance/failed")
    success, judged = line.get("success"), int(min(max(line.get("judged") or 0.0, 0.0), 1e12))
    if reward is None:
        return None
    if failed is None and success is not None:
        failed = float(success == 0)
    if failed is None and reward <= 0:  # a log that does not tell solved from failed groups; nothing is solved here
        failed = line.get("zero_variance")
    if failed is None and line.get("zero_variance") is not None:
        failed = 0.0
    if failed is None:
        return None
    successes = min(max(success or 0.0, 0.0), 1.0) * judged
    return Seen(line.step, failed, judged, round(successes), reward)


def _is_full(rows: list[Seen], window: int, source: str) -> bool:
    if source == "prefopt":
        return len(rows) >= window
    return len(rows) >= LEAST_LINES and rows[-1].step - rows[0].step + 1 >= window


def _reason(failed: float, among: str, bound: float | None, wanted: int | None) -> str:
    found = (
        f"learning has stalled: in {failed:.0%} of the {among} no completion was rewarded and the reward does not rise"
    )
    if bound is None:
        return found
    return (
        f"{found}; a completion succeeds with a chance of at most {bound:.2g} (95 %), so that half the groups would "
        f"hold a success only with num_completions={wanted:,} or more"
    )


def _change(line: Line, wanted: int | None) -> dict[str, Any]:
    """More completions of a prompt, where those needed are within reach."""
    own = line.run.number("num_completions")
    return {"num_completions": wanted} if own and wanted and own < wanted <= 8 * own else {}
