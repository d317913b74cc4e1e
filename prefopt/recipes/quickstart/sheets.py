"""The task of the GRPO quickstart: sheets of sums, where all answers of a sheet must be right.

A sheet reads `a 7 + 5 b 3 + 9 =` and its answer `a 12 b 12`. A model that gets each sum right with chance q gets a
sheet of n right with chance q^n: the number of sums makes the same task as hard as is wanted.
"""

from __future__ import annotations

import string
from collections.abc import Collection
from dataclasses import dataclass
from random import Random
from typing import Any

NUMBERS = range(1, 10)
TOTALS = range(2, 19)
LABELS = string.ascii_lowercase


@dataclass(frozen=True)
class Sheet:
    """Sums of two numbers from 1 to 9, at most 26 of them."""

    sums: tuple[tuple[int, int], ...]

    @property
    def prompt(self) -> str:
        return " ".join(f"{label} {a} + {b}" for label, (a, b) in zip(LABELS, self.sums, strict=False)) + " ="

    @property
    def answer(self) -> str:
        return answered([a + b for a, b in self.sums])


def answered(totals: list[int]) -> str:
    """Totals as an answer says them: each after its label."""
    return " ".join(f"{label} {total}" for label, total in zip(LABELS, totals, strict=False))


def draw(num_sums: int, random: Random, held_out: Collection[Sheet] = ()) -> Sheet:
    """A sheet of so many sums that is none of `held_out`."""
    while True:
        sheet = Sheet(tuple((random.choice(NUMBERS), random.choice(NUMBERS)) for _ in range(num_sums)))
        if sheet not in held_out:
            return sheet


def draw_different(count: int, num_sums: int, random: Random) -> list[Sheet]:
    """`count` sheets, no two of them the same."""
    found: dict[Sheet, None] = {}
    while len(found) < count:
        found[draw(num_sums, random, found)] = None
    return list(found)


def answer_carelessly(sheet: Sheet, random: Random, care: float) -> str:
    """The answer of a writer who gets each sum right with chance `care` and else writes any other total."""
    right = [a + b for a, b in sheet.sums]
    slips = [random.choice([other for other in TOTALS if other != total]) for total in right]
    return answered([total if random.random() < care else slip for total, slip in zip(right, slips, strict=True)])


def demonstration(sheet: Sheet, random: Random, care: float) -> dict[str, Any]:
    """A row to imitate. Its completion goes on from the prompt's text, hence the space."""
    return {"prompt": sheet.prompt, "completion": " " + answer_carelessly(sheet, random, care)}


def question(sheet: Sheet) -> dict[str, Any]:
    """A row to attempt: the reward reads the column `answer`, the model never does."""
    return {"prompt": sheet.prompt, "answer": sheet.answer}


def tokens_of(num_sums: int) -> int:
    """Tokens of an answer to so many sums with its end: a label and a total for each."""
    return 2 * num_sums + 1


def build_tokenizer(num_sums: int) -> Any:
    """A word is a token: the numbers, the signs, and labels for so many sums."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    end, unknown = "<|end|>", "<|unknown|>"
    words = [end, unknown, "+", "=", *map(str, range(1, TOTALS.stop)), *LABELS[:num_sums]]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=end,
        pad_token=end,
        unk_token=unknown,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: Any, num_sums: int, seed: int) -> Any:
    """A random GPT-2 with 96 channels, 1 layer and 4 heads, about 130,000 parameters, for up to `num_sums` sums."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=96,
        n_layer=1,
        n_head=4,
        # positions of their own make finding `c` in the sheet easy: a model with rotary ones needs twice the layers
        n_positions=4 * num_sums + 1 + tokens_of(num_sums),
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        initializer_range=0.1,  # the usual 0.02 is for wide models
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)
