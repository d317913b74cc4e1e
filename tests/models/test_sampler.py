from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from prefopt.models import attention
from prefopt.models.sampler import sample

# more words than the 50 that transformers keeps when not told otherwise
VOCABULARY, END = 80, 3
PROMPTS = [[5, 6, 7], [4], [8, 9, 10, 11, 5, 6, 7], [6, 6]]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


def next_token(model: torch.nn.Module, prompt: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)


def greedy_by_hand(model: torch.nn.Module, prompt: list[int], max_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(int(next_token(model, tokens).argmax()))
        if tokens[-1] == END:
            break
    return tokens[len(prompt) :]


@pytest.mark.parametrize("budget", [1, 25, 10_000])
def test_greedy_gives_the_likeliest_tokens_of_ordinary_forwards_whatever_the_batches(budget):
    model = llama().eval()
    wanted = [[greedy_by_hand(model, p, 9)] * 2 for p in PROMPTS]
    got = sample(model, PROMPTS, n=2, max_tokens=9, temperature=0, eos_ids=[END], seed=0, tokens_per_batch=budget)
    assert got == wanted


def test_completions_end_with_the_first_end_token_or_at_the_limit():
    rows = sample(llama(), PROMPTS, n=50, max_tokens=6, eos_ids=[END, 4], seed=1)
    assert [len(completions) for completions in rows] == [50] * 4
    flat = [tokens for completions in rows for tokens in completions]
    assert all(not {END, 4} & set(tokens[:-1]) for tokens in flat)
    assert all(tokens[-1] in (END, 4) or len(tokens) == 6 for tokens in flat)
    assert {tokens[-1] in (END, 4) for tokens in flat} == {True, False}


def test_without_end_tokens_every_completion_has_the_full_length():
    rows = sample(llama(), PROMPTS, n=5, max_tokens=6, eos_ids=[], seed=1)
    assert {len(tokens) for completions in rows for tokens in completions} == {6}


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6)])
def test_first_tokens_are_drawn_from_the_models_distribution(temperature, top_p):
    model = llama().eval()
    # defaults a model may bring along: none of them may change what is drawn
    model.generation_config.top_k, model.generation_config.repetition_penalty = 2, 5.0
    draws = 4000
    got = sample(model, PROMPTS[:2], n=draws, max_tokens=1, temperature=temperature, top_p=top_p, eos_ids=[END], seed=3)
    for prompt, completions in zip(PROMPTS, got, strict=False):
        p = next_token(model, prompt).pow(1 / temperature)
        p = p / p.sum()
        value, order = p.sort(descending=True)
        p[order[value.cumsum(0) - value >= top_p]] = 0  # the fewest likeliest tokens that reach top_p
        p = p / p.sum()
        counts = torch.bincount(torch.tensor(completions)[:, 0], minlength=VOCABULARY) / draws
        error = (p * (1 - p) / draws).sqrt()
        # 3 / draws: a rare token drawn a few times is no sign of another distribution
        assert ((counts - p).abs() <= 4.5 * error + 3 / draws).all()
    assert model.generation_config.top_k == 2


def test_a_seed_fixes_the_samples_and_the_callers_random_numbers_go_on_undisturbed():
    model = llama()
    torch.manual_seed(11)
    undisturbed = torch.rand(3)
    torch.manual_seed(11)
    options = {"n": 3, "max_tokens": 8, "eos_ids": [END]}
    first = sample(model, PROMPTS, seed=5, **options)
    assert torch.equal(torch.rand(3), undisturbed)
    assert sample(model, PROMPTS, seed=5, **options) == first
    assert sample(model, PROMPTS, seed=6, **options) != first


def test_mode_and_attention_are_put_back_and_dropout_is_off_meanwhile():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.5)
    )
    model.train()
    model.transformer.h[0].eval()
    with torch.no_grad():
        wanted = [[greedy_by_hand(model.eval(), p, 5)] for p in PROMPTS]
    model.train()
    model.transformer.h[0].eval()
    model.config._attn_implementation = attention.NAME
    assert sample(model, PROMPTS, max_tokens=5, temperature=0, eos_ids=[END], seed=0) == wanted
    assert model.config._attn_implementation == attention.NAME
    assert model.training and model.transformer.h[1].training and not model.transformer.h[0].training


def test_an_adapter_takes_part():
    from peft import LoraConfig, get_peft_model

    model = llama().eval()
    plain = sample(model, PROMPTS, max_tokens=8, temperature=0, eos_ids=[END], seed=0)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=True)).eval()
    assert sample(wrapped, PROMPTS, max_tokens=8, temperature=0, eos_ids=[END], seed=0) == plain
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    adapted = sample(wrapped, PROMPTS, max_tokens=8, temperature=0, eos_ids=[END], seed=0)
    assert adapted == [[greedy_by_hand(wrapped, p, 8)] for p in PROMPTS]
    assert adapted != plain


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [[1], []]}, "prompt 1 has no tokens"),
        ({"n": 0}, "n must be at least 1"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
    ],
)
def test_options_out_of_range_are_named(change, message):
    options = {"prompts": PROMPTS, "max_tokens": 4, "eos_ids": [END], "seed": 0, **change}
    with pytest.raises(ValueError, match=message):
        sample(llama(), **options)
