"""The packed tree against the padded rectangle and against ordinary forwards, over the families people train.

Two numbers are equal here when they differ by at most 1e-5 of the largest magnitude of their kind: a log-prob of the
largest log-prob, a gradient entry of the largest entry of the whole gradient. (Entries of one tensor may be zero in
exact arithmetic, as those of a key bias are, so a tensor's own scale will not do.)
"""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from prefopt.batch import Batch
from prefopt.models.load import save_memory, turn_dropout_off
from prefopt.models.policy import Policy, choose

FLOAT32 = 1e-5


def weighted_sum(batch: Batch, logp: Tensor) -> Tensor:
    """A weight of either sign for every token, so that no error can hide in a sum."""
    torch.manual_seed(3)
    return (torch.randn(len(logp)).to(logp) * logp).sum()


def dpo(batch: Batch, logp: Tensor) -> Tensor:
    """Rafailov et al. 2023, equation 7, beta 0.1, against a reference a few nats away from the policy."""
    torch.manual_seed(4)
    reference = batch.sum_tokens(logp.detach()) + 5 * torch.randn(batch.num_completions).to(logp)
    chosen, rejected = batch.pairs(0.1 * (batch.sum_tokens(logp) - reference))
    return -F.logsigmoid(chosen - rejected).sum()


