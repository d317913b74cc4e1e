"""Figures of rows that decide what to train."""

from __future__ import annotations

import random

import pytest

from prefopt.advice.data import checker, compared, contradictions, figures, longer, shallow, tied
from prefopt.data import Dataset
from prefopt.records import Example


def row(prompt: list[int], completions: list[list[int]], scores: list[float]) -> Example:
    return Example(prompt, completions, scores, [[True] * len(own) for own in completions])


def test_wrong_labels_are_counted_from_comparisons_made_twice() -> None:
    draw, rows = random.Random(0), []
    for number in range(4_000):
        prompt, better, worse = [number // 2 % 500], [1, number // 2 % 7], [2, number // 2 % 5]
        scores = [0.0, 1.0] if draw.random() < 0.2 else [1.0, 0.0]
        rows.append(row(prompt, [better, worse], scores))
    assert contradictions(compared(rows)) == pytest.approx(0.2, abs=0.03)


def test_rows_that_are_there_once_say_nothing_of_wrong_labels() -> None:
    rows = [row([number], [[1], [2]], [1.0, 0.0]) for number in range(200)]
    found = figures(Dataset(rows, [], "pairs", "pairs", "x", {"empty completion": 3}))
    assert found.noise is None
    assert any("not measured" in note for note in found.notes)
    assert "3 left out: empty completion" in found.notes


def test_the_longer_answer() -> None:
    sides = compared(
        [row([1], [[1, 2], [1]], [1.0, 0.0]), row([1], [[1], [2]], [1.0, 0.0]), row([1], [[1, 2], [1]], [0, 1])]
    )
    assert longer(sides) == pytest.approx((1 + 0.5 + 0) / 3)


def test_ties_are_counted_over_comparisons() -> None:
    assert tied([row([1], [[1], [2], [3]], [1.0, 1.0, 0.0])]) == pytest.approx(1 / 3)


def test_a_simple_preference_is_found_and_a_random_one_is_not() -> None:
    draw = random.Random(1)
    answers = [[[draw.randrange(6) for _ in range(10)] for _ in range(2)] for _ in range(800)]
    told = [row([1, 2], own, [float(own[0].count(3) >= own[1].count(3)), 0.5]) for own in answers]
    coin = [row([1, 2], own, [float(draw.random() < 0.5), 0.5]) for own in answers]
    simple, none = shallow(compared(told)), shallow(compared(coin))
    assert simple is not None and simple > 0.7
    assert none is not None and abs(none - 0.5) < 0.06


@pytest.mark.parametrize(
    ("columns", "wanted"),
    [
        ({"answer": "so it is 5\n#### 5"}, "math"),
        ({"answer": 12}, "math"),
        ({"solution": "\\boxed{\\frac{1}{2}}"}, "math"),
        ({"answer": "Paris"}, "exact"),
        ({"answer": "A long text. " * 20}, None),
        ({"test": "assert f(1) == 1", "entry_point": "f"}, "code"),
        ({"instruction_id_list": ["length"], "answer": "5"}, "ifeval"),
        ({"chosen": "5"}, None),
        ({"answer": ""}, None),
    ],
)
def test_what_can_be_checked(columns: dict[str, object], wanted: str | None) -> None:
    assert checker(columns) == wanted
