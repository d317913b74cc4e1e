"""The watch of a run: what the detectors see beside its metrics, where findings go, and what is done about them."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from prefopt import config, detectors, ranks, streams
from prefopt.batch import Batch
from prefopt.data import Dataset
from prefopt.detectors import Finding, Run, WatchOptions
from prefopt.doctor.mend import mended
from prefopt.evaluate.scoring import sampled, score
from prefopt.models.load import load_tokenizer, tokenizer_source
from prefopt.models.policy import text_config
from prefopt.models.sampler import Local
from prefopt.models.sampling import Completion, Sampling
from prefopt.recipes.folder import FIXED
from prefopt.recipes.journal import Journal
from prefopt.recipes.lines import Lines
from prefopt.records import Example, InputError
from prefopt.rewards import RewardOptions
from prefopt.rewards import build as build_reward
from prefopt.rollout.prompts import Prompt
from prefopt.rollout.text import Text, end_tokens

FINDINGS = "findings.jsonl"
PROBED, COMPARED = 64, 200  # prompts of a probe, without a reward and with one
ATTEMPTS = 4  # answers to each prompt that a pair is taken from


class Ended(Exception):
    """The run is found to be sick and ends here, with its weights as they are."""


@dataclass(frozen=True)
class ProbeOptions:
    """The start model's own answers to held-out prompts, by which drift and hollow margins are seen."""

    # held-out prompts that the start model answers once before training; every evaluation asks how likely the answers
    # still are. 0: none; None: 64, or 200 with probe_reward. More narrow the interval of the accuracy
    probe: int | None = None
    # longest of these answers, in tokens
    probe_tokens: int = 64
    # what the start model's answers are compared by, two to a prompt: a reward as `reward` of online training takes it,
    # such as math, file.py:function or a reward model's directory. Tells a hollow margin from pairs that are easy, and,
    # as every evaluation answers the prompts anew, whether the policy gets better
    probe_reward: str | None = None

    def __post_init__(self) -> None:
        if self.probe is not None and self.probe < 0:
            raise ValueError(f"probe must be at least 0, got {self.probe}")
        if self.probe_tokens < 1:
            raise ValueError(f"probe_tokens must be at least 1, got {self.probe_tokens}")
        if self.probe_reward is not None and self.probe == 0:
            raise ValueError("probe_reward compares answers of the probe, and probe is 0; leave one of them out")

    @property
    def prompts(self) -> int:
        if self.probe is not None:
            return self.probe
        return PROBED if self.probe_reward is None else COMPARED


# ---------------------------------------------------------------- the watch


class Watching:
    """A listener: metrics go to the detectors, findings to findings.jsonl and, but for notes, to the log.

    The same on all processes, as their metrics are; the first writes and speaks.
    """

    def __init__(self, options: WatchOptions, run: Run, out: Path, journal: Journal) -> None:
        self.options, self.journal = options, journal
        self.lines = Lines(out / FINDINGS)
        self.watch = detectors.Watch(run, detectors.every(), self._tell)
        self.evaluated, self.ended = -1, 0

    def listen(self, step: int, metrics: Mapping[str, float]) -> None:
        if any(name.startswith("eval/") for name in metrics):
            self.evaluated = step
        self.watch.listen(step, metrics)

    def sick(self) -> Finding | None:
        """What ends the run, where sick runs are to end."""
        return None if self.options.on_sick == "warn" else self.watch.sick()

    def end(self, step: int) -> None:
        """The run ends here, after `step` updates, because it is sick."""
        self.ended = step
        self.journal.say(f"on_sick={self.options.on_sick}: the run ends after update {step}")

    def summary(self) -> dict[str, Any]:
        """What summary.json says: every finding, the stall in a form of its own, and where the run ended, if it did."""
        stall = stalled(self.watch.find("sparse_reward"))
        return {"findings": self.watch.summary(), "stalled": stall, "ended_at": self.ended or None}

    def clear(self) -> None:
        """Begin the file anew."""
        if ranks.is_main():
            self.lines.clear()

    def state_dict(self) -> dict[str, Any]:
        lines = self.lines.state_dict() if ranks.is_main() else None
        return {"watch": self.watch.state_dict(), "lines": lines, "evaluated": self.evaluated}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.watch.load_state_dict(state["watch"])
        self.evaluated = state["evaluated"]
        if ranks.is_main():
            self.lines.load_state_dict(state["lines"])

    def _tell(self, finding: Finding) -> None:
        if ranks.is_main():
            self.lines.append(finding.summary())
        if finding.level != "info":
            over = f"step {finding.recovered}: over: {finding.reason}"
            self.journal.say(finding.words() if finding.lasts else over)


