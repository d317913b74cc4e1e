from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prefopt.batch import Batch, Ragged, check, cut_targets, parts
from prefopt.records import Example

NAN = float("nan")


class Goals(NamedTuple):
    """Targets of every shape an objective may have."""

    of_prompts: Tensor
    of_completions: Tensor
    of_tokens: Tensor
    constant: Tensor
    absent: Tensor | None = None


class One(NamedTuple):
    x: Tensor


def example(prompt: int, *completions: int, scores: list[float] | None = None) -> Example:
    """A prompt and completions of these lengths, every token a different number within the example."""
    tokens, start = [], 100
    for length in completions:
        tokens.append(list(range(start, start + length)))
        start += length
    scores = scores or [float(n) for n in range(len(completions))]
    return Example(list(range(prompt)), tokens, scores, [[True] * length for length in completions])


def goals(batch: Batch) -> Goals:
    return Goals(
        torch.arange(batch.num_prompts),
        torch.arange(batch.num_completions),
        torch.arange(len(batch.trained)),
        torch.tensor(7.0),
    )


def pair_batch(*scores: list[float]) -> Batch:
    return Batch.of([example(2, 3, 1, scores=list(s)) for s in scores])


def test_examples_lie_end_to_end():
    batch = Batch.of(
        [
            Example([1, 2], [[3, 4], [5]], [0.5, 1.0], [[True, False], [True]]),
            Example([6], [[7]], [NAN], [[True]]),
        ]
    )
    assert batch.prompts.values.tolist() == [1, 2, 6] and batch.prompts.lengths.tolist() == [2, 1]
    assert batch.completions.values.tolist() == [3, 4, 5, 7] and batch.completions.lengths.tolist() == [2, 1, 1]
    assert batch.group.tolist() == [0, 0, 1] and batch.owner.tolist() == [0, 0, 1, 2]
    assert batch.trained.tolist() == [True, False, True, True]
    assert batch.score[:2].tolist() == [0.5, 1.0] and batch.score.isnan().tolist() == [False, False, True]
    assert (batch.num_prompts, batch.num_completions) == (2, 3)
    assert batch.tokens_per_prompt() == [5, 2]
    assert batch.tokens_per_prompt(repeat=True) == [7, 2]  # a padded row for each completion, with its prompt
    assert batch.rollout_logp is None


@pytest.mark.parametrize(
    "row",
    [
        Example([], [[1]], [1.0], [[True]], "pairs.jsonl:17"),
        Example([1], [[]], [1.0], [[]], "pairs.jsonl:17"),
        Example([1], [[2], []], [1.0, 0.0], [[True], []], "pairs.jsonl:17"),
        Example([1], [], [], [], "pairs.jsonl:17"),
    ],
)
def test_an_empty_prompt_or_completion_names_the_row(row):
    with pytest.raises(ValueError, match=r"pairs\.jsonl:17: an empty prompt or completion"):
        Batch.of([example(1, 1), row])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scores": [1.0]}, "2 completions, 1 scores; give one score each"),
        ({"scores": [1.0, 0.0, 0.0]}, "2 completions, 3 scores"),
        ({"trained": [[True], [True]]}, r"completions of \[2, 1\] tokens, trained flags for \[1, 1\]"),
        ({"trained": [[True, True]]}, r"trained flags for \[2\]"),
        ({"steps": [[NAN, 1.0]]}, r"completions of \[2, 1\] tokens, labels of steps for \[2\]"),
    ],
)
def test_scores_and_flags_that_are_not_one_each_name_the_row(changes, said):
    """Two such rows may cancel: laid end to end, nothing would tell."""
    row = Example([1], [[2, 3], [4]], [1.0, 0.0], [[True, True], [True]], "pairs.jsonl:17")
    assert Batch.of([row]).num_completions == 2
    with pytest.raises(ValueError, match=rf"pairs\.jsonl:17: .*{said}"):
        Batch.of([replace(row, **changes)])


def test_labels_of_steps_lie_end_to_end_and_rows_without_any_have_none():
    plain, labelled = Example([1], [[2, 3]], [1.0], [[True, True]]), Example([1], [[4]], [0.0], [[True]], "", [[0.0]])
    assert Batch.of([plain]).steps is None
    steps = Batch.of([plain, labelled]).steps
    assert steps.isnan().tolist() == [True, True, False] and steps[2] == 0


def test_ragged_rows_and_cuts():
    ragged = Ragged.of([[1, 2], [], [3], [4, 5, 6]])
    assert [row.tolist() for row in ragged.rows()] == [[1, 2], [], [3], [4, 5, 6]]
    assert [row.tolist() for row in ragged.cut(1, 3).rows()] == [[], [3]]
    assert len(ragged) == 4 and len(ragged.cut(2, 2)) == 0


