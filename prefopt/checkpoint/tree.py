"""State as two files that hold no code: plain values in JSON, tensors in safetensors. No pickle.

A tree is made of dicts with text keys, lists, tuples, text, numbers, booleans, None and tensors.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from prefopt.checkpoint.tensors import save_file

MARK = "$"  # begins a key that stands for something JSON has not


class Tree:
    """A state taken apart, ready to be written. copy: tensors are copied to the CPU, so that training may go on.

    hashes: xxh3_128 of files as they were to be written, where it is known.
    """

    def __init__(self, state: Any, copy: bool) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.hashes: dict[str, str] = {}
        self.copy = copy
        self.plain = self._apart(state, "")

    def write(self, folder: Path, name: str) -> list[str]:
        """Write NAME.json and NAME.safetensors, and return their names. OSError."""
        (folder / f"{name}.json").write_text(json.dumps(self.plain), encoding="utf-8")
        self.hashes[f"{name}.safetensors"] = save_file(self.tensors, folder / f"{name}.safetensors")
        return [f"{name}.json", f"{name}.safetensors"]

    def _apart(self, value: Any, place: str) -> Any:
        if isinstance(value, Tensor):
            name = f"{len(self.tensors)}{place}"  # a number, since keys with slashes may spell the same place
            self.tensors[name] = self._still(value)
            return {f"{MARK}tensor": name}
        if isinstance(value, float) and not math.isfinite(value):
            return {f"{MARK}float": str(value)}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, (list, tuple)):
            items = [self._apart(item, f"{place}/{number}") for number, item in enumerate(value)]
            return items if isinstance(value, list) else {f"{MARK}tuple": items}
        if isinstance(value, dict):
            wrong = [key for key in value if not isinstance(key, str) or key.startswith(MARK)]
            if wrong:
                raise TypeError(f"{place or 'the state'}: {wrong[0]!r} cannot be a key of a state")
            return {key: self._apart(item, f"{place}/{key}") for key, item in value.items()}
        raise TypeError(f"{place or 'the state'}: a {type(value).__name__} cannot be part of a state")

    def _still(self, tensor: Tensor) -> Tensor:
        """As it is now, on the CPU and in one piece; with `copy` in memory of its own."""
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        local = local.detach()
        if self.copy or local.device.type != "cpu" or not local.is_contiguous():
            return local.to("cpu", copy=True).contiguous()
        return local


def read(folder: Path, name: str) -> Any:
    """The state that `Tree.write` wrote. ValueError or OSError where it cannot be read."""
    plain = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    try:
        tensors = load_file(folder / f"{name}.safetensors")
    except SafetensorError as error:
        raise ValueError(f"{name}.safetensors: {error}") from None
    return _together(plain, tensors)


def _together(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_together(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((key, inner),) = value.items()
        if key == f"{MARK}tensor":
            # memory of torch's own: kernels may choose their way by how a tensor is aligned
            return tensors[inner].clone()
        if key == f"{MARK}float":
            return float(inner)
        if key == f"{MARK}tuple":
            return tuple(_together(item, tensors) for item in inner)
    return {key: _together(item, tensors) for key, item in value.items()}


def state_of_random() -> dict[str, Any]:
    """Every generator that a run draws from: Python's, NumPy's, torch's on the CPU and on this process's GPU."""
    import random

    import numpy

    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = numpy.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [[int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random(state: dict[str, Any]) -> None:
    """Take up every generator where `state_of_random` found it."""
    import random

    import numpy

    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state(("MT19937", numpy.array(keys, dtype=numpy.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
