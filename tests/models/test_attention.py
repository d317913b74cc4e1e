from __future__ import annotations

import math
import warnings
import weakref
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prefopt.batch import Batch
from prefopt.models import attention
from prefopt.models.layouts import TreeRow

H, J, D = 4, 2, 6
SHAPES = {
    "one completion": [(3, [4])],
    "many completions": [(5, [2, 1, 7, 3, 4])],
    "several prompts": [(4, [6]), (8, [1, 5, 3]), (1, [2, 4])],
    "prompts of one token": [(1, [1, 1]), (1, [3])],
}


def row_of(shape: list[tuple[int, list[int]]]) -> TreeRow:
    return TreeRow.of(Batch.of(tiny.examples(shape)), torch.device("cpu"))


def tensors(length: int, key_heads: int = J, width: int = D) -> tuple[Tensor, Tensor, Tensor]:
    """q [H, T, D], k, v [J, T, D], float64; large enough that the softmax is far from even."""
    torch.manual_seed(0)
    q = 2 * torch.randn(H, length, width, dtype=torch.float64)
    k, v = (torch.randn(key_heads, length, width, dtype=torch.float64) for _ in range(2))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def visible(row: TreeRow, window: int | None) -> Tensor:
    """[T, T], pair by pair from the definition: a token sees its prompt and its own completion, up to itself."""
    group, branch, position = row.group.tolist(), row.branch.tolist(), row.positions.tolist()
    size = len(group)
    see = [[False] * size for _ in range(size)]
    for i in range(size):
        for j in range(i + 1):
            related = group[i] == group[j] and branch[j] in (-1, branch[i])
            see[i][j] = related and (window is None or position[i] - position[j] < window)
    return torch.tensor(see)


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row: TreeRow,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Masked attention the textbook way, [T, H, D]."""
    k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    scores = scale * q @ k.transpose(1, 2)  # [H, T, T]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible(row, window), float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, scores.shape[1], 1)], -1)
    p = torch.softmax(scores, -1)[..., : k.shape[1]]
    return (p @ v).transpose(0, 1)


def call(q: Tensor, k: Tensor, v: Tensor, row: TreeRow, **settings) -> Tensor:
    """Through the door that transformers uses, [T, H, D]."""
    module = nn.Module()
    out, weights = attention.tree_attention(module, q[None], k[None], v[None], None, prefopt_tree=row, **settings)
    assert weights is None
    return out[0]


def assert_same_with_gradient(got: Tensor, wanted: Tensor, leaves: list[Tensor]) -> None:
    close = {"atol": 1e-10, "rtol": 1e-10}
    torch.testing.assert_close(got, wanted, **close)
    torch.manual_seed(1)
    pull = torch.randn_like(wanted)
    grads = torch.autograd.grad((pull * got).sum(), leaves), torch.autograd.grad((pull * wanted).sum(), leaves)
    for g, w in zip(*grads, strict=True):
        torch.testing.assert_close(g, w, **close)


def test_one_query_by_hand():
    # a prompt of one token and a completion of one, whose scores are 0 and ln 3: probabilities 1/4 and 3/4
    row = row_of([(1, [1])])
    q, k = torch.ones(1, 2, 1), torch.tensor([[[0.0], [math.log(3)]]])
    v = torch.tensor([[[8.0], [4.0]]])
    out = call(q, k, v, row, scaling=1.0)
    torch.testing.assert_close(out[:, 0, 0], torch.tensor([8.0, 8 / 4 + 4 * 3 / 4]))


@pytest.mark.parametrize("block", [1, 2, 3, 256])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_equal_dense_masked_attention_and_its_gradient(shape, key_heads, window, block, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", block)
    row = row_of(SHAPES[shape])
    q, k, v = tensors(len(row.ids), key_heads)
    got = call(q, k, v, row, scaling=0.3, sliding_window=window)
    assert_same_with_gradient(got, dense(q, k, v, row, 0.3, window), [q, k, v])


@pytest.mark.parametrize("window", [None, 40])
def test_long_segments_cross_the_real_block_boundary(window):
    row = row_of([(300, [280, 5]), (3, [7])])
    q, k, v = tensors(len(row.ids))
    got = call(q, k, v, row, sliding_window=window)
    assert_same_with_gradient(got, dense(q, k, v, row, D**-0.5, window), [q, k, v])


def test_values_may_be_wider_or_narrower_than_keys():
    row = row_of(SHAPES["several prompts"])
    q, k, _ = tensors(len(row.ids))
    _, _, v = tensors(len(row.ids), width=3)
    assert_same_with_gradient(call(q, k, v, row), dense(q, k, v, row, D**-0.5), [q, k, v])


def test_queries_that_are_views_of_a_larger_tensor_give_the_same():
    row = row_of(SHAPES["several prompts"])
    q, k, v = tensors(len(row.ids))
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]  # as a model hands them over
    assert not turned[0].is_contiguous()
    assert_same_with_gradient(call(*turned, row), dense(q, k, v, row, D**-0.5), [q, k, v])


@pytest.mark.parametrize("window", [None, 3])
def test_finite_differences_agree_with_the_gradient(window, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 2)
    row = row_of([(2, [3, 1]), (1, [2])])
    q, k, v = tensors(len(row.ids), width=2)
    assert torch.autograd.gradcheck(lambda *x: call(*x, row, sliding_window=window), (q, k, v))


def test_backward_can_run_twice():
    row = row_of(SHAPES["several prompts"])
    leaves = list(tensors(len(row.ids)))
    total = call(*leaves, row).sum()
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    again = torch.autograd.grad(total, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_checkpointed_pass_keeps_no_probabilities():
    """What a forward pass keeps goes through autograd's saved tensors, where checkpointing can drop it."""
    row = row_of(SHAPES["several prompts"])
    leaves, alive = list(tensors(len(row.ids))), []
    softmax = torch.softmax

    def watched(*arguments: Any, **settings: Any) -> Tensor:
        p = softmax(*arguments, **settings)
        alive.append(weakref.ref(p))
        return p

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "softmax", watched)
        out = checkpoint(lambda *x: call(*x, row), *leaves, use_reentrant=False)
    assert alive and not any(p() is not None for p in alive)
    assert_same_with_gradient(out, dense(*leaves, row, D**-0.5), leaves)


