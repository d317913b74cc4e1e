"""DPO by hand, against its closed form, and against TRL's own trainer."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from laws import llama, one_update, word_tokenizer

from prefopt.batch import Batch, Outputs
from prefopt.loop import Models
from prefopt.models.policy import Policy
from prefopt.objectives import DPO
from prefopt.objectives.dpo import Reference
from prefopt.records import Example


def pair(first: list[int], second: list[int], scores: tuple[float, float], trained: Any = None) -> Example:
    flags = trained or [[True] * len(first), [True] * len(second)]
    return Example([7], [first, second], list(scores), flags)


# Two pairs, beta 0.5.            logp of tokens      sum    reference   log-ratio   reward
# pair 0: chosen   [1, 2]         -1.0 -0.5          -1.5      -2.5         1.0        0.5
#         rejected [3]            -2.0               -2.0      -1.0        -1.0       -0.5
# pair 1: rejected [4, 5, 6]      -0.1 -0.2 (-9.0)   -0.3      -0.7         0.4        0.2     (-9.0): not trained
#         chosen   [1]            -3.0               -3.0      -2.0        -1.0       -0.5
# margins 1.0 and -0.7; losses ln(1 + e^-1) = 0.313262 and ln(1 + e^0.7) = 1.103186; sum 1.416448
BY_HAND = [
    pair([1, 2], [3], (1.0, 0.0)),
    pair([4, 5, 6], [1], (0.0, 1.0), [[True, True, False], [True]]),
]
LOGP = [-1.0, -0.5, -2.0, -0.1, -0.2, -9.0, -3.0]
REFERENCE = [-2.5, -1.0, -0.7, -2.0]


def test_loss_and_metrics_by_hand():
    batch, logp = Batch.of(BY_HAND), torch.tensor(LOGP, requires_grad=True)
    loss, seen = DPO(beta=0.5).loss(batch, Outputs(logp), Reference(torch.tensor(REFERENCE)))
    assert loss.item() == pytest.approx(1.416448, abs=2e-6)
    found = {name: [round(v, 6) for v in x.tolist()] for name, x in seen.items()}
    assert found == {
        "rewards/chosen": [0.5, -0.5],
        "rewards/rejected": [-0.5, 0.2],
        "rewards/margins": [1.0, -0.7],
        "rewards/accuracies": [1.0, 0.0],
        "logps/chosen": [-1.5, -3.0],
        "logps/rejected": [-2.0, -0.3],
    }
    loss.backward()
    # -beta * sigmoid(-margin) on every trained token of the chosen, plus the same on the rejected
    first, second = 0.5 / (1 + math.e), 0.5 / (1 + math.exp(-0.7))
    assert logp.grad.tolist() == pytest.approx([-first, -first, first, second, second, 0.0, -second])


def test_targets_are_sums_over_trained_tokens_and_the_count_is_pairs():
    batch = Batch.of(BY_HAND)
    models = Models(lambda part: None, lambda part: torch.tensor(LOGP))
    assert DPO().targets(batch, models).logp.tolist() == pytest.approx([-1.5, -2.0, -0.3, -3.0])
    assert int(DPO().count(batch)) == 2


@pytest.mark.parametrize("margin", [-2000.0, 2000.0])
def test_far_margins_stay_finite(margin):
    logp = torch.tensor([margin, 0.0], requires_grad=True)
    batch = Batch.of([pair([1], [2], (1.0, 0.0))])
    loss, _ = DPO(beta=1.0).loss(batch, Outputs(logp), Reference(torch.zeros(2)))
    loss.backward()
    assert loss.item() == pytest.approx(max(-margin, 0.0))
    assert logp.grad[0].item() == (-1.0 if margin < 0 else 0.0)


@pytest.mark.parametrize("shape", [(2, 1), (1,), (4,)])
def test_log_probs_of_the_wrong_shape_are_refused(shape):
    batch = Batch.of([pair([1], [2], (1.0, 0.0))])
    with pytest.raises(ValueError, match=r"expected a tensor of shape \[2\]"):
        DPO().loss(batch, Outputs(torch.zeros(shape)), Reference(torch.zeros(2)))


@pytest.mark.parametrize("scores", [(0.5, 0.5), (float("nan"), 1.0)])
def test_ties_and_unscored_completions_are_refused(scores):
    batch = Batch.of([pair([1], [2], (1.0, 0.0)), pair([1], [2], scores)])
    with pytest.raises(ValueError, match="prompt 1 has tied or missing scores"):
        DPO().loss(batch, Outputs(torch.zeros(4)), Reference(torch.zeros(4)))


@pytest.mark.parametrize("beta", [0.0, -0.1, float("nan")])
def test_beta_must_be_positive(beta):
    with pytest.raises(ValueError, match="beta must be above 0"):
        DPO(beta=beta)


# ---------------------------------------------------------------- closed form

# A complete prefix code: every policy over it is three numbers that sum to one, with unequal lengths.
SEQUENCES = [[0], [1, 0], [1, 1]]
REWARD = torch.tensor([0.3, 1.0, -0.6], dtype=torch.float64)


def table(theta: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Log-probs [K] under the policy whose first token has logits theta[0], and second, after a 1, theta[1]."""
    logp = theta.log_softmax(-1)  # [2 positions, 2 tokens]
    depth = [d for row in batch.completions.rows() for d in range(len(row))]
    return logp[depth, batch.completions.values]


