"""Seeded runs that go wrong, go well, or only look as if they went wrong, with the metrics that training logs.

Metrics come out of the package's own loop, objectives and rollout measures, under the names of metrics.jsonl. Beside
them every run has its true reward (gold) at each evaluation, exactly, which no detector sees.

Letters: G prompts, N completions, L tokens.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import tasks
import torch
from torch import Tensor

from prefopt import bench
from prefopt.batch import Batch, Ragged
from prefopt.bench.online import draw
from prefopt.budget import Budget
from prefopt.data.source import Offline
from prefopt.loop import LoopOptions, Models, evaluate, train
from prefopt.models.policy import Policy
from prefopt.objectives import EVERY
from prefopt.objectives.facts import extras, fitted, settled
from prefopt.optimizer import Updater
from prefopt.recipes.watching import gain
from prefopt.records import Example
from prefopt.rollout.groups import GroupFacts, Kinds, Range, group_metrics, reward_metrics, shape_metrics, task_metrics

EVALUATIONS = 8  # of a run, besides the one before its first update
HELD_OUT, PROBED, ATTEMPTS = 128, 200, 4
DRAWN, TIE = 1000, 1e-9  # rows of which the first PROBED with a measured prompt are compared; rewards that are as good
GROUPS, COMPLETIONS = 16, 8
JUDGE = 2.0  # how decided the judge of the pairs is, per standard deviation of reward
SEEDS = 3  # of each task: models and rewards; every run has rows, order and draws of its own
EVERYTHING = Budget(10**9, repeat=True)
DIGITS_KEPT = 6


@dataclass(frozen=True)
class Spec:
    """A run: everything that its metrics follow from.

    failure: what is looked for. intent: what it was made to be, sick, healthy or hard; what it became is for its gold
    to say. rows: kind of rows; size: how many. start: as `tasks.task` has it. first: updates of SFT on the rows' chosen
    answers before. partial: a checker pays for a part of an answer too. noisy: rewards of online training as the judge
    of the pairs sees them. taught: rows of that SFT, where they are others and more.
    """

    failure: str
    intent: str
    kind: str
    seed: int
    objective: str
    options: dict[str, Any] = field(default_factory=dict)
    rows: str = "pairs"
    size: int = 4000
    steps: int = 80
    batch: int = 32
    rate: float = 1e-3
    start: str = tasks.REFERENCE
    chance: float = 0.0
    first: int = 0
    partial: bool = False
    noisy: bool = False
    taught: int = 0

    @property
    def name(self) -> str:
        options = [f"{key}{value:g}" for key, value in self.options.items()]
        numbers = [f"n{self.size}", f"s{self.steps}", f"r{self.rate:g}", f"c{self.chance:g}", f"f{self.first}"]
        words = [self.failure, self.intent, self.kind, self.seed, self.objective, *options, self.rows, *numbers]
        kinds = [kind for kind in ("partial", "noisy") if getattr(self, kind)] + [f"t{self.taught}"] * (self.taught > 0)
        return "-".join(map(str, [*words, self.start, *kinds]))

    @property
    def online(self) -> bool:
        return EVERY[self.objective].facts.data == "prompts"

    def facts(self) -> dict[str, Any]:
        """What a detector may know of the run."""
        options = {**self.options, "learning_rate": self.rate, "batch_size": self.batch}
        if self.online:
            return {"objective": self.objective, "options": {**options, "num_completions": COMPLETIONS},
                    "steps": self.steps, "rows": None}  # fmt: skip
        epochs = self.steps * self.batch / self.size
        return {"objective": self.objective, "options": {**options, "epochs": epochs, "probe_reward": "gold"},
                "steps": self.steps, "rows": self.size}  # fmt: skip


# ---------------------------------------------------------------- rows


def rows(task: tasks.Task, kind: str, size: int, seed: int) -> list[Example]:
    """Pairs of a task. pairs: two answers of the start model, judged with some noise. answers: the same of the model
    that answers, wherever the run starts. far: the best and the worst of eight. surface: told apart by one token, or
    by length, and by nothing else.
    """
    made: dict[str, Callable[[], list[Example]]] = {
        "pairs": lambda: bench.pairs(task.world, size, seed, bench.Judge(scale=JUDGE)),
        "far": lambda: [extremes(row) for row in bench.ratings(task.world, size, 8, seed, bench.Judge(math.inf))],
        "surface": lambda: surface(task, size, seed),
        "answers": lambda: bench.pairs(task.world, size, seed, bench.Judge(scale=JUDGE), task.answers),
    }
    return made[kind]()


def extremes(row: Example) -> Example:
    best, worst = (row.scores.index(pick(row.scores)) for pick in (max, min))
    return pair(row.prompt, row.completions[best], row.completions[worst])


def pair(prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]) -> Example:
    both = [list(chosen), list(rejected)]
    return Example(list(prompt), both, [1.0, 0.0], [[True] * len(own) for own in both])


def surface(task: tasks.Task, size: int, seed: int) -> list[Example]:
    """Answers of the start model whose only difference is a mark: a token, the style, or the number of digits.

    Which mark it is depends on the task's own seed, so that training and held-out rows have the same.
    """
    space, chance = task.world.space, random.Random(seed)
    drawn = torch.Generator().manual_seed(seed)
    prompts = torch.randint(len(space.prompts), (size,), generator=drawn)
    mark, place, second_style = task.world.seed % 6, task.world.seed % 4, task.world.seed % 2 == 0
    probability = task.world.reference.exp()
    if task.kind in ("sums", "brackets", "routes", "maps", "coins"):
        better, worse = marks(task)
        first, second = (
            torch.multinomial(probability[prompts] * own, 1, generator=drawn)[:, 0] for own in (better, worse)
        )
        return [pair(space.prompts[p].tolist(), space.completion(a), space.completion(b))
                for p, a, b in zip(prompts.tolist(), first.tolist(), second.tolist(), strict=True)]  # fmt: skip
    number = torch.multinomial(probability[prompts], 1, generator=drawn)[:, 0]
    found = []
    for p, own in zip(prompts.tolist(), number.tolist(), strict=True):
        answer = space.completion(own)
        at, good = (0, tasks.SYMBOLS + second_style) if task.kind == "instructions" else (place, mark)
        others = (
            [tasks.SYMBOLS + (not second_style)] if task.kind == "instructions" else [t for t in range(6) if t != mark]
        )
        bad = answer[at] if answer[at] in others else chance.choice(others)
        found.append(pair(space.prompts[p].tolist(), [*answer[:at], good, *answer[at + 1 :]],
                          [*answer[:at], bad, *answer[at + 1 :]]))  # fmt: skip
    return found


def marks(task: tasks.Task) -> tuple[Tensor, Tensor]:
    """The completions with a mark and those with its opposite, [C] bool each: longer or shorter, or begun with a round
    bracket, or a move up or down, or one of the fields in a certain colour or in another, or many coins rather than
    few, the largest first rather than the smallest, two alike at first or not.
    """
    space, seed = task.world.space, task.world.seed
    if task.kind == "coins":
        one, two, many = space.tokens[:, 0], space.tokens[:, 1], space.lengths > 2
        paid = many & (two < len(tasks.COINS))
        return [
            (space.lengths > 3, (space.lengths > 1) & ~(space.lengths > 3)),
            (one == len(tasks.COINS) - 1, one == 0),
            (paid & (one == two), paid & (one != two)),
        ][seed % 3]
    if task.kind == "maps":
        more = space.tokens[:, 2 * seed % tasks.FIELDS] == seed % tasks.COLOURS
        return more, ~more
    if task.kind == "sums":
        more = (space.lengths == 2) & (space.tokens[:, 1] < tasks.DIGITS) & (space.tokens[:, 0] > 0)
        less = (space.lengths == 2) & (space.tokens[:, 1] == tasks.DIGITS)
    elif seed % 3 == 2:
        more, less = ((space.tokens[:, 0] % tasks.OPENING == kind) & (space.lengths > 1) for kind in (0, 1))
    else:
        more, less = task.finished & (space.lengths > 2), task.finished & (space.lengths == 2)
    return (more, less) if seed % 2 == 0 else (less, more)


# ---------------------------------------------------------------- what a run measures


class Probe:
    """As `prefopt.recipes.watching.Probe`: answers of the start model, and pairs of them that the reward tells apart.

    Likelihoods are read from the table of all completions; answers are drawn, so the noise is that of a real probe.
    """

    def __init__(self, task: tasks.Task, seed: int, rows: Sequence[Example]) -> None:
        """rows: those whose answers the policy's own are compared with, of any prompts."""
        self.task, self.seed, random_ = task, seed, torch.Generator().manual_seed(seed)
        probability = task.world.reference[task.measured].exp()  # [M, C]
        self.prompt = torch.randint(len(task.measured), (PROBED,), generator=random_)
        drawn = torch.multinomial(probability[self.prompt], ATTEMPTS, replacement=True, generator=random_)  # [N, 4]
        gold = task.world.gold[task.measured[self.prompt][:, None], drawn]
        self.start, self.drawing = gold.tolist(), torch.Generator().manual_seed(seed + 1)
        self.answer = drawn[:, 0]
        self.better = drawn.gather(1, gold.argmax(1, keepdim=True))[:, 0]
        self.worse = drawn.gather(1, gold.argmin(1, keepdim=True))[:, 0]
        self.differ = gold.max(1).values > gold.min(1).values
        self.base = task.world.reference[task.measured]
        prompt, answers = task.world.space.find(Batch.of(rows))
        place = torch.full((len(task.world.space.prompts),), -1).index_put(
            (task.measured,), torch.arange(len(self.base))
        )
        known = place[prompt] >= 0
        self.asked = place[prompt][known][:PROBED]  # [R]
        self.given = task.world.gold[prompt[:, None], answers.view(-1, 2)][known][:PROBED]  # [R, 2]

    def __call__(self, logp: Tensor) -> dict[str, float]:
        """logp [M, C] of the policy."""
        tokens = self.task.world.space.lengths[self.answer].sum()
        ratio = (logp - self.base)[self.prompt]  # [N, C]
        better, worse = (ratio.gather(1, own[:, None])[:, 0][self.differ] for own in (self.better, self.worse))
        right = (better > worse).double() + (better == worse).double() / 2
        return {
            "eval/probe_nll": -float(logp[self.prompt, self.answer].sum() / tokens),
            "eval/probe_finished": float(self.task.finished[self.answer].double().mean()),
            "eval/probe_accuracy": float(right.mean()),
            "eval/probe_pairs": float(len(right)),
            "eval/probe_wins": self.wins(logp),
            "eval/probe_compared": float(len(self.asked)),
            **gain(self.rewards(logp), self.start),
        }

    def rewards(self, logp: Tensor) -> list[float]:
        """Of an answer to each prompt, drawn with chances of their own at each evaluation."""
        drawn = torch.multinomial(logp[self.prompt].exp(), 1, generator=self.drawing)
        found: list[float] = self.task.world.gold[self.task.measured[self.prompt][:, None], drawn][:, 0].tolist()
        return found

    def wins(self, logp: Tensor) -> float:
        """Share of the rows' answers that the policy's own are better than; as good counts half."""
        drawn = torch.multinomial(logp[self.asked].exp(), 1, generator=torch.Generator().manual_seed(self.seed))
        own = self.task.world.gold[self.task.measured[self.asked][:, None], drawn]  # [R, 1]
        more, same = own > self.given + TIE, (own - self.given).abs() <= TIE
        return float((more.double() + same.double() / 2).mean())


