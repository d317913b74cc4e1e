"""Where an implicit prompt ends: the last turn, message or word that both answers share."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Any

TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


@dataclass(frozen=True)
class Implicit:
    """at: the characters of the shared prompt. asides: per completion, spans that are a Human's turns."""

    at: int
    asides: list[list[tuple[int, int]]]


def is_transcript(text: str) -> bool:
    """Whether the text is `\\n\\nHuman: ... \\n\\nAssistant: ...`, the form of Anthropic's HH data."""
    first = TURN.search(text)
    return first is not None and not text[: first.start()].strip() and "\n\nAssistant:" in text


def common_turns(chosen: str, rejected: str) -> Implicit | None:
    """The cut after `Assistant:` of the last turn up to which both transcripts agree; None if there is none."""
    turns = [list(TURN.finditer(text)) for text in (chosen, rejected)]
    at = 0
    for ours, theirs in zip(*turns, strict=False):
        if chosen[: ours.end()] != rejected[: theirs.end()]:
            break
        at = ours.end() if ours[1] == "Assistant" else at
    return Implicit(at, [_human(*side, at) for side in zip((chosen, rejected), turns, strict=True)]) if at else None


def _human(text: str, turns: list[re.Match[str]], at: int) -> list[tuple[int, int]]:
    """Spans after `at`, relative to it, from a Human's turn to the end of the next `Assistant:`."""
    spans, start = [], None
    for turn in turns:
        if turn.start() < at:
            continue
        if turn[1] == "Human" and start is None:
            start = turn.start()
        elif turn[1] == "Assistant" and start is not None:
            spans.append((start - at, turn.end() - at))
            start = None
    if start is not None:
        spans.append((start - at, len(text) - at))
    return spans


def common_messages(chosen: list[dict[str, Any]], rejected: list[dict[str, Any]]) -> int:
    """How many first messages are the prompt: the longest common run after which both answer."""
    num = 0
    while num < min(len(chosen), len(rejected)) and chosen[num] == rejected[num]:
        num += 1
    while num and not all(num < len(side) and side[num]["role"] == "assistant" for side in (chosen, rejected)):
        num -= 1
    return num


def common_text(chosen: str, rejected: str) -> Implicit:
    """The longest common beginning that splits no word and leaves both something to say.

    A space before the next word goes with that word, as byte-level and sentence-piece vocabularies have it.
    """
    at, limit = 0, min(len(chosen), len(rejected))
    while at < limit and chosen[at] == rejected[at]:
        at += 1
    while at and not all(_may_cut(text, at) and text[at:].strip() for text in (chosen, rejected)):
        at -= 1
    while at and chosen[at - 1] == " ":
        at -= 1
    return Implicit(at, [[], []])


def _may_cut(text: str, at: int) -> bool:
    """Whether the text may be cut before character `at`: not inside a word, nor before a mark that combines."""
    if at >= len(text):
        return False
    before, after = text[at - 1], text[at]
    if unicodedata.category(after) in ("Mn", "Mc", "Me", "Cf", "Sk") or unicodedata.category(before) == "Cf":
        return False
    return not (_in_word(before) and _in_word(after))


def _in_word(character: str) -> bool:
    """Letters and digits of scripts that put spaces between words (East Asian scripts, from U+2E80, do not)."""
    return unicodedata.category(character)[0] in "LNM" and ord(character) < 0x2E80
