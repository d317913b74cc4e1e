"""Exact match: the completion, or the answer in it, is one of the row's answers."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import partial
from typing import Literal

from prefopt.records import Sample, Score
from prefopt.rewards.answers import Place, find, right_answers
from prefopt.rewards.direct import DirectReward

Ignored = Literal["case", "space", "punctuation", "articles"]

ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def exact(
    answer_column: str | None = None,
    exact_answer: Sequence[Place] = ("all",),
    answer_after: str | None = None,
    exact_ignore: Sequence[Ignored] = ("space",),
) -> DirectReward:
    """1 where the answer equals one of the row's answers, 0 where it differs or is missing.

    Both are compared as NFC text after what `exact_ignore` names is taken out. A text that is 10,000 characters longer
    than ten times the longest answer is not read: it is 0. A row without an answer gives None.
    """
    return DirectReward(
        "exact",
        partial(
            _score, column=answer_column, places=tuple(exact_answer), after=answer_after, ignore=tuple(exact_ignore)
        ),
    )


def _score(
    sample: Sample, column: str | None, places: Sequence[Place], after: str | None, ignore: Sequence[Ignored]
) -> Score:
    right = right_answers(sample.columns, column)
    if isinstance(right, str):
        return Score(None, right)
    given = find(sample.text, places, after)
    if given is None:
        return Score(0.0, "no answer: looked for " + ", then ".join(places))
    if len(given) > 10_000 + 10 * max(map(len, right)):
        return Score(0.0, f"an answer of {len(given):,} characters")
    expected = {normal(answer, ignore) for answer in right}
    return (
        Score(None, "nothing is left of the row's answer")
        if "" in expected
        else Score(float(normal(given, ignore) in expected))
    )


def normal(text: str, ignore: Sequence[Ignored]) -> str:
    """`text` as NFC, without what is ignored.

    case: casefolded. punctuation: characters of Unicode's punctuation classes are dropped. articles: the words a, an
    and the, in lower case, are dropped. space: runs of white space are one space, and none stands at an end.
    """
    text = unicodedata.normalize("NFC", text)
    if "case" in ignore:
        text = text.casefold()
    if "punctuation" in ignore:
        text = "".join(letter for letter in text if not unicodedata.category(letter).startswith("P"))
    if "articles" in ignore:
        text = ARTICLES.sub(" ", text)
    return " ".join(text.split()) if "space" in ignore else text
