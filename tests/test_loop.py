"""The loop: schedules by hand, exact accumulation, and what happens when a step goes wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from laws import (
    EVERYTHING,
    apart,
    batch_from,
    batch_of,
    drawn,
    far,
    gpt_neox,
    largest_difference,
    one_update,
    rows,
    together,
    weights,
)
from variants import ALL, ROLLOUT_WIDE

from prefopt.batch import Batch
from prefopt.budget import Budget
from prefopt.data.source import Offline
from prefopt.loop import LoopOptions, Models, evaluate, rate, train
from prefopt.models.adapters import LoraOptions, adapt
from prefopt.models.policy import Policy
from prefopt.models.reference import AdapterOff, Cached, Copied
from prefopt.objectives import DPO, EVERY, SFT, Nothing
from prefopt.optimizer import Updater
from prefopt.records import Example, InputError

# the loop sees no more of an online method than its constants: a prompt's, the rollout's, a critic's
ONLINE = ("grpo", "lite_ppo", "ppo", "online_dpo")
NAMES = [name for name, cls in EVERY.items() if cls.facts.data != "prompts" or name in ONLINE]
every_objective = pytest.mark.parametrize("objective", [ALL[name] for name in NAMES], ids=NAMES)

# ---------------------------------------------------------------- schedules


def rates(steps: int, **options: Any) -> list[float]:
    return [rate(LoopOptions(**options), 8.0, step, steps) for step in range(steps)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # two of ten updates warm up: 8 x 1/2, 8 x 2/2; then eight updates fall from 8 towards 0
        ("linear", [4, 8, 8, 7, 6, 5, 4, 3, 2, 1]),
        ("constant", [4, 8] + [8] * 8),
        # 8 x sqrt(2 / (step + 1)) from the third on
        ("inverse_sqrt", [4, 8] + [8 * math.sqrt(2 / n) for n in range(3, 11)]),
        # half a cosine over eight updates
        ("cosine", [4, 8] + [4 * (1 + math.cos(math.pi * n / 8)) for n in range(8)]),
    ],
)
def test_schedules_by_hand(schedule, expected):
    assert rates(10, schedule=schedule, warmup=0.2) == pytest.approx(expected)


def test_without_warmup_the_first_update_has_the_peak_rate():
    assert rates(4, schedule="linear", warmup=0.0) == [8.0, 6.0, 4.0, 2.0]
    assert rates(1, schedule="cosine", warmup=0.0) == [8.0]


@pytest.mark.parametrize("schedule", ["linear", "constant", "inverse_sqrt", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 1.0])
def test_every_rate_lies_above_zero_and_not_above_the_peak(schedule, steps, warmup):
    assert all(0 < value <= 8 for value in rates(steps, schedule=schedule, warmup=warmup))


# ---------------------------------------------------------------- whole training


@dataclass
class Run:
    """weights after training, and what listeners heard: (step, metrics)."""

    weights: dict[str, torch.Tensor]
    heard: list[tuple[int, dict[str, float]]]

    def updates(self) -> list[dict[str, float]]:
        return [metrics for _, metrics in self.heard if "loss" in metrics]

    def evaluations(self) -> list[tuple[int, dict[str, float]]]:
        return [(step, metrics) for step, metrics in self.heard if "eval/loss" in metrics]


class Drawn(Offline):
    """Rows as a policy would have drawn them."""

    def batches(self, models: Any = None) -> Iterator[tuple[Batch, float]]:
        return ((drawn(batch), weight) for batch, weight in super().batches(models))


def run(
    objective: Any,
    models: Models | None = None,
    tokens: int = EVERYTHING,
    steps: int = 5,
    held_out: list[Example] | None = None,
    examples: list[Example] | None = None,
    budget: Budget | None = None,
    peak: float = 1e-2,
    **options: Any,
) -> Run:
    """Train on seven rows, three a step, so that the last batch of an epoch is short."""
    models, heard = models or far(objective), []
    policy: Any = models.policy
    data = objective.facts.data
    source = (Drawn if data == "prompts" else Offline)(examples or rows(data, num=7), batch_size=3, epochs=10)
    train(
        models,
        objective,
        source,
        Updater(policy.model.parameters()),
        LoopOptions(**options),
        peak=peak,
        steps=steps,
        budget=budget or Budget(tokens),
        evaluation=None
        if held_out is None
        else lambda: evaluate(models, objective, [(batch_from(data, held_out), 1.0)], budget or Budget(tokens)),
        listeners=[lambda step, metrics: heard.append((step, metrics))],
    )
    return Run(weights(policy.model), heard)


@every_objective
def test_token_budget_does_not_change_the_weights_that_training_ends_with(objective):
    whole = run(objective)
    policy: Any = far(objective).policy
    assert largest_difference(whole.weights, weights(policy.model)) > 1e-3
    for tokens in (1, 20, 45):
        assert largest_difference(run(objective, tokens=tokens).weights, whole.weights) < 1e-10


def test_the_clip_above_was_at_work():
    assert all(metrics["grad_norm"] > 1.0 for metrics in run(SFT()).updates())
    clipped, free = run(SFT()), run(SFT(), max_grad_norm=None)
    assert largest_difference(clipped.weights, free.weights) > 1e-4


def test_every_update_has_the_rate_of_the_schedule_and_counts_its_tokens_and_epochs():
    seen = run(SFT(), schedule="linear", warmup=0.2).updates()
    assert [m["learning_rate"] for m in seen] == pytest.approx([0.01, 0.01, 0.0075, 0.005, 0.0025])
    assert [m["epoch"] for m in seen] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3])
    examples = rows("demonstrations", num=7)
    assert sum(m["tokens"] for m in seen[:3]) == sum(example.num_tokens for example in examples)


class Lengths:
    """A made-up objective that reports each completion's length and does nothing else."""

    def count(self, batch: Batch) -> torch.Tensor:
        return torch.tensor(batch.num_completions)

    def targets(self, batch: Batch, models: Any) -> Nothing:
        return Nothing()

    def loss(self, batch: Batch, out: Any, targets: Nothing) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        lengths = batch.completions.lengths.double()
        return (out.logp.sum() * 0) + lengths.sum(), {"nll": lengths}


