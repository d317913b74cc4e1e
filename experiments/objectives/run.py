"""Every objective in the same small worlds, 8 seeds each, measured exactly.

    python experiments/objectives/run.py --tune            # once: choose each offline method's strength on other seeds
    python experiments/objectives/run.py                   # offline.json and offline.md
    python experiments/objectives/run.py --group online    # online.json and online.md

A world (docs/bench.md) has a reference policy, a true reward and every completion's probability, so what a method
gains, how far it goes for it, and how much that distance could have bought are exact. Runs are kept in --out and not
repeated; an objective that is not there is left out and named.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: two processes are worth more than two threads

from prefopt import bench
from prefopt.evaluate.statistics import Estimate, mean
from prefopt.objectives import EVERY
from prefopt.records import Example, write_json

HERE = Path(__file__).resolve().parent
SEEDS = tuple(range(8))
TUNING_SEEDS = (100, 101, 102)
DISTANCES = (0.5, 1.0, 2.0)  # nats at which methods are compared
PRICE = 0.4  # standard deviations of reward for a nat: strengths are chosen by the regret at this price
STEPS, TUNING_STEPS, EVERY_STEPS = 400, 200, 20

# ---------------------------------------------------------------- settings, written down before any result

# rows of each shape of data, and prompts per update: 128 judged completions in every update but those of `steps`
ROWS = {"pairs": 30_000, "ratings": 15_000, "labels": 60_000, "demonstrations": 30_000, "steps": 30_000}
BATCH = {"pairs": 64, "ratings": 32, "labels": 128, "demonstrations": 128, "steps": 128}
# peak step size by family
RATES = {"reference": 1e-3, "free": 3e-4, "supervised": 1e-3, "reward": 1e-3, "online": 1e-3}
COMPLETIONS = 8  # online: of each of the 16 prompts, so 128 in a rollout

BETAS = (0.15, 0.5, 1.5)


@dataclass(frozen=True)
class Method:
    """objective: name in `EVERY`; options: of it; strength: the one option that is chosen, from `grid`.

    A reward model's strength is the price of a nat at which its best policy is read. sync: updates after which the
    reference moves (TR-DPO). minibatches: updates of each rollout. reward: what online methods are told. learnt: that
    of a reward model trained on the pairs of the same world, and a critic starts from it; good: 1 where the true reward
    is above 1, else 0.
    """

    objective: str
    family: str
    options: dict[str, Any] = field(default_factory=dict)
    strength: str = "beta"
    grid: tuple[float | None, ...] = BETAS
    sync: int | None = None
    minibatches: int = 1
    reward: Literal["true", "learnt", "good"] = "true"


def online(objective: str, minibatches: int = 1, reward: Any = "true", **options: Any) -> Method:
    """At the price that the table is about: where the log-ratio is taken off the reward, beta is the price of a nat.

    A share of successes is worth less, so that it has a quarter of the price.
    """
    price = PRICE / 4 if reward == "good" else PRICE
    return Method(objective, "online", options, grid=(price,), minibatches=minibatches, reward=reward)


def dpo(grid: tuple[float | None, ...] = BETAS, sync: int | None = None, **options: Any) -> Method:
    return Method("dpo", "reference", options, grid=grid, sync=sync)


OFFLINE: dict[str, Method] = {
    "sft": Method("sft", "supervised", strength="", grid=(None,)),
    "sft dft": Method("sft", "supervised", {"weighting": "probability"}, strength="", grid=(None,)),
    "dpo": dpo(),
    "dpo smoothing 0.1 (cDPO)": dpo(label_smoothing=0.1),
    "dpo robust 0.1 (rDPO)": dpo(loss_type="robust", label_smoothing=0.1),
    "dpo hinge (SLiC)": dpo(loss_type="hinge"),
    "dpo exo": dpo(loss_type="exo"),
    "dpo nca": dpo(loss_type="nca"),
    "dpo apo_zero": dpo(loss_type="apo_zero"),
    "dpo apo_down": dpo(grid=(0.3, 1.0, 3.0), loss_type="apo_down"),
    "dpo sppo": dpo(loss_type="sppo"),
    "dpo discopop": dpo(loss_type="discopop"),
    "dpo bco": dpo(loss_type="bco"),
    "dpo sigmoid + bco (MPO)": dpo(loss_type={"sigmoid": 0.8, "bco": 0.2}),
    "dpo forward_kl": dpo(f_divergence="forward_kl"),
    "dpo js": dpo(f_divergence="js"),
    "dpo drop_penalty 5 (DPOP)": dpo(grid=(0.01, 0.03, 0.1), drop_penalty=5.0),
    "dpo wpo": dpo(weighting="wpo"),
    "dpo + sft 0.2 (RPO)": dpo(sft_weight=0.2),
    "dpo moving reference (TR-DPO)": dpo(grid=(0.3, 1.0, 3.0), sync=100),
    "ipo": Method("ipo", "reference", grid=(0.05, 0.15, 0.5)),
    "aot unpaired": Method("aot", "reference", {"pairing": "unpaired"}),
    "aot paired": Method("aot", "reference", {"pairing": "paired"}),
    "simpo": Method("simpo", "free", grid=(0.5, 2.0, 8.0)),
    "cpo": Method("cpo", "free"),
    "orpo": Method("orpo", "free", strength="odds_weight", grid=(0.1, 0.5, 2.0)),
    "kto": Method("kto", "reference"),
    "bco": Method("bco", "reference"),
    "reward": Method("reward", "reward", strength="", grid=(0.2, 0.4, 0.8)),
    "reward listwise": Method("reward", "reward", {"comparison": "listwise"}, strength="", grid=(0.2, 0.4, 0.8)),
    "prm": Method("prm", "reward", strength="", grid=(0.2, 0.4, 0.8)),
}

ONLINE: dict[str, Method] = {
    "rloo": online("rloo"),
    "grpo": online("grpo"),
    "grpo k3 in the loss (as in the paper)": online("grpo", kl="k3"),
    "grpo, 4 updates of a rollout": online("grpo", minibatches=4),
    "dr_grpo": online("dr_grpo"),
    "dapo": online("dapo"),
    "gspo": online("gspo"),
    "gspo, 4 updates of a rollout": online("gspo", minibatches=4),
    "cispo": online("cispo"),
    "cispo, 4 updates of a rollout": online("cispo", minibatches=4),
    "bnpo, 0/1 reward": online("bnpo", reward="good"),
    "reinforce_pp": online("reinforce_pp"),
    "lite_ppo": online("lite_ppo"),
    "sapo": online("sapo"),
    "maxrl, 0/1 reward": online("maxrl", reward="good"),
    "grpo, 0/1 reward": online("grpo", reward="good"),
    "rloo, 0/1 reward": online("rloo", reward="good"),
    "online_dpo": online("online_dpo"),
    "ppo": online("ppo"),
    "ppo on a learnt reward, critic from it": online("ppo", reward="learnt"),
}

METHODS: dict[str, Method] = OFFLINE | ONLINE
GROUPS = {"offline": OFFLINE, "online": ONLINE}


def objective_of(method: Method, strength: float | None) -> Any:
    """The objective of a method at a strength. LookupError, in words, if it or an option of it does not exist."""
    if method.objective not in EVERY:
        raise LookupError(f"there is no objective {method.objective}")
    named = {method.strength: strength} if method.strength else {}
    try:
        return EVERY[method.objective](**method.options, **named)
    except (TypeError, ValueError) as error:
        raise LookupError(str(error)) from error


# ---------------------------------------------------------------- one run


@dataclass(frozen=True)
class Task:
    """One training run."""

    name: str
    strength: float | None
    seed: int
    steps: int = STEPS

    def path(self, out: Path) -> Path:
        words = "".join(c if c.isalnum() else "-" for c in f"{self.name} {self.strength} {self.seed}")
        return out / f"{words}.json"

    def settings(self) -> dict[str, Any]:
        """What the result depends on; a kept result with others is not used."""
        method = METHODS[self.name]
        shared = {"rate": RATES[method.family], "rows": ROWS, "batch": BATCH, "price": PRICE}
        shared |= {"completions": COMPLETIONS} if method.family == "online" else {}
        return {**asdict(self), **asdict(method), **shared, "every": EVERY_STEPS}


@functools.lru_cache(maxsize=6)
def rows(shape: str, seed: int) -> list[Example]:
    """The training rows of a world, the same for every method; none where the policy writes its own."""
    if shape == "prompts":
        return []
    make: dict[str, Callable[..., list[Example]]] = {
        "pairs": bench.pairs,
        "ratings": bench.ratings,
        "labels": bench.labels,
        "demonstrations": bench.demonstrations,
        "steps": bench.steps,
    }
    return make[shape](bench.world(seed), ROWS[shape], seed=seed)


def perform(task: Task) -> dict[str, Any]:
    """Train, measure; numbers for JSON."""
    method, world = METHODS[task.name], bench.world(task.seed)
    objective = objective_of(method, task.strength)
    shape = objective.facts.data
    training = bench.Training(
        steps=task.steps,
        batch_size=BATCH.get(shape, 1),
        learning_rate=RATES[method.family],
        seed=task.seed,
        every=EVERY_STEPS,
        reference_sync_steps=method.sync,
        completions=COMPLETIONS,
        minibatches=method.minibatches,
    )
    began = time.process_time()
    if objective.facts.head == "language":
        found = bench.run(world, objective, rows(shape, task.seed), training, *judged(task, world))
        logp = bench.exact_logp(found.model, world.space)
        learnt = logp - world.reference
        points = [(step, point.kl, point.gold) for step, point in found.points]
    else:
        learnt, points = bench.learn_reward(world, objective, rows(shape, task.seed), training), []
        logp = bench.tilted(world.reference, learnt, float(task.strength or PRICE))
    end = bench.measure(world, logp)
    return {
        "settings": task.settings(),
        **asdict(end),
        "regret": bench.regret(world, logp, PRICE),
        "points": points,
        "along": {str(d): along(world, points, d) if points else scaled(world, learnt, d) for d in DISTANCES},
        "scaled": {str(d): scaled(world, learnt, d) for d in DISTANCES},
        "seconds": round(time.process_time() - began, 1),
    }


def judged(task: Task, world: bench.World) -> tuple[Any, Any]:
    """The reward that is learnt from, and the model that gives it, where a method is not told the true one."""
    if METHODS[task.name].reward == "true":
        return None, None
    if METHODS[task.name].reward == "good":
        return (world.gold > 1).double(), None
    scorer = bench.learn_scorer(world, EVERY["reward"](), rows("pairs", task.seed), bench.Training(seed=task.seed))
    return bench.reward_of(scorer, world), scorer


def along(world: bench.World, points: Sequence[tuple[int, float, float]], distance: float) -> float | None:
    """Efficiency at a distance that the run passes, at its best passing; None if it never does.

    Between two points gold is taken to be linear in the root of the distance, as it is near the reference.
    """
    wanted = math.sqrt(distance)
    golds = []
    for (_, before, low), (_, after, high) in pairwise(points):
        near, far = math.sqrt(max(before, 0.0)), math.sqrt(max(after, 0.0))
        if near != far and min(near, far) <= wanted <= max(near, far):
            golds.append(low + (high - low) * (wanted - near) / (far - near))
    return max(golds) / bench.best_at(world, distance) if golds else None


def scaled(world: bench.World, learnt: Any, distance: float) -> float | None:
    """Efficiency of the policy reference x exp(learnt / b) whose b puts it at a distance exactly.

    learnt is a reward model's score, or a policy's log-ratio to the reference: the direction a run has found, taken as
    far as `distance`. None where no b goes that far.
    """
    policy = bench.tilted(world.reference, learnt, bench.price(world.reference, learnt, distance))
    found = bench.measure(world, policy)
    return found.efficiency if abs(found.kl - distance) < 1e-6 else None


# ---------------------------------------------------------------- many runs


def usable(names: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """The methods that can run, and why the others cannot."""
    able, missing = [], {}
    for name in names:
        try:
            for strength in METHODS[name].grid:
                objective_of(METHODS[name], strength)
            able.append(name)
        except LookupError as error:
            missing[name] = str(error)
    return able, missing


def kept(task: Task, out: Path) -> dict[str, Any] | None:
    """The result of an earlier run with the same settings."""
    try:
        found: dict[str, Any] = json.loads(task.path(out).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = json.loads(json.dumps(task.settings()))
    return found if found.get("settings") == same else None


def run_all(tasks: Sequence[Task], out: Path, jobs: int) -> tuple[dict[Task, dict[str, Any]], dict[Task, str]]:
    """Results by task, and the errors of those that failed; writes each as it comes, and a line of progress."""
    found = {task: result for task in tasks if (result := kept(task, out)) is not None}
    waiting = sorted((task for task in tasks if task not in found), key=lambda task: task.seed)  # worlds are reused
    failed: dict[Task, str] = {}
    began = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        running = {pool.submit(perform, task): task for task in waiting}
        for number, future in enumerate(as_completed(running), 1):
            task = running[future]
            try:
                found[task] = future.result()
                write_json(task.path(out), found[task])
                said = line(found[task])
            except Exception as error:  # one method's failure must not cost the others their results
                failed[task] = said = f"{type(error).__name__}: {error}"
            left = (time.perf_counter() - began) / number * (len(waiting) - number)
            print(f"[{number}/{len(waiting)}, {left / 60:.0f} min left] {task.name} {task.strength} "
                  f"seed {task.seed}: {said}", flush=True)  # fmt: skip
    return found, failed


def line(result: dict[str, Any]) -> str:
    efficiency = result["efficiency"]
    shown = "-" if efficiency is None else f"{efficiency:.3f}"
    return f"gold {result['gold']:.3f} KL {result['kl']:.3f} FE {shown} ({result['seconds']:.0f} s)"


def tune(names: Sequence[str], out: Path, jobs: int, steps: int) -> dict[str, float | None]:
    """The strength of each method with the lowest mean regret over the tuning seeds, at PRICE."""
    tasks = [Task(n, s, seed, steps) for n in names for s in METHODS[n].grid for seed in TUNING_SEEDS]
    found, _ = run_all([task for task in tasks if len(METHODS[task.name].grid) > 1], out, jobs)
    chosen = {}
    for name in names:
        regrets = {
            strength: [r["regret"] for task, r in found.items() if (task.name, task.strength) == (name, strength)]
            for strength in METHODS[name].grid
        }
        complete = {s: sum(own) / len(own) for s, own in regrets.items() if len(own) == len(TUNING_SEEDS)}
        if complete or len(regrets) == 1:
            chosen[name] = min(complete, key=lambda s: complete[s]) if complete else METHODS[name].grid[0]
            print(f"{name}: {chosen[name]}   regret { ({s: round(x, 3) for s, x in complete.items()}) }")
    return chosen


# ---------------------------------------------------------------- what was found


def summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds with 95 % bootstrap intervals; the reference's gold is 0, so gold is the gain."""

    def estimate(values: Iterable[float | None]) -> dict[str, Any]:
        there = [value for value in values if value is not None]
        return (mean(there) if there else Estimate(None, None, None, 0, "no run came that far")).summary()

    return {
        "gain": estimate(r["gold"] for r in results),
        **{
            name: estimate(r[name] for r in results) for name in ("kl", "efficiency", "regret", "forward_kl", "entropy")
        },
        "along": {str(d): estimate(r["along"][str(d)] for r in results) for d in DISTANCES},
        "scaled": {str(d): estimate(r["scaled"][str(d)] for r in results) for d in DISTANCES},
        "seeds": [r["settings"]["seed"] for r in results],
    }


