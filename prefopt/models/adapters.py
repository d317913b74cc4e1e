"""LoRA through peft: a new adapter on a base model, or the continuation of one, with its start kept as reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.models.heads import LAYERS, TASKS, kind_in
from prefopt.models.load import turn_dropout_off
from prefopt.models.pickles import no_pickles, refuse_pickles
from prefopt.records import InputError

START = "prefopt_start"  # name of the frozen copy of the adapter a run continues


@dataclass(frozen=True)
class LoraOptions:
    """A low-rank adapter in place of full training (Hu et al. 2021, arXiv:2106.09685). lora_rank 0 trains all
    weights.
    """

    # rank of the update matrices; 0 trains the whole model, 8 to 64 is usual
    lora_rank: int = 0
    # the update is scaled by lora_alpha / lora_rank; None means twice the rank
    lora_alpha: int | None = None
    # names of the layers to adapt, or "all-linear"
    lora_targets: str | list[str] = "all-linear"


def adapt(model: Any, options: LoraOptions, adapter: Path | None = None) -> Any:
    """The model with a trainable adapter: the one in `adapter`, continued, or a new one that starts as a no-op.

    A continued adapter is loaded twice: the second copy stays frozen, as the reference. The model comes back unchanged
    when there is neither an adapter nor a rank.
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if adapter is None and not options.lora_rank:
        if getattr(model, "is_quantized", False):
            raise InputError("quantize: nf4 weights cannot be trained themselves; add lora_rank=16")
        return model
    if getattr(model, "is_quantized", False):
        checkpointing = getattr(model, "is_gradient_checkpointing", False)
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    if adapter is not None:
        adapted = attached(model, adapter, is_trainable=True)
        with no_pickles(adapter):
            adapted.load_adapter(adapter, adapter_name=START, is_trainable=False)
        adapted.set_adapter("default")
        turn_dropout_off(adapted)  # adapters bring their own, switched on
        return adapted
    kind = kind_in([type(model).__name__])
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha if options.lora_alpha is not None else 2 * options.lora_rank,
        lora_dropout=0.0,
        target_modules=options.lora_targets,
        exclude_modules=None if kind == "language" else list(LAYERS),  # peft trains and saves a score head whole
        task_type=TASKS[kind],
    )
    return get_peft_model(model, config)


def attached(model: Any, adapter: Path, is_trainable: bool = False) -> Any:
    """The model with the adapter in a directory on it. InputError where its weights are a pickle."""
    from peft import PeftModel

    refuse_pickles(adapter)
    with no_pickles(adapter):
        return PeftModel.from_pretrained(model, adapter, is_trainable=is_trainable)


def is_adapted(model: Any) -> bool:
    return hasattr(model, "peft_config")


@contextmanager
def at_start(model: Any) -> Iterator[None]:
    """The model as it was before training: on the adapter's frozen start where one is continued, else without adapter.

    A model without adapters stays as it is.
    """
    if not is_adapted(model):
        yield
    elif START in model.peft_config:
        model.set_adapter(START)
        try:
            yield
        finally:
            model.set_adapter("default")
    else:
        with model.disable_adapter():
            yield
