"""Rows to records: the column conventions people use, detected, said, and brought to one form.

A record is a prompt with scored completions, each either text or a list of `{"role", "content"}` messages.
TRL's column names mean what they mean there; the rest is brought to them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from prefopt.data.columns import ROLES, Columns, Dropped, Message, Record, Text
from prefopt.data.read import Row, RowError, kind_of
from prefopt.data.turns import common_messages, common_text, common_turns, is_transcript

Parse = Callable[[Columns], list[Record]]


@dataclass(frozen=True)
class Shape:
    """A convention of column names.

    kind: what its rows are. needs: its columns (`a|b`: either). parse: how a row is read. texts: the columns that are
    text or messages, in every row alike. reads: columns it takes where a row has them. every_pair: see `convert`.
    marked: its scores say right (1) or wrong (0), so that each answer has a label of its own.
    """

    name: str
    kind: str
    needs: tuple[str, ...]
    parse: Parse
    texts: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    every_pair: bool = False
    marked: bool = False


# -- one function per convention


def _pair(c: Columns) -> list[Record]:
    chosen, rejected = c.any("chosen"), c.any("rejected")
    scores = _pair_scores(c)
    if type(chosen) is not type(rejected):
        raise RowError(c.where, "'chosen' and 'rejected' are of different forms", "give text or messages for both")
    if "prompt" not in c.values:
        return [_implicit(c, chosen, rejected, scores)]
    prompt = c.any("prompt")
    if isinstance(prompt, str) and isinstance(chosen, list) and isinstance(rejected, list):
        if len(chosen) > 1 and chosen[0] == rejected[0]:  # the whole conversation beside its first message
            return [_implicit(c, chosen, rejected, scores)]
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list) and isinstance(chosen, str) and isinstance(rejected, str):
        chosen, rejected = _said(chosen), _said(rejected)
    if prompt and all(isinstance(side, list) and side[: len(prompt)] == prompt for side in (chosen, rejected)):
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]  # whole conversations beside their prompt
    return [c.record(prompt, [chosen, rejected], scores)]


def _said(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


def _pair_scores(c: Columns) -> list[float]:
    """The two scores where the row has both, else 1 for chosen and 0 for rejected."""
    if c.values.get("score_chosen") is None or c.values.get("score_rejected") is None:
        return [1.0, 0.0]
    return [c.number("score_chosen"), c.number("score_rejected")]


def _implicit(c: Columns, chosen: Text, rejected: Text, scores: list[float]) -> Record:
    if chosen == rejected:
        raise Dropped("chosen and rejected are equal")
    if isinstance(chosen, list) and isinstance(rejected, list):
        num = common_messages(chosen, rejected)
        if not num:
            raise RowError(c.where, "chosen and rejected share no first message", "give the prompt in its own column")
        return c.record(chosen[:num], [chosen[num:], rejected[num:]], scores)
    assert isinstance(chosen, str) and isinstance(rejected, str)
    if is_transcript(chosen) and is_transcript(rejected):
        cut = common_turns(chosen, rejected)
        if cut is None:
            raise RowError(
                c.where, "the two transcripts share no turn before an answer", "give the prompt in its own column"
            )
    else:
        cut = common_text(chosen, rejected)
    return c.record(chosen[: cut.at], [chosen[cut.at :], rejected[cut.at :]], scores, asides=cut.asides)


def _conversation_pair(c: Columns) -> list[Record]:
    column = c.name("conversations", "messages")
    return [c.record(c.messages(column), [_reply(c, "chosen"), _reply(c, "rejected")], [1.0, 0.0])]


def _reply(c: Columns, column: str) -> list[Message]:
    value = c.any(column)
    return _said(value) if isinstance(value, str) else value


def _messages(c: Columns) -> list[Record]:
    return [c.record(None, [c.messages(c.name("messages", "conversations"))], [1.0])]


def _labelled_messages(c: Columns) -> list[Record]:
    prompt, completion = last_reply(c.messages(c.name("messages", "conversations")), c.where)
    return [c.record(prompt, [completion], [c.flag(c.name("label", "kto_tag"))])]


def last_reply(messages: list[Message], where: str) -> tuple[list[Message], list[Message]]:
    """A conversation cut after the user's last turn that is answered; what follows the answer is left out."""
    answers = [number for number, item in enumerate(messages) if item["role"] == "assistant"]
    if not answers:
        raise RowError(where, "no assistant turn", "a conversation needs an answer to train on")
    users = [number for number, item in enumerate(messages[: answers[-1]]) if item["role"] == "user"]
    cut = users[-1] + 1 if users else answers[0]
    if not cut:
        raise RowError(where, "the conversation starts with its only answer", "put a user or system turn before it")
    return messages[:cut], messages[cut : answers[-1] + 1]


