"""What a run is rewarded for, as options, and the one place that builds it."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from prefopt.records import InputError, Reward
from prefopt.rewards import format as form
from prefopt.rewards import ifeval, length
from prefopt.rewards import math as mathematics
from prefopt.rewards.answers import Place
from prefopt.rewards.exact import Ignored, exact
from prefopt.rewards.function import FunctionReward, Limits
from prefopt.rewards.mixture import Mixture

# option -> the rewards that read it; the others are read by every reward
READ_BY: Mapping[str, tuple[str, ...]] = {
    "sample_deadline": ("math", "format", "ifeval"),
    "answer_column": ("math", "exact"),
    "answer_after": ("math", "exact"),
    "math_answer": ("math",),
    "math_expressions": ("math",),
    "exact_answer": ("exact",),
    "exact_ignore": ("exact",),
    "format_tags": ("format",),
    "format_pattern": ("format",),
    "ifeval_score": ("ifeval",),
    "length_target": ("length",),
    "overlong_tokens": ("overlong",),
    "overlong_cache": ("overlong",),
    "repetition_ngram": ("repetition",),
    **{f"code_{name}": ("code",) for name in ("credit", "sandbox", "seconds", "memory", "packages")},
}

Spec = str | Reward | Callable[..., Any]
Factory = Callable[[], Reward]


@dataclass(frozen=True)
class RewardOptions:
    """What completions are rewarded for."""

    # names (math, exact, format, ifeval, code, judge, length, overlong, repetition), functions of yours as
    # file.py:function, or directories of reward models; several are added up
    reward: str | list[str] = field(default_factory=list)
    # a factor for each reward, in their order; None: 1 for all
    reward_weights: list[float] | None = None
    # seconds that a reward may take for a batch: what is not scored by then is left out, and its process killed
    reward_deadline: float = 60.0
    # seconds that math, format and ifeval may take for one completion
    sample_deadline: float = 5.0
    # processes for each reward; None: one for a function of yours, one per core, at most four, for math and the like
    reward_workers: int | None = None
    # smallest part of a batch that your function may see alone: sample; group where it compares a prompt's completions
    reward_unit: Literal["sample", "group"] = "sample"
    # GiB of memory for each process; None: half of the machine's
    reward_memory: float | None = None
    # share of a batch that may stay without a score for failures before the run stops; 1 never stops it
    reward_failures: float = 0.5
    # a reward that abstains (None from a function): skip leaves it out of the sum, drop leaves the completion out
    reward_abstain: Literal["skip", "drop"] = "skip"
    # column with the right answer, a text or a list of them; None: answer, solution, ground_truth or target
    answer_column: str | None = None
    # text that the answer must follow, such as </think>; None: it may stand anywhere
    answer_after: str | None = None
    # where math looks for the answer, the first that is there: boxed (the last \boxed{}), hashes (after ####), line (a
    # last line "Answer: ..."), number (the last one), all (the whole completion)
    math_answer: list[Place] = field(default_factory=lambda: ["boxed"])
    # whether math counts what is still to be worked out, 16+2 for 18; a policy may learn to copy the sum
    math_expressions: bool = False
    # where exact looks for the answer; the places of math_answer
    exact_answer: list[Place] = field(default_factory=lambda: ["all"])
    # what exact does not compare: case, space, punctuation, articles
    exact_ignore: list[Ignored] = field(default_factory=lambda: ["space"])
    # tags that make up a completion for format, in their order
    format_tags: list[str] = field(default_factory=lambda: ["think", "answer"])
    # regular expression that a whole completion must match for format, in place of tags; . matches line ends
    format_pattern: str | None = None
    # 1 only where all of a row's instructions are followed, or the share of them
    ifeval_score: Literal["all", "share"] = "all"
    # tokens that length asks for
    length_target: int | None = None
    # tokens from which overlong is -1, usually max_tokens, and over how many before that it falls from 0
    overlong_tokens: int | None = None
    # tokens over which the penalty of overlong grows from 0 to -1
    overlong_cache: int | None = None
    # tokens in a run that repetition counts
    repetition_ngram: int = 3
    # what code pays for: all tests together, or the share that passes
    code_credit: Literal["all", "share"] = "all"
    # how code holds programs in; best: the strictest that this machine can enforce, but never unsafe
    code_sandbox: Literal["best", "strict", "standard", "unsafe"] = "best"
    # seconds of processor time, whole, for one program of code
    code_seconds: int = 4
    # GiB of address space for one program of code
    code_memory: float = 0.5
    # packages that programs of code may import beside the standard library
    code_packages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("reward_deadline", "sample_deadline"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 seconds, got {getattr(self, name)}")
        if not 0 <= self.reward_failures <= 1:
            raise ValueError(f"reward_failures must be from 0 to 1, got {self.reward_failures}")
        for name in ("reward_memory", "code_memory"):
            if (gib := getattr(self, name)) is not None and not 0 < gib < math.inf:
                raise ValueError(f"{name} must be above 0 GiB, got {gib}")
        counts = ("length_target", "overlong_tokens", "overlong_cache", "repetition_ngram", "code_seconds")
        for name in ("reward_workers", *counts):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if (self.overlong_cache or 0) > (self.overlong_tokens or math.inf):
            raise ValueError(
                f"overlong_cache={self.overlong_cache} is more than overlong_tokens={self.overlong_tokens}"
            )
        if self.reward_weights is not None and not all(map(math.isfinite, self.reward_weights)):
            raise ValueError(f"reward_weights must be numbers, got {self.reward_weights}")

    @property
    def names(self) -> list[str]:
        return [self.reward] if isinstance(self.reward, str) else self.reward

    def limits(self, workers: int, alone: bool = False) -> Limits:
        """For a reward in processes of its own. alone: it scores each sample by itself, in a time of its own."""
        return Limits(
            seconds=self.reward_deadline,
            sample_seconds=min(self.sample_deadline, self.reward_deadline) if alone else None,
            workers=self.reward_workers or workers,
            memory=int((self.reward_memory or _half_of_memory()) * (1 << 30)),
            unit="sample" if alone else self.reward_unit,
        )


def _half_of_memory() -> float:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 31)


def build(
    options: RewardOptions, rewards: Sequence[Spec] = (), factories: Mapping[str, Factory] | None = None
) -> Mixture:
    """The reward that the options name, then what `rewards` gives: names, functions with TRL's signature, or objects
    that are rewards already.

    factories: names that only the caller can build, such as judge and the directories of reward models.
    InputError on a name that is none, with the nearest, and on an option that a reward needs.
    """
    specs = [*options.names, *rewards]
    if not specs:
        raise InputError(
            f"reward: none is named; choose from {', '.join([*BUILT_IN, *(factories or {})])}, file.py:function"
        )
    _refuse_unread(options, [spec for spec in specs if isinstance(spec, str)])
    made: list[Reward] = []
    try:
        for spec in specs:
            made.append(_build(spec, options, factories or {}))
        return Mixture(made, options.reward_weights, options.reward_abstain, options.reward_failures)
    except ValueError as error:
        for reward in made:
            reward.close()
        raise error if isinstance(error, InputError) else InputError(str(error)) from None


def _refuse_unread(options: RewardOptions, names: Sequence[str]) -> None:
    """InputError, naming the option, where one is set that none of the rewards reads."""
    usual = RewardOptions()
    for option, readers in READ_BY.items():
        if getattr(options, option) != getattr(usual, option) and not set(readers) & set(names):
            raise InputError(f"{option} is read with reward={' or '.join(readers)} only; leave it out")


def _build(spec: Spec, options: RewardOptions, factories: Mapping[str, Factory]) -> Reward:
    if not isinstance(spec, str):
        if all(hasattr(spec, part) for part in ("name", "close", "__call__")):
            return spec  # type: ignore[return-value]
        if not callable(spec):
            raise InputError(
                f"reward: {spec!r} is not one; give a name ({', '.join([*BUILT_IN, *factories])}), file.py:function, "
                "a function, or an object with name, __call__(samples) and close()"
            )
        return FunctionReward(spec, options.limits(workers=1))
    if spec in factories:
        return factories[spec]()
    if spec in BUILT_IN:
        return BUILT_IN[spec](options)
    file, colon, name = spec.rpartition(":")
    if colon and file.endswith(".py") and name.isidentifier():
        return FunctionReward(spec, options.limits(workers=1))
    known = [*BUILT_IN, *factories]
    near = difflib.get_close_matches(spec, known, 1)
    hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}, or a function as file.py:function"
    raise InputError(f"reward: {spec!r} is not one; {hint}")


def _checked(function: Any, name: str, options: RewardOptions) -> FunctionReward:
    """One of prefopt's own checks, in processes that are killed where a completion keeps it busy."""
    return FunctionReward(function, options.limits(workers=min(4, os.cpu_count() or 1), alone=True), name)


