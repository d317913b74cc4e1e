"""What the detectors find in runs whose true reward is known: right, wrong and how late.

    python experiments/detectors/run.py              # everything: runs, verdicts, results.json, the tables of the docs
    python experiments/detectors/run.py --calibrate  # thresholds on the calibration tasks; the unseen task is not read
    python experiments/detectors/run.py --report     # verdicts and tables from runs that are there

Runs are kept in --out and not repeated. What makes a run sick is written down below and was before any detector was
looked at; a detector is never told the true reward, but for the pairs that it labels (`probe_reward`).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import tables
import tasks

import runs
from prefopt import detectors
from prefopt.detectors import Finding, Run, Watch
from prefopt.detectors.drift import Drift
from prefopt.detectors.orpo_start import OrpoStart
from prefopt.records import write_json
from runs import Spec

HERE = Path(__file__).resolve().parent
DOCS = HERE.parents[1] / "docs" / "watch.md"
# of each failure the tasks that were looked at only when its detector was frozen; thresholds were chosen on the others
UNSEEN = {"hollow": ("coins",), "drift": ("maps", "coins"), "stall": ("brackets", "maps"), "orpo": ("brackets", "maps")}
PAIRS_ALONE = ("routes", "coins")  # tasks in which the failures of DPO alone are made
NAMED = {"hollow": "hollow_margin", "stall": "sparse_reward", "drift": "drift", "orpo": "orpo_start"}
# step sizes at which a healthy run of a task gains steadily
RATES = {
    "worlds": 1e-3,
    "sums": 3e-4,
    "instructions": 1e-3,
    "brackets": 1e-3,
    "routes": 1e-3,
    "maps": 1e-3,
    "coins": 1e-3,
}
# and at which a base model is taught in one epoch of 20,000 rows
MANY_RATES = {"worlds": 1e-3, "sums": 1e-3, "instructions": 2e-3, "brackets": 2e-3, "maps": 6e-3}
MANY = {"maps": 40_000}  # those rows, where they are not 20,000
# GRPO's, where it is not 1e-3; and a chance of success that makes it slow at first, where that is not 0.01
STALL_RATES, SLOW = {"maps": 4e-3}, {"maps": 0.03}
# pairs so few that training on them for long does harm
FEW_ROWS = [60, 100, 150]
FEW = {"brackets": [32, 40, 48], "routes": [24, 32, 40], "maps": [24, 32, 40], "coins": [10, 13, 16]}
# runs of each intent; more on tasks that were once unseen, so that their intervals are narrow
SIZES = {"sick": 12, "healthy": 12, "hard": 6}
MORE = {
    "brackets": {"sick": 24, "healthy": 24, "hard": 12},
    "routes": {"sick": 24, "healthy": 24, "hard": 12},
    "maps": {"sick": 44, "healthy": 42, "hard": 22},
    "coins": {"sick": 44, "healthy": 42, "hard": 22},
}

# ---------------------------------------------------------------- what sick means, written before any detector ran

LOST, GAINED = 0.25, 0.1  # standard deviations of the start's reward: lost since the best, gained since the start
LOST_CHANCE, GAINED_CHANCE, SOLVED = 0.125, 0.05, 0.9  # the same where a checker pays 1 or 0, and what counts as solved


def sick(result: dict[str, Any], twin: dict[str, Any] | None) -> bool:
    """Whether the run did harm or nothing: it ended well below the best it had, or hardly above where it began.

    twin: the same run from a model that answers, where this one began from one that does not: its end counts among the
    best, as what these rows could give. A task that is solved from the start to the end is well.
    """
    golds = [point[1] for point in result["points"]]
    start, end, best = golds[0], golds[-1], max(golds)
    if result["spec"]["chance"]:
        solved = start >= SOLVED and end >= SOLVED
        return not solved and (end < best - LOST_CHANCE or end - start < GAINED_CHANCE)
    if twin is not None:
        best = max(best, twin["points"][-1][1])
    return end < best - LOST or end - start < GAINED


# ---------------------------------------------------------------- the runs


def plan(kinds: Sequence[str], failures: Iterable[str] = NAMED) -> list[Spec]:
    """All runs of these tasks, every number of them drawn from a generator of the run's own name."""
    specs = []
    most = max(max(MORE.get(kind, SIZES).values()) for kind in kinds)
    for number in range(most):  # outermost, so that what is broken off is balanced
        for failure in failures:
            for kind in kinds:
                if kind in PAIRS_ALONE and failure not in ("hollow", "drift"):
                    continue
                for intent, size in MORE.get(kind, SIZES).items():
                    if number < size:
                        specs += MAKERS[failure](kind, intent, number)
    return list({spec.name: spec for spec in specs}.values())


