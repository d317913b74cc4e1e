"""Three ways to judge the completions of one prompt: each alone, each two in both orders, all at once in two orders."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple, Protocol

from prefopt.records import InputError, Sample, Score
from prefopt.rewards.judge.answers import object_in, one_of, order_of, schema, text_in, whole_number
from prefopt.rewards.judge.asking import Answer, Question
from prefopt.rewards.judge.prompts import as_json, mark_of, quoted, shown, system

BEST = 10  # of the scale that a rubric scores on
REASON = '"<one or two sentences>"'
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
TEXT = {"type": "string"}
MARKS = {"type": "integer", "enum": list(range(BEST + 1))}


class Mode(Protocol):
    """Questions about the completions of one prompt, and what their answers make of each."""

    def questions(self, samples: Sequence[Sample]) -> list[Question]: ...

    def scores(self, samples: Sequence[Sample], answers: Sequence[Answer]) -> list[Score]: ...


@dataclass(frozen=True)
class Rubric:
    """The judge's score of each completion, as a share of the best one; with criteria, the mean of their scores.

    criteria: `name` or `name: what it means`. The parts of a score are the criteria.
    """

    principles: Sequence[str] = ()
    criteria: Sequence[str] = ()

    def questions(self, samples: Sequence[Sample]) -> list[Question]:
        return [self._question(shown(sample.prompt), shown(sample.completion)) for sample in samples]

    def _question(self, request: str, answer: str) -> Question:
        names, mark = criterion_names(self.criteria), mark_of(request, answer)
        scale = f"from 0 (useless) to {BEST} (could not be better)"
        if names:
            task = f"Score the answer on each criterion {scale}:\n" + "\n".join(f"- {line}" for line in self.criteria)
        else:
            task = f"Score the answer {scale}."
        marks = names or ["score"]
        reply = as_json({"reason": REASON, **dict.fromkeys(marks, f"<whole number from 0 to {BEST}>")})
        user = quoted("request", request, mark) + "\n\n" + quoted("answer", answer, mark)
        wanted = schema({"reason": TEXT, **dict.fromkeys(marks, MARKS)})
        return Question(system(mark, self.principles, task, reply), user, wanted, partial(_marks, marks))

    def scores(self, samples: Sequence[Sample], answers: Sequence[Answer]) -> list[Score]:
        return [Score(None, answer.why) if answer.value is None else self._score(answer.value) for answer in answers]

    def _score(self, marks: dict[str, int]) -> Score:
        shares = {name: mark / BEST for name, mark in marks.items()}
        return Score(sum(shares.values()) / len(shares), parts=shares if self.criteria else {})


class Duel(NamedTuple):
    """Two completions, by their places in the group, and what the first one won: 1, 0, 1/2 for a tie. swayed: the two
    orders did not agree, which counts as a tie.
    """

    first: int
    second: int
    won: float
    swayed: bool


@dataclass(frozen=True)
class Pairwise:
    """The share of its comparisons that a completion wins, a tie counted half.

    Each two are compared in both orders, since judges favour a place (Wang et al. 2023, arXiv:2305.17926; Zheng et al.
    2023, arXiv:2306.05685); where the orders disagree the two tie, and `position_bias` is the share of a completion's
    comparisons of which that is true. Equal texts tie unasked.
    opponents: how many others each completion meets; 0 = all.
    """

    principles: Sequence[str] = ()
    opponents: int = 0

    def questions(self, samples: Sequence[Sample]) -> list[Question]:
        return [self._question(samples, *places) for pair in self._asked(samples) for places in (pair, pair[::-1])]

    def _asked(self, samples: Sequence[Sample]) -> list[tuple[int, int]]:
        return [(i, j) for i, j in meetings(len(samples), self.opponents) if _differ(samples[i], samples[j])]

    def _question(self, samples: Sequence[Sample], one: int, other: int) -> Question:
        request, first, second = (
            shown(samples[one].prompt),
            shown(samples[one].completion),
            shown(samples[other].completion),
        )
        mark = mark_of(request, first, second)
        reply = as_json({"reason": REASON, "better": '"A", "B" or "tie"'})
        user = [quoted("request", request, mark), quoted("answer-A", first, mark), quoted("answer-B", second, mark)]
        wanted = schema({"reason": TEXT, "better": {"type": "string", "enum": ["A", "B", "tie"]}})
        told = system(mark, self.principles, "Say which of the two answers is better.", reply)
        return Question(told, "\n\n".join(user), wanted, _better)

    def scores(self, samples: Sequence[Sample], answers: Sequence[Answer]) -> list[Score]:
        asked = self._asked(samples)
        both = dict(zip(asked, zip(answers[0::2], answers[1::2], strict=True), strict=True))
        duels, why = [], "a prompt with one completion has nothing to compare it with"
        for i, j in meetings(len(samples), self.opponents):
            if (i, j) not in both:
                duels.append(Duel(i, j, 0.5, False))
                continue
            forth, back = both[i, j]
            if forth.value is None or back.value is None:
                why = forth.why or back.why
                continue
            duels.append(
                _duel(i, j, {"A": 1.0, "B": 0.0, "tie": 0.5}[forth.value], {"A": 0.0, "B": 1.0, "tie": 0.5}[back.value])
            )
        return win_shares(len(samples), duels, why)


@dataclass(frozen=True)
class Ranking:
    """The share of the others that a completion is ranked above, by a judge that sees all of them at once.

    Asked twice, the second time in reverse order; two whose order differs between the rankings tie, and count for
    `position_bias`.
    """

    principles: Sequence[str] = ()

    def questions(self, samples: Sequence[Sample]) -> list[Question]:
        if len(samples) < 2:
            return []
        if len(samples) > len(LETTERS):
            raise InputError(f"{len(samples)} completions cannot be ranked at once; use judge_mode=rubric or pairwise")
        places = list(range(len(samples)))
        return [self._question(samples, order) for order in (places, places[::-1])]

    def _question(self, samples: Sequence[Sample], order: list[int]) -> Question:
        request, texts = shown(samples[0].prompt), [shown(samples[place].completion) for place in order]
        names, mark = LETTERS[: len(order)], mark_of(request, *texts)
        answers = [quoted(f"answer-{name}", text, mark) for name, text in zip(names, texts, strict=True)]
        reply = as_json({"reason": REASON, "ranking": f"[all of {', '.join(names)}, the best one first]"})
        item = {"type": "string", "enum": list(names)}
        told = system(mark, self.principles, "Rank all answers, the best one first.", reply)
        user = "\n\n".join([quoted("request", request, mark), *answers])
        wanted = schema({"reason": TEXT, "ranking": {"type": "array", "items": item}})
        return Question(told, user, wanted, partial(_ranking, names, order))

    def scores(self, samples: Sequence[Sample], answers: Sequence[Answer]) -> list[Score]:
        why = next((answer.why for answer in answers if answer.value is None), "")
        if why or len(samples) < 2:
            return win_shares(len(samples), [], why or "a prompt with one completion has nothing to rank it with")
        ranks = [{place: rank for rank, place in enumerate(answer.value)} for answer in answers]
        duels = []
        for i, j in combinations(range(len(samples)), 2):
            forth, back = (float(rank[i] < rank[j]) for rank in ranks)
            duels.append(_duel(i, j, forth, back) if _differ(samples[i], samples[j]) else Duel(i, j, 0.5, False))
        return win_shares(len(samples), duels, "")


def meetings(size: int, opponents: int) -> list[tuple[int, int]]:
    """Which completions of a group meet: all, or each the next ones in a ring, so that all meet equally many."""
    reach = size // 2 if opponents <= 0 else min((opponents + 1) // 2, size // 2)
    return sorted(
        {(min(i, k), max(i, k)) for i in range(size) for j in range(1, reach + 1) if (k := (i + j) % size) != i}
    )


def win_shares(size: int, duels: Sequence[Duel], why: str) -> list[Score]:
    """Each completion's share of wins over the comparisons it was in; None, and why, for one that was in none."""
    won: list[list[float]] = [[] for _ in range(size)]
    swayed: list[list[bool]] = [[] for _ in range(size)]
    for duel in duels:
        for place, share in ((duel.first, duel.won), (duel.second, 1 - duel.won)):
            won[place].append(share)
            swayed[place].append(duel.swayed)
    return [
        Score(sum(own) / len(own), parts={"position_bias": sum(flags) / len(flags)}) if own else Score(None, why)
        for own, flags in zip(won, swayed, strict=True)
    ]


