"""What a run will need, before anything is loaded; the same for other objectives; what a few updates really took."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from prefopt import config
from prefopt.advice.fits import Fit, Run, cheapest
from prefopt.advice.machine import Speed
from prefopt.advice.memory import Memory, Sampling, Setup, Where, checkpoint_bytes
from prefopt.advice.passes import TOKENS, Row, full
from prefopt.advice.sizes import Net, net, of_config
from prefopt.advice.time import Time, Work, time_of
from prefopt.records import Example, InputError

COMPLETIONS = {"demonstrations": 1, "pairs": 2, "labels": 1, "ratings": 4, "steps": 1}
PROBED = 3  # updates of a probe


@dataclass(frozen=True)
class Estimate:
    """run: what it was worked out from. fit: the cheapest options that fit, None where nothing helps or no limit is
    known. time: None where no speed was measured. notes: what was assumed.
    """

    objective: str
    run: Run
    memory: Memory
    room: int | None
    fit: Fit | None
    time: Time | None
    notes: tuple[str, ...]


def estimate(
    resolved: Mapping[str, Any],
    device: str,
    room: int | None,
    speed: Speed | None = None,
    rows: Sequence[Row] | None = None,
) -> Estimate:
    """Memory, updates and time of a run.

    resolved: every section's options. device: cpu or cuda. room: bytes that are free. rows: in the order of training;
    None reads them from the run's data, or assumes rows of max_length where it names none. InputError for data and
    models that cannot be read.
    """
    notes: list[str] = []
    found = model_net(resolved["run"].model, resolved["model"])
    online = resolved["objective"].facts.data == "prompts"
    if rows is None:
        rows = read_rows(resolved, notes) if resolved["run"].data else assumed(resolved, notes)
    if online:
        notes.append("every completion is taken to be max_tokens long")
    run = run_of(resolved, found, tuple(rows), device)
    used = None
    if speed is not None:
        steps = steps_of(resolved, len(run.rows))
        used = time_of(found, run.epoch(), steps, run.setup, work_of(resolved, run), speed)
        run = replace(run, setup=replace(run.setup, saved=saves(resolved["checkpoint"], used.seconds)))
    if run.setup.saved:
        copy = checkpoint_bytes(found, run.setup) / 1e9
        notes.append(
            f"a checkpoint that is still being written stands beside the next update: up to {copy:.3f} GB more"
        )
    fit = None if room is None else cheapest(run, room)
    return Estimate(resolved["objective"].facts.name, run, run.memory(), room, fit, used, tuple(notes))


def model_net(model: str, options: Any) -> Net:
    """The numbers of a directory, of the base model behind an adapter, or of a hub name's configuration."""
    from prefopt.models.load import base_model

    source = base_model(model)
    if Path(source).exists():
        return net(source)
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(
            source, trust_remote_code=options.trust_remote_code, revision=options.revision
        )
    except (OSError, ValueError) as error:
        raise InputError(f"{source}: cannot read its configuration: {str(error).splitlines()[0]}") from None
    return of_config(found.to_dict(), source)


# ---------------------------------------------------------------- rows


def read_rows(resolved: Mapping[str, Any], notes: list[str]) -> list[Row]:
    """The training rows as token counts, in the order of the first epoch; what is left out, and why, goes to notes."""
    from prefopt.data import load, split
    from prefopt.data.source import Offline
    from prefopt.models.load import load_tokenizer, tokenizer_source

    run, facts = resolved["run"], resolved["objective"].facts
    tokenizer = load_tokenizer(tokenizer_source(run.model), resolved["model"])
    sampled = resolved["rollout"].max_tokens if facts.data == "prompts" else 0
    data = load(run.data, tokenizer, facts.data, resolved["data"], answer_tokens=sampled)
    notes += [f"{count:,} rows are left out: {reason}" for reason, count in data.dropped.items()]
    if run.eval_data is None and run.eval_fraction and len(data.examples) > facts.least:
        data, _ = split(data, max(run.eval_fraction, facts.least / len(data.examples)), run.seed)
    order = Offline(data.examples, resolved["loop"].batch_size, seed=run.seed).order(0)
    return [row_of(data.examples[number], resolved) for number in order]


