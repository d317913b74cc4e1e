"""Rewards by name: what can be named, what is refused, and a function of a user from file to score."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prefopt.records import InputError, Sample, Score
from prefopt.rewards import RewardOptions, build
from prefopt.rewards.direct import DirectReward
from prefopt.rewards.options import BUILT_IN, READ_BY


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_name_builds_a_reward_that_scores(name: str) -> None:
    needs: dict[str, dict[str, Any]] = {
        "length": {"length_target": 4},
        "overlong": {"overlong_tokens": 4, "overlong_cache": 2},
    }
    columns = {
        "answer": "1",
        "test_list": ["assert double(2) == 4"],
        "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{}],
    }
    reward = build(RewardOptions(reward=name, reward_workers=1, **needs.get(name, {})))
    try:
        (score,) = reward([Sample("p", r"\boxed{1}", [1, 2], columns=columns)])
    finally:
        reward.close()
    assert score.value is not None and next(iter(score.parts)) == name
    assert reward.counts == {name: {"scored": 1}}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "none is named; choose from math"),
        ({"reward": "maths"}, "did you mean math"),
        ({"reward": "something"}, "a function as file.py:function"),
        ({"reward": "missing.py:f"}, "there is no file missing.py"),
        ({"reward": "length"}, "length_target is missing"),
        ({"reward": "overlong", "overlong_tokens": 9}, "overlong_cache is missing"),
        ({"reward": ["exact", "exact"]}, "not all different"),
        ({"reward": ["exact", "format"], "reward_weights": [1.0]}, "1 for 2 rewards"),
        ({"reward": "exact", "math_expressions": True}, "math_expressions is read with reward=math only"),
    ],
)
def test_what_cannot_be_built_says_what_to_do(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        build(RewardOptions(**options))


def test_what_is_neither_a_name_nor_a_function_is_refused() -> None:
    with pytest.raises(InputError, match="reward: 3 is not one; give a name"):
        build(RewardOptions(), [3])  # type: ignore[list-item]


@pytest.mark.parametrize(
    "options",
    [
        {"reward_deadline": 0.0},
        {"sample_deadline": float("inf")},
        {"reward_failures": 1.5},
        {"reward_memory": 0.0},
        {"reward_workers": 0},
        {"repetition_ngram": 0},
        {"code_memory": 0.0},
        {"overlong_tokens": 2, "overlong_cache": 3},
        {"reward_weights": [float("nan")]},
    ],
)
def test_values_out_of_range_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(reversed(options))):
        RewardOptions(**options)


def test_every_option_of_one_reward_is_an_option() -> None:
    usual = RewardOptions()
    assert all(hasattr(usual, name) and set(readers) <= BUILT_IN.keys() for name, readers in READ_BY.items())


def test_names_functions_and_objects_are_mixed(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def short(completions, **columns):\n    return [len(c) < 3 for c in completions]\n"
    )

    def long(completions: list[str], **columns: Any) -> list[float]:
        return [10.0 * (len(completion) > 2) for completion in completions]

    own = DirectReward("own", lambda sample: Score(100.0))
    options = RewardOptions(reward=["exact", f"{tmp_path}/mine.py:short"], reward_weights=[1.0, 2.0, 3.0, 4.0, 5.0])
    reward = build(options, [long, own, "judge"], {"judge": lambda: DirectReward("judge", lambda sample: Score(0.0))})
    try:
        scores = reward([Sample("p", text, columns={"answer": "abc"}) for text in ("abc", "ab")])
        assert [score.value for score in scores] == [1 + 30 + 400, 2 + 400]
        assert list(scores[0].parts) == ["exact", "short", "long", "own", "judge"]
    finally:
        reward.close()


def test_a_run_tells_functions_where_it_is_and_hears_what_they_log() -> None:
    def step(completions: list[str], trainer_state: Any, log_extra: Any, log_metric: Any) -> list[float]:
        log_extra("size", map(len, completions))
        log_metric("half", 0.5)
        return [trainer_state.global_step / trainer_state.max_steps] * len(completions)

    reward = build(RewardOptions(), [step])
    try:
        reward.at(3, 12)
        assert reward([Sample("p", "c")])[0].value == 0.25
        assert reward.extra == {"step/size": [1]} and reward.metrics == {"step/half": 0.5}
    finally:
        reward.close()


def test_importing_rewards_does_not_import_torch_or_the_algebra() -> None:
    code = "import sys, prefopt.rewards; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"torch", "transformers", "math_verify", "sympy", "numpy"} & set(loaded) == set()
