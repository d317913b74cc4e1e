"""Which prompts are sampled next: every one once an epoch, easier ones at their share, and by success."""

from __future__ import annotations

from collections import Counter

import pytest

from prefopt.rollout.prompts import FLOOR, Prompt, Stream, Success


def prompts(count: int, name: str = "p") -> list[Prompt]:
    return [Prompt([1], f"{name}{number}") for number in range(count)]


def test_every_prompt_comes_once_an_epoch_in_an_order_of_its_own() -> None:
    drawn = [draw.number for draw in Stream(prompts(7), 0).take(21)]
    epochs = [drawn[start : start + 7] for start in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_rollouts_of_another_size_draw_the_same_prompts_and_seeds() -> None:
    whole = Stream(prompts(5), 3).take(12)
    stream = Stream(prompts(5), 3)
    assert [*stream.take(4), *stream.take(1), *stream.take(7)] == whole
    assert [draw.number for draw in Stream(prompts(5), 4).take(12)] != [draw.number for draw in whole]


def test_a_prompt_that_comes_again_is_sampled_with_another_seed() -> None:
    seeds = [draw.seed for draw in Stream(prompts(2), 0).take(8)]
    assert len(set(seeds)) == 8


@pytest.mark.parametrize("share", [0.25, 0.5, 0.7])
def test_easier_prompts_have_their_share_of_every_stretch(share: float) -> None:
    stream = Stream(prompts(50), 0, easier=prompts(3, "easy"), easier_share=share)
    drawn = stream.take(200)
    for start in range(0, 200, 20):
        easier = sum(draw.easier for draw in drawn[start : start + 20])
        assert abs(easier - 20 * share) <= 1
    assert stream.drawn == sum(not draw.easier for draw in drawn)
    assert {draw.prompt.asked for draw in drawn if draw.easier} == {"easy0", "easy1", "easy2"}


def test_the_curriculum_sees_every_prompt_first_and_then_prefers_those_solved_half_the_time() -> None:
    stream = Stream(prompts(4), 0, curriculum="success")
    assert sorted(draw.number for draw in stream.take(4)) == [0, 1, 2, 3]
    stream.learn([(0, 0.0), (1, 0.5), (2, 1.0), (3, 0.5)])
    seen = Counter(draw.number for draw in stream.take(2000))
    # weights 0.05, 1, 0.05, 1: shares 0.024 and 0.476
    assert seen[1] + seen[3] > 1800
    assert 20 <= seen[0] <= 90 and 20 <= seen[2] <= 90  # what was hopeless is tried again


def test_success_forgets_by_halves() -> None:
    order = Success(1, "0")
    order.learn(0, 1.0)
    assert order.weight(0) == pytest.approx(FLOOR)
    order.learn(0, 0.0)  # 0.5 x 1 + 0.5 x 0
    assert order.success[0] == 0.5 and order.weight(0) == pytest.approx(1.0)
