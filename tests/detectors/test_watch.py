"""The watch says each finding once, when enough of the last checks agree, and resumes exactly."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from streams import watched

import prefopt.detectors
from prefopt.detectors import Finding, Run, Watch, WatchOptions, every
from prefopt.detectors.drift import Drift
from prefopt.detectors.finding import Check, Level, Line, State
from prefopt.detectors.hollow_margin import HollowMargin


@dataclass(frozen=True)
class Says:
    """Finds what the metric `level` says: 0 nothing, 1 info, 2 warn, 3 sick."""

    needed: int = 2
    among: int = 3
    name: ClassVar[str] = "says"
    title: ClassVar[str] = "what it is told"

    def see(self, state: State, line: Line) -> Check | None:
        level = line.get("level")
        levels: Sequence[Level | None] = (None, "info", "warn", "sick")
        return None if level is None else Check(levels[int(level)], level, 0.5, "it says so", "do something")


def levels(*values: float) -> list[tuple[int, dict[str, float]]]:
    return [(step, {"level": value}) for step, value in enumerate(values, 1)]


def told(*values: float, **options: int) -> list[tuple[int, str, int | None]]:
    """(step, level, recovered) of everything that is told."""
    said: list[Finding] = []
    watch = Watch(Run(), [Says(**options)], said.append)
    for step, metrics in levels(*values):
        watch.listen(step, metrics)
    return [(finding.step, finding.level, finding.recovered) for finding in said]


def test_one_check_of_three_is_no_finding_and_two_are_one_that_is_said_once() -> None:
    assert told(2, 0, 0, 2, 0, 0) == []
    assert told(2, 0, 2, 2, 2, 2) == [(3, "warn", None)]


def test_the_level_is_the_highest_that_enough_checks_reach() -> None:
    # two of 1, 3, 2 reach 2; then two of 3, 2, 3 reach 3
    assert told(1, 3, 2, 3) == [(2, "info", None), (3, "warn", None), (4, "sick", None)]


def test_it_is_over_when_none_of_the_last_checks_finds_anything_and_may_come_back() -> None:
    assert told(2, 2, 0, 0, 0, 2, 2) == [(2, "warn", None), (2, "warn", 5), (7, "warn", None)]


def test_a_line_without_the_metric_is_no_vote() -> None:
    stream = [(1, {"level": 2.0}), (2, {"loss": 1.0}), (3, {"level": float("nan")}), (4, {"level": 2.0})]
    assert watched(Says(), stream).find("says") is not None


def test_what_lasts_has_the_numbers_of_its_last_check() -> None:
    finding = watched(Says(), levels(1, 1, 1, 2, 1)).find("says")
    assert finding is not None and (finding.since, finding.last, finding.value, finding.level) == (2, 5, 1.0, "info")


def test_the_worst_and_the_sick_are_those_that_last() -> None:
    watch = watched(Says(), levels(3, 3))
    assert watch.worst() == "sick" and watch.sick() is not None
    for step in (3, 4, 5):
        watch.listen(step, {"level": 0.0})
    assert watch.worst() is None and watch.sick() is None and watch.summary()[0]["recovered"] == 5


def stream(steps: int) -> list[tuple[int, dict[str, float]]]:
    """Metrics of every kind that scatter enough to make findings begin and end."""
    draw = random.Random(1)
    names = ("reward", "task_reward", "success", "judged", "zero_variance/failed", "zero_variance/solved", "entropy")
    names += ("rewards/accuracies", "rewards/margins", "loss", "epoch", "grad_norm", "completion_length", "finished")
    names += ("kl_reference", "clip_fraction/low", "unscored", "nll", "sampler_gap", "repetition")
    names += ("eval/probe_nll", "eval/reward", "eval/loss", "value/explained_variance")
    return [(step, {name: draw.choice([0.0, 1.0, 5.0]) * draw.random() for name in names}) for step in range(steps)]


@pytest.mark.parametrize("cut", [3, 57, 111])
def test_a_watch_that_goes_on_from_its_state_says_the_same_as_one_that_was_never_stopped(cut: int) -> None:
    run, lines = Run("orpo", {"stall_window": 4, "beta": 0.1, "epochs": 1}, rows=10), stream(160)
    whole: list[Finding] = []
    parts: list[Finding] = []
    first, second = Watch(run, every(), parts.append), Watch(run, every(), parts.append)
    through = Watch(run, every(), whole.append)
    for step, values in lines:
        through.listen(step, values)
    for step, values in lines[:cut]:
        first.listen(step, values)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step, values in lines[cut:]:
        second.listen(step, values)
    assert parts == whole and second.state_dict() == through.state_dict() and len(whole) > 10


def test_a_state_is_a_copy() -> None:
    watch = watched(Says(), levels(2))
    state = watch.state_dict()
    watch.listen(2, {"level": 2.0})
    assert state["votes"] == {"says": [2]} and state["findings"] == []


def test_what_acts_on_sick_runs_needs_the_watch() -> None:
    with pytest.raises(ValueError, match="on_sick=stop needs watch=on"):
        WatchOptions(watch="off", on_sick="stop")


@pytest.mark.parametrize("seed", range(5))
def test_no_number_however_odd_ends_a_run(seed: int) -> None:
    draw = random.Random(seed)
    odd = (0.0, -1.0, 1e300, -1e300, 1e-300, float("nan"), float("inf"), 0.5, 1.0)
    for objective in ("orpo", "dpo", "grpo"):
        watch = Watch(Run(objective, {"stall_window": 3, "num_completions": 4}), every())
        for step, values in stream(80):
            watch.listen(step, {name: draw.choice(odd) for name in [*values, "judged", "skipped", "eval/probe_pairs"]})
        json.dumps(watch.state_dict())


def test_no_text_promises_to_be_early() -> None:
    files = sorted(Path(prefopt.detectors.__file__).parent.glob("*.py"))
    texts = {file.name: file.read_text(encoding="utf-8") for file in files}
    assert texts and [name for name, text in texts.items() if re.search(r"\bearly\b", text, re.IGNORECASE)] == []


def test_drift_is_a_note_once_a_hollow_margin_is_confirmed_in_the_same_run() -> None:
    apart = [(step, {"rewards/accuracies": 1.0, "loss": 0.01, "epoch": 0.1}) for step in range(1, 10)]

    def evaluation(step: int, preferred: float) -> tuple[int, dict[str, float]]:
        probed = {"eval/probe_nll": 1.0 + 2.0 * (step > 0), "eval/probe_accuracy": preferred, "eval/probe_pairs": 200.0}
        return step, probed

    lines = [evaluation(0, 0.5), *apart, evaluation(9, 0.9), evaluation(10, 0.4), evaluation(11, 0.9)]
    watch = Watch(Run("dpo", {"beta": 0.1}), [HollowMargin(), Drift(unverified="sick")])
    levels = []
    for line in lines:
        watch.listen(*line)
        levels += [(line[0], watch.find("drift").level)] if line[0] > 8 and "loss" not in line[1] else []
    # sick on its own; a note, whose remedy is the cause's, from when the cause is known, also once it is over
    assert levels == [(9, "sick"), (10, "info"), (11, "info")]
    drift, hollow = watch.find("drift"), watch.find("hollow_margin")
    assert "a consequence of hollow_margin" in drift.reason and drift.remedy == hollow.remedy and drift.change == {}
    assert hollow.recovered == 11
