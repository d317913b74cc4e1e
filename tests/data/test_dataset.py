"""From a file to a dataset: conversions, counts of what was dropped, limits, splits."""

from __future__ import annotations

import json
import struct
from decimal import Decimal
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from chat_styles import CHATML, assistant, build, user
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import save_model

from prefopt.data import DataOptions, Dataset, load, split
from prefopt.data.columns import single
from prefopt.records import InputError

TEXT = build(adds_bos=True)
CHAT = build(CHATML)
PAIRS = [{"prompt": f"{n} the fox", "chosen": " found a key", "rejected": " sun" * n} for n in range(1, 9)]


def written(folder: Path, rows: list[Any]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def made(folder: Path, rows: list[Any], kind: Any = "pairs", tokenizer: Any = TEXT, **options: Any) -> Dataset:
    return load(written(folder, rows), tokenizer, kind, DataOptions(**options))


def test_a_dataset_says_what_it_is(tmp_path: Path) -> None:
    data = made(tmp_path, [*PAIRS, {"prompt": "a", "chosen": "b", "rejected": "b"}])
    lines = data.describe().splitlines()
    assert lines[0] == f"{tmp_path / 'rows.jsonl'}: prompt/chosen/rejected, text"
    assert lines[1:3] == ["8 pairs", "dropped 1: 1 chosen and rejected are equal"]
    assert lines[3].startswith("prompt tokens     shortest") and lines[4].startswith("completion tokens shortest")
    assert [example.where for example in data.examples][:2] == [f"{tmp_path / 'rows.jsonl'}:{n}" for n in (1, 2)]
    assert [record.prompt for record in data.rows] == [row["prompt"] for row in PAIRS]


def test_a_dataset_says_which_files_of_a_folder_it_leaves_out(tmp_path: Path) -> None:
    for number, name in enumerate(("train", "test")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(PAIRS[number]))
    data = load(tmp_path, TEXT, "pairs")
    assert [record.prompt for record in data.rows] == [PAIRS[0]["prompt"]]
    note = "1 files left out, not of the split train (test.jsonl); add @NAME to the path for them"
    assert note in data.describe().splitlines()
    assert load(f"{tmp_path}@test", TEXT, "pairs").notes == {}


def test_the_first_rows_are_shown_as_the_model_sees_them(tmp_path: Path) -> None:
    shown = made(tmp_path, PAIRS).show(TEXT, 1)
    assert shown.splitlines()[1:] == [
        "prompt: '<s>1 the fox'",
        "score 1: ' found a key</s>'",
        "score 0: ' sun</s>'",
    ]
    talk = [user("a"), assistant("b"), user("c"), assistant("d")]
    shown = made(tmp_path, [{"messages": talk}], "demonstrations", CHAT).show(CHAT)
    assert r"«<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n»d<|im_end|>\n" in shown


CONVERSIONS: list[tuple[dict[str, Any], str, list[tuple[list[str], list[float]]]]] = [
    (PAIRS[0], "demonstrations", [([" found a key</s>"], [1.0])]),
    (PAIRS[0], "labels", [([" found a key</s>"], [1.0]), ([" sun</s>"], [0.0])]),
    (PAIRS[0], "prompts", [([], [])]),
    (
        {"prompt": "a", "completions": [" 1", " 2", " 3"], "scores": [2, 3, 1]},
        "pairs",
        [([" 2</s>", " 3</s>"], [1.0, 0.0])],
    ),
    ({"prompt": "a", "completions": [" 1", " 2", " 3"], "scores": [2, 3, 1]}, "demonstrations", [([" 2</s>"], [1.0])]),
    ({"prompt": "a", "completion": " b", "label": True}, "demonstrations", [([" b</s>"], [1.0])]),
    (PAIRS[0], "ratings", [([" found a key</s>", " sun</s>"], [1.0, 0.0])]),
    (
        PAIRS[0] | {"score_chosen": 4.5, "score_rejected": -2},
        "ratings",
        [([" found a key</s>", " sun</s>"], [4.5, -2.0])],
    ),
    (
        PAIRS[0] | {"score_chosen": 4.5, "score_rejected": -2},
        "pairs",
        [([" found a key</s>", " sun</s>"], [1.0, 0.0])],
    ),
    (
        PAIRS[0] | {"score_chosen": 4.5, "score_rejected": -2},
        "labels",
        [([" found a key</s>"], [1.0]), ([" sun</s>"], [0.0])],
    ),
    (
        {"prompt": "a", "completions": [" 1", " 2", " 3"], "scores": [2, 3, 3]},
        "ratings",
        [([" 1</s>", " 2</s>", " 3</s>"], [2.0, 3.0, 3.0])],
    ),
]


@pytest.mark.parametrize(("row", "kind", "want"), CONVERSIONS)
def test_data_of_one_kind_serves_another_where_that_keeps_its_meaning(
    row: dict[str, Any], kind: str, want: list[tuple[list[str], list[float]]], tmp_path: Path
) -> None:
    found = made(tmp_path, [row], kind).examples
    assert [([TEXT.decode(tokens) for tokens in e.completions], e.scores) for e in found] == want


def test_data_that_cannot_serve_is_refused_with_what_fits(tmp_path: Path) -> None:
    refusals: list[tuple[dict[str, Any], str, str]] = [
        ({"prompt": "a", "completion": "b"}, "pairs", "holds demonstrations .* needs pairs; use SFT"),
        ({"prompt": "a", "completion": "b", "label": True}, "pairs", "holds labels .*; use .* KTO"),
        ({"prompt": "a"}, "demonstrations", "holds prompts .*; use an objective that samples"),
        ({"text": "a b"}, "labels", "holds demonstrations"),
    ]
    for row, kind, message in refusals:
        with pytest.raises(InputError, match=message):
            made(tmp_path, [row], kind)


def test_only_answers_marked_right_or_wrong_become_labels(tmp_path: Path) -> None:
    marked = {name: {"solution": f" {name}", "is_correct": name == "b"} for name in ("b", "c")}
    assert [e.scores for e in made(tmp_path, [{"question": "a", **marked}], "labels").examples] == [[1.0], [0.0]]
    replies = [{"text": "b", "role": "assistant", "rank": 0}]
    best = {"message_id": "1", "text": "a", "role": "prompter", "replies": replies}
    for row in ({"prompt": "a", "completions": [" b"], "scores": [1]}, best):
        with pytest.raises(InputError, match=r"holds ratings .* needs labels; use SFT, DPO"):
            made(tmp_path, [row], "labels")


def test_a_text_that_is_both_chosen_and_rejected_gives_no_labels(tmp_path: Path) -> None:
    data = made(tmp_path, [PAIRS[0], {"prompt": "a", "chosen": " b", "rejected": " b"}], "labels")
    assert (len(data), data.dropped) == (2, {"chosen and rejected are equal": 1})


def test_ranked_siblings_of_a_tree_give_every_pair(tmp_path: Path) -> None:
    replies = [{"text": f"{rank}", "role": "assistant", "rank": rank, "replies": []} for rank in (1, 0, 2)]
    tree = {"message_id": "1", "parent_id": None, "text": "q", "role": "prompter", "replies": replies}
    found = made(tmp_path, [tree]).examples
    answers = [[TEXT.decode(tokens).strip(" </s>") for tokens in example.completions] for example in found]
    assert answers == [["0", "1"], ["0", "2"], ["1", "2"]]
    assert [TEXT.decode(e.completions[0]) for e in made(tmp_path, [tree], "demonstrations").examples] == [" 0</s>"]


def test_messages_of_a_tree_one_per_row_are_gathered(tmp_path: Path) -> None:
    rows = [{"message_id": "1", "parent_id": None, "text": "q", "role": "prompter"}]
    rows += [{"message_id": str(n), "parent_id": "1", "text": f"{n}", "role": "assistant", "rank": n} for n in (2, 3)]  # type: ignore[dict-item]
    [example] = made(tmp_path, rows).examples
    assert [TEXT.decode(tokens) for tokens in example.completions] == [" 2</s>", " 3</s>"]
    with pytest.raises(InputError, match=r"rows.jsonl:1: parent_id names no message of the file"):
        made(tmp_path, rows[1:])


def test_messages_that_fit_no_tree_are_refused_or_counted_each(tmp_path: Path) -> None:
    def said(name: str, parent: str | None, rank: int | None = None) -> dict[str, Any]:
        role = "prompter" if rank is None else "assistant"
        return {"message_id": name, "parent_id": parent, "text": name, "role": role, "rank": rank}

    good = [said("1", None), said("2", "1", 0), said("3", "1", 1)]
    bad = {
        "parent_id names no message of the file: 8": said("9", "8", 0),
        "the message hangs on no tree": said("10", "9"),
        "duplicate message_id: 2": said("2", "1", 2),
    }
    loop = [said("9", "10"), said("10", "9")]
    for message, rows in zip(bad, ([said("9", "8", 0)], loop, [said("2", "1", 2)]), strict=True):
        with pytest.raises(InputError, match=f"rows.jsonl:4: {message}"):
            made(tmp_path, [*good, *rows])
    data = made(tmp_path, [*good, *bad.values()], skip_bad=True)
    assert data.dropped == {message.split(":")[0]: 1 for message in bad}
    assert [TEXT.decode(tokens) for tokens in data.examples[0].completions] == [" 2</s>", " 3</s>"]


def test_bad_labels_give_no_demonstrations_and_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": " b", "label": label} for label in (True, False, False)]
    data = made(tmp_path, rows, "labels")
    assert [example.scores for example in data.examples] == [[1.0], [0.0], [0.0]]
    assert "labels: 1 good, 2 bad" in data.describe().splitlines()
    assert made(tmp_path, rows, "demonstrations").dropped == {"labelled bad, not a demonstration": 2}


def test_a_question_that_no_answer_solves_gives_no_demonstration(tmp_path: Path) -> None:
    rows = [{"question": "a", "m": {"solution": " b", "is_correct": right}} for right in (False, True)]
    data = made(tmp_path, rows, "demonstrations")
    assert (len(data), data.dropped) == (1, {"no answer is right, not a demonstration": 1})


# ---------------------------------------------------------------- rows that nothing can be compared in

TIED: dict[str, tuple[dict[str, Any], str]] = {
    "pair": (
        {"prompt": "a", "chosen": " b", "rejected": " c", "score_chosen": 0.5, "score_rejected": 0.5},
        "both .* 0.5",
    ),
    "rated": ({"prompt": "a", "completions": [" b", " c", " d"], "scores": [2, 2, 2]}, "all 3 .* 2"),
}


@pytest.mark.parametrize("name", TIED)
@pytest.mark.parametrize("kind", ["pairs", "ratings"])
def test_a_tie_stops_with_the_row_and_the_remedy_or_is_dropped_and_counted(
    name: str, kind: str, tmp_path: Path
) -> None:
    row, words = TIED[name]
    good = {key: value for key, value in row.items() if "score" not in key}
    rows = [good if name == "pair" else row | {"scores": [2, 2, 1]}, row]
    with pytest.raises(InputError, match=rf"rows.jsonl:2: tied scores: {words} in single precision; .*ties=drop"):
        made(tmp_path, rows, kind)
    for options in ({"ties": "drop"}, {"skip_bad": True}):
        data = made(tmp_path, rows, kind, **options)
        assert (len(data), data.dropped) == (1, {"tied scores": 1})


# differences that are lost in single precision, in which training compares
NEARLY_TIED: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "a", "completions": [" b", " c"], "scores": [1700000000, 1700000001]}, "both .* 1.7e[+]09"),
    ({"prompt": "a", "completions": [" b", " c", " d"], "scores": [1, 1 + 1e-9, 1]}, "all 3 .* 1"),
    (PAIRS[0] | {"score_chosen": 1.000000001, "score_rejected": 1}, "both .* 1"),
]


