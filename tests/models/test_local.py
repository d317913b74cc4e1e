from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from prefopt.batch import Batch
from prefopt.models import decode
from prefopt.models.policy import Policy
from prefopt.models.sampler import Local, bytes_held, held, positions, unreached
from prefopt.models.sampling import Completion, Sampling
from prefopt.records import Example

VOCABULARY = 300  # more than one block of the draws
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = {"head_dim": 8, "sliding_window": 5}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
# what reaches the attention function differs: nothing, windows, soft caps, sinks, values narrower than keys
SHARED: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "gemma2": SLIDING,
    "gpt_oss": {**SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {**MLA, **EXPERTS, "num_key_value_heads": 4},
    "opt": {"word_embed_proj_dim": 16},
}
ENDS = list(range(3, 43))


def tiny(kind: str = "llama", **changes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **SHARED.get(kind, {}), **changes})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.3)
    return model


def prompts(*sizes: int) -> list[list[int]]:
    token = random.Random(0)
    return [[token.randrange(43, VOCABULARY) for _ in range(size)] for size in sizes]


PROMPTS = prompts(3, 12, 1, 12, 7)


def scored(model: Any, asked: list[list[int]], found: list[list[Completion]], temperature: float) -> torch.Tensor:
    """What ordinary forwards say of the same tokens, laid end to end."""
    rows = [
        Example(prompt, [c.tokens for c in own], [1.0] * len(own), [[True] * len(c.tokens) for c in own])
        for prompt, own in zip(asked, found, strict=True)
    ]
    with torch.no_grad():
        return Policy(model.eval(), "padded", temperature=temperature)(Batch.of(rows)).logp


def laid_out(found: list[list[Completion]]) -> torch.Tensor:
    return torch.tensor([logp for own in found for completion in own for logp in completion.logp])


@pytest.mark.parametrize("kind", SHARED)
def test_log_probs_are_those_of_the_scorer_while_rows_come_and_go(kind):
    model = tiny(kind)
    local = Local(model, ENDS, tokens_per_batch=150)  # a few of the rows at a time
    assert local.reason.startswith("prompts shared")
    found = local.sample(PROMPTS, 3, Sampling(max_tokens=18, temperature=0.8), range(5))
    lengths = {len(c.tokens) for own in found for c in own}
    assert len(lengths) > 4 and max(lengths) == 18  # early ends, and some at the limit
    torch.testing.assert_close(laid_out(found), scored(model, PROMPTS, found, 0.8), atol=1e-5, rtol=0)


