"""What a run on prompts has besides others: a sampler, a reward, rollouts, and held-out prompts to sample."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from prefopt import ranks
from prefopt.batch import Batch
from prefopt.budget import Budget
from prefopt.data import Dataset
from prefopt.recipes.journal import Journal
from prefopt.records import InputError, Reward, discreet
from prefopt.rewards import Mixture, RewardOptions
from prefopt.rewards import build as build_reward
from prefopt.rollout import RolloutOptions
from prefopt.rollout.attempts import Attempts
from prefopt.rollout.groups import Group
from prefopt.rollout.held_out import HeldOut
from prefopt.rollout.prompts import Prompt, Stream
from prefopt.rollout.samplers import build as build_sampler
from prefopt.rollout.source import Online

log = logging.getLogger("prefopt")


def parted(options: Mapping[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """The options with every reward as its name, and the rewards as they were given: names, functions, objects."""
    given = options.get("reward")
    if given is None:
        return dict(options), []
    rewards = list(given) if isinstance(given, (list, tuple)) else [given]
    return {**options, "reward": [one if isinstance(one, str) else named(one) for one in rewards]}, rewards


def named(reward: Any) -> str:
    """What the run's record calls a reward that was given as an object."""
    return str(getattr(reward, "name", None) or getattr(reward, "__name__", type(reward).__name__))


def refuse_contradictions(objective: Any, settings: Mapping[str, Any]) -> None:
    """InputError on options that cannot go together, before anything is loaded."""
    options: RolloutOptions = settings["rollout"]
    facts, limit = objective.facts, settings["data"].max_length
    if options.num_completions < facts.least_completions:
        raise InputError(
            f"num_completions: {facts.name} compares the completions of a prompt and needs at least "
            f"{facts.least_completions}, got {options.num_completions}"
        )
    if limit is not None and limit <= options.max_tokens:
        raise InputError(
            f"max_length={limit} is for prompt and completion together and leaves no room for a prompt beside "
            f"max_tokens={options.max_tokens}; raise one or lower the other"
        )
    _refuse_sharding(facts, settings)
    _refuse_penalty(objective, options)
    if options.sampling.truncated and getattr(objective, "correction", "none") == "none":
        log.warning(
            "top_k, top_p or min_p: completions come from another distribution than the one that is trained; "
            "correction=token weighs them by the difference"
        )


def _refuse_sharding(facts: Any, settings: Mapping[str, Any]) -> None:
    if settings["model"].shard and settings["rollout"].sampler == "local":
        raise InputError(
            "shard: processes that share the weights cannot draw completions of unequal lengths with sampler: local; "
            "use sampler: vllm, or leave shard out"
        )
    if settings["model"].shard and facts.critic:
        raise InputError(f"shard: {facts.name} has a critic, which is not sharded; leave shard out, or take grpo")


def _refuse_penalty(objective: Any, options: RolloutOptions) -> None:
    """InputError where a failure that is cut, of reward 0, would be worth less than the objective takes."""
    lowest, name = getattr(objective, "least_reward", None), objective.facts.name
    if options.unfinished != "penalty" or lowest is None or -options.unfinished_penalty >= lowest:
        return
    raise InputError(
        f"unfinished: penalty makes a failure that is cut worth {-options.unfinished_penalty:g}, and {name} takes no "
        f"reward below {lowest:g}; use unfinished: keep or ignore, or take grpo"
    )


def prompts_of(data: Dataset) -> list[Prompt]:
    """The rows of a data set as prompts to sample."""
    return [
        Prompt(example.prompt, row.prompt or "", row.extra, example.where)
        for example, row in zip(data.examples, data.rows, strict=True)
    ]


def reward_for(settings: Mapping[str, Any], given: Sequence[Any]) -> Mixture:
    """The reward of a run. given: as `parted` has it."""
    options: RewardOptions = settings["reward"]
    return build_reward(replace(options, reward=[]), given or options.names, factories(settings))


