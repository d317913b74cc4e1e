"""Preference optimisation of language models, exact and fast: `prefopt.train(model=..., data=..., objective=DPO())`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefopt.data import load_data as load_data
    from prefopt.objectives import DPO as DPO
    from prefopt.objectives import SFT as SFT
    from prefopt.recipes.train import train as train

__version__ = "0.1.0"

# Looked up on first use: `import prefopt` must not wait for torch.
LAZY = {
    "DPO": "prefopt.objectives",
    "SFT": "prefopt.objectives",
    "load_data": "prefopt.data",
    "train": "prefopt.recipes.train",
}

__all__ = ["DPO", "SFT", "__version__", "load_data", "train"]


def __getattr__(name: str) -> Any:
    if name not in LAZY:
        raise AttributeError(f"module 'prefopt' has no attribute {name!r}")
    return getattr(importlib.import_module(LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *LAZY})
