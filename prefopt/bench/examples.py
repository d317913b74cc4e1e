"""Training rows drawn from a world's reference and labelled by its reward: one maker for each shape of data.

Letters: P prompts, C completions, R rows, S places.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prefopt.bench.measures import best_of
from prefopt.bench.worlds import World
from prefopt.records import Example


@dataclass(frozen=True, eq=False)
class Judge:
    """Who labels the rows: by a reward, with the noise of Bradley and Terry 1952 (Biometrika 39), some by mistake."""

    # how decided the labels are, per unit of reward: larger is closer to always right, smaller to a coin; inf: always
    scale: float = 1.0
    # share of labels turned around afterwards, 0 to 1: larger drowns the reward in noise, 0.5 leaves none of it
    flip: float = 0.0
    # reward to judge by, [P, C]; None: the world's own
    reward: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"scale must be above 0, got {self.scale}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip must be a share, 0 to 1, got {self.flip}")

    def impressions(self, world: World, drawn: Drawn, random: torch.Generator) -> Tensor:
        """How the judge takes each completion, [R, k]: scale x reward + Gumbel noise.

        The larger of two is the first with probability s(scale (r1 - r2)), and an order of several follows Plackett
        and Luce. With an infinite scale it is the reward itself.
        """
        reward = self.of(world)[drawn.prompt[:, None], drawn.completion]
        if math.isinf(self.scale):
            return reward
        noise = -torch.empty_like(reward).exponential_(generator=random).log()
        return self.scale * reward + noise

    def of(self, world: World) -> Tensor:
        """The reward this judge goes by, [P, C]."""
        return world.gold if self.reward is None else self.reward

    def mistakes(self, size: int, random: torch.Generator) -> Tensor:
        """Which labels are turned around, [size] bool."""
        return torch.rand(size, generator=random) < self.flip


@dataclass(frozen=True, eq=False)
class Drawn:
    """prompt [R], completion [R, k]: numbers of prompts and of their completions, no completion twice in a row."""

    prompt: Tensor
    completion: Tensor


def draw(policy: Tensor, num: int, k: int, random: torch.Generator) -> Drawn:
    """`num` prompts, all equally likely, each with `k` different completions drawn one after the other from a policy
    [P, C] of log-probs.
    """
    prompt = torch.randint(len(policy), (num,), generator=random)
    completion = torch.empty(num, k, dtype=torch.int64)
    for p, probability in enumerate(policy.exp()):
        here = (prompt == p).nonzero()[:, 0]
        if len(here):
            completion[here] = torch.multinomial(probability.expand(len(here), -1), k, generator=random)
    return Drawn(prompt, completion)


def pairs(
    world: World, num: int, seed: int = 0, judge: Judge | None = None, source: Tensor | None = None
) -> list[Example]:
    """Two different completions of a prompt, the preferred one with score 1 and the other with 0, in either order.

    source: the policy [P, C] they are drawn from; None: the reference.
    """
    judge, random = judge or Judge(), torch.Generator().manual_seed(seed)
    drawn = draw(world.reference if source is None else source, num, 2, random)
    first, second = judge.impressions(world, drawn, random).unbind(1)
    coin = torch.rand(num, generator=random) < 0.5
    wins = torch.where(first == second, coin, first > second) ^ judge.mistakes(num, random)
    return _rows(world, drawn, torch.stack([wins, ~wins], 1).double(), "pair")


def ratings(world: World, num: int, k: int = 4, seed: int = 0, judge: Judge | None = None) -> list[Example]:
    """`k` different completions of a prompt, each with the judge's impression of it as its score."""
    judge, random = judge or Judge(), torch.Generator().manual_seed(seed)
    if judge.flip:
        raise ValueError(f"ratings have no label to turn around; flip must be 0, got {judge.flip}; use a lower scale")
    drawn = draw(world.reference, num, k, random)
    return _rows(world, drawn, judge.impressions(world, drawn, random), "rating")


def labels(world: World, num: int, seed: int = 0, judge: Judge | None = None) -> list[Example]:
    """One completion of a prompt, good (1) with probability s(scale x reward), else bad (0)."""
    judge, random = judge or Judge(), torch.Generator().manual_seed(seed)
    drawn = draw(world.reference, num, 1, random)
    reward = judge.of(world)[drawn.prompt, drawn.completion[:, 0]]
    chance = (reward > 0).double() if math.isinf(judge.scale) else torch.sigmoid(judge.scale * reward)
    good = (torch.rand(num, generator=random, dtype=torch.float64) < chance) ^ judge.mistakes(num, random)
    return _rows(world, drawn, good[:, None].double(), "label")


def demonstrations(world: World, num: int, n: int = 4, seed: int = 0) -> list[Example]:
    """One completion of a prompt: the one with the highest true reward of `n` drawn from the reference."""
    random = torch.Generator().manual_seed(seed)
    drawn = draw(best_of(world.reference, world.gold, n), num, 1, random)
    return _rows(world, drawn, torch.ones(num, 1), "demonstration")


def steps(world: World, num: int, seed: int = 0) -> list[Example]:
    """One completion of a prompt, each token of it a step: right (1) if it raised the reward that the reference would
    go on to get, else wrong (0); its score is 1 if every step is right.
    """
    drawn = draw(world.reference, num, 1, torch.Generator().manual_seed(seed))
    progress = token_progress(world)[drawn.prompt, drawn.completion[:, 0]]  # [R, L]
    right = (progress > 0).double()
    rows = []
    for number, example in enumerate(_rows(world, drawn, torch.ones(num, 1), "steps")):
        own = right[number, : len(example.completions[0])].tolist()
        rows.append(
            Example(example.prompt, example.completions, [min(own)], example.trained, example.where, steps=[own])
        )
    return rows


def prefix_value(world: World) -> Tensor:
    """The true reward to be expected when the reference goes on from a place, [P, S]."""
    space, p = world.space, world.reference.exp()
    mass, total = (torch.zeros(len(p), len(space.last), dtype=p.dtype) for _ in range(2))
    for t in range(space.tokens.shape[1]):
        here = space.real[:, t]
        mass.index_add_(1, space.places[here, t], p[:, here])
        total.index_add_(1, space.places[here, t], (p * world.gold)[:, here])
    return total / mass


def token_progress(world: World) -> Tensor:
    """What each token of a completion adds to the reward to be expected, [P, C, L]; 0 after the end.

    The sum over a completion is its true reward less the prompt's mean.
    """
    space, value = world.space, prefix_value(world)[:, world.space.places]  # [P, C, L]
    after = torch.cat([value[:, :, 1:], value[:, :, :1]], 2)
    end = space.lengths - 1
    after[:, torch.arange(len(end)), end] = world.gold
    return (after - value) * space.real


def _rows(world: World, drawn: Drawn, scores: Tensor, name: str) -> list[Example]:
    prompts, space = world.space.prompts.tolist(), world.space
    known = [space.completion(number) for number in range(len(space.tokens))]
    return [
        _example(prompts[p], [known[c] for c in own], score, f"{name} {number}")
        for number, (p, own, score) in enumerate(
            zip(drawn.prompt.tolist(), drawn.completion.tolist(), scores.tolist(), strict=True)
        )
    ]


def _example(prompt: list[int], completions: Sequence[list[int]], scores: list[float], where: str) -> Example:
    return Example(prompt, list(completions), scores, [[True] * len(tokens) for tokens in completions], where)