def run_facts(objective: Any, settings: Mapping[str, Any], peak: float, steps: int, rows: int) -> Run:
    """What detectors may know of a run."""
    options = config.flat({**settings, "objective": objective})
    plain = {name: value for name, value in options.items() if isinstance(value, (bool, int, float, str))}
    settled: dict[str, Any] = {"learning_rate": peak}
    if "rollout" in settings:
        settled["stall_window"] = settings["rollout"].stall_window  # what a stall is judged over
    return Run(objective.facts.name, {**plain, **settled}, steps, rows)


def stalled(finding: Finding | None) -> dict[str, Any] | None:
    """A stall: since and recovered are updates, failed the share of groups without a success."""
    if finding is None:
        return None
    places = {"since": finding.since, "step": finding.last, "failed": finding.value, "recovered": finding.recovered}
    return {**places, **finding.evidence, "advice": f"{finding.reason}. {finding.remedy}"}


def fixed(
    objective: Any,
    options: Mapping[str, Any],
    out: Path,
    found: Sequence[Mapping[str, Any]],
    say: Callable[[str], None],
) -> list[tuple[Any, dict[str, Any]]]:
    """The runs, (objective, options), that mend one, as the recipes of `prefopt doctor --apply` would.

    options: as the run was given them, objects among them. found: findings as summary.json has them. Empty, with a line
    for the log, where the run is not sick, or no option alone mends it.
    """
    findings = [Finding(**one) for one in found]
    if not any(finding.lasts and finding.level == "sick" for finding in findings):
        return []
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    own = {**config.flat({"objective": objective}), **plain, "out": str(out / FIXED)}
    try:
        recipes = mended(objective.facts.name, own, findings, {})
    except InputError as error:
        say(f"on_sick=fix: {error}")
        return []
    recipes[-1]["out"] = str(out / FIXED)
    return [_made({**recipe, "on_sick": "warn"}) for recipe in recipes]


