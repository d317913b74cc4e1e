"""Tokenisation traps: boundary merges, BOS and EOS once, templates that rewrite, who wrote which token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_styles import (
    CHATML,
    COUNTS_TURNS,
    GEMMA,
    LAST_TURN_THINKS,
    LLAMA3,
    MARKED,
    MARKED_WITHOUT_STOP,
    NO_STOP,
    PROMPT_THINKS,
    STYLES,
    assistant,
    build,
    user,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.data import DataOptions, load, template_text
from prefopt.data.columns import Record
from prefopt.data.template import Encoder
from prefopt.records import Example, InputError

TALK = [user("a fox"), assistant("the key"), user("old tree"), assistant("shiny sun")]


def one(tokenizer: Any, prompt: Any, *completions: Any, kind: str = "demonstrations", **options: Any) -> Example:
    """The example of one record."""
    record = Record("rows.jsonl:1", prompt, list(completions), [1.0, 0.0][: len(completions)])
    encoder = Encoder(tokenizer, **options)
    [example] = encoder.encode([encoder.render(record, kind)])
    if isinstance(example, InputError):
        raise example
    return example


def trained_text(tokenizer: Any, example: Example) -> list[str]:
    """The trained runs of the only completion, as text."""
    runs: list[list[int]] = []
    before = False
    for token, flag in zip(example.completions[0], example.trained[0], strict=True):
        if flag:
            runs = runs if before else [*runs, []]
            runs[-1].append(token)
        before = flag
    return [tokenizer.decode(run) for run in runs]


def test_a_token_that_merges_across_the_boundary_belongs_to_the_answer() -> None:
    tokenizer = build()
    whole = tokenizer("the fox</s>")["input_ids"]  # " fox" is one token; "the " alone ends in a space token
    example = one(tokenizer, "the ", "fox")
    assert tokenizer.decode(example.prompt) == "the"
    assert example.prompt + example.completions[0] == whole


def test_pairs_share_the_prompt_that_both_answers_leave_whole() -> None:
    tokenizer = build()
    for answers in (
        ("fox", "\nkey"),
        ("\nkey", "fox"),
    ):  # the space of "the " merges with fox, and not with a line break
        example = one(tokenizer, "the ", *answers, kind="pairs")
        assert tokenizer.decode(example.prompt) == "the"
        for text, tokens in zip(answers, example.completions, strict=True):
            assert example.prompt + tokens == tokenizer(f"the {text}</s>")["input_ids"]


@pytest.mark.parametrize("text", ["the key", "the key</s>", "the key</s></s>"])
@pytest.mark.parametrize("own", [False, True])
def test_an_answer_ends_in_exactly_one_eos_and_it_is_trained(text: str, own: bool) -> None:
    """Also where the tokenizer adds one of its own."""
    tokenizer = with_own_eos(build()) if own else build()
    example = one(tokenizer, "a fox", text)
    assert example.completions[0].count(tokenizer.eos_token_id) == 1
    assert example.completions[0][-1] == tokenizer.eos_token_id
    assert example.trained[0][-1]
    assert tokenizer.eos_token_id not in example.prompt


def with_own_eos(tokenizer: Any) -> Any:
    from tokenizers import processors

    processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer.backend_tokenizer.post_processor = processor
    return tokenizer


def test_a_prompt_to_be_answered_ends_in_no_eos() -> None:
    assert with_own_eos(build()).eos_token_id not in one(with_own_eos(build()), "a fox", kind="prompts").prompt


@pytest.mark.fault(38)
def test_eos_is_trained_where_it_is_also_the_pad_token() -> None:
    tokenizer = build(pad_token="</s>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert one(tokenizer, "a fox", "the key").trained[0] == [True] * len(one(tokenizer, "a fox", "the key").trained[0])


@pytest.mark.fault(38)
def test_an_eos_that_is_not_read_back_from_text_is_appended_as_its_id() -> None:
    tokenizer = build()
    tokenizer.split_special_tokens = True  # "</s>" in a text is now letters
    example = one(tokenizer, "a fox", "the key")
    assert example.completions[0][-1] == tokenizer.eos_token_id
    assert tokenizer.decode(example.completions[0][:-1]) == "the key"


@pytest.mark.fault(38)
def test_a_tokenizer_without_eos_trains_the_text_alone() -> None:
    example = one(build(eos_token=None), "a fox", " the key")
    assert build().decode(example.completions[0]) == " the key"


@pytest.mark.parametrize("prompt", ["a fox", "<s>a fox"])
def test_bos_comes_once_where_the_text_spells_it(prompt: str) -> None:
    example = one(build(adds_bos=True), prompt, " the key")
    assert example.prompt.count(build().bos_token_id) == 1
    assert example.prompt[0] == build().bos_token_id


def test_bos_comes_once_where_the_template_writes_it() -> None:
    tokenizer = build(LLAMA3, adds_bos=True)
    example = one(tokenizer, [user("a fox")], [assistant("the key")])
    assert (example.prompt + example.completions[0]).count(tokenizer.bos_token_id) == 1


def test_an_empty_prompt_is_bos_or_the_first_token_or_refused() -> None:
    with_bos, without = build(), build(bos=None)
    assert one(with_bos, "", "the key").prompt == [with_bos.bos_token_id]
    assert (
        without.decode(one(without, "", "the key").prompt + one(without, "", "the key").completions[0]) == "the key</s>"
    )
    with pytest.raises(InputError, match=r"rows.jsonl:1: the prompt is empty and the tokenizer has no BOS"):
        one(without, "", "the key", "fox", kind="pairs")


def test_an_empty_prompt_to_be_answered_is_bos_or_refused() -> None:
    assert one(build(), "", kind="prompts").prompt == [build().bos_token_id]
    with pytest.raises(InputError, match="the prompt is empty and the tokenizer has no BOS"):
        one(build(bos=None), "", kind="prompts")


def test_plain_text_trains_on_all_after_its_first_token() -> None:
    tokenizer = build(adds_bos=True)
    example = one(tokenizer, None, "the old fox")
    assert example.prompt == [tokenizer.bos_token_id]
    assert tokenizer.decode(example.completions[0]) == "the old fox</s>"
    assert all(example.trained[0])


def space_marked() -> Any:
    """A tokenizer like stories260K's: every text starts with a space mark."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {c: n for n, c in enumerate("▁thefoxky", 3)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_the_space_mark_of_every_text_does_not_come_between_prompt_and_answer() -> None:
    tokenizer = space_marked()
    example = one(tokenizer, "the fo", "x key")
    assert tokenizer.convert_ids_to_tokens(example.prompt) == list("▁the▁fo")
    assert tokenizer.convert_ids_to_tokens(example.completions[0]) == [*"x▁key", "</s>"]


