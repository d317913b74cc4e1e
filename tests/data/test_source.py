"""Batches: the order is a function of seed and epoch, and the ranks' shares are the single process's batch."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.data.source import Offline
from prefopt.records import Example, InputError


def examples(num: int) -> list[Example]:
    return [Example([number + 1], [[1]], [1.0], [[True]]) for number in range(num)]


def seen(source: Offline) -> list[tuple[list[int], float]]:
    """The prompts of every batch, by their only token, and its weight."""
    return [(batch.prompts.values.tolist(), weight) for batch, weight in source.batches()]


def test_every_epoch_sees_every_example_once_in_another_order() -> None:
    batches = seen(Offline(examples(10), 4, epochs=2, seed=3))
    first, second = ([token for batch, _ in half for token in batch] for half in (batches[:3], batches[3:]))
    assert sorted(first) == sorted(second) == list(range(1, 11))
    assert first != second and first != sorted(first)
    assert [len(batch) for batch, _ in batches] == [4, 4, 2] * 2


def test_the_order_follows_the_seed_alone() -> None:
    assert seen(Offline(examples(20), 3, seed=1)) == seen(Offline(examples(20), 3, seed=1))
    assert seen(Offline(examples(20), 3, seed=1)) != seen(Offline(examples(20), 3, seed=2))
    assert seen(Offline(examples(5), 2, shuffle=False))[0][0] == [1, 2]


@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 5))
def test_the_ranks_shares_are_the_single_process_s_batch(num: int, size: int, world: int) -> None:
    whole = seen(Offline(examples(num), size, epochs=2))
    shares = [seen(Offline(examples(num), size, epochs=2, rank=r, world=world)) for r in range(world)]
    assert {len(share) for share in shares} == {len(whole)}
    for step, (batch, _) in enumerate(whole):
        parts = [share[step] for share in shares]
        assert sorted(token for tokens, weight in parts for token in tokens if weight) == sorted(batch)
        assert all(tokens == batch[:1] for tokens, weight in parts if not weight)


def test_a_resumed_source_goes_on_where_it_stopped() -> None:
    whole, resumed = seen(Offline(examples(10), 3, epochs=3)), Offline(examples(10), 3, epochs=3)
    resumed.step = 5
    assert seen(resumed) == whole[5:]


def test_the_step_counts_the_batches_already_handed_out() -> None:
    source = Offline(examples(10), 3)
    batches = source.batches()
    next(batches)
    next(batches)
    assert source.step == 2
    assert seen(source) == seen(Offline(examples(10), 3))[2:]


@pytest.mark.parametrize(("epochs", "steps"), [(1, 4), (2.5, 10), (0.1, 1)])
def test_steps_counts_part_epochs_up(epochs: float, steps: int) -> None:
    source = Offline(examples(10), 3, epochs=epochs)
    assert source.steps() == steps == len(seen(source))


def test_a_source_that_could_never_fill_a_batch_is_refused() -> None:
    with pytest.raises(InputError, match="no examples to make batches of"):
        Offline([], 4)
    with pytest.raises(InputError, match="batch_size must be at least 1"):
        Offline(examples(3), 0)
    with pytest.raises(InputError, match="rank 2 is not one of 2"):
        Offline(examples(3), 1, rank=2, world=2)
