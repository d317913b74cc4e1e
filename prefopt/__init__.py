"""Preference optimisation of language models, exact and fast: `prefopt.train(model=..., data=..., objective=DPO())`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefopt.data import load as load_data
    from prefopt.objectives import AOT, BCO, CPO, DPO, IPO, KTO, ORPO, SFT, ProcessReward, RewardModel, SimPO
    from prefopt.recipes.train import train

__version__ = "0.1.0"

# Looked up on first use: `import prefopt` must not wait for torch.
LAZY = {
    "AOT": "prefopt.objectives:AOT",
    "BCO": "prefopt.objectives:BCO",
    "CPO": "prefopt.objectives:CPO",
    "DPO": "prefopt.objectives:DPO",
    "IPO": "prefopt.objectives:IPO",
    "KTO": "prefopt.objectives:KTO",
    "ORPO": "prefopt.objectives:ORPO",
    "ProcessReward": "prefopt.objectives:ProcessReward",
    "RewardModel": "prefopt.objectives:RewardModel",
    "SFT": "prefopt.objectives:SFT",
    "SimPO": "prefopt.objectives:SimPO",
    "load_data": "prefopt.data:load",
    "train": "prefopt.recipes.train:train",
}

__all__ = [
    "AOT",
    "BCO",
    "CPO",
    "DPO",
    "IPO",
    "KTO",
    "ORPO",
    "SFT",
    "ProcessReward",
    "RewardModel",
    "SimPO",
    "__version__",
    "load_data",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in LAZY:
        raise AttributeError(f"module 'prefopt' has no attribute {name!r}")
    module, attribute = LAZY[name].split(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *LAZY})
