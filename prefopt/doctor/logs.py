"""Logs of runs, read into one form: metrics by our names, step after step, and what else is known of the run.

| what | from |
|---|---|
| a run's folder with `metrics.jsonl` | prefopt |
| `trainer_state.json`, or a folder or checkpoint that has one | TRL and transformers |
| a folder or file of TensorBoard events | any of TRL, OpenRLHF, verl; needs `tensorboard` |
| `.jsonl` or `.csv` with a column for the step | verl's file logger, OpenRLHF, exports of Weights & Biases |
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefopt import config
from prefopt.detectors import Run
from prefopt.doctor.names import as_number, not_finite, objective_of, ours, source_of, step_of
from prefopt.metrics import METRICS
from prefopt.records import InputError

STATE = "trainer_state.json"
EVENTS = "events.out.tfevents"


@dataclass(frozen=True)
class Log:
    """A run's metrics. lines: (update, metrics by our names), in order. folder: where its recipe is or would be.

    recipe: the run's options as they were written. notes: what was left out and why, for the reader. finished: whether
    the run says that it is over; None where its log cannot say. lost: where the loss or the gradient is not finite, in
    words, and stays so; no detector reads such numbers.
    """

    path: Path
    lines: list[tuple[int, dict[str, float]]]
    run: Run
    folder: Path
    recipe: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    finished: bool | None = None
    lost: str = ""

    @property
    def last(self) -> int:
        return max((step for step, _ in self.lines), default=0)


def read(path: str | Path) -> Log:
    """The log at `path`, whoever wrote it. InputError where there is none, or none that is known."""
    there = Path(path)
    if not there.exists():
        raise InputError(f"{there}: no such file or folder; give a run's folder, or the log of one")
    log = _folder(there) if there.is_dir() else _file(there)
    if not log.lines:
        raise InputError(f"{log.path}: holds no metrics yet; look again when the run has taken an update")
    return log


def _folder(folder: Path) -> Log:
    if (folder / "metrics.jsonl").exists():
        return _own(folder)
    states = [folder / STATE, *sorted(folder.glob(f"checkpoint-*/{STATE}"), key=_checkpoint)]
    there = [state for state in states if state.exists()]
    if there:
        return _trainer_state(max(there, key=_checkpoint))
    if any(folder.rglob(f"{EVENTS}*")):
        return _events(folder)
    if (folder / "config.yaml").exists():
        raise InputError(f"{folder}: the run has no metrics yet; look again when it has taken an update")
    raise InputError(
        f"{folder}: no log of a run is there; expected metrics.jsonl, {STATE}, TensorBoard events, or give a .jsonl or "
        ".csv file itself"
    )


def _checkpoint(state: Path) -> float:
    """The update of a checkpoint; the run's own state, beside them, counts as the last."""
    number = state.parent.name.removeprefix("checkpoint-")
    return float(number) if number.isdigit() else float("inf")


def _file(file: Path) -> Log:
    if file.name == "metrics.jsonl" and (file.parent / "config.yaml").exists():
        return _own(file.parent)
    if file.name.startswith(EVENTS):
        return _events(file)
    if file.suffix == ".json":
        return _trainer_state(file)
    if file.suffix in (".jsonl", ".ndjson"):
        rows, notes = json_lines(file)
        return _rows(file, rows, notes)
    if file.suffix in (".csv", ".tsv"):
        return _rows(file, _table(file), [])
    raise InputError(
        f"{file}: not a log that is known; give a run's folder, {STATE}, TensorBoard events, or a .jsonl or .csv file"
    )


# ---------------------------------------------------------------- ours


def _own(folder: Path) -> Log:
    rows, notes = json_lines(folder / "metrics.jsonl")
    lines = [
        (int(row["step"]), {n: float(v) for n, v in row.items() if n != "step" and as_number(v) is not None})
        for row in rows
        if as_number(row.get("step")) is not None
    ]
    recipe, summary = _recipe(folder), _json(folder / "summary.json") or {}
    objective = recipe.pop("objective", None) or summary.get("objective")
    used = {"learning_rate": summary["learning_rate"]} if summary.get("learning_rate") is not None else {}
    run = Run(objective, {**recipe, **used}, _steps(recipe, summary), summary.get("data", {}).get("rows"))
    return Log(folder / "metrics.jsonl", lines, run, folder, recipe, notes, bool(summary))


def _steps(recipe: Mapping[str, Any], summary: Mapping[str, Any]) -> int | None:
    steps = summary.get("steps") or recipe.get("max_steps")
    return int(steps) if steps else None


def _recipe(folder: Path) -> dict[str, Any]:
    """The options of a run's config.yaml; empty without one."""
    file = folder / "config.yaml"
    return dict(config.read_recipe(file)) if file.exists() else {}


