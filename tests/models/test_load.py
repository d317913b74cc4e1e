from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prefopt.batch import Batch
from prefopt.models.adapters import LoraOptions, adapt
from prefopt.models.load import ModelOptions, load, load_tokenizer, pick_dtype, tokenizer_source, turn_dropout_off
from prefopt.models.policy import Policy
from prefopt.records import InputError


def tokenizer(end: str | None = "</s>", extra: str = "word") -> PreTrainedTokenizerFast:
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, extra: 3}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token=end, unk_token="<unk>")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.build("llama").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def directory(saved, tmp_path) -> Path:
    """A model directory a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def message(source: str | Path, **options: str) -> str:
    with pytest.raises(InputError) as caught:
        load(source, ModelOptions(**options))
    return str(caught.value)


def test_a_directory_gives_its_model_and_tokenizer(saved):
    loaded = load(saved)
    wanted = tiny.build("llama").state_dict()
    assert all(torch.equal(weight, wanted[name]) for name, weight in loaded.model.state_dict().items())
    assert loaded.tokenizer("word")["input_ids"] == [3]
    assert (loaded.source, loaded.adapter) == (str(saved), None)
    assert not loaded.model.training


def test_a_directory_may_be_given_as_a_string_and_relative(saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    assert load(str(saved)).adapter is None
    assert load(saved.name).adapter is None
    assert load(f"./{saved.name}").adapter is None


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float64"])
def test_weights_come_in_the_precision_asked_for(saved, name):
    model = load(saved, ModelOptions(dtype=name)).model
    assert {p.dtype for p in model.parameters()} == {getattr(torch, name)}


def test_auto_is_float32_on_a_cpu_and_bfloat16_on_a_gpu(saved):
    assert next(load(saved).model.parameters()).dtype == torch.float32
    assert pick_dtype("auto", torch.device("cuda")) == torch.bfloat16


def test_an_adapter_directory_leads_to_its_base_model(saved, tmp_path):
    adapted = adapt(load(saved).model, LoraOptions(lora_rank=2))
    adapted.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.adapter == tmp_path and loaded.source == str(tmp_path)
    assert adapt(loaded.model, LoraOptions(), loaded.adapter).peft_config["default"].r == 2


def test_an_adapters_own_tokenizer_comes_first_and_its_base_models_otherwise(saved, tmp_path):
    adapt(load(saved).model, LoraOptions(lora_rank=2)).save_pretrained(tmp_path)
    assert tokenizer_source(tmp_path) == str(saved)
    assert load(tmp_path).tokenizer("word")["input_ids"] == [3]
    tokenizer(extra="other").save_pretrained(tmp_path)
    assert tokenizer_source(tmp_path) == str(tmp_path)
    assert load(tmp_path).tokenizer("other")["input_ids"] == [3]


@pytest.mark.parametrize("source", ["nowhere", "./no/where", "/no/where", "a/b/c", Path("owner/name"), "~/model"])
def test_a_directory_that_is_not_there_is_named(source):
    said = message(source)
    assert f"{source}: no such directory" in said and "owner/name" in said


@pytest.mark.fault(40)
def test_a_hub_name_that_cannot_be_reached_is_named():
    assert message("nobody/nothing-at-all").startswith("nobody/nothing-at-all: ")


def test_a_directory_without_a_config_is_not_a_model(directory):
    (directory / "config.json").unlink()
    said = message(directory)
    assert f"{directory}: no config.json" in said and "save_pretrained" in said


def test_a_config_that_is_not_json_is_named(directory):
    (directory / "config.json").write_text("{ not json")
    assert message(directory).startswith(f"{directory}: cannot load a causal language model: ")


def test_a_model_that_is_no_causal_language_model_is_named(directory):
    (directory / "config.json").write_text(json.dumps({"model_type": "t5"}))
    assert message(directory).startswith(f"{directory}: cannot load a causal language model: ")


def test_missing_weights_are_named(directory):
    (directory / "model.safetensors").unlink()
    assert message(directory).startswith(f"{directory}: cannot load a causal language model: ")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_weights_are_named(directory, share):
    whole = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(whole[: int(share * len(whole))])
    assert message(directory).startswith(f"{directory}: cannot load a causal language model: ")


def test_weights_of_another_size_are_named(directory):
    settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    (directory / "config.json").write_text(json.dumps({**settings, "intermediate_size": 56}))
    assert message(directory).startswith(f"{directory}: cannot load a causal language model: ")


def test_weights_that_the_file_does_not_hold_are_not_made_up(directory):
    """A model without its head, such as a reward model or an encoder, would train on random numbers."""
    from safetensors.torch import load_file, save_file

    weights = load_file(directory / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    said = message(directory)
    assert f"{directory}: " in said and "lm_head.weight" in said


def test_a_tied_head_is_not_a_missing_one(tmp_path):
    tiny.build("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model = load(tmp_path).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_missing_tokenizer_is_named(directory):
    for path in directory.glob("*token*"):
        path.unlink()
    assert message(directory).startswith(f"{directory}: cannot load a tokenizer: ")


@pytest.mark.fault(38)
def test_a_tokenizer_without_an_end_token_says_where_to_set_it(directory):
    tokenizer(end=None).save_pretrained(directory)
    said = message(directory)
    assert "no end-of-sequence token" in said and "eos_token in tokenizer_config.json" in said
    with pytest.raises(InputError, match="no end-of-sequence token"):
        load_tokenizer(directory)


def test_an_adapter_without_a_base_model_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert f"{tmp_path}/adapter_config.json: base_model_name_or_path is missing" in message(tmp_path)


def test_an_adapter_config_that_is_not_json_is_named(tmp_path):
    for text in ("{ not json", "[]", ""):
        (tmp_path / "adapter_config.json").write_text(text)
        assert f"{tmp_path}/adapter_config.json: not a JSON object" in message(tmp_path)


def test_an_adapter_whose_base_model_moved_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/moved/away"}))
    assert f"{tmp_path}/adapter_config.json: the base model /moved/away is not there" in message(tmp_path)


def test_four_bit_weights_need_a_gpu(saved):
    said = message(saved, quantize="nf4")
    assert "needs a GPU" in said and "dtype: bfloat16 with lora_rank" in said


# every kind of noise that these families have, switched on in the config
NOISY = {
    "gpt2": {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5},
    "llama": {"attention_dropout": 0.5},
    "gpt_neox": {"attention_dropout": 0.5, "hidden_dropout": 0.5},
    "phi3": {"attention_dropout": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5},
    "opt": {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5},
    "bloom": {"attention_dropout": 0.5, "hidden_dropout": 0.5},
}


@pytest.mark.parametrize("family", NOISY)
def test_no_noise_is_left_even_in_training_mode(family):
    model, batch = tiny.build(family, **NOISY[family]), Batch.of(tiny.examples([(7, [5, 9])]))
    with torch.no_grad():
        quiet = Policy(model, "padded")(batch).logp
        model.train()
        assert not torch.equal(Policy(model, "padded")(batch).logp, quiet)  # there was noise to remove
        turn_dropout_off(model)
        for _ in range(3):
            torch.testing.assert_close(Policy(model, "padded")(batch).logp, quiet)


def test_expert_routing_loses_its_noise_too():
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {**tiny.BASE, "num_local_experts": 4, "router_jitter_noise": 0.5}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **settings)).train()
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
        turn_dropout_off(model)
        assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_what_is_loaded_has_no_dropout_with_gradient_checkpointing_on(tmp_path):
    tiny.build("gpt2").save_pretrained(tmp_path)  # its dropout is 0.1 unless someone says otherwise
    tokenizer().save_pretrained(tmp_path)
    model = load(tmp_path, ModelOptions(gradient_checkpointing=True)).model
    assert model.training
    ids = torch.arange(3, 12)[None]
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
