"""A file of JSON lines that outlives full disks, kills and resumes."""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from pathlib import Path
from typing import Any

from prefopt.records import plain

log = logging.getLogger("prefopt")
MOST_WAITING = 100_000  # lines kept in memory while the disk takes none
PIECE = 2**16  # bytes looked through at once for the end of a line


class Lines:
    """Appends to `path`. A line that cannot be written waits in memory and is written with the next one that can.

    size: bytes of whole lines that this run knows to be in the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = whole(path)
        self.waiting: deque[str] = deque(maxlen=MOST_WAITING)
        self.warned = False

    def append(self, value: Any) -> None:
        """Write one line; where that fails, one warning, and it is kept for later."""
        self.waiting.append(json.dumps(plain(value), ensure_ascii=False) + "\n")
        try:
            self._write()
            self.warned = False
        except OSError as error:
            if not self.warned:
                log.warning("%s: cannot be written (%s); its lines wait in memory, training goes on", self.path, error)
            self.warned = True

    def close(self) -> None:
        """Try once more to write what waits; say how many lines are lost where that fails."""
        if not self.waiting:
            return
        try:
            self._write()
        except OSError as error:
            log.warning("%s: its last %d lines could not be written (%s)", self.path, len(self.waiting), error)

    def _write(self) -> None:
        with self.path.open("ab") as file:
            if file.tell() < self.size:  # someone has taken from it: filling up would be with NUL bytes
                self.size = whole(self.path)
            # a line of which only a part got in, now or before a kill, must not run into the next
            file.truncate(self.size)
            while self.waiting:
                # half of a surrogate pair is no UTF-8, and JSON has an escape for it
                line = self.waiting[0].encode("utf-8", "backslashreplace")
                file.write(line)
                file.flush()
                self.size += len(line)
                self.waiting.popleft()

    def clear(self) -> None:
        """Begin anew."""
        self.path.unlink(missing_ok=True)
        self.size, self.waiting = 0, deque(maxlen=MOST_WAITING)

    def state_dict(self) -> dict[str, Any]:
        return {"size": self.size, "waiting": list(self.waiting)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what was written after the state was saved: it is going to happen again."""
        there = self.path.stat().st_size if self.path.exists() else 0
        if there < state["size"]:
            log.warning("%s: shorter than when the checkpoint was written; what is gone stays gone", self.path)
        self.size = whole(self.path, state["size"])
        if there > self.size:
            os.truncate(self.path, self.size)
        self.waiting = deque(state["waiting"], maxlen=MOST_WAITING)


def whole(path: Path, most: int | None = None) -> int:
    """Bytes of the whole lines at the start of a file, of its first `most` if given; 0 where there is none."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        end = size if most is None else min(size, most)
        while end:
            start = file.seek(max(0, end - PIECE))
            last = file.read(end - start).rfind(b"\n")
            if last >= 0:
                return start + last + 1
            end = start
    return 0