@pytest.mark.parametrize("style", STYLES)
def test_messages_train_on_what_the_assistant_wrote_in_every_turn(style: str) -> None:
    tokenizer = build(STYLES[style])
    first, last = trained_text(tokenizer, one(tokenizer, None, TALK))
    assert first.strip().startswith("the key") and last.strip().startswith("shiny sun")
    ends = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "mistral": "</s>"}
    assert all(turn.rstrip().endswith(ends[style]) for turn in (first, last))


@pytest.mark.parametrize("style", STYLES)
def test_one_turn_as_messages_or_as_prompt_and_completion_is_the_same_example(style: str) -> None:
    tokenizer = build(STYLES[style])
    assert one(tokenizer, None, TALK[:2]) == one(tokenizer, TALK[:1], TALK[1:2])


def test_train_on_completion_trains_the_last_answer_only() -> None:
    tokenizer = build(CHATML)
    example = one(tokenizer, None, TALK, train_on="completion")
    assert trained_text(tokenizer, example) == ["shiny sun<|im_end|>\n"]
    assert example == one(tokenizer, TALK[:3], TALK[3:])


def test_train_on_all_trains_every_token_but_the_first() -> None:
    tokenizer = build(CHATML)
    for example in (one(tokenizer, None, TALK, train_on="all"), one(tokenizer, TALK[:3], TALK[3:], train_on="all")):
        assert len(example.prompt) == 1
        assert all(example.trained[0])
        assert tokenizer.decode(example.prompt + example.completions[0]).count("<|im_start|>") == 4


