"""A completion that is asked for and being written, and what ends it: shared by the ways to sample in this process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from prefopt.models.draw import Stream
from prefopt.models.sampling import Completion
from prefopt.records import NotFinite

CONTEXT = 8  # tokens decoded before the new ones: alone, many tokenizers drop a first token's space


class Asked(NamedTuple):
    """One completion to write. prompt: at least one token; at: its number among the prompts; number: the completion's
    among the prompt's; seed: the prompt's; limit: most tokens.
    """

    prompt: Sequence[int]
    at: int
    number: int
    seed: int
    limit: int


class Ending:
    """Whether a completion is at its end: an end token, or a stop text that its last token completes.

    ValueError where there are stop texts and no tokenizer to read them with.
    """

    def __init__(self, ends: Sequence[int], stop: Sequence[str] = (), tokenizer: Any = None) -> None:
        if stop and tokenizer is None:
            raise ValueError(f"stop texts {list(stop)} need a tokenizer; give one to the sampler")
        self.ends, self.stop, self.tokenizer = frozenset(ends), tuple(stop), tokenizer
        # a token is at least a byte, but for a few special ones
        self._reach = max((len(text.encode()) for text in stop), default=0) + CONTEXT

    def __call__(self, prompt: Sequence[int], tokens: Sequence[int]) -> bool:
        return tokens[-1] in self.ends or (bool(self.stop) and self._stopped(prompt, tokens))

    def _stopped(self, prompt: Sequence[int], tokens: Sequence[int]) -> bool:
        """Whether a stop text is in what the latest tokens add to the text before them."""
        start = max(0, len(tokens) - self._reach)
        before, new = [*prompt[-CONTEXT:], *tokens[:start]][-CONTEXT:], list(tokens[start:])
        head, whole = self._text(before), self._text(before + new)
        text = whole[len(head) :] if whole.startswith(head) else self._text(new)
        return any(stop in text for stop in self.stop)

    def _text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))


@dataclass
class Writing:
    """A completion so far. finished: it ended by itself. done: it ended, by itself or at its limit."""

    asked: Asked
    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    finished: bool = False
    done: bool = False

    def __post_init__(self) -> None:
        self.stream = Stream(self.asked.seed, self.asked.number)

    @property
    def last(self) -> int:
        """The token that the next one follows."""
        return self.tokens[-1] if self.tokens else self.asked.prompt[-1]

    def add(self, token: int, logp: float, ending: Ending) -> None:
        """Go on with a token. NotFinite where it was drawn from a distribution of what is no number."""
        if math.isnan(logp):
            raise NotFinite(
                "the model's log-probs are not numbers, so nothing can be drawn from it; lower learning_rate where it "
                "is in training, or check its weights"
            )
        self.tokens.append(token)
        self.logp.append(logp)
        self.finished = ending(self.asked.prompt, self.tokens)
        self.done = self.finished or len(self.tokens) >= self.asked.limit

    def completion(self) -> Completion:
        return Completion(self.tokens, self.logp, self.finished)
