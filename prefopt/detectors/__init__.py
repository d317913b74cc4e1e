"""Detectors: signs of trouble in a run's metrics, as pure functions of the stream. Nothing here imports torch."""

from __future__ import annotations

from prefopt.detectors.clipping import Clipping
from prefopt.detectors.critic import Critic
from prefopt.detectors.distance import Distance
from prefopt.detectors.drift import Drift
from prefopt.detectors.entropy import Entropy
from prefopt.detectors.finding import Check, Detector, Finding, Line, Run
from prefopt.detectors.gradients import Gradients
from prefopt.detectors.hollow_margin import HollowMargin
from prefopt.detectors.length import Length
from prefopt.detectors.low_beta import LowBeta
from prefopt.detectors.memorising import Memorising
from prefopt.detectors.no_preference import NoPreference
from prefopt.detectors.options import WatchOptions
from prefopt.detectors.orpo_start import OrpoStart
from prefopt.detectors.over_optimisation import OverOptimisation
from prefopt.detectors.repetition import Repetition
from prefopt.detectors.sampler_mismatch import SamplerMismatch
from prefopt.detectors.sparse_reward import SparseReward
from prefopt.detectors.truncation import Truncation
from prefopt.detectors.unscored import Unscored
from prefopt.detectors.watch import Watch
from prefopt.detectors.zero_variance import ZeroVariance

# name -> class; the four that a run may die of come first
EVERY: dict[str, type[Detector]] = {
    cls.name: cls
    for cls in (
        HollowMargin,
        SparseReward,
        Drift,
        OrpoStart,
        Memorising,
        OverOptimisation,
        LowBeta,
        NoPreference,
        ZeroVariance,
        Entropy,
        Length,
        Truncation,
        Repetition,
        Distance,
        Clipping,
        Critic,
        SamplerMismatch,
        Gradients,
        Unscored,
    )
}


def every() -> list[Detector]:
    """One of each, with the thresholds that they come with."""
    return [cls() for cls in EVERY.values()]


__all__ = [
    "EVERY",
    "Check",
    "Detector",
    "Finding",
    "Line",
    "Run",
    "Watch",
    "WatchOptions",
    "every",
]