def _json(file: Path) -> dict[str, Any] | None:
    """A JSON object, or None where the file is not there or is being written."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


# ---------------------------------------------------------------- of others


def _trainer_state(file: Path) -> Log:
    """A log of transformers' Trainer, and so of TRL's."""
    file.open("rb").close()  # where it may not be read, that is said
    state = _json(file)
    if state is None:
        raise InputError(f"{file}: not a JSON object; a copy that was cut short? give the whole file")
    history = state.get("log_history")
    if not isinstance(history, list):
        raise InputError(f"{file}: has no log_history, so it is no {STATE}")
    rows = [row for row in history if isinstance(row, dict)]
    names = {name for row in rows for name in row}
    source = source_of(names) or "TRL"
    lines = _ordered((step_of(row), ours(row, source)) for row in rows)
    objective = objective_of(values for _, values in lines)
    known = {"batch_size": as_number(state.get("train_batch_size")), "epochs": as_number(state.get("num_train_epochs"))}
    options = {name: int(value) if value.is_integer() else value for name, value in known.items() if value is not None}
    steps = as_number(state.get("max_steps"))
    run = Run(objective, options, int(steps) if steps and steps > 0 else None, None, source="TRL")
    finished = run.steps is not None and state.get("global_step") == run.steps
    if not lines and rows:
        raise InputError(f"{file}: none of its metrics is known ({_some(names)}); is it a run of preference training?")
    notes: list[str] = []
    return Log(file, lines, run, file.parent, {}, notes, finished, _lost(rows, source, notes))


def _rows(file: Path, rows: list[dict[str, Any]], notes: list[str]) -> Log:
    """Lines of a logger, or an export: {"step": ..., NAME: ...}, or verl's {"step": ..., "data": {NAME: ...}}."""
    flat = [{**row, **row["data"]} if isinstance(row.get("data"), dict) else row for row in rows]
    names = {name for row in flat for name in row}
    if not flat:
        raise InputError(f"{file}: is empty; look again when the run has logged something")
    source = source_of(names)
    if source is None and _is_ours(names):
        lines = _ordered((step_of(row), _numbers(row)) for row in flat)
        return Log(file, lines, Run(objective_of(values for _, values in lines)), file.parent, {}, notes)
    if source is None:
        raise InputError(f"{file}: none of its columns tells which trainer wrote it ({_some(names)})")
    if not any(step_of(row) is not None for row in flat):
        raise InputError(f"{file}: no column says the step (one of step, _step, global_step)")
    lines = _ordered((step_of(row), ours(row, source)) for row in flat)
    run = Run(objective_of(v for _, v in lines), source=source)
    return Log(file, lines, run, file.parent, {}, notes, None, _lost(flat, source, notes))


def _lost(rows: Iterable[Mapping[str, Any]], source: str, notes: list[str]) -> str:
    """From where on, and how often, the loss or the gradient is not finite at the end; empty where they are.

    What is finite again goes to notes: weights that are lost give no such numbers.
    """
    bad: list[tuple[int, list[str]]] = []
    last: set[str] = set()
    for row in sorted(rows, key=lambda row: step_of(row) or 0):
        names = not_finite(row, source)
        last = (last - ours(row, source).keys()) | set(names)
        if names:
            bad.append((step_of(row) or 0, names))
    if not bad:
        return ""
    what = " and ".join(sorted({name for _, names in bad for name in names}))
    where = f"{what} in {len(bad):,} line{'s' * (len(bad) > 1)}, first at step {bad[0][0]:,}"
    if not last:
        notes.append(f"not finite, and finite again since: {where}")
    return where if last else ""


def _is_ours(names: Iterable[str]) -> bool:
    return len({name.removeprefix("eval/") for name in names} & METRICS.keys()) > 1


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    found = {name: as_number(value) for name, value in row.items() if name not in ("step", "_step")}
    return {name: value for name, value in found.items() if value is not None}


def _some(names: Iterable[str]) -> str:
    shown = ", ".join(name[:40] for name in sorted(names)[:6])
    # of any bytes: say no control
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
    return safe or "there are none"


def _ordered(lines: Iterable[tuple[int | None, dict[str, float]]]) -> list[tuple[int, dict[str, float]]]:
    """Lines with a step and at least one metric, in the order of their steps; equal steps keep theirs."""
    kept = [(step, values) for step, values in lines if step is not None and values.keys() - {"epoch"}]
    return sorted(kept, key=lambda line: line[0])


def json_lines(file: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of JSON lines, and what was left out: a last line of which only a part was written.

    InputError naming the line for one that is none in the middle of the file.
    """
    try:
        texts = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from None
    rows, notes = [], []
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            if number == len(texts):
                notes.append(f"{file.name}:{number}: only a part of the last line is there; left out")
                continue
            raise InputError(f"{file}:{number}: not JSON; is it a log of JSON lines?") from None
        if not isinstance(row, dict):
            raise InputError(f"{file}:{number}: expected an object of metrics, got {str(row)[:40]}")
        rows.append(row)
    return rows, notes


def _table(file: Path) -> list[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)
    try:
        with file.open(encoding="utf-8-sig", errors="replace", newline="") as text:
            reader = csv.DictReader(text, delimiter="\t" if file.suffix == ".tsv" else ",")
            return [{k: v for k, v in row.items() if k is not None} for row in reader]
    except (OSError, csv.Error) as error:
        raise InputError(f"{file}: cannot be read as a table: {error}") from None


def _events(path: Path) -> Log:
    """TensorBoard's event files. InputError, with what to install, where `tensorboard` is missing."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        raise InputError(
            f"{path}: reading TensorBoard events needs tensorboard; pip install tensorboard, or give the run's "
            f"{STATE} or an export as .csv"
        ) from None
    folders = [path] if path.is_file() else sorted({file.parent for file in path.rglob(f"{EVENTS}*")})
    steps: dict[int, dict[str, Any]] = {}
    for folder in folders:
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        for name in events.Tags()["scalars"]:
            for event in events.Scalars(name):
                steps.setdefault(event.step, {})[name] = event.value
    return _rows(path, [{"step": step, **values} for step, values in sorted(steps.items())], [])
