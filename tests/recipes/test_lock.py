"""One run in a folder at a time, for as long as its process lives and no longer."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prefopt.recipes.lock import NAME, Lock
from prefopt.records import InputError


def is_free(folder: Path) -> bool:
    try:
        Lock(folder).close()
    except InputError:
        return False
    return True


@pytest.mark.fault(9)
def test_a_second_lock_is_refused_with_process_and_machine_until_the_first_is_closed(tmp_path):
    lock = Lock(tmp_path)
    with pytest.raises(InputError, match=f"process {os.getpid()} on {socket.gethostname()}.*choose another out"):
        Lock(tmp_path)
    lock.close()
    lock.close()  # twice is no error, and closes nobody else's file
    assert is_free(tmp_path)


@contextlib.contextmanager
def child(work: Callable[[], object]) -> Iterator[int]:
    """A fork, as its id, that has done this and lives until the end of `with`."""
    here, there = os.pipe()
    process = os.fork()
    if not process:
        work()
        os.write(there, b"done")
        signal.pause()
    try:
        assert os.read(here, 4) == b"done"
        yield process
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(here)
        os.close(there)


@pytest.mark.fault(9)
def test_a_lock_ends_with_its_process_however_that_ends(tmp_path):
    with child(lambda: Lock(tmp_path)) as process, pytest.raises(InputError, match=f"process {process} on"):
        Lock(tmp_path)
    assert is_free(tmp_path)


def test_a_fork_of_the_run_does_not_hold_its_folder(tmp_path):
    """A reward's process may outlive the run that forked it."""
    lock = Lock(tmp_path)
    with child(lambda: None):
        assert not is_free(tmp_path)
        lock.close()
        assert is_free(tmp_path)


def test_closing_it_in_a_fork_leaves_the_run_its_lock(tmp_path):
    lock = Lock(tmp_path)
    with child(lock.close):
        assert not is_free(tmp_path)
    lock.close()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', "\0"])
def test_who_holds_it_may_be_unknown(text, tmp_path):
    lock = Lock(tmp_path)
    (tmp_path / NAME).write_text(text)
    with pytest.raises(InputError, match=r"another run is writing there \(it has not said which"):
        Lock(tmp_path)
    lock.close()
