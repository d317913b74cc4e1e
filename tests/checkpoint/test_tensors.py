"""Tensors written as safetensors reads them, with the hash of what is on the disk."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from prefopt.checkpoint.commit import digest
from prefopt.checkpoint.tensors import DTYPES, save_file


def drawn(dtype):
    """Two numbers of every shape that a state may have."""
    numbers = torch.arange(6).reshape(2, 3) % 2
    return {f"{dtype}/{name}": x.to(dtype) for name, x in {"matrix": numbers, "one": numbers[0, 1]}.items()}


def test_every_type_and_shape_is_read_by_safetensors_as_it_was_written(tmp_path):
    tensors = {name: x for dtype in DTYPES for name, x in drawn(dtype).items()}
    tensors |= {"empty": torch.empty(0, 3), "odd bytes": torch.tensor([1, 2, 3], dtype=torch.uint8)}
    known = save_file(tensors, tmp_path / "file")
    assert known == digest(tmp_path / "file")
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors.keys()
    for name, x in tensors.items():
        assert found[name].dtype == x.dtype and found[name].shape == x.shape and torch.equal(found[name], x), name


def test_no_tensors_are_a_file_too(tmp_path):
    assert save_file({}, tmp_path / "file") == digest(tmp_path / "file")
    assert load_file(tmp_path / "file") == {}


def test_a_type_that_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"^w: tensors of torch\.complex64 cannot be saved"):
        save_file({"w": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "file")


def test_a_write_that_the_system_takes_in_pieces_is_finished(tmp_path, monkeypatch):
    import io

    plain = io.FileIO.write

    class Small(io.FileIO):
        def write(self, part):
            return plain(self, part[:5])

    path = tmp_path / "file"
    monkeypatch.setattr(type(path), "open", lambda self, mode, buffering: Small(str(self), "w"))
    known = save_file({"w": torch.arange(10.0)}, path)
    monkeypatch.undo()
    assert known == digest(path) and torch.equal(load_file(path)["w"], torch.arange(10.0))
