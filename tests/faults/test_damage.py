"""Faults 4 and 5: a checkpoint of which something is cut or flipped is found out, and the one before it is used."""

from __future__ import annotations

import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from lives import Server, result

from prefopt.recipes.resume import find
from prefopt.recipes.signals import EXIT_CODE
from prefopt.records import InputError

EVERY = {"save_every": 4, "save_minutes": None, "preflight": "off"}
FILES = ["MANIFEST.json", "rank-0.json", "rank-0.safetensors"]
NEWEST, BEFORE = "step-00000006", "step-00000004"


@pytest.fixture(scope="module")
def stopped(server, tmp_path_factory):
    """A run that was stopped after update 6, with checkpoints of the fourth and the sixth."""
    out = tmp_path_factory.mktemp("damage") / "stopped"
    assert server.run("sft", out, EVERY, signals=[("before update", 6, signal.SIGTERM)]) == EXIT_CODE, server.said
    assert sorted(os.listdir(out / "checkpoints" / NEWEST)) == FILES
    return out


@pytest.fixture
def out(stopped, tmp_path):
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        old = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([old ^ (1 << bit % 8)]))


def goes_on_from_the_one_before(server: Server, out: Path, unharmed: Any, name: str) -> None:
    assert server.run("sft", out, EVERY) == 0, server.said
    assert f"checkpoint {NEWEST} left out: {name}" in server.said
    assert "resuming after update 4, exactly" in server.said
    assert result(out) == unharmed("sft")


@pytest.mark.fault(4)
def test_a_file_that_was_cut_short_is_named_and_the_checkpoint_before_it_is_used(out, server, unharmed):
    path = out / "checkpoints" / NEWEST / "rank-0.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    goes_on_from_the_one_before(server, out, unharmed, path.name)


@pytest.mark.fault(4)
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("left", [None, 0, 1, 0.5], ids=["gone", "empty", "one-byte", "half"])
def test_whatever_is_left_of_a_file_the_checkpoint_is_left_out(left, name, out):
    path = out / "checkpoints" / NEWEST / name
    if left is None:
        path.unlink()
    else:
        os.truncate(path, int(left * path.stat().st_size) if left < 1 else left)
    checkpoint, skipped = find(out)
    assert checkpoint is not None and checkpoint.path.name == BEFORE
    assert [one.path.name for one in skipped] == [NEWEST] and name in skipped[0].why


@pytest.mark.fault(5)
def test_a_flipped_bit_is_found_and_the_checkpoint_before_it_is_used(out, server, unharmed):
    path = out / "checkpoints" / NEWEST / "MANIFEST.json"
    flip(path, random.Random("manifest").randrange(8 * path.stat().st_size))
    goes_on_from_the_one_before(server, out, unharmed, path.name)


@pytest.mark.fault(5)
@pytest.mark.parametrize("name", FILES)
def test_no_flipped_bit_passes(name, out):
    """Two hundred of each file, one in turn."""
    path = out / "checkpoints" / NEWEST / name
    draw, size = random.Random(name), path.stat().st_size
    for place in draw.sample(range(size), 200):
        bit = 8 * place + draw.randrange(8)
        flip(path, bit)
        checkpoint, _ = find(out)
        assert checkpoint is not None and checkpoint.path.name == BEFORE, f"bit {bit} of {name}"
        flip(path, bit)
    assert find(out)[0].path.name == NEWEST


@pytest.mark.fault(4, 5)
def test_where_no_checkpoint_is_whole_the_run_does_not_begin_anew_by_itself(out):
    for name in (NEWEST, BEFORE):
        flip(out / "checkpoints" / name / "rank-0.json", 100)
    with pytest.raises(InputError, match="no checkpoint is whole") as refused:
        find(out)
    for said in (f"{NEWEST}: rank-0.json is damaged", f"{BEFORE}: rank-0.json is damaged", "overwrite=true"):
        assert said in str(refused.value)


@pytest.mark.fault(5)
def test_a_damaged_checkpoint_does_not_crowd_out_the_whole_ones(out, server):
    """It has the highest number until the run comes by, and only one is to be kept."""
    flip(out / "checkpoints" / NEWEST / "rank-0.safetensors", 10_000)
    options = EVERY | {"save_every": 1, "keep_checkpoints": 1, "save_async": False}
    assert server.run("sft", out, options, kill="before update", number=2) == -signal.SIGKILL
    assert find(out)[0].step == 5
