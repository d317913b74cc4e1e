"""Perplexity, KL and preference accuracy: by hand on policies that are tables, and on a real model."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from prefopt.batch import Batch, Outputs
from prefopt.evaluate.kl import sequence_kl
from prefopt.evaluate.perplexity import perplexity
from prefopt.evaluate.preference import preference_accuracy
from prefopt.evaluate.scoring import sampled, score
from prefopt.models.policy import Policy
from prefopt.models.sampler import sample
from prefopt.records import Example


class Table:
    """A policy whose token t has probability p[t], whatever came before."""

    def __init__(self, *p: float) -> None:
        self.logp = torch.tensor(p).log()

    def __call__(self, batch: Batch) -> Outputs:
        return Outputs(self.logp[batch.completions.values])


def example(*completions: list[int], scores: list[float] | None = None) -> Example:
    trained = [[True] * len(tokens) for tokens in completions]
    return Example([0], list(completions), scores or [1.0] * len(completions), trained)


def gpt2() -> Policy:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=12, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.4)
    return Policy(GPT2LMHeadModel(config).train())


def test_perplexity_by_hand():
    # 1/2 * 1/2 * 1/8: exp(-mean log) = 32^(1/3)
    found = perplexity(Table(0.5, 0.125), [example([0]), example([0, 1])])
    assert found.value == pytest.approx(32 ** (1 / 3))
    assert found.nll == pytest.approx(math.log(32) / 3)
    assert found.num_tokens == 3


def test_perplexity_leaves_out_tokens_the_policy_did_not_write():
    row = Example([0], [[1, 0, 1]], [1.0], [[False, True, False]])
    assert perplexity(Table(0.5, 0.125), [row]).value == pytest.approx(2.0)
    nothing = perplexity(Table(0.5, 0.125), [Example([0], [[1]], [1.0], [[False]])])
    assert nothing.value is None and "no trained token" in nothing.why


def test_perplexity_of_an_impossible_token_is_none_with_a_reason():
    found = perplexity(Table(1.0, 0.0), [example([1])])
    assert found.value is None and "inf" in found.why


@pytest.mark.parametrize("budget", [1, 11, 10_000])
def test_the_token_budget_does_not_change_a_score(budget):
    policy, rows = gpt2(), [example([1, 2, 3], [4]), example([5, 6]), example([7, 8, 9, 10])]
    scored, whole = score(policy, rows, budget), score(policy, rows)
    assert torch.allclose(scored.logp, whole.logp, atol=1e-5)
    assert scored.tokens.tolist() == [3, 1, 2, 4]


def test_scores_are_those_of_a_plain_forward_without_dropout_and_the_mode_is_put_back():
    policy = gpt2()
    policy.model.transformer.h[0].eval()
    scored = score(policy, [example([4, 7])])
    assert policy.model.training and policy.model.transformer.h[1].training
    assert not policy.model.transformer.h[0].training
    policy.model.config._attn_implementation = "sdpa"
    with torch.no_grad():
        logp = policy.model.eval()(input_ids=torch.tensor([[0, 4, 7]])).logits[0].log_softmax(-1)
    assert scored.logp.item() == pytest.approx((logp[0, 4] + logp[1, 7]).item(), abs=1e-5)


def test_kl_by_hand():
    # log(1/2 / 1/4) = ln 2 for token 0, log(1/2 / 3/4) = ln 2/3 for token 1
    policy, reference = Table(0.5, 0.5), Table(0.25, 0.75)
    found = sequence_kl(policy, reference, [example([0, 0], [1]), example([0])])
    first, second = (2 * math.log(2) + math.log(2 / 3)) / 2, math.log(2)
    assert found.value == pytest.approx((first + second) / 2)
    assert found.standard_error == pytest.approx(abs(first - second) / 2)
    assert found.per_token == pytest.approx((3 * math.log(2) + math.log(2 / 3)) / 4)
    assert found.n == 2


def test_sampled_kl_estimates_the_exact_kl_of_a_model():
    # completions of one token: KL is a sum over 12 tokens
    policy, reference = gpt2(), gpt2()
    with torch.no_grad():
        for weight in reference.model.transformer.h[1].parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    prompts = [[3], [5, 6]]
    exact = []
    for prompt in prompts:
        rows = [Example(prompt, [[token] for token in range(12)], [1.0] * 12, [[True]] * 12)]
        p, q = score(policy, rows).logp, score(reference, rows).logp
        exact.append(float((p.exp() * (p - q)).sum()))
    samples = [
        row
        for prompt in prompts
        for tokens in sample(policy.model, [prompt], n=1500, max_tokens=1, eos_ids=[], seed=0)[0]
        for row in sampled([prompt], [[tokens]])
    ]
    found = sequence_kl(policy, reference, samples)
    assert found.value == pytest.approx(sum(exact) / 2, abs=4 * found.standard_error)
    assert found.value > 4 * found.standard_error


def test_kl_that_cannot_be_measured_is_none_with_a_reason():
    assert "no samples" in sequence_kl(Table(1.0), Table(1.0), []).why
    impossible = sequence_kl(Table(0.5, 0.5), Table(1.0, 0.0), [example([1])])
    assert impossible.value is None and "1 of 1" in impossible.why
    alone = sequence_kl(Table(0.5, 0.5), Table(0.25, 0.75), [example([1])])
    assert alone.standard_error is None and alone.value is not None and "one prompt" in alone.why


def test_preference_accuracy_by_hand():
    # the policy likes token 0 more than the reference does, token 1 less
    policy, reference = Table(0.6, 0.4), Table(0.25, 0.75)
    pairs = [
        example([0], [1], scores=[1.0, 0.0]),  # right
        example([0, 0], [1], scores=[0.0, 1.0]),  # wrong: the better one comes second
        example([1], [0], scores=[0.0, 1.0]),  # right
        example([0, 1], [1, 0], scores=[1.0, 0.0]),  # tied
    ]
    found = preference_accuracy(policy, reference, pairs)
    assert (found.value, found.n) == (2.5 / 4, 4)
    assert preference_accuracy(policy, reference, []).value is None
    with pytest.raises(ValueError, match="tied"):
        preference_accuracy(policy, reference, [example([0], [1], scores=[1.0, 1.0])])
