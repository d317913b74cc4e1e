"""Files to rows: every row knows its `file:line`, and nothing is coerced on the way.

JSON lines, a JSON array, both gzipped, Parquet, CSV and TSV, a directory of such files, a directory written by
`datasets.save_to_disk`, or a hub name `owner/name[:config][@split]`.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from prefopt.records import InputError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv")
HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.\[\]:%+-]+))?")
# Words of a file's name that say which split it holds, as the `datasets` library takes them.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
BOM = b"\xef\xbb\xbf"


class RowError(InputError):
    """One row is wrong: `where: found; what to do`. `reason` is one per kind of fault, for counts."""

    def __init__(self, where: str, reason: str, todo: str, detail: str = "") -> None:
        self.where, self.reason = where, reason
        super().__init__(f"{where}: {reason}{': ' + detail if detail else ''}; {todo}")


@dataclass(frozen=True)
class Row:
    """One row as the file holds it. untyped: from CSV, where every cell is text."""

    where: str
    values: dict[str, Any]
    untyped: bool = False


def read(source: str | Path) -> Iterator[Row | RowError]:
    """The rows of a file, a directory or a hub dataset, bad rows as the error that names them.

    InputError where the source as a whole cannot be read: missing, empty, no rights, unknown suffix, not the format it
    claims.
    """
    found = False
    try:
        for item in _open(source):
            found = True
            yield item
    except OSError as error:
        raise InputError(f"{error.filename or source}: cannot be read: {error.strerror or error}") from None
    if not found:
        raise InputError(f"{source}: the file holds no rows; check that it was written to the end")


def _open(source: str | Path) -> Iterator[Row | RowError]:
    path, split = _parted(source)
    if path.is_file() and split is None:
        return _file(path)
    if path.is_dir():
        return _directory(path, split)
    hub = HUB_NAME.fullmatch(str(source))
    if hub and not str(source).endswith((*SUFFIXES, ".gz")):
        return _hub(hub["name"], hub["config"], hub["split"] or "train")
    raise InputError(f"{source}: no such file or directory{_near(Path(source))}")


def _parted(source: str | Path) -> tuple[Path, str | None]:
    """A path and the split that `@` names after it."""
    path = Path(source)
    if path.exists() or "@" not in path.name:
        return path, None
    name, split = str(source).rsplit("@", 1)
    return Path(name), split


def unread(source: str | Path) -> list[str]:
    """Names of the files that `read` leaves out of a folder, because others hold the training split."""
    path, split = _parted(source)
    if split or not path.is_dir() or _is_saved(path):
        return []
    taken = _chosen(path, None)
    return [file.name for file in _files(path) if file not in taken]


def _near(path: Path) -> str:
    """A hint: the name beside the missing one that looks most like it."""
    beside = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, beside, 1)
    return f"; did you mean {path.parent / close[0]}?" if close else "; give a path, or a hub name like owner/name"


def _file(path: Path) -> Iterator[Row | RowError]:
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(
            f"{path}: unknown suffix {suffix or '(none)'}; known: {', '.join(SUFFIXES)}, and .gz of the text ones"
        )
    if suffix == ".parquet":
        return _parquet(path)
    if suffix in (".csv", ".tsv"):
        return _csv(path, "\t" if suffix == ".tsv" else ",")
    return _json(path)


def _json(path: Path) -> Iterator[Row | RowError]:
    """A JSON array or JSON lines: told apart by the first character, since `.json` is used for both."""
    starts = (line.removeprefix(BOM).lstrip() for _, line in _numbered(path))
    head = next((start for start in starts if start), b"")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{path}:1: the file is UTF-16; save it as UTF-8")
    return _array(path) if head.startswith(b"[") else _lines(path)


def _bytes(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path) if path.suffix == ".gz" else path.open("rb"))


def _numbered(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers, from 1. Only a line feed ends a line: JSON strings may hold other separators."""
    number = 0
    try:
        with _bytes(path) as file:
            for number, line in enumerate(file, 1):
                yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}:{number + 1}: the gzip stream is damaged ({error}); copy the file again") from None


def _lines(path: Path) -> Iterator[Row | RowError]:
    for number, line in _numbered(path):
        line = line.removeprefix(BOM) if number == 1 else line
        if line.strip():
            try:
                yield _row(f"{path}:{number}", _loads(_text(line, f"{path}:{number}"), f"{path}:{number}"))
            except RowError as error:
                yield error


