"""`prefopt audit`: the page, JSON, exit codes, the cleaned file and the record of what was removed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import planted
import pytest

from prefopt import cli
from prefopt.audit import CHECKS
from prefopt.data import read_prompts


def run(capsys: Any, *words: Any, code: int = 0) -> tuple[str, str]:
    assert cli.main(["audit", *map(str, words)]) == code
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return str(out), str(err)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """Forty pairs; 3 empty, 5 a copy of 4, 7 contradicts 6, 9 equal, 11 refuses, 13 is no row; ids are carried."""
    rows = [{"id": n, **row} for n, row in enumerate(planted.pairs(40))]
    rows[3]["chosen"] = " "
    rows[5] = {**rows[4], "id": 5}
    rows[7] = {**planted.swapped(rows[6]), "id": 7}
    rows[9]["chosen"] = rows[9]["rejected"]
    rows[11]["chosen"] = "I cannot answer this."
    del rows[13]["rejected"]
    return planted.write(tmp_path / "pairs.jsonl", rows)


def test_the_page_has_what_fired_the_worst_first_with_places_and_remedies(faulty: Path, capsys: Any) -> None:
    out, err = run(capsys, faulty, code=1)
    order = [out.index(f"\n  {name} ") for name in ("contradiction", "wrong-row", "duplicate")]
    assert order == sorted(order)
    assert out.index("\nerrors\n") < out.index("\nwarnings\n") < out.index("\nnotes\n")
    assert "pairs.jsonl:10  one text twice" in out and "remove them (--fix does)" in " ".join(out.split())
    assert "2 rows, 5.0 %" in out
    assert "stopped" in err and "identical" in err


def test_clean_rows_exit_with_0_and_the_level_can_be_chosen(tmp_path: Path, capsys: Any) -> None:
    path = planted.write(tmp_path / "clean.jsonl", planted.pairs(600))
    assert "nothing found by" in run(capsys, path)[0]
    few = planted.write(tmp_path / "few.jsonl", planted.pairs(30))
    run(capsys, few)
    run(capsys, few, "--fail-on", "note", code=1)
    run(capsys, few, "--fail-on", "sometimes", code=2)


def test_errors_can_be_left_to_the_reader(faulty: Path, capsys: Any) -> None:
    run(capsys, faulty, "--fail-on", "never")


def test_json_has_every_check_and_every_row(faulty: Path, capsys: Any) -> None:
    found = json.loads(run(capsys, faulty, "--json", code=1)[0])
    assert [check["name"] for check in found["checks"]] == [check.name for check in CHECKS]
    by_name = {check["name"]: check for check in found["checks"]}
    assert [row["where"] for row in by_name["contradiction"]["rows"]] == [f"{faulty}:7", f"{faulty}:8"]
    assert by_name["leaked"]["not_made"] and by_name["leaked"]["count"] is None
    assert by_name["markup"]["count"] == 0 and by_name["markup"]["not_made"] is None
    assert set(found["fired"]["error"]) == {"wrong-row", "empty", "contradiction", "identical"}


def test_what_is_safe_is_removed_and_recorded_and_columns_stay(faulty: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "clean.jsonl"
    _, err = run(capsys, faulty, "--fix", out, "--fail-on", "never")
    given, kept, removed = lines(faulty), lines(out), lines(tmp_path / "clean.removed.jsonl")
    gone = [3, 5, 6, 7, 9]
    assert kept == [row for row in given if row["id"] not in gone]
    assert [row["row"]["id"] for row in removed] == gone
    assert [row["row"] for row in removed] == [given[n] for n in gone]
    assert removed[1] == {
        "where": f"{faulty}:6",
        "checks": ["duplicate"],
        "why": [f"the same as {faulty}:5"],
        "row": given[5],
    }
    assert "wrote 35 rows" in err and "removed 5" in err


def test_more_is_removed_by_name(faulty: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "clean.jsonl"
    run(capsys, faulty, "--fix", out, "--remove", "refused", "--remove", "wrong-row", "--fail-on", "never")
    assert [row["id"] for row in lines(out)] == [n for n in range(40) if n not in (3, 5, 6, 7, 9, 11, 13)]
    run(capsys, out)


def test_what_names_no_rows_cannot_be_removed(faulty: Path, tmp_path: Path, capsys: Any) -> None:
    _, err = run(capsys, faulty, "--fix", tmp_path / "o.jsonl", "--remove", "length", code=2)
    assert "about the whole set" in err
    assert "with --fix" in run(capsys, faulty, "--remove", "refused", code=2)[1]
    assert "write over the data" in run(capsys, faulty, "--fix", faulty, code=2)[1]


def test_a_line_that_is_no_row_goes_to_the_record(tmp_path: Path, capsys: Any) -> None:
    path, out = planted.write(tmp_path / "rows.jsonl", planted.pairs(30)), tmp_path / "clean.jsonl"
    path.write_text(path.read_text() + '{"prompt": "cut sh\n')
    run(capsys, path, "--fix", out, "--fail-on", "never")
    [removed] = lines(tmp_path / "clean.removed.jsonl")
    assert len(lines(out)) == 30 and removed["checks"] == ["wrong-row"] and "cut short" in removed["why"][0]


CSV = {
    "label": ("prompt,completion,label", [f"q{n},an answer {n},{'True' if n % 2 else 'False'}" for n in range(20)]),
    "scores": (
        "prompt,chosen,rejected,score_chosen,score_rejected",
        [f'q{n},"a, good {n}",bad {n},{n + 2},{n}' for n in range(20)],
    ),
    "messages": (
        "prompt,chosen,rejected",
        [
            ",".join(
                f'"[{{""role"": ""{role}"", ""content"": ""{said} {n}""}}]"'
                for role, said in (("user", "q"), ("assistant", "good"), ("assistant", "bad"))
            )
            for n in range(20)
        ],
    ),
}


@pytest.mark.parametrize("name", CSV)
def test_rows_of_csv_stay_what_they_are(name: str, tmp_path: Path, capsys: Any) -> None:
    header, rows = CSV[name]
    path, out = tmp_path / "rows.csv", tmp_path / "clean.csv"
    path.write_text("\n".join([header, *rows, rows[0]]) + "\n")
    page, error = run(capsys, path, "--fix", tmp_path / "clean.jsonl", code=2)
    assert "ends in .csv" in error and "duplicate" in page  # what was found, perhaps by hours of a model, is not lost
    before = json.loads(run(capsys, path, "--fix", out, "--json")[0])
    after = json.loads(run(capsys, out, "--json")[0])
    assert (before["rows"], after["rows"], after["items"], after["shape"]) == (21, 20, 20, before["shape"])
    assert "duplicate" in before["fired"]["warning"] and "duplicate" not in after["fired"]["warning"]


def test_columns_that_json_has_no_form_for_are_written_so_that_they_are_read(tmp_path: Path, capsys: Any) -> None:
    import datetime

    import pyarrow
    import pyarrow.parquet

    rows = [{**row, "day": datetime.date(2024, 5, 1), "x": float("nan")} for row in planted.pairs(4)]
    path, out = tmp_path / "rows.parquet", tmp_path / "clean.jsonl"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    run(capsys, path, "--fix", out)
    assert [(row["day"], row["x"]) for row in lines(out)] == [("2024-05-01", None)] * 4
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**row, "raw": b"\xff"} for row in rows]), path)
    assert "rows.parquet:1: cannot be written as JSON" in run(capsys, path, "--fix", out, code=2)[1]


def test_half_of_a_surrogate_pair_does_not_stop_the_cleaned_file(tmp_path: Path, capsys: Any) -> None:
    path, out = planted.write(tmp_path / "rows.jsonl", planted.pairs(4)), tmp_path / "clean.jsonl"
    path.write_text(path.read_text() + '{"prompt": "h", "chosen": "a \\ud800", "rejected": "b"}\n')
    run(capsys, path, "--fix", out, "--fail-on", "never")
    assert lines(out) == lines(path)


@pytest.mark.parametrize(
    ("source", "out"),
    [
        ("in/a.jsonl", "in/a.jsonl"),
        ("in/a.removed.jsonl", "in/a.jsonl"),  # the record would take its place
        ("in/a.jsonl", "in/held.jsonl"),
        ("in", "in/a.jsonl"),
        ("in", "in/new.jsonl"),  # the next audit would read it, too
        ("in/a.jsonl", "out.parquet"),
        ("in/a.jsonl", "out"),
    ],
)
def test_fix_writes_over_nothing_that_is_read_and_nothing_that_cannot_be(
    source: str, out: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    for name in ("a", "a.removed", "held"):
        planted.write(tmp_path / "in" / f"{name}.jsonl", planted.pairs(5))
    before = {file: file.read_bytes() for file in Path().rglob("*.jsonl")}
    assert f"--fix {out}: " in run(capsys, source, "--eval", "in/held.jsonl", "--fix", out, code=2)[1]
    assert {file: file.read_bytes() for file in Path().rglob("*.*") if file.is_file()} == before


def test_leaked_rows_are_removed(tmp_path: Path, capsys: Any) -> None:
    rows = planted.pairs(30)
    path, held = planted.write(tmp_path / "a.jsonl", rows), planted.write(tmp_path / "b.jsonl", rows[:4])
    out = tmp_path / "clean.jsonl"
    run(capsys, path, "--eval", held, "--fix", out, "--fail-on", "never")
    assert lines(out) == rows[4:]


def test_a_tree_stays_where_some_of_its_answers_are_fine(tmp_path: Path, capsys: Any) -> None:
    def tree(name: str, *said: str) -> dict[str, Any]:
        replies = [{"text": text, "role": "assistant", "rank": rank} for rank, text in enumerate(said)]
        return {"message_tree_id": name, "prompt": {"text": f"{name}?", "role": "prompter", "replies": replies}}

    # of a's three pairs one is restyled; b's only pair is
    rows = [tree("a", "One day.", "Two.", "ONE DAY!"), tree("b", "One day.", "ONE DAY!")]
    path, out = planted.write(tmp_path / "trees.jsonl", rows), tmp_path / "clean.jsonl"
    _, err = run(capsys, path, "--fix", out, "--remove", "restyled", "--fail-on", "never")
    assert lines(out) == rows[:1]
    assert "kept, since only some of what they hold was named: 1" in err


def test_cleaned_files_are_read_by_training(faulty: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "clean.jsonl"
    run(capsys, faulty, "--fix", out, "--remove", "wrong-row", "--fail-on", "never")
    assert len(read_prompts(out)[0]) == 34


def test_help_and_the_list_of_checks(capsys: Any) -> None:
    out = run(capsys, "--help")[0]
    assert "model_rows" in out and "--fail-on" in out
    out = run(capsys, "--list")[0]
    assert all(f"{check.name} ({check.severity})" in out for check in CHECKS)
    assert json.loads(run(capsys, "--list", "--json")[0])[0]["name"] == CHECKS[0].name


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "needs one file of rows, none is given"),
        (["a.jsonl", "b.jsonl"], "got a.jsonl b.jsonl"),
        (["a.jsonl"], "no such file"),
        (["a" * 300 + ".jsonl"], "cannot be read: File name too long"),
        (["a.jsonl", "exampels=2"], "did you mean examples"),
        (["a.jsonl", "model_rows=5"], "read with --model"),
        (["a.jsonl", "--fixx", "b"], "did you mean --fix"),
    ],
)
def test_what_the_user_gets_wrong_is_said(words: list[str], said: str, tmp_path: Path, capsys: Any) -> None:
    assert said in run(capsys, *words, code=2)[1]
