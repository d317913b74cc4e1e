"""Records of one kind for an objective of another, where that loses no meaning."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Literal

from prefopt.data.columns import Dropped, Record
from prefopt.data.read import RowError
from prefopt.data.shapes import Shape, last_reply
from prefopt.records import InputError

Kind = Literal["demonstrations", "pairs", "labels", "ratings", "steps", "prompts", "completions"]
Ties = Literal["error", "drop"]

FITS = {
    "demonstrations": "SFT",
    "pairs": "SFT, DPO or another objective on pairs, or a reward model",
    "labels": "SFT on the good ones, or KTO or another objective on labels",
    "ratings": "SFT, DPO or another objective on pairs, or a reward model",
    "steps": "a process reward model",
    "prompts": "an objective that samples its own answers",
}
COMPARED = ("pairs", "labels", "ratings")  # what learns that one completion of a row is better than another


class Unfit(InputError):
    """Data that cannot serve an objective. found: what it is, in words."""

    def __init__(self, found: str, kind: Kind, fits: str) -> None:
        super().__init__(f"{found}, and this objective needs {kind}; use {fits}, or give other data")
        self.found = found


def check(shape: Shape, kind: Kind, source: str) -> None:
    """Unfit, naming what the data is and what it is good for, unless it can serve as `kind`."""
    rated = (shape.kind, kind) == ("ratings", "labels") and not shape.marked  # no number says where good begins
    if kind in ("prompts", shape.kind) or ((shape.kind, kind) in _CONVERT and not rated):
        return
    if kind == "completions":  # whatever has whole answers
        if shape.kind not in ("prompts", "steps"):
            return
        raise InputError(f"{source} holds {shape.kind} ({shape.name}) and no whole answers; give data that has some")
    raise Unfit(f"{source} holds {shape.kind} ({shape.name})", kind, FITS[shape.kind])


def convert(record: Record, shape: Shape, kind: Kind, ties: Ties) -> Iterator[Record | Dropped]:
    """The record as one or more of `kind`; what cannot be one as the Dropped that gives the reason.

    RowError where a prompt is wanted of a conversation that has none, where a group is too small to compare, and,
    unless ties are to be dropped, where it is tied, and where completions to learn from have no scores.
    """
    if kind in ("prompts", "completions"):
        yield _asked(record) if kind == "prompts" else record
        return
    if any(map(math.isnan, record.scores)):
        todo = "add a column scores with one number for each"
        raise RowError(record.where, "the completions have no scores", todo)
    if shape.kind == "pairs":
        dropped = _no_pair(record, kind, ties)
    elif shape.kind == "ratings" and kind in ("pairs", "ratings"):
        dropped = _no_group(record, shape, ties)
    else:
        dropped = None
    if dropped:
        yield dropped
    else:
        yield from _CONVERT.get((shape.kind, kind), _itself)(record, shape)


def _no_pair(record: Record, kind: Kind, ties: Ties) -> Dropped | None:
    """Why a row of chosen and rejected cannot serve; None if it can."""
    chosen, rejected = record.scores
    if kind in COMPARED and record.completions[0] == record.completions[1]:
        return Dropped("chosen and rejected are equal")
    if chosen < rejected:
        return Dropped("chosen scored below rejected")
    return _tied(record, ties) if kind in COMPARED and chosen == rejected else None


def _no_group(record: Record, shape: Shape, ties: Ties) -> Dropped | None:
    """Why rated completions cannot be compared; None if they can.

    A message tree holds many groups: of those that cannot be compared the count is enough.
    """
    if len(record.scores) < 2:
        if shape.every_pair:
            return Dropped("a single answer, no pair")
        raise RowError(record.where, "a single answer, no pair", "give two rated completions or more, or use SFT")
    if min(record.scores) == max(record.scores):
        return _tied(record, "drop" if shape.every_pair else ties)
    return None


def _tied(record: Record, ties: Ties) -> Dropped:
    """The reason for the count. RowError, naming the row and the scores, unless ties are to be dropped."""
    if ties == "drop":
        return Dropped("tied scores")
    num = len(record.scores)
    found = f"{'both' if num == 2 else f'all {num}'} completions score {record.scores[0]:g} in single precision"
    raise RowError(record.where, "tied scores", "correct them, or leave such rows out with ties=drop", found)


def _asked(record: Record) -> Record:
    """The prompt alone; of a whole conversation, what precedes its last answer."""
    prompt, whole = record.prompt, record.completions[:1]
    if prompt is None:
        prompt = last_reply(whole[0], record.where)[0] if isinstance(whole[0], list) else whole[0]
    return replace(record, prompt=prompt, completions=[], scores=[], asides=[])


def _best(record: Record, shape: Shape) -> Iterator[Record | Dropped]:
    """The best-scored completion as a demonstration; none where all are marked wrong."""
    best = max(record.scores)
    if shape.marked and not best:
        yield Dropped("no answer is right, not a demonstration")
    else:
        yield _only(record, record.scores.index(best), 1.0)


def _good(record: Record, shape: Shape) -> Iterator[Record | Dropped]:
    yield record if record.scores[0] == 1.0 else Dropped("labelled bad, not a demonstration")


def _each(record: Record, shape: Shape) -> Iterator[Record]:
    """Every completion with its own label: chosen or right 1, rejected or wrong 0."""
    for number, score in enumerate([1.0, 0.0] if shape.kind == "pairs" else record.scores):
        yield _only(record, number, score)


def _itself(record: Record, shape: Shape) -> Iterator[Record]:
    yield record


def _as_pair(record: Record, shape: Shape) -> Iterator[Record]:
    yield replace(record, scores=[1.0, 0.0])


def _only(record: Record, number: int, score: float) -> Record:
    asides = record.asides[number : number + 1]
    return replace(record, completions=[record.completions[number]], scores=[score], asides=asides)


def _best_and_worst(record: Record, shape: Shape) -> Iterator[Record | Dropped]:
    """The best against the worst; of ranked siblings, each against every worse one (ranks are a person's own order).

    Two siblings of one rank lose their pair, which is counted; the tree's other pairs are whole.
    """
    order = sorted(range(len(record.scores)), key=lambda number: -record.scores[number])
    extremes = (order[0], record.scores.index(min(record.scores)))
    for better, worse in combinations(order, 2) if shape.every_pair else [extremes]:
        completions = [record.completions[better], record.completions[worse]]
        if record.scores[better] == record.scores[worse]:
            yield Dropped("tied scores")
        elif completions[0] == completions[1]:
            yield Dropped("chosen and rejected are equal")
        else:
            yield replace(record, completions=completions, scores=[1.0, 0.0])


_CONVERT = {
    ("pairs", "pairs"): _as_pair,
    ("pairs", "ratings"): _itself,
    ("pairs", "demonstrations"): _best,
    ("ratings", "demonstrations"): _best,
    ("labels", "demonstrations"): _good,
    ("pairs", "labels"): _each,
    ("ratings", "labels"): _each,
    ("ratings", "pairs"): _best_and_worst,
}
