"""Fault 24: memory runs out under a real limit, in the middle of a run."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import WORDS, largest_difference, word_tokenizer
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from prefopt.checkpoint import newest

STARVED = 4  # the update from which memory is short
OPTIONS = [
    *("batch_size=8", "max_steps=6", "learning_rate=1e-3", "dtype=float32", "eval_fraction=0", "save_every=1"),
    *("keep_checkpoints=9", "tokens_per_forward=512"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose layers need a quarter of a MiB for each token, and pairs of about sixty tokens."""
    made = tmp_path_factory.mktemp("memory")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 8192, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(word_tokenizer()), max_position_embeddings=128, eos_token_id=0, **sizes)
    LlamaForCausalLM(config).save_pretrained(made / "model")
    word_tokenizer().save_pretrained(made / "model")
    draw = random.Random(0)
    rows = [{name: " ".join(draw.choices(WORDS, k=20)) for name in ("prompt", "chosen", "rejected")} for _ in range(16)]
    (made / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return made


def words(folder: Path, out: Path) -> list[str]:
    return ["train", "dpo", *map(str, ["--model", folder / "model", "--data", folder / "pairs.jsonl"]),
            "--out", str(out), *OPTIONS]  # fmt: skip


def updates(out: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in line.items() if name != "tokens_per_second"} for line in found]


def final(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(folder, forks):
    """A run with memory enough."""
    ended = forks.run(words(folder, folder / "whole"))
    assert ended.code == 0, ended.said
    return folder / "whole"


@pytest.mark.fault(24)
def test_where_memory_gets_short_forward_passes_get_smaller_and_the_result_is_the_same(folder, forks, whole):
    out = folder / "short"
    ended = forks.run(words(folder, out), starve=(STARVED, 90.0))
    assert ended.code == 0, ended.said
    assert "out of memory; tokens_per_forward halved to 256 (the result does not change)" in ended.said
    assert len(updates(out)) == len(updates(whole)) == 6
    for ours, theirs in zip(updates(out), updates(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6)
    assert largest_difference(final(out), final(whole)) < 1e-5


@pytest.mark.fault(24)
def test_where_memory_is_gone_the_run_ends_with_advice_and_goes_on_elsewhere_to_the_same_result(folder, forks, whole):
    out = folder / "gone"
    ended = forks.run(words(folder, out), starve=(STARVED, 6.0))
    assert ended.code == 2, ended.said
    assert "error: out of memory" in ended.said and "try gradient_checkpointing=true" in ended.said
    assert "DefaultCPUAllocator" in ended.said
    checkpoint, skipped = newest(out / "checkpoints")
    assert checkpoint is not None and checkpoint.step == STARVED - 1 and not skipped
    assert not (out / "summary.json").exists()
    ended = forks.run(words(folder, out))
    assert ended.code == 0, ended.said
    assert updates(out) == updates(whole)
    assert (out / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()
