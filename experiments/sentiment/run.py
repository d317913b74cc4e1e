"""SFT, then DPO, of a real model on pairs made from its own samples, scored by a sentiment lexicon.

    python experiments/sentiment/run.py --out runs/sentiment --results experiments/sentiment/results.json

The model (stories260K), the stories (tinystories-1k) and the lexicon (VADER) are read from --shared. The score of a
text is the mean valence of its words, words outside the lexicon counting 0: unlike a sum it does not grow with length.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import prefopt
from prefopt.evaluate.kl import sequence_kl
from prefopt.evaluate.perplexity import perplexity
from prefopt.evaluate.scoring import sampled
from prefopt.evaluate.statistics import mean
from prefopt.models.load import ModelOptions, load
from prefopt.models.policy import Policy, choose
from prefopt.models.sampler import sample
from prefopt.records import Example, write_json

END = 1  # `<s>`: how a story ends for this model
WORD = re.compile(r"[a-z]+(?:'[a-z]+)*")


@dataclass(frozen=True)
class Size:
    """stories: for training; held_out: for evaluation, never trained on; samples: continuations of each opening."""

    stories: int
    held_out: int
    samples: int
    dpo_epochs: float
    max_tokens: int = 192
    sft_rate: float = 2e-4
    dpo_rate: float = 3e-4
    batch_size: int = 8
    beta: float = 0.1


SIZES = {
    "small": Size(stories=100, held_out=60, samples=4, dpo_epochs=2.0, max_tokens=144),
    "full": Size(stories=300, held_out=150, samples=8, dpo_epochs=1.0),
}
LONGEST = 400  # tokens of a story; most of a shorter one's continuations end within max_tokens


def read_lexicon(path: Path) -> dict[str, float]:
    """Word -> mean valence of ten raters, -4 to 4."""
    lines = (line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line)
    return {fields[0]: float(fields[1]) for fields in lines}


def sentiment(text: str, lexicon: dict[str, float]) -> float:
    """Mean valence of the words of a text; 0 for a text without words."""
    words = WORD.findall(text.lower())
    return sum(lexicon.get(word, 0.0) for word in words) / len(words) if words else 0.0


def opening(story: str) -> str:
    """The first sentences of a story, up to 60 percent of it."""
    ends = [found.end() for found in re.finditer(r"[.!?]\"?(?=\s)", story)]
    short = [end for end in ends if end <= 0.6 * len(story)]
    return story[: (short or ends or [len(story) // 2])[-1 if short else 0]]


def own_copy(source: Path, folder: Path) -> Path:
    """The model with its end of a story named as the end-of-sequence token; the original names one it never uses."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        shutil.copyfile(source / name, folder / name)
    settings = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    write_json(folder / "tokenizer_config.json", {**settings, "eos_token": settings["bos_token"]})
    return folder


class Continuations(NamedTuple):
    """texts, ended: [opening][sample], the text after the opening, and whether the story came to its end in time.

    examples: the same as token ids.
    """

    texts: list[list[str]]
    ended: list[list[bool]]
    examples: list[Example]


class Writer:
    """A model that continues openings, and what it says of held-out stories."""

    def __init__(self, folder: Path) -> None:
        loaded = load(folder, ModelOptions(dtype="float32"))
        self.tokenizer, self.policy = loaded.tokenizer, Policy(loaded.model)
        choose(self.policy)

    def continuations(self, openings: list[str], size: Size, seed: int) -> Continuations:
        prompts = [self.tokenizer(text)["input_ids"] for text in openings]
        found = sample(self.policy.model, prompts, n=size.samples, max_tokens=size.max_tokens, eos_ids=[END], seed=seed)
        texts = [[self._text(prompt, tokens) for tokens in own] for prompt, own in zip(prompts, found, strict=True)]
        return Continuations(texts, [[tokens[-1] == END for tokens in own] for own in found], sampled(prompts, found))

    def _text(self, prompt: list[int], tokens: list[int]) -> str:
        start = self.tokenizer.decode(prompt, skip_special_tokens=True)
        return str(self.tokenizer.decode([*prompt, *tokens], skip_special_tokens=True))[len(start) :]

    def short(self, stories: list[str]) -> list[str]:
        """Those of at most LONGEST tokens."""
        return [story for story in stories if len(self.tokenizer(story)["input_ids"]) <= LONGEST]

    def perplexity(self, stories: list[str]) -> float | None:
        """Of whole stories, per token, their end included."""
        rows = [[*self.tokenizer(story)["input_ids"], END] for story in stories]
        examples = [Example(ids[:1], [ids[1:]], [1.0], [[True] * (len(ids) - 1)]) for ids in rows]
        return perplexity(self.policy, examples).value


