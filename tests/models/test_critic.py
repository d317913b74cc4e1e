"""A critic beside the policy: where it starts, where its values are read, what trains, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from laws import batch_of, gpt_neox, largest_difference, save_model, weights
from test_policy import completion_states
from transformers import AutoModelForSequenceClassification

from prefopt import preflight
from prefopt.batch import Batch
from prefopt.models.adapters import LoraOptions, adapt
from prefopt.models.critic import ActorCritic, CriticOptions, build, copied, new_value_head, value_model
from prefopt.models.heads import score_layer
from prefopt.models.load import ModelOptions, load
from prefopt.models.policy import Policy, choose
from prefopt.recipes.train import save
from prefopt.records import Example, InputError

EXAMPLE = Example([3, 4], [[5, 6, 7, 8]], [1.0], [[True] * 4])
FAMILIES = ["llama", "gemma2", "gpt2", "gpt_neox", "opt"]


@pytest.fixture(scope="module")
def start(tmp_path_factory: Any) -> Path:
    return save_model(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: Any, start: Path) -> Path:
    """A reward model's directory whose scores are far from 0."""
    loaded = load(start, head="completion")
    with torch.no_grad():
        score_layer(loaded.model).weight.copy_(torch.linspace(-1, 1, 16))
    folder: Path = tmp_path_factory.mktemp("reward")
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


def speaking(critic: Policy) -> Policy:
    """The critic with a last layer that is not 0."""
    layer = score_layer(critic.inner)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-1, 1, layer.weight.shape[1]))
    return critic


def both(policy: Policy) -> ActorCritic:
    return ActorCritic(policy, value_model(copied(policy), policy.layout))


# ---------------------------------------------------------------- where values are read


