"""What can go wrong, and what a run does then. docs/faults.md is made of this and of the tests marked with a number."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """what: goes wrong. expected: of a run. untested: what no test injects, and why; empty where all is."""

    what: str
    expected: str
    untested: str = ""


FAULTS = {
    1: Fault("SIGKILL while a checkpoint is written", "the run goes on from the last whole one, to the same result"),
    2: Fault(
        "SIGKILL between updates, while generating, while scoring, between updates of one rollout",
        "the run goes on to the same result; no prompt is left out or comes twice",
    ),
    3: Fault("SIGTERM, Ctrl-C", "the update ends, a checkpoint is written, exit code 75; a second one ends it at once"),
    4: Fault("a checkpoint's file is cut short", "the checkpoint before it is used; it is said which was not, and why"),
    5: Fault("one bit of a checkpoint is flipped", "found by its hash; the checkpoint before it is used"),
    6: Fault(
        "the disk is full when a checkpoint is written",
        "what was begun is removed, older checkpoints make room, training goes on and tries again; it stops after "
        "max_failed_saves in a row",
    ),
    7: Fault(
        "the disk is full when metrics, or the summary at the end, are written",
        "one warning; lines wait in memory; training goes on; without its summary the run ends with an error, and the "
        "same command goes on",
    ),
    8: Fault("the run's folder cannot be written", "an error before any model is loaded"),
    9: Fault("two runs in one folder", "the second is refused, and told which process holds it"),
    10: Fault("a line of the data is no JSON", "an error with file, line and column; skip_bad counts it and goes on"),
    11: Fault(
        "the data's last line is cut, holds NUL bytes, is no UTF-8, begins with a BOM, repeats a key; an empty file",
        "an error of its own for each, with file and line; a BOM is read past",
    ),
    12: Fault(
        "a row lacks a column, changes its type or holds NaN", "an error with file and line, never a silent None"
    ),
    13: Fault(
        "weights or gradients that are not numbers, a learning rate of 1e30",
        "the update is skipped and counted, after max_bad_steps in a row the run stops; such weights are never saved, "
        "such a loss is never logged as 0",
    ),
    14: Fault(
        "gradients jump, or the policy runs away",
        "noted in findings.jsonl: gradients that jump again and again, a policy that drifts from what it could say; a "
        "loss that jumps without either is only seen in metrics.jsonl",
    ),
    15: Fault("a reward raises", "its samples have no score and the first traceback is shown; a stop where most fail"),
    16: Fault("a reward hangs", "it is killed at its deadline; its samples have no score"),
    17: Fault(
        "a reward gives NaN, infinity, text, a wrong number of scores",
        "each such sample has no score; a rollout without any score is left out, loudly",
    ),
    18: Fault("all completions of a prompt score the same", "counted as solved or failed; drawn again where asked"),
    19: Fault("a judge answers 429 with Retry-After", "waits as told, up to its deadline"),
    20: Fault(
        "a judge answers 500, refuses, resets, drips or hangs", "asked again; else no score, within the deadline"
    ),
    21: Fault(
        "a judge's answer is malformed, out of range, cut, a refusal", "asked again once; else no score, counted"
    ),
    22: Fault("the judge is down at the start", "an error with its address, before any model is loaded"),
    23: Fault(
        "a judge favours what it reads first, or another model answers in its place",
        "both orders are asked, and how often they disagree is counted; what another model answers is no score",
    ),
    24: Fault(
        "memory runs out on a CPU", "smaller forward passes, the same result; else advice; checkpoints stay whole"
    ),
    25: Fault(
        "memory runs out on a GPU", "smaller forward passes, the same result", "on a GPU itself; its error is raised"
    ),
    26: Fault(
        "the system kills a reward's process", "noticed at once, a new one is started, its samples are scored again"
    ),
    27: Fault("the sandbox's server dies; runs leave orphans", "started anew; nothing is left of many runs"),
    28: Fault(
        "the engine that generates dies, times out, gives too few completions, or those of another prompt",
        "asked again; then an error that says so; nothing is learnt from it",
    ),
    29: Fault("the engine did not take the new weights", "found by their fingerprint before anything is generated"),
    30: Fault("the engine's log-probs differ from those trained on", "measured at every update, corrected where asked"),
    31: Fault(
        "options, model, versions or processes changed before a run goes on",
        "refused with the differences; allow_inexact goes on and notes them",
    ),
    32: Fault("the data changed before a run goes on", "refused: the rows are not the same"),
    33: Fault("a checkpoint is due, or the run ends, while the one before is still being written", "waits for it"),
    34: Fault("no terminal, closed streams, an ASCII locale, the clock jumps", "the run goes on to the same result"),
    35: Fault("one of several processes dies", "all end within a minute"),
    36: Fault("a reward gives up on one process only", "all stop together, with its error"),
    37: Fault("the tracking service is down or slow", "training never waits; everything is in metrics.jsonl"),
    38: Fault("a tokenizer without padding or end token, a template that fails", "an error, or handled and said"),
    39: Fault("the last line of metrics.jsonl is torn", "it is dropped; the file goes on with whole lines"),
    40: Fault("the hub is out of reach", "local folders need none; after a failed upload the command to retry is said"),
}
