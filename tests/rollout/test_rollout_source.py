"""The source of online objectives: what is drawn, scored and cut into updates, by a known sampler and reward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from laws import word_tokenizer
from torch import Tensor

from prefopt.batch import Batch
from prefopt.budget import Budget
from prefopt.loop import Models
from prefopt.models.sampling import Completion, Sampling
from prefopt.records import InputError, Sample, Score
from prefopt.rollout.attempts import Attempts
from prefopt.rollout.groups import repeated
from prefopt.rollout.options import RolloutOptions
from prefopt.rollout.prompts import Prompt, Stream
from prefopt.rollout.source import Online

WORD = word_tokenizer()
GOOD, BAD, END = (WORD.convert_tokens_to_ids(word) for word in ("good", "bad", "</s>"))
PROMPTS = [Prompt(WORD("red " * (1 + at % 3) + "cat :")["input_ids"], f"prompt {at}", {"at": at}) for at in range(12)]


@dataclass
class Dice:
    """A sampler whose completion i of a prompt is `good` or `bad` by its seed; unequal lengths, every fourth is cut."""

    updates: int = 0
    asked: list[list[int]] = field(default_factory=list)

    def update(self, policy: Any) -> None:
        self.updates += 1

    def sample(self, prompts: Any, n: int, sampling: Sampling, seeds: Sequence[int]) -> list[list[Completion]]:
        self.asked.append(list(seeds))
        return [[self.one(seed, at) for at in range(n)] for seed in seeds]

    @staticmethod
    def one(seed: int, at: int) -> Completion:
        tokens = [GOOD if (seed >> at) & 1 else BAD] * (1 + at % 3)
        ended = at % 4 != 3
        tokens = [*tokens, END] if ended else tokens
        return Completion(tokens, [-0.25 * (place + 1) for place in range(len(tokens))], ended)

    def close(self) -> None:
        pass


class Says:
    """A reward that is a function of one sample."""

    name = "says"

    def __init__(self, value: Callable[[Sample], float | None]) -> None:
        self.value = value
        self.seen: list[Sample] = []

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        self.seen += samples
        return [Score(value, "" if value is not None else "it is silent") for value in map(self.value, samples)]

    def close(self) -> None:
        pass


def is_good(sample: Sample) -> float:
    return float("good" in sample.text)


class Constants(NamedTuple):
    number: Tensor  # [G]
    reward: Tensor  # [N]
    logp: Tensor  # [K]


class Counting:
    """An objective that numbers the prompts of every rollout it is given."""

    def __init__(self) -> None:
        self.rollouts: list[tuple[Batch, bool]] = []

    def count(self, batch: Batch) -> Tensor:
        return (~batch.score.isnan()).sum()

    def targets(self, batch: Batch, models: Any) -> Constants:
        self.rollouts.append((batch, models.several))
        assert batch.rollout_logp is not None
        return Constants(torch.arange(batch.num_prompts), batch.score, batch.rollout_logp)


def online(value: Any = is_good, batch_size: int = 3, said: Any = None, **options: Any) -> Online:
    given = RolloutOptions(**{"num_completions": 4, "max_tokens": 4, **options})
    attempts = Attempts(Dice(), Says(value), WORD, given)
    said = [] if said is None else said
    stream = Stream(PROMPTS, 0, curriculum=given.curriculum)
    return Online(stream, attempts, Counting(), given, batch_size=batch_size, budget=Budget(10**6), say=said.append)


def take(source: Online, count: int) -> list[Batch]:
    batches = source.batches(Models(policy=None))
    return [batch for _, (batch, _) in zip(range(count), batches, strict=False)]


def test_a_batch_holds_what_was_drawn_and_what_it_is_worth() -> None:
    source = online()
    [batch] = take(source, 1)
    assert (batch.num_prompts, batch.num_completions) == (3, 12)
    drawn = [Dice.one(seed, at) for seed in source.attempts.sampler.asked[0] for at in range(4)]
    assert [row.tolist() for row in batch.completions.rows()] == [one.tokens for one in drawn]
    assert batch.score.tolist() == [float(one.tokens[0] == GOOD) for one in drawn]
    assert batch.rollout_logp is not None and batch.trained.all()
    assert batch.rollout_logp.tolist() == [value for one in drawn for value in one.logp]


def test_the_reward_reads_text_without_special_tokens_and_the_columns_of_the_row() -> None:
    source = online()
    take(source, 1)
    seen = source.attempts.reward.seen
    texts = {" " + " ".join([word] * times) for word in ("good", "bad") for times in (1, 2, 3)}
    assert {sample.text for sample in seen} <= texts
    assert all(sample.prompt == f"prompt {sample.columns['at']}" for sample in seen)
    assert [sample.group for sample in seen] == [0] * 4 + [1] * 4 + [2] * 4
    assert [sample.finished for sample in seen[:4]] == [True, True, True, False]


def test_constants_are_computed_once_for_a_rollout_and_cut_with_it() -> None:
    source = online(rollout_batches=2, rollout_passes=3)
    batches = take(source, 6)
    [(whole, several)] = source.objective.rollouts
    assert several and whole.num_prompts == 6
    numbers = [batch.targets.number.tolist() for batch in batches]
    assert sorted(numbers[0] + numbers[1]) == list(range(6))
    assert all(sorted(map(tuple, numbers[at : at + 2])) == [(0, 1, 2), (3, 4, 5)] for at in (0, 2, 4))
    for batch in batches:
        assert torch.equal(batch.targets.reward, batch.score)
        assert torch.equal(batch.targets.logp, batch.rollout_logp)
    assert source.attempts.sampler.updates == 1
    take(source, 1)
    assert source.attempts.sampler.updates == 2


def test_every_pass_but_the_first_takes_the_updates_in_an_order_of_its_own() -> None:
    source = online(batch_size=2, rollout_batches=6, rollout_passes=3)
    first = [batch.targets.number[0].item() for batch in take(source, 18)]
    passes = [first[start : start + 6] for start in (0, 6, 12)]
    assert passes[0] == [0, 2, 4, 6, 8, 10]
    assert all(sorted(order) == passes[0] for order in passes)
    assert len({tuple(order) for order in passes}) == 3


def test_one_update_per_rollout_is_said_to_the_objective() -> None:
    source = online()
    take(source, 2)
    assert [several for _, several in source.objective.rollouts] == [False, False]


def test_the_rollout_that_was_looked_at_is_the_first_that_is_trained_on() -> None:
    looked = online()
    first = looked.first(None)
    assert torch.equal(first.completions.values, take(looked, 1)[0].completions.values)
    assert torch.equal(take(online(), 1)[0].completions.values, first.completions.values)


def test_metrics_of_a_rollout_come_with_its_first_update() -> None:
    source = online(rollout_passes=2)
    batches = source.batches(Models(policy=None))
    next(batches)
    first = dict(source.seen)
    next(batches)
    assert {"reward", "unscored", "zero_variance/failed", "seconds/sampling"} <= first.keys()
    assert source.seen == {"epoch": 0.25}  # 3 of 12 prompts
    next(batches)
    assert "reward" in source.seen


@pytest.mark.fault(17)
def test_what_could_not_be_scored_takes_no_part() -> None:
    source = online(lambda sample: None if sample.columns["at"] % 2 else is_good(sample))
    [batch] = take(source, 1)
    missing = [sample.columns["at"] % 2 == 1 for sample in source.attempts.reward.seen]
    assert batch.score.isnan().tolist() == missing
    assert 0 < source.seen["unscored"] < 1 and source.seen["unscored"] == sum(missing) / 12


@pytest.mark.fault(17)
def test_rollouts_without_a_score_are_left_out_and_stop_the_run_with_the_reason() -> None:
    said: list[str] = []
    source = online(lambda sample: None, said=said)
    with pytest.raises(InputError, match=r"3 rollouts in a row without a single score; the first reason: it is silent"):
        take(source, 1)
    assert source.objective.rollouts == [] and len(said) == 3
    assert said[0] == "no completion of rollout 1 has a score, so nothing is learnt from it: it is silent"


@pytest.mark.fault(17)
def test_a_rollout_without_a_score_between_others_is_passed_over() -> None:
    calls: list[Sample] = []

    def value(sample: Sample) -> float | None:
        calls.append(sample)
        return None if (len(calls) - 1) // 12 % 3 else is_good(sample)  # rollouts 1, 4, 7, ... are scored

    source = online(value, said=[])
    assert len(take(source, 3)) == 3
    assert source.rollouts == 7


def test_an_update_without_a_score_is_left_out_of_its_rollout() -> None:
    order = [draw.number for draw in Stream(PROMPTS, 0).take(6)]
    source = online(lambda sample: None if sample.columns["at"] in order[:3] else is_good(sample), rollout_batches=2)
    [batch] = take(source, 1)
    assert batch.targets.number.tolist() == [3, 4, 5] and not batch.score.isnan().any()


def test_completions_that_were_cut_may_be_kept_ignored_or_punished() -> None:
    worth = {how: take(online(lambda s: 1.0, unfinished=how), 1)[0].score for how in ("keep", "ignore", "penalty")}
    cut = torch.tensor([False, False, False, True] * 3)
    assert worth["keep"].tolist() == [1.0] * 12
    assert torch.equal(worth["ignore"].isnan(), cut)
    assert worth["penalty"].tolist() == [1.0, 1.0, 1.0, 0.0] * 3


@pytest.mark.fault(18)
def test_dynamic_sampling_draws_on_until_every_group_teaches_something() -> None:
    """Prompts with an even number are always solved: those of odd number alone have groups that differ."""

    def value(sample: Sample) -> float:
        return 1.0 if sample.columns["at"] % 2 == 0 else float(len(sample.tokens) % 2)

    plain, dynamic = online(value, batch_size=4), online(value, batch_size=4, dynamic_sampling=True, dynamic_rounds=9)
    [left], [right] = take(plain, 1), take(dynamic, 1)

    def useful(batch: Batch) -> int:
        return sum(len(set(own.tolist())) > 1 for own in batch.score.view(-1, 4))

    assert useful(left) < 4 == useful(right)
    assert dynamic.seen["effective_groups"] == 4 and dynamic.seen["zero_variance/solved"] > 0
    assert dynamic.stream.total > plain.stream.total == 4
    assert dynamic.seen["epoch"] == dynamic.stream.total / 12


def test_a_round_of_dynamic_sampling_draws_no_more_than_is_missing() -> None:
    """Every second prompt of the stream teaches something: 2 of 4 are missing, then 1 of 2, and 1 again."""
    useful = {draw.number for draw in Stream(PROMPTS, 0).take(12)[1::2]}

    def value(sample: Sample) -> float:
        return float(len(sample.tokens) % 2) if sample.columns["at"] in useful else 0.0

    source = online(value, batch_size=4, dynamic_sampling=True, dynamic_rounds=9)
    take(source, 1)
    assert [len(seeds) for seeds in source.attempts.sampler.asked] == [4, 2, 1, 1]


@pytest.mark.fault(18)
def test_dynamic_sampling_gives_up_after_its_rounds_and_fills_up() -> None:
    source = online(lambda sample: 0.0, dynamic_sampling=True, dynamic_rounds=2)
    [batch] = take(source, 1)
    assert batch.num_prompts == 3 and source.stream.total == 9
    assert source.seen["effective_groups"] == 0 and source.seen["zero_variance/failed"] == 1


def test_the_task_is_measured_so_that_a_stall_can_be_seen() -> None:
    source = online(lambda sample: float(sample.columns["at"] < 3), batch_size=12)
    take(source, 1)
    seen = {name: source.seen[name] for name in ("task_reward", "success", "zero_variance/failed")}
    assert seen == {"task_reward": 0.25, "success": 0.25, "zero_variance/failed": 0.75}
    assert source.seen["judged"] == 12 * source.options.num_completions


def test_repetition_is_the_share_of_runs_of_four_that_came_before() -> None:
    # runs: abab baba abab baba ab.. : of 5 runs of "abababab" 2 are new
    assert repeated([1, 2] * 4) == pytest.approx(3 / 5)
    assert repeated([1, 2, 3, 4, 5]) == 0 and repeated([1, 1, 1]) == 0


class Polite:
    """A mixture whose task is never solved, with ever more for manners."""

    name = "polite"

    def __init__(self) -> None:
        self.asked = 0
        self.at_steps: list[tuple[int, int]] = []

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        self.asked += 1
        manners = [self.asked / 8 + 0.1 * (at % 2) for at in range(len(samples))]
        return [Score(extra, "", {"task": 0.0, "manners": extra}) for extra in manners]

    def at(self, step: int, steps: int) -> None:
        self.at_steps.append((step, steps))

    def close(self) -> None:
        pass


def test_a_bonus_beside_the_task_does_not_hide_a_stall() -> None:
    source = online(stall_window=4)
    source.attempts.reward = Polite()
    take(source, 6)
    assert source.seen["reward"] > 0.7
    assert source.seen["task_reward"] == source.seen["success"] == 0 and source.seen["zero_variance/failed"] == 1


def test_a_reward_that_asks_is_told_before_every_rollout_how_far_the_run_is() -> None:
    source = online(rollout_batches=2)
    source.steps, source.attempts.reward = 6, Polite()
    take(source, 6)
    assert source.attempts.reward.at_steps == [(0, 6), (2, 6), (4, 6)]


def test_easier_prompts_are_no_success_of_those_with_their_number() -> None:
    """The easier three are never solved, the main ones with the same numbers always."""
    source = online(lambda sample: float(sample.columns["at"] < 3), batch_size=4, curriculum="success")
    easier = [Prompt(prompt.tokens, "easy", {"at": 100 + at}) for at, prompt in enumerate(PROMPTS[:3])]
    source.stream = Stream(PROMPTS, 0, curriculum="success", easier=easier, easier_share=0.5)
    take(source, 6)
    assert source.stream.total - source.stream.drawn == 12
    assert source.stream.order.success == {at: float(at < 3) for at in range(12)}


def test_the_curriculum_is_told_how_often_a_prompt_was_solved() -> None:
    source = online(lambda sample: float(sample.columns["at"] < 3), curriculum="success")
    take(source, 4)
    assert source.stream.order.success == {at: float(at < 3) for at in range(12)}


def test_a_reward_that_gives_the_wrong_number_of_scores_stops_the_run() -> None:
    source = online()
    source.attempts.reward = lambda samples: [Score(1.0)]
    source.attempts.reward.name = "short"
    with pytest.raises(InputError, match="short: 1 scores for 12 completions"):
        take(source, 1)


@pytest.mark.fault(28)
def test_a_sampler_that_gives_the_wrong_number_of_completions_stops_the_run() -> None:
    source = online()
    source.attempts.sampler.sample = lambda prompts, n, sampling, seeds: [[]] * len(prompts)
    with pytest.raises(InputError, match=r"the sampler gave \[0, 0, 0\] completions for 3 x 4"):
        take(source, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature 0 makes all completions of a prompt the same"),
        ({"num_completions": 0}, "num_completions must be at least 1"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1"),
        ({"unfinished_penalty": 2.0}, "unfinished_penalty is read with unfinished: penalty only"),
        ({"dynamic_rounds": 5}, "dynamic_rounds is read with dynamic_sampling only"),
        ({"easier_share": 0.3}, "easier_share is read with easier_data only"),
        ({"easier_share": 1.0, "easier_data": "x"}, "easier_share must be between 0 and 1"),
        ({"unfinished": "penalty", "unfinished_penalty": math.nan}, "unfinished_penalty must be above 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RolloutOptions(**options)
