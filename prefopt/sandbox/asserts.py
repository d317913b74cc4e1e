"""Tests written as asserts, made into what a sandbox can judge: calls with expected values where all of them are
`assert f(arguments) == value`, else code that runs in a process of its own."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import functools
import sys
from collections.abc import Sequence

from prefopt.sandbox import codec
from prefopt.sandbox.programs import Asserts, Call, Calls

UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError)


def program(code: str, tests: str, entry: str = "", before: str = "") -> Calls | Asserts:
    """A program with tests: asserts, or a function `check` that takes the function named `entry`.

    before: source with definitions that the tests use; of the program's own only functions that tests call are there
    for them. ValueError if the tests are no Python or call nothing that the program could define.
    """
    return dataclasses.replace(_plan(tests, entry, before), code=code)


@functools.lru_cache(4096)
def _plan(tests: str, entry: str, before: str) -> Calls | Asserts:
    """The tests of a program without its source."""
    try:
        tree = ast.parse(tests)
    except UNREADABLE as error:
        raise ValueError(f"tests that are no Python: {error}") from None
    check = next((node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "check"), None)
    body = check.body if check is not None and entry else tree.body
    alias = {check.args.args[0].arg: entry} if check is not None and entry and check.args.args else {}
    if not before.strip() or alias:
        calls = [_call(statement, alias) for statement in body if not _idle(statement)]
        if calls and None not in calls:
            return Calls("", [call for call in calls if call is not None], given=before)
    names = [entry] if entry else free_names(tree, before)
    if not names:
        raise ValueError("tests that call no function of the program")
    return Asserts("", _imports(tree) + tests, names, "check" if alias else "", before)


def _idle(statement: ast.stmt) -> bool:
    """A statement that tests nothing: a docstring, a constant that holds, `assert True`, a name for later."""
    if isinstance(statement, ast.Assert):
        return isinstance(statement.test, ast.Constant) and bool(statement.test.value)
    if isinstance(statement, ast.Assign):
        return isinstance(statement.value, (ast.Constant, ast.Dict))
    return isinstance(statement, ast.Pass) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    )


def _call(statement: ast.stmt, alias: dict[str, str]) -> Call | None:
    """`assert f(arguments) == value`, or the other way round, of literals; None for anything else."""
    test = statement.test if isinstance(statement, ast.Assert) else None
    if not isinstance(test, ast.Compare) or len(test.ops) != 1 or not isinstance(test.ops[0], ast.Eq):
        return None
    left, right = test.left, test.comparators[0]
    call, value = (left, right) if isinstance(left, ast.Call) else (right, left)
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        return None
    if hasattr(builtins, call.func.id):
        return None
    try:
        arguments = [ast.literal_eval(argument) for argument in call.args]
        named = {keyword.arg or "": ast.literal_eval(keyword.value) for keyword in call.keywords}
        expected = ast.literal_eval(value)
        codec.encode([arguments, list(named.values()), expected])
    except (*UNREADABLE, TypeError):
        return None
    return None if "" in named else Call(alias.get(call.func.id, call.func.id), arguments, expected, named)


def free_names(tree: ast.AST, before: str = "") -> list[str]:
    """Names that tests call and neither they nor `before` define, in the order of their appearance."""
    try:
        defined = _defined(tree) | _defined(ast.parse(before))
    except UNREADABLE:
        defined = _defined(tree)
    called = [node.func.id for node in _walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    return [name for name in dict.fromkeys(called) if name not in defined and not hasattr(builtins, name)]


def _walk(tree: ast.AST) -> Sequence[ast.AST]:
    return sorted(ast.walk(tree), key=lambda node: (getattr(node, "lineno", 0), getattr(node, "col_offset", 0)))


def _defined(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return found


def _imports(tree: ast.AST) -> str:
    """Imports of the standard library's modules that tests use without importing them: in one process with the program
    they would have found the program's."""
    owners = [node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    used = [owner.id for owner in owners if isinstance(owner, ast.Name)]
    missing = [name for name in dict.fromkeys(used) if name in sys.stdlib_module_names and name not in _defined(tree)]
    return "".join(f"import {name}; " for name in missing) + ("\n" if missing else "")
