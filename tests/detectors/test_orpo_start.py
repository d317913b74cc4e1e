"""ORPO from a base model is seen by how far the chosen answers' nll falls in the run itself."""

from __future__ import annotations

import math

import pytest
from streams import between, found, merged, updates

from prefopt.detectors import Run
from prefopt.detectors.orpo_start import OrpoStart

START = OrpoStart(unverified="sick")  # so that its levels are seen
FEW = Run("orpo", {"epochs": 4.0}, rows=300)
MANY = Run("orpo", {"epochs": 1.0}, rows=40_000)


def falls(start: float, end: float, accuracy: float = 0.99, epochs: float = 1.0) -> list:
    return updates(40, nll=between(start, end, 40), rewards__accuracies=accuracy, epoch=lambda step: epochs * step / 40)


def test_a_far_start_with_the_preference_learnt_is_sick_and_sft_comes_first() -> None:
    finding = found(START, falls(4.0, 1.0), FEW)
    assert finding is not None and finding.level == "sick"
    # the mean of the last five of 40 updates, on a line from 4 to 1
    assert finding.value == pytest.approx(4.0 - (1.0 + 2 * 3 / 39), abs=1e-6)
    assert finding.before == {"objective": "sft", "epochs": 4.0}


def test_what_no_reward_confirms_is_a_note_as_it_comes() -> None:
    assert found(OrpoStart(), falls(4.0, 1.0), FEW).level == "info"
    assert found(OrpoStart(), beside_rows(0.2), FEW).level == "warn"


def test_a_start_that_is_less_far_is_a_warning_and_many_rows_make_it_a_note() -> None:
    assert found(START, falls(2.0, 1.2), FEW).level == "warn"
    assert found(START, falls(4.0, 1.0, accuracy=0.7), FEW).level == "warn"
    assert found(START, falls(4.0, 1.0), MANY).level == "info"


def test_an_sft_start_is_none_whatever_is_learnt_by_heart_later() -> None:
    assert found(START, falls(1.2, 1.0), FEW) is None
    later = [(step + 40, {**values, "epoch": 3.0}) for step, values in falls(1.0, 0.1)]
    assert found(START, merged(falls(1.2, 1.1), later), FEW) is None


def test_held_out_answers_are_judged_where_there_are_some() -> None:
    evaluations = [(0, {"eval/nll": 3.0}), (40, {"eval/nll": 1.0})]
    assert found(START, evaluations, FEW).value == pytest.approx(2.0)


def test_a_start_model_that_does_not_end_its_answers_is_a_warning() -> None:
    evaluation = [(0, {"eval/probe_finished": 0.4, "eval/nll": 1.5})]
    finding = found(START, merged(evaluation, falls(1.2, 1.1)), FEW)
    assert finding is not None and finding.level == "warn" and "40%" in finding.reason
    fine = [(0, {"eval/probe_finished": 0.95, "eval/nll": 1.5})]
    assert found(START, merged(fine, falls(1.5, 1.4)), FEW) is None


def beside_rows(wins: float, later: float = 0.6) -> list:
    """What a reward says of the start model's answers to 200 prompts, beside those of the rows, and of later ones."""
    lines = [(0, {"eval/probe_wins": wins, "eval/nll": 1.5}), (40, {"eval/probe_wins": later, "eval/nll": 1.5})]
    return [(at, {**values, "eval/probe_compared": 200.0}) for at, values in lines]


def test_a_start_model_whose_answers_lose_to_those_of_the_rows_is_a_warning() -> None:
    # Wilson, 95 %, of 200: 0.43 is at most 0.4993, 0.44 at most 0.509
    finding = found(START, beside_rows(0.43), FEW)
    assert finding is not None and (finding.level, finding.step, finding.value) == ("warn", 0, 0.43)
    assert finding.before == {"objective": "sft", "epochs": 4.0} and "43%" in finding.reason
    assert found(START, beside_rows(0.44), FEW) is None
    assert found(START, beside_rows(0.2), MANY).level == "info"


def test_a_start_model_as_good_as_the_rows_is_fine_however_far_its_nll_falls() -> None:
    assert found(START, merged(beside_rows(0.5), falls(4.0, 1.0)), FEW) is None
    assert found(START, merged(beside_rows(0.5, 0.1), falls(1.2, 1.1)), FEW) is None  # the start counts


def test_a_start_that_could_not_be_scored_is_unknown_and_no_later_one_stands_for_it() -> None:
    lines = beside_rows(math.nan, 0.2)
    assert found(OrpoStart(), lines, FEW) is None
    assert found(OrpoStart(), [(step + 5, values) for step, values in beside_rows(0.2)], FEW) is None


def test_chosen_answers_less_likely_than_the_models_own_are_a_warning_at_the_start() -> None:
    finding = found(START, [(0, {"eval/nll": 2.0, "eval/probe_nll": 1.4})], FEW)
    assert finding is not None and finding.level == "warn" and finding.value == pytest.approx(0.6)
    assert found(START, [(0, {"eval/nll": 1.7, "eval/probe_nll": 1.4})], FEW) is None


def test_other_objectives_are_not_judged() -> None:
    assert found(START, falls(4.0, 1.0), Run("sft", rows=300)) is None
