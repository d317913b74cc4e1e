"""Checkpoints are written one at a time, while training goes on, and what fails is said, counted and tried again."""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prefopt.checkpoint import CheckpointOptions, Keeper, commit, keeper, newest, read
from prefopt.records import InputError


class Run:
    """Something that changes, with its keeper. said: lines for the log. told: facts of those kept, commit by commit."""

    def __init__(self, folder: Path, whole: int | None = None, **options: Any) -> None:
        self.folder = folder / "checkpoints"
        self.weights, self.said, self.told = torch.zeros(3), list[str](), list[Any]()
        given = CheckpointOptions(**{"save_minutes": None, **options})
        self.keeper = Keeper(
            self.folder, given, self.state, say=self.said.append, committed=self.told.append, whole=whole
        )

    def state(self) -> dict[str, Any]:
        return {"weights": self.weights}

    def save(self, step: int, **named: Any) -> None:
        self.weights.fill_(step)
        self.keeper.save(step, {"best": step}, **named)

    def kept(self) -> list[int | None]:
        return [commit.step_of(path) for path in commit.found(self.folder)]


def held(step: int, folder: Path) -> float:
    return float(read(folder / commit.name_of(step), "rank-0")["weights"][0])


class Gate:
    """A disk that takes nothing until it is opened. reached: whether something waits for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.reached = threading.Event(), threading.Event()
        plain = commit.seal

        def seal(*given: Any) -> None:
            self.reached.set()
            assert self.open.wait(30)
            plain(*given)

        monkeypatch.setattr(commit, "seal", seal)


@pytest.mark.parametrize("save_async", [False, True])
def test_a_checkpoint_holds_the_state_as_it_was_when_it_was_saved(save_async, tmp_path):
    run = Run(tmp_path, save_async=save_async)
    for step in (1, 2, 3):
        run.save(step)
        run.weights.fill_(99)
    run.keeper.close()
    assert run.kept() == [2, 3] and [held(step, run.folder) for step in (2, 3)] == [2.0, 3.0]
    assert run.told == [[{"best": 1}], [{"best": 1}, {"best": 2}], [{"best": 2}, {"best": 3}]]
    assert (run.folder / "latest").read_text() == "step-00000003\n" and run.keeper.whole == 3


@pytest.mark.fault(33)
def test_training_goes_on_while_a_checkpoint_is_written_and_the_next_one_waits_for_it(tmp_path, monkeypatch):
    run, gate = Run(tmp_path), Gate(monkeypatch)
    run.save(1)
    assert gate.reached.wait(30) and run.keeper.busy and run.kept() == []
    second = threading.Thread(target=run.save, args=(2,))
    second.start()
    second.join(0.1)
    assert second.is_alive(), "the second was begun before the first was written"
    gate.open.set()
    second.join(30)
    run.keeper.close()
    assert run.kept() == [1, 2] and [held(step, run.folder) for step in (1, 2)] == [1.0, 2.0]


@pytest.mark.fault(33)
@pytest.mark.parametrize("error", [None, InputError("the run failed")])
def test_a_run_that_ends_or_fails_waits_for_the_checkpoint_that_is_being_written(error, tmp_path, monkeypatch):
    run, gate = Run(tmp_path), Gate(monkeypatch)

    def end() -> None:
        try:
            with run.keeper:
                run.save(1)
                if error:
                    raise error
        except InputError:
            pass

    ending = threading.Thread(target=end)
    ending.start()
    assert gate.reached.wait(30)
    ending.join(0.1)
    assert ending.is_alive() and run.kept() == []
    gate.open.set()
    ending.join(30)
    assert run.kept() == [1]


def test_none_is_due_by_the_clock_while_one_is_being_written(tmp_path, monkeypatch):
    run, gate = Run(tmp_path, save_minutes=1e-9), Gate(monkeypatch)
    assert run.keeper.due(1)
    run.save(1)
    assert gate.reached.wait(30) and not run.keeper.due(2)
    gate.open.set()
    run.keeper.close()
    run.keeper.took = 1000.0  # so long a write is due again only when it was 5 % of the time
    assert not run.keeper.due(2)


def test_checkpoints_are_due_at_every_so_many_updates_once(tmp_path):
    run = Run(tmp_path, save_every=3)
    assert [step for step in range(1, 10) if run.keeper.due(step)] == [3, 6, 9]
    run.save(3, wait=True)
    assert not run.keeper.due(3)
    assert not any(Run(tmp_path).keeper.due(step) for step in range(1, 10))


def failing(monkeypatch: pytest.MonkeyPatch, number: int, *, times: int, after: str = "seal") -> list[int]:
    """The disk refuses so many times at a point of the protocol; how often it was asked."""
    plain, asked = getattr(commit, after), list[int]()

    def refuse(*given: Any, **named: Any) -> Any:
        asked.append(1)
        if len(asked) <= times:
            raise OSError(number, "refused")
        return plain(*given, **named)

    monkeypatch.setattr(commit, after, refuse)
    return asked


@pytest.mark.parametrize("save_async", [False, True])
def test_a_save_that_fails_is_said_leaves_nothing_behind_and_the_next_one_is_whole(save_async, tmp_path, monkeypatch):
    run = Run(tmp_path, save_async=save_async)
    failing(monkeypatch, errno.EIO, times=1)
    run.save(1)
    run.keeper.close()
    assert run.said == [
        "step 1: the checkpoint could not be written ([Errno 5] refused); training goes on, failure 1 of 5 in a row"
    ]
    assert list(run.folder.iterdir()) == [] and run.keeper.whole is None
    run.save(2, wait=True)
    assert run.kept() == [2] and run.keeper.failed == 0


def test_after_so_many_failures_in_a_row_the_run_stops_with_the_reason(tmp_path, monkeypatch):
    run = Run(tmp_path, max_failed_saves=2, save_async=False)
    failing(monkeypatch, errno.EIO, times=2)
    run.save(1)
    with pytest.raises(InputError, match=r"2 checkpoints in a row could not be written \(the last: .*refused\)"):
        run.save(2)


def test_failures_that_are_not_in_a_row_do_not_stop_it(tmp_path, monkeypatch):
    run = Run(tmp_path, max_failed_saves=2, save_async=False)
    for step in (1, 2, 3):
        with monkeypatch.context() as patch:
            failing(patch, errno.EIO, times=1)
            run.save(2 * step)
        run.save(2 * step + 1)
    assert run.kept() == [5, 7]


def test_a_full_disk_is_made_room_on_and_tried_again_at_once(tmp_path, monkeypatch):
    run = Run(tmp_path, keep_checkpoints=3, save_async=False)
    for step in (1, 2, 3):
        run.save(step)
    failing(monkeypatch, errno.ENOSPC, times=1)
    run.save(4)
    assert run.kept() == [3, 4] and run.keeper.failed == 0
    assert "step 4: no room for the checkpoint; all but that of step 3 were removed" in run.said


class SlowRemoval:
    """A disk that is full while a checkpoint that lost its name is still being removed.

    gate: until it is open nothing goes; `full` opens it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.folder, self.gate, plain = folder, threading.Event(), commit.discard

        def discard(path: Path) -> None:
            if path.name.startswith(commit.REMOVED) and path.exists():
                assert self.gate.wait(30)
                time.sleep(0.05)  # so that who does not wait for it comes too early
            plain(path)

        monkeypatch.setattr(commit, "discard", discard)

    @property
    def full(self) -> bool:
        self.gate.set()
        return any(self.folder.glob(f"{commit.REMOVED}*"))


