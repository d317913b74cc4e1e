"""Reward models from data to a directory that plain transformers and peft score with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import WORDS, save_model, word_tokenizer, write_rows
from peft import AutoPeftModelForSequenceClassification, AutoPeftModelForTokenClassification
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    pipeline,
)

import prefopt
from prefopt.batch import Batch
from prefopt.data import DataOptions, Dataset
from prefopt.data import load as load_data
from prefopt.evaluate.rewards import completion_scores, step_scores
from prefopt.models.adapters import LoraOptions, adapt
from prefopt.models.load import load
from prefopt.models.policy import Policy
from prefopt.objectives import ProcessReward, RewardModel

FAST = {"batch_size": 16, "max_steps": 30, "eval_fraction": 0.2, "learning_rate": 1e-2, "dtype": "float32"}
FAMILIES = ["llama", "qwen2", "gpt_neox", "gpt2"]


def start(folder: Path, family: str) -> Path:
    """A tiny random model whose tokenizer pads with its end token, as many do; Qwen's has embeddings to spare."""
    if family != "qwen2":
        return save_model(folder, architecture=family)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "max_position_embeddings": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=300, initializer_range=0.3, **sizes, **heads)).save_pretrained(folder)
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    Qwen2Tokenizer(vocab={**letters, "<|endoftext|>": len(letters)}, merges=[]).save_pretrained(folder)
    return folder


def run(objective: Any, model: Path, folder: Path, **options: Any) -> Any:
    data = write_rows(folder / f"{objective.facts.name}.jsonl", objective.facts.data, num=160)
    return prefopt.train(objective=objective, model=model, data=data, **{**FAST, "out": folder / "run", **options})


def policy_of(folder: Path, head: Any) -> Policy:
    loaded = load(folder, head=head)
    return Policy(adapt(loaded.model, LoraOptions(), loaded.adapter))


def held_out(folder: Path, tokenizer: Any, data: str) -> Dataset:
    return load_data(write_rows(folder / "held out.jsonl", data, num=6, seed=5), tokenizer, data, DataOptions())


def texts(data: Dataset, tokenizer: Any) -> list[str]:
    """Each completion after its prompt, with the end token, as a user would write it."""
    return [f"{row.prompt}{text}{tokenizer.eos_token}" for row in data.rows for text in row.completions]


def plain_scores(model: Any, tokenizer: Any, many: list[str]) -> torch.Tensor:
    """Scores by transformers alone, in one right-padded batch."""
    inputs = tokenizer(many, padding=True, return_tensors="pt")
    assert inputs["attention_mask"].sum(1).unique().numel() > 1  # texts of unequal length
    with torch.no_grad():
        return model.eval()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits


# ---------------------------------------------------------------- a score of a whole text


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_reward_model_gives_its_scores_in_plain_transformers(family, tmp_path):
    result = run(RewardModel(), start(tmp_path / "model", family), tmp_path)
    summary = result.summary
    assert summary["start"]["eval/loss"] == pytest.approx(0.693, abs=0.1)  # a new head scores near 0
    assert summary["end"]["eval/loss"] < 0.35 and summary["end"]["eval/accuracy"] > 0.9
    assert summary["reference"] is None and summary["layout"] == "tree"

    tokenizer = AutoTokenizer.from_pretrained(result.model_dir)
    model = AutoModelForSequenceClassification.from_pretrained(result.model_dir)
    assert model.config.num_labels == 1
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    data = held_out(tmp_path, tokenizer, "ratings")
    ours = completion_scores(policy_of(result.model_dir, "completion"), data.examples)
    theirs = plain_scores(model, tokenizer, texts(data, tokenizer))[:, 0]
    assert (theirs.double() - ours).abs().max() < 1e-5
    assert ours.std() > 0.3


def test_the_language_model_head_is_gone(tmp_path):
    result = run(RewardModel(), save_model(tmp_path / "model"), tmp_path, max_steps=1)
    names = AutoModelForSequenceClassification.from_pretrained(result.model_dir).state_dict()
    assert "score.weight" in names and not any("lm_head" in name for name in names)


