"""Attention over a packed tree, plugged into transformers' attention interface under the name `prefopt_tree`.

Every completion attends to its prompt and to itself. Three ways with one answer: `blocks` (any device, its own
backward, memory linear in length), `plain` (soft-capped scores and attention sinks, through autograd), `flex`
(FlexAttention, GPU). Letters: H query heads, J key heads, R = H / J, T row length, D head width, B query rows in a
block, S keys seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from prefopt.models.layouts import Segment, TreeRow

NAME = "prefopt_tree"
LANES = 32  # rows of probabilities are padded to a whole number of SIMD vectors: the softmax's tail is slow
KEEP = 8  # keep probabilities for backward up to this many head widths of keys: then they weigh less than the rest
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
    prefopt_tree.visits.append(sliding_window)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if softcap is not None or s_aux is not None:
        return _plain(query, key, value, prefopt_tree, scale, sliding_window, softcap, s_aux), None
    if query.is_cuda and _compiled_flex() is not None:
        return _flex(query, key, value, prefopt_tree, scale, sliding_window), None
    out = _Blocks.apply(query[0], key[0], value[0], prefopt_tree, scale, sliding_window)  # [T, H, D]
    return out[None], None


ALL_ATTENTION_FUNCTIONS.register(NAME, tree_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, lambda *args, **kwargs: None)


class _Blocks(torch.autograd.Function):
    """Softmax attention block by block. Probabilities are kept for backward where a row of them is short, else
    recomputed.

    Rows of a block are ordered query first, then the query heads that share a key head, so a block is a view.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, row: TreeRow, scale: float, window: int | None) -> Tensor:
        by_key_head = _gather_heads(q, k.shape[0]).mul_(scale)  # [J, T, R, D]
        out = v.new_empty(*by_key_head.shape[:3], v.shape[-1])
        keep = any(ctx.needs_input_grad)
        kept: list[Tensor | None] = []
        for segment in row.segments:
            keys, values = _seen(k, segment), _seen(v, segment)
            for block in _blocks_of(segment):
                p = _probabilities(by_key_head, keys, row, block, window)  # [J, B*R, S]
                out[:, block.start : block.stop] = torch.bmm(p, values[:, : block.seen]).view(
                    -1, block.size, *out.shape[2:]
                )
                kept.append(p if keep and block.seen <= KEEP * q.shape[-1] else None)
        ctx.save_for_backward(q, k, v, *kept)  # not on ctx itself: gradient checkpointing could not drop them
        ctx.row, ctx.scale, ctx.window = row, scale, window
        return _scatter_heads(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *probabilities = ctx.saved_tensors
        wide = torch.promote_types(q.dtype, torch.float32)  # a prompt's keys collect from every completion
        by_key_head = _gather_heads(q, k.shape[0]).mul_(ctx.scale)  # [J, T, R, D]
        g = _gather_heads(grad.transpose(0, 1), k.shape[0])  # [J, T, R, D]
        dq = torch.empty_like(by_key_head)
        dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        kept = iter(probabilities)
        for segment in ctx.row.segments:
            keys, values = _seen(k, segment), _seen(v, segment)
            for block in _blocks_of(segment):
                p = next(kept)
                if p is None:
                    p = _probabilities(by_key_head, keys, ctx.row, block, ctx.window)
                pulled = _rows(g, block)  # [J, B*R, D]
                _add(dv, torch.bmm(p.transpose(1, 2), pulled), block)
                pull = torch.bmm(pulled, values[:, : block.seen].transpose(1, 2))  # [J, B*R, S]
                pull = torch.ops.aten._softmax_backward_data(pull, p, -1, p.dtype)
                dq[:, block.start : block.stop] = torch.bmm(pull, keys[:, : block.seen]).view(
                    -1, block.size, *dq.shape[2:]
                )
                _add(dk, torch.bmm(pull.transpose(1, 2), _rows(by_key_head, block)), block)
        dq = _scatter_heads(dq.mul_(ctx.scale)).transpose(0, 1)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None


@dataclass(frozen=True)
class _Block:
    """Query rows start to stop of a segment. seen: keys they are given, context first, rounded up to the SIMD width."""

    segment: Segment
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def before(self) -> int:
        """Keys that every row of the block sees."""
        first, last = self.segment.context
        return last - first + self.start - self.segment.start

    @property
    def seen(self) -> int:
        return _rounded(self.before + self.size)


def _blocks_of(segment: Segment) -> list[_Block]:
    """The segment's queries, at most BLOCK rows at a time."""
    return [
        _Block(segment, start, min(start + BLOCK, segment.stop)) for start in range(segment.start, segment.stop, BLOCK)
    ]


def _rounded(size: int) -> int:
    return -(-size // LANES) * LANES


def _gather_heads(x: Tensor, key_heads: int) -> Tensor:
    """[H, T, D] -> a new [J, T, R, D]."""
    grouped = x.unflatten(0, (key_heads, -1)).transpose(1, 2)  # [J, T, R, D]
    return grouped.clone(memory_format=torch.contiguous_format)


def _scatter_heads(x: Tensor) -> Tensor:
    """[J, T, R, D] -> [T, H, D]."""
    return x.transpose(0, 1).flatten(1, 2)


def _rows(x: Tensor, block: _Block) -> Tensor:
    """A block's rows of [J, T, R, D], as [J, B*R, D]."""
    return x[:, block.start : block.stop].flatten(1, 2)


def _seen(x: Tensor, segment: Segment) -> Tensor:
    """The keys or values a segment sees, context first, zeros up to a whole number of lanes: [J, T, D] -> [J, S, D]."""
    first, last = segment.context
    length = last - first + segment.stop - segment.start
    spare = x.new_zeros(x.shape[0], _rounded(length) - length, x.shape[2])
    return torch.cat([x[:, first:last], x[:, segment.start : segment.stop], spare], 1)


def _add(total: Tensor, part: Tensor, block: _Block) -> None:
    """Give a gradient of the keys a block saw, [J, S, D], back to where they stand in the row, [J, T, D]."""
    first, last = block.segment.context
    size = last - first
    if size:
        total[:, first:last] += part[:, :size]
    total[:, block.segment.start : block.stop] += part[:, size : block.before + block.size]


def _probabilities(q: Tensor, keys: Tensor, row: TreeRow, block: _Block, window: int | None) -> Tensor:
    """Attention probabilities of one block, [J, B*R, S], from scaled queries [J, T, R, D]."""
    scores = torch.bmm(_rows(q, block), keys[:, : block.seen].transpose(1, 2))  # [J, B*R, S]
    by_row = scores.view(len(q), block.size, -1, block.seen)  # [J, B, R, S]
    own = block.seen - block.before
    by_row[..., block.before :] += _future(block.size, own, q.dtype, q.device)[:, None]
    if window is not None and block.before + block.size > window:
        by_row.masked_fill_(_too_far(row, block, window)[:, None], float("-inf"))
    return torch.softmax(scores, -1, out=scores)


def _future(size: int, own: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[B, own] -inf where a key of the block (or a spare one) comes after the query, else 0."""
    return _triangle(BLOCK, dtype, device)[:size, :own]


@cache
def _triangle(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((size, size + LANES), float("-inf"), dtype=dtype, device=device).triu_(1)


def _too_far(row: TreeRow, block: _Block, window: int) -> Tensor:
    """[B, S] True where a key lies `window` or more positions before its query."""
    key = _seen(row.positions[None, :, None], block.segment)[0, : block.seen, 0]
    return key[None] <= row.positions[block.start : block.stop, None] - window


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
        keys, values = _seen(k, segment), _seen(v, segment)
        for block in _blocks_of(segment):
            scores = (
                torch.bmm(q[:, block.start : block.stop], keys[:, : block.seen].transpose(1, 2)) * scale
            )  # [H, B, S]
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            hidden = torch.zeros(block.size, block.seen, dtype=torch.bool, device=q.device)
            hidden[:, block.before :] = _future(block.size, block.seen - block.before, wide, q.device) < 0
            if window is not None:
                hidden |= _too_far(row, block, window)
            scores = scores.masked_fill(hidden, float("-inf"))
            if sinks is not None:
                extra = sinks.to(scores.dtype).view(-1, 1, 1).expand(-1, block.size, 1)
                scores = torch.cat([scores, extra], -1)
            p = torch.softmax(scores, -1, dtype=wide).to(q.dtype)[..., : block.seen]
            out.append((block.start, torch.bmm(p, values[:, : block.seen]).transpose(0, 1)))  # [B, H, D]
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

    # compiled, the mask is computed block by block; otherwise it is a [T, T] tensor
    create = torch.compile(create_block_mask) if row.ids.is_cuda else create_block_mask
    if window not in row.masks:
        group, branch, position = row.group, row.branch, row.positions

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            inside = (branch[k] == -1) | (branch[q] == branch[k])
            near = position[q] - position[k] < window if window is not None else q >= k
            return (group[q] == group[k]) & (q >= k) & inside & near

        size = len(row.ids)
        row.masks[window] = create(visible, None, None, size, size, device=str(row.ids.device))
    return row.masks[window]


def _flex(query: Tensor, key: Tensor, value: Tensor, row: TreeRow, scale: float, window: int | None) -> Tensor:
    """FlexAttention with the tree's block mask; [1, T, H, D]."""
    grouped = query.shape[1] != key.shape[1]
    out = _compiled_flex()(query, key, value, block_mask=flex_mask(row, window), scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous()
