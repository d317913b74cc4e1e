"""The objectives that laws and golden trajectories are run on: every one as it is by default, and options that change
its formula.
"""

from __future__ import annotations

from typing import Any

from prefopt.objectives import EVERY

VARIANTS: dict[str, Any] = {}

ALL: dict[str, Any] = {name: cls() for name, cls in EVERY.items()} | VARIANTS
