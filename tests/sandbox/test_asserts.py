from __future__ import annotations

import ast

import pytest

from prefopt.sandbox import Asserts, Call, Calls
from prefopt.sandbox.asserts import free_names, program


def test_asserts_of_calls_and_literals_become_calls() -> None:
    made = program("code", "assert f([1, -2], key='x') == {'a': (1, 2)}, 'text'\nassert 3 == g()")
    assert made == Calls("code", [Call("f", [[1, -2]], {"a": (1, 2)}, {"key": "x"}), Call("g", [], 3)])


def test_check_calls_the_function_it_is_given() -> None:
    tests = (
        "METADATA = {'a': 1}\ndef check(candidate):\n    '''words'''\n    assert True\n    assert candidate(1) == 2\n"
    )
    assert program("", tests, "f", "def f(x): ...") == Calls("", [Call("f", [1], 2)], given="def f(x): ...")


@pytest.mark.parametrize(
    "tests",
    [
        "assert f(1)",
        "assert not f(1)",
        "assert f(1) is True",
        "assert abs(f(1) - 2) < 1e-6",
        "assert f(1) == f(2)",
        "assert f(x) == 1",
        "assert f(*[1]) == 1",
        "assert f(**{'a': 1}) == 1",
        "assert sorted(f(1)) == [1]",
        "assert f(1) == 2 == 2",
        "for i in range(3):\n    assert f(i) == i",
        "assert f(1) == 1\nx = f(2)\nassert x == 2",
    ],
)
def test_any_other_test_stays_code(tests: str) -> None:
    assert program("code", tests) == Asserts("code", tests, ["f"])


def test_what_stands_before_tests_keeps_them_code() -> None:
    made = program("code", "assert f(1) == 2", before="import math")
    assert made == Asserts("code", "assert f(1) == 2", ["f"], before="import math")


def test_modules_that_tests_use_without_importing_them_are_imported() -> None:
    made = program("", "assert math.isclose(f(1), 2.0)")
    assert isinstance(made, Asserts) and made.tests == "import math; \nassert math.isclose(f(1), 2.0)"


def test_free_names_are_those_that_only_the_program_can_define() -> None:
    tests = "import os\ndef h(x): return len(x)\ny = [i for i in range(3)]\nassert h(f(1)) == g(y) == Node(i)"
    assert free_names(ast.parse(tests), "class Node: ...") == ["f", "g"]


@pytest.mark.parametrize(("tests", "why"), [("assert f(", "no Python"), ("assert 1 + 1 == 3", "call no function")])
def test_tests_that_cannot_test_anything_are_refused(tests: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        program("", tests)
