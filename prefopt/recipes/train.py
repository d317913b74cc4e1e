"""From a model and a data file to an aligned model: what `prefopt train` and `prefopt.train` do."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from prefopt import config, preflight, ranks, streams
from prefopt.batch import Batch
from prefopt.budget import Budget, memory_advice
from prefopt.checkpoint.commit import sync
from prefopt.data import DataOptions, Dataset, load, split, template_text
from prefopt.data.source import steps_per_epoch
from prefopt.loop import LoopOptions, Models, budget_for
from prefopt.metrics import METRICS, find
from prefopt.models.adapters import LoraOptions, adapt, is_adapted
from prefopt.models.load import Loaded, ModelOptions, keep_freed_memory, load_tokenizer, tokenizer_source
from prefopt.models.load import load as load_model
from prefopt.models.policy import Policy, choose, text_config
from prefopt.models.reference import Cached, ReferenceOptions, pick
from prefopt.models.sharding import shard
from prefopt.objectives.facts import extras, fitted, needs_reference, settled
from prefopt.recipes import online
from prefopt.recipes.card import write_card, written_text
from prefopt.recipes.folder import FIXED, Finished, clear, closed_to_others, holds_run, prepare, remove_state
from prefopt.recipes.journal import Journal, progress
from prefopt.recipes.results import Best, save, save_critic, with_a_better_way
from prefopt.recipes.resume import Earlier
from prefopt.recipes.updates import Clock, Following, Work, run_updates, source_of
from prefopt.recipes.watching import Probe, Watching, fixed, probe_for, run_facts
from prefopt.records import Example, InputError, write_json

log = logging.getLogger("prefopt")


@dataclass(frozen=True)
class RunOptions:
    """What goes in and where the results go."""

    # model directory, adapter directory, or hub name
    model: str
    # file, folder or hub name of the training rows
    data: str
    # folder of this run: config, metrics, summary, and the model in OUT/model
    out: str
    # rows to evaluate on; None: hold out eval_fraction of the data
    eval_data: str | None = None
    # share of the data held out when there is no eval_data; rows with one prompt stay together; 0 for none
    eval_fraction: float = 0.05
    # decides the order of the data and every random number
    seed: int = 0
    # check the step-0 identities before the first update, and stop a broken run
    preflight: Literal["on", "off"] = "on"
    # weights to write out: those of the last update, or of the evaluation with the best eval_metric
    keep: Literal["last", "best"] = "last"
    # metric that decides keep: best; `prefopt explain` says which way is better; None: eval/loss, or eval/reward where
    # the model's own completions are evaluated
    eval_metric: str | None = None
    # write into a folder that already holds a run
    overwrite: bool = False
    # hub name to upload the result to, once it is saved
    push_to_hub: str | None = None
    # whether a repository that push_to_hub makes is private
    hub_private: bool = True
    # services that are told the metrics as well: tensorboard, wandb, trackio, mlflow, or a function of yours as
    # file.py:function, called with (step, metrics); training never waits for one
    track: str | list[str] = field(default_factory=list)
    # of several processes: minutes that one waits for the others before the run stops; more where a reward may keep one
    # busy for longer
    max_wait_minutes: float = 10.0

    def __post_init__(self) -> None:
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"eval_fraction must be at least 0 and below 1, got {self.eval_fraction}")
        if not self.max_wait_minutes > 0:
            raise ValueError(f"max_wait_minutes must be above 0, got {self.max_wait_minutes}")
        if self.keep == "best" and self.eval_data is None and not self.eval_fraction:
            raise ValueError("keep: best needs held-out rows; give eval_data or an eval_fraction above 0")

    @property
    def services(self) -> list[str]:
        """What `track` names."""
        return [self.track] if isinstance(self.track, str) else list(self.track)


class Result(NamedTuple):
    """model_dir: a directory that plain transformers (or peft, for adapters) loads. summary: what summary.json
    holds.
    """

    model_dir: Path
    summary: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What a run does: its objective with every option settled, its data as the model sees it, the number of updates.

    settled: the options that follow from the training rows, or from how completions are drawn, by name. easier: prompts
    to mix in, where the policy writes the completions.
    """

    objective: Any
    data: Dataset
    held_out: Dataset | None
    tokenizer: Any
    steps: int
    settled: dict[str, Any]
    easier: Dataset | None = None