def _completion(c: Columns) -> list[Record]:
    prompt, completion = c.any("prompt"), c.any("completion")
    if type(prompt) is not type(completion):
        raise RowError(c.where, "'prompt' and 'completion' are of different forms", "give text or messages for both")
    score = c.flag(c.name("label", "kto_tag")) if "label" in c.values or "kto_tag" in c.values else 1.0
    return [c.record(prompt, [completion], [score])]


def _rated(c: Columns) -> list[Record]:
    """`completions` with `scores` or `ratings`, or completions that are objects with their own score.

    NaN for those that nobody has scored.
    """
    prompt = c.any("prompt") if "prompt" in c.values else None
    completions, column = c.values.get("completions"), c.name("scores", "ratings")
    if not isinstance(completions, list):
        raise c.wrong("completions", "a list of completions is expected")
    if column in c.values:
        scores = c.values[column]
        if not isinstance(scores, list):
            raise c.wrong(column, "a list of numbers is expected")
        if len(scores) != len(completions):
            found = f"{len(completions)} completions, {len(scores)} {column}"
            raise RowError(c.where, f"completions and {column} differ in number", "give one score each", found)
        items = [{"completion": item, "score": score} for item, score in zip(completions, scores, strict=True)]
    else:
        items = [_rated_item(item) for item in completions]
    inner = [Columns(Row(c.where, item), c.chat) for item in items]
    texts = [item.any("completion") for item in inner]
    scores = [item.number("score") if "score" in item.values else math.nan for item in inner]
    if prompt is None:
        return [_instructed(c, texts, scores)]
    if isinstance(prompt, list):
        texts = [_said(text) if isinstance(text, str) else text for text in texts]
    return [c.record(prompt, texts, scores)]


def _rated_item(item: Any) -> dict[str, Any]:
    if not isinstance(item, dict):
        return {"completion": item}
    text = next((item[key] for key in ("response", "completion", "text", "content") if key in item), None)
    scores = [item[key] for key in ("score", "rating", "overall_score") if key in item]
    return {"completion": text, **({"score": scores[0]} if scores else {})}


def _steps(c: Columns) -> list[Record]:
    """The steps of one answer in `completions`, each with a label: the record's completions and scores are theirs."""
    prompt, steps, labels = c.any("prompt"), c.values.get("completions"), c.values.get("labels")
    if not isinstance(steps, list) or not steps:
        raise c.wrong("completions", "a list of at least one step is expected")
    if not isinstance(labels, list):
        raise c.wrong("labels", "a list with a label for each step is expected")
    if len(labels) != len(steps):
        found = f"{len(steps)} steps, {len(labels)} labels"
        raise RowError(c.where, "steps and labels differ in number", "give one label each", found)
    inner = [
        Columns(Row(c.where, {"step": step, "label": label}), c.chat) for step, label in zip(steps, labels, strict=True)
    ]
    texts: list[Text] = [item.text("step") for item in inner]
    empty = [number for number, text in enumerate(texts) if not _content_of(text)]
    if empty:
        raise RowError(c.where, "a step is empty", "leave it out, with its label", f"completions[{empty[0]}]")
    return [c.record(prompt, texts, [item.share("label") for item in inner])]


def _instruction(c: Columns) -> list[Record]:
    if "chosen" in c.values and "rejected" in c.values:
        return [_instructed(c, [c.text("chosen"), c.text("rejected")], _pair_scores(c))]
    label = c.name("label", "kto_tag")
    score = c.flag(label) if label in c.values else 1.0
    return [_instructed(c, [c.text("output")], [score])]