class Rollouts:
    """Groups of the policy's own answers to prompts drawn anew, with the metrics of `prefopt.rollout`."""

    def __init__(self, task: tasks.Task, objective: Any, reward: Tensor, seed: int, noisy: bool = False) -> None:
        self.task, self.objective, self.reward, self.noisy = task, objective, reward, noisy
        self.random = torch.Generator().manual_seed(seed)
        self.range, self.seen = Range(), {}
        self.steps_per_epoch = len(task.world.space.prompts) / GROUPS

    def batches(self, models: Any) -> Iterator[tuple[Batch, float]]:
        while True:
            whole = self.rollout(models.policy)
            with torch.no_grad():
                targets = self.objective.targets(whole, models)
            yield replace(whole, targets=targets), 1.0

    def rollout(self, policy: Any) -> Batch:
        space = self.task.world.space
        chosen = torch.randperm(len(space.prompts), generator=self.random)[:GROUPS]
        tokens, logp = draw(policy, space, chosen.repeat_interleave(COMPLETIONS), self.random)  # [N, L]
        real = tokens >= 0
        batch = Batch(
            Ragged(space.prompts[chosen].flatten(), torch.full((len(chosen),), space.prompts.shape[1])),
            Ragged(tokens[real], real.sum(1)),
            torch.arange(len(chosen)).repeat_interleave(COMPLETIONS),
            torch.ones(int(real.sum()), dtype=torch.bool),
            torch.zeros(len(tokens)),
            logp[real],
        )
        prompt, completion = space.find(batch)
        score = self.reward[prompt[batch.group], completion].float()
        if self.noisy:  # the larger of two is the first with the same chance as in the pairs
            score = score - torch.empty_like(score).exponential_(generator=self.random).log() / JUDGE
        self.seen = self.measured(chosen, score, real.sum(1))
        return replace(batch, score=score)

    def measured(self, chosen: Tensor, score: Tensor, lengths: Tensor) -> dict[str, float]:
        facts = []
        for at, number in enumerate(chosen.tolist()):
            own = slice(at * COMPLETIONS, (at + 1) * COMPLETIONS)
            value, length = score[own].tolist(), lengths[own].tolist()
            few = [0.0] * COMPLETIONS
            facts.append(GroupFacts(number, False, value, value, value, [{}] * COMPLETIONS, length,
                                    [True] * COMPLETIONS, few, ""))  # fmt: skip
        self.range.see(value for fact in facts for value in fact.known)
        solved = [[self.range.solved(value) for value in fact.known] for fact in facts]
        kinds = Kinds.of(facts, self.range)
        useful = sum(max(fact.known) - min(fact.known) > 1e-6 for fact in facts)
        return {**reward_metrics(facts), **task_metrics(facts, solved), **group_metrics(kinds, useful),
                **shape_metrics(facts)}  # fmt: skip


