"""Dynamic sampling chooses the same prompts for every update, however many processes share the work."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from test_rollout_source import online

from prefopt import ranks
from prefopt.records import Sample
from prefopt.rollout.source import Rollout


def even_is_solved(sample: Sample) -> float:
    """Groups of prompts with an even number teach nothing."""
    return 1.0 if sample.columns["at"] % 2 == 0 else float(len(sample.tokens) % 2)


def rollout(**options: Any) -> Rollout:
    source = online(even_is_solved, batch_size=5, rollout_batches=2, dynamic_sampling=True, **options)
    source.first(None)
    assert source.ready is not None
    return source.ready


def two_processes(monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[Rollout]:
    """What each of two processes makes of its part, played by two threads."""
    own, meeting = threading.local(), threading.Barrier(2, timeout=20)
    table: list[Any] = [None, None]
    found: list[Any] = [None, None]

    def gather(value: Any) -> list[Any]:
        table[own.rank] = value
        meeting.wait()
        everyone = list(table)
        meeting.wait()
        return everyone

    monkeypatch.setattr(ranks, "rank", lambda: own.rank)
    monkeypatch.setattr(ranks, "world", lambda: 2)
    monkeypatch.setattr(ranks, "gather", gather)

    def play(rank: int) -> None:
        own.rank = rank
        found[rank] = rollout(**options)

    threads = [threading.Thread(target=play, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def updates(rollout: Rollout) -> list[list[tuple[int, int]]]:
    """Prompts and seeds of each update."""
    keys, done = iter([(group.draw.number, group.draw.seed) for group in rollout.groups]), []
    for size in rollout.sizes:
        done.append([next(keys) for _ in range(size)])
    return done


@pytest.mark.parametrize("rounds", [1, 9])
def test_two_processes_train_on_the_prompts_that_one_does(monkeypatch, rounds):
    alone = rollout(dynamic_rounds=rounds)
    shared = [updates(one) for one in two_processes(monkeypatch, dynamic_rounds=rounds)]
    for number, whole in enumerate(updates(alone)):
        assert [own[number] for own in shared] == [whole[0::2], whole[1::2]]
    if rounds == 9:
        assert alone.metrics["effective_groups"] == 10 and all(group.useful for group in alone.groups)
