"""A watched run trains the same; what it finds is said, kept and resumed; on_sick ends it or mends it."""

from __future__ import annotations

import json
import math
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from laws import save_model, write_rows

import prefopt
from prefopt import config, detectors, loop
from prefopt.commands.train import train as command_train
from prefopt.objectives import DPO, GRPO, KTO, ORPO, SFT
from prefopt.recipes import train as recipe
from prefopt.recipes import watching
from prefopt.records import InputError

FAST = {"batch_size": 8, "max_steps": 6, "eval_fraction": 0.25, "learning_rate": 3e-2, "dtype": "float32"}
SICK = {**FAST, "max_steps": 20, "eval_every": 2}  # the policy drifts by more than 1 nat a token within 10 updates


def function() -> Any:
    """A reward that is never earned and travels to its process whole."""

    def never(completions: list[str], **columns: Any) -> list[float]:
        return [0.0] * len(completions)

    return never


never = function()


@pytest.fixture
def model_dir(tmp_path):
    return save_model(tmp_path / "model")


@pytest.fixture
def drift_counts(monkeypatch):
    """Drift is no more than a note where no reward says that it did harm; here it is what makes a run sick."""
    monkeypatch.setitem(detectors.EVERY, "drift", partial(detectors.EVERY["drift"], unverified="sick"))


@pytest.fixture
def pairs(tmp_path):
    return write_rows(tmp_path / "pairs.jsonl", "pairs")


def run(objective: Any, model: Path, data: Path, out: Path, **options: Any) -> Any:
    return prefopt.train(objective=objective, model=model, data=data, out=out, **{**FAST, **options})


def lines(out: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name).read_text(encoding="utf-8").splitlines()]


def trained(out: Path) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


def without(rows: list[dict[str, Any]], *prefixes: str) -> list[dict[str, Any]]:
    names = ("tokens_per_second", *prefixes)
    return [{name: value for name, value in row.items() if not name.startswith(names)} for row in rows]


@pytest.mark.parametrize("kind", ["pairs", "prompts"])
def test_what_is_trained_is_the_same_with_the_watch_on_and_off(kind, model_dir, tmp_path):
    data = write_rows(tmp_path / f"{kind}.jsonl", kind)
    objective, options = (DPO(), {}) if kind == "pairs" else (GRPO(), {"reward": never, "max_tokens": 4})
    for watch in ("on", "off"):
        run(objective, model_dir, data, tmp_path / watch, watch=watch, eval_every=2, **options)
    assert trained(tmp_path / "on") == trained(tmp_path / "off")
    on, off = (lines(tmp_path / watch, "metrics.jsonl") for watch in ("on", "off"))
    seconds = ("seconds/", "eval/seconds/")
    assert without(on, "eval/probe_", *seconds) == without(off, *seconds)
    assert any("eval/probe_nll" in row for row in on) == (kind == "pairs")
    assert not any("eval/probe_nll" in row for row in off)
    assert json.loads((tmp_path / "off" / "summary.json").read_text())["findings"] is None


def test_the_probe_is_the_nll_of_answers_of_the_start_model(model_dir, pairs, tmp_path):
    out = tmp_path / "run"
    result = run(DPO(), model_dir, pairs, out, max_steps=8)
    values = [row["eval/probe_nll"] for row in lines(out, "metrics.jsonl") if "eval/probe_nll" in row]
    # an answer of a random model over 29 words and an end: about ln 30 = 3.4 nats a token, less where it is peaked
    assert 1.0 < values[0] < 3.5 and values[1] > values[0] + 0.1
    assert 0 <= result.summary["end"]["eval/probe_finished"] <= 1
    assert (result.summary["start"]["eval/probe_nll"], result.summary["end"]["eval/probe_nll"]) == (
        values[0],
        values[1],
    )


def test_a_model_that_is_not_trained_does_not_drift(model_dir, pairs, tmp_path):
    result = run(DPO(), model_dir, pairs, tmp_path / "run", learning_rate=1e-12)
    assert result.summary["end"]["eval/probe_nll"] == pytest.approx(result.summary["start"]["eval/probe_nll"], abs=1e-6)
    assert result.summary["findings"] == []


