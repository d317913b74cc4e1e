"""Objectives: what is minimised, one file each. `EVERY` is the one table from name to class."""

from prefopt.objectives.dpo import DPO
from prefopt.objectives.facts import Facts, Nothing, Objective
from prefopt.objectives.sft import SFT

EVERY: dict[str, type] = {cls.facts.name: cls for cls in (SFT, DPO)}

__all__ = ["DPO", "EVERY", "SFT", "Facts", "Nothing", "Objective"]
