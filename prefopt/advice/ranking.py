"""From a case to an order of methods, each with what speaks for it and against it."""

from __future__ import annotations

from typing import NamedTuple

from prefopt.advice.case import Case
from prefopt.advice.rules import CHANGES, METHODS, RULES, Method


class Reason(NamedTuple):
    """words: why. points: how much. evidence, source: on what it rests."""

    words: str
    points: float
    evidence: str
    source: str


class Advice(NamedTuple):
    """A method's place. refused: why it cannot be trained here at all, empty where it can."""

    name: str
    title: str
    points: float
    reasons: tuple[Reason, ...]
    refused: str = ""

    @property
    def why(self) -> list[Reason]:
        return [reason for reason in self.reasons if reason.points > 0]

    @property
    def why_not(self) -> list[Reason]:
        return [reason for reason in self.reasons if reason.points < 0]


def rank(case: Case) -> list[Advice]:
    """Every method, the best first; those that cannot be trained come last and say why."""
    found = [_weighed(case, name, method) for name, method in METHODS.items()]
    return sorted(found, key=lambda advice: (bool(advice.refused), -advice.points))


def _weighed(case: Case, name: str, method: Method) -> Advice:
    why_not = refused(case, method)
    if why_not:
        return Advice(name, method.title, 0.0, (), why_not)
    holding = [rule for rule in RULES if name in rule.methods and rule.when(case)]
    reasons = tuple(Reason(rule.words(case), rule.points, rule.evidence, rule.source) for rule in holding)
    return Advice(name, method.title, sum(reason.points for reason in reasons), reasons)


def refused(case: Case, method: Method) -> str:
    """Why a method cannot be trained on such rows; empty where it can."""
    kind = case.data.kind
    if kind not in method.kinds:
        return f"the rows are {kind}, and it needs {' or '.join(method.kinds)}"
    if method.needs == "check" and case.check is None:
        return "nothing here can score a new answer: no column that a program can check, and no --reward"
    return ""


def changes(case: Case) -> list[str]:
    """What would change the answer."""
    return [change.words(case) for change in CHANGES if change.when(case)]
