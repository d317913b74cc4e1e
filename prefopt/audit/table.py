"""What an audit looks at: every row of the source, what training would make of it, and why it would leave it out.

Unlike `prefopt.data.load` this keeps the rows that training refuses or drops, because they are what is looked for.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefopt.audit import words
from prefopt.audit.options import AnswerOptions
from prefopt.audit.words import Corpus
from prefopt.data import DataOptions
from prefopt.data.columns import Dropped, Message, Record, Text
from prefopt.data.convert import Kind, check, convert
from prefopt.data.dataset import fit, rename
from prefopt.data.read import Row, RowError, read
from prefopt.data.shapes import Reader, Shape, grow, last_reply
from prefopt.data.template import Encoder
from prefopt.records import Example, InputError, text_of

Floats = NDArray[np.float64]
ROWS_AT_ONCE = 1000
EMPTY = ("empty completion", "a step is empty")
EQUAL = "chosen and rejected are equal"
TIED = "tied scores"


@dataclass(frozen=True)
class Fault:
    """Why training stops at a row, or leaves it out. reason: one per kind of fault. wrong: it stops there."""

    line: int
    reason: str
    message: str
    wrong: bool


@dataclass(frozen=True)
class Item:
    """One prompt with the completions that are compared or learnt: most rows hold one, a tree holds many.

    line: its row, an index into `Table.lines`. record: as training has it, the better completion of a pair first.
    asked, answers: its texts; of messages, with their roles. scores: as the file rates the completions, or None.
    example: its tokens, or None without a tokenizer or where the row cannot be tokenised.
    """

    line: int
    record: Record
    asked: str
    answers: list[str]
    scores: list[float] | None
    example: Example | None = None


@dataclass(frozen=True)
class Asked:
    """What a model makes of every completion, [N], NaN where it was not asked; N: completions, items in order.

    per_token, total: log-probability, nats. score: of a reward model, which has no log-probabilities. own: per token,
    of completions that the model wrote itself.
    """

    per_token: Floats
    total: Floats
    score: Floats | None
    own: Floats | None


@dataclass(frozen=True, eq=False)
class Table:
    """A source as an audit sees it. Every row is in `lines`, in order.

    shape: the convention in words. kind: what is learnt from it. faults: rows that give no item, or stop training.
    held: held-out rows to look for leakage from, or None. encoder: how tokens were made, None without a tokenizer.
    loose: the rows were messages of trees, one a row. token_faults: rows that cannot be tokenised. asked: what a model
    makes of them.
    """

    source: str
    shape: str
    kind: str
    lines: list[Row]
    items: list[Item]
    faults: list[Fault]
    options: DataOptions
    encoder: Encoder | None = None
    held: Table | None = None
    loose: bool = False
    token_faults: list[Fault] = field(default_factory=list)
    asked: Asked | None = None
    answers: AnswerOptions = field(default_factory=AnswerOptions)

    @cached_property
    def keys(self) -> list[str]:
        """Each item's prompt, less differences of white space and Unicode form, with what a chat template is given."""
        return [given(item.record) + words.folded(item.asked) for item in self.items]

    @cached_property
    def answer_keys(self) -> list[tuple[str, ...]]:
        """Each item's completions, folded as the prompts are."""
        return [tuple(map(words.folded, item.answers)) for item in self.items]

    @cached_property
    def num_answers(self) -> int:
        """Completions of an item: 1 or 2; 0 where rows hold prompts or different numbers of completions."""
        numbers = {len(item.answers) for item in self.items}
        return numbers.pop() if len(numbers) == 1 else 0

    @cached_property
    def corpus(self) -> Corpus:
        """The words of every completion, items in order, completions in order within one."""
        return words.corpus(answer for item in self.items for answer in item.answers)

    @cached_property
    def asked_corpus(self) -> Corpus:
        """The words of every prompt, with the word ids of `corpus`."""
        return words.corpus((item.asked for item in self.items), self.corpus.vocabulary)

    @cached_property
    def answer_words(self) -> list[int]:
        """Number of words of each completion, as `corpus` has them."""
        lengths: list[int] = self.corpus.lengths.tolist()
        return lengths

    def place(self, line: int) -> str:
        """`file:line` of a row."""
        return self.lines[line].where


