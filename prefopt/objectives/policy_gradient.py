"""Learning from rewards on groups of completions: advantage, ratio with its clipping, aggregation and KL are separate
choices, and a method is a choice of each.

Letters: G prompts, N completions, K completion tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from prefopt.batch import Batch, Outputs
from prefopt.objectives.advantages import Advantage, scored
from prefopt.objectives.facts import Models, check_ranges
from prefopt.objectives.update import policy_logp

Correction = Literal["none", "token", "sequence"]
KL = Literal["reward", "k3", "k3_weighted", "k2"]


class Rollout(NamedTuple):
    """Constants of a rollout. advantage [K]; old_logp [K]: the policy's log-probs when the completions were drawn, None
    while it has not moved since; reference_logp [K] where the loss holds a KL term; weight [K]: correction for what the
    sampler drew from; kl [N]: log-ratio to the reference, nats per completion, None without a reference.
    """

    advantage: Tensor
    old_logp: Tensor | None
    reference_logp: Tensor | None
    weight: Tensor | None
    kl: Tensor | None


# (batch, log-prob [K], log-ratio to the old policy [K], advantage [K]) -> loss of each token [K], and metrics
Surrogate = Callable[[Batch, Tensor, Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class Aggregation:
    """How token losses [K] become one number: a weight for each token, and the count that the sum is divided by.

    weights(batch) -> [K]; count(batch) -> [], from the batch alone.
    """

    weights: Callable[[Batch], Tensor]
    count: Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Method:
    """A policy gradient: each part is a choice of its own."""

    advantage: Advantage
    surrogate: Surrogate
    aggregation: Aggregation


# ---------------------------------------------------------------- aggregation


def _one(batch: Batch) -> Tensor:
    return torch.ones_like(batch.trained, dtype=torch.float32)


def _per_token_of_sequence(batch: Batch) -> Tensor:
    ones = _one(batch)
    return batch.spread(1 / batch.sum_tokens(ones).clamp(min=1))


def num_scored(batch: Batch) -> Tensor:
    """Completions that have a reward, []."""
    return scored(batch.score).sum()


def num_scored_tokens(batch: Batch) -> Tensor:
    """Trained tokens of completions that have a reward, []."""
    return (batch.trained & batch.spread(scored(batch.score))).sum()


# the mean over a completion's tokens, then over completions: a token of a long answer weighs less
SEQUENCE_MEAN = Aggregation(_per_token_of_sequence, num_scored)
# the mean over all tokens of the update: every token weighs the same
TOKEN_MEAN = Aggregation(_one, num_scored_tokens)
# the sum over a completion's tokens, then the mean over completions: the gradient of the expected reward
SEQUENCE_SUM = Aggregation(_one, num_scored)


def constant_mean(length: float) -> Aggregation:
    """The sum over a completion's tokens divided by a constant, then the mean over completions."""
    return Aggregation(lambda batch: _one(batch) / length, num_scored)


# ---------------------------------------------------------------- ratio and clipping