@pytest.mark.parametrize("tokens", [1, 6, 11, EVERYTHING])
def test_metrics_are_means_over_items_however_the_step_is_cut(tokens):
    # completions of 1, 2, 3 and 8 tokens: the mean is 3.5; a mean over the two passes of budget 11 would be 5
    batch = Batch.of([Example([1], [[2] * n], [1.0], [[True] * n]) for n in (1, 2, 3, 8)])
    models = Models(Policy(gpt_neox(0)))
    found = one_update(Lengths(), batch, models, tokens).metrics
    assert found["nll"] == found["loss"] == 3.5
    measured = evaluate(models, Lengths(), [(batch.take(0, 3), 1.0), (batch.take(3, 4), 1.0)], Budget(tokens))
    assert measured == {"eval/loss": 3.5, "eval/nll": 3.5}


class Sided(Lengths):
    """The same, which reports the lengths of long completions apart."""

    def loss(self, batch: Batch, out: Any, targets: Nothing) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, seen = super().loss(batch, out, targets)
        return loss, {**seen, "margin": seen["nll"][seen["nll"] > 5]}


def test_a_metric_without_an_item_is_left_out_and_not_logged_as_nan():
    batch = Batch.of([Example([1], [[2] * n], [1.0], [[True] * n]) for n in (1, 2, 3, 8)])
    models = Models(Policy(gpt_neox(0)))
    assert one_update(Sided(), batch, models, 6).metrics["margin"] == 8
    assert "margin" not in one_update(Sided(), batch.take(0, 3), models).metrics
    assert evaluate(models, Sided(), [(batch.take(0, 3), 1.0)], Budget(9)) == {"eval/loss": 2.0, "eval/nll": 2.0}


def test_updates_too_small_for_16_bit_weights_add_up():
    """Twenty steps of 3e-4: a bfloat16 weight above 0.5 moves by 2e-3 at least, or not at all."""
    models = Models(Policy(gpt_neox(0, torch.bfloat16)))
    policy: Any = models.policy
    before = weights(policy.model)
    after = run(SFT(), models, steps=20, peak=3e-4, schedule="constant", warmup=0.0).weights
    moved = torch.cat([(after[name] != x)[x.abs() > 0.5].flatten() for name, x in before.items() if "weight" in name])
    assert len(moved) > 100
    assert moved.double().mean() > 0.5


# ---------------------------------------------------------------- evaluation


