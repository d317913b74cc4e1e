from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from prefopt import bench
from prefopt.bench.examples import draw, prefix_value, token_progress
from prefopt.bench.measures import expected
from prefopt.bench.space import next_logp
from prefopt.records import Example

MANY = 20_000


def reward_of(world: bench.World, examples: list[Example]) -> Tensor:
    """True reward of every completion of every row, [R, k]."""
    prompts = {tuple(row): number for number, row in enumerate(world.space.prompts.tolist())}
    known = {tuple(world.space.completion(n)): n for n in range(len(world.space.tokens))}
    gold = world.gold.tolist()
    rows = [[gold[prompts[tuple(e.prompt)]][known[tuple(c)]] for c in e.completions] for e in examples]
    return torch.tensor(rows, dtype=torch.float64)


def within_four_errors(seen: Tensor, chance: Tensor) -> bool:
    """Whether the share of true values [R] bool is what their chances [R] say, in each quarter of the chances."""
    for part in chance.argsort().chunk(4):
        error = (chance[part] * (1 - chance[part])).mean().div(len(part)).sqrt()
        if (seen[part].double().mean() - chance[part].mean()).abs() > 4 * error:
            return False
    return True


@pytest.mark.parametrize(("scale", "flip"), [(1.0, 0.0), (3.0, 0.0), (1.0, 0.2)])
def test_pairs_are_preferred_as_bradley_and_terry_say(small: bench.World, scale: float, flip: float) -> None:
    found = bench.pairs(small, MANY, seed=1, judge=bench.Judge(scale=scale, flip=flip))
    reward, first_won = reward_of(small, found), torch.tensor([e.scores[0] > e.scores[1] for e in found])
    chance = torch.sigmoid(scale * (reward[:, 0] - reward[:, 1]))
    assert within_four_errors(first_won, (1 - flip) * chance + flip * (1 - chance))
    assert not within_four_errors(first_won, torch.sigmoid(1.3 * scale * (reward[:, 0] - reward[:, 1])))


def test_pairs_hold_two_different_completions_with_scores_one_and_zero(small: bench.World) -> None:
    found = bench.pairs(small, 2000, seed=2)
    assert all(e.completions[0] != e.completions[1] and sorted(e.scores) == [0.0, 1.0] for e in found)
    assert 0.4 < sum(e.scores[0] for e in found) / 2000 < 0.6
    assert found[7].where == "pair 7" and found[7].trained == [[True] * 4] * 2


def test_an_infinite_scale_always_prefers_the_better_and_flips_at_its_rate(small: bench.World) -> None:
    for flip in (0.0, 0.25, 1.0):
        found = bench.pairs(small, 2000, seed=3, judge=bench.Judge(scale=math.inf, flip=flip))
        ahead = reward_of(small, found).diff(dim=1)[:, 0]  # of the second completion
        clear = ahead.abs() > 1e-9  # 0100 and 0010 have the same tokens, neighbours and ends
        right = (torch.tensor([e.scores[1] > e.scores[0] for e in found]) == (ahead > 0))[clear].double()
        assert len(right) > 1900
        assert right.mean().item() == pytest.approx(1 - flip, abs=4 * math.sqrt(flip * (1 - flip) / len(right)))


def test_equal_rewards_are_preferred_by_a_coin() -> None:
    world = bench.world(0, "global")
    found = bench.pairs(world, 4000, seed=4, judge=bench.Judge(scale=math.inf))
    reward = reward_of(world, found)
    tied = (reward[:, 0] - reward[:, 1]).abs() < 1e-9
    share = torch.tensor([e.scores[0] for e in found])[tied].mean()
    assert tied.sum() > 200 and abs(share - 0.5) < 4 * 0.5 / tied.sum().sqrt()


def test_rows_are_drawn_from_the_reference_or_from_the_policy_that_is_given(small: bench.World) -> None:
    better = bench.tilted(small.reference, small.gold, 1.0)
    random = torch.Generator().manual_seed(5)
    for policy in (small.reference, better):
        drawn = draw(policy, MANY, 1, random)
        gold = small.gold[drawn.prompt, drawn.completion[:, 0]]
        assert abs(gold.mean() - expected(policy, small.gold)) < 4 * gold.std() / math.sqrt(MANY)
        assert torch.bincount(drawn.prompt).min() > MANY / 16 - 4 * math.sqrt(MANY / 16)
    assert reward_of(small, bench.pairs(small, 2000, seed=6, source=better)).mean() > 0.5