def test_sums_and_means_over_trained_tokens_by_hand():
    batch = Batch.of(
        [
            Example([1], [[1, 1, 1], [1, 1]], [1.0, 0.0], [[True, False, True], [False, False]]),
            Example([1], [[1]], [1.0], [[True]]),
        ]
    )
    x = torch.tensor([1.0, 10.0, 3.0, 20.0, 30.0, 5.0])
    assert batch.sum_tokens(x).tolist() == [4.0, 0.0, 5.0]
    assert batch.mean_tokens(x).tolist() == [2.0, 0.0, 5.0]  # no trained token: 0, not a division by zero
    assert batch.spread(torch.tensor([7.0, 8.0, 9.0])).tolist() == [7, 7, 7, 8, 8, 9]


@pytest.mark.parametrize("bad", [NAN, float("inf"), float("-inf")])
def test_what_stands_on_an_untrained_token_reaches_neither_sum_nor_gradient(bad):
    batch = Batch.of([Example([1], [[1, 2]], [1.0], [[True, False]])])
    x = torch.tensor([2.0, bad], requires_grad=True)
    batch.sum_tokens(x).sum().backward()
    assert batch.sum_tokens(x).tolist() == batch.mean_tokens(x).tolist() == [2.0]
    assert x.grad.tolist() == [1.0, 0.0]


def test_sums_keep_the_dtype_of_what_is_summed():
    batch = Batch.of([example(1, 2)])
    assert batch.sum_tokens(torch.ones(2, dtype=torch.float64)).dtype == torch.float64


def test_pairs_are_ordered_by_score_wherever_the_better_one_stands():
    batch = pair_batch([1.0, 0.0], [-3.0, -2.5], [0.1, 0.2])
    better, worse = batch.pairs(torch.tensor([10.0, 11.0, 20.0, 21.0, 30.0, 31.0]))
    assert better.tolist() == [10, 21, 31] and worse.tolist() == [11, 20, 30]


@pytest.mark.parametrize("scores", [[1.0, 1.0], [NAN, 1.0], [1.0, NAN], [NAN, NAN]])
def test_ties_and_missing_scores_name_the_prompt(scores):
    with pytest.raises(ValueError, match="prompt 1 has tied or missing scores; drop it"):
        pair_batch([1.0, 0.0], scores, [0.0, 0.0]).pairs(torch.zeros(6))


@pytest.mark.parametrize(
    "counts,said", [([2, 3], "prompt 1 has 3"), ([1, 3], "prompt 0 has 1"), ([2, 2, 1], "prompt 2 has 1")]
)
def test_other_than_two_completions_name_the_prompt(counts, said):
    batch = Batch.of([example(2, *[1] * count) for count in counts])
    with pytest.raises(ValueError, match=f"{said} completions and needs exactly two"):
        batch.pairs(torch.zeros(sum(counts)))


def test_shapes_that_would_broadcast_are_refused():
    batch = pair_batch([1.0, 0.0], [0.0, 1.0])  # G 2, N 4, K 8
    n, k = torch.zeros(4), torch.zeros(8)
    for reject, x in [
        (batch.sum_tokens, n),
        (batch.sum_tokens, k[:, None]),
        (batch.mean_tokens, n),
        (batch.mean_tokens, k[None]),
        (batch.spread, k),
        (batch.spread, n[:, None]),
        (batch.spread, torch.tensor(1.0)),
        (batch.pairs, k),
        (batch.pairs, n[:, None]),
        (batch.pairs, torch.zeros(2)),
    ]:
        with pytest.raises(ValueError, match=r"expected a tensor of shape \[\d\], got \["):
            reject(x)
    with pytest.raises(ValueError, match=r"here: expected a tensor of shape \[4\], got \[4, 1\]"):
        check(n[:, None], 4, "here")
    assert check(n, 4, "here") is n


def test_taking_prompts_takes_all_that_is_theirs():
    batch = Batch.of([example(2, 3), example(4, 1, 2), example(1, 5)])
    batch = Batch(**{**vars(batch), "rollout_logp": torch.arange(11.0)})
    cut = batch.take(1, 3)
    assert [row.tolist() for row in cut.prompts.rows()] == [[0, 1, 2, 3], [0]]
    assert cut.completions.lengths.tolist() == [1, 2, 5] and cut.group.tolist() == [0, 0, 1]
    assert cut.score.tolist() == [0, 1, 0] and cut.rollout_logp.tolist() == list(range(3, 11))
    assert len(cut.trained) == 8


