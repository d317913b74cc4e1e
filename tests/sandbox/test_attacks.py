"""The hostile programs of `attacks.py`, at each level this machine has, as root and as an unprivileged user."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from attacks import CHECKED, REFUSED, Attack, Place, attacks, attempt
from run_attacks import said

from prefopt.records import InputError
from prefopt.sandbox import confine, find, process
from prefopt.sandbox.machine import NOBODY

ROOT = Path(__file__).parents[2]
ALL = attacks(Place("", 0, "", 0))
WHO = [(level, user) for level in ("standard", "strict") for user in ("caller", "unprivileged")]


def interpreter(user: int) -> str:
    """A Python that a user can run the sandbox's own code with. Skips where there is none."""
    tried = []
    for path in (sys.executable, "/usr/local/bin/python3", "/usr/bin/python3"):
        command = [path, "-c", "import sys, prefopt.sandbox; assert sys.version_info >= (3, 11)"]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, user=user, group=user, timeout=60)
        except OSError as error:
            tried.append(f"{path}: {error.strerror}")
            continue
        if done.returncode == 0:
            return path
        tried.append(f"{path}: {done.stderr.strip().splitlines()[-1]}")
    pytest.skip(f"no Python 3.11 that user {user} can read prefopt with: {'; '.join(tried)}")


@pytest.fixture(scope="module", params=WHO, ids="-".join)
def outcome(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What came of every attack at one level, as one user."""
    level, who = request.param
    try:
        find(level)
    except InputError as error:
        pytest.skip(str(error))
    user: dict[str, Any] = {}
    python = sys.executable
    if who == "unprivileged":
        if os.geteuid() != 0:
            pytest.skip("the tests run as an unprivileged user already: that is the case of the caller")
        python = interpreter(NOBODY)
        user = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    script = str(Path(__file__).with_name("run_attacks.py"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([python, script, level], capture_output=True, text=True, env=environment, timeout=300, **user)
    assert done.returncode == 0, done.stderr
    return {"level": level, **json.loads(done.stdout)}


def test_the_standard_level_holds_where_the_kernel_can_enforce_it() -> None:
    """The other tests skip what the machine cannot; a sandbox that is broken must not look like such a machine."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("the standard level needs Linux on x86-64")
    if confine.landlock_version() == 0:
        pytest.skip("this kernel has no Landlock")
    assert find("standard").level == "standard"


@pytest.mark.parametrize("attack", ALL, ids=lambda attack: f"{attack.number:02}-{attack.name}")
def test_an_attack_earns_nothing_and_reaches_nothing(attack: Attack, outcome: dict[str, Any]) -> None:
    got = outcome["results"][str(attack.number)]
    assert got["passed"] <= attack.passed, got
    assert got["outcome"] in attack.outcomes or not attack.outcomes, got
    if "passed" in attack.outcomes:
        assert got["passed"] == 2
    if attack.tries and (attack.number, outcome["level"]) != (51, "standard"):  # sizes of files: docs/sandbox.md
        assert re.match(REFUSED, got["said"]), got["said"]


@pytest.mark.parametrize("abi", [1, 2])
def test_files_keep_their_length_where_landlock_does_not_see_it(
    abi: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before ABI 3 Landlock knows no right to truncate: a newer kernel is asked for an older rule set."""
    try:
        host = replace(find("standard").host, readable=(str(tmp_path),))
    except InputError as error:
        pytest.skip(str(error))
    as_it_is = process._source
    older = "return max(0,", f"return min({abi},"
    assert older[0] in as_it_is("confine")
    monkeypatch.setattr(process, "_source", lambda name: as_it_is(name).replace(*older))
    path = tmp_path / "data"
    path.write_text("words")
    for place, mode in ((path, 0o666), *((folder, 0o755) for folder in (tmp_path, *tmp_path.parents[:2]))):
        place.chmod(mode)
    zygote = process.Zygote(host, process.Limits())
    for how in (
        "os.truncate(PATH, 0)",
        "os.open(PATH, os.O_TRUNC)",
        "os.open(PATH, os.O_TRUNC | os.O_ACCMODE)",
        "os.open(PATH, os.O_TRUNC | os.O_WRONLY)",
        "ctypes.set_errno(0); must(library.syscall(2, PATH.encode(), os.O_TRUNC))",
        "must(library.syscall(437, -100, PATH.encode(), ctypes.byref((ctypes.c_uint64 * 3)(512, 0, 0)), 24))",
    ):
        tried = said(zygote, attempt(CHECKED + how.replace("PATH", repr(str(path)))))
        assert re.match(REFUSED, tried), (how, tried)
        assert path.read_text() == "words", how
    assert said(zygote, attempt("open('/dev/null', 'w').write('x')")) == "REACHED"
    zygote.close()


def test_nothing_outside_has_changed_and_no_process_is_left(outcome: dict[str, Any]) -> None:
    assert outcome["damage"] == []
    assert outcome["left"] == []


def test_hashes_of_texts_are_the_same_in_every_start(outcome: dict[str, Any]) -> None:
    first, second = outcome["hashes"]
    assert first == second
    assert re.match(r"\(-?\d+, \[", first), first  # an answer, not an error


def test_a_clock_that_stands_still_is_not_believed(outcome: dict[str, Any]) -> None:
    """Attack 66 stops every clock it can see and then adds three million squares."""
    assert outcome["results"]["66"]["cpu_seconds"] > 0.05


def test_attempts_on_the_tests_are_named(outcome: dict[str, Any]) -> None:
    expected = {1: "exit", 2: "ended_loading", 3: "equality", 6: "frames", 7: "objects", 61: "builtins", 62: "tests"}
    found = {number: outcome["results"][str(number)]["signs"] for number in expected}
    assert all(sign in found[number] for number, sign in expected.items()), found
    assert outcome["results"]["0"]["signs"] == []


def test_the_attacks_work_where_nothing_confines_them(tmp_path: Path) -> None:
    """At level unsafe these reach what they aim at: the suite above would notice."""
    script = f"""
import json, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from contextlib import ExitStack
from run_attacks import LIMITS, Target, said
from attacks import attacks
from prefopt.sandbox import Sandbox
from prefopt.sandbox.process import Zygote
with ExitStack() as stack:
    target = Target(stack)
    zygote = Zygote(Sandbox("unsafe").machine.host, LIMITS)
    harmless = (28, 29, 30, 33, 34, 40, 42, 43, 51, 78, 80, 81)
    answers = {{a.number: said(zygote, a.code) for a in attacks(target.place) if a.number in harmless}}
    zygote.close()
    print(json.dumps([answers, target.damage()]))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    answers, damage = json.loads(done.stdout)
    assert set(answers.values()) == {"REACHED"}, answers
    assert len(damage) >= 5
