"""The form of a completion: tags in their order, or a pattern that it matches as a whole."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from prefopt.records import InputError, Sample, Score, text_of
from prefopt.rewards.direct import DirectReward


def tags(names: Sequence[str]) -> DirectReward:
    """1 where the completion is `<a>...</a> <b>...</b>` and nothing else: every tag once, in this order, none of them
    empty, white space alone between and around them. Otherwise 0, with the reason. Messages count as one text.
    """
    return DirectReward("format", partial(_tags, names=tuple(names)))


def _tags(sample: Sample, names: Sequence[str]) -> Score:
    rest = sample.text.strip()
    for name in names:
        opening, closing = f"<{name}>", f"</{name}>"
        if sample.text.count(opening) != 1 or sample.text.count(closing) != 1:
            return Score(0.0, f"{opening} and {closing} do not stand there once each")
        inside, _, after = rest.removeprefix(opening).partition(closing)
        if not rest.startswith(opening):
            return Score(0.0, f"{opening} is out of place")
        if not inside.strip():
            return Score(0.0, f"{opening} is empty")
        rest = after.strip()
    return Score(0.0, "text stands outside the tags") if rest else Score(1.0)


def match(completions: Sequence[Any], pattern: str, **columns: Any) -> list[float]:
    """1 where the pattern matches the whole completion (`.` matches line ends, too), else 0.

    Run it in a process of its own: a pattern can take for ever on some texts.
    """
    expression = re.compile(pattern, re.DOTALL)
    return [float(expression.fullmatch(text_of(completion)) is not None) for completion in completions]


def compiled(pattern: str) -> str:
    """`pattern`, once it is known to be one. InputError if it is not."""
    try:
        re.compile(pattern, re.DOTALL)
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(f"format_pattern: {pattern!r} is no regular expression: {error}") from None
    return pattern
