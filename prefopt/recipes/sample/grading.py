"""What completions are worth: scored by rewards, or criticised and rewritten by a judge."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from prefopt.data.columns import LARGEST, single
from prefopt.models.weights import fingerprint
from prefopt.recipes.online import reward_for
from prefopt.recipes.sample.ledger import Tally
from prefopt.recipes.sample.options import Kind, RowOptions
from prefopt.recipes.sample.pick import PICK, Answer, Picked, Row, ahead
from prefopt.recipes.sample.writers import in_form
from prefopt.records import InputError, Sample
from prefopt.rewards import Mixture, RewardOptions
from prefopt.rewards.judge import Judge, JudgeOptions, Revision, critique_and_revise
from prefopt.rewards.judge.options import listed
from prefopt.rollout.reward_model import RewardModelReward

Numbered = Sequence[tuple[int, Sample]]  # a prompt's completions, each with its number
UNCHANGED = "the revision changes nothing"
NO_BETTER = "the revision does not score better"
NOT_KEPT = "no revision was kept"


class Graded(NamedTuple):
    """What becomes of a prompt, and what its rows say of all its completions."""

    picked: Picked
    provenance: Mapping[str, Any]


class Grader(Protocol):
    """Rows of a batch of prompts."""

    @property
    def about(self) -> Mapping[str, Any]:
        """Who grades, for the provenance of rows."""
        ...

    @property
    def versions(self) -> Mapping[str, Any]:
        """What a name does not say and must not change while rows are written."""
        ...

    def __call__(self, batch: Sequence[Numbered], seed: str, tally: Tally) -> list[Graded]: ...

    def close(self) -> None: ...


def grader(kind: Kind, n: int, settings: Mapping[str, Any]) -> Grader:
    """What makes rows of this kind. InputError for a reward that cannot be built and a judge that does not answer."""
    return Revising(settings) if kind == "revised" else Scoring(kind, n, settings)


class Scoring:
    """Rows of completions by their rewards."""

    def __init__(self, kind: Kind, n: int, settings: Mapping[str, Any]) -> None:
        if not settings["reward"].names:
            raise InputError(f"--as {kind}: no reward is named; give --reward, such as math or file.py:function")
        self.kind, self.n, self.options = kind, n, settings["rows"]
        self.reward = reward_for(settings, [])
        self.about = _about(self.reward, settings)
        self.versions = _versions(self.reward, settings["reward"])

    def __call__(self, batch: Sequence[Numbered], seed: str, tally: Tally) -> list[Graded]:
        scores = iter(scored(self.reward, [sample for own in batch for _, sample in own], tally))
        return [self._graded(own, [next(scores) for _ in own]) for own in batch]

    def _graded(self, own: Numbered, scores: Sequence[float | None]) -> Graded:
        known = {number: score for (number, _), score in zip(own, scores, strict=True) if score is not None}
        answers = [Answer(number, sample.completion, known[number]) for number, sample in own if number in known]
        said = {"scores": [known.get(number) for number in range(self.n)]}
        return Graded(PICK[self.kind](answers, self.options), said)

    def close(self) -> None:
        self.reward.close()


def scored(reward: Mixture, samples: Sequence[Sample], tally: Tally) -> list[float | None]:
    """Rewards in single precision, as rows keep them; None for those without one, which are counted by reason."""
    found: list[float | None] = []
    for score in reward(samples):
        why = score.why if score.value is None else "" if abs(score.value) <= LARGEST else "a reward out of range"
        if score.value is None or why:
            tally.unscored[why or "no reason given"] += 1
            found.append(None)
        else:
            found.append(single(score.value))
            tally.see(found[-1] or 0.0)
    return found


class Revising:
    """Pairs of a completion and what a judge makes of it after a critique by a principle; the revision is chosen.

    With a reward besides, a pair is kept only where the revision scores better, by the margin.
    Bai et al. 2022, arXiv:2212.08073.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.options: RowOptions = settings["rows"]
        self.failures = settings["reward"].reward_failures
        self.reward = reward_for(settings, []) if settings["reward"].names else None
        self.judge = Judge(settings["judge"])
        self.judge.ping()
        rewards = _about(self.reward, settings) if self.reward else {}
        self.about = {**rewards, "judge": {"model": self.judge.asker.served, "rounds": self.options.rounds}}
        versions = _versions(self.reward, settings["reward"]) if self.reward else {}
        self.versions = {**versions, "judge": self.judge.asker.served}

    def __call__(self, batch: Sequence[Numbered], seed: str, tally: Tally) -> list[Graded]:
        samples = [sample for own in batch for _, sample in own]
        drawn = random.Random(seed).getrandbits(32)
        revisions = critique_and_revise(self.judge, samples, rounds=self.options.rounds, seed=drawn)
        self._check(revisions)
        scores = iter(self._scores(samples, revisions, tally))
        found = iter(
            [
                self._row(sample, revision, next(scores), tally)
                for sample, revision in zip(samples, revisions, strict=True)
            ]
        )
        return [self._graded([(number, next(found)) for number, _ in own]) for own in batch]

    def _graded(self, found: Sequence[tuple[int, Row | None]]) -> Graded:
        rows = [row._replace(numbers=[number]) for number, row in found if row is not None]
        return Graded(Picked(rows, "" if rows else NOT_KEPT), {})

    def _scores(
        self, samples: Sequence[Sample], revisions: Sequence[Revision], tally: Tally
    ) -> list[tuple[float | None, float | None] | None]:
        """Scores of each completion and its revision; None where nothing scores them."""
        if self.reward is None:
            return [None] * len(samples)
        there = [place for place, revision in enumerate(revisions) if revision.revision is not None]
        both = []
        for place in there:
            both += [replace(samples[place], group=place), _revised(samples[place], revisions[place], place)]
        found = scored(self.reward, both, tally)
        scores: list[tuple[float | None, float | None] | None] = [(None, None)] * len(samples)
        for at, place in enumerate(there):
            scores[place] = found[2 * at], found[2 * at + 1]
        return scores

    def _row(
        self,
        sample: Sample,
        revision: Revision,
        scores: tuple[float | None, float | None] | None,
        tally: Tally,
    ) -> Row | None:
        """The pair, if the revision is one; what is not is counted by reason."""
        why = f"no revision: {revision.why}" if revision.revision is None else unfit(revision.revision)
        if revision.revision == sample.text:
            why = UNCHANGED
        columns: dict[str, Any] = {}
        if not why and scores is not None:
            before, after = scores
            if before is None or after is None:
                return None  # counted as unscored
            why = "" if ahead(after, before, self.options.margin) else NO_BETTER
            columns = {"score_chosen": after, "score_rejected": before}
        if why:
            tally.left_out[why] += 1
            return None
        chosen = in_form(sample.prompt, revision.revision or "")
        return Row({"chosen": chosen, "rejected": sample.completion, **columns}, [], revision.provenance)

    def _check(self, revisions: Sequence[Revision]) -> None:
        """InputError where more failed than `reward_failures` allows: a judge that is gone must not use up prompts."""
        failed = Counter(revision.why for revision in revisions if revision.revision is None)
        if failed.total() > self.failures * len(revisions):
            reasons = "\n".join(f"  {number} x {why}" for why, number in failed.most_common(3))
            raise InputError(
                f"judge: {failed.total()} of {len(revisions)} completions were not revised, more than "
                f"reward_failures={self.failures:g} allows:\n{reasons}"
            )

    def close(self) -> None:
        self.judge.close()
        if self.reward is not None:
            self.reward.close()


