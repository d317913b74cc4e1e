"""How often the policy, against the reference, prefers what is better."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prefopt.batch import Batch
from prefopt.evaluate.scoring import TOKENS_PER_BATCH, Scorer, score
from prefopt.evaluate.statistics import Estimate, wilson
from prefopt.records import Example


def preference_accuracy(
    policy: Scorer, reference: Scorer, pairs: Sequence[Example], tokens_per_batch: int = TOKENS_PER_BATCH
) -> Estimate:
    """Share of pairs whose better completion has the larger log p_policy - log p_reference, a tie counted half.

    That log-ratio, times beta, is the reward that DPO's policy stands for (Rafailov et al. 2023, arXiv:2305.18290,
    section 4), so this is its accuracy as a reward model. Wilson's interval. ValueError on a tied pair.
    """
    if not pairs:
        return Estimate(None, None, None, 0, "there are no pairs")
    ours, theirs = (score(model, pairs, tokens_per_batch) for model in (policy, reference))
    better, worse = Batch.of(pairs).pairs(ours.logp - theirs.logp)  # [G], [G]
    if not torch.isfinite(better - worse).all():
        return Estimate(None, None, None, len(pairs), "a pair has no finite log-ratio")
    right = (better > worse).double() + (better == worse).double() / 2
    return wilson(float(right.sum()), len(pairs))
