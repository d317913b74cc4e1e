"""Programs with what is expected of them, and the verdict: made here, where no program runs.

Expected answers stay on this side. A program is given inputs only, and earns nothing by its exit code, by what it
prints where its answers are judged, or by messages of its own.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from prefopt.sandbox import codec, signs
from prefopt.sandbox.process import End, Irregular, Run, SandboxError, Zygote, plain

GONE = ("gone", "left")  # it is not there any more; left: while it was loaded
SOURCE_BYTES = 1 << 20  # of a program; longer ones are not run


class Outcome(StrEnum):
    """How a program fared.

    passed: every test. failed: a test, or an exception. timeout: its seconds or its processor time. memory: it ran out
    of memory. killed: by a signal, such as a segmentation fault. protocol: it sent something else than answers.
    infra_error: the sandbox failed or was out of time, or the tests check nothing; says nothing about the program.
    """

    PASSED = "passed"
    FAILED = "failed"
    TIMEOUT = "timeout"
    MEMORY = "memory"
    KILLED = "killed"
    PROTOCOL = "protocol"
    INFRA_ERROR = "infra_error"


@dataclass(frozen=True)
class Call:
    """A call of one of a program's functions and the value it must return, by Python's == on plain values."""

    function: str
    arguments: Sequence[Any]
    expected: Any
    named: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Calls:
    """A program that defines functions; its tests are calls, all in one process, in their order.

    tuples_as_lists: expected values come from JSON, which has lists only: a tuple answers for a list. given: what of
    the source the program was given.
    """

    code: str
    calls: Sequence[Call]
    tuples_as_lists: bool = False
    given: str = ""


@dataclass(frozen=True)
class Script:
    """A program that reads standard input and prints: one process for each test.

    Output is compared line by line, without space at the ends of lines and without empty lines at the end.
    """

    code: str
    inputs: Sequence[str]
    outputs: Sequence[str]


@dataclass(frozen=True)
class Asserts:
    """A program that defines functions; its tests are code that runs in a process of its own and calls them.

    tests: source with asserts; each that runs is one test, however often it runs. Where none can, one test is that
    `check` ends without an exception. names: the functions of the program that they call.
    check: the function of `tests` that is given the first of names, "" where the asserts stand at the top. before:
    source with definitions that the tests use, run before them.
    """

    code: str
    tests: str
    names: Sequence[str]
    check: str = ""
    before: str = ""


Program = Calls | Script | Asserts


@dataclass(frozen=True)
class Verdict:
    """passed of total tests held. why: the first thing that went wrong, "" if nothing did. signs: see `signs.SIGNS`.

    cpu_seconds: processor time of all its processes. total is 0 where tests could not be counted.
    """

    outcome: Outcome
    passed: int
    total: int
    why: str = ""
    signs: tuple[str, ...] = ()
    cpu_seconds: float = 0.0


@dataclass
class Tally:
    """What is known of a program so far."""

    total: int
    passed: int = 0
    why: str = ""
    outcome: Outcome = Outcome.PASSED
    signs: set[str] = field(default_factory=set)
    cpu: float = 0.0

    def fail(self, why: str, outcome: Outcome = Outcome.FAILED) -> None:
        """The first reason and the first outcome that is more than a failed test are kept."""
        self.why = self.why or plain(why)
        if self.outcome in (Outcome.PASSED, Outcome.FAILED):
            self.outcome = outcome

    def verdict(self) -> Verdict:
        signs_ = tuple(sorted(self.signs))
        return Verdict(self.outcome, self.passed, self.total, self.why, signs_, round(self.cpu, 4))


def judge(zygote: Zygote, program: Program, until: float) -> Verdict:
    """Run a program and say how it fared. until: by the clock (time.monotonic), for all of it.

    SandboxError if the sandbox fails, or if `until` passes before the program's own seconds do.
    """
    if len(program.code.encode("utf-8", "replace")) > SOURCE_BYTES:
        return Verdict(Outcome.FAILED, 0, _total(program), f"a source of more than {SOURCE_BYTES} bytes is not run")
    tally = Tally(_total(program))
    if isinstance(program, Calls):
        _calls(zygote, program, until, tally)
    elif isinstance(program, Script):
        _script(zygote, program, until, tally)
    else:
        _tests(zygote, program, until, tally)
    return tally.verdict()


def _total(program: Program) -> int:
    return len(program.calls) if isinstance(program, Calls) else len(getattr(program, "inputs", ()))


@contextlib.contextmanager
def _process(zygote: Zygote, request: dict[str, Any], until: float, tally: Tally, **files: int) -> Iterator[Run]:
    """A process that runs a request; what it does instead of answering becomes the tally's outcome."""
    run = zygote.run(**files)
    patience = 0.0
    problem: Irregular | None = None
    try:
        if run.begin(request, until) >= until:
            problem = Irregular("late", "the time of the whole batch was up")
        yield run
        problem = None
    except Irregular as found:
        if found.outcome != "timeout" or problem is None:
            problem = found
        patience = 0.1 if found.outcome in GONE else 0.0
    finally:
        end = run.stop(patience)
        tally.cpu += end.cpu
    if problem is not None:
        if problem.outcome == "late":
            raise SandboxError(str(problem))
        why, outcome = _reason(problem, end, zygote)
        tally.fail(why, outcome)
        tally.signs |= {"ended_loading"} if (problem.outcome, outcome) == ("left", Outcome.FAILED) else set()


