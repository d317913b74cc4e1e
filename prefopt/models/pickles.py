"""Weights are read as data: from safetensors, never from a pickle, which is a program that runs when it is read."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from prefopt.models.heads import AUTO, HeadKind
from prefopt.records import InputError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def refuse_pickles(folder: Path, head: HeadKind = "language") -> None:
    """InputError, with the command that converts them, where a folder's only weights are pickles.

    folder: of a model or an adapter.
    """
    if any(folder.glob("*.safetensors")):
        return
    found = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES and "model" in path.name)
    if found:
        raise InputError(
            f"{folder}: its weights are a pickle ({found[0]}), which could run any program when it is read; where you "
            f"trust its origin, write them as safetensors first: {conversion(folder, head)}"
        )


def conversion(folder: Path, head: HeadKind = "language") -> str:
    """A command that writes the weights of `folder` as safetensors beside the pickle."""
    if (folder / "adapter_config.json").exists():
        code = (
            "import torch; from safetensors.torch import save_file; "
            f"save_file(torch.load({str(folder / 'adapter_model.bin')!r}, weights_only=True), "
            f"{str(folder / 'adapter_model.safetensors')!r})"
        )
    else:
        name = str(folder)
        code = f"from transformers import {AUTO[head]} as M; M.from_pretrained({name!r}).save_pretrained({name!r})"
    return f'python -c "{code}"'


_alone = threading.RLock()


@contextlib.contextmanager
def no_pickles(source: str | Path) -> Iterator[None]:
    """InputError where anything reads a pickle of tensors meanwhile: libraries fall back to them in many places."""

    def refuse(*given: Any, **named: Any) -> Any:
        raise InputError(
            f"{source}: some of its weights are a pickle, which could run any program when it is read; give a model "
            "whose weights are safetensors"
        )

    with _alone:
        read, torch.load = torch.load, refuse
        try:
            yield
        finally:
            torch.load = read
