"""Completions from a model in this process, on the weights that are trained."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from prefopt import streams
from prefopt.budget import Budget
from prefopt.models import attention, decode
from prefopt.models.decode import Decoder, Prefix
from prefopt.models.draw import draw, uniforms
from prefopt.models.generate import generated
from prefopt.models.packed import packed
from prefopt.models.policy import SMALL, is_windowed, text_config
from prefopt.models.sampling import Completion, Sampling
from prefopt.models.writing import Asked, Ending, Writing

Way = Literal["auto", "shared", "generate"]
TOKENS = 16_384  # held at once on a CPU, and at least on a GPU
MOST_TOKENS = 262_144  # on a GPU, which is idle with few rows
SHARE = 0.3  # of a GPU's free memory, for what is held
FILLED = 16_384  # prompt tokens in one forward pass: bounds its memory


class Local:
    """Draws completions from a causal language model of transformers, with or without adapters.

    A prompt's keys and values are computed once and shared by its completions; what has ended leaves the running batch
    and what waits joins it. Architectures that this is not exact for, by a probe, are sampled through their own
    `generate`. Mode, attention, generation defaults and the state of torch's random numbers are as before afterwards.

    ends: tokens that end a completion, kept in it. tokenizer: needed for stop texts alone. tokens_per_batch: prompt
    tokens and room for completion tokens held at once; larger decodes more rows together, smaller needs less memory;
    None: 16,384 on a CPU, by free memory on a GPU. It halves itself when memory runs out. progress: a bar on a
    terminal. way: "shared" and "generate" insist; then nothing is probed. reason: which way was taken and why, for the
    log.
    """

    def __init__(
        self,
        model: Any,
        ends: Sequence[int],
        tokenizer: Any = None,
        *,
        tokens_per_batch: int | None = None,
        progress: bool = False,
        way: Way = "auto",
    ) -> None:
        self.model = model.get_base_model() if hasattr(model, "peft_config") else model
        self.ends, self.tokenizer, self.progress = list(ends), tokenizer, progress
        self.tokens_per_batch = tokens_per_batch
        self._budget: Budget | None = None
        self._choice = choose(self.model) if way == "auto" else Choice(way == "shared", True, f"{way}, as asked")
        self.reason = self._choice.reason

    def sample(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        """n completions of every prompt, [prompt][completion].

        seeds: one for each prompt; completion i is a function of (weights, prompt, its seed, i), up to rounding.
        Shorter than max_tokens where the model has no more positions. ValueError on an empty prompt, one that fills all
        the model's positions, n below 1, seeds that are not one for each prompt, or stop texts without a tokenizer.
        """
        copies = 1 if sampling.temperature == 0 else n
        asked = _asked(prompts, n, copies, sampling, seeds, positions(self.model))
        ending = Ending(self.ends, sampling.stop, self.tokenizer)
        if self._budget is None:  # not before: a GPU's memory fills up until the first samples are drawn
            self._budget = Budget(self.tokens_per_batch or held(self.model), name="tokens_per_batch")

        def written(tokens: int) -> list[Writing]:
            rows = run(self.model, self._choice, asked, sampling, ending, tokens)
            return list(_shown(rows, len(asked), self.progress))

        done: list[list[Completion]] = [[Completion([], [], False)] * copies for _ in prompts]
        with _ready(self.model, decode.NAME if self._choice.shared else None), packed(self.model, sampling.max_tokens):
            for row in self._budget.run(written, smallest=max((len(a.prompt) + a.limit for a in asked), default=1)):
                done[row.asked.at][row.asked.number] = row.completion()
        return [own * (n // copies) for own in done]

    def update(self, policy: Any) -> None:
        """Nothing to do: the weights are the policy's own."""

    def close(self) -> None:
        """Nothing to let go of."""


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
    tokens_per_batch: int | None = None,
    progress: bool = False,
) -> list[list[list[int]]]:
    """n completions of every prompt: [prompt][completion] -> token ids, the end token included where one was produced.

    `Local` with one seed for all, and token ids alone. A completion without an end token was cut at max_tokens.
    temperature 0 is greedy (n equal completions); 1 with top_p 1 draws from exactly the distribution that `Policy`
    scores. ValueError on an empty prompt or an option out of range.
    """
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p)
    local = Local(model, ends=eos_ids, tokens_per_batch=tokens_per_batch, progress=progress)
    seeds = random.Random(seed)
    found = local.sample(prompts, n, sampling, [seeds.getrandbits(64) for _ in prompts])
    return [[completion.tokens for completion in own] for own in found]


