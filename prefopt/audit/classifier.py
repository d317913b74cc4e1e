"""A logistic classifier on hashed word counts, and its word on rows that it was not fitted to.

n: items, f: features. numpy only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prefopt.audit.words import Corpus, Hashes, mixed

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

FEATURES = 2**18  # columns that words and pairs of words are hashed to
FOLDS = 5
MOST = 5_000  # items that a classifier is fitted to: more change its word little, and cost time
PENALTY = 1.0  # on the squared length of the weights
NEWTON, CONJUGATE = 6, 10  # steps of the two loops
STEPS_AT_ONCE = 2_000_000  # words hashed at a time: bounds memory


@dataclass(frozen=True)
class Sparse:
    """A matrix [n, f] by rows: column and value of every entry, and where each row starts, [n + 1]."""

    columns: Ints
    values: Floats
    starts: Ints
    width: int

    def take(self, rows: Ints) -> Sparse:
        """Some rows, in the order given."""
        lengths = np.diff(self.starts)[rows]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        where = np.arange(starts[-1]) + np.repeat(self.starts[rows] - starts[:-1], lengths)
        return Sparse(self.columns[where], self.values[where], starts, self.width)

    @property
    def owner(self) -> Ints:
        """The row of every entry."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))


@dataclass(frozen=True)
class Fitted:
    """A matrix ready for products with vectors on both sides."""

    matrix: Sparse
    owner: Ints

    def forward(self, weights: Floats) -> Floats:
        """Matrix times weights, [n]."""
        products = self.matrix.values * weights[self.matrix.columns]
        return np.bincount(self.owner, products, len(self.matrix.starts) - 1).astype(np.float64)

    def backward(self, rows: Floats) -> Floats:
        """Rows times matrix, [f]."""
        products = self.matrix.values * rows[self.owner]
        return np.bincount(self.matrix.columns, products, self.matrix.width).astype(np.float64)


def fit(matrix: Sparse, signs: Floats, penalty: float = PENALTY) -> Floats:
    """Weights [f] with the least sum of log(1 + exp(-sign * row . w)) + penalty / 2 |w|^2; signs [n] of -1 and 1.

    Newton's method, its linear systems solved by conjugate gradients (Nocedal and Wright 2006, section 7.1).
    """
    ready = Fitted(matrix, matrix.owner)
    weights = np.zeros(matrix.width)
    for _ in range(NEWTON):
        probability = 1 / (1 + np.exp(np.clip(signs * ready.forward(weights), -30, 30)))  # of being wrong
        gradient = -ready.backward(signs * probability) + penalty * weights
        curvature = probability * (1 - probability)
        step = _solve(ready, curvature, penalty, -gradient)
        weights = weights + step
        if np.abs(step).max() < 1e-2:
            break
    return weights


def _solve(ready: Fitted, curvature: Floats, penalty: float, right: Floats) -> Floats:
    """x with (X' diag(curvature) X + penalty) x = right, by conjugate gradients."""
    x, residual = np.zeros_like(right), right.copy()
    direction, size = residual.copy(), float(residual @ residual)
    start = size
    for _ in range(CONJUGATE):
        if size <= 1e-4 * start or size == 0:
            break
        product = ready.backward(curvature * ready.forward(direction)) + penalty * direction
        length = size / float(direction @ product)
        x += length * direction
        residual -= length * product
        size, before = float(residual @ residual), size
        direction = residual + size / before * direction
    return x


def word_features(texts: Corpus, per_item: int) -> Sparse:
    """Which words and pairs of neighbours occur, in rows of length 1.

    per_item: 2 where consecutive texts are the chosen and the rejected answer of an item, whose difference is its row;
    1 where each text is a row of its own.
    """
    columns, values, lengths = [], [], []
    items = len(texts.lengths) // per_item
    if not items:
        return Sparse(np.zeros(0, np.int64), np.zeros(0), np.zeros(1, np.int64), FEATURES)
    at_once = max(1, STEPS_AT_ONCE // max(1, int(texts.lengths.sum() / max(1, items))))
    for start in range(0, items, at_once):
        part = texts.part(start * per_item, min(start + at_once, items) * per_item)
        column, value, length = _part_features(part, per_item)
        columns.append(column)
        values.append(value)
        lengths.append(length)
    starts = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
    return Sparse(np.concatenate(columns), np.concatenate(values), starts, FEATURES)


def _part_features(part: Corpus, per_item: int) -> tuple[Ints, Floats, Ints]:
    """Columns, values and entries per item of some texts: a word once per text, whatever its count."""
    word: Hashes = mixed(part.ids.astype(np.uint64))
    owner = part.owner
    same = owner[1:] == owner[:-1]
    with np.errstate(over="ignore"):
        pair = mixed(word[:-1] * np.uint64(3) + word[1:], 1)[same]
    code = (np.concatenate([word, pair]) % np.uint64(FEATURES)).astype(np.int64)
    text = np.concatenate([owner, owner[:-1][same]])
    key = np.sort(((text // per_item) * FEATURES + code) * 2 + text % per_item)
    key = key[np.concatenate([[True], key[1:] != key[:-1]])] if len(key) else key
    # what is in both answers cancels
    place = key // 2
    alone = np.ones(len(key), bool)
    twice = np.flatnonzero(place[1:] == place[:-1])
    alone[twice] = alone[twice + 1] = False
    key, place = key[alone], place[alone]
    items = len(part.lengths) // per_item
    length = np.bincount(place // FEATURES, minlength=items)
    scale = 1 / np.sqrt(np.maximum(length, 1))
    return place % FEATURES, (1.0 - 2.0 * (key % 2)) * scale[place // FEATURES], length


def with_columns(matrix: Sparse, more: Floats) -> Sparse:
    """The matrix with dense columns [n, m] after its own."""
    rows, width = more.shape
    lengths = np.diff(matrix.starts) + width
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    columns, values = np.empty(starts[-1], np.int64), np.empty(starts[-1])
    extra = (starts[1:, None] - width + np.arange(width)).ravel()
    old = np.ones(starts[-1], bool)
    old[extra] = False
    columns[old], values[old] = matrix.columns, matrix.values
    columns[extra] = np.tile(matrix.width + np.arange(width), rows)
    values[extra] = more.ravel()
    return Sparse(columns, values, starts, matrix.width + width)


def held_out(matrix: Sparse, signs: Floats, groups: Sequence[str], seed: int = 0) -> Floats:
    """The log-odds that each row's sign is right, [n], by a classifier that was not fitted to its group.

    groups: rows of one group (a prompt) are in one fold. NaN where there are too few groups to fold.
    """
    margins = np.full(len(signs), np.nan)
    for fitting, asked in folds(groups, seed):
        weights = fit(matrix.take(fitting), signs[fitting])
        part = matrix.take(asked)
        margins[asked] = signs[asked] * Fitted(part, part.owner).forward(weights)
    return margins


def folds(groups: Sequence[str], seed: int) -> Iterator[tuple[Ints, Ints]]:
    """Rows to fit to, MOST at most, and rows to ask, for each of FOLDS folds of whole groups."""
    names = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    random = np.random.default_rng(seed)
    fold_of = random.permutation(len(names)) % FOLDS
    fold = fold_of[np.array([names[group] for group in groups], dtype=np.int64)]
    for number in range(FOLDS):
        fitting, asked = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        if len(fitting) > MOST:
            fitting = np.sort(random.choice(fitting, MOST, replace=False))
        if len(asked) and len(fitting):
            yield fitting, asked