def test_the_default_scale_is_one_over_the_root_of_the_width():
    row = row_of(SHAPES["one completion"])
    q, k, v = tensors(len(row.ids))
    torch.testing.assert_close(call(q, k, v, row), call(q, k, v, row, scaling=D**-0.5))


def test_a_prompts_keys_collect_gradient_from_all_completions_in_float32_when_weights_are_bfloat16():
    # 300 completions of one token each give the prompt's value the same small pull; added up in bfloat16 it would stall
    row = row_of([(1, [1] * 300)])
    q, k = torch.zeros(1, 301, 1).bfloat16(), torch.zeros(1, 301, 1).bfloat16()
    v = torch.zeros(1, 301, 1).bfloat16().requires_grad_()
    call(q, k, v, row).float().sum().backward()
    # the prompt sees itself (1), each completion gives it half
    assert v.grad[0, 0, 0].item() == pytest.approx(1 + 300 / 2, rel=0.01)


@pytest.mark.parametrize("block", [2, 256])
@pytest.mark.parametrize("softcap,sunk", [(2.0, False), (None, True), (2.0, True)])
@pytest.mark.parametrize("window", [None, 3])
def test_soft_caps_and_sinks_equal_a_dense_computation(window, softcap, sunk, block, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", block)
    row = row_of(SHAPES["several prompts"])
    q, k, v = tensors(len(row.ids))
    sinks = torch.randn(H, dtype=torch.float64, requires_grad=True) if sunk else None
    got = call(q, k, v, row, scaling=0.4, sliding_window=window, softcap=softcap, s_aux=sinks)
    wanted = dense(q, k, v, row, 0.4, window, softcap, sinks)
    assert_same_with_gradient(got, wanted, [q, k, v] + ([sinks] if sunk else []))


@pytest.mark.parametrize("window", [None, 3, 50])
def test_the_flex_mask_is_the_tree(window):
    row = row_of([(60, [90, 40]), (30, [80]), (1, [2, 4])])
    size = len(row.ids)
    mask = attention.flex_mask(row, window)
    index = torch.arange(size)
    zero = torch.tensor(0)
    assert torch.equal(mask.mask_mod(zero, zero, index[:, None], index[None]), visible(row, window))
    blocks = mask.to_dense()[0, 0].bool()  # a block that is left out must hold nothing visible
    side = mask.BLOCK_SIZE[0]
    padded = torch.zeros(blocks.shape[0] * side, blocks.shape[1] * side, dtype=torch.bool)
    padded[:size, :size] = visible(row, window)
    filled = padded.view(blocks.shape[0], side, blocks.shape[1], side).any(3).any(1)
    assert torch.equal(blocks, filled)
    assert not blocks.all()


@pytest.mark.parametrize("window", [None, 3])
def test_flex_attention_gives_the_same_output(window):
    from torch.nn.attention.flex_attention import flex_attention

    row = row_of(SHAPES["several prompts"])
    q, k, v = (x.detach()[None] for x in tensors(len(row.ids)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it runs uncompiled
        mask = attention.flex_mask(row, window)
        out = flex_attention(q, k, v, block_mask=mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(out[0].transpose(0, 1), dense(q[0], k[0], v[0], row, 0.3, window))


def test_block_masks_are_built_once_per_window():
    row = row_of(SHAPES["several prompts"])
    first, windowed = attention.flex_mask(row, None), attention.flex_mask(row, 3)
    assert attention.flex_mask(row, None) is first
    assert attention.flex_mask(row, 3) is windowed is not first


def test_a_layout_that_does_not_arrive_is_an_error_that_names_the_way_out():
    q, k, v = (x[None] for x in tensors(3))
    with pytest.raises(RuntimeError, match=r"Linear does not pass the layout.*use layout: padded"):
        attention.tree_attention(nn.Linear(1, 1), q, k, v, None)


def test_dropout_is_refused():
    row = row_of(SHAPES["one completion"])
    with pytest.raises(RuntimeError, match="dropout is not supported"):
        call(*tensors(len(row.ids)), row, dropout=0.1)


def test_every_call_leaves_its_window():
    row = row_of(SHAPES["one completion"])
    for window in (None, 3):
        call(*tensors(len(row.ids)), row, sliding_window=window)
    assert row.visits == [None, 3]