@pytest.mark.parametrize(("row", "words"), NEARLY_TIED)
@pytest.mark.parametrize("kind", ["pairs", "ratings"])
def test_a_difference_that_single_precision_loses_is_a_tie(
    row: dict[str, Any], words: str, kind: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"rows.jsonl:1: tied scores: {words} in single precision"):
        made(tmp_path, [row], kind)
    good = {key: value for key, value in row.items() if "score" not in key}
    rows = [good if "chosen" in row else row | {"scores": [2, 1, 0][: len(row["scores"])]}, row]
    assert made(tmp_path, rows, kind, ties="drop").dropped == {"tied scores": 1}


def test_a_tie_in_single_precision_stops_a_run_before_it_begins(tmp_path: Path, capsys: Any) -> None:
    from prefopt import cli

    row = {"prompt": "red :", "completions": [" good", " bad"], "scores": [1700000000, 1700000001]}
    rows = [row | {"scores": [1, 2]} for _ in range(3)] + [row]
    model, out = save_model(tmp_path / "model"), tmp_path / "run"
    given = [f"model={model}", f"data={written(tmp_path, rows)}", f"out={out}"]
    assert cli.main(["train", "reward", *given]) == 2
    assert "rows.jsonl:4: tied scores" in capsys.readouterr().err
    assert not list(out.glob("**/*.safetensors"))


