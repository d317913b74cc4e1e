"""Faults 10 to 12 through the command line: what is wrong in a file is said with its line, before any weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from laws import save_model

from prefopt import cli
from prefopt.recipes import train as recipe

PAIR = {"prompt": "red cat :", "chosen": " good", "rejected": " bad"}
GOOD = (json.dumps(PAIR) + "\n").encode()
TURNS = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "good"}]


def pair(**changes: Any) -> bytes:
    row = {name: value for name, value in {**PAIR, **changes}.items() if value != "(none)"}
    return json.dumps(row).encode() + b"\n"


# a file's bytes after three good rows -> what is said of it; every one has a message of its own
BROKEN = {
    "no JSON": (b'{"prompt": "red" "chosen"}\n', r":4: corrupt JSON: expecting ',' delimiter at column 18; repair"),
    "a cut last line": (GOOD[:30], ":4: the JSON is cut short: unterminated string"),
    "a cut object": (b'{"prompt": "red", ', ":4: the JSON is cut short: "),
    "NUL bytes": (GOOD + b"\0" * 512, ":5: the line holds NUL bytes; the file was damaged or cut"),
    "no UTF-8": (b'{"prompt": "caf\xe9"}\n', ":4: not UTF-8: byte 16 of the line; save the file as UTF-8"),
    "a key twice": (b'{"prompt": "a", "prompt": "b"}\n', ":4: duplicate key: 'prompt' appears twice in one object"),
    "NaN": (b'{"prompt": "a", "chosen": NaN, "rejected": "c"}\n', ":4: NaN is not JSON"),
    "a column is not there": (pair(chosen="(none)"), ":4: "),
    "a column is null": (pair(chosen=None), ":4: "),
    "a column changes its type": (pair(chosen=7), ":4: "),
    "text becomes turns": (pair(chosen=TURNS), ":4: "),
    "a score is text": (pair(score_chosen="high", score_rejected=0), ":4: "),
    "a row is a list": (b"[1, 2]\n", ":4: the row is a list; a JSON object with named columns is expected"),
}


@pytest.fixture
def model_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "load_model", lambda *given: pytest.fail("weights were read"))
    return save_model(tmp_path / "model")


def words(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    return ["train", "dpo", "--model", str(model), "--data", str(data), "--out", str(out), *more]


@pytest.mark.fault(10, 11, 12)
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_row_is_said_with_its_file_and_line_and_skip_bad_counts_it(name, model_dir, tmp_path, capsys):
    broken, message = BROKEN[name]
    data = tmp_path / "pairs.jsonl"
    data.write_bytes(GOOD * 3 + broken + (b"" if name in ("a cut last line", "a cut object", "NUL bytes") else GOOD))
    assert cli.main(words(model_dir, data, tmp_path / "run")) == 2
    said = capsys.readouterr().err
    assert f"error: {data}{message}" in said and said.count("\n") == 1
    assert not (tmp_path / "run" / "model").exists()
    dry = ["--dry-run", "--json", "--skip-bad", "eval_fraction=0"]
    assert cli.main(words(model_dir, data, tmp_path / "run", *dry)) == 0
    counted = json.loads(capsys.readouterr().out)["data"]
    assert counted["rows"] == data.read_bytes().count(GOOD)
    assert list(counted["dropped"].values()) == [1]


@pytest.mark.fault(11)
@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"], ids=["nothing", "blank lines", "a mark alone"])
def test_a_file_without_rows_is_refused(content, model_dir, tmp_path, capsys):
    data = tmp_path / "pairs.jsonl"
    data.write_bytes(content)
    assert cli.main(words(model_dir, data, tmp_path / "run")) == 2
    assert f"{data}: the file holds no rows; check that it was written to the end" in capsys.readouterr().err


@pytest.mark.fault(11)
def test_a_mark_at_the_start_is_read_past(model_dir, tmp_path, capsys):
    data = tmp_path / "pairs.jsonl"
    data.write_bytes(b"\xef\xbb\xbf" + GOOD * 4)
    assert cli.main(words(model_dir, data, tmp_path / "run", "--dry-run", "--json", "eval_fraction=0")) == 0
    assert json.loads(capsys.readouterr().out)["data"]["rows"] == 4


@pytest.mark.fault(12)
def test_null_and_nan_in_a_table_are_no_texts(model_dir, tmp_path, capsys):
    import pyarrow
    import pyarrow.parquet

    for number, (chosen, kind) in enumerate(
        [([" good", None], pyarrow.string()), ([1.0, float("nan")], pyarrow.float64())]
    ):
        table = {"prompt": ["red :", "cat :"], "chosen": pyarrow.array(chosen, kind), "rejected": [" bad", " bad"]}
        data = tmp_path / f"{number}.parquet"
        pyarrow.parquet.write_table(pyarrow.table(table), data)
        assert cli.main(words(model_dir, data, tmp_path / "run")) == 2
        assert f"error: {data}:{2 - number}: " in capsys.readouterr().err
