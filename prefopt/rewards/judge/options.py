"""What a judge is asked, where, and how patiently."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prefopt.endpoint import Patience, require_name
from prefopt.records import InputError

MODES = ("rubric", "pairwise", "ranking")


@dataclass(frozen=True)
class JudgeOptions:
    """A language model behind an OpenAI-compatible server that judges completions (Zheng et al. 2023,
    arXiv:2306.05685).
    """

    # the server's address as OpenAI clients take it, /v1 included
    judge_url: str = "http://127.0.0.1:8000/v1"
    # the model to ask; empty takes the one model that the server lists
    judge_model: str = ""
    # rubric: a score for each completion, one call each; pairwise: each two of a prompt's completions in both orders,
    # the most dependable and the most calls; ranking: all of a prompt's completions at once, in two orders
    judge_mode: Literal["rubric", "pairwise", "ranking"] = "rubric"
    # what a good answer is: a text file with one principle a line, or the principles; empty asks for helpfulness,
    # honesty and harmlessness
    principles: str | list[str] = ""
    # rubric: criteria to score one by one, each `name` or `name: what it means`; a text file with one a line, or the
    # criteria; empty asks for one overall score
    judge_criteria: str | list[str] = ""
    # pairwise: opponents of each completion; fewer cost less and say less, 0 takes all others
    judge_opponents: int = 0
    # environment variable that holds the server's key; empty sends none
    judge_key_variable: str = ""
    # folder where answers are kept, so that a question is paid for once; empty keeps none
    judge_cache: str = ""
    # longest answer of the judge in tokens; a judge that thinks before it answers needs thousands
    judge_max_tokens: int = 512
    # 0 gives the judge's likeliest verdict; above, verdicts vary from call to call
    judge_temperature: float = 0.0
    # longest prompt or completion in characters; a longer one is not judged, rather than judged by a part of it
    judge_max_chars: int = 32_000
    # seconds for one question, retries included; longer helps with a slow judge
    judge_timeout: float = 60.0
    # seconds for all questions of a batch; what is not answered by then is not scored
    judge_deadline: float = 300.0
    # further tries after a busy or failing answer; more help with a flaky server, and take longer
    judge_retries: int = 4
    # questions under way at once; more are faster until the server answers 429
    judge_concurrency: int = 16
    # questions begun per second; 0 sets no limit
    judge_per_second: float = 0.0

    def __post_init__(self) -> None:
        if self.judge_mode not in MODES:
            raise ValueError(f"judge_mode must be one of {', '.join(MODES)}, got {self.judge_mode!r}")
        for name in ("judge_max_tokens", "judge_max_chars", "judge_concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("judge_timeout", "judge_deadline"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be seconds above 0, got {getattr(self, name)}")
        for name in ("judge_opponents", "judge_temperature", "judge_retries", "judge_per_second"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        require_name("judge_key_variable", self.judge_key_variable)

    @property
    def patience(self) -> Patience:
        return Patience(
            call=self.judge_timeout,
            retries=self.judge_retries,
            concurrency=self.judge_concurrency,
            per_second=self.judge_per_second,
        )


def listed(given: str | list[str], name: str) -> list[str]:
    """The lines of a file, or the list as it is, without empty ones. InputError where the file cannot be read."""
    if isinstance(given, list):
        lines = given
    elif not given:
        lines = []
    else:
        try:
            lines = Path(given).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise InputError(f"{name}: {given} is not a text file that can be read: {error}") from None
    found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if given and not found:
        raise InputError(f"{name}: {given} holds no line; write one a line, or leave {name} out")
    return found
