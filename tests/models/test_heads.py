"""Score heads: new ones, kept ones, where a score is read, and what cannot have one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from laws import gpt_neox, rows, save_model, word_tokenizer
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto import modeling_auto

from prefopt import preflight
from prefopt.batch import Batch
from prefopt.models import heads
from prefopt.models import policy as policies
from prefopt.models.adapters import LoraOptions, adapt
from prefopt.models.layouts import TreeRow
from prefopt.models.load import ModelOptions, head_of, load
from prefopt.models.policy import Policy, choose
from prefopt.preflight import PreflightError
from prefopt.records import Example, InputError


@pytest.fixture(scope="module")
def start(tmp_path_factory: Any) -> Path:
    return save_model(tmp_path_factory.mktemp("start"))


def saved(folder: Path, auto: Any, start: Path, **options: Any) -> Path:
    """A classifier as transformers itself makes and saves one."""
    auto.from_pretrained(start, **options).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def message(source: Path, head: Any) -> str:
    with pytest.raises(InputError) as caught:
        load(source, head=head)
    return str(caught.value)


# ---------------------------------------------------------------- new heads


@pytest.mark.parametrize("head", ["completion", "steps"])
def test_a_new_head_scores_near_zero_and_comes_from_the_seed_alone(start, head):
    batch, layers = Batch.of([Example([1, 2], [[3, 4, 5], [6]], [1.0, 0.0], [[True] * 3, [True]])]), []
    for seed, noise in ((3, 0), (3, 5), (4, 0)):
        torch.manual_seed(seed)
        torch.randn(noise)  # what else was drawn does not matter
        loaded = load(start, head=head)
        layers.append(heads.score_layer(loaded.model).weight.detach())
        with torch.no_grad():
            value = Policy(loaded.model)(batch).value
        assert 0.001 < value.abs().mean() < 0.3
    assert torch.equal(layers[0], layers[1]) and not torch.equal(layers[0], layers[2])
    if head == "steps":
        assert layers[0][0].abs().max() == 0


def test_the_backbone_is_the_language_models(start):
    language, scoring = load(start).model, load(start, head="completion").model
    ours = scoring.base_model.state_dict()
    for name, weight in language.base_model.state_dict().items():
        rows = len(weight) if weight.ndim else None
        assert torch.equal(ours[name][:rows], weight)  # the embeddings may have grown


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_scores_are_float32_or_wider_whatever_the_weights_are(start, dtype):
    batch = Batch.of([Example([1, 2], [[3, 4, 5]], [1.0], [[True] * 3])])
    value = Policy(load(start, ModelOptions(dtype=dtype), head="completion").model)(batch).value
    assert value.dtype == (torch.float64 if dtype == "float64" else torch.float32)


def test_only_the_row_of_right_steps_is_trained(start):
    model = load(start, head="steps").model
    value = Policy(model)(Batch.of([Example([1, 2], [[3, 4, 5]], [1.0], [[True] * 3])])).value
    value.sum().backward()
    layer = heads.score_layer(model)
    assert layer.weight.grad[0].abs().max() == 0 and layer.weight.grad[1].abs().max() > 0
    assert layer.bias.grad.tolist() == [0.0, 3.0]


# ---------------------------------------------------------------- padding


def tokenizer(**special: str) -> Any:
    found = word_tokenizer()
    found.pad_token = None
    for name, token in special.items():
        setattr(found, name, token)
    return found


def test_a_padding_token_of_its_own_is_kept_and_the_end_token_is_not_one(start):
    cases: list[tuple[dict[str, str], str]] = [
        ({"pad_token": "<unk>"}, "<unk>"),
        ({"pad_token": "<unk>", "bos_token": "one"}, "<unk>"),
        ({"bos_token": "one"}, "one"),
        ({"pad_token": "</s>", "bos_token": "one"}, "one"),
        ({"bos_token": "</s>"}, heads.PADDING),
        ({"pad_token": "</s>"}, heads.PADDING),
        ({}, heads.PADDING),
    ]
    for special, expected in cases:
        model, one = load(start, head="steps").model, tokenizer(**special)
        heads.give_padding(model, one)
        assert one.pad_token == expected != one.eos_token
        assert model.config.pad_token_id == one.pad_token_id < model.get_input_embeddings().weight.shape[0]
        assert one.padding_side == "right"


def test_embeddings_grow_only_where_no_row_is_free():
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    for size, expected in ((len(word_tokenizer()), len(word_tokenizer()) + 1), (64, 64)):
        settings = AutoConfig.for_model("llama", vocab_size=size, num_labels=1, **config)
        model = AutoModelForSequenceClassification.from_config(settings)
        heads.give_padding(model, tokenizer())
        assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == expected


def test_where_padding_is_the_end_token_the_score_is_read_where_transformers_reads_it(start, tmp_path):
    """At the last token that is not one; so an older model's scores stay what they were."""
    model = AutoModelForSequenceClassification.from_pretrained(start, num_labels=1, pad_token_id=0).eval()
    model.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    loaded = load(tmp_path, head="completion")
    assert loaded.model.config.pad_token_id == 0
    ends = [[5, 6, 0], [7, 0, 0], [0], [8, 9], [0, 0, 0]]  # of every kind, also an answer that is an end alone
    batch = Batch.of([Example([3, 4], ends, [0.0] * 5, [[True] * len(c) for c in ends])])
    with torch.no_grad():
        expected = [model(input_ids=torch.tensor([[3, 4, *c]])).logits[0, 0] for c in ends]
        for layout in ("tree", "padded"):
            value = Policy(loaded.model, layout)(batch).value
            found = value[batch.completions.lengths.cumsum(0) - 1]
            assert torch.allclose(found, torch.stack(expected), atol=1e-6), layout