def pairs(openings: list[str], made: Continuations, lexicon: dict[str, float]) -> list[dict[str, str]]:
    """The best and the worst continuation of each opening that came to their end, where they differ in score."""
    rows = []
    for prompt, texts, ended in zip(openings, made.texts, made.ended, strict=True):
        ranked = sorted(
            (sentiment(text, lexicon), text) for text, end in zip(texts, ended, strict=True) if end and text
        )
        if len(ranked) >= 2 and ranked[0][0] < ranked[-1][0]:
            rows.append({"prompt": prompt, "chosen": ranked[-1][1], "rejected": ranked[0][1]})
    return rows


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def scores(made: Continuations, lexicon: dict[str, float]) -> list[float]:
    """Mean score of each opening's continuations, ended or not."""
    return [sum(sentiment(text, lexicon) for text in own) / len(own) for own in made.texts]


def run(shared: Path, out: Path, size: Size, seed: int = 0) -> dict[str, Any]:
    """The whole experiment; what it found, for JSON."""
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    lexicon = read_lexicon(shared / "data/vader/vader_lexicon.txt")
    base = own_copy(shared / "models/stories260K", out / "base")
    first = Writer(base)
    stories = json.loads((shared / "data/tinystories-1k/tinystories_1000.json").read_text(encoding="utf-8"))
    random.Random(seed).shuffle(stories)
    stories = first.short(stories)
    held_out, training = stories[: size.held_out], stories[size.held_out :][: size.stories]
    openings = [opening(story) for story in training]

    tales = [
        {"prompt": start, "completion": story[len(start) :]} for start, story in zip(openings, training, strict=True)
    ]
    common = {"batch_size": size.batch_size, "dtype": "float32", "seed": seed, "overwrite": True}
    sft = prefopt.train(
        objective=prefopt.SFT(),
        model=base,
        data=write_rows(out / "sft.jsonl", tales),
        out=out / "sft",
        learning_rate=size.sft_rate,
        **common,
    )
    second = Writer(sft.model_dir)
    made = pairs(openings, second.continuations(openings, size, seed), lexicon)
    dpo = prefopt.train(
        objective=prefopt.DPO(beta=size.beta),
        model=sft.model_dir,
        data=write_rows(out / "pairs.jsonl", made),
        out=out / "dpo",
        learning_rate=size.dpo_rate,
        epochs=size.dpo_epochs,
        **common,
    )
    writers = {"base": first, "sft": second, "dpo": Writer(dpo.model_dir)}
    found = measure(writers, held_out, lexicon, size, seed)
    return {
        **found,
        "pairs": len(made),
        "preference_accuracy": dpo.summary["end"].get("eval/rewards/accuracies"),
        "size": dataclasses.asdict(size),
        "model": str(dpo.model_dir),
        "seconds": round(time.perf_counter() - began, 1),
    }


def measure(
    writers: dict[str, Writer], stories: list[str], lexicon: dict[str, float], size: Size, seed: int
) -> dict[str, Any]:
    """On stories that no model was trained on: sentiment of their continuations, its rise, perplexity, distance."""
    made = {
        name: writer.continuations([opening(story) for story in stories], size, seed + 1)
        for name, writer in writers.items()
        if name != "base"
    }
    means = {name: scores(own, lexicon) for name, own in made.items()}
    # paired: both models continue the same opening, and openings are what is drawn anew
    rise = mean([after - before for before, after in zip(means["sft"], means["dpo"], strict=True)], seed=seed)
    ended = {name: [end for row in own.ended for end in row] for name, own in made.items()}
    return {
        "sentiment": {name: mean(own, seed=seed).summary() for name, own in means.items()},
        "rise": rise.summary(),
        "perplexity": {name: writer.perplexity(stories) for name, writer in writers.items()},
        "ended": {name: sum(flags) / len(flags) for name, flags in ended.items()},
        "kl": dataclasses.asdict(sequence_kl(writers["dpo"].policy, writers["sft"].policy, made["dpo"].examples)),
    }


def table(found: dict[str, Any]) -> str:
    """What was found, for a reader."""
    lines = ["model   sentiment of continuations   perplexity of stories   came to an end"]
    for name, value in found["perplexity"].items():
        s, ended = found["sentiment"].get(name), found["ended"].get(name)
        said = f"{s['value']:.4f} [{s['low']:.4f}, {s['high']:.4f}]" if s else ""
        lines.append(f"{name:<7} {said:<28}   {value:>21.3f}   {'' if ended is None else f'{ended:.1%}':>14}")
    rise, kl = found["rise"], found["kl"]
    lines.append(
        f"rise from sft to dpo: {rise['value']:.4f} [{rise['low']:.4f}, {rise['high']:.4f}], {rise['n']} openings"
    )
    lines.append(f"KL(dpo || sft): {kl['value']:.1f} nats per continuation, {kl['per_token']:.4f} per token")
    lines.append(f"{found['pairs']} pairs, {found['seconds']:.0f} s")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).resolve()
    parser.add_argument("--shared", type=Path, default=here.parents[3] / "shared", help="folder with models/ and data/")
    parser.add_argument("--out", type=Path, default=Path("runs/sentiment"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=None, help="JSON file for what was found")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    found = run(given.shared, given.out, SIZES[given.size], given.seed)
    print(table(found))
    if given.results is not None:
        write_json(given.results, {name: value for name, value in found.items() if name != "model"})


if __name__ == "__main__":
    main()
