"""Reward model: a score per completion, so that the better of two scores more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.batch import Batch, Outputs, check
from prefopt.objectives.facts import Facts, Nothing, check_ranges


@dataclass(frozen=True)
class RewardModel:
    """-log s(r_better - r_worse - m), averaged over the comparisons of a prompt; r is one score of a whole completion.

        pairs:    loss = 1/P sum over pairs [ -log s(r_i - r_j - m_ij) + centering (r_i + r_j)^2 ]
        listwise: loss = sum over i [ -log( e^r_i / (e^r_i + sum over j below i of e^(r_j + m_ij)) ) ] + centring
          r_i = the score read at completion i's last token
          i, j = completions of one prompt, i labelled better than j; ties and unlabelled ones are not compared
          P = number of such pairs of the prompt
          m_ij = margin x (label of i - label of j)
          s = logistic function
    pairs is Bradley-Terry, listwise is Plackett-Luce: a ranking as choices of the best among what is left.
    With two completions the two are equal. The mean is over prompts, so a prompt with many answers counts once.
    Ouyang et al. 2022, arXiv:2203.02155, equation 1 (pairs); Zhu et al. 2023, arXiv:2301.11270 (listwise).
    """

    # all pairs of a prompt's completions, or their whole ranking at once; listwise is statistically more efficient
    # where labels are a true ranking, pairs forgives noise in the middle of it; equal for two completions
    comparison: Literal["pairs", "listwise"] = "pairs"
    # score by which one unit of label difference must be won: larger separates clear cases more and trusts the labels'
    # distances, 0 uses their order alone (useful range 0 to 1 for labels of 1 to 5)
    margin: float = 0.0
    # pull of a prompt's scores towards a mean of 0, which comparisons leave open: larger holds scores of different
    # prompts on one scale and shrinks them, 0 lets them drift (0.01 is the usual start)
    centering: float = 0.0

    facts: ClassVar[Facts] = Facts(
        name="reward",
        title="Reward model",
        data="ratings",
        source="arXiv:2203.02155 eq. 1",
        learning_rate=1e-5,
        head="completion",
        healthy="`loss` starts near ln 2 = 0.69 per pair, because a new head scores everything near 0, and falls. "
        "`eval/accuracy` rises from 0.5 to 0.6 to 0.8 on human preferences, which people themselves agree on about as "
        "often; above 0.95 means that the answers are easy to tell apart. `margin` rises slowly. `mean_reward` stays "
        "within a few units of 0, and exactly where is without meaning: only differences within a prompt are learnt.",
        failures="`eval/loss` turns up while `eval/accuracy` stays: the scores grow too sure of themselves; one epoch "
        "is usual, and a lower `learning_rate` or `keep=best` with `eval_metric=eval/accuracy` help. "
        "`accuracy` stays near 0.5: labels near chance, or the answers were cut before they differ; read a few rows, "
        "raise `max_length`. "
        "`accuracy` near 1 within a few hundred updates: a surface feature gives the label away (length, a phrase, who "
        "wrote the answer), and a policy trained on the scores will exploit it; balance the data. "
        "`mean_reward` drifts far from 0: nothing holds it; set `centering=0.01`. "
        "Scores differ from run to run on texts unlike the data: a reward model knows its own data only; train several "
        "seeds and compare them before a policy is trained against one.",
    )

    def __post_init__(self) -> None:
        if self.comparison not in ("pairs", "listwise"):
            raise ValueError(f"comparison must be pairs or listwise, got {self.comparison!r}")
        check_ranges(self, "margin", "centering")

    def count(self, batch: Batch) -> Tensor:
        return torch.tensor(batch.num_prompts, device=batch.group.device)

    def targets(self, batch: Batch, models: Any) -> Nothing:
        return Nothing()

    def loss(self, batch: Batch, out: Outputs, targets: Nothing) -> tuple[Tensor, dict[str, Tensor]]:
        reward = last(batch, out.value)  # [N]
        i, j = comparisons(batch)  # [P], [P]
        share = 1 / torch.bincount(batch.group[i])[batch.group[i]].to(reward.dtype)  # [P], 1 in all of a prompt
        gap = reward[i] - reward[j]  # [P]
        shortfall = self.margin * (batch.score[i] - batch.score[j]) - gap  # [P]
        if self.comparison == "pairs":
            loss = (share * F.softplus(shortfall)).sum()
        else:
            loss = F.softplus(log_sum(shortfall, i)).sum()
        if self.centering:
            loss = loss + self.centering * (share * (reward[i] + reward[j]) ** 2).sum()
        return loss, {
            "accuracy": (gap > 0).to(loss.dtype),
            "margin": gap,
            "chosen_reward": reward[i],
            "rejected_reward": reward[j],
            "mean_reward": reward,
        }

    def at_start(self) -> dict[str, float]:
        return {}


def last(batch: Batch, value: Tensor | None) -> Tensor:
    """The value at each completion's last token: [K] -> [N]. ValueError for a model without a score head."""
    if value is None:
        raise ValueError("the model has no score head, so there is no value to read")
    return check(value, len(batch.trained), "last")[batch.completions.lengths.cumsum(0) - 1]


def comparisons(batch: Batch) -> tuple[Tensor, Tensor]:
    """The better and the worse completion of every two of a prompt with different labels, [P] int64 each.

    Ordered by the better one. ValueError, naming the prompt, where none of a prompt's completions can be compared.
    """
    count = torch.bincount(batch.group, minlength=batch.num_prompts)  # [G]
    first = count.cumsum(0) - count  # [G]
    place = torch.arange(len(batch.group), device=batch.group.device) - first[batch.group]  # [N]
    label = batch.score.new_full((batch.num_prompts, int(count.max())), torch.nan)
    label[batch.group, place] = batch.score  # [G, largest]
    g, i, j = (label[:, :, None] > label[:, None, :]).nonzero(as_tuple=True)
    without = torch.bincount(g, minlength=batch.num_prompts) == 0  # [G]
    if without.any():
        number = int(without.nonzero()[0])
        raise ValueError(f"comparisons: prompt {number} has no two completions with different scores; drop it")
    return first[g] + i, first[g] + j


def log_sum(x: Tensor, key: Tensor) -> Tensor:
    """log of the sum of e^x over the entries of each key, [P], [P] non-decreasing -> [number of keys]."""
    _, size = key.unique_consecutive(return_counts=True)
    rows = torch.nn.utils.rnn.pad_sequence(list(x.split(size.tolist())), True, -torch.inf)
    return torch.logsumexp(rows, 1)
