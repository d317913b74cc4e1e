"""Which method is advised for which case, and what is said with it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from prefopt import config
from prefopt.advice.case import Case, DataFacts, ModelFacts
from prefopt.advice.ranking import changes, rank
from prefopt.advice.rules import METHODS, RULES
from prefopt.advice.stages import stages

PAIRS = DataFacts("pairs", 5_000, 5_000, answer_tokens=60, prompt_tokens=30)
TUNED = ModelFacts(10**9, True, ends=1.0, better=1.2, worse=1.3, own=1.0, samples=48)
UNSOLVED = replace(PAIRS, kind="demonstrations", checker="math", checkable=5_000)
BASE = replace(TUNED, ends=0.1, template=False, better=2.5)


def first(case: Case) -> str:
    return rank(case)[0].name


@pytest.mark.parametrize(
    ("case", "wanted"),
    [
        (Case(PAIRS, TUNED), "dpo"),
        (Case(replace(PAIRS, rows=1_500)), "dpo"),
        (Case(replace(PAIRS, rows=300)), "ipo"),
        (Case(replace(PAIRS, noise=0.23), TUNED), "dpo"),
        (Case(replace(PAIRS, noise=0.45), TUNED), "dpo"),
        (Case(replace(PAIRS, noise=0.0), TUNED), "ipo"),
        (Case(replace(PAIRS, rows=20_000, shallow=0.9), TUNED), "reward_rloo"),
        (Case(replace(PAIRS, kind="labels", good=0.4), TUNED), "kto"),
        (Case(replace(PAIRS, kind="demonstrations"), TUNED), "sft"),
        (Case(replace(PAIRS, kind="demonstrations", checker="math", checkable=4_900), TUNED), "grpo"),
        (Case(replace(PAIRS, checker="math", checkable=812), TUNED), "dpo"),
        (Case(replace(PAIRS, kind="prompts"), TUNED, reward="judge"), "grpo"),
        (
            Case(replace(PAIRS, kind="demonstrations", checker="math", checkable=5_000), replace(TUNED, solved=0.0)),
            "sft",
        ),
        (Case(replace(PAIRS, kind="prompts", checker="math", checkable=5_000), replace(TUNED, solved=0.0)), "grpo"),
        (Case(replace(UNSOLVED, passing=0.9), replace(TUNED, solved=0.0)), "sft"),
        (Case(replace(UNSOLVED, passing=0.002), replace(TUNED, solved=0.0)), "grpo"),
        (Case(replace(UNSOLVED, passing=0.002), replace(TUNED, solved=0.2)), "grpo"),
    ],
)
def test_the_first_method(case: Case, wanted: str) -> None:
    assert first(case) == wanted


def test_what_cannot_be_trained_says_why() -> None:
    refused = {advice.name: advice.refused for advice in rank(Case(replace(PAIRS, kind="labels")))}
    assert refused["dpo"] == "the rows are labels, and it needs pairs or ratings"
    assert "--reward" in refused["grpo"]
    assert not refused["kto"]
    refused = {advice.name: advice.refused for advice in rank(Case(replace(PAIRS, kind="ratings")))}
    assert refused["kto"] == "the rows are ratings, and it needs labels or pairs"
    assert not refused["dpo"]


def test_nothing_can_be_trained_on_prompts_alone_and_the_way_out_is_said() -> None:
    case = Case(replace(PAIRS, kind="prompts"))
    assert all(advice.refused for advice in rank(case))
    assert any("--reward" in words for words in changes(case))


def test_some_rows_with_answers_to_check_are_counted_in_what_would_change_the_answer() -> None:
    said = changes(Case(replace(PAIRS, checker="math", checkable=812), TUNED))
    assert any("812 of 5,000 rows" in words and "GRPO" in words for words in said)


def test_a_method_that_does_not_fit_comes_after_those_that_do() -> None:
    case = Case(
        replace(PAIRS, rows=20_000, shallow=0.9), TUNED, room=10**9, memory={"reward_rloo": 10**10, "dpo": 10**8}
    )
    assert first(replace(case, memory={})) == "reward_rloo"
    assert first(case) not in ("reward_rloo",)


def test_every_reason_says_what_it_rests_on() -> None:
    for rule in RULES:
        assert rule.evidence in ("measured here", "published", "convention")
        assert rule.source or rule.evidence == "convention"
        assert set(rule.methods) <= set(METHODS)


def test_a_base_model_is_taught_to_answer_first() -> None:
    made = stages(Case(PAIRS, BASE), "dpo", "m", "d.jsonl", "runs/a")
    assert [stage.name for stage in made] == ["sft", "dpo"]
    assert made[1].options["model"] == made[0].options["out"] + "/model"
    assert [stage.name for stage in stages(Case(PAIRS, TUNED), "dpo", "m", "d.jsonl", "runs/a")] == ["dpo"]


def test_wrong_labels_are_told_to_the_loss_where_they_are_more_than_people_differ() -> None:
    for noise, wanted in ((0.23, {}), (0.45, {"loss_type": "robust", "label_smoothing": 0.3})):
        options = stages(Case(replace(PAIRS, noise=noise), TUNED), "dpo", "m", "d.jsonl", "runs/a")[-1].options
        assert {name: options[name] for name in ("loss_type", "label_smoothing") if name in options} == wanted


KINDS = ("demonstrations", "pairs", "ratings", "labels", "prompts")


@pytest.mark.parametrize(("method", "kind"), [(m, kind) for m in METHODS for kind in KINDS if kind in METHODS[m].kinds])
def test_the_options_of_every_stage_exist(method: str, kind: str) -> None:
    case = Case(replace(PAIRS, kind=kind, checker="math", checkable=5_000), BASE)
    for stage in stages(case, method, "m", "d.jsonl", "runs/a", positions=512):
        options = dict(stage.options)
        config.resolve(config.sections(str(options.pop("objective"))), config.Layer(options))
