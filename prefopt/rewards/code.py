"""Code: the program in the completion passes the row's tests, in the sandbox."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prefopt.records import InputError, Sample, Score
from prefopt.rewards.channel import VALUE
from prefopt.rewards.function import Failures
from prefopt.sandbox import Call, Calls, Limits, Outcome, Program, Sandbox, Script, Verdict, asserts, codec

LANGUAGES = {"python", "python3", "py"}
# columns in which a row may keep its own solution, the first that is there
SOLUTIONS = ("canonical_solution", "reference_solution", "code")
# columns that name the function that tests call
ENTRIES = ("entry_point", "fn_name", "function")


@dataclass(frozen=True)
class Task:
    """What a row asks of a program: `make` gives a source its tests. entry: the function it must define, "" if none is
    named. start: source that the completion continues, such as the head of the function. solution: the row's own
    completion, None without one.
    """

    make: Callable[[str], Program]
    entry: str = ""
    start: str = ""
    solution: str | None = None


class CodeReward:
    """1 where the program in the completion passes all of the row's tests, else 0; or the share that it passes.

    The program is the last block between fences that names Python, else the last that names no language, of those that
    define the function that the tests call if any do; a completion without a block is a program as a whole. Where the
    prompt is Python, it stands before the program: a block may continue it or define the function anew.
    Tests are taken from the columns `test` and `entry_point` (HumanEval), `test_list` (MBPP), `inputs` and `outputs`,
    or `input_output` (a JSON text of both): values for a named function, or text for a program that reads and prints.
    None where the sandbox failed or was out of time, a row has no tests or tests that check nothing, or the row's own
    solution does not pass them.
    """

    name = "code"

    def __init__(
        self,
        credit: Literal["all", "share"] = "all",
        sandbox: str = "best",
        limits: Limits | None = None,
        seconds: float = 60.0,
        workers: int = 0,
        packages: Sequence[str] = (),
    ) -> None:
        """credit: for all tests or none, or for the share that passes. sandbox: its level. limits: of one program.
        seconds: of a batch. workers: programs at once, 0 takes one for each processor. packages: what programs may
        import beside the standard library.

        InputError if this machine cannot enforce the level.
        """
        if credit not in ("all", "share"):
            raise InputError(f"code: credit must be all or share, got {credit!r}")
        self.credit, self.seconds, self.failures = credit, seconds, Failures()
        self.sandbox = Sandbox(sandbox, limits, workers, packages)
        self.unsound: dict[str, str] = {}  # row -> why its own solution does not pass, "" where it does

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        tasks = [_task_or_why(sample) for sample in samples]
        keys = [_key(sample) for sample in samples]
        checks = {
            key: task.make(source(task, task.solution))
            for key, task in zip(keys, tasks, strict=True)
            if isinstance(task, Task) and task.solution is not None and key not in self.unsound
        }
        written = [
            task.make(source(task, sample.text)) if isinstance(task, Task) else None
            for task, sample in zip(tasks, samples, strict=True)
        ]
        programs = [*checks.values(), *(program for program in written if program is not None)]
        verdicts = iter(self.sandbox.judge(programs, self.seconds))
        for key in checks:
            self._note_solution(key, next(verdicts))
        scores = []
        for sample, key, task in zip(samples, keys, tasks, strict=True):
            scores.append(self._score(next(verdicts), key) if isinstance(task, Task) else Score(None, task))
            self._count(sample, scores[-1])
        return scores

    def close(self) -> None:
        self.sandbox.close()

    @property
    def counts(self) -> Counter[str]:
        return self.failures.counts

    def check(self, rows: Sequence[Mapping[str, Any]]) -> dict[int, str]:
        """The rows that cannot be scored, by their position, and why: no tests, or an own solution that fails them."""
        samples = [Sample(row.get("prompt", ""), "", columns=row) for row in rows]
        found = {n: why for n, sample in enumerate(samples) if isinstance(why := _task_or_why(sample), str)}
        sound = [n for n in range(len(rows)) if n not in found]
        scores = self([samples[n] for n in sound])
        return found | {n: score.why for n, score in zip(sound, scores, strict=True) if score.value is None}

    def _note_solution(self, key: str, verdict: Verdict) -> None:
        if verdict.outcome is not Outcome.INFRA_ERROR:
            passed = verdict.outcome is Outcome.PASSED
            self.unsound[key] = "" if passed else f"the row's own solution does not pass its tests: {verdict.why}"

    def _score(self, verdict: Verdict, key: str) -> Score:
        if problem := self.unsound.get(key):
            return Score(None, problem)
        if verdict.outcome is Outcome.INFRA_ERROR:
            return Score(None, f"{verdict.outcome}: {verdict.why}")
        share = verdict.passed / verdict.total if verdict.total else 0.0
        passed = verdict.outcome is Outcome.PASSED
        why = "" if passed else f"{verdict.outcome}: {verdict.why}"
        signs = f"signs: {', '.join(verdict.signs)}" if verdict.signs else ""
        parts = {"tests_passed": share if verdict.total else None, "signs": float(len(verdict.signs))}
        value = share if self.credit == "share" else float(passed)
        return Score(value, "; ".join(part for part in (why, signs) if part), parts)

    def _count(self, sample: Sample, score: Score) -> None:
        if score.value is None:
            self.failures.note(self.name, VALUE, sample, score.why)
        else:
            self.counts["scored"] += 1


# ---------------------------------------------------------------- the program in a completion


def source(task: Task, text: str) -> str:
    """The program that a completion stands for: its code after the start that the row gives."""
    code = extract(text, task.entry)
    if not task.start:
        return code
    return f"{task.start}\n{code}" if defines(code, task.entry) else task.start + code


def extract(text: str, entry: str = "") -> str:
    """The last of the text's blocks, or the last that defines `entry` if any does; all of the text without a block."""
    found = blocks(text)
    if not found:
        return text
    return next((block for block in reversed(found) if entry and defines(block, entry)), found[-1])


