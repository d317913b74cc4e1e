"""A trained reward model as a reward."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt import ranks
from prefopt.data import DataOptions
from prefopt.data import load as load_data
from prefopt.data.columns import Record
from prefopt.data.template import Encoder
from prefopt.evaluate.rewards import completion_scores
from prefopt.loop import LoopOptions, budget_for
from prefopt.models.adapters import LoraOptions, adapt
from prefopt.models.load import ModelOptions, head_of, load
from prefopt.models.policy import Policy, choose, text_config
from prefopt.records import Example, InputError, Sample, Score, text_of

log = logging.getLogger("prefopt")
USUAL = ModelOptions()


@dataclass(frozen=True)
class RewardModelOptions:
    """How a reward model scores completions."""

    # longest prompt with its completion, in the reward model's tokens; a longer one is not scored, rather than scored
    # by a part of it. None takes the model's context
    reward_model_length: int | None = None
    # tokens per forward pass; more are faster until memory runs out. None: 8192 on a GPU, 2048 on a CPU
    reward_model_tokens: int | None = None
    # scores less a mean, over a standard deviation: those of `first` (the first batch scored), of a file of
    # demonstrations, or given as mean,deviation; empty leaves scores as they are
    reward_model_scale: str = ""

    def __post_init__(self) -> None:
        for name in ("reward_model_length", "reward_model_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


class RewardModelReward:
    """Scores completions by a model from `prefopt train reward`, whose tokenizer and chat template it uses.

    source: its directory, an adapter's, or a hub name. A completion that was cut is read as if it ended there. mean,
    deviation: what scores are normalised by, None until the first batch with reward_model_scale=first.
    """

    def __init__(
        self,
        source: str | Path,
        model_options: ModelOptions = USUAL,
        options: RewardModelOptions = RewardModelOptions(),
    ) -> None:
        head = head_of(source, model_options)
        if head != "completion":
            raise InputError(
                f"{source}: not a reward model; train one with `prefopt train reward --model {source} --data PAIRS` "
                "and give its directory"
            )
        loaded = load(source, model_options, ranks.device(), head)
        self.name, self.source, self.options = _name(Path(source)), str(source), options
        self.policy: Any = Policy(adapt(loaded.model, LoraOptions(), loaded.adapter))
        self.policy.model.requires_grad_(False)
        self.encoder = Encoder(loaded.tokenizer)
        self.layout = choose(self.policy, model_options.layout).reason
        self.budget = budget_for(LoopOptions(tokens_per_forward=options.reward_model_tokens), ranks.device())
        context = getattr(text_config(self.policy.inner), "max_position_embeddings", None)
        self.longest: int | None = options.reward_model_length or context
        self.mean, self.deviation = self._scale()

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        records = [self._record(sample) for sample in samples]
        scores = self._raw(records)
        if self.mean is None:
            self.mean, self.deviation = _spread(scores, "the first batch")
            log.info("%s: scores less %.4g, over %.4g: of the first batch", self.name, self.mean, self.deviation)
        return [self._normal(score) for score in scores]

    def close(self) -> None:
        """Let go of the model's memory."""
        self.policy = None

    def _raw(self, records: Sequence[Record | str]) -> list[Score]:
        """The model's own scores; a text stands for a record that there is none of, and says why."""
        scores = [Score(None, record) if isinstance(record, str) else Score(None) for record in records]
        rendered, places = [], []
        for place, record in enumerate(records):
            if isinstance(record, str):
                continue
            try:
                rendered.append(self.encoder.render(record, "completions"))
                places.append(place)
            except InputError as error:
                scores[place] = Score(None, str(error))
        fit: list[tuple[int, Example]] = []
        for place, example in zip(places, self.encoder.encode(rendered), strict=True):
            why = str(example) if isinstance(example, InputError) else self._too_long(example)
            if why:
                scores[place] = Score(None, why)
            elif isinstance(example, Example):
                fit.append((place, example))
        for place, value in self._values(fit):
            finite = math.isfinite(value)
            scores[place] = Score(value) if finite else Score(None, "the reward model's score is not a finite number")
        return scores

    def _values(self, fit: Sequence[tuple[int, Example]]) -> list[tuple[int, float]]:
        """Places and scores. Completions of one prompt go through the model together, which reads it once."""
        if not fit:
            return []
        groups: dict[tuple[int, ...], list[tuple[int, Example]]] = {}
        for place, example in fit:
            groups.setdefault(tuple(example.prompt), []).append((place, example))
        pieces = [piece for group in groups.values() for piece in _pieces(group, self.budget.tokens)]
        joined = [_joined([example for _, example in piece]) for piece in pieces]
        smallest = max(example.num_tokens for _, example in fit)
        found = self.budget.run(lambda tokens: completion_scores(self.policy, joined, tokens), smallest)
        return list(zip([place for piece in pieces for place, _ in piece], found.tolist(), strict=True))

    def _record(self, sample: Sample) -> Record | str:
        if not text_of(sample.completion).strip():
            return "an empty completion"
        if isinstance(sample.prompt, str) is not isinstance(sample.completion, str):
            return "prompt and completion are not both texts or both messages"
        prompt, completion = (
            said if isinstance(said, str) else [dict(turn) for turn in said]
            for said in (sample.prompt, sample.completion)
        )
        return Record("a completion", prompt, [completion], [math.nan])

    def _too_long(self, example: Example) -> str:
        if self.longest is None or example.num_tokens <= self.longest:
            return ""
        return f"{example.num_tokens} tokens, where the reward model reads {self.longest}"

    # -- normalisation

    def _normal(self, score: Score) -> Score:
        if score.value is None or not self.options.reward_model_scale or not self.deviation or self.mean is None:
            return score
        return Score((score.value - self.mean) / self.deviation, parts={"raw": score.value})

    def _scale(self) -> tuple[float | None, float | None]:
        """Mean and deviation to normalise by; 0 and 1 for none, None for those of the first batch."""
        said = self.options.reward_model_scale
        if not said:
            return 0.0, 1.0
        if said == "first":
            if ranks.active():
                raise InputError(
                    "reward_model_scale=first differs from process to process; give a file of demonstrations, or "
                    "mean,deviation"
                )
            return None, None
        numbers = _two_numbers(said)
        if numbers is None and not Path(said).exists():
            raise InputError(f"reward_model_scale: {said!r} is not first, mean,deviation nor a file of demonstrations")
        mean, deviation = numbers or self._of_demonstrations(said)
        if not (math.isfinite(mean) and 0 < deviation < math.inf):
            raise InputError(f"reward_model_scale: a mean of {mean} and a deviation of {deviation} scale nothing")
        return mean, deviation

    def _of_demonstrations(self, path: str) -> tuple[float, float]:
        data = load_data(path, self.encoder.tokenizer, "demonstrations", DataOptions(max_length=self.longest))
        values = completion_scores(self.policy, data.examples, self.budget.tokens).tolist()
        mean, deviation = _spread([Score(value) for value in values], path)
        log.info("%s: scores less %.4g, over %.4g: of %d demonstrations", self.name, mean, deviation, len(values))
        return mean, deviation


