"""Step-0 identities: facts that hold exactly before the first update, and break when a run is set up wrongly.

Before training the policy is the reference. So a DPO loss is ln 2 and its margins are 0, two passes agree, the
packed tree gives the padded layout's log-probs, and the cached reference is the live model. A few forward passes on
a few rows check it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prefopt.batch import Batch, Outputs

SAMPLE_TOKENS = 2048


class PreflightError(RuntimeError):
    """A run that would have trained on a broken set-up. The message says which identity fails, by how much, and why."""


def sample(batch: Batch) -> Batch:
    """The first prompts of a batch, a few thousand tokens at most (one prompt at least)."""
    total, stop = 0, 0
    for cost in batch.tokens_per_prompt()[:4]:
        total, stop = total + cost, stop + 1
        if total > SAMPLE_TOKENS:
            break
    return batch.take(0, stop)


def check(
    objective: Any,
    policy: Any,
    reference: Callable[[Batch], Tensor] | None,
    batch: Batch,
    *,
    same_model: bool = True,
) -> list[str]:
    """Run the identities on `batch` and return a line for each that held.

    policy: has `score(batch, layout) -> Outputs` and `layout`. same_model: the reference is the policy before training,
    so that the objective's `at_start` values must hold. PreflightError on the first that does not.
    """
    passed = []
    with torch.no_grad():
        first = policy(batch)
        again = policy(batch)
        slack = rounding(first.logp, policy)
        _require_finite(first)
        gap = (first.logp - again.logp).abs().max().item()
        if not gap <= slack:
            raise PreflightError(
                f"two passes over the same rows differ by {gap:.1e} nats: the model is random; "
                "switch dropout and other noise off in its config"
            )
        passed.append(f"two passes agree to {gap:.0e} nats")
        if policy.layout != "padded":
            gap = (policy.score(batch, "padded").logp - first.logp).abs().max().item()
            if not gap <= slack:
                raise PreflightError(
                    f"the packed layout differs from the padded one by {gap:.1e} nats on this data; "
                    "use layout: padded, and report the model"
                )
            passed.append(f"packed equals padded to {gap:.0e} nats")
        if reference is not None and same_model:
            passed += _against_reference(objective, first, reference, batch, slack)
    return passed


def _require_finite(out: Outputs) -> None:
    if not torch.isfinite(out.logp).all():
        raise PreflightError("the model gives log-probs that are not finite; try dtype: float32 or check its weights")


def _against_reference(
    objective: Any, out: Outputs, reference: Callable[[Batch], Tensor], batch: Batch, slack: float
) -> list[str]:
    gap = (reference(batch).to(out.logp.device) - out.logp).abs().max().item()
    if not gap <= slack:
        raise PreflightError(
            f"reference and policy differ by {gap:.1e} nats before any training: the reference is not the model this "
            "run starts from (another adapter, stale cache, or other weights); set reference_model if that is meant, "
            "or delete the cache folder named in the log"
        )
    loss, seen = objective.loss(batch, out, objective.targets(batch, _Frozen(reference)))
    values = {"loss": float(loss / objective.count(batch)), **{name: float(x.mean()) for name, x in seen.items()}}
    # a sum over a completion's tokens adds up their rounding
    room = slack * math.sqrt(int(batch.completions.lengths.max())) * 4
    for name, expected in objective.at_start().items():
        if not abs(values[name] - expected) <= room:
            raise PreflightError(
                f"{name} is {values[name]:.6f} before the first update and must be {expected:.6f}; "
                "the objective or the pairing of completions is broken"
            )
    said = ", ".join(f"{name} {values[name]:.6f}" for name in objective.at_start())
    return [f"reference equals policy to {gap:.0e} nats", f"before the first update: {said}"]


class _Frozen:
    """Models for `objective.targets` while the policy is its own reference."""

    def __init__(self, reference: Callable[[Batch], Tensor]) -> None:
        self.reference = reference


def rounding(logp: Tensor, policy: Any) -> float:
    """Nats by which two correct computations of a log-prob may differ, from the weights' precision and the values'
    size.
    """
    eps = torch.finfo(next(policy.model.parameters()).dtype).eps
    largest = max(logp.abs().max().item(), 1.0)
    return (64 if eps < 1e-4 else 8) * eps * largest
