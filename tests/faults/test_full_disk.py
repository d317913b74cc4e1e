"""Faults 6 and 7: the disk is full, of checkpoints or of anything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import scenes
from lives import result

needs_mounts = pytest.mark.skipif(not scenes.can_mount(), reason="no process here may mount a disk of a given size")
NEVER = {"save_minutes": None, "preflight": "off"}
OFTEN = {**NEVER, "save_every": 3, "save_async": False}


class Sizes(NamedTuple):
    """Bytes that a checkpoint and a model take of a disk. between: larger than any file of a model, and too small for
    the largest of a checkpoint.
    """

    checkpoint: int
    model: int
    between: int


@pytest.fixture(scope="module")
def sizes(server, unharmed, tmp_path_factory):
    unharmed("dpo")
    killed = tmp_path_factory.mktemp("disk") / "killed"
    assert server.run("dpo", killed, OFTEN, kill="before update", number=12) == -9
    folders = killed / "checkpoints" / "step-00000009", server.folder / "dpo-unharmed" / "model"
    largest = [max(path.stat().st_size for path in folder.iterdir()) for folder in folders]
    return Sizes(*map(pages, folders), sum(largest) // 2)


def pages(folder: Path) -> int:
    """Bytes that a folder's files take of a tmpfs."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return sum(-(-size // scenes.PAGE) * scenes.PAGE for size in sizes)


@needs_mounts
@pytest.mark.fault(6)
def test_older_checkpoints_make_room_for_a_new_one(server, unharmed, sizes, tmp_path):
    """Two find room, and of a third the half; beside two the result finds none, until one of them goes."""
    options = OFTEN | {"keep_checkpoints": 3}
    size = int(2.5 * sizes.checkpoint)
    code = server.run("dpo", tmp_path / "run", options, scene="small_disk", bytes=size, keep=str(tmp_path / "kept"))
    assert code == 0, server.said
    assert "step 9: no room for the checkpoint; all but that of step 6 were removed" in server.said
    assert "little room is left for the result; all checkpoints but that of step 12 were removed" in server.said
    assert "step 9: checkpoint written" in server.said and "could not be written" not in server.said
    assert result(tmp_path / "kept") == unharmed("dpo")


@needs_mounts
@pytest.mark.fault(6)
def test_a_disk_without_room_for_a_checkpoint_does_not_stop_training(server, unharmed, sizes, tmp_path):
    size = sizes.checkpoint - scenes.PAGE
    kept = tmp_path / "kept"
    code = server.run("dpo", tmp_path / "run", OFTEN, scene="small_disk", bytes=size, keep=str(kept))
    assert code == 0, server.said
    for number, step in enumerate((3, 6, 9, 12), 1):
        assert f"step {step}: the checkpoint could not be written" in server.said
        assert f"training goes on, failure {number} of 5 in a row" in server.said
    assert "No space left on device" in server.said
    assert result(kept) == unharmed("dpo")


@needs_mounts
@pytest.mark.fault(6)
def test_after_max_failed_saves_in_a_row_the_run_stops_and_leaves_nothing_half_written(server, sizes, tmp_path):
    size, kept = sizes.checkpoint * 2 // 3, tmp_path / "kept"
    options = OFTEN | {"max_failed_saves": 2, "overwrite": True}
    code = server.run("dpo", tmp_path / "run", options, scene="small_disk", bytes=size, keep=str(kept))
    assert code == 1
    assert "InputError" in server.said and "2 checkpoints in a row could not be written" in server.said
    again = f"`prefopt train --resume {tmp_path / 'run'}`, not the same command with overwrite=true, goes on"
    assert f"make room there or choose another out; {again}" in server.said
    assert list((kept / "checkpoints").iterdir()) == []
    assert [line["step"] for line in lines(kept)][-1] == 6  # it stopped there, and not where it is to end


@pytest.mark.fault(6)
def test_saving_is_tried_again_and_works_once_there_is_room(server, unharmed, sizes, tmp_path):
    """No file may be longer than a model's until the eighth update."""
    out = tmp_path / "run"
    scene = {"scene": "small_files", "bytes": sizes.between, "until": 8}
    assert server.run("dpo", out, OFTEN, **scene, kill="before update", number=11) == -9, server.said
    for step in (3, 6):
        assert f"step {step}: the checkpoint could not be written" in server.said
    assert "File too large" in server.said
    assert [path.name for path in (out / "checkpoints").iterdir() if path.is_dir()] == ["step-00000009"]
    assert server.run("dpo", out, OFTEN) == 0, server.said
    assert result(out) == unharmed("dpo")


@pytest.mark.fault(6)
def test_a_run_that_is_done_is_saved_although_its_last_checkpoints_were_not(server, unharmed, sizes, tmp_path):
    scene = {"scene": "small_files", "bytes": sizes.between, "until": 100}
    options = {**OFTEN, "max_failed_saves": 4, "save_async": True}
    assert server.run("dpo", tmp_path / "run", options, **scene) == 0, server.said
    assert "failure 4 of 4 in a row" in server.said
    assert result(tmp_path / "run") == unharmed("dpo")


@needs_mounts
@pytest.mark.fault(6)
def test_older_checkpoints_make_room_for_better_weights(server, sizes, tmp_path):
    """Two of each find room, and of the third weights, which a later evaluation finds better, the half."""
    options, kept = OFTEN | {"keep": "best"}, tmp_path / "kept"
    assert server.run("dpo", tmp_path / "whole", options) == 0, server.said
    size = 2 * sizes.checkpoint + int(2.5 * sizes.model)
    code = server.run("dpo", tmp_path / "run", options, scene="small_disk", bytes=size, keep=str(kept))
    assert code == 0, server.said
    assert "no room for the best weights; all checkpoints but that of step 6 were removed" in server.said
    assert result(kept) == result(tmp_path / "whole")


@needs_mounts
@pytest.mark.fault(7)
def test_metrics_wait_in_memory_while_the_disk_is_full(server, unharmed, sizes, tmp_path):
    size, kept = sizes.model + 20 * scenes.PAGE, tmp_path / "kept"
    scene = {"scene": "full_for_a_while", "bytes": size, "keep": str(kept), "updates": [2, 12]}
    assert server.run("dpo", tmp_path / "run", NEVER, **scene) == 0, server.said
    assert server.said.count("metrics.jsonl: cannot be written ([Errno 28] No space left on device)") == 1
    assert result(kept) == unharmed("dpo")


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