def probabilities(theta: torch.Tensor) -> torch.Tensor:
    """Of the three sequences, [3]."""
    every = Batch.of([Example([0], SEQUENCES, [0.0] * 3, [[True] * len(s) for s in SEQUENCES])])
    return every.sum_tokens(table(theta, every)).exp()


@pytest.mark.parametrize("beta", [0.25, 1.0, 3.0])
def test_optimum_on_bradley_terry_labels_is_the_tilted_reference(beta):
    """pi* = reference x exp(reward / beta) / Z, arXiv:2305.18290 equation 4, on labels drawn with probability
    sigmoid(difference of rewards), here in the population: every ordered pair weighted by its probability.
    """
    start = torch.tensor([[0.4, -0.2], [-0.5, 0.3]], dtype=torch.float64)
    ref = probabilities(start)
    models = Models(lambda part: None, lambda part: table(start, part))
    weighted = []
    for i in range(3):
        for j in set(range(3)) - {i}:
            batch = Batch.of([pair(SEQUENCES[j], SEQUENCES[i], (0.0, 1.0))])
            targets = DPO(beta).targets(batch, models)
            weighted.append((ref[i] * ref[j] * torch.sigmoid(REWARD[i] - REWARD[j]), batch, targets))
    theta = start.clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [theta], max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Any:
        solver.zero_grad()
        total: Any = sum(w * DPO(beta).loss(b, Outputs(table(theta, b)), t)[0] for w, b, t in weighted)
        total.backward()
        return total

    solver.step(closure)
    tilted = ref * (REWARD / beta).exp()
    assert torch.allclose(probabilities(theta), tilted / tilted.sum(), rtol=0, atol=1e-7)


# ---------------------------------------------------------------- parity


@pytest.fixture
def trl_trainer(tmp_path, monkeypatch):
    """TRL's own DPO trainer on text rows: its tokenisation, its collator, its loss. policy and reference differ."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    answers = [("good", "bad bad cat"), ("good red dog here", "no"), ("yes yes", "one two"), ("cat", "dog runs here")]
    prompts = ["red cat :", "blue dog runs here :", ":", "yes :"]
    columns = {"prompt": prompts, "chosen": [f" {c}" for c, _ in answers], "rejected": [f" {r}" for _, r in answers]}
    tokenizer = word_tokenizer()
    config = trl.DPOConfig(
        output_dir=str(tmp_path),
        beta=0.3,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        max_length=None,
    )
    models = [llama(seed, vocabulary=len(tokenizer)).eval() for seed in (0, 1)]
    return trl.DPOTrainer(
        model=models[0],
        ref_model=models[1],
        args=config,
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
    )


def test_loss_and_gradient_of_every_pair_equal_trl(trl_trainer):
    """`DPOTrainer.compute_loss` on one row at a time and on all rows, against one update of our loop."""
    tokenizer, rows = word_tokenizer(), list(trl_trainer.train_dataset)
    # our models are drawn anew: TRL replaces the forward function of the ones it is given
    ours, reference = (Policy(llama(seed, vocabulary=len(tokenizer))) for seed in (0, 1))
    models = Models(ours, lambda batch: reference(batch).logp.detach())
    examples = [
        Example(
            row["prompt_ids"],
            [row["rejected_ids"], row["chosen_ids"]],
            [0.0, 1.0],
            [[True] * len(row["rejected_ids"]), [True] * len(row["chosen_ids"])],
        )
        for row in rows
    ]
    for chosen_rows, chosen in [
        *(([row], [example]) for row, example in zip(rows, examples, strict=True)),
        (rows, examples),
    ]:
        trl_trainer.model.zero_grad()
        inputs = trl_trainer.data_collator(copy.deepcopy(chosen_rows))
        theirs = trl_trainer.compute_loss(trl_trainer.model, inputs)
        theirs.backward()
        gradient = torch.cat([p.grad.flatten() for p in trl_trainer.model.parameters()])
        found = one_update(DPO(beta=0.3), Batch.of(chosen), models)
        assert found.metrics["loss"] == pytest.approx(theirs.item(), abs=1e-5)
        assert abs(theirs.item() - math.log(2)) > 1e-2
        assert torch.allclose(found.gradient, gradient, rtol=0, atol=1e-5 * max(1.0, float(gradient.abs().max())))
