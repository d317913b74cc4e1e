"""Checks by hand: small cases whose answer a reader can see."""

from __future__ import annotations

import json
import random
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import planted
import pytest

from prefopt.audit import AnswerOptions, AuditOptions, Finding, audit, similar
from prefopt.audit.answers import is_cut, is_refusal, repeats
from prefopt.audit.classifier import Sparse, fit, folds, word_features
from prefopt.audit.contradictions import components
from prefopt.audit.lengths import area
from prefopt.audit.similar import Sets, candidates, least, signature
from prefopt.audit.texts import BROKEN, main_script
from prefopt.audit.verifiable import worked
from prefopt.audit.words import Corpus, corpus, folded, plain, runs
from prefopt.data import DataOptions
from prefopt.records import InputError


def find(tmp_path: Path, rows: list[dict[str, Any]], check: str, **more: Any) -> Finding:
    report = audit(planted.write(tmp_path / "rows.jsonl", rows), options=AuditOptions(checks=[check]), **more)
    return report.findings[0][1]


def pair(prompt: str, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def test_the_same_turns_with_other_tools_are_no_copy(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]
    tools = [[{"type": "function", "function": {"name": name}}] for name in ("map", "map", "clock")]
    rows = [{"messages": turns, "tools": each} for each in tools] + [{"messages": turns}]
    assert list(find(tmp_path, rows, "duplicate").rows) == [1]
    assert not find(tmp_path, rows, "near-duplicate").rows


def test_a_copy_is_named_by_its_line_however_long_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / ("deep" * 30)
    folder.mkdir()
    path = planted.write(folder / "rows.jsonl", [pair("a", "b", "c"), pair("a", "b", "c"), pair("d", "e", "f")])
    held = planted.write(tmp_path / "held.jsonl", [pair("d", "e", "f")])
    page = audit(path, held=held).page(80)
    assert "rows.jsonl:2  the same as line 1" in page and "rows.jsonl:3  also held.jsonl:1" in page


@pytest.mark.parametrize(
    ("held", "shown"), [("more_rows.jsonl", "more_rows.jsonl:1"), ("b/rows.jsonl", "b/rows.jsonl:1")]
)
def test_another_file_whose_name_ends_alike_keeps_its_name(
    held: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("b").mkdir()
    path, other = (
        planted.write(Path("rows.jsonl"), [pair("a", "b", "c")]),
        planted.write(Path(held), [pair("a", "d", "e")]),
    )
    assert f"rows.jsonl:1  also {shown}" in audit(path, held=other).page(80)


def test_whole_texts_are_not_said_to_come_from_prompts(tmp_path: Path) -> None:
    assert find(tmp_path, [{"text": f"Tale {n}."} for n in range(3)], "few-rows").said == "3 demonstrations"


def test_the_remedy_for_exchanged_columns_is_one(tmp_path: Path) -> None:
    rows = [pair(f"{n}?", f"good {n}", f"bad {n}", score_chosen=1, score_rejected=2) for n in range(5)]
    path, check = planted.write(tmp_path / "rows.jsonl", rows), AuditOptions(checks=["inverted-scores"])
    before = audit(path, options=check)
    said = before.findings[0][0].remedy.strip(")").split("--map ")[1:]
    swapped = dict(part.strip().split("=") for part in said)
    after = audit(path, DataOptions(map=swapped), check)
    assert before.fired and not after.fired and after.table.kind == "pairs"


def test_labels_have_a_weight_that_evens_them_out_and_steps_have_none(tmp_path: Path) -> None:
    labels = [{"prompt": f"{n}?", "completion": "so", "label": n > 0} for n in range(9)]
    steps = [{"prompt": f"{n}?", "completions": ["so", "then"], "labels": [True, n > 0]} for n in range(9)]
    assert find(tmp_path, labels, "imbalance").said == "8 good, 1 bad; undesirable_weight=8 makes both count alike"
    assert find(tmp_path, steps, "imbalance").said == "17 good, 1 bad"


# -- words


def test_words_of_scripts_without_spaces_are_letters() -> None:
    texts = corpus(["The cat sat.", "猫がsat"])
    # the cat sat . | 猫 が sat
    assert texts.ids.tolist() == [0, 1, 2, 3, 4, 5, 2]
    assert texts.lengths.tolist() == [4, 3]


def test_folding_takes_out_space_and_unicode_form_and_style_takes_case_and_signs() -> None:
    assert folded("  a\n\n b\tcafe\u0301 ") == "a b caf\u00e9"
    assert plain("It's  FINE, really!") == plain("its fine really")


def test_runs_of_three_words_are_equal_where_the_words_are() -> None:
    texts = corpus(["a b c d", "x a b c", "a b", "a b", "", "b a"])
    codes, starts = runs(texts, 3)
    assert starts.tolist() == [0, 2, 4, 5, 6, 6, 7]
    own = [codes[a:b].tolist() for a, b in pairwise(starts)]
    assert own[0][0] == own[1][1]  # a b c
    assert own[2] == own[3] != own[5]  # short texts are one run, in their order
    assert len({code for part in own for code in part}) == 5


def every_candidate(texts: Corpus, held: int = 0) -> list[list[int]]:
    """Candidates of all bands, one band after the other."""
    return np.concatenate(list(candidates(signature(texts), held))).tolist()  # type: ignore[no-any-return]


def test_the_index_counts_shared_runs() -> None:
    texts = corpus(["a b c d e", "a b c d f", "a b c d e", "", ""])
    # {abc bcd cde} and {abc bcd cdf}: 2 of 4
    index = Sets(texts).jaccard(np.array([0, 0, 0, 3]), np.array([1, 2, 3, 4]))
    assert index.tolist() == [0.5, 1.0, 0.0, 1.0]
    assert [0, 2] in every_candidate(texts)


def test_candidates_of_two_sets_are_one_of_each() -> None:
    texts = corpus(["a b c d", "a b c d", "a b c d", "p q r s"])
    assert {(0, 1), (0, 2)} == set(map(tuple, every_candidate(texts, held=1)))
    # a held text that comes second in the order of texts is none
    assert every_candidate(corpus(["p q r s", "a b c d", "a b c d", ""]), held=1) == []
    assert every_candidate(corpus(["", ""])) == []


def test_a_text_is_compared_with_the_last_eight_of_its_bucket() -> None:
    pairs = every_candidate(corpus(["a b c d"] * 11))
    assert [one for one, other in pairs[: len(pairs) // similar.BANDS] if other == 10] == list(range(2, 10))
    pairs = every_candidate(corpus(["a b c d"] * 11), held=9)
    assert pairs[: len(pairs) // similar.BANDS] == [[one, other] for other in (9, 10) for one in range(1, 9)]


def changed(draw: random.Random, words: list[str]) -> str:
    """The words with some of them put anew, at most half."""
    rate = draw.choice([0.0, 0.02, 0.1, 0.5])
    return " ".join(str(draw.randrange(99)) if draw.random() < rate else word for word in words)


def test_pairs_compared_in_parts_have_the_index_of_sets_and_no_bound_is_below_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw = random.Random(0)
    written = [changed(draw, ("one two three four five six seven " * n).split()) for n in [0, 1, 3, 9] * 15]
    texts = corpus(written)
    codes, starts = runs(texts, similar.RUN)
    own = [set(codes[a:b].tolist()) for a, b in pairwise(starts)]
    left, right = (np.ravel(side) for side in np.meshgrid(np.arange(60), np.arange(60)))
    pairs = list(zip(left, right, strict=True))
    by_hand = [len(own[a] & own[b]) / len(own[a] | own[b]) if own[a] | own[b] else 1.0 for a, b in pairs]
    monkeypatch.setattr(similar, "TEXTS_AT_ONCE", 7)
    monkeypatch.setattr(similar, "RUNS_AT_ONCE", 50)
    sets = Sets(texts)
    assert sets.jaccard(left, right).tolist() == by_hand
    for bound in (sets.by_sizes(left, right), sets.by_counts(left, right)):
        assert (bound >= by_hand).all() and (bound < 0.8).sum() > 1000
    lowest = np.minimum(by_hand, by_hand[::-1])
    kept = least([(sets, left, right), (sets, left[::-1], right[::-1])], 0.8)
    assert 100 < (lowest >= 0.8).sum() < 3000
    assert np.where(kept >= 0.8, kept, 0).tolist() == np.where(lowest >= 0.8, lowest, 0).tolist()


def test_a_near_copy_is_named_once_with_the_first_it_is_near_to(tmp_path: Path) -> None:
    text = planted.text(random.Random(5))
    said = [f"{text} {text[::-1]}{end}" for end in ("", " Yes.", " No.", "", " No.")]
    rows = [{"prompt": "Which?", "completion": answer, "label": 1} for answer in said]
    rows.append({"prompt": "Which?", "completion": said[1] + "!", "label": 0})
    found = find(tmp_path, rows, "near-duplicate")
    # 3 and 4 are copies to the letter, 5 has the other label
    assert set(found.rows) == {1, 2}
    assert ["rows.jsonl:1 (index 0.9" in why for why in found.rows.values()] == [True, True]


@pytest.mark.parametrize("other", ["prompt", "chosen", "rejected"])
def test_a_near_copy_is_one_in_its_prompt_and_both_answers(other: str, tmp_path: Path) -> None:
    draw = random.Random(6)
    row = {name: " ".join(planted.text(draw) for _ in range(3)) for name in ("prompt", "chosen", "rejected")}
    near = {name: f"{text} Yes." for name, text in row.items()}
    assert set(find(tmp_path, [row, near], "near-duplicate").rows) == {1}
    near[other] = f"{row[other][: len(row[other]) // 2]} {planted.text(draw)} {planted.text(draw)}"
    assert not find(tmp_path, [row, near], "near-duplicate").rows


# -- contradictions


def test_circles_of_preferences_are_components() -> None:
    part = components([("a", "b"), ("b", "c"), ("c", "a"), ("c", "d"), ("e", "d")])
    assert part["a"] == part["b"] == part["c"]
    assert len({part["a"], part["d"], part["e"]}) == 3


def test_a_circle_of_three_is_a_contradiction_and_an_order_is_none(tmp_path: Path) -> None:
    order = [pair("Q?", "A.", "B."), pair("Q?", "B.", "C."), pair("Q?", "A.", "C.")]
    assert find(tmp_path, order, "contradiction").rows == {}
    circle = [*order, pair("Q?", "C.", "A.")]
    found = find(tmp_path, circle, "contradiction")
    assert set(found.rows) == {0, 1, 2, 3}
    assert found.rows[3].endswith("rows.jsonl:3 says the opposite")
    assert "circle" in found.rows[0] and not found.rows[0].endswith(":1")  # another row of it, not itself


def test_the_same_pair_at_two_prompts_is_no_contradiction(tmp_path: Path) -> None:
    assert not find(tmp_path, [pair("Q?", "A.", "B."), pair("R?", "B.", "A.")], "contradiction").fired


def test_labels_contradict_where_one_answer_has_both(tmp_path: Path) -> None:
    rows = [{"prompt": "Q?", "completion": said, "label": good} for said, good in (("A.", 1), ("A. ", 0), ("B.", 0))]
    assert set(find(tmp_path, rows, "contradiction").rows) == {0, 1}


# -- answers


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("There are many ways to do it. One is to begin with the first thing that you can find and then", True),
        ("There are many ways to do it. One is to begin with the first thing that you can find and then.", False),
        (
            "There are many ways to do it. These are the most usual ones of all:\n- the first\n- the second of them",
            False,
        ),
        ("The whole answer is one line of words without a stop and so it may be a title or verse", False),
        ("Yes", False),
        ("There are many ways to do this well. You can read about all of them at http://a.example/b/c", False),
    ],
)
def test_prose_that_stops_in_mid_sentence_is_cut(text: str, cut: bool) -> None:
    assert is_cut(text) is cut


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I\u2019m sorry, I cannot assist you.", True),
        ("As an AI language model, I am not able to do so.", True),
        ("Unfortunately, the company's collapse became inevitable.", False),
        ("I'm sorry to hear that! Try some tea.", False),
        ("Sorry for the late answer: 42.", False),
        ("I can't stress this enough: " + "read the manual. " * 40, False),
    ],
)
def test_refusals_are_told_by_how_they_begin(text: str, refusal: bool) -> None:
    assert is_refusal(text) is refusal


def test_loops_are_told_from_lists() -> None:
    assert repeats("and so it goes on " * 20)
    assert not repeats(" ".join(planted.text(random.Random(n)) for n in range(8)))


@pytest.mark.parametrize(
    "text", ["caf\u00c3\u00a9", "don\u00e2\u20ac\u2122t", "find.\u00e2\u20ac\n", "a\ufffdb", "a\x07b", "tr\\u00e8s"]
)
def test_broken_encodings_are_seen(text: str) -> None:
    assert BROKEN.search(text)


@pytest.mark.parametrize(
    "text", ["café, naïve, São Paulo", "Ça va? Älter Ñandú", "“quoted” — it\u2019s", "a\tb\r\nc", "猫 ご飯"]
)
def test_sound_text_is_not_called_broken(text: str) -> None:
    assert BROKEN.search(text) is None


def test_the_script_of_a_text_is_that_of_most_letters() -> None:
    assert main_script("Это другой язык, на котором никто не спрашивал вообще") == "CYRILLIC"
    assert main_script("An answer in English that mentions Москва once, and goes on") == "LATIN"
    assert main_script("короткий") == ""


def test_an_asked_translation_keeps_its_script(tmp_path: Path) -> None:
    russian = "Это другой язык, на котором написан этот ответ на вопрос. "
    asked = "Translate this sentence into Russian, please, and keep the tone as it is: it is late.\n"
    both = [pair(asked, russian + "Да.", russian + "Нет.")]
    assert not find(tmp_path, both, "script").fired


# -- numbers


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("48/2", 24),
        ("2+3*4", 14),
        ("(2+3)*4", 20),
        ("-3+5", 2),
        (".5*4", 2),
        ("2/0", None),
        ("2**9", None),
        ("1+", None),
    ],
)
def test_sums_are_worked_exactly(text: str, value: int | None) -> None:
    assert worked(text) == (None if value is None else Fraction(value))