def clipped(low: float, high: float) -> Surrogate:
    """-min(r A, clip(r, 1 - low, 1 + high) A), r the ratio of each token. Schulman et al. 2017, arXiv:1707.06347."""

    def surrogate(batch: Batch, logp: Tensor, move: Tensor, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        ratio = move.exp()
        return clipped_loss(ratio, advantage, low, high), clip_metrics(batch, ratio, advantage, low, high)

    return surrogate


def clipped_loss(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A), element by element."""
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def clip_metrics(batch: Batch, ratio: Tensor, advantage: Tensor, low: float, high: float) -> dict[str, Tensor]:
    """ratio, and the shares of trained tokens whose gradient is clipped away on either side: [K] each."""
    at = batch.trained & batch.spread(scored(batch.score))
    ratio, advantage = ratio.detach()[at], advantage[at]
    return {
        "ratio": ratio,
        "clip_fraction/low": ((ratio < 1 - low) & (advantage < 0)).float(),
        "clip_fraction/high": ((ratio > 1 + high) & (advantage > 0)).float(),
    }


def reinforce(batch: Batch, logp: Tensor, move: Tensor, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """-A r with r the ratio of the whole completion: the gradient of the expected reward, also off-policy, exact."""
    ratio = batch.spread(batch.sum_tokens(move).exp() / batch.sum_tokens(torch.ones_like(move)).clamp(min=1))
    whole = batch.sum_tokens(move).exp().detach()
    return -ratio * advantage, {"ratio": whole[scored(batch.score)]}


# ---------------------------------------------------------------- KL in the loss


def kl_loss(kind: KL, batch: Batch, logp: Tensor, move: Tensor, reference_logp: Tensor) -> Tensor:
    """A penalty on the distance from the reference as a token loss, [K] nats.

    k3: e^-d - 1 + d of each token, as GRPO has it; its gradient is that of KL(reference || policy), and partial.
    k3_weighted: the same, times the token's ratio (DeepSeek-V3.2, arXiv:2512.02556). k2: half the square of the whole
    completion's log-ratio, whose gradient is that of KL(policy || reference).
    Schulman 2020, http://joschu.net/blog/kl-approx.html.
    """
    if kind == "k2":
        distance = batch.sum_tokens(logp - reference_logp)  # [N]
        return batch.spread(0.5 * distance.square() / batch.sum_tokens(torch.ones_like(logp)).clamp(min=1))
    d = logp - reference_logp
    k3 = torch.expm1(-d) + d
    return move.exp() * k3 if kind == "k3_weighted" else k3


# ---------------------------------------------------------------- what all methods share


@dataclass(frozen=True)
class PolicyGradient:
    """Options and steps that every method on groups shares; a method adds its own `method`.

    Inherited, against the habit of this package: a dozen methods would otherwise repeat these options word for word.
    """

    # strength of the pull towards the reference, reward units per nat: larger stays closer, 0 needs no reference
    beta: float = 0.0
    # where that pull acts. reward: the log-ratio is taken off the reward, which is exact; k2, k3 (as in the GRPO
    # paper), k3_weighted: an estimate of the distance is added to the loss
    kl: KL = "reward"
    # correct for a sampler whose log-probs differ from the trainer's: none, or weights trainer/sampler of each token or
    # of the whole completion, cut at correction_cap
    correction: Correction = "none"
    # largest such weight: larger corrects more and is noisier (2 is usual)
    correction_cap: float = 2.0

    def __post_init__(self) -> None:
        check_ranges(self, "beta", above_zero=("correction_cap",))

    @property
    def method(self) -> Method:
        raise NotImplementedError

    def count(self, batch: Batch) -> Tensor:
        return self.method.aggregation.count(batch)

    def targets(self, batch: Batch, models: Models) -> Rollout:
        several = getattr(models, "several", False)
        reference = models.reference(batch) if self.beta else None
        old = policy_logp(batch, models) if several or reference is not None or self.correction != "none" else None
        kl = None if reference is None or old is None else batch.sum_tokens(old - reference)  # [N]
        reward = batch.score if kl is None or self.kl != "reward" else batch.score - self.beta * kl
        return Rollout(
            batch.spread(self.method.advantage(batch, reward)),
            old,
            reference if self.kl != "reward" else None,
            None if old is None else correction_weight(self.correction, self.correction_cap, batch, old),
            kl,
        )

    def loss(self, batch: Batch, out: Outputs, targets: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        old = out.logp.detach() if targets.old_logp is None else targets.old_logp
        move = out.logp - old  # [K]
        token, seen = self.method.surrogate(batch, out.logp, move, targets.advantage)
        if targets.weight is not None:
            token = token * targets.weight
        if targets.reference_logp is not None:
            token = token + self.beta * kl_loss(self.kl, batch, out.logp, move, targets.reference_logp)
        at = batch.trained & batch.spread(scored(batch.score))  # [K]
        loss = (token * self.method.aggregation.weights(batch))[at].sum()
        return loss, {**seen, **gap_metrics(batch, old, at), **kl_metrics(targets.kl, batch)}

    def at_start(self) -> dict[str, float]:
        return {"ratio": 1.0, **({"kl_reference": 0.0} if self.beta else {})}


def correction_weight(kind: Correction, cap: float, batch: Batch, old_logp: Tensor) -> Tensor | None:
    """min(trainer / sampler, cap) for each token or, spread over its tokens, for each completion: [K]; None for none.

    ValueError where the sampler gave no log-probs. Yao et al. 2025, truncated importance sampling
    (fengyao.notion.site/off-policy-rl).
    """
    if kind == "none":
        return None
    if batch.rollout_logp is None:
        raise ValueError("correction needs the sampler's log-probs, and it gave none; use correction: none")
    gap = old_logp - batch.rollout_logp  # [K]
    return (batch.spread(batch.sum_tokens(gap)) if kind == "sequence" else gap).exp().clamp(max=cap)


def gap_metrics(batch: Batch, old_logp: Tensor, at: Tensor) -> dict[str, Tensor]:
    """How far the sampler's log-probs are from the trainer's, of the tokens `at`; nothing if it gave none."""
    if batch.rollout_logp is None:
        return {}
    return {"sampler_gap": (old_logp.detach() - batch.rollout_logp)[at].abs()}


def kl_metrics(kl: Tensor | None, batch: Batch) -> dict[str, Tensor]:
    """The distance of the completions that have a reward, [n] nats each."""
    return {} if kl is None else {"kl_reference": kl[scored(batch.score)]}
