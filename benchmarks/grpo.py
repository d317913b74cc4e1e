"""Learning from the model's own completions against TRL on one machine: generation alone, and the whole GRPO step.

`make bench-grpo` measures both. Every measurement is a process of its own, the two sides take turns, and the other side
first tries its settings so that its best one is compared.

Generation: prefopt's sampler against transformers' `generate`, all rows in one batch, completion tokens a second. Two
workloads: `full`, every completion as long as the longest; `ending`, completions that end by themselves, a quarter of
the longest on average, twice as many prompts. Both sides draw from the same distribution and stop at the same tokens.
Share of the bandwidth limit: the time that reading the weights once a step and every key and value that a step needs
takes at the rate at which this machine copies memory, over the time taken (`full` alone). Where rows are many the
products, not the bandwidth, bound the time: their share of the rate measured in the same process is given beside it.

Step: prompts sampled, rewarded, and one update of GRPO without a reference: the time from one call of the reward to the
next, so that what a run does once is counted on neither side. Both sides: same model, prompts, number and length of
completions, reward function, learning rate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from offline import RESULTS, VOCABULARY, Shape, build, met, peak_gigabytes, product_rate, rows, versions
from offline import SHAPES as MODELS


@dataclass(frozen=True)
class Work:
    """What a step samples: prompts, completions of each, tokens of each. steps: timed steps of a run, which has one
    more.
    """

    prompts: int
    completions: int
    tokens: int
    steps: int = 2


TINY = Shape(64, 128, 2, 2, 2, pairs=8, update=2)
SHAPES = {"tiny": TINY, **MODELS}
WORK = {
    "tiny": Work(2, 2, 16, 1),
    "15M": Work(4, 8, 64),
    "135M": Work(4, 8, 64),
    "0.5B": Work(16, 8, 256),
}
TARGETS = {
    "generation": {"15M": {"speed_ratio": 3.0}, "135M": {"speed_ratio": 3.0}},
    "step": {"15M": {"speed_ratio": 10.0}, "135M": {"speed_ratio": 4.0}},
}
# of transformers' generate, by prefopt's precision; prefopt in bfloat16 meets generate in either
GENERATE = {
    "bfloat16": [
        {"dtype": "bfloat16", "cache": "dynamic"},
        {"dtype": "bfloat16", "cache": "static"},
        {"dtype": "float32", "cache": "dynamic"},
        {"dtype": "float32", "cache": "static"},
    ],
    "float32": [
        {"dtype": "float32", "cache": "dynamic"},
        {"dtype": "float32", "cache": "static"},
    ],
}
# of TRL. weights: what the model is loaded in; autocast: GRPOConfig(bf16=True); parts: forward and backward passes that
# an update is cut into; paged: transformers' continuous batching for generation
TRL = {
    "bfloat16": [
        {"weights": "bfloat16", "autocast": False, "checkpointing": False, "parts": 1},
        {"weights": "bfloat16", "autocast": False, "checkpointing": False, "parts": 4},
        {"weights": "float32", "autocast": True, "checkpointing": False, "parts": 1},
        {"weights": "float32", "autocast": False, "checkpointing": False, "parts": 1},
        {"weights": "bfloat16", "autocast": False, "checkpointing": False, "parts": 1, "paged": True},
    ],
    "float32": [
        {"weights": "float32", "autocast": False, "checkpointing": False, "parts": 1},
        {"weights": "float32", "autocast": False, "checkpointing": False, "parts": 4},
    ],
}
LEARNING_RATE = 1e-6


# ---------------------------------------------------------------- generation


def prompts_of(name: str, workload: str) -> list[list[int]]:
    """Token ids; every one above the special ones."""
    count = WORK[name].prompts * (2 if workload == "ending" else 1)
    found = [[token + 3 for token in prompt] for prompt, *_ in rows(SHAPES[name])]
    return [found[at % len(found)] for at in range(count)]


def ends_of(name: str, workload: str) -> tuple[list[int], int]:
    """End tokens, and the longest completion; of a random model any token is as likely as another."""
    longest = WORK[name].tokens
    if workload == "full":
        return [], longest
    return list(range(3, 3 + VOCABULARY // (longest // 2))), 2 * longest


def loaded(folder: Path, dtype: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=getattr(torch, dtype)).eval().to(device)


def timed(work: Any) -> tuple[float, Any]:
    import torch

    began = time.perf_counter()
    done = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, done


def generate_prefopt(name: str, folder: Path, workload: str, setting: dict[str, Any]) -> dict[str, Any]:
    from prefopt.models.sampler import Local
    from prefopt.models.sampling import Sampling

    model, prompts, (ends, longest) = (
        loaded(folder, setting["dtype"]),
        prompts_of(name, workload),
        ends_of(name, workload),
    )
    rates = {"bandwidth": copy_rate(), "products": product_rate(setting["dtype"])}
    # room for all rows at once, as `generate` has them
    room = sum(map(len, prompts)) * 4 + len(prompts) * WORK[name].completions * longest
    local = Local(model, ends, tokens_per_batch=room)
    local.sample(prompts, WORK[name].completions, Sampling(max_tokens=4), range(len(prompts)))
    seconds, found = timed(
        lambda: local.sample(prompts, WORK[name].completions, Sampling(max_tokens=longest), range(len(prompts)))
    )
    tokens = sum(len(completion.tokens) for own in found for completion in own)
    result = {
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
        "peak_gb": peak_gigabytes(),
        "way": local.reason,
    }
    if workload == "full":
        moved, multiplied = needed(name, model)
        result |= {"bandwidth_share": moved / rates["bandwidth"] / seconds, "copy_rate": rates["bandwidth"]}
        result |= {"product_share": multiplied / rates["products"] / seconds, "product_rate": rates["products"]}
    return result


def generate_transformers(name: str, folder: Path, workload: str, setting: dict[str, Any]) -> dict[str, Any]:
    import torch

    model, prompts, (ends, longest) = (
        loaded(folder, setting["dtype"]),
        prompts_of(name, workload),
        ends_of(name, workload),
    )
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts for _ in range(WORK[name].completions)])
    ids = ids.to(model.device)
    cache = {"cache_implementation": "static", "disable_compile": True} if setting["cache"] == "static" else {}

    def generate(tokens: int) -> Any:
        with torch.inference_mode():
            return model.generate(
                input_ids=ids,
                attention_mask=(ids != 0).long(),
                max_new_tokens=tokens,
                do_sample=True,
                top_k=0,
                eos_token_id=ends or None,
                pad_token_id=0,
                **cache,
            )

    generate(4)
    seconds, found = timed(lambda: generate(longest))
    made = found[:, width:]
    ended = torch.isin(made, torch.tensor(ends, device=made.device)).cumsum(-1)
    tokens = int((ended == 0).sum() + (ended > 0).any(-1).sum()) if ends else made.numel()
    return {"tokens_per_second": tokens / seconds, "seconds": seconds, "peak_gb": peak_gigabytes()}


def needed(name: str, model: Any) -> tuple[float, float]:
    """Bytes that generating `full` has to read, and operations of its matrix products: weights once a step and once for
    the prompts, each prompt's keys and values once a step, each completion's own once a step.
    """
    shape, work, size = SHAPES[name], WORK[name], next(model.parameters()).element_size()
    head = shape.width // shape.heads
    layer = 2 * shape.width * head * (shape.heads + shape.key_heads) + 3 * shape.width * shape.inner
    lengths = [len(prompt) for prompt in prompts_of(name, "full")]
    num_rows, steps, prompt = len(lengths) * work.completions, work.tokens, sum(lengths)
    weights = shape.layers * layer + VOCABULARY * shape.width
    cached = 2 * shape.layers * shape.key_heads * head * (prompt * steps + num_rows * steps * (steps + 1) / 2)
    moved = size * (weights * (steps + 1) + cached)
    seen = prompt * work.completions * steps + num_rows * steps * (steps + 1) / 2
    seen += sum(length * (length + 1) / 2 for length in lengths)
    multiplied = (
        2 * shape.layers * layer * (prompt + num_rows * steps) + 2 * VOCABULARY * shape.width * num_rows * steps
    )
    return moved, multiplied + 4 * shape.layers * shape.heads * head * seen


def copy_rate() -> float:
    """Bytes read and written a second by the best of several large copies."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.ones(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / min(timed(lambda: target.copy_(source))[0] for _ in range(8))


