"""What a model makes of the rows: which of two answers it finds likelier, and how far they are from its own.

N: completions, items in order; n: items. The numbers come from `prefopt.audit.asking`, which alone imports torch.
"""

from __future__ import annotations

import numpy as np

from prefopt.audit.check import Check, Finding, of_items, skipped
from prefopt.audit.classifier import Floats
from prefopt.audit.table import Table
from prefopt.evaluate.statistics import mean, wilson

NO_MODEL = "no model was given; name one with --model DIR"
APART = 1.0  # nats per token
SCORED_APART = 3.0  # of a reward model's score: the chosen answer wins with probability 0.95
FAR = 6.0  # robust standard deviations
FEWEST = 20


def gaps(table: Table) -> Floats | None:
    """How much better the model finds the chosen answer, [n]: nats per token, or score. NaN: not asked."""
    asked = table.asked
    if asked is None or table.num_answers != 2:
        return None
    each = (asked.score if asked.score is not None else asked.per_token).reshape(-1, 2)
    return np.asarray(each[:, 0] - each[:, 1])


def order(table: Table) -> Finding:
    """How often the model finds the chosen answer better than the rejected one."""
    found = _known(gaps(table))
    if found is None:
        return skipped(NO_MODEL)
    share = wilson(float((found > 0).sum() + (found == 0).sum() / 2), len(found))
    low, high = 100 * (share.low or 0), 100 * (share.high or 0)
    said = f"the model prefers chosen in {100 * (share.value or 0):.0f} % of {len(found):,} pairs"
    said += f" ({low:.0f} to {high:.0f} %)"
    return Finding(fired=bool(share.low and share.low > 0.95), measured=share, said=said)


def inverted(table: Table) -> Finding:
    """Pairs that the model puts clearly the other way round."""
    return _apart(table, -1.0)


def separated(table: Table) -> Finding:
    """Pairs whose chosen answer the model finds clearly better already."""
    return _apart(table, 1.0)


def _apart(table: Table, sign: float) -> Finding:
    found = gaps(table)
    if found is None or table.asked is None:
        return skipped(NO_MODEL)
    scored = table.asked.score is not None
    limit, unit = (SCORED_APART, "of score") if scored else (APART, "nats per token")
    rows = {int(n): f"{found[n]:+.2f} {unit}" for n in np.flatnonzero(sign * found > limit)}
    finding = of_items(table, rows)
    worst = sorted(rows, key=lambda n: -sign * found[n])
    ranked = [(table.items[n].line, round(float(sign * found[n]), 3)) for n in worst]
    known = int((~np.isnan(found)).sum())
    said = f"{len(rows):,} of {known:,} pairs by more than {limit:g} {unit}"
    return Finding(finding.rows, finding.items, bool(rows), wilson(len(rows), known), said, ranked)


def far(table: Table) -> Finding:
    """Completions far less likely to the model than those of the other rows."""
    if table.asked is None or table.asked.score is not None:
        return skipped(NO_MODEL if table.asked is None else "the model scores answers and does not write")
    surprise = -table.asked.per_token
    known = surprise[~np.isnan(surprise)]
    if len(known) < FEWEST:
        return skipped(f"fewer than {FEWEST} completions")
    middle = float(np.median(known))
    spread = 1.4826 * float(np.median(np.abs(known - middle)))
    each = max(1, table.num_answers)
    limit = middle + FAR * max(spread, 1e-9)
    rows = {int(n) // each: f"{surprise[n]:.2f} nats per token" for n in np.flatnonzero(surprise > limit)}
    finding = of_items(table, rows)
    said = f"a completion costs {middle:.2f} nats per token (median); more than {limit:.2f} is far off"
    return Finding(finding.rows, finding.items, bool(rows), None, said)


def foreign(table: Table) -> Finding:
    """How much less likely the rows' completions are to the model than what it writes itself."""
    asked = table.asked
    if asked is None or asked.score is not None:
        return skipped(NO_MODEL if asked is None else "the model scores answers and does not write")
    if asked.own is None or not len(asked.own):
        return skipped("the model wrote no completions of its own (model_samples)")
    each = max(1, table.num_answers)
    chosen = -asked.per_token.reshape(-1, each)[:, 0]
    known = chosen[~np.isnan(chosen)]
    if not len(known):
        return skipped("no completion was scored")
    own = float(np.mean(-asked.own))
    estimate = mean((known - own).tolist())
    said = f"chosen answers cost {float(known.mean()):.2f} nats per token, what the model writes itself {own:.2f}"
    return Finding(fired=bool(estimate.low is not None and estimate.low > APART), measured=estimate, said=said)


def _known(found: Floats | None) -> Floats | None:
    if found is None:
        return None
    known = found[~np.isnan(found)]
    return known if len(known) else None


CHECKS = (
    Check(
        "model-order",
        "note",
        "how often the model already finds the chosen answer better (fires where that is nearly always)",
        "what is already so needs no training; about half is usual for log-probabilities",
        "if nearly all are, sample new pairs from this model",
        "log-probability per token, or the score of a reward model",
        order,
        kinds=("pairs",),
        needs="model",
        removal="never",
    ),
    Check(
        "model-inverted",
        "note",
        "pairs that the model puts clearly the other way round: by 1 nat per token, or 3 of score",
        "wrong labels are among them, and so are the pairs that have most to teach",
        "read the first of the list; correct wrong labels, keep the rest",
        "1 nat per token: a rule of thumb; 3 of score: a probability of 0.05 after Bradley and Terry",
        inverted,
        kinds=("pairs",),
        needs="model",
    ),
    Check(
        "model-separated",
        "note",
        "pairs whose chosen answer the model finds clearly better already, by as much",
        "an objective without a reference (orpo, simpo, cpo) has little to learn from them",
        "leave them as they are, or take harder pairs",
        "as model-inverted",
        separated,
        kinds=("pairs",),
        needs="model",
    ),
    Check(
        "model-far",
        "note",
        "rows with a completion that is far less likely to the model than the others are (6 robust deviations)",
        "another language, noise or a broken encoding; a few such tokens have large gradients",
        "read them; remove the wrong ones with --remove model-far",
        "median and median absolute deviation; Leys et al. 2013, Journal of Experimental Social Psychology 49, use 2.5",
        far,
        kinds=("pairs", "labels", "demonstrations"),
        needs="model",
    ),
    Check(
        "model-foreign",
        "warning",
        "how much less likely chosen answers are to the model than its own (fires above 1 nat per token)",
        "pairs the model would never write teach it little of what it does write, and push its own answers about",
        "train sft on the chosen answers first, or sample pairs from the model (`prefopt sample`)",
        "1 nat per token: a rule of thumb, not measured; Tajwar et al. 2024, arXiv:2404.14367, on a model's own data",
        foreign,
        kinds=("pairs", "labels", "demonstrations"),
        needs="model",
        removal="never",
    ),
)
