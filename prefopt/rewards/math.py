r"""Mathematics: the answer in a completion equals the row's, as numbers or as expressions.

math-verify compares them, in a process that is killed at its deadline: it hands completions to a computer algebra
system, which some of them can keep busy for hours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from prefopt.records import text_of
from prefopt.rewards.answers import Place, find, right_answers
from prefopt.rewards.channel import Reasoned

# words after a number that change it, so that they are no unit
SCALES = {"hundred", "thousand", "million", "billion", "trillion", "dozen", "half", "quarter", "third", "percent"}
DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
FRACTION = r"\\[dt]?frac\{\d+\}\{\d+\}|\\[dt]?frac\d\d"
PLAIN = re.compile(
    rf"[-+]?\s?(?:{DIGITS}|{DIGITS}\s?/\s?\d+|(?:\d+\s?)?(?:{FRACTION})|\d+\s\d+/\d+|(?:{DIGITS})\s?\\times\s?10\^(?:\d|\{{-?\d+\}}))"
    r"(?:\s?\\?%)?"
)
UNIT = re.compile(r"(?<=[\d%}])\s?((?:[A-Za-z]+\s?){1,4})(?:\^\{?[23]\}?)?$")
NAME = re.compile(r"\\?[A-Za-z]+(?:_\{?\w+\}?)?(?:\([A-Za-z, ]+\))?")


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
    return _verified(without_unit(given) if is_number(given) else given, without_unit(right) if is_number(right) else right)


def _verified(given: str, right: str) -> Reasoned:
    """math-verify's word on it, without its own time limits: those need signals, and a process that is killed does not."""
    expected = _parsed(right)
    if not expected:
        return Reasoned(None, f"the right answer cannot be read as mathematics: {right[:80]!r}")
    try:
        found = _parsed(given)
    except Exception as error:
        return Reasoned(0.0, f"not readable as mathematics ({type(error).__name__})")
    if not found:
        return Reasoned(0.0, "not readable as mathematics")
    from math_verify import verify

    equal = verify(expected, found, timeout_seconds=None, raise_on_error=True)
    return Reasoned(float(equal), "")


def _parsed(text: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    extraction = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]
    return parse(  # type: ignore[no-any-return]
        "\\boxed{" + text + "}",
        extraction,
        extraction_mode="first_match",
        parsing_timeout=None,
        raise_on_error=True,
    )


def tidy(text: str) -> str:
    r"""Without what says nothing of the value: `$`, currencies, `\left`, thin spaces, `\text{...}`, a last full stop."""
    text = text.strip().rstrip(".").strip()
    if text.startswith("\\(") and text.endswith("\\)"):
        text = text[2:-2]
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}", r" \1", text)
    text = re.sub(r"\\(?:left|right|!|,|;|:|quad|displaystyle)(?![A-Za-z])|\\\$|[$€£¥]|\{,\}(?=\d{3})", _kept, text)
    return re.sub(r"\s+", " ", text).strip()


def _kept(match: re.Match[str]) -> str:
    return "," if match[0] == "{,}" else " " if match[0] in ("\\quad", "\\,", "\\;", "\\:") else ""


def is_number(text: str) -> bool:
    """Whether a tidied text is one number, perhaps with a unit."""
    return PLAIN.fullmatch(without_unit(text)) is not None


def without_unit(text: str) -> str:
    match = UNIT.search(text)
    if not match or {word.lower().rstrip("s") for word in match[1].split()} & SCALES:
        return text
    return text[: match.start()].strip()


