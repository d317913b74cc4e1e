"""What travels between layers and needs nothing but the standard library: errors, examples, run files."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class InputError(ValueError):
    """Something the user gave is wrong. The message says what was found, where, and what to do."""


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
