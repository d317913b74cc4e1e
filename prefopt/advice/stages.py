"""From a method to the runs that it takes, as options, the last one's model being what is wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prefopt.advice.case import Case
from prefopt.advice.rules import METHODS, noisy

TOKENS = 256  # of a new answer, where nothing is known of its length
PLACES = ["boxed", "hashes", "line", "number"]  # where a number may stand in an answer
STEPS_WANTED = 50  # updates below which the batch is made smaller
# share of wrong labels that the robust loss is told: figures of few repeated rows scatter up to one half, where it
# ends. Chosen where 0.3 of the labels were turned round (experiments/advise)
WRONG = 0.3
LARGEST, SMALLEST = 32, 4  # prompts of an update


@dataclass(frozen=True)
class Stage:
    """One run. name: for its file. options: of the recipe. why: in words."""

    name: str
    options: dict[str, Any]
    why: str


def stages(case: Case, method: str, model: str, data: str, folder: str, positions: int | None = None) -> list[Stage]:
    """The runs of a method: SFT first where the model needs it, then the method's own.

    folder: their outputs go to folder-OBJECTIVE. positions: the model's context.
    """
    names = list(METHODS[method].stages)
    if needs_sft(case, method):
        names.insert(0, "sft")
    made: list[Stage] = []
    trained, scorer = model, ""
    for name in names:
        out = f"{folder}-{name}"
        options: dict[str, Any] = {"objective": name, "model": trained, "data": data, "out": out}
        options |= _common(case, positions) | _own(case, name, scorer, positions)
        made.append(Stage(name, options, WHY[name]))
        if name == "reward":
            scorer = f"{out}/model"
        else:
            trained = f"{out}/model"
    return made


WHY = {
    "sft": "the model learns to answer in the form of the rows",
    "reward": "a model learns to score answers as the rows do",
    "dpo": "the better answers become likelier than the worse, held by the reference",
    "ipo": "the better answers become likelier by a set margin",
    "kto": "good answers gain, bad ones lose, held by the reference",
    "orpo": "the better answers are learnt and become likelier than the worse, in one pass",
    "simpo": "the better answers become likelier per token, without a reference",
    "grpo": "the model's own answers are rewarded and compared within each prompt",
    "rloo": "the model's own answers are rewarded, each compared with the others of its prompt",
    "ppo": "the model's own answers are rewarded, and a critic says at each token what was to be expected",
}


def needs_sft(case: Case, method: str) -> bool:
    """Whether SFT on the rows' good answers should come first: a base model, or rows far from what it writes."""
    there = case.data.kind in METHODS["sft"].kinds
    return there and method not in ("sft", "orpo") and (case.base is True or case.foreign is True)


def _common(case: Case, positions: int | None) -> dict[str, Any]:
    """What every run of a case has. Few rows: smaller updates, so that there are enough of them."""
    batch = max(SMALLEST, min(LARGEST, case.data.rows // STEPS_WANTED))
    options: dict[str, Any] = {} if batch == LARGEST else {"batch_size": batch}
    if positions is not None and positions < 1024:
        options["max_length"] = positions
    return options


def _own(case: Case, name: str, scorer: str, positions: int | None) -> dict[str, Any]:
    """What an objective has besides."""
    if name in ("grpo", "rloo", "ppo"):
        return _sampled(case, name, scorer, positions)
    if case.data.kind in ("ratings",) and name not in ("sft",):
        return {"ties": "drop"}
    return loss_options(case, name)


def loss_options(case: Case, name: str) -> dict[str, Any]:
    """What the rows ask of an objective's loss."""
    if name == "dpo" and noisy(case):
        return {"loss_type": "robust", "label_smoothing": WRONG}
    return {}


def _sampled(case: Case, name: str, scorer: str, positions: int | None) -> dict[str, Any]:
    """The reward, and how long answers may be: twice the usual one's length."""
    reward = scorer or case.check or ""
    usual = TOKENS if case.data.answer_tokens is None else 2 * max(16, round(case.data.answer_tokens))
    longest = min(1024, usual) if positions is None else min(usual, positions // 2, 1024)
    options: dict[str, Any] = {"reward": [reward], "max_tokens": longest, "num_completions": 8}
    if reward == "math":
        options["math_answer"] = PLACES
    if longest >= 1024 and (positions is None or positions > 1024):
        options["max_length"] = min(2048, positions or 2048)
    if scorer:
        options["beta"] = 0.05  # a learnt reward is trusted near the reference only
    if scorer and name == "ppo":
        options["critic_model"] = scorer
    return options
