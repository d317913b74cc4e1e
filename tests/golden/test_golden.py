"""A refactor moves no loss; trajectory.py beside this file says how to write the numbers anew."""

from __future__ import annotations

import json

import pytest
from trajectory import STEPS, losses, path
from variants import ALL


@pytest.mark.parametrize("name", ALL)
def test_twenty_updates_give_the_committed_losses(name):
    expected = json.loads(path(name).read_text(encoding="utf-8"))
    assert len(expected) == STEPS
    assert losses(name) == pytest.approx(expected, rel=1e-6)


# -p log p, p a constant for the gradient, is small for impossible tokens and rises as they become possible;
# -w A log p, w a constant for the gradient, has the size of log p and not that of what was learnt
NO_MEASURE = {"sft-probability", "cispo", "cispo-lowest"}


@pytest.mark.parametrize("name", [name for name in ALL if name not in NO_MEASURE])
def test_the_toy_model_learns(name):
    """A trajectory that goes nowhere would hide a broken update."""
    expected = json.loads(path(name).read_text(encoding="utf-8"))
    assert sum(expected[-3:]) < 0.9 * sum(expected[:3])  # three updates see every row