def digits(x: float) -> int:
    """Significant ones: 999999995904.0 has twelve and 1e12, the same in single precision, has one."""
    return len(Decimal(repr(x)).normalize().as_tuple().digits)


@given(st.floats(allow_nan=False, allow_infinity=False, width=32))
@hypothesis.example(999999995904.0)
def test_a_score_is_the_shortest_decimal_of_what_single_precision_keeps(value: float) -> None:
    kept = single(value)
    assert struct.pack("f", kept) == struct.pack("f", value) and digits(kept) <= digits(value)
    assert single(kept) == kept


def test_a_score_reads_as_it_was_written() -> None:
    assert [single(x) for x in (4.2, -0.1, 3, 1e-5)] == [4.2, -0.1, 3.0, 1e-5]


def test_a_tie_is_no_fault_where_nothing_is_compared(tmp_path: Path) -> None:
    for row, _ in TIED.values():
        for kind in ("demonstrations", "prompts"):
            data = made(tmp_path, [row], kind)
            assert (len(data), data.dropped) == (1, {})
    assert TEXT.decode(made(tmp_path, [TIED["pair"][0]], "demonstrations").examples[0].completions[0]) == " b</s>"
    with pytest.raises(InputError, match="tied scores"):  # a label says that one is good and one bad
        made(tmp_path, [TIED["pair"][0]], "labels")


def test_scores_that_contradict_a_pair_leave_it_out(tmp_path: Path) -> None:
    wrong = PAIRS[0] | {"score_chosen": 1, "score_rejected": 2}
    for kind in ("pairs", "ratings", "demonstrations"):
        assert made(tmp_path, [PAIRS[1], wrong], kind).dropped == {"chosen scored below rejected": 1}


def test_equal_texts_are_counted_and_their_tie_is_no_error(tmp_path: Path) -> None:
    same = {"prompt": "a", "chosen": " b", "rejected": " b", "score_chosen": 1, "score_rejected": 1}
    for kind in ("pairs", "ratings"):
        assert made(tmp_path, [PAIRS[0], same], kind).dropped == {"chosen and rejected are equal": 1}
    rated = [{"prompt": "a", "completions": [" b", " b", end], "scores": [3, 2, 1]} for end in (" b", " c")]
    data = made(tmp_path, rated, "ratings")
    assert (len(data), data.dropped) == (1, {"all rated completions are equal as tokens": 1})


