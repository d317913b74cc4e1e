"""The quickstart of learning from rewards: its task by hand, and a small run of all of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from random import Random
from typing import Any

import pytest

from prefopt import cli
from prefopt.recipes import quickstart
from prefopt.recipes.quickstart import recipe
from prefopt.recipes.quickstart.grpo import HEADER, OWN, Settings
from prefopt.recipes.quickstart.grpo_screen import conclusions, stalled, verdict
from prefopt.recipes.quickstart.sheets import (
    TOTALS,
    Sheet,
    answer_carelessly,
    build_model,
    build_tokenizer,
    demonstration,
    draw,
    draw_different,
    tokens_of,
)
from prefopt.records import InputError, Sample
from prefopt.rewards.exact import exact

SHEET = Sheet(((7, 5), (3, 9), (9, 9)))


def test_a_sheet_and_its_answer_read_as_they_should():
    assert SHEET.prompt == "a 7 + 5 b 3 + 9 c 9 + 9 ="
    assert SHEET.answer == "a 12 b 12 c 18"


@pytest.mark.parametrize(
    ("said", "reward", "shown"),
    [
        (" a 12 b 12 c 18", 1.0, "[green]right[/]"),
        ("a 12 b 13 c 18", 0.0, "[red]2 of 3[/]"),
        ("a 12 b 12", 0.0, "[red]2 of 3[/]"),
        ("a 12 b 12 c 18 d 4", 0.0, "[red]not in this form[/]"),
        ("b 12 a 12 c 18", 0.0, "[red]not in this form[/]"),
        ("12 12 18", 0.0, "[red]0 of 3[/]"),
        ("", 0.0, "[red]0 of 3[/]"),
    ],
)
def test_a_point_only_where_all_of_a_sheet_is_right(said, reward, shown):
    [score] = exact()([Sample(SHEET.prompt, said, columns={"answer": SHEET.answer})])
    assert score.value == reward
    assert verdict(SHEET, said.strip()) == shown


def test_careless_writers_slip_as_often_as_they_should_and_never_write_the_right_total_by_a_slip():
    random, n = Random(0), 4000
    answers = [answer_carelessly(SHEET, random, 0.6).split() for _ in range(n)]
    for place, total in ((1, "12"), (3, "12"), (5, "18")):
        said = [answer[place] for answer in answers]
        assert said.count(total) / n == pytest.approx(0.6, abs=4 * math.sqrt(0.24 / n))
        assert set(said) == {str(other) for other in TOTALS}  # every wrong total too
    assert answer_carelessly(SHEET, random, 1.0) == SHEET.answer


def test_no_sheet_is_drawn_that_is_held_out():
    random = Random(1)
    held_out = draw_different(70, 1, random)
    assert len(set(held_out)) == 70  # of the 81 there are
    assert not {draw(1, random, held_out) for _ in range(300)} & set(held_out)


def test_a_word_is_a_token_and_a_completion_goes_on_from_its_prompt():
    tokenizer = build_tokenizer(3)
    row = demonstration(SHEET, Random(0), 1.0)
    prompt, completion = (tokenizer(row[name])["input_ids"] for name in ("prompt", "completion"))
    assert tokenizer(row["prompt"] + row["completion"])["input_ids"] == prompt + completion
    assert tokenizer.decode(completion) == SHEET.answer and len(completion) + 1 == tokens_of(3) == 7
    assert tokenizer.unk_token_id not in prompt + completion
    model = build_model(tokenizer, 3, seed=0)
    assert len(prompt) + tokens_of(3) == model.config.n_positions
    assert model.lm_head.weight.equal(build_model(tokenizer, 3, seed=0).lm_head.weight)
    assert not model.lm_head.weight.equal(build_model(tokenizer, 3, seed=1).lm_head.weight)


def test_neither_quickstart_clears_the_folder_of_the_other(tmp_path):
    for header, own, other in ((HEADER, OWN, (recipe.HEADER, recipe.OWN)), (recipe.HEADER, recipe.OWN, (HEADER, OWN))):
        folder = tmp_path / str(len(header))
        recipe.claim(folder, header, own)
        (folder / "config.yaml").write_text(header)
        (folder / "summary.json").touch()
        with pytest.raises(InputError, match="no quickstart wrote"):
            recipe.claim(folder, *other)
        assert (folder / "summary.json").exists()
        recipe.claim(folder, header, own)
        assert not list(folder.iterdir())


def test_another_word_is_refused(capsys):
    assert cli.main(["quickstart", "ppo"]) == 2
    assert "quickstart ppo: there is `prefopt quickstart`, alone or with `grpo`" in capsys.readouterr().err


# ---------------------------------------------------------------- what is said


def accuracy(start: float, end: float, low: float | None, high: float | None) -> dict[str, Any]:
    why = {} if low is not None else {"why": "all 9 items are equal"}
    ends = {name: {"value": value, "low": 0.0, "high": 1.0, "n": 9} for name, value in (("start", start), ("end", end))}
    return {**ends, "gain": {"value": end - start, "low": low, "high": high, "n": 9, **why}}


def test_the_conclusions_claim_no_more_than_the_intervals_and_the_run_say():
    up, level, down, none = (
        accuracy(0.2, 0.9, 0.63, 0.77),
        accuracy(0.2, 0.25, -0.01, 0.11),
        accuracy(0.5, 0.1, -0.5, -0.3),
        accuracy(0.0, 0.0, None, None),
    )
    lasting = {"since": 1, "recovered": None}

    def said(main: Any, alone: Any, stall: Any, mixed: Any) -> list[str]:
        hard = {"sums": 9, "alone": {"accuracy": alone, "stalled": stall}, "easier_mixed_in": {"accuracy": mixed}}
        return conclusions({"sums": 2, "accuracy": main, "hard": hard})

    first = said(up, none, lasting, up)
    assert "at least 63 points" in first[0] and "at least 63 points" in first[2]
    assert "reported as stalled" in first[1] and "no gain can be claimed (all 9 items are equal)" in first[1]
    second = said(level, up, {"since": 1, "recovered": 7}, down)
    assert "its interval holds 0" in second[0]
    assert "reported" not in second[1] and "not stalled at its end" in second[1]
    assert "less often, by at least 30 points" in second[2]
    assert "not stalled" in said(up, none, None, up)[1]


def test_a_stall_is_said_with_its_updates():
    assert stalled(None) == "no"
    assert stalled({"since": 1, "recovered": None}) == "from update 1"
    assert stalled({"since": 3, "recovered": 44}) == "from update 3 to 44"


# ---------------------------------------------------------------- a small run of all of it


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    return folder, quickstart.run_grpo(folder, seed=3, quick=True)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_reward_raises_held_out_accuracy(quick):
    folder, summary = quick
    found = summary["accuracy"]
    assert found["gain"]["low"] > 0.1
    assert found["end"]["value"] - found["start"]["value"] == pytest.approx(found["gain"]["value"])
    for name in ("start", "end"):
        assert found[name]["low"] <= found[name]["value"] <= found[name]["high"] and found[name]["n"] == 48
    assert json.loads((folder / "summary.json").read_text()) == summary


def test_what_no_completion_earns_stalls_and_is_reported(quick):
    hard = quick[1]["hard"]["alone"]
    assert hard["accuracy"]["end"]["value"] == hard["accuracy"]["start"]["value"] == 0
    assert hard["stalled"]["since"] == 1 and hard["stalled"]["recovered"] is None
    assert "easier_data" in hard["stalled"]["advice"]


def test_the_hard_task_is_tried_with_as_many_of_its_prompts_alone_and_beside_easier_ones(quick):
    folder, _ = quick
    settings = Settings.quick(3)
    asked = {"hard": settings.hard_prompts, "mixed": settings.hard_prompts + settings.easier_prompts}
    for name, prompts in asked.items():
        given = (folder / name / "config.yaml").read_text()
        assert f"batch_size: {prompts}\n" in given and f"max_steps: {settings.hard_updates}\n" in given
    assert "easier_data: null" in (folder / "hard" / "config.yaml").read_text()
    share = settings.easier_prompts / asked["mixed"]
    assert f"easier_share: {share}\n" in (folder / "mixed" / "config.yaml").read_text()


def test_no_training_sees_a_held_out_sheet(quick):
    folder, _ = quick
    data = folder / "data"
    held_out = {row["prompt"] for name in ("grpo", "hard") for row in rows(data / f"{name}_held_out.jsonl")}
    assert len(held_out) == 2 * Settings.quick(3).held_out
    for name in ("sft", "grpo", "hard", "easier"):
        assert not held_out & {row["prompt"] for row in rows(data / f"{name}.jsonl")}


def test_answers_and_metrics_of_every_model_are_kept(quick):
    folder, _ = quick
    kept = rows(folder / "samples.jsonl")
    assert [row["task"] for row in kept] == ["grpo"] * 48 + ["hard"] * 48
    assert kept[0].keys() >= {"prompt", "answer", "sft", "grpo"} and kept[-1].keys() >= {"sft", "hard", "mixed"}
    right = {name: sum(row[name] == row["answer"] for row in kept[:48]) for name in ("sft", "grpo")}
    assert right["grpo"] > right["sft"]
    assert [*dict.fromkeys(row["phase"] for row in rows(folder / "metrics.jsonl"))] == ["sft", "grpo", "hard", "mixed"]