@every_objective
def test_evaluation_changes_neither_weights_nor_random_numbers(objective):
    held_out = rows(objective.facts.data, num=3, seed=5)
    torch.manual_seed(7)
    plain = run(objective)
    state = torch.random.get_rng_state()
    torch.manual_seed(7)
    watched = run(objective, held_out=held_out, eval_every=2)
    assert largest_difference(plain.weights, watched.weights) == 0
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [step for step, _ in watched.evaluations()] == [0, 2, 4, 5]
    assert watched.evaluations()[0][1] != watched.evaluations()[-1][1]  # a loss alone may be the same for every policy


def test_evaluation_keeps_nothing_for_a_backward_pass():
    models, seen = apart(), []

    def policy(batch: Batch) -> Any:
        out = models.policy(batch)
        seen.append(out.logp.requires_grad)
        return out

    evaluate(Models(policy), SFT(), [(batch_of("demonstrations"), 1.0)], Budget(30))
    assert seen and not any(seen)


def test_without_an_interval_evaluation_is_at_the_start_and_the_end():
    assert [step for step, _ in run(SFT(), held_out=rows("demonstrations", num=2)).evaluations()] == [0, 5]


@every_objective
def test_evaluation_equals_the_loss_of_the_same_rows_in_training(objective):
    """However they are cut, but for objectives whose constants are taken from the whole update."""
    models, batch = far(objective), batch_of(objective.facts.data)
    trained = one_update(objective, batch, models).metrics
    whole = objective.facts.forwards or isinstance(objective, ROLLOUT_WIDE)
    parts = [batch] if whole else [batch.take(0, 2), batch.take(2, 5)]
    measured = evaluate(models, objective, [(part, 1.0) for part in parts], Budget(30))
    for name in measured:
        assert measured[name] == pytest.approx(trained[name.removeprefix("eval/")], rel=1e-12), name


# ---------------------------------------------------------------- the reference stays where it was


def lora(seed: int) -> Any:
    # only the matrices that take part in the forward pass; an adapter on every linear layer is what a run would have
    return adapt(gpt_neox(seed), LoraOptions(lora_rank=2))


