"""How rows become forward passes, as the loop cuts them, in numbers alone.

Letters: T tokens of a pass, K completion tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

# the numbers of the code that runs; a test holds them equal
BLOCK, LANES, KEEP = 256, 32, 8  # prefopt.models.attention
TOKENS = {"cpu": 2048, "cuda": 8192}  # prefopt.loop.budget_for


class Row(NamedTuple):
    """Token counts of a prompt and of the completions it owns."""

    prompt: int
    completions: tuple[int, ...]

    def cost(self, repeat: bool = False) -> int:
        """Tokens in a forward pass; repeat: the prompt once for each completion."""
        return self.prompt * (len(self.completions) if repeat else 1) + sum(self.completions)


@dataclass(frozen=True)
class Pass:
    """One forward pass. tokens T, completion K: tokens in all and of completions. kept: query rows times keys of the
    attention blocks whose probabilities stay until backward, for each head. seen: the same over all blocks.
    """

    tokens: int
    completion: int
    kept: int
    seen: int


@dataclass(frozen=True)
class Updates:
    """The passes that matter of a run's updates. largest: by tokens. most: passes of the update that has most.
    number: updates. tokens, completion, seen: of all updates of an epoch, to reckon time with. per_update: tokens.
    """

    largest: Pass
    most: int
    number: int
    tokens: int
    completion: int
    seen: int


def cut(rows: Sequence[Row], budget: int, repeat: bool = False) -> Iterator[list[Row]]:
    """An update's rows in passes of at most `budget` tokens, a prompt never apart from its completions."""
    start = 0
    while start < len(rows):
        stop, total = start + 1, rows[start].cost(repeat)
        while stop < len(rows) and total + rows[stop].cost(repeat) <= budget:
            total, stop = total + rows[stop].cost(repeat), stop + 1
        yield list(rows[start:stop])
        start = stop


def pass_of(rows: Sequence[Row], head_width: int, repeat: bool = False) -> Pass:
    """The pass that these rows make; repeat: as an ordinary padded rectangle."""
    completion = sum(sum(row.completions) for row in rows)
    if repeat:
        longest = max(row.prompt + max(row.completions, default=0) for row in rows)
        num = sum(len(row.completions) for row in rows)
        return Pass(num * longest, completion, 0, num * longest * longest)
    blocks = [block for row in rows for block in _blocks(row)]
    kept = sum(size * seen for size, seen in blocks if seen <= KEEP * head_width)
    return Pass(sum(row.cost() for row in rows), completion, kept, sum(size * seen for size, seen in blocks))


def _blocks(row: Row) -> Iterator[tuple[int, int]]:
    """Query rows and keys, rounded up to whole lanes, of each attention block: see prefopt.models.attention."""
    for number, size in enumerate(row.completions):
        queries, context = (size, row.prompt) if number else (row.prompt + size, 0)
        for start in range(0, queries, BLOCK):
            rows = min(BLOCK, queries - start)
            yield rows, -(-(context + start + rows) // LANES) * LANES


@functools.lru_cache(maxsize=8)
def updates(rows: tuple[Row, ...], batch_size: int, budget: int, head_width: int, repeat: bool = False) -> Updates:
    """An epoch's updates, rows in the order given."""
    found: list[list[Pass]] = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        found.append([pass_of(part, head_width, repeat) for part in cut(batch, budget, repeat)])
    every = [one for own in found for one in own]
    return Updates(
        largest=max(every, key=lambda one: (one.tokens, one.completion)),
        most=max(map(len, found)),
        number=len(found),
        tokens=sum(one.tokens for one in every),
        completion=sum(one.completion for one in every),
        seen=sum(one.seen for one in every),
    )


def full(batch_size: int, completions: int, length: int) -> tuple[Row, ...]:
    """An update's rows where nothing is known of the data: each of `length` tokens, its prompt and its `completions`
    equally long.
    """
    prompt = max(1, length // (completions + 1))
    return (Row(prompt, (prompt,) * completions),) * batch_size
