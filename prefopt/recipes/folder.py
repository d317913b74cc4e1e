"""The folder of a run: free, writable, and one run's at a time."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefopt import ranks
from prefopt.checkpoint.commit import sweep
from prefopt.models.load import base_model
from prefopt.recipes.lock import Lock
from prefopt.records import InputError

CHECKPOINTS = "checkpoints"  # folder of the run's whole state, while it goes on
BEST = "best"  # folder of the weights that keep=best may choose, while it goes on


@contextlib.contextmanager
def closed_to_others() -> Iterator[None]:
    """Whatever the umask allows, what is written meanwhile cannot be changed by every user of the machine."""
    before = os.umask(0o077)
    os.umask(before | 0o002)
    try:
        yield
    finally:
        os.umask(before)


def _overwritten(model: str | None, out: Path) -> str | None:
    """A problem in words if `model`, or the base of an adapter there, is what this run would write over."""
    target = (out / "model").resolve()
    if model is None or not target.exists():
        return None
    if Path(model).resolve() == target or (Path(model).exists() and Path(base_model(model)).resolve() == target):
        return f"{out}: the result would be written over a model it is made from ({model}); choose another out"
    return None


def clear(out: Path, journal: Any) -> None:
    """Remove an earlier run's result, once this one is known to work."""
    ranks.barrier()
    if ranks.is_main():
        for name in ("model", "critic", CHECKPOINTS, BEST):
            shutil.rmtree(out / name, ignore_errors=True)
        (out / "summary.json").unlink(missing_ok=True)
        journal.clear()


def _done(out: Path) -> str | None:
    """A problem in words if a run has ended in `out`."""
    begun = any((out / CHECKPOINTS).glob("step-*"))
    if (out / "summary.json").exists() or ((out / "model").exists() and not begun):
        return f"{out}: already holds a run; choose another out, or overwrite=true"
    return None


def prepare(run: Any, reference_model: str | None, stack: contextlib.ExitStack) -> Path:
    """The run folder, checked to be writable and free and locked until `stack` ends, before any slow work."""
    out = Path(run.out)
    problem = None
    if ranks.is_main():
        problem = _overwritten(run.model, out) or _overwritten(reference_model, out)
        try:
            out.mkdir(parents=True, exist_ok=True)
            (out / ".writable").touch()
            (out / ".writable").unlink()
            stack.callback(Lock(out).close)
            # now that it is locked: a run may have ended here a moment ago
            problem = _done(out) if not run.overwrite and _done(out) else problem
            sweep(out / CHECKPOINTS)
        except InputError as error:
            problem = problem or str(error)
        except OSError as error:
            problem = f"{out}: cannot write there ({error.strerror}); choose another out"
    problem = ranks.from_main(problem)
    if problem:
        raise InputError(problem)
    return out
