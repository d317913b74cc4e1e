"""SFT by hand, and against plain cross-entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from laws import gpt_neox, one_update, rows

from prefopt.batch import Batch, Outputs
from prefopt.loop import Models
from prefopt.models.policy import Policy
from prefopt.objectives import SFT, Nothing
from prefopt.records import Example


def test_loss_by_hand():
    # trained log-probs -1.0, -0.5 and -2.0: the sum is 3.5 over 3 tokens; the -9.0 was not written by the policy
    example = Example([7], [[1, 2, 3]], [1.0], [[True, False, True]])
    batch = Batch.of([example, Example([7], [[4]], [1.0], [[True]])])
    logp = torch.tensor([-1.0, -9.0, -0.5, -2.0], requires_grad=True)
    loss, seen = SFT().loss(batch, Outputs(logp), Nothing())
    loss.backward()
    assert loss.item() == 3.5
    assert int(SFT().count(batch)) == 3
    assert seen["nll"].tolist() == [1.0, 0.5, 2.0]
    assert logp.grad.tolist() == [-1.0, 0.0, -1.0, -1.0]


def test_weighted_by_probability_by_hand():
    # p = 0.5 and 0.1: -p log p = 0.5 * 0.693147 + 0.1 * 2.302585 = 0.576832; the gradient is -p, p being a constant
    batch = Batch.of([Example([7], [[1, 2, 3]], [1.0], [[True, False, True]])])
    logp = torch.tensor([0.5, 0.9, 0.1]).log().requires_grad_()
    loss, seen = SFT(weighting="probability").loss(batch, Outputs(logp), Nothing())
    loss.backward()
    assert loss.item() == pytest.approx(0.576832, abs=1e-6)
    assert logp.grad.tolist() == pytest.approx([-0.5, 0.0, -0.1])
    assert seen["nll"].tolist() == pytest.approx([0.693147, 2.302585])
    assert int(SFT(weighting="probability").count(batch)) == 2


def test_an_unknown_weighting_is_refused():
    with pytest.raises(ValueError, match="weighting must be none or probability, got 'dft'"):
        SFT(weighting="dft")  # type: ignore[arg-type]


def test_update_equals_plain_cross_entropy_over_trained_tokens():
    """`F.cross_entropy` with ignored labels on an ordinary right-padded batch: the mean over tokens, not over rows."""
    examples, model = rows("demonstrations", num=6), gpt_neox(0)
    sequences = [[*e.prompt, *e.completions[0]] for e in examples]
    width = max(map(len, sequences))
    ids, labels = torch.zeros(6, width, dtype=torch.int64), torch.full((6, width), -100)
    for n, (example, sequence) in enumerate(zip(examples, sequences, strict=True)):
        ids[n, : len(sequence)] = torch.tensor(sequence)
        flags = [False] * len(example.prompt) + example.trained[0]
        labels[n, : len(sequence)] = torch.tensor([t if f else -100 for t, f in zip(sequence, flags, strict=True)])
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences])
    logits = model(input_ids=ids, attention_mask=mask).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    found = one_update(SFT(), Batch.of(examples), Models(Policy(gpt_neox(0))))
    assert found.metrics["loss"] == pytest.approx(loss.item(), rel=1e-12)
    assert found.metrics["nll"] == pytest.approx(loss.item(), rel=1e-12)
    assert torch.allclose(found.gradient, gradient, rtol=1e-9, atol=1e-12)
