"""What objectives on pairs share: losses of the two rewards, the metrics of a pair, and what is asked of the reference.

Letters: G pairs, N completions, K completion tokens. s is the sigmoid, r the reward of a completion, w the chosen and l
the rejected one, D = r(w) - r(l).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.batch import Batch, Outputs


class Reference(NamedTuple):
    """Targets of an objective with a reference.

    logp [N]: each completion's log-prob under the reference, nats, its tokens put together as the objective does.
    drift []: middle of the rewards of an update, None where no loss reads it.
    """

    logp: Tensor
    drift: Tensor | None = None


class Settings(NamedTuple):
    """What some losses read besides the rewards. label_smoothing: share of pairs taken to be flipped. drift: []."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    drift: Tensor | None = None


# ---------------------------------------------------------------- losses: (r(w) [G], r(l) [G], settings) -> [G]


def sigmoid(chosen: Tensor, rejected: Tensor, settings: Settings) -> Tensor:
    """-(1 - e) log s(D) - e log s(-D), e the label smoothing: 0 is DPO, above 0 conservative DPO, least at
    D = logit(1 - e).

    Rafailov et al. 2023, arXiv:2305.18290, equation 7; Mitchell 2023, ericmitchell.ai/cdpo.pdf.
    """
    loss = -F.logsigmoid(chosen - rejected)
    if not settings.label_smoothing:
        return loss
    flipped = -F.logsigmoid(rejected - chosen)
    return (1 - settings.label_smoothing) * loss + settings.label_smoothing * flipped


def robust(chosen: Tensor, rejected: Tensor, settings: Settings) -> Tensor:
    """(-(1 - e) log s(D) + e log s(-D)) / (1 - 2e): with a share e of flipped pairs, its mean is DPO's on clean ones.

    Chowdhury et al. 2024, arXiv:2403.00409.
    """
    share = settings.label_smoothing
    clean, flipped = F.logsigmoid(chosen - rejected), F.logsigmoid(rejected - chosen)
    return (share * flipped - (1 - share) * clean) / (1 - 2 * share)


def hinge(chosen: Tensor, rejected: Tensor, settings: Settings) -> Tensor:
    """max(0, 1 - D): no credit to a pair beyond the margin.

    SLiC, Zhao et al. 2023, arXiv:2305.10425, on DPO's rewards as in Liu et al. 2023 (RSO), arXiv:2309.06657.
    """
    return torch.relu(1 - (chosen - rejected))


def exo(chosen: Tensor, rejected: Tensor, settings: Settings) -> Tensor:
    """KL((s(D), s(-D)) || (1 - e, e)): the reverse of cDPO's cross-entropy; e is the label smoothing, or 0.001.

    Ji et al. 2024, arXiv:2402.00856.
    """
    share = torch.tensor(settings.label_smoothing or 1e-3, dtype=chosen.dtype, device=chosen.device)
    better, worse = F.logsigmoid(chosen - rejected), F.logsigmoid(rejected - chosen)
    return better.exp() * (better - torch.log1p(-share)) + worse.exp() * (worse - share.log())


def nca(chosen: Tensor, rejected: Tensor, settings: Settings) -> Tensor:
    """-log s(r(w)) - 1/2 log s(-r(w)) - 1/2 log s(-r(l)): absolute rewards keep the chosen one from falling.

    Chen et al. 2024, arXiv:2402.05369.
    """
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def apo_zero(chosen: Tensor, rejected: Tensor, settings: Settings) -> Tensor:
    """s(-r(w)) + s(r(l)): chosen up, rejected down, for chosen completions better than the model's own.

    D'Oosterlinck et al. 2024, arXiv:2408.06266.
    """
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def apo_down(chosen: Tensor, rejected: Tensor, settings: Settings) -> Tensor:
    """s(r(w)) + s(-D): chosen down, rejected further down, for chosen completions worse than the model's own.

    D'Oosterlinck et al. 2024, arXiv:2408.06266.
    """
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


