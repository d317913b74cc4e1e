"""The registry of metrics: nothing is logged that is not defined in it."""

from __future__ import annotations

import pytest

from prefopt.metrics import METRICS, known


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_says_what_it_is_and_what_healthy_looks_like(name):
    assert METRICS[name].definition and METRICS[name].healthy
    assert known(name) == name and known(f"eval/{name}") == f"eval/{name}"


@pytest.mark.parametrize("name", ["vibes", "eval/vibes", "train/loss", "eval/eval/loss", ""])
def test_an_unregistered_name_is_refused_with_what_to_do(name):
    with pytest.raises(KeyError, match=r"is not registered in prefopt/metrics\.py; add its definition there first"):
        known(name)
