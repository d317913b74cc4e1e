from __future__ import annotations

import tiny
import torch

from prefopt.batch import Batch
from prefopt.models.layouts import PaddedRows, Segment, TreeRow
from prefopt.records import Example

CPU = torch.device("cpu")
# two prompts: the first with completions of two and one tokens, the second with one of three
SMALL = Batch.of(
    [
        Example([10, 11], [[20, 21], [30]], [1.0, 0.0], [[True, True], [True]]),
        Example([12], [[40, 41, 42]], [1.0], [[True] * 3]),
    ]
)


def test_the_packed_row_by_hand():
    row = TreeRow.of(SMALL, CPU)
    assert row.ids.tolist() == [10, 11, 20, 21, 30, 12, 40, 41, 42]
    assert row.positions.tolist() == [0, 1, 2, 3, 2, 0, 1, 2, 3]
    assert row.group.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1]
    assert row.branch.tolist() == [-1, -1, 0, 0, 1, -1, 2, 2, 2]
    assert row.at.tolist() == [2, 3, 4, 6, 7, 8]
    assert row.before.tolist() == [1, 2, 1, 5, 6, 7]  # both first tokens of prompt 0 are predicted from its last


def test_the_segments_by_hand():
    # the first completion runs on from its prompt; the second sees the prompt as context
    segments = TreeRow.of(SMALL, CPU).segments
    assert segments == [Segment((0, 0), 0, 4), Segment((0, 2), 4, 5), Segment((5, 5), 5, 9)]


def test_segments_cover_every_token_exactly_once():
    row = TreeRow.of(tiny.family(), CPU)
    covered = [t for s in row.segments for t in range(s.start, s.stop)]
    assert sorted(covered) == list(range(len(row.ids)))


def test_the_padded_rectangle_by_hand():
    rows = PaddedRows.of(SMALL, CPU)
    assert rows.ids.tolist() == [[10, 11, 20, 21], [10, 11, 30, 0], [12, 40, 41, 42]]
    assert rows.mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert rows.at.tolist() == [2, 3, 6, 9, 10, 11]
    assert rows.before.tolist() == [1, 2, 5, 8, 9, 10]


def test_both_layouts_point_at_the_completions_tokens_in_their_order():
    batch = tiny.family()
    tree, padded = TreeRow.of(batch, CPU), PaddedRows.of(batch, CPU)
    assert torch.equal(tree.ids[tree.at], batch.completions.values)
    assert torch.equal(padded.ids.flatten()[padded.at], batch.completions.values)
    # the token that predicts is the same one too
    assert torch.equal(tree.ids[tree.before], padded.ids.flatten()[padded.before])


def test_the_packed_row_holds_each_prompt_once():
    batch = tiny.family()
    assert len(TreeRow.of(batch, CPU).ids) == sum(batch.tokens_per_prompt())
