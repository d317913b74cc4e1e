"""Faults 3, 33 and 39 in whole runs: asked to stop, slow disks, and a record that was torn."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
from lives import arguments, result

from prefopt.recipes.signals import EXIT_CODE

ASKED = {"save_minutes": None, "preflight": "off"}  # no checkpoint but the one that a signal asks for
STOPS = {"SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}
AT = 7  # the update in which it comes, the last of a rollout's four but one


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").glob("step-*"))


@pytest.mark.fault(3)
@pytest.mark.parametrize(("kind", "stop"), [("dpo", "SIGTERM"), ("ppo", "Ctrl-C")])
def test_a_signal_ends_the_run_after_the_update_with_a_checkpoint_and_it_goes_on_exactly(
    kind, stop, server, unharmed, tmp_path
):
    out = tmp_path / "run"
    assert server.run(kind, out, ASKED, signals=[("before update", AT, STOPS[stop])]) == EXIT_CODE, server.said
    assert checkpoints(out) == [f"step-{AT:08d}"]
    assert f"stopped after update {AT} of 12. The same command goes on from update {AT}." in server.said
    assert server.run(kind, out, ASKED) == 0, server.said
    assert result(out) == unharmed(kind)


@pytest.mark.fault(3)
@pytest.mark.parametrize("stop", STOPS)
def test_a_second_signal_ends_the_run_at_once(stop, server, tmp_path):
    which = STOPS[stop]
    twice = [("before update", AT, which), ("after update", AT, which)]
    code = server.run("dpo", tmp_path / "run", ASKED, signals=twice)
    assert code == (130 if which == signal.SIGINT else -which)
    assert checkpoints(tmp_path / "run") == []


@pytest.mark.fault(3)
def test_a_signal_while_a_checkpoint_is_written_waits_for_both(server, unharmed, tmp_path):
    out = tmp_path / "run"
    options = {"save_every": 3, "save_minutes": None}
    code = server.run("dpo", out, options, signals=[("before fsync", 9, signal.SIGTERM)])
    assert code == EXIT_CODE, server.said
    assert len(checkpoints(out)) == 2
    assert server.run("dpo", out, options) == 0, server.said
    assert result(out) == unharmed("dpo")


@pytest.mark.fault(3)
def test_the_command_line_exits_with_75_and_resume_goes_on(server, monkeypatch, capsys, tmp_path):
    from prefopt import cli, loop

    plain = loop.update

    def update(*given, **named):
        signal.raise_signal(signal.SIGTERM)
        return plain(*given, **named)

    model, pairs = (str(server.folder / name) for name in ("model", "pairs.jsonl"))
    words = ["train", "dpo", "--model", model, "--data", pairs, "--out", str(tmp_path / "run"), "max_steps=3"]
    monkeypatch.setattr(loop, "update", update)
    assert cli.main([*words, "overwrite=true"]) == EXIT_CODE
    said = capsys.readouterr().err
    assert "stopped after update 1 of 3" in said and "The same command goes on" not in said  # it would begin anew
    assert f"`prefopt train --resume {tmp_path / 'run'}`, not the same command with overwrite=true, goes on" in said
    # the second, for it began with overwrite=true, and that is not what --resume repeats
    assert cli.main(["train", "--resume", str(tmp_path / "run")]) == EXIT_CODE
    assert "stopped after update 2 of 3" in capsys.readouterr().err
    monkeypatch.undo()
    assert cli.main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["resumed_at"] == [1, 2]


# ---------------------------------------------------------------- a disk that is slow


@pytest.mark.fault(33)
@pytest.mark.parametrize("save_async", [False, True], ids=["waiting", "async"])
def test_on_a_slow_disk_every_checkpoint_is_waited_for_and_the_run_is_the_same(
    save_async, server, unharmed, one_thread, monkeypatch, tmp_path
):
    """Writing takes longer than the updates between two checkpoints, and longer than the run's end."""
    import prefopt
    from prefopt.checkpoint import commit, tree

    plain, whole, order = tree.save_file, commit.commit, []

    def slow(tensors, path):
        time.sleep(0.05)  # the slow disk itself
        return plain(tensors, path)

    def noted(writing, step, *rest, **named):
        order.append(step)
        return whole(writing, step, *rest, **named)

    monkeypatch.setattr(tree, "save_file", slow)
    monkeypatch.setattr(commit, "commit", noted)
    monkeypatch.setenv("PREFOPT_CACHE", str(server.folder / "cache"))
    options = {"save_every": 3, "save_minutes": None, "save_async": save_async}
    prefopt.train(**arguments("dpo", server.folder), out=tmp_path / "run", **options)
    assert order == [3, 6, 9, 12]
    assert result(tmp_path / "run") == unharmed("dpo")
    assert not (tmp_path / "run" / "checkpoints").exists()


# ---------------------------------------------------------------- a record that was torn


@pytest.mark.fault(39)
def test_a_torn_line_at_the_end_of_a_record_is_dropped_and_whole_lines_follow(server, unharmed, tmp_path):
    out = tmp_path / "run"
    assert server.run("grpo", out, ASKED, signals=[("before update", AT, signal.SIGTERM)]) == EXIT_CODE
    for name in ("metrics.jsonl", "completions.jsonl"):
        with (out / name).open("ab") as file:
            file.write(b'{"step": 9, "lo')
    assert server.run("grpo", out, ASKED) == 0, server.said
    assert result(out) == unharmed("grpo")


@pytest.mark.fault(39)
def test_a_record_that_lost_its_end_goes_on_with_whole_lines(server, unharmed, tmp_path):
    out = tmp_path / "run"
    assert server.run("sft", out, ASKED, signals=[("before update", AT, signal.SIGTERM)]) == EXIT_CODE
    whole = (out / "metrics.jsonl").read_bytes()
    (out / "metrics.jsonl").write_bytes(whole[:-7])
    assert server.run("sft", out, ASKED) == 0, server.said
    assert "shorter than when the checkpoint was written" in server.said
    wanted = unharmed("sft")
    lost = whole.count(b"\n") - 1
    assert result(out) == {**wanted, "metrics": wanted["metrics"][:lost] + wanted["metrics"][lost + 1 :]}