def test_a_worked_solution_is_a_right_answer_too(tmp_path: Path) -> None:
    rows = [pair(f"{n}?", f"So.\nA: {n}", f"So.\nA: {n + 1}", ground_truth=f"It is {n}.\nA: {n}") for n in range(9)]
    rows[4]["chosen"] = "So.\nA: 7"
    found = find(tmp_path, rows, "checker", where=AnswerOptions(answer_column="ground_truth"))
    assert list(found.rows) == [4] and "found '7', right is '4'" in found.rows[4]


def test_what_takes_algebra_goes_to_the_checker(tmp_path: Path) -> None:
    rows = [pair(f"{n}?", rf"\boxed{{\sqrt{{{n}}}}}", r"\boxed{x}", answer=rf"{n}^{{1/2}}") for n in range(2, 12)]
    rows[3]["chosen"] = r"\boxed{\sqrt{99}}"
    assert list(find(tmp_path, rows, "checker", where=AnswerOptions(math_answer=["boxed"])).rows) == [3]


def test_the_area_is_the_share_of_ordered_pairs_and_its_interval_holds_it() -> None:
    found = area(np.array([3.0, 5.0]), np.array([1.0, 3.0]))
    # 3>1, 3=3 (half), 5>1, 5>3: 3.5 of 4
    assert found.value == pytest.approx(3.5 / 4)
    assert found.low is not None and found.high is not None and found.low < 0.875 <= found.high
    assert area(np.array([1.0]), np.array([])).value is None


