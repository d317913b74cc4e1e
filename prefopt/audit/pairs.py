"""What a pair can teach: whether its two answers differ at all, in what, and by how much they are rated apart."""

from __future__ import annotations

import statistics

import numpy as np

from prefopt.audit import words
from prefopt.audit.check import Check, Finding, of_items, of_rows, skipped
from prefopt.audit.table import EQUAL, TIED, Table
from prefopt.evaluate.statistics import Estimate, mean

ALIKE = 0.7  # median share of shared words from which pairs are said to differ in little
NEAR_TIE = 0.05  # of the spread of margins: below it two scores say next to nothing


def identical(table: Table) -> Finding:
    """Pairs whose two answers are one text; a difference of white space alone is none."""
    rows = {fault.line: "one text twice" for fault in table.faults if fault.reason.startswith(EQUAL)}
    found = of_items(table, {n: "one text twice" for n, pair in enumerate(table.answer_keys) if pair[0] == pair[1]})
    rows |= found.rows
    return Finding(rows=rows, items=found.items, fired=bool(rows))


def restyled(table: Table) -> Finding:
    """Pairs whose answers differ in case, punctuation or spaces between words, and in nothing else."""
    found = {}
    for number, (chosen, rejected) in enumerate(table.answer_keys):
        if chosen != rejected and _starts_alike(chosen, rejected):
            own = words.plain(chosen)
            if own and own == words.plain(rejected):
                found[number] = "the answers differ in case or punctuation only"
    return of_items(table, found)


def _starts_alike(chosen: str, rejected: str) -> bool:
    """Whether the first letters are the same: most pairs need no closer look."""
    left, right = words.plain(chosen[:40]), words.plain(rejected[:40])
    least = min(len(left), len(right), 12)
    return left[:least] == right[:least]


def cut_equal(table: Table) -> Finding:
    """Pairs that are the same tokens, or become so where max_length cuts them."""
    found = {}
    for number, item in enumerate(table.items):
        if item.example is None or len(set(table.answer_keys[number])) < 2:
            continue
        left, right = item.example.completions
        limit = table.options.max_length
        room = max(0, limit - len(item.example.prompt)) if limit else None
        if left == right:
            found[number] = "equal as tokens"
        elif room and left[:room] == right[:room]:
            found[number] = f"equal after the first {room} tokens of each answer"
    return of_items(table, found)


def alike(table: Table) -> Finding:
    """Median share of the longer answer's words that the shorter one has, counted with their number."""
    if len(table.items) < 2:
        return skipped("fewer than 2 pairs")
    shares = [_shared(table, 2 * number) for number in range(len(table.items))]
    median = statistics.median(shares)
    said = f"the two answers of a pair share {100 * median:.0f} % of their words (median)"
    return Finding(fired=median > ALIKE, measured=Estimate(median, None, None, len(shares)), said=said)


def _shared(table: Table, first: int) -> float:
    left, right = table.corpus.text(first), table.corpus.text(first + 1)
    longest = max(len(left), len(right))
    if not longest:
        return 1.0
    ids, inverse = np.unique(np.concatenate([left, right]), return_inverse=True)
    counts = [np.bincount(part, minlength=len(ids)) for part in (inverse[: len(left)], inverse[len(left) :])]
    return float(np.minimum(*counts).sum() / longest)


def ties(table: Table) -> Finding:
    """Rows whose answers are all rated the same."""
    rows = {fault.line: fault.reason for fault in table.faults if fault.reason == TIED}
    tied = {n: f"both rated {s[0]:g}" for n, s in _rated(table).items() if s[0] == s[1]}
    found = of_items(table, tied)
    return of_rows(rows | found.rows)


def _rated(table: Table) -> dict[int, list[float]]:
    return {n: item.scores for n, item in enumerate(table.items) if item.scores is not None and len(item.scores) == 2}


def near_ties(table: Table) -> Finding:
    """Pairs whose ratings differ by less than a twentieth of the spread of all margins."""
    rated = _rated(table)
    margins = {n: abs(scores[0] - scores[1]) for n, scores in rated.items()}
    if len(margins) < 20:
        return skipped("fewer than 20 pairs have ratings (score_chosen, score_rejected)")
    spread = float(np.std(list(margins.values())))
    least = NEAR_TIE * spread
    close = {n: f"rated {rated[n][0]:g} and {rated[n][1]:g}" for n, margin in margins.items() if 0 < margin < least}
    found = of_items(table, close)
    estimate = mean(list(margins.values()))
    said = f"margins of ratings: mean {estimate.value:.3g}, standard deviation {spread:.3g}"
    return Finding(rows=found.rows, items=found.items, fired=bool(close), measured=estimate, said=said)


