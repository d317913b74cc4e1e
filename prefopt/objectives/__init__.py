"""Objectives: what is minimised, one file each. `EVERY` is the one table from name to class."""

from prefopt.objectives.aot import AOT
from prefopt.objectives.bco import BCO
from prefopt.objectives.cpo import CPO
from prefopt.objectives.dpo import DPO
from prefopt.objectives.facts import Facts, Nothing, Objective
from prefopt.objectives.grpo import GRPO
from prefopt.objectives.ipo import IPO
from prefopt.objectives.kto import KTO
from prefopt.objectives.orpo import ORPO
from prefopt.objectives.prm import ProcessReward
from prefopt.objectives.reward import RewardModel
from prefopt.objectives.rloo import RLOO
from prefopt.objectives.sft import SFT
from prefopt.objectives.simpo import SimPO

EVERY: dict[str, type] = {
    cls.facts.name: cls
    for cls in (SFT, RewardModel, ProcessReward, DPO, IPO, AOT, SimPO, CPO, ORPO, KTO, BCO, GRPO, RLOO)
}

__all__ = [
    "AOT",
    "BCO",
    "CPO",
    "DPO",
    "EVERY",
    "GRPO",
    "IPO",
    "KTO",
    "ORPO",
    "RLOO",
    "SFT",
    "Facts",
    "Nothing",
    "Objective",
    "ProcessReward",
    "RewardModel",
    "SimPO",
]
