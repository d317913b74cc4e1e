"""Tensors as a safetensors file, hashed while it is written: reading it back for its hash would take a fifth longer.

The system is asked to bring each piece to the disk as soon as it has it; otherwise it begins when the file is synced,
and writing and syncing take their times one after the other.

The format: the header's length as 8 bytes, little-endian; the header, JSON; the tensors' bytes.
https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
PIECE = 32 * 2**20  # bytes after which the disk begins
PAGE = 4096
START_WRITING = 2  # SYNC_FILE_RANGE_WRITE of Linux: begin, and wait for nothing
_hasher_of: tuple[int, ThreadPoolExecutor] | None = None


def save_file(tensors: Mapping[str, Tensor], path: Path) -> str:
    """Write contiguous tensors on the CPU, and return the file's xxh3_128 as it should be, in hexadecimal. OSError.

    TypeError for a type of numbers that is not in DTYPES.
    """
    parts = _parts(tensors)
    hashed = hasher().submit(_hash, parts)
    try:
        with path.open("wb", buffering=0) as file:
            _write(file, parts)
    finally:
        wait([hashed])  # it reads the tensors
    return hashed.result()


def hasher() -> ThreadPoolExecutor:
    """The thread that hashes, and removes old files, while this process lives. A fork gets one of its own.

    Started early: where memory is short, a thread that is to start may never say that it did, and be waited for.
    """
    global _hasher_of
    if _hasher_of is None or _hasher_of[0] != os.getpid():
        _hasher_of = os.getpid(), ThreadPoolExecutor(1, "prefopt-hash")
        _hasher_of[1].submit(int).result()
    return _hasher_of[1]


def _parts(tensors: Mapping[str, Tensor]) -> list[memoryview]:
    """The file: its header, and every tensor's bytes, the widest numbers first, so that all are aligned."""
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, begin = {}, 0
    for name in names:
        x = tensors[name]
        if x.dtype not in DTYPES:
            raise TypeError(f"{name}: tensors of {x.dtype} cannot be saved")
        end = begin + x.numel() * x.element_size()
        header[name] = {"dtype": DTYPES[x.dtype], "shape": list(x.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    # one number alone may keep the stride of what it was cut from, and could not be seen as bytes
    flat = [tensors[name].as_strided((tensors[name].numel(),), (1,)) for name in names]
    views = [x.view(torch.uint8).numpy().data for x in flat]
    return [memoryview(struct.pack("<Q", len(text)) + text), *views]


def _hash(parts: Sequence[memoryview]) -> str:
    hashed = xxhash.xxh3_128()
    for part in parts:
        hashed.update(part)
    return str(hashed.hexdigest())


def _write(file: Any, parts: Sequence[memoryview]) -> None:
    """All of them: the system may take less at once."""
    done = begun = 0
    for part in parts:
        while len(part):
            size = file.write(part[:PIECE])
            part, done = part[size:], done + size
            if done - begun >= PIECE:
                whole = done - done % PAGE  # a page that is on its way to the disk cannot be written on
                _begin(file.fileno(), begun, whole - begun)
                begun = whole


def _begin(descriptor: int, offset: int, size: int) -> None:
    """Have the system bring bytes to the disk meanwhile; a hint, which only Linux takes. Syncing reports errors."""
    if sync_file_range := getattr(ctypes.CDLL(None), "sync_file_range", None):
        sync_file_range(descriptor, ctypes.c_int64(offset), ctypes.c_int64(size), START_WRITING)
