"""Rows with a right answer in a column: whether their own completions are what the label says of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from prefopt.audit.answers import LEARNT, every
from prefopt.audit.check import Check, Finding, of_items, skipped
from prefopt.audit.table import Item, Table
from prefopt.evaluate.statistics import wilson
from prefopt.records import Sample
from prefopt.rewards.answers import COLUMNS, LONGEST, Place, find, right_answers
from prefopt.rewards.math import number_of, same_words, tidy
from prefopt.rewards.options import RewardOptions, build
from prefopt.rewards.units import measured

PLACES: tuple[Place, ...] = ("boxed", "hashes", "line", "number", "all")
FITS = 0.5  # share of answers labelled right that must pass for a place to be where answers stand
WORKED = 8  # words: a right answer of more is a worked solution
NOTE = re.compile(r"<<([-+*/().\d\s]{1,80})=(-?\d+(?:\.\d+)?)>>")
PART = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+|[-+*/()])")
DEEPEST = 20  # brackets within brackets


@dataclass(frozen=True)
class Verified:
    """What an item's completions should be: (name, text, right answers, whether the label says that it is right)."""

    number: int
    claims: list[tuple[str, str, list[str], bool]] = field(default_factory=list)


def checker(table: Table) -> Finding:
    """Completions that the checker of mathematics judges otherwise than their label does.

    The answer is looked for where most answers that are labelled right have it.
    """
    rows = [each for number, item in enumerate(table.items) if (each := _claims(number, item, table))]
    if not rows:
        return skipped(f"no row has a right answer in a column ({', '.join(COLUMNS)}; or answer_column=NAME)")
    places = table.answers.math_answer or _likeliest(rows, table)
    if places is None:
        return skipped("the right answers are found in too few of the answers that are labelled right; set math_answer")
    verdicts = _judged(rows, places, table.answers.answer_after)
    found: dict[int, str] = {}
    judged = 0
    for row in rows:
        for place, (name, _, right, good) in enumerate(row.claims):
            verdict = verdicts[row.number, place]
            judged += verdict is not None
            if verdict is not None and verdict[0] != good:
                said = f"found {verdict[1]!r}" if verdict[1] else "no answer found"
                found[row.number] = (
                    f"{name} is labelled {'right' if good else 'wrong'}: {said}, right is {_short(right, places)[0]!r}"
                )
    share = wilson(len(found), max(1, len(rows)))
    said = f"{judged:,} answers of {len(rows):,} rows were checked, looked for in: {', '.join(places)}"
    finding = of_items(table, found)
    return Finding(finding.rows, finding.items, bool(found), share, said)


def _claims(number: int, item: Item, table: Table) -> Verified | None:
    right = right_answers(item.record.extra, table.answers.answer_column)
    if isinstance(right, str):
        return None
    claims = []
    for (name, text), score in zip(every(item), item.record.scores, strict=True):
        claims.append((name, text, right, score > 0.5))
    return Verified(number, claims)


