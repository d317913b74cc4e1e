"""The objectives that laws and golden trajectories are run on: every one as it is by default, and options that change
its formula.
"""

from __future__ import annotations

from typing import Any

from prefopt.objectives import (
    AOT,
    BNPO,
    CISPO,
    CPO,
    DPO,
    EVERY,
    GRPO,
    GSPO,
    IPO,
    KTO,
    PPO,
    RLOO,
    SFT,
    DrGRPO,
    LitePPO,
    OnlineDPO,
    ReinforcePP,
    RewardModel,
    SimPO,
)
from prefopt.objectives.facts import fitted

VARIANTS: dict[str, Any] = {
    "sft-probability": SFT(weighting="probability"),
    "dpo-conservative": DPO(label_smoothing=0.1),
    "dpo-robust": DPO(loss_type="robust", label_smoothing=0.1),
    # no pair of the laws' rows is beyond its margin, where it gives no credit
    "dpo-hinge": DPO(beta=0.05, loss_type="hinge"),
    "dpo-exo": DPO(loss_type="exo"),
    "dpo-nca": DPO(beta=0.5, loss_type="nca"),
    "dpo-apo-zero": DPO(beta=0.2, loss_type="apo_zero"),
    "dpo-apo-down": DPO(loss_type="apo_down"),
    # no log-ratio is beyond 1 / (2 beta), from where it pulls back
    "dpo-sppo": DPO(beta=0.02, loss_type="sppo"),
    "dpo-discopop": DPO(loss_type="discopop"),
    "dpo-weighted": DPO(loss_type={"sigmoid": 0.8, "bco": 0.2}),
    "dpo-mean": DPO(log_ratio="mean"),
    "dpo-forward-kl": DPO(beta=0.3, f_divergence="forward_kl"),
    "dpo-js": DPO(beta=0.3, f_divergence="js"),
    "dpo-alpha": DPO(beta=0.3, f_divergence="alpha"),
    "dpo-length": DPO(length_penalty=0.05),
    "dpo-tail": DPO(tail_weight=0.5),
    "dpo-drop": DPO(drop_penalty=5.0),
    # random models find their rows unlikely: weights of 0.002 to 0.02
    "dpo-wpo": DPO(beta=1.0, weighting="wpo"),
    "dpo-sft": DPO(sft_weight=1.0),
    "ipo-mean": IPO(log_ratio="mean"),
    "aot-paired": AOT(pairing="paired"),
    "simpo-sft": SimPO(sft_weight=0.5),
    "cpo-conservative": CPO(label_smoothing=0.1),
    "cpo-bare": CPO(sft_weight=0.0),
    "kto-weighted": KTO(desirable_weight=2.0, undesirable_weight=0.5),
    "reward-listwise": RewardModel(comparison="listwise"),
    "reward-margin-centering": RewardModel(margin=0.3, centering=0.1),
    "reward-listwise-margin-centering": RewardModel(comparison="listwise", margin=0.3, centering=0.1),
    "grpo-k3-weighted": GRPO(beta=0.04, kl="k3_weighted"),
    "grpo-token": GRPO(correction="token"),
    "dr-grpo-k2": DrGRPO(beta=0.05, kl="k2", length=8.0),
    # weights of whole completions are far from 1 here
    "gspo-sequence": GSPO(correction="sequence", correction_cap=1e6),
    "cispo-lowest": CISPO(lowest=0.9, highest=1.1),
    "rloo-clip": RLOO(beta=0.0, clip=0.2, correction="token"),
    "reinforce-pp-baseline": ReinforcePP(baseline="group", kl="k2"),
    "ppo-options": PPO(gamma=0.9, gae_lambda=0.5, whiten="both", entropy_bonus=0.01, value_weight=1.0, value_clip=None),
    "online-dpo-ipo": OnlineDPO(loss_type="ipo"),
}

LONGEST = 8  # completion that may be drawn, for objectives that ask
# scaled by a spread that is taken over all prompts of a rollout
ROLLOUT_WIDE = (BNPO, LitePPO, ReinforcePP, PPO)
ALL: dict[str, Any] = {name: fitted(cls(), LONGEST, 3) for name, cls in EVERY.items()} | VARIANTS