# -- classifier


def test_the_classifier_is_where_its_gradient_is_zero() -> None:
    draw = np.random.default_rng(0)
    dense = draw.normal(size=(40, 3))
    starts = np.arange(0, 121, 3)
    matrix = Sparse(np.tile(np.arange(3), 40), dense.ravel(), starts, 3)
    signs = np.where(dense @ [1.0, -2.0, 0.5] + draw.normal(size=40) > 0, 1.0, -1.0)
    weights = fit(matrix, signs, penalty=1.0)
    wrong = 1 / (1 + np.exp(signs * (dense @ weights)))
    assert np.abs(weights - dense.T @ (signs * wrong)).max() < 1e-2


def test_features_of_a_pair_are_what_one_answer_has_and_the_other_lacks() -> None:
    matrix = word_features(corpus(["a b", "a c", "a b", "a b"]), per_item=2)
    # b, "a b" against c, "a c": two with a plus and two with a minus, each a half; equal answers leave nothing
    assert np.diff(matrix.starts).tolist() == [4, 0]
    assert sorted(matrix.values) == [-0.5, -0.5, 0.5, 0.5]


def test_a_prompt_is_never_fitted_to_and_asked_in_one_fold() -> None:
    groups = [str(n % 7) for n in range(70)]
    asked: list[int] = []
    for fitting, out in folds(groups, 0):
        assert not {groups[n] for n in fitting} & {groups[n] for n in out}
        asked += out.tolist()
    assert sorted(asked) == list(range(70))


