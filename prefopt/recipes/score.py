"""What a reward model says of the answers in a file: `prefopt score`."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prefopt import ranks
from prefopt.data import DataOptions, Dataset
from prefopt.data import load as load_data
from prefopt.data.columns import Record
from prefopt.data.convert import Unfit
from prefopt.evaluate.rewards import completion_scores, ranked_rightly, step_scores, steps_rightly
from prefopt.evaluate.statistics import Estimate
from prefopt.loop import LoopOptions, budget_for
from prefopt.models.adapters import LoraOptions, adapt
from prefopt.models.heads import HeadKind
from prefopt.models.load import ModelOptions, head_of, keep_freed_memory, load
from prefopt.models.policy import Policy, choose, text_config
from prefopt.recipes.journal import progress
from prefopt.records import InputError, plain


class Scores(NamedTuple):
    """rows: one per row of the file, with the model's scores, in a form that `prefopt train` reads. summary: plain
    numbers and words. notes: lines for the log.
    """

    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    notes: list[str]


def score(model: str | Path, data: str | Path, model_options: ModelOptions, data_options: DataOptions) -> Scores:
    """Scores of every answer in `data`, or of every step for a process reward model.

    model: a reward model's directory, adapter directory or hub name. data: anything that `prefopt train` reads. With
    max_length None, rows longer than the model's context are left out, and counted. InputError for a model without a
    score head, and for data without answers (without steps).
    """
    head = head_of(model, model_options)
    if head == "language":
        raise InputError(
            f"{model}: a causal language model, which has no score head; train one from it with "
            f"`prefopt train reward --model {model} --data PAIRS --out RUN` and give RUN/model"
        )
    if ranks.device().type == "cpu":
        keep_freed_memory()
    loaded = load(model, model_options, ranks.device(), head)
    policy = Policy(adapt(loaded.model, LoraOptions(), loaded.adapter))
    if data_options.max_length is None:
        limit = getattr(text_config(policy.inner), "max_position_embeddings", None)
        data_options = dataclasses.replace(data_options, max_length=limit)
    dataset = _answers(data, loaded.tokenizer, head, data_options)
    choice = choose(policy, model_options.layout)
    tokens = budget_for(LoopOptions(), ranks.device()).tokens
    with progress("scoring", len(dataset)) as advance:
        if head == "steps":
            steps = step_scores(policy, dataset.examples, tokens, advance)
            scores = [probability for own in steps for probability in own]
        else:
            scores = completion_scores(policy, dataset.examples, tokens, advance).tolist()
    if not all(map(math.isfinite, scores)):
        raise InputError(f"{model}: some scores are not finite; try dtype=float32 or check its weights")
    found, summary = _of_steps(dataset, steps) if head == "steps" else _of_completions(dataset, scores)
    about = {"model": str(model), "data": dataset.source, "shape": dataset.shape, "rows": len(dataset)}
    return Scores(
        found, {**about, **summary, "dropped": dataset.dropped}, [dataset.describe(), f"layout: {choice.reason}"]
    )


def _answers(data: str | Path, tokenizer: Any, head: HeadKind, options: DataOptions) -> Dataset:
    """The rows to score. InputError, saying which model scores what they hold, where this one cannot."""
    try:
        return load_data(data, tokenizer, "steps" if head == "steps" else "completions", options)
    except Unfit as error:
        raise InputError(
            f"{error.found}, and this model scores the steps of an answer; score whole answers with a model from "
            "`prefopt train reward`, or give data with prompt, completions (the steps) and labels"
        ) from None


def _of_completions(dataset: Dataset, scores: Sequence[float]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows and summary for one score per completion, laid end to end."""
    rows, own, start = [], [], 0
    for record in dataset.rows:
        own.append(list(scores[start : start + len(record.completions)]))
        start += len(record.completions)
        rows.append(_row(record, dataset.kind, own[-1]))
    summary: dict[str, Any] = {"completions": len(scores), "score": spread(scores)}
    if dataset.kind == "pairs":
        summary["chosen"], summary["rejected"] = (spread([pair[side] for pair in own]) for side in (0, 1))
        summary["ranked_as_labelled"] = said(ranked_rightly([[1.0, 0.0]] * len(own), own))
    elif dataset.kind == "ratings":
        summary["ranked_as_labelled"] = said(ranked_rightly([record.scores for record in dataset.rows], own))
    elif dataset.kind == "labels":
        for name, good in (("good", True), ("bad", False)):
            mine = [s for s, r in zip(scores, dataset.rows, strict=True) if (r.scores[0] > 0.5) is good]
            summary[name] = spread(mine)
    return rows, summary


def _row(record: Record, kind: str, scores: list[float]) -> dict[str, Any]:
    """A row of the file with its scores; what the file itself rated is kept as ratings."""
    row = {**record.extra, **_asked(record)}
    if kind == "pairs":
        for side in ("chosen", "rejected"):
            if (rating := row.pop(f"score_{side}", None)) is not None:
                row[f"rating_{side}"] = rating
        row |= dict(zip(("chosen", "rejected"), record.completions, strict=True))
        return row | dict(zip(("score_chosen", "score_rejected"), scores, strict=True))
    if kind == "ratings":
        rated = {} if any(map(math.isnan, record.scores)) else {"ratings": record.scores}
        return row | {"completions": record.completions, "scores": scores, **rated}
    if record.prompt is None:
        [whole] = record.completions
        return row | {"text" if isinstance(whole, str) else "messages": whole, "score": scores[0]}
    row |= {"completion": record.completions[0], "score": scores[0]}
    return row | ({"label": record.scores[0] > 0.5} if kind == "labels" else {})


def _of_steps(dataset: Dataset, scores: Sequence[Sequence[float]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows and summary for the probability of each step; an answer's is given in the three usual ways."""
    rows = []
    for record, own in zip(dataset.rows, scores, strict=True):
        product = 1.0
        for probability in own:
            product *= probability
        # an answer that was cut has fewer steps than its record; some labels are shares
        row = {**record.extra, **_asked(record), "completions": record.completions}
        row |= {
            "labels": [bool(label) if label in (0, 1) else label for label in record.scores],
            "step_scores": list(own),
        }
        rows.append({**row, "min": min(own), "product": product, "last": own[-1]})
    labels = [[label for label in (e.steps or [[]])[0] if label == label] for e in dataset.examples]
    summary = {
        "steps": sum(map(len, scores)),
        "probability": spread([probability for own in scores for probability in own]),
        "judged_as_labelled": said(steps_rightly(labels, scores)),
    }
    return rows, summary


def _asked(record: Record) -> dict[str, Any]:
    """The columns of a row besides its answers."""
    asked: dict[str, Any] = {} if record.prompt is None else {"prompt": record.prompt}
    if record.tools:
        asked["tools"] = record.tools
    return asked | ({"chat_template_kwargs": record.template} if record.template else {})


def spread(numbers: Sequence[float]) -> dict[str, Any]:
    """mean, low and high of some numbers; None where there are none."""
    if not numbers:
        return {"mean": None, "lowest": None, "highest": None}
    return {"mean": statistics.fmean(numbers), "lowest": min(numbers), "highest": max(numbers)}


def said(estimate: Estimate) -> dict[str, Any]:
    found: dict[str, Any] = plain(estimate.summary())
    return found