def _instructed(c: Columns, answers: list[Text], scores: list[float]) -> Record:
    """Alpaca: instruction, input, and optionally system and history. A conversation where the tokenizer has a chat
    template, otherwise text under `### Instruction:`, `### Input:`, `### Response:` headings."""
    instruction, given = c.text("instruction"), c.text("input") if c.values.get("input") is not None else ""
    history = c.values.get("history") or []
    if c.chat or history or c.values.get("system"):
        turns = [{"role": "system", "content": c.text("system")}] if c.values.get("system") else []
        for asked, answered in history:
            turns += [{"role": "user", "content": asked}, *_said(answered)]
        turns.append({"role": "user", "content": f"{instruction}\n{given}" if given else instruction})
        return c.record(turns, [_said(text) if isinstance(text, str) else text for text in answers], scores)
    prompt = f"### Instruction:\n{instruction}\n\n"
    prompt += f"### Input:\n{given}\n\n" if given else ""
    return c.record(prompt + "### Response:\n", answers, scores)


def _question(c: Columns, answers: list[str], scores: list[float]) -> Record:
    question = c.text("question")
    if c.chat:
        return c.record([{"role": "user", "content": question}], [_said(text) for text in answers], scores)
    return c.record(question + "\n", list(answers), scores)


def _answered(c: Columns) -> list[Record]:
    return [_question(c, [c.text("answer")], [1.0])]


def _is_solution(value: Any) -> bool:
    return isinstance(value, dict) and {"is_correct", "solution"} <= value.keys()


def _solutions(c: Columns) -> list[Record]:
    """One question with columns `{"solution", "is_correct"}`, one per model: right answers score 1, wrong ones 0."""
    inner = [Columns(Row(c.where, value), c.chat) for value in c.values.values() if _is_solution(value)]
    return [_question(c, [item.text("solution") for item in inner], [item.flag("is_correct") for item in inner])]


def _text(c: Columns) -> list[Record]:
    return [c.record(None, [c.text("text")], [1.0])]


def _prompt(c: Columns) -> list[Record]:
    return [c.record(c.any("prompt"), [], [])]


def _tree(c: Columns) -> list[Record]:
    """An OpenAssistant tree: every turn with ranked answers, rank 0 the best, as one record with scores -rank."""
    root = c.values["prompt"] if isinstance(c.values.get("prompt"), dict) else c.values
    try:
        return list(_branches(c, root, []))
    except RecursionError:
        raise RowError(c.where, "the tree is too deep", "drop it") from None


def _branches(c: Columns, node: dict[str, Any], before: list[Message]) -> Iterator[Record]:
    inner = Columns(Row(c.where, node), c.chat)
    role = ROLES.get(inner.text("role"), "")
    if role not in ("user", "assistant"):
        raise RowError(c.where, "a message of the tree has an unknown role", "prompter or assistant is expected")
    path = [*before, {"role": role, "content": inner.text("text")}]
    replies = node.get("replies") or []
    if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
        raise RowError(c.where, "the replies to a message are no messages", "a list of objects is expected")
    ranked = [reply for reply in replies if reply.get("rank") is not None and reply.get("role") == "assistant"]
    if ranked:
        answers = [Columns(Row(c.where, reply), c.chat) for reply in ranked]
        prompt, texts = _dialogue(path, [answer.text("text") for answer in answers], c.chat)
        yield Record(c.where, prompt, texts, [-answer.number("rank") for answer in answers])
    for reply in replies:
        yield from _branches(c, reply, path)


def _dialogue(path: list[Message], answers: list[str], chat: bool) -> tuple[Text, list[Text]]:
    """Messages where there is a chat template, otherwise a Human/Assistant transcript."""
    if chat:
        return path, [_said(text) for text in answers]
    names = {"user": "Human", "assistant": "Assistant"}
    text = "".join(f"\n\n{names[item['role']]}: {item['content']}" for item in path)
    return text + "\n\nAssistant:", [f" {answer}" for answer in answers]


_PAIR = ("chosen", "rejected")
_SCORED = ("score_chosen", "score_rejected")
_ALPACA = ("input", "system", "history")
_LABEL = "label|kto_tag"
_RATED = "scores|ratings"
_CHAT = "messages|conversations"
_ALWAYS = ("tools", "chat_template_kwargs")

