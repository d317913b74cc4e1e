"""A checkpoint is whole or not there; the newest whole one is found, and never removed."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.checkpoint import commit
from prefopt.checkpoint.commit import MANIFEST, digest, found, newest, prune, verified


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def save(folder: Path, step: int, content: bytes = b"weights", facts: Any = None, world: int = 1) -> Path:
    """A checkpoint of one file for each process."""
    writing = commit.hidden(folder, step, "first")
    for rank in range(world):
        commit.make(writing)
        (writing / f"rank-{rank}").write_bytes(content)
        commit.seal(writing, rank, [f"rank-{rank}"])
    return commit.commit(writing, step, world, facts or {})


def steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in found(folder)]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_committed_is_found_with_its_step_and_facts(folder):
    path = save(folder, 7, facts={"options": {"rate": 1e-3}, "best": None})
    checkpoint, skipped = newest(folder)
    assert (checkpoint.path, checkpoint.step, skipped) == (path, 7, [])
    assert checkpoint.facts == {"options": {"rate": 1e-3}, "best": None}
    assert names(path) == [MANIFEST, "rank-0"]


def test_nothing_is_found_before_the_commit_and_in_a_folder_that_is_not_there(folder):
    assert newest(folder) == (None, [])
    writing = commit.hidden(folder, 1, "first")
    commit.make(writing)
    (writing / "rank-0").write_bytes(b"weights")
    commit.seal(writing, 0, ["rank-0"])
    assert newest(folder) == (None, [])
    commit.sweep(folder)
    assert names(folder) == []


def test_the_files_of_every_process_are_in_the_manifest(folder):
    path = save(folder, 1, world=3)
    manifest = commit.manifest_of(path)
    assert sorted(manifest["files"]) == ["rank-0", "rank-1", "rank-2"] and manifest["world"] == 3
    (path / "rank-2").unlink()
    with pytest.raises(ValueError, match="rank-2 is missing"):
        verified(path)


def test_the_first_process_waits_for_the_others(folder):
    writing = commit.hidden(folder, 1, "first")
    commit.make(writing)
    for rank in (0, 1):
        (writing / f"rank-{rank}").write_bytes(b"weights")
    commit.seal(writing, 0, ["rank-0"])
    late = threading.Timer(0.05, commit.seal, (writing, 1, ["rank-1"]))
    late.start()
    commit.commit(writing, 1, 2, {})
    late.join()
    assert newest(folder)[0].step == 1


def test_a_process_that_failed_or_never_comes_is_named(folder):
    writing = commit.hidden(folder, 1, "first")
    commit.make(writing)
    with pytest.raises(OSError, match="process 0 has not written its part"):
        commit.commit(writing, 1, 1, {}, patience=0)
    commit.give_up(writing, 0, OSError(28, "No space left on device"))
    with pytest.raises(OSError, match=r"process 0 could not write its part.*No space left") as error:
        commit.commit(writing, 1, 1, {})
    assert error.value.errno == 28


def test_everything_is_on_the_disk_before_the_name_is_and_the_name_before_older_ones_go(folder, monkeypatch):
    """The order of all that a power cut could tear apart."""
    save(folder, 1)
    happened: list[str] = []

    def where(path: Any) -> str:
        path = Path(os.readlink(f"/proc/self/fd/{path}")) if isinstance(path, int) else Path(path)
        return path.name if path.name in ("checkpoints", "latest.tmp") else path.name.split("-")[0]

    def noted(call: str) -> None:
        plain = getattr(os, call)

        def work(path: Any, *rest: Any) -> Any:
            happened.append(f"{call} {where(path)}")
            return plain(path, *rest)

        monkeypatch.setattr(os, call, work)

    for call in ("fsync", "rename", "replace"):
        noted(call)
    path = save(folder, 2)
    prune(folder, 1, 2)
    commit.point(folder, path)
    monkeypatch.undo()
    assert happened == [
        "fsync rank",  # what was written,
        "replace files",  # listed for the process that commits,
        "fsync MANIFEST.json.tmp",
        "replace MANIFEST.json.tmp",  # by all,
        "fsync .writing",
        "rename .writing",  # gets its name,
        "fsync checkpoints",
        "rename step",  # and then the older one loses its own
        "replace latest.tmp",  # a note for people
    ]


# ---------------------------------------------------------------- damage


def reseal(path: Path, **changed: Any) -> None:
    """Change a manifest as someone would who also knows how to hash it."""
    manifest = {**commit.manifest_of(path), **changed}
    whole = {"xxh3_128": xxhash.xxh3_128_hexdigest(json.dumps(manifest).encode()), "manifest": manifest}
    (path / MANIFEST).write_text(json.dumps(whole))


@settings(max_examples=80, deadline=None)
@given(bit=st.integers(min_value=0))
def test_no_flipped_bit_of_a_manifest_changes_what_is_read(bit, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "flipped"
    path = folder / "step-00000003"
    if not path.exists():
        save(folder, 3, facts={"options": {"rate": 0.5, "name": "é"}, "best": None})
    (path / MANIFEST).chmod(0o600)
    whole, wanted = (path / MANIFEST).read_bytes(), verified(path)
    bit %= 8 * len(whole)
    flipped = bytearray(whole)
    flipped[bit // 8] ^= 1 << bit % 8
    (path / MANIFEST).write_bytes(flipped)
    try:
        assert verified(path) == wanted  # a space became another one
    except ValueError as error:
        assert MANIFEST in str(error)
    finally:
        (path / MANIFEST).write_bytes(whole)


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "{}", "[1, 2]", '"text"', '{"manifest": {}}', '{"manifest": 1, "xxh3_128": 1}', "{", "\0" * 99],
)
def test_what_is_no_manifest_is_damage_and_not_an_accident(text, folder):
    save(folder, 1)
    broken = save(folder, 2)
    (broken / MANIFEST).write_text(text)
    checkpoint, skipped = newest(folder)
    assert checkpoint.step == 1 and skipped[0].path == broken and f"{MANIFEST} is damaged" in skipped[0].why


def test_a_newer_format_is_named(folder):
    reseal(save(folder, 1), format=99)
    checkpoint, (skipped,) = newest(folder)
    assert checkpoint is None and skipped.why == f"{MANIFEST} is of format 99; this version reads {commit.FORMAT}"


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "..", ".", "", "sub/file"])
def test_a_manifest_cannot_name_files_elsewhere(name, folder):
    path = save(folder, 1)
    entry = commit.manifest_of(path)["files"]["rank-0"]
    reseal(path, files={name: entry})
    with pytest.raises(ValueError, match="names a file outside its folder"):
        verified(path)


def test_folders_of_other_names_are_no_checkpoints(folder):
    save(folder, 1)
    for name in (
        "step-2",
        "step-final",
        "step-00000003.bak",
        "step-٣",
        ".writing-00000004-x",
        ".removed-step-00000005",
    ):
        (folder / name).mkdir()
    (folder / "step-00000006").write_text("a file")
    assert steps(folder) == [1]


def test_a_hash_needs_no_memory_map():
    """Some file systems have none, and where a disk fails one ends the process."""
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not path.exists():
        pytest.skip("no file here that cannot be mapped")
    assert digest(path) == xxhash.xxh3_128_hexdigest(path.read_bytes())


@pytest.mark.parametrize("size", [0, 1, commit.PIECE - 1, commit.PIECE, commit.PIECE + 1])
def test_a_hash_is_of_all_bytes_and_their_order(size, tmp_path):
    content = (bytes(range(251)) * (size // 251 + 1))[:size]
    (tmp_path / "file").write_bytes(content)
    assert digest(tmp_path / "file") == xxhash.xxh3_128_hexdigest(content)


# ---------------------------------------------------------------- keeping few


def test_pruning_keeps_the_newest_and_at_least_one(folder):
    for step in (1, 2, 3, 10):
        save(folder, step)
    assert [path.name for path in prune(folder, 2, 10)] == ["step-00000003", "step-00000010"]
    assert steps(folder) == [3, 10]
    prune(folder, 0, 10)
    assert names(folder) == ["step-00000010"]


def test_what_was_to_be_removed_when_a_process_ended_is_no_checkpoint_and_is_swept(folder):
    for step in (1, 2, 3):
        save(folder, step)
    prune(folder, 1, 3, remove=lambda path: None)
    assert names(folder) == [".removed-step-00000001", ".removed-step-00000002", "step-00000003"]
    assert steps(folder) == [3] and newest(folder)[0].step == 3
    save(folder, 2)
    prune(folder, 1, 3, remove=lambda path: None)  # the name was taken already
    commit.sweep(folder)
    assert names(folder) == ["step-00000003"]


@given(there=st.sets(st.integers(0, 30), min_size=1), keep=st.integers(-1, 5), data=st.data())
@settings(max_examples=60, deadline=None)
def test_pruning_never_removes_the_one_that_is_known_to_be_whole(there, keep, data, tmp_path_factory):
    """Whatever is newer is from before a resume that found it wanting."""
    folder = tmp_path_factory.mktemp("prune") / "checkpoints"
    whole = data.draw(st.sampled_from(sorted(there)))
    for step in there:
        (folder / commit.name_of(step)).mkdir(parents=True)
    stay = prune(folder, keep, whole)
    assert [path.name for path in stay] == [commit.name_of(step) for step in steps(folder)]
    assert steps(folder) == [step for step in sorted(there) if step <= whole][-max(keep, 1) :]


def test_a_damaged_one_of_the_same_step_is_replaced(folder):
    save(folder, 1)
    damaged = save(folder, 2, b"old")
    (damaged / "rank-0").write_bytes(b"bad")
    path = save(folder, 2, b"new")
    assert (path / "rank-0").read_bytes() == b"new" and newest(folder)[0].step == 2
    assert names(folder) == ["step-00000001", "step-00000002"]


def test_a_file_that_cannot_be_replaced_is_left_as_it_was_and_nothing_beside_it(tmp_path):
    (tmp_path / "latest").mkdir()  # in the way
    with pytest.raises(OSError):
        commit.write_synced(tmp_path / "latest", "step")
    assert names(tmp_path) == ["latest"]
