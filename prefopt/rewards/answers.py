"""Where an answer stands in a text. Every search is linear: a completion may be of any size and hold anything."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

Place = Literal["boxed", "hashes", "line", "number", "all"]

LONGEST = 1000  # characters; a longer answer is none
TAIL = 20_000  # characters at the end of a text in which a last line or number is looked for

# the columns that a row's right answer may stand in, the first that there is
COLUMNS = ("answer", "solution", "ground_truth", "target")

NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+")
LINE = re.compile(
    r"\**(?:(?:the\s+)?(?:final\s+)?answer\s*(?:is\b\s*:?|:)|a\s*:)\**\s*(.+)",
    re.IGNORECASE,
)


def boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}`, whose braces are balanced; None without one or where it has no end."""
    start = text.rfind("\\boxed")
    if start < 0:
        return None
    rest = text[start + len("\\boxed") : start + len("\\boxed") + LONGEST + 100].lstrip()
    if not rest.startswith("{"):
        return None
    depth = 0
    for position, letter in enumerate(rest):
        escaped = position > 0 and rest[position - 1] == "\\"
        depth += 0 if escaped else (letter == "{") - (letter == "}")
        if depth == 0:
            return rest[1:position].strip()
    return None


def hashes(text: str) -> str | None:
    """What follows the last `####`, to the end of its line."""
    _, mark, rest = text.rpartition("####")
    return rest[: LONGEST + 100].strip().split("\n", 1)[0].strip() if mark else None


def line(text: str) -> str | None:
    """What follows `Answer:`, `A:` or `The answer is` in the last line that starts so, less a full stop at its end."""
    for found in reversed(text[-TAIL:].splitlines()):
        if match := LINE.match(found.strip()):
            return match[1].lstrip("* \t").rstrip("*. \t")
    return None


def last_number(text: str) -> str | None:
    """The last number of the text."""
    found = NUMBER.findall(text[-TAIL:])
    return found[-1] if found else None


PLACES: Mapping[Place, Callable[[str], str | None]] = {
    "boxed": boxed,
    "hashes": hashes,
    "line": line,
    "number": last_number,
    "all": str.strip,
}


def find(text: str, places: Sequence[Place], after: str | None = None) -> str | None:
    """The answer in the first of the places that has one; None where none has, or it is empty or too long.

    after: a text that the answer must follow, such as `</think>`; without it there is no answer.
    """
    if after:
        _, mark, text = text.rpartition(after)
        if not mark:
            return None
    for place in places:
        found = PLACES[place](text)
        if found:
            return found if len(found) <= LONGEST or place == "all" else None
    return None


def right_answers(row: Mapping[str, Any], column: str | None) -> list[str] | str:
    """The row's right answers as text, or why there is none. A list is several that are all right.

    A text with `####` (GSM8K) or a box is what stands there. An empty one is none: nothing equals a missing answer.
    """
    name = column or next((name for name in COLUMNS if row.get(name) is not None), None)
    if name is None:
        return f"the row has no {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}; name its column with answer_column"
    if row.get(name) is None:
        return f"the row has no {name!r}"
    value = row[name]
    found = [_one(each) for each in (value if isinstance(value, (list, tuple)) else [value])]
    return found if found and all(found) else f"{name!r} holds an empty answer"


def _one(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value)
    return hashes(text) or boxed(text) or text.strip()
