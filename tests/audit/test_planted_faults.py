"""Every check finds at least 95 % of the faults planted in clean rows, and names at most 1 % of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import planted
import pytest
from planted import PLANTED, WHOLE, Planted

from prefopt.audit import CHECKS, AuditOptions, Finding, audit
from prefopt.data import DataOptions

ROWS = [case for case in PLANTED if not case.whole]


def found(path: Path, check: str, **more: Any) -> tuple[Finding, set[int]]:
    """What one check finds, and the rows that it names, from 0."""
    report = audit(path, options=AuditOptions(checks=[check]), **more)
    [(_, finding)] = report.findings
    assert not finding.skipped, finding.skipped
    return finding, set(finding.rows)


@pytest.mark.parametrize("case", ROWS, ids=[case.check for case in ROWS])
def test_planted_rows_are_found_and_no_others(case: Planted, tmp_path: Path) -> None:
    rows, places = planted.plant(case)
    finding, named = found(planted.write(tmp_path / "rows.jsonl", rows), case.check)
    partners = {place - 1 for place in places} if case.check == "contradiction" else set()
    assert finding.fired
    assert len(named & set(places)) >= 0.95 * len(places)
    assert len(named - set(places) - partners) <= 0.01 * len(rows)


@pytest.mark.parametrize("case", [*PLANTED, *WHOLE], ids=[case.check for case in [*PLANTED, *WHOLE]])
def test_clean_rows_are_left_alone(case: Planted, tmp_path: Path) -> None:
    finding, named = found(planted.write(tmp_path / "rows.jsonl", case.clean()), case.check)
    assert len(named) <= 0.01 * len(case.clean())
    assert not finding.fired


@pytest.mark.parametrize("case", WHOLE, ids=[case.check for case in WHOLE])
def test_a_fault_of_the_whole_set_is_seen(case: Planted, tmp_path: Path) -> None:
    rows = case.clean()
    spoilt = [case.spoil(row, row) for row in rows]
    finding, named = found(planted.write(tmp_path / "rows.jsonl", spoilt), case.check)
    assert finding.fired and not named


def test_every_check_has_planted_faults() -> None:
    elsewhere = {"few-rows", "leaked", "nearly-leaked", *TOKENS, *MODELS}
    assert {check.name for check in CHECKS} == {case.check for case in [*PLANTED, *WHOLE]} | elsewhere


# -- held-out rows


def test_leaked_prompts_are_found(tmp_path: Path) -> None:
    rows = planted.pairs()
    held = [{**row, "chosen": "Other.", "rejected": "Words."} for row in rows[10:30]] + planted.pairs(50, seed=9)
    path, other = planted.write(tmp_path / "train.jsonl", rows), planted.write(tmp_path / "held.jsonl", held)
    finding, named = found(path, "leaked", held=other)
    assert finding.fired and named == set(range(10, 30))
    assert finding.rows[10] == f"also {other}:1"


def test_reworded_leaks_are_found_and_exact_ones_left_to_the_other_check(tmp_path: Path) -> None:
    rows = [planted.longest(row) for row in planted.pairs()]
    held = [planted.reworded(row) for row in rows[10:30]] + rows[40:50]
    path, other = planted.write(tmp_path / "train.jsonl", rows), planted.write(tmp_path / "held.jsonl", held)
    assert found(path, "nearly-leaked", held=other)[1] == set(range(10, 30))
    assert found(path, "leaked", held=other)[1] == set(range(40, 50))


# -- tokens

TOKENS = (
    "identical-cut",
    "double-bos",
    "no-bos",
    "no-end",
    "early-end",
    "unknown-token",
    "merged-token",
    "overlong",
)
MODELS = ("model-order", "model-inverted", "model-separated", "model-far", "model-foreign")
START_TWICE = "{{ bos_token + bos_token }}" + planted.CHAT
NO_END = planted.CHAT.replace("m['content'] + '</s>'", "m['content'] + ' .'").replace("</s>", "")


def spoilt(spoil: Any, rows: planted.Rows) -> tuple[planted.Rows, set[int]]:
    places = set(range(5, 105, 5))
    return [spoil(row) if n in places else row for n, row in enumerate(rows)], places


@pytest.mark.parametrize(
    ("check", "spoil", "limit"),
    [
        # 600 words in the prompt leave room for few of the answer, and both begin alike
        (
            "identical-cut",
            lambda row: {**row, "chosen": "Ban " * 70 + row["chosen"], "rejected": "Ban " * 70 + row["rejected"]},
            64,
        ),
        ("early-end", lambda row: {**row, "chosen": row["chosen"] + "</s> And more words after."}, None),
        ("unknown-token", lambda row: {**row, "rejected": row["rejected"] + " \u263a"}, None),
        ("double-bos", lambda row: {**row, "prompt": "Ban <s>" + row["prompt"]}, None),
        ("overlong", lambda row: {**row, "chosen": row["chosen"] * 8}, 150),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_faults_of_tokens_are_found(check: str, spoil: Any, limit: int | None, tmp_path: Path) -> None:
    made = planted.tokenizer()
    rows, places = spoilt(spoil, planted.pairs())
    options = DataOptions(max_length=limit, overlong="truncate")
    finding, named = found(planted.write(tmp_path / "rows.jsonl", rows), check, tokenizer=made, data=options)
    assert finding.fired and len(named & places) >= 0.95 * len(places) and len(named - places) <= 0.01 * len(rows)
    clean = planted.write(tmp_path / "clean.jsonl", planted.pairs())
    assert not found(clean, check, tokenizer=made, data=options)[0].fired


@pytest.mark.parametrize(
    ("check", "template"),
    [("double-bos", START_TWICE), ("no-bos", planted.CHAT), ("no-end", NO_END)],
)
def test_faults_of_templates_are_found(check: str, template: str, tmp_path: Path) -> None:
    path = planted.write(tmp_path / "rows.jsonl", planted.chats(40))
    finding, named = found(path, check, tokenizer=planted.tokenizer(template))
    assert finding.fired and named == (set() if check == "no-end" else set(range(40)))
    sound = planted.tokenizer("{{ bos_token }}" + planted.CHAT)
    assert not found(path, check, tokenizer=sound)[0].fired


def test_a_prompt_whose_last_token_joins_the_answer_is_found(tmp_path: Path) -> None:
    rows, places = spoilt(
        lambda row: {**row, "prompt": row["prompt"].strip()[:-1], "chosen": "ing then", "rejected": "ing not"},
        planted.pairs(),
    )
    path = planted.write(tmp_path / "rows.jsonl", rows)
    named = found(path, "merged-token", tokenizer=planted.tokenizer(), data=DataOptions(max_length=None))[1]
    assert named == places