def test_a_pipeline_gives_the_score_as_it_is(tmp_path):
    result = run(RewardModel(), save_model(tmp_path / "model"), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(result.model_dir)
    data = held_out(tmp_path, tokenizer, "ratings")
    found = pipeline("text-classification", model=str(result.model_dir), device="cpu")(texts(data, tokenizer))
    ours = completion_scores(policy_of(result.model_dir, "completion"), data.examples)
    assert [each["score"] for each in found] == pytest.approx(ours.tolist(), abs=1e-5)


def test_training_goes_on_from_a_reward_model_with_its_head(tmp_path):
    first = run(RewardModel(), save_model(tmp_path / "model"), tmp_path)
    second = run(RewardModel(), first.model_dir, tmp_path, out=tmp_path / "again", max_steps=2, learning_rate=1e-6)
    assert second.summary["start"]["eval/loss"] == pytest.approx(first.summary["end"]["eval/loss"], abs=1e-5)


def test_the_best_weights_are_kept_by_accuracy(tmp_path):
    options = {"keep": "best", "eval_metric": "eval/accuracy", "eval_every": 3}
    result = run(RewardModel(), save_model(tmp_path / "model"), tmp_path, **options)
    assert result.summary["end"]["eval/accuracy"] >= result.summary["start"]["eval/accuracy"]
    assert AutoModelForSequenceClassification.from_pretrained(result.model_dir).config.num_labels == 1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_with_its_head_loads_in_peft(family, tmp_path):
    """The padding token is new in both, so the embeddings grow when peft loads the adapter."""
    result = run(RewardModel(), start(tmp_path / "model", family), tmp_path, lora_rank=4, learning_rate=2e-2)
    assert result.summary["end"]["eval/loss"] < result.summary["start"]["eval/loss"] - 0.2
    tokenizer = AutoTokenizer.from_pretrained(result.model_dir)
    model = AutoPeftModelForSequenceClassification.from_pretrained(result.model_dir, num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    data = held_out(tmp_path, tokenizer, "ratings")
    ours = completion_scores(policy_of(result.model_dir, "completion"), data.examples)
    assert (plain_scores(model, tokenizer, texts(data, tokenizer))[:, 0].double() - ours).abs().max() < 1e-5
    assert ours.std() > 0.3
    saved = load_file(result.model_dir / "adapter_model.safetensors")
    assert any("score" in name for name in saved) and not any("embed" in name or "wte" in name for name in saved)


def test_an_adapter_is_continued_with_its_head(tmp_path):
    first = run(RewardModel(), save_model(tmp_path / "model"), tmp_path, lora_rank=4, learning_rate=2e-2)
    second = run(RewardModel(), first.model_dir, tmp_path, out=tmp_path / "again", max_steps=2, learning_rate=1e-6)
    assert second.summary["start"]["eval/loss"] == pytest.approx(first.summary["end"]["eval/loss"], abs=1e-5)
    again = run(RewardModel(), first.model_dir, tmp_path, out=tmp_path / "more", max_steps=8)
    assert again.summary["end"]["eval/loss"] < again.summary["start"]["eval/loss"] - 0.02


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_seed_decides_the_new_head(lora_rank, tmp_path):
    model = save_model(tmp_path / "model")
    ends = [
        run(RewardModel(), model, tmp_path, out=tmp_path / str(n), seed=seed, max_steps=2, lora_rank=lora_rank)
        for n, seed in enumerate((3, 3, 4))
    ]
    first, same, other = (each.summary["end"]["loss"] for each in ends)
    assert first == same != other


# ---------------------------------------------------------------- a score of each step


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_process_reward_model_gives_its_probabilities_in_plain_transformers(family, tmp_path):
    result = run(ProcessReward(), start(tmp_path / "model", family), tmp_path)
    assert result.summary["start"]["eval/loss"] == pytest.approx(0.693, abs=0.1)
    assert result.summary["end"]["eval/loss"] < 0.35 and result.summary["end"]["eval/wrong_accuracy"] > 0.8
    tokenizer = AutoTokenizer.from_pretrained(result.model_dir)
    model = AutoModelForTokenClassification.from_pretrained(result.model_dir).eval()
    assert model.config.id2label == {0: "wrong", 1: "right"}
    last = next(module for name, module in model.named_children() if name in ("score", "classifier"))
    assert last.weight[0].abs().max() == 0 and last.weight[1].abs().max() > 0
    data = held_out(tmp_path, tokenizer, "steps")
    ours = step_scores(policy_of(result.model_dir, "steps"), data.examples)
    for example, probabilities in zip(data.examples, ours, strict=True):
        (tokens,), (labels,) = example.completions, example.steps
        with torch.no_grad():
            right = model(input_ids=torch.tensor([[*example.prompt, *tokens]])).logits[0].softmax(-1)[:, 1]
        at = [len(example.prompt) + n for n, label in enumerate(labels) if label == label]
        assert probabilities == pytest.approx(right[at].tolist(), abs=1e-5)
        assert len(probabilities) == 3 and probabilities[1] < min(probabilities[0], probabilities[2])


def test_an_adapter_of_a_process_reward_model_loads_in_peft(tmp_path):
    result = run(ProcessReward(), save_model(tmp_path / "model"), tmp_path, lora_rank=4, learning_rate=2e-2)
    assert result.summary["end"]["eval/loss"] < result.summary["start"]["eval/loss"] - 0.2
    model = AutoPeftModelForTokenClassification.from_pretrained(result.model_dir, num_labels=2).eval()
    data = held_out(tmp_path, AutoTokenizer.from_pretrained(result.model_dir), "steps")
    policy = policy_of(result.model_dir, "steps")
    batch = Batch.of(data.examples[:1])
    with torch.no_grad():
        ids = torch.cat([batch.prompts.values, batch.completions.values])[None]
        logits = model(input_ids=ids).logits[0, len(batch.prompts.values) :]
        assert torch.allclose(policy(batch).value, logits[:, 1] - logits[:, 0], atol=1e-5)


# ---------------------------------------------------------------- the model card


TURNS = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}END{% endif %}{% endfor %}"
CHATS = {
    "text": None,
    "template writes the end": TURNS.replace("END", "</s>"),
    "template leaves the end out": TURNS.replace("END", " ."),
}


def conversations(path: Path) -> Path:
    """The rows of a file with their prompts, and whole answers, as messages."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
        if "scores" in row:
            row["completions"] = [[{"role": "assistant", "content": text}] for text in row["completions"]]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("objective", [RewardModel(), ProcessReward()], ids=["reward", "prm"])
def test_the_code_of_the_model_card_gives_the_scores_that_were_trained(
    objective, lora_rank, chat, tmp_path, monkeypatch
):
    facts = objective.facts
    data = write_rows(tmp_path / "rows.jsonl", facts.data, num=32)
    if CHATS[chat]:
        conversations(data)
    given = {**FAST, "max_steps": 3, "lora_rank": lora_rank, "chat_template": CHATS[chat], "out": tmp_path / "run"}
    result = prefopt.train(objective=objective, model=save_model(tmp_path / "model"), data=data, **given)
    card = (result.model_dir / "README.md").read_text(encoding="utf-8")
    code = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(result.model_dir.parent)
    rows = load_data(data, AutoTokenizer.from_pretrained(result.model_dir), facts.data, DataOptions())
    policy = policy_of(result.model_dir, facts.head)
    for record, example in zip(rows.rows[:2], rows.examples, strict=False):
        if facts.head == "completion":
            for number, score in enumerate(completion_scores(policy, [example])):
                names = {"prompt": record.prompt, "answer": record.completions[number]}
                exec(code, names)
                assert float(names["score"]) == pytest.approx(float(score), abs=1e-5)
        else:
            names = {"prompt": record.prompt, "solution": "".join(f"{step}\n" for step in record.completions)}
            exec(code, names)
            ends = [len(example.prompt) + n for n, label in enumerate(example.steps[0]) if label == label]
            assert names["right"][ends].tolist() == pytest.approx(step_scores(policy, [example])[0], abs=1e-5)


def test_a_chat_template_given_for_training_is_saved_with_the_model(tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }} {% endfor %}", encoding="utf-8")
    asked = [{"role": "user", "content": "red"}]
    rows = [{"prompt": asked, "completions": [WORDS[n], WORDS[n + 1]], "scores": [0, 1]} for n in range(8)]
    data = tmp_path / "chat.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    given = {**FAST, "max_steps": 1, "eval_fraction": 0.0, "chat_template": str(template)}
    result = prefopt.train(
        objective=RewardModel(), model=save_model(tmp_path / "model"), data=data, out=tmp_path / "run", **given
    )
    assert AutoTokenizer.from_pretrained(result.model_dir).chat_template == template.read_text(encoding="utf-8")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.vocab_size == len(word_tokenizer())
