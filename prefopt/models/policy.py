"""`Policy(batch) -> Outputs`: what a causal language model, or a reward model, says of the completions, by the fastest
layout that is exact for it.

Letters: K completion tokens, T packed row, D hidden width, V vocabulary.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefopt.batch import Batch, Outputs
from prefopt.models import attention
from prefopt.models.head import Head
from prefopt.models.heads import score_head
from prefopt.models.layouts import PaddedRows, TreeRow
from prefopt.records import Example

Layout = Literal["tree", "padded"]


class ValueHead(nn.Module):
    """One number per completion token from the hidden states.

    at="before": at the position that predicts the token (a critic, V of the state); at="token": at the token itself
    (a reward model reads its score at the last token).
    """

    def __init__(self, width: int, at: Literal["before", "token"] = "before", dtype: torch.dtype | None = None):
        super().__init__()
        self.at, self.linear = at, nn.Linear(width, 1, dtype=dtype)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor, before: Tensor, at: Tensor) -> Tensor:
        """hidden [T, D] -> [K] float32 or wider."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        weight, bias = self.linear.weight.to(wide), self.linear.bias.to(wide)
        return F.linear(hidden[before if self.at == "before" else at].to(wide), weight, bias)[:, 0]


class Policy:
    """A transformers causal language model, or a classifier on one, with or without adapters, that scores batches.

    A classifier's score of each token is `Outputs.value`; it has no log-probs.

    layout: "tree" packs prompts once without padding, "padded" is an ordinary right-padded batch; `choose` decides
    by a probe. entropy, collision: compute `Outputs.entropy`, `Outputs.collision` too. Gradients flow unless under
    no_grad. The model's own weights are used as they are. temperature: log-probs are those of the distribution that
    completions are drawn from, softmax(logits / temperature).
    """

    def __init__(
        self,
        model: Any,
        layout: Layout = "tree",
        *,
        entropy: bool = False,
        collision: bool = False,
        value: ValueHead | None = None,
        temperature: float = 1.0,
    ) -> None:
        self.model, self.layout, self.value = model, layout, value
        self.entropy, self.collision, self.temperature = entropy, collision, temperature
        self.inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.backbone = self.inner.base_model
        self.plain_attention = _plain_name(self.inner)
        self.scorer = score_head(self.inner)
        self.fused_head = True

    @property
    def device(self) -> torch.device:
        return next(self.inner.parameters()).device

    def __call__(self, batch: Batch) -> Outputs:
        return self.score(batch, self.layout)

    def score(self, batch: Batch, layout: Layout) -> Outputs:
        """`Outputs` through a given layout."""
        token = batch.completions.values.to(self.device)
        if self.scorer is not None:
            hidden, before, at = self._hidden(batch, layout)
            value = self.scorer(hidden[self.scorer.place(token, before, at)])
            return Outputs(value.new_empty(0), value=value)
        if not self.fused_head:
            return self._full_logits(batch, layout, token)
        hidden, before, at = self._hidden(batch, layout)
        logp, entropy, collision = self.head()(hidden[before], token, self.entropy, self.collision)
        return Outputs(logp, entropy, None if self.value is None else self.value(hidden, before, at), collision)

    def head(self) -> Head:
        """The model's language-model head, with the scale and soft cap its family applies to logits."""
        linear, config = self.inner.get_output_embeddings(), text_config(self.inner)
        if hasattr(linear, "lora_A"):  # its `weight` is the base layer's alone: the adapter would never be trained
            raise RuntimeError("the head carries an adapter of its own")
        scale = getattr(config, "logit_scale", None) or 1.0
        divide = getattr(config, "logits_scaling", None) or 1.0
        cap = getattr(config, "final_logit_softcapping", None)
        return Head(linear.weight, getattr(linear, "bias", None), scale / divide, cap, self.temperature)

    def _inputs(self, batch: Batch, layout: Layout) -> tuple[dict[str, Any], Tensor, Tensor]:
        if layout == "tree":
            self._attend(attention.NAME)
            row = TreeRow.of(batch, self.device)
            inputs = {"input_ids": row.ids[None], "position_ids": row.positions[None], "prefopt_tree": row}
            return inputs, row.before, row.at
        self._attend(self.plain_attention)
        rows = PaddedRows.of(batch, self.device)
        return {"input_ids": rows.ids, "attention_mask": rows.mask}, rows.before, rows.at

    def _hidden(self, batch: Batch, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """Final hidden states [T, D], with the positions that predict the tokens and the tokens' own, [K] each."""
        inputs, before, at = self._inputs(batch, layout)
        hidden = self.backbone(**inputs, use_cache=False)[0]
        return hidden.flatten(0, 1), before, at

    def _full_logits(self, batch: Batch, layout: Layout, token: Tensor) -> Outputs:
        """For heads that are more than a linear map: the model's own logits, all of them."""
        if self.value is not None:
            raise RuntimeError("a value head needs a model whose backbone and head can be told apart")
        inputs, before, _ = self._inputs(batch, layout)
        logits = self.inner(**inputs, use_cache=False).logits.flatten(0, 1)[before] / self.temperature  # [K, V]
        wide = torch.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
        entropy = -(wide.exp() * wide).sum(-1) if self.entropy else None
        collision = torch.logsumexp(2 * wide.detach(), -1) if self.collision else None
        return Outputs(wide.gather(1, token[:, None])[:, 0], entropy, None, collision)

    def _attend(self, name: str) -> None:
        # kept after the call on purpose: gradient checkpointing runs the layers again in backward
        self.inner.config._attn_implementation = name
        if self.backbone.config is not self.inner.config:
            self.backbone.config._attn_implementation = name

    @contextmanager
    def ordinary(self) -> Iterator[Any]:
        """The model with its ordinary attention, for generation and saving."""
        before = self.inner.config._attn_implementation
        self._attend(self.plain_attention)
        try:
            yield self.model
        finally:
            self._attend(before)


def per_token(out: Outputs) -> Tensor:
    """What a model says of each token: log-probs of a language model, scores of a reward model, [K]."""
    return out.logp if out.value is None or len(out.logp) else out.value


def text_config(model: Any) -> Any:
    """The configuration of the language model, also inside a multimodal one."""
    return model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config


def _plain_name(model: Any) -> str:
    name = getattr(model.config, "_attn_implementation", None) or "eager"
    return "sdpa" if name == attention.NAME else name


@dataclass(frozen=True)
class Choice:
    """The layout a probe chose and why, for the log."""

    layout: Layout
    fused_head: bool
    reason: str


SMALL = 200_000_000  # parameters of a model that is copied to float32 for a probe


def choose(policy: Policy, wanted: Literal["auto", "tree", "padded"] = "auto") -> Choice:
    """Set the policy's layout and head by a numeric probe on a few random tokens, and say why.

    The packed tree must reach every layer's attention, with its window, and give the padded layout's log-probs (a
    reward model's scores) and gradient within the rounding measured between ordinary forwards. Where rounding hides
    the effect of a prompt token (16-bit weights, untrained model) a small model is probed in float32. RuntimeError if
    the user insists on "tree" and the probe says no.
    """
    bare = copy.copy(policy)
    bare.value = None  # the probe compares log-probs; a model without a chunked head has them too
    judge = _probe(bare)
    if judge.unsure and sum(p.numel() for p in policy.inner.parameters()) <= SMALL:
        policy._attend(policy.plain_attention)
        judge = _probe(Policy(copy.deepcopy(policy.inner).float()))
    policy._attend(policy.plain_attention)  # some models run, and are wrong, on the packed tree's attention
    policy.fused_head = judge.head_problem is None
    head = "chunked head" if policy.fused_head else f"full logits ({judge.head_problem})"
    head = head if policy.scorer is None else "score head"
    name = type(policy.inner).__name__
    if judge.tree_problem is not None and wanted == "tree":
        raise RuntimeError(f"layout: tree is not exact for {name}: {judge.tree_problem}; use layout: auto")
    if wanted == "padded":
        policy.layout, reason = "padded", f"padded layout as asked, {head}"
    elif judge.tree_problem is None:
        policy.layout, reason = "tree", f"packed tree, {head}: equal to the padded layout on a probe"
        if judge.unsure:
            reason += ", as far as 16-bit weights can tell"
    else:
        policy.layout = "padded"
        reason = f"padded layout, {head}: the packed tree does not fit {name} ({judge.tree_problem})"
    return Choice(policy.layout, policy.fused_head, reason)


@dataclass(frozen=True)
class _Judgement:
    """What a probe found: a problem in words or None; unsure when the weights' rounding is too coarse to tell."""

    head_problem: str | None
    tree_problem: str | None
    unsure: bool


def _probe(policy: Policy) -> _Judgement:
    batch, changed = _probe_batches(text_config(policy.inner).vocab_size)
    eps = max(torch.finfo(p.dtype).eps for p in policy.inner.parameters() if p.is_floating_point())
    with torch.no_grad():
        policy.fused_head = False
        whole = per_token(policy.score(batch, "padded"))
        effect = _mean_gap(per_token(policy.score(changed, "padded")), whole)
        alone = torch.cat([per_token(policy.score(batch.take(g, g + 1), "padded")) for g in range(batch.num_prompts)])
        # rounding as it shows between two ordinary forwards, or as it must be expected
        slack = max(4 * _mean_gap(alone, whole), (16 if eps < 1e-4 else 0.5) * eps * whole.abs().mean().item())
        policy.fused_head = True
        head = _problem(policy, batch, "padded", whole, slack)
        policy.fused_head = head is None
        tree = _problem(policy, batch, "tree", whole, slack)
    tree = tree or _gradient_problem(policy, batch, eps)
    return _Judgement(head, tree, unsure=eps > 1e-4 and (tree is not None or effect < 4 * slack))


def _mean_gap(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().mean().item()


def _problem(policy: Policy, batch: Batch, layout: Layout, whole: Tensor, slack: float) -> str | None:
    """None if the layout gives the log-probs `whole` through every layer, else the reason in words."""
    try:
        inputs, _, _ = policy._inputs(batch, layout)
        gap = _mean_gap(per_token(policy.score(batch, layout)), whole)
        if layout == "tree":
            policy.backbone(**inputs, use_cache=False)
    except Exception as error:  # any architecture may fail here in its own way; the reason goes to the log
        return _in_words(error)
    config = text_config(policy.inner)
    if layout == "tree":
        windows, layers = inputs["prefopt_tree"].visits, config.num_hidden_layers
        if len(windows) != layers:
            return f"{layers - len(windows)} of {layers} layers mix tokens in another way"
        if is_windowed(config) and not any(windows):
            return "its sliding window does not reach the attention function"
    what = "log-probs differ by {:.1e} nats a token" if policy.scorer is None else "scores differ by {:.1e} a token"
    return None if gap <= slack else what.format(gap)


def is_windowed(config: Any) -> bool:
    """Whether some layers see only the nearest tokens; the probe's rows are too short to show it."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return any("full" not in kind for kind in kinds)
    return bool(getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None))


def _gradient_problem(policy: Policy, batch: Batch, eps: float) -> str | None:
    """None if a trained weight near the input gets the padded layout's gradient from the tree, else why not."""
    weight = next((p for p in policy.inner.parameters() if p.requires_grad and p.is_floating_point()), None)
    if weight is None or not torch.is_grad_enabled():
        return None
    grads = []
    try:
        for layout in ("padded", "tree"):
            (grad,) = torch.autograd.grad(per_token(policy.score(batch, layout)).sum(), [weight], allow_unused=True)
            grads.append(torch.zeros_like(weight) if grad is None else grad)
    except Exception as error:  # a kernel that has no backward here, for one
        return f"backward: {_in_words(error)}"
    gap = (grads[0].float() - grads[1].float()).norm() / grads[0].float().norm().clamp(min=1e-30)
    return None if gap <= (1e-3 if eps < 1e-4 else 0.1) else f"gradients differ by {float(gap):.1e} of their norm"


def _in_words(error: Exception) -> str:
    text = str(error).splitlines()
    return f"{type(error).__name__}: {text[0][:120] if text else 'no message'}"


def _probe_batches(vocabulary: int) -> tuple[Batch, Batch]:
    """Two prompts with two and one completions, and the same with the prompts' first tokens changed."""
    draw = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(vocabulary) for _ in range(count)]

    prompts, answers = [tokens(7), tokens(4)], [[tokens(5), tokens(9)], [tokens(6)]]

    def batch(first: list[list[int]]) -> Batch:
        return Batch.of(
            [
                Example(prompt, own, [1.0] * len(own), [[True] * len(a) for a in own])
                for prompt, own in zip(first, answers, strict=True)
            ]
        )

    return batch(prompts), batch([[(p[0] + 1) % vocabulary, *p[1:]] for p in prompts])
