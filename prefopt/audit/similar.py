"""Which texts are nearly the same: MinHash to find candidates, then the exact share of word runs they have in common.

P: hash functions of a signature, S: texts. Broder 1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets,
chapter 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from prefopt.audit.words import Corpus, Hashes, mixed, runs

RUN = 3  # words of a run
SIMILARITY = 0.8  # Jaccard index from which texts count as nearly the same, as in Lee et al. 2022, arXiv:2107.06499
BANDS, ROWS = 12, 3  # two texts with index 0.8 share a band with probability 1 - (1 - 0.8^3)^12 = 0.9998
TEXTS_AT_ONCE = 4000  # bounds the memory of a signature
REPRESENTATIVES = 8  # members of a bucket that a new one is compared with
NOTHING = np.uint64(2**64 - 1)


def signature(texts: Corpus) -> Hashes:
    """The least hash of each text's runs under P hash functions, [S, P]; of an empty text, the largest number."""
    factors = mixed(np.arange(BANDS * ROWS, dtype=np.uint64), 7) | np.uint64(1)  # odd: multiplying permutes
    found = np.full((len(texts.lengths), len(factors)), NOTHING)
    for start in range(0, len(texts.lengths), TEXTS_AT_ONCE):
        stop = min(start + TEXTS_AT_ONCE, len(texts.lengths))
        codes, starts = runs(texts.part(start, stop), RUN)
        whose = np.flatnonzero(np.diff(starts))
        if len(whose):
            for number, factor in enumerate(factors):
                with np.errstate(over="ignore"):
                    found[start + whose, number] = np.minimum.reduceat(codes * factor, starts[whose])
    return found


def candidates(signatures: Hashes, held: int = 0) -> Iterator[tuple[int, int]]:
    """Pairs of texts, the earlier one first, that share a band; each text with at most a few of its bucket.

    held: so many first texts are another set, and only pairs of one of them and one of the rest are given.
    """
    seen: set[tuple[int, int]] = set()
    for band in range(BANDS):
        part = signatures[:, band * ROWS : (band + 1) * ROWS]
        key = part[:, 0].copy()
        for column in range(1, ROWS):
            with np.errstate(over="ignore"):
                key = mixed(key + part[:, column], column)
        order = np.argsort(key, kind="stable")
        edges = np.flatnonzero(np.diff(key[order])) + 1
        for bucket in np.split(order, edges):
            if len(bucket) < 2 or signatures[bucket[0], 0] == NOTHING:
                continue
            first = int(np.searchsorted(bucket, held)) if held else 0
            for place in range(max(1, first), len(bucket)):
                last = first if held else place
                for other in bucket[max(0, last - REPRESENTATIVES) : last]:
                    pair = (int(other), int(bucket[place]))
                    if pair not in seen:
                        seen.add(pair)
                        yield pair


class Sets:
    """The runs of each text of a corpus as a sorted set, made when asked for."""

    def __init__(self, texts: Corpus) -> None:
        self.of = lru_cache(maxsize=4096)(lambda number: np.unique(runs(texts.part(number, number + 1), RUN)[0]))

    def jaccard(self, left: int, right: int) -> float:
        """Shared runs over all runs of both; 1 for two empty texts."""
        a, b = self.of(left), self.of(right)
        if not len(a) or not len(b):
            return float(len(a) == len(b))
        shared = len(np.intersect1d(a, b, assume_unique=True))
        return shared / (len(a) + len(b) - shared)


def least(pairs: Sequence[tuple[Sets, int, int]], above: float) -> float:
    """The least index of several pairs of texts; below `above` the rest is not looked at."""
    lowest = 1.0
    for sets, left, right in pairs:
        lowest = min(lowest, sets.jaccard(left, right))
        if lowest < above:
            break
    return lowest
