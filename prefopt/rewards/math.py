r"""Mathematics: the answer in a completion equals the row's, as numbers or as expressions.

math-verify compares them, in a process that is killed at its deadline: it hands completions to a computer algebra
system, which some of them can keep busy for hours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

from prefopt.records import text_of
from prefopt.rewards.answers import LONGEST, Place, find, right_answers
from prefopt.rewards.channel import Reasoned
from prefopt.rewards.units import measured, spelled

DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
PLAIN = re.compile(
    rf"(?P<sign>[-+]?)\s?(?:(?P<decimal>{DIGITS})(?:\s?/\s?(?P<under>\d+)|\s?\\times\s?10\^\{{?(?P<power>-?\d{{1,3}})\}}?)?"
    r"|(?:(?P<whole>\d+)\s?)?\\[dt]?frac(?:\{(?P<top>\d+)\}\{(?P<bottom>\d+)\}|(?P<digits>\d\d))"
    r"|(?P<mixed>\d+)\s(?P<mixed_top>\d+)/(?P<mixed_bottom>\d+))(?P<percent>\s?\\?%)?"
)
NAME = re.compile(r"\\?[A-Za-z]+(?:_\{?\w+\}?)?(?:\([A-Za-z, ]+\))?")
WORDS = re.compile(r"[^\W\d_]+(?: [^\W\d_]+)*")
MINUS = str.maketrans("\u2212\u2013", "--")  # the minus sign and the dash that is used for one
ROUNDED = Fraction(1, 10**6)  # how far a decimal may be from what it rounds: of the value, and at most of 1


class Grader:
    """`grade` with options, for a process: it imports the algebra while it starts, and not in a sample's time."""

    def __init__(self, **given: Any) -> None:
        self.given = given

    def __reduce__(self) -> tuple[Any, ...]:
        return _warm, (self.given,)


def _warm(given: dict[str, Any]) -> Callable[..., list[Reasoned]]:
    compare("\\sqrt{12}", "2\\sqrt{3}")
    return partial(grade, **given)


def grade(
    completions: Sequence[Any],
    answer_column: str | None = None,
    math_answer: Sequence[Place] = ("boxed",),
    answer_after: str | None = None,
    math_expressions: bool = False,
    **columns: Any,
) -> list[Reasoned]:
    """1 where the completion's answer equals one of the row's, 0 where it differs or is missing.

    A row without a readable answer gives None. See `prefopt.rewards.options.RewardOptions` for the options.
    """
    columns = {name: values for name, values in columns.items() if isinstance(values, list)}
    graded = []
    for position, completion in enumerate(completions):
        row = {name: values[position] for name, values in columns.items()}
        right = right_answers(row, answer_column)
        if isinstance(right, str):
            graded.append(Reasoned(None, right))
            continue
        given = find(text_of(completion), math_answer, answer_after)
        if given is None:
            graded.append(Reasoned(0.0, "no answer: looked for " + ", then ".join(math_answer)))
            continue
        graded.append(_any(given, right, math_expressions))
    return graded


def _any(given: str, right: Sequence[str], expressions: bool) -> Reasoned:
    found = [compare(given, each, expressions) for each in right]
    return max(found, key=lambda each: -1.0 if each.value is None else each.value)


def compare(given: str, right: str, expressions: bool = False) -> Reasoned:
    """Whether two answers are equal. None, with the reason, where the right one cannot be read.

    Where the right answer is a number, the given one must be written as one: with a sign, a currency, a unit, a
    percent sign or as one fraction, but not as something still to be worked out, unless `expressions` says so.
    Units are the same, or one answer has none. Words are compared as text, and are no products of letters.
    """
    given, right = tidy(given), tidy(right)
    if given == right:
        return Reasoned(1.0, "")
    if "=" not in right:
        name, equals, value = given.rpartition("=")
        if equals and not NAME.fullmatch(name.strip()):
            return Reasoned(0.0, "an equation that is not name = value")
        given = value.strip()
    if max(len(given), len(right)) > LONGEST:
        return Reasoned(0.0, f"an answer of more than {LONGEST:,} characters")
    if (same := same_words(given, right)) is not None:
        return Reasoned(float(same), "")
    (given, unit), (right, right_unit) = measured(given), measured(right)
    if unit and right_unit and unit != right_unit:
        return Reasoned(0.0, f"in units of {unit}, not {right_unit}")
    number, right_number = number_of(given), number_of(right)
    if number and right_number:
        return Reasoned(float(number.equals(right_number)), "")
    if right_number and not expressions:
        return Reasoned(0.0, "not one number")
    return _verified(given, right)