SHAPES: tuple[Shape, ...] = (
    Shape("an OpenAssistant message tree", "ratings", ("message_tree_id", "prompt"), _tree, every_pair=True),
    Shape("an OpenAssistant message tree", "ratings", ("message_id", "text", "role"), _tree, every_pair=True),
    Shape("question and solutions with is_correct", "ratings", ("question", "(solution)"), _solutions, marked=True),
    Shape("conversations/chosen/rejected", "pairs", (_CHAT, *_PAIR), _conversation_pair, _PAIR),
    Shape("messages/label", "labels", (_CHAT, _LABEL), _labelled_messages),
    Shape("instruction/chosen/rejected", "pairs", ("instruction", *_PAIR), _instruction, _PAIR, (*_ALPACA, *_SCORED)),
    Shape("instruction/rated completions", "ratings", ("instruction", "completions"), _rated, (), _ALPACA),
    Shape("instruction/output/label", "labels", ("instruction", "output", _LABEL), _instruction, ("output",), _ALPACA),
    Shape("instruction/output", "demonstrations", ("instruction", "output"), _instruction, ("output",), _ALPACA),
    Shape("prompt/chosen/rejected", "pairs", ("prompt", *_PAIR), _pair, ("prompt", *_PAIR), _SCORED),
    Shape("chosen/rejected with an implicit prompt", "pairs", _PAIR, _pair, _PAIR, _SCORED),
    Shape("prompt/rated completions", "ratings", ("prompt", "completions", _RATED), _rated, ("prompt",)),
    Shape("prompt/completions/labels", "steps", ("prompt", "completions", "labels"), _steps, ("prompt",)),
    Shape("prompt/rated completions", "ratings", ("prompt", "completions"), _rated, ("prompt",)),
    Shape("prompt/completion/label", "labels", ("prompt", "completion", _LABEL), _completion, ("prompt", "completion")),
    Shape("prompt/completion", "demonstrations", ("prompt", "completion"), _completion, ("prompt", "completion")),
    Shape("messages", "demonstrations", (_CHAT,), _messages),
    Shape("question/answer", "demonstrations", ("question", "answer"), _answered, ("question", "answer")),
    Shape("text", "demonstrations", ("text",), _text, ("text",)),
    Shape("prompt", "prompts", ("prompt",), _prompt, ("prompt",)),
)


def _columns(shape: Shape) -> set[str]:
    """Every column the convention takes."""
    return {name for need in shape.needs for name in need.split("|")} | {*shape.reads, *_ALWAYS}


KNOWN = {name for shape in SHAPES for name in _columns(shape)} - {"(solution)"}


def has(values: dict[str, Any], need: str) -> bool:
    if need == "(solution)":
        return any(_is_solution(value) for value in values.values())
    return any(name in values for name in need.split("|"))


def detect(row: Row) -> Shape:
    """The convention whose columns the row has. RowError, naming its columns, if none."""
    for shape in SHAPES:
        if all(has(row.values, need) for need in shape.needs):
            return shape
    names = ", ".join(row.values) or "none"
    todo = "name them with map, for example --map chosen=good; conventions: " + "; ".join(
        dict.fromkeys(
            "/".join(need.split("|")[0] for need in shape.needs) for shape in SHAPES if "(" not in shape.needs[-1]
        )
    )
    raise RowError(row.where, "the columns follow no known convention", todo, names)


def form(value: Any) -> str:
    """Text or messages, to tell string rows from conversational ones."""
    if isinstance(value, (list, dict)):
        return "messages"
    return "text" if isinstance(value, str) else kind_of(value)


