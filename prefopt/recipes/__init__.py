"""Whole jobs: from files and a model directory to a trained model and a run folder."""
