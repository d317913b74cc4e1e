from __future__ import annotations

import gzip
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefopt.records import InputError, Sample, Score
from prefopt.rewards.code import CodeReward, blocks, defines, extract, source, task_of
from prefopt.sandbox import Asserts, Calls, Limits, Script

HUMANEVAL = Path(__file__).parents[3] / "shared" / "data" / "humaneval" / "HumanEval.jsonl.gz"

# the formats of HumanEval, MBPP and of inputs with outputs, with tasks of their own
HEAD = 'def double(x: int) -> int:\n    """Twice x.\n    >>> double(2)\n    4\n    """\n'
CHECK = {"prompt": HEAD, "entry_point": "double", "test": "def check(candidate):\n    assert candidate(2) == 4\n"}
ASSERTS = {"prompt": "Write a function.", "test_list": ["assert double(2) == 4", "assert double(5) == 10"]}
FUNCTION = {"fn_name": "double", "inputs": [[2], [5]], "outputs": [4, 10]}
PRINTS = {"inputs": ["2\n", "5\n"], "outputs": ["4\n", "10\n"]}
RIGHT = "def double(x):\n    return 2 * x\n"
WRONG = "def double(x):\n    return x + 2\n"  # right for 2


def sample(text: str, columns: dict[str, Any]) -> Sample:
    return Sample(columns.get("prompt", ""), text, columns=columns)


def fenced(code: str, language: str = "python") -> str:
    return f"Here it is:\n```{language}\n{code}```\nDone."


@pytest.fixture(scope="module")
def reward() -> Iterator[CodeReward]:
    try:
        made = CodeReward(limits=Limits(seconds=3.0, cpu_seconds=2), workers=2)
    except InputError as error:
        pytest.skip(str(error))
    yield made
    made.close()


def values(reward: CodeReward, *samples: Sample) -> list[float | None]:
    return [score.value for score in reward(samples)]


# ---------------------------------------------------------------- the program in a completion


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("x = 1", []),
        ("```python\na\n```", ["a\n"]),
        ("```py\na\n```\ntext\n```\nb\n```", ["b\n", "a\n"]),
        ("```Python3 \na\n```", ["a\n"]),
        ("```bash\nls\n```\n```python\na\n```", ["a\n"]),
        ("```python\na\n", ["a\n"]),
        ("  ```python\n  a\n  ```", ["  a\n"]),
        ("```python\n```", [""]),
        ("```python title=a\na\n```", ["a\n"]),
        ("```Python 3\na\n```", ["a\n"]),
        ("```{.python}\na\n```", ["a\n"]),
        ("```python:main.py\na\n```", ["a\n"]),
        ("~~~python\na\n```\n~~~", ["a\n```\n"]),
        ("````python\na\n```\nb\n````", ["a\n```\nb\n"]),
        ("```python\na\n````\nb", ["a\n"]),
        ("```python\na = 1```", ["a = 1"]),
        ("```python\na = 1```\n", ["a = 1"]),
        ("```text\nb\n```\n```python x", []),
        ("```a` is code\nb\n", []),
        ("```", []),
        ("", []),
    ],
)
def test_blocks_are_what_stands_between_fences(text: str, found: list[str]) -> None:
    assert blocks(text) == found


def test_a_block_that_names_python_goes_before_a_bare_one() -> None:
    shown = fenced("print(2 * int(input()))\n") + "Its output:\n```\n4\n```\n"
    assert extract(shown) == extract(shown, "double") == "print(2 * int(input()))\n"
    assert extract(fenced(RIGHT, "") + fenced("double(2)\n"), "double") == RIGHT


def test_the_last_block_that_defines_the_function_is_the_program() -> None:
    text = fenced("x = 0\n") + fenced(RIGHT) + fenced("print(double(4))\n")
    assert extract(text, "double") == RIGHT
    assert extract(text) == extract(text, "triple") == "print(double(4))\n"
    assert extract("return 2 * x", "double") == "return 2 * x"


@pytest.mark.parametrize("code", ["def f(x): ...", "async def f(): ...", "class f:\n  x = 1", "f = lambda x: x"])
def test_a_name_is_defined_at_the_left_edge(code: str) -> None:
    assert defines(f"import os\n{code}", "f")
    assert not defines(f"if True:\n  {code}", "f")
    assert not defines(code, "g") and not defines(code, "")


def test_a_completion_continues_the_prompt_or_defines_the_function_anew() -> None:
    task = task_of(sample("", CHECK))
    assert source(task, "    return 2 * x\n") == HEAD + "    return 2 * x\n"
    assert source(task, fenced("    return 2 * x\n")) == HEAD + "    return 2 * x\n"
    assert source(task, fenced(RIGHT)) == f"{HEAD}\n{RIGHT}"
    assert source(task_of(sample("", ASSERTS)), RIGHT) == RIGHT


def test_a_huge_completion_is_read_in_no_time() -> None:
    text = "```python\n" * 50_000 + "`" * 1_000_000
    start = time.process_time()
    extract(text, "double")
    assert time.process_time() - start < 10


