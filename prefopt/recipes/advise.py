"""Looks at data, model and machine, ranks methods, and writes the recipes of the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from prefopt import config, ranks
from prefopt.advice import data as data_side
from prefopt.advice import model as model_side
from prefopt.advice.case import Case
from prefopt.advice.machine import device_memory
from prefopt.advice.passes import Row
from prefopt.advice.ranking import Advice, changes, rank, refused
from prefopt.advice.rules import METHODS
from prefopt.advice.stages import Stage, stages
from prefopt.data import DataOptions, Dataset, load
from prefopt.data import read as reading
from prefopt.models.load import Loaded, ModelOptions, load_tokenizer, tokenizer_source
from prefopt.models.load import load as load_model
from prefopt.models.policy import Policy, choose, text_config
from prefopt.recipes.estimate import COMPLETIONS, Estimate, estimate
from prefopt.records import InputError, Sample
from prefopt.rewards import RewardOptions, build
from prefopt.rewards.options import BUILT_IN

NOTHING: Mapping[str, Any] = MappingProxyType({})
PIECES = 4096  # of a tokenizer made from the rows, where no model is named
READ = 2000  # rows that it is made from
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Advised:
    """stages: the runs of the first method that can be trained, empty where no model is named or none can."""

    case: Case
    ranking: list[Advice]
    changes: list[str]
    stages: list[Stage]


def advise(
    source: str,
    model: str | None,
    options: DataOptions,
    how: ModelOptions,
    *,
    reward: str | None = None,
    room: int | None = None,
    folder: str = "runs/advised",
    typed: Mapping[str, Any] = NOTHING,
) -> Advised:
    """Everything `prefopt advise` says. InputError for data or a model that cannot be read.

    reward: what the user can reward new answers by. room: bytes that a run may take, instead of what is free. folder:
    begins the names of the runs' folders. typed: options that the recipes repeat, as they were given.
    """
    if reward is not None and reward not in (*BUILT_IN, "judge") and not Path(reward).is_dir():
        build(RewardOptions(), [reward]).close()  # InputError for one that there is not
    tokenizer = stand_in(source) if model is None else load_tokenizer(tokenizer_source(model), how)
    if model is None and "max_length" not in typed:
        options = replace(options, max_length=None)  # a stand-in's tokens say nothing of what fits
    facts = data_side.look(source, tokenizer, options)
    device, free = device_memory()
    case = Case(facts, reward=reward, device=device, room=free if room is None else room)
    positions = None
    if model is not None:
        loaded = load_model(model, how, ranks.device())
        positions = getattr(text_config(loaded.model), "max_position_embeddings", None)
        if positions is not None and positions < (options.max_length or positions + 1):
            options = replace(options, max_length=positions)
            case = replace(case, data=data_side.look(source, tokenizer, options))
        case = look_at_model(loaded, source, case, options)
        del loaded
        case = replace(case, memory=memories(case, model, source))
    ranking = rank(case)
    first = next((advice for advice in ranking if not advice.refused), None)
    made = [] if first is None or model is None else stages(case, first.name, model, source, folder, positions)
    return Advised(case, ranking, changes(case), [fitted(stage, case, model or "", typed) for stage in made])


# ---------------------------------------------------------------- the model


def look_at_model(loaded: Loaded, source: str, case: Case, options: DataOptions) -> Case:
    """The case with the model's figures and, with a checker, how many of its answers and of the rows' pass."""
    policy = Policy(loaded.model)
    choose(policy)
    limit = getattr(text_config(loaded.model), "max_position_embeddings", None)
    short = replace(options, max_length=min(filter(None, (options.max_length, limit)), default=None))
    kind = case.data.kind if case.data.kind != "steps" else "prompts"
    wanted: Any = "completions" if kind != "prompts" else "prompts"
    rows = load(source, loaded.tokenizer, wanted, short, answer_tokens=model_side.TOKENS if wanted == "prompts" else 0)
    found, data = model_side.look(policy, loaded.tokenizer, rows.examples, kind), case.data
    if case.check in ("math", "exact"):
        room = model_side.TOKENS if short.max_length is None else min(model_side.TOKENS, short.max_length // 2)
        prompts = load(source, loaded.tokenizer, "prompts", short, answer_tokens=room)
        found = replace(found, solved=solved(policy, loaded.tokenizer, prompts, case.check))
        data = replace(data, passing=passing(rows, prompts, case.check))
    return replace(case, model=found, data=data)


def solved(policy: Any, tokenizer: Any, prompts: Dataset, check: str) -> float | None:
    """Share of the model's own answers that the checker passes; None where none could be scored."""
    number = min(model_side.ROWS, len(prompts.examples))
    drawn = model_side.samples(policy, tokenizer, prompts.examples[:number], 0)
    return accepted(
        check,
        [
            Sample(row.prompt or "", tokenizer.decode(own.tokens, skip_special_tokens=True), columns=row.extra, group=n)
            for n, (row, own) in enumerate(zip(prompts.rows[:number], drawn, strict=True))
        ],
    )


