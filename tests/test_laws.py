"""What must hold for every objective. A new one is covered by being in `prefopt.objectives.EVERY`.

All in float64, on rows of unequal length, with the worse completion first every other time, tokens that are not
trained on, and a policy far away from its reference. What a language model says of a token is its log-prob; what a
reward model says of it is its score.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from laws import (
    EVERYTHING,
    apart,
    batch_from,
    batch_of,
    far,
    gpt_neox,
    logp_by_hand,
    one_update,
    rows,
    scores_by_hand,
    shuffled,
    together,
    with_critic,
)
from variants import ALL

from prefopt import metrics
from prefopt.batch import Batch, Outputs, parts
from prefopt.loop import Models
from prefopt.models.policy import Policy, per_token
from prefopt.objectives import DPO, IPO, OnlineDPO
from prefopt.objectives.facts import extras
from prefopt.objectives.online_dpo import picked

every_objective = pytest.mark.parametrize("objective", list(ALL.values()), ids=list(ALL))
# one objective for each head and shape of rows, where the law is about the model and not about the loss
KINDS = {(each.facts.head, each.facts.data): name for name, each in reversed(ALL.items())}
every_kind = pytest.mark.parametrize("objective", [ALL[name] for name in KINDS.values()], ids=list(KINDS.values()))


def data_of(objective: Any, **options: Any) -> Batch:
    return batch_of(objective.facts.data, **options)


def read(objective: Any, batch: Batch) -> torch.Tensor:
    """The tokens whose log-prob or score the objective reads, [K]."""
    if isinstance(objective, OnlineDPO):  # the best and the worst completion of a prompt
        return batch.trained & (batch.spread(picked(batch)) != 0)
    if objective.facts.head == "language":
        return batch.trained
    if objective.facts.head == "steps":
        return ~batch.steps.isnan()
    last = torch.zeros_like(batch.trained)
    last[batch.completions.lengths.cumsum(0) - 1] = True
    return last


def saying(out: Outputs, x: torch.Tensor) -> Outputs:
    """The outputs with `x` [K] as what the model says of each token."""
    return out._replace(logp=x) if len(out.logp) else out._replace(value=x)


def same_update(left: Any, right: Any) -> None:
    assert torch.allclose(left.gradient, right.gradient, rtol=1e-9, atol=1e-12)
    assert left.gradient.abs().max() > 1e-3
    assert left.metrics.keys() == right.metrics.keys()
    for name in left.metrics:
        assert left.metrics[name] == pytest.approx(right.metrics[name], rel=1e-9, abs=1e-12), name


@every_objective
@pytest.mark.parametrize("tokens", [1, 25, 60])
def test_token_budget_does_not_change_the_update(objective, tokens):
    models, batch = far(objective), data_of(objective)
    same_update(one_update(objective, batch, models, tokens), one_update(objective, batch, models, EVERYTHING))


@every_objective
def test_tree_equals_padded(objective):
    batch = data_of(objective)
    tree, padded = (one_update(objective, batch, far(objective, layout=layout)) for layout in ("tree", "padded"))
    same_update(tree, padded)


@every_kind
@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_log_probs_and_scores_are_those_of_ordinary_forward_passes(objective, layout):
    head, examples = objective.facts.head, rows(objective.facts.data)
    model, ordinary = gpt_neox(0, head=head), logp_by_hand if head == "language" else scores_by_hand
    by_hand = torch.cat([x for example in examples for x in ordinary(model, example)])
    batch = Batch.of(examples)
    found = per_token(Policy(model, layout)(batch))
    if head == "completion":
        found = found[read(objective, batch)]  # the classifier says only what the whole text is worth
    assert torch.allclose(found, by_hand, rtol=0, atol=1e-12)


@every_objective
def test_order_of_prompts_does_not_matter(objective):
    examples = rows(objective.facts.data)
    moved = shuffled(examples)
    assert moved != examples
    data = objective.facts.data
    first, second = (one_update(objective, batch_from(data, order), far(objective)) for order in (examples, moved))
    same_update(first, second)


def credit(objective: Any, batch: Batch) -> torch.Tensor:
    """Derivative of the loss with respect to what the model says of each completion token, [K]."""
    models = far(objective)
    with torch.no_grad():
        full, targets = models.policy(batch), objective.targets(batch, models)
    x = per_token(full).clone().requires_grad_()
    objective.loss(batch, saying(full, x), targets)[0].backward()
    return x.grad


@every_objective
def test_untrained_tokens_get_exactly_zero_credit_and_trained_ones_do_not(objective):
    batch = data_of(objective)
    which = read(objective, batch)
    assert not which.all()
    found = credit(objective, batch)
    assert (found[~which] == 0).all()
    assert (found[which] != 0).all()


@every_objective
def test_what_an_untrained_token_is_worth_changes_neither_loss_nor_count_nor_metrics(objective):
    batch, models = data_of(objective), far(objective)

    def seen(worth: float) -> dict[str, float]:
        def shift(part: Batch) -> torch.Tensor:  # of the batch, or of others that targets ask about
            return torch.where(read(objective, part), 0.0, worth)  # [K]

        def policy(part: Batch) -> Outputs:
            out = models.policy(part)
            return saying(out, per_token(out) + shift(part))

        shifted = Models(policy, lambda part: models.reference(part) + shift(part))
        with torch.no_grad():
            loss, found = objective.loss(batch, policy(batch), objective.targets(batch, shifted))
        found = {**found, "loss": loss}
        return {name: float(x.sum()) for name, x in found.items()} | {"count": float(objective.count(batch))}

    assert seen(0.0) == pytest.approx(seen(-3.0))


def positions_of_credit(objective: Any, batch: Batch) -> set[tuple[int, int]]:
    """(row, column) of a padded batch whose output is read, counted from the prompt's start.

    A token's log-prob is read one before it, where it is predicted; a score at the token itself.
    """
    found, first = set(), 0
    which, shift = read(objective, batch), int(objective.facts.head == "language")
    for n, length in enumerate(batch.completions.lengths.tolist()):
        prompt = int(batch.prompts.lengths[batch.group[n]])
        found |= {(n, prompt + i - shift) for i in range(length) if which[first + i]}
        first += length
    return found


@every_objective
def test_only_positions_that_are_read_get_credit(objective):
    """Prompt tokens get none, but for the last, whose output predicts the completion's first token."""
    batch, models = data_of(objective), far(objective, layout="padded")
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
    assert {tuple(at) for at in gradient.abs().sum(-1).nonzero().tolist()} == positions_of_credit(objective, batch)


