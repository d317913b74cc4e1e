"""How long a run takes: its products and what they cost at a rate that was measured, no better than a factor of two."""

from __future__ import annotations

from dataclasses import dataclass

from prefopt.advice.machine import Speed
from prefopt.advice.memory import Setup
from prefopt.advice.passes import Updates
from prefopt.advice.sizes import Net

# what training reaches of the rate of a large product: 0.39 to 0.63 in benchmarks/results/*.json, on a CPU
SHARE = 0.5
# what sampling reaches of the rate of reading: small products are bound by it
READING = 0.5


@dataclass(frozen=True)
class Work:
    """What an update does besides the pass that carries the gradient.

    scored: passes without gradient over its rows, of the policy and of a reference that is asked live. once: passes
    over all rows before training. sampled: completion tokens that are written for an update. steps: tokens written one
    after the other for it. critic: a second model of the policy's size is trained.
    """

    scored: int = 0
    once: int = 0
    sampled: int = 0
    steps: int = 0
    critic: bool = False


@dataclass(frozen=True)
class Time:
    """seconds: of the whole run; per_update of one update. operations: floating-point, of the whole run's products."""

    updates: int
    tokens: int
    operations: float
    per_update: float
    seconds: float


def forward(net: Net, tokens: int, completion: int, seen: int, head: bool = True) -> float:
    """Operations of a forward pass: layers on every token, attention on what it sees, the head on completions."""
    layers = 2.0 * net.linear * tokens + 4.0 * net.layers * net.query_width * seen
    return layers + (2.0 * net.head * completion if head else 0.0)


def time_of(net: Net, epoch: Updates, steps: int, setup: Setup, work: Work, speed: Speed) -> Time:
    """The time of `steps` updates like those of the epoch."""
    share = 1 / max(epoch.number, 1)
    one = forward(net, epoch.tokens, epoch.completion, epoch.seen, setup.head) * share
    backward = (1 if setup.lora_rank else 2) + bool(setup.checkpointing)
    passes = 1 + backward + work.scored
    critic = 3 * forward(net, epoch.tokens, 0, epoch.seen, False) * share if work.critic else 0.0
    operations = passes * one + critic
    per_update = operations / (speed.products * SHARE) + _sampling(net, setup, work, speed)
    first = work.once * one * epoch.number
    total = steps * operations + first
    seconds = steps * per_update + first / (speed.products * SHARE)
    return Time(steps, round(epoch.tokens * share * steps), total, per_update, seconds)


def _sampling(net: Net, setup: Setup, work: Work, speed: Speed) -> float:
    """Seconds to write an update's completions: every step reads all weights, and multiplies them with every row."""
    weights = net.linear + net.head
    reading = work.steps * weights * setup.size / (speed.reading * READING)
    return max(reading, 2.0 * weights * work.sampled / (speed.products * SHARE))
