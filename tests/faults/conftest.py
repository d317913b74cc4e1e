"""One server of training runs and one of commands for all tests here, and how many threads their runs have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from forks import Forks
from lives import Server, prepare, result


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Its folder holds the model and the rows of all runs."""
    folder = tmp_path_factory.mktemp("lives")
    prepare(folder)
    made = Server(folder)
    yield made
    made.close()


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Commands, each in a process of its own."""
    made = Forks(tmp_path_factory.mktemp("forks"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def unharmed(server: Server) -> Callable[[str], dict[str, Any]]:
    """What a run of a kind ends with when nothing goes wrong."""
    known: dict[str, dict[str, Any]] = {}

    def of(kind: str) -> dict[str, Any]:
        if kind not in known:
            out = server.folder / f"{kind}-unharmed"
            assert server.run(kind, out, {"save_minutes": None, "preflight": "off"}) == 0, server.said
            known[kind] = result(out)
        return known[kind]

    return of


@pytest.fixture
def one_thread() -> Iterator[None]:
    """This process computes with as many as the server's."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
