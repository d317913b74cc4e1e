"""What a loss needs of a whole update: equal to one process's, in any number of passes, and without copies."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from laws import apart, batch_of, one_update, rows

from prefopt import ranks
from prefopt.batch import Batch
from prefopt.budget import Budget
from prefopt.loop import Models
from prefopt.objectives import AOT, BCO, KTO, update


@pytest.mark.parametrize("tokens", [1, 30, 10**6])
def test_log_probs_without_gradient_are_the_policys_in_any_number_of_passes(monkeypatch, tokens):
    monkeypatch.setattr(update, "PASS_TOKENS", tokens)
    models, batch = apart(), batch_of("pairs")
    found = update.policy_logp(batch, models)
    assert not found.requires_grad
    assert torch.allclose(found, models.policy(batch).logp, rtol=0, atol=1e-12)


def test_passes_are_bounded(monkeypatch):
    monkeypatch.setattr(update, "PASS_TOKENS", 40)
    models, batch, seen = apart(), batch_of("pairs", num=8), []

    def policy(part: Batch) -> Any:
        seen.append(sum(part.tokens_per_prompt()))
        return apart().policy(part)

    models.policy = policy
    update.policy_logp(batch, models)
    assert len(seen) > 2 and max(seen) <= 40


@pytest.mark.parametrize("repeat", [False, True])
def test_passes_keep_to_the_runs_budget(repeat):
    """repeat: a layout that computes the prompt anew for each completion."""
    models, seen = counted(apart(), repeat)
    models.budget, batch = Budget(60, repeat=repeat), batch_of("pairs", num=8)
    update.policy_logp(batch, models)
    assert len(seen) > 2 and max(seen) <= 60


@pytest.mark.parametrize("objective", [KTO(), BCO(), AOT()])
def test_an_update_hands_its_budget_to_the_objective(objective):
    models, seen = counted(apart(), False)
    one_update(objective, batch_of(objective.facts.data, num=8), models, tokens=30)
    assert len(seen) > 4 and max(seen) <= 30


def test_memory_that_runs_out_halves_the_runs_budget():
    models, batch = apart(), batch_of("pairs", num=8)
    whole, policy, models.budget = models.policy(batch).logp, models.policy, Budget(1000)

    def scarce(part: Batch) -> Any:
        if sum(part.tokens_per_prompt()) > 60:
            raise MemoryError
        return policy(part)

    models.policy = scarce
    assert torch.allclose(update.policy_logp(batch, models), whole, rtol=0, atol=1e-12)
    assert models.budget.tokens == 62  # 1000 halved four times


def counted(models: Models, repeat: bool) -> tuple[Models, list[int]]:
    """The models, and a list that grows by the tokens of each of the policy's passes."""
    policy: Any = models.policy
    seen: list[int] = []

    def counting(part: Batch) -> Any:
        seen.append(sum(part.tokens_per_prompt(repeat)))
        return policy(part)

    counting.model = policy.model  # type: ignore[attr-defined]
    models.policy = counting
    return models, seen


def on_ranks(monkeypatch: Any, shares: list[tuple[Batch, torch.Tensor]]) -> list[update.Everyone]:
    """What each of several processes gets, each holding a batch and values of its prompts."""
    sent = [(batch.filler, values) for batch, values in shares]
    monkeypatch.setattr(ranks, "gather", lambda value: list(sent))
    found = []
    for number, (batch, values) in enumerate(shares):
        monkeypatch.setattr(ranks, "rank", lambda number=number: number)
        found.append(update.everyone(batch, values))
    return found


def test_everyone_is_this_process_alone_where_there_is_one():
    batch = batch_of("pairs", num=3)
    values = torch.arange(6.0).view(3, 2).requires_grad_()
    found = update.everyone(batch, values)
    assert torch.equal(found.values, values) and not found.values.requires_grad
    assert found.own == slice(0, 3)


def test_every_process_sees_all_values_and_its_own_place(monkeypatch):
    examples = rows("pairs", num=5)
    values = torch.arange(10.0).view(5, 2)
    shares = [(Batch.of(examples[:3]), values[:3]), (Batch.of(examples[3:]), values[3:])]
    for found, (_, own) in zip(on_ranks(monkeypatch, shares), shares, strict=True):
        assert torch.equal(found.values, values)
        assert torch.equal(found.values[found.own], own)


def test_a_process_without_a_prompt_of_its_own_adds_nothing(monkeypatch):
    """Four processes, two prompts: the last two got the first prompt again."""
    examples = rows("pairs", num=2)
    one, two = Batch.of(examples[:1]), Batch.of(examples[1:])
    filler = replace(one, filler=True)
    first, second = torch.tensor([[1.0]]), torch.tensor([[5.0]])
    found = on_ranks(monkeypatch, [(one, first), (two, second), (filler, first), (filler, first)])
    assert [one.values.tolist() for one in found] == [[[1.0], [5.0]]] * 4
    assert [one.own for one in found] == [slice(0, 1), slice(1, 2), slice(0, 1), slice(0, 1)]


def test_a_row_that_repeats_the_first_counts(monkeypatch):
    """Three processes, three prompts, the last equal to the first in its texts."""
    [one] = rows("labels", num=1)
    other = replace(one, prompt=[*one.prompt, 1])
    values = [torch.tensor([[x]]) for x in (1.0, 5.0, 7.0)]
    found = on_ranks(monkeypatch, list(zip(map(Batch.of, ([one], [other], [one])), values, strict=True)))
    assert [one.values.tolist() for one in found] == [[[1.0], [5.0], [7.0]]] * 3
    assert [one.own for one in found] == [slice(0, 1), slice(1, 2), slice(2, 3)]
