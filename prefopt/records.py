"""What travels between layers and needs nothing but the standard library: errors, examples, run files."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

Message = Mapping[str, Any]  # {"role": ..., "content": ...}


class InputError(ValueError):
    """Something the user gave is wrong. The message says what was found, where, and what to do, and no secret."""

    def __init__(self, *said: Any) -> None:
        super().__init__(*map(without_secrets, said))


class NotFinite(InputError):
    """A model has come to numbers that are none, and does not come back from there."""


@dataclass(frozen=True)
class Example:
    """One prompt with the completions it owns, as token ids: a row of every offline method.

    prompt: token ids, at least one (a completion's first token is predicted from the prompt's last).
    completions: 1 for demonstrations and labels, 2 for pairs, K for ratings; each at least one token.
    scores: one number per completion; higher is better. Pairs: 1.0 chosen, 0.0 rejected. Labels: 1.0 good, 0.0 bad.
      Demonstrations: 1.0. NaN = could not be scored.
    trained: per completion, per token: False where the policy did not write the token (tool output, user turns).
    where: `file:line`, for messages.
    steps: per completion, per token: the label of a step at its last token (1.0 right, 0.0 wrong, or a share), NaN
      elsewhere; None where nothing is labelled by steps.
    """

    prompt: list[int]
    completions: list[list[int]]
    scores: list[float]
    trained: list[list[bool]]
    where: str = ""
    steps: list[list[float]] | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt once and of every completion."""
        return len(self.prompt) + sum(map(len, self.completions))


@dataclass(frozen=True)
class Sample:
    """A completion that is to be scored.

    prompt, completion: text, or messages where the prompt is messages. tokens: the completion's token ids, empty where
    they are not known. finished: it ended by itself, not at the length limit. columns: the other columns of the
    prompt's row (an answer, tests). group: samples of equal group answer the same prompt.
    """

    prompt: str | Sequence[Message]
    completion: str | Sequence[Message]
    tokens: Sequence[int] = ()
    finished: bool = True
    columns: Mapping[str, Any] = field(default_factory=dict)
    group: int = 0

    @property
    def text(self) -> str:
        """The completion as one text: the contents of its messages, one after the other."""
        return text_of(self.completion)


class Score(NamedTuple):
    """value: the reward; None = could not be scored, and then `why` says the reason. Never a made-up number.

    parts: what the value is made of, by name, to be logged; None where a part could not be scored.
    """

    value: float | None
    why: str = ""
    parts: Mapping[str, float | None] = {}


class Reward(Protocol):
    """Scores whole batches, so that code, judges and models can work on many samples at once.

    The result has one score for each sample, in their order. It returns within its deadline, whatever a sample does.
    """

    name: str

    def __call__(self, samples: Sequence[Sample]) -> list[Score]: ...

    def close(self) -> None:
        """Let go of processes, connections and files."""
        ...


def text_of(said: str | Sequence[Message]) -> str:
    """Text, or messages as their contents one after the other."""
    return said if isinstance(said, str) else "\n".join(str(turn.get("content") or "") for turn in said)


# ---------------------------------------------------------------- secrets

HIDDEN = "***"
LEAST = 8  # characters of a secret; what is shorter would be found in ordinary words
LOGIN = re.compile(r"(?<=://)[^\s/?#'\"<>]+@")  # in an address
QUERY = re.compile(r"(?<=[?&])([\w-]*(?:token|key|secret|password|signature)[\w-]*=)[^&#\s'\"]+", re.IGNORECASE)
VARIABLE = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD)$", re.IGNORECASE)  # names of environment variables that hold one

_kept: set[str] = set()


def keep_secret(value: str) -> None:
    """From here on `discreet` hides this value too."""
    if len(value) >= LEAST:
        _kept.add(value)


def discreet(text: str) -> str:
    """`text` without the logins and keys in addresses, the values of variables such as HF_TOKEN, and kept secrets."""
    text = QUERY.sub(rf"\g<1>{HIDDEN}", LOGIN.sub(f"{HIDDEN}@", text))
    held = {value for name, value in os.environ.items() if len(value) >= LEAST and VARIABLE.search(name)}
    for secret in sorted(_kept | held, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def without_secrets(value: Any) -> Any:
    """`value`, a tree of dicts and lists, with every text in it `discreet`."""
    if isinstance(value, str):
        return discreet(value)
    if isinstance(value, dict):
        return {name: without_secrets(item) for name, item in value.items()}
    return type(value)(map(without_secrets, value)) if type(value) in (list, tuple) else value


class Discreet(logging.Filter):
    """Keeps secrets out of what the program logs."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = discreet(record.getMessage()), ()
        return True


logging.getLogger("prefopt").addFilter(Discreet())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON through a temporary file, so a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def append_json(path: Path, value: Any) -> None:
    """Append `value` as one line of JSON."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(plain(value), ensure_ascii=False) + "\n")


def plain(value: Any) -> Any:
    """`value` with every non-finite float as None: `NaN` is not JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
