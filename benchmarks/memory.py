"""The estimate of `prefopt estimate` beside measured peaks: 4 objectives, 3 shapes, options varied.

`python benchmarks/memory.py` trains three updates of each point in a process of its own, one at a time, and writes
results/memory.json. Peaks are resident memory on a CPU, of which Python with torch is a large part for small models:
so the part above that is compared as well. On a GPU the allocator's peak is compared.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from offline import RESULTS, Shape, build, text, versions

WITHIN = 0.15
SHAPES = {
    "7M": Shape(192, 512, 4, 4, 2, pairs=24, update=8, prompt=60, longest_prompt=200, answer=(20, 120)),
    "15M": Shape(288, 768, 6, 6, 6, pairs=24, update=8),
    "55M": Shape(512, 1408, 10, 8, 4, pairs=12, update=4, prompt=100, longest_prompt=300, answer=(20, 160)),
    "0.5B": Shape(1024, 2816, 28, 16, 8, pairs=96, update=32, prompt=1000, longest_prompt=1400, answer=(100, 400)),
}


@dataclass(frozen=True)
class Point:
    """One run. data: which of the files of `build` it reads, or prompts."""

    objective: str
    shape: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def data(self) -> str:
        return {"sft": "demonstrations", "kto": "labels", "grpo": "prompts", "ppo": "prompts"}.get(
            self.objective, "pairs"
        )


SAMPLED = {"num_completions": 4, "max_tokens": 48, "reward": ["length"], "length_target": 16}
POINTS = (
    Point("sft", "7M"),
    Point("sft", "15M", {"dtype": "bfloat16"}),
    Point("sft", "55M", {"gradient_checkpointing": True}),
    Point("dpo", "7M", {"tokens_per_forward": 8192}),
    Point("dpo", "15M"),
    Point("dpo", "15M", {"dtype": "bfloat16", "tokens_per_forward": 1024}),
    Point("dpo", "55M", {"lora_rank": 16}),
    Point("dpo", "55M", {"dtype": "bfloat16", "reference": "copy"}),
    Point("dpo", "55M", {"save_every": 2}),
    Point("kto", "7M", {"dtype": "bfloat16"}),
    Point("kto", "15M", {"gradient_checkpointing": True, "tokens_per_forward": 4096}),
    Point("kto", "55M"),
    Point("grpo", "7M", SAMPLED),
    Point("grpo", "15M", {**SAMPLED, "dtype": "bfloat16", "beta": 0.05}),
    Point("grpo", "55M", {**SAMPLED, "lora_rank": 8}),
    Point("ppo", "15M", SAMPLED),
    Point("ppo", "55M", {**SAMPLED, "critic": "shared"}),
)
ON_GPU = tuple(
    Point(name, "0.5B", options)
    for name, options in (
        ("sft", {}),
        ("dpo", {}),
        ("dpo", {"dtype": "float32", "tokens_per_forward": 4096}),
        ("dpo", {"lora_rank": 16}),
        ("dpo", {"gradient_checkpointing": True, "tokens_per_forward": 16384}),
        ("kto", {}),
        ("orpo", {}),
    )
)


def write_prompts(shape: Shape, folder: Path) -> None:
    draw = random.Random(2)
    lines = [{"prompt": text([draw.randrange(40_000) for _ in range(draw.randint(8, 40))])} for _ in range(shape.pairs)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def resolved_of(point: Point, folder: Path) -> dict[str, Any]:
    """The point's options, every section."""
    from prefopt import config

    options = {
        "model": str(folder / "model"),
        "data": str(folder / f"{point.data}.jsonl"),
        "out": str(folder / "run"),
        "batch_size": SHAPES[point.shape].update,
        "max_length": 1024 if point.data == "prompts" else None,
        "eval_fraction": 0.0,
        "learning_rate": 1e-6,
        "save_minutes": None,
        "max_steps": 3,
        **point.options,
    }
    if point.objective == "dpo" and not {"reference", "lora_rank"} & point.options.keys():
        options["cache_dir"] = str(folder / "cache")
    return config.resolve(config.sections(point.objective), config.Layer(options))


