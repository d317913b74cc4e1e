"""Counts, intervals and tables of what the detectors found."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefopt.detectors import EVERY
from prefopt.evaluate.statistics import wilson

HERE = Path(__file__).resolve().parent
BEGIN, END = (
    "<!-- made by experiments/detectors/run.py: begin -->",
    "<!-- made by experiments/detectors/run.py: end -->",
)
TITLES = {
    "hollow": "hollow margin (DPO)",
    "stall": "sparse-reward stall (GRPO)",
    "drift": "over-optimised on few pairs (DPO)",
    "orpo": "ORPO from a model that cannot answer",
}
Verdicts = Sequence[Mapping[str, Any]]


def report(
    verdicts: Verdicts,
    healed: Sequence[Mapping[str, Any]],
    unseen: Mapping[str, Sequence[str]],
    named: Mapping[str, str],
) -> dict[str, Any]:
    """Everything that the tables say, as numbers; and the verdict on every run. unseen: of every failure its tasks."""
    parts: dict[str, list[Mapping[str, Any]]] = {"calibration": [], "unseen": []}
    for verdict in verdicts:
        parts["unseen" if verdict["kind"] in unseen[verdict["failure"]] else "calibration"].append(verdict)
    other = peers()
    return {
        "unseen_tasks": dict(unseen),
        "num_runs": {part: len(own) for part, own in parts.items()},
        "named": {
            part: {failure: confusion(_of(own, failure), name) for failure, name in named.items()}
            for part, own in parts.items()
        },
        "unjudged": {
            part: {
                failure: confusion([{**v, "found": v["unjudged"]} for v in _of(own, failure)], name)
                for failure, name in named.items()
                if failure != "stall"
            }
            for part, own in parts.items()
        },
        "every": {
            part: {name: fired(own, name, own_failure(name, named)) for name in EVERY} for part, own in parts.items()
        },
        "remedies": remedies(healed),
        "peers": {failure: side_by_side(_of(verdicts, failure), other) for failure in named} if other else {},
        "runs": list(verdicts),
        "healed": list(healed),
    }


def _of(verdicts: Verdicts, failure: str) -> list[Mapping[str, Any]]:
    return [verdict for verdict in verdicts if verdict["failure"] == failure]


def rate(hits: int, n: int) -> dict[str, Any]:
    return {"hits": hits, **wilson(hits, n).summary()}


def confusion(verdicts: Verdicts, name: str) -> dict[str, Any]:
    """Of one detector in the runs of its own failure, for `warn` and above, and for `sick`."""
    bad, well = [v for v in verdicts if v["sick"]], [v for v in verdicts if not v["sick"]]
    hard = [v for v in well if v["intent"] == "hard"]
    found: dict[str, Any] = {"num_sick": len(bad), "num_well": len(well), "num_hard": len(hard)}
    for level in ("warn", "sick"):
        hits, alarms = _at(bad, name, level), _at(well, name, level)
        found[level] = {
            "recall": rate(len(hits), len(bad)),
            "false_alarms": rate(len(alarms), len(well)),
            "hard": rate(len(_at(hard, name, level)), len(hard)),
            "precision": rate(len(hits), len(hits) + len(alarms)),
            "delay": delay(hits, name, level),
        }
    return found


def _at(verdicts: Verdicts, name: str, level: str) -> list[Mapping[str, Any]]:
    return [v for v in verdicts if v["found"].get(name, {}).get(level) is not None]


def delay(hits: Verdicts, name: str, level: str) -> dict[str, Any]:
    """Updates from the best true reward to the finding, negative before it; and the share of the run that was over."""
    if not hits:
        return {"after_peak": None, "low": None, "high": None, "share": None}
    late = sorted(v["found"][name][level] - v["peak"] for v in hits)
    share = statistics.median(v["found"][name][level] / v["steps"] for v in hits)
    return {"after_peak": statistics.median(late), "low": late[0], "high": late[-1], "share": share}


def own_failure(name: str, named: Mapping[str, str]) -> str | None:
    """The failure that a detector is for, among those that were made."""
    return next((failure for failure, detector in named.items() if detector == name), None)


def fired(verdicts: Verdicts, name: str, failure: str | None) -> dict[str, Any]:
    """Of one detector in all runs: how many of those in which its warning stood to the end, or until it was over, were
    sick, whatever of, and how many of them of what it names.
    """
    bad, well = [v for v in verdicts if v["sick"]], [v for v in verdicts if not v["sick"]]
    hits, alarms = _at(bad, name, "warn"), _at(well, name, "warn")
    stood = [v for v in [*hits, *alarms] if v["found"][name]["end"] != "info"]
    of_its_own = rate(sum(v["sick"] and v["failure"] == failure for v in stood), len(stood))
    notes = sum(name in v["found"] for v in verdicts) - len(hits) - len(alarms)
    return {
        "hits": len(hits),
        "alarms": len(alarms),
        "precision": rate(sum(v["sick"] for v in stood), len(stood)),
        "of_its_own": of_its_own if failure else None,
        "false_alarms": rate(len(alarms), len(well)),
        "notes": notes,
    }


def remedies(healed: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    keys = sorted({(one["failure"], one["remedy"], one["kind"]) for one in healed})
    found = []
    for failure, remedy in sorted({key[:2] for key in keys}):
        for kinds in [[kind] for f, r, kind in keys if (f, r) == (failure, remedy)] + [None]:
            own = [one for one in healed if (one["failure"], one["remedy"]) == (failure, remedy)
                   and (kinds is None or one["kind"] in kinds)]  # fmt: skip
            found.append({
                "failure": failure, "remedy": remedy, "kind": kinds[0] if kinds else "all",
                "recovered": rate(sum(one["recovered"] for one in own), len(own)),
                "gain": statistics.median(one["gain"] for one in own),
                "wanted": statistics.median(one["healthy"] for one in own),
            })  # fmt: skip
    return found


# ---------------------------------------------------------------- beside others


def peers() -> dict[str, Any]:
    """What other watchers said of the runs, where that was measured (peers.py)."""
    try:
        found: dict[str, Any] = json.loads((HERE / "peers.json").read_text(encoding="utf-8"))
    except OSError:
        return {}
    return found


def side_by_side(verdicts: Verdicts, other: Mapping[str, Any]) -> dict[str, Any]:
    """Any warning at all, of any detector, in the sick and in the well runs of a failure."""
    there = [v for v in verdicts if v["name"] in other]
    says: dict[str, Callable[[Mapping[str, Any]], bool]] = {
        "prefopt": lambda v: any(own["warn"] is not None for own in v["found"].values()),
        "prefopt, sick": lambda v: any(own["sick"] is not None for own in v["found"].values()),
        "rldoctor": lambda v: bool(other[v["name"]]["rldoctor"]),
        "rlwatch": lambda v: bool(other[v["name"]]["rlwatch"]),
    }
    return {
        who: {
            "recall": rate(sum(map(tells, bad)), len(bad)),
            "false_alarms": rate(sum(map(tells, well)), len(well)),
        }
        for who, tells in says.items()
        for bad, well in [([v for v in there if v["sick"]], [v for v in there if not v["sick"]])]
    }


# ---------------------------------------------------------------- Markdown


def cell(found: Mapping[str, Any]) -> str:
    """hits of n, and the interval of their share."""
    if found["value"] is None:
        return "-"
    return f"{found['hits']} of {found['n']} ({found['low']:.2f} to {found['high']:.2f})"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def named_table(made: Mapping[str, Any]) -> str:
    heads = ["failure", "tasks", "level", "found of sick", "precision", "false alarms", "of these on hard ones",
             "updates after the best reward", "share of the run"]  # fmt: skip
    rows = []
    for failure, title in TITLES.items():
        for part in made["named"]:
            for level in ("warn", "sick"):
                own = made["named"][part].get(failure)
                if own is None or not own["num_sick"] + own["num_well"]:
                    continue
                found = own[level]
                counts = [cell(found[key]) for key in ("recall", "precision", "false_alarms", "hard")]
                rows.append([title, part, level, *counts, *lateness(found["delay"])])
    return table(heads, rows)


def unjudged_table(made: Mapping[str, Any]) -> str:
    rows = [
        [TITLES[failure], part, *(cell(own["warn"][key]) for key in ("recall", "precision", "false_alarms"))]
        for failure in TITLES
        for part in made["unjudged"]
        if (own := made["unjudged"][part].get(failure)) and own["num_sick"] + own["num_well"]
    ]
    return table(["failure", "tasks", "found of sick", "precision", "false alarms"], rows)


def lateness(late: Mapping[str, Any]) -> list[str]:
    if late["share"] is None:
        return ["-", "-"]
    return [f"{late['after_peak']:+.0f} ({late['low']:+.0f} to {late['high']:+.0f})", f"{late['share']:.2f}"]


def every_table(made: Mapping[str, Any]) -> str:
    heads = [
        "detector",
        "warned in sick / in well runs, calibration",
        "the same, unseen task",
        "sick of anything, unseen",
        "sick of what it names, unseen",
        "notes",
    ]
    rows = []
    for name in EVERY:
        before, after = made["every"]["calibration"][name], made["every"]["unseen"][name]
        counts = [f"{own['hits']} / {own['alarms']}" for own in (before, after)]
        shares = [cell(after["precision"]), cell(after["of_its_own"]) if after["of_its_own"] else "-"]
        rows.append([f"`{name}`", *counts, *shares, str(before["notes"] + after["notes"])])
    return table(heads, rows)


def remedy_table(made: Mapping[str, Any]) -> str:
    heads = ["failure", "remedy", "tasks", "recovered", "median gain", "a healthy run's"]
    rows = []
    for own in made["remedies"]:
        gains = [f"{own['gain']:.2f}", f"{own['wanted']:.2f}"]
        rows.append([TITLES[own["failure"]], own["remedy"], own["kind"], cell(own["recovered"]), *gains])
    return table(heads, rows)


def peer_table(made: Mapping[str, Any]) -> str:
    rows = [
        [TITLES[failure], who, cell(found["recall"]), cell(found["false_alarms"])]
        for failure, own in made["peers"].items()
        for who, found in own.items()
    ]
    return table(["failure", "watcher", "warned in sick runs", "warned in well runs"], rows)


def text(made: Mapping[str, Any]) -> str:
    """The part of the page that is made, between its marks."""
    unseen = made["unseen_tasks"]
    kinds = dict.fromkeys(kind for own in unseen.values() for kind in own)
    of = {kind: [TITLES[failure] for failure, own in unseen.items() if kind in own] for kind in kinds}
    named = "; ".join(f"`{kind}` for {' and '.join(own)}" for kind, own in of.items())
    parts = [
        f"{made['num_runs']['calibration']} runs on calibration tasks, {made['num_runs']['unseen']} on unseen ones: "
        f"{named}.",
        "### The four failures, each by its own detector",
        named_table(made),
        "### The same without `probe_reward`",
        unjudged_table(made),
        "### Every detector, over all these runs",
        every_table(made),
        "### What the remedies bring",
        remedy_table(made) if made["remedies"] else "Not measured.",
        "### Beside other watchers",
        peer_table(made) if made["peers"] else "Not measured.",
    ]
    return "\n\n".join(parts)


def write(page: Path, made: Mapping[str, Any]) -> None:
    """Put the tables between the page's marks. Nothing where there is no such page."""
    if not page.exists():
        return
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n\n{text(made)}\n\n{END}{after}", encoding="utf-8")
