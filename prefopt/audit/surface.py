"""What a classifier that sees only which words occur makes of the labels: whether they are surface, or noise.

n: items.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from prefopt.audit.check import Check, Finding, skipped
from prefopt.audit.classifier import Floats, Sparse, held_out, with_columns, word_features
from prefopt.audit.table import Table
from prefopt.evaluate.statistics import wilson

FEWEST = 100  # rows below which five folds say nothing
SURFACE = 0.95  # accuracy from which words alone decide
TELLS = 0.7  # lower end of the accuracy's interval from which its errors say something of the labels
TRUSTED = 0.05  # share of rows, those it is surest of, in which its errors are taken for wrong labels
TRUSTED_ROWS = 200  # and no fewer rows than that: their share must be known
NOTICED = 0.02  # share of wrong labels from which rows are named


@lru_cache(maxsize=2)
def margins(table: Table) -> Floats:
    """The log-odds that each item's label is right, [n], by a classifier fitted to other prompts. NaN: not asked.

    Its features are words and pairs of neighbours, of pairs the difference of the two answers', and, where a model
    was asked, what it makes of them.
    """
    groups = [key or str(number) for number, key in enumerate(table.keys)]
    if table.kind == "labels":
        marks = np.array([1.0 if item.record.scores[0] > 0.5 else -1.0 for item in table.items])
        return held_out(_with_signals(table, np.ones((len(marks), 1))), marks, groups)
    return held_out(_with_signals(table, None), np.ones(len(table.items)), groups)


def _with_signals(table: Table, constant: Floats | None) -> Sparse:
    """The features of all items, with a column of ones where there is an intercept, and the model's where asked."""
    matrix = word_features(table.corpus, per_item=2 if table.kind == "pairs" else 1)
    more = [constant] if constant is not None else []
    if (signals := model_columns(table)) is not None:
        more.append(signals)
    return with_columns(matrix, np.concatenate(more, axis=1)) if more else matrix


def model_columns(table: Table) -> Floats | None:
    """What a model makes of each item, as columns of unit spread, [n, m]; 0 where it was not asked; None without one.

    Of pairs the differences, per token and in all, so that the classifier finds their weight.
    """
    asked = table.asked
    if asked is None:
        return None
    each = max(1, table.num_answers)
    columns = []
    for found in (asked.per_token, asked.total, asked.score):
        if found is not None and not np.isnan(found).all():
            own = found.reshape(-1, each)
            column = own[:, 0] - own[:, 1] if each == 2 else own[:, 0] - np.nanmean(own[:, 0])
            columns.append(np.nan_to_num(column / max(float(np.nanstd(column)), 1e-9)))
    return np.stack(columns, axis=1) if columns else None


def surface(table: Table) -> Finding:
    """How often the words alone tell which answer is the better one."""
    if len(table.items) < FEWEST:
        return skipped(f"fewer than {FEWEST} rows")
    found = margins(table)
    asked = found[~np.isnan(found)]
    if not len(asked):
        return skipped("all rows have one prompt, so none can be held out")
    accuracy = wilson(float((asked > 0).sum() + (asked == 0).sum() / 2), len(asked))
    assert accuracy.value is not None and accuracy.low is not None and accuracy.high is not None
    said = f"words alone are right in {100 * accuracy.value:.1f} % of held-out rows"
    said += f" ({100 * accuracy.low:.1f} to {100 * accuracy.high:.1f} %)"
    return Finding(fired=accuracy.value > SURFACE, measured=accuracy, said=said)


def noise(table: Table) -> Finding:
    """How many labels are wrong, and the rows most likely to be.

    Where the classifier is sure, what it gets wrong is mostly labels; the share of those is taken for all rows.
    """
    if len(table.items) < FEWEST:
        return skipped(f"fewer than {FEWEST} rows")
    found = margins(table)
    if np.isnan(found).any():
        return skipped("all rows have one prompt, so none can be held out")
    order = np.argsort(found)
    ranked = [(table.items[n].line, round(float(-found[n]), 3)) for n in order if found[n] < 0]
    accuracy = wilson(float((found > 0).sum()), len(found))
    sure = np.argsort(-np.abs(found))[: max(TRUSTED_ROWS, round(TRUSTED * len(found)))]
    share = wilson(float((found[sure] < 0).sum()), len(sure))
    assert accuracy.low is not None and share.low is not None and share.value is not None
    if accuracy.low < TELLS:
        said = f"cannot be told from words (right in {100 * accuracy.low:.1f} % at least, 70 % is needed); the rows "
        said += "that they contradict most come first in the list"
        return Finding(ranked=ranked, said=said)
    said = f"about {100 * share.value:.1f} % of the labels look wrong"
    said += f" ({100 * share.low:.1f} to {100 * (share.high or 0):.1f} %)"
    if share.low < NOTICED:
        return Finding(ranked=ranked, measured=share, said=said)
    worst = [int(n) for n in order[: round(share.value * len(found))] if found[n] < 0]
    rows = {table.items[n].line: f"log-odds {found[n]:+.1f} that the label is right" for n in worst}
    return Finding(rows, frozenset(worst), True, share, said, ranked)


CHECKS = (
    Check(
        "surface",
        "warning",
        "how often words alone tell chosen from rejected, on held-out prompts (fires above 95 %)",
        "the loss falls to zero and accuracy reaches 1 by learning those words, while answers need not get better",
        "look at what differs; take pairs from one model, and judge by quality on held-out prompts, not by the loss",
        "0.95: calibrated on 28 small runs of this project, 1.00 where pairs were hollow, 0.67 to 0.82 where not; some "
        "separable data is fine",
        surface,
        kinds=("pairs", "labels"),
        removal="never",
    ),
    Check(
        "label-noise",
        "warning",
        "rows whose label is probably wrong: a classifier of words, fitted to other prompts, is sure of the opposite",
        "wrong labels make the optimum flatter, as a larger beta would, and decisive pairs suffer most",
        "read the first of the list and correct them; or use a loss that expects noise (dpo label_smoothing, ipo)",
        "errors among the twentieth of rows it is surest of, 200 at least; needs 70 % accuracy. After Northcutt, Jiang "
        "and Chuang 2021, arXiv:1911.00068",
        noise,
        kinds=("pairs", "labels"),
    ),
)
