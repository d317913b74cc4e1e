"""Offline methods against TRL on one machine: rows per second and peak memory on the same model, rows and precision.

`make bench-dpo` measures DPO, `make bench-offline` KTO, ORPO, SFT and the reward model. Every measurement is a process
of its own, the two libraries take turns, and TRL first tries its settings (weights in bfloat16 or autocast, gradient
checkpointing, rows per device) so that its best one is compared. Timed: the reference pass and the updates; not timed:
loading, tokenising, saving. The share is what prefopt reaches of the matrix-product rate measured in the same process,
with the products that the method needs counted once: linear layers on every token (a shared prompt once), the head on
completion tokens, causal attention; the forwards of the method and one backward (two forwards' worth); nothing
recomputed is counted. A row is a pair, for SFT the chosen answer of one, for KTO either answer with its label.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

VOCABULARY = 49_152
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Method:
    """What is compared.

    rows: the file of `build` it trains on. forwards: passes over all rows whose products count, the one with a gradient
    as three. head: the language-model head is part of each. targets: as TARGETS, where they are this method's own.
    """

    rows: str
    forwards: int
    head: bool = True
    targets: dict[str, dict[str, float]] | None = None


OFFLINE = {"15M": {"speed_ratio": 5.0}}
METHODS = {
    "dpo": Method("pairs", forwards=4),
    # the mismatched pairs, too, are scored by policy and reference
    "kto": Method("labels", forwards=6, targets=OFFLINE),
    "orpo": Method("pairs", forwards=3, targets=OFFLINE),
    "sft": Method("demonstrations", forwards=3, targets=OFFLINE),
    "reward": Method("pairs", forwards=3, head=False, targets=OFFLINE),
}


@dataclass(frozen=True)
class Shape:
    """A Llama-architecture model and the rows it trains on; prompts are log-normal around `prompt` tokens."""

    width: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    pairs: int
    update: int  # pairs per update
    prompt: int = 120
    longest_prompt: int = 600
    answer: tuple[int, int] = (20, 220)


SHAPES = {
    "15M": Shape(288, 768, 6, 6, 6, pairs=32, update=8),
    "135M": Shape(576, 1536, 30, 9, 3, pairs=16, update=8),
    "0.5B": Shape(1024, 2816, 28, 16, 8, pairs=256, update=32, prompt=1000, longest_prompt=1400, answer=(100, 400)),
}
# what each shape should reach; a miss comes with a profile of where the time goes
TARGETS = {
    "15M": {"speed_ratio": 8.0, "memory_ratio": 0.5, "share": 0.5},
    "135M": {"speed_ratio": 4.0, "memory_ratio": 0.5, "share": 0.5},
    "0.5B": {"speed_ratio": 1.5},
}
# TRL's settings to try, by precision. `weights` is what the model is loaded in, `autocast` is DPOConfig(bf16=True).
# bfloat16: products in bfloat16, weights and AdamW in float32, as in prefopt (dtype=bfloat16 keeps float32 masters).
# all-bfloat16: TRL's weights and AdamW in bfloat16 too: faster, but an update below 1/256 of a weight is lost;
# prefopt has no such mode and runs as before.
SETTINGS = {
    "bfloat16": [
        {"weights": "float32", "autocast": True, "checkpointing": False, "rows": 2},
        {"weights": "float32", "autocast": True, "checkpointing": False, "rows": 8},
        {"weights": "float32", "autocast": True, "checkpointing": True, "rows": 8},
    ],
    "all-bfloat16": [
        {"weights": "bfloat16", "autocast": False, "checkpointing": False, "rows": 2},
        {"weights": "bfloat16", "autocast": False, "checkpointing": False, "rows": 8},
    ],
    "float32": [
        {"weights": "float32", "autocast": False, "checkpointing": False, "rows": 2},
        {"weights": "float32", "autocast": False, "checkpointing": False, "rows": 8},
    ],
}


def build(shape: Shape, folder: Path) -> None:
    """A random model, a word-per-token tokenizer, and the rows as pairs, labels and demonstrations, each a file."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>"] + [f"w{n}" for n in range(VOCABULARY - 3)]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    fast.save_pretrained(folder / "model")
    texts = [[text(prompt), " " + text(good), " " + text(bad)] for prompt, good, bad in rows(shape)]
    write(folder / "pairs.jsonl", [{"prompt": prompt, "chosen": good, "rejected": bad} for prompt, good, bad in texts])
    write(folder / "demonstrations.jsonl", [{"prompt": prompt, "completion": good} for prompt, good, _ in texts])
    labels = [
        {"prompt": prompt, "completion": answer, "label": number == 0}
        for prompt, *answers in texts
        for number, answer in enumerate(answers)
    ]
    write(folder / "labels.jsonl", random.Random(1).sample(labels, len(labels)))


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def rows(shape: Shape) -> list[tuple[list[int], list[int], list[int]]]:
    draw = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(VOCABULARY - 3) for _ in range(count)]

    made = []
    for _ in range(shape.pairs):
        size = round(draw.lognormvariate(math.log(shape.prompt), 0.6))
        prompt = tokens(min(max(size, 10), shape.longest_prompt))
        made.append((prompt, tokens(draw.randint(*shape.answer)), tokens(draw.randint(*shape.answer))))
    return made