def read_table(
    source: str | Path,
    options: DataOptions,
    kind: Kind | None = None,
    tokenizer: Any = None,
    held: Table | None = None,
) -> Table:
    """Read and understand `source`, and tokenise it where there is a tokenizer; no row is left out silently.

    kind: what training learns from it; None takes what the rows are, ratings as the pairs they make. InputError where
    the source as a whole cannot be read, no row can be understood, or the rows cannot serve as `kind`.
    """
    encoder = _encoder(tokenizer, options)
    gathered = _Gatherer(str(source), options, kind, chat=encoder is None or encoder.has_template)
    for row, renamed in _rows(source, gathered):
        gathered.take(row, renamed)
    shape = gathered.reader.shape
    if shape is None:
        reasons = Counter(fault.reason for fault in gathered.faults)
        raise InputError(f"{source}: no row could be read ({', '.join(f'{n:,} {why}' for why, n in reasons.items())})")
    items: list[Item] = gathered.items
    token_faults: list[Fault] = []
    found = gathered.kind or shape.kind
    if encoder is not None:
        items, token_faults = _tokenised(items, encoder, found, options)
    return Table(
        str(source),
        gathered.reader.how,
        found,
        gathered.lines,
        items,
        gathered.faults,
        options,
        encoder,
        held,
        gathered.loose,
        token_faults,
    )


def _encoder(tokenizer: Any, options: DataOptions) -> Encoder | None:
    if tokenizer is None:
        return None
    separator = options.step_separator.replace(r"\n", "\n")
    return Encoder(tokenizer, options.chat_template, options.train_on, step_separator=separator)


def _rows(source: str | Path, gathered: _Gatherer) -> Iterator[tuple[Row, Row]]:
    """Good rows as they are and with their columns renamed; bad ones are noted.

    Messages of a tree, one per row, are gathered first.
    """
    loose: list[Row] = []
    for item in read(source):
        if isinstance(item, RowError):
            gathered.refuse(Row(item.where, {}), item)
            continue
        try:
            row = rename(item, gathered.options.map) if gathered.options.map else item
        except RowError as error:
            gathered.refuse(item, error)
            continue
        if {"message_id", "parent_id", "text"} <= row.values.keys() and "replies" not in row.values:
            loose.append(row)
        else:
            yield item, row
    gathered.loose = bool(loose)
    for item in grow(loose):
        if isinstance(item, RowError):
            gathered.refuse(Row(item.where, {}), item)
        else:
            yield item, item


@dataclass
class _Gatherer:
    """Rows to items and faults, one at a time."""

    source: str
    options: DataOptions
    kind: Kind | None
    chat: bool
    loose: bool = False
    lines: list[Row] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reader = Reader(chat=self.chat, whole=True)

    def refuse(self, row: Row, error: Exception) -> None:
        """Note a row that cannot be used; it is a line of its own all the same."""
        self.lines.append(row)
        self._fault(error)

    def _fault(self, error: Exception) -> None:
        wrong = isinstance(error, RowError)
        reason = error.reason if isinstance(error, RowError) else str(error)
        self.faults.append(Fault(len(self.lines) - 1, reason, str(error), wrong and reason not in EMPTY))

    def take(self, row: Row, renamed: Row) -> None:
        """Note a row, with the items it gives."""
        self.lines.append(row)
        before = sum(self.reader.notes.values())
        try:
            records = self.reader.records(renamed)
        except (RowError, Dropped) as error:
            self._fault(error)
            return
        assert self.reader.shape
        if len(self.lines) == 1 or self.kind is None:
            self._choose(self.reader.shape)
        if sum(self.reader.notes.values()) > before:
            self._fault(Dropped(EMPTY[0]))
        for record in records:
            self._add(record, self.reader.shape)

    def _choose(self, shape: Shape) -> None:
        if self.kind is None:
            self.kind = "pairs" if shape.kind == "ratings" else shape.kind  # type: ignore[assignment]
        assert self.kind
        check(shape, self.kind, self.source)

    def _add(self, record: Record, shape: Shape) -> None:
        """The record's items: of pairs as they are, whatever their scores say, since that is looked at."""
        line = len(self.lines) - 1
        if shape.kind == self.kind or self.kind is None:
            scores = record.scores if _is_rated(record, shape) else None
            self.items.append(_item(line, record, scores))
            return
        try:
            for found in convert(record, shape, self.kind, "drop"):
                if isinstance(found, Dropped):
                    self._fault(found)
                else:
                    self.items.append(_item(line, found, _rating_of(found, record)))
        except RowError as error:
            self._fault(error)