class Reader:
    """Turns rows into records; the first row decides the shape, and every later one must have it.

    whole: a record's `extra` holds all columns of its row, as what scores new answers to a prompt may read any of them.
    notes: completions left out of rows that are kept, by reason.
    """

    def __init__(self, chat: bool, whole: bool = False) -> None:
        self.chat, self.whole = chat, whole
        self.shape: Shape | None = None
        self.first = ""
        self.forms: dict[str, str] = {}
        self.how = ""
        self.notes: Counter[str] = Counter()

    def records(self, row: Row) -> list[Record]:
        """RowError if the row is wrong or has another shape; Dropped if nothing can be learnt from it."""
        shape = self.shape or detect(row)
        forms = {name: form(row.values.get(name)) for name in shape.texts if name in row.values}
        if self.shape is None:
            records = self._parse(shape, row)
            self.shape, self.first, self.forms = shape, row.where, forms
            self.how = self._words(records)
            return records
        self._same(row, forms)
        return self._parse(shape, row)

    def _parse(self, shape: Shape, row: Row) -> list[Record]:
        records = shape.parse(Columns(row, self.chat))
        if not records:
            raise Dropped("no ranked answer")
        kept = [filled for record in records if (filled := _filled(record, shape))]
        if not kept:
            raise Dropped("empty completion")
        for record in kept:
            _check_unicode(record)
        before, after = (sum(len(record.completions) for record in part) for part in (records, kept))
        self.notes["completions left out of a rated row, as empty"] += before - after
        taken = set() if self.whole else _columns(shape) - {*_SCORED}
        extra = {name: value for name, value in row.values.items() if name not in taken}
        return [replace(record, extra=extra) for record in kept]

    def _same(self, row: Row, forms: dict[str, str]) -> None:
        """RowError, naming both lines, unless the row has the columns and forms of the first."""
        assert self.shape
        missing = [need for need in self.shape.needs if not has(row.values, need)]
        if missing:
            name = missing[0].split("|")[0]
            todo = f"the first row ({self.first}) is {self.shape.name}; complete the row, or split the file"
            raise RowError(row.where, f"{name!r} is missing", todo)
        for name, found in forms.items():
            usual = self.forms.get(name, found)
            if found != usual and {found, usual} == {"text", "messages"}:
                todo = "give text rows and conversations their own files"
                raise RowError(row.where, f"mixed shapes: {name!r} is {found}, {usual} at {self.first}", todo)

    def _words(self, records: list[Record]) -> str:
        assert self.shape
        if not records:
            return self.shape.name
        record = records[0]
        conversational = any(isinstance(item, list) for item in [record.prompt, *record.completions])
        words = f"{self.shape.name}, {'conversational' if conversational else 'text'}"
        if "implicit" in self.shape.name and not conversational:
            source = record.prompt if isinstance(record.prompt, str) else ""
            turns = is_transcript(source)
            words += ", cut after the last common turn" if turns else ", cut after the last common word"
        elif "implicit" in self.shape.name:
            words += ", cut after the last common message"
        return words + (", with tools" if record.tools else "")


def _filled(record: Record, shape: Shape) -> Record | None:
    """The record without empty completions; None where some are and no two rated ones are left."""
    full = [number for number, text in enumerate(record.completions) if _content_of(text)]
    if len(full) == len(record.completions):
        return record if full or shape.kind == "prompts" else None
    if shape.kind != "ratings" or len(full) < 2:
        return None
    completions, scores = [record.completions[n] for n in full], [record.scores[n] for n in full]
    return replace(record, completions=completions, scores=scores)


def _content_of(text: Text) -> bool:
    """Whether there is anything in a completion to learn."""
    if isinstance(text, str):
        return bool(text.strip())
    return any(item["content"].strip() or item.get("tool_calls") for item in text)


def _check_unicode(record: Record) -> None:
    """RowError on half of a surrogate pair: no tokenizer takes it, and it cannot be written back as UTF-8."""
    texts = [item for item in [record.prompt, *record.completions] if item is not None]
    for text in texts:
        for piece in [text] if isinstance(text, str) else [item["content"] for item in text]:
            try:
                piece.encode("utf-8")
            except UnicodeEncodeError:
                raise RowError(
                    record.where, "half of a surrogate pair in a text", "write the character whole"
                ) from None


def grow(rows: list[Row]) -> Iterator[Row | RowError]:
    """OpenAssistant messages one per row (message_id, parent_id) as one nested row per tree.

    A message whose id is taken, or that hangs on no tree, is the RowError that names it.
    """
    nodes: dict[str, dict[str, Any]] = {}
    kept = []
    for row in rows:
        name = str(row.values["message_id"])
        if name in nodes:
            yield RowError(row.where, "duplicate message_id", "keep one of the messages", name)
        else:
            nodes[name] = {**row.values, "replies": []}
            kept.append(row)
    reached = _joined(nodes)
    for row in kept:
        name, parent = str(row.values["message_id"]), row.values["parent_id"]
        if parent is None:
            yield replace(row, values=nodes[name])
        elif str(parent) not in nodes:
            yield RowError(row.where, "parent_id names no message of the file", "keep whole trees", str(parent))
        elif name not in reached:
            yield RowError(row.where, "the message hangs on no tree", "a message above it is missing: keep whole trees")


def _joined(nodes: dict[str, dict[str, Any]]) -> set[str]:
    """The ids that a first message leads to, once every node is put among the replies of its parent."""
    for node in nodes.values():
        if node["parent_id"] is not None and str(node["parent_id"]) in nodes:
            nodes[str(node["parent_id"])]["replies"].append(node)
    reached: set[str] = set()
    waiting = [node for node in nodes.values() if node["parent_id"] is None]
    while waiting:
        node = waiting.pop()
        reached.add(str(node["message_id"]))
        waiting += node["replies"]
    return reached
