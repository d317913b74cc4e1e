"""The quickstart of learning from rewards: SFT, GRPO, a task too hard for it, and that with easier prompts mixed in.

Every run is one that `prefopt train grpo` can do, with the reward `exact`, which gives 1 or 0.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import yaml

from prefopt.recipes.quickstart import grpo_screen
from prefopt.recipes.quickstart.recipe import claim, one_thread, quiet_libraries
from prefopt.recipes.quickstart.screen import Screen
from prefopt.recipes.quickstart.sheets import (
    Sheet,
    build_model,
    build_tokenizer,
    demonstration,
    draw,
    draw_different,
    question,
    tokens_of,
)
from prefopt.records import append_json, write_json

OWN = "config.yaml metrics.jsonl summary.json samples.jsonl data base sft grpo hard mixed".split()
HEADER = "# Resolved settings of `prefopt quickstart grpo`\n"


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result.

    demonstrations: rows of SFT; half of them have `hard_sums` sums, the others any number up to it. care: chance that a
    writer gets a sum right. sums: of a sheet of the main task. hard_sums: of the task too hard to find. easier: number
    of sums of the easier sheets, in turn. held_out: sheets of each task that no training sees. updates, prompts: of the
    main run. hard_updates, hard_prompts: of the hard task, with and without the easier ones, which are added to them.
    """

    seed: int = 0
    demonstrations: int = 6000
    care: float = 0.6
    sums: int = 2
    hard_sums: int = 14
    easier: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    held_out: int = 200
    updates: int = 40
    prompts: int = 64
    hard_updates: int = 50
    hard_prompts: int = 16
    easier_prompts: int = 48
    sft: dict[str, Any] = field(
        default_factory=lambda: {
            "learning_rate": 4e-3,
            "epochs": 2,
            "batch_size": 16,
            "adam_beta2": 0.95,
            "layout": "padded",
        }
    )
    grpo: dict[str, Any] = field(
        default_factory=lambda: {
            "learning_rate": 2e-3,
            "schedule": "constant",
            "num_completions": 8,
            "tokens_per_forward": 8192,
        }
    )

    @classmethod
    def quick(cls, seed: int) -> Settings:
        """Small enough for a test: fewer rows, sheets and updates, and a stall is judged over fewer rollouts."""
        usual = cls(seed)
        return replace(
            usual,
            demonstrations=3000,
            hard_sums=10,
            easier=(1, 2),
            held_out=48,
            updates=14,
            prompts=32,
            hard_updates=5,
            hard_prompts=4,
            easier_prompts=12,
            sft={**usual.sft, "batch_size": 8},
            grpo={**usual.grpo, "stall_window": 5},
        )


@dataclass(frozen=True)
class Held:
    """Sheets that no training sees."""

    main: list[Sheet]
    hard: list[Sheet]

    @classmethod
    def of(cls, settings: Settings) -> Held:
        random = Random(f"{settings.seed} held out")
        count = settings.held_out
        return cls(draw_different(count, settings.sums, random), draw_different(count, settings.hard_sums, random))


def run(out: str | Path = "runs/quickstart-grpo", seed: int = 0, quick: bool = False) -> dict[str, Any]:
    """Run all of it into the folder `out`, show what changed, and return what summary.json holds.

    quick: a small run that checks the machinery.
    InputError if `out` holds something that is not a quickstart of GRPO.
    """
    began = time.perf_counter()
    settings = Settings.quick(seed) if quick else Settings(seed)
    folder, screen = claim(Path(out), HEADER, OWN), Screen()
    with quiet_libraries(), one_thread():
        (folder / "config.yaml").write_text(HEADER + yaml.safe_dump(_plain(settings), sort_keys=False), "utf-8")
        held = Held.of(settings)
        base = prepare(folder, settings, held, screen)
        sft = imitate(folder, base, settings, screen)
        main = improve(folder, sft, settings, screen)
        hard = attempt_alone(folder, sft, settings, screen)
        mixed = attempt_with_easier(folder, sft, settings, screen)
        show(folder, settings, held, screen)
    summary = {
        "accuracy": main["held_out"]["accuracy"],
        "sums": settings.sums,
        "hard": {"sums": settings.hard_sums, "alone": _outcome(hard), "easier_mixed_in": _outcome(mixed)},
        "model": main["model"],
        "sft_model": str(sft),
        "seed": seed,
        "seconds": round(time.perf_counter() - began, 1),
    }
    write_json(folder / "summary.json", summary)
    grpo_screen.findings(screen, summary)
    grpo_screen.farewell(screen, folder, summary)
    return summary


def prepare(folder: Path, settings: Settings, held: Held, screen: Screen) -> Path:
    """Data files, tokenizer and a random model."""
    from prefopt.recipes.quickstart.model import save

    screen.phase("Task", "Sheets of sums. A point only where every answer of a sheet is right.")
    random, unseen = Random(f"{settings.seed} sheets"), {*held.main, *held.hard}
    lengths = [*range(1, settings.hard_sums + 1), *[settings.hard_sums] * settings.hard_sums]
    shown = [draw(random.choice(lengths), random, unseen) for _ in range(settings.demonstrations)]
    rows = [demonstration(sheet, random, settings.care) for sheet in shown]
    screen.wrote(_write(folder / "data" / "sft.jsonl", rows), len(rows))
    held_out = [demonstration(sheet, random, settings.care) for sheet in held.main + held.hard]
    _write(folder / "data" / "sft_held_out.jsonl", held_out)
    main = [draw(settings.sums, random, unseen) for _ in range(settings.updates * settings.prompts)]
    hard = [draw(settings.hard_sums, random, unseen) for _ in range(settings.hard_updates * settings.hard_prompts)]
    count = settings.hard_updates * settings.easier_prompts
    easier = [draw(settings.easier[at % len(settings.easier)], random, unseen) for at in range(count)]
    for name, sheets in (("grpo", main), ("hard", hard), ("easier", easier)):
        screen.wrote(_write(folder / "data" / f"{name}.jsonl", map(question, sheets)), len(sheets))
    for name, sheets in (("grpo", held.main), ("hard", held.hard)):
        _write(folder / "data" / f"{name}_held_out.jsonl", map(question, sheets))
    grpo_screen.example(screen, main[0])
    tokenizer = build_tokenizer(settings.hard_sums)
    save(tokenizer, build_model(tokenizer, settings.hard_sums, settings.seed), folder / "base")
    return folder / "base"


