"""What verdicts are made of, one program at a time."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import pytest

from prefopt.records import InputError
from prefopt.sandbox import Asserts, Call, Calls, Limits, Outcome, Sandbox, Script, Verdict

CALLS = (Call("add", (2, 3), 5), Call("add", (1, 1), 2))


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    try:
        made = Sandbox(limits=Limits(seconds=1.1, cpu_seconds=1), workers=1)
    except InputError as error:
        pytest.skip(str(error))
    with made:
        yield made


def judged(sandbox: Sandbox, program: Calls | Script | Asserts) -> Verdict:
    return sandbox.judge([program])[0]


def test_tests_passed_are_counted_and_the_first_failure_is_named(sandbox: Sandbox) -> None:
    code = "def add(a, b):\n    return [5][a - 2]"
    verdict = judged(sandbox, Calls(code, (*CALLS, Call("add", (9, 9), 0))))
    assert (verdict.outcome, verdict.passed, verdict.total) == (Outcome.FAILED, 1, 3)
    assert verdict.why == "test 2: a wrong answer"  # [5][-1] is 5


def test_an_exception_fails_its_test_and_not_the_next(sandbox: Sandbox) -> None:
    code = "def add(a, b):\n    if a == 2: raise ValueError('two')\n    return a + b"
    verdict = judged(sandbox, Calls(code, CALLS))
    assert (verdict.outcome, verdict.passed, verdict.why) == (Outcome.FAILED, 1, "test 1: ValueError: two")


def test_answers_before_a_timeout_count_as_passed_tests(sandbox: Sandbox) -> None:
    code = "def add(a, b):\n    while a == 1: pass\n    return a + b"
    verdict = judged(sandbox, Calls(code, CALLS))
    assert (verdict.outcome, verdict.passed, verdict.total) == (Outcome.TIMEOUT, 1, 2)


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("def add(a, b): return bytearray(1 << 40)", Outcome.MEMORY),
        ("import os\ndef add(a, b): os.abort()", Outcome.KILLED),
        ("import os\ndef add(a, b): os.write(3, b'x' * 99)", Outcome.PROTOCOL),
        ("import time\ndef add(a, b): time.sleep(9)", Outcome.TIMEOUT),
        ("def sub(a, b): return 0", Outcome.FAILED),
        ("def add(a, b): return add", Outcome.FAILED),
        ("def add(a, b): raise SystemExit(0)", Outcome.FAILED),
        ("class E(Exception):\n  def __str__(s): raise s\ndef add(a, b): raise E", Outcome.FAILED),
        ("def add(a, b): return (yield a + b)", Outcome.FAILED),
    ],
)
def test_each_way_to_fail_has_its_outcome(sandbox: Sandbox, code: str, outcome: Outcome) -> None:
    verdict = judged(sandbox, Calls(code, CALLS))
    assert (verdict.outcome, verdict.passed, verdict.total) == (outcome, 0, 2), verdict.why
    assert verdict.why


def test_an_answer_byte_by_byte_ends_at_the_limit(sandbox: Sandbox) -> None:
    code = "import os, struct, time\nos.write(3, struct.pack('!I', 1 << 19))\nfor _ in range(1 << 19):\n"
    code += "    os.write(3, b' ')\n    time.sleep(1e-4)\n"
    start = time.monotonic()
    verdict = judged(sandbox, Calls(code, CALLS))
    assert verdict.outcome is Outcome.TIMEOUT
    assert time.monotonic() - start < 1.1 + 1.0


def test_a_tuple_answers_for_a_list_only_where_asked(sandbox: Sandbox) -> None:
    calls = (Call("f", (), [[1, 2], {"k": [3]}]),)
    code = "def f(): return ((1, 2), {'k': (3,)})"
    assert judged(sandbox, Calls(code, calls)).outcome is Outcome.FAILED
    assert judged(sandbox, Calls(code, calls, tuples_as_lists=True)).outcome is Outcome.PASSED


def test_a_deep_answer_is_compared_in_no_time(sandbox: Sandbox) -> None:
    """As an attack on the trainer: it is the trainer that compares."""
    code = "def f():\n    value = 1\n    for _ in range(60): value = (value,)\n    return {value, 2}"
    start = time.process_time()
    verdict = judged(sandbox, Calls(code, (Call("f", (), {1, 2}),)))
    assert (verdict.outcome, verdict.why) == (Outcome.FAILED, "test 1: a wrong answer")
    assert time.process_time() - start < 5


def test_expected_values_that_stand_in_the_source_are_a_sign(sandbox: Sandbox) -> None:
    calls = tuple(Call("f", (text,), text[::-1] + "!") for text in ("first", "second", "third"))
    table = {call.arguments[0]: call.expected for call in calls}
    cheat = judged(sandbox, Calls(f"def f(text): return {table!r}[text]", calls))
    honest = judged(sandbox, Calls("def f(text): return text[::-1] + '!'", calls))
    given = judged(sandbox, Calls(f"# {table}\ndef f(text): return text[::-1] + '!'", calls, given=f"# {table}\n"))
    assert (cheat.outcome, cheat.signs) == (Outcome.PASSED, ("hard_coded",))
    assert (honest.signs, given.signs) == ((), ())


# ---------------------------------------------------------------- scripts


@pytest.mark.parametrize(
    ("code", "outcome", "passed"),
    [
        ("print(int(input()) * 2)", Outcome.PASSED, 2),
        ("import sys\nprint(int(sys.stdin.read()) * 2, '  \\n\\n')", Outcome.PASSED, 2),
        ("import os\nos.write(1, b'%d' % (int(os.read(0, 99)) * 2))", Outcome.PASSED, 2),
        ("n = int(open(0).read())\nif __name__ == '__main__': print(n * 2); exit()", Outcome.PASSED, 2),
        ("print(8)", Outcome.FAILED, 1),
        ("print(int(input()) * 2); raise ValueError", Outcome.FAILED, 0),
        ("print(int(input()) * 2); exit(3)", Outcome.FAILED, 0),
        ("print(int(input()) * 2, flush=True)\nwhile True: pass", Outcome.TIMEOUT, 0),
        ("while True: print('x' * 10000)", Outcome.FAILED, 0),
        ("import os\nos.write(1, b'\\xff\\xfe')", Outcome.FAILED, 0),
        ("print('\\ud800')", Outcome.FAILED, 0),
        ("", Outcome.FAILED, 0),
    ],
)
def test_scripts_are_judged_by_what_they_print(sandbox: Sandbox, code: str, outcome: Outcome, passed: int) -> None:
    verdict = judged(sandbox, Script(code, ("4\n", "5\n"), ("8", "10\n")))
    assert (verdict.outcome, verdict.passed, verdict.total) == (outcome, passed, 2), verdict.why


# ---------------------------------------------------------------- tests in a process of their own

CHECK = "def check(candidate):\n    for i in range(4):\n        assert candidate(i, 2) == i + 2\n"
CHECK += "    assert candidate(1, 2) >= 3\n"


@pytest.mark.parametrize(
    ("code", "outcome", "passed", "total"),
    [
        ("def add(a, b): return a + b", Outcome.PASSED, 2, 2),
        ("def add(a, b): return 3", Outcome.FAILED, 1, 2),
        ("def add(a, b): raise ValueError(a)", Outcome.FAILED, 0, 2),
        ("class E:\n  def __eq__(s, o): return True\ndef add(a, b): return E()", Outcome.FAILED, 0, 2),
        ("import os\ndef add(a, b): os._exit(0)", Outcome.FAILED, 0, 0),
        ("def add(a, b):\n  while True: pass", Outcome.TIMEOUT, 0, 0),
        ("import os\nos.write(3, b'done' * 99)", Outcome.PROTOCOL, 0, 0),
        ("import sys; sys.exit(0)", Outcome.FAILED, 0, 0),
        ("check = lambda c: None\ndef add(a, b): return 0\nassert_ = None", Outcome.FAILED, 0, 2),
    ],
)
def test_asserts_run_where_the_program_does_not(
    sandbox: Sandbox, code: str, outcome: Outcome, passed: int, total: int
) -> None:
    verdict = judged(sandbox, Asserts(code, CHECK, ("add",), "check"))
    assert (verdict.outcome, verdict.passed, verdict.total) == (outcome, passed, total), verdict.why


def test_values_of_every_kind_pass_between_tests_and_program(sandbox: Sandbox) -> None:
    tests = """
