"""Faults 1 and 2: whenever a training process is killed, the run that goes on ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from lives import KINDS, result

KILLS = int(os.environ.get("PREFOPT_KILLS", "20"))  # of each kind; `make kills` has 100


def moments_of(out: Path) -> dict[str, int]:
    return dict(json.loads(out.with_suffix(".moments").read_text()))


def same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        assert found[name] == value, f"{name} differ"


@pytest.mark.fault(1, 2)
@pytest.mark.parametrize("save_async", [False, True], ids=["waiting", "async"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_killed_again_and_again_ends_like_one_that_never_was(kind, save_async, server):
    """Kills at moments drawn evenly among their kinds: between steps, within updates, saves, generation, reward.

    Of each chain of lives a checkpoint comes after so many updates, which a resume then has to do again.
    """
    options = {"save_every": 1, "save_minutes": None, "save_async": save_async}
    unharmed, out = server.folder / f"{kind}-whole", server.folder / f"{kind}-killed"
    shutil.rmtree(unharmed, ignore_errors=True)
    assert server.run(kind, unharmed, options, shaken=True) == 0, server.said
    wanted, moments = result(unharmed), moments_of(unharmed)
    draw, kills, lives = random.Random(f"{kind}/{save_async}/{KILLS}"), 0, 0
    while kills < KILLS // 2:
        shutil.rmtree(out, ignore_errors=True)
        options["save_every"], code = draw.choice((1, 2, 3, 5)), -9
        while code == -9:
            name = draw.choice(sorted(moments))
            number = draw.randint(1, moments[name])
            code = server.run(kind, out, options, kill=name, number=number, shaken=True)
            kills, lives = kills + (code == -9), lives + 1
            assert code in (0, -9), server.said
            assert lives < 10 * KILLS, "the run does not come to its end"
            if (out / "summary.json").exists():  # killed after its end, or while its checkpoints were removed
                break
        same(result(out), wanted)
        assert code == -9 or not (out / "checkpoints").exists()