# ---------------------------------------------------------------- heads that are kept, and refusals


def test_what_a_directory_was_saved_as_is_known(start, tmp_path):
    assert head_of(start) == "language"
    assert head_of(saved(tmp_path / "rm", AutoModelForSequenceClassification, start, num_labels=1)) == "completion"
    assert head_of(saved(tmp_path / "prm", AutoModelForTokenClassification, start, num_labels=2)) == "steps"
    for head in ("language", "completion", "steps"):
        folder = tmp_path / f"adapter of {head}"
        adapt(load(start, head=head).model, LoraOptions(lora_rank=2)).save_pretrained(folder)
        assert head_of(folder) == head


@pytest.mark.parametrize(
    ("auto", "labels", "head"),
    [(AutoModelForSequenceClassification, 1, "completion"), (AutoModelForTokenClassification, 2, "steps")],
)
def test_a_head_that_is_there_is_kept(auto, labels, head, start, tmp_path):
    folder = saved(tmp_path, auto, start, num_labels=labels)
    ours, theirs = load(folder, head=head).model, auto.from_pretrained(folder)
    assert torch.equal(heads.score_layer(ours).weight, heads.score_layer(theirs).weight)


def test_a_classifier_with_other_labels_is_refused(start, tmp_path):
    three = saved(tmp_path / "three", AutoModelForSequenceClassification, start, num_labels=3)
    said = message(three, "completion")
    assert "3 labels" in said and "reward model has 1" in said and "new head" in said
    assert "process reward model has 2" in message(
        saved(tmp_path / "five", AutoModelForTokenClassification, start, num_labels=5), "steps"
    )


def test_a_reward_model_is_no_process_reward_model_and_the_reverse(start, tmp_path):
    one = saved(tmp_path / "rm", AutoModelForSequenceClassification, start, num_labels=1)
    two = saved(tmp_path / "prm", AutoModelForTokenClassification, start, num_labels=2)
    assert "this is a reward model" in message(one, "steps") and "train reward" in message(one, "steps")
    assert "this is a process reward model" in message(two, "completion") and "train prm" in message(two, "completion")
    assert "this is not a whole causal language model" in message(one, "language")


