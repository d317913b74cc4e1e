"""Direct preference optimisation: a classifier on pairs whose logit is the policy's own log-ratio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prefopt.batch import Batch, Outputs
from prefopt.objectives import pairwise
from prefopt.objectives.divergences import DIVERGENCES
from prefopt.objectives.facts import Facts, Models, check_ranges
from prefopt.objectives.pairwise import LOSSES, Reference, Settings, pair_metrics
from prefopt.objectives.update import everyone, policy_logp


@dataclass(frozen=True)
class DPO:
    """-log s(r(chosen) - r(rejected)): a classifier of pairs whose logit is a difference of the policy's own rewards.

        r(y)  =  beta * (log p(y | x) - log p_reference(y | x))      log p summed over the trained tokens of y
        loss  =  -log s(r(chosen) - r(rejected))                     s(z) = 1 / (1 + exp(-z)), mean over pairs

    Its optimum, on pairs that follow the Bradley-Terry model of a reward R, is p_reference * exp(R / beta), normalised.
    Options change the loss of the two rewards (`loss_type`), the rewards themselves (`log_ratio`, `f_divergence`,
    `tail_weight`, `length_penalty`, `drop_penalty`), the weight of a pair (`weighting`), or add a term (`sft_weight`).
    Rafailov et al. 2023, arXiv:2305.18290, equation 7.
    """

    # strength of the pull towards the reference: larger stays closer, smaller moves further (useful range 0.01 to 0.5;
    # with log_ratio: mean, whose rewards are per token, 2 to 10)
    beta: float = 0.1
    # what is made of the two rewards. sigmoid: -log s of the difference; robust: unbiased under a share of flipped
    # labels (rDPO); hinge: none beyond a margin of 1 (SLiC); exo: reverse KL; discopop: a discovered blend; nca,
    # apo_zero, bco: each reward by itself, chosen up and rejected down; apo_down: both down, rejected more; sppo:
    # log-ratios regressed on +-1 / (2 beta). Several are summed by weight (MPO), as in loss_type.sigmoid=0.8
    # loss_type.bco=0.2: a larger weight counts that loss more, a smaller one less. bco takes one more pass over each
    # update, without gradient, for the middle of its rewards
    loss_type: (
        Literal["sigmoid", "robust", "hinge", "exo", "nca", "apo_zero", "apo_down", "sppo", "bco", "discopop"]
        | dict[str, float]
    ) = "sigmoid"
    # share of pairs taken to be labelled the wrong way round, 0 to 0.5, read by sigmoid (cDPO: stops at
    # beta * difference = logit(1 - share)), robust and exo (0: 0.001); larger trusts labels less, smaller more
    label_smoothing: float = 0.0
    # sum: log p of a whole completion; mean: per token, so that long completions weigh no more (Tulu 3)
    log_ratio: Literal["sum", "mean"] = "sum"
    # distance from the reference that the optimum trades against reward: reverse_kl is DPO's, forward_kl covers all the
    # reference does, js and alpha lie between
    f_divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    # of f_divergence: alpha, between 0 and 1: smaller is closer to reverse_kl, larger to forward_kl
    f_alpha: float = 0.5
    # reward of each token of length that a pair's difference is credited with (R-DPO): larger makes the policy shorter,
    # 0 leaves length alone (useful range 0.01 to 0.05)
    length_penalty: float = 0.0
    # weight of the tokens beyond the shorter completion's length (LD-DPO): 1 counts them as the others, smaller makes
    # length matter less, 0 leaves them out
    tail_weight: float = 1.0
    # weight of the chosen completion's fall below the reference (DPOP's lambda; its paper has 5 to 500): larger forbids
    # the fall, 0 allows it
    drop_penalty: float = 0.0
    # none: pairs weigh the same; wpo: by how likely the policy itself is to write both completions, which makes
    # off-policy pairs count less
    weighting: Literal["none", "wpo"] = "none"
    # weight of the negative log-likelihood of the chosen completion, mean over its tokens (RPO, IRPO: 1): larger keeps
    # the chosen likely, 0 adds nothing
    sft_weight: float = 0.0

    facts: ClassVar[Facts] = Facts(
        name="dpo",
        title="Direct preference optimisation",
        data="pairs",
        source="arXiv:2305.18290 eq. 7",
        learning_rate=1e-6,
        reference=True,
        healthy="Before the first update the loss is ln 2 = 0.6931 and every reward is 0; a run where they are not is "
        "stopped. `rewards/margins` rises from 0, and `eval/loss` stays below its start and falls. "
        "`eval/rewards/accuracies` settles at 0.6 to 0.8 on human preferences; it is near 1 only where the answers are "
        "easy to tell apart. `logps/chosen` often falls, more slowly than `logps/rejected`: "
        "`prefopt explain logps/chosen` says when that is fine.",
        failures="`eval/loss` turns up while `loss` still falls: the run memorises its pairs; stop at the turn "
        "(`keep=best` with `eval_every`), take fewer epochs or a larger `beta`. "
        "`logps/chosen` and `logps/rejected` fall fast and samples get worse: the policy has left the reference; a "
        "larger `beta`, a lower `learning_rate` or fewer epochs. "
        "`loss` near 0 and `rewards/accuracies` near 1 within a few hundred updates: the two answers can be told apart "
        "by their surface (a phrase, the length, who wrote them), so little else is learned; look at the pairs, and "
        "prefer pairs sampled from the model that is trained. "
        "`loss` stays at 0.69: the learning rate is too low, or the labels are near chance; raise `learning_rate`, or "
        "keep only pairs whose difference is clear. "
        "Answers grow longer: the chosen answers are longer, and the loss cannot tell length from quality; balance the "
        "lengths in the data. "
        "Samples are not in the form of the data from the start: the model was never taught it; run `sft` on the "
        "chosen answers first.",
    )

    def __post_init__(self) -> None:
        _refuse_ranges(self)
        _refuse_losses(self)
        _refuse_combinations(self)

    @property
    def terms(self) -> dict[str, float]:
        """Each loss and its weight in the sum."""
        return self.loss_type if isinstance(self.loss_type, dict) else {self.loss_type: 1.0}

    @property
    def extras(self) -> tuple[str, ...]:
        """The optional `Outputs` that are read."""
        return ("collision",) if self.weighting == "wpo" else ()

    def count(self, batch: Batch) -> Tensor:
        return torch.tensor(batch.num_prompts, device=batch.group.device)

    def targets(self, batch: Batch, models: Models) -> Reference:
        reference = self.total(batch, models.reference(batch))
        if "bco" not in self.terms:
            return Reference(reference)
        rewards = self.beta * (self.total(batch, policy_logp(batch, models)) - reference)  # [N]
        return Reference(reference, everyone(batch, torch.stack(batch.pairs(rewards), 1)).values.mean())

    def loss(self, batch: Batch, out: Outputs, targets: Reference) -> tuple[Tensor, dict[str, Tensor]]:
        log_ratio = self.total(batch, out.logp) - targets.logp  # [N]
        rewards = self.beta * DIVERGENCES[self.f_divergence](log_ratio, self.f_alpha)  # [N]
        chosen, rejected = batch.pairs(rewards)  # [G], [G]
        loss = self.compare(*self.penalised(batch, chosen, rejected), targets.drift)  # [G]
        if self.weighting == "wpo":
            loss = loss * pairwise.likelihood(batch, out)
        seen = pair_metrics(batch, out.logp, chosen, rejected)
        if self.sft_weight:
            nll, _ = batch.pairs(-batch.mean_tokens(out.logp))  # [G]
            loss, seen = loss + self.sft_weight * nll, {**seen, "nll": nll}
        return loss.sum(), seen

    def total(self, batch: Batch, logp: Tensor) -> Tensor:
        """Log-prob of each completion as the rewards read it: [K] -> [N] nats."""
        if self.tail_weight != 1:
            logp = torch.where(pairwise.beyond_shorter(batch), self.tail_weight * logp, logp)
        return batch.mean_tokens(logp) if self.log_ratio == "mean" else batch.sum_tokens(logp)

    def penalised(self, batch: Batch, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
        """The two rewards [G], [G] with what the loss adds to them: a penalty on a fall, a credit for length.

        Pal et al. 2024 (DPOP), arXiv:2402.13228; Park et al. 2024 (R-DPO), arXiv:2403.19159.
        """
        if self.drop_penalty:
            chosen = chosen - self.drop_penalty * torch.relu(-chosen)
        if self.length_penalty:
            # plus: the sum of both is what the data prefer by, so the policy is left with that minus the length's part
            credit, rejected_credit = batch.pairs(self.length_penalty * pairwise.lengths(batch))
            chosen, rejected = chosen + credit, rejected + rejected_credit
        return chosen, rejected

    def compare(self, chosen: Tensor, rejected: Tensor, drift: Tensor | None) -> Tensor:
        """The weighted losses of the rewards, [G], [G] -> [G]; drift [] is the middle that bco measures from."""
        settings = Settings(self.beta, self.label_smoothing, drift)
        losses = [weight * LOSSES[name].function(chosen, rejected, settings) for name, weight in self.terms.items()]
        return torch.stack(losses).sum(0)

    def at_start(self) -> dict[str, float]:
        start = {"rewards/chosen": 0.0, "rewards/rejected": 0.0, "rewards/margins": 0.0}
        if self.length_penalty or self.sft_weight or self.weighting != "none":
            return start  # the loss depends on the rows and the model
        zero = torch.zeros(1, dtype=torch.float64)
        return {"loss": float(self.compare(zero, zero, None)), **start}


def _refuse_ranges(options: DPO) -> None:
    """ValueError on an option outside its range."""
    check_ranges(options, "length_penalty", "drop_penalty", "sft_weight", above_zero=("beta",))
    if not 0 <= options.label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be at least 0 and below 0.5, got {options.label_smoothing}")
    if not 0 < options.f_alpha <= 1:
        raise ValueError(f"f_alpha must be above 0 and at most 1, got {options.f_alpha}")
    if not 0 <= options.tail_weight <= 1:
        raise ValueError(f"tail_weight must be between 0 and 1, got {options.tail_weight}; 1 is DPO")


def _refuse_losses(options: DPO) -> None:
    """ValueError on a loss that there is not, a weight that is none, or a label_smoothing that no loss can use."""
    if not options.terms:
        raise ValueError("loss_type names no loss; give one, such as loss_type=sigmoid")
    for name, weight in options.terms.items():
        if name not in LOSSES:
            raise ValueError(f"loss_type: {name!r} is not one of {', '.join(LOSSES)}")
        if not 0 < weight < float("inf"):
            raise ValueError(f"loss_type: the weight of {name} must be above 0, got {weight}; leave it out instead")
    if "robust" in options.terms and not options.label_smoothing:
        raise ValueError("loss_type robust needs label_smoothing, the share of wrong labels; without it, use sigmoid")
    if options.label_smoothing and not any(LOSSES[name].smoothed for name in options.terms):
        readers = ", ".join(name for name, loss in LOSSES.items() if loss.smoothed)
        raise ValueError(f"label_smoothing is read by {readers} only; leave it out, or use one of them as loss_type")


def _refuse_combinations(options: DPO) -> None:
    """ValueError on options that contradict each other, or that nothing would read."""
    absolute = [name for name in options.terms if not LOSSES[name].of_margin]
    changed = [
        name
        for name, plain in (("f_divergence", "reverse_kl"), ("length_penalty", 0), ("drop_penalty", 0))
        if getattr(options, name) != plain
    ]
    if absolute and changed:
        raise ValueError(
            f"{changed[0]} is defined for a difference of rewards, and loss_type {absolute[0]} reads each reward by "
            "itself; leave one of the two out"
        )
    if options.f_alpha != 0.5 and options.f_divergence != "alpha":
        raise ValueError("f_alpha is read with f_divergence: alpha only; set that, or leave f_alpha out")
    if options.f_divergence != "reverse_kl" and (options.log_ratio == "mean" or options.tail_weight != 1):
        raise ValueError(
            "f_divergence needs log-ratios of whole completions; leave it out, or use log_ratio: sum, tail_weight: 1"
        )
    if options.log_ratio == "mean" and options.tail_weight != 1:
        raise ValueError("log_ratio: mean and tail_weight both correct for length; use one of them")
