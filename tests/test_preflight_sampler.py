"""Completions drawn at another temperature than the one that is trained stop a run, in 16 bits too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import gpt_neox
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt import preflight
from prefopt.batch import Batch
from prefopt.models.policy import Policy, choose
from prefopt.models.sampler import Local
from prefopt.models.sampling import Sampling
from prefopt.preflight import PreflightError
from prefopt.records import Example

STORIES = Path(__file__).parents[2] / "shared" / "models" / "stories260K"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def stories(dtype: torch.dtype) -> tuple[Any, list[list[int]]]:
    """A small trained model, and the beginnings of stories."""
    if not STORIES.is_dir():
        pytest.skip(f"{STORIES} is missing: it holds the small trained model")
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    beginnings = ["Once upon a time", "Tom had a", "Lily saw", "The dog"]
    return AutoModelForCausalLM.from_pretrained(STORIES, dtype=dtype).eval(), tokenizer(beginnings)["input_ids"]


def tiny(dtype: torch.dtype) -> tuple[Any, list[list[int]]]:
    """A random model with logits that tell tokens apart."""
    return gpt_neox(0, dtype).eval(), [[3, 4, 5], [6, 7], [8, 9, 10, 11], [12]]


def check(made: tuple[Any, list[list[int]]], temperature: float) -> list[str]:
    """What preflight says of completions drawn at a temperature, where 1 is trained."""
    model, prompts = made
    policy = Policy(model)
    choose(policy)
    drawn = Local(model, [2]).sample(prompts, 4, Sampling(32, temperature), range(len(prompts)))
    pairs = zip(prompts, drawn, strict=True)
    examples = [
        Example(p, [c.tokens for c in own], [0.0] * 4, [[True] * len(c.tokens) for c in own]) for p, own in pairs
    ]
    logp = torch.tensor([x for own in drawn for completion in own for x in completion.logp])
    return preflight.check_sampler(policy, replace(Batch.of(examples), rollout_logp=logp), truncated=False, local=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model", [stories, tiny])
def test_the_right_temperature_passes(model, dtype):
    [line] = check(model(dtype), 1.0)
    assert line.startswith("sampler equals policy to")


@pytest.mark.parametrize("temperature", [0.7, 0.8, 1.25])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model", [stories, tiny])
@pytest.mark.fault(30)
def test_another_temperature_is_refused(model, dtype, temperature):
    with pytest.raises(PreflightError, match="completions come from another distribution"):
        check(model(dtype), temperature)
