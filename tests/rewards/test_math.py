"""The math reward: what is equal, what is refused, and real model answers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefopt.records import Sample
from prefopt.rewards import Mixture, RewardOptions, build
from prefopt.rewards.math import compare, grade

GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k"
real = pytest.mark.skipif(not GSM8K.is_dir(), reason="the real data is not at ../shared/data/gsm8k")

EQUAL = [
    ("18", "18"),
    ("18.0", "18"),
    ("$18", "18"),
    (r"\$18.00", "18"),
    ("18 dollars", "18"),
    (r"18\text{ eggs}", "18"),
    ("18 cm^2", "18"),
    ("+18", "18"),
    ("18.", "18"),
    ("x = 18", "18"),
    ("1,080", "1080"),
    (r"1{,}080", "1,080"),
    (r"1\,080", "1080"),
    ("1080", "1,080"),
    (r"\frac{36}{2}", "18"),
    ("36/2", "18"),
    (r"1.8 \times 10^{1}", "18"),
    ("0.5", r"\frac{1}{2}"),
    ("1/2", "0.5"),
    (r"50\%", "0.5"),
    (r"\sqrt{12}", r"2\sqrt{3}"),
    ("1 + x^2", "x^2+1"),
    (r"\left(1, 2\right)", "(1,2)"),
    (r"\{2, 1\}", r"\{1,2\}"),
    ("y=1+2x", "y=2x+1"),
    (r"\text{Tuesday}", "Tuesday"),
    ("-18", "-18"),
    ("\u221218", "-18"),
    ("18 square feet", r"18\text{ ft}^2"),
    (r"18\text{ m}^2", "18"),
    ("18 m", r"18 \text{ meters}"),
    ("18", "18 cm"),
    ("60 miles per hour", "60 miles/hour"),
    (r"2\sqrt{3}\text{ m}", r"2\sqrt{3}"),
    ("90 degrees", r"90^\circ"),
    (r"90^{\circ}", "90"),
    ("1 1/2", "1.5"),
    ("-1 1/2", "-1.5"),
    (r"1\frac12", "3/2"),
    ("0.333333", "1/3"),
    ("0.0000001", r"1 \times 10^{-7}"),
    ("Yes", "yes"),
    ("(A)", "A"),
    ("ab", "a b"),
    (r"x \cdot y", "yx"),
]

DIFFERENT = [
    ("19", "18"),
    ("-18", "18"),
    ("18, 26", "18"),  # several answers
    (r"\{18, 26\}", "18"),
    (r"18 \text{ or } 26", "18"),
    (r"18 \pm 8", "18"),
    ("[17, 19]", "18"),
    ("26 = 18", "18"),  # equations that end in the answer
    ("18 = 26", "18"),
    ("x = 26 = 18", "18"),
    (r"26 = 2\sqrt{3}", r"2\sqrt{3}"),
    ("10 8", "18"),  # two numbers
    ("16 + 2", "18"),  # still to be worked out
    ("(16 - 3 - 4) * 2", "18"),
    ("-(-18)", "18"),
    ("18 thousand", "18"),
    ("x", "18"),
    (r"\infty", "18"),
    ("nan", "18"),
    ("", "18"),
    ("18" + "0" * 900, "18"),
    (r"1.8 \times 10^{999999999}", "18"),  # would fill the memory
    ("3.1416", r"\pi"),
    ("0.3333", r"\frac{1}{3}"),
    ("Monday", "Tuesday"),
    ("2", "2x"),  # a variable is no unit
    ("2x", "2"),
    ("2", "2m"),
    ("3", "3x^2"),
    ("3x", "3x^2"),
    ("3", "3 m^2"),
    (r"\frac{1}{2}", r"\frac{1}{2} m"),
    ("5", "5i"),
    ("5i", "5"),
    ("12", "12xy"),
    ("5k", "5"),
    ("5n", "5"),
    ("2 a", "2"),
    ("6e", "6"),
    ("5 pi", "5"),
    ("5 squared", "5"),
    ("5 is wrong", "5"),
    ("5 or six", "5"),
    ("5 thousandths", "5"),
    ("10 cm", "10 m"),
    ("10 dollars", "10 cents"),
    ("7 days", "7 weeks"),
    ("9 square meters", "9 m"),
    (r"2\sqrt{3}\text{ cm}", r"2\sqrt{3}\text{ m}"),
    ("1 1/2", "0.5"),
    ("1/0", "18"),
    ("0.0000001", "0.0000002"),
    ("18.0000001", "18"),
    (r"0.5\%", r"50\%"),
    ("sey", "yes"),  # words are no products
    ("s \\cdot e \\cdot y", "yes"),
    ("seat", "east"),
    (r"\text{veen}", r"\text{even}"),
    ("BA", "AB"),
    ("a", "A"),
]


@pytest.mark.parametrize(("given", "right"), EQUAL)
def test_these_are_equal(given: str, right: str) -> None:
    assert compare(given, right).value == 1.0


@pytest.mark.parametrize(("given", "right"), DIFFERENT)
def test_these_are_not(given: str, right: str) -> None:
    assert compare(given, right).value == 0.0


def test_a_percent_sign_is_read_as_hundredths_or_not_at_all() -> None:
    """math-verify's reading, stated in the docs: 50% is 0.5 and 50."""
    assert [compare(r"50\%", right).value for right in ("50", "0.5", "5")] == [1.0, 1.0, 0.0]


