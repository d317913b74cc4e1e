"""What runs within vLLM's workers: takes over weights, and says which it has. Started by `--worker-extension-cls`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefopt.models.weights import fingerprint


class Weights:
    """Mixed into vLLM's worker class, so its names must not meet those of a worker.

    A worker that was started anew has version "": its weights are those of the checkpoint, which nobody trained.
    """

    model_runner: Any

    def prefopt_state(self) -> dict[str, Any]:
        """version of the weights, "" before any were taken over, or where taking them over failed half-way; their
        fingerprint then, and the type they are kept in.
        """
        dtype = str(next(self.model_runner.model.parameters()).dtype).removeprefix("torch.")
        return {"dtype": dtype, **getattr(self, "_prefopt_has", {"version": "", "fingerprint": ""})}

    def prefopt_take(self, weights: str | Iterable[tuple[str, Tensor]], version: str) -> dict[str, Any]:
        """Load weights, given as they are or as the path of a safetensors file, and say what the model has now."""
        self._prefopt_has = {"version": "", "fingerprint": ""}
        given = _read(weights) if isinstance(weights, str) else weights
        with torch.no_grad():
            self.model_runner.model.load_weights(given)
        held = fingerprint(self.model_runner.model.parameters())
        self._prefopt_has = {"version": version, "fingerprint": held}
        return self.prefopt_state()


def _read(path: str) -> Iterable[tuple[str, Tensor]]:
    from safetensors import safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not there for vLLM; give a vllm_folder that trainer and server both see")
    with safe_open(path, framework="pt") as file:
        for name in file.keys():
            yield name, file.get_tensor(name)
