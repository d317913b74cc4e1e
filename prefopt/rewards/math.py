r"""Mathematics: the answer in a completion equals the row's, as numbers or as expressions.

math-verify compares them, in a process that is killed at its deadline: it hands completions to a computer algebra
system, which some of them can keep busy for hours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from prefopt.records import text_of
from prefopt.rewards.answers import Place, find, right_answers
from prefopt.rewards.channel import Reasoned

# words after a number that change it, so that they are no unit
SCALES = {"hundred", "thousand", "million", "billion", "trillion", "dozen", "half", "quarter", "third", "percent"}
DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
FRACTION = r"(?:\\[dt]?frac\{\d+\}\{\d+\}|\\[dt]?frac\d\d)"
POWER = r"\\times\s?10\^(?:\d|\{-?\d{1,3}\})"
PLAIN = re.compile(rf"[-+]?\s?(?:{DIGITS}(?:\s?/\s?\d+|\s?{POWER})?|(?:\d+\s?)?{FRACTION}|\d+\s\d+/\d+)(?:\s?\\?%)?")
UNIT = re.compile(r"(?<=[\d%}])\s?((?:[A-Za-z]+\s?){1,4})(?:\^\{?[23]\}?)?$")
NAME = re.compile(r"\\?[A-Za-z]+(?:_\{?\w+\}?)?(?:\([A-Za-z, ]+\))?")


class Grader:
    """`grade` with options, for a process: it imports the algebra while it starts, and not in a sample's time."""

    def __init__(self, **given: Any) -> None:
        self.given = given

    def __reduce__(self) -> tuple[Any, ...]:
        return _warm, (self.given,)


def _warm(given: dict[str, Any]) -> Callable[..., list[Reasoned]]:
    compare("0.5", "\\frac{1}{2}")
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
    """
    given, right = tidy(given), tidy(right)
    if given == right:
        return Reasoned(1.0, "")
    if "=" not in right:
        name, equals, value = given.rpartition("=")
        if equals and not NAME.fullmatch(name.strip()):
            return Reasoned(0.0, "an equation that is not name = value")
        given = value.strip()
    if is_number(right) and not expressions and not is_number(given):
        return Reasoned(0.0, "not one number")
    if is_integer(given) and is_integer(right):
        return Reasoned(float(int(given.replace(",", "")) == int(right.replace(",", ""))), "")
    return _verified(*(without_unit(text) if is_number(text) else text for text in (given, right)))


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

    places = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]
    found: list[Any] = parse("\\boxed{" + text + "}", places, extraction_mode="first_match", parsing_timeout=None)
    return found


def tidy(text: str) -> str:
    r"""Without what says nothing of the value: `$`, currencies, `\left`, thin spaces, `\text{}`, a last full stop."""
    text = text.strip().rstrip(".").strip()
    if text.startswith("\\(") and text.endswith("\\)"):
        text = text[2:-2]
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}", r" \1", text)
    text = re.sub(r"(?<=\d)(?:\{,\}|\\[,!])(?=\d{3})", "", text)  # 1{,}080 and 1\,080 are 1080
    text = re.sub(r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\!|\\\$|[$€£¥]", "", text)
    text = re.sub(r"\\[,;:]|\\quad(?![A-Za-z])", " ", text)
    return re.sub(r"\s+", " ", text).strip()


def is_number(text: str) -> bool:
    """Whether a tidied text is one number, perhaps with a unit."""
    return PLAIN.fullmatch(without_unit(text)) is not None


def is_integer(text: str) -> bool:
    return re.fullmatch(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)", text, re.ASCII) is not None


def without_unit(text: str) -> str:
    match = UNIT.search(text)
    if not match or {word.lower().rstrip("s") for word in match[1].split()} & SCALES:
        return text
    return text[: match.start()].strip()