@pytest.mark.parametrize("head", ["completion", "steps"])
def test_a_family_that_transformers_has_no_classifier_for_is_named(head, tmp_path):
    tiny.build("granite").save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    said = message(tmp_path, head)
    assert "for granite models" in said and heads.ENDING[head] in said


def test_a_reward_model_without_its_head_is_not_made_up(start, tmp_path):
    folder = saved(tmp_path, AutoModelForSequenceClassification, start, num_labels=1)
    weights = load_file(folder / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "no values for score.weight" in message(folder, "completion")


def test_a_damaged_language_model_gets_no_head(start, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((start / name).read_bytes())
    weights = load_file(start / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "no values for model.norm.weight" in message(tmp_path, "completion")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    assert "cannot load a reward model" in message(tmp_path, "completion")


# ---------------------------------------------------------------- families, layouts and preflight


def classifiable(mapping: str) -> list[str]:
    classes = getattr(modeling_auto, f"MODEL_FOR_{mapping}_CLASSIFICATION_MAPPING_NAMES")
    return [family for family in tiny.PACKED if family in classes]


def classifier(family: str, auto: Any, labels: int) -> Any:
    """A random classifier of the family with weights large enough that wrong attention shows."""
    settings = {**tiny.BASE, **tiny.PACKED[family], "num_labels": labels, "bos_token_id": 0}
    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(family, **settings))
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.2) if weight.ndim >= 2 else weight.add_(0.1 * torch.randn_like(weight))
    return model.eval()


@pytest.mark.parametrize("family", classifiable("SEQUENCE"))
def test_scores_of_the_packed_tree_are_transformers_own(family):
    model, batch = classifier(family, AutoModelForSequenceClassification, 1), tiny.family()
    policy = Policy(model)
    assert choose(policy).layout == "tree"
    with torch.no_grad():
        found = policy(batch).value[batch.completions.lengths.cumsum(0) - 1]
        prompts = batch.prompts.rows()
        with policy.ordinary():
            for n, completion in enumerate(batch.completions.rows()):
                ids = torch.cat([prompts[int(batch.group[n])], completion])[None]
                assert model(input_ids=ids).logits[0, 0].item() == pytest.approx(found[n].item(), abs=2e-5)


@pytest.mark.parametrize("family", classifiable("TOKEN"))
def test_scores_of_steps_in_the_packed_tree_are_transformers_own(family):
    model, batch = classifier(family, AutoModelForTokenClassification, 2), tiny.pairs()
    policy = Policy(model)
    assert choose(policy).layout == "tree"
    with torch.no_grad():
        rows_of_value = policy(batch).value.split(batch.completions.lengths.tolist())
        prompts = batch.prompts.rows()
        with policy.ordinary():
            for n, completion in enumerate(batch.completions.rows()):
                prompt = prompts[int(batch.group[n])]
                logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0, len(prompt) :]
                assert torch.allclose(logits[:, 1] - logits[:, 0], rows_of_value[n], atol=2e-5)


@pytest.mark.parametrize("head", ["completion", "steps"])
def test_preflight_catches_wrong_packing_of_a_reward_model(head, monkeypatch):
    class Running:
        """Positions that do not restart after the prompt."""

        @classmethod
        def of(cls, batch: Batch, device: torch.device) -> TreeRow:
            row = TreeRow.of(batch, device)
            return dataclasses.replace(row, positions=torch.arange(len(row.ids)))

    policy, batch = Policy(gpt_neox(0, torch.float32, head)), Batch.of(rows("ratings"))
    said = preflight.check_policy(policy, batch)
    assert [line.split(" to ")[0] for line in said] == ["two passes agree", "packed equals padded"]
    assert not any("nats" in line for line in said)
    monkeypatch.setattr(policies, "TreeRow", Running)
    with pytest.raises(PreflightError, match="the packed layout differs from the padded one"):
        preflight.check_policy(policy, batch)
