"""Completions as text from an OpenAI-compatible server: for data, not for training, whose tokens must be known."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from prefopt.endpoint import Endpoint, Patience, Reply, key_from, require_name
from prefopt.models.sampling import Sampling
from prefopt.records import InputError, Message

Prompt = str | Sequence[Message]
START = "for example `transformers serve MODEL` or `vllm serve MODEL`"
LENGTH = "max_completion_tokens"  # the name that some chat servers want for max_tokens


@dataclass(frozen=True)
class ServerOptions:
    """A server that completes text (/completions) or answers messages (/chat/completions)."""

    # its address as OpenAI clients take it, /v1 included
    server_url: str = "http://127.0.0.1:8000/v1"
    # the model to ask; empty takes the one model that the server lists
    server_model: str = ""
    # environment variable that holds its key; empty sends none
    server_key_variable: str = ""
    # seconds for one completion, retries included; longer helps long completions and slow servers
    server_timeout: float = 300.0
    # further tries after a busy or failing answer; more help with a flaky server, and take longer
    server_retries: int = 4
    # completions under way at once; more are faster until the server answers 429
    server_concurrency: int = 32
    # completions begun per second; 0 sets no limit
    server_per_second: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.server_timeout < math.inf:
            raise ValueError(f"server_timeout must be seconds above 0, got {self.server_timeout}")
        if self.server_concurrency < 1 or self.server_retries < 0 or not self.server_per_second >= 0:
            raise ValueError("server_concurrency must be at least 1, server_retries and server_per_second at least 0")
        require_name("server_key_variable", self.server_key_variable)


class Written(NamedTuple):
    """text: the completion; None where there is none, and then `why` says the reason. finished: it ended by itself, not
    at max_tokens. model: who wrote it, as the server says.
    """

    text: str | None
    finished: bool = False
    why: str = ""
    model: str = ""


class Server:
    """Draws completions of texts and conversations. counts: what happened on the way."""

    def __init__(self, options: ServerOptions) -> None:
        patience = Patience(
            call=options.server_timeout,
            retries=options.server_retries,
            concurrency=options.server_concurrency,
            per_second=options.server_per_second,
        )
        self.options, self.model, self._length = options, options.server_model, "max_tokens"
        self.endpoint = Endpoint(options.server_url, patience, key_from(options.server_key_variable))

    @property
    def counts(self) -> Counter[str]:
        return self.endpoint.counts

    def ping(self) -> str:
        """The name of the model that answers. InputError, with address and reason, where none does."""
        reply = self.endpoint.ask("/models", seconds=min(10.0, self.options.server_timeout), retries=0)
        if reply.status is None:
            raise InputError(f"no server answers: {reply.why}; start one, {START}, or change server_url")
        if reply.status in (401, 403):
            raise InputError(f"{reply.why}; name the environment variable of the key in server_key_variable")
        names = _names(reply.body)
        if not self.model and len(names) != 1:
            found = ", ".join(names[:8]) or "none"
            raise InputError(f"{self.endpoint.url} lists {len(names)} models ({found}); name one in server_model")
        self.model = self.model or names[0]
        return self.model

    def sample(
        self, prompts: Sequence[Prompt], n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[list[Written]]:
        """n completions of every prompt, [prompt][completion]; one that failed is absent with a reason.

        Each is a request with a seed of its own, so that a server which heeds seeds gives completion i of a prompt
        again whatever else is asked. A stop text is kept where the server tells which one it was.
        """
        if not self.model:
            self.ping()
        tasks = [
            partial(self._one, prompt, sampling, random.Random(f"{seed}/{number}").getrandbits(31))
            for prompt, seed in zip(prompts, seeds, strict=True)
            for number in range(n)
        ]
        rounds = math.ceil(len(tasks) / self.options.server_concurrency)
        seconds = rounds * self.options.server_timeout
        if self.options.server_per_second:
            seconds += len(tasks) / self.options.server_per_second
        late = Written(None, why=f"no completion within {seconds:g} s")
        found = [written or late for written in self.endpoint.gather(tasks, seconds)]
        return [found[at : at + n] for at in range(0, len(found), n)]

    def close(self) -> None:
        self.endpoint.close()

    async def _one(self, prompt: Prompt, sampling: Sampling, seed: int) -> Written:
        length = self._length
        reply = await self._send(prompt, sampling, seed, length)
        if reply.status == 400 and length != LENGTH and LENGTH in reply.why:
            reply = await self._send(prompt, sampling, seed, LENGTH)
            self._length = LENGTH if reply.body is not None else self._length
        return _written(reply)

    async def _send(self, prompt: Prompt, sampling: Sampling, seed: int, length: str) -> Reply:
        asked, path = ({"prompt": prompt}, "/completions")
        if not isinstance(prompt, str):
            asked, path = ({"messages": [dict(turn) for turn in prompt]}, "/chat/completions")
        return await self.endpoint.send(path, {"model": self.model, **asked, **_drawing(sampling, seed, length)})


def _drawing(sampling: Sampling, seed: int, length: str) -> dict[str, Any]:
    """The settings of a request. What only some servers know is sent only where it was asked for."""
    found: dict[str, Any] = {
        length: sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": seed,
    }
    extra = {"top_k": sampling.top_k, "min_p": sampling.min_p, "stop": list(sampling.stop)}
    return found | {name: value for name, value in extra.items() if value}


def _written(reply: Reply) -> Written:
    if reply.body is None:
        return Written(None, why=reply.why)
    try:
        choice = reply.body["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        ended, stop, model = choice.get("finish_reason"), choice.get("stop_reason"), reply.body.get("model")
    except (KeyError, IndexError, TypeError, AttributeError):
        return Written(None, why=f"the server's answer is no completion: {reply.body!r:.120}")
    if not isinstance(text, str):
        return Written(None, why=f"the server's answer has no text: {choice!r:.120}")
    if ended == "content_filter":
        return Written(None, why="the server filtered the completion")
    kept = text + stop if isinstance(stop, str) and not text.endswith(stop) else text
    return Written(kept, ended == "stop", "", str(model or ""))


def _names(body: Any) -> list[str]:
    try:
        return [str(model["id"]) for model in body["data"]]
    except (KeyError, TypeError):
        return []