def test_ratings_are_ordered_as_plackett_and_luce_say(small: bench.World) -> None:
    found = bench.ratings(small, MANY, k=3, seed=7, judge=bench.Judge(scale=2.0))
    reward, score = reward_of(small, found), torch.tensor([e.scores for e in found])
    assert within_four_errors(score.argmax(1) == 0, torch.softmax(2 * reward, 1)[:, 0])
    assert within_four_errors(score[:, 1] > score[:, 2], torch.sigmoid(2 * (reward[:, 1] - reward[:, 2])))
    assert all(len({tuple(c) for c in e.completions}) == 3 for e in found)


def test_ratings_of_an_infinite_scale_are_the_reward(small: bench.World) -> None:
    found = bench.ratings(small, 50, seed=8, judge=bench.Judge(scale=math.inf))
    assert [e.scores for e in found] == reward_of(small, found).tolist()


def test_labels_are_good_as_often_as_the_logistic_function_says(small: bench.World) -> None:
    for scale, flip in ((1.0, 0.0), (2.0, 0.3), (math.inf, 0.0)):
        found = bench.labels(small, MANY, seed=9, judge=bench.Judge(scale=scale, flip=flip))
        reward, good = reward_of(small, found)[:, 0], torch.tensor([e.scores[0] == 1.0 for e in found])
        chance = (reward > 0).double() if math.isinf(scale) else torch.sigmoid(scale * reward)
        assert within_four_errors(good, (1 - flip) * chance + flip * (1 - chance))


@pytest.mark.parametrize("n", [1, 4])
def test_demonstrations_are_the_best_of_n(small: bench.World, n: int) -> None:
    gold = reward_of(small, bench.demonstrations(small, MANY, n=n, seed=10))
    of_n = expected(bench.best_of(small.reference, small.gold, n), small.gold)
    assert abs(gold.mean() - of_n) < 4 * gold.std() / math.sqrt(MANY)


@pytest.mark.parametrize("name", ["small", "ended"])
def test_the_progress_of_tokens_adds_up_to_the_reward_and_is_nil_on_average(
    name: str, request: pytest.FixtureRequest
) -> None:
    world = request.getfixturevalue(name)
    progress = token_progress(world)  # [P, C, L]
    assert torch.allclose(progress.sum(2), world.gold, rtol=0, atol=1e-12)  # each prompt's mean is 0
    assert progress[:, ~world.space.real].abs().max() == 0 if name == "ended" else True
    # at every place the tokens that may follow, weighted by the reference, add nothing
    with torch.no_grad():
        p = next_logp(world.model, world.space).exp()  # [P, S, V]
    step = torch.zeros_like(p)
    step[:, world.space.places[world.space.real], world.space.tokens[world.space.real]] = progress[:, world.space.real]
    assert (p * step).sum(2).abs().max() < 1e-9
    assert prefix_value(world)[:, 0].abs().max() < 1e-12


@pytest.mark.parametrize("name", ["small", "ended"])
def test_a_step_is_right_where_the_expected_reward_rises(name: str, request: pytest.FixtureRequest) -> None:
    world = request.getfixturevalue(name)
    known = {tuple(world.space.completion(n)): n for n in range(len(world.space.tokens))}
    prompts, progress = world.space.prompts.tolist(), token_progress(world)
    seen = []
    for e in bench.steps(world, 500, seed=11):
        own = progress[prompts.index(e.prompt), known[tuple(e.completions[0])]][: len(e.completions[0])]
        assert e.steps == [(own > 0).double().tolist()] and e.scores == [min(e.steps[0])]
        seen += e.steps[0]
    assert 0.3 < sum(seen) / len(seen) < 0.7


def test_another_reward_can_judge(ended: bench.World) -> None:
    judge = bench.Judge(scale=math.inf, reward=ended.space.lengths.double().expand_as(ended.gold))
    for e in bench.pairs(ended, 500, seed=12, judge=judge):
        short, long = sorted(e.completions, key=len)
        assert len(short) == len(long) or e.scores[e.completions.index(long)] == 1.0


def test_rows_are_a_function_of_the_seed(small: bench.World) -> None:
    makers = (bench.pairs, bench.ratings, bench.labels, bench.demonstrations, bench.steps)
    for make in makers:
        assert make(small, 20, seed=1) == make(small, 20, seed=1) != make(small, 20, seed=2)


@pytest.mark.parametrize(
    ("bad", "message"), [({"scale": 0.0}, "scale"), ({"scale": math.nan}, "scale"), ({"flip": 1.5}, "flip")]
)
def test_a_judge_that_cannot_be_is_refused(bad: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench.Judge(**bad)  # type: ignore[arg-type]


def test_ratings_have_no_label_to_turn_around(small: bench.World) -> None:
    with pytest.raises(ValueError, match="use a lower scale"):
        bench.ratings(small, 5, judge=bench.Judge(flip=0.1))
