"""The quickstart, step by step: task, model, SFT, pairs, DPO, comparison. Everything is left in the run's folder."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import yaml

from prefopt.recipes.quickstart.files import Pair, judge, write_demonstrations, write_pairs
from prefopt.recipes.quickstart.screen import Screen
from prefopt.recipes.quickstart.task import Instruction, instructions, write, write_carelessly
from prefopt.records import InputError, append_json, write_json

CONFIG = "config.yaml"
OWN = (CONFIG, "metrics.jsonl", "summary.json", "samples.jsonl", "data", "base", "sft", "dpo", "cache")
HEADER = "# Resolved settings of `prefopt quickstart`\n"


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result.

    demonstrations, pairs, held_out: instructions of each kind; no two kinds share one. samples: answers an instruction
    in the comparison. care: probability that a writer remembers a rule. sharpness: of the judge, see `files.judge`.
    """

    seed: int = 0
    demonstrations: int = 6000
    pairs: int = 2500
    held_out: int = 256
    samples: int = 4
    care: float = 0.7
    sharpness: float = 2.0
    beta: float = 0.1
    sft: dict[str, Any] = field(default_factory=lambda: {"learning_rate": 3e-3, "epochs": 2, "batch_size": 32})
    dpo: dict[str, Any] = field(default_factory=lambda: {"learning_rate": 1e-4, "epochs": 2, "batch_size": 32})

    @classmethod
    def quick(cls, seed: int) -> Settings:
        """Too little to learn the task: for tests of everything else."""
        sft = {"learning_rate": 3e-3, "epochs": 2, "batch_size": 16}
        return cls(seed, demonstrations=700, pairs=150, held_out=32, samples=2, sft=sft)


@dataclass(frozen=True)
class Parts:
    """The instructions, cut so that no part shares one with another."""

    held_out: list[Instruction]
    demonstrations: list[Instruction]
    pairs: list[Instruction]

    @classmethod
    def of(cls, settings: Settings) -> Parts:
        every = instructions(Random(settings.seed))
        first = settings.held_out + settings.demonstrations
        return cls(every[: settings.held_out], every[settings.held_out : first], every[first : first + settings.pairs])


def run(out: str | Path = "runs/quickstart", seed: int = 0, quick: bool = False) -> dict[str, Any]:
    """Run all of it into the folder `out`, show what changed, and return what summary.json holds.

    quick: a tiny run that checks the machinery and learns next to nothing.
    InputError if `out` holds something that is not a quickstart.
    """
    began = time.perf_counter()
    settings = Settings.quick(seed) if quick else Settings(seed)
    folder, screen = claim(Path(out)), Screen()
    with quiet_libraries(), one_thread():
        (folder / CONFIG).write_text(HEADER + yaml.safe_dump(asdict(settings), sort_keys=False), encoding="utf-8")
        parts = Parts.of(settings)
        base = prepare(folder, settings, parts, screen)
        sft = imitate(folder, settings, base, screen)
        counts = collect(folder, settings, parts, sft, screen)
        dpo = prefer(folder, settings, sft, screen)
        findings = conclude(folder, settings, parts, (sft, dpo), screen)
    summary = {
        **findings,
        "pairs": counts,
        "model": str(dpo),
        "sft_model": str(sft),
        "seed": seed,
        "seconds": round(time.perf_counter() - began, 1),
    }
    write_json(folder / "summary.json", summary)
    screen.farewell(folder, summary)
    return summary


