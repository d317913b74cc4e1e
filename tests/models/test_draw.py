from __future__ import annotations

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from prefopt.models.draw import BLOCK, LIKELIEST, Stream, draw, probabilities, uniforms
from prefopt.models.sampling import Sampling

ALMOST_ONE = 1 - 2**-53  # the largest number that a stream gives


def logits(rows: int, vocabulary: int, spread: float = 2.0) -> torch.Tensor:
    return spread * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0))


def warped(z: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """transformers' own truncation of the same logits."""
    steps = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        steps.append(MinPLogitsWarper(sampling.min_p))
    return steps(torch.zeros(len(z), 0, dtype=torch.int64), z.clone()).softmax(-1)


TRUNCATIONS = [
    Sampling(),
    Sampling(temperature=0.6),
    Sampling(top_k=7),
    Sampling(top_p=0.6),
    Sampling(min_p=0.2),
    Sampling(temperature=1.4, top_k=30, top_p=0.8, min_p=0.05),
    # flat, so that the share is not reached by the tokens sorted first
    Sampling(temperature=50.0, top_p=0.9),
    Sampling(top_k=10**6, top_p=0.95),
]


@pytest.mark.parametrize("sampling", TRUNCATIONS, ids=str)
@pytest.mark.parametrize("vocabulary", [40, 3 * LIKELIEST])
def test_the_distribution_is_the_one_of_transformers_own_truncation(sampling, vocabulary):
    z = logits(5, vocabulary)
    p = probabilities(z, sampling)
    torch.testing.assert_close(p / p.sum(-1, keepdim=True), warped(z, sampling), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("vocabulary", [3, BLOCK, 2 * BLOCK + 17])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7, top_p=0.8)], ids=str)
def test_tokens_come_as_often_as_they_are_likely_and_logp_says_how_likely(vocabulary, sampling):
    z, draws = logits(1, vocabulary, 3.0), 20_000
    uniform = torch.rand(draws, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    drawn = draw(z.expand(draws, -1), sampling, uniform)
    p = warped(z, sampling)[0]
    counts = torch.bincount(drawn.token, minlength=vocabulary) / draws
    assert ((counts - p).abs() <= 4.5 * (p * (1 - p) / draws).sqrt() + 3 / draws).all()
    torch.testing.assert_close(drawn.logp, p[drawn.token].log(), atol=1e-5, rtol=0)


def test_a_token_that_cannot_be_drawn_never_is_at_either_end_of_the_numbers():
    z = torch.full((1, 2 * BLOCK + 5), float("-inf"))
    z[0, [BLOCK, BLOCK + 3]] = 0.0
    ends = torch.tensor([[0.0, 0.0], [ALMOST_ONE, ALMOST_ONE], [0.0, ALMOST_ONE]], dtype=torch.float64)
    drawn = draw(z.expand(3, -1), Sampling(), ends)
    assert drawn.token.tolist() == [BLOCK, BLOCK + 3, BLOCK + 3]
    torch.testing.assert_close(drawn.logp, torch.full((3,), 0.5).log())


def test_without_numbers_the_likeliest_token_is_taken_at_no_cost_in_logp():
    z = logits(4, 30)
    drawn = draw(z, Sampling(temperature=0.0), None)
    assert drawn.token.tolist() == z.argmax(-1).tolist() and drawn.logp.tolist() == [0.0] * 4


def test_a_stream_depends_on_seed_and_number_alone():
    cpu = torch.device("cpu")
    first = uniforms([Stream(1, 0), Stream(1, 1), Stream(2, 0)], cpu)
    assert torch.equal(uniforms([Stream(2, 0)], cpu)[0], first[2])
    assert len(set(first.flatten().tolist())) == 6
    assert ((first >= 0) & (first < 1)).all()
    stream = Stream(1, 0)
    assert stream.pair() != stream.pair()