# ---------------------------------------------------------------- a run


class Point(NamedTuple):
    """gold: in standard deviations of the start's reward, or, for a checker, the chance of success; kl: nats."""

    step: int
    gold: float
    kl: float


def perform(spec: Spec, folder: Path, stop_when: Callable[[list[Any]], bool] | None = None) -> dict[str, Any]:
    """Train and listen. stop_when: asked at every evaluation, with the lines so far, whether the run ends there."""
    began = time.process_time()
    torch.set_num_threads(1)
    task = tasks.task(spec.kind, spec.seed % SEEDS, spec.start, folder / "models", spec.chance)
    policy = Policy(task.world.policy_model(), "padded", **_wanted(EVERY[spec.objective]()))
    if spec.first:
        _fine_tune(policy, spec, task)
    lines: list[Any] = []
    points: list[Point] = []
    try:
        _train(spec, task, policy, lines, points, stop_when)
    except Stopped:
        pass
    return {
        "spec": asdict(spec),
        "run": spec.facts(),
        "lines": lines,
        "points": points,
        "seconds": round(time.process_time() - began, 2),
    }


class Stopped(Exception):
    """The remedy ends the run here."""


def _train(spec: Spec, task: tasks.Task, policy: Any, lines: list[Any], points: list[Point], stop: Any) -> None:
    objective: Any = EVERY[spec.objective](**spec.options)
    gold = task.right.double() if spec.chance else task.world.gold
    if spec.online:
        longest = task.world.space.tokens.shape[1]
        objective = fitted(objective, longest, COMPLETIONS)
        paid = _partial(task) if spec.partial else gold
        source: Any = Rollouts(task, objective, paid, spec.seed, spec.noisy)
        held_out: list[Example] = []
    else:
        examples = rows(task, spec.rows, spec.size, spec.seed + 1)
        held_out = rows(task, spec.rows, HELD_OUT, spec.seed + 10_001)
        objective = settled(objective, examples)
        epochs = math.ceil(spec.steps * spec.batch / len(examples)) + 1
        source = Offline(examples, spec.batch, epochs=epochs, seed=spec.seed, least=objective.facts.least)
    models = Models(policy, task.world.lookup())
    compared = [] if spec.online else rows(task, spec.rows, DRAWN, spec.seed + 40_001)
    probe = Probe(task, spec.seed + 20_001, compared) if compared else None
    told: list[int] = []

    def measure() -> dict[str, float]:
        step = told[-1] if told else 0
        logp = task.logp(policy.model)
        kl = float((logp.exp() * (logp - task.world.reference[task.measured])).sum(1).mean())
        points.append(Point(step, task.expected(logp, gold), kl))
        if probe is None:
            return _held_out_reward(task, logp, gold, spec.seed)
        batches = [(Batch.of(held_out), 1.0)]
        return {**evaluate(models, objective, batches, EVERYTHING), **probe(logp)}

    def listen(step: int, metrics: dict[str, float]) -> None:
        told.append(step)
        lines.append([step, {name: float(f"{value:.{DIGITS_KEPT}g}") for name, value in metrics.items()}])
        if stop is not None and any(name.startswith("eval/") for name in metrics) and stop(lines):
            raise Stopped

    train(
        models,
        objective,
        source,
        Updater(policy.model.parameters()),
        LoopOptions(schedule="linear", warmup=0.1, eval_every=max(spec.steps // EVALUATIONS, 1)),
        peak=spec.rate,
        steps=spec.steps,
        budget=EVERYTHING,
        evaluation=measure,
        listeners=[listen],
    )


def _wanted(objective: Any) -> dict[str, Any]:
    return dict.fromkeys(extras(objective), True)


def _held_out_reward(task: tasks.Task, logp: Tensor, gold: Tensor, seed: int) -> dict[str, float]:
    """Of one answer to every measured prompt."""
    random_ = torch.Generator().manual_seed(seed + 30_001)
    drawn = torch.multinomial(logp.exp(), 1, generator=random_)
    return {"eval/reward": float(gold[task.measured].gather(1, drawn).mean())}


def _fine_tune(policy: Any, spec: Spec, task: tasks.Task) -> None:
    """SFT on the chosen answers of the rows; where there are none, on so many answers that the checker accepts."""
    if spec.online:
        allowed = task.right.double() * task.world.reference.exp()
        random_ = torch.Generator().manual_seed(spec.seed)
        there = (allowed.sum(1) > 0).nonzero()[:, 0]  # prompts to which an answer is accepted
        prompts = there[torch.randint(len(there), (spec.size,), generator=random_)]
        numbers = torch.multinomial(allowed[prompts], 1, generator=random_)[:, 0]
        pairs_ = [(task.world.space.prompts[p].tolist(), task.world.space.completion(n))
                  for p, n in zip(prompts.tolist(), numbers.tolist(), strict=True)]  # fmt: skip
    else:
        pairs_ = [(row.prompt, row.completions[0 if row.scores[0] > row.scores[1] else 1])
                  for row in rows(task, spec.rows, spec.taught or spec.size, spec.seed + 1)]  # fmt: skip
    examples = [Example(prompt, [own], [1.0], [[True] * len(own)]) for prompt, own in pairs_]
    source = Offline(
        examples, spec.batch, epochs=math.ceil(spec.first * spec.batch / len(examples)) + 1, seed=spec.seed
    )
    train(
        Models(policy),
        EVERY["sft"](),
        source,
        Updater(policy.model.parameters()),
        LoopOptions(schedule="linear", warmup=0.1),
        peak=spec.rate,
        steps=spec.first,
        budget=EVERYTHING,
    )


def _partial(task: tasks.Task) -> Tensor:
    """For every completion the largest share of tokens, each in its place, that it has in common with a right one."""
    space = task.world.space
    share = torch.zeros_like(task.world.gold)
    for p, right in enumerate(task.right):
        wanted = space.tokens[right]  # [R, L]
        if len(wanted):
            same = (space.tokens[:, None] == wanted[None]) & space.real[:, None]
            share[p] = (same.double().sum(2) / space.lengths[:, None]).max(1).values
    return share