def test_an_answer_of_any_length_is_compared() -> None:
    (graded,) = grade(["1" * 5000], answer=["18"], math_answer=["all"])
    assert graded.value == 0.0 and "more than 1,000 characters" in graded.why


def test_a_sum_counts_where_that_is_asked_for() -> None:
    assert compare("16 + 2", "18", expressions=True).value == 1.0
    assert compare("16 + 3", "18", expressions=True).value == 0.0


def test_only_a_box_counts_unless_another_place_is_named() -> None:
    said = [r"so \boxed{18}", "Answer: 18", "18", r"\boxed{1} \boxed{18}", r"\boxed{18} \boxed{1}", r"\boxed{18", ""]
    graded = grade(said, answer=["x\n#### 18"] * len(said))
    assert [each.value for each in graded] == [1, 0, 0, 1, 0, 0, 0]
    assert "looked for boxed" in graded[1].why
    lines = grade(said, answer=["18"] * len(said), math_answer=["boxed", "line", "number"])
    assert [each.value for each in lines] == [1, 1, 1, 1, 0, 1, 0]


def test_a_row_without_a_readable_answer_is_not_a_wrong_one() -> None:
    said = [r"\boxed{18}"] * 3
    assert [each.value for each in grade(said, answer=[None, "", "18"])] == [None, None, 1.0]
    assert "answer_column" in grade(said[:1])[0].why
    assert grade([r"\boxed{}"], answer=[""])[0].value is None  # nothing equals a missing answer


def test_several_right_answers_and_messages() -> None:
    said = [[{"role": "assistant", "content": r"\boxed{3}"}], [{"role": "assistant", "content": r"\boxed{4}"}]]
    assert [each.value for each in grade(said, gold=[["2", "3"], ["2", "3"]], answer_column="gold")] == [1.0, 0.0]


# ---------------------------------------------------------------- in its processes


@pytest.fixture(scope="module")
def reward() -> Iterator[Mixture]:
    made = build(RewardOptions(reward="math", sample_deadline=1.0, reward_workers=2, reward_failures=1.0))
    yield made
    made.close()


HOSTILE = {
    "a tower of powers": (r"\boxed{9^{9^{9^{9^9}}}}", 0.0),
    "a sum of a tower": (r"\boxed{9^{9^{9^{9}}} - 9^{9^{9^{9}}} + 18}", 0.0),
    "factorials": (r"\boxed{((((9!)!)!)!)!}", 0.0),
    "braces without end": (r"\boxed" + "{" * 100_000, 0.0),
    "nested fractions": (r"\boxed{" + r"\frac{1}{" * 200 + "1" + "}" * 200 + "}", 0.0),
    "a hundred thousand digits": (r"\boxed{" + "9" * 100_000 + "}", 0.0),
    "nul and surrogates": ("\x00\ud800" + r"\boxed{1" + "\ud800" + "8}", 0.0),
    "code": (r"\boxed{__import__('os').system('touch hacked')}", 0.0),
    "ten megabytes before the box": ("x" * 10_000_000 + r"\boxed{18}", 1.0),
    "ten megabytes in it": (r"\boxed{" + "1" * 10_000_000 + "}", 0.0),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_are_wrong_in_time(reward: Mixture, name: str, tmp_path: Path) -> None:
    text, expected = HOSTILE[name]
    start = time.monotonic()
    (score,) = reward([Sample("p", text, columns={"answer": "18"})])
    assert time.monotonic() - start < 10
    assert score.value == expected
    assert not Path("hacked").exists()


def test_what_keeps_the_algebra_busy_is_no_score_and_loses_no_other(reward: Mixture) -> None:
    """Where the right answer is an expression, any is compared with it; this one is never worked out."""
    said = [r"\boxed{2\sqrt{3}}", r"\boxed{9^{9^{9^{9}}}}", r"\boxed{\sqrt{12}}"]
    start = time.monotonic()
    scores = reward([Sample("p", text, columns={"answer": r"2\sqrt{3}"}) for text in said])
    assert time.monotonic() - start < 10
    assert [score.value for score in scores] == [1.0, None, 1.0]
    assert "within 1 seconds" in scores[1].why


@real
def test_real_answers_of_four_models_are_graded_as_their_authors_did() -> None:
    """5,276 answers to 1,319 questions of GSM8K, with the authors' own verdict: no disagreement."""
    checked, wrong = 0, []
    for line in (GSM8K / "example_model_solutions.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        answers = [value for value in row.values() if isinstance(value, dict)]
        right = row["ground_truth"].rpartition("A:")[2].strip()
        said = [answer["solution"] for answer in answers]
        for answer, graded in zip(answers, grade(said, answer=[right] * 4, math_answer=["line"]), strict=True):
            checked += 1
            if graded.value != float(answer["is_correct"]):
                wrong.append((right, answer["solution"][-80:], graded))
    assert checked == 5276
    assert wrong == []


@real
def test_the_right_answers_of_gsm8k_can_be_read_and_are_right() -> None:
    rows = [json.loads(line) for line in (GSM8K / "train.jsonl").open(encoding="utf-8")]
    for row in rows[::20]:
        right = row["answer"].rpartition("####")[2].strip()
        other = str(int(right.replace(",", "")) + 1)
        said = [f"\\boxed{{{right}}}", f"\\boxed{{{other}}}", row["answer"]]
        assert [each.value for each in grade(said, answer=[row["answer"]] * 3)] == [1.0, 0.0, 0.0]
        assert grade([row["answer"]], answer=[row["answer"]], math_answer=["hashes"])[0].value == 1.0
