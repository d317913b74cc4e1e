"""Does `prefopt advise` name the method that wins? Small worlds, equal budgets, every method on the same rows.

    python experiments/advise/run.py --tune        # strengths.json, on worlds of their own
    python experiments/advise/run.py               # results.json and results.md

A regime is a kind of rows with a size, a share of wrong labels, a source of answers, a reward that is easy or hard to
learn, and perhaps a checker. Every method that can be trained on it gets the same number of updates of 128 completions
(a reward model and what learns from it share them), and is judged by what its policy truly earns, less a price for the
distance it went, exactly. Advice is asked with what a user's files would show: figures of the rows and of the model.
It is right where its first method won, or where the 95 % interval of the winner's lead over it, paired by seed, holds
0. Results of runs are kept in --out and not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from prefopt import bench
from prefopt.advice.case import Case, ModelFacts
from prefopt.advice.data import compared, figures
from prefopt.advice.ranking import rank
from prefopt.advice.stages import loss_options
from prefopt.batch import Batch
from prefopt.bench.measures import expected
from prefopt.data import Dataset
from prefopt.objectives import EVERY
from prefopt.records import Example, write_json

HERE = Path(__file__).resolve().parent
SEEDS, TUNING_SEEDS = tuple(range(10)), (100, 101, 102)
STEPS = 100
PRICE = 0.4  # standard deviations of reward for a nat, as in experiments/objectives
CHECK_PRICE = 0.1  # of a share of solved answers
COMPLETIONS = 8

# ---------------------------------------------------------------- methods, at strengths chosen elsewhere

STRENGTHS = HERE / "strengths.json"  # of --tune: method -> strength and peak step size
RATES = (3e-4, 1e-3, 3e-3)
# method that takes one run on the rows -> the option that says how strongly, and what is tried for it
ONE_RUN: dict[str, tuple[str, tuple[float, ...]]] = {
    "sft": ("", (0.0,)),
    "dpo": ("beta", (0.15, 0.5, 1.5)),
    "ipo": ("beta", (0.05, 0.15, 0.5)),
    "kto": ("beta", (0.5, 1.5, 4.5)),
    "orpo": ("odds_weight", (0.6, 2.0, 6.0)),
    "simpo": ("beta", (0.15, 0.5, 1.5)),
}
# method that learns from rewards -> its objective; its strength is beta, in units of the price of a nat
BY_REWARD = {"reward_rloo": "rloo", "reward_grpo": "grpo", "ppo": "ppo", "rloo": "rloo", "grpo": "grpo"}
BETAS = (0.7, 1.0, 1.4, 2.0)
BATCH = {"pairs": 64, "labels": 128, "demonstrations": 128, "ratings": 32}


@dataclass(frozen=True)
class Regime:
    """kind: of the rows. rows: how they are made, from a world and a seed. reward: of the world. check: a level of the
    true reward above which a program calls an answer right; None where there is no program.
    """

    name: str
    kind: str
    rows: Callable[[Any, int], list[Example]]
    reward: Any = "structured"
    check: float | None = None


def pairs(num: int, flip: float = 0.0, scale: float = 1.0) -> Callable[[Any, int], list[Example]]:
    return lambda world, seed: bench.pairs(world, num, seed, bench.Judge(scale=scale, flip=flip))


def foreign_pairs(num: int) -> Callable[[Any, int], list[Example]]:
    """Pairs of another world's answers, which this one's reference hardly ever writes."""
    return lambda world, seed: bench.pairs(world, num, seed, source=2.0 * bench.world(seed + 50).reference)


def labels(num: int, harder: float = 0.0) -> Callable[[Any, int], list[Example]]:
    """harder: taken off the reward before it is judged, so that fewer answers are good."""
    return lambda world, seed: bench.labels(world, num, seed, bench.Judge(reward=world.gold - harder))


def demonstrations(num: int) -> Callable[[Any, int], list[Example]]:
    return lambda world, seed: bench.demonstrations(world, num, seed=seed)


REGIMES = (
    Regime("many pairs", "pairs", pairs(20_000)),
    Regime("300 pairs", "pairs", pairs(300)),
    Regime("3,000 pairs, 30 % wrong", "pairs", pairs(3_000, flip=0.3)),
    Regime("3,000 pairs, always right", "pairs", pairs(3_000, scale=math.inf)),
    Regime("3,000 pairs, reward of the sum (easy)", "pairs", pairs(3_000), "global"),
    Regime("3,000 pairs, random reward (unlearnable)", "pairs", pairs(3_000), "hash"),
    Regime("3,000 pairs of another model", "pairs", foreign_pairs(3_000)),
    Regime("6,000 labels", "labels", labels(6_000)),
    Regime("6,000 labels, few of them good", "labels", labels(6_000, harder=2.0)),
    Regime("3,000 demonstrations", "demonstrations", demonstrations(3_000)),
    Regime("3,000 demonstrations and a checker", "demonstrations", demonstrations(3_000), check=1.0),
    Regime("3,000 pairs and a checker", "pairs", pairs(3_000), check=1.0),
    Regime(
        "3,000 demonstrations and a checker that hardly ever passes", "demonstrations", demonstrations(3_000), check=3.2
    ),
    Regime("4,000 ratings of four answers", "ratings", lambda world, seed: bench.ratings(world, 4_000, 4, seed)),
)


# strengths are chosen on these together, without a checker and with one, on worlds of their own
TUNED_ON = (Regime("3,000 pairs", "pairs", pairs(3_000)), Regime("300 pairs", "pairs", pairs(300)))
TUNED_ON_CHECKER = (Regime("a checker", "demonstrations", demonstrations(3_000), check=1.0),)


# ---------------------------------------------------------------- advice


def case_of(world: Any, regime: Regime, rows: Sequence[Example]) -> Case:
    """What `prefopt advise` would see of the rows and of the reference."""
    data = figures(Dataset(list(rows), [], regime.kind, regime.kind, "bench"))
    data = replace(data, passing=passing(world, regime, rows))
    return Case(data, model_facts(world, regime, rows), "exact" if regime.check is not None else None)


def model_facts(world: Any, regime: Regime, rows: Sequence[Example]) -> ModelFacts:
    """The model's figures, exact where a user would sample."""
    space = world.space
    length = expected(world.reference, space.lengths.to(world.reference.dtype))
    own = -expected(world.reference, world.reference) / length
    sides = compared(rows) if regime.kind in ("pairs", "ratings") else []
    better = [(p, b) for p, b, _ in sides] or [
        (tuple(e.prompt), tuple(e.completions[0])) for e in rows if e.scores[0] > 0.5
    ]
    known = {tuple(tokens): number for number, tokens in enumerate(map(space.completion, range(len(space.tokens))))}
    prompts = {tuple(prompt): number for number, prompt in enumerate(space.prompts.tolist())}
    found = [float(world.reference[prompts[p], known[c]]) / len(c) for p, c in better[:500]]
    solved = None if regime.check is None else expected(world.reference, (world.gold > regime.check).double())
    return ModelFacts(100_000, True, 1.0, -statistics.fmean(found), None, own, solved, 500)