def claim(folder: Path, header: str = HEADER, own: Sequence[str] = OWN) -> Path:
    """The run's folder, empty; what an earlier quickstart left in it goes, and nothing else ever does.

    header: how the config of such a quickstart begins. own: the names of what it writes.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; choose another --out")
    if folder.is_dir() and any(folder.iterdir()):
        config = folder / CONFIG
        if not config.is_file() or not config.read_text(encoding="utf-8", errors="replace").startswith(header):
            raise InputError(f"{folder}: holds files that no quickstart wrote; choose another --out")
    for name in own:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without transformers' bars for reading and writing weights: at this size they only flash by."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch: a model this small gains nothing from a second, and beside busy programs waits for it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def prepare(folder: Path, settings: Settings, parts: Parts, screen: Screen) -> Path:
    """Data files, tokenizer and a random model."""
    from prefopt.recipes.quickstart.model import build_model, build_tokenizer, save

    screen.phase("Task", "Writers demonstrate one-line stories, and forget each rule about 3 times in 10.")
    random = Random(f"{settings.seed} demonstrations")
    rows = [(one, write_carelessly(one, random, settings.care)) for one in parts.demonstrations]
    screen.wrote(write_demonstrations(folder / "data" / "sft.jsonl", rows), len(rows))
    held_out = [(one, write_carelessly(one, random, settings.care)) for one in parts.held_out]
    write_demonstrations(folder / "data" / "sft_held_out.jsonl", held_out)
    perfect = [(one, write(one, random)) for one in parts.held_out]
    write_demonstrations(folder / "data" / "without_mistakes_held_out.jsonl", perfect)
    screen.demonstration(*rows[0])
    screen.phase("Model", "A tokenizer and a Llama-architecture model from nothing: random weights.")
    tokenizer = build_tokenizer([text for one, line in rows for text in (one.text, line)])
    model = build_model(tokenizer, settings.seed)
    save(tokenizer, model, folder / "base")
    screen.say(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens in the vocabulary")
    return folder / "base"


def imitate(folder: Path, settings: Settings, base: Path, screen: Screen) -> Path:
    """SFT on the demonstrations."""
    from prefopt.objectives import SFT

    screen.phase("SFT", "The model learns to answer by imitation, the writers' mistakes included.")
    data, held_out = folder / "data" / "sft.jsonl", folder / "data" / "sft_held_out.jsonl"
    return _train("sft", SFT(), base, data, held_out, folder, settings, settings.sft)


def prefer(folder: Path, settings: Settings, sft: Path, screen: Screen) -> Path:
    """DPO on the pairs."""
    from prefopt.objectives import DPO

    screen.phase("DPO", "The model learns from which of its own answers was chosen. It never sees a rule or a star.")
    data, held_out = folder / "data" / "pairs.jsonl", folder / "data" / "pairs_held_out.jsonl"
    return _train("dpo", DPO(settings.beta), sft, data, held_out, folder, settings, settings.dpo)


def _train(
    name: str, objective: Any, model: Path, data: Path, held_out: Path, folder: Path, settings: Settings, options: Any
) -> Path:
    """Train through the public interface, and add the run's metrics to the quickstart's."""
    from prefopt.recipes.train import train  # torch: not before the first line is shown

    result = train(
        model=model,
        data=data,
        eval_data=held_out,
        objective=objective,
        out=folder / name,
        seed=settings.seed,
        **({"cache_dir": folder / "cache"} if objective.facts.reference else {}),
        **options,
    )
    for line in (folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        append_json(folder / "metrics.jsonl", {"phase": name, **json.loads(line)})
    return result.model_dir


def collect(folder: Path, settings: Settings, parts: Parts, sft: Path, screen: Screen) -> dict[str, Any]:
    """Pairs of the SFT model's own answers; the counts of what came of them."""
    from prefopt.recipes.quickstart.measure import Contender

    screen.phase("Pairs", "The SFT model answers new instructions twice; a judge, wrong at times, picks the better.")
    model, random = Contender.load(sft), Random(f"{settings.seed} judge")
    pairs, unusable = _pairs(model, parts.pairs, settings.seed + 1, random, settings.sharpness)
    exact, _ = _pairs(model, parts.held_out, settings.seed + 2, random, math.inf)
    screen.wrote(write_pairs(folder / "data" / "pairs.jsonl", pairs), len(pairs))
    write_pairs(folder / "data" / "pairs_held_out.jsonl", exact)
    wrong = sum(pair.wrong for pair in pairs)
    screen.say(f"judged wrong: {wrong} of {len(pairs)}; left out as tied or unfinished: {unusable}")
    screen.pair(pairs[0])
    return {"trained": len(pairs), "judged_wrong": wrong, "left_out": unusable, "held_out": len(exact)}


def _pairs(
    model: Any, asked: Sequence[Instruction], seed: int, random: Random, sharpness: float
) -> tuple[list[Pair], int]:
    """Judged pairs, and how many instructions gave none: a tie, or an answer that did not end."""
    tokens = model.tokens(asked, 2, seed)
    end = model.tokenizer.eos_token_id
    pairs = [
        judge(one, lines[0], lines[1], random, sharpness) if all(answer[-1] == end for answer in own) else None
        for one, own, lines in zip(asked, tokens, model.lines(tokens), strict=True)
    ]
    kept = [pair for pair in pairs if pair is not None]
    return kept, len(pairs) - len(kept)


def conclude(
    folder: Path, settings: Settings, parts: Parts, models: tuple[Path, Path], screen: Screen
) -> dict[str, Any]:
    """Compare the two models on the held-out instructions, show it and keep the samples."""
    from prefopt.recipes.quickstart.measure import Contender, HeldOut, compare

    screen.phase("Compare", f"Both models answer {len(parts.held_out)} instructions that no training saw.")
    data = folder / "data"
    files = HeldOut(
        data / "sft_held_out.jsonl", data / "without_mistakes_held_out.jsonl", data / "pairs_held_out.jsonl"
    )
    sft, dpo = (Contender.load(path) for path in models)
    findings, old, new = compare(sft, dpo, parts.held_out, files, settings.samples, settings.seed + 3)
    for number, one in enumerate(parts.held_out):
        row = {
            "instruction": one.text,
            **{name: answers.lines[number] for name, answers in (("sft", old), ("dpo", new))},
            **{f"stars_{name}": answers.rewards[number] for name, answers in (("sft", old), ("dpo", new))},
        }
        append_json(folder / "samples.jsonl", row)
    screen.findings(findings)
    screen.samples(parts.held_out, old, new)
    return findings.summary()
