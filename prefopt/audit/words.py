"""Texts as words and as sets of word runs: what every check that needs no tokenizer compares.

T: words of all texts laid end to end, S: texts.
"""

from __future__ import annotations

import re
import unicodedata
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Hashes = NDArray[np.uint64]

# A letter of a script that puts no space between words is a word of its own, as is a sign.
UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\u0e00-\u0e7f"
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+|[^\w\s]")


def folded(text: str) -> str:
    """The text in Unicode form NFC with runs of white space as one space: what counts as the same text."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return " ".join(text.split())


def plain(text: str) -> str:
    """The text's letters and digits alone, in lower case: what is left when style is taken away."""
    return "".join(letter for letter in unicodedata.normalize("NFKC", text).casefold() if letter.isalnum())


@dataclass(frozen=True)
class Corpus:
    """Texts as word ids. ids [T] int64; starts [S + 1] int64: where each text begins, and the end of the last.

    vocabulary: lower-case word -> id.
    """

    ids: Ints
    starts: Ints
    vocabulary: dict[str, int]

    @cached_property
    def lengths(self) -> Ints:
        """Words of each text, [S]."""
        return np.diff(self.starts)

    @cached_property
    def owner(self) -> Ints:
        """The text that each word is of, [T]."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    def part(self, start: int, stop: int) -> Corpus:
        """The texts from `start` to `stop`."""
        first, last = self.starts[start], self.starts[stop]
        return Corpus(self.ids[first:last], self.starts[start : stop + 1] - first, self.vocabulary)

    def text(self, number: int) -> Ints:
        """The word ids of one text."""
        return self.ids[self.starts[number] : self.starts[number + 1]]


def corpus(texts: Iterable[str], vocabulary: dict[str, int] | None = None) -> Corpus:
    """Texts as word ids. vocabulary: one to go on with, so that ids mean the same; it grows."""
    known = {} if vocabulary is None else vocabulary
    ids, starts = array("q"), array("q", [0])
    for text in texts:
        ids.extend([known.setdefault(word, len(known)) for word in WORD.findall(text.lower())])
        starts.append(len(ids))
    return Corpus(np.array(ids, dtype=np.int64), np.array(starts, dtype=np.int64), known)


def mixed(numbers: Hashes, seed: int = 0) -> Hashes:
    """64-bit hashes of 64-bit numbers: the finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    with np.errstate(over="ignore"):
        x = numbers + np.uint64((0x9E3779B97F4A7C15 * (seed + 1)) % 2**64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(x ^ (x >> np.uint64(31)), dtype=np.uint64)


def runs(texts: Corpus, length: int) -> tuple[Hashes, Ints]:
    """A hash for every run of `length` words, and the starts of each text's runs, [S + 1].

    A text shorter than that is one run: it is compared as a whole.
    """
    word = mixed(texts.ids.astype(np.uint64))  # [T]
    code = word.copy()
    shorter = {}
    with np.errstate(over="ignore"):
        for step in range(1, length):
            at = texts.starts[:-1][texts.lengths == step]
            shorter[step] = (at, code[at])
            after = np.zeros_like(word)
            after[:-step] = word[step:]
            code = mixed(code * np.uint64(3) + after, step)  # not a plain sum: order counts
    keep = np.arange(len(word)) < np.repeat(texts.starts[1:] - length + 1, texts.lengths)
    for at, whole in shorter.values():
        keep[at], code[at] = True, whole
    counts = np.where(texts.lengths < length, np.minimum(texts.lengths, 1), texts.lengths - length + 1)
    return code[keep], np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