def _is_rated(record: Record, shape: Shape) -> bool:
    """Whether the scores are the file's own, and not the 1 and 0 that stand for chosen and rejected."""
    if shape.kind == "pairs":
        return all(record.extra.get(name) is not None for name in ("score_chosen", "score_rejected"))
    return shape.kind == "ratings"


def _rating_of(found: Record, record: Record) -> list[float] | None:
    """What the file says of the completions that were picked from a rated row."""
    if len(record.scores) < 2 or any(map(math.isnan, record.scores)):
        return None
    rated = [(text, score) for text, score in zip(record.completions, record.scores, strict=True)]
    picked = []
    for text in found.completions:
        picked.append(next(score for other, score in rated if other == text))
    return picked


def _item(line: int, record: Record, scores: list[float] | None) -> Item:
    asked, answers = _split(record)
    return Item(line, record, said(asked), [spoken(text) for text in answers], scores)


def given(record: Record) -> str:
    """The tools and arguments of the chat template: with others the same turns are another prompt."""
    parts = [part for part in (record.tools, record.template) if part]
    return json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str) + "\n" if parts else ""


def _split(record: Record) -> tuple[Text, list[Text]]:
    """Prompt and completions; of a whole conversation, what its last answer follows, and that answer."""
    if record.prompt is not None:
        return record.prompt, record.completions
    if record.completions and isinstance(record.completions[0], list):
        try:
            before, reply = last_reply(record.completions[0], record.where)
        except RowError:
            return "", record.completions
        return before, [reply]
    return "", record.completions


def said(text: Text) -> str:
    """A prompt as one text; of messages, each with its role."""
    if isinstance(text, str):
        return text
    return "\n".join(f"{turn['role']}: {_content(turn)}" for turn in text)


def spoken(text: Text) -> str:
    """A completion as one text, without roles."""
    return text if isinstance(text, str) else "\n".join(map(_content, text))


def _content(turn: Message) -> str:
    calls = [
        json.dumps(call.get("function", call), sort_keys=True, default=str) for call in turn.get("tool_calls") or []
    ]
    return "\n".join([text_of([turn]), *calls]) if calls else text_of([turn])


def _tokenised(items: list[Item], encoder: Encoder, kind: str, options: DataOptions) -> tuple[list[Item], list[Fault]]:
    """The items with their tokens, before any is cut, and the faults of those that have none."""
    found: list[Item] = []
    faults: list[Fault] = []
    for start in range(0, len(items), ROWS_AT_ONCE):
        part = items[start : start + ROWS_AT_ONCE]
        rendered, whose = [], []
        for number, item in enumerate(part):
            try:
                rendered.append(encoder.render(item.record, kind))
                whose.append(number)
            except RowError as error:
                faults.append(Fault(item.line, error.reason, str(error), True))
        examples: dict[int, Example] = {}
        for number, example in zip(whose, encoder.encode(rendered), strict=True):
            if isinstance(example, RowError):
                faults.append(Fault(part[number].line, example.reason, str(example), True))
            else:
                examples[number] = example
        found += [replace(item, example=examples.get(number)) for number, item in enumerate(part)]
    return found, faults


def fitted(item: Item, options: DataOptions) -> tuple[Example | None, int, str]:
    """The item's tokens within max_length, how many completions were cut, and why there are none left."""
    if item.example is None:
        return None, 0, "not tokenised"
    try:
        example, cut = fit(item.example, options)
    except Dropped as why:
        return None, 0, str(why)
    return example, cut, ""
