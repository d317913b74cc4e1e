"""The folder of a run: free, writable, and one run's at a time."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prefopt import config, ranks
from prefopt.checkpoint.commit import sweep
from prefopt.models.load import base_model
from prefopt.recipes.lock import Lock
from prefopt.records import InputError

CHECKPOINTS = "checkpoints"  # folder of the run's whole state, while it goes on
BEST = "best"  # folder of the weights that keep=best may choose, while it goes on
FIXED = "fixed"  # folder of the run that mends a sick one, in its own
MENDING = (FIXED, f"{FIXED}-first")  # folders of all that mend it


class Finished(InputError):
    """The run that was asked for has come to its end in this folder before."""


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
    """A problem in words if `model`, or the base of an adapter there, is what this run would write over or remove."""
    targets = {(out / name / "model").resolve() for name in (".", *MENDING) if (out / name / "model").exists()}
    if model is None or not targets:
        return None
    if Path(model).resolve() in targets or (Path(model).exists() and Path(base_model(model)).resolve() in targets):
        return f"{out}: the result would be written over a model it is made from ({model}); choose another out"
    return None


def clear(out: Path, journal: Any) -> None:
    """Remove an earlier run's result, once this one is known to work."""
    ranks.barrier()
    if ranks.is_main():
        for name in MENDING:
            if (out / "summary.json").exists() and (out / name).exists():  # only what is finished is mended
                shutil.rmtree(out / name, ignore_errors=True)
        (out / "summary.json").unlink(missing_ok=True)  # first: it says that the rest is a result
        for name in ("model", "critic"):
            shutil.rmtree(out / name, ignore_errors=True)
        remove_state(out)
        journal.clear()


def remove_state(out: Path) -> None:
    """Remove what is there for a run to go on from."""
    for name in (CHECKPOINTS, BEST):
        shutil.rmtree(out / name, ignore_errors=True)


def holds_run(out: Path) -> bool:
    """Whether there is a run in `out`, finished or with a checkpoint, or a model of which that is not known."""
    return any((out / name).exists() for name in ("summary.json", "model")) or _begun(out)


def _begun(out: Path) -> bool:
    return any((out / CHECKPOINTS).glob("step-*"))


def _done(out: Path, settings: Mapping[str, Any]) -> str | None:
    """A problem in words if a run has ended in `out`, or there is a model that is not from a run of these settings."""
    fixed = out / FIXED
    if (out / "summary.json").exists() and (fixed / "config.yaml").exists() and not (fixed / "summary.json").exists():
        return (
            f"{out}: already holds a run, and {fixed} an unfinished one that mends it: "
            f"`prefopt train --resume {fixed}` goes on with that; or choose another out, or overwrite=true for both"
        )
    unknown = (out / "model").exists() and not _begun(out) and not _asked_before(out, settings)
    if (out / "summary.json").exists() or unknown:
        return f"{out}: already holds a run; choose another out, or overwrite=true"
    return None


def _mended_now(out: Path) -> str | None:
    """A problem in words if a run that mends the one in `out` is going on."""
    try:
        for name in MENDING:
            if (out / name).is_dir():
                Lock(out / name).close()
    except InputError as error:
        return str(error)
    return None


def _asked_before(out: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the run in `out` was begun with these settings, so that without a summary it is this one, unfinished."""
    kept = out / "config.yaml"
    return kept.is_file() and _lines(kept.read_text(encoding="utf-8")) == _lines(config.to_yaml(settings))


def _lines(recipe: str) -> list[str]:
    """A recipe without the options that --resume resets."""
    return [line for line in recipe.splitlines() if not line.startswith(("overwrite:", "allow_inexact:"))]


def prepare(settings: Mapping[str, Any], stack: contextlib.ExitStack) -> Path:
    """The run folder, checked to be writable and free and locked until `stack` ends, before any slow work.

    InputError where it cannot be had, Finished where these settings have been run there. What a run that was killed
    after its end has left is removed.
    """
    run, reference_model = settings["run"], settings["reference"].reference_model
    out = Path(run.out)
    problem, finished = None, False
    if ranks.is_main():
        problem = _overwritten(run.model, out) or _overwritten(reference_model, out)
        try:
            out.mkdir(parents=True, exist_ok=True)
            (out / ".writable").touch()
            (out / ".writable").unlink()
            stack.callback(Lock(out).close)
            # now that it is locked: a run may have ended here a moment ago
            problem = (_mended_now(out) if run.overwrite else _done(out, settings)) or problem
            sweep(out / CHECKPOINTS)
            if (out / "summary.json").exists() and not run.overwrite:
                finished = _asked_before(out, settings)
            if finished:  # else it may be anybody's
                remove_state(out)
        except InputError as error:
            problem = problem or str(error)
        except OSError as error:
            problem = f"{out}: cannot write there ({error.strerror}); choose another out"
    problem, finished = ranks.from_main((problem, finished))
    if problem:
        raise Finished(problem) if finished else InputError(problem)
    return out
