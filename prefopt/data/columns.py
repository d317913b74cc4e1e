"""One row's columns, checked: text, messages, numbers and labels in their one form, or the error that names them."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from typing import Any

from prefopt.data.read import Row, RowError, kind_of

Message = dict[str, Any]
Text = str | list[Message]
Span = tuple[int, int]

LARGEST = 3.4e38  # scores are kept in single precision
SHOWN = 40  # characters of a value that an error shows

ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "function_call",
    "system": "system",
    "developer": "developer",
    "observation": "tool",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
}


@dataclass(frozen=True)
class Record:
    """A prompt and the completions it owns, not yet tokenised.

    prompt: text or messages; None where the row is one whole text or conversation (`text`, `messages`).
    completions, scores: as in `prefopt.records.Example`; no completion in a prompt-only row. Where a row's answer is
    labelled by steps: the steps and their labels.
    asides: per completion, character spans of a text that the policy did not write (a Human turn of a transcript).
    tools, template: what the chat template is given besides the messages. extra: the row's other columns, and the
    scores that a pair came with; all its columns where prompts alone were asked for.
    """

    where: str
    prompt: Text | None
    completions: list[Text]
    scores: list[float]
    asides: list[list[Span]] = field(default_factory=list)
    tools: list[Any] | None = None
    template: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


class Dropped(Exception):
    """A row that is well-formed but cannot be trained on; its reason is counted, whatever `skip_bad` says."""


class Columns:
    """A row's columns with checks: a getter returns the value in its one form or raises the RowError that names it."""

    def __init__(self, row: Row, chat: bool) -> None:
        self.row, self.where, self.values, self.chat = row, row.where, row.values, chat

    def wrong(self, column: str, todo: str) -> RowError:
        if column not in self.values:
            return RowError(self.where, f"{column!r} is missing", todo)
        return RowError(self.where, f"{column!r} is {kind_of(self.values[column])}", todo)

    def name(self, *columns: str) -> str:
        """The first of these columns that the row has."""
        return next((column for column in columns if column in self.values), columns[0])

    def text(self, column: str) -> str:
        value = self.values.get(column)
        if not isinstance(value, str):
            raise self.wrong(column, "text is expected")
        return value

    def any(self, column: str) -> Text:
        """Text, or messages."""
        value = self.values.get(column)
        if isinstance(value, str) and not (self.row.untyped and value.lstrip().startswith('[{"')):
            return value
        return self.messages(column)

    def messages(self, column: str) -> list[Message]:
        value = self.values.get(column)
        if self.row.untyped and isinstance(value, str):
            value = self.json(column)
        value = [value] if isinstance(value, dict) else value
        if not isinstance(value, list):
            raise self.wrong(column, "text or a list of messages is expected")
        if not value:
            raise RowError(self.where, f"{column!r} is an empty list", "give at least one message")
        return [message(item, f"{column}[{number}]", self.where) for number, item in enumerate(value)]

    def json(self, column: str) -> Any:
        try:
            return json.loads(self.values[column])
        except (ValueError, RecursionError):
            raise RowError(self.where, f"{column!r} is not JSON", "write it as JSON text") from None

    def number(self, column: str) -> float:
        value = self.values.get(column)
        if self.row.untyped and isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                raise self.wrong(column, "a number is expected") from None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.wrong(column, "a number is expected")
        if not abs(value) <= LARGEST:  # NaN too
            todo = f"give a finite number, {LARGEST:.0e} at most, or drop the row"
            raise RowError(self.where, f"{column!r} is out of range", todo, str(value))
        return single(value)

    def flag(self, column: str) -> float:
        """A label: true or false, 1 or 0 (in CSV, those words)."""
        value = self.values.get(column)
        if self.row.untyped and isinstance(value, str):
            words = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
            value = words.get(value.strip().lower(), value)
        if isinstance(value, (bool, int, float)) and value in (0, 1):  # a table's column with gaps holds 1.0 and 0.0
            return float(value)
        raise self._no_label(column, "true or false is expected")

    def share(self, column: str) -> float:
        """A label that may lie in between: true or false, or a number from 0 to 1."""
        value = self.values.get(column)
        if isinstance(value, (bool, int, float)) and 0 <= value <= 1:
            return float(value)
        raise self._no_label(column, "true or false, or a number from 0 to 1, is expected")

    def _no_label(self, column: str, todo: str) -> RowError:
        value = self.values.get(column)
        if not isinstance(value, (str, int, float)) or isinstance(value, bool):
            return self.wrong(column, todo)
        shown = repr(value)
        shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."
        return RowError(self.where, f"{column!r} is {kind_of(value)}", todo, shown)

    def record(self, prompt: Text | None, completions: list[Text], scores: list[float], **more: Any) -> Record:
        """A record with this row's tools and template arguments."""
        tools = self.values.get("tools")
        if isinstance(tools, str):
            tools = self.json("tools") if tools.strip() else None
        if tools is not None and not isinstance(tools, list):
            raise self.wrong("tools", "a list of functions, or JSON text of one, is expected")
        if "conversations" in self.values and tools:
            tools = [tool if "type" in tool else {"type": "function", "function": tool} for tool in tools]
        template = self.values.get("chat_template_kwargs") or {}
        return Record(self.where, prompt, completions, scores, tools=tools or None, template=template, **more)


def single(value: float) -> float:
    """The number that single precision keeps of `value`, as its shortest decimal: 4.2 stays 4.2.

    Numbers that training cannot tell apart are equal from here on.
    """
    kept = struct.pack("f", value)
    [exact] = struct.unpack("f", kept)
    decimals = (float(f"{exact:.{digits}g}") for digits in range(6, 10))  # 9 digits tell any two apart
    return next(decimal for decimal in decimals if struct.pack("f", decimal) == kept)


def message(value: Any, column: str, where: str) -> Message:
    """A message in the one form, from role/content or from/value. Keys that hold null are left out."""
    if not isinstance(value, dict):
        raise RowError(where, f"{column} is {kind_of(value)}", "a message with role and content is expected")
    value = {key: item for key, item in value.items() if item is not None}
    if "from" in value or ("value" in value and "role" not in value):
        value = {{"from": "role", "value": "content"}.get(key, key): item for key, item in value.items()}
    role = value.get("role")
    if not isinstance(role, str):
        raise RowError(where, f"{column} has no role", "give each message role and content, or from and value")
    content = _content(value.get("content", "" if "tool_calls" in value else None), column, where)
    role = ROLES.get(role, role)
    if role == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(content, column, where)}
    return {**value, "role": role, "content": content}


def _content(value: Any, column: str, where: str) -> str:
    if isinstance(value, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
        return "".join(part["text"] for part in value)
    if not isinstance(value, str):
        found = "a list with parts that are not text" if isinstance(value, list) else kind_of(value)
        raise RowError(where, f"{column}: content is {found}", "text is expected")
    return value


def _calls(content: str, column: str, where: str) -> list[dict[str, Any]]:
    """sharegpt's function_call, JSON text of one call or several, as tool calls."""
    try:
        calls = json.loads(content)
    except ValueError:
        raise RowError(
            where, f"{column}: the function call is not JSON", 'write {"name": ..., "arguments": ...}'
        ) from None
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        raise RowError(where, f"{column}: the function call has no name", 'write {"name": ..., "arguments": ...}')
    return [{"type": "function", "function": {"name": c["name"], "arguments": c.get("arguments", {})}} for c in calls]