def _reason(problem: Irregular, end: End, zygote: Zygote) -> tuple[str, Outcome]:
    """Why a process did not answer, from how it ended."""
    if _out_of_time(end, zygote.limits.cpu_seconds):
        return f"it used {zygote.limits.cpu_seconds} seconds of processor time", Outcome.TIMEOUT
    if problem.outcome == "timeout":
        return f"it took longer than {zygote.seconds:g} seconds", Outcome.TIMEOUT
    if problem.outcome == "protocol":
        return str(problem), Outcome.PROTOCOL
    if end.stopped:
        return "it closed its channel", Outcome.PROTOCOL
    if end.signal:
        return f"it was killed by signal {end.signal}", Outcome.KILLED
    return str(problem), Outcome.FAILED


def _out_of_time(end: End, cpu_seconds: int) -> bool:
    """Whether a process used up its processor time.

    The kernel enforces the limit by its ticks, which on a busy machine run ahead of the time that it reports: whoever
    died of SIGKILL that nobody here sent, past half the limit, ran into it.
    """
    killed = end.signal == signal.SIGKILL and not end.stopped
    return end.cpu >= (cpu_seconds / 2 if killed else cpu_seconds - 0.05)


def _expect(run: Run, *words: str) -> list[Any]:
    """The next message, which must begin with one of the words."""
    message = run.receive()
    sizes = {"signs": 2, "loaded": 1, "finished": 1, "value": 2, "call": 4, "done": 4}
    if message[0] not in words or len(message) != sizes.get(message[0], 3):
        raise Irregular("protocol", f"it sent {plain(message[0])!r} where {' or '.join(words)} was due")
    return message


def _error(tally: Tally, message: list[Any], where: str) -> None:
    """Count an exception that a program reports; its text is the program's."""
    kind, text = plain(message[1]), plain(message[2])
    memory = kind == "MemoryError"
    tally.fail(f"{where}: {kind}{': ' if text else ''}{text}", Outcome.MEMORY if memory else Outcome.FAILED)


# ---------------------------------------------------------------- calls


def _calls(zygote: Zygote, program: Calls, until: float, tally: Tally) -> None:
    try:
        expected = [codec.encode(call.expected) for call in program.calls]
        given = [_encoded(call.arguments, call.named) for call in program.calls]
    except codec.Unsendable as error:
        raise SandboxError(f"the tests: {error}") from None
    tally.signs |= _hard_coded(program)
    with _process(zygote, {"role": "functions", "code": program.code}, until, tally) as run:
        if not _loaded(run, tally):
            return
        for number, (call, sent, right) in enumerate(zip(program.calls, given, expected, strict=True), 1):
            message = _call(run, call.function, *sent)
            if message[0] == "error":
                _error(tally, message, f"test {number}")
            elif _equal(message[1], right, program.tuples_as_lists):
                tally.passed += 1
            else:
                tally.fail(f"test {number}: a wrong answer")


def _loaded(run: Run, tally: Tally) -> bool:
    """Whether the program's source has run to its end."""
    try:
        message = _expect(run, "signs", "stopped")
        if message[0] == "signs":
            tally.signs |= set(map(plain, message[1])) & signs.SIGNS.keys()
            message = _expect(run, "loaded", "stopped")
    except Irregular as problem:
        raise Irregular("left" if problem.outcome == "gone" else problem.outcome, str(problem)) from None
    if message[0] == "stopped":
        tally.signs |= {"ended_loading"} if message[1] == "SystemExit" else set()
        _error(tally, message, "while it was loaded")
    return message[0] == "loaded"


