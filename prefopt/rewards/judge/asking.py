"""Questions to a chat model that must be answered in JSON: asked once more when unreadable, and kept on disk."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from prefopt.endpoint import Endpoint, Reply, key_from
from prefopt.records import InputError, write_json
from prefopt.rewards.judge.answers import Unreadable, content_of, schema
from prefopt.rewards.judge.options import JudgeOptions

log = logging.getLogger("prefopt")
PING = 10.0  # seconds within which a server says which models it has; asking one to speak gets judge_timeout
PING_TOKENS = 16
CLOSED = {401, 403}
REFUSALS = {400, 415, 422, 501}  # what a server says to a request that holds something it does not know
CACHE_VERSION = 1


class Question(NamedTuple):
    """system, user: what is said. schema: of the answer. read: the answer's text to a verdict; raises Unreadable."""

    system: str
    user: str
    schema: dict[str, Any]
    read: Callable[[str], Any]


class Answer(NamedTuple):
    """value: the verdict; None where there is none, and then `why` says the reason. model: who gave it."""

    value: Any
    why: str = ""
    model: str = ""


class Shape(NamedTuple):
    """What a request may hold: servers differ. length: their name for the longest answer."""

    schema: bool = True
    temperature: bool = True
    length: str = "max_tokens"

    def less(self, why: str) -> Shape | None:
        """The shape without what a server complains of; None where nothing is left to leave out."""
        if self.length == "max_tokens" and "max_completion_tokens" in why:
            return self._replace(length="max_completion_tokens")
        if self.temperature and "temperature" in why:
            return self._replace(temperature=False)
        return self._replace(schema=False) if self.schema else None


