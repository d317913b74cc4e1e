"""Faults 8 and 9: a folder that cannot be written, or that another run holds."""

from __future__ import annotations

import json
import os

import pytest
import scenes
from lives import result

from prefopt import cli
from prefopt.recipes import train as recipe

needs_mounts = pytest.mark.skipif(not scenes.can_mount(), reason="no process here may mount a folder read-only")
NEVER = {"save_minutes": None, "preflight": "off"}


@needs_mounts
@pytest.mark.fault(8)
def test_a_read_only_file_system_is_refused_before_the_model_is_looked_for(server, tmp_path):
    out = tmp_path / "disk" / "run"
    out.parent.mkdir()
    code = server.run("dpo", out, {"model": str(tmp_path / "no model")}, scene="read_only")
    assert code == 1
    assert f"InputError: {out}: cannot write there (Read-only file system); choose another out" in server.said


@pytest.mark.fault(8)
def test_a_file_in_the_way_is_refused_before_the_model_is_looked_for(server, tmp_path):
    out = tmp_path / "run"
    out.write_text("")
    assert server.run("dpo", out, {"model": str(tmp_path / "no model")}) == 1
    assert f"InputError: {out}: cannot write there (File exists); choose another out" in server.said


@needs_mounts
@pytest.mark.fault(8)
def test_a_disk_without_room_for_the_settings_is_refused_before_the_model_is_looked_for(server, tmp_path):
    options = {"model": str(tmp_path / "no model")}
    kept = tmp_path / "kept"
    code = server.run("dpo", tmp_path / "run", options, scene="no_room", keep=str(kept))
    assert code == 1
    assert "cannot write there (No space left on device); make room, or choose another out" in server.said
    assert (kept / "config.yaml").read_text() == "objective: dpo\n"  # that of the run before, from which it can go on


@pytest.mark.fault(9)
def test_a_second_run_in_a_folder_is_refused_with_the_process_that_holds_it(server, unharmed, tmp_path):
    out, told = tmp_path / "run", tmp_path / "told.json"
    assert server.run("dpo", out, NEVER, scene="rival", keep=str(told)) == 0, server.said
    holder, ended = json.loads(told.read_text())
    assert ended.startswith(
        f"InputError: {out}: another run is writing there (process {holder} on {os.uname().nodename}"
    )
    assert result(out) == unharmed("dpo")


@pytest.mark.fault(9)
def test_a_second_command_exits_with_2(server, tmp_path, capsys, monkeypatch):
    from prefopt.recipes.lock import Lock

    def refuse(*given, **named):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(recipe, "load_model", refuse)
    words = ["train", "dpo", "--model", str(server.folder / "model"), "--data", str(server.folder / "pairs.jsonl")]
    (tmp_path / "run").mkdir()
    lock = Lock(tmp_path / "run")
    assert cli.main([*words, "--out", str(tmp_path / "run"), "overwrite=true"]) == 2
    lock.close()
    assert f"another run is writing there (process {os.getpid()} on" in capsys.readouterr().err
