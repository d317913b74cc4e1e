"""One token at a time for many completions: each prompt's keys and values once, however many completions share them.

Plugged into transformers' attention interface under the name `prefopt_decode`. A completion's own part begins with the
last token of its prompt, which is fed as the first step: filling in a prompt needs no head, and a completion can join
at any time. All rows write the same column of the own part; a row that joined later does not see the columns before.
Letters: P prompts, B rows (one a completion), H query heads, J key heads, R = H / J, S tokens of a prompt, C columns of
the own part, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "prefopt_decode"
COLUMNS = 64  # of the own part at first, and the step in which it grows
HIDDEN = -1e30  # added to scores that do not count: finite, so that a row which sees nothing is not NaN


class Kind(NamedTuple):
    """What a layer asks of its attention: scale of the scores, sliding window, soft cap, sinks [H]."""

    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None


def decode_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    prefopt_decode: Decoder | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """query [B, H, T, D], key, value [B, J, T, D] -> [B, T, H, D], as transformers' attention interface asks.

    RuntimeError where the model does not hand the running batch through.
    """
    if prefopt_decode is None:
        raise RuntimeError(f"{type(module).__name__} does not pass the running batch to its attention")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    kind = Kind(scale, sliding_window, softcap, s_aux)
    layer: int = module.layer_idx  # type: ignore[assignment]  # every attention with a cache has it
    return prefopt_decode.attend(layer, query, key, value, kind), None


ALL_ATTENTION_FUNCTIONS.register(NAME, decode_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, lambda *args, **kwargs: None)


@dataclass
class Store:
    """Keys and values of every layer, [slots, J, columns, D] each; it grows, and keeps what it holds.

    wide: hold them in float32 or wider, for a CPU, whose product of one row with 16-bit keys is slow.
    """

    wide: bool = False
    slots: int = 0
    columns: int = 0
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def reserve(self, slots: int, columns: int) -> None:
        """Room for so many, or more."""
        if slots <= self.slots and columns <= self.columns:
            return
        if slots > self.slots:  # by half: prompts may come in a few at a time
            self.slots = max(slots, self.slots * 3 // 2)
        self.columns = max(columns, self.columns)
        for layer, pair in self.layers.items():
            key, value = (self._grown(part) for part in pair)
            self.layers[layer] = key, value

    def of(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's keys and values; made on first sight, in the shape of those given."""
        if layer not in self.layers:
            self.layers[layer] = self._new(key), self._new(value)
        return self.layers[layer]

    def move(self, source: Sequence[int], target: Sequence[int], columns: slice) -> None:
        """Copy slots `source` to slots `target`, none of which is a source."""
        if not source:
            return
        for pair in self.layers.values():
            for part in pair:
                index = torch.tensor([list(source), list(target)], device=part.device)
                part[index[1], :, columns] = part[index[0], :, columns]

    def to_front(self, columns: slice) -> None:
        """Copy columns to the first ones."""
        for pair in self.layers.values():
            for part in pair:
                part[:, :, : columns.stop - columns.start] = part[:, :, columns].clone()

    def _new(self, like: Tensor) -> Tensor:
        dtype = torch.promote_types(like.dtype, torch.float32) if self.wide else like.dtype
        # zeros: what no token has been written to is read too, with weight 0, and must not be NaN
        return like.new_zeros(self.slots, like.shape[1], self.columns, like.shape[3], dtype=dtype)

    def _grown(self, part: Tensor) -> Tensor:
        new = part.new_zeros(self.slots, part.shape[1], self.columns, part.shape[3])
        new[: part.shape[0], :, : part.shape[2]] = part
        return new


@dataclass
class Prefix:
    """All of a prompt but its last token, where it stands in the store of prompts, and how many rows use it."""

    tokens: Sequence[int]
    slot: int
    rows: int = 0

    @property
    def length(self) -> int:
        return len(self.tokens)


class Row(NamedTuple):
    """A completion that is being made. started: the column of its prompt's last token."""

    prefix: Prefix
    started: int


class Composition(NamedTuple):
    """What the layers read of the rows, the same until one joins or leaves.

    grid [P * M]: the row at each place of a prompt's up to M rows, any row where there is none. place [B]: where a row
    stands in that grid. first: the oldest row's column. shared: tokens of the longest prompt. unseen [P, 1, 1, S]: what
    hides a shorter prompt's padding, None where there is none. late [B, 1, 1, columns]: what hides the columns before a
    row joined, None where all joined at once.
    """

    grid: Tensor
    place: Tensor
    first: int
    shared: int
    unseen: Tensor | None
    late: Tensor | None


