"""Figures of a file of rows that decide what to train: cheap, on token ids and columns, no torch."""

from __future__ import annotations

import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.advice.case import DataFacts
from prefopt.data import DataOptions, Dataset, load
from prefopt.data.dataset import prompt_key, read_prompts
from prefopt.records import Example, InputError
from prefopt.rewards.answers import COLUMNS, NUMBER, right_answers

USUAL = DataOptions()
SHORT = 60  # characters of an answer that can be compared as it is
LOOKED_AT = 2000  # rows that the slower figures are taken from
BUCKETS = 2048  # of token counts, by hash
FEWEST = 20  # repeated rows from which wrong labels are estimated
TESTS = ("test", "test_list", "inputs", "input_output")  # columns that the reward `code` reads
INSTRUCTIONS = ("instruction_id_list",)  # and `ifeval`


def look(source: str | Path, tokenizer: Any, options: DataOptions = USUAL) -> DataFacts:
    """The figures of a file. InputError as `prefopt train` has them."""
    columns, _, _ = read_prompts(source, options)
    checker, checkable = checked([record.extra for record in columns])
    facts = figures(_load(source, tokenizer, options))
    return DataFacts(**{**vars(facts), "checker": checker, "checkable": checkable})


def _load(source: str | Path, tokenizer: Any, options: DataOptions) -> Dataset:
    """The rows with all of their answers, whatever kind they are."""
    problem = InputError(f"{source}: no rows")
    for kind in ("completions", "steps", "prompts"):
        try:
            return load(source, tokenizer, kind, options)
        except InputError as error:
            problem = error
            if " holds " not in str(error) and "needs" not in str(error):
                raise
    raise problem


def figures(data: Dataset) -> DataFacts:
    """What the token ids say."""
    examples, kind = data.examples, data.kind
    lengths = [len(tokens) for example in examples for tokens in example.completions]
    sides = compared(examples) if kind in ("pairs", "ratings") else []
    notes = [f"{count:,} left out: {reason}" for reason, count in data.dropped.items()]
    noise = contradictions(sides)
    if sides and noise is None:
        notes.append("wrong labels: not measured, since too few rows are there more than once")
    labels = [score for example in examples for score in example.scores] if kind == "labels" else []
    return DataFacts(
        kind=kind,
        rows=len(examples),
        # a whole text begins with no more than BOS: it is told from others as the split does; without rows, by tokens
        prompts=len({prompt_key(row) for row in data.rows} or {tuple(example.prompt) for example in examples}),
        longer=longer(sides),
        ties=tied(examples) if kind == "ratings" else None,
        noise=noise,
        shallow=shallow(sides),
        good=sum(label > 0.5 for label in labels) / len(labels) if labels else None,
        answer_tokens=statistics.median(lengths) if lengths else None,
        prompt_tokens=statistics.median(len(example.prompt) for example in examples),
        notes=tuple(notes),
    )


Side = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # prompt, better, worse


def compared(examples: Sequence[Example]) -> list[Side]:
    """The best and the worst answer of every row in which there are two that differ in score."""
    found = []
    for example in examples:
        order = sorted(range(len(example.scores)), key=lambda n: example.scores[n])
        if len(order) > 1 and example.scores[order[0]] < example.scores[order[-1]]:
            better, worse = (tuple(example.completions[n]) for n in (order[-1], order[0]))
            found.append((tuple(example.prompt), better, worse))
    return found