def _made(recipe: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A recipe's objective, and its other options."""
    section = {"objective": config.sections(recipe["objective"])["objective"]}
    fields = {row.key for row in config.describe(section)}
    own = {name: value for name, value in recipe.items() if name in fields}
    others = {name: value for name, value in recipe.items() if name not in fields and name != "objective"}
    return config.resolve(section, own)["objective"], others


# ---------------------------------------------------------------- the probe


class Probe:
    """Answers of the start model to held-out prompts, and how likely they are at each evaluation.

    examples: one answer to each prompt. pairs: a better and a worse one, of those that a reward tells apart; base: log-
    prob of each of their completions under the start model, nats. finished: share of the answers that ended.
    given: the reward of the rows' own answers to each prompt, as much of them as the policy may write. own: that of the
    start model's.
    """

    def __init__(self, policy: Any, options: ProbeOptions, settings: Mapping[str, Any], held_out: Dataset) -> None:
        self.policy, self.options, self.settings = policy, options, settings
        self.asked = _asked(held_out, options.prompts, getattr(policy, "inner", None))
        self.given: list[list[float]] = []
        self.own: list[list[float]] = []
        self.tokenizer: Any = None
        self.examples: list[Example] = []
        self.pairs: list[Example] = []
        self.base: list[float] = []
        self.finished: float | None = None

    def start(self, tokenizer: Any) -> str:
        """Sample, from the weights as they are now; what was done, in words."""
        self.tokenizer, prompts = tokenizer, [prompt for prompt, _ in self.asked]
        number = ATTEMPTS if self.options.probe_reward else 1
        drawn = ranks.from_main(self._sampled(number) if ranks.is_main() else [])
        if not prompts:
            return "probe: no held-out prompt leaves room for an answer, so drift is not measured"
        self.examples = sampled([list(p.tokens) for p in prompts], [[own[0].tokens] for own in drawn])
        self.finished = sum(own[0].finished for own in drawn) / len(drawn)
        words = f"probe: {len(prompts)} answers of the start model, {self.finished:.0%} ended by themselves"
        if self.options.probe_reward is None:
            return words
        compared = ranks.from_main(self._compared(drawn) if ranks.is_main() else ([], [], []))
        self.pairs, self.given, self.own = compared
        self.base = score(self.policy, self.pairs).logp.tolist()
        return f"{words}; {len(self.pairs)} pairs that {self.options.probe_reward} tells apart"

    def __call__(self) -> dict[str, float]:
        """Metrics of the policy as it is now, named eval/...."""
        found: dict[str, float] = {}
        if self.examples:
            now = score(self.policy, self.examples)
            found["eval/probe_nll"] = -float(now.logp.sum()) / int(now.tokens.sum())
        if self.finished is not None:
            found["eval/probe_finished"] = self.finished
        if self.pairs:
            ratio = score(self.policy, self.pairs).logp - torch.tensor(self.base, dtype=torch.float64)  # [N]
            better, worse = Batch.of(self.pairs).pairs(ratio)  # [G], [G]
            right = (better > worse).double() + (better == worse).double() / 2
            found |= {"eval/probe_accuracy": float(right.mean()), "eval/probe_pairs": float(len(self.pairs))}
        return found | self._wins()

    def _sampled(self, n: int) -> list[list[Completion]]:
        """Answers to all prompts, from the same draws of chance at each call."""
        local = Local(self.policy.model, end_tokens(self.policy.inner, self.tokenizer), self.tokenizer)
        seeds = random.Random(f"{self.settings['run'].seed}/probe")
        sampling = Sampling(max_tokens=self.options.probe_tokens)
        return local.sample([p.tokens for p, _ in self.asked], n, sampling, [seeds.getrandbits(64) for _ in self.asked])

    def _scored(self, drawn: Sequence[Sequence[Completion]]) -> list[list[float | None]]:
        """What the reward says of each prompt's answers."""
        reward = _reward(str(self.options.probe_reward), self.settings)
        try:
            text = Text(self.tokenizer)
            made = [text.samples(p, own, at) for at, ((p, _), own) in enumerate(zip(self.asked, drawn, strict=True))]
            scores = iter(reward([sample for own in made for sample in own]))
        finally:
            reward.close()
        return [[next(scores).value for _ in own] for own in made]

    def _compared(
        self, drawn: Sequence[Sequence[Completion]]
    ) -> tuple[list[Example], list[list[float]], list[list[float]]]:
        """For each prompt the best and the worst answer by the reward, where they differ; rewards of the rows' and of
        the start model's own.
        """
        most = self.options.probe_tokens  # as of the policy's answers: one that is cut off would lose for that alone
        rows = [[Completion(own[:most], [], len(own) <= most) for own in row.completions] for _, row in self.asked]
        scored = self._scored([[*own, *row] for own, row in zip(drawn, rows, strict=True)])
        pairs = []
        for (prompt, _), own, values in zip(self.asked, drawn, scored, strict=True):
            known = [(value, place) for place, value in enumerate(values[: len(own)]) if value is not None]
            if known and max(known)[0] > min(known)[0]:
                both = [own[max(known)[1]].tokens, own[min(known)[1]].tokens]
                pairs.append(Example(list(prompt.tokens), both, [1.0, 0.0], [[True] * len(one) for one in both]))
        given = [[v for v in values[len(own) :] if v is not None] for own, values in zip(drawn, scored, strict=True)]
        start = [[v for v in values[: len(own)] if v is not None] for own, values in zip(drawn, scored, strict=True)]
        return pairs, given, start

    def _wins(self) -> dict[str, float]:
        """How often the policy's answers, drawn anew, are better than the rows' own; as good counts half."""
        if self.options.probe_reward is None or not self.asked or self.settings["model"].shard:
            return {}  # weights that are split over processes cannot be sampled from here
        if self.tokenizer is None:  # a run that goes on from a checkpoint
            self.tokenizer = load_tokenizer(tokenizer_source(self.settings["run"].model), self.settings["model"])
        scored = ranks.from_main(self._anew() if ranks.is_main() and self.given else [])
        shares = [
            sum((own[0] > value) + (own[0] == value) / 2 for value in given) / len(given)
            for own, given in zip(scored, self.given if scored else [], strict=True)
            if own[0] is not None and given
        ]
        # said where nothing could be compared too, or that of an earlier evaluation would stand for it
        wins = sum(shares) / len(shares) if shares else math.nan
        now = [own[0] for own in scored]
        return {"eval/probe_wins": wins, "eval/probe_compared": float(len(shares)), **gain(now, self.own)}

    def _anew(self) -> list[list[float | None]]:
        """Rewards of an answer to each prompt; none where the reward failed, which must not end the training."""
        try:
            return self._scored(self._sampled(1))
        except InputError as error:
            streams.note(f"probe: the policy's answers could not be compared: {error}")
            return []

    def state_dict(self) -> dict[str, Any]:
        examples = [vars(example) for example in self.examples]
        return {
            "examples": examples,
            "pairs": [vars(pair) for pair in self.pairs],
            "base": list(self.base),
            "finished": self.finished,
            "given": [list(own) for own in self.given],
            "own": [list(own) for own in self.own],
            "reward": self.options.probe_reward,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.examples = [Example(**one) for one in state["examples"]]
        self.pairs = [Example(**one) for one in state["pairs"]]
        self.base, self.finished = list(state["base"]), state["finished"]
        # other prompts or another reward, as allow_inexact may bring: there is nothing to compare with
        prompts = [list(prompt.tokens) for prompt, _ in self.asked]
        same = prompts == [one.prompt for one in self.examples] and state["reward"] == self.options.probe_reward
        self.given = [list(own) for own in state["given"]] if same else []
        self.own = [list(own) for own in state.get("own", [])] if same else []


def gain(now: Sequence[float | None], start: Sequence[Sequence[float]]) -> dict[str, float]:
    """Mean reward of one answer to each prompt, and how far it is above that of the start model's own answers to the
    same prompts: in standard deviations of these around their prompt's mean, with its standard error over prompts.

    now: one for each prompt, None where it has none; empty where nothing was scored. NaN: unknown.
    """
    known = [(value, own) for value, own in zip(now, start, strict=False) if value is not None and len(own) > 1]
    values = [value for value in now if value is not None]
    found = {"reward": statistics.fmean(values) if values else math.nan, "gain": math.nan, "gain_error": math.nan}
    spread = math.sqrt(statistics.fmean(statistics.variance(own) for _, own in known)) if known else 0.0
    if len(known) > 1 and spread > 0:
        rises = [(value - statistics.fmean(own)) / spread for value, own in known]
        found["gain"] = statistics.fmean(rises)
        found["gain_error"] = statistics.stdev(rises) / math.sqrt(len(rises))
    return {f"eval/probe_{name}": value for name, value in found.items()}


def probe_for(policy: Any, settings: Mapping[str, Any], held_out: Dataset | None) -> Probe | None:
    """The probe of a run, not yet sampled; None where there is none. InputError where one is asked for in vain."""
    options: ProbeOptions | None = settings.get("probe")
    if options is None or settings["watch"].watch == "off":
        return None
    if held_out is None and (options.probe or options.probe_reward):
        raise InputError("probe: there are no held-out prompts; leave out the options that begin with probe")
    return None if held_out is None or not options.prompts else Probe(policy, options, settings, held_out)


def _asked(held_out: Dataset, most: int, model: Any) -> list[tuple[Prompt, Example]]:
    """The first different prompts that leave room for an answer, and the rows they are of."""
    limit = getattr(text_config(model), "max_position_embeddings", None) if model is not None else None
    found: dict[tuple[int, ...], tuple[Prompt, Example]] = {}
    for example, row in zip(held_out.examples, held_out.rows, strict=True):
        if len(example.prompt) < (limit or math.inf) and len(found) < most:
            prompt = Prompt(example.prompt, row.prompt or "", row.extra, example.where)
            found.setdefault(tuple(example.prompt), (prompt, example))
    return list(found.values())


def _reward(name: str, settings: Mapping[str, Any]) -> Any:
    """The reward that answers are compared by. InputError for a judge: a run on pairs has no option for its address."""
    if name == "judge":
        raise InputError(
            "probe_reward: a judge needs options that a run on pairs does not have; give a function of yours that asks "
            "it, as file.py:function"
        )
    factories = {name: partial(_reward_model, name, settings)} if Path(name).is_dir() else {}
    return build_reward(RewardOptions(), [name], factories)


def _reward_model(folder: str, settings: Mapping[str, Any]) -> Any:
    from prefopt.rollout.reward_model import RewardModelReward

    return RewardModelReward(folder, settings["model"])
