"""What DPO changed, measured on instructions that neither training saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from prefopt.data import load
from prefopt.evaluate.kl import KL, sequence_kl
from prefopt.evaluate.perplexity import Perplexity, perplexity
from prefopt.evaluate.preference import preference_accuracy
from prefopt.evaluate.scoring import sampled
from prefopt.evaluate.statistics import Estimate
from prefopt.evaluate.win_rate import mean_reward, win_rate
from prefopt.models.load import load as load_model
from prefopt.models.policy import Policy, choose
from prefopt.models.sampler import sample
from prefopt.recipes.quickstart.files import prompt_ids
from prefopt.recipes.quickstart.task import Instruction, Stars, stars

MAX_TOKENS = 32  # the longest line of the grammar has 17 with its end


@dataclass(frozen=True)
class Contender:
    """A trained model, as something that scores and writes."""

    policy: Policy
    tokenizer: Any

    @classmethod
    def load(cls, folder: Path) -> Contender:
        loaded = load_model(folder)
        policy = Policy(loaded.model)
        choose(policy)
        return cls(policy, loaded.tokenizer)

    def tokens(self, instructions: Sequence[Instruction], n: int, seed: int) -> list[list[list[int]]]:
        """n answers to every instruction, as token ids, at temperature 1."""
        return sample(
            self.policy.model,
            prompt_ids(self.tokenizer, instructions),
            n=n,
            max_tokens=MAX_TOKENS,
            eos_ids=[self.tokenizer.eos_token_id],
            seed=seed,
            progress=True,
        )

    def lines(self, tokens: Sequence[Sequence[list[int]]]) -> list[list[str]]:
        return [[self.tokenizer.decode(one, skip_special_tokens=True) for one in own] for own in tokens]


class Answers(NamedTuple):
    """A model's answers to the held-out instructions, [instruction][sample]."""

    tokens: list[list[list[int]]]
    lines: list[list[str]]
    stars: list[list[Stars]]

    @classmethod
    def of(cls, model: Contender, instructions: Sequence[Instruction], n: int, seed: int) -> Answers:
        tokens = model.tokens(instructions, n, seed)
        lines = model.lines(tokens)
        earned = [[stars(one, line) for line in own] for one, own in zip(instructions, lines, strict=True)]
        return cls(tokens, lines, earned)

    @property
    def rewards(self) -> list[list[float]]:
        return [[one.total for one in own] for own in self.stars]

    def rules(self) -> dict[str, float]:
        """Mean of each rule, 0 to 1."""
        flat = [one for own in self.stars for one in own]
        return {rule.name: sum(getattr(one, rule.name) for one in flat) / len(flat) for rule in fields(Stars)}

    def words(self) -> float:
        """Mean words a line."""
        counts = [len(line.split()) for own in self.lines for line in own]
        return sum(counts) / len(counts)


class BeforeAfter(NamedTuple):
    before: Any
    after: Any


@dataclass(frozen=True)
class Findings:
    """The SFT model (before) and the DPO model (after) on the held-out instructions."""

    win_rate: Estimate
    preference_accuracy: Estimate
    kl: KL
    perplexity: BeforeAfter
    perplexity_without_mistakes: BeforeAfter
    reward: BeforeAfter
    rules: BeforeAfter
    words: BeforeAfter

    def summary(self) -> dict[str, Any]:
        """For summary.json."""
        return {
            "win_rate": self.win_rate.summary(),
            "preference_accuracy": self.preference_accuracy.value,
            "preference_accuracy_interval": self.preference_accuracy.summary(),
            "kl": self.kl.value,
            "kl_standard_error": self.kl.standard_error,
            "perplexity": _both(self.perplexity),
            "perplexity_without_mistakes": _both(self.perplexity_without_mistakes),
            "reward": {key: estimate.summary() for key, estimate in self.reward._asdict().items()},
            "rules": self.rules._asdict(),
            "words": self.words._asdict(),
        }


def _both(pair: BeforeAfter) -> dict[str, float | None]:
    return {key: found.value for key, found in pair._asdict().items()}


class HeldOut(NamedTuple):
    """Files of rows for the held-out instructions."""

    demonstrations: Path
    without_mistakes: Path
    pairs: Path


def compare(
    before: Contender, after: Contender, instructions: Sequence[Instruction], files: HeldOut, n: int, seed: int
) -> tuple[Findings, Answers, Answers]:
    """Both models' answers (n samples an instruction) and all that is said of them."""
    old, new = Answers.of(before, instructions, n, seed), Answers.of(after, instructions, n, seed + 1)
    prompts = prompt_ids(after.tokenizer, instructions)
    pairs = load(files.pairs, after.tokenizer, "pairs").examples
    findings = Findings(
        win_rate=win_rate(new.rewards, old.rewards),
        preference_accuracy=preference_accuracy(after.policy, before.policy, pairs),
        kl=sequence_kl(after.policy, before.policy, sampled(prompts, new.tokens)),
        perplexity=_perplexities(before, after, files.demonstrations),
        perplexity_without_mistakes=_perplexities(before, after, files.without_mistakes),
        reward=BeforeAfter(mean_reward(old.rewards), mean_reward(new.rewards)),
        rules=BeforeAfter(old.rules(), new.rules()),
        words=BeforeAfter(old.words(), new.words()),
    )
    return findings, old, new


def _perplexities(before: Contender, after: Contender, path: Path) -> BeforeAfter:
    examples = load(path, after.tokenizer, "demonstrations").examples
    found: list[Perplexity] = [perplexity(model.policy, examples) for model in (before, after)]
    return BeforeAfter(*found)
