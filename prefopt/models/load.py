"""From a directory or a hub name to a causal language model, or a reward model, and its tokenizer."""

from __future__ import annotations

import contextlib
import ctypes
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.utils import logging as transformers_logging

from prefopt import streams
from prefopt.models.heads import (
    AUTO,
    IN_WORDS,
    LABELS,
    LAYERS,
    HeadKind,
    fresh,
    give_padding,
    keep_padding,
    kind_in,
    refuse_other_heads,
)
from prefopt.models.pickles import no_pickles, refuse_pickles
from prefopt.records import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class ModelOptions:
    """How the model is loaded and laid out."""

    # weights: float32 (exact; auto on a CPU) or bfloat16 (half the memory, auto on a GPU; AdamW keeps float32 masters)
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    # packed tree (a shared prompt computed once, no padding) or padded rectangle; auto asks a numeric probe
    layout: Literal["auto", "tree", "padded"] = "auto"
    # recompute activations in backward: less memory, about a third more time
    gradient_checkpointing: bool = False
    # split the decoder layers over the processes (FSDP2); without it every process holds the whole model
    shard: bool = False
    # load the base model in 4-bit NF4 (QLoRA; needs a GPU and the `gpu` extra, and lora_rank)
    quantize: Literal["none", "nf4"] = "none"
    # run model code that comes with the weights; only for sources you trust
    trust_remote_code: bool = False
    # branch, tag or commit of a hub model
    revision: str | None = None


@dataclass(frozen=True)
class Loaded:
    """model, its tokenizer, and where they came from. adapter: directory of the adapter the model continues, or
    None.
    """

    model: Any
    tokenizer: Any
    source: str
    adapter: Path | None = None


def load(
    source: str | Path,
    options: ModelOptions = ModelOptions(),
    device: torch.device | str = "cpu",
    head: HeadKind = "language",
) -> Loaded:
    """A model with dropout off, on `device`, with its tokenizer.

    source: a Hugging Face model directory, an adapter directory (its base model is found through
    adapter_config.json), or a hub name. head: what the model is for; a causal language model gets a new score head for
    "completion" and "steps", a model that has one keeps it. InputError, with what to do, for a directory that is
    neither, a missing tokenizer, or options that cannot hold here.
    """
    quiet_bars()
    base, adapter = _resolve(source)
    for folder in (Path(base), adapter):
        if folder is not None and folder.is_dir():
            refuse_pickles(folder, head)
    with no_pickles(base):
        model, new = _weights(base, options, torch.device(device), head)
    tokenizer = load_tokenizer(tokenizer_source(source), options)
    if head != "language":
        (give_padding if new else keep_padding)(model, tokenizer)
    turn_dropout_off(model)
    if options.quantize == "none":
        nn.Module.to(model, device)
    if options.gradient_checkpointing:
        save_memory(model)
    return Loaded(model, tokenizer, str(source), adapter)


