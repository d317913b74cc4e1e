"""The enumerable bench: small worlds whose every completion, probability and reward is known exactly."""

from prefopt.bench.examples import Judge, demonstrations, labels, pairs, ratings, steps
from prefopt.bench.measures import Measure, Point, best_at, best_of, frontier, measure, point, price, regret, tilted
from prefopt.bench.space import Lookup, Space, exact_logp, exact_values
from prefopt.bench.training import Run, Training, learn_reward, learn_scorer, reward_of, run
from prefopt.bench.worlds import World, world

__all__ = [
    "Judge",
    "Lookup",
    "Measure",
    "Point",
    "Run",
    "Space",
    "Training",
    "World",
    "best_at",
    "best_of",
    "demonstrations",
    "exact_logp",
    "exact_values",
    "frontier",
    "labels",
    "learn_reward",
    "learn_scorer",
    "measure",
    "pairs",
    "point",
    "price",
    "ratings",
    "regret",
    "reward_of",
    "run",
    "steps",
    "tilted",
    "world",
]
