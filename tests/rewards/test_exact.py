"""Exact match: what is compared, and what is left out of the comparison."""

from __future__ import annotations

import pytest

from prefopt.records import Sample
from prefopt.rewards.exact import exact, normal


def value(completion: str, answer: object, **options: object) -> float | None:
    (score,) = exact(**options)([Sample("p", completion, columns={"answer": answer})])  # type: ignore[arg-type]
    return score.value


def test_by_default_white_space_alone_is_forgiven() -> None:
    assert value(" Paris\n", "Paris") == 1.0
    assert value("a  b", "a b") == 1.0
    assert value("paris", "Paris") == 0.0 and value("Paris.", "Paris") == 0.0 and value("in Paris", "Paris") == 0.0
    assert value("cafe\u0301", "caf\u00e9") == 1.0  # two ways to write one character


def test_what_is_ignored_is_ignored_on_both_sides() -> None:
    ignore = ["case", "space", "punctuation", "articles"]
    assert value("The  PARIS!", "paris", exact_ignore=ignore) == 1.0
    assert value("theatre", "atre", exact_ignore=ignore) == 0.0
    assert normal("A b", []) == "A b" and normal("A b", ["case", "articles"]) == "  b"


def test_the_answer_may_stand_in_a_place_and_be_one_of_several() -> None:
    assert value("reasons\n#### 72", "so\n#### 72", exact_answer=["hashes"]) == 1.0
    assert value("72", 72) == 1.0 and value("72", 72.0) == 1.0 and value("b", ["a", "b"]) == 1.0
    assert value("no place", "72", exact_answer=["hashes"]) == 0.0


@pytest.mark.parametrize("answer", [None, "", "  ", []])
def test_a_missing_answer_equals_nothing(answer: object) -> None:
    assert value("", answer) is None


def test_nothing_is_left_of_an_answer_that_is_all_ignored() -> None:
    assert value("?", "!", exact_ignore=["punctuation"]) is None


@pytest.mark.parametrize(
    "text", ["x" * 10_000_000, "\ud800\x00", "\u0301" * 1_000_000], ids=["10 MB", "surrogate", "marks"]
)
def test_hostile_text_is_wrong(text: str) -> None:
    assert value(text, "Paris", exact_ignore=["case", "space", "punctuation", "articles"]) == 0.0