def hollow(kind: str, intent: str, seed: int) -> list[Spec]:
    """DPO on pairs told apart by a mark; on pairs judged by reward; on the best against the worst, as easy as marks."""
    pick = random.Random(f"hollow/{intent}/{kind}/{seed}")
    kinds = {"sick": "surface", "healthy": "pairs", "hard": "far"}
    beta = {"beta": pick.choice([0.05, 0.1, 0.2])}
    size = pick.choice([2000, 4000])
    return [Spec("hollow", intent, kind, seed, "dpo", beta, kinds[intent], size, rate=RATES[kind])]


def drift(kind: str, intent: str, seed: int) -> list[Spec]:
    """DPO on few pairs for many epochs; on many; with a small beta on very many, or a large one on few."""
    pick = random.Random(f"drift/{intent}/{kind}/{seed}")
    if intent == "sick":
        options, size, steps = {"beta": pick.choice([0.01, 0.03, 0.1])}, pick.choice(FEW.get(kind, FEW_ROWS)), 120
        return [Spec("drift", intent, kind, seed, "dpo", options, "pairs", size, steps, rate=2 * RATES[kind])]
    if intent == "healthy":
        options, size = {"beta": pick.choice([0.1, 0.3, 0.5])}, pick.choice([3000, 6000])
        return [Spec("drift", intent, kind, seed, "dpo", options, "pairs", size, rate=RATES[kind])]
    options, size = pick.choice([({"beta": 0.01}, 30_000), ({"beta": 1.0}, 300)])
    return [Spec("drift", intent, kind, seed, "dpo", options, "pairs", size, rate=RATES[kind])]


def stall(kind: str, intent: str, seed: int) -> list[Spec]:
    """GRPO with a checker that the start hardly ever satisfies; often enough; nearly always, or seldom at first."""
    pick = random.Random(f"stall/{intent}/{kind}/{seed}")
    chances = {"sick": [1e-5, 1e-4, 3e-4], "healthy": [0.05, 0.1, 0.3], "hard": [SLOW.get(kind, 0.01), 0.95]}
    rate, chance = STALL_RATES.get(kind, 1e-3), pick.choice(chances[intent])
    return [Spec("stall", intent, kind, seed, "grpo", {"beta": 0.0}, "", 0, 60, rate=rate, chance=chance)]


