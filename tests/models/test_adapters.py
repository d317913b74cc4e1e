from __future__ import annotations

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from prefopt.models.adapters import START, LoraOptions, adapt, at_start, is_adapted
from prefopt.records import InputError


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 12)[None]).logits


def moved(model: torch.nn.Module) -> None:
    torch.manual_seed(2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name and START not in name:
                weight.normal_(0, 0.1)


def test_rank_zero_trains_the_whole_model():
    model = tiny.build("llama")
    assert adapt(model, LoraOptions()) is model
    assert not is_adapted(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_new_adapter_starts_as_a_no_op_and_alone_is_trained():
    wanted = logits(tiny.build("llama"))
    model = adapt(tiny.build("llama"), LoraOptions(lora_rank=4))
    assert is_adapted(model) and torch.equal(logits(model), wanted)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    # two layers of seven linear maps, two factors each; the head is left alone
    assert len(trained) == 2 * 7 * 2 and all("lora_" in name for name in trained)


@pytest.mark.parametrize("alpha,scale", [(None, 2.0), (4, 1.0), (16, 4.0)])
def test_the_update_is_scaled_by_alpha_over_rank_and_alpha_is_twice_the_rank_unless_given(alpha, scale):
    model = adapt(tiny.build("llama"), LoraOptions(lora_rank=4, lora_alpha=alpha))
    assert model.base_model.model.model.layers[0].mlp.up_proj.scaling == {"default": scale}


def test_targets_name_the_layers():
    model = adapt(tiny.build("llama"), LoraOptions(lora_rank=4, lora_targets=["q_proj"]))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 and all("q_proj" in name for name in trained)


def test_adapters_have_no_dropout():
    model = adapt(tiny.build("llama"), LoraOptions(lora_rank=4)).train()
    moved(model)
    assert torch.equal(logits(model), logits(model))


def test_a_continued_adapter_leaves_the_dropout_it_was_trained_with_behind(tmp_path):
    torch.manual_seed(2)
    config = LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(tiny.build("llama"), config).save_pretrained(tmp_path)
    model = adapt(tiny.build("llama"), LoraOptions(), tmp_path)
    for _ in range(2):
        assert torch.equal(logits(model), logits(model))
        with at_start(model):
            assert torch.equal(logits(model), logits(model))
        model.train()


def test_a_continued_adapter_goes_on_from_its_weights_and_its_start_is_frozen(tmp_path):
    first = adapt(tiny.build("llama"), LoraOptions(lora_rank=4))
    moved(first)
    first.save_pretrained(tmp_path)
    model = adapt(tiny.build("llama"), LoraOptions(), tmp_path)
    assert torch.equal(logits(model), logits(first))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * 2 and not any(START in name for name in trained)


def test_at_start_is_the_base_model_for_a_new_adapter_and_the_start_for_a_continued_one(tmp_path):
    base = tiny.build("llama")
    wanted = logits(base)
    new = adapt(base, LoraOptions(lora_rank=4))
    moved(new)
    with at_start(new):
        assert torch.equal(logits(new), wanted)
    assert not torch.equal(logits(new), wanted)
    new.save_pretrained(tmp_path)
    continued = adapt(tiny.build("llama"), LoraOptions(), tmp_path)
    start = logits(continued)
    with torch.no_grad():
        for name, weight in continued.named_parameters():
            if "lora_B.default" in name:
                weight.zero_()
    with at_start(continued):
        assert torch.equal(logits(continued), start)
    assert torch.equal(logits(continued), wanted)  # its own lora_B is zero now


def test_at_start_goes_back_to_the_trained_adapter_after_an_error(tmp_path):
    first = adapt(tiny.build("llama"), LoraOptions(lora_rank=4))
    moved(first)
    first.save_pretrained(tmp_path)
    for model in (first, adapt(tiny.build("llama"), LoraOptions(), tmp_path)):
        before = logits(model)
        with pytest.raises(KeyError), at_start(model):
            raise KeyError
        assert torch.equal(logits(model), before)
        assert any(p.requires_grad for p in model.parameters())


def test_a_model_without_adapters_is_its_own_start():
    model = tiny.build("llama")
    with at_start(model):
        pass


def test_what_is_saved_loads_in_plain_peft(tmp_path):
    first = adapt(tiny.build("llama"), LoraOptions(lora_rank=4))
    moved(first)
    first.save_pretrained(tmp_path)
    continued = adapt(tiny.build("llama"), LoraOptions(), tmp_path)
    continued.save_pretrained(tmp_path / "again", selected_adapters=["default"])
    plain = PeftModel.from_pretrained(tiny.build("llama"), tmp_path / "again")
    assert torch.equal(logits(plain), logits(first))


def test_four_bit_weights_without_an_adapter_are_refused():
    model = tiny.build("llama")
    model.is_quantized = True
    with pytest.raises(InputError, match="add lora_rank"):
        adapt(model, LoraOptions())
