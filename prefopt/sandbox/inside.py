"""What runs in the process of one program, after it has confined itself: the program, and the calls asked of it.

Messages are frames of a length and JSON on descriptor 3. Everything that is sent after the program has begun may be
the program's own work: what is read of it decides nothing but which values were answered.
Standard library only, and Python 3.9: the sandbox runs a copy.
"""

from __future__ import annotations

import ast
import builtins
import io
import json
import os
import struct
import sys
from typing import Any

from prefopt.sandbox import signs
from prefopt.sandbox.codec import decode, encode

CHANNEL = 3
TEXT = 200  # characters of an error's message that are passed on


def send(message: Any) -> None:
    body = json.dumps(message).encode()
    left = memoryview(struct.pack("!I", len(body)) + body)
    while left:
        left = left[os.write(CHANNEL, left) :]


def receive() -> Any:
    """The next message; the process ends where the other side has gone."""
    return json.loads(_exactly(struct.unpack("!I", _exactly(4))[0]))


def _exactly(size: int) -> bytes:
    pieces = []
    while size:
        piece = os.read(CHANNEL, min(size, 1 << 20))
        if not piece:
            os._exit(0)
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def run(request: dict[str, Any]) -> None:
    """Do what a request asks; its role is `functions`, `script` or `tests`."""
    {"functions": serve_functions, "script": run_script, "tests": run_tests}[request["role"]](request)


# ---------------------------------------------------------------- programs


def load(source: str, names: dict[str, Any]) -> bool:
    """Run a program's source in `names`, after its signs are sent; False, and why is sent, if that failed."""
    try:
        tree = ast.parse(source, "<program>")
        send(["signs", signs.find(tree)])
        exec(compile(tree, "<program>", "exec"), names)
    except BaseException as error:
        send(["stopped", *_described(error)])
        return False
    return True


def _described(error: BaseException) -> tuple[str, str]:
    try:
        return type(error).__name__, str(error)[:TEXT]
    except BaseException:  # its __str__ is the program's
        return "error", "an exception that cannot be described"


def serve_functions(request: dict[str, Any]) -> None:
    """Load a program that defines functions, then answer calls of them until the other side has gone."""
    names: dict[str, Any] = {"__name__": "program"}
    if not load(request["code"], names):
        return
    send(["loaded"])
    while True:
        name, arguments, named = receive()
        try:
            given = {key: decode(value) for key, value in named}
            answer = ["value", encode(names[name](*map(decode, arguments), **given))]
        except KeyError as error:
            missing = name not in names
            answer = ["error", "NameError", f"the program defines no {name!r}"] if missing else _failed(error)
        except BaseException as error:
            answer = _failed(error)
        send(answer)


def _failed(error: BaseException) -> list[str]:
    return ["error", *_described(error)]


def run_script(request: dict[str, Any]) -> None:
    """Run a program that reads descriptor 0 and writes descriptor 1."""
    sys.stdin = io.TextIOWrapper(open(0, "rb", closefd=False), encoding="utf-8", errors="replace")
    sys.stdout = io.TextIOWrapper(open(1, "wb", closefd=False), encoding="utf-8")
    try:
        tree = ast.parse(request["code"], "<program>")
        send(["signs", signs.find(tree)])
        exec(compile(tree, "<program>", "exec"), {"__name__": "__main__"})
        ended = ["finished"]
    except SystemExit as error:
        ended = ["finished"] if error.code in (None, 0) else ["stopped", "SystemExit", str(error.code)[:TEXT]]
    except BaseException as error:
        ended = ["stopped", *_described(error)]
    sys.stdout.flush()
    send(ended)


# ---------------------------------------------------------------- tests of another process's functions


class Counter:
    """How many asserts held and failed, and the first failure."""

    def __init__(self) -> None:
        self.passed, self.failed, self.why = 0, 0, ""

    def hold(self) -> None:
        self.passed += 1

    def fail(self, line: int, error: BaseException | None = None) -> None:
        self.failed += 1
        text = "assert failed" if error is None else ": ".join(part for part in _described(error) if part)
        self.why = self.why or f"line {line}: {text}"[:TEXT]


class Counted(ast.NodeTransformer):
    """Makes an assert count instead of stopping, but inside `try` and `with`, which may want its exception.

    assert X  ->  try: _asserts.hold() if X else _asserts.fail(line); except Exception as e: _asserts.fail(line, e)
    """

    def visit_Try(self, node: ast.Try) -> ast.AST:
        return node

    def visit_With(self, node: ast.With) -> ast.AST:
        return node

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        template = f"""
try:
    _asserts.hold() if CONDITION else _asserts.fail({node.lineno})
except Exception as _error:
    _asserts.fail({node.lineno}, _error)
"""
        statement = ast.parse(template).body[0]
        statement.body[0].value.test = node.test  # type: ignore[attr-defined]
        return ast.fix_missing_locations(ast.copy_location(statement, node))


def run_tests(request: dict[str, Any]) -> None:
    """Run tests whose `names` are functions of another process, and say how many asserts held.

    `before` is run first, with its own definitions; `check` is the function of the tests that takes the first name,
    or "" where the tests are statements.
    """
    send(["signs", []])
    asserts = Counter()
    proxies = {name: _proxy(name) for name in request["names"]}
    names: dict[str, Any] = {"__name__": "tests", "_asserts": asserts}
    try:
        exec(compile(request["before"], "<before>", "exec"), names)
        names.update(proxies)
        tree = Counted().visit(ast.parse(request["tests"], "<tests>"))
        exec(compile(ast.fix_missing_locations(tree), "<tests>", "exec"), names)
        if request["check"]:
            names[request["check"]](proxies[request["names"][0]])
    except BaseException as error:
        asserts.fail(0, error)
    send(["done", asserts.passed, asserts.failed, asserts.why])


def _proxy(name: str) -> Any:
    def call(*arguments: Any, **named: Any) -> Any:
        given = [[key, encode(value)] for key, value in named.items()]
        send(["call", name, [encode(argument) for argument in arguments], given])
        answer = receive()
        if answer[0] == "value":
            return decode(answer[1])
        kind = getattr(builtins, answer[1], None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            raise kind(answer[2])
        raise RuntimeError(f"{answer[1]}: {answer[2]}")

    call.__name__ = name
    return call
