"""The process reward model by hand."""

from __future__ import annotations

import math

import pytest
import torch

from prefopt.batch import Batch, Outputs
from prefopt.objectives import Nothing, ProcessReward
from prefopt.records import Example

NAN = math.nan


def solution(steps: list[float]) -> Example:
    return Example([7], [[1] * len(steps)], [1.0], [[True] * len(steps)], steps=[steps])


# Labels at the steps' last tokens; scores elsewhere (9.0) are not read. L(x) = ln(1 + e^-x).
# solution 0: right, wrong       scores 1.0, 0.5    L(1.0) = 0.313262, L(-0.5) = 0.974077
# solution 1: right half of the time  score -2.0    (L(-2.0) + L(2.0)) / 2 = 1.126928
BATCH = Batch.of([solution([NAN, 1.0, 0.0]), solution([0.5, NAN])])
VALUE = [9.0, 1.0, 0.5, -2.0, 9.0]


def test_loss_metrics_and_count_by_hand():
    value = torch.tensor(VALUE, requires_grad=True)
    loss, seen = ProcessReward().loss(BATCH, Outputs(torch.zeros(0), value=value), Nothing())
    assert loss.item() == pytest.approx(2.414267, abs=2e-6)
    assert int(ProcessReward().count(BATCH)) == 3
    assert {name: [round(v, 4) for v in x.tolist()] for name, x in seen.items()} == {
        "accuracy": [1.0, 0.0, 1.0],
        "right_accuracy": [1.0],
        "wrong_accuracy": [0.0, 1.0],
        "mean_probability": [0.7311, 0.6225, 0.1192],
    }
    loss.backward()
    # probability minus label at the labelled tokens
    assert value.grad.tolist() == pytest.approx([0.0, 0.731059 - 1, 0.622459, 0.119203 - 0.5, 0.0], abs=1e-6)


@pytest.mark.parametrize("shape", [(5, 1), (1,), (3,)])
def test_values_of_the_wrong_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected a tensor of shape \[5\]"):
        ProcessReward().loss(BATCH, Outputs(torch.zeros(0), value=torch.zeros(shape)), Nothing())


def test_a_model_without_a_head_and_rows_without_steps_are_refused():
    with pytest.raises(ValueError, match="no score head"):
        ProcessReward().loss(BATCH, Outputs(torch.zeros(5)), Nothing())
    plain = Batch.of([Example([7], [[1]], [1.0], [[True]])])
    with pytest.raises(ValueError, match="no row has labelled steps"):
        ProcessReward().count(plain)


@pytest.mark.parametrize("value", [-2000.0, 2000.0])
def test_far_scores_stay_finite(value):
    batch = Batch.of([solution([1.0])])
    loss, _ = ProcessReward().loss(batch, Outputs(torch.zeros(0), value=torch.tensor([value])), Nothing())
    assert loss.item() == max(-value, 0.0)
