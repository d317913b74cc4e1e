from __future__ import annotations

import logging

import pytest
import torch

from prefopt.budget import Budget, is_out_of_memory
from prefopt.records import InputError

# as torch 2.13 words them, on a GPU and on a CPU
GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of ...")
CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4000000000000 bytes. Error code 12 (Cannot allocate memory)"
)
OURS = MemoryError()


def work(limit: int, error: BaseException, seen: list[int]):
    """Cuts ten rows of 10 tokens by the budget, as the loop does, and fails above `limit` tokens."""

    def run(tokens: int) -> int:
        seen.append(tokens)
        total, rows = 0, max(tokens // 10, 1)
        for start in range(0, 10, rows):
            if 10 * min(rows, 10 - start) > limit:
                raise error
            total += sum(range(start, min(start + rows, 10)))
        return total

    return run


@pytest.mark.parametrize("error", [GPU, CPU, OURS], ids=["gpu", "cpu", "python"])
@pytest.mark.fault(24, 25)
def test_the_budget_halves_until_it_fits_and_the_result_is_the_same(error, caplog):
    seen: list[int] = []
    budget = Budget(100)
    with caplog.at_level(logging.WARNING, "prefopt"):
        assert budget.run(work(30, error, seen), smallest=10) == sum(range(10))
    assert seen == [100, 50, 25] and budget.tokens == 25
    assert "tokens_per_forward halved to 50" in caplog.text and "halved to 25" in caplog.text
    assert budget.run(work(30, error, seen), smallest=10) == sum(range(10))
    assert seen[3:] == [25]  # the smaller budget is kept


def test_without_trouble_nothing_changes(caplog):
    budget, seen = Budget(100), []
    assert budget.run(work(1000, GPU, seen), smallest=10) == sum(range(10))
    assert seen == [100] and budget.tokens == 100 and not caplog.text


def test_what_a_failed_attempt_left_is_undone_before_the_next():
    weight = torch.ones(1, requires_grad=True)
    order = []

    def step(tokens: int) -> None:
        order.append(tokens)
        for value in (1.0, 2.0, 3.0):
            (value * weight).sum().backward()
            if tokens > 50 and value == 2.0:
                raise GPU

    def undo() -> None:
        order.append("undo")
        weight.grad = None

    Budget(100).run(step, smallest=1, undo=undo)
    assert order == [100, "undo", 50] and weight.grad.item() == 6


@pytest.mark.parametrize("error", [GPU, CPU, OURS], ids=["gpu", "cpu", "python"])
@pytest.mark.fault(24, 25)
def test_below_the_smallest_row_the_error_says_what_to_try(error):
    undone = []
    with pytest.raises(InputError) as caught:
        Budget(100).run(work(5, error, []), smallest=40, undo=lambda: undone.append(1))
    said = str(caught.value)
    assert "one prompt of 40 tokens" in said and "\n" not in said
    for advice in ("gradient_checkpointing=true", "max_length", "lora_rank=16", "dtype=bfloat16"):
        assert advice in said
    assert len(undone) == 3  # at 100, 50 and 25, where one prompt goes alone already


def test_where_processes_must_march_together_it_stops_at_once_and_says_so():
    seen: list[int] = []
    with pytest.raises(InputError, match="lower tokens_per_forward"):
        Budget(100, together=True).run(work(30, GPU, seen), smallest=10)
    assert seen == [100]


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("no"), KeyError("x")]
)
def test_other_errors_pass_through_untouched(error):
    seen: list[int] = []
    budget = Budget(100)
    with pytest.raises(type(error)) as caught:
        budget.run(work(30, error, seen), smallest=10, undo=lambda: pytest.fail("nothing to undo"))
    assert caught.value is error and seen == [100] and budget.tokens == 100


@pytest.mark.fault(24)
def test_a_real_allocation_that_cannot_be_met_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_a_budget_below_one_token_is_refused():
    for tokens in (0, -5):
        with pytest.raises(InputError, match=f"at least 1, got {tokens}"):
            Budget(tokens)