value = {(1, "a"): [1.5, {2, 3}], b"x": (None, True, 2**80, 1j)}
assert same(value, named=value) == [value, value]
assert type(same(value)[0][b"x"]) is tuple
try:
    fail()
    reached = True
except ZeroDivisionError as error:
    reached = "no" in str(error)
assert reached
"""
    code = "def same(x, named=None): return [x, named]\ndef fail(): raise ZeroDivisionError('no')"
    verdict = judged(sandbox, Asserts(code, tests, ("same", "fail")))
    assert (verdict.outcome, verdict.passed, verdict.total) == (Outcome.PASSED, 3, 3), verdict.why


def test_helpers_of_the_tests_are_not_the_programs(sandbox: Sandbox) -> None:
    """A test may use a function of the prompt; a program that defines it anew changes nothing."""
    before = "def size(x): return abs(x)\ndef f(x): ..."
    tests = "def check(candidate):\n    assert size(candidate(1) - 2) < 1e-6\n"
    cheat = Asserts("def size(x): return 0\ndef f(x): return 99", tests, ("f",), "check", before)
    honest = Asserts("def f(x): return x + 1", tests, ("f",), "check", before)
    assert [verdict.outcome for verdict in sandbox.judge([cheat, honest])] == [Outcome.FAILED, Outcome.PASSED]


@pytest.mark.parametrize(
    "tests",
    [
        "x = f(1)",
        "def check(candidate): pass",
        "def test_f():\n    assert f(1) == 2",
        "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(f(1), 2)",
        "if False:\n    raise ValueError",
    ],
)
def test_tests_that_check_nothing_say_nothing_of_the_program(sandbox: Sandbox, tests: str) -> None:
    check = "check" if "check" in tests else ""
    verdict = judged(sandbox, Asserts("def f(x): return x + 1", tests, ("f",), check))
    assert (verdict.outcome, verdict.total) == (Outcome.INFRA_ERROR, 0)
    assert "check nothing" in verdict.why


@pytest.mark.parametrize(
    ("tests", "total"),
    [
        ("    if c(1) != 2: raise ValueError", 1),
        ("    if c(1) != 2: assert False, c(1)", 1),
        ("    if c(1) != 2:\n        exit(1)", 1),
        ("    try:\n        assert c(1) == 2\n    except ValueError: pass", 1),
        ("    try:\n        assert c(1) == 2\n    except BaseException: pass", 1),
        ("    import contextlib as of\n    with of.suppress(KeyError): assert c(1) == 2; assert c(2) == 3", 2),
        ("    for i in (0, 6):\n        try:\n            assert c(i) == i + 1\n        except KeyError: pass", 1),
        ("    def equal(a, b): assert a == b\n    equal(c(1), 2); equal(c(2), 3)", 1),
        ("    assert all(map(lambda i: c(i) == i + 1, range(3)))", 1),
        ("    for have, right in zip(map(c, [1, 2]), [2, 3]): assert have == right\n    assert c(6) == 7", 2),
    ],
)
def test_whatever_tests_check_tells_right_programs_from_wrong_ones(sandbox: Sandbox, tests: str, total: int) -> None:
    programs = "return x + 1", "return 7", "raise StopIteration", "raise StopAsyncIteration"
    made = [Asserts(f"def f(x): {body}", f"def check(c):\n{tests}\n", ("f",), "check") for body in programs]
    right, *wrong = sandbox.judge(made)
    assert (right.outcome, right.passed, right.total) == (Outcome.PASSED, total, total), right.why
    for verdict in wrong:
        assert verdict.outcome is Outcome.FAILED and verdict.passed < verdict.total and verdict.why


def test_asserts_that_a_program_keeps_from_running_are_not_passed(sandbox: Sandbox) -> None:
    tests = "def check(candidate):\n    for x in candidate(3): assert x >= 0\n"
    empty, right = (Asserts(f"def f(n): return {of}", tests, ("f",), "check") for of in ("[]", "list(range(n))"))
    verdicts = sandbox.judge([empty, right])
    assert [verdict.outcome for verdict in verdicts] == [Outcome.FAILED, Outcome.PASSED]
    assert verdicts[0].why == "none of the asserts ran"


def test_a_loop_over_a_long_answer_is_one_test(sandbox: Sandbox) -> None:
    tests = "def check(candidate):\n    for x in candidate(3): assert x >= 0\n    assert candidate(3) == [0, 1, 2]\n"
    verdict = judged(sandbox, Asserts("def f(n): return [0] * 10_000", tests, ("f",), "check"))
    assert (verdict.passed, verdict.total) == (1, 2)


def test_packages_can_be_allowed(sandbox: Sandbox) -> None:
    """`packaging`, which pytest needs, stands for numpy: the interpreter need not be the one it was built for."""
    program = Calls(
        "import packaging.version\ndef f(): return str(packaging.version.parse('1.0'))", (Call("f", (), "1.0"),)
    )
    assert "ModuleNotFoundError" in judged(sandbox, program).why
    with Sandbox(workers=1, packages=("packaging",)) as allowing:
        assert judged(allowing, program).outcome is Outcome.PASSED
        other = Calls("import pytest\ndef f(): return '1.0'", (Call("f", (), "1.0"),))
        assert allowing.judge([other])[0].outcome is Outcome.FAILED
    with pytest.raises(InputError, match="nonesuch"):
        Sandbox(packages=("nonesuch",))


def test_a_level_that_is_none_and_limits_below_zero_are_refused() -> None:
    with pytest.raises(InputError, match="'strickt' is none"):
        Sandbox("strickt")
    for name in ("seconds", "cpu_seconds", "memory_bytes", "output_bytes", "answer_bytes", "num_files"):
        with pytest.raises(ValueError, match=name):
            Limits(**{name: 0})


def test_outcomes_are_what_the_rest_of_prefopt_reads() -> None:
    assert [str(outcome) for outcome in Outcome] == list(
        itertools.chain(("passed", "failed", "timeout", "memory"), ("killed", "protocol", "infra_error"))
    )
