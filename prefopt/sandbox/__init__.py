"""Model-written code, run where it can do no harm and judged where it cannot reach. Linux; see docs/sandbox.md."""

from __future__ import annotations

from prefopt.sandbox.machine import LEVELS, Machine, find
from prefopt.sandbox.pool import Sandbox
from prefopt.sandbox.process import Limits, SandboxError
from prefopt.sandbox.programs import Asserts, Call, Calls, Outcome, Program, Script, Verdict
from prefopt.sandbox.signs import SIGNS

__all__ = [
    "LEVELS",
    "SIGNS",
    "Asserts",
    "Call",
    "Calls",
    "Limits",
    "Machine",
    "Outcome",
    "Program",
    "Sandbox",
    "SandboxError",
    "Script",
    "Verdict",
    "find",
]
