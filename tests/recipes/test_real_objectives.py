"""From the command line, on real rows, with a real model: each objective improves its own held-out measure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Tokenizer, LlamaConfig, LlamaForCausalLM

from prefopt import cli
from prefopt.evaluate.statistics import wilson

SHARED = Path(__file__).resolve().parents[3] / "shared"
STORIES = SHARED / "models/stories260K"
REWRITES = SHARED / "data/llms-from-scratch/instruction-data-with-preference.json"
LABELS = SHARED / "data/llama-factory/kto_en_demo.json"
HARMLESS = SHARED / "data/hh-rlhf/test.jsonl.gz"
WORDS = SHARED / "data/gpt2-tokenizer"

real = pytest.mark.skipif(
    not all(path.exists() for path in (STORIES, REWRITES, LABELS, HARMLESS, WORDS)),
    reason="the real model and data (../shared beside the project) are not here",
)

TEMPLATE = """\
{% for m in messages %}{{ '\n\nHuman: ' if m['role'] == 'user' else '\n\nAssistant: ' }}{{ m['content'] }}\
{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '\n\nAssistant: ' }}{% endif %}"""


def trained(capsys: Any, out: Path, objective: str, model: Path, data: Path, *options: str) -> dict[str, Any]:
    """The summary of a run from the command line."""
    capsys.readouterr()
    words = ["train", objective, "--model", str(model), "--data", str(data), "--out", str(out), "--json", *options]
    assert cli.main(words) == 0
    summary: dict[str, Any] = json.loads(capsys.readouterr().out)
    return summary


@real
@pytest.mark.parametrize(("objective", "rate"), [("dpo", "5e-4"), ("ipo", "1e-4"), ("simpo", "5e-4"), ("orpo", "2e-3")])
def test_polite_rewrites_are_told_from_impolite_ones(objective, rate, tmp_path, capsys):
    options = ["max_length=512", f"learning_rate={rate}", "eval_fraction=0.15", "max_steps=12"]
    found = trained(capsys, tmp_path / "run", objective, STORIES, REWRITES, *options)
    start, end, rows = found["start"], found["end"], found["held_out_rows"]
    assert found["data"]["rows"] + rows == 1094 and found["data"]["dropped"] == {"chosen and rejected are equal": 6}
    assert end["eval/loss"] < start["eval/loss"]
    right = end["eval/rewards/accuracies"]
    assert right > start["eval/rewards/accuracies"]
    assert wilson(round(right * rows), rows).low > 0.5


@pytest.fixture(scope="module")
def small_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained Llama with a real vocabulary, and room for conversations."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = GPT2Tokenizer(str(WORDS / "gpt2_vocab.json"), str(WORDS / "gpt2_merges.txt"))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=None, **sizes)
    ).save_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@real
def test_good_chat_answers_are_told_from_bad_ones_by_their_labels(small_llama, tmp_path, capsys):
    options = ["max_length=384", "learning_rate=1e-2", "eval_fraction=0.3", "batch_size=16"]
    found = trained(capsys, tmp_path / "run", "kto", small_llama, LABELS, *options)
    start, end = found["start"], found["end"]
    assert start["eval/kl"] == pytest.approx(0, abs=1e-3)
    assert end["eval/loss"] < 0.95 * start["eval/loss"]
    assert end["eval/rewards/chosen"] > end["eval/rewards/rejected"]


@real
def test_a_reward_model_ranks_held_out_human_preferences_better_than_chance(tmp_path, capsys):
    options = ["max_length=192", "learning_rate=1e-3", "eval_fraction=0.3", "max_steps=60", "batch_size=16"]
    found = trained(capsys, tmp_path / "run", "reward", STORIES, HARMLESS, *options)
    start, end, rows = found["start"], found["end"], found["held_out_rows"]
    assert end["eval/loss"] < start["eval/loss"]
    assert wilson(round(end["eval/accuracy"] * rows), rows).low > 0.5
