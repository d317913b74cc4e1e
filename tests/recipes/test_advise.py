"""`prefopt advise`: what it says of files, and that every recipe it can write runs as it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from laws import save_model, write_rows

from prefopt import cli
from prefopt.advice.case import Case, DataFacts, ModelFacts
from prefopt.advice.rules import METHODS
from prefopt.advice.stages import stages
from prefopt.data import DataOptions
from prefopt.models.load import ModelOptions
from prefopt.recipes.advise import advise, write

KINDS = ("demonstrations", "pairs", "ratings", "labels", "prompts")
BASE = ModelFacts(10_000, False, ends=0.0, better=4.0, own=1.0, samples=4)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("advise")
    save_model(folder / "model")
    for data in KINDS:
        write_rows(folder / f"{data}.jsonl", data, num=40)
    return folder


def facts(kind: str) -> DataFacts:
    check = {"checker": "exact", "checkable": 40} if kind == "prompts" else {}
    return DataFacts(kind, 40, 40, answer_tokens=4, prompt_tokens=3, **check)  # type: ignore[arg-type]


# each method on the rows it is for, and those that rows of another kind must be made into
RUNS = [
    ("sft", "labels"),
    ("dpo", "ratings"),
    ("ipo", "pairs"),
    ("kto", "pairs"),
    ("orpo", "pairs"),
    ("simpo", "pairs"),
    ("reward_rloo", "ratings"),
    ("reward_grpo", "pairs"),
    ("ppo", "pairs"),
    ("grpo", "prompts"),
    ("rloo", "prompts"),
]


@pytest.mark.parametrize(("method", "kind"), RUNS, ids=[method for method, _ in RUNS])
def test_every_advised_recipe_runs(method: str, kind: str, place: Path, tmp_path: Path) -> None:
    model = BASE if method == "dpo" else replace(BASE, ends=1.0, better=1.0)  # once with SFT before it
    case = Case(facts(kind), model)
    made = stages(
        case, method, str(place / "model"), str(place / f"{kind}.jsonl"), str(tmp_path / "run"), positions=128
    )
    for file in write(made, tmp_path / "recipe.yaml"):
        assert cli.main(["train", str(file), "max_steps=1", "--json"]) == 0, file.read_text()
    assert len(made) == len(METHODS[method].stages) + (method == "dpo")
    assert (Path(made[-1].options["out"]) / "model" / "config.json").exists()


def test_every_method_is_among_the_runs() -> None:
    assert {method for method, _ in RUNS} == METHODS.keys()


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [("demonstrations", "sft"), ("pairs", "ipo"), ("ratings", "ipo"), ("labels", "kto"), ("prompts", "grpo")],
)
def test_a_file_is_understood(kind: str, wanted: str, place: Path) -> None:
    found = advise(str(place / f"{kind}.jsonl"), None, DataOptions(), ModelOptions())
    assert found.case.data.kind == kind
    assert found.case.data.rows == 40
    assert found.ranking[0].name == wanted
    assert not found.stages  # no model is named


def test_the_command_looks_at_the_model_and_writes_what_runs(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["advise", "--data", str(place / "pairs.jsonl"), "--model", str(place / "model"), "--json"]
    assert cli.main([*words, "--out", "recipe.yaml"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"]["samples"] > 0 and found["model"]["own"] > 0 and found["model"]["better"] > 0
    assert found["machine"]["needed"]["dpo"] > 10**8
    assert found["files"] and found["ranking"][0]["reasons"]
    for file in found["files"]:
        assert cli.main(["train", file, "--print-config"]) == 0


@pytest.mark.parametrize(("right", "wanted"), [("9", "grpo"), ("7", "sft")])
def test_where_the_model_solves_nothing_rows_that_pass_their_own_checker_are_imitated_first(
    right: str, wanted: str, place: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    own = [{"prompt": f"three and {n}", "completion": "so it is 7", "answer": right} for n in range(40)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in own))
    found = advise(str(rows), str(place / "model"), DataOptions(), ModelOptions())
    assert found.case.model is not None and found.case.model.solved == 0
    assert found.case.data.passing == (right == "7")
    assert found.ranking[0].name == wanted


def test_no_row_is_left_out_by_the_length_that_a_tokenizer_of_no_model_gives_it(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    own = [{"text": " ".join(str(word * (n + 7)) for word in range(900))} for n in range(30)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in own))
    found = advise(str(rows), None, DataOptions(), ModelOptions()).case.data
    assert (found.rows, found.prompts, found.notes) == (30, 30, ())


def test_rows_that_do_not_fit_into_the_model_are_said_to_be_left_out(place: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    own = [{"prompt": f"three and {n}", "completion": "so it is 7 " * (60 if n < 9 else 1)} for n in range(20)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in own))
    found = advise(str(rows), str(place / "model"), DataOptions(), ModelOptions())
    assert found.stages[0].options["max_length"] == 128
    assert found.case.data.rows == 11
    assert found.case.data.notes == ("9 left out: longer than max_length 128",)


def test_the_page_says_why_and_what_would_change_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["advise", "--data", str(place / "pairs.jsonl")]) == 0
    page = capsys.readouterr().out
    for word in (
        "1. ",
        "[measured here: experiments/objectives/offline.md]",
        "What would change the answer",
        "not GRPO",
    ):
        assert word in page


def test_a_reward_whose_options_only_training_takes_is_one_that_can_be_had(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "pairs.jsonl", "pairs", num=4)
    found = advise(str(rows), None, DataOptions(), ModelOptions(), reward="length")
    assert not next(advice for advice in found.ranking if advice.name == "grpo").refused


def test_rows_of_steps_are_sent_to_the_objective_that_learns_from_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "steps.jsonl", "steps", num=4)
    assert cli.main(["advise", "--data", str(tmp_path / "steps.jsonl")]) == 0
    page = capsys.readouterr().out
    assert "`prefopt train prm` learns from steps" in " ".join(page.split())
    assert page.endswith("No recipe can be written\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "advise needs --data"),
        (["--data", "x.jsonl", "--out", "r.yaml"], "give --model"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--data", "a" * 300 + ".jsonl"], "cannot be read: File name too long"),
        (["--data", "x.jsonl", "--reward", "mth"], "did you mean math?"),
        (["--data", "x.jsonl", "--reward", "gone.py:score"], "there is no file gone.py"),
        (["--data", "x.jsonl", "--memory", "nan"], "--memory nan: give the gigabytes"),
        (["--data", "x.jsonl", "--model", "m", "--out", "x.jsonl"], "name a file.yaml"),
    ],
)
def test_a_user_error_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["advise", *words]) == 2
    assert message in capsys.readouterr().err
