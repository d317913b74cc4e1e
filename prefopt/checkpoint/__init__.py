"""A run's whole state on disk: checkpoints that are whole or not there, written while training goes on."""

from prefopt.checkpoint.commit import Checkpoint, Skipped, found, newest, prune
from prefopt.checkpoint.keeper import CheckpointOptions, Keeper
from prefopt.checkpoint.tree import Tree, read

__all__ = ["Checkpoint", "CheckpointOptions", "Keeper", "Skipped", "Tree", "found", "newest", "prune", "read"]