def passing(world: Any, regime: Regime, rows: Sequence[Example]) -> float | None:
    """Share of the rows' better answers that the checker accepts; None without one."""
    if regime.check is None:
        return None
    prompt, answer = world.space.find(Batch.of(as_kind(rows, regime.kind, "demonstrations")))
    return float((world.gold[prompt, answer] > regime.check).double().mean())


# ---------------------------------------------------------------- runs


def perform(regime: Regime, method: str, seed: int, how: dict[str, float], advised: dict[str, Any]) -> dict[str, Any]:
    """Train and measure: what the policy earns, how far it went, and the one less the price of the other.

    how: strength and rate. advised: options of the loss that the advice sets.
    """
    world = bench.world(seed, regime.reward)
    rows = regime.rows(world, seed)
    value = world.gold if regime.check is None else (world.gold > regime.check).double()
    price = PRICE if regime.check is None else CHECK_PRICE
    began = time.process_time()
    if method in ONE_RUN:
        option = ONE_RUN[method][0]
        objective = EVERY[method](**({option: how["strength"]} if option else {}), **advised)
        shape = objective.facts.data
        fitting = as_kind(rows, regime.kind, shape)
        training = bench.Training(STEPS, BATCH[shape], how["rate"], seed, every=STEPS)
        found = bench.run(world, objective, fitting, training)
    else:
        found = rewarded(world, regime, rows, method, seed, value, how["strength"] * price, how["rate"])
    logp = bench.exact_logp(found.model, world.space)
    earned = expected(logp, value) - expected(world.reference, value)
    distance = bench.point(world, logp).kl
    return {
        "earned": earned,
        "kl": distance,
        "worth": earned - price * distance,
        "seconds": round(time.process_time() - began, 1),
    }


