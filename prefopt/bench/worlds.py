"""A world small enough to be known completely: a reference model, every completion, and the true reward of each.

Letters: P prompts, C completions, L tokens of the longest completion, S places, V tokens (see `space`).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from prefopt.bench.space import Lookup, Space, next_logp

Reward = Literal["structured", "global", "hash"]

SIDE = 4  # a prompt is one of 4 subjects and one of 4 manners
WIDTH, LAYERS, HEADS = 64, 2, 4


@dataclass(frozen=True, eq=False)
class World:
    """Everything about a small preference problem, exactly.

    gold [P, C]: the true reward of each completion; under the reference its mean is 0 for each prompt and its standard
    deviation 1. reference [P, C], reference_tokens [P, C, L]: log-probs of completions and of their tokens, nats.
    model: the reference itself, frozen; `policy_model` is a copy to train. float64 but for the model.
    """

    seed: int
    reward: Reward
    space: Space
    gold: Tensor
    reference: Tensor
    reference_tokens: Tensor
    model: Any

    def policy_model(self) -> Any:
        """A copy of the reference model that can be trained."""
        return copy.deepcopy(self.model).requires_grad_(True)

    def lookup(self) -> Lookup:
        """Reference log-probs of any batch of this world, read from the table."""
        return Lookup(self.space, self.reference_tokens.to(next(self.model.parameters()).dtype))


def world(seed: int = 0, reward: Reward = "structured", lengths: bool = False) -> World:
    """A world: 16 prompts; 1,296 completions of four of six tokens, or with lengths 364 of up to five of three tokens.

    reward: structured = a sum over tokens and neighbours, weighted by the prompt, and an interaction of the first and
    last token; global = minus the squared distance of the sum of all tokens from the prompt's target, easy to check and
    hard to build up token by token; hash = a random number for each completion, which nothing can generalise.
    lengths: completions end with an end token; the reward is then centred and scaled within each length, so it says
    nothing about length and any drift of it is the method's own. A world is a function of its arguments.
    """
    space, model, tokens = _reference(seed, lengths)
    reference = tokens.sum(2)
    raw = REWARDS[reward](space, torch.Generator().manual_seed(7919 * seed + 1))
    return World(seed, reward, space, _standard(raw, reference.exp(), space), reference, tokens, model)


def _space(lengths: bool) -> Space:
    content, longest = (3, 5) if lengths else (6, 4)
    first = content + lengths  # ids of subjects, after those of the completions' tokens
    prompts = [[first + i, first + SIDE + j] for i in range(SIDE) for j in range(SIDE)]
    return Space.of(prompts, content, longest, end=lengths)


# ---------------------------------------------------------------- the reference


@functools.lru_cache(maxsize=8)
def _reference(seed: int, lengths: bool) -> tuple[Space, Any, Tensor]:
    """The space, a model that was fitted to a random teacher, and the log-probs of its tokens [P, C, L]."""
    space = _space(lengths)
    model = _fit(_model(space, seed), space, _teacher(space, torch.Generator().manual_seed(7919 * seed)), seed)
    with torch.no_grad():
        return space, model, space.along(next_logp(model, space))


def _model(space: Space, seed: int, dtype: torch.dtype = torch.float32) -> Any:
    """A GPT-NeoX of 0.1 M parameters whose head has a row for each token of a completion, and none for prompts."""
    settings: Any = GPTNeoXConfig  # its stub lacks arguments that it takes
    config = settings(
        vocab_size=int(space.prompts.max()) + 1,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        rotary_pct=1.0,
        max_position_embeddings=16,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = GPTNeoXForCausalLM(config)
        head = nn.Linear(WIDTH, space.num_tokens, bias=False)
        nn.init.normal_(head.weight, std=config.initializer_range)
        model.set_output_embeddings(head)
    return model.to(dtype)


def _teacher(space: Space, random: torch.Generator) -> Tensor:
    """log p(token | prompt, place) of a random bigram that depends on the prompt, [P, S, V]."""
    subject = 0.7 * torch.randn(SIDE, space.num_tokens, generator=random)
    manner = 0.7 * torch.randn(SIDE, space.tokens.shape[1], space.num_tokens, generator=random)
    neighbour = 0.7 * torch.randn(space.num_tokens, space.num_tokens, generator=random)
    after = torch.where(space.last[:, None] >= 0, neighbour[space.last.clamp(min=0)], 0.0)  # [S, V]
    i, j = torch.arange(SIDE).repeat_interleave(SIDE), torch.arange(SIDE).repeat(SIDE)  # [P]
    return (subject[i][:, None] + manner[j][:, space.depth] + after).double().log_softmax(-1)


def _reach(space: Space, logp: Tensor) -> Tensor:
    """Probability of coming to each place, [P, S], from log p(token | place) [P, S, V]."""
    reach = torch.ones(logp.shape[:2], dtype=logp.dtype)
    for place, parent in enumerate(space.parent.tolist()):
        if parent >= 0:
            reach[:, place] = reach[:, parent] * logp[:, parent, space.last[place]].exp()
    return reach


def _fit(model: Any, space: Space, teacher: Tensor, seed: int, steps: int = 160) -> Any:
    """The model after `steps` updates on the exact cross-entropy from the teacher, for four prompts at a time."""
    weight = _reach(space, teacher)[..., None] * teacher.exp()  # [P, S, V]
    adam = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.01)
    random = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in adam.param_groups:
            group["lr"] = 5e-3 * min((step + 1) / 20, 1 - step / steps)
        prompts = torch.randperm(len(space.prompts), generator=random)[:4]
        loss = -(weight[prompts] * next_logp(model, space, prompts)).sum() / len(prompts)
        adam.zero_grad()
        loss.backward()
        adam.step()
    return model.eval().requires_grad_(False)


# ---------------------------------------------------------------- the true reward


def _structured(space: Space, random: torch.Generator) -> Tensor:
    """0.6 sum_t a_x(y_t) + 0.6 sum_t b(y_t, y_t+1) + c_x(y_first, y_last), normal a, b, c; a by the prompt's subject, c
    by its manner; [P, C]. The end token is none of the y.
    """
    content = _content(space)
    token = torch.randn(SIDE, content, generator=random)
    pair = torch.randn(content, content, generator=random)
    ends = torch.randn(SIDE, content, content, generator=random)
    y = space.tokens
    is_content = (y >= 0) & (y < content)  # [C, L]
    y, size = y.masked_fill(~is_content, 0), is_content.sum(1)
    alone = (token[:, y] * is_content).sum(2)  # [subjects, C]
    together = (pair[y[:, :-1], y[:, 1:]] * is_content[:, 1:]).sum(1)  # [C]
    last = y.gather(1, (size - 1).clamp(min=0)[:, None])[:, 0]
    across = ends[:, y[:, 0], last] * (size > 0)  # [manners, C]
    i, j = torch.arange(SIDE).repeat_interleave(SIDE), torch.arange(SIDE).repeat(SIDE)
    return (0.6 * alone[i] + 0.6 * together + across[j]).double()


def _global(space: Space, random: torch.Generator) -> Tensor:
    """-(sum of content tokens - the prompt's target)^2, [P, C]."""
    content = _content(space)
    y = space.tokens
    total = y.masked_fill((y < 0) | (y >= content), 0).sum(1)
    most = (content - 1) * space.tokens.shape[1]
    target = torch.randint(most // 5, most - most // 5 + 1, (len(space.prompts), 1), generator=random)
    return -(total - target).double().square()


def _hash(space: Space, random: torch.Generator) -> Tensor:
    """A normal number for each completion of each prompt, [P, C]."""
    return torch.randn(len(space.prompts), len(space.tokens), generator=random, dtype=torch.float64)


REWARDS: dict[str, Callable[[Space, torch.Generator], Tensor]] = {
    "structured": _structured,
    "global": _global,
    "hash": _hash,
}


def _content(space: Space) -> int:
    """How many tokens are not the end token."""
    return space.num_tokens - int(space.lengths.min() < space.lengths.max())


def _standard(raw: Tensor, probability: Tensor, space: Space) -> Tensor:
    """The reward with mean 0 under the reference for each prompt and standard deviation 1 over all of them, [P, C].

    In a space with lengths each length by itself has mean 0 and, where its completions differ, one standard deviation.
    """
    ended = space.num_tokens > _content(space)
    size = space.lengths - (space.tokens == _content(space)).any(1).long() if ended else torch.zeros_like(space.lengths)
    gold = torch.zeros_like(raw)
    for length in size.unique():
        here = size == length
        share = probability[:, here] / probability[:, here].sum(1, keepdim=True)
        centred = raw[:, here] - (share * raw[:, here]).sum(1, keepdim=True)
        spread = (share * centred.square()).sum(1, keepdim=True).sqrt()
        gold[:, here] = centred / spread.clamp(min=1e-9) if ended else centred
    return gold / (probability * gold.square()).sum(1).mean().sqrt()
