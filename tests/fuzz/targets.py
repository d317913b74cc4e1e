"""What is fuzzed: each takes any bytes, and fails only where the code under it does what it must never do."""

from __future__ import annotations

import atexit
import json
import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from prefopt import config
from prefopt.data import dataset, read
from prefopt.data.convert import Kind
from prefopt.data.read import RowError
from prefopt.data.shapes import Reader
from prefopt.records import InputError, without_secrets
from prefopt.sandbox import codec

FOLDER = Path(tempfile.mkdtemp(prefix="prefopt-fuzz-"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".jsonl.gz", ".parquet")


def files(data: bytes) -> None:
    """A file of each kind with any content: rows, or errors that say where. The first byte chooses the kind."""
    path = FOLDER / f"rows{SUFFIXES[data[0] % len(SUFFIXES)]}" if data else FOLDER / "rows.jsonl"
    path.write_bytes(data[1:])
    try:
        for item in read.read(path):
            where = item.where
            assert where.startswith(f"{path}:") and where.removeprefix(f"{path}:").isdecimal(), where
            assert isinstance(item, RowError) or all(isinstance(name, str) for name in item.values)
    except InputError as error:
        assert str(path) in str(error)


def rows(data: bytes) -> None:
    """Any rows of JSON, for objectives of each kind: records that can be trained on, or errors that say where.

    The first byte chooses the kind, the second whether there is a chat template.
    """
    kinds: tuple[Kind, ...] = (*get_args(Kind),)
    kind, chat = kinds[data[0] % len(kinds)] if data else kinds[0], bool(data[1:2] > b"\x7f")
    path = FOLDER / "shapes.jsonl"
    path.write_bytes(data[2:])
    for options in (dataset.DataOptions(), dataset.DataOptions(skip_bad=True, ties="drop")):
        reader = Reader(chat=chat, whole=kind == "prompts")
        try:
            found = list(dataset._records(path, reader, kind, options, Counter()))
        except InputError as error:
            assert str(path) in str(error)
            continue
        for record in found:
            assert len(record.completions) == len(record.scores)
            assert all(math.isnan(score) or math.isfinite(score) for score in record.scores)
            if kind == "pairs":
                assert record.scores == [1.0, 0.0] and record.completions[0] != record.completions[1]
            if kind == "prompts":
                assert record.prompt is not None and not record.completions
            str(record).encode()  # no half of a surrogate pair


def recipe(data: bytes) -> None:
    """Any text as a recipe, and its lines as words of a command: options that are written and read back, or errors."""
    names = list(config.objectives())
    objective = names[data[0] % len(names)] if data else names[0]
    path = FOLDER / "recipe.yaml"
    path.write_bytes(data[1:])
    layers: list[Callable[[], config.Layer]] = [
        lambda: config.read_recipe(path),
        lambda: config.parse_overrides(data[1:].decode("utf-8", "replace").splitlines()),
    ]
    sections = {name: config.load(one) for name, one in config.sections(objective).items()}
    needed = {"model": "m", "data": "d", "out": "o"}
    for layer in layers:
        try:
            resolved = config.resolve(sections, needed, layer())
        except InputError as error:
            assert str(error)
            continue
        path.write_text(config.to_yaml(resolved), encoding="utf-8")
        again = config.read_recipe(path)
        assert again.pop("objective") == objective
        assert config.flat(config.resolve(sections, again)) == without_secrets(config.flat(resolved))


def messages(data: bytes) -> None:
    """Any bytes as what a sandboxed program answers: a tree that equals itself unless NaN is in it, or ValueError."""
    try:
        tree = codec.check(codec.parse(data))
    except ValueError:
        return
    alike = codec.same(tree, tree)
    try:
        value = codec.decode(tree)
        back = codec.check(codec.parse(json.dumps(codec.encode(value)).encode()))
    except TypeError:  # a list as the key of a dict, say: nothing that `encode` wrote
        return
    # where the tree says one thing twice (a key, a member) it is not what `encode` writes, and equals nothing
    if alike:
        assert codec.same(tree, back) or _repeats(tree)


def _repeats(tree: Any) -> bool:
    """Whether decoding loses a part."""
    if not isinstance(tree, list):
        return False
    back = codec.encode(codec.decode(tree))
    if isinstance(back, list) and len(back) != len(tree):
        return True
    inner = [item for pair in tree[1:] for item in pair] if tree[0] == "d" else tree[1:]
    return any(map(_repeats, inner)) if tree[0] in ("d", "l", "t", "s", "z") else False


TARGETS: dict[str, Callable[[bytes], None]] = {"files": files, "rows": rows, "recipe": recipe, "messages": messages}
