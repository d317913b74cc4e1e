"""Stopping a run from outside: the first signal lets the update end and saves the run, the second ends it at once."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again later; schedulers can tell it from success and from failure
ECHO = 5.0  # seconds in which a launcher's signal is the scheduler's, sent to all and passed on once more


class Paused(SystemExit):
    """A run that was asked to stop and can go on. Its exit code is 75."""

    def __init__(self, words: str) -> None:
        super().__init__(EXIT_CODE)
        self.words = words

    def __str__(self) -> str:
        return self.words


class Signals:
    """Within `with`, SIGTERM and SIGINT (Ctrl-C) set `asked`; a second one ends the process as without it.

    Of several processes only a second one that comes more than ECHO seconds later ends this one. Elsewhere than in the
    main thread signals cannot be taken, and `asked` stays empty.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.asked, self.since = "", 0.0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._take) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            if time.monotonic() - self.since > ECHO:
                self._restore()
                signal.raise_signal(number)
            return
        self.asked, self.since = signal.Signals(number).name, time.monotonic()
        from prefopt import ranks  # here: help and errors need no torch

        if ranks.world() == 1:  # not left to this handler, which waits for whatever runs outside of Python
            self._restore()
        self.say(f"{self.asked}: stopping after this update, with a checkpoint; once more to stop at once")
