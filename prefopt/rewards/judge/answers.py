"""A judge's words to a verdict, strictly: what was not asked for is no verdict."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
FENCED = re.compile(r"\A```(?:json)?[ \t]*\n(.*)\n```\Z", re.DOTALL)
LONGEST = 100_000  # characters of an answer that are looked at


class Unreadable(ValueError):
    """An answer that is not what was asked for. kind: what it is counted as."""

    def __init__(self, why: str, kind: str = "unreadable") -> None:
        super().__init__(why)
        self.kind = kind


def content_of(body: Any) -> str:
    """The text of a chat completion. Unreadable for a refusal, an answer that was cut, and what is no completion."""
    try:
        choice = body["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        content, refusal = message.get("content"), message.get("refusal")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise Unreadable("the server's answer is no chat completion") from None
    if refusal or finish == "content_filter":
        raise Unreadable(f"the judge refused: {str(refusal or finish)[:200]}", "refused")
    if finish == "length":
        raise Unreadable("the judge's answer was cut; raise judge_max_tokens", "truncated")
    if not isinstance(content, str) or not content.strip():
        raise Unreadable("the judge said nothing")
    return content


def object_in(content: str, keys: Sequence[str]) -> dict[str, Any]:
    """The one JSON object that an answer consists of, with exactly these keys. Unreadable for anything else.

    A thought before it (`<think>`) and a code fence around it are taken off: they are habits, not words.
    """
    text = THOUGHT.sub("", content[:LONGEST]).strip()
    fenced = FENCED.match(text)
    try:
        found = json.loads(fenced[1] if fenced else text, object_pairs_hook=_once, parse_constant=_no_constant)
    except Unreadable:
        raise
    except (ValueError, RecursionError):
        raise Unreadable(f"not one JSON object: {content[:80]!r}") from None
    if not isinstance(found, dict) or found.keys() != set(keys):
        raise Unreadable(f"expected an object with {', '.join(keys)}, got {content[:80]!r}")
    return found


def whole_number(value: Any, largest: int) -> int:
    """A whole number from 0 to `largest`. Unreadable otherwise: 11 of 10 is no high score, but none."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= largest:
        raise Unreadable(f"expected a whole number from 0 to {largest}, got {str(value)[:40]!r}")
    return value


def one_of(value: Any, choices: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise Unreadable(f"expected one of {', '.join(choices)}, got {str(value)[:40]!r}")
    return value


def order_of(value: Any, names: Sequence[str]) -> list[str]:
    """Every name exactly once."""
    if (
        not isinstance(value, list)
        or not all(isinstance(name, str) for name in value)
        or sorted(value) != sorted(names)
    ):
        raise Unreadable(f"expected every one of {', '.join(names)} once, got {str(value)[:80]!r}")
    return value


def text_in(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise Unreadable(f"expected a text, got {str(value)[:40]!r}")
    return value


def schema(properties: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON schema of an object with exactly these properties, in this order."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Unreadable("a key stands twice")
    return found


def _no_constant(name: str) -> None:
    raise Unreadable(f"{name} is no number")
