"""A prompt's completions with their scores, and what is measured of a rollout of such groups."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from prefopt.models.sampling import Completion
from prefopt.records import Sample, Score
from prefopt.rollout.prompts import Draw

EQUAL = 1e-6  # rewards closer than this are one reward: their difference is rounding


@dataclass(frozen=True)
class Group:
    """A draw with its completions, as tokens and as what was scored.

    scores: as the reward gave them. rewards: what is learnt from, NaN for a completion that takes no part.
    """

    draw: Draw
    completions: Sequence[Completion]
    samples: Sequence[Sample]
    scores: Sequence[Score]
    rewards: Sequence[float]

    @property
    def useful(self) -> bool:
        """Whether its rewards differ, so that there is something to learn from it."""
        return differ([value for value in self.rewards if not math.isnan(value)])

    def facts(self) -> GroupFacts:
        return GroupFacts(
            self.draw.number,
            self.draw.easier,
            [task_reward(score) for score in self.scores],
            [score.value for score in self.scores],
            list(self.rewards),
            [dict(score.parts) for score in self.scores],
            [len(completion.tokens) for completion in self.completions],
            [completion.finished for completion in self.completions],
            [repeated(completion.tokens) for completion in self.completions],
            next((score.why for score in self.scores if score.value is None), ""),
        )


class GroupFacts(NamedTuple):
    """What every process learns of a group, one entry for each completion.

    task: reward of the task alone. values: the reward as given; None where there is none. rewards: what is learnt
    from. parts: of the reward, by name. lengths: tokens. repeated: as the function has it. why: the first reason of a
    score that is missing.
    """

    number: int
    easier: bool
    task: list[float | None]
    values: list[float | None]
    rewards: list[float]
    parts: list[Mapping[str, float | None]]
    lengths: list[int]
    finished: list[bool]
    repeated: list[float]
    why: str

    @property
    def known(self) -> list[float]:
        """The task's rewards of the completions that have one."""
        return [value for value in self.task if value is not None]


def differ(values: Sequence[float]) -> bool:
    return len(values) > 1 and max(values) - min(values) > EQUAL


def repeated(tokens: Sequence[int], run: int = 4) -> float:
    """Share of the runs of so many tokens that stand in the completion before; 0 where there is no such run."""
    runs = [tuple(tokens[at : at + run]) for at in range(len(tokens) - run + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def task_reward(score: Score) -> float | None:
    """The reward for the task itself: of a mixture its first part, so that a bonus for length is not taken for it."""
    return next(iter(score.parts.values())) if score.parts else score.value


def reward_of(score: Score, finished: bool, unfinished: str, penalty: float) -> float:
    """What is learnt from: the score, less what a completion cut at max_tokens loses; NaN where it takes no part."""
    if score.value is None or (not finished and unfinished == "ignore"):
        return math.nan
    return score.value - penalty if not finished and unfinished == "penalty" else score.value


def most_useful(groups: Sequence[Group], wanted: int) -> list[Group]:
    """The first `wanted` groups, those with something to learn from before others, in the order they were drawn."""
    chosen = sorted(range(len(groups)), key=lambda place: not groups[place].useful)[:wanted]
    return [groups[place] for place in sorted(chosen)]


class Range:
    """The lowest and highest task reward of a run so far, 0 among them: what lies above their middle is a success.

    So 1 of 0 and 1 is one, and of -1 and 1, and 7 of 0 to 10.
    """

    def __init__(self) -> None:
        self.low = self.high = 0.0

    def see(self, rewards: Iterable[float]) -> None:
        for value in rewards:
            self.low, self.high = min(self.low, value), max(self.high, value)

    def state_dict(self) -> dict[str, float]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, float]) -> None:
        vars(self).update(state)

    def solved(self, reward: float) -> bool:
        return reward > (self.low + self.high) / 2


class Kinds(NamedTuple):
    """Groups by what their task rewards say. solved, failed: all the same, high or low. mixed: they differ."""

    mixed: int
    solved: int
    failed: int

    @classmethod
    def of(cls, groups: Iterable[GroupFacts], seen: Range) -> Kinds:
        mixed = solved = failed = 0
        for group in groups:
            known = group.known
            mixed += differ(known)
            if known and not differ(known):
                high = seen.solved(known[0])
                solved, failed = solved + high, failed + (not high)
        return cls(mixed, solved, failed)


def reward_metrics(groups: Sequence[GroupFacts]) -> dict[str, float]:
    """Mean reward, its spread, its parts and the share that is missing, over all completions."""
    values = [value for group in groups for value in group.values]
    known = [value for value in values if value is not None]
    found = {"unscored": (len(values) - len(known)) / len(values)} if values else {}
    if known:
        found |= {"reward": statistics.fmean(known), "reward_std": statistics.pstdev(known)}
    parts: dict[str, list[float]] = {}
    for group in groups:
        for own in group.parts:
            for name, value in own.items():
                if value is not None:
                    parts.setdefault(name, []).append(value)
    if len(parts) > 1:
        found |= {f"reward/{name}": statistics.fmean(own) for name, own in parts.items()}
    return found


def task_metrics(groups: Sequence[GroupFacts], solved: Sequence[Sequence[bool]]) -> dict[str, float]:
    """Reward and successes of the task alone. solved: of each group, of its completions that have a task reward."""
    known = [value for group in groups for value in group.known]
    if not known:
        return {}
    share = sum(map(sum, solved)) / len(known)
    return {"task_reward": statistics.fmean(known), "success": share, "judged": float(len(known))}


def shape_metrics(groups: Sequence[GroupFacts]) -> dict[str, float]:
    """How long completions are, how many end by themselves, and how much they repeat."""
    lengths = [length for group in groups for length in group.lengths]
    finished = [flag for group in groups for flag in group.finished]
    if not lengths:
        return {}
    repetition = statistics.fmean(share for group in groups for share in group.repeated)
    means = {"completion_length": statistics.fmean(lengths), "finished": statistics.fmean(finished)}
    return {**means, "repetition": repetition}


def group_metrics(kinds: Kinds, trained: int) -> dict[str, float]:
    """Shares of groups that teach nothing, by why, of all that were drawn; trained: groups that do teach."""
    found = {"effective_groups": float(trained)}
    if judged := sum(kinds):
        found |= {"zero_variance/solved": kinds.solved / judged, "zero_variance/failed": kinds.failed / judged}
    return found
