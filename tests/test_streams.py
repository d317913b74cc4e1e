"""Printing to streams that are gone, and descriptors that are closed from the start."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from typing import Any

import pytest

from prefopt import streams
from prefopt.terminal import say


def broken_pipe() -> Any:
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w", buffering=1)


def closed() -> Any:
    stream = io.StringIO()
    stream.close()
    return stream


class Interrupted(io.StringIO):
    """As a stream whose write a signal's handler came into."""

    def write(self, text: str) -> int:
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")


@pytest.mark.parametrize("make", [lambda: None, broken_pipe, closed, Interrupted], ids=["none", "pipe", "closed", "in"])
def test_what_cannot_be_written_is_dropped(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = make()
    monkeypatch.setattr(sys, "stderr", stream)
    for _ in range(3):
        streams.note("nobody reads this")
    assert not streams.is_terminal()
    if isinstance(stream, io.TextIOWrapper):
        with pytest.raises(BrokenPipeError):
            stream.close()


def test_what_can_be_written_is_and_a_character_that_cannot_be_shown_is_escaped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw, encoding="ascii", errors="strict"))
    streams.note("caf\u00e9 \N{GREEK SMALL LETTER BETA}")
    assert raw.getvalue() == b"caf\\xe9 \\u03b2\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_a_full_disk_under_stdout_is_said_and_is_no_crash(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        say("a summary")
        say("and more")  # the stream goes nowhere now
    assert capsys.readouterr().err == "stdout: cannot be written (No space left on device)\n"


FILLED = """
import os, subprocess, sys
from prefopt import streams
streams.fill()
opened = os.open({file!r}, os.O_WRONLY | os.O_CREAT)
assert opened > 2, opened
subprocess.run([sys.executable, "-c", "import os; os.write(1, b'out'); os.write(2, b'err')"], check=True)
os.write(opened, b"whole")
"""


def test_files_do_not_get_the_numbers_of_streams_that_were_closed(tmp_path: Any) -> None:
    file = tmp_path / "file"
    code = FILLED.format(file=str(file))
    done = subprocess.run([sys.executable, "-c", code], preexec_fn=lambda: os.closerange(0, 3), timeout=60)
    assert done.returncode == 0 and file.read_bytes() == b"whole"
