"""Objectives: what is minimised, one file each. `EVERY` is the one table from name to class."""

from prefopt.objectives.aot import AOT
from prefopt.objectives.dpo import DPO
from prefopt.objectives.facts import Facts, Nothing, Objective
from prefopt.objectives.ipo import IPO
from prefopt.objectives.prm import ProcessReward
from prefopt.objectives.reward import RewardModel
from prefopt.objectives.sft import SFT

EVERY: dict[str, type] = {cls.facts.name: cls for cls in (SFT, RewardModel, ProcessReward, DPO, IPO, AOT)}

__all__ = ["AOT", "DPO", "EVERY", "IPO", "SFT", "Facts", "Nothing", "Objective", "ProcessReward", "RewardModel"]
