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
    """Which asserts held every time that they ran, by their place in the source, and the first failure.

    asked: calls of the program. entered: by place, runs of asserts in `try` that did not hold. ended: 1 if an exception
    ended the tests.
    """

    def __init__(self) -> None:
        self.held: set[tuple[int, ...]] = set()
        self.failed: set[tuple[int, ...]] = set()
        self.entered: dict[tuple[int, ...], int] = {}
        self.asked, self.ended, self.why = 0, 0, ""

    def hold(self, *place: int) -> None:
        self.held.add(place)

    def fail(self, line: int, column: int, error: BaseException | None = None) -> None:
        self.failed.add((line, column))
        self.note(line, error)

    def enter(self, *place: int) -> None:
        self.entered[place] = self.entered.get(place, 0) + 1

    def leave(self, *place: int) -> None:
        self.entered[place] -= 1
        self.hold(*place)

    def end(self, error: BaseException) -> None:
        self.ended = 1
        self.note(0, error)

    def note(self, line: int, error: BaseException | None) -> None:
        text = "assert failed" if error is None else ": ".join(part for part in _described(error) if part)
        self.why = self.why or f"line {line}: {text}"[:TEXT]

    def counts(self, kind: str) -> tuple[int, int, str]:
        """Tests that held, tests that failed and why; none at all where nothing was tested. kind: see `kind_of`."""
        failed = len(self.failed) + self.ended
        raised = {place for place, times in self.entered.items() if times}
        held = self.held - self.failed - raised
        if failed or held:
            return len(held), failed, self.why
        if kind == "asserts" or raised:
            return 0, 1, "an assert failed where the tests drop its error" if raised else "none of the asserts ran"
        if kind == "nothing" or not self.asked:
            return 0, 0, "the tests check nothing: no assert and no exception that they raise can fail"
        return 1, 0, ""


class Counted(ast.NodeTransformer):
    """Makes an assert count instead of stopping; inside `try` and `with`, which may want its exception, it does both.

    assert X  ->  try: _asserts.hold(place) if X else _asserts.fail(place)
                  except Exception as e: _asserts.fail(place, e)
    inside `try`  ->  _asserts.enter(place); assert X; _asserts.leave(place)
    """

    inside = 0

    def _within(self, node: Any) -> ast.AST:
        self.inside += 1
        self.generic_visit(node)
        self.inside -= 1
        return node

    visit_Try = visit_TryStar = visit_With = visit_AsyncWith = _within

    def visit_Assert(self, node: ast.Assert) -> Any:
        place = f"{node.lineno}, {node.col_offset}"
        if self.inside and _always_fails(node):
            return node
        if self.inside:
            around = ast.parse(f"_asserts.enter({place}); _asserts.leave({place})").body
            return [ast.fix_missing_locations(ast.copy_location(s, node)) for s in (around[0], node, around[1])]
        template = f"""
try:
    _asserts.hold({place}) if CONDITION else _asserts.fail({place})
except Exception as _error:
    _asserts.fail({place}, _error)
"""
        statement: Any = ast.parse(template).body[0]
        statement.body[0].value.test = node.test
        return ast.fix_missing_locations(ast.copy_location(statement, node))


def _always_fails(node: ast.Assert) -> bool:
    """`assert False`, which says that this place should not be reached."""
    return isinstance(node.test, ast.Constant) and not node.test.value


def kind_of(tree: ast.Module, check: str) -> str:
    """How tests tell a wrong program: `asserts` that must run, `exceptions`, or `nothing`.

    Asserts in `try` and in functions that may not be called need not run. A call of `check` that ends without an
    exception is a test, as are statements that can raise one.
    """
    bodies = [node.body for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == check]
    todo: list[ast.AST] = list(bodies[-1] if bodies else tree.body)
    apart = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.Try, ast.With)
    raises = bool(bodies)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Assert) and not _always_fails(node):
            return "asserts"
        raises = raises or isinstance(node, (ast.Raise, ast.Assert, ast.Try, ast.With))
        todo += [] if isinstance(node, apart) else ast.iter_child_nodes(node)
    return "exceptions" if raises else "nothing"


def run_tests(request: dict[str, Any]) -> None:
    """Run tests whose `names` are functions of another process, and say how many tests held.

    `before` is run first, with its own definitions; `check` is the function of the tests that takes the first name,
    or "" where the tests are statements.
    """
    send(["signs", []])
    asserts, kind = Counter(), "nothing"
    proxies = {name: _proxy(name, asserts) for name in request["names"]}
    names: dict[str, Any] = {"__name__": "tests", "_asserts": asserts}
    try:
        exec(compile(request["before"], "<before>", "exec"), names)
        names.update(proxies)
        tree = ast.parse(request["tests"], "<tests>")
        kind = kind_of(tree, request["check"])
        tree = Counted().visit(tree)
        exec(compile(ast.fix_missing_locations(tree), "<tests>", "exec"), names)
        if request["check"]:
            names[request["check"]](proxies[request["names"][0]])
    except BaseException as error:
        asserts.end(error)
    send(["done", *asserts.counts(kind)])


def _proxy(name: str, asserts: Counter) -> Any:
    def call(*arguments: Any, **named: Any) -> Any:
        asserts.asked += 1
        given = [[key, encode(value)] for key, value in named.items()]
        send(["call", name, [encode(argument) for argument in arguments], given])
        answer = receive()
        if answer[0] == "value":
            return decode(answer[1])
        kind = getattr(builtins, answer[1], None)
        # the end of an iteration would end all(map(f, ..)) and zip(map(f, ..), ..) as if every value had been right
        ends = (StopIteration, StopAsyncIteration)
        if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, ends):
            raise kind(answer[2])
        raise RuntimeError(f"{answer[1]}: {answer[2]}")

    call.__name__ = name
    return call
