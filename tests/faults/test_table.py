"""Every fault of the table is injected by a test, or it is said why not."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from table import FAULTS

GENERATOR = Path(__file__).parents[2] / "docs" / "generate.py"


def injected() -> dict[int, list[tuple[Path, str]]]:
    spec = importlib.util.spec_from_file_location("generate_docs", GENERATOR)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return dict(module.injected())


@pytest.mark.parametrize("number", FAULTS)
def test_a_fault_is_injected_by_a_test_or_it_is_said_why_not(number):
    assert injected().get(number) or FAULTS[number].untested


def test_no_test_names_a_fault_that_is_not_in_the_table():
    assert injected().keys() <= FAULTS.keys()