def tied(examples: Sequence[Example]) -> float | None:
    """Share of the answers' comparisons within a prompt that score alike."""
    alike = whole = 0
    for example in examples[:LOOKED_AT]:
        counts, size = Counter(example.scores), len(example.scores)
        whole += size * (size - 1) // 2
        alike += sum(number * (number - 1) // 2 for number in counts.values())
    return alike / whole if whole else None


def longer(sides: Sequence[Side]) -> float | None:
    """How often the better answer is the longer one, ties as one half."""
    if not sides:
        return None
    won = sum(0.5 + 0.5 * ((len(better) > len(worse)) - (len(better) < len(worse))) for _, better, worse in sides)
    return won / len(sides)


def contradictions(sides: Sequence[Side]) -> float | None:
    """Share of labels that must be wrong, from comparisons that were made more than once; None of fewer than 20.

    Two labels of one comparison disagree with probability 2 e (1 - e) where each is wrong with probability e.
    """
    votes: dict[Any, list[bool]] = defaultdict(list)
    for prompt, better, worse in sides:
        votes[prompt, *sorted((better, worse))].append(better < worse)
    pairs = apart = 0
    for own in votes.values():
        yes, size = sum(own), len(own)
        pairs, apart = pairs + size * (size - 1) // 2, apart + yes * (size - yes)
    if pairs < FEWEST:
        return None
    share = min(apart / pairs, 0.5)
    return float((1 - (1 - 2 * share) ** 0.5) / 2)


# ---------------------------------------------------------------- how simple the preference is


def shallow(sides: Sequence[Side], folds: int = 5, seed: int = 0) -> float | None:
    """How often a ridge regression on counts of tokens, neighbours included, names the better answer of rows that it
    has not seen; None of fewer than 50 rows.

    The rows of a prompt may stand on both sides, as they do when a reward model is trained on them.
    """
    if len(sides) < 50:
        return None
    chosen = random.Random(seed).sample(list(sides), min(len(sides), LOOKED_AT))
    x = np.stack([_counts(p, better) - _counts(p, worse) for p, better, worse in chosen])  # [R, BUCKETS]
    used = np.flatnonzero(np.abs(x).sum(0))
    x = x[:, used]
    right, fold = 0.0, np.arange(len(x)) % folds
    for number in range(folds):
        weight = _ridge(x[fold != number])
        score = x[fold == number] @ weight
        right += float((score > 0).sum() + 0.5 * (score == 0).sum())
    return right / len(x)


def _ridge(x: np.ndarray) -> np.ndarray:
    """Weights whose score of every difference [R, B] is near 1: better less worse."""
    strength = 0.1 * float((x * x).sum() / max(x.shape[1], 1)) + 1e-6
    if len(x) < x.shape[1]:  # the smaller of the two systems
        return np.asarray(x.T @ np.linalg.solve(x @ x.T + strength * np.eye(len(x)), np.ones(len(x))))
    return np.asarray(np.linalg.solve(x.T @ x + strength * np.eye(x.shape[1]), x.sum(0)))


def _counts(prompt: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
    """Tokens and pairs of neighbours of an answer, and its tokens beside the prompt's last, by hash."""
    found = np.zeros(BUCKETS)
    end = prompt[-1]
    for token in tokens:
        found[hash((token,)) % BUCKETS] += 1
        found[hash((end, token, 1)) % BUCKETS] += 0.5
    for pair in pairwise(tokens):
        found[hash(pair) % BUCKETS] += 1
    return found


# ---------------------------------------------------------------- what can be checked


def checked(rows: Sequence[Mapping[str, Any]]) -> tuple[str | None, int]:
    """The reward that can check answers by these columns, and how many rows have what it needs."""
    able = Counter(name for row in rows if (name := checker(row)) is not None)
    if not able:
        return None, 0
    name, number = able.most_common(1)[0]
    return name, number


def checker(row: Mapping[str, Any]) -> str | None:
    """The reward that a row's columns serve: tests, instructions, a number or formula, a short text; else None."""
    if any(row.get(name) for name in TESTS):
        return "code"
    if any(row.get(name) for name in INSTRUCTIONS):
        return "ifeval"
    if not any(row.get(name) is not None for name in COLUMNS):
        return None
    answers = right_answers(row, None)
    if isinstance(answers, str) or any(len(answer) > SHORT for answer in answers):
        return None
    return "math" if all(_is_formula(answer) for answer in answers) else "exact"


def _is_formula(answer: str) -> bool:
    return bool(NUMBER.fullmatch(answer.strip("$ %"))) or "\\" in answer
