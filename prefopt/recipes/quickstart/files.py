"""The quickstart's data files: demonstrations by careless writers, and pairs labelled by a judge who errs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from prefopt.recipes.quickstart.task import Instruction, stars

Message = dict[str, str]


@dataclass(frozen=True)
class Pair:
    """Two lines for one instruction and their gold stars; `wrong` where the judge chose the one with fewer."""

    instruction: Instruction
    chosen: str
    rejected: str
    stars_chosen: float
    stars_rejected: float

    @property
    def wrong(self) -> bool:
        return self.stars_chosen < self.stars_rejected


def judge(instruction: Instruction, first: str, second: str, random: Random, sharpness: float) -> Pair | None:
    """The better of two lines, as a judge sees it; None where the gold reward ties.

    P(first chosen) = 1 / (1 + exp(-sharpness (stars of first - stars of second))), the Bradley-Terry model: small
    differences are often judged wrong, large ones seldom. sharpness inf: never wrong.
    """
    gap = stars(instruction, first).total - stars(instruction, second).total
    if gap == 0:
        return None
    wrong = 0.0 if math.isinf(sharpness) else 1 / (1 + math.exp(sharpness * abs(gap)))
    if (gap > 0) == (random.random() < wrong):
        first, second = second, first
    return Pair(instruction, first, second, stars(instruction, first).total, stars(instruction, second).total)


def write_demonstrations(path: Path, rows: Iterable[tuple[Instruction, str]]) -> Path:
    """A conversation a row: `messages`."""
    return _write(path, ({"messages": [_asks(one), _says(line)]} for one, line in rows))


def write_pairs(path: Path, pairs: Iterable[Pair]) -> Path:
    """`prompt`, `chosen`, `rejected`, and for the curious the gold stars, which training does not read."""
    return _write(
        path,
        (
            {
                "prompt": [_asks(pair.instruction)],
                "chosen": [_says(pair.chosen)],
                "rejected": [_says(pair.rejected)],
                "stars": [round(pair.stars_chosen, 2), round(pair.stars_rejected, 2)],
            }
            for pair in pairs
        ),
    )


def prompt_ids(tokenizer: Any, instructions: Sequence[Instruction]) -> list[list[int]]:
    """Each instruction as the model sees it, up to where its answer begins."""
    return [
        tokenizer.apply_chat_template([_asks(one)], add_generation_prompt=True, return_dict=False)
        for one in instructions
    ]


def _asks(instruction: Instruction) -> Message:
    return {"role": "user", "content": instruction.text}


def _says(line: str) -> Message:
    return {"role": "assistant", "content": line}


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path