@pytest.mark.parametrize("where", ["copy", "cache", "adapter"])
def test_reference_does_not_move_while_the_policy_does(where, tmp_path):
    policy = Policy(lora(0) if where == "adapter" else gpt_neox(0))
    examples = rows("pairs", num=7)
    batch = Batch.of(examples)
    budget = Budget(EVERYTHING)
    makers = {"copy": Copied.of, "adapter": AdapterOff, "cache": lambda p, _: Cached(p, tmp_path)}
    reference: Any = makers[where](policy, budget)
    if where == "cache":
        reference.fill(examples, Budget(EVERYTHING))
    before = reference(batch).clone()
    assert torch.allclose(before, policy(batch).logp.detach(), atol=1e-6)
    first = run(DPO(), Models(policy, reference)).updates()
    assert first[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert torch.equal(reference(batch), before)
    assert (policy(batch).logp - before).abs().max() > 1e-2


# ---------------------------------------------------------------- steps that go wrong


@dataclass(frozen=True)
class Sick:
    """An objective whose loss is not a number in the updates with these numbers (from 0)."""

    inner: Any
    bad: tuple[int, ...]
    seen: list[int]

    @property
    def facts(self) -> Any:
        return self.inner.facts

    def count(self, batch: Batch) -> torch.Tensor:
        self.seen.append(1)
        return self.inner.count(batch)

    def targets(self, batch: Batch, models: Any) -> Any:
        return self.inner.targets(batch, models)

    def loss(self, batch: Batch, out: Any, targets: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, seen = self.inner.loss(batch, out, targets)
        return (loss * math.nan if len(self.seen) - 1 in self.bad else loss), seen


@pytest.mark.fault(13)
def test_an_update_that_is_not_finite_is_skipped_and_the_run_goes_on(caplog):
    found = run(Sick(SFT(), (1, 3), []), steps=6, tokens=20, max_bad_steps=2)
    assert [(step, metrics.get("skipped"), "loss" in metrics) for step, metrics in found.heard] == [
        *((1, None, True), (2, 1, False), (3, None, True), (4, 2, False), (5, None, True), (6, None, True)),
    ]
    assert all(torch.isfinite(x).all() for x in found.weights.values())
    assert caplog.text.count("the gradient is not finite; the update was skipped") == 2


@pytest.mark.fault(13)
def test_the_run_stops_after_so_many_bad_updates_in_a_row_with_finite_weights():
    models = apart()
    with pytest.raises(InputError, match=r"2 gradients in a row were not finite; lower learning_rate \(now "):
        run(Sick(SFT(), (1, 3, 4), []), models, steps=9, max_bad_steps=2)
    policy: Any = models.policy
    assert all(torch.isfinite(x).all() for x in policy.model.parameters())
    # updates 0 and 2 were good, so the weights have moved
    assert largest_difference(weights(policy.model), weights(gpt_neox(0))) > 1e-3


@pytest.mark.fault(13)
def test_a_skipped_update_changes_no_weight():
    models = apart()
    with pytest.raises(InputError):
        run(Sick(SFT(), tuple(range(9)), []), models, steps=9, max_bad_steps=3, weight_decay=0.1)
    policy: Any = models.policy
    assert largest_difference(weights(policy.model), weights(gpt_neox(0))) == 0


def test_a_batch_without_a_trained_token_is_skipped():
    models = together()
    policy: Any = models.policy
    empty = [Example([1, 2], [[3, 4]], [1.0], [[False, False]])]
    source, updater = Offline(empty, batch_size=1), Updater(policy.model.parameters())
    train(models, SFT(), source, updater, LoopOptions(), peak=1e-2, steps=1, budget=Budget(99))
    assert largest_difference(weights(policy.model), weights(gpt_neox(0))) == 0


class Leaky:
    """A policy that runs out of memory in its passes with these numbers."""

    def __init__(self, policy: Any, at: set[int], kind: type[Exception]) -> None:
        self.policy, self.model, self.at, self.kind, self.number = policy, policy.model, at, kind, -1

    def __call__(self, batch: Batch) -> Any:
        self.number += 1
        if self.number in self.at:
            raise self.kind("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes")
        return self.policy(batch)


KINDS = [(RuntimeError, name) for name in NAMES] + [(kind, "dpo") for kind in (MemoryError, torch.OutOfMemoryError)]


@pytest.mark.parametrize(("kind", "name"), KINDS)
@pytest.mark.fault(24, 25)
def test_running_out_of_memory_in_the_middle_of_a_step_changes_nothing(kind, name):
    objective = ALL[name]
    largest = max(example.num_tokens for example in rows(objective.facts.data, num=7))
    whole, models = run(objective, tokens=largest + 1), far(objective)
    # the step's first pass has left a gradient when the second fails
    leaky, budget = Leaky(models.policy, {1}, kind), Budget(largest + 1)
    found = run(objective, Models(leaky, models.reference), budget=budget)
    assert budget.tokens == (largest + 1) // 2
    assert largest_difference(found.weights, whole.weights) < 1e-10
    for ours, expected in zip(found.updates(), whole.updates(), strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-10)
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-6)


@pytest.mark.fault(24)
def test_gradients_of_16_bit_weights_are_taken_back_too_when_memory_runs_out():
    # ten tokens a prompt: one prompt a pass under both 15 tokens and 7, so that not even the rounding differs
    examples = [Example([n, 2, 3, 4, 5], [[n, 6, 7, 8, 9]], [1.0], [[True] * 5]) for n in range(6)]
    ends = []
    for at in (set(), {1}):
        leaky = Leaky(Policy(gpt_neox(0, torch.bfloat16)), at, MemoryError)
        run(SFT(), Models(leaky), tokens=15, examples=examples)
        ends.append(weights(leaky.model))
    assert largest_difference(*ends) == 0
    assert largest_difference(ends[0], weights(gpt_neox(0, torch.bfloat16))) > 1e-3


@pytest.mark.fault(24)
def test_running_out_of_memory_with_one_prompt_says_what_to_do():
    models = apart()
    leaky = Leaky(models.policy, set(range(99)), MemoryError)
    with pytest.raises(InputError, match=r"out of memory with one prompt of \d+ tokens .* try gradient_checkpointing"):
        run(SFT(), Models(leaky), tokens=45)


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    class Broken(Leaky):
        def __call__(self, batch: Batch) -> Any:
            raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match="size mismatch"):
        run(SFT(), Models(Broken(apart().policy, set(), RuntimeError)))
