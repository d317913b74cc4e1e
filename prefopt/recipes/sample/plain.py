"""Completions of prompts, as they come."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from prefopt.data import DataOptions
from prefopt.models.sampling import Sampling
from prefopt.recipes.sample.writers import Writer
from prefopt.records import InputError, Sample


class Samples(NamedTuple):
    """rows: one per completion, in the order of the prompts: prompt, completion, its number of tokens (None where a
    server does not say), and whether it ended by itself. notes: lines for the log.
    """

    rows: list[dict[str, Any]]
    notes: list[str]


def sample(
    writer: Writer, source: str | Sequence[str], options: DataOptions, *, n: int, sampling: Sampling, seed: int
) -> Samples:
    """n completions of the texts in a list, or of the prompts of a file that `prefopt train` reads.

    InputError for a file or a number that cannot be, and where not one completion was written.
    """
    if n < 1:
        raise InputError(f"sample: n must be at least 1, got {n}")
    prompts = writer.read(source, options)
    seeds = random.Random(seed)
    given = [one.prompt for one in prompts.asked]
    drawn = writer.write(given, n, sampling, [seeds.getrandbits(64) for _ in given])
    rows = [_row(found) for own in drawn for found in own if isinstance(found, Sample)]
    failed = Counter(found for own in drawn for found in own if isinstance(found, str))
    lost = [f"{number:,} completions were not written: {why}" for why, number in failed.most_common(5)]
    if lost and not rows:
        raise InputError("\n".join(lost))
    return Samples(rows, [*prompts.notes, *lost])


def _row(sample: Sample) -> dict[str, Any]:
    return {
        "prompt": sample.prompt,
        "completion": sample.completion,
        "tokens": len(sample.tokens) or None,
        "finished": sample.finished,
    }