def plan(*, objective: Any, **options: Any) -> Plan:
    """Read and tokenise the data without loading weights. InputError as for `train`."""
    named, rewards = online.parted(options)
    settings = _settings(objective, named)
    if is_online(objective):
        online.reward_for(settings, rewards).close()  # that there is one, and that it loads
    return _planned(objective, settings)


def _planned(objective: Any, settings: dict[str, Any], say: Callable[[str], None] = lambda text: None) -> Plan:
    """Everything that can be read and refused before the weights; say: told what was found as it is found."""
    _refuse_contradictions(objective, settings)
    tokenizer = load_tokenizer(tokenizer_source(settings["run"].model), settings["model"])
    if settings["data"].chat_template is not None:
        tokenizer.chat_template = template_text(settings["data"].chat_template)  # saved with the model it trained
    data, held_out = _read(objective, settings, tokenizer)
    say(data.describe())
    _refuse_few_rows(objective, settings["run"], data, held_out)
    for one in (data, held_out):
        if one is not None and (words := _one_sided(one)):
            say(words)
    if held_out is None and settings["run"].eval_fraction:
        say(f"held out: none of so few rows ({len(data)}); give eval_data to see how the model does on others")
    easier = _easier(objective, settings, tokenizer, say)
    done = settled(objective, data.examples)
    if is_online(objective):
        done = fitted(done, settings["rollout"].max_tokens, settings["rollout"].num_completions)
    found = {field.name: getattr(done, field.name) for field in fields(objective)}
    found = {name: value for name, value in found.items() if value != getattr(objective, name)}
    for name, value in found.items():
        say(f"{name}: {value}, from the {'rollout options' if is_online(objective) else 'training rows'}")
    steps = _steps(settings, len(data.examples), objective)
    return Plan(done, data, held_out, tokenizer, steps, found, easier)


def train(*, objective: Any, **options: Any) -> Result:
    """Train `model` on `data` with `objective` and write the result to `out`.

    options: any field of DataOptions, ModelOptions, LoraOptions, ReferenceOptions, LoopOptions and RunOptions by name
    (`prefopt train dpo --help` lists them), and for objectives on prompts of RolloutOptions, RewardOptions and
    JudgeOptions (`prefopt train grpo --help`), where `reward` may hold functions and rewards too. InputError, before
    anything is loaded where possible, for what cannot work; PreflightError when a step-0 identity fails; PeerError when
    another process of the run failed.
    """
    named, rewards = online.parted(options)
    settings = _settings(objective, named)
    fixes, out = settings["watch"].on_sick == "fix", Path(settings["run"].out)
    with contextlib.ExitStack() as stack:
        try:
            result = _alone(objective, settings, rewards, stack)
            mending = fixed(objective, options, out, result.summary["findings"], _say) if fixes else []
        except Finished:
            mending = _unmended(objective, options, out) if fixes else []
            if not mending:
                raise
        if mending:
            _say(f"on_sick=fix: training anew in {out / FIXED}")
        for made, changed in mending:  # in folders of their own
            result = train(objective=made, **changed)
    return result


