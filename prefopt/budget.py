"""How many tokens go through one forward pass; halves itself when memory runs out."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from prefopt import ranks
from prefopt.batch import Batch, Targets, parts
from prefopt.records import InputError

T = TypeVar("T")
log = logging.getLogger("prefopt")
ADVICE = "gradient_checkpointing=true, a smaller max_length, lora_rank=16 or dtype=bfloat16"


class Budget:
    """A token budget per forward pass. It bounds memory and never changes a result: losses are sums.

    together: every process runs as many forward passes as the others (sharded weights are gathered in each), so that
    none may begin again with half the budget. repeat: the layout computes a prompt anew for each of its completions.
    name: what the user knows it by.
    """

    def __init__(
        self, tokens: int, together: bool = False, repeat: bool = False, name: str = "tokens_per_forward"
    ) -> None:
        if tokens < 1:
            raise InputError(f"{name} must be at least 1, got {tokens}")
        self.tokens, self.together, self.repeat, self.name = tokens, together, repeat, name

    def state_dict(self) -> dict[str, int]:
        return {"tokens": self.tokens}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.tokens = state["tokens"]

    def passes(self, batch: Batch, targets: Targets, tokens: int) -> Iterator[tuple[Batch, Targets, bool]]:
        """The batch and its targets, a forward pass of at most so many tokens at a time.

        Together, the last piece comes again until all processes ran as many passes; the third value is then False: it
        must count nothing.
        """
        pieces = list(parts(batch, targets, tokens, self.repeat))
        for number in range(ranks.all_max(len(pieces)) if self.together else len(pieces)):
            yield (*pieces[min(number, len(pieces) - 1)], number < len(pieces))

    def smallest(self, batch: Batch) -> int:
        """Tokens of the largest prompt with its completions: no pass can do with less."""
        return max(batch.tokens_per_prompt(self.repeat))

    def run(self, work: Callable[[int], T], smallest: int, undo: Callable[[], None] = lambda: None) -> T:
        """`work(tokens)`, again with half the budget whenever memory runs out.

        smallest: tokens of the largest single prompt with its completions; below it halving cannot help.
        undo: takes back what the failed attempt left behind (gradients).
        """
        while True:
            try:
                return work(self.tokens)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                message = _first_line(error)
            undo()  # outside the handler: the traceback holds the failed pass's tensors
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if self.together:
                raise InputError(f"out of memory ({message}); a sharded run cannot adapt: lower tokens_per_forward")
            if self.tokens <= smallest:
                raise InputError(
                    f"out of memory with one prompt of {smallest} tokens per forward pass ({message}); try {ADVICE}"
                )
            self.tokens = max(self.tokens // 2, 1)
            log.warning("out of memory; %s halved to %d (the result does not change)", self.name, self.tokens)


@contextlib.contextmanager
def memory_advice() -> Iterator[None]:
    """Where memory runs out in the block, and not in a forward pass that could be smaller, InputError with advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(f"out of memory ({_first_line(error)}); try {ADVICE}") from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is the CPU's or the GPU's way of saying so."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return "DefaultCPUAllocator: can't allocate memory" in text or "not enough memory: you tried" in text