def rewarded(
    world: Any, regime: Regime, rows: Sequence[Example], method: str, seed: int, value: Any, beta: float, rate: float
) -> Any:
    """A policy that learns from rewards: the checker's, or those of a model that is trained on the rows before."""
    half = STEPS if method in ("rloo", "grpo") else STEPS // 2
    online = bench.Training(half, 1, rate, seed, every=half, completions=COMPLETIONS)
    objective = EVERY[BY_REWARD[method]](beta=beta)
    if method in ("rloo", "grpo"):
        return bench.run(world, objective, None, online, value)
    learn = bench.Training(STEPS - half, 64, 1e-3, seed, every=STEPS)
    scorer = bench.learn_scorer(world, EVERY["reward"](), as_kind(rows, regime.kind, "pairs"), learn)
    reward = bench.reward_of(scorer, world)
    spread = math.sqrt(expected(world.reference, (reward - (world.reference.exp() * reward).sum(1, keepdim=True)) ** 2))
    return bench.run(world, objective, None, online, reward / spread, scorer if method == "ppo" else None)


def as_kind(rows: Sequence[Example], kind: str, wanted: str) -> list[Example]:
    """The rows as another kind, as the data reader converts them."""
    if kind == wanted:
        return list(rows)
    if wanted == "pairs":
        return [pair(row) for row in rows if max(row.scores) > min(row.scores)]
    if wanted == "labels":
        return [one(row, n, float(row.scores[n] == max(row.scores))) for row in rows for n in range(len(row.scores))]
    good = [row for row in rows if max(row.scores) > 0.5 or kind != "labels"]
    return [one(row, row.scores.index(max(row.scores)), 1.0) for row in good]


def pair(row: Example) -> Example:
    best, worst = row.scores.index(max(row.scores)), row.scores.index(min(row.scores))
    return Example(row.prompt, [row.completions[best], row.completions[worst]], [1.0, 0.0],
                   [row.trained[best], row.trained[worst]], row.where)  # fmt: skip


def one(row: Example, number: int, score: float) -> Example:
    return Example(row.prompt, [row.completions[number]], [score], [row.trained[number]], row.where)


# ---------------------------------------------------------------- results


def outcome(path: Path, regime: Regime, method: str, seed: int, how: dict[str, float], advised: dict[str, Any]) -> Any:
    """A run's result, from its file where that was made the same way."""
    asked = {"steps": STEPS, "regime": regime.name, **how, "advised": advised}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
    if {name: found.get(name) for name in asked} != asked:
        found = {**asked, **perform(regime, method, seed, how, advised)}
        write_json(path, found)
        shown = f"{how['strength']:g}, {how['rate']:g}: {found['worth']:.3f} ({found['seconds']} s)"
        print(f"seed {seed}, {regime.name}: {method} {shown}", flush=True)
    return found


def tune(method: str, out: Path) -> dict[str, float]:
    """The strength and rate of a method that are worth most on worlds that the table does not use.

    Where the best stands at an edge of what is tried, the next value beyond it is tried too, once.
    """
    regimes = TUNED_ON_CHECKER if method in ("rloo", "grpo") else TUNED_ON
    strengths = ONE_RUN[method][1] if method in ONE_RUN else BETAS
    worth: dict[tuple[float, float], float] = {}

    def best(strengths: Iterable[float], rates: Iterable[float]) -> tuple[float, float]:
        for strength, rate in itertools.product(strengths, rates):
            how = {"strength": strength, "rate": rate}
            own = []
            for seed, (number, regime) in itertools.product(TUNING_SEEDS, enumerate(regimes)):
                path = out / f"tune{number}-{method}-{strength:g}-{rate:g}-{seed}.json"
                own.append(outcome(path, regime, method, seed, how, {})["worth"])
            worth[strength, rate] = statistics.fmean(own)
        return max(worth, key=worth.__getitem__)

    strength, rate = best(strengths, RATES)
    strength, rate = best([strength], beyond(rate, RATES))
    strength, rate = best(beyond(strength, strengths), [rate])
    return {"strength": strength, "rate": rate, "worth": round(worth[strength, rate], 4)}


