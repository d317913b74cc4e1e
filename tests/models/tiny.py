"""Tiny random models of many families, and ragged batches, all built in code."""

from __future__ import annotations

import random
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from prefopt.batch import Batch
from prefopt.records import Example

VOCABULARY = 96
WINDOW = 5  # shorter than every sequence, so that a window that is not applied shows

BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"head_dim": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# two layers of windowed attention and two of full attention where a family alternates
WINDOWED = {"head_dim": 8, "num_hidden_layers": 4, "sliding_window": WINDOW}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2}
PACKED: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": WINDOWED,
    # soft caps small enough to bend the scores of a tiny model
    "gemma2": {
        **WINDOWED,
        **ALTERNATING,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {**WINDOWED, **ALTERNATING, "query_pre_attn_scalar": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {},
    "phi3": {"sliding_window": WINDOW},
    "olmo2": {},
    "qwen3_moe": {**EXPERTS, "num_experts": 4},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layer_interval": 2},
    "gpt_oss": {**WINDOWED, **ALTERNATING, "num_local_experts": 4, "num_experts_per_tok": 2},
    "cohere2": {**WINDOWED, **ALTERNATING, "logit_scale": 0.5},
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.4, "embedding_multiplier": 2.0},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_group": 1,
        "topk_group": 1,
    },
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48},
}
NOT_PACKED: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 8},
    "qwen3_next": {**EXPERTS, "num_experts": 4, "layer_types": ["linear_attention", "full_attention"]},
    "lfm2": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "bloom": {"n_layer": 2, "n_head": 4},
}


def build(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model whose matrices have standard deviation 0.2 (not the usual 0.02), so that wrong attention shows."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**BASE, **{**PACKED, **NOT_PACKED}[family], **changes})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim >= 2:
                weight.normal_(0, 0.2)
            else:
                weight.add_(0.1 * torch.randn_like(weight))
    return model.to(dtype).eval()


def examples(shape: list[tuple[int, list[int]]], seed: int = 0, first_token: int = 3) -> list[Example]:
    """Random examples: for each prompt its length and the lengths of its completions. Better and worse alternate."""
    draw = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(first_token, VOCABULARY) for _ in range(count)]

    rows = []
    for g, (prompt, completions) in enumerate(shape):
        answers = [tokens(length) for length in completions]
        scores = [float((g + n) % 2) for n in range(len(completions))]
        rows.append(Example(tokens(prompt), answers, scores, [[True] * len(a) for a in answers], f"row {g}"))
    return rows


def pairs() -> Batch:
    """Three prompts of one to nine tokens with two completions each; the worse one comes first in two of them."""
    return Batch.of(examples([(7, [5, 9]), (1, [3, 1]), (9, [2, 8])]))


def family() -> Batch:
    """Ragged in every way: one, two and four completions per prompt, prompts and completions of one token."""
    return Batch.of(examples([(4, [6]), (8, [1, 5, 3, 7]), (1, [2, 4])], seed=1))
