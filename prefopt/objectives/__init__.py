"""Objectives: what is minimised, one file each. `EVERY` is the one table from name to class."""

from prefopt.objectives.aot import AOT
from prefopt.objectives.bco import BCO
from prefopt.objectives.bnpo import BNPO
from prefopt.objectives.cispo import CISPO
from prefopt.objectives.cpo import CPO
from prefopt.objectives.dapo import DAPO
from prefopt.objectives.dpo import DPO
from prefopt.objectives.dr_grpo import DrGRPO
from prefopt.objectives.facts import Facts, Nothing, Objective
from prefopt.objectives.grpo import GRPO
from prefopt.objectives.gspo import GSPO
from prefopt.objectives.ipo import IPO
from prefopt.objectives.kto import KTO
from prefopt.objectives.lite_ppo import LitePPO
from prefopt.objectives.maxrl import MaxRL
from prefopt.objectives.online_dpo import OnlineDPO
from prefopt.objectives.orpo import ORPO
from prefopt.objectives.ppo import PPO
from prefopt.objectives.prm import ProcessReward
from prefopt.objectives.reinforce_pp import ReinforcePP
from prefopt.objectives.reward import RewardModel
from prefopt.objectives.rloo import RLOO
from prefopt.objectives.sapo import SAPO
from prefopt.objectives.sft import SFT
from prefopt.objectives.simpo import SimPO

OFFLINE = (SFT, RewardModel, ProcessReward, DPO, IPO, AOT, SimPO, CPO, ORPO, KTO, BCO)
# these learn from the policy's own completions and their rewards
ONLINE = (GRPO, DrGRPO, DAPO, GSPO, CISPO, BNPO, LitePPO, RLOO, ReinforcePP, SAPO, MaxRL, PPO, OnlineDPO)

EVERY: dict[str, type] = {cls.facts.name: cls for cls in (*OFFLINE, *ONLINE)}

__all__ = [
    "AOT",
    "BCO",
    "BNPO",
    "CISPO",
    "CPO",
    "DAPO",
    "DPO",
    "EVERY",
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
    "Facts",
    "LitePPO",
    "MaxRL",
    "Nothing",
    "Objective",
    "OnlineDPO",
    "ProcessReward",
    "ReinforcePP",
    "RewardModel",
    "SimPO",
]
