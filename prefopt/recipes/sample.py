"""What a model answers to prompts: `prefopt sample`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prefopt import ranks
from prefopt.data import DataOptions, load
from prefopt.data.shapes import Record
from prefopt.data.template import Encoder
from prefopt.models import sampler
from prefopt.models.load import ModelOptions
from prefopt.models.load import load as load_model
from prefopt.records import InputError


class Samples(NamedTuple):
    """rows: one per completion, in the order of the prompts: prompt, completion, its number of tokens, and whether it
    ended by itself. notes: lines for the log.
    """

    rows: list[dict[str, Any]]
    notes: list[str]


def sample(
    model: str,
    source: str | Sequence[str],
    model_options: ModelOptions,
    data_options: DataOptions,
    *,
    adapter: str | None = None,
    progress: bool = False,
    **drawing: Any,
) -> Samples:
    """Completions of prompts: the texts in a list, or the prompts of a file that `prefopt train` reads.

    drawing: n, max_tokens, temperature, top_p and seed, as `sampler.sample` has them. InputError for an adapter, a file
    or a number that cannot be.
    """
    loaded, tokenizer = _model(model, adapter, model_options)
    asked, prompts, notes = _prompts(source, tokenizer, data_options)
    ends = end_tokens(loaded, tokenizer)
    try:
        answers = sampler.sample(loaded, prompts, eos_ids=ends, progress=progress, **drawing)
    except ValueError as error:
        raise InputError(f"sample: {error}") from None
    rows = [
        _row(prompt, continuation(tokenizer, ids, tokens), len(tokens), bool(tokens) and tokens[-1] in ends)
        for prompt, ids, several in zip(asked, prompts, answers, strict=True)
        for tokens in several
    ]
    return Samples(rows, notes)


def _model(source: str, adapter: str | None, options: ModelOptions) -> tuple[Any, Any]:
    """Model and tokenizer; `source` may itself be an adapter's directory, which names its base model."""
    if adapter is not None and not (Path(adapter) / "adapter_config.json").is_file():
        raise InputError(f"{adapter}: not an adapter, adapter_config.json is missing; give the folder it was saved in")
    loaded = load_model(source, options, ranks.device())
    folder = adapter or loaded.adapter
    if folder is None:
        return loaded.model, loaded.tokenizer
    from peft import PeftModel

    return PeftModel.from_pretrained(loaded.model, folder), loaded.tokenizer


def _prompts(
    source: str | Sequence[str], tokenizer: Any, options: DataOptions
) -> tuple[list[Any], list[list[int]], list[str]]:
    """The prompts as given, text or messages, their tokens, and notes.

    A text of a list is a user's turn where the model has a chat template; in a file it is what it says.
    """
    if isinstance(source, str):
        dataset = load(source, tokenizer, "prompts", options)
        return (
            [row.prompt for row in dataset.rows],
            [example.prompt for example in dataset.examples],
            [dataset.describe()],
        )
    encoder = Encoder(tokenizer, options.chat_template)
    asked = [[{"role": "user", "content": text}] if encoder.has_template else text for text in source]
    records = [Record("--prompt", prompt, [], []) for prompt in asked]
    prompts = []
    for example in encoder.encode([encoder.render(record, "prompts") for record in records]):
        if isinstance(example, InputError):
            raise example
        prompts.append(example.prompt)
    return asked, prompts, []


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the model's own (a chat model has several) and the tokenizer's."""
    ends = model.generation_config.eos_token_id
    listed = ends if isinstance(ends, list) else [ends]
    return sorted({token for token in [*listed, tokenizer.eos_token_id] if token is not None})


def continuation(tokenizer: Any, prompt: list[int], tokens: list[int]) -> str:
    """The text that the tokens add to the prompt's: decoded alone, many tokenizers drop a first token's space."""
    before, whole = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, prompt + tokens))
    return str(whole[len(before) :] if whole.startswith(before) else tokenizer.decode(tokens, skip_special_tokens=True))


def _row(prompt: Any, text: str, num_tokens: int, finished: bool) -> dict[str, Any]:
    """A row in the form of the prompt: text, or messages."""
    completion = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
    return {"prompt": prompt, "completion": completion, "tokens": num_tokens, "finished": finished}
