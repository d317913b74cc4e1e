"""Completions from tokens to what rewards read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefopt.models.sampling import Completion
from prefopt.records import Sample
from prefopt.rollout.prompts import Prompt

NEAR = 16  # tokens of a prompt's end that a completion is decoded with


@dataclass(frozen=True)
class Text:
    """Decodes completions with the model's tokenizer; special tokens are left out."""

    tokenizer: Any

    def samples(self, prompt: Prompt, completions: Sequence[Completion], group: int) -> list[Sample]:
        """A prompt's completions in the form of the prompt: text, or a message of the assistant."""
        texts = continuations(self.tokenizer, list(prompt.tokens), [completion.tokens for completion in completions])
        return [
            Sample(
                prompt.asked,
                text if isinstance(prompt.asked, str) else [{"role": "assistant", "content": text}],
                completion.tokens,
                completion.finished,
                prompt.columns,
                group,
            )
            for text, completion in zip(texts, completions, strict=True)
        ]


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the model's own (a chat model has several) and the tokenizer's."""
    ends = model.generation_config.eos_token_id
    listed = ends if isinstance(ends, list) else [ends]
    return sorted({token for token in [*listed, tokenizer.eos_token_id] if token is not None})


def continuation(tokenizer: Any, prompt: list[int], tokens: list[int]) -> str:
    """The text that the tokens add to the prompt's, without special tokens."""
    return continuations(tokenizer, prompt, [tokens])[0]


def continuations(tokenizer: Any, prompt: list[int], several: Sequence[list[int]]) -> list[str]:
    """The texts that each of several completions adds to one prompt.

    Decoded alone, many tokenizers drop a first token's space. The prompt's last tokens are enough to keep it.
    """
    near = prompt[-NEAR:]
    before = tokenizer.decode(near, skip_special_tokens=True)
    wholes = tokenizer.batch_decode([near + list(tokens) for tokens in several], skip_special_tokens=True)
    return [
        whole[len(before) :] if whole.startswith(before) else tokenizer.decode(tokens, skip_special_tokens=True)
        for whole, tokens in zip(wholes, several, strict=True)
    ]
