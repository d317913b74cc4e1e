"""Runs of TRL 1.16, healthy and not, with the watch inside, and what `prefopt doctor` says of the state they leave."""

from __future__ import annotations

import pytest
from trl_runs import RUNS

from prefopt.doctor import diagnose, read
from prefopt.integrations.trl import Watch

EXPECTED = {"dpo_healthy": {}, "dpo_surface": {"hollow_margin": "warn"}, "grpo_stalled": {"sparse_reward": "sick"}}


@pytest.mark.parametrize("name", RUNS)
def test_the_watch_and_the_doctor_say_the_right_thing(name, tmp_path):
    watch = Watch(say=lambda text: None)
    trainer = RUNS[name](tmp_path, [watch])
    live = {finding.name: finding.level for finding in watch.found if finding.lasts and finding.level != "info"}
    trainer.state.save_to_json(str(tmp_path / "trainer_state.json"))
    found = diagnose(read(tmp_path)).findings
    assert live == EXPECTED[name]
    assert {one.name: one.level for one in found if one.lasts and one.level != "info"} == EXPECTED[name]
