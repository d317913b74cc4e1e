"""Records of one kind for an objective of another, where that loses no meaning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
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
    if kind in ("prompts", shape.kind) or (shape.kind, kind) in _CONVERT:
        return
    found = f"{source} holds {shape.kind} ({shape.name}), and this objective needs {kind}"
    raise InputError(f"{found}; use {FITS[shape.kind]}, or give other data")


def convert(record: Record, shape: Shape, kind: Kind) -> Iterator[Record]:
    """The record as one or more of `kind`. Dropped, with the reason, where it cannot be one."""
    if shape.kind == "pairs" and kind in ("pairs", "labels") and record.completions[0] == record.completions[1]:
        raise Dropped("chosen and rejected are equal")
    if kind == "prompts":
        yield _asked(record)
        return
    if kind == shape.kind:
        yield record
        return
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


def _good(record: Record, shape: Shape) -> Iterator[Record]:
    if record.scores[0] != 1.0:
        raise Dropped("labelled bad, not a demonstration")
    yield record


def _each(record: Record, shape: Shape) -> Iterator[Record]:
    """Every completion with its own label: chosen or right 1, rejected or wrong 0."""
    for number, score in enumerate(record.scores):
        yield _only(record, number, score)


def _right_or_wrong(record: Record, shape: Shape) -> Iterator[Record]:
    """Answers that were marked right or wrong, as labels; a rating on a scale is not one."""
    if not set(record.scores) <= {0.0, 1.0}:
        raise Dropped("rated on a scale, neither good nor bad")
    yield from _each(record, shape)


def _only(record: Record, number: int, score: float) -> Record:
    asides = record.asides[number : number + 1]
    return replace(record, completions=[record.completions[number]], scores=[score], asides=asides)


def _best_and_worst(record: Record, shape: Shape) -> Iterator[Record]:
    """The best against the worst; of ranked siblings, each against every worse one (ranks are a person's own order)."""
    if max(record.scores, default=0.0) == min(record.scores, default=0.0):
        raise Dropped("tied scores" if len(record.scores) > 1 else "a single answer, no pair")
    best, worst = record.scores.index(max(record.scores)), record.scores.index(min(record.scores))
    picked = [(best, worst)]
    if shape.every_pair:
        order = sorted(range(len(record.scores)), key=lambda number: -record.scores[number])
        picked = [(a, b) for place, a in enumerate(order) for b in order[place + 1 :]]
    for a, b in picked:
        if record.scores[a] != record.scores[b] and record.completions[a] != record.completions[b]:
            yield replace(record, completions=[record.completions[a], record.completions[b]], scores=[1.0, 0.0])


_CONVERT = {
    ("pairs", "demonstrations"): _best,
    ("ratings", "demonstrations"): _best,
    ("labels", "demonstrations"): _good,
    ("pairs", "labels"): _each,
    ("ratings", "labels"): _right_or_wrong,
    ("ratings", "pairs"): _best_and_worst,
}
