"""A checkpoint is whole or it is not there, whenever the process is killed.

Every process writes its files into one hidden folder, syncs them, and lists them with sizes and hashes. When all lists
are there the first process writes the manifest, syncs, renames the folder to its name and syncs the parent: the rename
is the commit. Only then may older checkpoints go. A reader takes the newest one whose files are those of its manifest.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

MANIFEST = "MANIFEST.json"
FORMAT = 1
HIDDEN = ".writing-"
PATIENCE = 1800.0  # seconds that the first process waits for the others' files
POLL = 0.02


@dataclass(frozen=True)
class Checkpoint:
    """One that verified. step: updates taken. facts: what its writer noted, see `commit`."""

    path: Path
    step: int
    facts: dict[str, Any]


@dataclass(frozen=True)
class Skipped:
    """One that cannot be used, and why."""

    path: Path
    why: str


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def hidden(folder: Path, step: int, attempt: str) -> Path:
    """Where a checkpoint is while it is written. attempt: the same on all processes, another one at every try."""
    return folder / f"{HIDDEN}{step:08d}-{attempt}"


def seal(folder: Path, rank: int, files: Sequence[str]) -> None:
    """Sync a process's files in `folder` and list them; the list is there only once they are durable. OSError."""
    listed = {}
    for name in files:
        sync(folder / name)
        listed[name] = {"bytes": (folder / name).stat().st_size, "xxh3_128": digest(folder / name)}
    write_synced(folder / _list_name(rank), json.dumps(listed))


def give_up(folder: Path, rank: int, why: str) -> None:
    """Tell the first process that this one's files will not come; silent where not even that can be written."""
    try:
        (folder / f"failed-{rank}").write_text(why, encoding="utf-8")
    except OSError:
        pass


def commit(writing: Path, step: int, world: int, facts: Mapping[str, Any], patience: float = PATIENCE) -> Path:
    """Make what all processes have written the checkpoint of `step`, and return its folder.

    OSError where a process failed, or its list did not come within `patience` seconds.
    """
    files = {name: entry for rank in range(world) for name, entry in _await(writing, rank, patience).items()}
    manifest = {"format": FORMAT, "step": step, "world": world, "files": files, "facts": dict(facts)}
    write_synced(writing / MANIFEST, json.dumps(manifest, indent=1))
    for rank in range(world):
        (writing / _list_name(rank)).unlink()
    sync(writing)
    final = writing.parent / name_of(step)
    if final.exists():  # of the same step, from before a resume: it was found wanting, or this would not be written
        shutil.rmtree(final)
    os.rename(writing, final)
    sync(writing.parent)
    return final


def _await(writing: Path, rank: int, patience: float) -> dict[str, Any]:
    path, failed, began = writing / _list_name(rank), writing / f"failed-{rank}", time.monotonic()
    while not path.exists():
        if failed.exists():
            raise OSError(f"process {rank} could not write its part: {failed.read_text(encoding='utf-8')}")
        if time.monotonic() - began > patience:
            raise OSError(f"process {rank} has not written its part within {patience:.0f} s")
        time.sleep(POLL)
    listed: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return listed


def _list_name(rank: int) -> str:
    return f"files-{rank}.json"


# ---------------------------------------------------------------- reading


def newest(folder: Path) -> tuple[Checkpoint | None, list[Skipped]]:
    """The newest checkpoint that verifies, and the newer ones that do not."""
    skipped: list[Skipped] = []
    for path in reversed(found(folder)):
        try:
            return verified(path), skipped
        except (OSError, ValueError) as error:
            skipped.append(Skipped(path, str(error)))
    return None, skipped


def found(folder: Path) -> list[Path]:
    """Folders of committed checkpoints, oldest first, verified or not."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def verified(path: Path) -> Checkpoint:
    """The checkpoint at `path`, every byte of which is as it was written. ValueError or OSError, with what is wrong."""
    manifest = manifest_of(path)
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"{name} is missing")
        if file.stat().st_size != entry["bytes"]:
            raise ValueError(f"{name} has {file.stat().st_size:,} bytes and not {entry['bytes']:,}")
        if digest(file) != entry["xxh3_128"]:
            raise ValueError(f"{name} is damaged: its hash is not the one in {MANIFEST}")
    return Checkpoint(path, manifest["step"], manifest["facts"])


def manifest_of(path: Path) -> dict[str, Any]:
    """What MANIFEST.json says. ValueError where it is missing, no JSON, or of another format."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        known = manifest["format"] == FORMAT and isinstance(manifest["step"], int)
        names = [Path(name) for name in manifest["files"]]
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing") from None
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{MANIFEST} is damaged") from None
    if not known:
        raise ValueError(f"{MANIFEST} is of format {manifest['format']!r}; this version reads {FORMAT}")
    if any(len(name.parts) != 1 or name.name in ("", "..") for name in names):
        raise ValueError(f"{MANIFEST} names a file outside its folder")
    return dict(manifest)


# ---------------------------------------------------------------- keeping few


def prune(folder: Path, keep: int) -> list[Path]:
    """Remove all but the newest `keep` checkpoints, at least one, and return those that stay.

    To be called after a commit: the newest is then known to be whole.
    """
    there = found(folder)
    for path in there[: -max(keep, 1)]:
        remove(path)
    return there[-max(keep, 1) :]


def remove(path: Path) -> None:
    """Take a checkpoint away: first its name, so that what is left half-way is not taken for one."""
    doomed = path.with_name(f".removed-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def discard(writing: Path) -> None:
    """Remove what could not be finished."""
    shutil.rmtree(writing, ignore_errors=True)


def point(folder: Path, path: Path) -> None:
    """Note in the file `latest` which checkpoint is the newest, for people and scripts; `newest` looks for itself."""
    write_synced(folder / "latest", path.name + "\n")


def sweep(folder: Path) -> None:
    """Remove what was being written or removed when a process ended. Only while no other run uses the folder."""
    for pattern in (f"{HIDDEN}*", ".removed-*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


# ---------------------------------------------------------------- files


def sync(path: Path) -> None:
    """Return once a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, text: str) -> None:
    """Write a file that is whole or not there."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    os.replace(temporary, path)


def digest(path: Path) -> str:
    """xxh3_128 of a file, in hexadecimal: for damage by chance, not by intent."""
    hashed = xxhash.xxh3_128()
    with path.open("rb") as file:
        if path.stat().st_size:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                hashed.update(view)
    return str(hashed.hexdigest())
