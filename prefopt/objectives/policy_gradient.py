"""Learning from rewards on groups of completions: advantage, ratio with its clipping, aggregation and KL are separate
choices, and a method is a choice of each.

Letters: G prompts, N completions, K completion tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from prefopt.batch import Batch, Outputs
from prefopt.objectives.advantages import Advantage, centred, scored
from prefopt.objectives.facts import Models, check_ranges
from prefopt.objectives.update import policy_logp


class Rollout(NamedTuple):
    """Constants of a rollout. advantage [K]; old_logp [K]: the policy's log-probs when the completions were drawn, None
    where the rollout serves one update, which finds the policy as it was; reference_logp [K] where the loss holds a KL
    term; kl [N]: log-ratio to the reference, nats per completion, where the reward holds it.
    """

    advantage: Tensor
    old_logp: Tensor | None = None
    reference_logp: Tensor | None = None
    kl: Tensor | None = None


# (batch, log-prob [K], log-ratio to the old policy [K], advantage [K]) -> loss of each token [K], and metrics.
# Each token's loss has the gradient of its own log-prob alone, so that tokens can be weighted and left out.
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
    """A policy gradient: each part is a choice of its own.

    kl_advantage: the baseline of the log-ratio that is taken off the reward, where kl is reward, on the scale that
    `advantage` gives the rewards: without it the pull of a divided reward would change with its spread, and the policy
    would end elsewhere than at the reference tilted by reward / beta.
    """

    advantage: Advantage
    surrogate: Surrogate
    aggregation: Aggregation
    kl_advantage: Advantage = centred


# ---------------------------------------------------------------- aggregation


def _one(batch: Batch) -> Tensor:
    return torch.ones_like(batch.trained, dtype=torch.float32)


def share_of_completion(batch: Batch) -> Tensor:
    """One over the trained tokens of the completion that each token is in, [K]."""
    return batch.spread(1 / batch.sum_tokens(_one(batch)).clamp(min=1))


def num_scored(batch: Batch) -> Tensor:
    """Completions that have a reward, []."""
    return scored(batch.score).sum()


def num_scored_tokens(batch: Batch) -> Tensor:
    """Trained tokens of completions that have a reward, []."""
    return scored_tokens(batch).sum()


def scored_tokens(batch: Batch) -> Tensor:
    """Trained tokens of completions that have a reward, [K] bool."""
    return batch.trained & batch.spread(scored(batch.score))


# the mean over a completion's tokens, then over completions: a token of a long answer weighs less
SEQUENCE_MEAN = Aggregation(share_of_completion, num_scored)
# the mean over all tokens of the update: every token weighs the same
TOKEN_MEAN = Aggregation(_one, num_scored_tokens)
# the sum over a completion's tokens, then the mean over completions: the gradient of the expected reward
SEQUENCE_SUM = Aggregation(_one, num_scored)


def constant_mean(length: float) -> Aggregation:
    """The sum over a completion's tokens divided by a constant, then the mean over completions."""
    return Aggregation(lambda batch: _one(batch) / length, num_scored)


# ---------------------------------------------------------------- ratio and clipping