def text(tokens: list[int]) -> str:
    return " ".join(f"w{token}" for token in tokens)


def trees(shape: Shape, method: Method) -> list[tuple[list[int], list[list[int]]]]:
    """Prompts with the answers that share them, as the method's rows have them."""
    whole = rows(shape)
    if method.rows == "labels":
        return [(prompt, [answer]) for prompt, *answers in whole for answer in answers]
    return [(prompt, answers[:1] if method.rows == "demonstrations" else answers) for prompt, *answers in whole]


def num_rows(shape: Shape, method: Method) -> int:
    return shape.pairs * (2 if method.rows == "labels" else 1)


def products(shape: Shape, method: Method) -> float:
    """Floating-point operations of the matrix products needed for all rows, a shared prompt counted once."""
    head = shape.width // shape.heads
    layer = 2 * shape.width * head * (shape.heads + shape.key_heads) + 3 * shape.width * shape.inner
    total = 0.0
    for prompt, answers in trees(shape, method):
        sizes = [len(answer) + 1 for answer in answers]  # with its end-of-sequence token
        pairs_seen = len(prompt) * (len(prompt) + 1) / 2
        pairs_seen += sum(size * len(prompt) + size * (size + 1) / 2 for size in sizes)
        forward = 2 * shape.layers * layer * (len(prompt) + sum(sizes))
        forward += 2 * shape.layers * 2 * shape.heads * head * pairs_seen
        forward += 2 * VOCABULARY * shape.width * sum(sizes) * method.head
        total += method.forwards * forward
    return total


def product_rate(dtype: str) -> float:
    """Best rate of a large square matrix product here and now, operations per second."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 4096
    a = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
    times = []
    for _ in range(6):
        began = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return float(2 * size**3 / min(times))


def peak_gigabytes() -> float:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def run_prefopt(name: str, shape: Shape, folder: Path, precision: str, setting: dict[str, Any]) -> dict[str, float]:
    import prefopt
    from prefopt.objectives import EVERY

    method, objective = METHODS[name], EVERY[name]()
    if objective.facts.reference and not objective.facts.live:
        setting = {"cache_dir": str(folder / f"cache-{time.time_ns()}"), **setting}
    precision = precision.removeprefix("all-")
    rate = product_rate(precision)
    result = prefopt.train(
        objective=objective,
        model=str(folder / "model"),
        data=str(folder / f"{method.rows}.jsonl"),
        out=str(folder / f"prefopt-{time.time_ns()}"),
        dtype=precision,
        batch_size=shape.update,
        max_length=None,
        eval_fraction=0.0,
        learning_rate=1e-6,
        schedule="constant",
        warmup=0.0,
        preflight="off",
        **setting,
    )
    seconds = result.summary["seconds"]["reference"] + result.summary["seconds"]["training"]
    return {
        "rows_per_second": num_rows(shape, method) / seconds,
        "peak_gb": peak_gigabytes(),
        "share": products(shape, method) / seconds / rate,
        "product_rate": rate,
        "loss": result.summary["start"]["loss"],
    }


def run_profile(name: str, shape: Shape, folder: Path, precision: str, setting: dict[str, Any]) -> dict[str, Any]:
    """Where a run's time goes: operators and their share of it, the ten largest."""
    from torch.profiler import profile

    with profile() as recorded:
        found = run_prefopt(name, shape, folder, precision, setting)
    averages = recorded.key_averages()
    whole = sum(entry.self_cpu_time_total + entry.self_device_time_total for entry in averages)
    largest = sorted(averages, key=lambda entry: -(entry.self_cpu_time_total + entry.self_device_time_total))[:10]
    shares = {entry.key: (entry.self_cpu_time_total + entry.self_device_time_total) / whole for entry in largest}
    return {**found, "profile": shares}


