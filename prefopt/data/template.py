"""Records to token ids: the only place that knows chat templates and special tokens.

Prompt and completion are tokenised together. The prompt is what the tokenised prompt and the tokenised whole have in
common, so a token that merges across the boundary belongs to the completion (as in TRL 1.16, `common_prefix_length`).
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from prefopt.data.columns import Message, Record, Span
from prefopt.data.read import RowError
from prefopt.data.shapes import last_reply
from prefopt.records import Example, InputError

TrainOn = Literal["assistant", "completion", "all"]
Side = tuple[list[int], list[bool]]  # token ids, and which of them are trained
Found = dict[tuple[bool, str], tuple[list[int], list[Span]]]  # (plain, text) -> token ids and their spans
GENERATION = re.compile(r"\{%-?\s*generation\b")


@dataclass(frozen=True)
class Rendered:
    """A record as the text the model sees, before tokens.

    prompt: the text to answer, or None where the row is one whole text. wholes: prompt and completion together.
    trained: per whole, character spans the policy wrote; None: all after the prompt.
    masked: token ids and flags where the template itself marks the assistant's tokens (`{% generation %}`).
    plain: not from a chat template, so that the tokenizer adds its own special tokens.
    steps: where each labelled step ends, in characters of the one whole.
    """

    record: Record
    prompt: str | None
    wholes: list[str]
    trained: list[list[Span] | None]
    plain: bool
    masked: tuple[list[int], list[bool]] | None = None
    steps: list[int] | None = None


@dataclass
class Encoder:
    """Tokenises records. step_separator ends each labelled step. notes counts what was met and handled, for the log."""

    tokenizer: Any
    chat_template: str | None = None
    train_on: TrainOn = "assistant"
    notes: Counter[str] = field(default_factory=Counter)
    step_separator: str = "\n"

    def __post_init__(self) -> None:
        self.chat_template = None if self.chat_template is None else template_text(self.chat_template)
        ids = _ids(self.tokenizer, ["a"], special=True)[0]
        self.bos, self.eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        self.adds_bos = self.bos is not None and ids[:1] == [self.bos]
        added = [str(token) for token in self.tokenizer.get_added_vocab()]
        self.specials = tuple({*added, *map(str, self.tokenizer.all_special_tokens)} - {""})
        active = self.chat_template or self.tokenizer.chat_template
        self.has_template = bool(active)
        self.marks_assistant = isinstance(active, str) and GENERATION.search(active) is not None

    # -- text

    def render(self, record: Record, kind: str) -> Rendered:
        """The record as text. RowError where the template refuses it, or the answer cannot be told from the rest."""
        if kind == "prompts":
            return self._only_prompt(record)
        if kind == "steps":
            return self._with_steps(record)
        if record.prompt is None:
            text = record.completions[0]
            return self._conversation(record, text) if isinstance(text, list) else self._text(record, text)
        if isinstance(record.prompt, list):
            return self._reply(record, record.prompt, kind)
        return self._plain(record, record.prompt, kind)

    def _only_prompt(self, record: Record) -> Rendered:
        if isinstance(record.prompt, list):
            return Rendered(record, None, [self._apply(record, record.prompt, answer=True)], [None], plain=False)
        return Rendered(record, None, [record.prompt or ""], [None], plain=True)

    def _with_steps(self, record: Record) -> Rendered:
        """The prompt and all steps, each with its separator, the last one too."""
        asked = self._only_prompt(record)
        [whole], ends = asked.wholes, []
        for step in record.completions:
            assert isinstance(step, str)
            whole += step + self.step_separator
            ends.append(len(whole))
        return replace(asked, prompt=asked.wholes[0], wholes=[whole], steps=ends)

    def _text(self, record: Record, text: str) -> Rendered:
        return Rendered(record, None, [text], [None], plain=True)

    def _plain(self, record: Record, prompt: str, kind: str) -> Rendered:
        texts = [text for text in record.completions if isinstance(text, str)]
        wholes = [prompt + text for text in texts]
        trained = [
            _outside(asides, len(prompt), len(whole)) for asides, whole in zip(record.asides, wholes, strict=False)
        ]
        if kind == "demonstrations" and self.train_on == "all":
            return Rendered(record, None, wholes, [None], plain=True)
        return Rendered(record, prompt, wholes, trained or [None] * len(wholes), plain=True)

    def _reply(self, record: Record, prompt: list[Message], kind: str) -> Rendered:
        asked = self._apply(record, prompt, answer=True)
        wholes, trained = [], []
        for completion in record.completions:
            assert isinstance(completion, list)
            whole = self._apply(record, prompt + completion)
            self._check_whole(record, prompt + completion, whole)
            self._check_history(record, prompt, asked, whole)
            spans = None
            if len(completion) > 1 or completion[0]["role"] != "assistant":
                spans = self._turns(record, prompt + completion, len(prompt), whole)
            wholes.append(whole)
            trained.append(spans)
        if kind == "demonstrations" and self.train_on == "all":
            return Rendered(record, None, wholes, [None], plain=False)
        return Rendered(record, asked, wholes, trained, plain=False)

    def _conversation(self, record: Record, messages: list[Message]) -> Rendered:
        if self.train_on == "completion":
            prompt, reply = last_reply(messages, record.where)
            split = Record(
                record.where, prompt, [reply], record.scores, [], record.tools, record.template, record.extra
            )
            return self._reply(split, prompt, "demonstrations")
        whole = self._apply(record, messages)
        self._check_whole(record, messages, whole)
        if self.train_on == "all":
            return Rendered(record, None, [whole], [None], plain=False)
        if not any(item["role"] == "assistant" for item in messages):
            raise RowError(
                record.where, "no assistant turn", "a conversation needs an answer to train on, or train_on=all"
            )
        if self.marks_assistant:
            return Rendered(record, None, [whole], [None], plain=False, masked=self._marked(record, messages))
        return Rendered(record, None, [whole], [self._turns(record, messages, 0, whole)], plain=False)

    def _apply(self, record: Record, messages: list[Message], answer: bool = False, **more: Any) -> Any:
        arguments = {"tokenize": False, "chat_template": self.chat_template, **record.template, **more}
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=record.tools, add_generation_prompt=answer, **arguments
            )
        except Exception as error:  # a template is a program of the user's: it raises what it likes
            todo = "change the row, or give another chat_template"
            raise RowError(record.where, "the chat template refuses the conversation", todo, str(error)) from error

    def _check_whole(self, record: Record, messages: list[Message], whole: str) -> None:
        """RowError if the template silently leaves out a tool call, a tool's answer or a system turn."""
        called = [_name(call) for item in messages for call in item.get("tool_calls") or []]
        if called and self._apply(record, [_renamed(item) for item in messages]) == whole:
            self._lost(record, f"tool calls ({called[0]})")
        for item in messages:
            # the longest word, since a template may escape or indent what it renders
            word = max(re.findall("[A-Za-z0-9]+", item["content"]), key=len, default="")
            if item["role"] in ("tool", "system") and word not in whole:
                self._lost(record, f"{item['role']} turns")
        if record.tools and not any(_name(tool) in whole for tool in record.tools):
            self.notes["conversations whose tools the chat template leaves out"] += 1

    def _lost(self, record: Record, what: str) -> None:
        raise RowError(record.where, f"the chat template leaves out {what}", "give a chat_template that renders them")

    def _check_history(self, record: Record, prompt: list[Message], asked: str, whole: str) -> None:
        """RowError if the whole conversation renders the turns of the prompt otherwise than the prompt alone does.

        A generation prompt that differs at its end (an empty thought block) is no harm: the completion starts there.
        """
        if whole.startswith(asked):
            return
        history = self._apply(record, prompt).rstrip()
        same = _common(asked, whole)
        if same < len(history):
            self._unstable(record, f"{asked[same : same + 30]!r} became {whole[same : same + 30]!r}")
        self.notes["prompts whose generation prompt differs from the rendered answer: it starts where they differ"] += 1

    def _unstable(self, record: Record, detail: str) -> None:
        todo = "give a chat_template that renders a turn alike whatever follows or has {% generation %}"
        todo += ", or train_on=completion" if record.prompt is None else ""
        raise RowError(record.where, "the chat template rewrites earlier turns", todo, detail)

    def _turns(self, record: Record, messages: list[Message], first: int, whole: str) -> list[Span]:
        """Character spans of the assistant's turns from message `first` on, each with what ends it.

        A turn starts where the conversation before it, rendered to be answered, stops agreeing with the whole.
        It ends where the conversation up to it ends. Where the template renders a last turn otherwise (Qwen 3 adds an
        empty thought block), it ends at the stop token of the conversation's last turn.
        """
        numbers = [n for n, item in enumerate(messages) if item["role"] == "assistant" and n >= first]
        starts = [self._start(record, messages, n, whole) for n in numbers]
        spans = []
        for place, number in enumerate(numbers):
            upto = whole if number + 1 == len(messages) else self._apply(record, messages[: number + 1])
            if whole.startswith(upto):
                end = len(upto)
            else:
                after = starts[place + 1] if place + 1 < len(starts) else len(whole)
                end = self._stop(record, whole, starts[place], after, self._stop_token(messages[numbers[-1]], whole))
            spans.append((starts[place], end))
        return spans

    def _start(self, record: Record, messages: list[Message], number: int, whole: str) -> int:
        if number == 0:
            return max(whole.find(messages[0]["content"].strip()), 0)
        asked = self._apply(record, messages[:number], answer=True)
        same = _common(asked, whole)
        if same < len(asked) and same < len(self._apply(record, messages[:number]).rstrip()):
            self._unstable(record, f"{asked[same : same + 30]!r} became {whole[same : same + 30]!r}")
        return same

    def _stop_token(self, last: Message, whole: str) -> str:
        """The special token that first follows the last answer's text; empty if none does."""
        said = last["content"].strip()
        tail = whole.rfind(said) + len(said)
        places = [(whole.find(token, tail), token) for token in self.specials]
        return min(((place, token) for place, token in places if place >= 0), default=(0, ""))[1]

    def _stop(self, record: Record, whole: str, start: int, before: int, stop: str) -> int:
        """The end of the first stop token after `start`."""
        end = whole.find(stop, start, before) if stop else -1
        if end < 0:
            self._unstable(record, "no stop token tells where an answer ends")
        return end + len(stop)

    def _marked(self, record: Record, messages: list[Message]) -> tuple[list[int], list[bool]]:
        """Token ids and the template's own assistant mask, the token that ends a turn included."""
        more = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        output = self._apply(record, messages, **more)
        ids, mask = list(output["input_ids"]), [bool(flag) for flag in output["assistant_masks"]]
        if not any(mask):
            raise RowError(record.where, "the template's {% generation %} marks no token", "check the chat_template")
        last = max(n for n, flag in enumerate(mask) if flag) + 1
        special = set(self.tokenizer.all_special_ids)
        if last < len(ids) and ids[last] in special and ids[last - 1] not in special:
            self.notes["conversations whose template marks no end of turn: it is trained too"] += 1
            stop = ids[last]
            mask = [flag or (n > 0 and mask[n - 1] and ids[n] == stop) for n, flag in enumerate(mask)]
        return ids, mask

    # -- tokens

    def encode(self, rendered: Sequence[Rendered]) -> list[Example | RowError]:
        """Examples in the order given, a row that cannot be one as its error."""
        offsets = any(item.steps or any(spans is not None for spans in item.trained) for item in rendered)
        found: Found = {}
        for plain in (True, False):
            wanted = [item for item in rendered if item.plain is plain]
            texts = [text for item in wanted for text in [item.prompt, *item.wholes] if text is not None]
            unique = list(dict.fromkeys(texts))
            tokens = self._tokens(unique, plain, offsets)
            found |= {(plain, text): own for text, own in zip(unique, tokens, strict=True)}
        examples: list[Example | RowError] = []
        for item in rendered:
            try:
                examples.append(self._stepwise(item, found) if item.steps else self._example(item, found))
            except RowError as error:
                examples.append(error)
        return examples

    def _tokens(self, texts: list[str], plain: bool, offsets: bool) -> list[tuple[list[int], list[Span]]]:
        if not texts:
            return []
        if offsets and not self.tokenizer.is_fast:
            raise InputError(
                "this tokenizer gives no character offsets, which answers of turns or steps need; use a fast one"
            )
        output = self.tokenizer(
            texts,
            add_special_tokens=plain,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=offsets,
            verbose=False,
        )
        spans = output["offset_mapping"] if offsets else [[]] * len(texts)
        return [(list(ids), list(span)) for ids, span in zip(output["input_ids"], spans, strict=True)]

    def _stepwise(self, item: Rendered, found: Found) -> Example:
        """The tokens of the whole text, each step's label at the last token that ends with the step or before.

        So a label sees no word of the next step, and the text of the first steps, up to a separator, has their tokens.
        No EOS: more steps may follow.
        """
        record, [whole], ends = item.record, item.wholes, item.steps or []
        ids, spans = found[item.plain, whole]
        reached = list(accumulate((end for _, end in spans), max))  # [tokens], characters
        last = [bisect_right(reached, end) - 1 for end in ends]
        while ids[last[-1]] == self.eos and spans[last[-1]] == (0, 0):  # a tokenizer's own EOS is no text
            last[-1] -= 1
        labels = [math.nan] * (last[-1] + 1)
        for at, label in zip(last, record.scores, strict=True):
            labels[at] = label
        side = self._one_bos(ids[: last[-1] + 1]) if item.plain else ids[: last[-1] + 1]
        prompt, [(own, flags)] = self._parted(item, found, [(side, [True] * len(side))])
        labels = labels[-len(own) :]
        if sum(not math.isnan(label) for label in labels) < len(ends):
            raise RowError(record.where, "a step of no token of its own", "give a step_separator that parts the steps")
        return Example(prompt, [own], [min(record.scores)], [flags], record.where, [labels])

    def _example(self, item: Rendered, found: Found) -> Example:
        record, where = item.record, item.record.where
        if item.masked:
            return _trimmed(record, *item.masked)
        ends = bool(record.completions)
        sides = [
            self._side(item, whole, spans, found[item.plain, whole], ends)
            for whole, spans in zip(item.wholes, item.trained, strict=True)
        ]
        if item.prompt is None and not ends:
            return Example(sides[0][0] or self._bos_for(record), [], [], [], where)
        if item.prompt is None:
            return _trimmed(record, *sides[0]) if item.trained[0] is not None else _whole(record, sides[0][0])
        prompt, parts = self._parted(item, found, sides)
        return Example(prompt, [ids for ids, _ in parts], record.scores, [flags for _, flags in parts], where)

    def _parted(self, item: Rendered, found: Found, sides: list[Side]) -> tuple[list[int], list[Side]]:
        """The prompt's tokens, which all sides begin with, and what follows them in each."""
        asked, _ = found[item.plain, item.prompt or ""]
        prompt = self._one_bos(asked) if item.plain else asked
        cut = min(_common(prompt, ids) for ids, _ in sides)
        if item.plain and cut < len(prompt) - (prompt[-1:] == [self.eos]):
            self.notes["prompts whose last token merges with the answer's first: the answer starts with it"] += 1
        if cut == 0:
            sides, cut = self._unprompted(item.record, sides)
        if any(len(ids) == cut for ids, _ in sides):
            raise RowError(item.record.where, "empty completion", "give an answer of at least one token")
        return sides[0][0][:cut], [(ids[cut:], flags[cut:]) for ids, flags in sides]

    def _side(
        self, item: Rendered, whole: str, spans: list[Span] | None, tokens: tuple[list[int], list[Span]], ends: bool
    ) -> Side:
        """Token ids and flags of one whole text, with one BOS and one EOS where it is plain text."""
        ids, offsets = tokens
        flags = [True] * len(ids)
        if spans is not None:
            flags = [any(start < b and a < end for a, b in spans) and start < end for start, end in offsets]
        if item.plain:
            ids, flags = self._one_bos(ids), flags[len(ids) - len(self._one_bos(ids)) :]
            return self._one_eos(ids, flags, ends)
        turns = item.record.completions[0] if item.record.completions else ""
        answered = isinstance(turns, list) and turns[-1]["role"] == "assistant"
        if answered and self.eos is not None and not whole.rstrip().endswith(self.specials):
            self.notes["answers that the chat template ends with no special token: EOS added"] += 1
            return [*ids, self.eos], [*flags, True]
        return ids, flags

    def _one_bos(self, ids: list[int]) -> list[int]:
        """A text that spells its BOS, by a tokenizer that adds one, starts with two: keep one."""
        return ids[1:] if self.adds_bos and ids[:2] == [self.bos, self.bos] else ids

    def _one_eos(self, ids: list[int], flags: list[bool], ends: bool) -> tuple[list[int], list[bool]]:
        """Exactly one EOS at the end of an answer; none at the end of a prompt.

        Its id, not its text, so that it is one token whatever the tokenizer makes of the text.
        """
        if self.eos is None:
            return ids, flags
        num = len(ids)
        while num > 1 and ids[num - 1] == self.eos and (not ends or ids[num - 2] == self.eos):
            num -= 1
        ids, flags = ids[:num], flags[:num]
        if ends and ids[-1:] != [self.eos]:
            return [*ids, self.eos], [*flags, not flags or flags[-1]]
        return ids, flags

    def _unprompted(self, record: Record, sides: list[Side]) -> tuple[list[Side], int]:
        """An empty prompt: BOS stands for it; without one, the first token of a single answer does."""
        if self.bos is None and len(sides) == 1:
            return sides, 1
        start = self._bos_for(record)
        return [([*start, *ids], [False, *flags]) for ids, flags in sides], 1

    def _bos_for(self, record: Record) -> list[int]:
        """BOS, in place of an empty prompt."""
        if self.bos is not None:
            return [self.bos]
        raise RowError(record.where, "the prompt is empty and the tokenizer has no BOS", "give a prompt")


