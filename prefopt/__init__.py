"""Preference optimisation of language models, exact and fast: `prefopt.train(model=..., data=..., objective=DPO())`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefopt.data import load as load_data
    from prefopt.objectives import (
        AOT,
        BCO,
        BNPO,
        CISPO,
        CPO,
        DAPO,
        DPO,
        GRPO,
        GSPO,
        IPO,
        KTO,
        ORPO,
        PPO,
        RLOO,
        SAPO,
        SFT,
        DrGRPO,
        LitePPO,
        MaxRL,
        OnlineDPO,
        ProcessReward,
        ReinforcePP,
        RewardModel,
        SimPO,
    )
    from prefopt.recipes.train import train

__version__ = "0.1.0"

__all__ = [
    "AOT",
    "BCO",
    "BNPO",
    "CISPO",
    "CPO",
    "DAPO",
    "DPO",
    "GRPO",
    "GSPO",
    "IPO",
    "KTO",
    "ORPO",
    "PPO",
    "RLOO",
    "SAPO",
    "SFT",
    "DrGRPO",
    "LitePPO",
    "MaxRL",
    "OnlineDPO",
    "ProcessReward",
    "ReinforcePP",
    "RewardModel",
    "SimPO",
    "__version__",
    "load_data",
    "train",
]


# what is not an objective, and where it stands
ELSEWHERE = {"load_data": "prefopt.data:load", "train": "prefopt.recipes.train:train"}


def __getattr__(name: str) -> Any:
    """Looked up on first use: `import prefopt` must not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module 'prefopt' has no attribute {name!r}")
    module, attribute = ELSEWHERE.get(name, f"prefopt.objectives:{name}").split(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