def measure(point: Point, folder: Path, known: dict[str, Any] | None) -> dict[str, Any]:
    """Estimated and measured, bytes and seconds. known: an earlier result, whose measurements are kept."""
    from prefopt.advice.machine import device_memory, speed
    from prefopt.recipes.estimate import Probed, dtype_of, estimate, probe

    resolved = resolved_of(point, folder)
    device, room = device_memory()
    found = estimate(resolved, device, room, speed(dtype_of(resolved["model"].dtype, device), device))
    measured = Probed(known["measured"], known["seconds"]["measured"], 3) if known else probe(resolved)
    peak = found.memory.peak
    assert found.time is not None
    base = sum(peak.parts.get(name, 0) for name in ("python and torch", "tokenizer"))
    return {
        **asdict(point),
        "passes": found.run.epoch().most,
        "moment": peak.name,
        "parts": dict(peak.parts),
        "estimated": peak.total,
        "measured": measured.peak,
        "off": peak.total / measured.peak - 1,
        "off_above_base": (peak.total - base) / (measured.peak - base) - 1,
        "seconds": known["seconds"]
        if known  # both were taken on the same, perhaps busy, machine
        else {"estimated": found.time.per_update, "measured": measured.per_update},
    }


def run(points: list[Point], earlier: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every point, shape by shape, one process at a time. earlier: results whose measurements are not repeated."""
    known = {(one["objective"], one["shape"], json.dumps(one["options"])): one for one in earlier}
    found = []
    for name in dict.fromkeys(point.shape for point in points):
        with tempfile.TemporaryDirectory() as place:
            order = [sys.executable, __file__, "--build", name, place]
            subprocess.run(order, check=True)  # in a process of its own: this one measures speed and stays small
            for point in (one for one in points if one.shape == name):
                name_of = (point.objective, point.shape, json.dumps(point.options))
                result = measure(point, Path(place), known.get(name_of))
                print(line(result), flush=True)
                found.append(result)
    return found


def line(result: dict[str, Any]) -> str:
    took = result["seconds"]
    estimated, measured = result["estimated"] / 1e9, result["measured"] / 1e9
    return (
        f"{result['objective']:<5} {result['shape']:<5} {estimated:7.3f} {measured:7.3f} GB "
        f"{result['off']:+6.1%} above base {result['off_above_base']:+6.1%}  {took['estimated']:6.2f} "
        f"{took['measured']:6.2f} s  {result['moment']:<10} {result['options']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES)
    parser.add_argument("--objectives", nargs="+")
    parser.add_argument("--out", type=Path, default=None, help="default: results/memory.json, on a GPU memory-gpu.json")
    parser.add_argument("--again", nargs="+", type=Path, default=[], help="results to estimate anew, not measure")
    parser.add_argument("--build", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.build:
        shape, folder = SHAPES[given.build[0]], Path(given.build[1])
        build(shape, folder)
        return write_prompts(shape, folder)
    import torch

    gpu = torch.cuda.is_available()
    points = [
        point
        for point in (ON_GPU if gpu else POINTS)
        if point.shape in (given.shapes or SHAPES) and point.objective in (given.objectives or [point.objective])
    ]
    earlier = [one for path in given.again for one in json.loads(path.read_text(encoding="utf-8"))["results"]]
    results = run(points, earlier)
    outside = [one for one in results if abs(one["off"]) > WITHIN]
    above = [one for one in results if abs(one["off_above_base"]) > WITHIN]
    device = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} CPU threads"
    whole = given.shapes is None and given.objectives is None
    if whole or given.out:
        out = given.out or RESULTS / ("memory-gpu.json" if gpu else "memory.json")
        report = {"device": device, "versions": versions(), "within": WITHIN, "results": results}
        out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    number = len(results)
    print(f"within {WITHIN:.0%}: {number - len(outside)} of {number}, above the base {number - len(above)} of {number}")


if __name__ == "__main__":
    main()