def passing(rows: Dataset, prompts: Dataset, check: str) -> float | None:
    """Share of the rows' better answers that the checker passes; None where none could be scored.

    prompts: the same rows with all of their columns.
    """
    columns = {row.where: row.extra for row in prompts.rows}
    good = [
        Sample(row.prompt or "", row.completions[row.scores.index(max(row.scores))], columns=columns[row.where])
        for row in rows.rows
        if row.completions and max(row.scores) > 0.5 and row.where in columns
    ]
    return accepted(check, good[: model_side.CHECKED])


def accepted(check: str, given: Sequence[Sample]) -> float | None:
    """Share of those samples that the checker can score which it passes."""
    reward = build(RewardOptions(math_answer=["boxed", "hashes", "line", "number"]), [check])
    try:
        values = [score.value for score in reward(given) if score.value is not None] if given else []
    finally:
        reward.close()
    return sum(value > 0.5 for value in values) / len(values) if values else None


# ---------------------------------------------------------------- the machine


def memories(case: Case, model: str, source: str) -> dict[str, int]:
    """Bytes that each method's largest run would take at its defaults, on rows of the usual length."""
    found = {}
    for name, method in METHODS.items():
        if not refused(case, method):
            made = stages(case, name, model, source, "runs/none")
            found[name] = max(reckoned(stage, case, model).memory.peak.total for stage in made)
    return found


def reckoned(stage: Stage, case: Case, model: str) -> Estimate:
    """The estimate of a stage, whose own model may not be there yet: all are of the first one's size."""
    options = {**stage.options, "model": model, "data": ""}
    options.pop("critic_model", None)
    objective = str(options.pop("objective"))
    if "reward" in options:
        options["reward"] = []
    resolved = config.resolve(config.sections(objective), config.Layer(options))
    return estimate(resolved, case.device, case.room, rows=usual_rows(resolved, case))


def usual_rows(resolved: Mapping[str, Any], case: Case) -> list[Row]:
    """An update's rows of the usual length."""
    prompt, answer = round(case.data.prompt_tokens or 1), round(case.data.answer_tokens or 1)
    kind = resolved["objective"].facts.data
    if kind == "prompts":
        answers = (resolved["rollout"].max_tokens,) * resolved["rollout"].num_completions
    else:
        answers = (answer,) * COMPLETIONS[kind]
    return [Row(max(prompt, 1), answers)] * int(resolved["loop"].batch_size)


def fitted(stage: Stage, case: Case, model: str, typed: Mapping[str, Any]) -> Stage:
    """The stage with the options that were typed, where its objective reads them, and the cheapest that make it fit."""
    known = {option.key for option in config.describe(config.sections(str(stage.options["objective"])))}
    mine = {key: value for key, value in typed.items() if key in known}
    stage = replace(stage, options={**stage.options, **mine})
    found = reckoned(stage, case, model)
    return replace(stage, options={**stage.options, **(found.fit.options if found.fit is not None else {})})


# ---------------------------------------------------------------- files


def write(made: Sequence[Stage], path: Path) -> list[Path]:
    """The recipes, in order: one run's as `path`, of several with the number and objective in the name. InputError."""
    files = (
        [path]
        if len(made) == 1
        else [path.with_name(f"{path.stem}-{number}-{stage.name}{path.suffix}") for number, stage in enumerate(made, 1)]
    )
    for file, stage in zip(files, made, strict=True):
        body = yaml.dump(stage.options, Dumper=config.Dumper, sort_keys=False, allow_unicode=True, width=10**6)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"# {stage.why}\n{body}", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{file}: cannot write: {error.strerror or error}") from None
    return files


# ---------------------------------------------------------------- without a model


def stand_in(source: str) -> Any:
    """A tokenizer made from the rows' own texts, with a plain chat template, where no model is named."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    texts: list[str] = []
    for row in reading.read(source):
        if isinstance(row, reading.Row):
            texts += list(_texts(row.values))
        if len(texts) > READ:
            break
    made = ByteLevelBPETokenizer()
    made.train_from_iterator(texts, vocab_size=PIECES, show_progress=False, special_tokens=["</s>"])
    found = PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, eos_token="</s>")
    found.chat_template = CHATML
    return found


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in inner for text in _texts(item)]
