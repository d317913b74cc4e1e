"""What a model's memory and time follow from, read from its configuration and the headers of its weights."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefopt.records import InputError

# what families call the same number, the usual name first
NAMES = {
    "width": ("hidden_size", "n_embd", "d_model", "dim"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "key_heads": ("num_key_value_heads", "num_kv_heads"),
    "head_width": ("head_dim",),
    "inner": ("intermediate_size", "n_inner", "ffn_dim"),
    "vocabulary": ("vocab_size",),
    "positions": ("max_position_embeddings", "n_positions"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
}
# families whose feed-forward layer has two matrices and whose norm is LayerNorm; the others have a gate and RMSNorm
PLAIN = {"gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "falcon", "phi", "mpt", "starcoder2", "codegen"}
# matrices that are looked up in, or are the head: no adapter goes on them by default
LOOKED_UP = re.compile(r"(embed|wte|wpe|lm_head|embed_out|(^|\.)score\.|shared\.)")
DEFAULTS_OF_FAMILY = {"gpt2": {"tie_word_embeddings": True}, "llama": {"tie_word_embeddings": False}}


@dataclass(frozen=True)
class Net:
    """A decoder's numbers.

    width, inner: of hidden states and of the feed-forward layer. key_heads: of keys and values. parameters: all
    weights, a tied head once. linear: weights of the layers' matrices, which every token is multiplied with.
    rank_width: what an adapter on all of those has in weights for each rank. gated: the feed-forward layer has a gate.
    products: numbers of size `inner` that it keeps of each token for backward. root_norm: RMSNorm, not LayerNorm.
    positions: the context, None where none is named. file_bytes: of the weights on disk, 0 where they are not there.
    """

    width: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    head_width: int
    vocabulary: int
    parameters: int
    linear: int
    rank_width: int
    tied: bool
    gated: bool
    products: int
    root_norm: bool
    positions: int | None = None
    file_bytes: int = 0

    @property
    def head(self) -> int:
        """Weights of the language-model head, or of the embeddings where they are one."""
        return self.vocabulary * self.width

    @property
    def body(self) -> int:
        """Weights without a head of their own: what a classifier on the same decoder has, but for its small layer."""
        return self.parameters - (0 if self.tied else self.head)

    @property
    def query_width(self) -> int:
        """Numbers of one token's queries in a layer."""
        return self.heads * self.head_width

    @property
    def key_width(self) -> int:
        """Numbers of one token's keys in a layer; its values have as many."""
        return self.key_heads * self.head_width


def net(folder: str | Path) -> Net:
    """A model directory's numbers, from config.json and the headers of its safetensors files; nothing is loaded.

    InputError where there is no readable configuration of a decoder.
    """
    path = Path(folder)
    found = of_config(_json(path / "config.json"), str(path))
    shapes = dict(headers(path))
    return counted(found, shapes, sum(file.stat().st_size for file in path.glob("*.safetensors"))) if shapes else found


def of_config(config: Mapping[str, Any], where: str = "the configuration") -> Net:
    """The numbers that follow from a configuration alone; weights are counted as the usual decoder has them.

    InputError naming what is missing.
    """
    text = config.get("text_config")
    config = {**config, **text} if isinstance(text, Mapping) else config
    known = {name: _first(config, options) for name, options in NAMES.items()}
    missing = [name for name in ("width", "layers", "heads", "vocabulary") if not known[name]]
    if missing:
        wanted = ", ".join(NAMES[name][0] for name in missing)
        raise InputError(f"{where}: no {wanted}; memory is worked out from the configuration of a decoder")
    family = str(config.get("model_type", ""))
    plain = family in PLAIN
    width, heads = known["width"], known["heads"]
    tied = config.get("tie_word_embeddings", DEFAULTS_OF_FAMILY.get(family, {}).get("tie_word_embeddings", True))
    made = Net(
        width=width,
        inner=known["inner"] or 4 * width,
        layers=known["layers"],
        heads=heads,
        key_heads=known["key_heads"] or heads,
        head_width=known["head_width"] or width // heads,
        vocabulary=known["vocabulary"],
        parameters=0,
        linear=0,
        rank_width=0,
        tied=bool(tied),
        gated=not plain,
        products=_products(config, plain),
        root_norm=not plain,
        positions=known["positions"] or None,
    )
    return _usual(made, known["experts"] or 1)


def _products(config: Mapping[str, Any], plain: bool) -> int:
    """What a feed-forward layer keeps: before and after its activation; with a gate the other factor and the product as
    well; the steps of an activation that is written out.
    """
    if not plain:
        return 4
    return 5 if config.get("activation_function", config.get("hidden_act")) == "gelu_new" else 2


def _usual(made: Net, experts: int) -> Net:
    """The weights of a decoder with these numbers, biases left out."""
    attention = made.heads * made.head_width
    shapes = [(made.width, attention), (made.width, made.key_width), (made.width, made.key_width)]
    shapes += [(attention, made.width)]
    shapes += [(made.width, made.inner)] * (2 if made.gated else 1) * experts + [(made.inner, made.width)] * experts
    linear = made.layers * sum(a * b for a, b in shapes)
    norms = (2 * made.layers + 1) * made.width * (1 if made.root_norm else 2)
    return replace(
        made,
        linear=linear,
        parameters=linear + norms + made.head * (1 if made.tied else 2),
        rank_width=made.layers * sum(a + b for a, b in shapes),
    )


def counted(made: Net, shapes: Mapping[str, tuple[int, ...]], file_bytes: int) -> Net:
    """The same with the weights that the files hold."""
    matrices = [shape for name, shape in shapes.items() if len(shape) == 2 and not LOOKED_UP.search(name)]
    heads = [name for name in shapes if name.endswith(("lm_head.weight", "embed_out.weight"))]
    return replace(
        made,
        parameters=sum(map(math.prod, shapes.values())),
        linear=sum(a * b for a, b in matrices),
        rank_width=sum(a + b for a, b in matrices),
        tied=not heads,
        file_bytes=file_bytes,
    )


def headers(folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor in a directory's safetensors files. InputError where one cannot be read."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with file.open("rb") as opened:
                (size,) = struct.unpack("<Q", opened.read(8))
                entries = json.loads(opened.read(size))
        except (OSError, ValueError, struct.error) as error:
            raise InputError(f"{file}: not a readable safetensors file ({error}); fetch the weights again") from None
        for name, entry in entries.items():
            if name != "__metadata__":
                yield name, tuple(entry["shape"])


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> int:
    """The first of these that is there and not null, as a number; 0 without one."""
    value = next((config[name] for name in names if config.get(name) is not None), 0)
    return int(value) if isinstance(value, (int, float)) else 0


def _json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot read it: {error.strerror or error}; give a model directory") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); fetch the model again") from None
    return found