def test_flipped_labels_come_first_in_the_list_of_noise(tmp_path: Path) -> None:
    rows = planted.decided(600)
    flips = set(range(0, 600, 5))
    rows = [planted.swapped(row) if n in flips else row for n, row in enumerate(rows)]
    found = find(tmp_path, rows, "label-noise")
    assert found.measured is not None and found.measured.low is not None and found.measured.high is not None
    assert found.measured.low <= 0.2 <= found.measured.high
    first = [line for line, _ in found.ranked[: len(flips)]]
    assert len(flips & set(first)) >= 0.95 * len(flips)


def test_noise_is_not_claimed_where_words_tell_nothing(tmp_path: Path) -> None:
    found = find(tmp_path, planted.pairs(), "label-noise")
    assert not found.fired and not found.rows and found.measured is None
    assert "cannot be told from words" in found.said and found.ranked


# -- rows that are not pairs, and rows of many


def test_a_tree_is_audited_by_its_pairs(tmp_path: Path) -> None:
    replies = [{"text": said, "role": "assistant", "rank": rank} for rank, said in enumerate(["A b.", "C d.", "A B!"])]
    tree = {"message_tree_id": "1", "prompt": {"text": "Q?", "role": "prompter", "replies": replies}}
    report = audit(planted.write(tmp_path / "trees.jsonl", [tree]), options=AuditOptions(checks=["restyled"]))
    assert (len(report.table.lines), len(report.table.items)) == (1, 3)
    [(_, found)] = report.findings
    assert set(found.rows) == {0} and len(found.items) == 1