# ---------------------------------------------------------------- whole steps


def prompt_file(name: str, folder: Path) -> Path:
    """The prompts of `build`'s pairs as rows, each with a number."""
    lines = [json.loads(line) for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": line["prompt"]}) + "\n" for line in lines), encoding="utf-8")
    return file


def noting(file: Path) -> Callable[..., list[float]]:
    """A reward that differs within a group, and notes when it was asked; it may run in another process."""

    def reward(completions: list[str], **columns: Any) -> list[float]:
        with file.open("a", encoding="utf-8") as lines:
            lines.write(f"{time.monotonic()}\n")
        return [float(sum(completion.encode()) % 7) for completion in completions]

    return reward


def step_seconds(file: Path, steps: int) -> float:
    """Seconds between two calls of the reward, over the last steps."""
    times = [float(line) for line in file.read_text(encoding="utf-8").split()]
    if len(times) < steps + 1:
        raise SystemExit(f"the reward was called {len(times)} times in {steps + 1} steps")
    return (times[-1] - times[-1 - steps]) / steps


def step_prefopt(name: str, folder: Path, workload: str, setting: dict[str, Any]) -> dict[str, Any]:
    import prefopt

    work, out, calls = WORK[name], folder / f"prefopt-{time.time_ns()}", folder / f"calls-{time.time_ns()}"
    prefopt.train(
        objective=prefopt.GRPO(),
        model=str(folder / "model"),
        data=str(prompt_file(name, folder)),
        out=str(out),
        reward=noting(calls),
        dtype=setting["dtype"],
        batch_size=work.prompts,
        num_completions=work.completions,
        max_tokens=work.tokens,
        max_steps=work.steps + 1,
        max_length=None,
        eval_fraction=0.0,
        learning_rate=LEARNING_RATE,
        schedule="constant",
        warmup=0.0,
        preflight="off",
        save_completions=0,
    )
    metrics = read_metrics(out)
    found = {
        "seconds": step_seconds(calls, work.steps),
        "sampling_seconds": average(metrics, "seconds/sampling"),
        "scoring_seconds": average(metrics, "seconds/scoring"),
        "completion_length": average(metrics, "completion_length"),
        "peak_gb": peak_gigabytes(),
    }
    return {**found, "tokens_per_second": made(work, found)}


def read_metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def average(metrics: list[dict[str, Any]], key: str) -> float:
    return statistics.fmean(line[key] for line in metrics if line.get(key) is not None)


def made(work: Work, found: dict[str, float]) -> float:
    """Completion tokens sampled and trained on a second."""
    return work.prompts * work.completions * found["completion_length"] / found["seconds"]


def step_trl(name: str, folder: Path, workload: str, setting: dict[str, Any]) -> dict[str, Any]:
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    work, steps = WORK[name], setting.get("steps", WORK[name].steps)
    calls = folder / f"calls-{time.time_ns()}"
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=getattr(torch, setting["weights"]))
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=noting(calls),
        train_dataset=load_dataset("json", data_files=str(prompt_file(name, folder)), split="train"),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        args=GRPOConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=work.prompts * work.completions // setting["parts"],
            gradient_accumulation_steps=setting["parts"],
            num_generations=work.completions,
            max_completion_length=work.tokens,
            max_steps=steps + 1,
            loss_type="grpo",
            beta=0.0,
            temperature=1.0,
            top_k=0,
            gradient_checkpointing=setting["checkpointing"],
            use_transformers_continuous_batching=setting.get("paged", False),
            bf16=setting["autocast"],
            use_cpu=not torch.cuda.is_available(),
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
    )
    trainer.train()
    lengths = [
        entry["completions/mean_length"] for entry in trainer.state.log_history if "completions/mean_length" in entry
    ]
    found = {
        "seconds": step_seconds(calls, steps),
        "completion_length": statistics.fmean(lengths),
        "peak_gb": peak_gigabytes(),
    }
    return {**found, "tokens_per_second": made(work, found)}


