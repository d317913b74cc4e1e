"""Attention over a packed tree, plugged into transformers' attention interface under the name `prefopt_tree`.

Every completion attends to its prompt and to itself. Three ways with one answer: `blocks` (any device, its own
backward, memory linear in length), `plain` (soft-capped scores and attention sinks, through autograd), `flex`
(FlexAttention, GPU). Letters: H query heads, J key heads, R = H / J, T row length, D head width, B query rows in a
block, S keys seen.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from prefopt.models.layouts import Segment, TreeRow

NAME = "prefopt_tree"
BLOCK = 256  # query rows at a time: bounds the scores held at once and skips most of the masked half


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    prefopt_tree: TreeRow | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """query [1, H, T, D], key, value [1, J, T, D] -> [1, T, H, D], as transformers' attention interface asks.

    RuntimeError where the model does not hand the layout through, or asks for dropout.
    """
    if prefopt_tree is None:
        raise RuntimeError(f"{type(module).__name__} does not pass the layout to its attention; use layout: padded")
    if dropout:
        raise RuntimeError("attention dropout is not supported: the policy must be the distribution that is scored")
    prefopt_tree.visits.append(getattr(module, "layer_idx", 0) or 0)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if softcap is not None or s_aux is not None:
        return _plain(query, key, value, prefopt_tree, scale, sliding_window, softcap, s_aux), None
    if query.is_cuda and _compiled_flex() is not None:
        return _flex(query, key, value, prefopt_tree, scale, sliding_window), None
    out = _Blocks.apply(query[0], key[0], value[0], prefopt_tree, scale, sliding_window)  # [T, H, D]
    return out[None], None


ALL_ATTENTION_FUNCTIONS.register(NAME, tree_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, lambda *args, **kwargs: None)


def _blocks_of(segment: Segment) -> list[tuple[int, int]]:
    """Query ranges of at most BLOCK rows."""
    return [(a, min(a + BLOCK, segment.stop)) for a in range(segment.start, segment.stop, BLOCK)]


def _seen(x: Tensor, segment: Segment, stop: int) -> Tensor:
    """The keys or values that queries before `stop` see: context, then the segment so far. [J, T, D] -> [J, S, D]."""
    own = x[:, segment.start : stop]
    first, last = segment.context
    return own if first == last else torch.cat([x[:, first:last], own], 1)


class _Blocks(torch.autograd.Function):
    """Softmax attention block by block; backward recomputes each block's probabilities, so only q, k, v are kept."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, row: TreeRow, scale: float, window: int | None) -> Tensor:
        heads, length, width = q.shape
        out = q.new_empty(length, heads, v.shape[-1])
        for segment in row.segments:
            for start, stop in _blocks_of(segment):
                p = _probabilities(q, k, row, segment, (start, stop), scale, window)  # [J, R*B, S]
                o = torch.bmm(p, _seen(v, segment, stop))  # [J, R*B, D]
                out[start:stop] = _unfold(o, heads)
        ctx.save_for_backward(q, k, v)
        ctx.row, ctx.scale, ctx.window = row, scale, window
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        wide = torch.promote_types(q.dtype, torch.float32)  # a prompt's keys collect from every completion
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        heads = q.shape[0]
        for segment in ctx.row.segments:
            first, last = segment.context
            size = last - first
            for start, stop in _blocks_of(segment):
                p = _probabilities(q, k, ctx.row, segment, (start, stop), ctx.scale, ctx.window)
                g = _fold(grad[start:stop].transpose(0, 1), k.shape[0])  # [J, R*B, D]
                seen_k, seen_v = _seen(k, segment, stop), _seen(v, segment, stop)
                pull_v = torch.bmm(p.transpose(1, 2), g)  # [J, S, D]
                pull = torch.bmm(g, seen_v.transpose(1, 2))  # [J, R*B, S]
                pull = torch.ops.aten._softmax_backward_data(pull, p, -1, p.dtype).mul_(ctx.scale)
                dq[:, start:stop] = torch.bmm(pull, seen_k).view(heads, stop - start, -1)
                pull_k = torch.bmm(pull.transpose(1, 2), _fold(q[:, start:stop], k.shape[0]))  # [J, S, D]
                for total, part in ((dk, pull_k), (dv, pull_v)):
                    if size:
                        total[:, first:last] += part[:, :size]
                    total[:, segment.start : stop] += part[:, size:]
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _fold(x: Tensor, key_heads: int) -> Tensor:
    """[H, B, D] -> [J, R*B, D]: the query heads that share a key head side by side."""
    return x.reshape(key_heads, -1, x.shape[-1])