def inverted(table: Table) -> Finding:
    """Pairs whose chosen answer is rated below the rejected one."""
    found = {n: f"chosen {s[0]:g}, rejected {s[1]:g}" for n, s in _rated(table).items() if s[0] < s[1]}
    return of_items(table, found)


def constant_scores(table: Table) -> Finding:
    """Whether ratings use fewer than three values, so that they say no more than the labels."""
    rated = _rated(table)
    if len(rated) < 20:
        return skipped("fewer than 20 pairs have ratings (score_chosen, score_rejected)")
    values = {score for scores in rated.values() for score in scores}
    if values <= {0.0, 1.0}:
        return skipped("the ratings are right or wrong, not more")
    margins = {round(scores[0] - scores[1], 6) for scores in rated.values()}
    said = f"{len(values)} different ratings, {len(margins)} different margins"
    return Finding(fired=len(margins) < 2, measured=Estimate(len(values), None, None, len(rated)), said=said)


PAIRS = ("pairs",)
CHECKS = (
    Check(
        "identical",
        "error",
        "pairs whose chosen and rejected answers are one text",
        "the gradient is exactly zero; the loss stays at ln 2 for them and hides what the rest does",
        "remove them (--fix does)",
        "the gradient of every loss on pairs is the difference of the two answers'",
        identical,
        kinds=PAIRS,
        removal="safe",
    ),
    Check(
        "identical-cut",
        "error",
        "pairs that are the same tokens, or become so where max_length cuts them",
        "what differs is never seen",
        "raise max_length, or leave such rows out (training drops and counts them)",
        "equality of the tokens within max_length",
        cut_equal,
        kinds=PAIRS,
        needs="tokens",
    ),
    Check(
        "restyled",
        "warning",
        "pairs whose answers differ in case, punctuation or spacing only",
        "what is taught is a habit of writing, with all the weight of a preference",
        "remove them with --remove restyled, unless that habit is the aim",
        "equality of letters and digits",
        restyled,
        kinds=PAIRS,
    ),
    Check(
        "alike",
        "warning",
        "the median share of words that the two answers of a pair have in common (fires above 70 %)",
        "pairs that differ in a few words are separated by those words: the loss falls to zero while answers stay as "
        "they were (hollow margin), and chosen answers lose probability with rejected ones",
        "sample pairs from the model that is trained (`prefopt sample`), and judge by quality on held-out "
        "prompts, not by the loss",
        "0.7: calibrated on 28 small runs of this project, 0.75 where pairs were hollow, 0.20 to 0.29 where not",
        alike,
        kinds=PAIRS,
        removal="never",
    ),
    Check(
        "tied-scores",
        "warning",
        "rows whose answers are all rated the same",
        "training stops at the first (ties=error), because a tie is often a rating that failed",
        "correct them, or leave them out with ties=drop",
        "equality in single precision",
        ties,
        kinds=PAIRS,
        needs="scores",
    ),
    Check(
        "near-tie",
        "note",
        "pairs whose ratings differ by less than 5 % of the standard deviation of all margins",
        "the order of such a pair is mostly the noise of who rated it, and it counts as much as any other",
        "leave them out with --remove near-tie, or use a loss with the ratings in it",
        "5 %: a rule of thumb, not measured",
        near_ties,
        kinds=PAIRS,
        needs="scores",
    ),
    Check(
        "inverted-scores",
        "error",
        "pairs whose chosen answer is rated below the rejected one",
        "label and rating contradict each other: one is wrong (training drops such rows and counts them)",
        "swap or remove them; if they are many, the columns are probably exchanged (all four: --map chosen=rejected "
        "--map rejected=chosen --map score_chosen=score_rejected --map score_rejected=score_chosen)",
        "order of the ratings",
        inverted,
        kinds=PAIRS,
        needs="scores",
    ),
    Check(
        "flat-scores",
        "note",
        "whether all rated pairs have one and the same margin",
        "such ratings say no more than the labels, so a loss that uses margins gains nothing by them",
        "rate on a finer scale, or leave the ratings out",
        "fewer than two different margins",
        constant_scores,
        kinds=PAIRS,
        needs="scores",
        removal="never",
    ),
)