@pytest.mark.usefixtures("drift_counts")
def test_drift_is_said_once_and_kept(model_dir, pairs, tmp_path, capsys):
    out = tmp_path / "run"
    result = run(DPO(), model_dir, pairs, out, **SICK)
    [finding] = [one for one in result.summary["findings"] if one["name"] == "drift"]
    assert finding["level"] == "sick" and finding["value"] > 1 and finding["recovered"] is None
    said = capsys.readouterr().err
    assert said.count("sick: drift") == 1 and "Label more pairs" in said
    kept = [one["level"] for one in lines(out, "findings.jsonl") if one["name"] == "drift"]
    assert [level for level in kept if level != "info"] in (["sick"], ["warn", "sick"])
    assert result.summary["steps"] == 20 and result.summary["ended_at"] is None


@pytest.mark.usefixtures("drift_counts")
def test_on_sick_stop_ends_the_run_with_its_weights(model_dir, pairs, tmp_path, capsys):
    whole = run(DPO(), model_dir, pairs, tmp_path / "whole", **SICK)
    result = run(DPO(), model_dir, pairs, tmp_path / "run", **SICK, on_sick="stop")
    found = next(one for one in result.summary["findings"] if one["name"] == "drift")
    assert result.summary["ended_at"] == found["step"] < 20
    steps = [row["step"] for row in lines(tmp_path / "run", "metrics.jsonl")]
    assert max(steps) == found["step"]
    # the updates before it are those of a run that goes on
    both = [lines(tmp_path / name, "metrics.jsonl")[: len(steps)] for name in ("whole", "run")]
    assert without(both[0]) == without(both[1]) and trained(tmp_path / "run") != trained(tmp_path / "whole")
    assert f"the run ends after update {found['step']}" in capsys.readouterr().err
    assert whole.summary["ended_at"] is None and (tmp_path / "run" / "model" / "config.json").exists()


def test_on_sick_stop_ends_a_run_whose_answers_get_worse_by_a_reward(model_dir, pairs, tmp_path):
    reward = tmp_path / "mine.py"
    said = "[said.count('bad') - said.count('good') for said in completions]"  # what these pairs teach away
    reward.write_text(f"def mine(completions, **columns):\n    return {said}\n")
    options = {**SICK, "probe_reward": f"{reward}:mine", "probe_tokens": 8, "on_sick": "stop"}
    result = run(DPO(), model_dir, pairs, tmp_path / "run", **options)
    found = next(one for one in result.summary["findings"] if one["name"] == "drift")
    assert found["level"] == "sick" and found["evidence"]["gain"] < 0.1
    assert result.summary["ended_at"] == found["step"] < 20


@pytest.mark.usefixtures("drift_counts")
def test_on_sick_stop_ends_a_run_that_goes_on_from_where_it_was_found_sick(model_dir, pairs, tmp_path, monkeypatch):
    options = {**SICK, "on_sick": "stop", "save_every": 1}
    whole = run(DPO(), model_dir, pairs, tmp_path / "whole", **options)

    def stopped(self: Any, step: int) -> None:
        raise RuntimeError("stopped")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
        patch.setattr(watching.Watching, "end", stopped)
        run(DPO(), model_dir, pairs, tmp_path / "run", **options)
    result = run(DPO(), model_dir, pairs, tmp_path / "run", **options)
    assert result.summary["ended_at"] == whole.summary["ended_at"] == result.summary["resumed_at"][0]
    both = [lines(tmp_path / name, "metrics.jsonl") for name in ("whole", "run")]
    assert without(both[0]) == without(both[1]) and trained(tmp_path / "run") == trained(tmp_path / "whole")


@pytest.mark.usefixtures("drift_counts")
def test_on_sick_fix_trains_anew_with_what_mends_it(model_dir, pairs, tmp_path, capsys):
    out = tmp_path / "run"
    result = run(DPO(beta=0.01), model_dir, pairs, out, **SICK, on_sick="fix")
    assert result.model_dir == out / "fixed" / "model"
    recipe = config.read_recipe(out / "fixed" / "config.yaml")
    assert (recipe["beta"], recipe["on_sick"]) == (0.1, "warn")
    assert json.loads((out / "summary.json").read_text())["ended_at"] and "training anew" in capsys.readouterr().err


