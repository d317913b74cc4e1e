"""The quickstarts: a model from nothing, SFT, then DPO or GRPO, and what changed, in a few minutes on two CPU cores."""

from prefopt.recipes.quickstart.grpo import run as run_grpo
from prefopt.recipes.quickstart.recipe import run

__all__ = ["run", "run_grpo"]
