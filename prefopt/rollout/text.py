"""Completions from tokens to what rewards read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefopt.models.sampling import Completion
from prefopt.records import Message, Sample
from prefopt.rollout.prompts import Prompt


@dataclass(frozen=True)
class Text:
    """Decodes completions with the model's tokenizer; special tokens are left out."""

    tokenizer: Any

    def samples(self, prompt: Prompt, completions: Sequence[Completion], group: int) -> list[Sample]:
        """A prompt's completions in the form of the prompt: text, or a message of the assistant."""
        return [self._sample(prompt, completion, group) for completion in completions]

    def _sample(self, prompt: Prompt, completion: Completion, group: int) -> Sample:
        text = continuation(self.tokenizer, list(prompt.tokens), completion.tokens)
        said: str | list[Message] = text
        if not isinstance(prompt.asked, str):
            said = [{"role": "assistant", "content": text}]
        return Sample(prompt.asked, said, completion.tokens, completion.finished, prompt.columns, group)


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the model's own (a chat model has several) and the tokenizer's."""
    ends = model.generation_config.eos_token_id
    listed = ends if isinstance(ends, list) else [ends]
    return sorted({token for token in [*listed, tokenizer.eos_token_id] if token is not None})


def continuation(tokenizer: Any, prompt: list[int], tokens: list[int]) -> str:
    """The text that the tokens add to the prompt's: decoded alone, many tokenizers drop a first token's space."""
    before, whole = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, prompt + tokens))
    return str(whole[len(before) :] if whole.startswith(before) else tokenizer.decode(tokens, skip_special_tokens=True))
