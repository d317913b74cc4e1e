"""`prefopt estimate`: memory, updates and time of a run, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prefopt import config
from prefopt.commands.given import memory_of, readable
from prefopt.records import InputError
from prefopt.terminal import Parser, as_json, libraries, say

ESTIMATE = """\
prefopt estimate OBJECTIVE --model DIR [--data FILE] [key=value ...]
prefopt estimate RECIPE.yaml [key=value ...]

What a run would hold in memory, part by part, how many updates and tokens it has, about how long it takes, whether it
fits, and the cheapest options that make it fit; then the same for the other objectives on such data. Worked out from
the model's configuration and the rows' lengths: no weights are loaded.

  --model DIR      a model directory or hub name (its configuration is enough)
  --data FILE      the rows; without it every row is taken to be max_length long
  --memory GB      memory that the run may take; what is free here unless given
  --probe          train three updates in a process of its own as well, and show what they took
  --map chosen=good
                   read the column `good` as `chosen`; repeat for more
  --json           the same as JSON, on stdout

Memory was within 15 % of the measured peak in 16 of 17 runs on a CPU (docs/estimate.md has the table). Time rests on
the rate of a matrix product, measured now, and may be off by a factor of two and more; --probe measures. Options are
those of `prefopt train`."""

GIGABYTE = 10**9
FLAGS = ("model", "data")


def estimate(words: list[str]) -> None:
    """Show what a run would need, and whether it fits."""
    given = estimate_parser().read(words)
    if given.help:
        return say(ESTIMATE)
    resolved, allowed = estimate_options(given), memory_of(given.memory)
    with libraries(given.json), readable():
        from prefopt.advice.machine import device_memory, speed
        from prefopt.recipes import estimate as recipe

        device, room = device_memory()
        room = room if allowed is None else allowed
        rate = speed(recipe.dtype_of(resolved["model"].dtype, device), device)
        found = recipe.estimate(resolved, device, room, rate)
        beside = [recipe.beside(resolved, name, device, room, rate, found.run.rows) for name in recipe.others(resolved)]
        probed = recipe.probe(resolved) if given.probe else None
    if given.json:
        return say(as_json(as_data(found, beside, probed)))
    say("\n".join(page(found, beside, probed)))


def estimate_parser() -> Parser:
    parser = Parser("estimate", ESTIMATE)
    parser.add_argument("words", nargs="*")
    for flag in FLAGS:
        parser.add_argument(f"--{flag}")
    parser.add_argument("--map", action="append", default=[])
    parser.add_argument("--memory", type=float)
    for flag in ("--probe", "--json"):
        parser.add_argument(flag, action="store_true")
    return parser


def estimate_options(given: Any) -> dict[str, Any]:
    """Every section's options. InputError as `prefopt train` has them; data and out may be left out."""
    if not given.words:
        raise InputError("estimate what? `prefopt estimate OBJECTIVE --model DIR` or `prefopt estimate RECIPE.yaml`")
    first, *overrides = given.words
    if first.endswith((".yaml", ".yml")):
        recipe = config.read_recipe(first)
        objective = recipe.pop("objective", None)
        if not isinstance(objective, str):
            raise InputError(f"{first}: objective: missing; add a line such as `objective: dpo`")
    else:
        recipe, objective = config.Layer(), first
    flags = config.Layer({flag: getattr(given, flag) for flag in FLAGS if getattr(given, flag)})
    typed = config.parse_overrides([*(f"map.{word}" for word in given.map), *overrides])
    resolved = config.resolve(config.sections(objective), config.Layer({"data": "", "out": ""}), recipe, flags, typed)
    if given.probe and not resolved["run"].data:
        raise InputError("--probe trains, so it needs data; give --data FILE")
    return resolved


# ---------------------------------------------------------------- for a reader


def page(found: Any, beside: Sequence[Any], probed: Any) -> list[str]:
    """The estimate for a reader at a terminal."""
    lines = [*about(found), "", *parts(found), "", *verdict(found)]
    if probed is not None:
        lines += ["", *measured(found, probed)]
    if beside:
        lines += ["", *table([found, *beside])]
    return [*lines, *(f"\n{note}" for note in found.notes)]