def test_log_probs_stay_right_where_columns_are_given_back_and_added(monkeypatch):
    monkeypatch.setattr(decode, "COLUMNS", 4)
    model = tiny("mistral")
    found = Local(model, ENDS, tokens_per_batch=110).sample(PROMPTS[:2], 6, Sampling(max_tokens=20), range(2))
    assert len({len(c.tokens) for own in found for c in own}) > 3
    torch.testing.assert_close(laid_out(found), scored(model, PROMPTS[:2], found, 1.0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("way", ["shared", "generate"])
def test_a_sample_is_the_same_alone_and_in_any_crowd(way):
    model, sampling = tiny(), Sampling(max_tokens=8, top_p=0.9)
    whole = Local(model, ENDS, tokens_per_batch=10_000, way=way).sample(PROMPTS, 3, sampling, range(5))
    for budget in (1, 70):
        assert tokens_of(Local(model, ENDS, tokens_per_batch=budget, way=way), sampling) == [
            [c.tokens for c in own] for own in whole
        ]
    alone = Local(model, ENDS, way=way).sample([PROMPTS[3]], 2, sampling, [3])
    assert [c.tokens for c in alone[0]] == [c.tokens for c in whole[3][:2]]
    torch.testing.assert_close(laid_out(alone), laid_out([whole[3][:2]]), atol=1e-5, rtol=0)


def tokens_of(local: Local, sampling: Sampling) -> list[list[list[int]]]:
    return [[c.tokens for c in own] for own in local.sample(PROMPTS, 3, sampling, range(5))]


@pytest.mark.parametrize("sampling", [Sampling(max_tokens=12, temperature=0.7), Sampling(max_tokens=12, temperature=0)])
def test_generate_draws_the_same_samples(sampling):
    model = tiny("mistral")
    shared, generated = (Local(model, ENDS, way=way).sample(PROMPTS, 3, sampling, range(5)) for way in WAYS)
    assert [[c.tokens for c in own] for own in shared] == [[c.tokens for c in own] for own in generated]
    assert [c.finished for own in shared for c in own] == [c.finished for own in generated for c in own]
    torch.testing.assert_close(laid_out(shared), laid_out(generated), atol=1e-5, rtol=0)


WAYS = ("shared", "generate")


def test_architectures_that_mix_tokens_otherwise_go_through_generate_with_right_log_probs():
    model = tiny("mamba", state_size=4)
    local = Local(model, ENDS)
    assert "generate" in local.reason and "layers mix tokens in another way" in local.reason
    found = local.sample(PROMPTS, 2, Sampling(max_tokens=8), range(5))
    torch.testing.assert_close(laid_out(found), scored(model, PROMPTS, found, 1.0), atol=1e-5, rtol=0)


def test_a_window_that_does_not_reach_the_attention_is_noticed_however_short_the_probe():
    config = tiny("mistral").config
    assert unreached([5, 5], config) is None
    assert "sliding window" in str(unreached([None, None], config))
    assert "1 of 2 layers" in str(unreached([5], config))


def test_truncated_log_probs_sum_to_one_over_what_can_be_drawn():
    model = tiny()
    found = Local(model, []).sample(PROMPTS[:1], 400, Sampling(max_tokens=1, top_k=4), [0])
    likelihood = {c.tokens[0]: c.logp[0] for c in found[0]}
    assert len(likelihood) == 4
    assert math.isclose(sum(map(math.exp, likelihood.values())), 1.0, abs_tol=1e-6)


def test_seeds_are_the_prompts_own():
    local, sampling = Local(tiny(), ENDS), Sampling(max_tokens=9)
    same = [PROMPTS[0], PROMPTS[0]]
    first, second = local.sample(same, 2, sampling, [4, 5])
    assert first[0].tokens != first[1].tokens and first != second
    assert [c.tokens for c in local.sample(same, 2, sampling, [5, 4])[1]] == [c.tokens for c in first]


class Letters:
    """A tokenizer whose every token is one letter, a to z over and over."""

    def decode(self, tokens: list[int], **options: Any) -> str:
        return "".join(chr(ord("a") + token % 26) for token in tokens)


@pytest.mark.parametrize("way", WAYS)
def test_a_stop_text_ends_a_completion_and_stays_in_it(way):
    local = Local(tiny(), [], Letters(), way=way)
    plain = local.sample(PROMPTS, 4, Sampling(max_tokens=25), range(5))
    text = local.tokenizer.decode(plain[1][2].tokens)
    stop = text[10:13]
    stopped = local.sample(PROMPTS, 4, Sampling(max_tokens=25, stop=("ABC", stop)), range(5))
    for before, after in zip(plain, stopped, strict=True):
        for free, cut in zip(before, after, strict=True):
            whole = local.tokenizer.decode(free.tokens)
            end = whole.find(stop) + 3 if stop in whole else 25
            assert cut.tokens == free.tokens[:end] and cut.finished == (stop in whole)
            torch.testing.assert_close(cut.logp, free.logp[:end], atol=1e-5, rtol=0)
    assert len(stopped[1][2].tokens) <= 13


def test_a_stop_text_that_begins_in_the_prompt_does_not_count():
    model = tiny()
    local = Local(model, [], Letters())
    (free,) = local.sample(PROMPTS[:1], 1, Sampling(max_tokens=10), [0])[0]
    letters = local.tokenizer.decode(PROMPTS[0])[-1] + local.tokenizer.decode(free.tokens)
    (cut,) = local.sample(PROMPTS[:1], 1, Sampling(max_tokens=10, stop=(letters[:3],)), [0])[0]
    assert cut.tokens == free.tokens or letters[:3] in letters[1:]
    assert len(cut.tokens) > 2


def test_stop_texts_without_a_tokenizer_are_refused():
    with pytest.raises(ValueError, match="tokenizer"):
        Local(tiny(), []).sample(PROMPTS, 1, Sampling(stop=("x",)), range(5))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_prompt_and_completion_fit_the_models_positions(kind, way):
    limited = {"n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2} if kind == "gpt2" else {}
    model = tiny(kind, max_position_embeddings=16, **limited)
    assert positions(model) == 16
    found = Local(model, [], way=way).sample(PROMPTS, 2, Sampling(max_tokens=9), range(5))
    assert [len(own[0].tokens) for own in found] == [9, 4, 9, 4, 9]
    torch.testing.assert_close(laid_out(found), scored(model, PROMPTS, found, 1.0), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="prompt 1 has 16 tokens and the model 16 positions"):
        Local(model, [], way=way).sample([[20], [20] * 16], 1, Sampling(max_tokens=1), [0, 1])


def test_seeds_must_be_one_for_each_prompt():
    with pytest.raises(ValueError, match="2 seeds for 5 prompts"):
        Local(tiny(), []).sample(PROMPTS, 1, Sampling(), [0, 1])


def test_in_bfloat16_log_probs_are_the_scorers_up_to_its_rounding():
    model = tiny().bfloat16()
    found = Local(model, ENDS).sample(PROMPTS, 6, Sampling(max_tokens=20), range(5))
    gap = (laid_out(found) - scored(model, PROMPTS, found, 1.0)).abs()
    assert gap.mean() < 0.03 and gap.max() < 0.3


def test_a_model_in_training_with_gradient_checkpointing_samples_and_trains_on():
    model = tiny()
    wanted = Local(model.eval(), ENDS).sample(PROMPTS, 2, Sampling(max_tokens=8), range(5))
    model.train()
    model.gradient_checkpointing_enable()
    assert Local(model, ENDS).sample(PROMPTS, 2, Sampling(max_tokens=8), range(5)) == wanted
    assert model.training and all(module.training for module in model.modules())
    model(input_ids=torch.tensor(PROMPTS[:1]), labels=torch.tensor(PROMPTS[:1])).loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_a_failure_leaves_the_model_as_it_was():
    model = tiny()
    local, before = Local(model.train(), ENDS), model.config._attn_implementation
    with pytest.raises(IndexError):
        local.sample([[VOCABULARY + 5]], 1, Sampling(max_tokens=2), [0])
    assert model.training and model.config._attn_implementation == before


def test_when_memory_runs_out_fewer_rows_are_held_and_the_samples_are_the_same(monkeypatch):
    model, sampling = tiny(), Sampling(max_tokens=5)
    local = Local(model, ENDS, tokens_per_batch=1000)
    wanted = tokens_of(local, sampling)
    step, rows = decode.Decoder.step, []

    def short_of_memory(self: Any, tokens: torch.Tensor) -> torch.Tensor:
        rows.append(len(tokens))
        if len(tokens) > 6:
            raise torch.OutOfMemoryError("no memory left")
        return step(self, tokens)

    monkeypatch.setattr(decode.Decoder, "step", short_of_memory)
    assert tokens_of(local, sampling) == wanted
    assert max(rows) > 6 >= rows[-1]


def test_what_a_token_needs_is_read_from_the_configuration():
    model = tiny()
    # 2 layers, keys and values, 2 heads of 4 numbers, 4 bytes each
    assert bytes_held(model) == 2 * 2 * 2 * 4 * 4
    assert held(model) == 16_384


def test_compaction_fills_holes_from_the_end():
    assert decode.compacted([True, False, True, False, True]) == [0, 4, 2]
    assert decode.compacted([False, False]) == []