def positions(model: Any) -> int | None:
    """Tokens that prompt and completion may have together, or None where the model names no limit."""
    limit = getattr(text_config(model), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def held(model: Any) -> int:
    """Tokens whose keys and values may be held at once: 16,384 on a CPU; on a GPU what fits a share of its free memory,
    between that and 262,144.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        return TOKENS
    free, _ = torch.cuda.mem_get_info(device)
    return max(TOKENS, min(MOST_TOKENS, int(SHARE * free) // bytes_held(model)))


def bytes_held(model: Any) -> int:
    """Bytes of one token's keys and values in all layers, as the configuration has them."""
    config = text_config(model)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = next(model.parameters()).element_size()
    return int(2 * config.num_hidden_layers * heads * width * size)


def _asked(
    prompts: Sequence[Sequence[int]],
    n: int,
    copies: int,
    sampling: Sampling,
    seeds: Sequence[int],
    room: int | None,
) -> list[Asked]:
    """Every completion to write, longest prompt first: what is filled in together then needs little padding."""
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts; give one for each")
    for at, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {at} has no tokens; begin it with the model's start token")
        if room is not None and len(prompt) >= room:
            raise ValueError(f"prompt {at} has {len(prompt)} tokens and the model {room} positions; shorten or drop it")
    limits = [sampling.max_tokens if room is None else min(sampling.max_tokens, room - len(p)) for p in prompts]
    order = sorted(range(len(prompts)), key=lambda at: -len(prompts[at]))
    return [Asked(prompts[at], at, number, seeds[at], limits[at]) for at in order for number in range(copies)]


def _shown(rows: Iterator[Writing], total: int, progress: bool) -> Iterable[Writing]:
    """The rows, with a bar on stderr where that is a terminal."""
    if not progress or not streams.is_terminal():
        return rows
    from rich.console import Console
    from rich.progress import track

    console = Console(file=streams.errors())
    return track(rows, description="sampling", total=total, console=console, transient=True)


# ---------------------------------------------------------------- the running batch


class Running:
    """Completions written together on shared prompts.

    asked: those of one prompt one after the other. tokens: as `Local.tokens_per_batch`.
    """

    def __init__(self, model: Any, asked: Sequence[Asked], sampling: Sampling, ending: Ending, tokens: int) -> None:
        self.decoder = Decoder(model)
        self.sampling, self.ending, self.tokens = sampling, ending, tokens
        self._waiting = deque(asked)
        self._rows: list[Writing] = []
        self._newest: tuple[int, Prefix] | None = None  # the prompt that joined last, and where it is held
        self._limit = max((one.limit for one in asked), default=0)

    def __iter__(self) -> Iterator[Writing]:
        while self._waiting or self._rows:
            self._admit()
            self._step()
            yield from (row for row in self._rows if row.done)
            self._let_go()

    def _step(self) -> None:
        """One token for every row."""
        device = self.decoder.device
        logits = self.decoder.step(torch.tensor([row.last for row in self._rows], device=device))
        greedy = self.sampling.temperature == 0
        drawn = draw(logits, self.sampling, None if greedy else uniforms([r.stream for r in self._rows], device))
        for row, token, logp in zip(self._rows, drawn.token.tolist(), drawn.logp.tolist(), strict=True):
            row.add(token, logp, self.ending)

    def _admit(self) -> None:
        """Let in what waits, as far as the budget goes, at least one row."""
        joining: list[Asked] = []
        fresh: list[Asked] = []  # the first of each prompt that is not held yet
        newest = self._newest[0] if self._newest else None
        while self._waiting:
            one = self._waiting[0]
            opens = [one] if one.at != newest else []
            prompts, rows = fresh + opens, len(self._rows) + len(joining)
            if rows and self._cost(prompts, rows + 1) > self.tokens:
                break
            joining.append(self._waiting.popleft())
            fresh, newest = prompts, one.at
        held = self._open(fresh)
        if self._newest:
            held[self._newest[0]] = self._newest[1]
        for one in joining:
            self.decoder.join(held[one.at])
            self._rows.append(Writing(one))
            self._newest = one.at, held[one.at]

    def _cost(self, fresh: Sequence[Asked], rows: int) -> int:
        """Tokens held with these prompts more and so many rows, every prompt as wide as the longest."""
        lengths = [prefix.length for prefix in self.decoder.prefixes] + [len(one.prompt) for one in fresh]
        return len(lengths) * max(lengths, default=0) + rows * self._limit

    def _open(self, fresh: Sequence[Asked]) -> dict[int, Prefix]:
        """Fill prompts in, a bounded number of tokens at a time: where each is held, by its number."""
        held: dict[int, Prefix] = {}
        rest = list(fresh)
        while rest:
            some = max(1, FILLED // len(rest[0].prompt))  # the longest comes first
            now, rest = rest[:some], rest[some:]
            prefixes = self.decoder.open([one.prompt for one in now])
            held |= {one.at: prefix for one, prefix in zip(now, prefixes, strict=True)}
        return held

    def _let_go(self) -> None:
        alive = [not row.done for row in self._rows]
        if all(alive):
            return
        continues = self._waiting and self._newest and self._waiting[0].at == self._newest[0]
        order = self.decoder.keep(alive, self._newest[1] if continues and self._newest else None)
        self._rows = [self._rows[at] for at in order]
        if not continues:
            self._newest = None


def run(
    model: Any, choice: Choice, asked: Sequence[Asked], sampling: Sampling, ending: Ending, tokens: int
) -> Iterator[Writing]:
    """Write what is asked in the chosen way; in the order in which they end."""
    if choice.shared:
        return iter(Running(model, asked, sampling, ending, tokens))
    return generated(model, asked, sampling, ending, tokens, choice.mixed)


@contextmanager
def _ready(model: Any, attend: str | None) -> Iterator[None]:
    """The model in eval mode without gradients, with this attention (None: its ordinary one); put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    configs = list({id(c): c for c in (model.config, model.base_model.config)}.values())
    attentions = [config._attn_implementation for config in configs]
    defaults = getattr(model, "generation_config", None)
    try:
        model.eval()
        for config, name in zip(configs, attentions, strict=True):
            config._attn_implementation = attend or _ordinary(model, name)
        with torch.no_grad():
            yield
    finally:
        model.generation_config = defaults
        for config, name in zip(configs, attentions, strict=True):
            config._attn_implementation = name
        for module, training in modes:
            module.training = training


def _ordinary(model: Any, name: str) -> str:
    """An attention that every forward pass can use: packed attention has no cache of keys and values."""
    if name != attention.NAME:
        return name
    return "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"


# ---------------------------------------------------------------- which way is exact


@dataclass(frozen=True)
class Choice:
    """shared: prompts are shared by `Decoder`, else `generate` is used. mixed: there, prompts of unequal length may be
    padded to one batch. reason: in words.
    """

    shared: bool
    mixed: bool
    reason: str


def choose(model: Any) -> Choice:
    """The fastest way that gives an ordinary forward pass's log-probs on a few random tokens, and why.

    A small 16-bit model is probed in float32, where rounding hides nothing.
    """
    eps = max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point())
    if eps > 1e-4 and sum(p.numel() for p in model.parameters()) <= SMALL:
        model = copy.deepcopy(model).float()
    shared = _problem(model, Choice(True, True, ""))
    if shared is None:
        return Choice(True, True, "prompts shared by their completions: equal to ordinary forwards on a probe")
    mixed = _problem(model, Choice(False, True, "")) is None
    reason = f"the model's own generate, because shared prompts do not fit {type(model).__name__} ({shared})"
    return Choice(False, mixed, reason if mixed else f"{reason}; only prompts of equal length together")


def _problem(model: Any, choice: Choice) -> str | None:
    """None where this way gives an ordinary forward's log-probs of what it draws, through every layer; else why not."""
    asked, limit = _probe(text_config(model).vocab_size), Sampling(max_tokens=6)
    try:
        with _ready(model, decode.NAME if choice.shared else None):
            if choice.shared:
                running = Running(model, asked, limit, Ending([]), tokens=30)  # too few for all rows at once
                rows = list(running)
                problem = unreached(running.decoder.windows, text_config(model))
            else:
                rows, problem = list(generated(model, asked, limit, Ending([]), 10_000, choice.mixed)), None
        with _ready(model, None):
            alone = torch.cat([_ordinary_logp(model, [row])[0] for row in rows])  # [K]
            together = torch.cat(_ordinary_logp(model, rows))
    except Exception as error:  # any architecture may fail here in its own way; the reason goes to the log
        text = str(error).splitlines()
        return f"{type(error).__name__}: {text[0][:120] if text else 'no message'}"
    found = torch.tensor([logp for row in rows for logp in row.logp], device=alone.device)
    eps = max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point())
    # rounding as it shows between two ordinary forwards, or as it must be expected
    expected = (64 if eps < 1e-4 else 0.5) * eps * float(alone.abs().mean())
    gap, slack = float((found - alone).abs().mean()), max(4 * float((together - alone).abs().mean()), expected)
    return problem or (None if gap <= slack else f"log-probs differ by {gap:.1e} nats a token")


def unreached(windows: Sequence[int | None], config: Any) -> str | None:
    """Why the attention calls of a step are not all that the model does, or None."""
    layers = config.num_hidden_layers
    if len(windows) != layers:
        return f"{layers - len(windows)} of {layers} layers mix tokens in another way"
    if is_windowed(config) and not any(windows):
        return "its sliding window does not reach the attention function"
    return None


def _probe(vocabulary: int) -> list[Asked]:
    """Three prompts with two, two and one completions of unequal length, so that rows leave and join."""
    token = random.Random(0)
    prompts = [[token.randrange(vocabulary) for _ in range(size)] for size in (7, 4, 1)]
    shapes = [(0, 0, 3), (0, 1, 6), (1, 0, 2), (1, 1, 4), (2, 0, 5)]
    return [Asked(prompts[at], at, number, at, limit) for at, number, limit in shapes]


def _ordinary_logp(model: Any, rows: Sequence[Writing]) -> list[Tensor]:
    """Log-probs of each row's tokens by one forward pass over all, padded on the right."""
    whole = [[*row.asked.prompt, *row.tokens] for row in rows]
    width, device = max(map(len, whole)), next(model.parameters()).device
    ids = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in whole], device=device)  # [B, width]
    mask = torch.tensor([[1] * len(tokens) + [0] * (width - len(tokens)) for tokens in whole], device=device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    logp = torch.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))[:, :-1]
    logp = logp.gather(2, ids[:, 1:, None])[..., 0]  # [B, width - 1]
    return [own[len(row.asked.prompt) - 1 : len(t) - 1] for own, row, t in zip(logp, rows, whole, strict=True)]
