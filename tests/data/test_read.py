"""Files to rows: every format gives the same rows, and every fault is named by file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.data.read import Row, RowError, read, unread
from prefopt.records import InputError

ROWS = [{"prompt": "a", "chosen": "b\u2028c", "rejected": "d"}, {"prompt": "é", "chosen": "\n", "rejected": "🙂"}]


def values(path: Path | str) -> list[dict[str, Any]]:
    return [item.values for item in rows(path)]


def rows(path: Path | str) -> list[Row]:
    found = list(read(path))
    for item in found:
        if isinstance(item, RowError):
            raise item
    return found  # type: ignore[return-value]


def lines(*items: Any) -> bytes:
    return "\n".join(json.dumps(item, ensure_ascii=False) for item in items).encode()


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", ["r.jsonl", "r.ndjson", "r.json", "r.jsonl.gz"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n  \n"])
@pytest.mark.fault(11)
def test_json_lines_are_read_with_and_without_mark_gzip_and_blank_ends(
    name: str, mark: bytes, end: bytes, tmp_path: Path
) -> None:
    data = mark + lines(*ROWS) + end
    assert values(write(tmp_path / name, gzip.compress(data) if name.endswith("gz") else data)) == ROWS


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_is_read_and_its_rows_know_their_lines(indent: int | None, tmp_path: Path) -> None:
    path = write(tmp_path / "r.json", b"\xef\xbb\xbf" + json.dumps(ROWS, indent=indent).encode() + b"\n")
    assert values(path) == ROWS
    assert [row.where for row in rows(path)] == [f"{path}:{n}" for n in ((1, 1) if indent is None else (2, 7))]


def test_an_array_of_texts_is_rows_of_text(tmp_path: Path) -> None:
    assert values(write(tmp_path / "r.json", b'["a", "b"]')) == [{"text": "a"}, {"text": "b"}]


def test_parquet_and_saved_datasets_are_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list(ROWS)
    made.to_parquet(str(tmp_path / "r.parquet"))
    made.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": made, "test": made.select([1])}).save_to_disk(str(tmp_path / "splits"))
    assert values(tmp_path / "r.parquet") == values(tmp_path / "saved") == values(tmp_path / "splits") == ROWS
    assert values(f"{tmp_path / 'splits'}@test") == ROWS[1:]
    with pytest.raises(InputError, match=r"no split 'dev'; it holds train, test"):
        rows(f"{tmp_path / 'splits'}@dev")


def test_csv_and_tsv_are_read_with_their_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "r.csv", b'\xef\xbb\xbfprompt,chosen\n"a, b","two\nlines"\n\nc,d\n')
    assert values(path) == [{"prompt": "a, b", "chosen": "two\nlines"}, {"prompt": "c", "chosen": "d"}]
    assert [row.where for row in rows(path)] == [f"{path}:2", f"{path}:5"]
    assert all(row.untyped for row in rows(path))
    assert values(write(tmp_path / "r.tsv", b"prompt\tchosen\na, b\tc\n")) == [{"prompt": "a, b", "chosen": "c"}]


def test_a_directory_is_its_files_in_order_of_name(tmp_path: Path) -> None:
    for name, row in zip(("b.jsonl", "a.jsonl"), ROWS, strict=True):
        write(tmp_path / name, lines(row))
    write(tmp_path / "README.md", b"# not data")
    assert values(tmp_path) == ROWS[::-1]
    assert values(f"{tmp_path}@b") == ROWS[:1]


@pytest.mark.parametrize("inner", ["", "data"])
@pytest.mark.parametrize("name", ["{}.jsonl", "{}-00000-of-00001.json", "pairs_{}.jsonl.gz"])
def test_a_directory_with_splits_is_its_training_split_unless_another_is_named(
    name: str, inner: str, tmp_path: Path
) -> None:
    folder = tmp_path / inner
    folder.mkdir(exist_ok=True)
    files = {split: name.format(split) for split in ("train", "test", "validation")}
    for number, (split, file) in enumerate(files.items()):
        data = lines({"text": split, "number": number})
        write(folder / file, gzip.compress(data) if file.endswith("gz") else data)
    assert [row["text"] for row in values(tmp_path)] == ["train"]
    assert unread(tmp_path) == sorted([files["test"], files["validation"]])
    for asked, split in (("test", "test"), ("validation", "validation"), ("val", "validation"), ("train", "train")):
        assert [row["text"] for row in values(f"{tmp_path}@{asked}")] == [split]
        assert unread(f"{tmp_path}@{asked}") == []


def test_a_directory_whose_splits_leave_open_what_to_train_on_is_refused_with_the_choices(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", GOOD)
    assert values(tmp_path) == ROWS[:1]
    for other in ("dev.jsonl", "pairs.jsonl"):
        write(tmp_path / other, GOOD)
        with pytest.raises(InputError, match=rf"several splits \({other}, test.jsonl\); add @NAME"):
            rows(tmp_path)
        (tmp_path / other).unlink()


def test_a_hub_name_names_configuration_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name: str, config: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((name, config, split))
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert values("some/set") == values("some/set:main@test") == ROWS
    assert asked == [("some/set", None, "train"), ("some/set", "main", "test")]
    assert [row.where for row in rows("some/set@test")] == ["some/set@test:1", "some/set@test:2"]


@pytest.mark.fault(40)
def test_a_hub_name_that_cannot_be_loaded_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"some/set: neither a path here nor a dataset .* \(no route to the hub\)"):
        rows("some/set")


GOOD = lines(ROWS[0]) + b"\n"
FAULTS = {
    "corrupt line": (GOOD + b'{"a" 1}\n', r":2: corrupt JSON: .* at column 6; repair the line"),
    "cut line": (GOOD + b'{"prompt": "a', r":2: the JSON is cut short: .* column 12"),
    "cut object": (GOOD + b'{"prompt": "a",', r":2: the JSON is cut short"),
    "two objects": (b"{} {}\n", r":1: corrupt JSON: extra data"),
    "number": (GOOD + b"5\n", r":2: the row is a number; a JSON object"),
    "NaN": (GOOD + b'{"score": NaN}\n', r":2: NaN is not JSON: .*; write null, or drop the row"),
    "infinity": (b'{"score": -Infinity}\n', r":1: -Infinity is not JSON"),
    "duplicate": (b'{"a": 1, "b": {"c": 1, "c": 2}}\n', r":1: duplicate key: 'c' appears twice"),
    "utf-8": (GOOD + b'{"a": "\xff"}\n', r":2: not UTF-8: byte 8 of the line; save the file as UTF-8"),
    "NUL": (GOOD + b"\0\0\0\n", r":2: the line holds NUL bytes"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), r":1: the file is UTF-16; save it as UTF-8"),
    "empty": (b"", r"the file holds no rows"),
    "only blanks": (b"\n \n", r"the file holds no rows"),
    "deep": (b'{"a": ' + b"[" * 100_000 + b"\n", r":1: (JSON nested too deeply|the JSON is cut short)"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.fault(10, 11, 12)
def test_a_bad_line_is_named_with_its_fault_and_what_to_do(fault: str, tmp_path: Path) -> None:
    data, message = FAULTS[fault]
    path = write(tmp_path / "r.jsonl", data)
    with pytest.raises(InputError, match=message) as caught:
        rows(path)
    assert str(path) in str(caught.value)


ARRAYS = {
    "cut in a row": (b'[{"a": 1},\n{"a": ', r":2: the JSON is cut short"),
    "cut after a row": (b'[{"a": 1}\n', r":\d: corrupt JSON; a comma or \] is missing"),
    "cut after a comma": (b'[{"a": 1},\n', r":2: the JSON is cut short"),
    "no comma": (b'[{"a": 1}\n{"a": 2}]', r":2: corrupt JSON; a comma or \] is missing"),
    "more": (b'[{"a": 1}]\n[]', r"there is more after the array"),
    "NaN": (b'[{"a": 1},\n\n{"a": NaN}]', r":3: NaN is not JSON"),
    "duplicate": (b'[{"a": 1},\n{"a": 1, "a": 2}]', r":2: duplicate key"),
    "NUL": (b'[{"a": 1},\n\0]', r":2: the line holds NUL"),
    "utf-8": (b'[{"a": 1},\n"\xff"]', r":2: not UTF-8"),
    "empty": (b"[]", r"the file holds no rows"),
    "number": (b'[{"a": 1},\n 7]', r":2: the row is a number"),
}


@pytest.mark.parametrize("fault", ARRAYS)
@pytest.mark.fault(10, 11)
def test_a_fault_of_an_array_is_named_by_its_line(fault: str, tmp_path: Path) -> None:
    data, message = ARRAYS[fault]
    with pytest.raises(InputError, match=message):
        rows(write(tmp_path / "r.json", data))


@pytest.mark.fault(10)
def test_rows_after_a_bad_one_are_still_there_for_who_skips_it(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", b"nonsense\n" + lines(*ROWS))
    assert [type(item) for item in read(path)] == [RowError, Row, Row]
    path = write(tmp_path / "r.json", b'[{"a": NaN}, 3, {"a": 1, "a": 2}, {"a": 2}]')
    assert [type(item) for item in read(path)] == [RowError, RowError, RowError, Row]


def test_other_files_are_refused_with_the_reason(tmp_path: Path) -> None:
    for name, data, message in (
        ("r.txt", b"a", r"unknown suffix .txt; known: .jsonl"),
        ("r.parquet", b"PAR1 no", r"not a whole Parquet file"),
        ("r.csv", b"a,a\n1,2\n", r":1: column 'a' appears twice"),
        ("cells.csv", b"a,b\n1,2\n3\n", r":3: wrong number of cells: 1, the header has 2"),
        ("quote.csv", b'a,b\n1,"2\n', r":2: .*; check the quotes"),
        ("r.jsonl.gz", gzip.compress(GOOD)[:-9], r"the gzip stream is damaged"),
        ("plain.jsonl.gz", GOOD, r"the gzip stream is damaged"),
    ):
        with pytest.raises(InputError, match=message):
            rows(write(tmp_path / name, data))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no data file here"):
        rows(tmp_path / "empty")


def test_a_missing_file_names_the_one_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "pairs.jsonl", GOOD)
    with pytest.raises(InputError, match=r"no such file or directory; did you mean .*pairs\.jsonl\?"):
        rows(tmp_path / "pair.jsonl")
    with pytest.raises(InputError, match=r"no such file or directory; give a path, or a hub name"):
        rows("nowhere/at/all.jsonl")


@settings(deadline=None, max_examples=50)
@given(
    items=st.lists(st.dictionaries(st.text(), st.none() | st.text() | st.integers() | st.lists(st.text())), min_size=1),
    indent=st.sampled_from([None, 1]),
)
def test_any_json_objects_are_read_back_from_lines_and_from_an_array(
    items: list[dict[str, Any]], indent: int | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("any")
    assert values(write(folder / "r.jsonl", lines(*items))) == items
    assert values(write(folder / "r.json", json.dumps(items, indent=indent).encode())) == items


def test_a_parquet_file_without_rights_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.parquet

    def refused(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Failed to open local file. Detail: [errno 13] Permission denied")

    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", refused)
    with pytest.raises(InputError, match=r"rows\.parquet: cannot be read: Permission denied"):
        list(read(tmp_path / "rows.parquet"))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json.gz", "rows.csv"])
def test_a_file_without_rights_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so the system's refusal is put in its place."""
    path = tmp_path / name
    path.write_bytes(b"[]")

    def refused(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("io.open", refused)
    monkeypatch.setattr("builtins.open", refused)
    monkeypatch.setattr(Path, "open", refused)
    monkeypatch.setattr(gzip, "open", refused)
    with pytest.raises(InputError, match=f"{name}: cannot be read: Permission denied"):
        list(read(path))