# ---------------------------------------------------------------- the tests of a row


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        (CHECK, Calls),
        (ASSERTS, Calls),
        (FUNCTION, Calls),
        (PRINTS, Script),
        ({"input_output": json.dumps(FUNCTION)}, Calls),
        ({"input_output": json.dumps(PRINTS)}, Script),
        (
            {**CHECK, "test": "def check(candidate):\n    for i in range(3):\n        assert candidate(i) == 2 * i"},
            Asserts,
        ),
        ({**ASSERTS, "test_setup_code": "import math"}, Asserts),
        ({**ASSERTS, "test_imports": ["import math"], "test_setup_code": ""}, Asserts),
    ],
    ids=str,
)
def test_right_and_wrong_programs_are_told_apart_in_every_format(
    reward: CodeReward, columns: dict[str, Any], kind: type
) -> None:
    assert isinstance(task_of(sample("", columns)).make(""), kind)
    right, wrong = RIGHT, "def double(x):\n    return 3 * x\n"
    if kind is Script:
        right, wrong = "print(2 * int(input()))\n", "print(4)\n"
    assert values(reward, sample(fenced(right), columns), sample(fenced(wrong), columns)) == [1.0, 0.0]


def test_credit_is_for_all_tests_or_for_the_share(reward: CodeReward) -> None:
    [score] = reward([sample(fenced(WRONG), ASSERTS)])
    assert score == Score(0.0, "failed: test 2: a wrong answer", {"tests_passed": 0.5, "signs": 0.0})
    share = CodeReward(credit="share", workers=1)
    assert values(share, sample(fenced(WRONG), ASSERTS), sample(fenced(RIGHT), ASSERTS)) == [0.5, 1.0]
    share.close()


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import sys\nsys.exit(0)\n", "failed: while it was loaded: SystemExit: 0; signs: ended_loading, exit"),
        ("class E:\n  def __eq__(s, o): return True\ndef double(x): return E()", "cannot be sent"),
        ("def double(x):\n  while True: pass", "timeout: it"),
        ("def double(x): return bytearray(1 << 40)", "memory: test 1: MemoryError"),
        ("import ctypes; ctypes.string_at(0)", "killed: it was killed by signal 11"),
        ("import os; os.write(3, b'passed' * 9)", "protocol: it sent"),
        ("I cannot help with that.", "failed: while it was loaded: SyntaxError"),
        ("", "failed: test 1: NameError: the program defines no 'double'"),
    ],
)
def test_what_went_wrong_is_said(reward: CodeReward, code: str, why: str) -> None:
    [score] = reward([sample(code, ASSERTS)])
    assert score.value == 0.0 and why in score.why


@pytest.mark.parametrize(
    ("columns", "why"),
    [
        ({}, "no tests for code"),
        ({"inputs": [1, 2], "outputs": [1]}, "no tests for code"),
        ({"test_list": ["assert 1 == "]}, ""),
        ({"test_list": ["assert 1 == 1"]}, "call no function"),
        ({"input_output": "not JSON"}, ""),
        ({"inputs": [[object()]], "outputs": [1], "fn_name": "f"}, ""),
    ],
    ids=["nothing", "unequal", "no syntax", "no call", "no JSON", "no plain value"],
)
def test_a_row_whose_tests_make_no_sense_is_not_scored(reward: CodeReward, columns: dict[str, Any], why: str) -> None:
    scores = reward([sample(RIGHT, columns), sample(RIGHT, ASSERTS)])
    assert scores[0].value is None and scores[0].why and why in scores[0].why
    assert scores[1].value == 1.0


def test_a_row_whose_own_solution_fails_is_not_scored(reward: CodeReward) -> None:
    sound, unsound = {**ASSERTS, "code": RIGHT}, {**ASSERTS, "code": WRONG}
    scores = reward([sample(RIGHT, sound), sample(WRONG, sound), sample(RIGHT, unsound)])
    assert [score.value for score in scores] == [1.0, 0.0, None]
    assert scores[2].why == "the row's own solution does not pass its tests: test 2: a wrong answer"
    assert reward.check([sound, unsound, {}, ASSERTS]).keys() == {1, 2}


def test_what_was_not_run_in_time_is_not_scored() -> None:
    reward = CodeReward(seconds=1.0, workers=1)
    slow = "import time\ndef double(x): time.sleep(0.8); return 2 * x"
    start = time.monotonic()
    scores = reward([sample(slow, {**ASSERTS, "task_id": n}) for n in range(4)])
    assert time.monotonic() - start < 2.0
    assert [score.value for score in scores] == [None] * 4
    assert "infra_error: the time of the whole batch was up" in scores[-1].why
    assert reward.counts["value"] == 4
    reward.close()


def test_no_samples_and_unknown_options(reward: CodeReward) -> None:
    assert reward([]) == []
    with pytest.raises(InputError, match="credit must be all or share"):
        CodeReward(credit="some")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="sandbox level"):
        CodeReward(sandbox="loose")


# ---------------------------------------------------------------- real tasks

MUTATED = """

_right = {entry}
def {entry}(*arguments):
    value = _right(*arguments)
    if isinstance(value, bool): return not value
    if isinstance(value, (int, float)): return value + 1
    if isinstance(value, str): return value + "?"
    if isinstance(value, list): return value + [None]
    if isinstance(value, tuple): return value + (None,)
    if isinstance(value, dict): return {{**value, None: None}}
    return 0
"""


def test_humaneval_solutions_score_1_and_mutated_or_empty_ones_0(reward: CodeReward) -> None:
    if not HUMANEVAL.exists():
        pytest.skip(f"no {HUMANEVAL}")
    with gzip.open(HUMANEVAL, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == 164
    written = [
        [row["canonical_solution"] for row in rows],
        [row["canonical_solution"] + MUTATED.format(entry=row["entry_point"]) for row in rows],
        [""] * len(rows),
    ]
    for texts, value in zip(written, (1.0, 0.0, 0.0), strict=True):
        scores = reward([sample(text, row) for text, row in zip(texts, rows, strict=True)])
        other = [(row["task_id"], score) for row, score in zip(rows, scores, strict=True) if score.value != value]
        assert other == []