def _alone(objective: Any, settings: dict[str, Any], rewards: list[Any], held: contextlib.ExitStack) -> Result:
    """The run itself, whatever is to mend it. held: holds its folder. Finished where it has been run there."""
    run: RunOptions = settings["run"]
    with ranks.one_for_all(), contextlib.ExitStack() as stack:
        ranks.start(60 * run.max_wait_minutes)
        stack.enter_context(closed_to_others())
        out = prepare(settings, held)
        earlier = Earlier.find(out, settings)
        torch.manual_seed(run.seed)
        if ranks.device().type == "cpu":
            keep_freed_memory()
        journal = stack.enter_context(Journal(out, settings))
        if not holds_run(out):  # else once this one is known to work: --resume reads those of the run that is there
            journal.keep_settings()
        with memory_advice():
            return _train(objective, settings, rewards, journal, out, earlier)


def _unmended(objective: Any, options: dict[str, Any], out: Path) -> list[tuple[Any, dict[str, Any]]]:
    """Of the runs that mend the finished one in `out` those that are yet to end; as `fixed` has them."""
    found = ranks.from_main(json.loads((out / "summary.json").read_text("utf-8")) if ranks.is_main() else {})
    mending = fixed(objective, options, out, found["findings"] or [], _say)
    ended = ranks.from_main([(Path(changed["out"]) / "summary.json").exists() for _, changed in mending])
    return [one for one, is_ended in zip(mending, ended, strict=True) if not is_ended]


def _say(text: str) -> None:
    """A line for the log, while no journal is open."""
    if ranks.is_main():
        streams.note(text)


def _train(
    objective: Any, settings: dict[str, Any], rewards: list[Any], journal: Journal, out: Path, earlier: Earlier
) -> Result:
    clock = Clock()
    work, tokenizer, critic_tokenizer, how = _prepared(objective, settings, rewards, journal, out, earlier, clock)
    run_updates(work, earlier, out)
    clock.lap("training")
    actor, best = work.models.policy, work.best
    model_dir = best.result() if best else save(actor, tokenizer, out / "model")
    save_critic(actor, critic_tokenizer, out / "critic")
    clock.lap("save")
    result = Result(model_dir, _summary(work, earlier, model_dir, how))
    _publish(result, work.plan, settings, tokenizer, journal)
    return result


def _prepared(
    objective: Any,
    settings: dict[str, Any],
    rewards: list[Any],
    journal: Journal,
    out: Path,
    earlier: Earlier,
    clock: Clock,
) -> tuple[Work, Any, Any, str | None]:
    """All that comes before the first update: what is worked with, the tokenizers of the model and of a critic, and
    where the reference comes from, in words.
    """
    run, resumes = settings["run"], earlier.checkpoint is not None
    plan = _planned(objective, settings, journal.say)
    earlier.compare_rows(plan)
    rollouts = _rollouts(plan, settings, rewards, journal)
    clock.lap("data")
    policy, tokenizer = _loaded(plan, settings, journal)
    actor, critic_tokenizer = _with_critic(policy, plan, settings, tokenizer, journal)
    other = _other(settings, policy, plan)
    earlier.compare_weights(actor, other)
    earlier.describe(journal)
    journal.keep_settings()
    clock.lap("load")
    budget = budget_for(settings["loop"], ranks.device(), settings["model"].shard, repeat=repeats(actor))
    if rollouts:
        rollouts.start(policy, tokenizer, budget)
    checked = run.preflight == "on" and not resumes  # the weights are those of the start no more
    rows = _first_rows(plan, settings, rollouts) if checked else None
    clock.lap("rows")
    if rows is not None:
        _check_policy(policy, rows, settings, journal)
    clock.lap("preflight")
    probe = _probe(plan, settings, policy, tokenizer, journal, resumes)
    clock.lap("probe")
    reference, how = _reference(plan, settings, policy, other, budget, journal)
    if rows is not None and (rollouts or reference is not None) and settings["reference"].reference_model is None:
        journal.say_all("preflight", preflight.check_start(plan.objective, actor, reference, rows))
    clock.lap("reference")
    if not resumes:
        clear(out, journal)
    peak = _peak(plan.objective, settings["loop"], policy.model)
    watching = _watched(plan, settings, peak, out, journal, resumes)
    best = Best(metric_to_keep(run, objective), out, actor, tokenizer) if run.keep == "best" else None
    if words := _critic_rate(actor, settings["loop"], peak):
        journal.say(words)
    journal.begin(plan.steps)
    following = Following(settings["reference"], reference, policy) if _moves(settings) else None
    models, listening = Models(actor, reference), (best, following, clock, watching, probe)
    work = Work(plan, settings, models, budget, peak, rollouts, journal, *listening)
    return work, tokenizer, critic_tokenizer, how