def favoured(objective: Any, batch: Batch) -> torch.Tensor:
    """1 for what a descent step must raise, -1 for what it must lower, 0 for what it may leave, [K].

    Of a language model the log-probs of good and bad completions; of a reward model the scores of the best and the
    worst one; of a process reward model those of right and wrong steps.
    """
    if objective.facts.head == "language":
        return batch.spread(torch.where(batch.score > 0.5, 1.0, -1.0).double()) * batch.trained
    if objective.facts.head == "steps":
        return (2 * batch.steps - 1).nan_to_num(0.0).double()
    best, worst = batch.score == batch.score.max(), batch.score == batch.score.min()
    return batch.spread(best.double() - worst.double()) * read(objective, batch)


# IPO regresses the difference of log-ratios on 1 / (2 beta) = 5 nats; these two pairs are 14.7 and 5.07 apart
# NCA wants a chosen reward of ln 2 at most; this one is 5.3
PULLED_BACK = [(IPO(), 1), (IPO(), 3), (DPO(beta=0.5, loss_type="nca"), 1)]


@every_objective
@pytest.mark.parametrize("number", range(4))
def test_a_descent_step_favours_the_better_completion(objective, number):
    batch, models = data_of(objective, num=4).take(number, number + 1), far(objective)
    policy: Any = models.policy
    if objective.facts.critic:  # expects the same of every token: one that is wrong may favour the worse completion
        policy.critic.scorer.head.layer.weight.data.zero_()
    sign = favoured(objective, batch)  # [K]
    if (objective, number) in PULLED_BACK:
        sign = -sign
    with torch.no_grad():
        before = per_token(policy(batch))
        start = torch.nn.utils.parameters_to_vector(policy.model.parameters())
        with torch.enable_grad():
            gradient = one_update(objective, batch, models).gradient
        torch.nn.utils.vector_to_parameters(start - 1e-5 * gradient / gradient.norm(), policy.model.parameters())
        change = per_token(policy(batch)) - before
    assert float(sign @ change) > 1e-7


@every_objective
def test_loss_is_a_sum_over_prompts(objective):
    batch, models = data_of(objective), far(objective)
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
    models = together(extras=extras(objective), head=objective.facts.head)
    models = with_critic(models) if objective.facts.critic else models
    found = one_update(objective, data_of(objective), models).metrics
    for name, expected in objective.at_start().items():
        assert found[name] == pytest.approx(expected, rel=1e-12, abs=1e-12), name


@every_objective
def test_metrics_are_vectors_with_registered_names(objective):
    batch, models = data_of(objective), far(objective)
    found = objective.loss(batch, models.policy(batch), objective.targets(batch, models))[1]
    for name, x in found.items():
        metrics.known(name)
        assert x.ndim == 1 and len(x) > 1


@every_kind
def test_every_floating_point_type_of_the_model_is_kept(objective):
    batch = data_of(objective)
    found = apart().policy(batch).logp
    assert found.dtype == torch.float64
    assert Policy(gpt_neox(0, torch.float32))(batch).logp.dtype == torch.float32
