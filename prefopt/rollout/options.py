"""How completions are drawn, kept and learnt from while a model trains on its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prefopt.models.sampling import Sampling


@dataclass(frozen=True)
class RolloutOptions:
    """How prompts become scored completions, and how often each of these is learnt from."""

    # completions of each prompt: more tell better which is good and make hard prompts less hopeless, at their cost
    num_completions: int = 8
    # longest completion, in tokens; one that is longer is cut there, see unfinished
    max_tokens: int = 256
    # logits are divided by it, in sampling and in training alike: larger explores more, smaller repeats itself
    temperature: float = 1.0
    # keep so many of the likeliest tokens; 0 keeps all. Completions then come from another distribution than the one
    # that is trained: set correction too. So with top_p and min_p
    top_k: int = 0
    # keep the likeliest tokens that make up this share
    top_p: float = 1.0
    # keep tokens that are at least this share as likely as the likeliest
    min_p: float = 0.0
    # texts that end a completion; they stay in it
    stop: tuple[str, ...] = ()
    # what draws the completions. local: this process, with these weights; vllm: an engine beside it
    sampler: Literal["local", "vllm"] = "local"
    # updates' worth of prompts (batch_size each) that are sampled together: more keeps the sampler busy, and the later
    # updates learn from completions of an older policy
    rollout_batches: int = 1
    # passes over a rollout: more get more out of each completion, from an ever older policy
    rollout_passes: int = 1
    # completions cut at max_tokens. keep: scored like others; ignore: take no part; penalty: lose unfinished_penalty
    unfinished: Literal["keep", "ignore", "penalty"] = "keep"
    # reward units that a completion without an end loses with unfinished: penalty
    unfinished_penalty: float = 1.0
    # draw other prompts in place of those whose completions are all rewarded alike, which teach nothing (DAPO)
    dynamic_sampling: bool = False
    # rounds of such a search in a rollout; what is then missing is filled with prompts that teach nothing
    dynamic_rounds: int = 3
    # order of the prompts. none: each once an epoch, shuffled; success: those more often that are solved now and then
    curriculum: Literal["none", "success"] = "none"
    # easier prompts to mix in, in any form that data has: they teach what a hard task never rewards
    easier_data: str | None = None
    # share of each rollout's prompts that is taken from easier_data
    easier_share: float = 0.5
    # completions of each held-out prompt, at the temperature of training: more narrow the interval
    eval_completions: int = 4
    # rollouts over which the watch judges a stall: none of their groups, or nearly none, was ever rewarded
    stall_window: int = 30
    # rollouts in a row without a single score before the run stops; none of them is trained on
    max_unscored: int = 3
    # completions of each rollout written to completions.jsonl; None: all
    save_completions: int | None = 4

    def __post_init__(self) -> None:
        self.sampling  # noqa: B018  its checks are ours
        if not self.temperature:
            raise ValueError("temperature 0 makes all completions of a prompt the same; 1 is the usual start")
        least = {
            "num_completions": 1,
            "rollout_batches": 1,
            "rollout_passes": 1,
            "dynamic_rounds": 1,
            "eval_completions": 1,
            "stall_window": 3,
            "max_unscored": 1,
            "save_completions": 0,
        }
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ValueError(f"{name} must be at least {smallest}, got {value}")
        if self.dynamic_sampling and self.num_completions == 1:
            raise ValueError(
                "dynamic_sampling looks for prompts whose completions differ in reward, and num_completions=1 leaves "
                "nothing to differ; give 2 or more, or leave dynamic_sampling out"
            )
        if not 0 < self.easier_share < 1:
            raise ValueError(f"easier_share must be between 0 and 1, got {self.easier_share}")
        if not self.unfinished_penalty > 0 or self.unfinished_penalty == float("inf"):
            raise ValueError(f"unfinished_penalty must be above 0, got {self.unfinished_penalty}")
        self._refuse_unread()

    def _refuse_unread(self) -> None:
        """ValueError, naming the option, where one is changed that nothing would read."""
        needed = {
            "unfinished_penalty": ("unfinished: penalty", self.unfinished == "penalty"),
            "dynamic_rounds": ("dynamic_sampling", self.dynamic_sampling),
            "easier_share": ("easier_data", self.easier_data is not None),
        }
        for name, (reader, is_read) in needed.items():
            if not is_read and getattr(self, name) != getattr(type(self), name):
                raise ValueError(f"{name} is read with {reader} only; give that too, or leave {name} out")

    @property
    def sampling(self) -> Sampling:
        """The distribution that completions are drawn from."""
        return Sampling(self.max_tokens, self.temperature, self.top_k, self.top_p, self.min_p, self.stop)

    @property
    def updates(self) -> int:
        """Updates that a rollout serves."""
        return self.rollout_batches * self.rollout_passes
