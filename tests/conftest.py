"""Its presence puts this folder on the path, so that tests in subfolders can import what they share."""

from __future__ import annotations

import signal

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what it runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

# `make parity` names that folder and has an environment with the peer for it
collect_ignore = ["parity"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or leaves entries in the user's reference cache."""
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path_factory.mktemp("cache")))
