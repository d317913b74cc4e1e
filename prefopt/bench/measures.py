"""How good a policy is, exactly: its reward, its distance from the reference, and the best that distance can buy.

Policies are tables of log-probs, [P, C] nats, float64: P prompts, all equally likely, and C completions. Rewards are
tables of the same shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from prefopt.bench.worlds import World

CHEAPEST = math.exp(-16)  # rewards per nat
CLOSE = 1e-4  # nats from the reference below which a gain is not compared with the best possible one


@dataclass(frozen=True)
class Point:
    """kl: KL(policy || reference) in nats; gold: expected reward; both are means over prompts."""

    kl: float
    gold: float


@dataclass(frozen=True)
class Measure:
    """What there is to know of a policy.

    kl: KL(policy || reference); forward_kl: KL(reference || policy); entropy; nats per completion. gold: expected true
    reward, in standard deviations of the reference's, whose own is 0. length: expected tokens. best: the highest gold
    of any policy at this kl. efficiency: gold / best, at most 1; None within 1e-4 nats of the reference. gap: best -
    gold, never negative.
    """

    kl: float
    gold: float
    entropy: float
    forward_kl: float
    length: float
    best: float
    gap: float
    efficiency: float | None


def expected(logp: Tensor, value: Tensor) -> float:
    """Mean over prompts of the expectation of value [P, C] or [C] under a policy [P, C].

    Where a probability is 0 the value may be infinite; it counts nothing.
    """
    p = logp.exp()
    return float((p * value).masked_fill(p == 0, 0.0).sum(1).mean())


def kl(logp: Tensor, other: Tensor) -> float:
    """KL(policy || other), mean over prompts: [P, C], [P, C] -> nats."""
    return expected(logp, logp - other)


def tilted(reference: Tensor, reward: Tensor, beta: float) -> Tensor:
    """The policy with the highest E[reward] - beta KL(policy || reference): reference x exp(reward / beta) / Z, [P, C].

    Rafailov et al. 2023, arXiv:2305.18290, equation 4.
    """
    return (reference + reward / beta).log_softmax(1)


def best_of(reference: Tensor, reward: Tensor, n: int) -> Tensor:
    """The policy that draws n completions from the reference and keeps the one with the highest reward, [P, C].

    P(y) = F(y)^n - F(y-)^n, F the reference's probability of a reward up to y's; equal rewards share by probability.
    """
    logp = torch.empty_like(reference)
    for p, (own, value) in enumerate(zip(reference, reward, strict=True)):
        values, level = value.unique(return_inverse=True)  # ascending
        mass = torch.zeros(len(values), dtype=own.dtype).index_add(0, level, own.exp())
        upto = mass.cumsum(0)
        upto = upto / upto[-1]
        # log (F^n - (F - m)^n) by way of F^n (1 - (1 - m / F)^n): small differences keep their digits
        won = n * upto.log() + (-torch.expm1(n * torch.log1p(-(mass / upto).clamp(max=1.0)))).log()
        logp[p] = (won - mass.log())[level] + own
    return logp


def point(world: World, logp: Tensor) -> Point:
    """Where a policy [P, C] stands: its distance and its gold."""
    return Point(kl(logp, world.reference), expected(logp, world.gold))


def frontier(world: World, beta: float) -> Point:
    """The best trade-off at a price of `beta` rewards per nat."""
    return point(world, tilted(world.reference, world.gold, beta))


def best_at(world: World, distance: float) -> float:
    """The highest gold of any policy within KL `distance` nats of the reference: the frontier's, by bisection.

    All that a distance can buy is the completion with the highest reward, so beyond it the value stays the same.
    """
    if distance <= 0:
        return expected(world.reference, world.gold)
    beta = price(world.reference, world.gold, distance)
    near = frontier(world, beta)
    return near.gold + beta * max(distance - near.kl, 0.0) * (beta > CHEAPEST)  # the slope is beta


def price(reference: Tensor, reward: Tensor, distance: float) -> float:
    """The beta whose tilted policy is KL `distance` nats, above 0, from the reference, by bisection.

    The cheapest there is, e^-16, where no tilted policy goes as far: then it is all but certain of the best completion.
    """
    low, high = math.log(CHEAPEST), 16.0  # log beta
    if kl(tilted(reference, reward, CHEAPEST), reference) <= distance:
        return CHEAPEST
    while high - low > 1e-13 * max(1.0, abs(low), abs(high)):
        middle = (low + high) / 2
        too_far = kl(tilted(reference, reward, math.exp(middle)), reference) > distance
        low, high = (middle, high) if too_far else (low, middle)
    return math.exp(high)


def regret(world: World, logp: Tensor, beta: float) -> float:
    """How much less E[gold] - beta KL(policy || reference) a policy has than the best one: beta KL(policy || best)."""
    return beta * kl(logp, tilted(world.reference, world.gold, beta))


def measure(world: World, logp: Tensor) -> Measure:
    """Everything about a policy, from its exact log-probs [P, C] (`exact_logp`)."""
    here = point(world, logp)
    best = best_at(world, here.kl)
    start = expected(world.reference, world.gold)
    return Measure(
        kl=here.kl,
        gold=here.gold,
        entropy=-expected(logp, logp),
        forward_kl=kl(world.reference, logp),
        length=expected(logp, world.space.lengths.to(logp.dtype)),
        best=best,
        gap=best - here.gold,
        efficiency=None if here.kl < CLOSE else (here.gold - start) / (best - start),
    )
