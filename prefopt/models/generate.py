"""Completions through the model's own `generate`: for architectures whose tokens meet outside of pluggable attention.

Every draw is prefopt's, made where `generate` asks for changed scores, so that random streams, log-probs and ends are
those of every other sampler; `generate` keeps the model's cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from prefopt.models.draw import draw, uniforms
from prefopt.models.sampling import Sampling
from prefopt.models.writing import Asked, Ending, Writing


class _Draw:
    """A logits processor that draws, notes, and leaves one token possible; and the stopping criterion that goes with
    it.
    """

    def __init__(self, rows: Sequence[Writing], sampling: Sampling, ending: Ending) -> None:
        self.rows, self.sampling, self.ending = rows, sampling, ending

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """scores [B, V] -> 0 at the token drawn, minus infinity elsewhere."""
        greedy = self.sampling.temperature == 0
        drawn = draw(scores, self.sampling, None if greedy else uniforms([r.stream for r in self.rows], scores.device))
        for row, token, logp in zip(self.rows, drawn.token.tolist(), drawn.logp.tolist(), strict=True):
            if not row.done:
                row.add(token, logp, self.ending)
        only = torch.full_like(scores, float("-inf"))
        return only.scatter_(1, drawn.token[:, None], 0.0)

    def stopped(self, ids: Tensor, scores: Any, **other: Any) -> Tensor:
        """Which rows are done, [B] bool."""
        return torch.tensor([row.done for row in self.rows], device=ids.device)


def generated(
    model: Any, asked: Sequence[Asked], sampling: Sampling, ending: Ending, tokens: int, mixed: bool
) -> Iterator[Writing]:
    """What is asked, in batches of up to `tokens` prompt and completion tokens, padded on the left.

    mixed: prompts of unequal length may share a batch; some architectures see the padding.
    """
    for batch in _batches(asked, tokens, mixed):
        rows = [Writing(one) for one in batch]
        drawing = _Draw(rows, sampling, ending)
        prompts = [one.prompt for one in batch]
        width, device = max(map(len, prompts)), next(model.parameters()).device
        # padding on the left, so that every row's next token is at the right edge
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)  # [B, width]
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)  # [B, width]
        model.generation_config = _options(batch[0].limit)
        model.generate(
            input_ids=ids, attention_mask=mask, logits_processor=[drawing], stopping_criteria=[drawing.stopped]
        )
        yield from rows


def _options(max_tokens: int) -> Any:
    """`generate` without anything of its own: the model's defaults (top-k, repetition penalty) are set aside."""
    from transformers import GenerationConfig

    return GenerationConfig(max_new_tokens=max_tokens, do_sample=False, pad_token_id=0, use_cache=True)


def _batches(asked: Sequence[Asked], tokens: int, mixed: bool) -> Iterator[list[Asked]]:
    """Rows, longest prompt first, of one limit each, within the budget with their padding; at least one each."""
    batch: list[Asked] = []
    for one in asked:
        if batch:
            first = batch[0]
            full = (len(batch) + 1) * (len(first.prompt) + first.limit) > tokens
            if full or one.limit != first.limit or not (mixed or len(one.prompt) == len(first.prompt)):
                yield batch
                batch = []
        batch.append(one)
    if batch:
        yield batch
