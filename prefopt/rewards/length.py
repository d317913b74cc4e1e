"""Rewards of a completion's tokens: near a length, not too long, not repeating itself."""

from __future__ import annotations

from functools import partial

from prefopt.records import Sample, Score
from prefopt.rewards.direct import DirectReward


def length(target: int) -> DirectReward:
    """1 at `target` tokens, falling to 0 at none and at twice as many, where it stays: 1 - |n - target| / target."""
    return DirectReward("length", partial(_length, target=target))


def overlong(most: int, cache: int) -> DirectReward:
    """0 up to `most` - `cache` tokens, falling to -1 at `most`, where it stays.

    Yu et al. 2025 (DAPO), arXiv:2503.14476, eq. 13.
    """
    return DirectReward("overlong", partial(_overlong, most=most, cache=cache))


def repetition(ngram: int) -> DirectReward:
    """0 without a repeated run of `ngram` tokens, towards -1 the more are repeats: distinct runs / runs - 1.

    A completion shorter than that gives 0. After Yeo et al. 2025, arXiv:2502.03373, appendix C.2, as TRL has it.
    """
    return DirectReward("repetition", partial(_repetition, ngram=ngram))


def _length(sample: Sample, target: int) -> Score:
    if not sample.tokens:
        return _unknown()
    return Score(max(0.0, 1 - abs(len(sample.tokens) - target) / target))


def _overlong(sample: Sample, most: int, cache: int) -> Score:
    if not sample.tokens:
        return _unknown()
    over = len(sample.tokens) - (most - cache)
    return Score(0.0 if over <= 0 else -min(1.0, over / cache) if cache else -1.0)


def _repetition(sample: Sample, ngram: int) -> Score:
    if not sample.tokens:
        return _unknown()
    runs = [tuple(sample.tokens[start : start + ngram]) for start in range(len(sample.tokens) - ngram + 1)]
    return Score(len(set(runs)) / len(runs) - 1 if runs else 0.0)


def _unknown() -> Score:
    return Score(None, "the completion's tokens are not known")