def _text(data: bytes, where: str) -> str:
    if b"\0" in data:
        raise RowError(
            where, "the line holds NUL bytes", "the file was damaged or cut while being written: write it again"
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(where, "not UTF-8", "save the file as UTF-8", f"byte {error.start + 1} of the line") from None


class _Refused(ValueError):
    """JSON that is well-formed and not taken. args: reason, detail, what to do."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _Refused("duplicate key", f"{twice!r} appears twice in one object", "keep one")
    return values


def _constant(name: str) -> Any:
    raise _Refused(f"{name} is not JSON", "the value of a column", "write null, or drop the row")


_decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_constant)


def _loads(text: str, where: str) -> Any:
    """One JSON value. RowError, with the column, if it is corrupt, cut short, has a key twice or holds NaN."""
    try:
        return _decoder.decode(text)
    except _Refused as error:
        raise _refused(where, error) from None
    except json.JSONDecodeError as error:
        raise _broken(where, error, text, 0) from None
    except RecursionError:
        raise _deep(where) from None
    except ValueError as error:
        raise _digits(where, error) from None


def _refused(where: str, error: _Refused) -> RowError:
    reason, detail, todo = error.args
    return RowError(where, reason, todo, detail)


def _deep(where: str) -> RowError:
    return RowError(where, "JSON nested too deeply", "one flat object per row is expected")


def _digits(where: str, error: ValueError) -> RowError:
    """Python reads no whole number of thousands of digits."""
    return RowError(where, "a number of too many digits", "write it as text, or drop the row", str(error).split(";")[0])


def _broken(where: str, error: json.JSONDecodeError, text: str, start: int) -> RowError:
    cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
    column = f"{error.msg.lower()} at column {error.pos - start + 1}"
    if cut:
        return RowError(
            where,
            "the JSON is cut short",
            "the file was not written to the end, or a line break is missing its \\n escape",
            column,
        )
    return RowError(where, "corrupt JSON", "repair the line or drop it (skip_bad)", column)


def _row(where: str, value: Any) -> Row:
    if isinstance(value, str):
        return Row(where, {"text": value})
    if not isinstance(value, dict):
        raise RowError(where, f"the row is {kind_of(value)}", "a JSON object with named columns is expected")
    return Row(where, value)


def _array(path: Path) -> Iterator[Row | RowError]:
    """The elements of one JSON array, each with the line it starts on."""
    data = b"".join(line for _, line in _numbered(path)).removeprefix(BOM)
    text = _whole(data, path)
    position, line, counted = text.index("[") + 1, 1, 0
    while True:
        position = _skip(text, position)
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] == "]":
            break
        item, position = _element(text, position, path, line)
        yield item
        position = _skip(text, position)
        if text[position : position + 1] not in (",", "]"):
            line += text.count("\n", counted, position)
            raise RowError(
                f"{path}:{line}", "corrupt JSON", "a comma or ] is missing after the row, or the file is cut short"
            )
        position += text[position] == ","
    if text[position + 1 :].strip():
        raise InputError(
            f"{path}:{line}: there is more after the array's closing bracket; keep one array, or use JSON lines"
        )


def _element(text: str, position: int, path: Path, line: int) -> tuple[Row | RowError, int]:
    """One element of the array and where it ends. RowError raised: the array is broken; returned: this row is."""
    where = f"{path}:{line}"
    try:
        try:
            value, end = _decoder.raw_decode(text, position)
            return _row(where, value), end
        except RowError as error:
            return error, end
        except _Refused as error:
            return _refused(where, error), json.JSONDecoder().raw_decode(text, position)[1]
    except RecursionError:
        raise _deep(where) from None
    except json.JSONDecodeError as error:
        at = line + text.count("\n", position, error.pos)
        raise _broken(f"{path}:{at}", error, text, text.rfind("\n", 0, error.pos) + 1) from None
    except ValueError as error:
        raise _digits(where, error) from None


_space = re.compile(r"[ \t\r\n]*")


def _skip(text: str, position: int) -> int:
    match = _space.match(text, position)
    return match.end() if match else position


def _whole(data: bytes, path: Path) -> str:
    """The text of a file that cannot be read line by line, its faults still named by line."""
    if b"\0" in data:
        _text(b"\0", f"{path}:{data.count(bytes([10]), 0, data.find(0)) + 1}")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8; save the file as UTF-8") from None


def _csv(path: Path, delimiter: str) -> Iterator[Row | RowError]:
    data = b"".join(line for _, line in _numbered(path)).removeprefix(BOM)
    csv.field_size_limit(2**31 - 1)
    lines = csv.reader(io.StringIO(_whole(data, path), newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    start = 1
    try:
        for cells in lines:
            where, start = f"{path}:{start}", lines.line_num + 1
            if header is None:
                header = _header(cells, where)
            elif cells and len(cells) != len(header):
                todo = "quote cells that hold the delimiter or a line break"
                yield RowError(where, "wrong number of cells", todo, f"{len(cells)}, the header has {len(header)}")
            elif cells:
                yield Row(where, dict(zip(header, cells, strict=True)), untyped=True)
    except csv.Error as error:
        raise InputError(f"{path}:{start}: {error}; check the quotes of this row") from None


def _header(cells: list[str], where: str) -> list[str]:
    twice = [name for name in cells if cells.count(name) > 1]
    if twice:
        raise InputError(f"{where}: column {twice[0]!r} appears twice in the header; rename one")
    return cells


def _parquet(path: Path) -> Iterator[Row | RowError]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}:{number}", values)
    except PermissionError as error:
        raise PermissionError(error.errno, "Permission denied", str(path)) from None  # Arrow's names no file
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # names and dates that are none
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: not a whole Parquet file ({why}); write or copy it again") from None


def _directory(path: Path, split: str | None) -> Iterator[Row | RowError]:
    if _is_saved(path):
        yield from _saved(path, split)
        return
    for file in _chosen(path, split):
        yield from _file(file)


def _is_saved(path: Path) -> bool:
    return (path / "state.json").exists() or (path / "dataset_dict.json").exists()


def _chosen(path: Path, split: str | None) -> list[Path]:
    """The folder's files of one split: the one asked for, else train, else all if no name tells them apart.

    InputError, naming the choices, where the names say several splits and none is train.
    """
    files = _files(path)
    found = {_split_of(file) for file in files}
    if split:
        wanted = SPLITS.get(split, split)
        files = [file for file in files if _split_of(file) == wanted or file.name.startswith(split)]
    elif "train" in found:
        files = [file for file in files if _split_of(file) == "train"]
    elif len(found) > 1:
        names = ", ".join(file.name for file in files)
        raise InputError(f"{path}: the files are of several splits ({names}); add @NAME to the path, or give one file")
    if not files:
        raise InputError(
            f"{path}: no data file{f' of split {split!r}' if split else ''} here; known: {', '.join(SUFFIXES)}"
        )
    return files


def _split_of(file: Path) -> str | None:
    """The split that a file's name says: `test-00000-of-00002.parquet` is of test."""
    return next((SPLITS[word] for word in re.split("[^a-z]+", file.name.lower()) if word in SPLITS), None)


def _files(path: Path) -> list[Path]:
    """The data files of a folder, or of the folder `data` in it."""
    for folder in (path, path / "data"):
        inside = folder.iterdir() if folder.is_dir() else []
        files = sorted(item for item in inside if item.name.removesuffix(".gz").lower().endswith(SUFFIXES))
        if files:
            return files
    return []


def _saved(path: Path, split: str | None) -> Iterator[Row]:
    """A directory written by `datasets.save_to_disk`: one dataset, or a dictionary of splits."""
    import datasets

    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.DatasetDict):
        saved = _pick(saved, split, str(path))
    for number, values in enumerate(saved, 1):
        yield Row(f"{path}:{number}", dict(values))


def _pick(splits: Any, split: str | None, source: str) -> Any:
    name = split or ("train" if "train" in splits or len(splits) != 1 else next(iter(splits)))
    if name not in splits:
        raise InputError(f"{source}: no split {name!r}; it holds {', '.join(splits)}: add @NAME to the path")
    return splits[name]


def _hub(name: str, config: str | None, split: str) -> Iterator[Row]:
    import datasets

    try:
        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the library raises its own, requests' and the file system's errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{name}: neither a path here nor a dataset that could be loaded from the hub ({reason})"
        ) from error
    for number, values in enumerate(rows, 1):
        yield Row(f"{name}@{split}:{number}", dict(values))


def kind_of(value: Any) -> str:
    """A JSON value's type in words."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")