def _weights(base: str, options: ModelOptions, device: torch.device, head: HeadKind) -> tuple[Any, bool]:
    """The model, and whether its score head is a new one."""
    import transformers

    hub, extra = _hub_options(base, options), {}
    new = head != "language" and kind_in(_checked(base, options, head).architectures or []) == "language"
    if new:
        extra["num_labels"] = len(LABELS[head])
    quantization = _quantization(options, device, head)
    try:
        with _without_report() if new else contextlib.nullcontext():
            found: Any = getattr(transformers, AUTO[head]).from_pretrained(
                base,
                dtype=pick_dtype(options.dtype, device),
                quantization_config=quantization,
                use_safetensors=True,
                output_loading_info=True,
                **extra,
                **hub,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{base}: cannot load a {IN_WORDS[head]}: {_first_line(error)}") from error
    model, report = found
    made = tuple(f"{name}." for name in LAYERS) if new else ()
    _require_all_weights(base, (name for name in report["missing_keys"] if not name.startswith(made)), head)
    if new:
        fresh(model, head)
    return model, new


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """No table of weights that the file lacks: a new head is meant, and any other lack is an error."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _checked(base: str, options: ModelOptions, head: HeadKind) -> Any:
    """The configuration of a model that can have such a head. InputError where it cannot."""
    from transformers import AutoConfig

    try:
        settings = AutoConfig.from_pretrained(base, **_hub_options(base, options))
    except (OSError, ValueError) as error:
        raise InputError(f"{base}: cannot load a {IN_WORDS[head]}: {_first_line(error)}") from error
    refuse_other_heads(base, head, settings)
    return settings


def head_of(source: str | Path, options: ModelOptions = ModelOptions()) -> HeadKind:
    """What a model or adapter was saved as. InputError where its configuration cannot be read."""
    from transformers import AutoConfig

    base, adapter = _resolve(source)
    if adapter is not None:
        settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        return kind_in([], settings.get("task_type"))
    try:
        return kind_in(AutoConfig.from_pretrained(base, **_hub_options(base, options)).architectures or [])
    except (OSError, ValueError) as error:
        raise InputError(f"{base}: cannot read its configuration: {_first_line(error)}") from error


def _require_all_weights(base: str, missing: Iterable[str], head: HeadKind = "language") -> None:
    """InputError unless every weight came from the file: transformers makes up what is missing from random numbers."""
    names = sorted(missing)
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise InputError(
            f"{base}: no values for {names[0]}{more}; this is not a whole {IN_WORDS[head]} ({_OTHERS[head]}); give the "
            "directory of one"
        )


_OTHERS: dict[HeadKind, str] = {
    "language": "a reward model, an encoder, or half a checkpoint?",
    "completion": "an encoder, or half a checkpoint?",
    "steps": "an encoder, or half a checkpoint?",
}


def keep_freed_memory() -> None:
    """Tell glibc to keep large freed blocks instead of returning them; nothing happens with another C library.

    On a CPU every layer asks for the same blocks again, and pages that come back zeroed cost more than the arithmetic
    on them: pairs per second of the 15M benchmark shape rose from 2.7 to 3.6.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: blocks below it come from the heap
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap's free top stays


def quiet_bars() -> None:
    """No progress bars of transformers' own where there is no terminal to draw them on."""
    if not streams.is_terminal():
        transformers_logging.disable_progress_bar()


def tokenizer_source(source: str | Path) -> str:
    """Where the tokenizer of a model lies: an adapter's own directory if it has one, else its base model's."""
    base, adapter = _resolve(source)
    return str(adapter) if adapter and _has_tokenizer(adapter) else base


def base_model(source: str | Path) -> str:
    """The full model behind `source`: itself, or the one its adapter_config.json names."""
    return _resolve(source)[0]


def load_tokenizer(source: str | Path, options: ModelOptions = ModelOptions()) -> Any:
    """The tokenizer of a model directory or hub name. InputError when there is none or it has no end-of-sequence
    token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **_hub_options(source, options))
    except (OSError, ValueError) as error:
        raise InputError(f"{source}: cannot load a tokenizer: {_first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"{source}: no end-of-sequence token; set eos_token in tokenizer_config.json")
    return tokenizer


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]


def save_memory(model: Any) -> None:
    """Recompute activations layer by layer in backward. Dropout must be off: the model goes to training mode."""
    # a 5.x release renamed it
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()  # transformers recomputes only in training mode


# noise in training mode that is not called dropout: skipped layers, perturbed inputs of a router
NOISE = ("layerdrop", "jitter_noise", "input_jitter_noise")


def turn_dropout_off(model: nn.Module) -> None:
    """Set every dropout probability to zero: the policy that is scored must be the policy that is updated."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if ("dropout" in name or name in NOISE) and isinstance(value, float):
                setattr(module, name, 0.0)


def _resolve(source: str | Path) -> tuple[str, Path | None]:
    """Base model and adapter directory (None for a full model)."""
    path = Path(source)
    if not path.exists():
        if isinstance(source, Path) or str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
            raise InputError(f"{source}: no such directory; give a model directory or a hub name like owner/name")
        return str(source), None
    if (path / "adapter_config.json").exists():
        return _base_of(path / "adapter_config.json"), path
    if not (path / "config.json").exists():
        raise InputError(f"{path}: no config.json; give the directory that save_pretrained wrote")
    return str(path.resolve()), None


def _base_of(config: Path) -> str:
    """The base model an adapter was trained on."""
    try:
        base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise InputError(f"{config}: not a JSON object ({error}); write it again with save_pretrained") from error
    if not base:
        raise InputError(f"{config}: base_model_name_or_path is missing; add it")
    if not Path(base).exists() and base.startswith((".", "/", "~")):
        raise InputError(f"{config}: the base model {base} is not there; correct base_model_name_or_path")
    return str(base)


def _hub_options(source: str | Path, options: ModelOptions) -> dict[str, Any]:
    """What `from_pretrained` is told besides the name; a directory has no revisions."""
    extra: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
    if options.revision is not None and not Path(source).exists():
        extra["revision"] = options.revision
    return extra


def _has_tokenizer(path: Path) -> bool:
    return (path / "tokenizer_config.json").exists()


def _quantization(options: ModelOptions, device: torch.device, head: HeadKind) -> Any:
    if options.quantize == "none":
        return None
    if device.type != "cuda":
        raise InputError("quantize: nf4 needs a GPU; here use dtype: bfloat16 with lora_rank instead")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise InputError("quantize: nf4 needs bitsandbytes; install prefopt[gpu]") from None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=pick_dtype(options.dtype, device),
        llm_int8_skip_modules=None if head == "language" else list(LAYERS),  # a new head is trained as it is
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
