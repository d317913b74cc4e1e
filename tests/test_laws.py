"""What must hold for every objective. A new one is covered by being in `prefopt.objectives.EVERY`.

All in float64, on rows of unequal length, with the worse completion first every other time, tokens that are not
trained on, and a policy far away from its reference.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from laws import EVERYTHING, apart, batch_of, gpt_neox, logp_by_hand, one_update, rows, shuffled, together
from variants import ALL

from prefopt import metrics
from prefopt.batch import Batch, Outputs, parts
from prefopt.models.policy import Policy
from prefopt.objectives.facts import extras

every_objective = pytest.mark.parametrize("objective", list(ALL.values()), ids=list(ALL))


def data_of(objective: Any, **options: Any) -> Batch:
    return batch_of(objective.facts.data, **options)


def same_update(left: Any, right: Any) -> None:
    assert torch.allclose(left.gradient, right.gradient, rtol=1e-9, atol=1e-12)
    assert left.gradient.abs().max() > 1e-3
    assert left.metrics.keys() == right.metrics.keys()
    for name in left.metrics:
        assert left.metrics[name] == pytest.approx(right.metrics[name], rel=1e-9, abs=1e-12), name


@every_objective
@pytest.mark.parametrize("tokens", [1, 25, 60])
def test_token_budget_does_not_change_the_update(objective, tokens):
    models, batch = apart(), data_of(objective)
    same_update(one_update(objective, batch, models, tokens), one_update(objective, batch, models, EVERYTHING))


@every_objective
def test_tree_equals_padded(objective):
    batch = data_of(objective)
    tree, padded = (
        one_update(objective, batch, apart(layout=layout, extras=extras(objective))) for layout in ("tree", "padded")
    )
    same_update(tree, padded)


@every_objective
@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_log_probs_are_those_of_ordinary_forward_passes(objective, layout):
    model, examples = gpt_neox(0), rows(objective.facts.data)
    by_hand = torch.cat([logp for example in examples for logp in logp_by_hand(model, example)])
    found = Policy(model, layout)(Batch.of(examples)).logp
    assert torch.allclose(found, by_hand, rtol=0, atol=1e-12)


@every_objective
def test_order_of_prompts_does_not_matter(objective):
    examples = rows(objective.facts.data)
    moved = shuffled(examples)
    assert moved != examples
    first, second = (
        one_update(objective, Batch.of(order), apart(extras=extras(objective))) for order in (examples, moved)
    )
    same_update(first, second)


def credit(objective: Any, batch: Batch) -> torch.Tensor:
    """Derivative of the loss with respect to each completion token's log-prob, [K]."""
    models = apart(extras=extras(objective))
    with torch.no_grad():
        full, targets = models.policy(batch), objective.targets(batch, models)
    logp = full.logp.clone().requires_grad_()
    out = Outputs(logp, **{name: getattr(full, name) for name in extras(objective)})
    objective.loss(batch, out, targets)[0].backward()
    return logp.grad


@every_objective
def test_untrained_tokens_get_exactly_zero_credit_and_trained_ones_do_not(objective):
    batch = data_of(objective)
    assert not batch.trained.all()
    found = credit(objective, batch)
    assert (found[~batch.trained] == 0).all()
    assert (found[batch.trained] != 0).all()


@every_objective
def test_what_an_untrained_token_is_worth_changes_neither_loss_nor_count_nor_metrics(objective):
    batch, models = data_of(objective), apart(extras=extras(objective))
    with torch.no_grad():
        full = models.policy(batch)
    noise = torch.where(batch.trained, 0.0, -3.0)  # [K]

    def seen(shift: Any) -> dict[str, float]:
        reference = dataclasses.replace(models, reference=lambda part: models.reference(part) + shift)
        out = full._replace(logp=full.logp + shift)
        loss, found = objective.loss(batch, out, objective.targets(batch, reference))
        found = {**found, "loss": loss}
        return {name: float(x.sum()) for name, x in found.items()} | {"count": float(objective.count(batch))}

    assert seen(0.0) == pytest.approx(seen(noise))


