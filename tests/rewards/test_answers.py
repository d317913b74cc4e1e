"""Where an answer is looked for, on texts of every size and kind."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.rewards.answers import PLACES, find, right_answers

HUGE = 10_000_000


@pytest.mark.parametrize(
    ("place", "text", "answer"),
    [
        ("boxed", r"\boxed{1} then \boxed{2}", "2"),
        ("boxed", r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("boxed", r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        ("boxed", r"\boxed {3}", "3"),
        ("boxed", r"\boxed{1} and then \boxed{2", None),  # cut at the length limit: no answer
        ("boxed", "no box, 3", None),
        ("boxed", r"\boxed{}", None),
        ("boxed", r"\boxed 3", None),
        ("hashes", "a #### 1\n#### 72 \nmore", "72"),
        ("hashes", "a ####", None),
        ("hashes", "72", None),
        ("line", "Answer: 3\nmore", "3"),
        ("line", "The final answer is **4**.\n", "4"),
        ("line", "**Answer:** 5", "5"),
        ("line", "A: 1\nA: 2", "2"),
        ("line", "answers: 3", None),
        ("line", "A day has 24 hours", None),
        ("number", "from 1 to 1,080.50 at last.", "1,080.50"),
        ("number", "no numbers", None),
        ("all", "  x ", "x"),
    ],
)
def test_an_answer_is_found_where_it_is_looked_for(place: str, text: str, answer: str | None) -> None:
    assert find(text, [place]) == answer  # type: ignore[list-item]


def test_places_are_tried_in_their_order_and_only_after_the_mark() -> None:
    text = r"<think>\boxed{1}</think> Answer: 2"
    assert find(text, ["boxed", "line"]) == "1"
    assert find(text, ["boxed", "line"], after="</think>") == "2"
    assert find(r"<think>\boxed{1}", ["boxed"], after="</think>") is None


def test_the_right_answer_is_read_from_the_first_column_there_is() -> None:
    assert right_answers({"answer": "x = 2\n#### 72", "solution": "3"}, None) == ["72"]
    assert right_answers({"answer": None, "solution": r"so \boxed{3}"}, None) == ["3"]
    assert right_answers({"gold": [1, 2.0, "x"]}, "gold") == ["1", "2", "x"]


@pytest.mark.parametrize(
    ("row", "column", "why"),
    [
        ({}, None, "no answer, solution"),
        ({"a": 1}, "b", "no 'b'"),
        ({"answer": " "}, None, "empty"),
        ({"answer": []}, None, "empty"),
    ],
)
def test_a_row_without_an_answer_says_so(row: dict[str, object], column: str | None, why: str) -> None:
    assert why in str(right_answers(row, column))


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * (HUGE // 7),
        "\\boxed{" + "{" * HUGE,
        "#" * HUGE,
        "Answer:" * (HUGE // 7),
        "A: " + " " * HUGE,
        "\n" * HUGE,
        "1" * HUGE,
        "1," * (HUGE // 2),
        "**" * (HUGE // 2),
    ],
    ids=["boxes", "braces", "hashes", "lines", "spaces", "line ends", "digits", "groups", "stars"],
)
def test_a_text_of_ten_megabytes_takes_no_time(text: str) -> None:
    """Seconds, not the hours of a search that is not linear."""
    start = time.monotonic()
    for place in PLACES:
        find(text, [place])
    assert time.monotonic() - start < 5


@given(st.text(alphabet="\\boxed{}#A: n1.\n\x00\ud800"))
def test_nothing_that_can_be_written_breaks_a_search(text: str) -> None:
    for place in PLACES:
        found = find(text, [place])
        assert found is None or found.strip()
