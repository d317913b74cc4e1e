"""Records of one kind for an objective of another, where that loses no meaning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Literal

from prefopt.data.columns import Dropped, Record
from prefopt.data.shapes import Shape, last_reply
from prefopt.records import InputError

Kind = Literal["demonstrations", "pairs", "labels", "prompts"]

FITS = {
    "demonstrations": "SFT",
    "pairs": "SFT, DPO or another objective on pairs",
    "labels": "SFT on the good ones, or KTO or another objective on labels",
    "ratings": "SFT, DPO or another objective on pairs",
    "prompts": "an objective that samples its own answers",
}


def check(shape: Shape, kind: Kind, source: str) -> None:
    """InputError, naming what the data is and what it is good for, unless it can serve as `kind`."""
    rated = (shape.kind, kind) == ("ratings", "labels") and not shape.marked  # no number says where good begins
    if kind in ("prompts", shape.kind) or ((shape.kind, kind) in _CONVERT and not rated):
        return
    found = f"{source} holds {shape.kind} ({shape.name}), and this objective needs {kind}"
    raise InputError(f"{found}; use {FITS[shape.kind]}, or give other data")


def convert(record: Record, shape: Shape, kind: Kind) -> Iterator[Record | Dropped]:
    """The record as one or more of `kind`; what cannot be one as the Dropped that gives the reason.

    RowError where a prompt is wanted of a conversation that has none.
    """
    if shape.kind == "pairs" and kind in ("pairs", "labels") and record.completions[0] == record.completions[1]:
        yield Dropped("chosen and rejected are equal")
    elif kind == "prompts":
        yield _asked(record)
    elif kind == shape.kind:
        yield record
    else:
        yield from _CONVERT[shape.kind, kind](record, shape)


def _asked(record: Record) -> Record:
    """The prompt alone; of a whole conversation, what precedes its last answer."""
    prompt, whole = record.prompt, record.completions[:1]
    if prompt is None:
        prompt = last_reply(whole[0], record.where)[0] if isinstance(whole[0], list) else whole[0]
    return replace(record, prompt=prompt, completions=[], scores=[], asides=[])


def _best(record: Record, shape: Shape) -> Iterator[Record]:
    """The best-scored completion as a demonstration."""
    yield _only(record, record.scores.index(max(record.scores)), 1.0)


def _good(record: Record, shape: Shape) -> Iterator[Record | Dropped]:
    yield record if record.scores[0] == 1.0 else Dropped("labelled bad, not a demonstration")


def _each(record: Record, shape: Shape) -> Iterator[Record]:
    """Every completion with its own label: chosen or right 1, rejected or wrong 0."""
    for number, score in enumerate(record.scores):
        yield _only(record, number, score)


def _only(record: Record, number: int, score: float) -> Record:
    asides = record.asides[number : number + 1]
    return replace(record, completions=[record.completions[number]], scores=[score], asides=asides)


def _best_and_worst(record: Record, shape: Shape) -> Iterator[Record | Dropped]:
    """The best against the worst; of ranked siblings, each against every worse one (ranks are a person's own order)."""
    order = sorted(range(len(record.scores)), key=lambda number: -record.scores[number])
    if len(order) < 2:
        yield Dropped("a single answer, no pair")
        return
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
    ("pairs", "demonstrations"): _best,
    ("ratings", "demonstrations"): _best,
    ("labels", "demonstrations"): _good,
    ("pairs", "labels"): _each,
    ("ratings", "labels"): _each,
    ("ratings", "pairs"): _best_and_worst,
}
