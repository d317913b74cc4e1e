"""From a prompt's scored completions to rows: pairs, labels, rankings, and the best of them.

Scores are single precision, as the reader of rows has them: what it would find equal is equal here.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from prefopt.data.columns import LARGEST, single
from prefopt.recipes.sample.options import RowOptions
from prefopt.records import Message

TIED = "tied scores"
TOO_CLOSE = "no two completions differ by the margin"
TOO_FEW = "fewer than two scored completions"
EQUAL = "chosen and rejected are equal"
BELOW = "no completion reaches the threshold"
NONE = "no scored completion"


class Answer(NamedTuple):
    """A completion with its score. number: which of the prompt's completions it is."""

    number: int
    completion: str | Sequence[Message]
    score: float


class Row(NamedTuple):
    """columns: those of a row besides its prompt. numbers: the completions that it holds. provenance: of this row
    alone.
    """

    columns: dict[str, Any]
    numbers: list[int]
    provenance: Mapping[str, Any] = {}


class Picked(NamedTuple):
    """rows: none where nothing can be learnt from the prompt, and then `why` says the reason. ties: comparisons that
    came out equal. left_out: scored completions that are in no row for a reason of their own, by reason.
    """

    rows: list[Row]
    why: str = ""
    ties: int = 0
    left_out: Mapping[str, int] = {}


def pairs(answers: Sequence[Answer], options: RowOptions) -> Picked:
    """The best completion against the worst, or every two whose scores differ, each the better one first."""
    if len(answers) < 2:
        return Picked([], TOO_FEW)
    order = sorted(answers, key=lambda answer: -answer.score)
    meetings = list(combinations(order, 2)) if options.pair == "all" else [(order[0], order[-1])]
    ties = sum(better.score == worse.score for better, worse in meetings)
    apart = [(better, worse) for better, worse in meetings if ahead(better.score, worse.score, options.margin)]
    found: dict[str, Row] = {}
    for better, worse in apart:
        if better.completion != worse.completion:
            said = repr((better.completion, worse.completion))
            found.setdefault(said, pair(better, worse))
    if found:
        return Picked(list(found.values()), ties=ties)
    return Picked([], EQUAL if apart else TIED if ties == len(meetings) else TOO_CLOSE, ties)


def ahead(better: float, worse: float, margin: float) -> bool:
    """Whether one score is above another by at least the margin, in single precision."""
    return better > worse and single(min(better - worse, LARGEST)) >= single(margin)


def pair(chosen: Answer, rejected: Answer) -> Row:
    said = {"chosen": chosen.completion, "rejected": rejected.completion}
    scores = {"score_chosen": chosen.score, "score_rejected": rejected.score}
    return Row({**said, **scores}, [chosen.number, rejected.number])


def labels(answers: Sequence[Answer], options: RowOptions) -> Picked:
    """Every completion as good or bad: at least the threshold or not, or above or below the prompt's mean."""
    if not answers:
        return Picked([], NONE)
    if options.threshold is not None:
        return Picked([_labelled(answer, answer.score >= single(options.threshold)) for answer in answers])
    if len(answers) < 2:
        return Picked([], TOO_FEW)
    scores = [answer.score for answer in answers]
    if min(scores) == max(scores):
        return Picked([], TIED, ties=1)
    mean = single(statistics.fmean(scores))
    rows = [_labelled(answer, answer.score > mean) for answer in answers if answer.score != mean]
    level = len(answers) - len(rows)
    return Picked(rows, left_out={"at the mean of its prompt": level} if level else {})


def _labelled(answer: Answer, good: bool) -> Row:
    return Row({"completion": answer.completion, "label": good, "score": answer.score}, [answer.number])


def ranked(answers: Sequence[Answer], options: RowOptions) -> Picked:
    """All completions with their scores, the best first."""
    if len(answers) < 2:
        return Picked([], TOO_FEW)
    order = sorted(answers, key=lambda answer: -answer.score)
    if order[0].score == order[-1].score:
        return Picked([], TIED, ties=1)
    if all(answer.completion == order[0].completion for answer in order):
        return Picked([], "all completions are equal")
    columns = {"completions": [a.completion for a in order], "scores": [a.score for a in order]}
    return Picked([Row(columns, [answer.number for answer in order])])


def best(answers: Sequence[Answer], options: RowOptions) -> Picked:
    """The best completions that reach the threshold, equal texts once, at most `keep` of them."""
    if not answers:
        return Picked([], NONE)
    lowest = None if options.threshold is None else single(options.threshold)
    good = [answer for answer in answers if lowest is None or answer.score >= lowest]
    if not good:
        return Picked([], BELOW)
    different: dict[str, Answer] = {}
    for answer in sorted(good, key=lambda answer: -answer.score):
        different.setdefault(repr(answer.completion), answer)
    kept = list(different.values())[: options.keep]
    counts = {
        "below the threshold": len(answers) - len(good),
        "equal to a kept text": len(good) - len(different),
        "beyond keep": len(different) - len(kept),
    }
    rows = [Row({"completion": answer.completion, "score": answer.score}, [answer.number]) for answer in kept]
    return Picked(rows, left_out=+Counter(counts))


PICK: Mapping[str, Callable[[Sequence[Answer], RowOptions], Picked]] = {
    "pairs": pairs,
    "labels": labels,
    "ranked": ranked,
    "best": best,
}