def number(found: dict[str, Any], interval: bool = False, of: int = 0) -> str:
    """An estimate in a cell; with how many runs it is of where that is not all."""
    if found["value"] is None:
        return "-"
    bounds = f" [{found['low']:.2f}, {found['high']:.2f}]" if interval and found["low"] is not None else ""
    return f"{found['value']:.2f}{bounds}" + (f" ({found['n']})" if of and found["n"] < of else "")


def table(methods: dict[str, Any], strengths: dict[str, float | None]) -> str:
    """Markdown for a reader."""
    heads = ["method", "strength", "gain [95 %]", "KL", "FE"]
    heads += [f"FE at {d:g}, {how}" for how in ("along the run", "scaled") for d in DISTANCES]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, found in sorted(methods.items(), key=lambda item: -(item[1]["scaled"]["1.0"]["value"] or -math.inf)):
        runs = len(found["seeds"])
        option, strength = METHODS[name].strength or "price", strengths.get(name)
        cells = [name, "" if strength is None else f"{option} {strength:g}"]
        cells += [number(found["gain"], interval=True), number(found["kl"]), number(found["efficiency"])]
        cells += [number(found[how][str(d)], of=runs) for how in ("along", "scaled") for d in DISTANCES]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(
    found: dict[Task, dict[str, Any]], strengths: dict[str, float | None], missing: dict[str, str]
) -> dict[str, Any]:
    names = [name for name in METHODS if any(task.name == name for task in found)]
    methods = {
        name: {"strength": strengths[name], **summary([r for task, r in sorted(found.items(), key=lambda x: x[0].seed)
                                                       if task.name == name])}
        for name in names
    }  # fmt: skip
    return {
        "methods": methods,
        "missing": missing,
        "price": PRICE,
        "steps": sorted({task.steps for task in found}),
        "rows": ROWS,
        "rates": RATES,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", choices=GROUPS, default="offline", help="which objectives")
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"), help="folder of finished runs")
    parser.add_argument("--results", type=Path, help="JSON file, GROUP.json; the table goes beside it")
    parser.add_argument("--strengths", type=Path, default=HERE / "strengths.json", help="what --tune chose")
    parser.add_argument("--tune", action="store_true", help="choose the strengths, on seeds of their own")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--steps", type=int, default=None, help=f"updates of a run: {STEPS}, to tune {TUNING_STEPS}")
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", help="of the group; all of it")
    given = parser.parse_args()
    names, missing = usable(given.methods or GROUPS[given.group])
    results = given.results or HERE / f"{given.group}.json"
    for name, why in missing.items():
        print(f"left out: {name}: {why}", file=sys.stderr)
    before = json.loads(given.strengths.read_text(encoding="utf-8")) if given.strengths.exists() else {}
    if given.tune:
        write_json(given.strengths, {**before, **tune(names, given.out, given.jobs, given.steps or TUNING_STEPS)})
        return
    strengths = {name: before.get(name, METHODS[name].grid[len(METHODS[name].grid) // 2]) for name in names}
    tasks = [Task(name, strengths[name], seed, given.steps or STEPS) for name in names for seed in given.seeds]
    found, failed = run_all(tasks, given.out, given.jobs)
    missing |= {f"{task.name} seed {task.seed}": why for task, why in failed.items()}
    made = report(found, strengths, missing)
    write_json(results, made)
    results.with_suffix(".md").write_text(table(made["methods"], strengths) + "\n", encoding="utf-8")
    print(table(made["methods"], strengths))
    below = [name for name, own in made["methods"].items() if not (own["gain"]["low"] or own["gain"]["value"]) > 0]
    print("gain above 0 in every method" if not below else f"gain not above 0: {', '.join(below)}")


if __name__ == "__main__":
    main()
