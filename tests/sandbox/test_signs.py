from __future__ import annotations

import ast

import pytest

from prefopt.sandbox.signs import SIGNS, find


@pytest.mark.parametrize(
    ("code", "signs"),
    [
        ("def f(x):\n    return x + 1", []),
        ("def f(x):\n    try:\n        return int(x)\n    except ValueError:\n        return 0", []),
        ("def f(x):\n    try:\n        return int(x)\n    except Exception:\n        raise", []),
        ("def f(x):\n    'words'\n    try:\n        return int(x)\n    except:\n        return 0", ["swallow"]),
        ("try:\n    import numpy\nexcept BaseException:\n    pass", ["swallow"]),
        ("import sys\nsys.exit(0)", ["exit"]),
        ("from os import _exit as leave", ["exit"]),
        ("raise SystemExit", ["exit"]),
        ("import sys\nsys._getframe(1).f_locals", ["frames"]),
        ("import inspect\ninspect.currentframe()", ["frames"]),
        ("import gc", ["objects"]),
        ("import builtins\nbuiltins.print = len", ["builtins"]),
        ("class A:\n    def __eq__(self, other):\n        return True", ["equality"]),
        ("class A:\n    def __eq__(self, other):\n        return self.x == other.x", []),
        ("import unittest", ["tests"]),
        ("open('conftest.py', 'w')", ["tests"]),
    ],
)
def test_signs_of_attempts_on_the_tests(code: str, signs: list[str]) -> None:
    assert find(ast.parse(code)) == signs
    assert set(signs) <= SIGNS.keys()
