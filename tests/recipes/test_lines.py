"""A file of lines holds whole ones, in their order, whatever the disk and the last life of the run did to it."""

from __future__ import annotations

import contextlib
import json
import logging
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.recipes import lines as module
from prefopt.recipes.lines import Lines, whole


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def held(path: Path) -> list[Any]:
    """Every line of the file; an error where one is no JSON."""
    text = path.read_bytes()
    assert not text or text.endswith(b"\n")
    return [json.loads(line) for line in text.splitlines()]


def test_lines_are_appended_and_outlive_the_object(path):
    Lines(path).append({"step": 1})
    Lines(path).append({"step": 2, "loss": float("nan")})
    assert held(path) == [{"step": 1}, {"step": 2, "loss": None}]


@pytest.mark.fault(39)
@pytest.mark.parametrize("torn", ['{"step": 2, "lo', "{", "\0\0\0\0", "x" * 200_000])
def test_a_torn_last_line_does_not_run_into_the_next(torn, path):
    Lines(path).append({"step": 1})
    with path.open("a") as file:
        file.write(torn)
    Lines(path).append({"step": 2})
    assert held(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.fault(39)
@given(cut=st.integers(0, 60))
@settings(max_examples=61, deadline=None)
def test_wherever_the_file_was_cut_it_goes_on_with_whole_lines(cut, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "cut.jsonl"
    path.unlink(missing_ok=True)
    lines = Lines(path)
    for step in range(4):
        lines.append({"step": step, "é": "ü"})
    state, content = lines.state_dict(), path.read_bytes()
    path.write_bytes(content[: len(content) - cut])
    num_whole = path.read_bytes().count(b"\n")
    resumed = Lines(path)
    resumed.load_state_dict(state)
    resumed.append({"step": 4})
    *before, last = held(path)
    assert last == {"step": 4} and [line["step"] for line in before] == list(range(num_whole))


def test_what_was_written_after_the_checkpoint_is_taken_back(path, caplog):
    lines = Lines(path)
    lines.append(1)
    state = lines.state_dict()
    lines.append(2)
    resumed = Lines(path)
    resumed.load_state_dict(state)
    assert held(path) == [1]
    resumed.append(3)
    assert held(path) == [1, 3] and not caplog.records


@pytest.mark.parametrize("left", [None, b"", b'"a"\n"b'])
def test_a_file_that_was_shortened_while_the_run_goes_on_has_no_holes(left, path):
    """Cutting to the length it should have would fill up with NUL bytes."""
    lines = Lines(path)
    for number in range(20):
        lines.append(number)
    path.unlink()
    if left is not None:
        path.write_bytes(left)
    lines.append("next")
    lines.append("last")
    assert held(path) == [*(["a"] if left else []), "next", "last"]


def test_half_a_surrogate_pair_is_written_as_json_has_it(path):
    Lines(path).append({"completion": "\ud83d", "é": 1})
    assert held(path) == [{"completion": "\ud83d", "é": 1}]


# ---------------------------------------------------------------- full disks


@contextlib.contextmanager
def room(path: Path, size: int) -> Iterator[None]:
    """The file may grow by so many bytes and no more."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.fault(7)
def test_lines_wait_while_the_disk_is_full_and_come_in_order_with_one_warning(path, caplog):
    lines = Lines(path)
    lines.append(100)
    with caplog.at_level(logging.WARNING, "prefopt"), room(path, 6):  # a line and a half
        for number in range(200, 210):
            lines.append(number)
    assert len(caplog.records) == 1 and "its lines wait in memory" in caplog.text
    assert path.read_bytes().startswith(b"100\n200\n") and len(lines.waiting) == 9
    lines.append(300)
    assert held(path) == [100, *range(200, 210), 300]


@pytest.mark.fault(7)
def test_at_the_end_what_waits_is_written_or_it_is_said_how_much_is_lost(path, caplog):
    lines = Lines(path)
    lines.append(1)
    with room(path, 0):
        lines.append(2)
        lines.append(3)
        caplog.clear()
        lines.close()
    assert "its last 2 lines could not be written" in caplog.text
    lines.close()
    assert held(path) == [1, 2, 3]


def test_what_waits_is_part_of_the_state(path):
    lines = Lines(path)
    lines.append(1)
    with room(path, 1):
        lines.append(200)
    state = json.loads(json.dumps(lines.state_dict()))
    resumed = Lines(path)
    resumed.load_state_dict(state)
    resumed.append(3)
    assert held(path) == [1, 200, 3]


def test_only_so_many_lines_wait(path, monkeypatch):
    monkeypatch.setattr(module, "MOST_WAITING", 3)
    path.touch()
    lines = Lines(path)
    with room(path, 0):
        for number in range(10):
            lines.append(number)
    lines.append(10)
    assert held(path) == [8, 9, 10]


@pytest.mark.parametrize(
    ("text", "most", "size"), [(b"", None, 0), (b"a", None, 0), (b"a\nb\nc", None, 4), (b"a\nb\n", 3, 2)]
)
def test_whole_counts_the_bytes_of_whole_lines(text, most, size, path):
    path.write_bytes(text)
    assert whole(path, most) == size


def test_the_end_of_a_line_is_looked_for_in_every_piece(path):
    path.write_bytes(b"a\n" + b"x" * (3 * module.PIECE))
    assert whole(path) == 2 and whole(path.with_name("not there")) == 0
