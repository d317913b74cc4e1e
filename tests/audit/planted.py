"""Clean rows built in code, and for every check a way to spoil some of them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

Rows = list[dict[str, Any]]
NUM, FAULTY = 240, 20
OTHER = "Stavět dům za řekou není snadné".split()


@lru_cache
def lexicon() -> list[str]:
    """600 words that look like words."""
    draw = random.Random(7)
    starts, middles, ends = "b c d f g l m n p r s t v ch sh".split(), "a e i o u ai ou".split(), "n r l t s m".split()
    made = {
        draw.choice(starts) + draw.choice(middles) + draw.choice(ends) + draw.choice(["", "a", "ing", "er"])
        for _ in range(3000)
    }
    return sorted(made)[:600]


def sentence(draw: random.Random, least: int = 6, most: int = 14) -> str:
    """A capital, some words, a full stop."""
    return " ".join(draw.choice(lexicon()) for _ in range(draw.randint(least, most))).capitalize() + "."


def text(draw: random.Random) -> str:
    """Two to four sentences."""
    return " ".join(sentence(draw) for _ in range(draw.randint(2, 4)))


def pairs(num: int = NUM, seed: int = 0) -> Rows:
    """Pairs without a fault: which answer is chosen has nothing to do with its words or its length."""
    draw = random.Random(seed)
    return [{"prompt": f"{sentence(draw)}\n", "chosen": text(draw), "rejected": text(draw)} for _ in range(num)]


def labels(num: int = NUM, seed: int = 0) -> Rows:
    rows = pairs(num, seed)
    return [{"prompt": row["prompt"], "completion": row["chosen"], "label": n % 2 == 0} for n, row in enumerate(rows)]


def chats(num: int = NUM, seed: int = 0) -> Rows:
    """Pairs in messages, with a turn before."""
    draw = random.Random(seed)

    def turn(role: str) -> dict[str, str]:
        return {"role": role, "content": text(draw)}

    return [
        {
            "prompt": [turn("user"), turn("assistant"), turn("user")],
            "chosen": [turn("assistant")],
            "rejected": [turn("assistant")],
        }
        for _ in range(num)
    ]


def solved(num: int = NUM, seed: int = 0) -> Rows:
    """Pairs of worked sums with the right answer in a column."""
    draw, rows = random.Random(seed), []
    for _ in range(num):
        a, b = draw.randint(2, 40), draw.randint(2, 40)
        right, wrong = (
            f"{sentence(draw)} So <<{a}*{b}={a * b}>>.\n#### {a * b + off}" for off in (0, draw.randint(1, 9))
        )
        rows.append({"prompt": f"{sentence(draw)}\n", "chosen": right, "rejected": wrong, "answer": str(a * b)})
    return rows


def rated(num: int = NUM, seed: int = 0) -> Rows:
    """Pairs with ratings."""
    draw = random.Random(seed + 1)
    rows = pairs(num, seed)
    for row in rows:
        low = round(draw.uniform(1, 6), 2)
        row |= {"score_chosen": round(low + draw.uniform(1, 3), 2), "score_rejected": low}
    return rows


def decided(num: int = NUM, seed: int = 0) -> Rows:
    """Pairs whose chosen answer has one of a few words, in all but 2 %: labels can be told, and flips found."""
    draw, rows = random.Random(seed + 2), pairs(num, seed)
    for row in rows:
        good, bad = ("gladly", "rudely") if draw.random() < 0.98 else ("plainly", "plainly")
        row["chosen"] += f" {good.capitalize()} {draw.choice(lexicon())} {good}."
        row["rejected"] += f" {bad.capitalize()} {draw.choice(lexicon())} {bad}."
    return rows


class Planted(NamedTuple):
    """clean: rows without the fault. spoil: makes it in a row, given the row before. whole: it is the set that is
    spoilt, and no row is named.
    """

    check: str
    clean: Callable[[], Rows]
    spoil: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]
    whole: bool = False


def answer(side: str, make: Callable[[str], str]) -> Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]:
    """Spoils one answer by its text."""
    return lambda row, _: {**row, side: make(row[side])}


def both(
    make: Callable[[dict[str, Any]], dict[str, Any]],
) -> Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]:
    return lambda row, _: make(row)


def swapped(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}


def reworded(row: dict[str, Any]) -> dict[str, Any]:
    """The row with one word in twenty of each text changed, at least one."""
    out = dict(row)
    for name in ("prompt", "chosen", "rejected"):
        words = row[name].split(" ")
        words[-1] = "otherwise." + ("\n" if name == "prompt" else "")
        out[name] = " ".join(words)
    return out


def longer(row: dict[str, Any]) -> dict[str, Any]:
    words = row["prompt"].strip().lower().split()
    return {**row, "prompt": " ".join([*words, *lexicon()[:30]]) + "\n"}


REFUSALS = ("I'm sorry, but I can't help with that.", "I cannot answer this.", "As an AI, I am unable to do that.")
PLANTED: tuple[Planted, ...] = (
    Planted("wrong-row", pairs, lambda row, _: {"prompt": row["prompt"], "chosen": None, "rejected": row["rejected"]}),
    Planted("empty", pairs, answer("chosen", lambda _: " \n")),
    Planted("no-prompt", pairs, lambda row, _: {**row, "prompt": ""}),
    Planted(
        "cut-off",
        pairs,
        answer(
            "chosen",
            lambda said: said + " " + said.rstrip(".").lower()[: len(said) * 2 // 3].rsplit(" ", 1)[0].rstrip("."),
        ),
    ),
    Planted("refused", pairs, lambda row, _: {**row, "chosen": REFUSALS[len(row["chosen"]) % 3]}),
    Planted("formula", pairs, answer("chosen", lambda said: f"As an AI language model, {said}")),
    Planted(
        "placeholder",
        pairs,
        lambda row, _: {**row, "rejected": ("N/A", "None", "[insert answer here]")[len(row["chosen"]) % 3]},
    ),
    Planted("loop", pairs, answer("chosen", lambda said: (" ".join(said.split()[:7]) + " ") * 9)),
    Planted("stock-answer", pairs, lambda row, _: {**row, "chosen": "That depends on many things."}),
    Planted("echo", pairs, lambda row, _: {**row, "chosen": row["prompt"] + row["chosen"]}),
    Planted("duplicate", pairs, lambda _, before: dict(before)),
    Planted("near-duplicate", lambda: [longest(row) for row in pairs()], lambda _, before: reworded(before)),
    Planted("contradiction", pairs, lambda _, before: swapped(before)),
    Planted("identical", pairs, lambda row, _: {**row, "chosen": row["rejected"] + "  "}),
    Planted("restyled", pairs, lambda row, _: {**row, "chosen": row["rejected"].upper().replace(".", "!")}),
    Planted("tied-scores", rated, lambda row, _: {**row, "score_chosen": row["score_rejected"]}),
    Planted("near-tie", rated, lambda row, _: {**row, "score_chosen": row["score_rejected"] + 0.01}),
    Planted("inverted-scores", rated, lambda row, _: {**row, "score_chosen": row["score_rejected"] - 1.0}),
    Planted("broken-text", pairs, answer("chosen", lambda said: said + " na\u00c3\u00afve caf\u00c3\u00a9")),
    Planted("markup", pairs, answer("chosen", lambda said: said + "<|im_end|>")),
    Planted("speaker", pairs, answer("rejected", lambda said: "Assistant: " + said)),
    Planted("turns", chats, lambda row, _: {**row, "prompt": [*row["prompt"], {"role": "user", "content": "And?"}]}),
    Planted("boundary", pairs, lambda row, _: {**row, "prompt": row["prompt"].strip() + " "}),
    Planted(
        "script",
        lambda: [longest(row) for row in pairs()],
        answer("chosen", lambda said: "Это совсем другой язык, на котором никто не спрашивал. " * 3),
    ),
    Planted("checker", solved, lambda row, _: {**row, "chosen": row["chosen"].split("####")[0] + "#### 1"}),
    Planted("sums", solved, answer("chosen", lambda said: said.replace(">>", "7>>"))),
    Planted("label-noise", lambda: decided(600), both(swapped)),
    Planted("one-prompt", pairs, lambda row, _: {**row, "prompt": "The same every time?\n"}),
)

# faults of a whole set: all rows are spoilt, and the check must fire; on clean rows it must not
WHOLE: tuple[Planted, ...] = (
    Planted("alike", pairs, lambda row, _: {**row, "rejected": row["chosen"] + " Truly so."}, True),
    Planted("opening", pairs, answer("chosen", lambda said: "Certainly, here is " + said), True),
    Planted("uneven-space", pairs, answer("chosen", lambda said: " " + said), True),
    Planted("length", pairs, answer("chosen", lambda said: said + " " + said[::-1] + " more"), True),
    Planted("surface", pairs, answer("chosen", lambda said: said + " Thank you kindly."), True),
    Planted("flat-scores", rated, lambda row, _: {**row, "score_chosen": row["score_rejected"] + 1.0}, True),
    Planted("imbalance", labels, lambda row, before: {**row, "label": len(row["completion"]) % 9 == 0}, True),
)


def longest(row: dict[str, Any]) -> dict[str, Any]:
    """The row with longer texts, so that one changed word is a small share."""
    draw = random.Random(row["prompt"])
    more = {name: row[name].strip() + " " + text(draw) + " " + text(draw) for name in ("chosen", "rejected")}
    return {"prompt": row["prompt"].strip() + " " + text(draw) + "\n", **more}


def plant(case: Planted, seed: int = 0) -> tuple[Rows, list[int]]:
    """Rows of which some are spoilt, and which (from 0). A fault that takes a row from another follows it."""
    rows = case.clean()
    draw = random.Random(seed)
    places = sorted(draw.sample(range(1, len(rows), 2), FAULTY if len(rows) < 500 else len(rows) // 10))
    for place in places:
        rows[place] = case.spoil(rows[place], rows[place - 1])
    return rows, places


def write(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|> ' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)


def tokenizer(template: str = CHAT, bos: bool = True, unknown: str = "<unk>") -> Any:
    """One token a word; adds <s> to a text where `bos` says so."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>"]
    words = sorted({word for row in pairs() + decided(50) for said in row.values() for word in _parts(said)})
    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*names, *words])}, unk_token=unknown))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        unk_token=unknown,
        additional_special_tokens=names[3:],
    )
    made.chat_template = template
    return made


def _parts(said: str) -> list[str]:
    import re

    return re.findall(r"\w+|[^\w\s]+", said)
