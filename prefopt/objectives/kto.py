"""Kahneman-Tversky optimisation: single answers marked good or bad, valued by gain or loss against a drifting zero."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from prefopt import ranks
from prefopt.batch import Batch, Outputs
from prefopt.objectives.facts import Facts, Models, check_ranges
from prefopt.objectives.labelled import both_classes, desirable, label_metrics, sign
from prefopt.objectives.update import policy_logp
from prefopt.records import Example, InputError

log = logging.getLogger("prefopt")

BALANCE = (1.0, 4 / 3)  # of the good answers' weight in the sum to the bad ones'


class Zero(NamedTuple):
    """Constants of an update. logp [N]: each completion's reference log-prob, nats, summed over its trained tokens.

    drift []: the log-ratio that counts as neither gain nor loss, nats, at least 0; NaN where an update has one prompt
    only, which leaves nothing to measure it on.
    """

    logp: Tensor
    drift: Tensor


@dataclass(frozen=True)
class KTO:
    """w (1 - s(beta (h - z))) for a good completion, w (1 - s(beta (z - h))) for a bad one: gain or loss against z.

        h     =  log p(y | x) - log p_reference(y | x)     log p summed over the trained tokens of y
        z     =  max(0, mean of h over prompts with a completion written for another prompt), a constant
        w     =  desirable_weight or undesirable_weight
        s(u)  =  1 / (1 + exp(-u)); the loss is the mean over completions

    z estimates the distance KL(p || p_reference). It is measured once per update, over all forward passes and
    processes: every prompt of the update gets the completion of another one, in an order drawn from the texts
    themselves, never its own prompt's. A completion is cut where the new pairing would be longer than the longest row.
    Ethayarajh et al. 2024, arXiv:2402.01306.
    """

    # strength of the pull towards the reference: larger stays closer, smaller moves further (useful range 0.01 to 0.5)
    beta: float = 0.1
    # weight of a good completion: larger learns more from what to do, smaller more from what to avoid. None: from the
    # numbers of good and bad rows, so that the two classes weigh 1 to 4/3 against each other
    desirable_weight: float | None = None
    # weight of a bad completion: larger learns more from what to avoid, smaller more from what to do. None: as above
    undesirable_weight: float | None = None

    facts: ClassVar[Facts] = Facts(
        name="kto",
        title="Kahneman-Tversky optimisation",
        data="labels",
        source="arXiv:2402.01306",
        learning_rate=5e-6,
        reference=True,
        live=True,
        forwards=1,
        least=2,
        healthy="Before the first update `loss` is 0.5 (with both weights 1) and `kl` and every reward are 0. "
        "`rewards/chosen` rises above beta x `kl` and `rewards/rejected` falls below it; either alone is common too. "
        "`kl` rises from 0 and flattens. `eval/loss` stays below its start.",
        failures="`kl` grows without end and samples get worse: the policy leaves the reference; a larger `beta` or a "
        "lower `learning_rate`. "
        "`kl` jumps from update to update: it is an average over the update's rows; a larger `batch_size`, 16 or more. "
        "`rewards/chosen` and `rewards/rejected` rise together: one class outweighs the other; leave "
        "`desirable_weight` and `undesirable_weight` out, so that the numbers of rows decide. "
        "`loss` stays at its start: gains and losses far from `kl` have no gradient, or the rate is that of DPO; a "
        "higher `learning_rate`. "
        "Answers that are good for some people are lost: contradictory labels are settled for the majority; "
        "`dpo` keeps a share of both.",
    )

    def __post_init__(self) -> None:
        check_ranges(self, above_zero=("beta", "desirable_weight", "undesirable_weight"))

    @property
    def weights(self) -> tuple[float, float]:
        """Of a good and a bad completion; 1 where the rows have not been counted."""
        good, bad = self.desirable_weight, self.undesirable_weight
        return (1.0 if good is None else good, 1.0 if bad is None else bad)

    def settled(self, examples: Sequence[Example]) -> KTO:
        """The objective with its weights, from the numbers of good and bad rows.

        InputError where the rows are of one class or of one prompt.
        """
        good, bad = both_classes(self.facts.name, examples)
        if len({tuple(example.prompt) for example in examples}) < 2:
            raise InputError("kto measures its drift on answers to other prompts, and all rows have one; use bco")
        if self.desirable_weight is not None and self.undesirable_weight is not None:
            _warn_of_imbalance(self.desirable_weight * good / (self.undesirable_weight * bad))
            return self
        desirable_weight, undesirable_weight = balanced(self.desirable_weight, self.undesirable_weight, good / bad)
        return replace(self, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)

    def count(self, batch: Batch) -> Tensor:
        return torch.tensor(batch.num_completions, device=batch.group.device)

    def targets(self, batch: Batch, models: Models) -> Zero:
        return Zero(batch.sum_tokens(models.reference(batch)), drift(batch, models))

    def loss(self, batch: Batch, out: Outputs, targets: Zero) -> tuple[Tensor, dict[str, Tensor]]:
        good, logp, zero = desirable(batch), batch.sum_tokens(out.logp), targets.drift.nan_to_num(0.0)  # [N], [N], []
        rewards = self.beta * (logp - targets.logp)  # [N]
        weight = rewards.new_tensor(self.weights)[(~good).long()]  # [N]
        loss = weight * torch.sigmoid(sign(good, rewards) * (self.beta * zero - rewards))  # [N]
        measured = targets.drift.expand(len(good))
        return loss.sum(), {
            **label_metrics(good, logp, rewards, self.beta * zero),
            "kl": measured[~measured.isnan()],
        }

    def at_start(self) -> dict[str, float]:
        start = {"kl": 0.0, "rewards/chosen": 0.0, "rewards/rejected": 0.0}
        return {"loss": 0.5, **start} if self.weights == (1.0, 1.0) else start


def balanced(good: float | None, bad: float | None, ratio: float) -> tuple[float, float]:
    """Weights of good and bad rows, of which at least one is None: those with the ratio of the classes' totals in
    `BALANCE`, one of them changed as little as possible from 1.

    ratio: good rows to bad rows.
    Ethayarajh et al. 2024, arXiv:2402.01306; the bounds are those that TRL's KTOTrainer checks.
    """
    low, high = BALANCE
    known = ratio * (good or 1.0) / (bad or 1.0)
    if bad is not None or (good is None and known < low):  # only the good rows' weight is free, or the one to raise
        return min(max(1.0, low / known), high / known), bad or 1.0
    return good or 1.0, max(min(1.0, known / low), known / high)


def _warn_of_imbalance(ratio: float) -> None:
    low, high = BALANCE
    if not 0.99 * low <= ratio <= 1.01 * high:
        log.warning(
            "kto: good rows weigh %.2f times what bad rows do, counting their numbers; %.0f to %.2f is advised: leave "
            "desirable_weight or undesirable_weight out, and it follows from the rows",
            ratio,
            low,
            high,
        )


# ---------------------------------------------------------------- the drift

# prompt, completion, which of its tokens are trained
Row = tuple[tuple[int, ...], tuple[int, ...], tuple[bool, ...]]


def drift(batch: Batch, models: Models) -> Tensor:
    """Mean log-ratio of policy to reference on mismatched prompts and completions of an update, at least 0: [] nats.

    Over all processes, each of which scores its share. NaN if all rows of the update have the same prompt.
    """
    pairs = mismatched(row for share in ranks.gather(_rows(batch)) for row in share)
    if not pairs:
        log.warning("kto: all rows of this update have the same prompt, so its drift is taken to be 0")
        return torch.tensor(torch.nan, device=batch.trained.device)
    share = pairs[ranks.rank() :: ranks.world()]
    part = Batch.of(share or pairs[:1]).to(batch.trained.device)  # none of its own: as many passes as the others
    ratio = part.sum_tokens(policy_logp(part, models) - models.reference(part))  # [pairs of this process]
    total = ranks.all_sum(ratio.double().sum() * bool(share))
    return (total / len(pairs)).clamp(min=0).to(ratio.dtype)


def mismatched(rows: Iterable[Row]) -> list[Example]:
    """The prompt of each row with a completion written for another prompt; none if there is one prompt only.

    The rows are put in an order that their own content decides, each once, and each prompt gets the next completion of
    another prompt: neither the order of the data, nor rows that are there twice, nor the number of processes changes a
    pair, and rows that are sorted by prompt, topic or label do not meet their neighbours.
    """
    ring = sorted(set(rows), key=_name)
    if len({prompt for prompt, _, _ in ring}) < 2:
        return []
    longest = max(len(prompt) + len(completion) for prompt, completion, _ in ring)
    pairs = []
    for place, (prompt, _, _) in enumerate(ring):
        others = (ring[(place + step) % len(ring)] for step in range(1, len(ring)))
        _, completion, trained = next(row for row in others if row[0] != prompt)
        room = longest - len(prompt)  # no pair is longer than rows that are known to fit the model's context
        pairs.append(Example(list(prompt), [list(completion[:room])], [0.0], [list(trained[:room])]))
    return pairs


def _rows(batch: Batch) -> list[Row]:
    if batch.filler:
        return []
    prompts, lengths = batch.prompts.rows(), batch.completions.lengths.tolist()
    parts = zip(batch.group.tolist(), batch.completions.rows(), batch.trained.split(lengths), strict=True)
    return [(tuple(prompts[g].tolist()), tuple(own.tolist()), tuple(flags.tolist())) for g, own, flags in parts]


def _name(row: Row) -> bytes:
    return hashlib.blake2b(repr(row).encode(), digest_size=16).digest()
