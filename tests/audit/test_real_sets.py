"""Real preference files: each check finds the faults that are known to be in them, and leaves the rest alone.

They lie at ../shared; where they do not, this is skipped.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import planted
import pytest

from prefopt.audit import BY_NAME, AuditOptions, Report, audit
from prefopt.audit.lengths import area
from prefopt.audit.surface import margins
from prefopt.audit.table import Item, read_table
from prefopt.data import DataOptions

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="the real data is not at ../shared/data")

# What is known to be in each set: rows that a check must name. Read by hand, by the samples said.
KNOWN: dict[str, dict[str, int]] = {
    "hh-rlhf/test.jsonl.gz": {
        "empty": 4,
        "restyled": 3,
        "formula": 1,
        "placeholder": 5,
        # answers that the crowd workers' model was cut off in: 21 of 25 read were, the others lack a full stop
        "cut-off": 129,
        # the set is about harm: 22 of 25 read were refusals
        "refused": 58,
        # answers that go on with a turn of the human's
        "speaker": 29,
    },
    "llms-from-scratch/instruction-data-with-preference.json": {
        "identical": 6,
        "restyled": 3,
        "refused": 1,
        "script": 1,
    },
    "llama-factory/dpo_en_demo.json": {"duplicate": 5, "broken-text": 1, "formula": 4},
    # the texts hold `</s>` and `<|user|>`
    "llama-factory/kto_en_demo.json": {"markup": 2, "broken-text": 2, "cut-off": 2, "formula": 2, "speaker": 1},
    # rows are trees; "As an AI language model" stands in answers that are paired several times
    "oasst-sample/en_100_tree.jsonl": {"formula": 6, "cut-off": 4, "near-duplicate": 2, "one-prompt": 2, "restyled": 2},
    # 588 of 1,319 questions are solved, or failed, by all four models
    "gsm8k/example_model_solutions.jsonl": {"tied-scores": 588, "sums": 7, "checker": 0},
    "gsm8k/train.jsonl": {},
    # GPT-4's punctuation, read in the wrong encoding
    "tinystories-1k/tinystories_1000.json": {"broken-text": 83, "cut-off": 5},
}
# the slowest, left out where nothing is known of them
SLOW = {"gsm8k/train.jsonl": ["near-duplicate"]}


@pytest.fixture(scope="module", params=KNOWN)
def looked(request: Any) -> tuple[str, Report]:
    skip = SLOW.get(request.param, [] if request.param.startswith("llms") else ["surface", "label-noise"])
    return request.param, audit(SHARED / request.param, DataOptions(max_length=None), AuditOptions(skip=skip))


def test_known_faults_are_found(looked: tuple[str, Report]) -> None:
    name, report = looked
    counts = {check.name: len(finding.rows) for check, finding in report.findings}
    assert {check: counts[check] for check in KNOWN[name]} == KNOWN[name]


def test_no_check_names_more_than_one_row_in_a_hundred_of_what_is_clean(looked: tuple[str, Report]) -> None:
    name, report = looked
    for check, finding in report.findings:
        if check.name not in KNOWN[name]:
            assert report.share(finding) <= 0.01, (check.name, list(finding.rows.items())[:3])


def test_no_set_is_called_decided_by_length_or_words(looked: tuple[str, Report]) -> None:
    _, report = looked
    assert not {"length", "surface", "alike", "opening", "uneven-space"} & {check.name for check, _ in report.fired}


def test_the_list_names_checks() -> None:
    assert {check for known in KNOWN.values() for check in known} <= BY_NAME.keys()


# -- labels turned round at random


@pytest.mark.parametrize(
    ("name", "least"),
    # polite against impolite is told by words; of what is more or less harmful, they tell little
    [("llms-from-scratch/instruction-data-with-preference.json", 0.9), ("hh-rlhf/test.jsonl.gz", 0.55)],
)
def test_labels_turned_round_rank_high_in_the_list_of_noise(name: str, least: float, tmp_path: Path) -> None:
    """1,000 real pairs, 20 % of them turned round: the area under the curve of the list, without a model."""
    whole = read_table(SHARED / name, DataOptions(max_length=None))
    draw = random.Random(1)
    texts = [pair_of(item) for item in draw.sample(whole.items, 1000) if item.answers[0] != item.answers[1]]
    flips = set(draw.sample(range(len(texts)), len(texts) // 5))
    rows = [planted.swapped(row) if number in flips else row for number, row in enumerate(texts)]
    found = margins(read_table(planted.write(tmp_path / "rows.jsonl", rows), DataOptions(max_length=None)))
    flipped = np.array([number in flips for number in range(len(rows))])
    auc = area(-found[flipped], -found[~flipped])
    assert auc.value is not None and auc.value >= least


def pair_of(item: Item) -> dict[str, Any]:
    return {"prompt": item.asked, "chosen": item.answers[0], "rejected": item.answers[1]}