def _math(options: RewardOptions) -> Reward:
    grader = mathematics.Grader(
        answer_column=options.answer_column,
        math_answer=options.math_answer,
        answer_after=options.answer_after,
        math_expressions=options.math_expressions,
    )
    return _checked(grader, "math", options)


def _exact(options: RewardOptions) -> Reward:
    return exact(options.answer_column, options.exact_answer, options.answer_after, options.exact_ignore)


def _format(options: RewardOptions) -> Reward:
    if options.format_pattern is None:
        return form.tags(options.format_tags)
    return _checked(partial(form.match, pattern=form.compiled(options.format_pattern)), "format", options)


def _ifeval(options: RewardOptions) -> Reward:
    return _checked(partial(ifeval.follow, ifeval_score=options.ifeval_score), "ifeval", options)


def _length(options: RewardOptions) -> Reward:
    return length.length(_needed("length", length_target=options.length_target))


def _overlong(options: RewardOptions) -> Reward:
    return length.overlong(
        _needed("overlong", overlong_tokens=options.overlong_tokens),
        _needed("overlong", overlong_cache=options.overlong_cache),
    )


def _repetition(options: RewardOptions) -> Reward:
    return length.repetition(options.repetition_ngram)


def _code(options: RewardOptions) -> Reward:
    from prefopt.rewards.code import CodeReward
    from prefopt.sandbox import Limits as ProgramLimits

    # the clock allows more than the processor: other programs run at the same time
    limits = ProgramLimits(
        seconds=1.5 * options.code_seconds,
        cpu_seconds=options.code_seconds,
        memory_bytes=int(options.code_memory * (1 << 30)),
    )
    return CodeReward(
        options.code_credit,
        options.code_sandbox,
        limits,
        options.reward_deadline,
        options.reward_workers or 0,
        options.code_packages,
    )


def _needed(reward: str, **option: int | None) -> int:
    [(name, value)] = option.items()
    if value is None:
        raise InputError(f"reward {reward}: {name} is missing; set it, in tokens")
    return value


BUILT_IN: Mapping[str, Callable[[RewardOptions], Reward]] = {
    "math": _math,
    "exact": _exact,
    "format": _format,
    "ifeval": _ifeval,
    "length": _length,
    "overlong": _overlong,
    "repetition": _repetition,
    "code": _code,
}
