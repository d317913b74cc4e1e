"""Sharding over processes: decoder layers' weights, gradients and optimiser state split by FSDP2.

Embeddings, final norm and head stay whole on every process: the chunked head multiplies by their weights directly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from prefopt import ranks
from prefopt.models.policy import text_config
from prefopt.records import InputError


def shard(model: Any) -> int:
    """Split the decoder layers of a transformers model over the processes, in place; returns how many layers.

    16-bit layers are kept in float32 shards and gathered in 16 bits. FSDP2 averages gradients over processes; `Updater`
    takes that back. InputError where there is one process, or no list of layers is found.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if not ranks.active():
        raise InputError("shard=true needs several processes; start with `accelerate launch -m prefopt train ...`")
    layers = decoder_layers(model)
    dtype = next(layers.parameters()).dtype
    mixed = dtype in (torch.bfloat16, torch.float16)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32) if mixed else MixedPrecisionPolicy()
    for layer in layers:
        if mixed:
            layer.float()
        fully_shard(layer, mp_policy=policy, reshard_after_forward=True)
    return len(layers)


def decoder_layers(model: Any) -> nn.ModuleList:
    """The model's list of decoder layers. InputError if none has the configured length."""
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    for module in inner.modules():
        if isinstance(module, nn.ModuleList) and len(module) == text_config(inner).num_hidden_layers:
            return module
    raise InputError(f"shard=true: no list of decoder layers in {type(inner).__name__}; run without shard")


def whole_state(model: Any) -> dict[str, torch.Tensor]:
    """The full state dictionary of a sharded model, on the CPU of every process that asks together with all others."""
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()
        for name, tensor in model.state_dict().items()
    }
