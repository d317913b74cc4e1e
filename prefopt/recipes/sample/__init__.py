"""What a model says, and rows of training data made of it: `prefopt sample`."""

from prefopt.recipes.sample.options import RowOptions
from prefopt.recipes.sample.plain import Samples, sample
from prefopt.recipes.sample.preferences import Task, preferences
from prefopt.recipes.sample.writers import LocalWriter, ServerWriter, Writer

__all__ = ["LocalWriter", "RowOptions", "Samples", "ServerWriter", "Task", "Writer", "preferences", "sample"]