def _check_policy(policy: Policy, rows: Batch, settings: dict[str, Any], journal: Journal) -> None:
    """The step-0 checks of a policy, and of its sampler where it writes the completions."""
    journal.say_all("preflight", preflight.check_policy(policy, rows))
    if "rollout" in settings:
        options = settings["rollout"]
        lines = preflight.check_sampler(policy, rows, options.sampling.truncated, options.sampler == "local")
        journal.say_all("preflight", lines)


def _summary(work: Work, earlier: Earlier, model_dir: Path, how: str | None) -> dict[str, Any]:
    """What summary.json holds. how: where the reference comes from."""
    actor: Any = work.models.policy
    rollouts, watching = work.rollouts, work.watching
    return {
        "objective": work.plan.objective.facts.name,
        "settled": work.plan.settled,
        "model": str(model_dir),
        **_numbers(work.journal, work.best, work.plan),
        **(rollouts.summary() if rollouts else {}),
        **(watching.summary() if watching else {"findings": None, "stalled": None}),
        "learning_rate": work.peak,
        "reference": how,
        "layout": getattr(actor, "policy", actor).layout,
        "seconds": work.clock.laps,
        "resumed_at": earlier.resumed,
        "inexact": earlier.inexact,
    }


def is_online(objective: Any) -> bool:
    """Whether the policy writes the completions itself."""
    return bool(objective.facts.data == "prompts")


def _rollouts(plan: Plan, settings: dict[str, Any], rewards: list[Any], journal: Journal) -> online.Rollouts | None:
    """What samples and scores completions, closed with the journal; None where the data holds them."""
    if not is_online(plan.objective):
        return None
    rollouts = online.Rollouts(plan, settings, rewards, journal)
    journal.stack.callback(rollouts.close)
    return rollouts


def repeats(actor: Any) -> bool:
    """Whether a forward pass computes a prompt anew for each of its completions."""
    return bool(getattr(actor, "repeats", actor.layout == "padded"))


def _loaded(plan: Plan, settings: dict[str, Any], journal: Journal) -> tuple[Policy, Any]:
    """The policy and its tokenizer, once the rows are known to fit."""
    loaded = load_model(settings["run"].model, settings["model"], ranks.device(), plan.objective.facts.head)
    loaded.tokenizer.chat_template = plan.tokenizer.chat_template
    policy = _policy(loaded, settings, plan.objective, journal)
    _refuse_long_rows(policy, plan, _answer_tokens(plan.objective, settings))
    return policy, loaded.tokenizer  # not the plan's: a score head comes with padding of its own


def _with_critic(
    policy: Policy, plan: Plan, settings: dict[str, Any], tokenizer: Any, journal: Journal
) -> tuple[Any, Any]:
    """What is trained, the policy with a critic where the objective has one, and the tokenizer of such a critic."""
    if not plan.objective.facts.critic:
        return policy, None
    from prefopt.models.critic import build

    made = build(policy, settings["critic"], settings["model"], tokenizer)
    journal.say(made.words)
    return made.actor, made.tokenizer


def _first_rows(plan: Plan, settings: dict[str, Any], rollouts: online.Rollouts | None) -> Batch:
    """The rows that preflight checks: some of the first update's."""
    least = plan.objective.facts.least
    if rollouts:
        first = rollouts.first_rows()
    else:
        first, _ = next(iter(source_of(plan.data, settings["loop"], settings["run"].seed, least).batches()))
    return preflight.sample(first, least).to(ranks.device())


