"""Completions from a model in this process, as token ids."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from prefopt.models import attention

Row = tuple[int, list[int]]  # where the completion goes, and its prompt


def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    n: int = 1,
    max_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    eos_ids: Sequence[int],
    seed: int,
    tokens_per_batch: int = 16_384,
    progress: bool = False,
) -> list[list[list[int]]]:
    """n completions of every prompt: [prompt][completion] -> token ids, the end token included where one was produced.

    A completion without an end token was cut at max_tokens. temperature 0 is greedy (n equal completions); 1 with
    top_p 1 draws from exactly the distribution that `Policy` scores: the model's own generation defaults (top-k,
    repetition penalty) are set aside. Equal seed, budget and machine give equal samples. Mode, attention, generation
    defaults and the state of torch's random numbers are as before afterwards.
    tokens_per_batch: prompt and completion tokens of the rows that are generated together. progress: a bar on a
    terminal. ValueError on an empty prompt or an option out of range.
    """
    _check(prompts, n, max_tokens, temperature, top_p)
    copies = 1 if temperature == 0 else n
    rows = [(at, list(prompt)) for at, prompt in enumerate(p for p in prompts for _ in range(copies))]
    rows.sort(key=lambda row: len(row[1]))
    batches = list(_batches(rows, max_tokens, tokens_per_batch))
    options = _options(max_tokens, temperature, top_p, eos_ids)
    done: list[list[int]] = [[] for _ in rows]
    with _ready(model, options, seed) as ready:
        for batch in _shown(batches, progress):
            answers = _generate(ready, [prompt for _, prompt in batch], options.pad_token_id)
            for (at, _), answer in zip(batch, answers, strict=True):
                done[at] = _until(answer, set(eos_ids))
    repeats = n // copies
    return [done[at : at + copies] * repeats for at in range(0, len(done), copies)]


def _check(prompts: Sequence[Sequence[int]], n: int, max_tokens: int, temperature: float, top_p: float) -> None:
    empty = [at for at, prompt in enumerate(prompts) if not len(prompt)]
    if empty:
        raise ValueError(f"prompt {empty[0]} has no tokens; begin it with the model's start token")
    if n < 1 or max_tokens < 1:
        raise ValueError(f"n and max_tokens must be at least 1, got {n} and {max_tokens}")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature must be at least 0 and top_p in (0, 1], got {temperature} and {top_p}")


def _options(max_tokens: int, temperature: float, top_p: float, eos_ids: Sequence[int]) -> Any:
    from transformers import GenerationConfig

    # top_k 0: left alone, transformers keeps the 50 likeliest tokens only
    drawing = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    return GenerationConfig(
        max_new_tokens=max_tokens,
        do_sample=temperature > 0,
        eos_token_id=list(eos_ids) or None,
        pad_token_id=eos_ids[0] if eos_ids else 0,
        use_cache=True,
        **drawing,
    )


@contextmanager
def _ready(model: Any, options: Any, seed: int) -> Iterator[Any]:
    """The model in eval mode, with ordinary attention, these generation options and a seed; all put back afterwards."""
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    modes = [(module, module.training) for module in inner.modules()]
    configs = list({id(c): c for c in (inner.config, inner.base_model.config)}.values())
    attentions = [config._attn_implementation for config in configs]
    defaults, device = inner.generation_config, next(inner.parameters()).device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        inner.eval()
        inner.generation_config = options
        for config, name in zip(configs, attentions, strict=True):
            config._attn_implementation = _ordinary(inner, name)
        try:
            yield inner
        finally:
            inner.generation_config = defaults
            for config, name in zip(configs, attentions, strict=True):
                config._attn_implementation = name
            for module, training in modes:
                module.training = training


def _ordinary(model: Any, name: str) -> str:
    """The attention to generate with: packed attention has no cache of keys and values."""
    if name != attention.NAME:
        return name
    return "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"


def _batches(rows: list[Row], max_tokens: int, tokens_per_batch: int) -> Iterator[list[Row]]:
    """Rows, shortest prompt first, cut so that a batch with its padding stays within the budget; at least one each."""
    batch: list[Row] = []
    for row in rows:
        if batch and (len(batch) + 1) * (len(row[1]) + max_tokens) > tokens_per_batch:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _shown(batches: list[list[Row]], progress: bool) -> Iterable[list[Row]]:
    """The batches, with a bar on stderr where that is a terminal."""
    if not progress or not sys.stderr.isatty():
        return batches
    from rich.console import Console
    from rich.progress import track

    return track(batches, description="sampling", console=Console(stderr=True), transient=True)


def _generate(model: Any, prompts: list[list[int]], pad: int) -> list[list[int]]:
    width = max(map(len, prompts))
    device = next(model.parameters()).device
    # padding on the left, so that every row's next token is at the right edge
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)  # [rows, width]
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)  # [rows, width]
    generate: Callable[..., torch.Tensor] = model.generate
    return generate(input_ids=ids, attention_mask=mask)[:, width:].tolist()


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    """The tokens up to and including the first end token."""
    for at, token in enumerate(tokens):
        if token in ends:
            return tokens[: at + 1]
    return tokens
