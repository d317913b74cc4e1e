"""The listener: every line of metrics goes through the detectors, and each finding is said once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from prefopt.detectors.finding import LEVELS, Check, Detector, Finding, Level, Line, Run, State, rank

Tell = Callable[[Finding], None]

# a finding -> what it is a consequence of where that is sick in the same run: said once, by the cause
CAUSES: dict[str, tuple[str, ...]] = {"drift": ("hollow_margin",)}


def explained(check: Check, cause: Finding) -> Check:
    """A check as a note that leaves the remedy to the cause."""
    if check.level is None:
        return check
    reason = f"{check.reason}; a consequence of {cause.name}, see there"
    return replace(check, level="info", reason=reason, remedy=cause.remedy, change={}, before={})


class Watch:
    """A fold over a run's metrics: `listen` with every line, then read `findings`.

    A detector's finding begins when `needed` of its last `among` checks agree, at the highest level that so many reach;
    it is told then, again if its level rises, and a last time when it is over: none of these checks agrees any more.
    """

    def __init__(self, run: Run, detectors: Sequence[Detector], tell: Tell = lambda finding: None) -> None:
        self.run, self.detectors, self.tell = run, detectors, tell
        self.findings: list[Finding] = []
        self.states: dict[str, State] = {}
        self.votes: dict[str, list[int]] = {}

    def listen(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take in a line of metrics: of an update, or of an evaluation."""
        line = Line(step, metrics, self.run)
        for detector in self.detectors:
            check = detector.see(self.states.setdefault(detector.name, {}), line)
            if check is not None:
                cause = self._cause(detector.name)
                self._count(detector, explained(check, cause) if cause else check, step, cause is not None)

    def worst(self) -> Level | None:
        """The highest level of what lasts."""
        ranks = [rank(finding.level) for finding in self.findings if finding.lasts]
        return LEVELS[max(ranks) - 1] if ranks else None

    def sick(self) -> Finding | None:
        """The first finding that makes going on a waste, if one lasts."""
        return next((finding for finding in self.findings if finding.lasts and finding.level == "sick"), None)

    def find(self, name: str) -> Finding | None:
        """A detector's latest finding."""
        return next((finding for finding in reversed(self.findings) if finding.name == name), None)

    def summary(self) -> list[dict[str, Any]]:
        """Every finding as plain values, those that last and are worst first."""
        order = sorted(self.findings, key=lambda finding: (not finding.lasts, -rank(finding.level), finding.step))
        return [finding.summary() for finding in order]

    def state_dict(self) -> dict[str, Any]:
        findings = [finding.summary() for finding in self.findings]
        return copy.deepcopy({"states": self.states, "votes": self.votes, "findings": findings})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        state = copy.deepcopy(dict(state))
        self.states, self.votes = state["states"], state["votes"]
        self.findings = [Finding(**finding) for finding in state["findings"]]

    def _cause(self, name: str) -> Finding | None:
        """A sick finding of this run of which this detector's are a consequence, whether or not it is over."""
        causes = [self.find(cause) for cause in CAUSES.get(name, ())]
        return next((one for one in causes if one is not None and one.level == "sick"), None)

    def _count(self, detector: Detector, check: Check, step: int, follows: bool) -> None:
        votes = self.votes.setdefault(detector.name, [])
        votes.append(rank(check.level))
        del votes[: -detector.among]
        agreed = sorted(votes, reverse=True)[detector.needed - 1] if len(votes) >= detector.needed else 0
        known = self.find(detector.name)
        lasting = known if known is not None and known.lasts else None
        if check.level is not None and agreed:
            self._found(detector, check, LEVELS[agreed - 1], lasting, step, follows)
        elif lasting is not None and not any(votes):
            self._put(replace(lasting, recovered=step), lasting, tell=True)

    def _found(
        self, detector: Detector, check: Check, level: Level, before: Finding | None, step: int, follows: bool
    ) -> None:
        """A finding begins, goes on, or rises; its numbers are those of the latest check. follows: what it is a
        consequence of is known by now, so that its level may also fall.
        """
        rises = before is None or rank(level) > rank(before.level)
        since = check.since if check.since is not None else step
        finding = Finding(
            detector.name,
            level if before is None or rises or follows else before.level,
            check.value,
            check.threshold,
            check.reason,
            step if before is None or rises else before.step,
            since if before is None else before.since,
            step,
            check.remedy,
            dict(check.change),
            dict(check.before),
            dict(check.evidence),
        )
        self._put(finding, before, tell=rises)

    def _put(self, finding: Finding, before: Finding | None, tell: bool) -> None:
        if before is None:
            self.findings.append(finding)
        else:
            self.findings[self.findings.index(before)] = finding
        if tell:
            self.tell(finding)