def trl_trainer(name: str, folder: Path, dtype: Any, data: Any, common: dict[str, Any]) -> Any:
    """TRL's trainer for the method, on the model in `folder`."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    def model(kind: Any = AutoModelForCausalLM, **options: Any) -> Any:
        return kind.from_pretrained(folder / "model", dtype=dtype, **options)

    rest = {"train_dataset": data, "processing_class": AutoTokenizer.from_pretrained(folder / "model")}
    if name == "dpo":
        from trl import DPOConfig, DPOTrainer

        return DPOTrainer(model=model(), ref_model=model(), args=DPOConfig(max_length=None, **common), **rest)
    if name == "kto":
        from trl import KTOConfig, KTOTrainer

        return KTOTrainer(model=model(), ref_model=model(), args=KTOConfig(max_length=None, **common), **rest)
    if name == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        return ORPOTrainer(model=model(), args=ORPOConfig(max_length=4096, **common), **rest)
    if name == "sft":
        from trl import SFTConfig, SFTTrainer

        return SFTTrainer(model=model(), args=SFTConfig(max_length=None, **common), **rest)
    from trl import RewardConfig, RewardTrainer

    scorer = model(AutoModelForSequenceClassification, num_labels=1)
    return RewardTrainer(model=scorer, args=RewardConfig(max_length=None, **common), **rest)


def run_trl(name: str, shape: Shape, folder: Path, precision: str, setting: dict[str, Any]) -> dict[str, float]:
    import torch
    from datasets import load_dataset

    method = METHODS[name]
    limit = setting.get("limit", num_rows(shape, method))
    data = load_dataset("json", data_files=str(folder / f"{method.rows}.jsonl"), split="train").select(range(limit))
    common = {
        "output_dir": str(folder / "trl"),
        "per_device_train_batch_size": setting["rows"],
        "gradient_accumulation_steps": shape.update // setting["rows"],
        "gradient_checkpointing": setting["checkpointing"],
        "bf16": setting["autocast"],
        "use_cpu": not torch.cuda.is_available(),
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    trainer = trl_trainer(name, folder, getattr(torch, setting["weights"]), data, common)
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"rows_per_second": limit / seconds, "peak_gb": peak_gigabytes(), "loss": losses[0]}


def measure(
    library: str, method: str, name: str, folder: Path, precision: str, setting: dict[str, Any]
) -> dict[str, Any] | None:
    """One measurement in a process of its own; None, with the reason printed, if it failed."""
    order = json.dumps(
        {"library": library, "method": method, "shape": name, "folder": str(folder), "p": precision, "setting": setting}
    )
    done = subprocess.run([sys.executable, __file__, "--one", order], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        print(f"  {library} {setting}: failed: {done.stderr.strip().splitlines()[-1:]}", flush=True)
        return None
    found: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    print(
        f"  {library:<8} {found['rows_per_second']:7.3f} rows/s  {found['peak_gb']:6.2f} GB"
        + (f"  share {found['share']:.0%}" if "share" in found else "")
        + f"  first loss {found['loss']:.4f}  {setting}",
        flush=True,
    )
    return found


def compare(method: str, name: str, precision: str, rounds: int, settings: int | None) -> dict[str, Any]:
    """Both libraries on one method and shape: TRL's best setting found, then turns."""
    shape = SHAPES[name]
    print(f"{method}, {name}, {precision}, {shape.pairs} pairs, {shape.update} rows per update", flush=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        subprocess.run([sys.executable, __file__, "--build", name, place], check=True)
        tried = []
        candidates = SETTINGS[precision][:settings]
        for setting in candidates if len(candidates) > 1 else []:
            found = measure("trl", method, name, folder, precision, {**setting, "limit": shape.update})
            tried += [] if found is None else [(found["rows_per_second"], setting, found)]
        best = max(tried, key=lambda item: item[0])[1] if tried else candidates[0]
        print(f"  best of TRL's settings: {best}", flush=True)
        ours, theirs = [], []
        for _ in range(rounds):
            ours.append(measure("prefopt", method, name, folder, precision, {}))
            theirs.append(measure("trl", method, name, folder, precision, best))
    if None in ours or None in theirs:
        raise SystemExit("a measurement failed; nothing was written")

    def median(results: list[Any], key: str) -> float:
        return statistics.median(result[key] for result in results)

    ratios = [a["rows_per_second"] / b["rows_per_second"] for a, b in zip(ours, theirs, strict=True)]
    result = {
        "method": method,
        "shape": name,
        "precision": precision,
        "model": asdict(shape),
        "prefopt": {key: median(ours, key) for key in ("rows_per_second", "peak_gb", "share", "product_rate")},
        "trl": {**{key: median(theirs, key) for key in ("rows_per_second", "peak_gb")}, "setting": best},
        "trl_tried": [{"setting": setting, **found} for _, setting, found in tried],
        "speed_ratio": statistics.median(ratios),
        "speed_ratios": ratios,
        "memory_ratio": median(ours, "peak_gb") / median(theirs, "peak_gb"),
        "share": median(ours, "share"),
    }
    targets = (METHODS[method].targets or TARGETS).get(name, {})
    result["missed"] = [key for key, wanted in targets.items() if not met(key, result[key], wanted)]
    if result["missed"]:
        with tempfile.TemporaryDirectory() as place:
            subprocess.run([sys.executable, __file__, "--build", name, place], check=True)
            found = measure("profile", method, name, Path(place), precision, {})
        result["profile"] = None if found is None else found["profile"]
    return result


def met(key: str, value: float, wanted: float) -> bool:
    """Whether a figure reaches its target; less is better for memory alone."""
    return value <= wanted if key == "memory_ratio" else value >= wanted


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {package: version(package) for package in ("prefopt", "trl", "torch", "transformers")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=["dpo"], help=f"of {', '.join(METHODS)}; default: dpo")
    parser.add_argument("--shapes", nargs="+", default=None, choices=SHAPES, help="default: 15M 135M, on a GPU 0.5B")
    parser.add_argument("--precisions", nargs="+", default=["bfloat16", "all-bfloat16"], choices=SETTINGS)
    parser.add_argument("--rounds", type=int, default=2, help="turns of each library")
    parser.add_argument("--out", type=Path, help="default: results/dpo.json, or offline.json")
    parser.add_argument("--append", action="store_true", help="keep the results already in --out")
    parser.add_argument("--settings", type=int, default=None, help="try only the first so many of TRL's settings")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--build", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.build:
        return build(SHAPES[given.build[0]], Path(given.build[1]))
    if given.one:
        order = json.loads(given.one)
        worker = {"prefopt": run_prefopt, "profile": run_profile, "trl": run_trl}[order["library"]]
        found = worker(order["method"], SHAPES[order["shape"]], Path(order["folder"]), order["p"], order["setting"])
        return print("RESULT " + json.dumps(found))
    import torch

    shapes = given.shapes or (["0.5B"] if torch.cuda.is_available() else ["15M", "135M"])
    results = [
        compare(method, name, precision, given.rounds, given.settings)
        for method in given.methods
        for precision in given.precisions
        for name in shapes
    ]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    out = given.out or RESULTS / ("dpo.json" if given.methods == ["dpo"] else "offline.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    if given.append:
        results = json.loads(out.read_text(encoding="utf-8"))["results"] + results
    report = {"device": device, "versions": versions(), "results": results}
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(
        f"\n{'method':<7} {'shape':<6} {'precision':<12} {'prefopt':>9} {'TRL':>9} {'ratio':>6}  {'memory':>16} "
        f"{'share':>6}"
    )
    for r in results:
        memory = f"{r['prefopt']['peak_gb']:.2f}/{r['trl']['peak_gb']:.2f} GB {r['memory_ratio']:.2f}x"
        print(
            f"{r['method']:<7} {r['shape']:<6} {r['precision']:<12} {r['prefopt']['rows_per_second']:>9.3f} "
            f"{r['trl']['rows_per_second']:>9.3f} {r['speed_ratio']:>5.1f}x  {memory} {r['share']:>6.0%}"
        )
        if r["missed"]:
            print(f"       below its target: {', '.join(r['missed'])}; time goes to")
            for name, share in (r["profile"] or {}).items():
                print(f"         {share:>4.0%} {name}")


if __name__ == "__main__":
    main()