def _verified(given: str, right: str) -> Reasoned:
    """math-verify's word on it, without its time limits: they are signals, which some of its work does not heed."""
    from math_verify import verify

    expected, found = _parsed(right), _parsed(given)
    if not expected:
        return Reasoned(None, f"the right answer cannot be read as mathematics: {right[:80]!r}")
    if not found:
        return Reasoned(0.0, "not readable as mathematics")
    equal = verify(expected, found, timeout_seconds=None, raise_on_error=True)
    return Reasoned(float(equal), "")


def _parsed(text: str) -> list[Any]:
    """math-verify's reading of an answer; empty where it has none."""
    from math_verify import LatexExtractionConfig, parse

    # units are compared before: what it takes for one may be a variable, as in 2m
    normal = replace(LatexExtractionConfig().normalization_config, units=False)
    places = [LatexExtractionConfig(False, boxed_match_priority=0, normalization_config=normal)]
    found: list[Any] = parse("\\boxed{" + text + "}", places, extraction_mode="first_match", parsing_timeout=None)
    return found


def tidy(text: str) -> str:
    r"""Without what says nothing of the value: `$`, currencies, `\left`, thin spaces, `\text{}`, a last full stop."""
    text = text.translate(MINUS).strip().rstrip(".").strip()
    if text.startswith("\\(") and text.endswith("\\)"):
        text = text[2:-2]
    text = re.sub(r"(?<=[\d})])\s?\\(?:text|mathrm)\{([^{}]*)\}", lambda match: f" {spelled(match[1])}", text)
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}", r" \1", text)
    text = re.sub(r"(?<=\d)(?:\{,\}|\\[,!])(?=\d{3})", "", text)  # 1{,}080 and 1\,080 are 1080
    text = re.sub(r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\!|\\\$|[$€£¥]", "", text)
    text = re.sub(r"\\[,;:]|\\quad(?![A-Za-z])", " ", text)
    return re.sub(r"\s+", " ", text).strip()


class Number(NamedTuple):
    """An answer that is one number. value: what is written, `50%` as 50, with percent."""

    value: Fraction
    percent: bool

    def equals(self, right: Number) -> bool:
        """Exactly for a whole right answer, else within rounding. A percent sign on one side: hundredths or nothing."""
        values, expected = {self.value}, {right.value}
        if self.percent and not right.percent:
            values.add(self.value / 100)
        if right.percent and not self.percent:
            expected.add(right.value / 100)
        return any(_close(value, each) for value in values for each in expected)


def _close(value: Fraction, right: Fraction) -> bool:
    if right.denominator == 1:
        return value == right
    return abs(value - right) <= ROUNDED * min(abs(right), Fraction(1))


def number_of(text: str) -> Number | None:
    """A tidied text without its unit as one number; None where it is none, or divides by 0."""
    match = PLAIN.fullmatch(text)
    if match is None:
        return None
    whole, top, bottom = _fraction(match)
    if int(bottom) == 0:
        return None
    value = Fraction(whole) + Fraction(top.replace(",", "")) / int(bottom)
    power = int(match["power"] or 0)
    value = value * 10**power if power >= 0 else value / 10**-power
    return Number(-value if match["sign"] == "-" else value, match["percent"] is not None)


def _fraction(match: re.Match[str]) -> tuple[int, str, str]:
    """Its whole part, its numerator and its denominator."""
    if match["decimal"]:
        return 0, match["decimal"], match["under"] or "1"
    if match["mixed"]:
        return int(match["mixed"]), match["mixed_top"], match["mixed_bottom"]
    top, bottom = tuple(match["digits"] or "") or (match["top"], match["bottom"])
    return int(match["whole"] or 0), top, bottom


def same_words(given: str, right: str) -> bool | None:
    """Whether two texts of letters alone are the same; None where they are to be read as mathematics.

    Case and spaces count for nothing, but one letter and two capitals (a line AB) are names with a case. A right
    answer with a word of three letters or more equals letters only.
    """
    words = [each if WORDS.fullmatch(each) else each[1:-1] for each in (given, right)]
    if all(WORDS.fullmatch(each) for each in words):
        return _folded(words[0]) == _folded(words[1])
    return False if WORDS.fullmatch(right) and max(map(len, right.split())) > 2 else None


def _folded(words: str) -> str:
    letters = words.replace(" ", "")
    return letters if len(letters) == 1 or (len(letters) == 2 and letters.isupper()) else letters.casefold()
