"""Worlds are slow to build (seconds), so each is built once for all tests."""

from __future__ import annotations

import pytest

from prefopt import bench


@pytest.fixture(scope="session")
def small() -> bench.World:
    return bench.world(0)


@pytest.fixture(scope="session")
def ended() -> bench.World:
    return bench.world(0, lengths=True)