class Decoder:
    """A running batch: prompts come in, rows join and leave, and every step gives the next logits of all rows.

    model: a causal language model whose attention is `prefopt_decode` while this runs. windows: the sliding window of
    every attention call of the latest forward pass; a probe reads it.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.prefixes: list[Prefix] = []
        self.rows: list[Row] = []
        self.windows: list[int | None] = []
        self._prompts = Store()
        self._own = Store(wide=self.device.type == "cpu")
        self._column = 0  # that the next step writes
        self._filling: list[Prefix] | None = None
        self._composition: Composition | None = None
        self._position = torch.empty(0)  # [B, 1] int64 of the next token
        self._far: dict[
            int, Tensor | None
        ] = {}  # by sliding window: what hides the prompt's tokens beyond it, one step

    def open(self, prompts: Sequence[Sequence[int]]) -> list[Prefix]:
        """Fill in prompts, all but the last token of each, in one forward pass."""
        new = [Prefix(prompt[:-1], len(self.prefixes) + at) for at, prompt in enumerate(prompts)]
        self.prefixes += new
        width = max(prefix.length for prefix in new)
        self._prompts.reserve(len(self.prefixes), width)
        if width:
            ids = torch.tensor([[*p.tokens, *[0] * (width - p.length)] for p in new], device=self.device)  # [P, S]
            position = torch.arange(width, device=self.device).expand(len(new), -1)
            self._filling, self.windows = new, []
            self.model.base_model(input_ids=ids, position_ids=position, use_cache=False, prefopt_decode=self)
            self._filling = None
        return new

    def join(self, prefix: Prefix) -> None:
        """Begin one more completion of a prompt, as the last row."""
        prefix.rows += 1
        self.rows.append(Row(prefix, self._column))
        self._composition = None

    def step(self, tokens: Tensor) -> Tensor:
        """Feed every row one token, [B] -> logits of the next, [B, V]."""
        if self._composition is None or self._column >= self._own.columns:
            self._make_room()
            self._compose()
        self._far, self.windows = {}, []
        out = self.model(input_ids=tokens[:, None], position_ids=self._position, use_cache=False, prefopt_decode=self)
        self._column += 1
        self._position = self._position + 1
        logits: Tensor = out.logits[:, -1]
        return logits

    def keep(self, alive: Sequence[bool], waiting: Prefix | None = None) -> list[int]:
        """Let go of rows, and of prompts without rows other than `waiting`; the old indices of the rows that stay, in
        their new order.
        """
        order = compacted(alive)
        for row, stays in zip(self.rows, alive, strict=True):
            row.prefix.rows -= not stays
        self._own.move(*_moves(order), slice(self._first(), self._column))
        self.rows = [self.rows[at] for at in order]
        self._close([prefix.rows > 0 or prefix is waiting for prefix in self.prefixes])
        self._composition = None
        return order

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, kind: Kind) -> Tensor:
        """query [B, H, T, D], key, value [B, J, T, D] -> [B, T, H, D]: of prompts that are filled in, or of a step."""
        self.windows.append(kind.window)
        if self._filling is not None:
            self._write_prompts(layer, key, value)
            return _causal(query, key, value, kind)
        keys, values = self._own.of(layer, key, value)
        size = len(self.rows)
        keys[:size, :, self._column] = key[:, :, 0]
        values[:size, :, self._column] = value[:, :, 0]
        grouped = query[:, :, 0].unflatten(1, (key.shape[1], -1))  # [B, J, R, D]
        shared = self._attend_prompt(layer, grouped, kind)
        return self._attend_own(layer, grouped, shared, kind).to(value.dtype).flatten(1, 2)[:, None]

    # ------------------------------------------------------------ rows and columns

    def _first(self) -> int:
        """The oldest row's column."""
        return min((row.started for row in self.rows), default=self._column)

    def _close(self, alive: Sequence[bool]) -> None:
        if all(alive):
            return
        order = compacted(alive)
        self._prompts.move(*_moves(order), slice(0, self._prompts.columns))
        self.prefixes = [self.prefixes[at] for at in order]
        for slot, prefix in enumerate(self.prefixes):
            prefix.slot = slot

    def _make_room(self) -> None:
        """Slots for all rows, and a free column: columns that nobody sees any more are given back first."""
        first = self._first()
        if self._column >= self._own.columns and first > self._own.columns // 4:
            self._own.to_front(slice(first, self._column))
            self.rows = [row._replace(started=row.started - first) for row in self.rows]
            self._column -= first
        columns = self._own.columns
        if self._column >= columns:
            columns = max(COLUMNS, self._column + max(COLUMNS, self._column // 2))
        self._own.reserve(len(self.rows), columns)

    def _compose(self) -> None:
        """Work out what the layers read, from the rows as they are."""
        members: list[list[int]] = [[] for _ in self.prefixes]
        for at, row in enumerate(self.rows):
            members[row.prefix.slot].append(at)
        most = max(map(len, members))
        grid = [own[at] if at < len(own) else 0 for own in members for at in range(most)]
        place = [0] * len(self.rows)
        for slot, own in enumerate(members):
            for at, row_at in enumerate(own):
                place[row_at] = slot * most + at
        length, started = [p.length for p in self.prefixes], [row.started for row in self.rows]
        self._composition = Composition(
            self._tensor(grid),
            self._tensor(place),
            min(started),
            max(length),
            self._unseen(length),
            self._late(started),
        )
        self._position = self._tensor([row.prefix.length + self._column - row.started for row in self.rows])[:, None]

    def _unseen(self, length: list[int]) -> Tensor | None:
        if min(length) == max(length):
            return None
        hidden = torch.arange(max(length), device=self.device) >= self._tensor(length)[:, None]  # [P, S]
        return _hiding(hidden[:, None, None])

    def _late(self, started: list[int]) -> Tensor | None:
        if min(started) == max(started):
            return None
        hidden = torch.arange(self._own.columns, device=self.device) < self._tensor(started)[:, None]  # [B, columns]
        return _hiding(hidden[:, None, None])

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    # ------------------------------------------------------------ attention

    def _write_prompts(self, layer: int, key: Tensor, value: Tensor) -> None:
        filling = self._filling or []
        slots = slice(filling[0].slot, filling[0].slot + len(filling))
        for store, new in zip(self._prompts.of(layer, key, value), (key, value), strict=True):
            store[slots, :, : new.shape[2]] = new

    def _attend_prompt(self, layer: int, query: Tensor, kind: Kind) -> tuple[Tensor, Tensor] | None:
        """query [B, J, R, D] -> attention over each row's prompt [B, J, R, D], and the log-sum-exp of its scores
        [B, J, R]; None where no prompt has a token before its last.
        """
        now = self._now()
        if not now.shared:
            return None
        num, (heads, repeat) = len(self.prefixes), query.shape[1:3]
        keys, values = (part[:num, :, : now.shared] for part in self._prompts.layers[layer])
        by_prompt = query[now.grid].unflatten(0, (num, -1)).transpose(1, 2)  # [P, J, M, R, D]
        out, size = _attend(by_prompt.flatten(2, 3), keys, values, self._hidden_of_prompt(kind, repeat), kind)
        out = out.unflatten(2, (-1, repeat)).transpose(1, 2).reshape(-1, heads, repeat, out.shape[-1])  # [P*M, J, R, D]
        size = size.unflatten(2, (-1, repeat)).transpose(1, 2).reshape(-1, heads, repeat)  # [P*M, J, R]
        return out[now.place], size[now.place]

    def _hidden_of_prompt(self, kind: Kind, repeat: int) -> Tensor | None:
        """What is added to the scores of a prompt's tokens: padding, and tokens beyond a sliding window,
        [P, 1, M * R or 1, S].
        """
        now, window = self._now(), kind.window
        if window is None:
            return now.unseen
        if window not in self._far:
            at = self._position[:, 0][now.grid].view(len(self.prefixes), 1, -1, 1)  # [P, 1, M, 1]
            far = torch.arange(now.shared, device=self.device) <= at - window  # [P, 1, M, S]
            hidden = _hiding(far.repeat_interleave(repeat, 2))
            self._far[window] = hidden if now.unseen is None else hidden + now.unseen
        return self._far[window]

    def _attend_own(self, layer: int, query: Tensor, shared: tuple[Tensor, Tensor] | None, kind: Kind) -> Tensor:
        """query [B, J, R, D] -> attention over prompt and own tokens, [B, J, R, D].

        The prompt takes part as one more column, whose score is the log of its sum and whose value is its attention.
        """
        first, last = self._first_seen(kind.window), self._column + 1
        keys, values = (part[: len(self.rows), :, first:last] for part in self._own.layers[layer])
        late = self._now().late
        scores = _scores(query, keys, None if late is None else late[..., first:last], kind)  # [B, J, R, C]
        columns = [scores]
        if shared is not None:
            columns.append(shared[1].to(scores.dtype)[..., None])
        if kind.sinks is not None:
            columns.append(kind.sinks.to(scores.dtype).view(1, *query.shape[1:3], 1).expand(len(query), -1, -1, 1))
        p = torch.softmax(torch.cat(columns, -1) if len(columns) > 1 else scores, -1)
        size = last - first
        out = p[..., :size].to(values.dtype) @ values  # [B, J, R, D]
        return out if shared is None else out + p[..., size : size + 1] * shared[0]

    def _first_seen(self, window: int | None) -> int:
        """The first column that a step reads: positions and columns advance together, so a window is a slice."""
        first = self._now().first
        return first if window is None else max(first, self._column + 1 - window)

    def _now(self) -> Composition:
        assert self._composition is not None, "step composes before the layers run"
        return self._composition


def compacted(alive: Sequence[bool]) -> list[int]:
    """Old indices in their new order: the holes are filled from the end, so that few move."""
    count = sum(alive)
    spare = [at for at in range(count, len(alive)) if alive[at]]
    return [at if alive[at] else spare.pop() for at in range(count)]


def _moves(order: list[int]) -> tuple[list[int], list[int]]:
    moved = [(old, new) for new, old in enumerate(order) if old != new]
    return [old for old, _ in moved], [new for _, new in moved]


def _hiding(hidden: Tensor) -> Tensor:
    """True -> a number that takes a score out, False -> 0."""
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, HIDDEN)


def _scores(query: Tensor, keys: Tensor, bias: Tensor | None, kind: Kind) -> Tensor:
    """query [X, J, M, D], keys [X, J, S, D] -> scores [X, J, M, S] in float32 or wider."""
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = ((query.to(keys.dtype) * kind.scale) @ keys.transpose(-1, -2)).to(wide)
    if kind.softcap is not None:
        scores = kind.softcap * torch.tanh(scores / kind.softcap)
    return scores if bias is None else scores + bias


def _attend(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, kind: Kind) -> tuple[Tensor, Tensor]:
    """query [X, J, M, D], keys, values [X, J, S, D] -> attention [X, J, M, D], log-sum-exp of its scores [X, J, M]."""
    if query.device.type == "cpu" and kind.softcap is None and keys.shape[-1] == values.shape[-1]:
        if bias is not None:  # finite in float16, too
            bias = bias.clamp(min=torch.finfo(query.dtype).min / 2).to(query.dtype)
        out, size = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys, values, attn_mask=bias, scale=kind.scale
        )
        return out, size
    scores = _scores(query, keys, bias, kind)
    size = scores.logsumexp(-1, keepdim=True)
    return (scores - size).exp().to(values.dtype) @ values, size[..., 0]


def _causal(query: Tensor, key: Tensor, value: Tensor, kind: Kind) -> Tensor:
    """Prompts padded on the right: query [P, H, S, D], key, value [P, J, S, D] -> [P, S, H, D]."""
    if kind.softcap is None and kind.sinks is None and (kind.window is None or kind.window >= query.shape[2]):
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=kind.scale, enable_gqa=query.shape[1] != key.shape[1]
        )
        return out.transpose(1, 2).contiguous()
    repeat, size = query.shape[1] // key.shape[1], query.shape[2]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    at = torch.arange(size, device=query.device)
    hidden = at[None] > at[:, None]  # [S, S]
    if kind.window is not None:
        hidden |= at[None] <= at[:, None] - kind.window
    scores = _scores(query, key, _hiding(hidden), kind)
    if kind.sinks is not None:
        extra = kind.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(len(query), -1, size, 1)
        scores = torch.cat([scores, extra], -1)
    out = torch.softmax(scores, -1)[..., :size].to(value.dtype) @ value
    return out.transpose(1, 2).contiguous()
