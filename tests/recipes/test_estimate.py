"""`prefopt estimate`, from options to pages, and a probe that trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from laws import save_model, write_rows

from prefopt import cli, config
from prefopt.advice.machine import Speed
from prefopt.recipes.estimate import estimate, others, probe, read_rows
from prefopt.records import InputError

SPEED = Speed(1e11, 1e10)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("estimate")
    save_model(folder / "model")
    for data in ("pairs", "prompts"):
        write_rows(folder / f"{data}.jsonl", data)
    return folder


def resolved(place: Path, objective: str, data: str, **options: Any) -> dict[str, Any]:
    paths = {"model": str(place / "model"), "data": str(place / f"{data}.jsonl"), "out": str(place / "out")}
    return config.resolve(config.sections(objective), config.Layer({**paths, **options}))


def test_rows_come_in_the_order_and_number_of_training(place: Path) -> None:
    from prefopt.recipes.train import plan

    options = {"model": str(place / "model"), "data": str(place / "pairs.jsonl"), "out": str(place / "out")}
    from prefopt.objectives import DPO

    trained = plan(objective=DPO(), **options)
    found = read_rows(resolved(place, "dpo", "pairs"), [])
    assert len(found) == len(trained.data.examples)
    assert sorted(row.cost() for row in found) == sorted(example.num_tokens for example in trained.data.examples)
    steps = estimate(resolved(place, "dpo", "pairs", batch_size=4, epochs=2), "cpu", None, SPEED).time
    assert steps is not None
    assert steps.updates == plan(objective=DPO(), **options, batch_size=4, epochs=2).steps


def test_rows_that_training_leaves_out_are_counted_with_their_reason(place: Path, tmp_path: Path) -> None:
    from prefopt.objectives import DPO
    from prefopt.recipes.train import plan

    rows = tmp_path / "rows.jsonl"
    rows.write_text((place / "pairs.jsonl").read_text() + 3 * '{"prompt": "a", "chosen": "b", "rejected": "b"}\n')
    trained = plan(objective=DPO(), model=str(place / "model"), data=str(rows), out="o")
    left_out = estimate(resolved(tmp_path, "dpo", "rows", model=str(place / "model")), "cpu", None).notes
    assert trained.data.dropped == {"chosen and rejected are equal": 3}
    assert left_out[0] == "3 rows are left out: chosen and rejected are equal"


def test_what_an_objective_needs_shows_in_its_parts(place: Path) -> None:
    parts = {name: estimate(resolved(place, name, "pairs"), "cpu", None).memory.peak.parts for name in ("dpo", "kto")}
    assert "reference" in parts["kto"] and "reference" not in parts["dpo"]  # live, and cached
    ppo = estimate(resolved(place, "ppo", "prompts", max_tokens=16, reward="exact"), "cpu", None, SPEED)
    assert ppo.memory.peak.parts["critic"] > 0
    assert {"forward", "backward", "loading", "sampling"} == {moment.name for moment in ppo.memory.moments}


def test_a_checkpoint_is_counted_where_the_run_is_long_enough(place: Path) -> None:
    def names(**options: Any) -> set[str]:
        found = estimate(resolved(place, "dpo", "pairs", **options), "cpu", None, SPEED)
        return {moment.name for moment in found.memory.moments}

    assert "checkpoint" not in names()
    assert "checkpoint" in names(save_every=2)
    assert "checkpoint" not in names(save_every=2, save_async=False)
    assert "checkpoint" in names(save_minutes=1e-9)


def test_others_learn_from_the_same_rows(place: Path) -> None:
    found = others(resolved(place, "dpo", "pairs"))
    assert {"ipo", "simpo", "orpo"} <= set(found)
    assert "dpo" not in found and "grpo" not in found


def test_the_command_needs_no_data_and_shows_every_part(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["estimate", "dpo", "--model", str(place / "model"), "max_length=64"]) == 0
    page = capsys.readouterr().out
    for word in ("weights", "moments", "activations", "no data", "ipo", "Fits into"):
        assert word in page


def test_what_does_not_fit_comes_with_options_or_with_none(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["estimate", "dpo", "--model", str(place / "model"), "--data", str(place / "pairs.jsonl"), "--json"]
    assert cli.main([*words, "--memory", "0.1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fit"] is None and found["free"] == 10**8
    assert {"peak", "time", "moments"} <= found.keys() and len(found["others"]) > 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "estimate what"),
        (["dpo"], "model: missing"),
        (["dpo", "--model", "nowhere/at/all"], "no such directory"),
        (["dpo", "--model", "a" * 300], "cannot be read: File name too long"),
        (["dpo", "--model", "m", "--probe"], "--probe trains"),
        (["dpo", "--model", "m", "--memory", "-1"], "--memory -1: give the gigabytes"),
        (["dpo", "--model", "m", "betta=1"], "did you mean beta"),
    ],
)
def test_a_user_error_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["estimate", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_probe_trains_and_measures(place: Path) -> None:
    options = resolved(place, "dpo", "pairs", batch_size=4, cache_dir=str(place / "cache"))
    found = probe(options, updates=2)
    assert found.updates == 2 and found.per_update > 0
    # for so small a model it is the base that is compared
    assert 0.5 < estimate(options, "cpu", None).memory.peak.total / found.peak < 2
    assert not (place / "out").exists()


def test_a_probe_that_fails_says_why(place: Path) -> None:
    (place / "bad.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"the probe of 3 updates failed: .*bad\.jsonl"):
        probe(resolved(place, "dpo", "bad"))
