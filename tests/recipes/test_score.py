"""`prefopt score`: every form of data in, rows with scores out that can be read again, and a summary for a reader."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import save_model, write_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import prefopt
from prefopt import cli
from prefopt.data import DataOptions
from prefopt.data import load as load_data
from prefopt.evaluate.rewards import completion_scores, ranked_rightly, step_scores, steps_rightly
from prefopt.models.load import ModelOptions, load
from prefopt.models.policy import Policy
from prefopt.objectives import ProcessReward, RewardModel
from prefopt.recipes.score import score
from prefopt.records import InputError

FAST = {"batch_size": 16, "max_steps": 20, "eval_fraction": 0.0, "learning_rate": 1e-2, "dtype": "float32"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: Any) -> dict[str, Path]:
    """A reward model and a process reward model that know good from bad, and the model they come from."""
    folder = tmp_path_factory.mktemp("models")
    start = save_model(folder / "start", architecture="gpt_neox")
    found = {"language": start}
    for objective in (RewardModel(), ProcessReward()):
        data = write_rows(folder / f"{objective.facts.name}.jsonl", objective.facts.data, num=96)
        out = folder / objective.facts.name
        found[objective.facts.name] = prefopt.train(
            objective=objective, model=start, data=data, out=out, **FAST
        ).model_dir
    return found


def run(capsys: Any, *words: Any) -> str:
    assert cli.main(["score", *map(str, words)]) == 0
    return str(capsys.readouterr().out)


def refused(capsys: Any, *words: Any) -> str:
    assert cli.main(["score", *map(str, words)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    return str(err)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def plain_score(folder: Path, text: str) -> float:
    """The score of one text by transformers alone."""
    model, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForSequenceClassification, AutoTokenizer))
    with torch.no_grad():
        return float(model.eval()(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits[0, 0])


# ---------------------------------------------------------------- rows in, rows with scores out


def test_pairs_gain_two_scores_that_plain_transformers_gives_too(models, tmp_path, capsys):
    data, out = write_rows(tmp_path / "pairs.jsonl", "pairs", num=10, seed=3), tmp_path / "scored.jsonl"
    text = run(capsys, "--model", models["reward"], "--data", data, "--out", out)
    given, found = lines(data), lines(out)
    for before, after in zip(given, found, strict=True):
        assert {name: after[name] for name in before} == before
        for side in ("chosen", "rejected"):
            whole = before["prompt"] + before[side] + "</s>"
            assert after[f"score_{side}"] == pytest.approx(plain_score(models["reward"], whole), abs=1e-5)
    ranked = sum(row["score_chosen"] > row["score_rejected"] for row in found)
    assert ranked >= 8
    assert f"ranked as labelled: {10 * ranked:.1f} % (" in text and "at 95 % confidence, n = 10)" in text
    assert load_data(out, AutoTokenizer.from_pretrained(models["reward"]), "pairs").dropped in (
        {},
        {"chosen scored below rejected": 10 - ranked},
    )


def test_ratings_keep_what_the_file_said_and_can_be_trained_on_again(models, tmp_path, capsys):
    data, out = write_rows(tmp_path / "ratings.jsonl", "ratings", num=8, seed=3), tmp_path / "scored.jsonl"
    summary = json.loads(run(capsys, "--model", models["reward"], "--data", data, "--out", out, "--json"))
    found = lines(out)
    assert [row["ratings"] for row in found] == [[1.0, 2.0, 4.0]] * 8
    assert summary["completions"] == 24 and summary["ranked_as_labelled"]["n"] == 8
    again = load_data(out, AutoTokenizer.from_pretrained(models["reward"]), "ratings")
    read, written = ([x.scores for x in again.examples], [row["scores"] for row in found])
    assert torch.equal(torch.tensor(read), torch.tensor(written))  # in single precision


def test_other_answers_gain_a_score(models, tmp_path, capsys):
    rows = {
        "labels": {"prompt": "red cat :", "completion": " good", "label": True, "id": 7},
        "demonstrations": {"prompt": "red cat :", "completion": " good dog"},
        "text": {"text": "red cat : good"},
        "odd columns": {"question": "red cat :", "completion": " good"},
    }
    for name, row in rows.items():
        data, out = tmp_path / f"{name}.jsonl", tmp_path / f"{name} scored.jsonl"
        data.write_text(json.dumps(row) + "\n", encoding="utf-8")
        more = ["--map", "prompt=question"] if "question" in row else []
        run(capsys, "--model", models["reward"], "--data", data, "--out", out, *more)
        [found] = lines(out)
        whole = row.get("text", "red cat :" + str(row.get("completion"))) + "</s>"
        assert found.pop("score") == pytest.approx(plain_score(models["reward"], whole), abs=1e-5)
        assert found == {("prompt" if key == "question" else key): value for key, value in row.items()}


def test_ties_and_groups_that_no_training_takes_are_scored(models, tmp_path, capsys):
    rows = [{"prompt": "red :", "completions": [" good", " bad"], "scores": [1, 1]}]
    rows.append({"prompt": "blue :", "completions": [" one"], "scores": [2]})
    data, out = tmp_path / "ties.jsonl", tmp_path / "scored.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    text = run(capsys, "--model", models["reward"], "--data", data, "--out", out)
    assert [len(row["scores"]) for row in lines(out)] == [2, 1]
    assert "ranked as labelled: not measured (no prompt has two completions with different labels)" in text


def test_the_scores_that_pairs_came_with_become_ratings(models, tmp_path, capsys):
    both = {"prompt": "red :", "chosen": " good", "rejected": " bad", "score_chosen": 9.5, "score_rejected": 2}
    rows = [both, {**both, "prompt": "cat :", "score_chosen": None, "score_rejected": None}]
    data, out = tmp_path / "pairs.jsonl", tmp_path / "scored.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    run(capsys, "--model", models["reward"], "--data", data, "--out", out)
    rated, unrated = lines(out)
    assert (rated["rating_chosen"], rated["rating_rejected"]) == (9.5, 2) and "rating_chosen" not in unrated
    assert rated["score_chosen"] == pytest.approx(plain_score(models["reward"], "red : good</s>"), abs=1e-5)
    assert unrated["score_rejected"] == pytest.approx(plain_score(models["reward"], "cat : bad</s>"), abs=1e-5)


def test_several_answers_without_scores_are_ranked_equal_ones_too(models, tmp_path, capsys):
    rows = [{"prompt": "red :", "completions": [" bad", " good", " good"]}]
    rows += [{"prompt": "cat :", "completions": [" one", " one"]}]
    data, out = tmp_path / "samples.jsonl", tmp_path / "scored.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    text = run(capsys, "--model", models["reward"], "--data", data, "--out", out)
    first, second = lines(out)
    assert first["scores"][0] < first["scores"][1] == pytest.approx(first["scores"][2], abs=1e-6)
    assert first["completions"] == rows[0]["completions"] and "ratings" not in first
    assert second["scores"] == pytest.approx([plain_score(models["reward"], "cat : one</s>")] * 2, abs=1e-5)
    assert "ranked as labelled: not measured" in text
    tokenizer = AutoTokenizer.from_pretrained(models["reward"])
    again = load_data(out, tokenizer, "ratings", DataOptions(ties="drop"))
    assert again.examples[0].scores == pytest.approx(first["scores"], rel=1e-6)
    with pytest.raises(InputError, match=r"samples\.jsonl:1: the completions have no scores; add a column scores"):
        load_data(data, tokenizer, "ratings")


def test_labels_of_steps_that_are_shares_stay_shares(models, tmp_path, capsys):
    row = {"prompt": "red :", "completions": [" cat good", " dog bad"], "labels": [0.75, 0]}
    data, out = tmp_path / "steps.jsonl", tmp_path / "scored.jsonl"
    data.write_text(json.dumps(row), encoding="utf-8")
    run(capsys, "--model", models["prm"], "--data", data, "--out", out)
    assert lines(out)[0]["labels"] == [0.75, False]


def test_steps_gain_probabilities(models, tmp_path, capsys):
    data, out = write_rows(tmp_path / "steps.jsonl", "steps", num=8, seed=3), tmp_path / "scored.jsonl"
    summary = json.loads(run(capsys, "--model", models["prm"], "--data", data, "--out", out, "--json"))
    for before, after in zip(lines(data), lines(out), strict=True):
        assert {name: after[name] for name in before} == before
        steps = after["step_scores"]
        assert len(steps) == 3 and steps[1] == after["min"] < 0.5
        assert after["last"] == steps[2] and after["product"] == pytest.approx(steps[0] * steps[1] * steps[2])
    assert summary["steps"] == 24 and summary["judged_as_labelled"]["value"] == 1.0
    assert load_data(out, AutoTokenizer.from_pretrained(models["prm"]), "steps").kind == "steps"


def test_the_token_budget_does_not_change_a_score(models, tmp_path):
    for name, data, scores in (("reward", "ratings", completion_scores), ("prm", "steps", step_scores)):
        loaded = load(models[name], head="completion" if name == "reward" else "steps")
        rows = load_data(write_rows(tmp_path / f"{name}.jsonl", data), loaded.tokenizer, data).examples
        told: list[int] = []
        whole, small = scores(Policy(loaded.model), rows), scores(Policy(loaded.model), rows, 20, told.append)
        flat = [torch.tensor(x).flatten() if isinstance(x, list) else x for x in (whole, small)]
        assert torch.allclose(*flat, atol=1e-6)
        assert sum(told) == len(rows) and len(told) > 3


def test_rows_longer_than_the_context_are_left_out_and_counted(models, tmp_path):
    data = tmp_path / "long.jsonl"
    rows = [{"prompt": "red :", "completion": " good" * n} for n in (3, 200)]
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = score(models["reward"], data, ModelOptions(), DataOptions(max_length=None))
    assert len(found.rows) == 1 and sum(found.summary["dropped"].values()) == 1
    assert any("dropped 1" in note for note in found.notes)


# ---------------------------------------------------------------- what is refused, and what is taught


def test_a_model_without_a_score_head_is_refused_with_what_to_train(models, tmp_path, capsys):
    data = write_rows(tmp_path / "pairs.jsonl", "pairs")
    message = refused(capsys, "--model", models["language"], "--data", data)
    assert "has no score head" in message and "prefopt train reward --model" in message


def test_data_that_does_not_fit_the_model_is_refused(models, tmp_path, capsys):
    steps, pairs = (write_rows(tmp_path / f"{kind}.jsonl", kind) for kind in ("steps", "pairs"))
    assert "holds steps" in refused(capsys, "--model", models["reward"], "--data", steps)
    message = refused(capsys, "--model", models["prm"], "--data", pairs)
    assert "holds pairs" in message and "this model scores the steps of an answer" in message and "SFT" not in message
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "red"}\n', encoding="utf-8")
    assert "no whole answers" in refused(capsys, "--model", models["reward"], "--data", prompts)


def test_what_is_missing_or_unknown_is_said(models, tmp_path, capsys):
    assert "score needs --model and --data" in refused(capsys, "--model", models["reward"])
    assert "did you mean --model" in refused(capsys, "--modle", "x")
    data = write_rows(tmp_path / "pairs.jsonl", "pairs")
    assert "beta" in refused(capsys, "--model", models["reward"], "--data", data, "beta=1")


def test_scores_that_are_not_finite_are_refused(models, tmp_path, capsys):
    model = AutoModelForSequenceClassification.from_pretrained(models["reward"])
    with torch.no_grad():
        model.score.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(models["reward"]).save_pretrained(tmp_path / "broken")
    data = write_rows(tmp_path / "pairs.jsonl", "pairs")
    assert "not finite" in refused(capsys, "--model", tmp_path / "broken", "--data", data)


def test_help_imports_nothing_heavy_and_names_what_rows_gain() -> None:
    code = "import sys; from prefopt.cli import main; main(['score', '--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *shown, modules = done.stdout.splitlines()
    assert {"torch", "transformers", "pyarrow"} & set(modules.split()) == set()
    assert all(word in "\n".join(shown) for word in ("score_chosen", "step_scores", "--map"))
    assert "score" in cli.COMMANDS


# ---------------------------------------------------------------- how often a score is right


def test_ranked_rightly_by_hand():
    # one comparison each: won, tied, lost: 1.5 of 3
    estimate = ranked_rightly([[1, 0], [0, 1], [1, 0]], [[2.0, 1.0], [3.0, 3.0], [0.0, 0.5]])
    assert (estimate.value, estimate.n) == (0.5, 3) and 0 < estimate.low < 0.5 < estimate.high < 1
    # labels 3, 1, 1: two comparisons, one won; then one of one: (1/2 + 1) / 2
    estimate = ranked_rightly([[3, 1, 1], [1, 0]], [[0.5, 0.0, 1.0], [1.0, 0.0]])
    assert estimate.value == 0.75
    assert ranked_rightly([[1, 1]], [[0.0, 1.0]]).value is None


def test_steps_rightly_by_hand():
    estimate = steps_rightly([[1, 0], [1]], [[0.9, 0.6], [0.7]])  # half and all
    assert estimate.value == 0.75 and estimate.n == 2
    assert steps_rightly([[1], [0]], [[0.9], [0.1]]).low > 0.2  # all right: Wilson's interval
