"""A judge as a reward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from prefopt.records import Sample, Score, text_of
from prefopt.rewards.judge.asking import Asker
from prefopt.rewards.judge.modes import Mode, Pairwise, Ranking, Rubric
from prefopt.rewards.judge.options import JudgeOptions, listed


class Judge:
    """Scores completions by a language model behind an OpenAI-compatible server: a number from 0 to 1 each.

    Returns within judge_deadline and a second. What the judge did not say, in the form it was asked for, is no score.
    counts: questions, answers from the cache, asked again, unreadable, refused, truncated, failed, late, model changed.
    """

    name = "judge"

    def __init__(self, options: JudgeOptions) -> None:
        self.options, self.mode, self.asker = options, mode_of(options), Asker(options)

    @property
    def counts(self) -> Counter[str]:
        return self.asker.counts

    def ping(self) -> str:
        """The name of the model that judges. InputError, with address and reason, where none answers."""
        return self.asker.ping()

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        scores = [Score(None, self._unfit(sample)) for sample in samples]
        groups: dict[int, list[int]] = {}
        for place, score in enumerate(scores):
            if not score.why:
                groups.setdefault(samples[place].group, []).append(place)
        own = {group: [samples[place] for place in places] for group, places in groups.items()}
        questions = {group: self.mode.questions(members) for group, members in own.items()}
        answers = iter(self.asker.ask([question for asked in questions.values() for question in asked]))
        for group, places in groups.items():
            found = self.mode.scores(own[group], [next(answers) for _ in questions[group]])
            for place, score in zip(places, found, strict=True):
                scores[place] = score
        return scores

    def close(self) -> None:
        self.asker.close()

    def _unfit(self, sample: Sample) -> str:
        """Why a sample cannot be judged; empty where it can."""
        longest = max(len(text_of(sample.prompt)), len(text_of(sample.completion)))
        if longest > self.options.judge_max_chars:
            return f"{longest} characters are too long to judge; raise judge_max_chars"
        return ""


def mode_of(options: JudgeOptions) -> Mode:
    principles = listed(options.principles, "principles")
    if options.judge_mode == "pairwise":
        return Pairwise(principles, options.judge_opponents)
    if options.judge_mode == "ranking":
        return Ranking(principles)
    mode = Rubric(principles, listed(options.judge_criteria, "judge_criteria"))
    mode.questions([Sample("", "")])  # says at once which criterion has no name
    return mode
