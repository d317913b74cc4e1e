"""One token for every row of logits, and its log-prob under exactly the distribution it was drawn from.

Letters: B rows, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prefopt.models.sampling import Sampling

BLOCK = 256  # tokens whose probabilities are first summed: near the square root of a vocabulary
LIKELIEST = 1024  # tokens sorted for top-p at first; where they do not reach the share, all are


class Drawn(NamedTuple):
    """token [B] int64; logp [B] float32 or wider, nats; NaN where the logits were no numbers."""

    token: Tensor
    logp: Tensor


class Stream:
    """A completion's own random numbers: equal for equal seed and number, whatever is drawn beside it."""

    def __init__(self, seed: int, number: int) -> None:
        self._random = random.Random(f"{seed}/{number}")

    def pair(self) -> tuple[float, float]:
        """What one token needs: two numbers in [0, 1)."""
        return self._random.random(), self._random.random()


def uniforms(streams: Sequence[Stream], device: torch.device) -> Tensor:
    """The next numbers of every stream, [B, 2] float64."""
    return torch.tensor([stream.pair() for stream in streams], dtype=torch.float64).to(device)


def draw(logits: Tensor, sampling: Sampling, uniform: Tensor | None) -> Drawn:
    """logits [B, V], uniform [B, 2] in [0, 1) -> a token of each row; at temperature 0 the likeliest, without uniform.

    By inverse distribution function in two levels, each with a number of its own: a block of tokens, then a token in
    it. Rounding of the logits then changes a token only where a number falls next to one of a few hundred borders, not
    of V.
    """
    if uniform is None:
        token = logits.argmax(-1)
        return Drawn(token, 0.0 * logits.amax(-1).to(torch.promote_types(logits.dtype, torch.float32)))
    p = probabilities(logits, sampling)
    block, total = _pick(_block_sums(p), uniform[:, 0])
    at = block[:, None] * BLOCK + torch.arange(BLOCK, device=p.device)  # [B, BLOCK]
    inside = p.gather(1, at.clamp(max=p.shape[1] - 1)).masked_fill_(at >= p.shape[1], 0.0)
    place, _ = _pick(inside, uniform[:, 1])
    chosen = inside.gather(1, place[:, None])[:, 0]
    return Drawn(block * BLOCK + place, (chosen / total).log().to(p.dtype))


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """[B, V] -> what is drawn from, up to a factor of each row: 0 for the tokens that are cut off.

    Temperature first, then top-k, then top-p of what is left, then min-p. Tokens exactly as likely as the last one kept
    are kept too.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    if sampling.temperature != 1:
        logits = logits.to(wide) / sampling.temperature
    p = torch.softmax(logits, -1, dtype=wide)
    return p.masked_fill_(p < _least(p, sampling), 0.0) if sampling.truncated else p


def _least(p: Tensor, sampling: Sampling) -> Tensor:
    """The smallest probability that is kept, [B, 1]."""
    least = p.amax(-1, keepdim=True) * sampling.min_p
    top_k = min(sampling.top_k, p.shape[1])
    if sampling.top_p < 1:
        least = torch.maximum(least, _least_of_share(p, top_k, sampling.top_p))
    elif top_k:
        least = torch.maximum(least, p.topk(top_k).values[:, -1:])
    return least


def _least_of_share(p: Tensor, top_k: int, top_p: float) -> Tensor:
    """The smallest of the fewest likeliest probabilities that reach the share top_p of the likeliest top_k (0: of all),
    [B, 1].
    """
    value = p.topk(top_k or min(LIKELIEST, p.shape[1])).values
    reached = value.cumsum(-1, dtype=torch.float64)
    whole = reached[:, -1:] if top_k else p.sum(-1, keepdim=True, dtype=torch.float64)
    if not top_k and bool((reached[:, -1:] < top_p * whole).any()):
        value = p.sort(descending=True).values
        reached = value.cumsum(-1, dtype=torch.float64)
    kept = (reached - value < top_p * whole).sum(-1, keepdim=True)  # at least 1
    return value.gather(1, kept - 1)


def _block_sums(p: Tensor) -> Tensor:
    """[B, V] -> sums over BLOCK tokens each, the last over what is left, [B, ceil(V / BLOCK)]."""
    whole = p.shape[1] // BLOCK * BLOCK
    sums = p[:, :whole].reshape(len(p), whole // BLOCK, BLOCK).sum(-1)
    return sums if whole == p.shape[1] else torch.cat([sums, p[:, whole:].sum(-1, keepdim=True)], 1)


def _pick(weight: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """weight [B, M] not negative, uniform [B] -> an index drawn with that weight [B], and the weights' sum [B]."""
    reached = weight.cumsum(-1, dtype=torch.float64)
    total = reached[:, -1]
    # below the total also where the product rounds up to it: an index of weight 0 is never taken
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    place = torch.searchsorted(reached, target[:, None], right=True)[:, 0]
    # where the weights are no numbers it is past the end: on a GPU that would end the process
    return place.clamp(max=weight.shape[1] - 1), total
