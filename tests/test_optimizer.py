from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from prefopt import optimizer
from prefopt.optimizer import Updater

BETAS, EPS, DECAY = (0.9, 0.99), 1e-7, 0.1


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2)).to(dtype)


def loss(model: nn.Module, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    x = torch.randn(5, 3).to(next(model.parameters()).dtype)
    return model(x).square().sum()


def one_weight(value: list[float], dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value, dtype=dtype))


def pulled(weight: nn.Parameter, grad: list[float]) -> None:
    """A backward pass that gives `weight` this gradient."""
    (weight * torch.tensor(grad, dtype=weight.dtype)).sum().backward()


def test_the_first_step_by_hand():
    # Adam's first step is the learning rate times the gradient's sign, whatever its size
    weight = one_weight([1.0, 2.0, 3.0])
    updater = Updater([weight], eps=0.0)
    pulled(weight, [0.5, -4.0, 1e-3])
    norm = updater.step(0.25, None)
    torch.testing.assert_close(weight.detach(), torch.tensor([0.75, 2.25, 2.75]))
    assert norm == pytest.approx(math.sqrt(0.25 + 16 + 1e-6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ten_steps_equal_torch_adamw_with_decay_on_matrices_only(dtype):
    model = network(dtype)
    twin = copy.deepcopy(model)
    updater = Updater(model.parameters(), betas=BETAS, eps=EPS, weight_decay=DECAY)
    matrices = [p for p in twin.parameters() if p.ndim >= 2]
    others = [p for p in twin.parameters() if p.ndim < 2]
    adam = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}], betas=BETAS, eps=EPS
    )
    for step in range(10):
        rate = 0.01 * (step + 1)
        loss(model, step).backward()
        updater.step(rate, None)
        for group in adam.param_groups:
            group["lr"] = rate
        adam.zero_grad()
        loss(twin, step).backward()
        adam.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_wide_weights_have_no_second_copy_and_narrow_ones_a_float32_one():
    wide, narrow = network(), network(torch.bfloat16)
    assert all(pair.master is pair.weight for pair in Updater(wide.parameters()).pairs)
    for pair in Updater(narrow.parameters()).pairs:
        assert pair.master.dtype == torch.float32 and pair.weight.dtype == torch.bfloat16
        assert torch.equal(pair.master, pair.weight.float())


def test_updates_too_small_for_bfloat16_add_up():
    # near 1 the next bfloat16 is 2^-7 away; steps of 1e-4 alone would round back to 1 for ever
    weight = one_weight([1.0], torch.bfloat16)
    updater = Updater([weight], betas=(0.0, 0.0), eps=0.0)
    values = []
    for _ in range(100):
        pulled(weight, [1.0])
        updater.step(1e-4, None)
        values.append(weight.item())
    assert values[0] == 1.0
    assert updater.pairs[0].master.item() == pytest.approx(0.99, abs=1e-5)
    assert weight.item() == torch.tensor(0.99).bfloat16().item() < 1.0


def test_bfloat16_weights_follow_the_float32_masters_of_a_float32_run():
    """The masters see what AdamW on float32 weights sees, if the gradients are the same."""
    narrow = one_weight([1.0, -2.0, 0.5], torch.bfloat16)
    wide = one_weight([1.0, -2.0, 0.5])
    ours, theirs = Updater([narrow], weight_decay=DECAY), Updater([wide], weight_decay=DECAY)
    for step in range(20):
        for weight, updater in ((narrow, ours), (wide, theirs)):
            pulled(weight, [1.0, 0.5 * (-1) ** step, 0.25])  # exact in bfloat16
            updater.step(1e-3, None)
        assert torch.equal(ours.pairs[0].master, wide)
        assert torch.equal(narrow, wide.bfloat16())


def test_gradients_of_many_passes_are_added_in_float32():
    # 1 + 2^-9 rounds to 1 in bfloat16: added there, 512 such passes would leave 1
    weight = one_weight([0.0], torch.bfloat16)
    updater = Updater([weight])
    pulled(weight, [1.0])
    for _ in range(512):
        pulled(weight, [2.0**-9])
    assert updater.pairs[0].master.grad.item() == 2.0
    assert weight.grad is None  # and no second gradient is kept
    assert updater.step(0.1, None) == 2.0


