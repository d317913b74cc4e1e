"""Completions that the policy writes itself: drawn, scored, learnt from."""

from prefopt.rollout.options import RolloutOptions

__all__ = ["RolloutOptions"]
