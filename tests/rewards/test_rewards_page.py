"""What docs/rewards.md shows, run."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest

from prefopt.records import Sample
from prefopt.rewards import RewardOptions, build
from prefopt.rewards.ifeval import CHECKS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
LEXICON = ROOT.parent / "shared" / "data" / "vader" / "vader_lexicon.txt"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("body", BLOCKS, ids=range(len(BLOCKS)))
def test_every_python_block_runs(body: str) -> None:
    exec(compile(body, "docs/rewards.md", "exec"), {"__name__": "page"})


def test_the_function_of_the_page_is_a_reward() -> None:
    seen: dict[str, Any] = {}
    exec(BLOCKS[0], seen)
    reward = build(RewardOptions(), [seen["short"]])
    try:
        rows = [("4 it is", "4"), ("five", "4"), ("any", None)]
        scores = reward([Sample("p", text, [1], columns={"answer": right}) for text, right in rows])
    finally:
        reward.close()
    assert [score.value for score in scores] == [1.0, 0.0, None]


def test_every_option_and_every_instruction_is_named() -> None:
    named = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`\n]+)`", PAGE))))
    assert {field.name for field in dataclasses.fields(RewardOptions)} - named == set()
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", PAGE.partition("## Instructions")[2].partition("##")[0], re.MULTILINE)
    assert {f"{family}:{name}" for family, names in rows for name in re.findall(r"`(\w+)`", names)} == CHECKS.keys()


@pytest.mark.skipif(not LEXICON.is_file(), reason="the real data is not at ../shared/data/vader")
def test_the_lexicon_of_the_example_prefers_pleasant_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VALENCE_LEXICON", str(LEXICON))
    reward = build(RewardOptions(reward=str(ROOT / "docs/examples/valence.py") + ":valence"))
    said = ["I love this happy day", "I hate this horrible day", "a day", "", "love " * 50]
    try:
        scores = reward([Sample("p", text) for text in said])
    finally:
        reward.close()
    values = [score.value for score in scores]
    # love 3.2 and happy 2.7 of five words; hate -2.7 and horrible -2.5
    assert values == pytest.approx([(3.2 + 2.7) / 5, (-2.7 - 2.5) / 5, 0.0, 0.0, 3.2])
    assert math.isclose(reward.metrics["valence/rated_words"], (2 + 2 + 50) / (5 + 5 + 2 + 50))