def orpo(kind: str, intent: str, seed: int) -> list[Spec]:
    """ORPO on few rows from a model that cannot answer yet; from one that can; from the first on many rows."""
    pick = random.Random(f"orpo/{kind}/{seed}")
    many = intent == "hard"
    rows, few = MANY.get(kind, 20_000), pick.choice(FEW_ROWS)
    size, steps, batch, rate = (rows, rows // 125, 128, MANY_RATES[kind]) if many else (few, 80, 32, 1e-3)
    start = tasks.ANSWERS if intent == "healthy" else tasks.BASE
    return [Spec("orpo", intent, kind, seed, "orpo", {"odds_weight": 0.5}, "answers", size, steps, batch, rate, start)]


MAKERS: dict[str, Callable[[str, str, int], list[Spec]]] = {
    "hollow": hollow,
    "stall": stall,
    "drift": drift,
    "orpo": orpo,
}


def twin_of(spec: Spec) -> Spec | None:
    """The same run from a model that answers."""
    return replace(spec, intent="healthy", start=tasks.ANSWERS) if spec.start == tasks.BASE else None


# ---------------------------------------------------------------- remedies


def remedies(spec: Spec, finding: Finding) -> dict[str, Spec]:
    """What the finding of a sick run says to do, as runs: by its changes where it has any, else in its words."""
    if spec.failure == "hollow":
        return {"online_dpo": replace(spec, intent="remedy", objective="online_dpo", rows="", size=0)}
    if spec.failure == "drift":
        few, rate = max(round(spec.size / spec.batch), 1), RATES[spec.kind]
        more = replace(spec, intent="remedy", options={"beta": 0.1}, steps=80, rate=rate)
        return {
            "three times beta, one epoch": replace(spec, intent="remedy", options=tripled(spec), steps=few),
            "beta 1, stopped": replace(spec, intent="remedy", options={"beta": 1.0}),
            "3,000 pairs of the same judge": replace(more, size=3000),
            "online_dpo, same judge": replace(more, objective="online_dpo", rows="", size=0, noisy=True),
        }
    if spec.failure == "orpo":
        return {
            "sft first, on its own rows": replace(spec, intent="remedy", first=spec.steps),
            "sft first, on 3,000 answers": replace(spec, intent="remedy", first=200, taught=3000),
        }
    return {
        "start that solves some": replace(spec, intent="remedy", first=40, size=200),
        "partial credit": replace(spec, intent="remedy", partial=True),
    }


def tripled(spec: Spec) -> dict[str, Any]:
    beta = spec.options["beta"]
    return {"beta": 0.1 if beta < 0.03 else min(3 * beta, 1.0)}


def ended(spec: Spec) -> Callable[[list[Any]], bool]:
    """on_sick=stop: whether the watch finds the run sick by now."""
    return lambda lines: listened({"run": spec.facts(), "lines": lines}).sick() is not None


# ---------------------------------------------------------------- verdicts


def every_level() -> list[Any]:
    """All detectors, and those that come as notes since this experiment at the levels that it measured them at."""
    measured = {"drift": Drift(unverified="sick"), "orpo_start": OrpoStart(unverified="sick")}
    return [measured.get(one.name, one) for one in detectors.every()]


def listened(result: dict[str, Any], every: Sequence[Any] | None = None) -> Watch:
    watch = Watch(Run(**result["run"]), every_level() if every is None else every)
    for step, metrics in result["lines"]:
        watch.listen(step, metrics)
    return watch


def said(result: dict[str, Any], every: Sequence[Any] | None = None) -> dict[str, dict[str, Any]]:
    """Of every detector that found something: the worst level and the last, and the first step of a warning and of
    sickness.
    """
    told: list[Finding] = []
    watch = Watch(Run(**result["run"]), every_level() if every is None else every, told.append)
    for step, metrics in result["lines"]:
        watch.listen(step, metrics)
    told += watch.findings  # as they stand at the end
    found: dict[str, dict[str, Any]] = {}
    for finding in told:
        own = found.setdefault(finding.name, {"level": finding.level, "warn": None, "sick": None, "end": None})
        own["end"] = finding.level
        own["level"] = max(own["level"], finding.level, key=detectors.finding.rank)
        if finding.lasts and finding.level != "info" and own["warn"] is None:
            own["warn"] = finding.step
        if finding.lasts and finding.level == "sick" and own["sick"] is None:
            own["sick"] = finding.step
    return found


def verdict(result: dict[str, Any], twin: dict[str, Any] | None) -> dict[str, Any]:
    """Label, gold and findings of a run, without its metrics."""
    spec, points = result["spec"], result["points"]
    golds = [point[1] for point in points]
    return {
        "failure": spec["failure"],
        "intent": spec["intent"],
        "kind": spec["kind"],
        "name": Spec(**spec).name,
        "sick": sick(result, twin),
        "start": golds[0],
        "end": golds[-1],
        "best": max(golds),
        "twin": twin["points"][-1][1] if twin else None,
        "peak": points[golds.index(max(golds))][0],
        "steps": spec["steps"],
        "every": max(spec["steps"] // runs.EVALUATIONS, 1),
        "found": said(result),
        "unjudged": said(unjudged(result)),
    }


def unjudged(result: dict[str, Any]) -> dict[str, Any]:
    """The same run as it is logged without probe_reward."""
    judged = {
        f"eval/probe_{name}" for name in ("accuracy", "pairs", "wins", "compared", "reward", "gain", "gain_error")
    }
    lines = [[step, {n: v for n, v in values.items() if n not in judged}] for step, values in result["lines"]]
    options = {name: value for name, value in result["run"]["options"].items() if name != "probe_reward"}
    return {**result, "lines": lines, "run": {**result["run"], "options": options}}


# ---------------------------------------------------------------- many runs


def path(spec: Spec, out: Path) -> Path:
    return out / f"{spec.name}.json"


def kept(spec: Spec, out: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path(spec, out).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if Spec(**found["spec"]) == spec else None


def perform(spec: Spec, out: Path) -> dict[str, Any]:
    """A run, or what another process has kept of it by now."""
    if (known := kept(spec, out)) is not None:
        return known
    stop = ended(spec) if spec.intent == "remedy" and spec.failure == "drift" and spec.steps > 80 else None
    result = runs.perform(spec, out, stop)
    out.mkdir(parents=True, exist_ok=True)
    scratch = path(spec, out).with_suffix(".tmp")
    scratch.write_text(json.dumps(result) + "\n", encoding="utf-8")
    scratch.rename(path(spec, out))
    return result


def run_all(specs: Sequence[Spec], out: Path, jobs: int) -> None:
    """Run what is not there yet; a line for each."""
    waiting = [spec for spec in specs if kept(spec, out) is None]
    began, context = time.perf_counter(), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        running = {pool.submit(perform, spec, out): spec for spec in waiting}
        for number, future in enumerate(as_completed(running), 1):
            spec = running[future]
            try:
                done = future.result()
                golds = [round(point[1], 2) for point in done["points"]]
                said_ = f"gold {golds} {done['seconds']} s"
            except Exception as error:  # one run's failure must not cost the others
                said_ = f"{type(error).__name__}: {error}"
            left = (time.perf_counter() - began) / number * (len(waiting) - number)
            print(f"[{number}/{len(waiting)}, {left / 60:.0f} min left] {spec.name}: {said_}", flush=True)


def collected(specs: Sequence[Spec], out: Path) -> list[dict[str, Any]]:
    """Verdicts of the runs that are there, and whose twin is."""
    found = []
    for spec in specs:
        own, other = kept(spec, out), twin_of(spec)
        twin = kept(other, out) if other else None
        if own is not None and (other is None or twin is not None):
            found.append(verdict(own, twin))
    return found


def with_twins(specs: Sequence[Spec]) -> list[Spec]:
    every = [each for spec in specs for each in (spec, twin_of(spec)) if each is not None]
    return list({spec.name: spec for spec in every}.values())


# ---------------------------------------------------------------- remedies, measured


def mended(specs: Sequence[Spec], out: Path, jobs: int, most: int) -> list[dict[str, Any]]:
    """Sick runs that their failure's own detector found, with what its remedy brings; the first `most` of each task.

    jobs: 0 for the remedies that are there.
    """
    todo: list[tuple[Spec, str, Spec]] = []
    for spec in specs:
        own, other = kept(spec, out), twin_of(spec)
        twin = kept(other, out) if other else None
        if spec.intent != "sick" or own is None or (other and twin is None) or not sick(own, twin):
            continue
        finding = listened(own).find(NAMED[spec.failure])
        taken = {each.name for each, _, _ in todo if (each.failure, each.kind) == (spec.failure, spec.kind)}
        if finding is not None and len(taken) < most:
            todo += [(spec, name, each) for name, each in remedies(spec, finding).items()]
    if jobs:
        run_all([each for _, _, each in todo], out, jobs)
    found = [_mended(spec, name, ending(each, out), specs, out) for spec, name, each in todo if kept(each, out)]
    for spec in {spec.name: spec for spec, _, _ in todo if spec.failure == "drift"}.values():
        found += [_mended(spec, name, point, specs, out) for name, point in best_points(spec, out).items()]
    return found


def ending(spec: Spec, out: Path) -> float:
    """True reward that a run ended with."""
    result = kept(spec, out)
    assert result is not None
    return float(result["points"][-1][1])


def best_points(spec: Spec, out: Path) -> dict[str, float]:
    """True reward of the weights of a sick run that another rule would have kept: the best there were, which nobody
    knows, and those with the most wins (keep=best, eval_metric=eval/probe_wins).
    """
    result = kept(spec, out)
    assert result is not None
    golds = [point[1] for point in result["points"]]
    wins = [values["eval/probe_wins"] for _, values in result["lines"] if "eval/probe_wins" in values]
    return {"best weights of the run (unknown)": max(golds), "weights with most wins": golds[wins.index(max(wins))]}


def _mended(spec: Spec, name: str, end: float, specs: Sequence[Spec], out: Path) -> dict[str, Any]:
    """Gain of the remedy over where the sick run began, beside that of the healthy runs of its failure and task."""
    before, other = kept(spec, out), twin_of(spec)
    assert before is not None
    start = before["points"][0][1]
    twin = kept(other, out) if other else None
    if twin is not None:  # from another start than the healthy runs: what it closes of the gap to its twin
        gain, wanted = end - before["points"][-1][1], twin["points"][-1][1] - before["points"][-1][1]
    else:
        healthy = [kept(s, out) for s in specs if (s.failure, s.kind, s.intent) == (spec.failure, spec.kind, "healthy")]
        gains = [r["points"][-1][1] - r["points"][0][1] for r in healthy if r is not None]
        gain, wanted = end - start, statistics.fmean(gains)
    return {"failure": spec.failure, "kind": spec.kind, "remedy": name, "gain": gain, "healthy": wanted,
            "recovered": gain >= wanted / 2}  # fmt: skip


# ---------------------------------------------------------------- thresholds

GRIDS: dict[str, dict[str, list[Any]]] = {
    "hollow_margin": {
        "preference": [0.6, 0.65, 0.7],
        "shared": [0.7, 0.75, 0.8, 0.85, 0.9, 0.95],
        "gap": [0.1, 0.2, 0.3, 9.0],
    },
    "sparse_reward": {"failed": [0.8, 0.9, 0.95], "window": [10, 15, 20, 25, 30]},
    "drift": {"gained": [0.05, 0.1], "lost": [0.15, 0.2, 0.25], "sure": [0.25, 0.5, 0.6, 0.75, 1.0]},
    "orpo_start": {"wins": [0.45, 0.5, 0.55]},
}
# hollow margins where the accuracy on held-out rows is not logged
BLIND: dict[str, list[Any]] = {"memory": [0.5, 1.0, 2.0, 4.0, 8.0, 12.0, 16.0, 1000.0]}
MISTAKEN = {"hollow": "drift"}  # whose sick runs are easily taken for the first
Judged = list[tuple[dict[str, Any], bool]]


def calibrate(out: Path, failures: Iterable[str]) -> dict[str, Any]:
    """Hits and false alarms for every threshold, on the calibration tasks alone."""
    table: dict[str, Any] = {}
    for failure in failures:
        name = NAMED[failure]
        there = judged(out, failure)
        others = judged(out, MISTAKEN[failure]) if failure in MISTAKEN else []
        table[name] = swept(name, GRIDS[name], there, others)
        if failure == "hollow":
            there, others = ([(_blind(own), bad) for own, bad in some] for some in (there, others))
            table["hollow_margin, held-out rows unknown"] = swept(name, BLIND, there, others)
    return table


def judged(out: Path, failure: str) -> Judged:
    """Runs of the calibration tasks, and whether they are sick."""
    specs = with_twins(plan([kind for kind in tasks.KINDS if kind not in UNSEEN[failure]], [failure]))
    known = [(kept(s, out), twin) for s in specs if (twin := kept(t, out) if (t := twin_of(s)) else None) or not t]
    return [(own, sick(own, twin)) for own, twin in known if own is not None]


def _blind(result: dict[str, Any]) -> dict[str, Any]:
    hidden = "eval/rewards/accuracies"
    lines = [[step, {n: v for n, v in values.items() if n != hidden}] for step, values in result["lines"]]
    return {**result, "lines": lines}


def swept(name: str, grid: dict[str, list[Any]], there: Judged, others: Judged) -> list[dict[str, Any]]:
    """A detector's counts for each combination of thresholds. mistaken: of the sick runs of `others`."""
    plain, rows = next(one for one in every_level() if one.name == name), []
    for settings in combinations(grid):
        detector = replace(plain, **settings)
        levels = [(said(own, [detector]).get(name, {}), bad) for own, bad in there]
        row: dict[str, Any] = {"settings": settings}
        for level in ("warn", "sick"):
            row[level] = {
                "hits": sum(found.get(level) is not None for found, bad in levels if bad),
                "sick": sum(bad for _, bad in levels),
                "alarms": sum(found.get(level) is not None for found, bad in levels if not bad),
                "well": sum(not bad for _, bad in levels),
            }
        if others:
            bad = [said(own, [detector]).get(name, {}) for own, bad in others if bad]
            row["mistaken"] = {"hits": sum(found.get("sick") is not None for found in bad), "sick": len(bad)}
        rows.append(row)
        print(name, row, flush=True)
    return rows


def combinations(grid: dict[str, list[Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{}]
    for key, values in grid.items():
        found = [{**each, key: value} for each in found for value in values]
    return found


# ---------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/detectors"), help="folder of finished runs")
    parser.add_argument("--results", type=Path, default=HERE / "results.json")
    parser.add_argument("--docs", type=Path, default=DOCS, help="page whose tables are written anew")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--remedies", type=int, default=6, help="sick runs of a failure and task to try the remedy on")
    parser.add_argument("--failures", nargs="+", choices=NAMED, default=list(NAMED))
    parser.add_argument("--kinds", nargs="+", choices=tasks.KINDS, default=list(tasks.KINDS))
    parser.add_argument("--calibrate", action="store_true", help="thresholds, from the calibration tasks")
    parser.add_argument("--train", action="store_true", help="the runs alone")
    parser.add_argument(
        "--report", action="store_true", help="remedies, verdicts and tables of the runs that are there"
    )
    given = parser.parse_args()
    if given.calibrate:
        file = HERE / "calibration.json"
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        write_json(file, {**before, **calibrate(given.out, given.failures)})
        return
    specs = with_twins(plan(given.kinds, given.failures))
    if not given.report:
        run_all(specs, given.out, given.jobs)
    if given.train:
        return
    healed = mended(specs, given.out, 0 if given.report else given.jobs, given.remedies)
    made = tables.report(collected(specs, given.out), healed, UNSEEN, NAMED)
    write_json(given.results, made)
    tables.write(given.docs, made)
    print(tables.text(made), file=sys.stdout)


if __name__ == "__main__":
    main()
