"""A model's numbers, from its configuration and the headers of its weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from laws import save_model
from torch import nn
from transformers import AutoModelForCausalLM

from prefopt.advice.sizes import net, of_config
from prefopt.records import InputError


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "gpt2"])
def test_weights_are_counted_as_the_model_has_them(architecture: str, tmp_path: Path) -> None:
    save_model(tmp_path, architecture=architecture)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    found = net(tmp_path)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert (found.width, found.layers, found.vocabulary) == (16, 2, model.get_input_embeddings().weight.shape[0])
    assert found.tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    head = model.get_output_embeddings()
    matrices = [m.weight for m in model.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    assert found.linear == sum(w.numel() for w in matrices if w is not head.weight)
    assert found.rank_width == sum(sum(w.shape) for w in matrices if w is not head.weight)


def test_without_weights_a_llama_is_counted_from_its_configuration(tmp_path: Path) -> None:
    save_model(tmp_path)
    counted = net(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    assert net(tmp_path).parameters == counted.parameters
    assert net(tmp_path).file_bytes == 0 < counted.file_bytes


def test_experts_are_counted() -> None:
    config = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 10,
        "intermediate_size": 4,
    }
    one, four = of_config(config), of_config({**config, "num_local_experts": 4})
    assert four.linear - one.linear == 3 * (3 * 8 * 4)  # three more experts of three matrices


def test_a_configuration_of_something_else_is_an_error_that_names_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8}), encoding="utf-8")
    with pytest.raises(InputError, match="num_hidden_layers, num_attention_heads, vocab_size"):
        net(tmp_path)


def test_a_torn_file_of_weights_is_named(tmp_path: Path) -> None:
    save_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match=r"model\.safetensors: not a readable"):
        net(tmp_path)


def test_reading_sizes_loads_no_weights(tmp_path: Path) -> None:
    save_model(tmp_path)
    header = next(iter(tmp_path.glob("*.safetensors")))
    size = int.from_bytes(header.read_bytes()[:8], "little")
    header.write_bytes(header.read_bytes()[: 8 + size])  # the header alone
    assert net(tmp_path).parameters > 0
    assert torch.is_grad_enabled()
