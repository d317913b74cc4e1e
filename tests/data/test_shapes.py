"""Conventions: each is detected, said and brought to one form; what breaks it is named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from chat_styles import assistant, user
from hypothesis import given
from hypothesis import strategies as st

from prefopt.data.columns import Dropped, Record
from prefopt.data.read import Row, RowError
from prefopt.data.shapes import Reader
from prefopt.data.turns import common_text

TALK = [user("a"), assistant("b"), user("c"), assistant("d")]
CALL = {"type": "function", "function": {"name": "find", "arguments": {"x": 1}}}


def read(*rows: dict[str, Any], chat: bool = True) -> tuple[str, str, list[Record]]:
    """The kind, the words and the records of rows."""
    reader = Reader(chat)
    records = [record for n, row in enumerate(rows, 1) for record in reader.records(Row(f"r.jsonl:{n}", row))]
    assert reader.shape
    return reader.shape.kind, reader.how, records


def one(row: dict[str, Any], chat: bool = True) -> tuple[Any, list[Any], list[float]]:
    [record] = read(row, chat=chat)[2]
    return record.prompt, record.completions, record.scores


KINDS: dict[str, tuple[dict[str, Any], str, str]] = {
    "pair": ({"prompt": "p", "chosen": "a", "rejected": "b"}, "pairs", "prompt/chosen/rejected, text"),
    "chat pair": (
        {"prompt": TALK[:1], "chosen": TALK[1:2], "rejected": TALK[3:]},
        "pairs",
        "prompt/chosen/rejected, conversational",
    ),
    "implicit": (
        {"chosen": "the cat sat", "rejected": "the cat ran"},
        "pairs",
        "chosen/rejected with an implicit prompt, text, cut after the last common word",
    ),
    "implicit chat": (
        {"chosen": TALK, "rejected": [*TALK[:3], assistant("e")]},
        "pairs",
        "chosen/rejected with an implicit prompt, conversational, cut after the last common message",
    ),
    "transcript": (
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
        "pairs",
        "chosen/rejected with an implicit prompt, text, cut after the last common turn",
    ),
    "messages": ({"messages": TALK}, "demonstrations", "messages, conversational"),
    "completion": ({"prompt": "p", "completion": "a"}, "demonstrations", "prompt/completion, text"),
    "label": ({"prompt": "p", "completion": "a", "label": True}, "labels", "prompt/completion/label, text"),
    "prompt": ({"prompt": "p", "answer": "7"}, "prompts", "prompt, text"),
    "alpaca": (
        {"instruction": "i", "input": "", "output": "o"},
        "demonstrations",
        "instruction/output, conversational",
    ),
    "text": ({"text": "t"}, "demonstrations", "text, text"),
    "kto": ({"messages": TALK, "kto_tag": False}, "labels", "messages/label, conversational"),
    "tools": ({"messages": TALK, "tools": [CALL]}, "demonstrations", "messages, conversational, with tools"),
    "steps": (
        {"prompt": "p", "completions": ["a", "b"], "labels": [True, False]},
        "steps",
        "prompt/completions/labels, text",
    ),
    "rated": (
        {"prompt": "p", "completions": ["a", "b"], "scores": [1, 2.5]},
        "ratings",
        "prompt/rated completions, text",
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_shape_is_detected_and_said(name: str) -> None:
    row, kind, words = KINDS[name]
    assert read(row)[:2] == (kind, words)


def test_other_columns_are_kept() -> None:
    [record] = read({"prompt": "p", "answer": "7", "level": 3})[2]
    assert record.extra == {"answer": "7", "level": 3}
    assert record.completions == []


def test_conversations_with_from_and_value_become_messages() -> None:
    turns = [("system", "s"), ("human", "a"), ("function_call", '{"name": "find", "arguments": {"x": 1}}')]
    turns += [("observation", "7"), ("gpt", "d")]
    _, [messages], _ = one({"conversations": [{"from": role, "value": text} for role, text in turns]})
    assert [item["role"] for item in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert messages[2] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert messages[3]["content"] == "7"


def test_tools_may_be_json_text_and_bare_functions_get_their_wrapper() -> None:
    function = {"name": "find", "parameters": {}}
    row = {
        "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        "tools": json.dumps([function]),
    }
    [record] = read(row)[2]
    assert record.tools == [{"type": "function", "function": function}]
    [record] = read({"messages": TALK, "tools": json.dumps([CALL])})[2]
    assert record.tools == [CALL]
    with pytest.raises(RowError, match=r"r.jsonl:1: 'tools' is not JSON"):
        read({"messages": TALK, "tools": "{"})


def test_the_pair_form_of_llama_factory() -> None:
    row = {"conversations": [{"from": "human", "value": "a"}]}
    row |= {name: {"from": "gpt", "value": name} for name in ("chosen", "rejected")}  # type: ignore[misc]
    assert one(row) == ([user("a")], [[assistant("chosen")], [assistant("rejected")]], [1.0, 0.0])


def test_a_prompt_beside_whole_conversations_is_not_said_twice() -> None:
    row = {"prompt": "a", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}
    for prompt in ("a", [user("a")]):
        assert one(row | {"prompt": prompt}) == ([user("a")], [[assistant("b")], [assistant("c")]], [1.0, 0.0])


def test_labelled_messages_are_cut_after_the_last_user_turn() -> None:
    assert one({"messages": TALK, "label": False}) == (TALK[:3], [TALK[3:]], [0.0])
    assert one({"messages": [*TALK, user("bye")], "label": True}) == (TALK[:3], [TALK[3:]], [1.0])


def test_instructions_are_a_conversation_with_a_template_and_headings_without() -> None:
    row = {"instruction": "add", "input": "1 2", "output": "3", "system": "s", "history": [["q", "r"]]}
    before = [{"role": "system", "content": "s"}, user("q"), assistant("r")]
    assert one(row) == ([*before, user("add\n1 2")], [[assistant("3")]], [1.0])
    bare = {"instruction": "add", "input": "1 2", "output": "3"}
    assert one(bare, chat=False)[0] == "### Instruction:\nadd\n\n### Input:\n1 2\n\n### Response:\n"
    assert one(bare | {"input": ""}, chat=False)[:2] == ("### Instruction:\nadd\n\n### Response:\n", ["3"])


def test_rated_completions_in_their_forms() -> None:
    want = ("p", ["a", "b"], [1.0, 3.0])
    assert one({"prompt": "p", "completions": ["a", "b"], "scores": [1, 3]}) == want
    assert one({"prompt": "p", "completions": ["a", "b"], "ratings": [1, 3]}) == want
    items = [{"response": "a", "overall_score": 1}, {"response": "b", "overall_score": 3}]
    assert one({"instruction": "p", "completions": items})[1:] == ([[assistant("a")], [assistant("b")]], [1.0, 3.0])
    with pytest.raises(RowError, match="completions and scores differ in number: 2 completions, 1 scores"):
        read({"prompt": "p", "completions": ["a", "b"], "scores": [1]})
    unrated = one({"prompt": "p", "completions": ["a", "b"]})[2]  # to be scored; to learn from them is refused
    assert len(unrated) == 2 and all(map(math.isnan, unrated))


def test_a_pair_has_its_own_scores_where_the_row_gives_both() -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "score_rejected": 2}
    assert one(row)[2] == one(row | {"score_chosen": None})[2] == [1.0, 0.0]
    assert one(row | {"score_chosen": 3})[2] == [3.0, 2.0]
    assert one({"instruction": "p", "chosen": "a", "rejected": "b", "score_chosen": 3, "score_rejected": 2})[2] == [
        3,
        2,
    ]
    with pytest.raises(RowError, match="'score_chosen' is true or false; a number is expected"):
        read(row | {"score_chosen": True})


def test_conversations_are_cut_where_both_still_answer() -> None:
    longer = [*TALK, user("e"), assistant("f")]
    assert one({"chosen": longer, "rejected": TALK})[:2] == (TALK[:3], [longer[3:], TALK[3:]])
    other = [*TALK[:2], user("x"), assistant("d")]
    assert one({"chosen": TALK, "rejected": other})[:2] == (TALK[:1], [TALK[1:], other[1:]])
    with pytest.raises(RowError, match="chosen and rejected share no first message"):
        read({"chosen": TALK, "rejected": [user("z"), assistant("b")]})


def test_a_human_s_turn_inside_an_answer_of_a_transcript_is_set_aside() -> None:
    start, more = "\n\nHuman: a\n\nAssistant:", " b\n\nHuman: c\n\nAssistant: d"
    [record] = read({"chosen": start + more, "rejected": start + " e"})[2]
    assert record.prompt == start and record.completions == [more, " e"]
    [[(first, last)], none] = record.asides
    assert more[:first] + "|" + more[last:] == " b| d" and none == []


def test_a_transcript_that_parts_in_a_human_s_turn_is_cut_at_the_answer_before() -> None:
    chosen = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d"
    prompt, answers, _ = one({"chosen": chosen, "rejected": chosen.replace("c", "e")})
    assert prompt == "\n\nHuman: a\n\nAssistant:"
    assert answers[0] == " b\n\nHuman: c\n\nAssistant: d"


WORD_CUTS = [
    ("the cat sat", "the cat ran", "the cat"),
    ("the cats", "the cat's", "the"),
    ("the catalogue", "the catastrophe", "the"),
    ("same start", "same start and more", "same"),
    ("Q: 1\nyes", "Q: 1\nno", "Q: 1\n"),
    ("one", "two", ""),
    ("今日は晴れ", "今日は雨", "今日は"),
    ("e\u0301te\u0301 a", "e\u0301te b", ""),
    ("say 👩\u200d🔬 now", "say 👩 now", "say"),
]


@pytest.mark.parametrize(("chosen", "rejected", "prompt"), WORD_CUTS)
def test_an_implicit_prompt_of_plain_text_ends_between_words(chosen: str, rejected: str, prompt: str) -> None:
    for a, b in ((chosen, rejected), (rejected, chosen)):
        assert a[: common_text(a, b).at] == prompt


@given(st.text("ab c\n", max_size=12), st.text("ab c\n", max_size=8), st.text("ab c\n", max_size=8))
def test_an_implicit_prompt_is_shared_and_splits_no_word(start: str, chosen: str, rejected: str) -> None:
    texts = (start + chosen, start + rejected)
    at = common_text(*texts).at
    assert texts[0][:at] == texts[1][:at]
    for text in texts:
        assert not (at and text[at - 1 : at].isalpha() and text[at : at + 1].isalpha())


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "null": ({"chosen": None}, "'chosen' is null; text or a list of messages is expected"),
    "number": ({"chosen": 3}, "'chosen' is a number"),
    "missing": ({"chosen": ...}, r"'chosen' is missing; the first row \(r.jsonl:1\) is prompt/chosen/rejected"),
    "mixed": ({"chosen": TALK[1:2], "rejected": TALK[3:]}, "mixed shapes: 'chosen' is messages, text at r.jsonl:1"),
    "half a surrogate": ({"chosen": "\ud83d"}, "half of a surrogate pair"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.fault(12)
def test_a_wrong_row_is_named_with_what_it_holds(name: str) -> None:
    change, message = WRONG[name]
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    bad = {key: value for key, value in (good | change).items() if value is not ...}
    with pytest.raises(RowError, match=f"^r.jsonl:2: {message}"):
        read(good, bad)


MESSAGES: dict[str, tuple[Any, str]] = {
    "text": ("hello", "'messages' is text; text or a list of messages is expected"),
    "empty": ([], "'messages' is an empty list"),
    "not objects": (["a"], r"messages\[0\] is text; a message with role and content"),
    "no role": ([{"content": "a"}], r"messages\[0\] has no role"),
    "null content": ([user("a"), {"role": "assistant", "content": None}], r"messages\[1\]: content is null"),
    "image": ([{"role": "user", "content": [{"type": "image"}]}], r"messages\[0\]: content is a list with parts"),
    "call": ([{"from": "function_call", "value": "find("}], "the function call is not JSON"),
}


@pytest.mark.parametrize("name", MESSAGES)
@pytest.mark.fault(12)
def test_a_wrong_message_is_named_by_its_place(name: str) -> None:
    value, message = MESSAGES[name]
    with pytest.raises(RowError, match=message):
        read({"messages": value})


def test_parts_that_are_text_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert one({"messages": [{"role": "user", "content": parts}, assistant("c")]})[1] == [[user("ab"), assistant("c")]]


GUESSES = {"true": "text: 'true'", 2: "a number: 2", 0.5: "a number: 0.5", None: "null", float("nan"): "a number: nan"}


@pytest.mark.parametrize("label", GUESSES)
def test_a_label_is_never_guessed_and_what_was_found_is_shown(label: Any) -> None:
    with pytest.raises(RowError, match=f"'label' is {GUESSES[label]}; true or false is expected"):
        read({"prompt": "p", "completion": "a", "label": label})
    with pytest.raises(RowError, match=rf"'label' is text: '{'no' * 19}n\.\.\.; true or false is expected"):
        read({"prompt": "p", "completion": "a", "label": "no" * 500})


def test_labels_of_a_table_whose_column_has_gaps_are_labels() -> None:
    for label in (1.0, 0.0):
        assert one({"prompt": "p", "completion": "a", "label": label}) == ("p", ["a"], [label])
        cells = {"prompt": "p", "completion": "a", "label": str(label)}
        assert Reader(chat=True).records(Row("r.csv:2", cells, untyped=True))[0].scores == [label]


def test_csv_cells_are_read_as_what_the_column_holds() -> None:
    reader = Reader(chat=True)
    cells = {"prompt": "5", "completion": "true", "label": "False"}
    [record] = reader.records(Row("r.csv:2", cells, untyped=True))
    assert (record.prompt, record.completions, record.scores) == ("5", ["true"], [0.0])
    [record] = Reader(chat=True).records(Row("r.csv:2", {"messages": json.dumps(TALK)}, untyped=True))
    assert record.completions == [TALK]


def test_unknown_columns_are_named_with_the_known_conventions() -> None:
    with pytest.raises(RowError, match=r"the columns follow no known convention: good, bad; name them with map"):
        read({"good": "a", "bad": "b"})


def test_an_empty_answer_is_dropped() -> None:
    for empty in ("", " \n", [assistant(" ")]):
        prompt: Any = "p" if isinstance(empty, str) else [user("p")]
        other: Any = "a" if isinstance(empty, str) else [assistant("a")]
        with pytest.raises(Dropped, match="empty completion"):
            read({"prompt": prompt, "chosen": other, "rejected": empty})


def test_trees_are_read_nested_and_flat(tmp_path: Path) -> None:
    nested = {"message_id": "1", "parent_id": None, "text": "q", "role": "prompter"}
    replies = [
        {"message_id": str(n), "parent_id": "1", "text": f"a{n}", "role": "assistant", "rank": n - 2, "replies": []}
        for n in (2, 3)
    ]
    want = ([user("q")], [[assistant("a2")], [assistant("a3")]], [0.0, -1.0])
    assert one({**nested, "replies": replies}) == want
    assert one({"message_tree_id": "1", "prompt": {**nested, "replies": replies}}) == want
    assert one({**nested, "replies": replies}, chat=False)[:2] == ("\n\nHuman: q\n\nAssistant:", [" a2", " a3"])
