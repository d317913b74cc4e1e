"""The names that other trainers log, and ours for the same numbers.

Read in the sources of TRL 1.16 (`trainer/*_trainer.py`, `experimental/`), verl (`trainer/ppo/metric_utils.py`, its
actors) and OpenRLHF (`trainer/`). A number that means something else than ours is left out, however alike the names
are: TRL's `kl` of GRPO, verl's `actor/kl_loss`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple


class Name(NamedTuple):
    """ours: the metric's name here. turn: from their number to ours."""

    ours: str
    turn: Callable[[float], float] = float


def _rest(share: float) -> float:
    return 1.0 - share


SAME = (
    *("loss", "grad_norm", "learning_rate", "epoch", "entropy", "reward", "reward_std", "accuracy", "margin"),
    *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"),
    *("nll", "log_odds_chosen", "completion_length", "finished", "unscored", "kl_reference", "repetition"),
)

TRL: Mapping[str, Name] = {
    **{name: Name(name) for name in SAME},
    "nll_loss": Name("nll"),
    "completions/mean_length": Name("completion_length"),
    "completions/clipped_ratio": Name("finished", _rest),
    "frac_reward_zero_std": Name("zero_variance"),
    "clip_ratio/low_mean": Name("clip_fraction/low"),
    "clip_ratio/high_mean": Name("clip_fraction/high"),
    "sampling/sampling_logp_difference/mean": Name("sampler_gap"),
    # PPO, which TRL had until 1.12
    "objective/entropy": Name("entropy"),
    "objective/kl": Name("kl_reference"),
    "objective/scores": Name("reward"),
    "policy/clipfrac_avg": Name("clip_fraction"),
}

VERL: Mapping[str, Name] = {
    "critic/score/mean": Name("task_reward"),
    "critic/rewards/mean": Name("reward"),
    "critic/vf_explained_var": Name("value/explained_variance"),
    "actor/entropy": Name("entropy"),
    "actor/entropy_loss": Name("entropy"),
    "actor/pg_clipfrac": Name("clip_fraction"),
    "actor/grad_norm": Name("grad_norm"),
    "actor/lr": Name("learning_rate"),
    "actor/pg_loss": Name("loss"),
    "response_length/mean": Name("completion_length"),
    "response_length/clip_ratio": Name("finished", _rest),
    "training/epoch": Name("epoch"),
}

OPENRLHF: Mapping[str, Name] = {
    "reward": Name("reward"),
    "response_length": Name("completion_length"),
    "truncated": Name("finished", _rest),
    "policy_loss": Name("loss"),
    "actor_grad_norm": Name("grad_norm"),
    "actor_lr": Name("learning_rate"),
    "ppo_clip_ratio": Name("clip_fraction"),
    "entropy_loss": Name("entropy"),
    # DPO and reward models
    "preference_loss": Name("loss"),
    "loss": Name("loss"),
    "acc": Name("rewards/accuracies"),
    "chosen_reward": Name("rewards/chosen"),
    "reject_reward": Name("rewards/rejected"),
    "lr": Name("learning_rate"),
    "nll_loss": Name("nll"),
}

# what tells whose names they are: one of these, and no other's
SIGNS: Mapping[str, tuple[str, ...]] = {
    "verl": ("critic/score/mean", "critic/rewards/mean", "actor/pg_loss", "actor/pg_clipfrac"),
    "OpenRLHF": ("reject_reward", "preference_loss", "response_length", "policy_loss", "ppo_clip_ratio"),
    "TRL": ("rewards/margins", "completions/mean_length", "frac_reward_zero_std", "reward_std", "objective/scores"),
}
TABLES: Mapping[str, Mapping[str, Name]] = {"TRL": TRL, "verl": VERL, "OpenRLHF": OPENRLHF}
STEPS = ("step", "_step", "global_step", "training/global_step", "trainer/global_step", "train/global_step", "Step")
PREFIXES = ("train/", "eval/", "eval_", "train_")


def source_of(names: Iterable[str]) -> str | None:
    """Whose log has these metrics; None where nothing tells."""
    plain = {bare(name)[1] for name in names}
    return next((source for source, signs in SIGNS.items() if plain & set(signs)), None)


def bare(name: str) -> tuple[bool, str]:
    """Whether a metric is of held-out rows, and its name without the prefix that says so."""
    held_out = False
    for prefix in PREFIXES:
        if name.startswith(prefix):
            held_out, name = held_out or prefix.startswith("eval"), name.removeprefix(prefix)
    return held_out, name


def ours(values: Mapping[str, Any], source: str) -> dict[str, float]:
    """The metrics that have a name here, by it; those that are no finite numbers are left out."""
    table, found = TABLES[source], {}
    for name, value in values.items():
        number = as_number(value)
        held_out, plain = bare(name)
        if number is None or plain not in table:
            continue
        known = table[plain]
        found[f"eval/{known.ours}" if held_out else known.ours] = known.turn(number)
    if "rewards/chosen" in found and "rewards/rejected" in found:
        found.setdefault("rewards/margins", found["rewards/chosen"] - found["rewards/rejected"])
    return found


def not_finite(values: Mapping[str, Any], source: str) -> list[str]:
    """Which of the updates' loss and gradient norm, by our names, are logged as NaN or infinite."""
    table, found = TABLES[source], set()
    for name, value in values.items():
        held_out, plain = bare(name)
        known = None if held_out else table.get(plain)
        if known is None or known.ours not in ("loss", "grad_norm") or isinstance(value, (bool, list, dict)):
            continue
        try:
            if not math.isfinite(float(value)):
                found.add(known.ours)
        except (TypeError, ValueError, OverflowError):
            continue
    return sorted(found)


def as_number(value: Any) -> float | None:
    """A finite number, or a text that is one (CSV); None for all else."""
    if isinstance(value, bool) or value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def step_of(values: Mapping[str, Any]) -> int | None:
    """The update that a line belongs to."""
    for name in STEPS:
        number = as_number(values.get(name))
        if number is not None:
            return int(number)
    return None


def objective_of(lines: Iterable[Mapping[str, float]]) -> str | None:
    """The kind of objective that logs these, by our names: of those that detectors tell apart. None where unsure."""
    names = {name for line in lines for name in line}
    if "log_odds_chosen" in names:
        return "orpo"
    if "reward" in names or "task_reward" in names:
        return "grpo" if "zero_variance" in names else None
    # KTO logs margins, too, of answers that are in no pair; CPO and its kin log the NLL of the chosen answer
    return "dpo" if {"rewards/margins", "rewards/accuracies"} <= names and "nll" not in names else None