def positions_of_credit(batch: Batch) -> set[tuple[int, int]]:
    """(row, column) of a padded batch that predict a trained token: one before it, counted from the prompt's start."""
    found, first = set(), 0
    for n, length in enumerate(batch.completions.lengths.tolist()):
        prompt = int(batch.prompts.lengths[batch.group[n]])
        found |= {(n, prompt + i - 1) for i in range(length) if batch.trained[first + i]}
        first += length
    return found


@every_objective
def test_only_positions_that_predict_a_trained_token_get_credit(objective):
    """Prompt tokens get none, but for the last, whose output predicts the completion's first token."""
    batch, models = data_of(objective), apart(layout="padded", extras=extras(objective))
    policy: Any = models.policy
    kept: list[torch.Tensor] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        output[0].retain_grad()
        kept.append(output[0])

    targets = objective.targets(batch, models)
    handle = policy.backbone.register_forward_hook(keep)
    objective.loss(batch, policy(batch), targets)[0].backward()
    handle.remove()
    gradient = kept[-1].grad  # [N, S, D]
    assert {tuple(at) for at in gradient.abs().sum(-1).nonzero().tolist()} == positions_of_credit(batch)


@every_objective
@pytest.mark.parametrize("number", range(4))
def test_a_descent_step_favours_the_better_completion(objective, number):
    batch, models = data_of(objective, num=4).take(number, number + 1), apart(extras=extras(objective))
    policy: Any = models.policy
    sign = torch.where(batch.score > 0.5, 1.0, -1.0).double()  # [N]
    with torch.no_grad():
        before = batch.sum_tokens(policy(batch).logp)
        start = torch.nn.utils.parameters_to_vector(policy.model.parameters())
        with torch.enable_grad():
            gradient = one_update(objective, batch, models).gradient
        torch.nn.utils.vector_to_parameters(start - 1e-5 * gradient / gradient.norm(), policy.model.parameters())
        change = batch.sum_tokens(policy(batch).logp) - before
    assert float(sign @ change) > 1e-7


@every_objective
def test_loss_is_a_sum_over_prompts(objective):
    batch, models = data_of(objective), apart(extras=extras(objective))
    targets = objective.targets(batch, models)
    whole = objective.loss(batch, models.policy(batch), targets)[0]
    pieces = list(parts(batch, targets, 1))
    one_by_one = [objective.loss(piece, models.policy(piece), goal)[0].item() for piece, goal in pieces]
    assert len(pieces) == batch.num_prompts
    assert whole.item() == pytest.approx(sum(one_by_one), rel=1e-12)
    assert int(objective.count(batch)) == sum(int(objective.count(piece)) for piece, _ in pieces)


@every_objective
def test_at_the_start_the_declared_values_hold(objective):
    if objective.facts.reference:
        assert objective.at_start(), "an objective with a reference has values that hold while the policy equals it"
    found = one_update(objective, data_of(objective), together(extras=extras(objective))).metrics
    for name, expected in objective.at_start().items():
        assert found[name] == pytest.approx(expected, rel=1e-12, abs=1e-12), name


@every_objective
def test_metrics_are_vectors_with_registered_names(objective):
    batch, models = data_of(objective), apart(extras=extras(objective))
    found = objective.loss(batch, models.policy(batch), objective.targets(batch, models))[1]
    for name, x in found.items():
        metrics.known(name)
        assert x.ndim == 1 and len(x) > 1


@every_objective
def test_every_floating_point_type_of_the_model_is_kept(objective):
    batch = data_of(objective)
    found = apart().policy(batch).logp
    assert found.dtype == torch.float64
    assert Policy(gpt_neox(0, torch.float32))(batch).logp.dtype == torch.float32
