"""What passes between a reward and the process that its function runs in.

Every message is a frame: 8 bytes of length, 8 bytes of the job's number, then the content. To the process it is a
pickle, which only the trainer writes; back it is JSON, because nothing that a reward's process says is unpickled.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

HEADER = struct.Struct(">QQ")
HELLO = 0  # the number of the first message, which says what to run; jobs count from 1
LARGEST_REPLY = 1 << 28  # bytes; a reply that claims more is no reply

ABSTAINED = "abstained"  # the reason of a None that a function gave on purpose: no failure
LARGEST = 3.4e38  # rewards are kept in single precision

# Ways in which a sample may be left without a number, as they are counted
RAISED, DEADLINE, DIED, LENGTH, VALUE, START = "raised", "deadline", "died", "length", "value", "start"


class Given(NamedTuple):
    """A function's answer for some samples.

    scores: a number, or None and the reason. extra: columns that it gave to `log_extra`. metrics: numbers that it gave
    to `log_metric`. tracebacks are those of `Refused`.
    """

    scores: list[tuple[float | None, str]]
    extra: dict[str, list[Any]]
    metrics: dict[str, list[float]]


class Refused(NamedTuple):
    """A call without an answer. kind: how it is counted. why: in a few words. traceback: the function's own."""

    kind: str
    why: str
    traceback: str = ""


class Reasoned(NamedTuple):
    """What a function may return in place of a number: the number, or None, and what is to be said of it."""

    value: float | None
    why: str


class BadReply(Exception):
    """What came back is not a reply."""


def frame(number: int, content: bytes) -> bytes:
    return HEADER.pack(len(content), number) + content


def read_given(content: bytes, size: int) -> Given | Refused:
    """A reply to a job of `size` samples. BadReply on anything else, whatever it is."""
    try:
        reply = json.loads(content)
        if "failed" in reply:
            return Refused(*(str(part) for part in reply["failed"]))
        scores = [_score(value, why) for value, why in reply["scores"]]
        extra = {str(column): list(values) for column, values in reply["extra"].items()}
        metrics = {str(name): [float(value) for value in values] for name, values in reply["metrics"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BadReply(f"{type(error).__name__}: {error}") from None
    if len(scores) != size:
        raise BadReply(f"{len(scores)} scores for {size} samples")
    return Given(scores, extra, metrics)


def _score(value: Any, why: Any) -> tuple[float | None, str]:
    if value is None:
        return None, str(why) or "no reason given"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST:
        raise ValueError(f"{value!r} is no score")
    return float(value), str(why)


def number(value: Any) -> tuple[float | None, str]:
    """What a function returned for a sample as (number, ""), or (None, the reason).

    None abstains. A bool counts as 1 or 0, and a tensor or array of one number as that number, as in TRL; text,
    several numbers, NaN, infinities and what single precision cannot hold are no rewards.
    """
    if isinstance(value, Reasoned):
        found, why = number(value.value)
        return found, value.why or why
    if value is None:
        return None, ABSTAINED
    kind = type(value).__name__
    if callable(getattr(value, "item", None)):
        try:
            value = value.item()
        except Exception:
            return None, f"returned a {kind} that is not one number"
    if not isinstance(value, (int, float)):
        return None, f"returned a {kind}, not a number: {short(value)}"
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not abs(found) <= LARGEST:
        return None, f"returned {found:g}, which is no reward" if not math.isinf(found) else "returned infinity"
    return found, ""


def short(value: Any, size: int = 80) -> str:
    """`repr`, cut; for messages."""
    try:
        text = repr(value[: 2 * size] if isinstance(value, (str, bytes, list, tuple)) else value)
    except Exception:
        return f"<{type(value).__name__}>"
    return text if len(text) <= size else text[: size - 1] + "…"


def shortened(lines: Sequence[str], size: int = 4000) -> str:
    """The end of a traceback, where the error is."""
    text = "".join(lines)
    return text if len(text) <= size else "…" + text[-size:]