def factories(settings: Mapping[str, Any]) -> dict[str, Callable[[], Reward]]:
    """What `prefopt.rewards` cannot build itself: the judge, and directories of reward models."""
    options: RewardOptions = settings["reward"]
    folders = [name for name in options.names if Path(name).is_dir()]
    models = {name: partial(_reward_model, name, settings) for name in folders}
    return {"judge": partial(_judge, settings), **models}


def _judge(settings: Mapping[str, Any]) -> Reward:
    """A judge that answers. InputError, with its address, where none does."""
    from prefopt.rewards.judge import Judge

    judge = Judge(settings["judge"])
    judge.ping()
    return judge


def _reward_model(folder: str, settings: Mapping[str, Any]) -> Reward:
    from prefopt.rollout.reward_model import RewardModelReward

    made: Reward = RewardModelReward(folder, settings["model"], settings["reward_model"])
    return made


class Rollouts:
    """The sampled side of a run: its reward from the start, and everything else once there is a policy.

    InputError for a reward that cannot be built, before any weights are read.
    """

    def __init__(self, plan: Any, settings: Mapping[str, Any], given: Sequence[Any], journal: Journal) -> None:
        self.objective, self.settings, self.journal = plan.objective, settings, journal
        self.data, self.held_out, self.easier = plan.data, plan.held_out, plan.easier
        self.options: RolloutOptions = settings["rollout"]
        self.steps = plan.steps
        self.reward = reward_for(settings, given)

    def start(self, policy: Any, tokenizer: Any, budget: Budget) -> None:
        """Make the sampler and the source."""
        self.policy = policy
        run = self.settings["run"]
        self.sampler, words = build_sampler(self.options, run.model, policy, tokenizer, self.settings["vllm"])
        self.journal.say(f"sampler: {words}")
        attempts = Attempts(self.sampler, self.reward, tokenizer, self.options)
        stream = Stream(
            prompts_of(self.data),
            run.seed,
            curriculum=self.options.curriculum,
            easier=prompts_of(self.easier) if self.easier else (),
            easier_share=self.options.easier_share,
        )
        self.source = Online(
            stream,
            attempts,
            self.objective,
            self.options,
            batch_size=self.settings["loop"].batch_size,
            budget=budget,
            steps=self.steps,
            seed=run.seed,
            tell=self._keep,
            say=self.journal.say,
        )
        self.check = HeldOut(prompts_of(self.held_out), attempts, self.options, run.seed) if self.held_out else None

    def first_rows(self) -> Batch:
        """The first rollout, for preflight."""
        return self.source.first(self.policy)

    def evaluation(self) -> Callable[[], dict[str, float]] | None:
        """Measures on the held-out prompts; None without any."""
        check = self.check
        return None if check is None else lambda: check(self.policy)

    def summary(self) -> dict[str, Any]:
        """What summary.json says of rollouts: held-out reward with intervals, what became of the reward's samples.

        By all processes together, of which each scored some.
        """
        rewards = {name: Counter[str]() for name in self.reward.counts}
        for own in ranks.gather(self.reward.state_dict()):
            for name, counts in own.items():
                rewards[name].update(counts)
        return {
            "held_out": self.check.summary() if self.check else None,
            "rewards": {name: dict(counts) for name, counts in rewards.items()},
        }

    def close(self) -> None:
        """Let go of the reward's processes and of the sampler."""
        self.reward.close()
        if hasattr(self, "sampler"):
            self.sampler.close()

    def _keep(self, step: int, groups: Sequence[Group]) -> None:
        """Write some completions of a rollout, or all, and show one."""
        rows = [row for group in groups for row in completion_rows(step, group)]
        self.journal.completions(step, rows, self.options.save_completions)


def completion_rows(step: int, group: Group) -> list[dict[str, Any]]:
    """A group's completions as rows of completions.jsonl."""
    return [
        {
            "step": step,
            "prompt": sample.prompt,
            "completion": sample.completion,
            "reward": score.value,
            "parts": dict(score.parts),
            "why": discreet(score.why),
            "tokens": len(sample.tokens),
            "finished": sample.finished,
            "where": group.draw.prompt.where,
        }
        for sample, score in zip(group.samples, group.scores, strict=True)
    ]
