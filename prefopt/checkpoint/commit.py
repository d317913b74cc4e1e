"""A checkpoint is whole or it is not there, whenever the process is killed.

Every process writes its files into one hidden folder, syncs them, and lists them with sizes and hashes. When all lists
are there the first process writes the manifest, syncs, renames the folder to its name and syncs the parent: the rename
is the commit. Only then may older checkpoints go. A reader takes the newest one whose files are those of its manifest.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

MANIFEST = "MANIFEST.json"
FORMAT = 1
HIDDEN = ".writing-"
REMOVED = ".removed-"
PATIENCE = 1800.0  # seconds that the first process waits for the others' files
POLL = 0.02
PIECE = 8 * 2**20  # bytes read at once


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


def make_place(folder: Path) -> None:
    """Make the folder of a run's checkpoints, with its name on the disk. OSError."""
    if not folder.exists():
        folder.mkdir(parents=True, exist_ok=True)
        sync(folder.parent)


def make(writing: Path) -> None:
    """Make a folder to write a checkpoint into, in one of the run's whose name is on the disk. OSError."""
    make_place(writing.parent)
    writing.mkdir(exist_ok=True)


def seal(folder: Path, rank: int, files: Sequence[str], hashes: Mapping[str, str] | None = None) -> None:
    """Sync a process's files in `folder` and list them; the list is there only once they are durable. OSError.

    hashes: those known already, as of `digest`.
    """
    listed = {}
    for name in files:
        sync(folder / name)
        known = (hashes or {}).get(name) or digest(folder / name)
        listed[name] = {"bytes": (folder / name).stat().st_size, "xxh3_128": known}
    _write_whole(folder / _list_name(rank), json.dumps(listed))  # for the first process, not for a reader


def give_up(folder: Path, rank: int, error: Exception) -> None:
    """Tell the first process that this one's files will not come; silent where not even that can be written."""
    note = folder / f"failed-{rank}"
    with contextlib.suppress(OSError):
        try:
            _write_whole(note, f"{getattr(error, 'errno', None) or 0} {error}")
        except OSError:
            note.touch()  # a full disk has room for a name


def commit(
    writing: Path,
    step: int,
    world: int,
    facts: Mapping[str, Any],
    patience: float = PATIENCE,
    useless: Callable[[], bool] = lambda: False,
) -> Path:
    """Make what all processes have written the checkpoint of `step`, and return its folder.

    OSError where a process failed, with its number, or where its list did not come within `patience` seconds or until
    it is `useless` to wait for.
    """
    files = {name: entry for rank in range(world) for name, entry in _await(writing, rank, patience, useless).items()}
    manifest = {"format": FORMAT, "step": step, "world": world, "files": files, "facts": dict(facts)}
    write_synced(writing / MANIFEST, json.dumps({"xxh3_128": _of_text(manifest), "manifest": manifest}, indent=1))
    for rank in range(world):
        (writing / _list_name(rank)).unlink()
    sync(writing)
    final = writing.parent / name_of(step)
    # of the same step, from before a resume: it was found wanting, or this would not be written
    instead = aside(final) if final.exists() else None
    os.rename(writing, final)
    sync(writing.parent)
    if instead is not None:
        discard(instead)
    return final


def _await(writing: Path, rank: int, patience: float, useless: Callable[[], bool]) -> dict[str, Any]:
    path, failed, began = writing / _list_name(rank), writing / f"failed-{rank}", time.monotonic()
    while not path.exists():
        if failed.exists():
            raise _failed(rank, failed.read_text(encoding="utf-8"))
        if time.monotonic() - began > patience or useless():
            raise OSError(f"process {rank} has not written its part within {time.monotonic() - began:.0f} s")
        time.sleep(POLL)
    listed: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return listed


def _failed(rank: int, note: str) -> OSError:
    """What `give_up` noted, with the number of the system's error where it was one."""
    number, _, why = note.partition(" ")
    words = f"process {rank} could not write its part: {why or 'not even the reason'}"
    return OSError(int(number or errno.ENOSPC), words) if number != "0" else OSError(words)


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


def step_of(path: Path) -> int | None:
    """The step in a checkpoint's name; None where a folder's name is none."""
    number = path.name.removeprefix("step-")
    return int(number) if number.isdecimal() and path.name == name_of(int(number)) else None


def found(folder: Path) -> list[Path]:
    """Folders of committed checkpoints, oldest first, verified or not."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir() and step_of(path) is not None)


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
    """What MANIFEST.json says. ValueError where it is missing, not as it was written, or of another format."""
    try:
        whole = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        manifest, is_whole = whole["manifest"], whole["xxh3_128"] == _of_text(whole["manifest"])
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing") from None
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{MANIFEST} is damaged: it is not what was written") from None
    if not is_whole:
        raise ValueError(f"{MANIFEST} is damaged: its hash is not its own")
    if manifest["format"] != FORMAT:
        raise ValueError(f"{MANIFEST} is of format {manifest['format']!r}; this version reads {FORMAT}")
    if any(len(Path(name).parts) != 1 or name == ".." for name in manifest["files"]):
        raise ValueError(f"{MANIFEST} names a file outside its folder")
    return dict(manifest)


def _of_text(manifest: Any) -> str:
    """Hash of a manifest, whatever its spacing."""
    return str(xxhash.xxh3_128_hexdigest(json.dumps(manifest).encode()))


# ---------------------------------------------------------------- keeping few


def prune(folder: Path, keep: int, newest: int, remove: Callable[[Path], object] | None = None) -> list[Path]:
    """Remove all but `keep` checkpoints, at least one, up to that of step `newest`, and return those that stay.

    newest: known to be whole. Later ones are from before a resume that found them wanting, and go. remove: takes what
    has lost its name already; `discard` unless given.
    """
    there = found(folder)
    until = [path for path in there if (step_of(path) or 0) <= newest]
    stay = until[-max(keep, 1) :]
    for path in there:
        if path not in stay:
            (remove or discard)(aside(path))
    return stay


def aside(path: Path) -> Path:
    """Take a checkpoint's name away, so that what is left of it is not taken for one."""
    doomed = path.with_name(f"{REMOVED}{path.name}")
    discard(doomed)
    os.rename(path, doomed)
    return doomed


def discard(folder: Path) -> None:
    """Remove what has no checkpoint's name."""
    shutil.rmtree(folder, ignore_errors=True)


def point(folder: Path, path: Path) -> None:
    """Note in the file `latest` which checkpoint is the newest, for people and scripts; `newest` looks for itself."""
    _write_whole(folder / "latest", path.name + "\n")


def sweep(folder: Path) -> None:
    """Remove what was being written or removed when a process ended. Only while no other run uses the folder."""
    for pattern in (f"{HIDDEN}*", f"{REMOVED}*"):
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
    """Write a file that is whole or not there, and on the disk."""
    _write_whole(path, text, synced=True)


def _write_whole(path: Path, text: str, synced: bool = False) -> None:
    """Write a file that is whole or not there; after a loss of power it may be either, unless it is `synced`."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        if synced:
            sync(temporary)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def digest(path: Path) -> str:
    """xxh3_128 of a file, in hexadecimal: for damage by chance, not by intent."""
    hashed, piece = xxhash.xxh3_128(), memoryview(bytearray(PIECE))
    # read, not mapped into memory: a disk that fails is then an error and not the end of the process
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(piece):
            hashed.update(piece[:size])
    return str(hashed.hexdigest())
