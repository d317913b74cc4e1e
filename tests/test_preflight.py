"""Step-0 identities: every broken set-up stops with its cause, and no healthy one does."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from laws import ARCHITECTURES, EVERYTHING, batch_from, gpt2, gpt_neox, rows
from torch import Tensor
from variants import ALL

from prefopt import preflight
from prefopt.batch import Batch
from prefopt.budget import Budget
from prefopt.models import policy as policies
from prefopt.models.adapters import LoraOptions, adapt
from prefopt.models.critic import ActorCritic, value_model
from prefopt.models.layouts import TreeRow
from prefopt.models.policy import Policy, choose
from prefopt.models.reference import AdapterOff, Cached, Copied
from prefopt.objectives import BCO, DPO, EVERY, KTO, update
from prefopt.objectives.dpo import Reference
from prefopt.objectives.facts import needs_reference
from prefopt.preflight import PreflightError

EXAMPLES = rows("pairs", num=6)
BATCH = Batch.of(EXAMPLES)


def check(objective: Any = None, policy: Any = None, reference: Any = None) -> list[str]:
    """All identities, as a run asks for them."""
    policy = policy or Policy(gpt_neox(0, torch.float32))
    reference = reference or Copied.of(policy, Budget(EVERYTHING))
    return preflight.check_policy(policy, BATCH) + preflight.check_start(objective or DPO(), policy, reference, BATCH)


def test_a_healthy_run_says_what_held():
    said = check()
    assert [line.split(" to ")[0].split(":")[0] for line in said] == [
        "two passes agree",
        "packed equals padded",
        "reference equals policy",
        "before the first update",
    ]
    assert said[-1].endswith(
        "loss 0.693147, rewards/chosen 0.000000, rewards/rejected 0.000000, rewards/margins 0.000000"
    )


# ---------------------------------------------------------------- broken set-ups


def test_a_reference_that_is_another_model_is_caught():
    other = Copied(Policy(gpt_neox(1, torch.float32)), Budget(EVERYTHING))
    with pytest.raises(PreflightError, match=r"reference and policy differ by .* nats a token before any training"):
        check(reference=other)


def test_a_reference_that_differs_a_little_is_caught():
    model = gpt_neox(0, torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.001)  # an update or two away
    with pytest.raises(PreflightError, match="the reference is not the model this run starts from"):
        check(reference=Copied(Policy(model), Budget(EVERYTHING)))


def test_a_fine_tuned_reference_is_told_from_its_base_in_16_bits():
    policy, tuned = Policy(gpt_neox(0, torch.bfloat16)), gpt_neox(0, torch.bfloat16)
    with torch.no_grad():
        for p in tuned.parameters():
            p.mul_(1.03)
    gap = (policy(BATCH).logp - Policy(tuned)(BATCH).logp).abs().mean().item()
    assert 0.05 < gap < 0.3  # a fine-tuned model's distance from its base, not another model's
    with pytest.raises(PreflightError, match="the reference is not the model this run starts from"):
        check(policy=policy, reference=Copied(Policy(tuned), Budget(EVERYTHING)))


def test_a_stale_cache_entry_is_caught(tmp_path):
    policy = Policy(gpt_neox(0, torch.float32))
    cached = Cached(policy, tmp_path)
    cached.fill(EXAMPLES, Budget(EVERYTHING))
    assert check(policy=policy, reference=cached)
    key = next(iter(cached.known))
    cached.known[key] = cached.known[key] - 0.01  # nats a token, of one completion in twelve
    with pytest.raises(PreflightError, match="stale cache"):
        check(policy=policy, reference=cached)


def test_dropout_is_caught():
    policy = Policy(gpt2(0, torch.float32, dropout=0.1))
    policy.model.train()
    with pytest.raises(PreflightError, match="the model is random; switch dropout"):
        check(policy=policy)


def broken_row(change: Callable[[TreeRow, Batch], dict[str, Any]]) -> Any:
    """TreeRow with some of its fields changed."""

    class Row:
        @classmethod
        def of(cls, batch: Batch, device: torch.device) -> TreeRow:
            row = TreeRow.of(batch, device)
            return dataclasses.replace(row, **change(row, batch))

    return Row


def own_position(row: TreeRow, batch: Batch) -> dict[str, Any]:
    return {"before": row.at}


def running_positions(row: TreeRow, batch: Batch) -> dict[str, Any]:
    return {"positions": torch.arange(len(row.ids))}


def siblings_visible(row: TreeRow, batch: Batch) -> dict[str, Any]:
    """Every completion sees all that stands before it from its prompt on."""
    open_segments = [dataclasses.replace(s, context=(s.context[0], s.start)) for s in row.segments]
    return {"segments": open_segments}


@pytest.mark.parametrize("change", [own_position, running_positions, siblings_visible])
def test_wrong_packing_is_caught(change, monkeypatch):
    policy = Policy(gpt_neox(0, torch.float32))
    reference = Copied(Policy(gpt_neox(0, torch.float32), "padded"), Budget(EVERYTHING))
    monkeypatch.setattr(policies, "TreeRow", broken_row(change))
    with pytest.raises(PreflightError, match="the packed layout differs from the padded one"):
        check(policy=policy, reference=reference)


@pytest.mark.fault(13)
def test_weights_that_are_not_finite_are_caught():
    policy = Policy(gpt_neox(0, torch.float32))
    with torch.no_grad():
        next(policy.model.parameters())[:] = math.nan
    with pytest.raises(PreflightError, match="log-probs are not finite"):
        check(policy=policy)


@dataclasses.dataclass(frozen=True)
class Swapped(DPO):
    """Takes the reference of the other completion of each pair."""

    def targets(self, batch: Batch, models: Any) -> Reference:
        logp = batch.sum_tokens(models.reference(batch))
        return Reference(logp.view(-1, 2).flip(1).reshape(-1))


@dataclasses.dataclass(frozen=True)
class NoReference(DPO):
    """Leaves the reference out."""

    def targets(self, batch: Batch, models: Any) -> Reference:
        return Reference(torch.zeros(batch.num_completions))


@dataclasses.dataclass(frozen=True)
class Mean(DPO):
    """Divides the loss by the number of pairs, which the loop does too."""

    def loss(self, batch: Batch, out: Any, targets: Reference) -> tuple[Tensor, dict[str, Tensor]]:
        loss, seen = super().loss(batch, out, targets)
        return loss / batch.num_prompts, seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objective", [Swapped(), NoReference(), Mean()])
def test_an_objective_that_breaks_its_own_start_values_is_caught(objective, dtype):
    with pytest.raises(PreflightError, match="before the first update and must be"):
        check(objective, Policy(gpt_neox(0, dtype)))


# ---------------------------------------------------------------- no false alarms

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OFFLINE = [name for name, cls in EVERY.items() if cls.facts.data != "prompts"]
ONLINE = [name for name in EVERY if name not in OFFLINE]
HEALTHY = [
    (architecture, dtype, tuning, name, layout)
    for architecture in ARCHITECTURES
    for dtype in DTYPES
    for tuning in ("full", "lora")
    for name in ("sft", "dpo", "kto", "orpo", "reward")
    for layout in ("auto", "padded")
]
# what depends on the model and not on the loss is checked above, and for one of those that sample
HEALTHY += [("gpt_neox", dtype, "full", name, "auto") for dtype in DTYPES for name in OFFLINE]
HEALTHY += [("gpt_neox", dtype, "full", name, "auto") for dtype in DTYPES for name in ONLINE]
HEALTHY += [(architecture, "bfloat16", "lora", "grpo", "padded") for architecture in ARCHITECTURES]
HEALTHY = list(dict.fromkeys(HEALTHY))


@pytest.mark.parametrize(("architecture", "dtype", "tuning", "name", "layout"), HEALTHY)
def test_no_healthy_run_is_stopped(architecture, dtype, tuning, name, layout, tmp_path):
    """Set up as a run does it: layout by the probe, the reference from the cache (the adapter's own base for LoRA)."""
    objective, model = ALL[name], ARCHITECTURES[architecture](0, DTYPES[dtype])
    policy = Policy(adapt(model, LoraOptions(lora_rank=4)) if tuning == "lora" else model)
    choose(policy, layout)
    examples, online = rows(objective.facts.data, num=6, seed=3), objective.facts.data == "prompts"
    reference: Any = None
    if needs_reference(objective):
        reference = AdapterOff(policy, Budget(40)) if tuning == "lora" else Cached(policy, tmp_path)
        if online and tuning == "full":
            reference = Copied.of(policy, Budget(40))  # completions that are yet to be written are in no cache
    if isinstance(reference, Cached):
        reference.fill(examples, Budget(40))
    batch = preflight.sample(batch_from(objective.facts.data, examples))
    assert len(preflight.check_policy(policy, batch)) == 1 + (policy.layout == "tree")
    actor: Any = policy
    if objective.facts.critic:
        actor = ActorCritic(policy, value_model(gpt_neox(1, DTYPES[dtype], head="completion"), policy.layout))
    if online or reference is not None:
        said = preflight.check_start(objective, actor, reference, batch)
        assert len(said) == (reference is not None) + bool(objective.at_start())


@pytest.mark.parametrize("objective", [KTO(), BCO()])
def test_rounding_between_the_passes_of_an_objective_stops_no_run(objective, monkeypatch):
    """Both score the update in passes of their own, and in 16 bits a log-prob depends on what shares its pass."""
    monkeypatch.setattr(update, "PASS_TOKENS", 1)
    policy = Policy(ARCHITECTURES["llama"](0, torch.bfloat16), "padded")
    batch = Batch.of(rows("labels", num=30, seed=3))
    apart = [policy(batch.take(g, g + 1)).logp for g in range(30)]
    assert not torch.equal(policy(batch).logp, torch.cat(apart))
    preflight.check_start(objective, policy, Copied.of(policy, Budget(EVERYTHING)), batch)


@pytest.mark.parametrize("objective", [KTO(), BCO()])
def test_a_sample_of_one_class_or_one_prompt_stops_no_run(objective):
    """What has no row among the first few cannot be checked on them."""
    policy = Policy(gpt_neox(0, torch.float32))
    good = rows("labels", num=6)[::2]
    for examples in (good, [dataclasses.replace(example, prompt=good[0].prompt) for example in good]):
        said = preflight.check_start(objective, policy, Copied.of(policy, Budget(EVERYTHING)), Batch.of(examples))
        assert "rewards/chosen 0.000000" in said[-1] and "rejected" not in said[-1]


def test_the_healthy_runs_are_many_and_most_of_them_are_packed():
    assert len(HEALTHY) >= 20
    for model in ARCHITECTURES.values():
        assert choose(Policy(model(0, torch.float32))).layout == "tree"


def test_sample_is_the_first_prompts_with_their_completions():
    long = rows("pairs", num=9)
    assert preflight.sample(Batch.of(long)).num_prompts == 4
    assert preflight.sample(Batch.of(long[:1])).num_prompts == 1
    whole = Batch.of([dataclasses.replace(long[0], prompt=[1] * preflight.SAMPLE_TOKENS), *long[1:]])
    assert preflight.sample(whole).num_prompts == 1
    assert preflight.sample(whole, least=2).num_prompts == 2  # what the objective cannot do without
    assert preflight.sample(Batch.of(long), least=6).num_prompts == 6