def clipped(low: float, high: float, bound: float = math.inf) -> Surrogate:
    """-min(r A, clip(r, 1 - low, 1 + high) A), r the ratio of each token. Schulman et al. 2017, arXiv:1707.06347."""

    def surrogate(batch: Batch, logp: Tensor, move: Tensor, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        ratio = move.exp()
        seen = clip_metrics(batch, ratio, advantage, low, high, bound)
        return clipped_loss(ratio, advantage, low, high, bound), seen

    return surrogate


def clipped_by_completion(low: float, high: float, bound: float = math.inf) -> Surrogate:
    """The same with the ratio of a completion, the geometric mean over its tokens. Zheng et al. 2025, arXiv:2507.18071.

    In the token form of the paper, whose gradient is the same.
    """

    def surrogate(batch: Batch, logp: Tensor, move: Tensor, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        ratio = batch.spread(batch.mean_tokens(move).exp())
        seen = clip_metrics(batch, ratio, advantage, low, high, bound)
        return clipped_loss(for_each_token(ratio, logp), advantage, low, high, bound), seen

    return surrogate


def whole(low: float = math.inf, high: float = math.inf) -> Surrogate:
    """-min(r A, clip(r, 1 - low, 1 + high) A) of a completion, r its ratio; its tokens hold equal parts of the value.

    Unclipped it is the gradient of the expected reward, also off-policy, exact.
    """

    def surrogate(batch: Batch, logp: Tensor, move: Tensor, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        each = batch.sum_tokens(move).exp()  # [N]
        ratio = batch.spread(each)
        token = clipped_loss(for_each_token(ratio, logp), advantage, low, high)
        token = token - token.detach() * (1 - share_of_completion(batch))
        seen = clip_metrics(batch, ratio, advantage, low, high) if high < math.inf else {}
        return token, {**seen, "ratio": each.detach()[scored(batch.score)]}

    return surrogate


reinforce = whole()


def weighted(lowest: float, highest: float) -> Surrogate:
    """-w A log p of each token, w its ratio cut to lowest and highest, without gradient: no token is left out.

    MiniMax 2025, arXiv:2506.13585.
    """

    def surrogate(batch: Batch, logp: Tensor, move: Tensor, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        ratio, at = move.detach().exp(), scored_tokens(batch)
        seen = {
            "ratio": ratio[at],
            "clip_fraction/low": (ratio < lowest)[at].float(),
            "clip_fraction/high": (ratio > highest)[at].float(),
        }
        return -ratio.clamp(lowest, highest) * advantage * logp, seen

    return surrogate


def gated(rising: float, falling: float) -> Surrogate:
    """-4/t sigmoid(t (r - 1)) A of each token; t is `rising` where A is above 0, else `falling`.

    At a ratio r of 1 the gradient is that of r A; it fades on both sides. Gao et al. 2025, arXiv:2511.20347.
    """

    def surrogate(batch: Batch, logp: Tensor, move: Tensor, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        ratio = move.exp()
        temperature = torch.full_like(ratio, falling).masked_fill(advantage > 0, rising)  # [K]
        gate = 4 / temperature * torch.sigmoid(temperature * (ratio - 1))
        return -gate * advantage, {"ratio": ratio.detach()[scored_tokens(batch)]}

    return surrogate


def for_each_token(ratio: Tensor, logp: Tensor) -> Tensor:
    """A completion's ratio [K], whose gradient at each token is that of the token's own log-prob, times the ratio."""
    return ratio.detach() * (logp - logp.detach()).exp()


def clipped_loss(ratio: Tensor, advantage: Tensor, low: float, high: float, bound: float = math.inf) -> Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A), element by element; r at most `bound`, which tells where A is negative.

    bound: Ye et al. 2019, arXiv:1912.09729.
    """
    return -torch.minimum(ratio.clamp(max=bound) * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def clip_metrics(
    batch: Batch, ratio: Tensor, advantage: Tensor, low: float, high: float, bound: float = math.inf
) -> dict[str, Tensor]:
    """ratio, and the shares of trained tokens whose gradient is clipped away on either side: [K] each."""
    at = scored_tokens(batch)
    ratio, advantage = ratio.detach()[at], advantage[at]
    rose = ((ratio > 1 + high) & (advantage > 0)) | ((ratio > bound) & (advantage < 0))
    fell = (ratio < 1 - low) & (advantage < 0)
    return {"ratio": ratio, "clip_fraction/low": fell.float(), "clip_fraction/high": rose.float()}


# ---------------------------------------------------------------- KL in the loss


def kl_loss(kind: str, batch: Batch, logp: Tensor, move: Tensor, reference_logp: Tensor) -> Tensor:
    """A penalty on the distance from the reference as a token loss, [K] nats.

    k3: e^-d - 1 + d of each token, as GRPO has it; its gradient is that of KL(reference || policy), and partial.
    k3_weighted: the same, times the token's ratio (DeepSeek-V3.2, arXiv:2512.02556). k2: half the square of the whole
    completion's log-ratio, whose gradient is that of KL(policy || reference) while the ratio is 1.
    Schulman 2020, http://joschu.net/blog/kl-approx.html.
    """
    d = logp - reference_logp
    if kind == "k2":
        return batch.spread(0.5 * batch.sum_tokens(d).square()) * share_of_completion(batch)
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
    # where that pull acts. reward: the log-ratio is taken off the reward, so that the optimum is the reference tilted
    # by reward / beta; k2, k3 (as in the GRPO paper), k3_weighted: an estimate of the distance is added to the loss
    kl: Literal["reward", "k2", "k3", "k3_weighted"] = "reward"
    # correct for a sampler whose log-probs differ from the trainer's. none; token, sequence: weights trainer/sampler of
    # each token or of the whole completion, cut at correction_cap; token_mask, sequence_mask: what has a weight above
    # the cap is left out
    correction: Literal["none", "token", "sequence", "token_mask", "sequence_mask"] = "none"
    # largest such weight: larger corrects more and is noisier, smaller is steadier and corrects less (2 is usual)
    correction_cap: float = 2.0

    def __post_init__(self) -> None:
        check_ranges(self, "beta", above_zero=("correction_cap",))
        if self.kl != "reward" and not self.beta:
            raise ValueError(f"kl: {self.kl} does nothing while beta is 0; set beta above 0 or leave kl out")
        if self.correction == "none" and self.correction_cap != type(self).correction_cap:
            raise ValueError("correction_cap does nothing without correction; set correction: token or sequence")

    @property
    def method(self) -> Method:
        raise NotImplementedError

    def count(self, batch: Batch) -> Tensor:
        return self.method.aggregation.count(batch)

    def targets(self, batch: Batch, models: Models) -> Rollout:
        several, in_reward = getattr(models, "several", False), bool(self.beta) and self.kl == "reward"
        if self.correction != "none" and batch.rollout_logp is None:
            raise ValueError("correction needs the sampler's log-probs, and it gave none; use correction: none")
        reference = models.reference(batch) if self.beta else None
        old = policy_logp(batch, models) if several or in_reward else None
        ratio = old - reference if in_reward and old is not None and reference is not None else None  # [K]
        return Rollout(
            self.credit(batch, None if ratio is None else self.beta * ratio),
            old if several else None,
            None if in_reward else reference,
            None if ratio is None else batch.sum_tokens(ratio),
        )

    def credit(self, batch: Batch, penalty: Tensor | None) -> Tensor:
        """The advantage of each token, [K]. penalty [K]: what the reference takes off its reward; None: nothing."""
        credit = self.method.advantage(batch, batch.score)
        if penalty is not None:
            each = torch.where(scored(batch.score), batch.sum_tokens(penalty), torch.nan)  # [N]
            credit = credit - self.method.kl_advantage(batch, each)
        return batch.spread(credit)

    def loss(self, batch: Batch, out: Outputs, targets: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        at = scored_tokens(batch)  # [K]
        old = out.logp.detach() if targets.old_logp is None else targets.old_logp
        # a ratio of a token that counts for nothing could be infinite, and its gradient of 0 x infinity is none
        logp = out.logp.masked_fill(~at, 0)
        move = logp - old.masked_fill(~at, 0)  # [K]
        token, seen = self.method.surrogate(batch, logp, move, targets.advantage)
        if self.correction != "none":
            token = token * correction_weight(self.correction, self.correction_cap, batch, old)
        if targets.reference_logp is not None:
            token = token + self.beta * kl_loss(self.kl, batch, logp, move, targets.reference_logp)
        loss = (token * self.method.aggregation.weights(batch))[at].sum()
        return loss, {**seen, **gap_metrics(batch, old, at), **kl_metrics(batch, old, targets)}

    def at_start(self) -> dict[str, float]:
        return {"ratio": 1.0, **({"kl_reference": 0.0} if self.beta else {})}


@dataclass(frozen=True)
class Clipped(PolicyGradient):
    """Options of methods that stop the gradient of what has moved far enough; a method sets its own sizes."""

    # how far a probability may fall, as a share, before its gradient stops: larger moves faster, smaller more safely
    clip_low: float = 0.2
    # how far it may rise: larger moves faster and keeps more variety, smaller is safer
    clip_high: float = 0.2
    # the ratio above which the gradient stops where the reward is below what was expected, which clipping alone never
    # does: larger stops it later, smaller sooner (3 is usual); null: never
    dual_clip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, "clip_low", "clip_high")
        if self.dual_clip is not None and not self.dual_clip > 1 + self.clip_high:
            raise ValueError(f"dual_clip must be above 1 + clip_high, {1 + self.clip_high:g}, got {self.dual_clip:g}")

    @property
    def edges(self) -> tuple[float, float, float]:
        """What the surrogates take: low, high, bound."""
        return self.clip_low, self.clip_high, math.inf if self.dual_clip is None else self.dual_clip


def correction_weight(kind: str, cap: float, batch: Batch, old_logp: Tensor) -> Tensor:
    """trainer / sampler for each token or, spread over its tokens, for each completion, without gradient: [K].

    Above the cap it is the cap or, where the kind is a mask, 0.
    Yao et al. 2025, truncated importance sampling (fengyao.notion.site/off-policy-rl). Masks:
    ringtech.notion.site/icepop.
    """
    if batch.rollout_logp is None:
        raise ValueError("correction needs the sampler's log-probs, and it gave none; use correction: none")
    gap = (old_logp.detach() - batch.rollout_logp).masked_fill(~batch.trained, 0)  # [K]
    weight = (batch.spread(batch.sum_tokens(gap)) if kind.startswith("sequence") else gap).exp()
    return weight.masked_fill(weight > cap, 0) if kind.endswith("mask") else weight.clamp(max=cap)


def gap_metrics(batch: Batch, old_logp: Tensor, at: Tensor) -> dict[str, Tensor]:
    """How far the sampler's log-probs are from the trainer's, of the tokens `at`; nothing if it gave none."""
    if batch.rollout_logp is None:
        return {}
    return {"sampler_gap": (old_logp.detach() - batch.rollout_logp)[at].abs()}


def kl_metrics(batch: Batch, old_logp: Tensor, targets: Rollout) -> dict[str, Tensor]:
    """The distance of the completions that have a reward, [n] nats each; nothing without a reference."""
    if targets.reference_logp is not None:
        kl = batch.sum_tokens(old_logp.detach() - targets.reference_logp)
    elif targets.kl is not None:
        kl = targets.kl
    else:
        return {}
    return {"kl_reference": kl[scored(batch.score)]}