def test_tool_output_and_user_turns_inside_a_completion_are_not_trained() -> None:
    tokenizer = build(CHATML)
    completion = [
        assistant("the key"),
        {"role": "tool", "content": "rain"},
        assistant("the sun"),
        user("a"),
        assistant("x=1;"),
    ]
    example = one(tokenizer, [user("a fox")], completion, completion[:1], kind="pairs")
    assert trained_text(tokenizer, example) == ["the key<|im_end|>\n", "the sun<|im_end|>\n", "x=1;<|im_end|>\n"]


def test_a_human_s_turn_inside_a_text_answer_is_not_trained() -> None:
    tokenizer, answer = build(adds_bos=True), " b\n\nHuman: a\n\nAssistant: fox"
    record = Record("r:1", "a key", [answer], [1.0], asides=[[(2, answer.index(" fox"))]])
    encoder = Encoder(tokenizer)
    [example] = encoder.encode([encoder.render(record, "demonstrations")])
    assert isinstance(example, Example)
    assert trained_text(tokenizer, example) == [" b", " fox</s>"]


def test_eos_is_not_trained_after_a_human_s_turn() -> None:
    tokenizer, answer = build(adds_bos=True), " b\n\nHuman: a"
    record = Record("r:1", "a key", [answer], [1.0], asides=[[(2, len(answer))]])
    encoder = Encoder(tokenizer)
    [example] = encoder.encode([encoder.render(record, "demonstrations")])
    assert isinstance(example, Example)
    assert trained_text(tokenizer, example) == [" b"]


def test_a_template_that_marks_its_assistant_is_believed() -> None:
    tokenizer = build(MARKED)
    assert trained_text(tokenizer, one(tokenizer, None, TALK)) == ["the key<|im_end|>", "shiny sun<|im_end|>"]


def test_a_marking_template_that_forgets_the_end_of_turn_still_teaches_to_stop() -> None:
    tokenizer = build(MARKED_WITHOUT_STOP)
    assert trained_text(tokenizer, one(tokenizer, None, TALK)) == ["the key<|im_end|>", "shiny sun<|im_end|>"]


def test_a_template_that_renders_its_last_turn_otherwise_is_handled() -> None:
    """Qwen 3 puts a thought block in the last turn only: turns end at the stop token, not where a shorter text ends."""
    tokenizer = build(LAST_TURN_THINKS)
    first, last = trained_text(tokenizer, one(tokenizer, None, TALK))
    assert first == "the key<|im_end|>"
    assert last == "<think>\n\n</think>\n\nshiny sun<|im_end|>\n"


def test_a_template_that_ends_its_last_turn_twice_is_handled() -> None:
    """Phi 3 puts EOS after the last end of turn: the token that ends a turn is the one that first follows its text."""
    tokenizer = build(CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}")
    assert trained_text(tokenizer, one(tokenizer, None, TALK)) == ["the key<|im_end|>", "shiny sun<|im_end|>\n</s>"]


def test_a_generation_prompt_that_the_answer_drops_starts_the_answer_where_they_differ() -> None:
    tokenizer = build(PROMPT_THINKS)
    example = one(tokenizer, [user("a fox")], [assistant("the key")])
    assert tokenizer.decode(example.prompt) == "<|im_start|>user\na fox<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(example.completions[0]) == "the key<|im_end|>\n"


@pytest.mark.parametrize("record", [(None, TALK), (TALK[:1], TALK[1:2])])
@pytest.mark.fault(38)
def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_reason(record: tuple[Any, Any]) -> None:
    with pytest.raises(InputError, match=r"rows.jsonl:1: the chat template rewrites earlier turns: '1.* became '"):
        one(build(COUNTS_TURNS), *record)