def _unfold(x: Tensor, heads: int) -> Tensor:
    """[J, R*B, D] -> [B, H, D]."""
    return x.view(heads, -1, x.shape[-1]).transpose(0, 1)


def _probabilities(
    q: Tensor, k: Tensor, row: TreeRow, segment: Segment, block: tuple[int, int], scale: float, window: int | None
) -> Tensor:
    """Attention probabilities of one block, [J, R*B, S]."""
    start, stop = block
    seen = _seen(k, segment, stop)
    scores = torch.bmm(_fold(q[:, start:stop], k.shape[0]) * scale, seen.transpose(1, 2))  # [J, R*B, S]
    by_row = scores.view(k.shape[0], -1, stop - start, scores.shape[-1])  # [J, R, B, S]
    size = stop - start
    by_row[..., -size:].masked_fill_(_future(size, q.device), float("-inf"))
    if window is not None and scores.shape[-1] > window:
        by_row.masked_fill_(_too_far(row, segment, block, window), float("-inf"))
    return torch.softmax(scores, -1, out=scores)


@cache
def _future(size: int, device: torch.device) -> Tensor:
    """[B, B] True above the diagonal."""
    return torch.ones(size, size, dtype=torch.bool, device=device).triu_(1)


def _too_far(row: TreeRow, segment: Segment, block: tuple[int, int], window: int) -> Tensor:
    """[B, S] True where a key lies `window` or more positions before its query."""
    start, stop = block
    key = _seen(row.positions[None, :, None], segment, stop)[0, :, 0]
    return key[None] <= row.positions[start:stop, None] - window


def _plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: TreeRow,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """The same through autograd, with soft-capped scores and attention sinks ([H], one extra logit per head)."""
    q, k, v = query[0], key[0], value[0]
    repeat = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
    wide = torch.promote_types(q.dtype, torch.float32)
    out: list[tuple[int, Tensor]] = []
    for segment in row.segments:
        for start, stop in _blocks_of(segment):
            scores = torch.bmm(q[:, start:stop], _seen(k, segment, stop).transpose(1, 2)) * scale  # [H, B, S]
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            size = stop - start
            hidden = torch.zeros(size, scores.shape[-1], dtype=torch.bool, device=q.device)
            hidden[:, -size:] = _future(size, q.device)
            if window is not None:
                hidden |= _too_far(row, segment, (start, stop), window)
            scores = scores.masked_fill(hidden, float("-inf"))
            if sinks is not None:
                extra = sinks.to(scores.dtype).view(-1, 1, 1).expand(-1, size, 1)
                scores = torch.cat([scores, extra], -1)
            p = torch.softmax(scores, -1, dtype=wide).to(q.dtype)[..., : hidden.shape[1]]
            out.append((start, torch.bmm(p, _seen(v, segment, stop)).transpose(0, 1)))  # [B, H, D]
    return torch.cat([o for _, o in sorted(out, key=lambda item: item[0])])[None]


@cache
def _compiled_flex() -> Any:
    """FlexAttention compiled for the GPU, or None where this torch build cannot compile it."""
    try:
        import triton  # noqa: F401
        from torch.nn.attention.flex_attention import flex_attention
    except ImportError:
        return None
    return torch.compile(flex_attention, dynamic=True)


def flex_mask(row: TreeRow, window: int | None) -> Any:
    """The tree as a FlexAttention block mask: same prompt, not later, and in the prompt or the same completion."""
    from torch.nn.attention.flex_attention import create_block_mask

    if window not in row.masks:
        group, branch, position = row.group, row.branch, row.positions

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            inside = (branch[k] == -1) | (branch[q] == branch[k])
            near = position[q] - position[k] < window if window is not None else q >= k
            return (group[q] == group[k]) & (q >= k) & inside & near

        size = len(row.ids)
        row.masks[window] = create_block_mask(visible, None, None, size, size, device=str(row.ids.device))
    return row.masks[window]


def _flex(query: Tensor, key: Tensor, value: Tensor, row: TreeRow, scale: float, window: int | None) -> Tensor:
    """FlexAttention with the tree's block mask; [1, T, H, D]."""
    grouped = query.shape[1] != key.shape[1]
    out = _compiled_flex()(query, key, value, block_mask=flex_mask(row, window), scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous()