@pytest.mark.usefixtures("drift_counts")
@pytest.mark.parametrize(("killed", "command"), [("before it begins", "the same"), ("in it", "--resume")])
def test_on_sick_fix_goes_on_where_the_run_that_mends_was_killed(
    killed, command, model_dir, pairs, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    options = {**SICK, "max_steps": 10, "beta": 0.01, "on_sick": "fix", "save_every": 2, "save_async": False}
    given = {**options, "model": model_dir, "data": pairs, "out": out}
    words = ["dpo", *(f"{name}={json.dumps(x) if isinstance(x, bool) else x}" for name, x in given.items())]
    plain = loop.update

    def update(*given: Any) -> Any:
        if (out / "fixed" / "checkpoints" / "step-00000002").exists():
            raise KeyboardInterrupt
        return plain(*given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "update", update)
        if killed == "before it begins":
            patch.setattr(recipe, "fixed", lambda *given: signal.raise_signal(signal.SIGINT))
        command_train(words)
    assert (out / "summary.json").exists()
    command_train(words if command == "the same" else ["--resume", str(out)])
    summary = json.loads((out / "fixed" / "summary.json").read_text())
    assert summary["resumed_at"] == ([2] if killed == "in it" else []) and summary["steps"] == 10
    with pytest.raises(InputError, match="already holds a run"):
        command_train(["--resume", str(out)])


def test_on_sick_fix_keeps_the_result_where_no_option_mends_it(model_dir, tmp_path, capsys):
    prompts = write_rows(tmp_path / "prompts.jsonl", "prompts")
    options = {"reward": never, "max_tokens": 4, "stall_window": 6, "num_completions": 2, "eval_fraction": 0.0}
    result = run(GRPO(), model_dir, prompts, tmp_path / "run", **options, max_steps=9, on_sick="fix")
    assert result.summary["ended_at"] == 6 and result.model_dir == tmp_path / "run" / "model"
    said = capsys.readouterr().err
    assert "no option alone mends this" in said and not (tmp_path / "run" / "fixed").exists()


def test_a_healthy_run_is_not_ended(model_dir, pairs, tmp_path):
    options = {**SICK, "learning_rate": 1e-4, "max_steps": 6}
    for on_sick in ("warn", "fix"):
        run(DPO(), model_dir, pairs, tmp_path / on_sick, **options, on_sick=on_sick)
    assert trained(tmp_path / "warn") == trained(tmp_path / "fix") and not (tmp_path / "fix" / "fixed").exists()


def test_a_reward_compares_answers_of_the_start_model(model_dir, pairs, tmp_path, monkeypatch):
    reward = tmp_path / "mine.py"
    said = "[said.count('good') - said.count('bad') for said in completions]"
    reward.write_text(f"def mine(completions, **columns):\n    return {said}\n")
    options = {**FAST, "max_steps": 20, "probe_reward": f"{reward}:mine", "eval_data": str(pairs), "probe_tokens": 8}
    out = tmp_path / "run"
    result = run(DPO(), model_dir, pairs, out, **options)
    start, end = result.summary["start"], result.summary["end"]
    assert start["eval/probe_accuracy"] == 0.5  # every log-ratio is 0, a tie, which counts half
    assert end["eval/probe_accuracy"] > 0.7 and end["eval/probe_pairs"] >= 3
    # `good` is written more and more: more often better than the rows' answers
    assert 0 < start["eval/probe_wins"] < end["eval/probe_wins"] <= 1 and end["eval/probe_compared"] >= 3
    assert end["eval/probe_reward"] > start["eval/probe_reward"] and end["eval/probe_gain"] > 0.5
    assert end["eval/probe_gain_error"] > 0


def test_a_gain_is_over_the_start_models_answers_to_the_same_prompts_in_their_standard_deviations():
    start = [[1.0, 3.0], [10.0, 12.0], [20.0, 24.0], [5.0]]
    found = watching.gain([4.0, 11.0, None, 9.0], start)
    # variances 2 and 2 of the prompts that are known, means 2 and 11: rises of 2 and 0
    assert found["eval/probe_reward"] == 8.0
    assert found["eval/probe_gain"] == pytest.approx(1 / math.sqrt(2))
    assert found["eval/probe_gain_error"] == pytest.approx(1 / math.sqrt(2))  # stdev of (sqrt 2, 0) is 1, of two
    for now, own in (([], []), ([], start), ([1.0, 2.0], [[3.0, 3.0], [4.0, 4.0]]), ([1.0], [[1.0, 2.0]])):
        unknown = watching.gain(now, own)
        assert math.isnan(unknown["eval/probe_gain"]) and math.isnan(unknown["eval/probe_gain_error"])


def test_wins_are_over_the_answers_of_the_rows_and_go_on_after_a_kill(model_dir, pairs, tmp_path, monkeypatch):
    reward = tmp_path / "mine.py"
    reward.write_text("def mine(completions, **columns):\n    return [float(len(said)) for said in completions]\n")
    options = {"max_steps": 2, "eval_every": 1, "save_every": 1, "save_async": False, "probe_tokens": 8}
    options |= {"probe_reward": f"{reward}:mine", "eval_data": str(pairs)}
    whole = run(DPO(), model_dir, pairs, tmp_path / "whole", **options)
    with monkeypatch.context() as patched, pytest.raises(Stop):
        patched.setattr(watching.Watching, "listen", stopping(watching.Watching.listen, 2))
        run(DPO(), model_dir, pairs, tmp_path / "run", **options)
    result = run(DPO(), model_dir, pairs, tmp_path / "run", **options)
    assert result.summary["resumed_at"] and result.summary["end"]["eval/probe_wins"] > 0
    kept = [lines(tmp_path / name, "metrics.jsonl") for name in ("whole", "run")]
    assert without(kept[0]) == without(kept[1])
    assert result.summary["end"]["eval/probe_gain_error"] > 0
    assert whole.summary["start"]["eval/probe_compared"] == whole.summary["end"]["eval/probe_compared"]


def length_reward(folder: Path, words: str = "") -> str:
    """How long an answer is; words: lines that come first."""
    (folder / "length.py").write_text(
        f"def length(completions, **columns):\n    {words or 'pass'}\n    return [float(len(x)) for x in completions]\n"
    )
    return f"{folder / 'length.py'}:length"


@pytest.mark.parametrize("then", [{}, {"probe": 4}])
def test_wins_are_unknown_where_a_run_goes_on_with_other_prompts_or_another_reward(
    then, model_dir, pairs, tmp_path, monkeypatch
):
    reward = length_reward(tmp_path)
    options = {"max_steps": 2, "eval_every": 1, "save_every": 1, "save_async": False, "probe_tokens": 4}
    with monkeypatch.context() as patched, pytest.raises(Stop):
        patched.setattr(watching.Watching, "listen", stopping(watching.Watching.listen, 2))
        run(DPO(), model_dir, pairs, tmp_path / "run", **options, **({"probe_reward": reward} if then else {}))
    result = run(DPO(), model_dir, pairs, tmp_path / "run", **options, **then, probe_reward=reward, allow_inexact=True)
    assert result.summary["resumed_at"]
    found = {line["step"]: line for line in lines(tmp_path / "run", "metrics.jsonl") if "eval/probe_nll" in line}
    assert found[2]["eval/probe_wins"] is None and ("eval/probe_wins" in found[0]) == bool(then)


def test_a_run_does_not_go_on_with_a_probe_reward_that_was_changed(model_dir, pairs, tmp_path, monkeypatch):
    options = {"max_steps": 2, "save_every": 1, "save_async": False, "probe": 2, "probe_tokens": 2}
    with monkeypatch.context() as patched, pytest.raises(Stop):
        patched.setattr(watching.Watching, "listen", stopping(watching.Watching.listen, 2))
        run(DPO(), model_dir, pairs, tmp_path / "run", **options, probe_reward=length_reward(tmp_path))
    with pytest.raises(InputError, match=r"reward 1 length.py:length: '\w+' then, '\w+' now"):
        run(DPO(), model_dir, pairs, tmp_path / "run", **options, probe_reward=length_reward(tmp_path, "1 + 1"))


def test_a_reward_that_fails_at_an_evaluation_does_not_end_the_run(model_dir, pairs, tmp_path, capsys):
    reward = length_reward(tmp_path, "if __import__('pathlib').Path(__file__ + '.down').exists(): raise OSError")

    class Down(watching.Probe):
        def _wins(self) -> dict[str, float]:
            found = super()._wins()
            (tmp_path / "length.py.down").touch()
            return found

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(watching, "Probe", Down)
        result = run(DPO(), model_dir, pairs, tmp_path / "run", max_steps=1, probe=2, probe_reward=reward)
    assert (tmp_path / "run" / "summary.json").exists() and "eval/probe_nll" in result.summary["end"]
    assert result.summary["start"]["eval/probe_compared"] == 2 and math.isnan(result.summary["end"]["eval/probe_wins"])
    assert math.isnan(result.summary["end"]["eval/probe_gain"])
    assert "probe: the policy's answers could not be compared: " in capsys.readouterr().err


def test_the_rows_answers_are_cut_where_the_policys_are(model_dir, pairs, tmp_path):
    """Else a model loses to rows that it wrote itself wherever the end decides."""
    said = tmp_path / "said.jsonl"
    reward = length_reward(tmp_path, f"open({str(said)!r}, 'a').write(repr([len(x.split()) for x in completions]))")
    run(DPO(), model_dir, pairs, tmp_path / "run", max_steps=1, probe=2, probe_tokens=1, probe_reward=reward)
    counts = [int(number) for part in said.read_text().split("]")[:-1] for number in part.strip("[").split(",")]
    assert counts and max(counts) <= 1


def test_every_objective_on_pairs_and_labels_has_a_probe_and_others_none(model_dir, tmp_path, capsys):
    for objective, kind in ((KTO(), "labels"), (ORPO(), "pairs"), (SFT(), "demonstrations")):
        data = write_rows(tmp_path / f"{kind}.jsonl", kind)
        result = run(objective, model_dir, data, tmp_path / kind, max_steps=2)
        assert ("eval/probe_nll" in result.summary["end"]) == (kind != "demonstrations")


def test_a_probe_without_held_out_prompts_is_refused_where_it_is_asked_for(model_dir, pairs, tmp_path):
    assert run(DPO(), model_dir, pairs, tmp_path / "run", eval_fraction=0.0).summary["findings"] == []
    with pytest.raises(InputError, match="probe: there are no held-out prompts; leave out"):
        run(DPO(), model_dir, pairs, tmp_path / "other", eval_fraction=0.0, probe=8)
    with pytest.raises(InputError, match="probe_reward compares answers of the probe, and probe is 0"):
        run(DPO(), model_dir, pairs, tmp_path / "other", probe=0, probe_reward="math")
    with pytest.raises(InputError, match="a judge needs options"):
        run(DPO(), model_dir, pairs, tmp_path / "other", probe_reward="judge")


class Stop(Exception):
    """Ends a run between two updates."""


def stopping(listen: Any, at: int) -> Any:
    """`listen`, and an end of the run once it has heard of step `at`."""

    def stops(self: Any, step: int, metrics: Any) -> None:
        listen(self, step, metrics)
        if step == at:
            raise Stop

    return stops


def test_a_watched_run_that_was_killed_finds_the_same_when_it_goes_on(model_dir, pairs, tmp_path, monkeypatch):
    options, at = {**SICK, "max_steps": 10, "save_every": 1, "save_async": False}, 7
    whole = run(DPO(), model_dir, pairs, tmp_path / "whole", **options)
    with monkeypatch.context() as patched:
        patched.setattr(watching.Watching, "listen", stopping(watching.Watching.listen, at))
        with pytest.raises(Stop):
            run(DPO(), model_dir, pairs, tmp_path / "run", **options)
    result = run(DPO(), model_dir, pairs, tmp_path / "run", **options)
    assert result.summary["resumed_at"] == [at - 1]
    assert result.summary["findings"] == whole.summary["findings"] != []
    for name in ("findings.jsonl", "metrics.jsonl"):
        assert without(lines(tmp_path / "run", name)) == without(lines(tmp_path / "whole", name))