def _name(tool: dict[str, Any]) -> str:
    """The name of a function, or of a call of one, in the wrapper `{"type": "function", "function": ...}` or bare."""
    return str(tool.get("function", tool).get("name", ""))


def _renamed(message: Message) -> Message:
    """The message with its calls naming other functions: a template that renders calls renders it otherwise."""
    calls = [
        {**call, "function": {**call["function"], "name": _name(call) + "_"}}
        if "function" in call
        else {**call, "name": _name(call) + "_"}
        for call in message.get("tool_calls") or []
    ]
    return {**message, "tool_calls": calls} if calls else message


def _whole(record: Record, ids: list[int]) -> Example:
    """Every token trained but the first, which nothing predicts."""
    if len(ids) < 2:
        raise RowError(record.where, "a text of a single token", "nothing can be predicted: drop the row")
    return Example(ids[:1], [ids[1:]], record.scores, [[True] * (len(ids) - 1)], record.where)


def _trimmed(record: Record, ids: list[int], flags: list[bool]) -> Example:
    """The prompt is all before the first trained token; nothing is kept after the last."""
    trained = [n for n, flag in enumerate(flags) if flag and n > 0]
    if not trained:
        raise RowError(record.where, "no token to train on", "check the roles of the conversation")
    first, last = trained[0], trained[-1] + 1
    return Example(ids[:first], [ids[first:last]], record.scores, [flags[first:last]], record.where)


def _common(left: Sequence[Any], right: Sequence[Any]) -> int:
    """The length of the common beginning."""
    if left == right[: len(left)]:
        return len(left)
    return next((n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def _outside(asides: list[Span], start: int, end: int) -> list[Span] | None:
    """What is left of start to end without the asides, which count from start; None if there are none."""
    if not asides:
        return None
    edges = [start, *(start + edge for span in asides for edge in span), end]
    return [(a, b) for a, b in zip(edges[0::2], edges[1::2], strict=True) if a < b]


def _ids(tokenizer: Any, texts: list[str], special: bool = False) -> list[list[int]]:
    return [list(ids) for ids in tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]]


def template_text(path_or_text: str) -> str:
    """A jinja template from its text or from a file. InputError if it is neither."""
    if "{" in path_or_text or "\n" in path_or_text:
        return path_or_text
    path = Path(path_or_text)
    if not path.is_file():
        raise InputError(f"chat_template: {path_or_text} is neither a file nor a template; give a path or jinja text")
    return path.read_text(encoding="utf-8")
