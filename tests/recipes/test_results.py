"""A result is on the disk before what could replace it goes, and a run's best weights are there when wanted."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from prefopt.recipes import results
from prefopt.recipes.results import Best
from prefopt.records import InputError


def test_a_result_is_synced_before_it_gets_its_name_and_its_name_before_anything_goes_on(tmp_path, monkeypatch):
    happened: list[str] = []

    def noted(owner: Any, call: str) -> None:
        plain = getattr(owner, call)

        def work(path: Any, *rest: Any) -> Any:
            place = Path(os.readlink(f"/proc/self/fd/{path}")) if isinstance(path, int) else Path(path)
            happened.append(f"{call} {place.relative_to(tmp_path)}")
            return plain(path, *rest)

        monkeypatch.setattr(owner, call, work)

    noted(os, "fsync")
    noted(os, "rename")
    with results._whole(tmp_path / "model") as writing:
        (writing / "weights").write_text("1")
        (writing / "more").mkdir()
        (writing / "more" / "file").write_text("1")
    monkeypatch.undo()
    synced = ["fsync .model.writing", *(f"fsync .model.writing/{name}" for name in ("more", "more/file", "weights"))]
    *before, name, last = happened
    assert sorted(before) == sorted(synced) and (name, last) == ("rename .model.writing", "fsync .")
    assert not (tmp_path / ".model.writing").exists() and (tmp_path / "model" / "more" / "file").exists()


def test_a_result_that_cannot_be_written_leaves_the_one_before_it_and_nothing_beside_it(tmp_path):
    with results._whole(tmp_path / "model") as writing:
        (writing / "weights").write_text("old")
    with pytest.raises(InputError, match="make room there"), results._whole(tmp_path / "model") as writing:
        (writing / "weights").write_text("new")
        raise OSError(28, "No space left on device")
    assert (tmp_path / "model" / "weights").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


class Saves:
    """A run with checkpoints whose evaluations are saved as folders of one file."""

    def __init__(self, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (out / "checkpoints").mkdir()
        self.out = out
        self.best = Best("eval/loss", out, None, None)

        def save(actor: Any, tokenizer: Any, folder: Path, make_room: Any) -> Path:
            folder.mkdir(parents=True)
            return folder

        monkeypatch.setattr(results, "save", save)

    def evaluate(self, step: int, loss: float) -> None:
        self.best.listen(step, {"eval/loss": loss})

    def kept(self) -> list[int]:
        return sorted(int(path.name.removeprefix("step-")) for path in (self.out / "best").glob("step-*"))


def test_weights_stay_while_a_checkpoint_may_go_back_to_them(tmp_path, monkeypatch):
    run = Saves(tmp_path, monkeypatch)
    for step, loss in ((0, 3.0), (2, 2.0), (4, 1.0)):
        run.evaluate(step, loss)
    assert run.kept() == [0, 2, 4]
    run.best.forget([{"best": 2}, {"best": 4}])
    assert run.kept() == [2, 4]
    run.best.forget([{"best": None}])
    assert run.kept() == [4]


def test_weights_that_are_saved_while_others_are_forgotten_stay(tmp_path, monkeypatch):
    """Checkpoints are committed in a thread of their own: it may ask what there is at any moment."""
    run = Saves(tmp_path, monkeypatch)
    run.evaluate(0, 3.0)
    plain, wanted, saved = Best._folder, threading.Event(), threading.Event()

    def folder(best: Best, step: int) -> Path:
        if threading.current_thread() is not threading.main_thread() and not wanted.is_set():
            wanted.set()
            assert saved.wait(30)
        return plain(best, step)

    monkeypatch.setattr(Best, "_folder", folder)
    committing = threading.Thread(target=run.best.forget, args=([{"best": 0}],))
    committing.start()
    assert wanted.wait(30)
    run.evaluate(2, 1.0)
    saved.set()
    committing.join()
    assert run.kept() == [0, 2]


def test_weights_that_are_gone_are_missed_when_the_run_goes_on(tmp_path, monkeypatch):
    run = Saves(tmp_path, monkeypatch)
    fresh = Best("eval/loss", tmp_path, None, None)
    fresh.load_state_dict(run.best.state_dict())  # of a run that has not been evaluated yet
    run.evaluate(2, 1.0)
    fresh.load_state_dict(run.best.state_dict())
    assert fresh.step == 2
    (tmp_path / "best" / "step-00000002").rmdir()
    with pytest.raises(InputError, match="is gone"):
        fresh.load_state_dict(run.best.state_dict())
