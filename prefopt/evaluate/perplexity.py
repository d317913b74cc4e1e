"""How well a policy predicts held-out text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from prefopt.evaluate.scoring import TOKENS_PER_BATCH, Scorer, score
from prefopt.records import Example


@dataclass(frozen=True)
class Perplexity:
    """value = exp(nll); nll: mean -log p per trained token, nats; num_tokens: how many. None where `why` says so."""

    value: float | None
    nll: float | None
    num_tokens: int
    why: str = ""


def perplexity(policy: Scorer, examples: Sequence[Example], tokens_per_batch: int = TOKENS_PER_BATCH) -> Perplexity:
    """Over all trained tokens of all completions of the examples, each token with the same weight.

    With pairs, give the examples the chosen completions only: a policy is meant to find rejected ones unlikely.
    """
    scored = score(policy, examples, tokens_per_batch)
    tokens = int(scored.tokens.sum())
    if not tokens:
        return Perplexity(None, None, 0, "there is no trained token to predict")
    nll = -float(scored.logp.sum()) / tokens
    if not math.isfinite(nll) or nll > 700:  # exp(710) is more than a float holds
        return Perplexity(None, nll if math.isfinite(nll) else None, tokens, f"nll is {nll} nats per token")
    return Perplexity(math.exp(nll), nll, tokens)
