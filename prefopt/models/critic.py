"""A policy with a critic: one call gives log-probs and, before each token, the reward that is to be expected.

The value of a token is read where the token is predicted, from the prompt and the tokens before it; it knows nothing
of the token itself. A reward model's score is read at a completion's last token; a critic that starts from one reads
the same layer one position earlier, and at every token, where it was not trained: near a text's end its values are
good from the start, further away they are learnt.

Letters: K completion tokens, D hidden width.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from prefopt.batch import Batch, Outputs
from prefopt.models.adapters import LoraOptions, adapt, is_adapted
from prefopt.models.heads import IN_WORDS, LAYERS, ScoreHead, fresh, score_layer
from prefopt.models.load import ModelOptions, head_of, load
from prefopt.models.policy import Layout, Policy, ValueHead, choose
from prefopt.records import InputError


@dataclass(frozen=True)
class CriticOptions:
    """The critic that learns which reward is to be expected."""

    # own: a model of its own, twice the memory of training; shared: one more layer on the policy's hidden states,
    # nearly free, but its loss moves the policy's weights too
    critic: Literal["own", "shared"] = "own"
    # reward model that an own critic starts from (directory or hub name), best the one that gives the reward; None: the
    # policy's weights and a new last layer that says 0
    critic_model: str | None = None

    def __post_init__(self) -> None:
        if self.critic == "shared" and self.critic_model is not None:
            raise ValueError("critic_model is what a critic of its own starts from; leave it out, or use critic: own")


@dataclass(frozen=True)
class StateHead:
    """A score head that is read before each token, at the position that predicts it."""

    head: ScoreHead

    def __call__(self, hidden: Tensor) -> Tensor:
        """[K, D] -> [K] float32 or wider."""
        return self.head(hidden)

    def place(self, token: Tensor, before: Tensor, at: Tensor) -> Tensor:
        """Where each token's value is read, [K]."""
        return before


class ActorCritic:
    """A policy and a critic as one callable, `batch -> Outputs(logp, entropy, value)`, with what the loop and preflight
    use of a `Policy`.

    critic: a classifier that `value_model` made, or None where the policy has a `ValueHead` of its own (a shared
    trunk). model: a module of both, for the optimiser. Saving, sampling and references take `policy`.
    """

    scorer = None  # log-probs are what it says of a token first

    def __init__(self, policy: Policy, critic: Policy | None = None) -> None:
        if (critic is None) == (policy.value is None):
            raise ValueError("a policy needs either a critic or a value head of its own, and has both or neither")
        self.policy, self.critic = policy, critic
        values: Any = policy.value if critic is None else critic.model
        self.model = nn.ModuleList([policy.model, values])

    def __call__(self, batch: Batch) -> Outputs:
        return self._with_values(self.policy(batch), None if self.critic is None else self.critic(batch))

    def score(self, batch: Batch, layout: Layout) -> Outputs:
        """`Outputs` through a given layout."""
        values = None if self.critic is None else self.critic.score(batch, layout)
        return self._with_values(self.policy.score(batch, layout), values)

    @staticmethod
    def _with_values(out: Outputs, values: Outputs | None) -> Outputs:
        return out if values is None else out._replace(value=values.value)

    @property
    def layout(self) -> Layout:
        """Of the policy; an own critic has one of its own."""
        return self.policy.layout

    @property
    def repeats(self) -> bool:
        """Whether a forward pass computes a prompt anew for each completion: a token budget must count them all."""
        return "padded" in (self.policy.layout, self.policy.layout if self.critic is None else self.critic.layout)

    @property
    def device(self) -> torch.device:
        return self.policy.device

    @property
    def inner(self) -> Any:
        return self.policy.inner

    @property
    def backbone(self) -> Any:
        return self.policy.backbone

    @property
    def temperature(self) -> float:
        return self.policy.temperature

    def ordinary(self) -> AbstractContextManager[Any]:
        """The language model with its ordinary attention, for generation and saving."""
        return self.policy.ordinary()


class Built(NamedTuple):
    """tokenizer: to be saved with an own critic, whose directory is that of a reward model. words: for the log."""

    actor: ActorCritic
    tokenizer: Any
    words: str


