"""A model's weights for an engine beside it: under the names of its checkpoint, adapters merged, and a fingerprint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from prefopt.records import InputError

CHUNK = 1 << 24  # elements hashed at once
MODULUS = 1 << 64
# odd constants of splitmix64 as signed 64-bit numbers: any odd multiplier keeps all information
FIRST, SECOND = (number - MODULUS for number in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """A number that stands for the values of all tensors together, the same on every device.

    It does not depend on how values are laid out: engines fuse, split and transpose matrices and pad them with zeros,
    which count nothing. One changed value changes it.
    """
    total = 0
    for tensor in tensors:
        for piece in tensor.detach().flatten().split(CHUNK):
            mixed = piece.float().view(torch.int32).long()  # 16-bit values are exact in float32
            mixed = (mixed ^ (mixed >> 15)) * FIRST
            mixed = (mixed ^ (mixed >> 31)) * SECOND
            total = (total + int((mixed ^ (mixed >> 29)).sum())) % MODULUS
    return f"{total:016x}"


def named_weights(model: Any, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Names as in the model's checkpoint and whole tensors, floating ones in `dtype`; weights that are tied come once.

    Adapters are merged in float32, without touching the model. Sharded weights are gathered, so all processes must go
    through it together. InputError for quantised weights.
    """
    if getattr(model, "is_quantized", False):
        raise InputError("an engine cannot take over quantised weights; sample with sampler=local, or train without")
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    found = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in _merged(inner)}
    yield from _as_saved(inner, found).items()


def _merged(inner: Any) -> Iterator[tuple[str, Tensor]]:
    """The weights of a transformers model, each adapted one with what its adapters add."""
    layers = {name: module for name, module in inner.named_modules() if hasattr(module, "get_delta_weight")}
    seen: set[int] = set()
    for name, tensor in inner.state_dict(keep_vars=True).items():
        path, _, last = name.rpartition(".")
        if _not_of_the_model(name) or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        whole = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
        owner = path.removesuffix(".base_layer")
        if owner in layers and path != owner and last == "weight":
            whole = _adapted(whole, layers[owner])
        yield _plain(name), whole


def _adapted(weight: Tensor, layer: Any) -> Tensor:
    """A layer's weight with what its active adapters add to it."""
    for adapter in layer.active_adapters:
        if getattr(layer, "use_dora", {}).get(adapter):
            raise InputError("an engine cannot take over a DoRA adapter; sample with sampler=local")
        if adapter in layer.lora_A or adapter in layer.lora_embedding_A:
            delta = layer.get_delta_weight(adapter).detach()
            weight = weight.float() + (delta.full_tensor() if isinstance(delta, DTensor) else delta).float()
    return weight


def _not_of_the_model(name: str) -> bool:
    """Whether a weight is an adapter's own, or a copy that peft keeps of a layer it trains whole."""
    other = ".modules_to_save." in name and ".modules_to_save.default." not in name
    return ".lora_" in name or ".original_module." in name or other


def _plain(name: str) -> str:
    """A weight's name without what peft puts into it."""
    return name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")


def _as_saved(inner: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under the names, and in the parts, of the checkpoint: transformers joins the weights of experts in memory."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return weights
    found: dict[str, Tensor] = revert_weight_conversion(inner, weights)
    return found
