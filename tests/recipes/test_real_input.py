"""A real model, real stories, a reward that is known: SFT, then DPO, must make its stories kinder, measurably."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
NEEDED = [
    "models/stories260K/model.safetensors",
    "data/tinystories-1k/tinystories_1000.json",
    "data/vader/vader_lexicon.txt",
]

real = pytest.mark.skipif(
    not all((SHARED / name).exists() for name in NEEDED),
    reason="the real model and data (../shared beside the project) are not here",
)


@pytest.fixture(scope="module")
def job() -> Any:
    """experiments/sentiment/run.py as a module."""
    path = ROOT / "experiments/sentiment/run.py"
    spec = importlib.util.spec_from_file_location("sentiment_job", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["sentiment_job"] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def test_score_by_hand(job):
    lexicon = {"happy": 2.7, "sad": -2.1, "don't": 1.0}
    # happy 2.7, sad -2.1, five words
    assert job.sentiment('"Happy or sad," he said.', lexicon) == pytest.approx(0.6 / 5)
    assert job.sentiment("Don't!", lexicon) == 1.0
    assert job.sentiment("...", lexicon) == 0.0


def test_openings_end_with_a_sentence_and_leave_a_story_to_tell(job):
    assert job.opening('He ran. "Stop!" she said. They sat down and had a long talk.') == 'He ran. "Stop!" she said.'
    assert job.opening("One sentence that never seems to") == "One sentence tha"


@pytest.fixture(scope="module")
def found(job, tmp_path_factory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFOPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        return job.run(SHARED, tmp_path_factory.mktemp("sentiment"), job.SIZES["small"])


@real
def test_held_out_sentiment_rises_by_more_than_chance(found, job):
    assert found["rise"]["n"] == job.SIZES["small"].held_out
    assert found["rise"]["low"] > 0
    before, after = found["sentiment"]["sft"]["value"], found["sentiment"]["dpo"]["value"]
    assert found["rise"]["value"] == pytest.approx(after - before)
    assert "rise from sft to dpo" in job.table(found)


@real
def test_perplexity_on_held_out_stories_is_reported_and_the_model_still_writes_stories(found):
    base, sft, dpo = (found["perplexity"][name] for name in ("base", "sft", "dpo"))
    assert sft < base
    assert dpo < 1.5 * sft
    assert found["kl"]["value"] > 0 and math.isfinite(found["kl"]["value"])


@real
def test_the_result_loads_in_plain_transformers_and_writes(found):
    model = AutoModelForCausalLM.from_pretrained(found["model"])
    tokenizer = AutoTokenizer.from_pretrained(found["model"])
    start = AutoModelForCausalLM.from_pretrained(SHARED / "models/stories260K")
    ids = tokenizer("One day, a little girl", return_tensors="pt")["input_ids"]
    text = tokenizer.decode(model.generate(ids, max_new_tokens=20, do_sample=False)[0], skip_special_tokens=True)
    assert len(text) > len("One day, a little girl") + 10
    with torch.no_grad():
        assert (model(ids).logits - start(ids).logits).abs().max() > 0.1
