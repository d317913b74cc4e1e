"""Process reward model: the probability that a step of a solution is right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from prefopt.batch import Batch, Outputs, check
from prefopt.objectives.facts import Facts, Nothing


@dataclass(frozen=True)
class ProcessReward:
    """-label log s(v) - (1 - label) log(1 - s(v)), averaged over labelled steps; v is the score at a step's last token.

        loss = 1/S sum over steps of cross-entropy(label, s(v))
          v = the score read at the step's last token
          label = 1 for a right step, 0 for a wrong one; a share in between for the estimated chance to end well
          S = number of labelled steps
          s = logistic function; s(v) is the probability that the step is right
    Lightman et al. 2023, arXiv:2305.20050; estimated labels: Wang et al. 2023, arXiv:2312.08935.
    """

    facts: ClassVar[Facts] = Facts(
        name="prm",
        title="Process reward model",
        data="steps",
        source="arXiv:2305.20050",
        learning_rate=1e-5,
        head="steps",
        healthy="`loss` starts near ln 2 = 0.69, because a new head gives every step probability one half, and falls "
        "below the entropy of the share of right steps (0.33 where 90 % are right). `eval/accuracy` rises above that "
        "share, and `eval/wrong_accuracy`, the wrong steps that are found, rises with it: it is the figure to watch.",
        failures="`accuracy` is the share of right steps and `wrong_accuracy` is 0: the model calls every step right; "
        "train longer, or balance the data. "
        "`eval/loss` turns up while `loss` still falls: the run memorises its problems; take fewer epochs, or "
        "`keep=best` with `eval_every`. "
        "`right_accuracy` falls as `wrong_accuracy` rises: the steps after a first mistake carry labels that "
        "contradict each other; label only up to the first wrong step. "
        "Scores are poor on another model's solutions: its steps are cut elsewhere; split them at the same marks as "
        "the training rows.",
    )

    def count(self, batch: Batch) -> Tensor:
        return (~labels(batch).isnan()).sum()

    def targets(self, batch: Batch, models: Any) -> Nothing:
        return Nothing()

    def loss(self, batch: Batch, out: Outputs, targets: Nothing) -> tuple[Tensor, dict[str, Tensor]]:
        label = labels(batch)  # [K]
        if out.value is None:
            raise ValueError("the model has no score head, so there is no value to read")
        at = ~label.isnan()  # [K]
        value = check(out.value, len(label), "value")[at]  # [S]
        label = label[at].to(value.dtype)  # [S]
        loss = F.binary_cross_entropy_with_logits(value, label, reduction="sum")
        right = ((value > 0) == (label > 0.5)).to(loss.dtype)  # [S]
        return loss, {
            "accuracy": right,
            "right_accuracy": right[label > 0.5],
            "wrong_accuracy": right[label <= 0.5],
            "mean_probability": value.sigmoid(),
        }

    def at_start(self) -> dict[str, float]:
        return {}


def labels(batch: Batch) -> Tensor:
    """Labels of steps at their last tokens, NaN elsewhere, [K]. ValueError where nothing is labelled by steps."""
    if batch.steps is None:
        raise ValueError("no row has labelled steps; give data of the kind `steps`")
    return batch.steps
