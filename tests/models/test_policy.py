from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from prefopt.batch import Batch
from prefopt.models import attention
from prefopt.models.load import load
from prefopt.models.policy import Policy, ValueHead, choose
from prefopt.records import Example

LAYOUTS = ["tree", "padded"]
STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260K"


def completion_states(model: torch.nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Per completion token, from rows run one by one: the final hidden state before it and at it [K, D], and the
    log-softmax it was drawn from [K, V].
    """
    prompts, before, at, logp = batch.prompts.rows(), [], [], []
    for g, completion in zip(batch.group.tolist(), batch.completions.rows(), strict=True):
        ids = torch.cat([prompts[g], completion])[None]
        hidden = model.base_model(input_ids=ids, use_cache=False)[0][0]
        logits = model(input_ids=ids, use_cache=False).logits[0]
        first = len(prompts[g])
        before.append(hidden[first - 1 : -1])
        at.append(hidden[first:])
        logp.append(torch.log_softmax(logits[first - 1 : -1].float(), -1))
    return torch.cat(before), torch.cat(at), torch.cat(logp)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("at", ["before", "token"])
def test_the_value_is_read_at_the_position_it_names(at, layout):
    model, batch = tiny.build("llama"), tiny.family()
    value = ValueHead(32, at=at)
    with torch.no_grad():
        value.linear.bias.fill_(0.7)
        before, token, _ = completion_states(model, batch)
        wanted = (before if at == "before" else token) @ value.linear.weight[0] + 0.7
        out = Policy(model, layout, value=value)(batch)
    assert out.value.shape == batch.trained.shape
    torch.testing.assert_close(out.value, wanted, atol=1e-5, rtol=1e-5)


def test_the_value_head_learns_and_so_does_the_body_behind_it():
    policy = Policy(tiny.build("llama"), value=ValueHead(32))
    policy(tiny.family()).value.sum().backward()
    assert policy.value.linear.weight.grad.any()
    assert policy.model.model.layers[0].mlp.up_proj.weight.grad.any()


def test_a_policy_with_a_value_head_can_be_probed():
    policy = Policy(tiny.build("llama"), value=ValueHead(32))
    assert choose(policy).layout == "tree"
    assert policy(tiny.family()).value is not None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_entropy_is_that_of_the_distribution_each_token_was_drawn_from(family, layout):
    model, batch = tiny.build(family), tiny.family()
    with torch.no_grad():
        _, _, logp = completion_states(model, batch)
        out = Policy(model, layout, entropy=True)(batch)
    torch.testing.assert_close(out.entropy, -(logp.exp() * logp).sum(-1), atol=1e-5, rtol=1e-5)
    chosen = logp.gather(1, batch.completions.values[:, None])[:, 0]
    torch.testing.assert_close(out.logp, chosen, atol=1e-5, rtol=1e-5)


def test_full_logits_and_the_chunked_head_agree():
    policy, batch = Policy(tiny.build("gemma2"), entropy=True), tiny.family()
    with torch.no_grad():
        chunked = policy(batch)
        policy.fused_head = False
        full = policy(batch)
    torch.testing.assert_close(chunked.logp, full.logp, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(chunked.entropy, full.entropy, atol=1e-5, rtol=1e-5)


def test_entropy_and_value_are_none_unless_asked_for():
    out = Policy(tiny.build("llama"))(tiny.family())
    assert out.entropy is None and out.value is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_untrained_tokens_are_scored_like_any_other_and_get_no_gradient_through_sums(layout):
    rows = tiny.examples([(4, [6, 3])])
    rows[0].trained[0][2:5] = [False] * 3
    some, whole = Batch.of(rows), Batch.of(tiny.examples([(4, [6, 3])]))
    policy = Policy(tiny.build("llama"), layout)
    out = policy(some).logp
    assert torch.equal(out, policy(whole).logp)
    out.retain_grad()
    some.sum_tokens(out).sum().backward()
    assert out.grad.tolist() == [1, 1, 0, 0, 0, 1, 1, 1, 1]


def test_log_probs_do_not_depend_on_what_else_is_in_the_batch():
    policy, batch = Policy(tiny.build("llama")), tiny.family()
    with torch.no_grad():
        whole = policy(batch).logp
        alone = torch.cat([policy(batch.take(g, g + 1)).logp for g in range(batch.num_prompts)])
    torch.testing.assert_close(whole, alone, atol=1e-5, rtol=1e-5)


def test_ordinary_gives_the_plain_model_and_puts_the_layout_back():
    model, batch = tiny.build("llama"), tiny.family()
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        policy = Policy(model)
        first = policy(batch).logp
        inside = model.config._attn_implementation
        with policy.ordinary() as plain:
            assert plain is model
            torch.testing.assert_close(plain(input_ids=ids).logits, wanted)
        assert model.config._attn_implementation == inside
        assert torch.equal(policy(batch).logp, first)


def test_ordinary_puts_the_layout_back_after_an_error():
    policy = Policy(tiny.build("llama"))
    policy(tiny.family())
    before = policy.model.config._attn_implementation
    with pytest.raises(KeyError), policy.ordinary():
        raise KeyError
    assert policy.model.config._attn_implementation == before


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_after_a_probe_the_model_is_an_ordinary_one(family):
    model = tiny.build(family)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        choose(Policy(model))
        assert torch.equal(model(input_ids=ids).logits, wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_adapted_model_scores_as_its_merged_weights_do(layout):
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(tiny.build("llama"), config)
    merged = copy.deepcopy(adapted).merge_and_unload()
    batch = tiny.family()
    with torch.no_grad():
        base = Policy(tiny.build("llama"), layout)(batch).logp
        got, wanted = Policy(adapted, layout)(batch).logp, Policy(merged, layout)(batch).logp
    assert (got - base).abs().max() > 0.1  # the adapter is not a no-op
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("targets", ["all-linear", ["lm_head"], ["q_proj", "lm_head"]])
def test_every_adapter_weight_gets_its_gradient_and_no_base_weight_does(targets):
    adapted = get_peft_model(tiny.build("llama"), LoraConfig(r=4, target_modules=targets))
    policy = Policy(adapted)
    choose(policy)
    policy(tiny.family()).logp.sum().backward()
    for name, weight in adapted.named_parameters():
        # lora_A's gradient is zero while lora_B is zero, but it is there
        assert (weight.grad is not None) == ("lora_" in name), name
        assert "lora_B" not in name or weight.grad.any(), name


def test_an_adapter_on_the_head_without_a_probe_is_an_error_and_not_an_untrained_adapter():
    adapted = get_peft_model(tiny.build("llama"), LoraConfig(r=4, target_modules=["lm_head"]))
    with pytest.raises(RuntimeError, match="the head carries an adapter"):
        Policy(adapted)(tiny.family())


def test_a_head_that_is_kept_as_a_trained_copy_is_the_one_that_scores_and_learns():
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    adapted = get_peft_model(tiny.build("llama"), config)
    own = next(w for name, w in adapted.named_parameters() if "modules_to_save" in name)
    policy, batch = Policy(adapted), tiny.family()
    choose(policy)
    before = policy(batch).logp
    before.sum().backward()
    assert own.grad.any()
    with torch.no_grad():
        own.mul_(2)
        assert (policy(batch).logp - before).abs().max() > 0.1


def test_a_tree_asked_for_where_it_does_not_fit_is_refused_with_the_reason():
    with pytest.raises(RuntimeError, match=r"layout: tree is not exact for Qwen3Next.* 1 of 2 layers.*layout: auto"):
        choose(Policy(tiny.build("qwen3_next")), "tree")


def test_the_choice_follows_the_wish_and_says_so():
    policy = Policy(tiny.build("llama"))
    choice = choose(policy, "padded")
    assert policy.layout == choice.layout == "padded" and "as asked" in choice.reason
    choice = choose(policy, "tree")
    assert policy.layout == choice.layout == "tree" and "equal to the padded layout" in choice.reason


def test_a_head_with_a_formula_of_its_own_is_noticed_and_its_own_logits_are_used(monkeypatch):
    model, batch = tiny.build("llama"), tiny.family()
    ordinary = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda hidden: torch.sin(ordinary(hidden)))
    policy = Policy(model)
    choice = choose(policy)
    assert not choice.fused_head and "full logits (log-probs differ by" in choice.reason
    with torch.no_grad():
        _, _, logp = completion_states(model, batch)
        chosen = logp.gather(1, batch.completions.values[:, None])[:, 0]
        torch.testing.assert_close(policy(batch).logp, chosen, atol=1e-5, rtol=1e-5)


def test_an_attention_that_ignores_the_packed_positions_is_noticed():
    """A model that counts its positions itself: every completion but the first would stand in the wrong place."""
    model = tiny.build("llama")
    rotary = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids: rotary(x, torch.arange(x.shape[1])[None])
    choice = choose(Policy(model))
    assert choice.layout == "padded" and "log-probs differ by" in choice.reason


def test_a_batch_of_one_token_prompts_and_completions_is_scored():
    batch = Batch.of([Example([5], [[7]], [1.0], [[True]])])
    model = tiny.build("llama")
    with torch.no_grad():
        wanted = torch.log_softmax(model(input_ids=torch.tensor([[5]])).logits[0, 0], -1)[7]
        for layout in LAYOUTS:
            torch.testing.assert_close(Policy(model, layout)(batch).logp, wanted[None])


@pytest.fixture(scope="module")
def stories():
    """A real model of 260 thousand weights with values published for it."""
    if not (STORIES / "REFERENCE.json").exists():
        pytest.skip(f"{STORIES.name} is not beside this checkout (../shared/models)")
    loaded = load(STORIES)
    return loaded, json.loads((STORIES / "REFERENCE.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_published_log_likelihood_is_reproduced(stories, layout):
    loaded, published = stories
    start, *tokens = loaded.tokenizer(published["nll_sentence"])["input_ids"]
    assert start == loaded.tokenizer.bos_token_id and 1 + len(tokens) == published["nll_tokens"]
    batch = Batch.of([Example([start], [tokens], [1.0], [[True] * len(tokens)])])
    with torch.no_grad():
        nll = -Policy(loaded.model, layout)(batch).logp.sum().item()
    assert nll == pytest.approx(published["nll"], abs=1e-3)
    assert nll == pytest.approx(published["nll_reference_from_bennyz_esp32_llm_eval_golden"], abs=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_published_greedy_story_is_the_likeliest_token_by_token(stories, layout):
    loaded, published = stories
    start, *story = published["greedy_ids"]
    assert len(story) == 64
    policy, size = Policy(loaded.model, layout), loaded.model.config.vocab_size
    batch = Batch.of([Example([start], [story], [1.0], [[True] * 64])])
    with torch.no_grad():
        hidden, before, _ = policy._hidden(batch, layout)
        states = hidden[before].repeat_interleave(size, 0)  # every token of the vocabulary as a candidate
        logp, _, _ = policy.head()(states, torch.arange(size).repeat(64))
        likeliest = logp.view(64, size).argmax(1)
        assert likeliest.tolist() == story
        # and the batch's own log-probs are those of the candidates chosen
        torch.testing.assert_close(policy(batch).logp, logp.view(64, size).max(1).values)
    assert loaded.tokenizer.decode(story).strip() == published["greedy_from_bos_64"].strip()


def test_a_window_that_only_the_mask_knows_of_is_noticed():
    """The probe's rows are shorter than real windows, so the attention must be told of the window, not just agree."""
    policy = Policy(tiny.build("mistral", sliding_window=64))
    assert choose(policy).layout == "tree"
    plain = attention.ALL_ATTENTION_FUNCTIONS[attention.NAME]

    def forgetful(*arguments, sliding_window=None, **settings):
        return plain(*arguments, **settings)

    attention.ALL_ATTENTION_FUNCTIONS.register(attention.NAME, forgetful)
    try:
        assert "window does not reach" in choose(policy).reason and policy.layout == "padded"
    finally:
        attention.ALL_ATTENTION_FUNCTIONS.register(attention.NAME, plain)


def test_a_backward_that_fails_is_noticed_before_training(monkeypatch):
    def no_backward(ctx, *grads):
        raise NotImplementedError("no backward here")

    monkeypatch.setattr(attention._Blocks, "backward", staticmethod(no_backward))
    policy = Policy(tiny.build("llama"))
    assert "backward: NotImplementedError: no backward here" in choose(policy).reason
    assert policy.layout == "padded"
