from __future__ import annotations

from typing import Any

import pytest
import torch

from prefopt import bench
from prefopt.batch import Batch
from prefopt.bench.space import Space, next_logp
from prefopt.bench.worlds import _model
from prefopt.models.policy import Policy
from prefopt.records import Example

every_world = pytest.mark.parametrize("name", ["small", "ended"])


def some(world: bench.World, prompts: list[int], every: int = 29) -> tuple[Batch, list[int]]:
    """A batch of every 29th completion of some prompts, and those completions' numbers."""
    numbers = list(range(0, len(world.space.tokens), every))
    rows = [world.space.completion(n) for n in numbers]
    flags = [[True] * len(row) for row in rows]
    return (
        Batch.of([Example(world.space.prompts[p].tolist(), rows, [0.0] * len(rows), flags) for p in prompts]),
        numbers,
    )


def moved(world: bench.World, dtype: torch.dtype = torch.float32) -> Any:
    """A model of the world's shape with large random weights, far from the reference."""
    model = _model(world.space, seed=1, dtype=dtype)
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return model.eval()


def test_a_tree_of_two_tokens_by_hand() -> None:
    space = Space.of([[3, 4]], content=2, longest=2, end=True)
    assert [space.completion(n) for n in range(len(space.tokens))] == [
        [2], [0, 2], [1, 2], [0, 0], [0, 1], [1, 0], [1, 1],
    ]  # fmt: skip
    assert space.depth.tolist() == [0, 1, 1] and space.parent.tolist() == [-1, 0, 0]
    assert space.places.tolist() == [[0, 0], [0, 1], [0, 2], [0, 1], [0, 1], [0, 2], [0, 2]]
    # prompt's first token, its last (the first place), then the places after 0 and after 1
    assert space.visible.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]
    assert space.ids.tolist() == [[3, 4, 0, 1]] and space.positions.tolist() == [0, 1, 2, 2]


@every_world
def test_exact_log_probs_are_the_policys(name: str, request: pytest.FixtureRequest) -> None:
    world = request.getfixturevalue(name)
    model, (batch, numbers) = moved(world), some(world, [0, 6, 15])
    with torch.no_grad():
        by_policy = batch.sum_tokens(Policy(model, "padded")(batch).logp)  # [N]
    exact = bench.exact_logp(model, world.space)[[0, 6, 15]][:, numbers].flatten()
    assert torch.allclose(by_policy.double(), exact, rtol=0, atol=1e-5)
    assert exact.std() > 1  # a model that says something


@every_world
def test_in_float64_they_agree_to_rounding(name: str, request: pytest.FixtureRequest) -> None:
    world = request.getfixturevalue(name)
    model, (batch, numbers) = moved(world, torch.float64), some(world, [3])
    with torch.no_grad():
        by_policy = batch.sum_tokens(Policy(model, "tree")(batch).logp)
    exact = bench.exact_logp(model, world.space)[3, numbers]  # also after the packed tree's attention was set
    assert torch.allclose(by_policy, exact, rtol=0, atol=1e-11)


@every_world
def test_probabilities_add_up_to_one(name: str, request: pytest.FixtureRequest) -> None:
    world = request.getfixturevalue(name)
    total = bench.exact_logp(moved(world), world.space).exp().sum(1)
    assert torch.allclose(total, torch.ones_like(total), rtol=0, atol=1e-12)


def test_one_forward_carries_the_gradient_of_the_policy() -> None:
    world = bench.world(0, lengths=True)
    model, (batch, numbers) = moved(world, torch.float64), some(world, [2], every=7)
    weights = list(model.parameters())
    by_policy = torch.autograd.grad(Policy(model, "padded")(batch).logp.sum(), weights)
    exact = world.space.along(next_logp(model, world.space)).sum(2)[2, numbers].sum()
    for left, right in zip(by_policy, torch.autograd.grad(exact, weights), strict=True):
        assert torch.allclose(left, right, rtol=1e-8, atol=1e-9)


@every_world
def test_the_lookup_gives_the_references_log_probs(name: str, request: pytest.FixtureRequest) -> None:
    world = request.getfixturevalue(name)
    batch, _ = some(world, [15, 0, 9], every=41)
    with torch.no_grad():
        logp = Policy(world.model, "padded")(batch).logp
    assert torch.allclose(world.lookup()(batch), logp, rtol=0, atol=1e-5)


def test_what_is_not_enumerated_is_refused(small: bench.World) -> None:
    for prompt, completion in [([6, 10], [0, 1, 2]), ([6, 6], [0, 1, 2, 3]), ([6, 10], [0, 1, 2, 9])]:
        batch = Batch.of([Example(prompt, [completion], [1.0], [[True] * len(completion)])])
        with pytest.raises(KeyError, match="none of the"):
            small.lookup()(batch)


def test_a_model_with_another_head_is_refused(small: bench.World) -> None:
    model = small.policy_model()
    model.set_output_embeddings(torch.nn.Linear(64, 14))
    with pytest.raises(ValueError, match="head has 14 tokens, this space has 6"):
        bench.exact_logp(model, small.space)
