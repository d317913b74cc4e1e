"""Data in: the usual preference files become examples of token ids, and every row left out is counted."""

from prefopt.data.dataset import DataOptions, Dataset, load, read_prompts, split
from prefopt.data.template import template_text

__all__ = ["DataOptions", "Dataset", "load", "read_prompts", "split", "template_text"]
