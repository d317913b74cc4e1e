"""The quickstart: a model from nothing, SFT, then DPO, and what changed, in a few minutes on two CPU cores."""

from prefopt.recipes.quickstart.recipe import run

__all__ = ["run"]