def test_moving_a_batch_moves_every_tensor():
    batch = Batch.of([example(2, 3)])
    moved = Batch(**{**vars(batch), "rollout_logp": torch.zeros(3)}).to("meta")
    tensors = [moved.prompts.values, moved.prompts.lengths, moved.completions.values, moved.completions.lengths]
    tensors += [moved.group, moved.trained, moved.score, moved.rollout_logp]
    assert {t.device.type for t in tensors} == {"meta"}
    assert batch.to("cpu").rollout_logp is None


def test_a_filler_stays_one_in_part_and_elsewhere():
    batch = Batch.of([example(2, 3)])
    filler = replace(batch, filler=True)
    assert filler.take(0, 1).filler and filler.to("cpu").filler
    assert not batch.take(0, 1).filler and not batch.to("cpu").filler


def test_a_budget_cuts_between_prompts_by_hand():
    batch = Batch.of([example(2, 3), example(4, 1, 2), example(1, 1), example(1, 20), example(1, 1)])  # 5 7 2 21 2
    sizes = [[p.tokens_per_prompt() for p, _ in parts(batch, (), tokens)] for tokens in (12, 14, 1000, 1)]
    assert sizes == [
        [[5, 7], [2], [21], [2]],
        [[5, 7, 2], [21], [2]],  # exactly the budget fits; what is larger than it goes alone
        [[5, 7, 2, 21, 2]],
        [[5], [7], [2], [21], [2]],
    ]


def test_targets_are_cut_by_what_they_belong_to():
    batch = Batch.of([example(2, 3), example(4, 1, 2), example(1, 1)])
    cut = cut_targets(batch, goals(batch), 1, 3)
    assert isinstance(cut, Goals)
    assert cut.of_prompts.tolist() == [1, 2] and cut.of_completions.tolist() == [1, 2, 3]
    assert cut.of_tokens.tolist() == [3, 4, 5, 6] and cut.constant.item() == 7 and cut.absent is None


def test_targets_of_several_columns_keep_them():
    batch = Batch.of([example(2, 3), example(4, 1, 2)])
    (cut,) = cut_targets(batch, One(torch.arange(6).view(3, 2)), 1, 2)
    assert cut.tolist() == [[2, 3], [4, 5]]


def test_a_target_of_no_known_size_is_refused():
    batch = Batch.of([example(2, 3), example(4, 1, 2)])
    with pytest.raises(ValueError, match=r"\[5\] is neither \[G\], \[N\], \[K\] nor a scalar"):
        cut_targets(batch, One(torch.zeros(5)), 0, 1)


shapes = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.integers(1, 5), min_size=1, max_size=4)), min_size=1, max_size=7
)


@given(shapes, st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_every_token_is_in_exactly_one_part_with_its_targets(shape, tokens):
    batch = Batch.of([example(prompt, *completions) for prompt, completions in shape])
    cuts = list(parts(batch, goals(batch), tokens))
    for part, goal in cuts:
        assert part.num_prompts == 1 or sum(part.tokens_per_prompt()) <= tokens
        assert len(goal.of_prompts) == part.num_prompts
        assert len(goal.of_completions) == part.num_completions
        assert len(goal.of_tokens) == len(part.trained)
        assert part.group.tolist() == sorted(part.group.tolist()) and set(part.group.tolist()) == set(
            range(part.num_prompts)
        )
    for name, size in (
        ("of_prompts", len(shape)),
        ("of_completions", len(batch.group)),
        ("of_tokens", len(batch.owner)),
    ):
        assert torch.cat([getattr(goal, name) for _, goal in cuts]).tolist() == list(range(size))
    for one, whole in (
        ([p.prompts.values for p, _ in cuts], batch.prompts.values),
        ([p.completions.values for p, _ in cuts], batch.completions.values),
        ([p.completions.lengths for p, _ in cuts], batch.completions.lengths),
        ([p.score for p, _ in cuts], batch.score),
    ):
        assert torch.equal(torch.cat(one), whole)
    # no part could have taken the next one's first prompt too
    for (part, _), (after, _) in pairwise(cuts):
        assert sum(part.tokens_per_prompt()) + after.tokens_per_prompt()[0] > tokens


@given(shapes, st.integers(1, 40))
@settings(max_examples=50, deadline=None)
def test_sums_over_parts_are_the_parts_of_the_sums(shape, tokens):
    batch = Batch.of([example(prompt, *completions) for prompt, completions in shape])
    x = torch.arange(float(len(batch.trained)))
    got = torch.cat([part.sum_tokens(own) for part, (own,) in parts(batch, One(x), tokens)])
    assert torch.equal(got, batch.sum_tokens(x))
