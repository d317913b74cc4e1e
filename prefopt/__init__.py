"""Preference optimisation of language models, exact and fast: `prefopt.train(model=..., data=..., objective=DPO())`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefopt.data import load as load_data
    from prefopt.objectives import AOT, DPO, IPO, SFT
    from prefopt.recipes.train import train

__version__ = "0.1.0"

# Looked up on first use: `import prefopt` must not wait for torch.
LAZY = {
    "AOT": "prefopt.objectives:AOT",
    "DPO": "prefopt.objectives:DPO",
    "IPO": "prefopt.objectives:IPO",
    "SFT": "prefopt.objectives:SFT",
    "load_data": "prefopt.data:load",
    "train": "prefopt.recipes.train:train",
}

__all__ = ["AOT", "DPO", "IPO", "SFT", "__version__", "load_data", "train"]


def __getattr__(name: str) -> Any:
    if name not in LAZY:
        raise AttributeError(f"module 'prefopt' has no attribute {name!r}")
    module, attribute = LAZY[name].split(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *LAZY})
