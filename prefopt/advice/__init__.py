"""Before a run: what it needs in memory and time, and which objective fits data, model and machine."""
