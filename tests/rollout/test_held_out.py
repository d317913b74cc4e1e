"""Held-out prompts: sampled alike at every evaluation, with the change of each prompt's mean and its interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from laws import word_tokenizer

from prefopt.models.sampling import Completion, Sampling
from prefopt.records import Sample, Score
from prefopt.rollout.attempts import Attempts
from prefopt.rollout.held_out import HeldOut
from prefopt.rollout.options import RolloutOptions
from prefopt.rollout.prompts import Prompt

WORD = word_tokenizer()
GOOD, BAD = (WORD.convert_tokens_to_ids(word) for word in ("good", "bad"))
PROMPTS = [Prompt([GOOD], f"prompt {at}", {"at": at}) for at in range(3)]


class Learner:
    """A sampler that writes as many `good` among a prompt's completions as the policy it was last given says."""

    def __init__(self) -> None:
        self.good = [0, 0, 0]
        self.asked: list[tuple[int, tuple[int, ...]]] = []

    def update(self, policy: Any) -> None:
        self.good = policy

    def sample(self, prompts: Any, n: int, sampling: Sampling, seeds: Sequence[int]) -> list[list[Completion]]:
        self.asked.append((n, tuple(seeds)))
        return [[self.one(at < good) for at in range(n)] for good in self.good]

    @staticmethod
    def one(good: bool) -> Completion:
        return Completion([GOOD if good else BAD], [-1.0], True)

    def close(self) -> None:
        pass


class Worth:
    """A reward of so much for `good` and `bad`; None: it cannot tell."""

    name = "worth"

    def __init__(self, good: float | None = 1.0, bad: float | None = 0.0) -> None:
        self.good, self.bad = good, bad

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        values = [self.good if "good" in sample.text else self.bad for sample in samples]
        return [Score(value, "" if value is not None else "no answer") for value in values]

    def close(self) -> None:
        pass


def held_out(reward: Worth | None = None, num: int = 3) -> tuple[HeldOut, Learner]:
    options, sampler = RolloutOptions(num_completions=7, eval_completions=4, max_tokens=2), Learner()
    return HeldOut(PROMPTS[:num], Attempts(sampler, reward or Worth(), WORD, options), options, 5), sampler


def test_every_evaluation_draws_eval_completions_with_the_same_seeds() -> None:
    held, sampler = held_out()
    held([0, 1, 2])
    held([1, 1, 4])
    first, second = sampler.asked
    assert first == second
    assert first[0] == 4 and len(set(first[1])) == 3


def test_the_gain_is_the_end_less_the_start_of_each_prompt() -> None:
    """Good among four: 0, 1, 2, then 1, 3, 2. Means 0.25 and 0.5; gains 0.25, 0.5 and 0."""
    held, _ = held_out()
    assert held([0, 1, 2])["eval/reward"] == pytest.approx(0.25)
    assert held([1, 3, 2])["eval/accuracy"] == pytest.approx(0.5)
    found = held.summary()
    for name in ("reward", "accuracy"):
        assert [found[name][when]["value"] for when in ("start", "end", "gain")] == pytest.approx([0.25, 0.5, 0.25])
    low, high = found["reward"]["gain"]["low"], found["reward"]["gain"]["high"]
    assert 0 <= low < 0.25 < high <= 0.5


def test_a_loss_is_a_negative_gain() -> None:
    held, _ = held_out()
    held([4, 4, 3])
    held([0, 0, 0])
    assert held.summary()["reward"]["gain"]["value"] == pytest.approx(-11 / 12)


def test_rewards_of_0_and_1_alone_are_accuracies() -> None:
    held, _ = held_out(Worth(good=1.0, bad=0.5))  # one of the two values is right or wrong
    assert "eval/accuracy" not in held([0, 1, 2])
    assert "accuracy" not in held.summary()
    half, _ = held_out(Worth(good=0.5, bad=0.0))
    assert "eval/accuracy" not in half([0, 1, 2])
    whole, _ = held_out(Worth())
    assert whole([4, 0, 0])["eval/accuracy"] == pytest.approx(1 / 3)


def test_a_prompt_without_a_score_has_no_mean_and_takes_no_part_in_the_gain() -> None:
    held, _ = held_out(Worth(bad=None), num=2)
    held([0, 2])
    held([3, 4])
    assert held.rewards == [[None, 1.0], [1.0, 1.0]]
    found = held.summary()["reward"]
    assert (found["start"]["n"], found["end"]["n"], found["gain"]["n"]) == (1, 2, 1)