def criterion_names(criteria: Sequence[str]) -> list[str]:
    """A key for each criterion: what stands before its colon, in lower case. InputError where two are the same."""
    names = [re.sub(r"\W+", "_", line.partition(":")[0].strip().lower()).strip("_") for line in criteria]
    for line, name in zip(criteria, names, strict=True):
        if not name or name == "reason" or names.count(name) > 1:
            raise InputError(f"judge_criteria: {line!r} needs a name of its own before its colon")
    return names


def _differ(one: Sample, other: Sample) -> bool:
    return shown(one.completion) != shown(other.completion)


def _duel(i: int, j: int, forth: float, back: float) -> Duel:
    return Duel(i, j, forth if forth == back else 0.5, forth != back)


def _marks(names: Sequence[str], content: str) -> dict[str, int]:
    found = object_in(content, ["reason", *names])
    text_in(found["reason"])
    return {name: whole_number(found[name], BEST) for name in names}


def _better(content: str) -> str:
    found = object_in(content, ["reason", "better"])
    text_in(found["reason"])
    return one_of(found["better"], ["A", "B", "tie"])


def _ranking(names: str, order: Sequence[int], content: str) -> list[int]:
    """Places in the group, the best one first."""
    found: dict[str, Any] = object_in(content, ["reason", "ranking"])
    text_in(found["reason"])
    ranked = order_of(found["ranking"], list(names))
    return [order[names.index(name)] for name in ranked]
