"""What objectives on completions marked good or bad share: the labels, and the metrics of a completion.

Letters: N completions, K completion tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prefopt.batch import Batch
from prefopt.records import Example, InputError


def desirable(batch: Batch) -> Tensor:
    """Which completions are marked good, [N] bool. ValueError, naming the completion, on a score that is no label."""
    wrong = (batch.score != 0) & (batch.score != 1)
    if wrong.any():
        n = int(wrong.nonzero()[0])
        raise ValueError(f"labels: completion {n} has score {float(batch.score[n])} and needs 1 (good) or 0 (bad)")
    return batch.score == 1


def both_classes(name: str, examples: Sequence[Example]) -> tuple[int, int]:
    """How many answers of the training rows are good and how many bad.

    InputError, naming the objective, where they are of one class.
    """
    good = sum(score == 1 for example in examples for score in example.scores)
    bad = sum(score == 0 for example in examples for score in example.scores)
    if good and bad:
        return good, bad
    raise InputError(
        f"{name} learns from good and bad answers, and all {good + bad} training rows are {'good' if good else 'bad'}; "
        "add rows of the other kind, or train sft on good ones"
    )


def sign(good: Tensor, like: Tensor) -> Tensor:
    """1 for what is to rise, -1 for what is to fall: good [N] bool -> [N], of the type of `like`."""
    return torch.where(good, 1.0, -1.0).to(like.dtype)


def label_metrics(good: Tensor, logp: Tensor, rewards: Tensor, middle: Tensor | float) -> dict[str, Tensor]:
    """What every objective on labels logs, by metric name: [N], or one value for each completion of a class.

    good [N] bool; logp [N] nats; rewards [N]; middle: the reward that divides good from bad.
    """
    return {
        "rewards/chosen": rewards[good],
        "rewards/rejected": rewards[~good],
        "rewards/accuracies": (sign(good, rewards) * (rewards - middle) > 0).to(rewards.dtype),
        "logps/chosen": logp[good],
        "logps/rejected": logp[~good],
    }
