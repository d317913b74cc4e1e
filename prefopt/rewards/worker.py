"""The process that a reward's function runs in. It may be killed at any moment, whatever the function does.

Started by `prefopt.rewards.pool` as `python -m prefopt.rewards.worker SOCKET PARENT`, never as a fork of the trainer:
it holds none of the trainer's memory, locks or devices.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib.util
import inspect
import itertools
import json
import logging
import os
import pickle
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prefopt import streams
from prefopt.rewards.channel import HEADER, HELLO, LENGTH, RAISED, frame, number, short, shortened

PR_SET_PDEATHSIG = 1


def main() -> None:
    descriptor, parent = map(int, sys.argv[1:3])
    die_with(parent)
    connection = socket.socket(fileno=descriptor)
    connection.set_inheritable(False)
    # what the function prints goes where the trainer's errors go, and never into the protocol
    os.dup2(2, 1)
    # a trainer whose terminal or reader has gone: a function that prints must not fail for it
    sys.stdout, sys.stderr = streams.output(), streams.errors()
    own = os.getpid()
    _, content = receive(connection)
    hello = pickle.loads(content)
    sys.path[:] = hello["path"]
    limit_memory(hello["memory"])
    try:
        function = load(hello["function"])
        reply: dict[str, Any] = {"ready": True}
    except Unusable as error:  # what is wrong is said; where it is in this file is nothing to a user
        reply = {"failed": [RAISED, str(error), ""]}
    except BaseException as error:
        reply = failure(error)
    send(connection, own, HELLO, reply)
    if "failed" in reply:
        return
    with asyncio.Runner() as runner:
        while True:
            job, content = receive(connection)
            send(connection, own, job, answer(function, pickle.loads(content), runner))


def die_with(parent: int) -> None:
    """End with the trainer, even where that is killed with SIGKILL and this process is busy."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        # where memory runs out, the system should take this process and not the trainer
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    if os.getppid() != parent:
        os._exit(1)


def limit_memory(size: int | None) -> None:
    """At most so many bytes of data: more is a MemoryError. Address space is left free, which GPU libraries reserve."""
    if size is not None:
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        size = size if hard == resource.RLIM_INFINITY else min(size, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (size, hard))


def receive(connection: socket.socket) -> tuple[int, bytes]:
    """The next message's number and content. The process ends where the trainer has gone."""
    size, job = HEADER.unpack(_exactly(connection, HEADER.size))
    return job, _exactly(connection, size)


def _exactly(connection: socket.socket, size: int) -> bytes:
    got = bytearray()
    while len(got) < size:
        part = connection.recv(min(size - len(got), 1 << 20))
        if not part:
            os._exit(0)
        got += part
    return bytes(got)


def send(connection: socket.socket, own: int, job: int, reply: Mapping[str, Any]) -> None:
    # a function that forks and returns in the child must not answer twice
    if os.getpid() != own:
        os._exit(1)
    connection.sendall(frame(job, json.dumps(reply, allow_nan=False).encode("ascii")))


class Unusable(Exception):
    """What was named is no function."""


def load(what: tuple[str, ...] | bytes) -> Callable[..., Any]:
    """The function: a pickle, or ("file", path, name). Unusable where it is none, or is not in that file."""
    function: Any
    # it warns that its own time limits are off: here the process has one
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    if isinstance(what, bytes):
        function = pickle.loads(what)
    else:
        _, path, name = what
        module = _module(Path(path))
        function = getattr(module, name, None)
        if not callable(function):
            found = f"{name!r} is {short(function)}" if hasattr(module, name) else f"there is no {name!r}"
            raise Unusable(f"{found} in {path}; its functions: {', '.join(_functions(module)) or 'none'}")
    if not callable(function):
        raise Unusable(f"{short(function)} is not a function")
    return function


def _functions(module: Any) -> list[str]:
    """Those that are written in a module itself."""
    own = [(name, value) for name, value in vars(module).items() if not name.startswith("_") and callable(value)]
    return [name for name, value in own if getattr(value, "__module__", None) == module.__name__]


def _module(path: Path) -> Any:
    # as for a script: a file may import its neighbours
    sys.path.insert(0, str(path.parent))
    # a file may have the name of a module that is needed here, such as json.py
    name = f"reward_{path.stem}" if path.stem in sys.modules else path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def answer(function: Callable[..., Any], job: Mapping[str, Any], runner: asyncio.Runner) -> dict[str, Any]:
    """The reply for a job: a number or a reason for each of its samples, or why there is none."""
    extra: dict[str, list[Any]] = {}
    metrics: dict[str, list[float]] = {}
    size = len(job["completions"])
    try:
        returned = function(**arguments(function, job, extra, metrics))
        if inspect.isawaitable(returned):
            returned = runner.run(_awaited(returned))
        values = values_of(returned, size)
        if isinstance(values, str):
            return {"failed": [LENGTH, values, ""]}
        scores = [number(value) for value in values]
    except BaseException as error:
        return failure(error)
    return {"scores": scores, "extra": extra, "metrics": metrics}


async def _awaited(returned: Any) -> Any:
    return await returned


def arguments(
    function: Callable[..., Any], job: Mapping[str, Any], extra: dict[str, list[Any]], metrics: dict[str, list[float]]
) -> dict[str, Any]:
    """What TRL 1.16 passes to a reward function, by keyword, less what the function has no parameter for."""

    def log_extra(column: str, values: Iterable[Any]) -> None:
        extra.setdefault(str(column), []).extend(_plain(value) for value in values)

    def log_metric(name: str, value: Any) -> None:
        found, why = number(value)
        if found is None:
            raise ValueError(f"log_metric({name!r}): {why}")
        metrics.setdefault(str(name), []).append(found)

    given = {
        **job["columns"],
        "prompts": job["prompts"],
        "completions": job["completions"],
        "completion_ids": job["completion_ids"],
        "trainer_state": SimpleNamespace(**job["state"]),
        "log_extra": log_extra,
        "log_metric": log_metric,
    }
    return {name: value for name, value in given.items() if takes(function, name)}


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether `name` can be passed by keyword."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a built-in one
        return True
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return True
    return name in parameters and parameters[name].kind in (
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    )


def values_of(returned: Any, size: int) -> Sequence[Any] | str:
    """One value for each of `size` completions, or what is wrong with what was returned."""
    if isinstance(returned, (str, bytes, Mapping)) or not isinstance(returned, Iterable):
        return f"returned {short(returned)}, not a list with a number for each of {size} completions"
    # one more than needed tells that there are too many, and an endless generator ends
    values = list(itertools.islice(returned, size + 1))
    if len(values) != size:
        many = f"more than {size}" if len(values) > size else str(len(values))
        return f"returned {many} values for {size} completions"
    return values


def _plain(value: Any) -> Any:
    """As JSON has it: text where it has no such value."""
    found, _ = number(value) if not isinstance(value, bool) else (None, "")
    return value if value is None or isinstance(value, (bool, str)) else short(value) if found is None else found


def failure(error: BaseException) -> dict[str, Any]:
    """The reply in place of an answer; the traceback begins in the function's own code."""
    own = error.__traceback__ and error.__traceback__.tb_next
    return {"failed": [RAISED, described(error), shortened(traceback.format_exception(type(error), error, own))]}


def described(error: BaseException) -> str:
    try:
        return f"raised {type(error).__name__}: {error}"[:300]
    except Exception:
        return f"raised {type(error).__name__}"


if __name__ == "__main__":
    main()