def _likeliest(rows: list[Verified], table: Table) -> list[Place] | None:
    """The place in which most answers that are labelled right hold the right one."""
    sample = rows[:: max(1, len(rows) // 500)]
    shares = {}
    for place in PLACES:
        good = [
            same(find(text, [place], table.answers.answer_after), _short(right, [place])) is True
            for row in sample
            for _, text, right, label in row.claims
            if label
        ]
        shares[place] = sum(good) / max(1, len(good))
    best = max(shares, key=lambda place: shares[place])
    return [best] if shares[best] >= FITS else None


def _judged(
    rows: list[Verified], places: list[Place], after: str | None
) -> dict[tuple[int, int], tuple[bool, str] | None]:
    """(item, completion) -> whether it is right and what was found there; None where that cannot be told.

    What is no number and no word goes to the checker of `reward=math`, in processes of its own.
    """
    verdicts: dict[tuple[int, int], tuple[bool, str] | None] = {}
    left: list[tuple[tuple[int, int], Sample, str]] = []
    for row in rows:
        for place, (_, text, whole, _) in enumerate(row.claims):
            given, right = find(text, places, after), _short(whole, places)
            verdict = same(given, right)
            if verdict is None and given is not None:
                left.append(((row.number, place), Sample("", text, columns={"answer": right}), given))
            else:
                verdicts[row.number, place] = None if verdict is None else (verdict, (given or "")[:60])
    if left:
        reward = build(RewardOptions(reward="math", math_answer=places, answer_after=after, reward_failures=1.0))
        try:
            for (key, _, given), score in zip(left, reward([sample for _, sample, _ in left]), strict=True):
                verdicts[key] = None if score.value is None else (score.value > 0.5, given[:60])
        finally:
            reward.close()
    return verdicts


def _short(right: list[str], places: Sequence[Place]) -> list[str]:
    """The right answers; of one that is a whole worked solution, what stands where completions have theirs."""
    return [(find(each, places) or each) if "\n" in each or len(each.split()) > WORKED else each for each in right]


def same(given: str | None, right: list[str]) -> bool | None:
    """Whether an answer is one of the right ones, as texts, numbers or words; None where that takes algebra."""
    if given is None:
        return False
    found = [_same(tidy(given), tidy(each)) for each in right]
    return True if True in found else None if None in found else False


def _same(given: str, right: str) -> bool | None:
    if given == right:
        return True
    if max(len(given), len(right)) > LONGEST:
        return False
    if (words := same_words(given, right)) is not None:
        return words
    (given, unit), (right, right_unit) = measured(given), measured(right)
    numbers = number_of(given), number_of(right)
    if numbers[0] and numbers[1]:
        return not (unit and right_unit and unit != right_unit) and numbers[0].equals(numbers[1])
    return None


def sums(table: Table) -> Finding:
    """Completions with a worked sum in GSM8K's form, <<48/2=24>>, that does not come out so."""
    found, seen = {}, 0
    for number, item in enumerate(table.items):
        for name, text in every(item):
            for said, result in NOTE.findall(text) if "<<" in text else []:
                seen += 1
                value = worked(said)
                if value is not None and abs(value - Fraction(result)) > _rounding(result, value):
                    found[number] = f"{name}: {said.strip()} is not {result}"
    if not seen:
        return skipped("no answer has worked sums in the form <<48/2=24>>")
    return of_items(table, found, f"{seen:,} sums were checked")


def _rounding(result: str, value: Fraction) -> Fraction:
    """Half a unit of the last digit written, and a millionth of the value."""
    digits = len(result.partition(".")[2])
    return Fraction(1, 10**digits) + abs(value) / 10**6


def worked(text: str) -> Fraction | None:
    """The value of a sum of numbers, + - * / and brackets; None where it is none, or divides by 0."""
    parts, at = [], 0
    while at < len(text.rstrip()):
        match = PART.match(text, at)
        if match is None:
            return None
        parts.append(match[1])
        at = match.end()
    try:
        value, end = _sum(parts, 0, 0)
    except (IndexError, ValueError, ZeroDivisionError):
        return None
    return value if end == len(parts) else None


def _sum(parts: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    value, at = _product(parts, at, depth)
    while at < len(parts) and parts[at] in "+-":
        other, after = _product(parts, at + 1, depth)
        value, at = (value + other if parts[at] == "+" else value - other), after
    return value, at


def _product(parts: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    value, at = _atom(parts, at, depth)
    while at < len(parts) and parts[at] in "*/":
        other, after = _atom(parts, at + 1, depth)
        value, at = (value * other if parts[at] == "*" else value / other), after
    return value, at


def _atom(parts: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    if depth > DEEPEST:
        raise ValueError("brackets nested too deeply")
    if parts[at] in "+-":
        value, after = _atom(parts, at + 1, depth + 1)
        return (-value if parts[at] == "-" else value), after
    if parts[at] == "(":
        value, after = _sum(parts, at + 1, depth + 1)
        if parts[after] != ")":
            raise ValueError("a bracket is not closed")
        return value, after + 1
    return Fraction(parts[at]), at + 1


CHECKS = (
    Check(
        "checker",
        "error",
        "rows whose own answer the checker judges otherwise than its label: chosen or demonstrated and wrong, or "
        "rejected and right",
        "a wrong answer is taught; a reward with that checker will say the opposite of the data",
        "read a few: is the answer wrong, or written in a form the checker does not read? Remove the rest with "
        "--remove checker",
        "reward=math, which the answer's place was tried for",
        checker,
        kinds=LEARNT,
        needs="answers",
    ),
    Check(
        "sums",
        "warning",
        "answers with a worked sum, <<48/2=24>>, that does not come out so",
        "wrong arithmetic is taught, also where the last line is right",
        "correct the sums, or remove the rows with --remove sums",
        "exact fractions, to the rounding that is written",
        sums,
        kinds=LEARNT,
    ),
)