def sppo(chosen: Tensor, rejected: Tensor, settings: Settings) -> Tensor:
    """((r(w) - 1/2)^2 + (r(l) + 1/2)^2) / beta^2: log-ratios regressed on +-1/(2 beta), win rates taken to be 1 and 0.

    Wu et al. 2024, arXiv:2405.00675.
    """
    return ((chosen - 0.5).square() + (rejected + 0.5).square()) / settings.beta**2


def bco(chosen: Tensor, rejected: Tensor, settings: Settings) -> Tensor:
    """-log s(r(w) - drift) - log s(drift - r(l)): each completion classified by itself; the drift is a constant.

    Jung et al. 2024, arXiv:2404.04656, on pairs.
    """
    drift = 0.0 if settings.drift is None else settings.drift
    return -F.logsigmoid(chosen - drift) - F.logsigmoid(drift - rejected)


MODULATION = 0.05  # the temperature of DiscoPOP's blend that was found together with it


def discopop(chosen: Tensor, rejected: Tensor, settings: Settings) -> Tensor:
    """(1 - m) (-log s(D)) + m exp(-D) with m = s(D / 0.05): logistic below 0, exponential above, not convex between.

    Lu et al. 2024, arXiv:2406.08414.
    """
    margin = chosen - rejected
    below = torch.sigmoid(-margin / MODULATION) * -F.logsigmoid(margin)
    # one exponent: exp(-D) alone overflows where its share m vanishes
    return below + torch.exp(F.logsigmoid(margin / MODULATION) - margin)


class Loss(NamedTuple):
    """of_margin: the loss reads the difference of the two rewards only. smoothed: it reads the label smoothing."""

    function: Callable[[Tensor, Tensor, Settings], Tensor]
    of_margin: bool = False
    smoothed: bool = False


LOSSES: dict[str, Loss] = {
    "sigmoid": Loss(sigmoid, of_margin=True, smoothed=True),
    "robust": Loss(robust, of_margin=True, smoothed=True),
    "hinge": Loss(hinge, of_margin=True),
    "exo": Loss(exo, of_margin=True, smoothed=True),
    "nca": Loss(nca),
    "apo_zero": Loss(apo_zero),
    "apo_down": Loss(apo_down),
    "sppo": Loss(sppo),
    "bco": Loss(bco),
    "discopop": Loss(discopop, of_margin=True),
}


# ---------------------------------------------------------------- what a pair is made of and what is logged of it


def lengths(batch: Batch) -> Tensor:
    """Trained tokens of each completion, [N] int64."""
    return batch.sum_tokens(batch.trained.long())


def beyond_shorter(batch: Batch) -> Tensor:
    """The trained tokens of a completion past the length of its pair's shorter one, [K] bool."""
    own = lengths(batch)  # [N]
    shorter = torch.minimum(*batch.pairs(own))[batch.group]  # [N]
    place = batch.trained.long().cumsum(0) - batch.spread(own.cumsum(0) - own)  # [K], from 1 in each completion
    return place > batch.spread(shorter)


def likelihood(batch: Batch, out: Outputs) -> Tensor:
    """How likely the policy is to write a pair, a constant: [G], about 1 for completions drawn from it, else below.

    exp of the mean over a completion's tokens of log p - log sum_v p_v^2, the product of both completions; the second
    term is a token's expected probability, so that a policy that is unsure of every token is not held against a pair.
    Zhou et al. 2024 (WPO), arXiv:2406.11827. ValueError without `Outputs.collision`.
    """
    if out.collision is None:
        raise ValueError("weighting: wpo reads Outputs.collision; score with Policy(..., collision=True)")
    likely = batch.mean_tokens((out.logp - out.collision).detach()).exp()  # [N]
    chosen, rejected = batch.pairs(likely)
    return chosen * rejected


def pair_metrics(batch: Batch, logp: Tensor, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """What every objective on pairs logs, by metric name, [G] each.

    logp [K] nats; chosen, rejected [G]: the rewards that the loss compares.
    """
    chosen_logp, rejected_logp = batch.pairs(batch.sum_tokens(logp))  # [G], [G]
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
        "logps/chosen": chosen_logp,
        "logps/rejected": rejected_logp,
    }
