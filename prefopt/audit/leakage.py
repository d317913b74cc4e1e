"""Training rows that are held out, too: what makes an evaluation look better than it is."""

from __future__ import annotations

import numpy as np

from prefopt.audit import words
from prefopt.audit.check import Check, Finding, of_items, skipped
from prefopt.audit.similar import SIMILARITY, Sets, candidates, least, signature
from prefopt.audit.table import Item, Table

NO_HELD = "no held-out rows were given; name them with --eval FILE"


def _key(item: Item) -> str:
    """What makes a row the same as a held-out one: its prompt, or the whole text of a row without one."""
    return words.folded(item.asked) or words.folded("\n".join(item.answers))


def exact(table: Table) -> Finding:
    """Rows whose prompt is a held-out row's."""
    if table.held is None:
        return skipped(NO_HELD)
    held = {_key(item): table.held.place(item.line) for item in reversed(table.held.items)}
    keys = map(_key, table.items)
    return of_items(table, {n: f"also {held[key]}" for n, key in enumerate(keys) if key in held})


def near(table: Table) -> Finding:
    """Rows whose prompt is nearly, but not to the letter, a held-out row's."""
    if table.held is None:
        return skipped(NO_HELD)
    held = list(map(_key, table.held.items))
    own = list(map(_key, table.items))
    known = set(held)
    texts = words.corpus([*held, *own])
    sets = Sets(texts)
    found: dict[int, str] = {}
    done = np.array([True] * len(held) + [key in known for key in own])
    for pairs in candidates(signature(texts), len(held)):
        first, second = pairs[~done[pairs[:, 1]]].T
        index = least([(sets, first, second)], SIMILARITY)
        close = index >= SIMILARITY
        for one, other, how in zip(first[close], second[close], index[close], strict=True):
            place = table.held.place(table.held.items[one].line)
            found.setdefault(int(other) - len(held), f"nearly {place} (index {how:.2f})")
        done[second[close]] = True
    return of_items(table, found)


CHECKS = (
    Check(
        "leaked",
        "error",
        "rows whose prompt is also held out",
        "what was trained on is no test: every held-out number is too good",
        "remove them from the training file (--fix does), or hold other prompts out",
        "the split of `prefopt train` keeps a prompt on one side",
        exact,
        needs="held",
        removal="safe",
    ),
    Check(
        "nearly-leaked",
        "warning",
        "rows whose prompt is nearly a held-out one",
        "as leaked rows; a reworded prompt is answered from memory",
        "look at a few, then remove them with --remove nearly-leaked",
        "Lee et al. 2022, arXiv:2107.06499: Jaccard index of 0.8",
        near,
        needs="held",
    ),
)