def about(found: Any) -> list[str]:
    """What was reckoned with: the model, the rows, the largest pass, the updates."""
    run, epoch = found.run, found.run.epoch()
    setup, net = run.setup, run.net
    how = f"an adapter of rank {setup.lora_rank} trained" if setup.lora_rank else "all trained"
    lines = [
        f"{found.objective}: {net.parameters:,} parameters, {how}, {setup.dtype} on a {'GPU' if setup.gpu else 'CPU'}",
        f"{len(run.rows):,} rows, {run.batch_size} in an update; the largest forward pass has {epoch.largest.tokens:,} "
        f"tokens, {epoch.largest.completion:,} of completions",
    ]
    if found.time is not None:
        lines.append(f"{found.time.updates:,} updates, {found.time.tokens:,} tokens, about {spell(found.time.seconds)}")
    return lines


def parts(found: Any) -> list[str]:
    """The memory of the moment that holds most."""
    peak = found.memory.peak
    rows = [(name, value) for name, value in peak.parts.items() if value]
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:<{width}}  {gigabytes(value):>9}" for name, value in rows]
    return [f"memory, GB, when most is held ({peak.name}):", *lines, f"  {'all':<{width}}  {gigabytes(peak.total):>9}"]


def verdict(found: Any) -> list[str]:
    """Whether it fits, and what makes it fit."""
    if found.room is None:
        return ["How much memory is free here could not be read; give --memory GB to see what fits"]
    free = f"{gigabytes(found.room)} GB"
    if found.fit is None:
        return [f"Does not fit into {free}, with any of the options that need less; take a smaller model"]
    if not found.fit.ways:
        return [f"Fits into {free}"]
    written = " ".join(f"{name}={config.shown(value).strip(chr(39))}" for name, value in found.fit.options.items())
    reasons = [f"  {', '.join(way.options)}: {way.words}" for way in found.fit.ways]
    return [
        f"Does not fit into {free}; the cheapest that does, at {gigabytes(found.fit.peak)} GB:",
        f"  {written}",
        *reasons,
    ]


def measured(found: Any, probed: Any) -> list[str]:
    """What the probe took beside what was estimated."""
    peak = found.memory.peak.total
    lines = [f"measured over {probed.updates} updates: {gigabytes(probed.peak)} GB (estimated {gigabytes(peak)})"]
    if found.time is not None:
        each, every = probed.per_update, probed.per_update * found.time.updates
        lines.append(
            f"an update took {each:.3g} s (estimated {found.time.per_update:.3g}); the run about {spell(every)}"
        )
    return lines


def table(every: Sequence[Any]) -> list[str]:
    """The same rows with each objective at its defaults."""
    width = max(len(one.objective) for one in every)
    lines = [
        "the same rows with other objectives, at their defaults:",
        f"  {'':<{width}}  {'GB':>9}  {'time':>12}  fits with",
    ]
    for one in every:
        took = spell(one.time.seconds) if one.time else "-"
        lines.append(f"  {one.objective:<{width}}  {gigabytes(one.memory.peak.total):>9}  {took:>12}  {fitting(one)}")
    return lines


def fitting(one: Any) -> str:
    """What makes it fit, in a few words."""
    if one.room is None:
        return "-"
    if one.fit is None:
        return "nothing"
    return (
        " ".join(f"{name}={config.shown(value).strip(chr(39))}" for name, value in one.fit.options.items())
        or "as it is"
    )


def gigabytes(value: int) -> str:
    return f"{value / GIGABYTE:.3f}" if value < 100 * GIGABYTE else f"{value / GIGABYTE:,.0f}"


def spell(seconds: float) -> str:
    """A duration for a reader."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


# ---------------------------------------------------------------- for machines


def as_data(found: Any, beside: Sequence[Any], probed: Any) -> dict[str, Any]:
    """The estimate as plain values; bytes and seconds."""
    return {
        **data_of(found),
        "probe": None if probed is None else vars(probed),
        "others": [data_of(one) for one in beside],
    }


def data_of(one: Any) -> dict[str, Any]:
    peak, epoch = one.memory.peak, one.run.epoch()
    fit: Mapping[str, Any] | None = (
        None if one.fit is None else {"options": dict(one.fit.options), "peak": one.fit.peak}
    )
    return {
        "objective": one.objective,
        "parameters": one.run.net.parameters,
        "rows": len(one.run.rows),
        "largest_pass": vars(epoch.largest),
        "peak": {"bytes": peak.total, "moment": peak.name, "parts": dict(peak.parts)},
        "moments": {moment.name: moment.total for moment in one.memory.moments},
        "free": one.room,
        "fit": fit,
        "time": None if one.time is None else vars(one.time),
        "notes": list(one.notes),
    }