def test_a_disk_that_is_full_until_an_older_one_is_gone_is_waited_for(tmp_path, monkeypatch):
    run = Run(tmp_path, keep_checkpoints=1, save_async=False)
    run.save(1)
    slow, plain = SlowRemoval(monkeypatch, run.folder), commit.make
    run.save(2)
    assert run.kept() == [2] and list(run.folder.glob(".removed-*"))  # and nobody waited for it

    def make(writing: Path) -> None:
        if slow.full:
            raise OSError(errno.ENOSPC, "full")
        plain(writing)

    monkeypatch.setattr(commit, "make", make)
    run.save(3)
    assert run.kept() == [3] and run.keeper.failed == 0
    assert not any("no room" in line for line in run.said)


def test_room_for_better_weights_is_first_what_is_being_removed_then_older_ones(tmp_path, monkeypatch):
    run = Run(tmp_path, keep_checkpoints=2, save_async=False)
    run.save(1)
    run.save(2)
    slow = SlowRemoval(monkeypatch, run.folder)
    run.save(3)
    slow.gate.set()
    assert run.keeper.keep_one() and run.kept() == [2, 3] and not slow.full
    assert run.keeper.keep_one() and run.kept() == [3] and run.told[-1] == [{"best": 3}]
    assert not run.keeper.keep_one() and run.kept() == [3]


def test_the_result_finds_the_room_of_what_is_being_removed(tmp_path, monkeypatch):
    run = Run(tmp_path, keep_checkpoints=2, save_async=False)
    run.save(1)
    run.save(2)
    slow = SlowRemoval(monkeypatch, run.folder)
    run.save(3)
    slow.gate.set()
    free = SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=0 if slow.full else 10**12))
    monkeypatch.setattr(keeper, "shutil", free)
    run.keeper.make_room()
    assert run.kept() == [2, 3]
    monkeypatch.setattr(keeper, "shutil", SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=0)))
    run.keeper.make_room()
    assert run.kept() == [3]