class Asker:
    """Asks a judge. counts: what happened, by name. served: the model that answers, as the server calls it."""

    def __init__(self, options: JudgeOptions) -> None:
        self.options, self.counts = options, Counter[str]()
        self.endpoint = Endpoint(options.judge_url, options.patience, key_from(options.judge_key_variable))
        self.model, self.served, self.shape = options.judge_model, "", Shape()

    def ping(self) -> str:
        """The name of the model that answers. InputError, with address and reason, where none does."""
        listed = self.endpoint.ask("/models", seconds=min(PING, self.options.judge_timeout), retries=0)
        if listed.status is None or listed.status in CLOSED:
            raise InputError(f"the judge does not answer: {listed.why}; {self._advice(listed)}")
        self._choose(_names(listed.body))
        seconds = self.options.judge_timeout
        [spoken] = self.endpoint.gather([lambda: self._send(GREETING, "", PING_TOKENS)], seconds)
        if spoken is None or not isinstance(spoken.body, dict):
            reply = spoken or Reply(None, f"no answer within {seconds:g} s")
            raise InputError(f"the judge {self.model!r} does not speak: {reply.why}; {self._advice(reply)}")
        self.served = self.served or str(spoken.body.get("model") or self.model)
        return self.model

    def ask(self, questions: Sequence[Question], seconds: float | None = None) -> list[Answer]:
        """An answer for each question, in their order, within so many seconds (judge_deadline) and never a second more.

        Equal questions are asked once.
        """
        if not self.served and questions:
            self.ping()
        seconds = self.options.judge_deadline if seconds is None else seconds
        keys = [self._key(question) for question in questions]
        first = dict(zip(keys, questions, strict=True))
        tasks = [partial(self._answer, question, key) for key, question in first.items()]
        found = self.endpoint.gather(tasks, seconds)
        known = dict(zip(first, found, strict=True))
        late = sum(answer is None for answer in found)
        self.counts["questions"] += len(first)
        self.counts["late"] += late
        return [known[key] or Answer(None, f"not judged within {seconds:g} s") for key in keys]

    def close(self) -> None:
        self.endpoint.close()

    async def _answer(self, question: Question, key: str) -> Answer:
        kept = self._kept(key, question)
        if kept is not None:
            self.counts["from the cache"] += 1
            return kept
        answer, content = await self._once(question, "")
        if answer.value is None and content is None:
            return answer
        if answer.value is None:
            self.counts["asked again"] += 1
            answer, content = await self._once(question, answer.why)
        if answer.value is not None:
            self._keep(key, content, answer.model)
        return answer

    async def _once(self, question: Question, complaint: str) -> tuple[Answer, str | None]:
        """An answer, and its text; None for the text where asking again would not help."""
        reply = await self._send(question, complaint)
        if reply.body is None:
            self.counts["failed"] += 1
            return Answer(None, reply.why), "" if reply.status == 200 else None
        model = str(reply.body.get("model") or self.model) if isinstance(reply.body, dict) else self.model
        if not self._pinned(model):
            return Answer(None, f"the judge's model changed from {self.served} to {model}"), None
        try:
            content = content_of(reply.body)
            return Answer(question.read(content), "", model), content
        except Unreadable as error:
            self.counts[error.kind] += 1
            return Answer(None, str(error)), ""

    async def _send(self, question: Question, complaint: str, tokens: int | None = None) -> Reply:
        """The server's reply. What it refuses is left out, for good where that helped."""
        shape: Shape | None = self.shape
        while shape is not None:
            reply = await self.endpoint.send("/chat/completions", self._body(question, complaint, shape, tokens))
            if reply.status not in REFUSALS:
                break
            shape = shape.less(reply.why)
        if reply.body is not None and shape is not None and shape != self.shape:
            self.shape = shape
            log.warning("judge: %s takes requests only with %s", self.endpoint.url, shape)
        return reply

    def _body(self, question: Question, complaint: str, shape: Shape, tokens: int | None) -> dict[str, Any]:
        note = (
            f"\n\nYour last reply was of no use ({complaint}). Reply with the JSON object alone." if complaint else ""
        )
        said = [("system", question.system), ("user", question.user + note)]
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": role, "content": text} for role, text in said],
            shape.length: self.options.judge_max_tokens if tokens is None else tokens,
        }
        if shape.temperature:
            body["temperature"] = self.options.judge_temperature
        if shape.schema:
            wanted = {"name": "verdict", "strict": True, "schema": question.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": wanted}
        return body

    def _pinned(self, model: str) -> bool:
        """Whether the model is the one that answered first: scores of two judges are not on one scale."""
        if model == self.served:
            return True
        if not self.counts["model changed"]:
            log.warning("judge: %s answers as %s, no longer as %s", self.endpoint.url, model, self.served)
        self.counts["model changed"] += 1
        return False

    def _choose(self, names: list[str]) -> None:
        """The model to ask, among those that the server lists."""
        if not self.model and len(names) != 1:
            found = ", ".join(names[:8]) or "none"
            raise InputError(f"{self.endpoint.url} lists {len(names)} models ({found}); name one in judge_model")
        if self.model and names and self.model not in names:
            near = difflib.get_close_matches(self.model, names, 3, 0.3) or names[:3]
            log.warning("judge: %s does not list %s, but %s", self.endpoint.url, self.model, ", ".join(near))
        self.model = self.model or names[0]

    def _advice(self, reply: Reply) -> str:
        if reply.status in CLOSED:
            name = self.options.judge_key_variable
            return f"check the key in {name}" if name else "name the variable that holds its key in judge_key_variable"
        return "start it, or change judge_url" if reply.status is None else "change judge_model, or the server"

    # -- answers kept on disk, one file each, so that several processes can share them

    def _key(self, question: Question) -> str:
        options = self.options
        asked = [CACHE_VERSION, options.judge_url, self.model, options.judge_temperature, options.judge_max_tokens]
        said = json.dumps([*asked, question.system, question.user, question.schema], sort_keys=True)
        return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()

    def _file(self, key: str) -> Path:
        return Path(self.options.judge_cache) / key[:2] / f"{key}.json"

    def _kept(self, key: str, question: Question) -> Answer | None:
        """The answer in the cache, read as strictly as a new one; None where there is none that can be read."""
        if not self.options.judge_cache:
            return None
        try:
            kept = json.loads(self._file(key).read_text(encoding="utf-8"))
            content, model = kept["content"], kept["model"]
            if not isinstance(content, str) or model != self.served:
                return None
            return Answer(question.read(content), "", model)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def _keep(self, key: str, content: str | None, model: str) -> None:
        if not self.options.judge_cache:
            return
        try:
            write_json(self._file(key), {"model": model, "content": content})
        except (OSError, ValueError) as error:
            if not self.counts["not kept"]:
                log.warning("judge: answers cannot be kept in %s: %s", self.options.judge_cache, error)
            self.counts["not kept"] += 1


GREETING = Question("You answer in JSON.", 'Reply with {"ready": true}.', schema({"ready": {"type": "boolean"}}), str)


def _names(body: Any) -> list[str]:
    try:
        return [str(model["id"]) for model in body["data"]]
    except (KeyError, TypeError):
        return []
