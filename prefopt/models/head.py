"""Log-probabilities of chosen tokens straight from hidden states: the [K, V] logits exist one chunk at a time.

Letters: K positions, D hidden width, V vocabulary, C positions in a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 256 * 2**20  # logits held at once; larger chunks make better matrix products, smaller ones less memory


@dataclass(frozen=True)
class Head:
    """A language-model head: logits = softcap(scale * (hidden @ weight.T + bias)) / temperature.

    weight [V, D], bias [V] or None, scale a number (Cohere multiplies, Granite divides), softcap nats or None (Gemma
    2). temperature: above 0, of the distribution that completions are drawn from.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    chunk_bytes: int = CHUNK_BYTES

    def __call__(
        self, hidden: Tensor, token: Tensor, entropy: bool = False, collision: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """hidden [K, D], token [K] int64 -> log-prob of each token [K], entropy [K] or None and collision [K] or None.

        Nats, float32 or wider; collision is log sum_v p_v^2 and carries no gradient. Exact up to rounding of the logits
        to the hidden states' dtype; gradients flow to hidden, weight and bias.
        """
        wide = torch.promote_types(hidden.dtype, torch.float32)
        keep = torch.is_grad_enabled()  # inside the function it is always off
        logp, spread, squares = _ChunkedLogp.apply(
            hidden, self.weight, self.bias, token, self, entropy, collision, keep
        )
        return logp.to(wide), spread if entropy else None, squares if collision else None

    def logits(self, hidden: Tensor) -> Tensor:
        """[C, D] -> [C, V] in the dtype of `hidden`."""
        z = hidden @ self.weight.t() if self.bias is None else torch.addmm(self.bias, hidden, self.weight.t())
        if self.softcap is not None:
            return z.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)
        return z if self.slope == 1.0 else z.mul_(self.slope)

    @property
    def slope(self) -> float:
        """What a logit gains by a unit of hidden @ weight.T where no soft cap bends it."""
        return self.scale / self.temperature

    def rows_per_chunk(self) -> int:
        return max(1, self.chunk_bytes // (self.weight.shape[0] * self.weight.element_size()))


class _ChunkedLogp(torch.autograd.Function):
    """The head and the log-softmax as one function; a chunk's logit gradient is kept if there is one chunk, else
    recomputed.

    d logp_k / d logit_kv = 1[v = token_k] - p_kv, minus what the code calls the pull. The incoming gradient is a number
    per row, so it multiplies the [C, D] side of the two products and the softmax is the one element-wise pass over the
    vocabulary.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token: Tensor,
        head: Head,
        entropy: bool,
        collision: bool,
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = head.rows_per_chunk()
        keep = keep and len(token) <= rows and head.softcap is None and not entropy
        logp: list[Tensor] = []
        spread: list[Tensor] = []
        squares: list[Tensor] = []
        kept = None
        for start in range(0, len(token), rows):
            cut = slice(start, start + rows)
            p, chunk_logp, chunk_entropy = _chunk(head, hidden[cut], token[cut], entropy)
            logp.append(chunk_logp)
            if chunk_entropy is not None:
                spread.append(chunk_entropy)
            if collision:
                squares.append(_collision(p))
            kept = _pull(p, token) if keep else None
        ctx.head, ctx.rows = head, rows
        ctx.save_for_backward(hidden, weight, bias, token, kept)
        ctx.set_materialize_grads(False)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        whole = [torch.cat(found) if found else hidden.new_empty(0, dtype=wide) for found in (logp, spread, squares)]
        ctx.mark_non_differentiable(whole[2])
        return whole[0], whole[1], whole[2]

    @staticmethod
    def backward(
        ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, token, kept = ctx.saved_tensors
        head: Head = ctx.head
        if grad_logp is None:
            grad_logp = torch.zeros(len(token), dtype=torch.float32, device=hidden.device)
        wants = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if wants[0] else None
        grad_weight = torch.zeros_like(weight) if wants[1] else None
        grad_bias = torch.zeros_like(bias) if wants[2] else None
        for start in range(0, len(token), ctx.rows):
            cut = slice(start, start + ctx.rows)
            h, g = hidden[cut], grad_logp[cut][:, None]  # [C, D], [C, 1]
            if kept is not None:
                pull, row = kept, -g * head.slope
            elif grad_entropy is None and head.softcap is None:
                pull, row = _pull(torch.softmax(head.logits(h), -1), token[cut]), -g * head.slope
            else:
                ge = None if grad_entropy is None else grad_entropy[cut]
                pull = _logit_gradient(head, h, token[cut], grad_logp[cut], ge)
                row = torch.full_like(g, head.slope)
            if grad_hidden is not None:
                grad_hidden[cut] = (row * (pull @ weight)).to(h.dtype)
            if grad_weight is not None:
                _add_product(grad_weight, pull.t(), (row * h).to(h.dtype), first=start == 0)
            if grad_bias is not None:
                grad_bias.addmv_(pull.t(), row[:, 0].to(h.dtype))
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total = a @ b for the first chunk, total += a @ b for the others."""
    if first:
        torch.mm(a, b, out=total)
    else:
        total.addmm_(a, b)


def _collision(p: Tensor) -> Tensor:
    """Probabilities [C, V] -> log of the sum of their squares, [C]; the sum is at least 1/V, so never underflows."""
    p = p.to(torch.promote_types(p.dtype, torch.float32))
    return torch.linalg.vecdot(p, p).log()


def _pull(p: Tensor, token: Tensor) -> Tensor:
    """p_kv - 1[v = token_k], over the memory of p [C, V]: a product then sums a token's many rows in full precision."""
    row = torch.arange(len(token), device=token.device)
    p[row, token] -= 1  # not scatter_add_, which on a CPU widens the whole of a 16-bit tensor
    return p


def _chunk(head: Head, h: Tensor, y: Tensor, entropy: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """[C, D], [C] -> probabilities [C, V] (over the logits' own memory), logp [C], entropy [C] or None."""
    wide = torch.promote_types(h.dtype, torch.float32)
    z = head.logits(h)
    top = z.amax(-1, keepdim=True)  # [C, 1]
    at_token = z.gather(1, y[:, None])[:, 0].to(wide)
    weighted = None
    if entropy:
        p = torch.softmax(z, -1)
        weighted = torch.linalg.vecdot(p.to(wide), (z - top).to(wide))  # E[z] - top, [C]
    else:
        p = torch.softmax(z, -1, out=z)  # row by row, so it may overwrite its input
    # log-sum-exp from the largest probability, which is at least 1/V: never underflows
    normaliser = top[:, 0].to(wide) - p.amax(-1).to(wide).log()
    spread = None if weighted is None else normaliser - top[:, 0].to(wide) - weighted
    return p, at_token - normaliser, spread


def _logit_gradient(head: Head, h: Tensor, y: Tensor, g: Tensor, ge: Tensor | None) -> Tensor:
    """Gradient with respect to the logits before the soft cap, [C, V]: the way that serves the soft cap and the
    entropy.
    """
    z = head.logits(h).to(torch.promote_types(h.dtype, torch.float32))
    logp = torch.log_softmax(z, -1)
    p = logp.exp()
    pull = p * -g[:, None]
    pull.scatter_add_(1, y[:, None], g[:, None].to(pull.dtype))
    if ge is not None:
        mean = (p * logp).sum(-1, keepdim=True)  # minus the entropy
        pull -= ge[:, None] * p * (logp - mean)
    if head.softcap is not None:
        pull *= 1 - (z * (head.temperature / head.softcap)).square()
    return pull.to(h.dtype)
