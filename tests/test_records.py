"""What travels between layers without torch: JSON that any reader takes, and files that are whole or not there."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from prefopt.records import Example, append_json, plain, write_json


def test_num_tokens_counts_the_prompt_once():
    assert Example([1, 2, 3], [[4, 5], [6]], [1.0, 0.0], [[True, True], [True]]).num_tokens == 6


def test_numbers_that_json_does_not_know_become_null_at_any_depth():
    given = {"a": math.nan, "b": [math.inf, 1.5, {"c": -math.inf}], "d": (1, 2.0), 3: Path("x/y"), "e": None}
    assert plain(given) == {"a": None, "b": [None, 1.5, {"c": None}], "d": [1, 2.0], "3": "x/y", "e": None}
    json.dumps(plain(given), allow_nan=False)


def test_booleans_and_whole_numbers_stay_what_they_are():
    assert json.dumps(plain({"on": True, "n": 3})) == '{"on": true, "n": 3}'


def test_write_json_makes_folders_replaces_and_leaves_no_temporary_file(tmp_path):
    path = tmp_path / "deep" / "summary.json"
    write_json(path, {"value": 1})
    write_json(path, {"value": math.nan, "name": "é"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"value": None, "name": "é"}
    assert [file.name for file in path.parent.iterdir()] == ["summary.json"]


def test_a_reader_never_sees_half_a_file(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_json(path, {"value": 1})

    def fail(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"value": 2})
    assert json.loads(path.read_text(encoding="utf-8")) == {"value": 1}


def test_append_json_adds_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_json(path, {"step": 1, "text": "two\nlines"})
    append_json(path, {"step": 2})
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == [
        {"step": 1, "text": "two\nlines"},
        {"step": 2},
    ]
