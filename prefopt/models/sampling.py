"""How completions are drawn, and what every sampler gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol


@dataclass(frozen=True)
class Sampling:
    """The distribution that completions are drawn from, and where they end.

    max_tokens: longest completion. temperature: logits are divided by it; 0 takes the likeliest token each time.
    top_k: keep so many of the likeliest tokens; 0 keeps all. top_p: keep the likeliest that make up this share.
    min_p: keep tokens at least this share as likely as the likeliest. stop: texts that end a completion, kept in it.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not self.temperature >= 0 or self.temperature == float("inf"):
            raise ValueError(f"temperature must be at least 0, got {self.temperature}; 0 is greedy")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, got {self.top_k}; 0 keeps every token")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"min_p must be at least 0 and below 1, got {self.min_p}")
        if not all(self.stop):
            raise ValueError("stop holds an empty text, which would end every completion at once; leave it out")

    @property
    def truncated(self) -> bool:
        """Whether some tokens cannot be drawn, so that the sampler's distribution is not the model's."""
        return bool(self.top_k) or self.top_p < 1 or self.min_p > 0


class Completion(NamedTuple):
    """tokens: the end token included where one was produced, at least one token. logp: of each token under the
    distribution it was drawn from, after temperature and truncation, nats; 0 where temperature is 0. finished: it
    ended by itself, with an end token or a stop text, not at max_tokens.
    """

    tokens: list[int]
    logp: list[float]
    finished: bool


class Sampler(Protocol):
    """Draws completions: the model in this process, an engine beside it, or a server."""

    def sample(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        """n completions of every prompt, [prompt][completion].

        seeds: one for each prompt; completion i of a prompt is a function of (weights, prompt, its seed, i) alone.
        """
        ...

    def update(self, policy: Any) -> None:
        """Take over the policy's weights as they are now. Nothing to do where they are shared."""
        ...

    def close(self) -> None: ...