@pytest.mark.parametrize("layout", ["tree", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_value_is_read_where_its_token_is_predicted(family, layout):
    """From rows run one by one: it knows the prompt and the tokens before, not the token."""
    model, batch = tiny.build(family), tiny.family()
    critic = speaking(value_model(copied(Policy(model, layout)), layout))
    with torch.no_grad():
        before, _, _ = completion_states(model, batch)
        found = critic(batch).value
    torch.testing.assert_close(found, before @ score_layer(critic.inner).weight[0], atol=1e-5, rtol=1e-5)


def test_the_padding_token_within_a_text_moves_no_value():
    """A reward model reads its score before padding; a critic reads every state where it is."""
    model, batch = tiny.build("llama"), tiny.family()
    critic = speaking(value_model(copied(Policy(model))))
    with torch.no_grad():
        wanted = critic(batch).value
        critic.inner.config.pad_token_id = int(batch.completions.values[1])
        again = speaking(value_model(critic.inner))
        torch.testing.assert_close(again(batch).value, wanted)


def test_one_call_says_what_policy_and_critic_say():
    policy = Policy(gpt_neox(0), entropy=True)
    critic = value_model(gpt_neox(1, head="completion"))
    actor, batch = ActorCritic(policy, critic), batch_of("prompts")
    with torch.no_grad():
        for layout in ("tree", "padded"):
            out, alone = actor.score(batch, layout), policy.score(batch, layout)
            assert torch.equal(out.logp, alone.logp) and torch.equal(out.entropy, alone.entropy)
            assert torch.equal(out.value, critic.score(batch, layout).value) and out.value.dtype == torch.float64
        assert torch.equal(actor(batch).value, critic(batch).value)


def test_each_keeps_its_own_layout():
    policy, critic = Policy(gpt_neox(0), "tree"), value_model(gpt_neox(1, head="completion"), "padded")
    actor = ActorCritic(policy, critic)
    assert (actor.layout, actor.critic.layout) == ("tree", "padded")
    assert actor.repeats and not both(policy).repeats


# ---------------------------------------------------------------- where a critic starts


@pytest.mark.parametrize("family", FAMILIES)
def test_a_critic_of_the_policys_weights_says_zero_and_shares_none_of_them(family):
    model, batch = tiny.build(family), tiny.pairs()
    before = weights(model)
    actor = both(Policy(model))
    out = actor(batch)
    assert (out.value == 0).all()
    (out.value - 1).square().sum().backward()
    torch.optim.SGD(actor.model.parameters(), lr=0.1).step()
    assert largest_difference(before, weights(model)) == 0  # the policy did not move with its critic
    with torch.no_grad():
        assert (actor(batch).value != 0).all()


def test_an_adapted_policy_gives_its_critic_merged_weights():
    model = adapt(gpt_neox(0, torch.float32), LoraOptions(lora_rank=2))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.1)
    policy, batch = Policy(model), batch_of("prompts", num=3)
    critic = speaking(value_model(copied(policy)))
    with torch.no_grad():
        hidden, before, _ = policy._hidden(batch, "tree")
        torch.testing.assert_close(
            critic(batch).value, hidden[before] @ score_layer(critic.inner).weight[0], atol=1e-5, rtol=1e-5
        )
    assert all(p.requires_grad for p in critic.model.parameters())
    assert "lora" not in "".join(name for name, _ in critic.inner.named_parameters())


def test_a_reward_models_score_is_the_value_after_the_last_token(start, reward_model):
    """The critic reads the same layer; one token further on it would say the reward model's score."""
    policy = loaded_policy(start)
    built = build(policy, CriticOptions(critic_model=str(reward_model)), ModelOptions(), load(start).tokenizer)
    whole = AutoModelForSequenceClassification.from_pretrained(reward_model)
    with torch.no_grad():
        states = whole.base_model(input_ids=torch.tensor([[*EXAMPLE.prompt, *EXAMPLE.completions[0]]]))[0][0]
        wanted = whole.score(states)[len(EXAMPLE.prompt) - 1 : -1, 0]
        found = built.actor(Batch.of([EXAMPLE])).value
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert found.abs().min() > 1e-3
    assert str(reward_model) in built.words and built.tokenizer.pad_token_id == whole.config.pad_token_id


def loaded_policy(start: Path) -> Policy:
    policy = Policy(load(start).model)
    choose(policy)
    return policy


def test_a_saved_critic_is_a_reward_models_directory_that_a_later_run_starts_from(start, tmp_path):
    policy, tokenizer = loaded_policy(start), load(start).tokenizer
    built = build(policy, CriticOptions(), ModelOptions(), tokenizer)
    assert "the policy's weights" in built.words
    speaking(built.actor.critic)
    folder = save(built.actor.critic, built.tokenizer, tmp_path / "critic")
    again = build(policy, CriticOptions(critic_model=str(folder)), ModelOptions(), tokenizer)
    batch = Batch.of([EXAMPLE])
    with torch.no_grad():
        torch.testing.assert_close(again.actor(batch).value, built.actor(batch).value)


# ---------------------------------------------------------------- a shared trunk


def test_a_shared_trunk_says_zero_and_its_loss_moves_the_policy():
    policy, batch = loaded_of("llama"), tiny.pairs()
    built = build(policy, CriticOptions(critic="shared"), ModelOptions(), None)
    actor = built.actor
    assert actor.critic is None and built.tokenizer is None and not actor.repeats
    out = actor(batch)
    assert (out.value == 0).all()
    with torch.no_grad():
        policy.value.linear.weight.fill_(0.3)
    (actor(batch).value - 1).square().sum().backward()
    named = dict(actor.model.named_parameters())
    assert {id(p) for p in policy.model.parameters()} < {id(p) for p in named.values()}
    assert policy.value.linear.weight.grad.any() and policy.model.model.layers[0].mlp.up_proj.weight.grad.any()


def loaded_of(family: str, dtype: torch.dtype = torch.float32) -> Policy:
    policy = Policy(tiny.build(family, dtype))
    choose(policy)
    return policy


def test_values_are_float32_where_weights_have_16_bits():
    policy = loaded_of("llama", torch.bfloat16)
    policy.value = new_value_head(policy)
    shared, own = ActorCritic(policy), both(loaded_of("llama", torch.bfloat16))
    for actor in (shared, own):
        assert actor(tiny.pairs()).value.dtype == torch.float32


# ---------------------------------------------------------------- with the rest of a run


def test_preflight_checks_it_as_it_checks_a_policy():
    actor = both(loaded_of("llama"))
    assert len(preflight.check_policy(actor, tiny.pairs())) == 2


def test_the_language_model_is_what_is_sampled_from_and_saved(start, tmp_path):
    actor = both(loaded_policy(start))
    with actor.ordinary() as model:
        assert model is actor.policy.model
    assert actor.device == actor.policy.device and actor.temperature == 1.0
    assert (actor.inner, actor.backbone, actor.scorer) == (actor.policy.inner, actor.policy.backbone, None)


# ---------------------------------------------------------------- what is refused


def refused(options: CriticOptions, policy: Policy, tokenizer: Any = None) -> str:
    with pytest.raises(InputError) as caught:
        build(policy, options, ModelOptions(), tokenizer)
    return str(caught.value)


def test_a_language_model_is_no_reward_model_to_start_from(start):
    found = refused(CriticOptions(critic_model=str(start)), loaded_policy(start), load(start).tokenizer)
    assert "causal language model and a reward model is wanted" in found and "prefopt train reward" in found


def test_a_reward_model_with_other_tokens_is_refused(start, reward_model):
    tokenizer = load(start).tokenizer
    tokenizer.add_tokens(["novel"])
    found = refused(CriticOptions(critic_model=str(reward_model)), loaded_policy(start), tokenizer)
    assert "'novel'" in found and "same family" in found


def test_a_family_without_a_classifier_is_told_to_share(start):
    assert "use critic: shared" in refused(CriticOptions(), loaded_of("cohere2"))


def test_hidden_states_that_do_not_lead_to_log_probs_cannot_be_shared():
    policy = loaded_of("llama")
    policy.fused_head = False
    assert "use critic: own" in refused(CriticOptions(critic="shared"), policy)


def test_a_shared_critic_starts_from_no_other_model():
    with pytest.raises(ValueError, match="critic_model is what a critic of its own starts from"):
        CriticOptions(critic="shared", critic_model="runs/reward/model")


def test_a_model_without_a_score_is_no_critic():
    with pytest.raises(ValueError, match="gives one score"):
        value_model(gpt_neox(0))
    with pytest.raises(ValueError, match="gives one score"):
        value_model(gpt_neox(0, head="steps"))


def test_a_policy_has_one_critic():
    policy = Policy(gpt_neox(0))
    with pytest.raises(ValueError, match="either a critic or a value head"):
        ActorCritic(policy)
    critic = value_model(copied(policy))
    policy.value = new_value_head(policy)
    with pytest.raises(ValueError, match="either a critic or a value head"):
        ActorCritic(policy, critic)