def imitate(folder: Path, base: Path, settings: Settings, screen: Screen) -> Path:
    """SFT on the demonstrations."""
    from prefopt.objectives import SFT

    slips = round(100 * (1 - settings.care))
    screen.phase("SFT", f"A small model imitates writers who get {slips} of 100 sums wrong.")
    _train("sft", SFT(), base, folder, settings, **settings.sft)
    return folder / "sft" / "model"


def improve(folder: Path, sft: Path, settings: Settings, screen: Screen) -> dict[str, Any]:
    """GRPO on the main task."""
    screen.phase("GRPO", f"It answers new sheets of {settings.sums} sums; the reward says only 1 or 0.")
    return _rewarded("grpo", sft, folder, settings, settings.updates, settings.prompts)


def attempt_alone(folder: Path, sft: Path, settings: Settings, screen: Screen) -> dict[str, Any]:
    """GRPO on the hard task."""
    screen.phase(
        "Too hard", f"The SFT model, and sheets of {settings.hard_sums} sums: who finds no point learns nothing."
    )
    return _rewarded("hard", sft, folder, settings, settings.hard_updates, settings.hard_prompts)


def attempt_with_easier(folder: Path, sft: Path, settings: Settings, screen: Screen) -> dict[str, Any]:
    """GRPO on the hard task, as many of its prompts in an update, with easier ones added to them."""
    shortest, longest = min(settings.easier), max(settings.easier)
    screen.phase("Easier prompts", f"The same, with sheets of {shortest} to {longest} sums mixed in (easier_data).")
    prompts = settings.hard_prompts + settings.easier_prompts
    easier = {"easier_data": folder / "data" / "easier.jsonl", "easier_share": settings.easier_prompts / prompts}
    return _rewarded("mixed", sft, folder, settings, settings.hard_updates, prompts, data="hard", **easier)


def _rewarded(
    name: str, model: Path, folder: Path, settings: Settings, updates: int, prompts: int, **options: Any
) -> dict[str, Any]:
    from prefopt.objectives import GRPO

    given = {
        "reward": "exact",
        "max_tokens": tokens_of(settings.hard_sums),
        "max_steps": updates,
        "batch_size": prompts,
        **settings.grpo,
        **options,
    }
    return _train(name, GRPO(), model, folder, settings, **given)


def _train(
    name: str, objective: Any, model: Path, folder: Path, settings: Settings, data: str | None = None, **options: Any
) -> dict[str, Any]:
    """Train through the public interface, and add the run's metrics to the quickstart's. What its summary says."""
    from prefopt.recipes.train import train  # torch: not before the first line is shown

    rows = folder / "data" / f"{data or name}.jsonl"
    result = train(
        model=model,
        data=rows,
        eval_data=rows.with_name(f"{rows.stem}_held_out.jsonl"),
        objective=objective,
        out=folder / name,
        seed=settings.seed,
        **options,
    )
    for line in (folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        append_json(folder / "metrics.jsonl", {"phase": name, **json.loads(line)})
    return result.summary


def show(folder: Path, settings: Settings, held: Held, screen: Screen) -> None:
    """One answer of every model to every held-out sheet, kept, and some of them shown."""
    screen.phase("Compare", f"Answers to {settings.held_out} sheets of each task that no training saw.")
    tasks = {"grpo": (held.main, ("sft", "grpo")), "hard": (held.hard, ("sft", "hard", "mixed"))}
    for task, (sheets, names) in tasks.items():
        answers = {name: answers_of(folder / name / "model", sheets, settings) for name in names}
        for at, sheet in enumerate(sheets):
            said = {name: own[at] for name, own in answers.items()}
            append_json(folder / "samples.jsonl", {"task": task, **question(sheet), **said})
        grpo_screen.samples(screen, task, sheets, answers)


def answers_of(model: Path, sheets: Sequence[Sheet], settings: Settings) -> list[str]:
    """One answer to every sheet, at temperature 1."""
    from prefopt.models.load import load
    from prefopt.models.sampler import sample

    loaded = load(model)
    tokenizer = loaded.tokenizer
    tokens = sample(
        loaded.model.eval(),
        [tokenizer(sheet.prompt)["input_ids"] for sheet in sheets],
        max_tokens=tokens_of(settings.hard_sums),
        eos_ids=[tokenizer.eos_token_id],
        seed=settings.seed,
    )
    return [tokenizer.decode(own[0], skip_special_tokens=True) for own in tokens]


def _outcome(summary: dict[str, Any]) -> dict[str, Any]:
    """What became of a run on the hard task."""
    return {"accuracy": summary["held_out"]["accuracy"], "stalled": summary["stalled"], "model": summary["model"]}


def _plain(settings: Settings) -> dict[str, Any]:
    return {**asdict(settings), "easier": list(settings.easier)}


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