def build(policy: Policy, options: CriticOptions, how: ModelOptions, tokenizer: Any) -> Built:
    """The policy, its layout chosen, with the critic that was asked for.

    how: precision and layout of an own critic. tokenizer: the policy's. InputError for a critic_model that is no reward
    model or has other tokens, and for policies that no critic can be made of.
    """
    if options.critic == "shared":
        policy.value = new_value_head(policy)
        return Built(ActorCritic(policy), None, "critic: a layer on the policy's hidden states, which says 0 at first")
    if options.critic_model is None:
        # the policy's layout was probed with the same body; a layer that says 0 of everything would pass any probe
        critic, layout = value_model(copied(policy), policy.layout), "in the policy's layout"
        origin = "the policy's weights, which says 0 at first"
    else:
        classifier, tokenizer = _loaded(options.critic_model, how, policy, tokenizer)
        critic, origin = value_model(classifier), options.critic_model
        layout = choose(critic, how.layout).reason
    size = sum(p.numel() for p in critic.model.parameters())
    return Built(ActorCritic(policy, critic), tokenizer, f"critic: {size:,} parameters from {origin}; {layout}")


def value_model(classifier: Any, layout: Layout = "tree") -> Policy:
    """A sequence classifier with one label, in memory, whose score is read before each token as `Outputs.value`.

    All of its weights are trained, in place. ValueError for a model that has no such score.
    """
    policy = Policy(classifier.requires_grad_(True), layout)
    if policy.scorer is None or len(policy.scorer.layer.weight) != 1:
        name = type(classifier).__name__
        raise ValueError(f"{name} has no layer that gives one score; give a {IN_WORDS['completion']}")
    policy.scorer = StateHead(policy.scorer)  # type: ignore[assignment]
    return policy


def new_value_head(policy: Policy) -> ValueHead:
    """A layer on the policy's hidden states that says 0 of every state, float32 or wider.

    InputError for a model whose hidden states do not lead to its log-probs by one layer.
    """
    if not policy.fused_head:
        name = type(policy.inner).__name__
        raise InputError(f"critic: shared cannot read the hidden states of {name}; use critic: own")
    weight = policy.inner.get_output_embeddings().weight  # [V, D]
    head = ValueHead(weight.shape[1], "before", torch.promote_types(weight.dtype, torch.float32))
    nn.init.zeros_(head.linear.weight)
    return head.to(policy.device)


def copied(policy: Policy) -> Any:
    """A classifier with a copy of the policy's weights, adapters merged, and a new last layer that says 0.

    InputError where transformers has no classifier of this architecture, and for 4-bit weights.
    """
    if getattr(policy.inner, "is_quantized", False):
        raise InputError("critic: own cannot start from 4-bit weights; give critic_model, or use critic: shared")
    whole = copy.deepcopy(policy.model)
    if is_adapted(whole):
        whole = whole.merge_and_unload()
    whole.config._attn_implementation = policy.plain_attention
    return _classifier(whole)


def _classifier(model: Any) -> Any:
    """A classifier that takes over the body of a language model, with a new last layer that says 0."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    classes: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    settings = copy.deepcopy(model.config)
    settings.num_labels = 1
    if type(settings) not in classes:
        raise InputError(
            f"critic: transformers has no class ...ForSequenceClassification for {settings.model_type} models; use "
            "critic: shared"
        )
    with torch.device("meta"):  # its own body is thrown away, so it is never filled
        found = classes[type(settings)](settings)
    setattr(found, found.base_model_prefix, model.base_model)
    name = next(name for name in LAYERS if getattr(found, name, None) is score_layer(found))
    body = next(p for p in model.base_model.parameters() if p.is_floating_point())
    setattr(found, name, score_layer(found).to_empty(device=body.device).to(body.dtype))
    fresh(found, "completion")
    nn.init.zeros_(score_layer(found).weight)
    return found.train(model.training)


def _loaded(source: str, how: ModelOptions, policy: Policy, tokenizer: Any) -> tuple[Any, Any]:
    """A reward model, adapters merged, on the policy's device, and its tokenizer."""
    found = head_of(source, how)
    if found != "completion":
        raise InputError(
            f"critic_model: {source} is a {IN_WORDS[found]} and a {IN_WORDS['completion']} is wanted; train one with "
            "`prefopt train reward`, or leave critic_model out to start from the policy's weights"
        )
    loaded = load(source, how, policy.device, "completion")
    ours, its = tokenizer.get_vocab(), loaded.tokenizer.get_vocab()
    other = next((token for token, number in ours.items() if its.get(token) != number), None)
    if other is not None:
        raise InputError(
            f"critic_model: {source} has other tokens ({other!r} is {ours[other]} for the model and "
            f"{its.get(other, 'none')} there); give a reward model that was made from a model of the same family"
        )
    if loaded.adapter is None:
        return loaded.model, loaded.tokenizer
    return adapt(loaded.model, LoraOptions(), loaded.adapter).merge_and_unload(), loaded.tokenizer
