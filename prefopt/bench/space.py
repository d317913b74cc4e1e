"""Every completion that there is, as a tree whose edges are tokens, and a model's exact distribution on it.

Letters: P prompts, M prompt tokens, C completions, L tokens of the longest completion, S places (prefixes that a token
follows; place 0 is the empty one), V tokens that completions are made of.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefopt.batch import Batch, Ragged
from prefopt.models.policy import Policy

Tokens = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Space:
    """Prompts, and the completions that each of them has.

    prompts [P, M] token ids. tokens [C, L] token ids 0 to V - 1, -1 after a completion's end. places [C, L] the place
    that each token follows, 0 after the end. last, parent, depth [S] the token that leads to a place (-1 to the first),
    the place before it (-1) and the number of tokens before it.
    """

    prompts: Tensor
    tokens: Tensor
    places: Tensor
    last: Tensor
    parent: Tensor
    depth: Tensor
    num_tokens: int

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], content: int, longest: int, end: bool) -> Space:
        """All completions of `content` tokens: of exactly `longest`, or, with an end token (id `content`), of any
        length up to `longest`. One that is as long as can be carries no end token: it is cut off there, so that the
        probabilities of all add up to one.
        """
        prefixes = [p for size in range(longest) for p in itertools.product(range(content), repeat=size)]
        ended = [(*prefix, content) for prefix in prefixes] if end else []
        completions = [*ended, *itertools.product(range(content), repeat=longest)]
        place = {prefix: number for number, prefix in enumerate(prefixes)}
        rows = [[*c, *[-1] * (longest - len(c))] for c in completions]
        follows = [[place[c[:t]] for t in range(len(c))] + [0] * (longest - len(c)) for c in completions]
        return cls(
            prompts=torch.tensor(prompts),
            tokens=torch.tensor(rows),
            places=torch.tensor(follows),
            last=torch.tensor([prefix[-1] if prefix else -1 for prefix in prefixes]),
            parent=torch.tensor([place[prefix[:-1]] if prefix else -1 for prefix in prefixes]),
            depth=torch.tensor([len(prefix) for prefix in prefixes]),
            num_tokens=content + end,
        )

    @functools.cached_property
    def real(self) -> Tensor:
        """Where `tokens` holds a token, [C, L] bool."""
        return self.tokens >= 0

    @property
    def lengths(self) -> Tensor:
        """Tokens of each completion, an end token included, [C]."""
        return self.real.sum(1)

    def completion(self, number: int) -> list[int]:
        """Token ids of a completion."""
        return [token for token in self.tokens[number].tolist() if token >= 0]

    def find(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Numbers of a batch's prompts [G] and completions [N]. KeyError if one is not of this space."""
        return _number(self.prompts, batch.prompts, "prompt"), _number(self.tokens, batch.completions, "completion")

    def along(self, table: Tensor) -> Tensor:
        """A token's value after each place, read along the completions: [P, S, V] -> [P, C, L]; 0 after the end."""
        return table[:, self.places, self.tokens.clamp(min=0)] * self.real

    @functools.cached_property
    def visible(self) -> Tensor:
        """Which positions of prompt-and-places a position attends to: itself and what leads to it, [T, T] bool.

        T = M - 1 + S: the first place stands at the prompt's last token.
        """
        first = self.prompts.shape[1] - 1
        seen = torch.ones(first + len(self.last), first + len(self.last), dtype=torch.bool).tril()
        for place, parent in enumerate(self.parent.tolist()):
            if parent >= 0:
                seen[first + place] = seen[first + parent]
                seen[first + place, first + place] = True
        return seen

    @functools.cached_property
    def ids(self) -> Tensor:
        """Token ids of prompt and places, [P, T]."""
        return torch.cat([self.prompts, self.last[1:].expand(len(self.prompts), -1)], 1)

    @functools.cached_property
    def positions(self) -> Tensor:
        """Position ids of prompt and places, [T]: a token's distance from the prompt's first."""
        first = self.prompts.shape[1] - 1
        return torch.cat([torch.arange(first), first + self.depth])


