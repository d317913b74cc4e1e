"""The objectives that laws and golden trajectories are run on: every one as it is by default, and options that change
its formula.
"""

from __future__ import annotations

from typing import Any

from prefopt.objectives import EVERY, RewardModel

VARIANTS: dict[str, Any] = {
    "reward-listwise": RewardModel(comparison="listwise"),
    "reward-margin-centering": RewardModel(margin=0.3, centering=0.1),
    "reward-listwise-margin-centering": RewardModel(comparison="listwise", margin=0.3, centering=0.1),
}

ALL: dict[str, Any] = {name: cls() for name, cls in EVERY.items()} | VARIANTS