def _revised(sample: Sample, revision: Revision, group: int) -> Sample:
    said = in_form(sample.prompt, revision.revision or "")
    return replace(sample, completion=said, tokens=(), finished=True, group=group)


def unfit(text: str) -> str:
    """Why a text is no completion for a row; empty where it is one."""
    if not text.strip():
        return "empty completion"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "half of a surrogate pair in the completion"
    return ""


# ---------------------------------------------------------------- who graded


def _about(reward: Mixture, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The rewards by name, weighted where they are, and a judge with what it was told."""
    options: RewardOptions = settings["reward"]
    found: dict[str, Any] = {"rewards": options.names}
    if options.reward_weights is not None:
        found["reward_weights"] = options.reward_weights
    for one in reward.rewards:
        if isinstance(one, Judge):
            found["judge"] = _judge(one, settings["judge"])
    return found


def _judge(judge: Judge, options: JudgeOptions) -> dict[str, Any]:
    told = {"principles": listed(options.principles, "principles")}
    told["criteria"] = listed(options.judge_criteria, "judge_criteria")
    said = {name: lines for name, lines in told.items() if lines}
    return {"model": judge.asker.served, "mode": options.judge_mode, **said}


def _versions(reward: Mixture, options: RewardOptions) -> dict[str, Any]:
    """What a reward's name does not say: the text of a file, a reward model's weights, the model that judges."""
    found: dict[str, Any] = {}
    for name in options.names:
        file, colon, _ = name.rpartition(":")
        if colon and file.endswith(".py"):
            found[name] = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
    for one in reward.rewards:
        if isinstance(one, RewardModelReward):
            found[one.name] = fingerprint(one.policy.model.state_dict().values())
        if isinstance(one, Judge):
            found[one.name] = one.asker.served
    return found