@pytest.mark.parametrize("piece", [1, 3, 4, 10, 11])
@pytest.mark.parametrize("turned", [False, True])
def test_narrow_gradients_are_added_piece_by_piece_to_the_same_sum(piece, turned, monkeypatch):
    monkeypatch.setattr(optimizer, "PIECE", piece)
    total, part = torch.arange(10.0).view(2, 5), torch.full((2, 5), 2.0**-9).cumsum(0).bfloat16()
    if turned:
        total, part = total.T, part.T
    wanted = total + part.float()
    assert optimizer._added(total, part) is total and torch.equal(total, wanted)


def test_a_split_step_is_the_whole_step():
    one, two = network(), network()
    whole, split = Updater(one.parameters()), Updater(two.parameters())
    for _ in range(3):
        (loss(one, 1) + loss(one, 2)).backward()
        loss(two, 1).backward()
        loss(two, 2).backward()
        assert whole.step(0.01, 1.0) == pytest.approx(split.step(0.01, 1.0), rel=1e-5)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clipping_by_hand_spans_all_weights(dtype):
    # gradients 3 and 4 in two tensors: norm 5, clipped to 1 they are 0.6 and 0.8
    first, second = one_weight([0.0], dtype), one_weight([0.0], dtype)
    updater = Updater([first, second])
    masters = [pair.master for pair in updater.pairs]
    pulled(first, [3.0])
    pulled(second, [4.0])
    used = {}
    step = updater.adam.step
    updater.adam.step = lambda: (used.update(grads=[m.grad.item() for m in masters]), step())
    assert updater.step(0.1, 1.0) == 5.0  # the norm before clipping
    assert used["grads"] == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize("limit", [None, 5.0, 100.0])
def test_a_gradient_within_the_limit_is_not_touched(limit):
    weight = one_weight([0.0, 0.0])
    updater = Updater([weight])
    pulled(weight, [3.0, 4.0])
    used = []
    step = updater.adam.step
    updater.adam.step = lambda: (used.append(weight.grad.tolist()), step())
    updater.step(0.1, limit)
    assert used == [[3.0, 4.0]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.fault(13)
def test_a_gradient_that_is_not_finite_changes_nothing(bad, dtype):
    model = network(dtype)
    updater = Updater(model.parameters(), weight_decay=DECAY)
    loss(model, 0).backward()
    updater.step(0.01, 1.0)
    weights = copy.deepcopy([(pair.weight, pair.master) for pair in updater.pairs])
    state = copy.deepcopy(updater.adam.state_dict()["state"])
    loss(model, 1).backward()
    updater.pairs[2].master.grad[0] = bad
    assert updater.step(0.01, 1.0) is None
    for pair, (weight, master) in zip(updater.pairs, weights, strict=True):
        assert torch.equal(pair.weight, weight) and torch.equal(pair.master, master)
        assert pair.weight.grad is None and pair.master.grad is None
    for index, values in updater.adam.state_dict()["state"].items():
        assert all(torch.equal(value, state[index][name]) for name, value in values.items())
    loss(model, 2).backward()
    assert updater.step(0.01, 1.0) > 0  # and the run goes on


def test_a_step_clears_the_gradients():
    model = network(torch.bfloat16)
    updater = Updater(model.parameters())
    loss(model, 0).backward()
    updater.step(0.01, None)
    assert all(pair.weight.grad is None and pair.master.grad is None for pair in updater.pairs)


def test_undoing_a_failed_pass_forgets_its_gradient():
    weight = one_weight([0.0], torch.bfloat16)
    updater = Updater([weight])
    pulled(weight, [8.0])
    updater.zero()
    pulled(weight, [2.0])
    assert updater.norm().item() == 2.0


def test_a_weight_without_a_gradient_stays():
    used, unused = one_weight([1.0]), one_weight([1.0])
    updater = Updater([used, unused])
    pulled(used, [1.0])
    assert updater.step(0.5, 1.0) == 1.0
    assert used.item() == pytest.approx(0.5) and unused.item() == 1.0


def test_frozen_weights_are_left_alone_and_a_model_of_only_those_is_refused():
    model = network()
    model[0].requires_grad_(False)
    assert len(Updater(model.parameters()).pairs) == 4
    with pytest.raises(ValueError, match="no parameter is trainable"):
        Updater(model.requires_grad_(False).parameters())