def test_rows_that_training_stops_at_are_named_and_the_others_audited(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps(pair("Q?", "A.", "B."))
    path.write_text(f'{good}\n{{"prompt": "Q?"\n{good}\n{json.dumps({"prompt": "Q?", "chosen": "A."})}\n')
    report = audit(path, options=AuditOptions(checks=["wrong-row", "duplicate"]))
    wrong, copies = (finding for _, finding in report.findings)
    assert set(wrong.rows) == {1, 3} and "'rejected' is missing" in wrong.rows[3]
    assert set(copies.rows) == {2}


def test_columns_are_read_by_their_mapped_names_and_kept_by_their_own(tmp_path: Path) -> None:
    rows = [{"question": "Q?", "good": "A.", "bad": "A."}]
    names = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    path = planted.write(tmp_path / "rows.jsonl", rows)
    report = audit(path, DataOptions(map=names), AuditOptions(checks=["identical"]))
    assert report.findings[0][1].rows == {0: "one text twice"}
    assert report.table.lines[0].values == rows[0]


def test_what_cannot_be_checked_says_why(tmp_path: Path) -> None:
    report = audit(planted.write(tmp_path / "rows.jsonl", planted.pairs(20)))
    why = {check.name: finding.skipped for check, finding in report.findings}
    assert "--eval" in why["leaked"] and "--tokenizer" in why["overlong"] and "--model" in why["model-far"]
    assert "fewer than 100 rows" in why["surface"] and "ratings" in why["near-tie"]


def test_a_check_that_there_is_not_is_an_error_with_the_nearest_name(tmp_path: Path) -> None:
    path = planted.write(tmp_path / "rows.jsonl", planted.pairs(5))
    with pytest.raises(InputError, match="did you mean duplicate"):
        audit(path, options=AuditOptions(checks=["duplicates"]))
