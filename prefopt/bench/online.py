"""Completions that the policy of a world draws itself, with their rewards: the source of online objectives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from prefopt.batch import Batch, Ragged
from prefopt.bench.space import Space
from prefopt.bench.worlds import World
from prefopt.models.policy import Policy


class Rollouts:
    """Endless rollouts: every prompt of the world with `n` completions of the policy, each scored by a reward table.

    reward [P, C]; None: the world's own. updates, minibatches: passes over a rollout, and the parts that each is cut
    into, prompts whole; every part is an update.
    """

    def __init__(
        self,
        world: World,
        objective: Any,
        n: int = 8,
        *,
        seed: int = 0,
        updates: int = 1,
        minibatches: int = 1,
        reward: Tensor | None = None,
    ) -> None:
        self.world, self.objective, self.n = world, objective, n
        self.updates, self.minibatches = updates, minibatches
        self.reward = world.gold if reward is None else reward
        self.random = torch.Generator().manual_seed(seed)
        self.steps_per_epoch = 1
        self.seen: dict[str, float] = {}

    def batches(self, models: Any) -> Iterator[tuple[Batch, float]]:
        """Every update's batch, with the constants of the rollout that it is part of, and its weight 1."""
        several = replace(models, several=self.updates * self.minibatches > 1)
        while True:
            whole = self.rollout(models.policy)
            with torch.no_grad():
                whole = replace(whole, targets=self.objective.targets(whole, several))
            for _ in range(self.updates):
                for start, stop in self._cuts(whole.num_prompts):
                    yield whole.take(start, stop), 1.0

    def _cuts(self, prompts: int) -> list[tuple[int, int]]:
        edges = [round(prompts * part / self.minibatches) for part in range(self.minibatches + 1)]
        return list(pairwise(edges))

    def rollout(self, policy: Any) -> Batch:
        """n completions of every prompt, the prompts in a new order."""
        space = self.world.space
        order = torch.randperm(len(space.prompts), generator=self.random)
        tokens, logp = draw(policy, space, order.repeat_interleave(self.n), self.random)  # [N, L], [N, L]
        real = tokens >= 0
        completions = Ragged(tokens[real], real.sum(1))
        prompts = Ragged(space.prompts[order].flatten(), torch.full((len(order),), space.prompts.shape[1]))
        batch = Batch(
            prompts,
            completions,
            torch.arange(len(order)).repeat_interleave(self.n),
            torch.ones_like(completions.values, dtype=torch.bool),
            torch.zeros(len(tokens)),
            logp[real],
        )
        prompt, completion = space.find(batch)
        score = self.reward[prompt[batch.group], completion].float()
        self.seen = {"reward": float(score.mean())}
        return replace(batch, score=score)


def draw(policy: Policy, space: Space, prompt: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """A completion of each of the prompts [N], by number: tokens [N, L], -1 after the end; their log-probs [N, L]."""
    longest = space.tokens.shape[1]
    tokens = torch.full((len(prompt), longest), -1)
    logp = torch.zeros(len(prompt), longest)
    ids, live = space.prompts[prompt], torch.ones(len(prompt), dtype=torch.bool)
    end = int(space.tokens.max()) if space.lengths.min() < space.lengths.max() else None
    for t in range(longest):
        with policy.ordinary() as model, torch.no_grad():
            known = model(input_ids=ids, use_cache=False).logits[:, -1].float().log_softmax(-1)  # [N, V]
        drawn = torch.multinomial(known.exp(), 1, generator=random)  # [N, 1]
        tokens[live, t], logp[live, t] = drawn[live, 0], known.gather(1, drawn)[live, 0]
        ids = torch.cat([ids, drawn], 1)
        if end is not None:
            live = live & (drawn[:, 0] != end)
    return tokens, logp