def blocks(text: str) -> list[str]:
    """What stands between fences: blocks that name no language, then those that name Python, each in their order.

    A fence is a line of at least three ` or ~, with the language as its first word; one as long, without words, ends
    the block. A block that has no end runs to that of the text, or to a fence at the end of its last line.
    """
    bare: list[str] = []
    named: list[str] = []
    lines: list[str] = []
    found, opened = bare, ""
    for line in text.splitlines(keepends=True):
        fence, words = _fence(line)
        if not opened and fence:
            language = next(iter(re.split(r"[\s,:.={}]+", words.strip("{. "))), "").lower()
            found = named if language in LANGUAGES else [] if language else bare
            lines, opened = [], fence
        elif opened and fence.startswith(opened) and not words:
            found.append("".join(lines))
            opened = ""
        elif opened:
            lines.append(line)
    if opened and lines:
        code = "".join(lines)
        glued = code.rstrip().endswith(opened)
        found.append(code.rstrip().removesuffix(opened) if glued else code)
    return [*bare, *named]


def _fence(line: str) -> tuple[str, str]:
    """The fence that a line begins with and the words after it; "" if it is none."""
    line = line.strip()
    if not line.startswith(("```", "~~~")):
        return "", ""
    words = line.lstrip(line[0])
    return ("", "") if line[0] == "`" in words else (line[: len(line) - len(words)], words.strip())


def defines(code: str, name: str) -> bool:
    """Whether a line at the left edge defines a function or class, or binds a name, called `name`."""
    starts = tuple(f"{word} {name}{after}" for word in ("def", "class", "async def") for after in "(: [")
    return bool(name) and any(line.startswith((*starts, f"{name} =")) for line in code.splitlines())


# ---------------------------------------------------------------- the tests of a row


def task_of(sample: Sample) -> Task:
    """The tests of a sample's row. ValueError, naming the columns that are read, if there are none."""
    columns = sample.columns
    entry = next((str(columns[name]) for name in ENTRIES if columns.get(name)), "")
    solution = next((columns[name] for name in SOLUTIONS if isinstance(columns.get(name), str)), None)
    start = _start(columns.get("prompt", sample.prompt), entry)
    if columns.get("test") and entry:
        tests = str(columns["test"])
        return Task(lambda code: asserts.program(code, tests, entry, start), entry, start, solution)
    if columns.get("test_list"):
        tests = "\n".join(map(str, columns["test_list"]))
        before = "\n".join([str(columns.get("test_setup_code") or ""), *map(str, columns.get("test_imports") or ())])
        called = entry or next(iter(asserts.free_names(ast.parse(tests), before)), "")
        return Task(lambda code: asserts.program(code, tests, before=before), called, "", solution)
    return _pairs(columns, entry, start, solution)


def _pairs(columns: Mapping[str, Any], entry: str, start: str, solution: str | None) -> Task:
    """Inputs and outputs: arguments and values of a named function, else what a program reads and prints."""
    given: Mapping[str, Any] = columns
    if isinstance(columns.get("input_output"), str):
        given = json.loads(columns["input_output"])
    inputs, outputs = given.get("inputs"), given.get("outputs")
    if not inputs or not outputs or len(inputs) != len(outputs):
        read = "test and entry_point, test_list, inputs and outputs of one length, or input_output"
        raise ValueError(f"the row has no tests for code: none of the columns {read}")
    entry = entry or str(given.get("fn_name") or "")
    if entry:
        codec.encode([list(inputs), list(outputs)])
        calls = [Call(entry, _arguments(one), value) for one, value in zip(inputs, outputs, strict=True)]
        return Task(lambda code: Calls(code, calls, tuples_as_lists=True), entry, start, solution)
    texts = list(map(_text, inputs)), list(map(_text, outputs))
    return Task(lambda code: Script(code, *texts), "", "", solution)


def _arguments(given: Any) -> list[Any]:
    return list(given) if isinstance(given, (list, tuple)) else [given]


def _text(lines: Any) -> str:
    return "\n".join(map(str, lines)) if isinstance(lines, (list, tuple)) else str(lines)


def _start(prompt: Any, entry: str) -> str:
    """The prompt, if it is Python that begins to define the function `entry`; else ""."""
    if not isinstance(prompt, str) or not entry or f"def {entry}" not in prompt:
        return ""
    try:
        ast.parse(prompt)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""
    return prompt


def _task_or_why(sample: Sample) -> Task | str:
    """The task of a sample's row, once its tests are known to make sense, or why it has none."""
    try:
        task = task_of(sample)
        task.make("")
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        return f"{error}"
    return task


def _key(sample: Sample) -> str:
    """A text that rows with the same tests and solution share."""
    names = ("task_id", "test", "test_list", "inputs", "outputs", "input_output", *ENTRIES, *SOLUTIONS)
    return repr([sample.columns.get(name) for name in names])
