"""Fault 38: tokenizers that lack a token, and chat templates that fail, in whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from laws import save_model, word_tokenizer, write_rows

from prefopt import cli
from prefopt.objectives import EVERY
from prefopt.recipes import train as recipe

FAST = ("batch_size=4", "max_steps=2", "eval_fraction=0.25", "learning_rate=1e-2", "dtype=float32")


@pytest.fixture
def model_dir(tmp_path):
    return save_model(tmp_path / "model")


def without(folder: Path, *names: str, **changes: Any) -> None:
    """Save the model's tokenizer anew, without some of its tokens."""
    tokenizer = word_tokenizer()
    for name in names:
        setattr(tokenizer, name, None)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)


def train(kind: str, model: Path, data: Path, out: Path, *options: str) -> int:
    words = ["--model", str(model), "--data", str(data), "--out", str(out), *FAST, *options]
    return cli.main(["train", kind, *words])


@pytest.mark.fault(38)
@pytest.mark.parametrize("kind", ["sft", "dpo", "reward", "grpo"])
def test_a_tokenizer_without_padding_trains_as_one_that_has_it(kind, model_dir, tmp_path, capsys):
    """Nothing here is padded, or what pads is never read."""
    shape = EVERY[kind].facts.data
    data = write_rows(tmp_path / "rows.jsonl", shape)
    options = ["--reward", "repetition", "num_completions=2", "max_tokens=4"] if shape == "prompts" else []
    ends = []
    for name in ("with", "without"):
        if name == "without":
            without(model_dir, "pad_token")
        assert train(kind, model_dir, data, tmp_path / name, *options) == 0, capsys.readouterr().err
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ends.append([{**json.loads(line), "tokens_per_second": 0} for line in lines])
    for one, other in zip(*ends, strict=True):
        timed = [key for key in one if key.startswith("seconds/")]
        assert {**one, **dict.fromkeys(timed, 0)} == {**other, **dict.fromkeys(timed, 0)}


@pytest.mark.fault(38)
@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_a_tokenizer_without_an_end_token_is_refused_before_any_weights_are_read(
    kind, model_dir, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(recipe, "load_model", lambda *given: pytest.fail("weights were read"))
    without(model_dir, "eos_token", "pad_token")
    shape = EVERY[kind].facts.data
    options = ["--reward", "repetition"] if shape == "prompts" else []
    assert train(kind, model_dir, write_rows(tmp_path / "rows.jsonl", shape), tmp_path / "run", *options) == 2
    assert "no end-of-sequence token; set eos_token in tokenizer_config.json" in capsys.readouterr().err


TURNS = [
    {"prompt": [{"role": "user", "content": "red cat"}], "completion": [{"role": "assistant", "content": "good"}]},
    {"prompt": [{"role": "tool", "content": "blue dog"}], "completion": [{"role": "assistant", "content": "bad"}]},
]
PLAIN = "{% for m in messages %}{{ m.content }} {% endfor %}"
FAILING = {
    "refuses a role": (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
        "{{ m.content }} {% endfor %}",
        "rows.jsonl:2: ",
        "no tools here",
    ),
    "divides by nothing": ("{% for m in messages %}{{ m.content }} {{ 1 // 0 }}{% endfor %}", "rows.jsonl:1: ", "zero"),
    "is no template": ("{% for m in messages %}{{ m.content }}", "", "template"),
    "asks for what is not there": ("{{ messages[0].name.upper() }}", "rows.jsonl:1: ", "no attribute 'name'"),
}


@pytest.mark.fault(38)
@pytest.mark.parametrize("fails", FAILING)
def test_a_template_that_fails_is_said_with_its_row_before_any_weights_are_read(
    fails, model_dir, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(recipe, "load_model", lambda *given: pytest.fail("weights were read"))
    template, where, said = FAILING[fails]
    without(model_dir, chat_template=template)
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, TURNS * 4)))
    assert train("sft", model_dir, data, tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert where in error and said in error and "Traceback" not in error


@pytest.mark.fault(38)
def test_a_chat_without_a_template_says_how_to_give_one_and_a_given_one_is_used(model_dir, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, TURNS * 4)))
    assert train("sft", model_dir, data, tmp_path / "run") == 2
    assert "chat_template" in capsys.readouterr().err
    (tmp_path / "plain.jinja").write_text(PLAIN)
    assert train("sft", model_dir, data, tmp_path / "run", f"chat_template={tmp_path / 'plain.jinja'}") == 0