def row_of(example: Example, resolved: Mapping[str, Any]) -> Row:
    """A row's token counts; where the policy writes the answers, each as long as it may be."""
    if resolved["objective"].facts.data == "prompts":
        options = resolved["rollout"]
        return Row(len(example.prompt), (options.max_tokens,) * options.num_completions)
    return Row(len(example.prompt), tuple(map(len, example.completions)))


def assumed(resolved: Mapping[str, Any], notes: list[str]) -> tuple[Row, ...]:
    """Rows of an update where no data is named: as long as they may be."""
    facts, size = resolved["objective"].facts, resolved["loop"].batch_size
    length = resolved["data"].max_length or 1024
    if facts.data == "prompts":
        options = resolved["rollout"]
        notes.append(f"no data: prompts are taken to fill max_length ({length} tokens with a completion)")
        prompt = max(1, length - options.max_tokens)
        return (Row(prompt, (options.max_tokens,) * options.num_completions),) * size
    notes.append(f"no data: every row is taken to have {length} tokens in each answer with its prompt")
    number = COMPLETIONS[facts.data]
    return full(size, number, length // 2 * (number + 1))


# ---------------------------------------------------------------- options


def run_of(resolved: Mapping[str, Any], found: Net, rows: tuple[Row, ...], device: str) -> Run:
    """What memory follows from."""
    loop = resolved["loop"]
    budget = loop.tokens_per_forward or TOKENS[device]
    return Run(
        found, rows, loop.batch_size, budget, setup_of(resolved, device, rows), resolved["model"].layout == "padded"
    )


def setup_of(resolved: Mapping[str, Any], device: str, rows: Sequence[Row]) -> Setup:
    """The options that decide memory."""
    from prefopt.objectives.facts import extras

    objective, model = resolved["objective"], resolved["model"]
    dtype = dtype_of(model.dtype, device)
    adapted = resolved["lora"].lora_rank or adapter_rank(resolved["run"].model)
    return Setup(
        dtype=dtype,
        lora_rank=adapted,
        checkpointing=model.gradient_checkpointing,
        quantised=model.quantize != "none",
        reference=reference_of(resolved, bool(adapted)),
        critic=critic_of(resolved),
        head=objective.facts.head == "language",
        scorers=scorers(resolved, dtype),
        entropy="entropy" in extras(objective),
        gpu=device == "cuda",
        saved=saves(resolved["checkpoint"]),
        sampling=sampling_of(resolved, rows),
    )


def dtype_of(name: str, device: str) -> str:
    """The precision that `auto` stands for, see prefopt.models.load.pick_dtype."""
    if name != "auto":
        return name
    return "bfloat16" if device == "cuda" else "float32"


def critic_of(resolved: Mapping[str, Any]) -> Literal["none", "own", "shared"]:
    if not resolved["objective"].facts.critic:
        return "none"
    chosen: Literal["own", "shared"] = resolved["critic"].critic
    return chosen


def adapter_rank(model: str) -> int:
    """The rank of the adapter in a directory, 0 where it is none."""
    path = Path(model) / "adapter_config.json"
    return int(json.loads(path.read_text(encoding="utf-8")).get("r", 16)) if path.exists() else 0


def reference_of(resolved: Mapping[str, Any], adapted: bool) -> Where:
    """Where the reference's log-probs come from, as prefopt.models.reference.pick decides."""
    from prefopt.objectives.facts import needs_reference

    objective, options = resolved["objective"], resolved["reference"]
    if not needs_reference(objective):
        return "none"
    live = objective.facts.live or bool(options.reference_sync_steps)
    if options.reference != "auto":
        chosen: Where = options.reference
        return chosen
    if not live:
        return "cache"
    return "adapter" if adapted and options.reference_model is None and not options.reference_sync_steps else "copy"


def saves(options: Any, seconds: float = math.inf) -> bool:
    """Whether a checkpoint is copied in memory at some time: by count, or by the clock in a run of so many seconds."""
    by_clock = options.save_minutes is not None and seconds > 60 * options.save_minutes
    return bool(options.save_async and (options.save_every is not None or by_clock))


def scorers(resolved: Mapping[str, Any], dtype: str) -> int:
    """Bytes of the reward models that score completions."""
    if "reward" not in resolved:
        return 0
    size = {"float32": 4, "bfloat16": 2, "float64": 8}[dtype]
    folders = [name for name in resolved["reward"].names if Path(name).is_dir()]
    return sum(model_net(name, resolved["model"]).body * size for name in folders)


def sampling_of(resolved: Mapping[str, Any], rows: Sequence[Row]) -> Sampling | None:
    """What is sampled together: the prompts of a rollout; None where the data holds the answers or an engine of its own
    writes them.
    """
    if "rollout" not in resolved or resolved["rollout"].sampler != "local":
        return None
    options = resolved["rollout"]
    prompts = min(len(rows), resolved["loop"].batch_size * options.rollout_batches)
    return Sampling(prompts, max(row.prompt for row in rows), options.num_completions, options.max_tokens)


def work_of(resolved: Mapping[str, Any], run: Run) -> Work:
    """What an update does besides its pass with a gradient."""
    objective, setup = resolved["objective"], run.setup
    facts = objective.facts
    live = setup.reference in ("copy", "adapter")
    scored = facts.forwards + (1 + (facts.data == "labels" and facts.live) if live else 0)
    once, steps, sampled = int(setup.reference == "cache"), 0, 0
    if setup.sampling is not None:
        options, sampled = resolved["rollout"], setup.sampling.prompts * setup.sampling.num * setup.sampling.max_tokens
        together = max(1, 16_384 // setup.sampling.max_tokens)
        steps = math.ceil(setup.sampling.prompts * setup.sampling.num / together) * setup.sampling.max_tokens
        sampled, steps = sampled // options.updates, steps // options.updates
    return Work(scored, once, sampled, steps, critic=setup.critic == "own")


def steps_of(resolved: Mapping[str, Any], rows: int) -> int:
    """Updates in all."""
    loop = resolved["loop"]
    if loop.max_steps is not None:
        return int(loop.max_steps)
    passes = resolved["rollout"].rollout_passes if "rollout" in resolved else 1
    return math.ceil(loop.epochs * max(1, rows // loop.batch_size + bool(rows % loop.batch_size))) * int(passes)


# ---------------------------------------------------------------- the same for others


def others(resolved: Mapping[str, Any]) -> list[str]:
    """Objectives that learn from the same kind of rows, or write answers to the same prompts, by name."""
    facts = resolved["objective"].facts
    known = config.objectives()
    return [name for name, found in known.items() if found.facts["data"] == facts.data and name != facts.name]


def beside(
    resolved: Mapping[str, Any], name: str, device: str, room: int | None, speed: Speed, rows: Sequence[Row]
) -> Estimate:
    """The estimate of the same rows with another objective."""
    return estimate(as_objective(resolved, name), device, room, speed, rows)


def as_objective(resolved: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The same run with another objective at its defaults."""
    sections = config.sections(name)
    objective = config.load(sections["objective"])()
    kept = {key: value for key, value in resolved.items() if key in sections and key not in ("objective", "critic")}
    if not reference_read(objective):
        kept["reference"] = config.load(sections["reference"])()
    if "critic" in sections:
        kept["critic"] = resolved.get("critic") or config.load(sections["critic"])()
    return {"objective": objective, **kept}


def reference_read(objective: Any) -> bool:
    from prefopt.objectives.facts import needs_reference

    return needs_reference(objective)


# ---------------------------------------------------------------- measured


@dataclass(frozen=True)
class Probed:
    """What three updates took in a process of their own. peak: bytes, resident on a CPU, allocated on a GPU.
    per_update: seconds, sampling and scoring included.
    """

    peak: int
    per_update: float
    updates: int


def probe(resolved: Mapping[str, Any], updates: int = PROBED) -> Probed:
    """Train a few updates in a process of its own, into a folder that is removed. InputError where that fails."""
    with tempfile.TemporaryDirectory() as place:
        changed = {
            "run": replace(
                resolved["run"], out=str(Path(place) / "run"), eval_fraction=0.0, eval_data=None, keep="last"
            ),
            "loop": replace(resolved["loop"], max_steps=updates, eval_every=None),
        }
        changed["run"] = replace(changed["run"], push_to_hub=None)
        recipe = Path(place) / "recipe.yaml"
        recipe.write_text(config.to_yaml({**resolved, **changed}), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "prefopt.recipes.probe", str(recipe)],
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith("PROBED ")]
    if not lines:
        why = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no word of why")
        raise InputError(f"the probe of {updates} updates failed: {why}")
    return Probed(**json.loads(lines[-1].removeprefix("PROBED ")))
