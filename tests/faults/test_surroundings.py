"""Faults 34 and 40: no terminal, streams that are gone, an ASCII locale, a clock that jumps, a hub out of reach."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_server import Answer, closed_port, serving
from laws import save_model, write_rows

from prefopt import cli

REWARD = """\
import sys

def talkative(completions, answer, **columns):
    print("scoring", len(completions), "completions")
    print("to both streams", file=sys.stderr)
    return [said.split().count(word) / 4 for said, word in zip(completions, answer, strict=True)]
"""
OPTIONS = [
    *("batch_size=4", "max_steps=3", "num_completions=4", "max_tokens=4", "learning_rate=1e-2", "dtype=float32"),
    *("eval_fraction=0.25", "eval_every=2", "save_every=1", "save_completions=null"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("surroundings")
    save_model(made / "model")
    write_rows(made / "prompts.jsonl", "prompts")
    (made / "reward.py").write_text(REWARD)
    return made


def words(folder: Path, out: Path) -> list[str]:
    given = ["--model", folder / "model", "--data", folder / "prompts.jsonl", "--out", out]
    return ["train", "grpo", *map(str, given), "--reward", f"{folder / 'reward.py'}:talkative", *OPTIONS]


def result(out: Path) -> dict[str, Any]:
    """Weights, metrics that are no times, and completions."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    timed = ("tokens_per_second", "seconds/")
    return {
        "weights": (out / "model" / "model.safetensors").read_bytes(),
        "metrics": [{name: x for name, x in line.items() if not name.startswith(timed)} for line in lines],
        "completions": (out / "completions.jsonl").read_bytes(),
        "done": (out / "summary.json").exists(),
    }


@pytest.fixture(scope="module")
def wanted(folder, forks):
    """What a run leaves when it prints to a file."""
    ended = forks.run(words(folder, folder / "plain"))
    assert ended.code == 0, ended.said
    assert "step 3/3" in ended.said and "scoring 16 completions" in ended.said
    return result(folder / "plain")


@pytest.mark.fault(34)
@pytest.mark.parametrize("streams", ["terminal", "lost terminal", "head", "gone"])
def test_a_run_ends_the_same_wherever_it_prints_to(streams, folder, forks, wanted):
    """A terminal; one that was closed; `| head -1`, which leaves after a line; a reader that left before."""
    out = folder / streams.replace(" ", "-")
    ended = forks.run(words(folder, out), streams)
    assert ended.code == 0
    assert result(out) == wanted
    if streams == "terminal":
        assert "training" in ended.said and "\x1b[" in ended.said  # the bar was drawn
    if streams == "head":
        assert ended.said.count("\n") == 1


@pytest.mark.fault(34)
def test_a_clock_that_jumps_changes_nothing(folder, forks, wanted):
    ended = forks.run(words(folder, folder / "clock"), clock=True)
    assert ended.code == 0, ended.said
    assert result(folder / "clock") == wanted


def alone(given: list[str], **environment: str) -> subprocess.CompletedProcess[bytes]:
    """`prefopt WORDS`, started with all streams closed, in an ASCII locale without Python's ways around it."""
    plain = {"LC_ALL": "C", "LANG": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "prefopt", *given],
        env={**os.environ, **plain, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        preexec_fn=lambda: os.closerange(0, 3),
        timeout=120,
    )


@pytest.mark.fault(34, 40)
def test_a_run_without_streams_locale_and_hub_ends_the_same(folder, wanted):
    """Local folders need no hub: its address is one where nobody listens, and its library is told to be offline."""
    out = folder / "bare"
    cache = str(folder / "no-hub-cache")
    ended = alone(words(folder, out), HF_HUB_OFFLINE="1", HF_HOME=cache, HF_ENDPOINT=nowhere())
    assert ended.returncode == 0
    assert result(out) == wanted


def nowhere() -> str:
    return f"http://127.0.0.1:{closed_port()}"


@pytest.fixture
def hub(monkeypatch):
    """Makes an address the hub's."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", "hf_planted")

    def use(url: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", url.removesuffix("/v1"))

    return use


@pytest.mark.fault(40)
@pytest.mark.parametrize("fails", ["500", "401", "closed"])
def test_a_failed_upload_leaves_the_result_and_says_the_command_to_retry(fails, folder, hub, tmp_path, capsys):
    status = int(fails) if fails.isdigit() else 200
    out = tmp_path / "a run"
    given = [*words(folder, out), "max_steps=1", "push_to_hub=me/mine"]
    with serving(lambda asked: Answer({"error": "the hub is unwell"}, status)) as server:
        hub(nowhere() if fails == "closed" else server.url)
        assert cli.main(given) == 2
        assert fails == "closed" or server.asked
    said = capsys.readouterr().err
    assert f"retry with `hf upload --private me/mine '{out / 'model'}' .`" in said
    assert "Traceback" not in said and "hf_planted" not in said
    assert (out / "model" / "model.safetensors").exists() and (out / "model" / "README.md").exists()
    assert json.loads((out / "summary.json").read_text())["steps"] == 1


@pytest.mark.fault(40)
@pytest.mark.parametrize("what", ["model", "data"])
def test_a_name_of_the_hub_that_cannot_be_reached_is_an_error_in_one_line(
    what, folder, hub, tmp_path, capsys, monkeypatch
):
    import datasets
    from huggingface_hub import constants

    hub(nowhere())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # or its library tries again for a minute
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    given = words(folder, tmp_path / "run")
    given[given.index(f"--{what}") + 1] = "no-such-owner/no-such-name"
    assert cli.main(given) == 2
    said = capsys.readouterr().err
    assert "no-such-owner/no-such-name" in said and "Traceback" not in said