def _moves(settings: dict[str, Any]) -> bool:
    """Whether the reference follows the policy."""
    return settings["reference"].reference_sync_steps is not None


def _watched(
    plan: Plan, settings: dict[str, Any], peak: float, out: Path, journal: Journal, resumes: bool
) -> Watching | None:
    """The watch of a run; None where it is off."""
    if settings["watch"].watch == "off":
        return None
    facts = run_facts(plan.objective, settings, peak, plan.steps, len(plan.data))
    watching = Watching(settings["watch"], facts, out, journal)
    if not resumes:
        watching.clear()
    return watching


def _probe(
    plan: Plan, settings: dict[str, Any], policy: Policy, tokenizer: Any, journal: Journal, resumes: bool
) -> Probe | None:
    """Answers of the start model, from weights that are still whole on each process; None where there are none."""
    probe = probe_for(policy, settings, plan.held_out)
    if probe is not None and not resumes:
        journal.say(probe.start(tokenizer))
    return probe


def _publish(result: Result, plan: Plan, settings: dict[str, Any], tokenizer: Any, journal: Journal) -> None:
    """Summary and model card, from the first process, and the upload if there is to be one."""
    run: RunOptions = settings["run"]
    if ranks.is_main():
        text = written_text(plan.objective.facts.head, plan.data, tokenizer)
        summary = result.model_dir.parent / "summary.json"
        try:
            write_card(result.model_dir, plan.objective, settings, result.summary, text)
            write_json(summary, result.summary)  # last: it says that the run is done
            sync(summary)  # before its checkpoints go
            sync(summary.parent)
        except OSError as error:
            raise InputError(
                f"{result.model_dir.parent}: cannot write there ({error.strerror}); the model is there, its card and "
                "summary.json are not; make room, and the same command, without overwrite=true, goes on from the "
                "newest checkpoint"
            ) from error
        remove_state(result.model_dir.parent)  # the result is there
    ranks.barrier()
    if run.push_to_hub and ranks.is_main():
        _push(result.model_dir, run.push_to_hub, run.hub_private, journal.say)


def _numbers(journal: Journal, best: Best | None, plan: Plan) -> dict[str, Any]:
    """Metrics at the start and of the weights that were kept, and what they were measured on."""
    data, held_out = plan.data, plan.held_out
    return {
        "start": journal.first,
        "end": {**journal.last, **(best.metrics if best else {})},
        "best_step": best.step if best else None,
        "data": {"rows": len(data), "shape": data.shape, "dropped": data.dropped, "source": data.source},
        "held_out_rows": 0 if held_out is None else len(held_out),
        "steps": plan.steps,
    }


def metric_to_keep(run: RunOptions, objective: Any) -> str:
    """The metric that decides keep: best."""
    return run.eval_metric or ("eval/reward" if is_online(objective) else "eval/loss")