@pytest.mark.fault(38)
def test_a_template_without_stop_token_gets_eos_and_it_is_counted() -> None:
    tokenizer = build(NO_STOP)
    encoder = Encoder(tokenizer)
    [example] = encoder.encode(
        [encoder.render(Record("r:1", [user("a fox")], [[assistant("key")]], [1.0]), "demonstrations")]
    )
    assert isinstance(example, Example)
    assert example.completions[0][-1] == tokenizer.eos_token_id and example.trained[0][-1]
    assert sum(encoder.notes.values()) == 1


@pytest.mark.fault(38)
def test_what_the_template_refuses_is_said_with_its_own_words() -> None:
    with pytest.raises(
        InputError, match=r"rows.jsonl:1: the chat template refuses the conversation: roles must alternate"
    ):
        one(build(GEMMA), [user("a"), user("b")], [assistant("c")])


def test_a_template_that_drops_a_tool_call_or_a_system_turn_is_refused() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "find_key"}}]}
    assert "find_key" in trained_text(build(CHATML), one(build(CHATML), [user("a fox")], [call]))[0]
    for question in ("a fox", "find_key"):
        with pytest.raises(InputError, match=r"leaves out tool calls \(find_key\)"):
            one(build(LLAMA3), [user(question)], [call])
    silent = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    with pytest.raises(InputError, match="leaves out system turns"):
        one(build(silent), [{"role": "system", "content": "old"}, user("a fox")], [assistant("key")])


def test_a_tool_s_answer_may_be_escaped_by_the_template_and_missing_tools_are_noted() -> None:
    escaped = CHATML.replace("m['content'] +", "(m['content'] | tojson if m['role'] == 'tool' else m['content']) +")
    tokenizer = build(escaped)
    messages = [user("a"), {"role": "tool", "content": '{"key": "old"}'}, assistant("b")]
    encoder = Encoder(tokenizer)
    encoder.render(Record("r:1", None, [messages], [1.0]), "demonstrations")
    assert not encoder.notes
    encoder.render(Record("r:1", None, [messages], [1.0], tools=[{"function": {"name": "find"}}]), "demonstrations")
    assert list(encoder.notes) == ["conversations whose tools the chat template leaves out"]


@pytest.mark.fault(38)
def test_a_chat_without_a_template_says_how_to_give_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": TALK}))
    with pytest.raises(InputError, match=r"the tokenizer has no chat template; give one with chat_template=FILE.jinja"):
        load(path, build(), "demonstrations")
    (tmp_path / "chat.jinja").write_text(CHATML)
    own = load(path, build(CHATML), "demonstrations").examples
    for given_template in (CHATML, str(tmp_path / "chat.jinja")):
        assert load(path, build(), "demonstrations", DataOptions(chat_template=given_template)).examples == own
    with pytest.raises(InputError, match="neither a file nor a template"):
        load(path, build(), "demonstrations", DataOptions(chat_template="absent.jinja"))


def test_the_text_of_a_template_given_either_way_is_public(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(CHATML)
    assert template_text(CHATML) == template_text(str(tmp_path / "chat.jinja")) == CHATML


SHARED = build(CHATML, adds_bos=True)


@settings(deadline=None, max_examples=60)
@given(st.text(), st.text(min_size=1), st.text(min_size=1))
def test_prompt_and_answer_laid_end_to_end_are_the_tokens_of_the_whole_text(prompt: str, good: str, bad: str) -> None:
    example = one(SHARED, prompt, good, bad, kind="pairs")
    for text, tokens, flags in zip((good, bad), example.completions, example.trained, strict=True):
        assert example.prompt + tokens == SHARED(prompt + text + "</s>")["input_ids"]
        assert all(flags)
    assert example.prompt


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)), min_size=1, max_size=3))
def test_the_trained_tokens_of_a_conversation_are_its_answers(turns: list[tuple[str, str]]) -> None:
    messages = [item for asked, answered in turns for item in (user(asked), assistant(answered))]
    example = one(SHARED, None, messages)
    assert trained_text(SHARED, example) == [f"{answered}<|im_end|>\n" for _, answered in turns]
