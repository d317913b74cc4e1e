"""Proximal policy optimisation: a critic says what was to be expected at every token, and what exceeds it is learnt.

Letters: N completions, K completion tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from prefopt import ranks
from prefopt.batch import Batch, Outputs
from prefopt.objectives.advantages import scored
from prefopt.objectives.facts import Facts, Models, check_ranges
from prefopt.objectives.gae import gae, last_steps, to_come
from prefopt.objectives.policy_gradient import (
    clip_metrics,
    clipped_loss,
    correction_weight,
    gap_metrics,
    num_scored_tokens,
    scored_tokens,
)
from prefopt.objectives.update import policy_outputs

VARIANCE_EPS = 1e-8  # added to a variance before its root


class Experience(NamedTuple):
    """Constants of a rollout, of every completion token, [K] but for the last.

    advantage; returns: what the critic should have said, reward units; value: what it said; foresight: its mean over
    the rollout is the share of the variance of rewards that the critic foresaw, None where they do not vary; old_logp:
    nats, of the policy that drew the completions, None where the rollout serves one update, which finds the policy as
    it was; kl [N]: log-ratio to the reference, nats per completion, None without a reference.
    """

    advantage: Tensor
    returns: Tensor
    value: Tensor
    foresight: Tensor | None
    old_logp: Tensor | None
    kl: Tensor | None


@dataclass(frozen=True)
class PPO:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + value_weight x (V - returns)^2 / 2, mean over all tokens.

        R_t      =  -beta x log p_old(t) / p_reference(t), and at a completion's last token the reward besides
        delta_t  =  R_t + gamma V_t+1 - V_t              V_t the critic's value of the state before token t
        A_t      =  delta_t + gamma gae_lambda A_t+1     returns_t = A_t + V_t, before A is whitened
        r        =  p(t) / p_old(t), p_old the policy that drew the completion
    With value_clip the square is the larger of (V - returns)^2 and (V kept within value_clip of its old value -
    returns)^2. Tokens that the policy did not write are no steps.
    Schulman et al. 2017, arXiv:1707.06347, and 2015, arXiv:1506.02438 (advantages); for language models as in Huang et
    al. 2024, arXiv:2403.17031.
    """

    # strength of the pull towards the reference, reward units per nat, taken off the reward of each token: larger stays
    # closer, 0 needs no reference
    beta: float = 0.05
    # how far a token's probability may fall, as a share, before its gradient stops: larger moves faster, smaller more
    # safely
    clip_low: float = 0.2
    # how far it may rise: larger moves faster and keeps more variety, smaller is safer
    clip_high: float = 0.2
    # where a token did worse than expected, the ratio above which its gradient stops too (3 is usual): larger stops it
    # later, smaller sooner; null: never
    dual_clip: float | None = None
    # weight of the critic's loss beside the policy's: where both share a trunk, larger learns values faster and smaller
    # leaves the policy more to itself; a critic of its own moves at the learning rate whatever the weight, but for the
    # clipping of gradients
    value_weight: float = 0.1
    # how far a value may move from what it was in the rollout before its gradient stops, reward units: larger learns
    # faster (for rewards larger than 1), smaller more steadily; null: it never stops
    value_clip: float | None = 0.2
    # weight of a reward one token later: 1 counts all alike, smaller prefers early ones
    gamma: float = 1.0
    # how far an advantage looks ahead before it trusts the critic: 1 sees the whole completion (unbiased, noisy), 0 the
    # next token only (quiet, as biased as the critic)
    gae_lambda: float = 0.95
    # what is brought to standard deviation 1 over a rollout: advantages (to mean 0 too), rewards of tokens (their mean
    # stays), both, or none; without it the size of rewards sets the size of steps
    whiten: Literal["advantages", "rewards", "both", "none"] = "advantages"
    # reward units for a nat of entropy at each token: larger keeps completions varied, 0 costs no time
    entropy_bonus: float = 0.0
    # correct for a sampler whose log-probs differ from the trainer's. none; token, sequence: weights trainer/sampler of
    # each token or of the whole completion, cut at correction_cap; token_mask, sequence_mask: what has a weight above
    # the cap is left out
    correction: Literal["none", "token", "sequence", "token_mask", "sequence_mask"] = "none"
    # largest such weight: larger corrects more and is noisier, smaller is steadier and corrects less (2 is usual)
    correction_cap: float = 2.0

    facts: ClassVar[Facts] = Facts(
        name="ppo",
        title="Proximal policy optimisation with a critic",
        data="prompts",
        source="arXiv:1707.06347",
        learning_rate=3e-6,
        reference=True,
        live=True,
        forwards=1,
        critic=True,
        healthy="`reward` rises. `value/explained_variance` climbs above 0 within a hundred updates and `value/loss` "
        "falls. `ratio` stays near 1, the clip fractions below 0.2, `kl_old` below 0.02. `kl_reference` rises from 0 "
        "and flattens where beta holds it.",
        failures="`value/explained_variance` stays at or below 0: the critic foresees nothing, so advantages are "
        "noise; start it from a reward model (`critic_model`), or a larger `value_clip` for large rewards. "
        "`ratio` far from 1 and `kl_old` above 0.1: a rollout is used for too long; fewer passes over it, a lower "
        "`learning_rate`. "
        "`kl_reference` grows without end and samples get worse: the reward is fooled; a larger `beta`. "
        "`clip_fraction/high` and `clip_fraction/low` above 0.3: steps are too large; a lower `learning_rate`.",
    )

    def __post_init__(self) -> None:
        names = ("beta", "clip_low", "clip_high", "value_weight", "entropy_bonus")
        check_ranges(self, *names, above_zero=("correction_cap", "value_clip"))
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma must be above 0 and at most 1, got {self.gamma}; 1 is usual")
        if not 0 <= self.gae_lambda <= 1:
            raise ValueError(f"gae_lambda must be between 0 and 1, got {self.gae_lambda}; 0.95 is usual")
        if self.dual_clip is not None and not self.dual_clip > 1 + self.clip_high:
            raise ValueError(f"dual_clip must be above 1 + clip_high, {1 + self.clip_high:g}, got {self.dual_clip:g}")
        if self.correction == "none" and self.correction_cap != type(self).correction_cap:
            raise ValueError("correction_cap does nothing without correction; set correction: token or sequence")

    @property
    def extras(self) -> tuple[str, ...]:
        """The optional `Outputs` that are read."""
        return ("entropy",) if self.entropy_bonus else ()

    def count(self, batch: Batch) -> Tensor:
        return num_scored_tokens(batch)

    def targets(self, batch: Batch, models: Models) -> Experience:
        out, at = policy_outputs(batch, models), scored_tokens(batch)
        value = _value(out)
        log_ratio = out.logp - models.reference(batch) if self.beta else None  # [K]
        reward = token_rewards(batch, log_ratio, self.beta).to(torch.promote_types(value.dtype, out.logp.dtype))
        if self.whiten in ("rewards", "both"):
            reward = whitened(batch, reward, at, keep_mean=True)
        advantage, returns = gae(batch, reward, value, self.gamma, self.gae_lambda)
        if self.whiten in ("advantages", "both"):
            advantage = whitened(batch, advantage, at)
        return Experience(
            advantage.masked_fill(~at, 0),
            returns,
            value,
            foresight(batch, to_come(batch, reward, self.gamma), value, at),
            out.logp if getattr(models, "several", False) else None,
            None if log_ratio is None else batch.sum_tokens(log_ratio),
        )

    def loss(self, batch: Batch, out: Outputs, targets: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        at = scored_tokens(batch)  # [K]
        old = out.logp.detach() if targets.old_logp is None else targets.old_logp
        # a ratio of a token that counts for nothing could be infinite, and its gradient of 0 x infinity is none
        move = out.logp.masked_fill(~at, 0) - old.masked_fill(~at, 0)  # [K]
        policy, clipping = self.surrogate(batch, move, targets.advantage)  # [K]
        if self.correction != "none":
            policy = policy * correction_weight(self.correction, self.correction_cap, batch, old)
        plain, kept = value_errors(_value(out), targets.value, targets.returns, self.value_clip)  # [K], [K]
        value = torch.maximum(plain, kept)
        token = policy + self.value_weight * value
        if self.entropy_bonus and out.entropy is not None:
            token = token - self.entropy_bonus * out.entropy
        seen = {"policy/loss": policy[at], "value/loss": value[at], "value/clip_fraction": (kept > plain)[at].float()}
        return token[at].sum(), {**seen, **clipping, **_seen(batch, out, old, targets)}

    def surrogate(self, batch: Batch, move: Tensor, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The policy's loss of each token, [K], and what is logged of it. move [K]: log-ratio to the old policy."""
        edges = (self.clip_low, self.clip_high, math.inf if self.dual_clip is None else self.dual_clip)
        ratio = move.exp()
        return clipped_loss(ratio, advantage, *edges), clip_metrics(batch, ratio, advantage, *edges)

    def at_start(self) -> dict[str, float]:
        return {"ratio": 1.0, "kl_old": 0.0, **({"kl_reference": 0.0} if self.beta else {})}


def _seen(batch: Batch, out: Outputs, old_logp: Tensor, targets: Experience) -> dict[str, Tensor]:
    """What is logged of the rollout and of the distance from it."""
    at, move = scored_tokens(batch), (out.logp - old_logp).detach()
    seen = {"value/returns": targets.returns[at], "kl_old": (torch.expm1(move) - move)[at]}
    if targets.foresight is not None:
        seen["value/explained_variance"] = targets.foresight[at]
    if out.entropy is not None:
        seen["entropy"] = out.entropy[at]
    if targets.kl is not None:
        seen["kl_reference"] = targets.kl[scored(batch.score)]
    return {**seen, **gap_metrics(batch, old_logp, at)}


# ---------------------------------------------------------------- rewards of tokens


def token_rewards(batch: Batch, log_ratio: Tensor | None, beta: float) -> Tensor:
    """Reward of each token, [K]: -beta x its log-ratio to the reference, and the score at the last trained one.

    log_ratio [K] nats, None without a reference. 0 on untrained tokens and in completions without a score.
    """
    score = batch.spread(batch.score)  # [K]
    reward = torch.where(last_steps(batch), score, 0)
    if log_ratio is not None:
        reward = reward - beta * log_ratio
    return torch.where(scored_tokens(batch), reward, 0)


# ---------------------------------------------------------------- the critic


def value_errors(value: Tensor, old: Tensor, returns: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """Half the squared error of each value, and of the value kept within `clip` of its old one: [K], [K].

    The loss is the larger of the two: a value that moved further than `clip` towards its return gets no gradient.
    """
    kept = value if clip is None else value.clamp(old - clip, old + clip)
    return 0.5 * (value - returns).square(), 0.5 * (kept - returns).square()


def foresight(batch: Batch, came: Tensor, value: Tensor, at: Tensor) -> Tensor | None:
    """1 - (e - mean e)^2 / variance of what came, e = came - value, [K]; None where what came does not vary.

    came [K]: the rewards to come from each token on, as they were; not returns, which hold the critic's own values. The
    mean over the tokens `at` of a rollout, on all processes, is the explained variance.
    """
    _, variance = moments(batch, came, at)
    if not variance > 0:
        return None
    error = came - value
    return 1 - (error - moments(batch, error, at)[0]).square() / variance


def _value(out: Outputs) -> Tensor:
    if out.value is None:
        raise ValueError("ppo reads Outputs.value and there is none; score with prefopt.models.critic.ActorCritic")
    return out.value


# ---------------------------------------------------------------- over the whole rollout


def moments(batch: Batch, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [] of x [K] over the tokens `at` of the rollout, on all processes; 0 where there are none."""
    shares = ranks.gather(x.new_empty(0).cpu() if batch.filler else x[at].detach().cpu())
    everyone = torch.cat(shares).to(x.device)
    if not len(everyone):
        return x.new_zeros(()), x.new_zeros(())
    return everyone.mean(), everyone.var(correction=0)


def whitened(batch: Batch, x: Tensor, at: Tensor, keep_mean: bool = False) -> Tensor:
    """x [K] with mean 0, or the mean it had, and standard deviation 1 over the tokens `at` of the rollout."""
    mean, variance = moments(batch, x, at)
    scaled = (x - mean) / (variance + VARIANCE_EPS).sqrt()
    return scaled + mean if keep_mean else scaled
