"""Feedback in words: what is wrong with an answer by a principle, a better one, and which of two is better.

Bai et al. 2022, arXiv:2212.08073: critique and revision against principles drawn at random, then comparisons.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from prefopt.records import Sample
from prefopt.rewards.judge.answers import object_in, schema, text_in
from prefopt.rewards.judge.asking import Answer, Question
from prefopt.rewards.judge.modes import TEXT, Pairwise
from prefopt.rewards.judge.options import listed
from prefopt.rewards.judge.prompts import DATA, USUAL, as_json, mark_of, quoted, shown
from prefopt.rewards.judge.reward import Judge


class Revision(NamedTuple):
    """revision: the better answer; None where there is none, and then `why` says the reason. critique: what was wrong
    with the one before. provenance: principle, model and round of each step, for the row.
    """

    critique: str | None
    revision: str | None
    why: str
    provenance: Mapping[str, Any]


class Preferred(NamedTuple):
    """better: 0 or 1, the place of the better answer; None for a tie, for orders that disagree, and where the judge did
    not say; `why` tells which. provenance: judge, principle, and what it said in each order.
    """

    better: int | None
    why: str
    provenance: Mapping[str, Any]


def critique_and_revise(
    judge: Judge, samples: Sequence[Sample], principles: Sequence[str] = (), *, rounds: int = 1, seed: int = 0
) -> list[Revision]:
    """Each answer criticised by a principle and rewritten, so many rounds one after the other.

    principles: those of the judge where none are given. Each round of each sample draws one. A step that fails ends a
    sample's rounds: what it has by then is its revision, None without any.
    """
    drawn = list(principles) or listed(judge.options.principles, "principles") or list(USUAL)
    texts = [shown(sample.completion) for sample in samples]
    critiques: list[str | None] = [None] * len(samples)
    steps: list[list[dict[str, Any]]] = [[] for _ in samples]
    why = [""] * len(samples)
    for number in range(rounds):
        going = [place for place in range(len(samples)) if not why[place]]
        chosen = {place: random.Random(f"{seed}/{number}/{place}").choice(drawn) for place in going}
        asked = [_revision(shown(samples[place].prompt), texts[place], chosen[place]) for place in going]
        for place, answer in zip(going, judge.asker.ask(asked), strict=True):
            if answer.value is None:
                why[place] = answer.why
                continue
            critiques[place], texts[place] = answer.value
            steps[place].append({"principle": chosen[place], "critique": critiques[place], "model": answer.model})
    return [
        Revision(critique, text if own else None, reason, {"method": "critique and revise", "steps": own})
        for critique, text, reason, own in zip(critiques, texts, why, steps, strict=True)
    ]


def preference(
    judge: Judge, pairs: Sequence[tuple[Sample, Sample]], principles: Sequence[str] = (), *, seed: int = 0
) -> list[Preferred]:
    """Which of two answers to one prompt is better, asked in both orders.

    principles: those of the judge where none are given; each pair draws one, as in the paper's comparisons.
    """
    drawn = list(principles) or listed(judge.options.principles, "principles")
    chosen = [random.Random(f"{seed}/{place}").choice(drawn) if drawn else "" for place in range(len(pairs))]
    modes = [Pairwise([principle] if principle else []) for principle in chosen]
    questions = [mode.questions(pair) for mode, pair in zip(modes, pairs, strict=True)]
    answers = iter(judge.asker.ask([question for own in questions for question in own]))
    found = []
    for mode, pair, principle, own in zip(modes, pairs, chosen, questions, strict=True):
        said = [next(answers) for _ in own]
        found.append(_preferred(mode, pair, principle, said))
    return found


def _preferred(mode: Pairwise, pair: tuple[Sample, Sample], principle: str, said: list[Answer]) -> Preferred:
    first = mode.scores(pair, said)[0]
    provenance = {
        "method": "pairwise judge",
        "principle": principle,
        "model": next((answer.model for answer in said if answer.model), ""),
        "verdicts": [answer.value for answer in said],
    }
    if first.value is None:
        return Preferred(None, first.why, provenance)
    if first.value == 0.5:
        swayed = bool(first.parts.get("position_bias"))
        return Preferred(None, "the two orders disagree" if swayed else "a tie", provenance)
    return Preferred(0 if first.value > 0.5 else 1, "", provenance)


def _revision(request: str, answer: str, principle: str) -> Question:
    mark = mark_of(request, answer)
    reply = as_json({"critique": '"<what is wrong with the answer>"', "revision": '"<the whole new answer>"'})
    told = (
        "You improve answers that an assistant gave to a request.",
        DATA.format(mark=mark),
        f"The principle to improve it by: {principle}",
        "First say how the answer falls short of the principle. Then write the answer anew, so that it holds to the "
        "principle and still does what the request asks for; keep what was right.",
        f"Reply with one JSON object alone: {reply}",
    )
    user = quoted("request", request, mark) + "\n\n" + quoted("answer", answer, mark)
    return Question("\n\n".join(told), user, schema({"critique": TEXT, "revision": TEXT}), _revised)


def _revised(content: str) -> tuple[str, str]:
    found = object_in(content, ["critique", "revision"])
    return text_in(found["critique"]), text_in(found["revision"])
