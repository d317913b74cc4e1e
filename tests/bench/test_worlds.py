from __future__ import annotations

import pytest
import torch

from prefopt import bench
from prefopt.bench import worlds as module
from prefopt.bench.measures import expected

REWARDS = ["structured", "global", "hash"]


def test_shapes_of_the_two_spaces(small: bench.World, ended: bench.World) -> None:
    assert small.gold.shape == small.reference.shape == (16, 1296)
    assert ended.gold.shape == ended.reference.shape == (16, 364)
    assert small.space.lengths.unique().tolist() == [4]
    assert torch.bincount(ended.space.lengths).tolist() == [0, 1, 3, 9, 27, 81 + 243]  # an end token counts as one
    assert sum(p.numel() for p in small.model.parameters()) == 101_376


@pytest.mark.parametrize("reward", REWARDS)
@pytest.mark.parametrize("lengths", [False, True])
def test_the_reward_is_centred_for_each_prompt_and_has_unit_spread(reward: str, lengths: bool) -> None:
    world = bench.world(0, reward, lengths)  # type: ignore[arg-type]
    p = world.reference.exp()
    assert (p * world.gold).sum(1).abs().max() < 1e-12
    assert expected(world.reference, world.gold.square()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("reward", REWARDS)
def test_with_lengths_the_reward_says_nothing_about_length(reward: str) -> None:
    world = bench.world(0, reward, lengths=True)  # type: ignore[arg-type]
    content = (world.space.tokens >= 0).sum(1) - (world.space.tokens == 3).any(1).long()
    for length in range(6):
        here = content == length
        p = world.reference[:, here].exp()
        assert (p * world.gold[:, here]).sum(1).abs().max() < 1e-12, length


def test_a_world_is_a_function_of_its_arguments_and_leaves_the_random_state_alone(ended: bench.World) -> None:
    torch.manual_seed(3)
    expected_draw = torch.rand(1)
    torch.manual_seed(3)
    *_, again = module._reference.__wrapped__(0, True)  # not the one that is kept
    assert torch.equal(torch.rand(1), expected_draw)
    assert torch.equal(again, ended.reference_tokens)
    other = bench.world(1, lengths=True)
    assert not torch.equal(other.gold, ended.gold) and not torch.equal(other.reference, ended.reference)


def test_rewards_of_one_seed_are_unrelated(small: bench.World) -> None:
    tables = torch.stack([small.gold[0], bench.world(0, "hash").gold[0]])
    assert torch.corrcoef(tables)[0, 1].abs() < 0.2


def test_the_reference_has_learnt_the_teacher_and_is_not_uniform(small: bench.World) -> None:
    teacher = module._teacher(small.space, torch.Generator().manual_seed(0))
    logp = small.space.along(teacher).sum(2)
    distance = float((logp.exp() * (logp - small.reference)).sum(1).mean())
    assert distance < 0.1  # a uniform reference: 1.9
    assert 4.5 < -expected(small.reference, small.reference) < 6.0  # uniform: 7.17


def test_the_reward_is_not_the_references_taste(small: bench.World) -> None:
    p, logp = small.reference.exp(), small.reference
    centred = logp - (p * logp).sum(1, keepdim=True)
    correlation = expected(logp, centred * small.gold) / expected(logp, centred.square()) ** 0.5
    assert abs(correlation) < 0.5


def test_structured_reward_by_hand() -> None:
    """r = 0.6 sum a + 0.6 sum b + c(first, last): tokens 0 1 2 have neighbours 01 and 12 and ends 02."""
    space = bench.world(0, lengths=True).space
    random = torch.Generator().manual_seed(11)
    a, b, c = (torch.randn(size, generator=random) for size in ((4, 3), (3, 3), (4, 3, 3)))
    found = module._structured(space, torch.Generator().manual_seed(11))
    row = [space.completion(n) for n in range(364)].index([0, 1, 2, 3])
    p = 4 * 2 + 1  # subject 2, manner 1
    by_hand = 0.6 * a[2].sum() + 0.6 * (b[0, 1] + b[1, 2]) + c[1, 0, 2]
    assert found[p, row] == pytest.approx(by_hand.item(), abs=1e-6)
    assert found[p, 0] == 0  # no content token


def test_global_reward_depends_on_the_sum_alone(small: bench.World) -> None:
    raw = module._global(small.space, torch.Generator().manual_seed(1))
    total = small.space.tokens.sum(1)
    for p in (0, 9):
        assert len(torch.stack([total.double(), raw[p]]).unique(dim=1)[0]) == 21  # sums 0 to 20
        assert (raw[p] == 0).any() and raw[p].max() == 0


def test_a_policy_model_is_a_copy(small: bench.World) -> None:
    model = small.policy_model()
    with torch.no_grad():
        next(model.parameters()).add_(1)
    assert torch.equal(bench.exact_logp(small.model, small.space), small.reference)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in small.model.parameters())
