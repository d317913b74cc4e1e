"""How many tokens go through one forward pass; halves itself when memory runs out."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from prefopt import ranks
from prefopt.records import InputError

T = TypeVar("T")
log = logging.getLogger("prefopt")


class Budget:
    """A token budget per forward pass. It bounds memory and never changes a result: losses are sums.

    together: every process runs as many forward passes as the others (sharded weights are gathered in each), so that
    none may begin again with half the budget.
    """

    def __init__(self, tokens: int, together: bool = False) -> None:
        if tokens < 1:
            raise InputError(f"tokens_per_forward must be at least 1, got {tokens}")
        self.tokens, self.together = tokens, together

    def passes(self, pieces: Sequence[T]) -> Iterator[tuple[T, bool]]:
        """Every piece, for one forward pass each; together, the last again until all processes ran as many.

        The second value is False for the repetitions, which must count nothing.
        """
        for number in range(ranks.all_max(len(pieces)) if self.together else len(pieces)):
            yield pieces[min(number, len(pieces) - 1)], number < len(pieces)

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
                message = str(error).splitlines()[0] if str(error) else type(error).__name__
            undo()  # outside the handler: the traceback holds the failed pass's tensors
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if self.together:
                raise InputError(f"out of memory ({message}); a sharded run cannot adapt: lower tokens_per_forward")
            if self.tokens <= smallest:
                advice = "gradient_checkpointing=true, a smaller max_length, lora_rank=16 or dtype=bfloat16"
                raise InputError(
                    f"out of memory with one prompt of {smallest} tokens per forward pass ({message}); try {advice}"
                )
            self.tokens = max(self.tokens // 2, 1)
            log.warning("out of memory; tokens_per_forward halved to %d (the result does not change)", self.tokens)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is the CPU's or the GPU's way of saying so."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return "DefaultCPUAllocator: can't allocate memory" in text or "not enough memory: you tried" in text
