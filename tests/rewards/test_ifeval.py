"""Every instruction followed and not followed, by hand; then all that IFEval asks for."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from prefopt.rewards.ifeval import CHECKS, Unknown, check, follow, sentences

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "ifeval" / "input_data.jsonl"

# instruction, arguments, a text that follows it, texts that do not
CASES: list[tuple[str, dict[str, Any], str, list[str]]] = [
    ("keywords:existence", {"keywords": ["ice", "c++"]}, "Nice C++", ["nice", "c++"]),
    ("keywords:frequency", {"keyword": "an", "frequency": 2, "relation": "at least"}, "An ant", ["an", "a n"]),
    ("keywords:frequency", {"keyword": "an", "frequency": 2, "relation": "less than"}, "an", ["an ant"]),
    ("keywords:forbidden_words", {"forbidden_words": ["ant", "c++"]}, "want", ["An Ant.", "c++!"]),
    ("keywords:letter_frequency", {"letter": "T", "let_frequency": 2, "let_relation": "at least"}, "to T", ["to"]),
    ("keywords:letter_frequency", {"letter": "#", "let_frequency": 1, "let_relation": "less than"}, "to", ["#to"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "a, b-c", ["a b"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "a b", ["a b c"]),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, "A b. C d!", ["A b, c."]),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "less than"},
        "Mr. A. B. is in.",
        ["It is. So."],
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        "***\na\n***\nb\n***",
        ["a", "a***b***c", "a******b"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "But"},
        "a\n\n'but, no'",
        ["But\n\na", "a\n\nb\n\nbut", "a\n\nbutter", "a"],
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "A BIG cat",
        ["A cat"],
    ),
    ("change_case:capital_word_frequency", {"capital_frequency": 1, "capital_relation": "less than"}, "a Cat", ["NO"]),
    ("change_case:english_capital", {}, "ALL OF IT, 3!", ["ALL of it", "ПРИВЕТ", "123"]),
    ("change_case:english_lowercase", {}, "all of it, 3!", ["All of it", "привет", "123"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it. "}, " say it. I said it.", ["I say it.", "Say. it"]),
    (
        "combination:two_responses",
        {},
        "a\n******\nb",
        ["a", "a ****** a", "a ****** b ****** c", "a ****** ", "a ***** b"],
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] and [b]", ["[a]", "[a\n] [b]", "[[a] b"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "a\nP. S. b", ["a\nPS b", "a"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "a\np.p.s b", ["P.S. b"]),
    ("detectable_format:constrained_response", {}, "My answer is yes.", ["Yes.", "My answer is yes. My answer is no."]),
    ("detectable_format:json_format", {}, '```json\n{"a": [1, null]}\n```', ["{'a': 1}", '{"a": 1', "Here: {}"]),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Day", "num_sections": 2},
        "Day 1 a Day 2",
        ["Day 1", "Day a Day b"],
    ),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        "* a\n - b\n**c**",
        ["* a", "* a\n* b\n* c", "a * b - c"],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        "*a* and **b**",
        ["*a*", "**a**", "* *", "*a\nb*c*"],
    ),
    ("detectable_format:title", {}, "<<poem of joy>>\nit", ["<poem>", "<< >>", "<<poem\nof>>", ">>poem<<"]),
    ("language:response_language", {"language": "th"}, "สวัสดีครับ 3", ["hello", "สวัสดี hello there"]),
    ("language:response_language", {"language": "ja"}, "これは本です", ["这是书", "123"]),
    ("punctuation:no_comma", {}, "none; here", ["one, here"]),
    ("startend:end_checker", {"end_phrase": "The end. "}, 'So. "the END."', ["The end. Not", "end."]),
    ("startend:quotation", {}, ' "all" ', ["all", '"', '"a', "'a'"]),
]
HOSTILE = [
    "[" * 100_000,
    "9" * 100_000,
    "\ud800\x00",
    "*" * 500_000,
    "\n" * 500_000 + "a",
    ". " * 300_000,
    "<<" * 500_000,
]


@pytest.mark.parametrize(
    ("name", "arguments", "right", "wrong"), CASES, ids=[f"{n}-{case[0]}" for n, case in enumerate(CASES)]
)
def test_each_instruction_is_told_apart(name: str, arguments: dict[str, Any], right: str, wrong: list[str]) -> None:
    assert check(name, right, arguments)
    assert [text for text in wrong if check(name, text, arguments)] == []
    assert not check(name, " \n", arguments)  # nothing follows no instruction


def test_every_check_has_a_case() -> None:
    assert {case[0] for case in CASES} == CHECKS.keys()


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_hostile_texts_are_answered_in_seconds(name: str) -> None:
    arguments = next(case[1] for case in CASES if case[0] == name)
    for text in HOSTILE:
        start = time.monotonic()
        check(name, text, arguments)
        assert time.monotonic() - start < 8


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("One. Two! Three?", 3),
        ("One sentence without an end", 1),
        ("It is 3.5 km. Yes.", 2),
        ("See e.g. this one. And Dr. No.", 2),
        ("J. R. Smith came.", 1),
        ('"Stop!" he said. Then he went.', 2),
        ("Title\n\nA sentence.", 2),
        ("Wait... what? No.", 2),
        ("1. First\n2. Second", 2),
        ("***\n---", 0),
        ("今日は。明日は。", 1),  # East Asian text has no space after its full stops: one run
    ],
)
def test_sentences(text: str, count: int) -> None:
    assert sentences(text) == count


def test_all_or_a_share_of_the_instructions() -> None:
    names, arguments = ["punctuation:no_comma", "detectable_format:title"], [{"language": None}, {}]
    said = ["<<a>> b", "a", "a, b"]
    columns = {"instruction_id_list": [names] * 3, "kwargs": [arguments] * 3}
    assert [each.value for each in follow(said, **columns)] == [1.0, 0.0, 0.0]  # type: ignore[arg-type]
    share = follow(said, ifeval_score="share", **columns)  # type: ignore[arg-type]
    assert [each.value for each in share] == [1.0, 0.5, 0.0]
    assert share[1].why == "not followed: detectable_format:title"


@pytest.mark.parametrize(
    ("names", "arguments", "why"),
    [
        (["new:one"], [{}], "'new:one' is not known"),
        (["punctuation:no_comma"], [{}, {}], "kwargs for 2"),
        (["detectable_format:title"], [{"letter": "a"}], "title' with"),
        (["keywords:existence"], [{}], "keywords"),
        (["keywords:frequency"], [{"keyword": "a", "frequency": 1, "relation": "about"}], "'about'"),
        (["language:response_language"], [{"language": "de"}], "'de' shares its script"),
        ([], [], "no instruction_id_list"),
        (None, None, "no instruction_id_list"),
    ],
)
def test_what_cannot_be_checked_is_no_score(names: Any, arguments: Any, why: str) -> None:
    (found,) = follow(["a text"], [names], [arguments])
    assert found.value is None and why in found.why


@pytest.mark.skipif(not DATA.is_file(), reason="the real data is not at ../shared/data/ifeval")
def test_all_of_ifeval_can_be_checked_but_languages_that_share_a_script() -> None:
    refused: dict[str, int] = {}
    total = 0
    for line in DATA.open(encoding="utf-8"):
        row = json.loads(line)
        for name, arguments in zip(row["instruction_id_list"], row["kwargs"], strict=True):
            total += 1
            try:
                check(name, "Some text.", arguments)
            except Unknown as error:
                assert name == "language:response_language", error
                refused[arguments["language"]] = refused.get(arguments["language"], 0) + 1
    assert total == 834
    # 21 of the 31 rows with a language: the rest are told by their letters
    assert sum(refused.values()) == 21 and "th" not in refused
    assert refused.keys() == {"ar", "bg", "de", "fa", "fi", "hi", "it", "mr", "ne", "pt", "ru", "sw", "ur", "vi"}
