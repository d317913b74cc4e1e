"""Batches: the order is a function of seed and epoch, and the ranks' shares are the single process's batch."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.data.source import Offline, steps_per_epoch
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


def test_a_process_without_a_prompt_of_its_own_is_given_a_filler_that_says_so() -> None:
    for rank in range(3):
        sizes = [
            (len(batch.prompts), batch.filler, weight)
            for batch, weight in Offline(examples(4), 3, rank=rank, world=3).batches()
        ]
        assert sizes == [(1, False, 1.0), (1, False, 1.0) if rank == 0 else (1, True, 0.0)]


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


# ---------------------------------------------------------------- batches of a least size


def test_a_rest_of_too_few_joins_the_batch_before() -> None:
    sizes = {7: [3, 4], 8: [3, 3, 2], 9: [3, 3, 3], 3: [3], 2: [2], 4: [4]}
    for num, wanted in sizes.items():
        batches = seen(Offline(examples(num), 3, least=2, epochs=2))
        assert [len(batch) for batch, _ in batches] == wanted * 2
        assert steps_per_epoch(num, 3, 2) == len(wanted)


@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 5), st.integers(1, 9))
def test_every_row_is_in_one_batch_of_the_epoch_and_none_is_too_small(
    num: int, size: int, world: int, least: int
) -> None:
    if min(num, size) < least:
        with pytest.raises(InputError, match=f"of {num} rows; at least {least} prompts are needed"):
            Offline(examples(num), size, least=least)
        return
    shares = [seen(Offline(examples(num), size, rank=r, world=world, least=least)) for r in range(world)]
    assert {len(share) for share in shares} == {steps_per_epoch(num, size, least)}
    batches = [
        [token for share in shares for token in share[step][0] if share[step][1]] for step in range(len(shares[0]))
    ]
    assert all(least <= len(batch) < size + least for batch in batches)
    assert all(len(batch) == size for batch in batches[:-1])
    assert sorted(token for batch in batches for token in batch) == list(range(1, num + 1))


def test_a_resumed_source_finds_the_batch_that_took_in_the_rest() -> None:
    whole, resumed = seen(Offline(examples(10), 3, epochs=3, least=2)), Offline(examples(10), 3, epochs=3, least=2)
    resumed.step = 5
    assert seen(resumed) == whole[5:] and [len(batch) for batch, _ in whole] == [3, 3, 4] * 3
