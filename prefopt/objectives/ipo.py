"""Identity preference optimisation: the difference of log-ratios is regressed on a set margin, not driven apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prefopt.batch import Batch, Outputs
from prefopt.objectives.facts import Facts, Models, check_ranges
from prefopt.objectives.pairwise import Reference, pair_metrics


@dataclass(frozen=True)
class IPO:
    """(h(chosen) - h(rejected) - 1 / (2 beta))^2: log-ratios that differ by a set margin, where DPO's never stop.

        h(y)  =  log p(y | x) - log p_reference(y | x)               log p summed over the trained tokens of y
        loss  =  (h(chosen) - h(rejected) - 1 / (2 beta))^2          mean over pairs

    beta weighs the KL distance from the reference as in DPO; the paper calls it tau. On labels from pairs drawn
    independently from m the optimum is p_reference * exp(P(y preferred to m) / beta), normalised, also where labels are
    certain. Two losses go by this name: the paper's, whose log-ratios are sums (the default), and the one that TRL and
    others use, whose log-ratios are means over tokens (`log_ratio`: mean).
    Azar et al. 2023, arXiv:2310.12036, equation 17.
    """

    # strength of the pull towards the reference: larger asks for a smaller margin, 1 / (2 beta) nats, and stays closer,
    # smaller moves further (useful range 0.01 to 1)
    beta: float = 0.1
    # sum: log p of a whole completion, as in the paper; mean: per token, as in TRL, so that the margin asked for is one
    # of nats per token and the same beta moves long completions much further
    log_ratio: Literal["sum", "mean"] = "sum"

    facts: ClassVar[Facts] = Facts(
        name="ipo",
        title="Identity preference optimisation",
        data="pairs",
        source="arXiv:2310.12036 eq. 17",
        learning_rate=1e-6,
        reference=True,
        healthy="Before the first update the loss is 1 / (4 beta^2), 25 for beta 0.1, and every reward is 0. "
        "`rewards/margins`, which is beta times the difference of log-ratios, rises towards 0.5 and settles below it, "
        "the more so the less the labels agree. `loss` falls to a level above 0: pairs scatter around the margin. "
        "`logps/chosen` often falls, more slowly than `logps/rejected`.",
        failures="`rewards/margins` far above 0.5: pairs that look alike drag each other past the margin, or the "
        "learning rate is too high; lower `learning_rate`. "
        "`loss` hardly falls: the margin 1 / (2 beta) is out of reach in so few updates; a larger `beta`, or more "
        "updates. "
        "`grad_norm` in the hundreds at a small `beta`: the gradient grows with the distance to the margin; clipping "
        "(`max_grad_norm`) then decides the step, so set `learning_rate` with that in mind. "
        "Samples fall apart with `log_ratio` mean: a margin of nats per token is large; a `beta` of 0.5 or more.",
    )

    def __post_init__(self) -> None:
        check_ranges(self, above_zero=("beta",))

    def count(self, batch: Batch) -> Tensor:
        return torch.tensor(batch.num_prompts, device=batch.group.device)

    def targets(self, batch: Batch, models: Models) -> Reference:
        return Reference(self.total(batch, models.reference(batch)))

    def loss(self, batch: Batch, out: Outputs, targets: Reference) -> tuple[Tensor, dict[str, Tensor]]:
        chosen, rejected = batch.pairs(self.total(batch, out.logp) - targets.logp)  # [G], [G]
        loss = (chosen - rejected - 1 / (2 * self.beta)).square()  # [G]
        return loss.sum(), pair_metrics(batch, out.logp, self.beta * chosen, self.beta * rejected)

    def total(self, batch: Batch, logp: Tensor) -> Tensor:
        """Log-prob of each completion as the log-ratio reads it: [K] -> [N] nats."""
        return batch.mean_tokens(logp) if self.log_ratio == "mean" else batch.sum_tokens(logp)

    def at_start(self) -> dict[str, float]:
        zero = {"rewards/chosen": 0.0, "rewards/rejected": 0.0, "rewards/margins": 0.0}
        return {"loss": 1 / (4 * self.beta**2), **zero}
