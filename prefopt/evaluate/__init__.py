"""What a trained policy is worth: win rate, preference accuracy, distance from the reference, perplexity."""

from prefopt.evaluate.statistics import Estimate, mean, wilson

__all__ = ["Estimate", "mean", "wilson"]
