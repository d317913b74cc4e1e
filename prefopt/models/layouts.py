"""Two ways to lay a batch out for a transformer, with the same answer: the packed tree and the padded rectangle.

Letters: G prompts, N completions, K completion tokens, T tokens in the packed row, S padded length.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prefopt.batch import Batch


@dataclass(frozen=True)
class Segment:
    """Queries start to stop of the packed row; they see the context before them (a prompt, or nothing) and
    themselves.
    """

    context: tuple[int, int]
    start: int
    stop: int


@dataclass(frozen=True)
class TreeRow:
    """A batch as one row without padding: each prompt once, its completions after it.

    ids, positions [T]: positions restart after the prompt for every completion. group, branch [T]: the prompt a token
    belongs to, and the completion (-1 in the prompt; unique over the row). at [K]: where each completion token stands;
    before [K]: the position that predicts it.
    """

    ids: Tensor
    positions: Tensor
    group: Tensor
    branch: Tensor
    at: Tensor
    before: Tensor
    segments: list[Segment]
    masks: dict[Any, Any] = field(default_factory=dict)  # block masks by sliding window, built when first asked for
    visits: list[int | None] = field(default_factory=list)  # the window of each attention call: the probe reads it

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> TreeRow:
        prompts, completions = batch.prompts.lengths.tolist(), batch.completions.lengths.tolist()
        owners = batch.group.tolist()
        prompt_rows, completion_rows = batch.prompts.rows(), batch.completions.rows()
        ids: list[Tensor] = []
        positions: list[int] = []
        group: list[int] = []
        branch: list[int] = []
        at: list[int] = []
        before: list[int] = []
        segments: list[Segment] = []
        end, n = 0, 0
        for g, size in enumerate(prompts):
            first, last = end, end + size
            ids.append(prompt_rows[g])
            positions += range(size)
            group += [g] * size
            branch += [-1] * size
            end = last
            while n < len(owners) and owners[n] == g:
                length = completions[n]
                ids.append(completion_rows[n])
                positions += range(size, size + length)
                group += [g] * length
                branch += [n] * length
                at += range(end, end + length)
                before += [last - 1, *range(end, end + length - 1)]
                # the first completion follows its prompt in the row: one causal run covers both
                segments.append(
                    Segment((first, first), first, end + length)
                    if end == last
                    else Segment((first, last), end, end + length)
                )
                end, n = end + length, n + 1

        def tensor(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64).to(device)

        return cls(
            torch.cat(ids).to(device),
            tensor(positions),
            tensor(group),
            tensor(branch),
            tensor(at),
            tensor(before),
            segments,
        )


@dataclass(frozen=True)
class PaddedRows:
    """A batch as a right-padded rectangle: ids, mask [N, S]; at, before [K] index its flattened positions."""

    ids: Tensor
    mask: Tensor
    at: Tensor
    before: Tensor

    @classmethod
    def of(cls, batch: Batch, device: torch.device, pad: int = 0) -> PaddedRows:
        size, length = batch.prompts.lengths[batch.group], batch.completions.lengths  # [N], [N]
        width = int((size + length).max())
        ids = torch.full((len(size) * width,), pad, dtype=torch.int64, device=size.device)
        row, place = _places(size)  # of every prompt token, once for each completion
        first = (batch.prompts.lengths.cumsum(0) - batch.prompts.lengths)[batch.group]  # [N]
        ids[row * width + place] = batch.prompts.values[first[row] + place]
        row, place = _places(length)  # of every completion token, [K]
        at = row * width + size[row] + place
        ids[at] = batch.completions.values
        mask = torch.arange(width, device=size.device) < (size + length)[:, None]
        at = at.to(device)
        return cls(ids.view(-1, width).to(device), mask.long().to(device), at, at - 1)


def _places(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The row of each token of rows laid end to end, and its place in that row."""
    row = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    return row, torch.arange(len(row), device=lengths.device) - (lengths.cumsum(0) - lengths)[row]
