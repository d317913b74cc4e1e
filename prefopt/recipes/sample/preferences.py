"""Rows of training data from a model's own completions: best-of-n, rejection sampling, AI feedback."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prefopt import __version__, config
from prefopt.data import template_text
from prefopt.data.shapes import KNOWN
from prefopt.models.sampling import Sampling
from prefopt.recipes.journal import progress
from prefopt.recipes.sample.grading import Graded, Grader, grader, unfit
from prefopt.recipes.sample.ledger import AGAIN, Ledger, Tally
from prefopt.recipes.sample.options import Kind, RowOptions
from prefopt.recipes.sample.writers import Asked, Writer
from prefopt.records import InputError, Sample
from prefopt.rewards.judge.options import listed

log = logging.getLogger("prefopt")
MOST_FAILED = 0.5  # of a batch's completions that a server may fail to write before the run stops
COMPARED = ("pairs", "labels", "ranked")  # kinds of row that need two completions of a prompt
# columns of the source that rows do not carry along: the reader would take them for columns of ours. An answer alone
# means nothing to it, and rewards need it later
TAKEN = {*KNOWN, "score", "provenance"} - {"answer"}
# options that decide how long the work takes, and with what patience, but not what comes of it
FREE = {
    *("reward_deadline", "sample_deadline", "reward_workers", "reward_memory", "reward_failures"),
    *("reward_model_tokens", "prompts_at_once", "layout", "gradient_checkpointing", "shard"),
    *("judge_url", "judge_key_variable", "judge_cache", "judge_timeout", "judge_deadline"),
    *("judge_retries", "judge_concurrency", "judge_per_second"),
}


class Task(NamedTuple):
    """What is to be written. settings: the sections data, model, reward, judge, reward_model and rows."""

    kind: Kind
    n: int
    sampling: Sampling
    seed: int
    settings: Mapping[str, Any]


class Work(NamedTuple):
    """A prompt with a key that names it, whatever else is in the file."""

    key: str
    asked: Asked


def preferences(
    open_writer: Callable[[], Writer],
    source: str | Sequence[str],
    out: Path,
    task: Task,
    say: Callable[[str], None] = log.info,
) -> dict[str, Any]:
    """Write rows to `out` and return the summary; what an equal call before had finished is kept.

    source: texts, or a file that `prefopt train` reads. open_writer: who writes the completions, made once the rewards
    stand. The rows are a function of (weights, prompts, task), however often the work is interrupted.
    InputError for a task that cannot be, a file that cannot be gone on with, and where nothing is left.
    """
    _refuse(task)
    with contextlib.ExitStack() as stack:
        judged = grader(task.kind, task.n, task.settings)
        stack.callback(judged.close)
        writer = open_writer()
        stack.callback(writer.close)
        about = dict(writer.about)
        prompts = writer.read(source, task.settings["data"])
        work = keyed(prompts.asked)
        ledger = stack.enter_context(Ledger(out, _settings(task, about, source, judged)))
        for note in prompts.notes:
            say(note)
        waiting = [one for one in work if one.key not in ledger.done]
        say(f"{out}: {len(work) - len(waiting):,} of {len(work):,} prompts are done; if interrupted, {AGAIN}")
        batches = Batches(task, writer, judged, {**about, **judged.about})
        with progress("sampling", len(waiting), unit="prompts") as advance:
            size = task.settings["rows"].prompts_at_once
            for start in range(0, len(waiting), size):
                batch = waiting[start : start + size]
                rows, tally = batches.rows(batch)
                ledger.add([one.key for one in batch], rows, tally)
                advance(len(batch))
                if not start and tally.left_out[batches.cut] > tally.completions / 2:
                    number = f"{tally.left_out[batches.cut]} of the first {tally.completions} completions"
                    say(f"{number} were {batches.cut} and are left out; raise --max-tokens, or set unfinished=keep")
        return _summary(task, out, ledger.tally, prompts.skipped)


def _refuse(task: Task) -> None:
    """InputError on what cannot give rows, before anything is loaded."""
    options: RowOptions = task.settings["rows"]
    options.refuse_unread(task.kind)
    if task.n < 1:
        raise InputError(f"sample: n must be at least 1, got {task.n}")
    alone = task.kind == "labels" and options.threshold is not None
    if task.kind in COMPARED and task.n < 2 and not alone:
        raise InputError(f"--as {task.kind} compares the completions of a prompt; give --n of at least 2, got {task.n}")
    if task.n > 1 and task.sampling.temperature == 0:
        raise InputError(f"--temperature 0 writes {task.n} equal completions of each prompt; raise it, or give --n 1")
    if task.settings["reward_model"].reward_model_scale == "first":
        raise InputError("reward_model_scale=first changes when the work is interrupted; give mean,deviation or a file")


def keyed(asked: Sequence[Asked]) -> list[Work]:
    """Every prompt with a hash of it and its columns; one that comes again has its number added."""
    seen: Counter[str] = Counter()
    found = []
    for one in asked:
        said = [one.prompt.asked, one.prompt.columns, one.shared]
        text = json.dumps(said, sort_keys=True, ensure_ascii=False, default=str)
        name = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        seen[name] += 1
        found.append(Work(name if seen[name] == 1 else f"{name}/{seen[name]}", one))
    return found


class Batches:
    """Turns prompts into rows. about: who writes and grades. cut: the reason for which cut completions are left out."""

    def __init__(self, task: Task, writer: Writer, judged: Grader, about: Mapping[str, Any]) -> None:
        self.task, self.writer, self.judged = task, writer, judged
        self.options: RowOptions = task.settings["rows"]
        self.cut = f"cut at {task.sampling.max_tokens} tokens"
        drawing = {**dataclasses.asdict(task.sampling), "n": task.n, "seed": task.seed}
        self.about = {"as": task.kind, **about, "sampling": drawing, "prefopt": __version__}

    def rows(self, batch: Sequence[Work]) -> tuple[list[dict[str, Any]], Tally]:
        """The rows of some prompts, in their order, and what became of the completions."""
        tally = Tally(prompts=len(batch))
        seeds = [random.Random(f"{self.task.seed}/{one.key}").getrandbits(62) for one in batch]
        prompts = [one.asked.prompt for one in batch]
        drawn = self.writer.write(prompts, self.task.n, self.task.sampling, seeds)
        tally.completions = sum(map(len, drawn))
        _check_written(drawn)
        usable = [self._usable(own, tally) for own in drawn]
        graded = self.judged(usable, f"{self.task.seed}/{batch[0].key}", tally)
        rows = [row for one, found in zip(batch, graded, strict=True) for row in self._rows(one, found, tally)]
        tally.rows = len(rows)
        return rows, tally

    def _usable(self, own: Sequence[Sample | str], tally: Tally) -> list[tuple[int, Sample]]:
        """The completions that may be in rows, each with its number; the others are counted by reason."""
        found = []
        for number, sample in enumerate(own):
            if isinstance(sample, str):
                tally.left_out[f"not written: {sample}"] += 1
            elif not sample.finished and self.options.unfinished == "ignore":
                tally.left_out[self.cut] += 1
            elif why := unfit(sample.text):
                tally.left_out[why] += 1
            else:
                found.append((number, sample))
        return found

    def _rows(self, one: Work, graded: Graded, tally: Tally) -> list[dict[str, Any]]:
        picked = graded.picked
        tally.ties += picked.ties
        tally.left_out.update(picked.left_out)
        if not picked.rows:
            tally.dropped[picked.why] += 1
        tally.kept += len({number for row in picked.rows for number in row.numbers})
        prompt, shared = one.asked.prompt, one.asked.shared
        carried = {name: value for name, value in prompt.columns.items() if name not in TAKEN}
        found = []
        for row in picked.rows:
            if "label" in row.columns:
                tally.labels["good" if row.columns["label"] else "bad"] += 1
            own = {"prompt": one.key, "completions": row.numbers, **graded.provenance, **row.provenance}
            columns = {"prompt": prompt.asked, **row.columns, **shared}
            found.append({**columns, **carried, **columns, "provenance": {**own, **self.about}})
        return found


def _check_written(drawn: Sequence[Sequence[Sample | str]]) -> None:
    """InputError where most completions failed: a server that is gone must not use up the prompts."""
    failed = Counter(found for own in drawn for found in own if isinstance(found, str))
    number = sum(map(len, drawn))
    if failed.total() > MOST_FAILED * number:
        why, _ = failed.most_common(1)[0]
        raise InputError(f"{failed.total()} of {number} completions were not written: {why}; {AGAIN}")


def _settings(task: Task, about: Mapping[str, Any], source: str | Sequence[str], judged: Grader) -> dict[str, Any]:
    """Everything that rows are a function of, files by what is in them."""
    options = {name: value for name, value in config.flat(task.settings).items() if name not in FREE}
    for name in ("principles", "judge_criteria"):
        options[name] = listed(options[name], name)
    if options["chat_template"] is not None:
        options["chat_template"] = template_text(options["chat_template"])
    who = {name: value for name, value in about.items() if name != "server"}
    drawing = {**dataclasses.asdict(task.sampling), "n": task.n, "seed": task.seed}
    asked = source if isinstance(source, str) else list(source)
    return {"as": task.kind, "data": asked, **who, **drawing, **options, "versions": dict(judged.versions)}


def _summary(task: Task, out: Path, tally: Tally, skipped: Mapping[str, int]) -> dict[str, Any]:
    """The numbers of all runs on this file. InputError, with the reasons, where no row came of it."""
    if not tally.rows:
        why = [f"{number:,} completions {reason}" for reason, number in tally.left_out.most_common(3)]
        why += [f"{number:,} completions unscored: {reason}" for reason, number in tally.unscored.most_common(3)]
        why += [f"{number:,} prompts: {reason}" for reason, number in tally.dropped.most_common(3)]
        raise InputError(
            f"not one row came of {tally.prompts:,} prompts and {tally.completions:,} completions\n  "
            + "\n  ".join(why)
            + "\nLook at some completions with `prefopt sample` without --as; raise --max-tokens where they are cut"
        )
    found = tally.summary()
    if task.kind != "labels":
        found.pop("labels")
    return {"as": task.kind, "out": str(out), **found, "skipped": dict(skipped)}
