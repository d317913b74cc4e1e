"""What is audited, and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from prefopt.rewards.answers import Place


@dataclass(frozen=True)
class AnswerOptions:
    """Where rows have a right answer, and where completions give theirs."""

    # column with the right answer, a text or a list of them; None: answer, solution, ground_truth or target
    answer_column: str | None = None
    # text that the answer must follow in a completion, such as </think>; None: it may stand anywhere
    answer_after: str | None = None
    # where a completion gives its answer, the first that is there: boxed, hashes, line, number, all; none named: the
    # place where most answers that are labelled right have it
    math_answer: list[Place] = field(default_factory=list)


@dataclass(frozen=True)
class AuditOptions:
    """What the rows are looked at as, and what is asked of a model."""

    # what training learns from the rows; None: what they are, ratings as the pairs they make
    kind: Literal["demonstrations", "pairs", "labels", "steps", "prompts"] | None = None
    # checks to make, by name; none named: all that the rows allow
    checks: list[str] = field(default_factory=list)
    # checks to leave out, by name
    skip: list[str] = field(default_factory=list)
    # rows of each finding that the page shows; larger shows more, 0 none
    examples: int = 3
    # rows that a model is asked about, the first ones; larger takes longer, None asks about all
    model_rows: int | None = 2000
    # prompts that a model answers itself, to compare its answers with those of the rows; 0 asks for none
    model_samples: int = 32

    def __post_init__(self) -> None:
        for name in ("examples", "model_samples"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.model_rows is not None and self.model_rows < 1:
            raise ValueError(f"model_rows must be at least 1, got {self.model_rows}")
