"""What is wrong with a run, from its log: ours or another trainer's. Nothing here imports torch."""

from __future__ import annotations

from prefopt.doctor.diagnosis import Diagnosis, diagnose
from prefopt.doctor.logs import Log, read

__all__ = ["Diagnosis", "Log", "diagnose", "read"]
