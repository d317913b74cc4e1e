"""How far the policy has moved from the reference, on its own samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prefopt.evaluate.scoring import TOKENS_PER_BATCH, Scorer, score
from prefopt.evaluate.statistics import standard_error
from prefopt.records import Example


@dataclass(frozen=True)
class KL:
    """value: nats per completion; standard_error: of value, over prompts; per_token: nats; n: prompts.

    None where `why` says so.
    """

    value: float | None
    standard_error: float | None
    per_token: float | None
    n: int
    why: str = ""


def sequence_kl(
    policy: Scorer, reference: Scorer, samples: Sequence[Example], tokens_per_batch: int = TOKENS_PER_BATCH
) -> KL:
    """KL(policy || reference) of completions: the mean of log p_policy - log p_reference over samples OF THE POLICY.

    samples: prompts with completions drawn from the policy at temperature 1 and top_p 1; with any other samples this is
    no KL. A completion cut at a limit counts up to the cut. Prompts weigh the same and are what is independent.
    Unbiased, and may come out below 0 when the KL is near 0 (the estimator called k1).
    """
    if not samples:
        return KL(None, None, None, 0, "there are no samples")
    ours, theirs = (score(model, samples, tokens_per_batch) for model in (policy, reference))
    ratio = (ours.logp - theirs.logp).numpy()  # [N]
    if not np.isfinite(ratio).all():
        why = f"{int((~np.isfinite(ratio)).sum())} of {len(ratio)} samples have no finite log-ratio"
        return KL(None, None, None, len(samples), why)
    sizes = [len(example.completions) for example in samples]
    per_prompt = [float(part.mean()) for part in np.split(ratio, np.cumsum(sizes)[:-1])]
    why = "" if len(samples) > 1 else "one prompt has no standard error"
    per_token = float(ratio.sum()) / max(1, int(ours.tokens.sum()))
    return KL(float(np.mean(per_prompt)), standard_error(per_prompt), per_token, len(samples), why)