def _encoded(arguments: Sequence[Any], named: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
    return [codec.encode(argument) for argument in arguments], [[key, codec.encode(v)] for key, v in named.items()]


def _call(run: Run, function: str, arguments: list[Any], named: list[Any]) -> list[Any]:
    """A function's answer: `value` and a checked tree, or `error`, its type and its text."""
    run.send([function, arguments, named])
    message = _expect(run, "value", "error")
    if message[0] == "value":
        try:
            codec.check(message[1])
        except ValueError as error:
            raise Irregular("protocol", f"it sent what is no value: {plain(error)}") from None
    elif not isinstance(message[1], str) or not isinstance(message[2], str):
        raise Irregular("protocol", "it sent an error that is not text")
    return message


def _equal(answer: Any, expected: Any, tuples_as_lists: bool) -> bool:
    if tuples_as_lists:
        answer, expected = _without_tuples(answer), _without_tuples(expected)
    return codec.same(answer, expected)


def _without_tuples(tree: Any) -> Any:
    """A tree with tuples as lists, outside of sets and keys, where there are no lists."""
    if not isinstance(tree, list) or tree[0] not in ("l", "t", "d"):
        return tree
    if tree[0] == "d":
        return ["d", *([key, _without_tuples(value)] for key, value in tree[1:])]
    return ["l", *map(_without_tuples, tree[1:])]


def _hard_coded(program: Calls) -> set[str]:
    """Whether at least two, and half, of the distinctive expected values stand in what the program wrote itself."""
    own = program.code.replace(program.given, "") if program.given else program.code
    source = "".join(own.split()).replace('"', "'")
    expected = {"".join(repr(call.expected).split()).replace('"', "'") for call in program.calls}
    distinctive = {text for text in expected if len(text) > 4 and text not in ("False",)}
    found = sum(text in source for text in distinctive)
    return {"hard_coded"} if found >= 2 and 2 * found >= len(distinctive) else set()


# ---------------------------------------------------------------- scripts


def _script(zygote: Zygote, program: Script, until: float, tally: Tally) -> None:
    for number, (given, right) in enumerate(zip(program.inputs, program.outputs, strict=True), 1):
        before = tally.outcome
        printed = _printed(zygote, program.code, given, until, tally)
        if printed is not None and _lines(printed) == _lines(right):
            tally.passed += 1
        elif printed is not None:
            tally.fail(f"test {number}: a wrong output")
        elif tally.outcome not in (before, Outcome.FAILED):
            return  # the others would most likely wait for the same limit


def _printed(zygote: Zygote, code: str, given: str, until: float, tally: Tally) -> str | None:
    """What a program prints, if it ends by itself and without an error."""
    with _file(given.encode("utf-8", "replace")) as stdin, _file(b"") as stdout:
        finished = False
        with _process(zygote, {"role": "script", "code": code}, until, tally, stdin=stdin, stdout=stdout) as run:
            finished = _finished(run, tally)
        if not finished:
            return None
        return os.pread(stdout, zygote.limits.output_bytes, 0).decode("utf-8", "replace")


def _finished(run: Run, tally: Tally) -> bool:
    message = _expect(run, "signs", "stopped")
    if message[0] == "signs":
        tally.signs |= set(map(plain, message[1])) & signs.SIGNS.keys()
        message = _expect(run, "finished", "stopped")
    if message[0] == "stopped":
        _error(tally, message, "while it ran")
    return message[0] == "finished"


@contextlib.contextmanager
def _file(content: bytes) -> Iterator[int]:
    """A descriptor of a file in memory, to be read from its start."""
    descriptor = os.memfd_create("program")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


# ---------------------------------------------------------------- tests in a process of their own


def _tests(zygote: Zygote, program: Asserts, until: float, tally: Tally) -> None:
    request: dict[str, Any] = {"role": "tests", "tests": program.tests, "before": program.before}
    request |= {"names": list(program.names), "check": program.check}
    with _process(zygote, {"role": "functions", "code": program.code}, until, tally) as candidate:
        if not _loaded(candidate, tally):
            return
        _test(zygote, request, candidate, until, tally)


def _test(zygote: Zygote, request: dict[str, Any], candidate: Run, until: float, tally: Tally) -> None:
    """Let the tests of one process call the functions of another. Irregular: what the candidate did."""
    tester_tally, trouble = Tally(0), None
    with _process(zygote, request, until, tester_tally) as tester:
        _expect(tester, "signs")
        while (message := _expect(tester, "call", "done"))[0] == "call":
            try:
                answer = _call(candidate, *message[1:])
            except Irregular as problem:
                trouble = problem
                break
            tester.until = max(tester.until, candidate.until)
            tester.send(answer)
        else:
            tally.passed, failed, why = message[1:]
            tally.total = tally.passed + failed
            if failed:
                tally.fail(why)
            elif not tally.total:
                tally.fail(why, Outcome.INFRA_ERROR)
    tally.cpu += tester_tally.cpu
    if trouble is not None:
        raise trouble
    if tester_tally.outcome is not Outcome.PASSED:
        tally.fail(f"the tests: {tester_tally.why}", tester_tally.outcome)
