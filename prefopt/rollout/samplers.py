"""The sampler that a run asks for."""

from __future__ import annotations

from typing import Any, NamedTuple

from prefopt.models.sampler import Local
from prefopt.models.sampling import Sampler
from prefopt.rollout.options import RolloutOptions
from prefopt.rollout.text import end_tokens


class Chosen(NamedTuple):
    """words: which it is and why, for the log."""

    sampler: Sampler
    words: str


def build(options: RolloutOptions, model: str, policy: Any, tokenizer: Any, vllm: Any) -> Chosen:
    """The sampler of `options.sampler`. InputError where it cannot be had.

    model: directory or hub name that training starts from. vllm: a `VllmOptions`.
    """
    if options.sampler == "vllm":
        from prefopt.models.vllm import Vllm

        return Chosen(Vllm.start(model, vllm), f"vLLM, {vllm.vllm_mode}")
    local = Local(policy.model, end_tokens(policy.inner, tokenizer), tokenizer)
    return Chosen(local, local.reason)