# ---------------------------------------------------------------- turns

WORKERS = {
    ("generation", "prefopt"): generate_prefopt,
    ("generation", "transformers"): generate_transformers,
    ("step", "prefopt"): step_prefopt,
    ("step", "trl"): step_trl,
}
OTHER = {"generation": "transformers", "step": "trl"}


@dataclass(frozen=True)
class Order:
    """One measurement in a process of its own."""

    part: str
    library: str
    shape: str
    workload: str
    folder: str
    setting: dict[str, Any]


def measure(order: Order) -> dict[str, Any] | None:
    """What one process found; None, with the reason printed, if it failed."""
    done = subprocess.run(
        [sys.executable, __file__, "--one", json.dumps(asdict(order))], capture_output=True, text=True
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        print(f"  {order.library} {order.setting}: failed: {done.stderr.strip().splitlines()[-1:]}", flush=True)
        return None
    found: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    shares = "".join(f"  {key} {found[key]:.0%}" for key in ("bandwidth_share", "product_share") if key in found)
    print(
        f"  {order.library:<12} {found['seconds']:8.2f} s {found['tokens_per_second']:9.1f} tokens/s "
        f"{found['peak_gb']:6.2f} GB{shares}  {order.setting}",
        flush=True,
    )
    return found


def compare(part: str, name: str, workload: str, precision: str, rounds: int, settings: int | None) -> dict[str, Any]:
    """Both sides of one comparison: the other's best setting found, then turns."""
    other, candidates = OTHER[part], (GENERATE if part == "generation" else TRL)[precision][:settings]
    print(f"{part}, {workload}, {name}, {precision}, {WORK[name]}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, __file__, "--build", name, folder], check=True)

        def turn(library: str, setting: dict[str, Any]) -> dict[str, Any] | None:
            return measure(Order(part, library, name, workload, folder, setting))

        tried = []
        for setting in candidates if len(candidates) > 1 else []:
            found = turn(other, {**setting, "steps": 1})
            tried += [] if found is None else [{"setting": setting, **found}]
        best = max(tried, key=lambda one: one["tokens_per_second"])["setting"] if tried else candidates[0]
        print(f"  best of the settings of {other}: {best}", flush=True)
        turns = [(turn("prefopt", {"dtype": precision}), turn(other, best)) for _ in range(rounds)]
    whole = [(ours, theirs) for ours, theirs in turns if ours is not None and theirs is not None]
    if len(whole) < len(turns):
        raise SystemExit("a measurement failed; nothing was written")
    ratios = [ours["tokens_per_second"] / theirs["tokens_per_second"] for ours, theirs in whole]
    result = {
        "part": part,
        "workload": workload,
        "shape": name,
        "precision": precision,
        "model": asdict(SHAPES[name]),
        "work": asdict(WORK[name]),
        "prefopt": medians([ours for ours, _ in whole]),
        other: {**medians([theirs for _, theirs in whole]), "setting": best},
        "tried": tried,
        "speed_ratio": statistics.median(ratios),
        "speed_ratios": ratios,
    }
    wanted = TARGETS[part].get(name, {})
    result["missed"] = [key for key, least in wanted.items() if not met(key, result[key], least)]
    return result


def medians(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Of every number; texts as they are."""
    return {
        key: statistics.median(one[key] for one in results) if isinstance(value, (int, float)) else value
        for key, value in results[0].items()
    }


def show(results: list[dict[str, Any]]) -> None:
    print(
        f"\n{'part':<11} {'workload':<8} {'shape':<6} {'precision':<9} {'prefopt':>9} {'other':>9} {'ratio':>6}  shares"
    )
    for one in results:
        ours, theirs = one["prefopt"], one[OTHER[one["part"]]]
        shares = [f"{ours[key]:.0%} of {key[:-6]}" for key in ("bandwidth_share", "product_share") if key in ours]
        print(
            f"{one['part']:<11} {one['workload']:<8} {one['shape']:<6} {one['precision']:<9} {ours['seconds']:>7.2f} s "
            f"{theirs['seconds']:>7.2f} s {one['speed_ratio']:>5.1f}x  {', '.join(shares)}"
            + ("  below its target" if one["missed"] else "")
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["generation", "step"], help="generation, step; default: both")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="default: 15M 135M, on a GPU 0.5B")
    parser.add_argument("--precisions", nargs="+", default=["bfloat16", "float32"], choices=TRL)
    parser.add_argument("--rounds", type=int, default=2, help="turns of each side")
    parser.add_argument("--settings", type=int, help="try only the first so many of the other side's settings")
    parser.add_argument("--out", type=Path, help="default: results/grpo.json")
    parser.add_argument("--append", action="store_true", help="keep the results already in --out")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one turn, nothing written: does it run?")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--build", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.build:
        return build(SHAPES[given.build[0]], Path(given.build[1]))
    if given.one:
        order = Order(**json.loads(given.one))
        found = WORKERS[order.part, order.library](order.shape, Path(order.folder), order.workload, order.setting)
        return print("RESULT " + json.dumps(found))
    import torch

    if given.quick:
        given.shapes, given.precisions, given.rounds, given.settings = ["tiny"], ["float32"], 1, 1
    results = [
        compare(part, name, workload, precision, given.rounds, given.settings)
        for part in given.parts
        for workload in (["full", "ending"] if part == "generation" else ["full"])
        for name in given.shapes or (["0.5B"] if torch.cuda.is_available() else ["15M", "135M"])
        for precision in given.precisions
    ]
    show(results)
    if given.quick and given.out is None:
        return
    out = given.out or RESULTS / "grpo.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    if given.append and out.exists():
        results = json.loads(out.read_text(encoding="utf-8"))["results"] + results
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    report = {"device": device, "versions": versions(), "results": results}
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
