"""Score heads in place of the language-model head: one number for a whole text, or one for each of its steps.

Directories stay ordinary transformers ones: a sequence classifier with one label for a reward model, a token
classifier with the labels wrong and right for a process reward model.

Letters: K completion tokens, T positions, D hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefopt.records import InputError

HeadKind = Literal["language", "completion", "steps"]

# the class that transformers loads a model with, and peft an adapter
AUTO: dict[HeadKind, str] = {
    "language": "AutoModelForCausalLM",
    "completion": "AutoModelForSequenceClassification",
    "steps": "AutoModelForTokenClassification",
}
# peft's name of the task
TASKS: dict[HeadKind, str] = {"language": "CAUSAL_LM", "completion": "SEQ_CLS", "steps": "TOKEN_CLS"}
IN_WORDS: dict[HeadKind, str] = {
    "language": "causal language model",
    "completion": "reward model",
    "steps": "process reward model",
}
# how transformers names the class, and the labels
ENDING: dict[HeadKind, str] = {"completion": "ForSequenceClassification", "steps": "ForTokenClassification"}
LABELS: dict[HeadKind, list[str]] = {"completion": ["score"], "steps": ["wrong", "right"]}
OBJECTIVE: dict[HeadKind, str] = {"completion": "reward", "steps": "prm"}
LAYERS = ("score", "classifier")  # what transformers calls the last layer of a classifier on a decoder
SPREAD = 0.1  # standard deviation of a new head's scores, for hidden states whose entries have size 1
PADDING = "<|pad|>"


@dataclass(frozen=True)
class ScoreHead:
    """The last linear layer of a classifier on a decoder: hidden states -> one score each.

    layer: [1, D] for a reward model; [2, D] for steps, whose score is right minus wrong, so that the softmax over both
    labels is the logistic function of the score, and of which only the row of `right` is trained. pad: the padding
    token; transformers reads a text's score at its last token that is not padding.
    """

    layer: Any
    pad: int | None

    def __call__(self, hidden: Tensor) -> Tensor:
        """[K, D] -> [K] float32 or wider: scores in 16 bits have steps of up to a hundredth of their size."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        weight, bias = self.layer.weight, getattr(self.layer, "bias", None)
        if len(weight) == 2:
            weight, bias = (None if row is None else row[1:] - row[:1].detach() for row in (weight, bias))
        return F.linear(hidden.to(wide), weight.to(wide), None if bias is None else bias.to(wide))[:, 0]

    def place(self, token: Tensor, before: Tensor, at: Tensor) -> Tensor:
        """The position where each completion token's score is read, [K]: its own, or the last one before padding.

        token [K]; before, at [K]: the positions that predict a token, and its own. Only a model whose padding is its
        end token has padding within a text.
        """
        if self.pad is None or len(self.layer.weight) == 2:
            return at
        padding = token == self.pad  # [K]
        follows = padding & (before == at.roll(1))  # [K] the token before is of the same completion
        place, moved = at, torch.where(padding, before, at)
        while not torch.equal(place, moved):
            place, moved = moved, torch.where(follows, moved.roll(1), moved)
        return place


def score_head(model: Any) -> ScoreHead | None:
    """The score head of a transformers model, without the adapters around it; None for a language model."""
    if model.get_output_embeddings() is not None:
        return None
    layer = score_layer(model)
    return None if layer is None else ScoreHead(layer, model.config.get_text_config().pad_token_id)


def score_layer(model: Any) -> Any:
    """The last layer of a classifier, or None."""
    found = [getattr(model, name) for name in LAYERS if isinstance(getattr(model, name, None), nn.Module)]
    return next((layer for layer in found if isinstance(getattr(layer, "weight", None), Tensor)), None)


def fresh(model: Any, kind: HeadKind) -> None:
    """Give a model a new head, in place: scores near 0, the same for the same `torch.manual_seed`."""
    layer = score_layer(model)
    draw = torch.Generator().manual_seed(torch.initial_seed())
    width = layer.weight.shape[1]
    with torch.no_grad():
        layer.weight.zero_()
        if layer.bias is not None:
            layer.bias.zero_()
        layer.weight[-1] = torch.randn(width, generator=draw) * (SPREAD / math.sqrt(width))
    model.config.id2label = dict(enumerate(LABELS[kind]))
    model.config.label2id = {name: number for number, name in enumerate(LABELS[kind])}
    if kind == "completion":
        model.config.problem_type = "regression"  # pipelines then show the score as it is


def give_padding(model: Any, tokenizer: Any) -> None:
    """A padding token that ends no text, in tokenizer and configuration: transformers finds a text's end by it.

    The tokenizer's own if that is not its end token, else its beginning-of-text token, else a new token, for which the
    embeddings grow by a row that is never trained.
    """
    end, begin = tokenizer.eos_token, tokenizer.bos_token
    if tokenizer.pad_token in (None, end):
        if begin not in (None, end):
            tokenizer.pad_token = begin
        else:
            tokenizer.add_special_tokens({"pad_token": PADDING})
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tokenizer.padding_side = "right"
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id


def keep_padding(model: Any, tokenizer: Any) -> None:
    """The padding that an existing head was trained with; one of its own where there is none."""
    pad = model.config.get_text_config().pad_token_id
    if pad is None:
        give_padding(model, tokenizer)
    elif tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)


def kind_in(names: Iterable[str], task: str | None = None) -> HeadKind:
    """What the classes of a model's configuration, or the task of an adapter's, make of it."""
    for kind, ending in ENDING.items():
        if task == TASKS[kind] or any(name.endswith(ending) for name in names):
            return kind
    return "language"


def refuse_other_heads(base: str, kind: HeadKind, settings: Any) -> None:
    """InputError unless a model can have a head of this kind.

    base: where it lies. settings: its transformers configuration.
    """
    has, wanted = kind_in(settings.architectures or []), len(LABELS[kind])
    if has not in ("language", kind):
        raise InputError(
            f"{base}: this is a {IN_WORDS[has]}, and a {IN_WORDS[kind]} is wanted; train {OBJECTIVE[has]}, or give a "
            "causal language model"
        )
    if has == kind and settings.num_labels != wanted:
        raise InputError(
            f"{base}: a classifier of {settings.num_labels} labels, where a {IN_WORDS[kind]} has {wanted}; give a "
            "model that was trained as one, or a causal language model, which gets a new head"
        )
    if type(settings) not in _mapping(kind) and AUTO[kind] not in (getattr(settings, "auto_map", None) or {}):
        raise InputError(
            f"{base}: transformers has no class ...{ENDING[kind]} for {settings.model_type} models, so a "
            f"{IN_WORDS[kind]} could not be saved; give a model of another family, such as llama, qwen2 or gpt2"
        )


def _mapping(kind: HeadKind) -> Any:
    """Configuration classes that transformers has a classifier for."""
    from transformers.models.auto import modeling_auto

    name = {"completion": "SEQUENCE", "steps": "TOKEN"}[kind]
    return getattr(modeling_auto, f"MODEL_FOR_{name}_CLASSIFICATION_MAPPING")