def _name(source: Path) -> str:
    """The run's name where the model lies in a run's folder, since all of those are called `model`."""
    return source.resolve().parent.name if source.name == "model" else source.name


def _spread(scores: Sequence[Score], where: str) -> tuple[float, float]:
    """Mean and standard deviation of the scores there are. InputError where they tell no deviation."""
    values = [score.value for score in scores if score.value is not None]
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    if not deviation > 0:
        raise InputError(f"reward_model_scale: {len(values)} scores of {where} have no spread to normalise by")
    return statistics.fmean(values), deviation


def _two_numbers(said: str) -> tuple[float, float] | None:
    try:
        mean, deviation = map(float, said.split(","))
    except ValueError:
        return None
    return mean, deviation


def _pieces(group: Sequence[tuple[int, Example]], tokens: int) -> list[list[tuple[int, Example]]]:
    """A prompt's completions in pieces of at most so many tokens, the prompt counted in each, and at least one each."""
    pieces: list[list[tuple[int, Example]]] = []
    room = 0
    for place, example in group:
        own = example.num_tokens - len(example.prompt)
        if not pieces or own > room:
            pieces.append([])
            room = tokens - len(example.prompt)
        pieces[-1].append((place, example))
        room -= own
    return pieces


def _joined(examples: Sequence[Example]) -> Example:
    """Examples of one prompt as one."""
    return Example(
        examples[0].prompt,
        [tokens for one in examples for tokens in one.completions],
        [math.nan] * len(examples),
        [flags for one in examples for flags in one.trained],
    )
