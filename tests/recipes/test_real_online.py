"""A real model on real prompts with a known reward: GRPO must make held-out stories kinder, beyond its interval."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import prefopt
from prefopt.objectives import GRPO

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
NEEDED = {
    "model": SHARED / "models/stories260K",
    "stories": SHARED / "data/tinystories-1k/tinystories_1000.json",
    "lexicon": SHARED / "data/vader/vader_lexicon.txt",
}

real = pytest.mark.skipif(
    not all(path.exists() for path in NEEDED.values()),
    reason="the real model and data (../shared beside the project) are not here",
)


@real
def test_grpo_makes_held_out_stories_kinder(tmp_path, monkeypatch):
    monkeypatch.setenv("VALENCE_LEXICON", str(NEEDED["lexicon"]))
    stories = json.loads(NEEDED["stories"].read_text(encoding="utf-8"))[:240]
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": " ".join(story.split()[:8])} for story in stories]
    prompts.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    result = prefopt.train(
        objective=GRPO(),
        model=NEEDED["model"],
        data=prompts,
        out=tmp_path / "run",
        reward=f"{ROOT / 'docs/examples/valence.py'}:valence",
        max_tokens=24,
        batch_size=8,
        max_steps=10,
        learning_rate=1e-3,
        eval_fraction=0.2,
        eval_completions=2,
    )
    reward = result.summary["held_out"]["reward"]
    assert reward["gain"]["low"] > 0.1 and reward["gain"]["n"] >= 40
    assert reward["end"]["low"] > reward["start"]["high"]
    assert result.summary["end"]["sampler_gap"] < 1e-4
    assert 0 < result.summary["end"]["reward/valence/rated_words"] <= 1
    assert result.summary["end"]["unscored"] == 0 and result.summary["stalled"] is None
