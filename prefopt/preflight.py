"""Step-0 identities: facts that hold exactly before the first update, and break when a run is set up wrongly.

Before training the policy is the reference. So a DPO loss is ln 2 and its margins are 0, two passes agree, the
packed tree gives the padded layout's log-probs, and the cached reference is the live model. A few forward passes on
a few rows check it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prefopt import ranks
from prefopt.batch import Batch, Outputs
from prefopt.models.policy import per_token
from prefopt.optimizer import broken

SAMPLE_TOKENS = 2048


class PreflightError(RuntimeError):
    """A run that would have trained on a broken set-up. The message says which identity fails, by how much, and why."""


def sample(batch: Batch, least: int = 1) -> Batch:
    """The first prompts of a batch, a few thousand tokens at most, but no fewer than `least` prompts."""
    total, stop = 0, 0
    for cost in batch.tokens_per_prompt()[: max(4, least)]:
        total, stop = total + cost, stop + 1
        if total > SAMPLE_TOKENS and stop >= least:
            break
    return batch.take(0, stop)


def check_policy(policy: Any, batch: Batch) -> list[str]:
    """The policy's own identities on a few rows: two passes agree, packed equals padded; a line for each that held.

    policy: has `score(batch, layout) -> Outputs`, `layout`, `model` and `scorer`. PreflightError on the first that
    fails.
    """
    with torch.no_grad():
        first, again = per_token(policy(batch)), per_token(policy(batch))
        what, unit = ("scores are not finite", "") if policy.scorer else ("log-probs are not finite", " nats")
        if not torch.isfinite(first).all():
            raise PreflightError(f"the model's {what}; try dtype: float32 or check its weights")
        if names := broken(policy.model.named_parameters()):
            raise PreflightError(f"the model's weights are not finite, though these rows do not meet them: {names[0]}")
        slack, gap = rounding(first, policy.model), _gap(first, again)
        if not gap <= slack:
            raise PreflightError(
                f"two passes over the same rows differ by {gap:.1e}{unit} a token: the model is random; "
                "switch dropout and other noise off in its config"
            )
        passed = [f"two passes agree to {gap:.0e}{unit} a token"]
        if policy.layout != "padded":
            gap = _gap(first, per_token(policy.score(batch, "padded")))
            if not gap <= slack:
                raise PreflightError(
                    f"the packed layout differs from the padded one by {gap:.1e}{unit} a token on this data; "
                    "use layout: padded, and report the model"
                )
            passed.append(f"packed equals padded to {gap:.0e}{unit} a token")
    return passed


def check_start(objective: Any, policy: Any, reference: Callable[[Batch], Tensor] | None, batch: Batch) -> list[str]:
    """What holds while the policy is the reference: equal log-probs, and the objective's `at_start` values.

    The values are checked with the policy's own log-probs as the reference's, where they hold exactly in any precision.
    reference: None where the objective reads none. PreflightError on the first that fails.
    """
    passed = []
    with torch.no_grad():
        if reference is not None:
            out = policy(batch)
            gap = _gap(out.logp, reference(batch).to(out.logp.device))
            if not gap <= rounding(out.logp, policy.model):
                raise PreflightError(
                    f"reference and policy differ by {gap:.1e} nats a token before any training: the reference is not "
                    "the model this run starts from (another adapter, stale cache, or other weights); set "
                    "reference_model if that is meant, or delete the cache folder named in the log"
                )
            passed.append(f"reference equals policy to {gap:.0e} nats a token")
        itself = _Itself(policy)
        loss, seen = objective.loss(batch, itself.policy(batch), objective.targets(batch, itself))
        means = {name: float(x.mean()) for name, x in seen.items() if len(x)}  # of a class that has a row here
        values = {"loss": float(loss / objective.count(batch)), **means}
    start = {name: expected for name, expected in objective.at_start().items() if name in values}
    for name, expected in start.items():
        if not abs(values[name] - expected) <= 1e-5 * max(1.0, abs(expected)):
            raise PreflightError(
                f"{name} is {values[name]:.6f} before the first update and must be {expected:.6f}; "
                "the objective or the pairing of completions is broken"
            )
    said = ", ".join(f"{name} {values[name]:.6f}" for name in start)
    return [*passed, f"before the first update: {said}"] if said else passed


def check_sampler(policy: Any, batch: Batch, truncated: bool, local: bool) -> list[str]:
    """That completions come from the distribution which training scores: the sampler's log-probs are the policy's.

    truncated: some tokens cannot be drawn (top_k, top_p, min_p), so that the two differ by design. local: the sampler
    uses these very weights, so that a gap beyond rounding is a fault. PreflightError for such a fault.
    """
    if batch.rollout_logp is None:
        return ["the sampler gives no log-probs: whether it draws from the policy was not checked"]
    with torch.no_grad():
        logp = policy(batch).logp
    gap, slack = _gap(logp, batch.rollout_logp.to(logp.device)), _sampler_slack(logp, policy.model)
    if truncated:
        why = "top_k, top_p or min_p leave some tokens out"
    elif gap <= slack:
        return [f"sampler equals policy to {gap:.0e} nats a token"]
    elif local:
        raise PreflightError(
            f"the sampler's log-probs differ from the policy's by {gap:.1e} nats a token: completions come from "
            "another distribution than the one that is trained; try dtype: float32, and report the model"
        )
    else:
        why = "another engine, or other weights"
    todo = "correction=token or correction=sequence weighs completions by the difference"
    return [f"the sampler's log-probs differ from the policy's by {gap:.1e} nats a token ({why}); {todo}"]


def _sampler_slack(logp: Tensor, model: Any) -> float:
    """Nats a token by which a sampler, which writes a token at a time, may differ from a pass over all.

    In 16 bits at most once the rounding was measured, and a temperature of 0.8 instead of 1 is 8 times it.
    """
    return (16 if _precision(model) < 1e-4 else 3) * rounding(logp, model)


def _gap(a: Tensor, b: Tensor) -> float:
    """Mean absolute difference, nats a token: a real fault moves many tokens, rounding may move one far."""
    return (a - b).abs().mean().item()


class _Itself:
    """Models for `objective.targets` while the policy is its own reference.

    One prompt at a time, so that rounding does not depend on what else is in a pass: objectives that score a batch in
    several passes find the same log-probs in each.
    """

    def __init__(self, policy: Callable[[Batch], Outputs]) -> None:
        self.score = policy

    def policy(self, batch: Batch) -> Outputs:
        num = batch.num_prompts
        places = [min(place, num - 1) for place in range(ranks.all_max(num))]  # as many passes as other processes
        outs = [self.score(batch.take(g, g + 1)) for g in places][:num]
        columns: list[Any] = [None if x[0] is None else torch.cat(x) for x in zip(*outs, strict=True)]
        return Outputs(*columns)

    def reference(self, batch: Batch) -> Tensor:
        return self.policy(batch).logp


def rounding(logp: Tensor, model: Any) -> float:
    """Mean nats a token by which two correct computations may differ, from the weights' coarsest precision."""
    eps = _precision(model)
    return (64 if eps < 1e-4 else 2) * eps * max(logp.abs().mean().item(), 1.0)


def _precision(model: Any) -> float:
    """Relative rounding of the coarsest weights."""
    return max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point())
