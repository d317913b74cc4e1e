"""What advice is given on: figures of the data, the model and the machine. What was not measured is None."""

from __future__ import annotations

from dataclasses import dataclass, field

Checker = str  # a reward's name: math, exact, code, ifeval


@dataclass(frozen=True)
class DataFacts:
    """Of a file of rows, see `prefopt.advice.data`.

    kind: as an objective's facts name it. rows, prompts: how many, and how many different prompts. checker: the reward
    that can check answers by a column of the rows, and checkable: how many rows have what it needs. passing: share of
    the rows' better answers that it accepts, where the model's own were checked too. longer: how often the better
    answer is the longer one, ties as one half. ties: share of compared answers that score alike. noise: share of labels
    that must be wrong, from rows that are there more than once. shallow: how often a classifier on counts of tokens
    tells the better answer, on rows that it has not seen. good: share of labels that are good. answer_tokens,
    prompt_tokens: median lengths. notes: why something is None.
    """

    kind: str
    rows: int
    prompts: int
    checker: Checker | None = None
    checkable: int = 0
    passing: float | None = None
    longer: float | None = None
    ties: float | None = None
    noise: float | None = None
    shallow: float | None = None
    good: float | None = None
    answer_tokens: float | None = None
    prompt_tokens: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelFacts:
    """Of a model on some of the rows, see `prefopt.advice.model`. nats are per token.

    template: the tokenizer has a chat template. ends: share of its answers that end by themselves. better, worse, own:
    negative log-likelihood of the better answers, the worse ones, and its own samples. solved: share of its own samples
    that the checker passes. parameters: how many.
    """

    parameters: int
    template: bool
    ends: float | None = None
    better: float | None = None
    worse: float | None = None
    own: float | None = None
    solved: float | None = None
    samples: int = 0
    notes: tuple[str, ...] = ()

    @property
    def gap(self) -> float | None:
        """How much less likely the better answers are than what it writes itself, nats per token."""
        return None if self.better is None or self.own is None else self.better - self.own


@dataclass(frozen=True)
class Case:
    """Everything advice reads. reward: a reward for new answers that the user has, by name, None without one. room:
    bytes free, device: where. memory: bytes that each objective would take at its defaults, where they were reckoned.
    """

    data: DataFacts
    model: ModelFacts | None = None
    reward: str | None = None
    device: str = "cpu"
    room: int | None = None
    memory: dict[str, int] = field(default_factory=dict)

    @property
    def check(self) -> str | None:
        """The reward that a policy's own answers can have without any model: the user's, or a checker's."""
        if self.reward is not None:
            return self.reward
        return self.data.checker if self.checkable_share >= 0.5 else None

    @property
    def checkable_share(self) -> float:
        return self.data.checkable / self.data.rows if self.data.rows else 0.0

    @property
    def foreign(self) -> bool | None:
        """Whether the rows' better answers are far from what the model writes; None where it was not measured."""
        gap = None if self.model is None else self.model.gap
        return None if gap is None else gap > FOREIGN

    @property
    def base(self) -> bool | None:
        """Whether the model does not answer in a form yet: no chat template, or answers that do not end."""
        if self.model is None:
            return None
        return (self.model.ends is not None and self.model.ends < ENDS) or bool(
            self.foreign and not self.model.template
        )


FOREIGN = 0.5  # nats a token beyond the model's own samples: a convention
ENDS = 0.8  # share of answers that end by themselves, below which a model is taken to be a base model