def _number(known: Tensor, rows: Ragged, what: str) -> Tensor:
    """The row of `known` [R, width] (-1 = nothing) that each sequence is, [n]."""
    base, width = int(known.max()) + 2, known.shape[1]
    power = base ** torch.arange(width)
    codes, order = ((known + 1) * power).sum(1).sort()
    owner = torch.repeat_interleave(torch.arange(len(rows)), rows.lengths)
    place = torch.arange(len(owner)) - (rows.lengths.cumsum(0) - rows.lengths)[owner]
    if (rows.lengths > width).any() or not ((rows.values >= 0) & (rows.values < base - 1)).all():
        raise KeyError(f"a {what} of this batch is none of the {len(known)} that are enumerated")
    code = torch.zeros(len(rows), dtype=torch.int64).index_add(0, owner, (rows.values + 1) * power[place])
    at = torch.searchsorted(codes, code).clamp(max=len(codes) - 1)
    if (codes[at] != code).any():
        raise KeyError(f"a {what} of this batch is none of the {len(known)} that are enumerated")
    return order[at]


def next_logp(model: Any, space: Space, prompts: Tensor | None = None) -> Tensor:
    """log p(token | prompt, place) of a causal language model, [P, S, V] nats, float64: one forward pass.

    prompts: numbers of the prompts to look at; all of them by default. The model's head has a row for each of the V
    tokens and no other, so completions outside the space have no probability. Carries gradient if that is enabled.
    """
    ids = space.ids if prompts is None else space.ids[prompts]
    dtype = next(model.parameters()).dtype
    hidden = torch.zeros(space.visible.shape, dtype=dtype).masked_fill(~space.visible, torch.finfo(dtype).min)
    with Policy(model).ordinary():
        logits = model(
            input_ids=ids,
            attention_mask=hidden.expand(len(ids), 1, -1, -1),
            position_ids=space.positions.expand(len(ids), -1),
            use_cache=False,
        ).logits
    if logits.shape[-1] != space.num_tokens:
        raise ValueError(f"the model's head has {logits.shape[-1]} tokens, this space has {space.num_tokens}")
    return logits[:, space.prompts.shape[1] - 1 :].double().log_softmax(-1)


def exact_logp(model: Any, space: Space) -> Tensor:
    """log p(completion | prompt), [P, C] nats, float64, without gradient; the probabilities of a row add up to one."""
    with torch.no_grad():
        return space.along(next_logp(model, space)).sum(2)


def exact_values(model: Any, space: Space) -> Tensor:
    """The score that a reward model gives each token of each completion, [P, C, L] float64, without gradient.

    It is read at the token itself, so a completion's is that of its last token; 0 after the end.
    """
    tokens = space.tokens[space.real]  # of all completions end to end
    found = torch.zeros(len(space.prompts), *space.tokens.shape, dtype=torch.float64)
    for p, prompt in enumerate(space.prompts):
        batch = Batch(
            prompts=Ragged(prompt, torch.tensor([len(prompt)])),
            completions=Ragged(tokens, space.lengths),
            group=torch.zeros(len(space.tokens), dtype=torch.int64),
            trained=torch.ones(len(tokens), dtype=torch.bool),
            score=torch.zeros(len(space.tokens)),
        )
        with torch.no_grad():
            value = Policy(model, "padded")(batch).value
        if value is None:
            raise ValueError("the model has no score head")
        found[p][space.real] = value.double()
    return found


class Lookup:
    """Log-probs of a batch's tokens read from a table [P, C, L]: a reference that costs no forward pass."""

    def __init__(self, space: Space, table: Tensor) -> None:
        self.space, self.table = space, table

    def __call__(self, batch: Batch) -> Tensor:
        """[K] nats."""
        prompt, completion = self.space.find(batch)
        return self.table[prompt[batch.group], completion][self.space.real[completion]]