def test_room_is_never_made_by_removing_the_one_that_is_whole(tmp_path, monkeypatch):
    """The newest by name is damaged: the run goes on from the one before it."""
    before = Run(tmp_path, save_async=False)
    before.save(1)
    before.save(2)
    (before.folder / "step-00000002" / "rank-0.json").write_text("")
    checkpoint, _ = newest(before.folder)
    run = Run(tmp_path, whole=checkpoint.step, save_async=False)
    failing(monkeypatch, errno.ENOSPC, times=2)
    run.save(2)
    assert run.kept() == [1] and newest(run.folder)[0].step == 1


@pytest.mark.parametrize("after", ["prune", "point"])
def test_a_disk_that_fails_after_the_commit_costs_no_checkpoint(after, tmp_path, monkeypatch):
    run = Run(tmp_path, save_async=False, keep_checkpoints=1)
    run.save(1)
    failing(monkeypatch, errno.ENOSPC, times=1, after=after)
    run.save(2)
    assert newest(run.folder)[0].step == 2 and run.keeper.failed == 0 and run.keeper.whole == 2
    assert any("the checkpoint is written, but older ones could not be removed" in line for line in run.said)


def test_a_state_that_cannot_be_written_is_a_failed_save_too(tmp_path, monkeypatch):
    from prefopt.checkpoint import tree

    def broken(*given: Any) -> None:
        raise RuntimeError("no memory for it")

    monkeypatch.setattr(tree, "save_file", broken)
    run = Run(tmp_path)
    run.save(1, wait=True)
    assert "no memory for it" in run.said[0] and run.keeper.failed == 1


@pytest.mark.fault(24)
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_where_memory_is_too_short_for_a_copy_training_waits_while_it_is_written(error, tmp_path, monkeypatch):
    from prefopt.checkpoint.tree import Tree

    plain = Tree._still

    def still(self: Tree, tensor: torch.Tensor) -> torch.Tensor:
        if self.copy:
            raise error
        return plain(self, tensor)

    monkeypatch.setattr(Tree, "_still", still)
    run = Run(tmp_path)
    for step in (1, 2):
        run.save(step)
        run.weights.fill_(99)
    run.keeper.close()
    assert [held(step, run.folder) for step in (1, 2)] == [1.0, 2.0] and run.keeper.failed == 0
    assert sum("no memory for a copy of the state" in line for line in run.said) == 1


def test_the_folder_is_there_before_anything_else_happens(tmp_path, monkeypatch):
    """Without it the weights that a first checkpoint counts on look as if none did."""
    run, gate = Run(tmp_path), threading.Event()
    plain = commit.make

    def make(writing: Path) -> None:
        assert gate.wait(30)
        plain(writing)

    monkeypatch.setattr(commit, "make", make)
    run.save(1)
    assert run.folder.exists() and run.kept() == []
    gate.set()
    run.keeper.close()
    assert run.kept() == [1]


@pytest.mark.parametrize("end", ["the next one", "the end"])
def test_processes_meet_again_and_again_while_one_of_them_is_still_writing(end, tmp_path, monkeypatch):
    """One that waits long in one place would be taken for hung."""
    monkeypatch.setattr(keeper, "ROUND", 0.01)
    run, gate, met = Run(tmp_path), Gate(monkeypatch), list[int]()
    with run.keeper:
        run.save(1)
        assert gate.reached.wait(30)

        def all_max(number: int) -> int:
            met.append(number)
            if len(met) == 5:
                gate.open.set()
            return number

        monkeypatch.setattr(keeper.ranks, "all_max", all_max)
        if end == "the next one":
            run.keeper.finish()
    assert met[:5] == [1] * 5 and 0 in met and run.kept() == [1]


def test_files_that_the_state_counts_on_are_synced_before_the_commit(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    run = Run(tmp_path, save_async=False)
    run.keeper.files = [tmp_path / "metrics.jsonl", tmp_path / "not there"]
    happened: list[str] = []
    for name in ("sync", "commit"):
        plain = getattr(commit, name)

        def noted(path: Path, *rest: Any, name: str = name, plain: Any = plain, **named: Any) -> Any:
            happened.append(f"{name} {path.name}")
            return plain(path, *rest, **named)

        monkeypatch.setattr(commit, name, noted)
    run.save(1)
    assert happened.index("sync metrics.jsonl") < [line.split()[0] for line in happened].index("commit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_every": 0}, "save_every must be at least 1"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1"),
        ({"max_failed_saves": 0}, "max_failed_saves must be at least 1"),
        ({"save_minutes": 0}, "save_minutes must be above 0"),
        ({"save_minutes": float("nan")}, "save_minutes must be above 0"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CheckpointOptions(**options)
