"""RewardTrainer beside `RewardModel`.

| TRL | prefopt |
|---|---|
| `RewardConfig()` | `RewardModel()` |
| a column `margin` | the distance of two scores, times `RewardModel(margin=...)` |
| `center_rewards_coefficient` | `centering` |

Both read the score where transformers' own sequence classifier reads it, at the last token that is not padding.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from peer import Ours, assert_parity, assert_same_metrics, classifier, on_ratings, pairs, same

from prefopt.objectives import RewardModel

ROWS = pairs(5)


def test_bradley_terry(tmp_path: Path) -> None:
    assert_parity(on_ratings(ROWS, tmp_path), RewardModel(), ours=Ours(model=classifier()))


def test_centring(tmp_path: Path) -> None:
    peer = on_ratings(ROWS, tmp_path, center_rewards_coefficient=0.3)
    assert_parity(peer, RewardModel(centering=0.3), ours=Ours(model=classifier()))


def test_margins_are_distances_of_scores(tmp_path: Path) -> None:
    """TRL takes a margin from a column of the data; here it is what the data's scores say, times an option."""
    margins = [0.0, 0.5, 1.0, 2.0, 3.0]
    rows = [
        replace(example, scores=[score * (margin or 1e-9) for score in example.scores])
        for example, margin in zip(ROWS, margins, strict=True)
    ]
    peer = on_ratings(rows, tmp_path, margins=[0.5 * margin for margin in margins])
    assert_parity(peer, RewardModel(margin=0.5), ours=Ours(model=classifier()))


def test_metrics_of_one_name_have_one_value(tmp_path: Path) -> None:
    names = same("accuracy", "margin", "mean_reward")
    assert_same_metrics(on_ratings(ROWS, tmp_path), RewardModel(), names, classifier())


def test_listwise_is_the_same_for_two_completions(tmp_path: Path) -> None:
    assert_parity(on_ratings(ROWS, tmp_path), RewardModel(comparison="listwise"), ours=Ours(model=classifier()))


@pytest.mark.parametrize("token", ["<pad>", "</s>"])
def test_the_score_is_read_where_trl_reads_it_also_where_padding_is_the_end_token(token: str, tmp_path: Path) -> None:
    """transformers reads at the last token that is not padding, so the token before the end where the two are one."""
    peer = on_ratings(ROWS, tmp_path, pad_token=token)
    padding = peer.trainer.processing_class.pad_token_id
    assert_parity(peer, RewardModel(), ours=Ours(model=classifier(padding)))
