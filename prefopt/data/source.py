"""The training source of offline objectives: examples, shuffled, as batches; each rank its share."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from prefopt.batch import Batch
from prefopt.records import Example, InputError


class Offline:
    """Batches of a list of examples for a number of epochs.

    The order is a pure function of (seed, epoch), so the whole state is the number of steps taken: assign `step` to
    resume. `batch_size` counts prompts over all ranks. Rank r takes every `world`-th prompt of each batch from its r-th
    on, so the ranks' shares together are the single process's batch, whatever `world` is.
    least: fewest prompts in a batch; a shorter rest at the end of an epoch joins the batch before it.
    InputError without examples, or with fewer than `least`.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        *,
        epochs: float = 1,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world: int = 1,
        least: int = 1,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        if not 0 <= rank < world:
            raise InputError(f"rank {rank} is not one of {world} processes")
        self.examples, self.batch_size, self.epochs = examples, batch_size, epochs
        self.seed, self.shuffle, self.rank, self.world = seed, shuffle, rank, world
        self.step, self.least = 0, least
        self.seen: dict[str, float] = {}
        if not examples:
            raise InputError("no examples to make batches of; give data")
        if min(len(examples), batch_size) < least:
            raise InputError(
                f"batch_size is {batch_size}, of {len(examples)} rows; at least {least} prompts are needed"
            )

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.examples), self.batch_size, self.least)

    def steps(self) -> int:
        """Batches in all epochs; part of an epoch is rounded up."""
        return math.ceil(self.epochs * self.steps_per_epoch)

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]

    def order(self, epoch: int) -> list[int]:
        """The examples' numbers in the order of this epoch."""
        numbers = list(range(len(self.examples)))
        if self.shuffle:
            random.Random(f"{self.seed}/{epoch}").shuffle(numbers)
        return numbers

    def batches(self, models: Any = None) -> Iterator[tuple[Batch, float]]:
        """This rank's share of each batch from `step` on, with its weight.

        The weight is 1.0, or 0.0 for a filler: the last batch may have fewer prompts than there are ranks, and a rank
        without one gets the batch's first prompt so that it runs the same forward passes; its loss must count nothing.
        """
        epoch, numbers = -1, [0]
        while self.step < self.steps():
            if self.step // self.steps_per_epoch != epoch:
                epoch = self.step // self.steps_per_epoch
                numbers = self.order(epoch)
            place = self.step % self.steps_per_epoch
            last = place == self.steps_per_epoch - 1
            start = place * self.batch_size
            whole = [self.examples[number] for number in numbers[start : None if last else start + self.batch_size]]
            share = whole[self.rank :: self.world]
            self.step += 1
            yield (Batch.of(share), 1.0) if share else (replace(Batch.of(whole[:1]), filler=True), 0.0)


def steps_per_epoch(rows: int, batch_size: int, least: int) -> int:
    """Batches that hold every row once, none with fewer than `least` of them."""
    full, rest = divmod(rows, batch_size)
    return max(full + (rest >= least), 1)
