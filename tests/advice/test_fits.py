"""The cheapest options that make a run fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_memory import NET

from prefopt.advice.fits import ROOM, WAYS, Run, cheapest
from prefopt.advice.memory import Setup
from prefopt.advice.passes import Row

WIDE = replace(NET, layers=40, parameters=40_000_000, linear=30_000_000, rank_width=300_000, vocabulary=50_000)
RUN = Run(WIDE, (Row(60, (50, 50)),) * 32, 32, 4096, Setup(reference="copy"))


def test_what_fits_is_left_as_it_is() -> None:
    found = cheapest(RUN, 10**12)
    assert found is not None and found.options == {}


def test_nothing_helps_where_there_is_no_room() -> None:
    assert cheapest(RUN, 10**6) is None


def test_the_cheapest_way_that_is_enough_is_taken_and_does_fit() -> None:
    usual = RUN.memory().peak.total
    seen = set()
    for share in (0.95, 0.9, 0.8, 0.7, 0.6, 0.5):
        found = cheapest(RUN, round(share * usual / ROOM))
        if found is None:
            continue
        assert found.peak <= share * usual
        seen.add(tuple(found.options))
        costs = sum(way.cost for way in found.ways)
        for way in WAYS:  # none of those that are cheaper alone would have been enough
            changed = way.change(RUN)
            if way.cost < costs and changed is not None and len(found.ways) == 1:
                assert changed.memory().peak.total > share * usual
    assert ("reference",) in seen and len(seen) >= 3


def test_the_smallest_pass_is_one_prompt_with_its_completions() -> None:
    found = next(way for way in WAYS if "tokens_per_forward" in way.options).change(RUN)
    assert found is not None and found.budget == 160
    assert found.epoch().largest.tokens == 160


@pytest.mark.parametrize("way", WAYS, ids=lambda way: next(iter(way.options)))
def test_a_way_that_is_taken_already_is_not_offered(way: object) -> None:
    changed = way.change(RUN)  # type: ignore[attr-defined]
    if changed is not None:
        assert way.change(changed) is None  # type: ignore[attr-defined]
