"""Which texts are nearly the same: MinHash to find candidates, then the exact share of word runs they have in common.

P: hash functions of a signature, S: texts. Broder 1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets,
chapter 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from prefopt.audit.words import Corpus, Floats, Hashes, Ints, mixed, runs

RUN = 3  # words of a run
SIMILARITY = 0.8  # Jaccard index from which texts count as nearly the same, as in Lee et al. 2022, arXiv:2107.06499
BANDS, ROWS = 12, 3  # two texts with index 0.8 share a band with probability 1 - (1 - 0.8^3)^12 = 0.9998
TEXTS_AT_ONCE = 4000  # bounds the memory of a signature; at most 2^(64 - BITS)
RUNS_AT_ONCE = 2_000_000  # compared in one go: bounds memory
BUCKETS = 64  # that runs are counted in by the first six bits of their hash
BITS = 52  # of a run's hash where sets are compared; those above them number the texts
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


def candidates(signatures: Hashes, held: int = 0) -> Iterator[Ints]:
    """Pairs of texts that share a band, [C, 2], the earlier one first; each text with at most a few of its bucket.

    One array for each band they share. held: so many first texts are another set, and only pairs of one of them and
    one of the rest are given.
    """
    filled = np.flatnonzero(signatures[:, 0] != NOTHING)
    for band in range(BANDS):
        part = signatures[filled, band * ROWS : (band + 1) * ROWS]
        key = part[:, 0].copy()
        for column in range(1, ROWS):
            with np.errstate(over="ignore"):
                key = mixed(key + part[:, column], column)
        yield _neighbours(key, filled, held)


def _neighbours(key: Hashes, texts: Ints, held: int) -> Ints:
    """Texts of one key, each with those before it, or with the held ones, REPRESENTATIVES of them at most."""
    order = np.argsort(key, kind="stable")
    fresh = np.concatenate([[True], np.diff(key[order]) != 0])[: len(order)]
    start = np.maximum.accumulate(np.where(fresh, np.arange(len(order)), 0))  # of the bucket each is in
    last = np.arange(len(order))
    if held:
        before = np.concatenate([[0], np.cumsum(texts[order] < held)])
        last = np.where(texts[order] < held, start, start + before[last] - before[start])
    place = last[:, None] - np.arange(REPRESENTATIVES, 0, -1)
    here, which = np.nonzero(place >= start[:, None])
    return texts[order[np.stack([place[here, which], here], axis=1)]]


class Sets:
    """The runs of each text of a corpus as a set: 52 bits of each hash, texts end to end, without repeats.

    By 52 bits, two runs of different words in texts of 1,000 words are taken for one in 1 of 4 billion pairs of texts.
    """

    def __init__(self, texts: Corpus) -> None:
        parts, self.sizes = [np.zeros(0, np.uint64)], np.zeros(len(texts.lengths), dtype=np.int64)
        self.counts = np.zeros((len(texts.lengths), BUCKETS), dtype=np.int32)
        for start in range(0, len(texts.lengths), TEXTS_AT_ONCE):
            stop = min(start + TEXTS_AT_ONCE, len(texts.lengths))
            codes, starts = runs(texts.part(start, stop), RUN)
            key = _marked(codes >> np.uint64(64 - BITS), np.repeat(np.arange(stop - start), np.diff(starts)))
            key = key[np.concatenate([[True], key[1:] != key[:-1]])[: len(key)]]
            self.sizes[start:stop] = _counts(key, BITS, stop - start)
            counts = _counts(key, BITS - 6, BUCKETS * (stop - start))
            self.counts[start:stop] = counts.reshape(-1, BUCKETS)
            parts.append(key & np.uint64(2**BITS - 1))
        self.codes, self.starts = np.concatenate(parts), np.concatenate([[0], np.cumsum(self.sizes)])

    def by_sizes(self, left: Ints, right: Ints) -> Floats:
        """What the index of each pair of texts cannot be above, by their numbers of runs, [C]."""
        return self._index(left, right, np.minimum(self.sizes[left], self.sizes[right]))

    def by_counts(self, left: Ints, right: Ints) -> Floats:
        """What the index of each pair of texts cannot be above, by their numbers of runs in each bucket, [C]."""
        parts = [np.zeros(0, np.int64)]
        for start in range(0, len(left), TEXTS_AT_ONCE):
            here = slice(start, start + TEXTS_AT_ONCE)
            parts.append(np.minimum(self.counts[left[here]], self.counts[right[here]]).sum(1))
        return self._index(left, right, np.concatenate(parts))

    def jaccard(self, left: Ints, right: Ints) -> Floats:
        """Shared runs over all runs of each pair of texts, [C]; 1 for two empty texts."""
        both = self.sizes[left] + self.sizes[right]
        ends = np.searchsorted(np.cumsum(both), np.arange(RUNS_AT_ONCE, both.sum(), RUNS_AT_ONCE)) + 1
        edges = np.unique(np.concatenate([np.arange(0, len(left), TEXTS_AT_ONCE), ends, [len(left)]]))
        shared = [self._shared(left[start:stop], right[start:stop]) for start, stop in pairwise(edges.tolist())]
        return self._index(left, right, np.concatenate([np.zeros(0, np.int64), *shared]))

    def _index(self, left: Ints, right: Ints, shared: Ints) -> Floats:
        every = self.sizes[left] + self.sizes[right] - shared
        return np.where(every == 0, 1.0, shared / np.maximum(every, 1))

    def _shared(self, left: Ints, right: Ints) -> Ints:
        """The number of runs that the two texts of each pair share, [C]: what is there twice among those of both."""
        texts = np.concatenate([left, right])
        sizes = self.sizes[texts]
        skipped = self.starts[texts] - np.cumsum(sizes) + sizes
        codes = self.codes[np.arange(sizes.sum()) + np.repeat(skipped, sizes)]
        key = _marked(codes, np.repeat(np.tile(np.arange(len(left)), 2), sizes))
        return _counts(key[1:][key[1:] == key[:-1]], BITS, len(left))


def _marked(codes: Hashes, owner: Ints) -> Hashes:
    """Codes of BITS bits with the number of their owner before them, sorted."""
    return np.sort(codes | owner.astype(np.uint64) << np.uint64(BITS))


def _counts(key: Hashes, bits: int, owners: int) -> Ints:
    """How many of the codes have each number before their last `bits`."""
    return np.bincount((key >> np.uint64(bits)).astype(np.int64), minlength=owners)


def least(parts: Sequence[tuple[Sets, Ints, Ints]], above: float) -> Floats:
    """The least index of several texts of each pair, [C]; what is below `above` may be larger than the index is."""
    lowest = np.ones(len(parts[0][1]))
    for bound in (Sets.by_sizes, Sets.by_counts, Sets.jaccard):
        for sets, left, right in parts:
            rest = np.flatnonzero(lowest >= above)
            lowest[rest] = np.minimum(lowest[rest], bound(sets, left[rest], right[rest]))
    return lowest
