"""The laws catch the bugs of the field: see plant_bugs.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from plant_bugs import BUGS, Bug, part, plant

HERE = Path(__file__).parent
PARTS = 12  # of the table, so that they can be looked for side by side


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("number", range(PARTS))
def test_every_planted_bug_is_caught(number):
    done = python(str(HERE / "plant_bugs.py"), str(number), str(PARTS))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("CAUGHT") == len(part(number, PARTS)) >= 1


def test_the_parts_hold_every_bug_once():
    assert sorted(bug.name for n in range(PARTS) for bug in part(n, PARTS)) == sorted(bug.name for bug in BUGS)
    assert len(BUGS) >= 18


def test_a_change_that_no_test_can_see_is_reported_as_missed():
    harmless = "Bug('harmless', 'objectives/sft.py', 'nll = -out', 'nll = 0 - out', words='zero_credit and sft')"
    done = python("-c", f"from plant_bugs import *; sys.exit(main([{harmless}]))")
    assert done.returncode == 1 and done.stdout.startswith("MISSED"), done.stdout + done.stderr


def test_a_bug_whose_place_is_gone_stops_the_script(tmp_path):
    (tmp_path / "loop.py").write_text("pass\n")
    with pytest.raises(SystemExit, match=r"is 0 times in prefopt/loop\.py, not once"):
        plant(Bug("name", "loop.py", "nowhere", "anything"), tmp_path)