def gradients(policy: Policy, batch: Batch, layout: str, loss: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Log-probs, loss and the gradient of every parameter (zero where the loss does not depend on it)."""
    policy.model.zero_grad()
    logp = policy.score(batch, layout).logp
    total = loss(batch, logp)
    total.backward()
    parameters = policy.model.parameters()
    return (
        logp.detach(),
        total.detach(),
        [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters],
    )


def assert_equal_on_its_scale(got: Tensor, wanted: Tensor, tolerance: float, scale: Tensor | float, what: str) -> None:
    gap = (got - wanted).abs().max().item()
    assert gap <= tolerance * float(scale), f"{what}: {gap:.1e} apart on a scale of {float(scale):.1e}"


def assert_tree_equals_padded(policy: Policy, batch: Batch, loss: Any, tolerance: float) -> None:
    tree, padded = (gradients(policy, batch, layout, loss) for layout in ("tree", "padded"))
    assert_equal_on_its_scale(tree[0], padded[0], tolerance, padded[0].abs().max(), "log-probs")
    assert_equal_on_its_scale(tree[1], padded[1], tolerance, padded[1].abs().clamp(min=1), "loss")
    largest = max(g.abs().max() for g in padded[2])
    assert largest > 1e-3
    for (name, _), got, wanted in zip(policy.model.named_parameters(), tree[2], padded[2], strict=True):
        assert_equal_on_its_scale(got, wanted, tolerance, largest, f"gradient of {name}")


def one_by_one(model: Any, batch: Batch) -> Tensor:
    """[K] from ordinary forwards: every completion alone behind its prompt, no padding, the model's own logits."""
    prompts, out = batch.prompts.rows(), []
    for g, completion in zip(batch.group.tolist(), batch.completions.rows(), strict=True):
        ids = torch.cat([prompts[g], completion])
        logits = model(input_ids=ids[None], use_cache=False).logits[0].float()
        before = torch.log_softmax(logits, -1)[len(prompts[g]) - 1 : -1]
        out.append(before.gather(1, completion[:, None])[:, 0])
    return torch.cat(out)


@pytest.mark.parametrize("family", tiny.PACKED)
def test_tree_equals_padded_in_loss_and_gradient(family):
    policy = Policy(tiny.build(family))
    assert choose(policy).layout == "tree", choose(policy).reason
    assert policy.fused_head
    assert_tree_equals_padded(policy, tiny.family(), weighted_sum, FLOAT32)
    assert_tree_equals_padded(policy, tiny.pairs(), dpo, FLOAT32)


@pytest.mark.parametrize("family", tiny.PACKED)
def test_both_layouts_equal_ordinary_forwards_of_one_row_each(family):
    policy, batch = Policy(tiny.build(family)), tiny.family()
    with torch.no_grad():
        with policy.ordinary() as model:
            wanted = one_by_one(model, batch)
        for layout in ("tree", "padded"):
            got = policy.score(batch, layout).logp
            assert_equal_on_its_scale(got, wanted, FLOAT32, wanted.abs().max(), layout)


@pytest.mark.parametrize("family", tiny.PACKED)
def test_wrong_attention_would_show(family):
    """A prompt's first token moves the log-probs of completions by far more than the tolerance above."""
    policy, batch = Policy(tiny.build(family)), tiny.family()
    first = torch.cat([torch.zeros(1, dtype=torch.int64), batch.prompts.lengths.cumsum(0)[:-1]])
    tokens = batch.prompts.values.clone()
    with torch.no_grad():
        before = policy(batch).logp
        tokens[first] = (tokens[first] + 1) % tiny.VOCABULARY
        batch.prompts.values.copy_(tokens)
        moved = (policy(batch).logp - before).abs()
    assert moved.mean() > 1000 * FLOAT32 * before.abs().max()


@pytest.mark.parametrize(
    "family,reason",
    [
        ("mamba", "2 of 2 layers mix tokens in another way"),
        ("qwen3_next", "1 of 2 layers mix tokens in another way"),
        ("lfm2", "2 of 4 layers mix tokens in another way"),
        ("bloom", "2 of 2 layers mix tokens in another way"),
    ],
)
def test_families_that_mix_tokens_in_another_way_fall_back_to_padded_and_say_so(family, reason):
    policy, batch = Policy(tiny.build(family)), tiny.family()
    choice = choose(policy)
    assert (choice.layout, policy.layout) == ("padded", "padded")
    assert f"the packed tree does not fit {type(policy.model).__name__} ({reason})" in choice.reason
    with torch.no_grad():
        wanted = one_by_one(policy.model, batch)
        assert_equal_on_its_scale(policy(batch).logp, wanted, FLOAT32, wanted.abs().max(), family)


@pytest.mark.parametrize("family", [*tiny.PACKED, *tiny.NOT_PACKED])
def test_bfloat16_weights_get_the_same_layout_as_float32_ones(family):
    choice = choose(Policy(tiny.build(family, torch.bfloat16)))
    assert choice.layout == ("tree" if family in tiny.PACKED else "padded"), choice.reason


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_bfloat16_tree_and_padded_agree_within_rounding(family):
    policy, batch = Policy(tiny.build(family, torch.bfloat16)), tiny.family()
    with torch.no_grad():
        tree, padded = policy.score(batch, "tree").logp, policy.score(batch, "padded").logp
    assert tree.dtype == torch.float32
    # 8 bits, a few roundings per layer; a change of context moves a log-prob by more than 1
    assert_equal_on_its_scale(tree, padded, 2**-5, padded.abs().max(), family)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt"])
def test_in_float64_tree_equals_padded_to_1e_10(family):
    """Llama's normalisation casts to float32, so the proof of exactness rests on families that do not."""
    policy = Policy(tiny.build(family, torch.float64))
    assert_tree_equals_padded(policy, tiny.family(), weighted_sum, 1e-10)
    assert_tree_equals_padded(policy, tiny.pairs(), dpo, 1e-10)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_gradient_checkpointing_gives_the_same_gradient(family, layout):
    policy, batch = Policy(tiny.build(family)), tiny.family()
    turn_dropout_off(policy.model)
    _, _, wanted = gradients(policy, batch, layout, weighted_sum)
    save_memory(policy.model)
    calls = []
    layer = next(m for m in policy.model.modules() if isinstance(m, GradientCheckpointingLayer))
    next(layer.children()).register_forward_pre_hook(lambda *_: calls.append(1))
    _, _, got = gradients(policy, batch, layout, weighted_sum)
    assert len(calls) == 2  # once forward, once again in backward: it really was recomputed
    for (name, _), g, w in zip(policy.model.named_parameters(), got, wanted, strict=True):
        torch.testing.assert_close(g, w, atol=1e-6 * max(x.abs().max() for x in wanted).item(), rtol=0, msg=name)
