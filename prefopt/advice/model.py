"""Figures of a model on some of the rows: does it answer in their form, and how far are they from what it writes?"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from prefopt.advice.case import ModelFacts
from prefopt.advice.data import compared
from prefopt.records import Example

ROWS = 48  # prompts that are answered, and rows that are scored
CHECKED = 500  # of the rows' own answers
TOKENS = 96  # of an answer at most
SHORTEST = 8


def look(policy: Any, tokenizer: Any, examples: Sequence[Example], kind: str, seed: int = 0) -> ModelFacts:
    """The figures of a `Policy` on up to 48 of the rows. kind: of the rows, as `DataFacts.kind`."""
    from prefopt.evaluate.scoring import score

    some = random.Random(seed).sample(list(examples), min(ROWS, len(examples)))
    drawn = samples(policy, tokenizer, some, seed)
    sides = compared(some) if kind in ("pairs", "ratings") else []
    good, bad = [(p, b) for p, b, _ in sides], [(p, w) for p, _, w in sides]
    if kind in ("demonstrations", "labels"):
        good = [(tuple(e.prompt), tuple(e.completions[0])) for e in some if e.completions and e.scores[0] > 0.5]
        bad = [(tuple(e.prompt), tuple(e.completions[0])) for e in some if e.completions and e.scores[0] <= 0.5]

    def per_token(rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> float | None:
        made = [Example(list(p), [list(c)], [0.0], [[True] * len(c)]) for p, c in rows if len(c)]
        if not made:
            return None
        scored = score(policy, made, 2048)
        return float(-scored.logp.sum() / scored.tokens.sum())

    written = [(example.prompt, own.tokens) for example, own in zip(some, drawn, strict=True)]
    ended = [own.finished for own in drawn]
    return ModelFacts(
        parameters=sum(p.numel() for p in policy.model.parameters()),
        template=bool(getattr(tokenizer, "chat_template", None)),
        ends=sum(ended) / len(ended) if ended else None,
        better=per_token(good),
        worse=per_token(bad),
        own=per_token(written),
        samples=len(drawn),
    )


def samples(policy: Any, tokenizer: Any, examples: Sequence[Example], seed: int) -> list[Any]:
    """One answer of the model to each row's prompt, at temperature 1."""
    from prefopt.models.sampler import Local
    from prefopt.models.sampling import Sampling

    longest = max([len(tokens) for example in examples for tokens in example.completions] or [TOKENS])
    sampling = Sampling(max_tokens=min(TOKENS, max(SHORTEST, 2 * longest)))
    sampler = Local(policy.model, ends=[tokenizer.eos_token_id], tokenizer=tokenizer)
    seeds = random.Random(seed)
    prompts = [example.prompt for example in examples]
    found = sampler.sample(prompts, 1, sampling, [seeds.getrandbits(64) for _ in prompts])
    return [own[0] for own in found]
