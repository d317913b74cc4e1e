"""Who writes completions: a model in this process, or an OpenAI-compatible server; and the prompts they are given."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from prefopt import ranks
from prefopt.data import DataOptions, load, read_prompts
from prefopt.data.columns import Record
from prefopt.data.template import Encoder
from prefopt.models.adapters import attached
from prefopt.models.load import ModelOptions
from prefopt.models.load import load as load_model
from prefopt.models.sampler import Local, positions
from prefopt.models.sampling import Sampling
from prefopt.models.server import Server, ServerOptions
from prefopt.models.weights import fingerprint
from prefopt.records import InputError, Message, Sample
from prefopt.rollout.prompts import Prompt
from prefopt.rollout.text import Text, end_tokens

log = logging.getLogger("prefopt")
Unwritten = str  # why there is no completion


class Asked(NamedTuple):
    """A prompt, and what a row for it repeats besides: tools and arguments of the chat template."""

    prompt: Prompt
    shared: dict[str, Any]


class Prompts(NamedTuple):
    """skipped: rows of the source that are no prompts here, by reason. notes: lines for the log."""

    asked: list[Asked]
    skipped: dict[str, int]
    notes: list[str]


class Writer(Protocol):
    """Writes completions of prompts."""

    @property
    def about(self) -> Mapping[str, Any]:
        """Who it is, for the provenance of rows."""
        ...

    def read(self, source: str | Sequence[str], options: DataOptions) -> Prompts:
        """The prompts of a file, or the texts in a list, in the form that it takes."""
        ...

    def write(
        self, prompts: Sequence[Prompt], n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[list[Sample | Unwritten]]:
        """n completions of every prompt, [prompt][completion], in the form of the prompt; completion i is a function
        of the prompt, its seed and i. `Sample.group` is the prompt's place.
        """
        ...

    def close(self) -> None: ...


class LocalWriter:
    """A model in this process. reason: how it draws, for the log."""

    def __init__(self, source: str, adapter: str | None, options: ModelOptions, progress: bool = False) -> None:
        self.model, self.tokenizer = _model(source, adapter, options)
        self.text = Text(self.tokenizer)
        ends = end_tokens(self.model, self.tokenizer)
        self.sampler = Local(self.model, ends, self.tokenizer, progress=progress)
        self.reason = self.sampler.reason
        self.source, self.adapter = source, adapter

    @property
    def about(self) -> dict[str, Any]:
        named = {"model": self.source, **({"adapter": self.adapter} if self.adapter else {})}
        return {**named, "weights": fingerprint(self.model.state_dict().values())}

    def read(self, source: str | Sequence[str], options: DataOptions) -> Prompts:
        """A text of a list is a user's turn where the model has a chat template; in a file it is what it says."""
        if not isinstance(source, str):
            return Prompts(self._texts(source, options), {}, [])
        data = load(source, self.tokenizer, "prompts", options)
        room = positions(self.model)
        asked, skipped, notes = [], Counter(data.dropped), [data.describe()]
        for example, record in zip(data.examples, data.rows, strict=True):
            if room is not None and len(example.prompt) >= room:
                skipped[f"prompt leaves no room in the model's {room:,} positions"] += 1
            else:
                asked.append(_asked(record, example.prompt))
        if len(asked) < len(data.rows):
            notes.append(f"left out {len(data.rows) - len(asked):,} prompts that fill the model's {room:,} positions")
        return Prompts(asked, dict(skipped), notes)

    def _texts(self, texts: Sequence[str], options: DataOptions) -> list[Asked]:
        encoder = Encoder(self.tokenizer, options.chat_template)
        records = [_typed(text, turn=encoder.has_template) for text in texts]
        asked = []
        for record, example in zip(
            records, encoder.encode([encoder.render(r, "prompts") for r in records]), strict=True
        ):
            if isinstance(example, InputError):
                raise example
            asked.append(_asked(record, example.prompt))
        return asked

    def write(
        self, prompts: Sequence[Prompt], n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[list[Sample | Unwritten]]:
        try:
            drawn = self.sampler.sample([prompt.tokens for prompt in prompts], n, sampling, seeds)
        except ValueError as error:
            raise InputError(f"sample: {error}") from None
        return [[*self.text.samples(p, own, at)] for at, (p, own) in enumerate(zip(prompts, drawn, strict=True))]

    def close(self) -> None:
        self.sampler.close()


class ServerWriter:
    """A server. It is asked at once whether it answers: InputError, with its address, where it does not."""

    def __init__(self, options: ServerOptions) -> None:
        self.server = Server(options)
        self.about = {"model": self.server.ping(), "server": self.server.endpoint.url}

    def read(self, source: str | Sequence[str], options: DataOptions) -> Prompts:
        """A text of a list is a user's turn; of a file, texts are completed and messages answered."""
        if not isinstance(source, str):
            return Prompts([_asked(_typed(text, turn=True)) for text in source], {}, [])
        records, shape, counts = read_prompts(source, options)
        plain = [record for record in records if not record.tools]
        skipped = Counter(counts)
        if len(plain) < len(records):
            skipped["tools, which a server is not told of here"] += len(records) - len(plain)
        notes = [f"{source}: {shape}, {len(plain):,} prompts; tokens are counted by the server alone"]
        notes += [f"left out {number:,}: {reason}" for reason, number in skipped.items()]
        return Prompts([_asked(record) for record in plain], dict(skipped), notes)

    def write(
        self, prompts: Sequence[Prompt], n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[list[Sample | Unwritten]]:
        drawn = self.server.sample([prompt.asked for prompt in prompts], n, sampling, seeds)
        return [
            [
                written.why if written.text is None else self._sample(prompt, written.text, written.finished, group)
                for written in own
            ]
            for group, (prompt, own) in enumerate(zip(prompts, drawn, strict=True))
        ]

    def _sample(self, prompt: Prompt, text: str, finished: bool, group: int) -> Sample:
        return Sample(prompt.asked, in_form(prompt.asked, text), (), finished, prompt.columns, group)

    def close(self) -> None:
        self.server.close()


def in_form(prompt: str | Sequence[Message], text: str) -> str | list[Message]:
    """A completion in the form of its prompt: text, or a message of the assistant."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _typed(text: str, turn: bool) -> Record:
    return Record("--prompt", [{"role": "user", "content": text}] if turn else text, [], [])


def _asked(record: Record, tokens: Sequence[int] = ()) -> Asked:
    shared = {"tools": record.tools, "chat_template_kwargs": record.template}
    prompt = Prompt(tokens, record.prompt or "", record.extra, record.where)
    return Asked(prompt, {name: value for name, value in shared.items() if value})


def _model(source: str, adapter: str | None, options: ModelOptions) -> tuple[Any, Any]:
    """Model and tokenizer; `source` may itself be an adapter's directory, which names its base model."""
    if adapter is not None and not (Path(adapter) / "adapter_config.json").is_file():
        raise InputError(f"{adapter}: not an adapter, adapter_config.json is missing; give the folder it was saved in")
    loaded = load_model(source, options, ranks.device())
    folder = adapter or loaded.adapter
    if folder is None:
        return loaded.model, loaded.tokenizer
    return attached(loaded.model, Path(folder)), loaded.tokenizer
