from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from prefopt.models.head import Head

K, D, V = 11, 6, 13
KINDS = {
    "plain": {},
    "scaled": {"scale": 0.7},
    "capped": {"softcap": 1.5},
    "scaled and capped": {"scale": 2.0, "softcap": 1.5},
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def inputs(dtype: torch.dtype = torch.float64, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """hidden [K, D], weight [V, D], bias [V] or None, token [K]; one token occurs in several rows."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(K, D, dtype=dtype), torch.randn(V, D, dtype=dtype)
    token = torch.randint(V, (K,))
    token[3] = token[0]
    offset = torch.randn(V, dtype=dtype) if bias else None
    for leaf in (hidden, weight, offset):
        if leaf is not None:
            leaf.requires_grad_()
    return hidden, weight, offset, token


def head(weight: Tensor, bias: Tensor | None, rows: int, **kind: float) -> Head:
    """A head that works on `rows` positions at a time."""
    return Head(weight, bias, chunk_bytes=rows * V * weight.element_size(), **kind)


def plain(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """Log-probabilities of the whole vocabulary, the textbook way, [K, V]."""
    logits = hidden @ weight.T + (0 if bias is None else bias)
    logits = scale * logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits, -1)


def plain_logp_and_entropy(logp: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    return logp[torch.arange(len(token)), token], -(logp.exp() * logp).sum(-1)


def test_three_tokens_by_hand():
    # logits of the one position: 1*1, 1*2, 1*0 -> log-sum-exp of 1, 2, 0
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[1.0], [2.0], [0.0]])
    total = math.log(math.e + math.e**2 + 1)
    logp, entropy, _ = Head(weight)(hidden, torch.tensor([1]), entropy=True)
    assert logp.item() == pytest.approx(2 - total, abs=1e-6)
    by_hand = -sum(math.exp(z - total) * (z - total) for z in (1, 2, 0))
    assert entropy.item() == pytest.approx(by_hand, abs=1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 4, K, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_and_gradients_are_those_of_a_plain_log_softmax(kind, rows, bias, entropy, dtype):
    hidden, weight, offset, token = inputs(dtype, bias)
    leaves = [x for x in (hidden, weight, offset) if x is not None]
    torch.manual_seed(1)
    pull, pull_entropy = torch.randn(K, dtype=dtype), torch.randn(K, dtype=dtype)  # a weight of either sign per token
    wanted, wanted_entropy = plain_logp_and_entropy(plain(hidden, weight, offset, **KINDS[kind]), token)
    logp, spread, _ = head(weight, offset, rows, **KINDS[kind])(hidden, token, entropy)
    close = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(logp, wanted, **close)
    loss, wanted_loss = (pull * logp).sum(), (pull * wanted).sum()
    if entropy:
        torch.testing.assert_close(spread, wanted_entropy, **close)
        loss = loss + (pull_entropy * spread).sum()
        wanted_loss = wanted_loss + (pull_entropy * wanted_entropy).sum()
    else:
        assert spread is None
    for got, expected in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(wanted_loss, leaves), strict=True):
        torch.testing.assert_close(got, expected, **close)


def test_the_entropy_alone_has_the_right_gradient():
    hidden, weight, offset, token = inputs()
    _, wanted = plain_logp_and_entropy(plain(hidden, weight, offset), token)
    _, spread, _ = head(weight, offset, 4)(hidden, token, entropy=True)
    leaves = [hidden, weight, offset]
    got, expected = torch.autograd.grad(spread.sum(), leaves), torch.autograd.grad(wanted.sum(), leaves)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("rows", [2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_finite_differences_agree_with_the_gradient(kind, rows):
    torch.manual_seed(0)
    hidden = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(V, dtype=torch.float64, requires_grad=True)
    token = torch.tensor([0, 7, 7, 12, 3])
    for entropy in (False, True):

        def scored(h: Tensor, w: Tensor, b: Tensor, entropy: bool = entropy) -> tuple[Tensor, ...]:
            return tuple(x for x in head(w, b, rows, **KINDS[kind])(h, token, entropy) if x is not None)

        assert torch.autograd.gradcheck(scored, (hidden, weight, bias))


@pytest.mark.parametrize("rows", [4, 100])
def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_the_same_one(rows):
    hidden, weight, offset, token = inputs()
    head(weight, offset, rows)(hidden, token)[0].sum().backward()
    wanted = hidden.grad
    hidden.grad, frozen = None, weight.detach()
    head(frozen, None if offset is None else offset.detach(), rows)(hidden, token)[0].sum().backward()
    assert frozen.grad is None
    torch.testing.assert_close(hidden.grad, wanted)


@pytest.mark.parametrize("rows", [4, 100])
def test_backward_can_run_twice(rows):
    hidden, weight, offset, token = inputs()
    total = head(weight, offset, rows)(hidden, token)[0].sum()
    first = torch.autograd.grad(total, [hidden, weight, offset], retain_graph=True)
    again = torch.autograd.grad(total, [hidden, weight, offset])
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_gives_the_float32_log_softmax_of_its_own_logits_within_rounding(kind):
    torch.manual_seed(0)
    hidden = torch.randn(40, 16).bfloat16()
    weight, token = (torch.randn(300, 16) / 4).bfloat16(), torch.randint(300, (40,))
    scorer = Head(weight, **KINDS[kind])
    wide = torch.log_softmax(scorer.logits(hidden).float(), -1)
    wanted, wanted_entropy = plain_logp_and_entropy(wide, token)
    for entropy in (False, True):
        logp, spread, _ = scorer(hidden, token, entropy)
        assert logp.dtype == torch.float32
        # probabilities carry 8 bits: a relative error of 2^-9 each
        torch.testing.assert_close(logp, wanted, atol=2**-8, rtol=0)
        if spread is not None:
            torch.testing.assert_close(spread, wanted_entropy, atol=2**-5, rtol=0)


@pytest.mark.parametrize("rows", [10, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_gradients_are_the_float32_ones_within_rounding(kind, rows):
    torch.manual_seed(0)
    narrow = [torch.randn(40, 16).bfloat16(), (torch.randn(300, 16) / 4).bfloat16()]
    token, pull = torch.randint(300, (40,)), torch.randn(40)
    grads = []
    for hidden, weight in (narrow, [x.float() for x in narrow]):
        hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        scorer = Head(weight, chunk_bytes=rows * 300 * weight.element_size(), **KINDS[kind])
        grads.append(torch.autograd.grad((pull * scorer(hidden, token)[0]).sum(), [hidden, weight]))
    for got, wanted in zip(*grads, strict=True):
        assert got.dtype == torch.bfloat16
        error = (got.float() - wanted).norm() / wanted.norm()
        assert error < 0.02  # a few roundings of 2^-9 each


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_logit_200_below_the_largest_has_log_prob_minus_200_and_not_minus_infinity(dtype):
    hidden, weight = torch.ones(1, 1, dtype=dtype), torch.tensor([[200.0], [0.0]], dtype=dtype)
    logp, _, _ = Head(weight)(hidden, torch.tensor([1]))
    assert logp.item() == pytest.approx(-200)
    hidden.requires_grad_()
    logp, entropy, _ = Head(weight)(hidden, torch.tensor([1]), entropy=True)
    (logp.sum() + entropy.sum()).backward()
    # d logp / d hidden = weight[1] - sum_v p_v weight_v = 0 - 200
    assert hidden.grad.item() == pytest.approx(-200)
    assert entropy.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("entropy", [False, True])
def test_no_position_gives_empty_results_and_a_zero_gradient(entropy):
    hidden, weight = torch.zeros(0, D, requires_grad=True), torch.ones(V, D, requires_grad=True)
    logp, spread, _ = Head(weight)(hidden, torch.zeros(0, dtype=torch.int64), entropy)
    assert logp.shape == (0,) and logp.dtype == torch.float32
    assert spread is None if not entropy else spread.shape == (0,)
    logp.sum().backward()
    assert hidden.grad.shape == (0, D)
    assert not weight.grad.any()


def test_a_chunk_holds_no_more_logits_than_asked_and_at_least_one_row():
    weight = torch.zeros(1000, 2)
    assert Head(weight, chunk_bytes=10 * 4000).rows_per_chunk() == 10
    assert Head(weight.bfloat16(), chunk_bytes=10 * 4000).rows_per_chunk() == 20
    assert Head(weight, chunk_bytes=1).rows_per_chunk() == 1


def test_the_whole_table_of_logits_never_exists_when_chunks_are_small(monkeypatch):
    sizes = []
    whole = Head.logits
    monkeypatch.setattr(Head, "logits", lambda self, h: sizes.append(len(h)) or whole(self, h))
    hidden, weight, offset, token = inputs()
    head(weight, offset, 4)(hidden, token)[0].sum().backward()
    assert sizes == [4, 4, 3] * 2  # forward, then backward again
    sizes.clear()
    head(weight, offset, K)(hidden, token)[0].sum().backward()
    assert sizes == [K]  # a single chunk's probabilities are kept


def test_a_token_that_occurs_often_keeps_its_whole_gradient_in_bfloat16():
    """600 equal rows: added one by one in bfloat16, the sum would stall at 256 times a term."""
    hidden = torch.ones(600, 16, dtype=torch.bfloat16)
    weight = torch.zeros(8, 16, dtype=torch.bfloat16, requires_grad=True)
    logp, _, _ = Head(weight)(hidden, torch.full((600,), 3))
    logp.sum().backward()
    wanted = torch.full((8, 16), -600 / 8)
    wanted[3] += 600
    torch.testing.assert_close(weight.grad.float(), wanted, rtol=0.01, atol=0)


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_collision_is_the_log_of_the_sum_of_squared_probabilities(kind, rows):
    hidden, weight, offset, token = inputs()
    wanted = plain(hidden, weight, offset, **KINDS[kind]).exp().square().sum(-1).log()
    logp, _, collision = head(weight, offset, rows, **KINDS[kind])(hidden, token, collision=True)
    torch.testing.assert_close(collision, wanted.detach(), atol=1e-12, rtol=0)
    assert not collision.requires_grad
    (bare,) = torch.autograd.grad(head(weight, offset, rows, **KINDS[kind])(hidden, token)[0].sum(), [weight])
    torch.testing.assert_close(torch.autograd.grad(logp.sum(), [weight])[0], bare)