@pytest.mark.parametrize("kind", ["pairs", "ratings"])
def test_a_single_rated_answer_stops_where_two_are_compared(kind: str, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completions": [" b", " c"][:num], "scores": [1, 2][:num]} for num in (2, 1)]
    with pytest.raises(InputError, match=r"rows.jsonl:2: a single answer, no pair; give two rated completions or more"):
        made(tmp_path, rows, kind)
    assert made(tmp_path, rows, kind, skip_bad=True).dropped == {"a single answer, no pair": 1}
    assert len(made(tmp_path, rows, "demonstrations")) == 2


SCORES: list[tuple[Any, str]] = [
    (None, "'score' is null; a number is expected"),
    ("4", "'score' is text; a number is expected"),
    (True, "'score' is true or false; a number is expected"),
    (1e39, "'score' is out of range: 1e[+]39; give a finite number"),
    (10**400, "'score' is out of range: 1000"),
]


@pytest.mark.parametrize(("score", "message"), SCORES, ids=[str(score)[:5] for score, _ in SCORES])
@pytest.mark.fault(12)
def test_a_score_that_is_no_finite_number_is_named(score: Any, message: str, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completions": [" b", " c"], "scores": [1, second]} for second in (2, score)]
    with pytest.raises(InputError, match=f"rows.jsonl:2: {message}"):
        made(tmp_path, rows, "ratings")
    if score is not None:  # a pair without one of its scores has none
        pair = PAIRS[0] | {"score_chosen": score, "score_rejected": 1}
        with pytest.raises(InputError, match=f"rows.jsonl:1: {message.replace('score', 'score_chosen')}"):
            made(tmp_path, [pair])


@pytest.mark.fault(12)
def test_a_score_of_a_table_that_is_not_a_number_is_named(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = {"prompt": ["a", "a"], "completions": [[" b", " c"]] * 2, "scores": [[1.0, 2.0], [1.0, float("nan")]]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    with pytest.raises(InputError, match=r"rows.parquet:2: 'score' is out of range: nan"):
        load(tmp_path / "rows.parquet", TEXT, "ratings")


def test_labels_of_one_class_are_refused_to_train_on_with_the_class_that_is_missing(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n} a", "completion": " b", "label": True} for n in range(3)]
    with pytest.raises(InputError, match=r"rows.jsonl: all 3 answers are labelled good and none bad; .*train sft"):
        made(tmp_path, rows, "labels")
    bad = [row | {"label": False} for row in rows]
    with pytest.raises(InputError, match=r"rows.jsonl: all 3 answers are labelled bad and none good; .*add good ones"):
        made(tmp_path, bad, "labels")
    assert len(load(written(tmp_path, rows), TEXT, "labels", held_out=True)) == 3
    long = bad[0] | {"completion": " b" * 50}
    with pytest.raises(InputError, match=r"none bad \(left out: 1 longer than max_length 20\)"):
        made(tmp_path, [*rows, long], "labels", max_length=20)


# ---------------------------------------------------------------- steps

STEPPED: dict[str, Any] = {
    "prompt": "the fox",
    "completions": [" found", " a key", " sun"],
    "labels": [True, True, False],
}
ENDS = [" found\n", " a key\n", " sun\n"]


def labelled(data: Dataset) -> list[list[tuple[str, float]]]:
    """Each row's steps: the text up to a label, and the label."""
    rows = []
    for example in data.examples:
        [tokens], [labels] = example.completions, example.steps or [[]]
        ends = [n for n, label in enumerate(labels) if label == label]
        starts = [0, *(end + 1 for end in ends)]
        rows.append([(TEXT.decode(tokens[a : b + 1]), labels[b]) for a, b in zip(starts, ends, strict=False)])
    return rows


def test_a_step_s_label_is_at_the_last_token_of_its_separator(tmp_path: Path) -> None:
    data = made(tmp_path, [STEPPED], "steps")
    [example] = data.examples
    assert (data.shape, data.kind, data.dropped) == ("prompt/completions/labels, text", "steps", {})
    assert labelled(data) == [list(zip(ENDS, [1.0, 1.0, 0.0], strict=True))]
    assert TEXT.decode(example.prompt) == "<s>the fox"
    assert TEXT.decode(example.completions[0]) == "".join(ENDS)  # and no EOS
    assert (example.scores, example.trained) == ([0.0], [[True] * len(example.completions[0])])
    right = STEPPED | {"completions": [" found"], "labels": [1]}
    assert made(tmp_path, [right], "steps").examples[0].scores == [1.0]
    assert "steps: 2 right, 1 wrong" in data.describe().splitlines()


def test_the_text_of_the_first_steps_has_the_tokens_they_have_in_the_whole(tmp_path: Path) -> None:
    """What a reader of a trained model does: tokenise prompt and steps up to a separator, read at the last token."""
    steps = ["Step 1: 12 + 345.", "(so) x=1;", "the fox."]
    whole = {"prompt": "12 345?\n", "completions": steps, "labels": [1, 0, 1]}
    [example] = made(tmp_path, [whole], "steps", step_separator=r"\n\n").examples
    ends = [n for n, label in enumerate((example.steps or [[]])[0]) if label == label]
    for number, end in enumerate(ends, 1):
        text = whole["prompt"] + "".join(step + "\n\n" for step in steps[:number])  # type: ignore[operator]
        assert example.prompt + example.completions[0][: end + 1] == TEXT(text)["input_ids"]


def test_a_token_that_spans_two_steps_carries_no_label(tmp_path: Path) -> None:
    """The vocabulary has `foxkey` as one token; the step that ends inside it is labelled at the token before."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["</s>", "a", "the", "|", "fox", "key", "|key"]
    raw = Tokenizer(models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="</s>"))  # type: ignore[call-arg]
    raw.pre_tokenizer = pre_tokenizers.Split(r" ", "removed")
    raw.model.continuing_subword_prefix = ""
    merging = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")
    row = {"prompt": "a", "completions": [" the fox", "key the"], "labels": [0, 1]}
    [example] = load(written(tmp_path, [row]), merging, "steps", DataOptions(step_separator="|")).examples
    assert merging.convert_ids_to_tokens(example.completions[0]) == ["the", "fox", "|key", "the", "|"]
    assert str(example.steps) == str([[float("nan"), 0.0, float("nan"), float("nan"), 1.0]])


def test_steps_that_no_token_parts_are_refused(tmp_path: Path) -> None:
    row = STEPPED | {"completions": [" f", "ox", " key"]}
    with pytest.raises(InputError, match=r"rows.jsonl:1: a step of no token of its own; give a step_separator"):
        made(tmp_path, [row], "steps", step_separator="")
    [bare] = made(tmp_path, [STEPPED], "steps", step_separator="").examples
    assert TEXT.decode(bare.completions[0]) == " found a key sun"


def test_a_separator_may_be_the_end_token_and_a_tokenizers_own_is_left_out(tmp_path: Path) -> None:
    from tokenizers import processors

    ends = build(adds_bos=True)
    ends.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    for tokenizer in (TEXT, ends):
        data = load(written(tmp_path, [STEPPED]), tokenizer, "steps", DataOptions(step_separator="</s>"))
        assert TEXT.decode(data.examples[0].prompt) == "<s>the fox"
        assert TEXT.decode(data.examples[0].completions[0]) == " found</s> a key</s> sun</s>"
        assert [tokens for tokens, _ in labelled(data)[0]] == [" found</s>", " a key</s>", " sun</s>"]


def test_steps_may_answer_a_conversation_or_an_empty_prompt(tmp_path: Path) -> None:
    talk = STEPPED | {"prompt": [user("q")]}
    [example] = made(tmp_path, [talk], "steps", CHAT).examples
    assert CHAT.decode(example.prompt) == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert CHAT.decode(example.completions[0]) == "".join(ENDS)
    [empty] = made(tmp_path, [STEPPED | {"prompt": ""}], "steps").examples
    assert TEXT.decode(empty.prompt) == "<s>"


def test_an_answer_too_long_is_dropped_or_keeps_its_whole_steps(tmp_path: Path) -> None:
    [whole] = made(tmp_path, [STEPPED], "steps").examples
    ends = [n + 1 for n, label in enumerate((whole.steps or [[]])[0]) if label == label]
    for room, left in ((ends[2] - 1, 2), (ends[1], 2), (ends[1] - 1, 1)):
        limit = len(whole.prompt) + room
        data = made(tmp_path, [STEPPED], "steps", max_length=limit, overlong="truncate")
        assert labelled(data) == [list(zip(ENDS[:left], [1.0] * left, strict=True))]
        assert (data.truncated, data.examples[0].scores) == (1, [1.0])  # the wrong step is cut away
        assert len(data.examples[0].completions[0]) == len(data.examples[0].trained[0]) == ends[left - 1]
    with pytest.raises(InputError, match="1 no whole step left after truncation"):
        made(tmp_path, [STEPPED], "steps", max_length=len(whole.prompt) + ends[0] - 1, overlong="truncate")
    with pytest.raises(InputError, match="1 longer than max_length"):
        made(tmp_path, [STEPPED], "steps", max_length=len(whole.prompt) + ends[2] - 1)


def test_the_labels_of_steps_are_shown(tmp_path: Path) -> None:
    assert made(tmp_path, [STEPPED], "steps").show(TEXT).splitlines()[1:] == [
        "prompt: '<s>the fox'",
        r"score 0: ' found\n a key\n sun\n'",
        r"  step right: ' found\n'",
        r"  step right: ' a key\n'",
        r"  step wrong: ' sun\n'",
    ]


def test_a_label_of_a_step_may_be_the_share_of_rollouts_that_end_well(tmp_path: Path) -> None:
    data = made(tmp_path, [STEPPED | {"labels": [1, 0.75, 0.5]}, STEPPED | {"labels": [0.875, True, 1.0]}], "steps")
    shares = [[1.0, 0.75, 0.5], [0.875, 1.0, 1.0]]
    assert labelled(data) == [list(zip(ENDS, own, strict=True)) for own in shares]
    assert [record.scores for record in data.rows] == shares
    assert [example.scores for example in data.examples] == [[0.5], [0.875]]
    assert "steps: 5 right, 1 wrong" in data.describe().splitlines()
    assert data.show(TEXT, 1).splitlines()[2:] == [
        r"score 0.5: ' found\n a key\n sun\n'",
        r"  step right: ' found\n'",
        r"  step right (0.75): ' a key\n'",
        r"  step wrong (0.5): ' sun\n'",
    ]


WRONG_STEPS: dict[str, tuple[dict[str, Any], str]] = {
    "number": ({"labels": [True]}, "steps and labels differ in number: 3 steps, 1 labels; give one label each"),
    "three classes": ({"labels": [1, 0, -1]}, "'label' is a number: -1; true or false, or a number from 0"),
    "above 1": ({"labels": [1, 0, 1.5]}, "'label' is a number: 1.5; true or false, or a number from 0 to 1, is exp"),
    "null label": ({"labels": [1, 0, None]}, "'label' is null; true or false, or a number from 0 to 1, is expected"),
    "text label": ({"labels": [1, 0, "0.5"]}, "'label' is text: '0.5'; true or false, or a number from 0 to 1"),
    "empty step": ({"completions": [" a", " ", " b"]}, r"a step is empty: completions\[1\]; leave it out"),
    "no step": ({"completions": [], "labels": []}, "'completions' is a list; a list of at least one step"),
    "a message": ({"completions": [[assistant("a")]] * 3}, "'step' is a list; text is expected"),
    "one label": ({"labels": True}, "'labels' is true or false; a list with a label for each step"),
    "no labels": (
        {"labels": ...},
        r"'labels' is missing; the first row \(.*rows.jsonl:1\) is prompt/completions/labels",
    ),
}


@pytest.mark.parametrize("name", WRONG_STEPS)
def test_wrong_steps_are_named(name: str, tmp_path: Path) -> None:
    change, message = WRONG_STEPS[name]
    bad = {key: value for key, value in (STEPPED | change).items() if value is not ...}
    with pytest.raises(InputError, match=f"rows.jsonl:2: {message}"):
        made(tmp_path, [STEPPED, bad], "steps")
    data = made(tmp_path, [STEPPED, bad], "steps", skip_bad=True)
    assert (len(data), sum(data.dropped.values())) == (1, 1)


def test_labels_of_steps_and_ratings_are_told_apart(tmp_path: Path) -> None:
    rated = STEPPED | {"scores": [3, 2, 1]}
    assert made(tmp_path, [rated], "pairs").shape == "prompt/rated completions, text"
    for kind in ("pairs", "labels", "demonstrations", "ratings"):
        with pytest.raises(InputError, match=f"holds steps .* needs {kind}; use a process reward model"):
            made(tmp_path, [STEPPED], kind)
    assert [record.prompt for record in made(tmp_path, [STEPPED], "prompts").rows] == ["the fox"]
    with pytest.raises(InputError, match=r"holds pairs .* needs steps"):
        made(tmp_path, PAIRS, "steps")


def test_equal_texts_with_different_ratings_give_no_pair_and_are_counted(tmp_path: Path) -> None:
    rated = [{"prompt": "a", "completions": texts, "scores": [3, 1]} for texts in ([" b", " b"], [" b", " c"])]
    data = made(tmp_path, rated)
    assert (len(data), data.dropped) == (1, {"chosen and rejected are equal": 1})


def test_an_empty_answer_leaves_the_other_rated_ones(tmp_path: Path) -> None:
    texts = [[" b", " ", " c"], ["", " c"], []]
    rows = [{"prompt": "a", "completions": item, "scores": [2, 3, 1][: len(item)]} for item in texts]
    for kind, left in (("pairs", [" b</s>", " c</s>"]), ("demonstrations", [" b</s>"])):
        data = made(tmp_path, rows, kind)
        [example] = data.examples
        assert [TEXT.decode(tokens) for tokens in example.completions] == left
        assert (data.dropped, list(data.notes.values())) == ({"empty completion": 2}, [1])
        assert "1 completions left out of a rated row, as empty" in data.describe().splitlines()


def test_an_empty_reply_of_a_tree_loses_no_other_turn(tmp_path: Path) -> None:
    def replies(*texts: str) -> list[dict[str, Any]]:
        return [{"text": text, "role": "assistant", "rank": rank} for rank, text in enumerate(texts)]

    follow = {"text": "r", "role": "prompter", "replies": replies("d", "")}
    tree = {"message_id": "1", "text": "q", "role": "prompter", "replies": replies("b", "", "c")}
    tree["replies"][0]["replies"] = [follow]  # type: ignore[index]
    data = made(tmp_path, [tree, {**tree, "replies": []}])
    assert (len(data), data.dropped, list(data.notes.values())) == (1, {"no ranked answer": 1}, [3])


def test_siblings_with_equal_texts_or_ranks_lose_only_that_pair_and_are_counted(tmp_path: Path) -> None:
    ranked = [("x", 0), ("x", 1), ("y", 1), ("z", 2)]
    replies = [{"text": text, "role": "assistant", "rank": rank, "replies": []} for text, rank in ranked]
    tree = {"message_id": "1", "parent_id": None, "text": "q", "role": "prompter", "replies": replies}
    data = made(tmp_path, [tree])
    assert (len(data), data.dropped) == (4, {"chosen and rejected are equal": 1, "tied scores": 1})


def test_of_a_tree_what_cannot_be_compared_is_counted_and_the_rest_is_read(tmp_path: Path) -> None:
    def said(*ranks: int, more: Any = ()) -> list[dict[str, Any]]:
        return [{"text": f"{n}", "role": "assistant", "rank": rank, "replies": more} for n, rank in enumerate(ranks)]

    ask = {"text": "r", "role": "prompter"}
    turns = [{**ask, "replies": said(0)}, {**ask, "replies": said(1, 1)}]
    tree = {"message_id": "1", "parent_id": None, **ask, "replies": [*said(0, more=turns), {**said(1)[0], "text": "z"}]}
    for kind, scores in (("pairs", [1.0, 0.0]), ("ratings", [0.0, -1.0])):
        data = made(tmp_path, [tree], kind)
        assert [example.scores for example in data.examples] == [scores]
        assert data.dropped == {"a single answer, no pair": 1, "tied scores": 1}


@pytest.mark.fault(10, 12)
def test_the_first_bad_row_stops_and_skip_bad_counts_them_all(tmp_path: Path) -> None:
    bad = ["{", '{"prompt": NaN}', {"prompt": "a", "chosen": None, "rejected": "b"}, {"prompt": "a", "rejected": "b"}]
    mixed = {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}
    rows = [PAIRS[0], *bad, mixed, PAIRS[1]]
    with pytest.raises(InputError, match=r"rows.jsonl:2: the JSON is cut short"):
        made(tmp_path, rows)
    data = made(tmp_path, rows, skip_bad=True)
    assert len(data) == 2
    assert sum(data.dropped.values()) == 5
    assert data.dropped["'chosen' is null"] == data.dropped["'chosen' is missing"] == 1


@pytest.mark.fault(38)
def test_rows_that_the_template_refuses_are_skipped_too(tmp_path: Path) -> None:
    odd = {"messages": [user("a"), {"role": "tool", "content": "x"}, assistant("b")]}
    silent = CHATML.replace(
        "{{ m['content'] + '<|im_end|>\n' }}", "{{ m['content'] * (m['role'] != 'tool') + '<|im_end|>\n' }}"
    )
    good = {"messages": [user("a"), assistant("b")]}
    with pytest.raises(InputError, match=r"rows.jsonl:2: the chat template leaves out tool turns"):
        made(tmp_path, [good, odd], "demonstrations", CHAT, chat_template=silent)
    data = made(tmp_path, [good, odd], "demonstrations", CHAT, chat_template=silent, skip_bad=True)
    assert (len(data), data.dropped) == (1, {"the chat template leaves out tool turns": 1})


def test_conversations_that_hold_no_prompt_are_skipped_too(tmp_path: Path) -> None:
    rows = [{"messages": talk} for talk in ([user("a"), assistant("b")], [user("a")], [assistant("b")])]
    with pytest.raises(InputError, match=r"rows.jsonl:2: no assistant turn"):
        made(tmp_path, rows, "prompts", CHAT)
    data = made(tmp_path, rows, "prompts", CHAT, skip_bad=True)
    assert data.dropped == {"no assistant turn": 1, "the conversation starts with its only answer": 1}
    assert len(data) == 1


def test_when_nothing_is_left_the_reasons_are_given(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"every row was dropped \(8 prompt leaves no room in max_length 3\)"):
        made(tmp_path, PAIRS, max_length=3)
    with pytest.raises(InputError, match=r"no row could be read \(1 the JSON is cut short\)"):
        made(tmp_path, ["{"], skip_bad=True)


def test_columns_are_renamed_and_wrong_names_get_the_nearest(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "good": " b", "bad": " c"}]
    names = {"chosen": "good", "rejected": "bad"}
    same = [{"prompt": "a", "chosen": " b", "rejected": " c"}]
    assert made(tmp_path, rows, map=names).examples == made(tmp_path, same).examples
    with pytest.raises(InputError, match="map: 'choosen' is not a column this program reads; did you mean 'chosen'"):
        made(tmp_path, rows, map={"choosen": "good"})
    with pytest.raises(InputError, match="map names column 'god', which the row lacks; did you mean 'good'"):
        made(tmp_path, rows, map=names | {"chosen": "god"})


def test_a_row_without_a_renamed_column_is_skipped_too(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "good": " b", "rejected": " c"}, {"prompt": "a", "rejected": " c"}]
    with pytest.raises(InputError, match=r"rows.jsonl:2: map names column 'good', which the row lacks; the names are"):
        made(tmp_path, rows, map={"chosen": "good"})
    data = made(tmp_path, rows, map={"chosen": "good"}, skip_bad=True)
    assert (len(data), data.dropped) == (1, {"map names column 'good', which the row lacks": 1})


def test_a_renamed_column_leaves_its_old_namesake_out(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "chosen": "old", "rejected": " c", "better": " b"}]
    [example] = made(tmp_path, rows, map={"chosen": "better"}).examples
    assert TEXT.decode(example.completions[0]) == " b</s>"


def test_too_long_rows_are_dropped_or_lose_the_end_of_the_answer_only(tmp_path: Path) -> None:
    whole = made(tmp_path, PAIRS, max_length=None)
    longest = max(len(e.prompt) + max(map(len, e.completions)) for e in whole.examples)
    assert made(tmp_path, PAIRS, max_length=longest).fingerprint == whole.fingerprint
    dropped = made(tmp_path, PAIRS, max_length=longest - 1)
    assert (len(dropped), dropped.dropped) == (7, {f"longer than max_length {longest - 1}": 1})
    cut = made(tmp_path, PAIRS, max_length=longest - 1, overlong="truncate")
    assert (len(cut), cut.truncated, cut.dropped) == (8, 1, {})
    before, after = whole.examples[-1], cut.examples[-1]
    assert after.prompt == before.prompt and after.completions[0] == before.completions[0]
    assert after.completions[1] == before.completions[1][:-1]
    assert TEXT.eos_token_id not in after.completions[1]


def test_a_pair_that_truncation_makes_equal_is_dropped(tmp_path: Path) -> None:
    rows = [*PAIRS[:1], {"prompt": "the", "chosen": " a" * 20 + " fox", "rejected": " a" * 20 + " key"}]
    data = made(tmp_path, rows, max_length=12, overlong="truncate")
    assert data.dropped == {"chosen and rejected are equal after truncation": 1}


def test_a_conversation_whose_answer_is_cut_away_is_dropped(tmp_path: Path) -> None:
    call = [assistant("a"), {"role": "tool", "content": "x " * 50}, assistant("b")]
    rows = [{"prompt": [user("q")], "completion": call}]
    assert made(tmp_path, rows, "demonstrations", CHAT, max_length=30, overlong="truncate").truncated == 1
    with pytest.raises(InputError, match="every row was dropped"):
        made(tmp_path, rows, "demonstrations", CHAT, max_length=6, overlong="truncate")


@settings(deadline=None, max_examples=40)
@given(limit=st.integers(2, 30), overlong=st.sampled_from(["drop", "truncate"]))
def test_no_row_is_longer_than_the_limit_and_none_is_lost_uncounted(
    limit: int, overlong: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("limit")
    try:
        data = made(folder, PAIRS, max_length=limit, overlong=overlong)
    except InputError:
        return
    assert all(len(e.prompt) + len(tokens) <= limit for e in data.examples for tokens in e.completions)
    assert len(data) + sum(data.dropped.values()) == len(PAIRS)


def test_options_out_of_range_are_refused() -> None:
    wrong: list[dict[str, Any]] = [{"max_length": 1}, {"overlong": "cut"}, {"train_on": "prompt"}, {"ties": "keep"}]
    for options in wrong:
        with pytest.raises(ValueError, match=next(iter(options))):
            DataOptions(**options)


@pytest.mark.parametrize(
    ("option", "kind", "read_for"),
    [
        ({"train_on": "all"}, "pairs", "demonstrations"),
        ({"step_separator": " "}, "pairs", "steps"),
        ({"ties": "drop"}, "demonstrations", "pairs and labels and ratings"),
    ],
)
def test_an_option_that_the_kind_does_not_read_is_refused(
    option: dict[str, str], kind: str, read_for: str, tmp_path: Path
) -> None:
    [(name, value)] = option.items()
    with pytest.raises(InputError, match=f"{name}={value} is read for {read_for} only, and .* on {kind}; leave it out"):
        made(tmp_path, PAIRS, kind, **option)
    assert len(made(tmp_path, PAIRS, "completions", **option)) == len(PAIRS)


def test_the_fingerprint_follows_tokens_and_order(tmp_path: Path) -> None:
    first = made(tmp_path, PAIRS).fingerprint
    assert made(tmp_path, PAIRS).fingerprint == first
    assert made(tmp_path, PAIRS[::-1]).fingerprint != first
    assert made(tmp_path, [*PAIRS[:-1], PAIRS[-1] | {"chosen": " key found a"}]).fingerprint != first
    assert made(tmp_path, [*PAIRS[:-1], PAIRS[-1] | {"prompt": "fox 8 the"}]).fingerprint != first
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in PAIRS]
    assert made(tmp_path, swapped).fingerprint != first


def test_the_fingerprint_is_computed_once_and_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefopt.data import dataset

    calls: list[int] = []

    def counted(examples: list[Any]) -> str:
        calls.append(len(examples))
        return "print"

    monkeypatch.setattr(dataset, "fingerprint", counted)
    train, held = split(made(tmp_path, PAIRS), 0.25, 0)
    assert calls == []
    assert (held.fingerprint, held.fingerprint) == ("print", "print")
    assert calls == [len(held)]


@settings(deadline=None, max_examples=40)
@given(
    prompts=st.lists(st.integers(0, 6), min_size=2, max_size=25).filter(lambda numbers: len(set(numbers)) > 1),
    fraction=st.floats(0.05, 0.95),
    seed=st.integers(0, 3),
)
def test_a_split_keeps_a_prompt_on_one_side_and_every_row_on_one(
    prompts: list[int], fraction: float, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows = [{"prompt": f"{p} the", "chosen": f" {n} fox", "rejected": " key"} for n, p in enumerate(prompts)]
    data = made(tmp_path_factory.mktemp("split"), rows)
    train, held = split(data, fraction, seed)
    sides = [{record.prompt for record in side.rows} for side in (train, held)]
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    assert sorted([*train.examples, *held.examples], key=lambda e: e.where) == sorted(
        data.examples, key=lambda e: e.where
    )
    assert split(data, fraction, seed)[1].fingerprint == held.fingerprint
    assert train.fingerprint != held.fingerprint


def test_a_split_holds_out_about_the_fraction(tmp_path: Path) -> None:
    rows = [{"text": f"{n} the fox"} for n in range(100)]
    train, held = split(made(tmp_path, rows, "demonstrations"), 0.2, 0)
    assert (len(train), len(held)) == (80, 20)
    assert [e.where for e in train.examples] == sorted(
        [e.where for e in train.examples], key=lambda w: int(w.split(":")[-1])
    )
    assert split(made(tmp_path, rows, "demonstrations"), 0.2, 1)[1].fingerprint != held.fingerprint


def test_conversations_with_the_same_first_question_stay_together(tmp_path: Path) -> None:
    rows = [{"messages": [user(str(n % 5)), assistant(f"{n}")]} for n in range(20)]
    train, held = split(made(tmp_path, rows, "demonstrations", CHAT), 0.4, 0)
    assert len(held) == 8
    assert not {tuple(e.prompt) for e in train.examples} & {tuple(e.prompt) for e in held.examples}


def test_one_prompt_cannot_be_split(tmp_path: Path) -> None:
    rows = [PAIRS[0] | {"rejected": f" {n}"} for n in range(5)]
    with pytest.raises(InputError, match="all rows have one prompt"):
        split(made(tmp_path, rows), 0.5, 0)
    with pytest.raises(InputError, match="between 0 and 1, got 1"):
        split(made(tmp_path, PAIRS), 1, 0)


def test_reading_needs_no_torch() -> None:
    import subprocess
    import sys

    heavy = ("torch", "transformers", "datasets", "pyarrow")
    code = f"import sys, prefopt.data; sys.exit(any(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