def _settings(objective: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Every section's dataclass from flat options."""
    given = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    facts = objective.facts
    return {"objective": objective, **config.resolve(config.run_sections(facts.data, facts.critic), given)}


def _refuse_contradictions(objective: Any, settings: dict[str, Any]) -> None:
    """Contradictions between options, before anything is loaded."""
    run: RunOptions = settings["run"]
    reference: ReferenceOptions = settings["reference"]
    adapted = settings["lora"].lora_rank or (Path(run.model) / "adapter_config.json").exists()
    if reference.reference == "adapter" and not adapted:
        raise InputError("reference: adapter needs lora_rank or an adapter directory as model; use reference: cache")
    if reference.reference == "adapter" and reference.reference_model:
        raise InputError("reference: adapter contradicts reference_model; use reference: cache or copy")
    if not needs_reference(objective) and reference != ReferenceOptions():
        why = " with beta 0; set beta above 0, or" if objective.facts.reference else ";"
        raise InputError(f"{objective.facts.name} reads no reference{why} leave out the options that begin with it")
    if is_online(objective):
        online.refuse_contradictions(objective, settings)
    if reference.reference == "cache" and objective.facts.live:
        raise InputError(
            f"reference: cache cannot serve {objective.facts.name}, which scores new pairings of prompts and answers "
            "in every update; use reference: copy, or adapter with lora_rank"
        )
    if reference.reference_sync_steps:
        _refuse_moving_reference(settings, adapted)
    elif reference.reference_mixup != ReferenceOptions.reference_mixup:
        raise InputError(
            "reference_mixup is read where the reference moves; give reference_sync_steps, or leave it out"
        )
    if settings["loop"].batch_size < objective.facts.least:
        raise InputError(
            f"batch_size: {objective.facts.name} needs at least {objective.facts.least} prompts in an update, got "
            f"{settings['loop'].batch_size}"
        )
    if settings["loop"].eval_every and run.eval_data is None and not run.eval_fraction:
        raise InputError("eval_every needs held-out rows; give eval_data or an eval_fraction above 0")
    if run.keep == "best":
        _refuse_metric(metric_to_keep(run, objective))
    if settings["lora"] != LoraOptions() and (Path(run.model) / "adapter_config.json").exists():
        raise InputError(
            f"{run.model}: an adapter is continued as it is; leave out lora_rank, lora_alpha, lora_targets"
        )
    if not settings["lora"].lora_rank and settings["lora"] != LoraOptions():
        raise InputError("lora_alpha and lora_targets need a lora_rank above 0")


def _refuse_metric(name: str) -> None:
    """InputError, naming those that can, if a metric cannot tell which of two evaluations is better."""
    measured = [f"eval/{each}" for each in METRICS if each not in ("tokens_per_second", "tokens")]
    if name not in measured and not name.startswith("eval/reward/"):
        raise InputError(f"eval_metric: {name} is not measured; choose one of {with_a_better_way(measured)}")
    if find(name).sign == "neither":
        raise InputError(
            f"eval_metric: neither a high nor a low {name} is better by itself; choose one of "
            f"{with_a_better_way(measured)}"
        )


def _refuse_moving_reference(settings: dict[str, Any], adapted: Any) -> None:
    if settings["reference"].reference not in ("auto", "copy"):
        raise InputError("reference_sync_steps moves a copy of the weights; use reference: copy")
    if adapted or settings["model"].shard:
        what = "shard" if settings["model"].shard else "an adapter"
        raise InputError(f"reference_sync_steps mixes whole weights and does not work with {what}; leave one out")


def _refuse_long_rows(policy: Policy, plan: Plan, answer_tokens: int) -> None:
    """InputError if a row is longer than the model's context: positions it never saw, or has no embedding for.

    answer_tokens: of an answer that is yet to be written.
    """
    limit = getattr(text_config(policy.inner), "max_position_embeddings", None)
    rows = _examples(plan)
    longest = max(len(example.prompt) + max(map(len, example.completions), default=answer_tokens) for example in rows)
    if limit is not None and longest > limit:
        what = f"a prompt and max_tokens={answer_tokens} make" if answer_tokens else "a row has"
        raise InputError(f"{what} {longest} tokens and the model's context is {limit}; set max_length={limit}")


def _read(objective: Any, settings: dict[str, Any], tokenizer: Any) -> tuple[Dataset, Dataset | None]:
    """Training rows and held-out rows (None if there are none)."""
    run: RunOptions = settings["run"]
    options: DataOptions = settings["data"]
    kind, room = objective.facts.data, _answer_tokens(objective, settings)
    data = load(run.data, tokenizer, kind, options, answer_tokens=room)
    if run.eval_data is not None:
        return data, load(run.eval_data, tokenizer, kind, options, held_out=True, answer_tokens=room)
    # one row cannot be parted, nor so few that a held-out update would take them all
    if not run.eval_fraction or len(data.examples) <= objective.facts.least:
        return data, None
    return split(data, max(run.eval_fraction, objective.facts.least / len(data.examples)), run.seed)


def _answer_tokens(objective: Any, settings: dict[str, Any]) -> int:
    """Tokens of an answer that is yet to be written; 0 where the data holds the answers."""
    return settings["rollout"].max_tokens if is_online(objective) else 0


def _easier(objective: Any, settings: dict[str, Any], tokenizer: Any, say: Callable[[str], None]) -> Dataset | None:
    """The prompts to mix in, where any are named."""
    if not is_online(objective) or settings["rollout"].easier_data is None:
        return None
    room = _answer_tokens(objective, settings)
    found = load(settings["rollout"].easier_data, tokenizer, "prompts", settings["data"], answer_tokens=room)
    say(f"easier prompts\n{found.describe()}")
    return found


def _refuse_few_rows(objective: Any, run: RunOptions, data: Dataset, held_out: Dataset | None) -> None:
    """InputError unless there are rows enough to train on and, where any are held out or must be, to evaluate on."""
    least, name = objective.facts.least, objective.facts.name
    if run.keep == "best" and held_out is None:
        raise InputError(
            f"{run.data}: keep: best needs held-out rows and there are too few to hold any out ({len(data)}); "
            "give eval_data"
        )
    if held_out is not None and run.eval_data is None and min(len(data), len(held_out)) < least:
        raise InputError(
            f"{data.source}: {len(held_out)} of {len(held_out) + len(data)} rows are held out, and {name} needs at "
            f"least {least} on either side; give more rows, eval_data, or eval_fraction=0"
        )
    for one in (data, held_out):
        if one is not None and len(one) < least:
            raise InputError(f"{one.source}: {name} needs at least {least} rows, got {len(one)}; give more")


def _one_sided(data: Dataset) -> str:
    """A line for the log where all labelled steps are right, or all wrong; empty otherwise."""
    labels = [label for e in data.examples for own in e.steps or [] for label in own if not math.isnan(label)]
    found = sorted({label > 0.5 for label in labels})
    if len(found) != 1:
        return ""
    here, other = ("right", "wrong") if found[0] else ("wrong", "right")
    return (
        f"{data.source}: all {len(labels):,} steps are labelled {here}, so {other}_accuracy is not measured on them; "
        f"from these alone a model learns to call every step {here}"
    )


def _examples(plan: Plan) -> list[Example]:
    """Every row of the run, held out or not."""
    others = [one for one in (plan.held_out, plan.easier) if one]
    return [*plan.data.examples, *(example for one in others for example in one.examples)]


def _policy(loaded: Loaded, settings: dict[str, Any], objective: Any, journal: Journal) -> Policy:
    model = adapt(loaded.model, settings["lora"], loaded.adapter)
    wanted = extras(objective)
    heat = settings["rollout"].temperature if is_online(objective) else 1.0
    policy = Policy(model, entropy="entropy" in wanted, collision="collision" in wanted, temperature=heat)
    choice = choose(policy, settings["model"].layout)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    journal.say(f"model: {total:,} parameters, {trained:,} trained, {dtype} on {policy.device}")
    journal.say(f"layout: {choice.reason}")
    if ranks.world() > 1:
        journal.say(f"processes: {ranks.world()}, batch_size is over all of them")
    return policy


def _reference(
    plan: Plan, settings: dict[str, Any], policy: Policy, other: Policy | None, budget: Budget, journal: Journal
) -> tuple[Any, str | None]:
    """The reference and where it comes from, in words; (None, None) for objectives without one. other: see `_other`."""
    if not needs_reference(plan.objective):
        _shard(policy, settings["model"], journal)
        return None, None
    options: ReferenceOptions = settings["reference"]
    reference, how = pick(options, policy, budget, other, plan.objective.facts.live)
    if options.reference_sync_steps:
        how += f", moved every {options.reference_sync_steps} updates"
    journal.say(f"reference: {how}")
    _shard(policy, settings["model"], journal)  # after the weights were hashed or copied
    if isinstance(reference, Cached):
        examples = _examples(plan)
        with progress("reference log-probs", len(examples)) as advance:
            computed = reference.fill(examples, budget, advance)
        journal.say(f"reference: {len(examples) - computed:,} rows from the cache, {computed:,} computed")
        reference.release()
    return reference, how


def _other(settings: dict[str, Any], policy: Policy, plan: Plan) -> Policy | None:
    """The reference_model; None where there is none, or no reference is needed.

    InputError unless it has the model's tokenizer, and its shapes where the two are mixed.
    """
    options: ReferenceOptions = settings["reference"]
    if options.reference_model is None or not needs_reference(plan.objective):
        return None
    loaded = load_model(options.reference_model, settings["model"], ranks.device())
    if loaded.tokenizer.get_vocab() != plan.tokenizer.get_vocab():
        raise InputError(f"{options.reference_model}: its tokenizer is not the model's, so it cannot be the reference")
    model = loaded.model if loaded.adapter is None else adapt(loaded.model, LoraOptions(), loaded.adapter)
    if options.reference_sync_steps and _shapes(model) != _shapes(policy.model):
        raise InputError(
            f"{options.reference_model}: its weights differ in shape from the model's, so reference_sync_steps "
            "cannot mix the two; give a model of the same architecture, or leave one of them out"
        )
    other = Policy(model.requires_grad_(False), temperature=policy.temperature)
    choose(other, settings["model"].layout)
    return other


def _shapes(model: Any) -> list[tuple[int, ...]]:
    return [tuple(p.shape) for p in model.parameters()]


def _shard(policy: Policy, options: ModelOptions, journal: Journal) -> None:
    if options.shard:
        journal.say(f"sharding: {shard(policy.model)} decoder layers over {ranks.world()} processes")


def _steps(settings: dict[str, Any], rows: int, objective: Any) -> int:
    """Updates in all. rows: of the training data, of which each comes once an epoch, beside easier ones."""
    loop: LoopOptions = settings["loop"]
    if loop.max_steps is not None:
        return loop.max_steps
    if is_online(objective):
        options = settings["rollout"]
        share = 1 - options.easier_share if options.easier_data is not None else 1.0
        return math.ceil(loop.epochs * rows / share / loop.batch_size) * int(options.rollout_passes)
    return math.ceil(loop.epochs * steps_per_epoch(rows, loop.batch_size, objective.facts.least))


def _peak(objective: Any, loop: LoopOptions, model: Any) -> float:
    if loop.learning_rate is not None:
        return loop.learning_rate
    default: float = objective.facts.learning_rate
    return default * 10 if is_adapted(model) else default


def _critic_rate(actor: Any, loop: LoopOptions, peak: float) -> str:
    """A line for the log where the higher default of adapters is the rate of a critic that has none; else empty."""
    if loop.learning_rate is not None or getattr(actor, "critic", None) is None or not is_adapted(actor.policy.model):
        return ""
    return (
        f"critic: trained whole at the adapter's learning rate, {peak:g}; critic=shared has no weights of its own to "
        "move too fast, or set learning_rate"
    )


def _push(folder: Path, name: str, private: bool, say: Callable[[str], None]) -> None:
    from huggingface_hub import HfApi

    again = shlex.join(["hf", "upload", *(["--private"] if private else []), name, str(folder), "."])
    say(f"uploading {folder} to {name}; should that be cut off, `{again}` does it again")
    try:
        api = HfApi()
        api.create_repo(name, exist_ok=True, private=private)
        api.upload_folder(repo_id=name, folder_path=folder)
    except Exception as error:  # whatever the network or the hub does, the files stay and the command to retry is said
        raise InputError(f"{name}: the upload failed ({error}); the model is safe; retry with `{again}`") from error
