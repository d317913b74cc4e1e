"""What a loss needs of a whole update, over all processes: log-probs without gradient, and every prompt's numbers.

Letters: G prompts of this process, E prompts of all processes, K completion tokens, C numbers of a prompt.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prefopt import ranks
from prefopt.batch import Batch, Outputs
from prefopt.budget import Budget
from prefopt.objectives.facts import Models

PASS_TOKENS = 2048  # in one forward pass, where nobody says how many


def policy_logp(batch: Batch, models: Models) -> Tensor:
    """Log-probs of the completion tokens under the policy as it is now, without gradient, [K] nats."""
    return policy_outputs(batch, models).logp


def policy_outputs(batch: Batch, models: Models) -> Outputs:
    """What the policy says of a batch as it is now, without gradient: log-probs, and values where it has a critic.

    In passes of the run's token budget, which halves itself when memory runs out.
    """
    budget: Budget = getattr(models, "budget", None) or Budget(PASS_TOKENS, together=True)

    def passes(tokens: int) -> Outputs:
        with torch.no_grad():
            scored = [(models.policy(part), counts) for part, _, counts in budget.passes(batch, (), tokens)]
        outs = [out for out, counts in scored if counts]
        values = [out.value for out in outs if out.value is not None]
        return Outputs(torch.cat([out.logp for out in outs]), value=torch.cat(values) if values else None)

    return budget.run(passes, smallest=budget.smallest(batch))


class Everyone(NamedTuple):
    """values [E, C] of all processes, by rank; own: which of them are this process's."""

    values: Tensor
    own: slice


def everyone(batch: Batch, values: Tensor) -> Everyone:
    """The numbers [G, C] of each prompt, from all processes, each prompt of the update once.

    An update with fewer prompts than processes gives the others its first prompt again: such a filler is left out, and
    its process told that the first prompt is its own.
    """
    shares = ranks.gather((batch.filler, values.detach().cpu()))
    real = [share for filler, share in shares if not filler]
    before = 0 if batch.filler else sum(len(share) for filler, share in shares[: ranks.rank()] if not filler)
    return Everyone(torch.cat(real).to(values.device), slice(before, before + len(values)))