def beyond(value: float, tried: Sequence[float]) -> list[float]:
    """The next value, where this is the first or last of several that grow by a factor."""
    if len(tried) < 2 or value not in (tried[0], tried[-1]):
        return []
    other = tried[1] if value == tried[0] else tried[-2]
    return [float(f"{value * value / other:.2g}")]


def gather(
    seeds: Sequence[int], regimes: Sequence[Regime], out: Path, strengths: dict[str, dict[str, float]]
) -> dict[str, dict[str, dict[int, Any]]]:
    """Results by regime, method and seed; each is written as it comes."""
    found: dict[str, dict[str, dict[int, Any]]] = {}
    for seed, regime in itertools.product(seeds, regimes):
        world = bench.world(seed, regime.reward)
        case = case_of(world, regime, regime.rows(world, seed))
        for advice in rank(case):
            if advice.refused:
                continue
            path = out / f"{REGIMES.index(regime)}-{advice.name}-{seed}.json"
            how = {name: strengths[advice.name][name] for name in ("strength", "rate")}
            result = outcome(path, regime, advice.name, seed, how, loss_options(case, advice.name))
            found.setdefault(regime.name, {}).setdefault(advice.name, {})[seed] = {**result, "points": advice.points}
    return found


def judged(found: dict[str, dict[int, Any]]) -> dict[str, Any]:
    """Which method won, which was advised, and whether the one is the other or no better by what the seeds can tell."""
    worth = {name: statistics.fmean(one["worth"] for one in own.values()) for name, own in found.items()}
    points = {name: statistics.fmean(one["points"] for one in own.values()) for name, own in found.items()}
    winner, advised = max(worth, key=worth.__getitem__), max(points, key=points.__getitem__)
    leads = [found[winner][seed]["worth"] - found[advised][seed]["worth"] for seed in found[winner]]
    low, high = interval(leads)
    return {
        "winner": winner,
        "advised": advised,
        "lead": statistics.fmean(leads),
        "low": low,
        "high": high,
        "right": winner == advised or (low is not None and low <= 0),
        "same": winner == advised,
        "worth": dict(sorted(worth.items(), key=lambda item: -item[1])),
        "earned": {name: statistics.fmean(one["earned"] for one in own.values()) for name, own in found.items()},
        "kl": {name: statistics.fmean(one["kl"] for one in own.values()) for name, own in found.items()},
        "seeds": len(leads),
    }


T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def interval(leads: Sequence[float]) -> tuple[float | None, float | None]:
    """Student's 95 % interval of a mean over seeds; None of one seed."""
    if len(leads) < 2:
        return None, None
    half = T_95[len(leads)] * statistics.stdev(leads) / math.sqrt(len(leads))
    middle = statistics.fmean(leads)
    return middle - half, middle + half


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| regime | advised | winner | winner's lead over it [95 %] | right | worth of each |",
        "|---|---|---|---|---|---|",
    ]
    for name, own in results.items():
        known = "" if own["low"] is None else f" [{own['low']:.3f}, {own['high']:.3f}]"
        lead = "-" if own["same"] else f"{own['lead']:.3f}{known}"
        verdict = "winner" if own["same"] else ("tie" if own["right"] else "no")
        worth = ", ".join(f"{method} {value:.2f}" for method, value in own["worth"].items())
        lines.append(f"| {name} | {own['advised']} | {own['winner']} | {lead} | {verdict} | {worth} |")
    right = sum(own["right"] for own in results.values())
    return "\n".join([*lines, "", f"Right in {right} of {len(results)} regimes."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/advise"), help="where runs are kept")
    parser.add_argument("--results", type=Path, default=HERE / "results.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--regimes", type=int, nargs="+", default=list(range(len(REGIMES))))
    parser.add_argument("--tune", action="store_true", help="choose strengths and peak step sizes")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.tune:
        return write_json(STRENGTHS, {method: tune(method, given.out) for method in (*ONE_RUN, *BY_REWARD)})
    chosen = [REGIMES[number] for number in given.regimes]
    found = gather(given.seeds, chosen, given.out, json.loads(STRENGTHS.read_text(encoding="utf-8")))
    results = {name: judged(own) for name, own in found.items()}
    write_json(given.results, {"steps": STEPS, "price": PRICE, "check_price": CHECK_PRICE, "results": results})
    given.results.with_suffix(".md").write_text(table(results) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
