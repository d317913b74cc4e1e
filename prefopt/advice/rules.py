"""What speaks for and against each method, as one table: when, how much, why, and on what evidence.

Points only order methods: a rule of 30 outweighs one of 20, and nothing else is read from them. Evidence is one of
three: measured here (experiments/ of this project: exact gains in small worlds), published (a paper, by its arXiv
number), or convention (what most people do, where nothing better is known).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from prefopt.advice.case import Case

Evidence = Literal["measured here", "published", "convention"]

FEW, MANY = 2_000, 10_000  # pairs below which a reward model knows too little, above which it is well fed
FEWEST = 1_000  # pairs below which a margin without an end learns them by heart
# share of labels that others of the same comparison speak against, from which a loss should know of them. People who
# agree in 65 % of comparisons give 0.23, and so do labels drawn by Bradley-Terry: for these the plain loss is right
NOISY = 0.4
SIMPLE = 0.75  # accuracy of a classifier on token counts above which a reward is simple to learn
HOPELESS = 0.01  # share of solved samples below which groups of eight are nearly all failures
LONG = 0.65  # share of pairs whose better answer is longer, above which length decides much


class Method(NamedTuple):
    """title: for a reader. kinds: of rows it can be trained on. needs: check (a reward for new answers), comparisons (a
    reward model is trained first), or nothing. stages: objectives, in order.
    """

    title: str
    kinds: tuple[str, ...]
    needs: Literal["", "check", "comparisons"]
    stages: tuple[str, ...]


COMPARED = ("pairs", "ratings")
METHODS: dict[str, Method] = {
    "sft": Method("SFT on the good answers", ("demonstrations", *COMPARED, "labels"), "", ("sft",)),
    "dpo": Method("DPO", COMPARED, "", ("dpo",)),
    "ipo": Method("IPO", COMPARED, "", ("ipo",)),
    "kto": Method("KTO", ("labels", "pairs"), "", ("kto",)),  # ratings do not say where good begins
    "orpo": Method("ORPO", COMPARED, "", ("orpo",)),
    "simpo": Method("SimPO", COMPARED, "", ("simpo",)),
    "reward_rloo": Method("a reward model, then RLOO", COMPARED, "comparisons", ("reward", "rloo")),
    "reward_grpo": Method("a reward model, then GRPO", COMPARED, "comparisons", ("reward", "grpo")),
    "ppo": Method("a reward model, then PPO", COMPARED, "comparisons", ("reward", "ppo")),
    "grpo": Method("GRPO with a checker", ("demonstrations", *COMPARED, "labels", "prompts"), "check", ("grpo",)),
    "rloo": Method("RLOO with a reward", ("demonstrations", *COMPARED, "labels", "prompts"), "check", ("rloo",)),
}
LEARNT = ("reward_rloo", "reward_grpo", "ppo")  # from a reward model of their own
FREE = ("orpo", "simpo")  # without a reference
REFERRED = ("dpo", "ipo", "kto")


class Rule(NamedTuple):
    """methods: it is about. when: it holds. points: for (or, negative, against). why: in words, from the case."""

    methods: tuple[str, ...]
    when: Callable[[Case], bool]
    points: float
    why: Callable[[Case], str] | str
    evidence: Evidence
    source: str

    def words(self, case: Case) -> str:
        return self.why if isinstance(self.why, str) else self.why(case)


# ---------------------------------------------------------------- what holds of a case


def compared(case: Case) -> bool:
    return case.data.kind in COMPARED


def few(case: Case) -> bool:
    return compared(case) and case.data.rows < FEW


def fewest(case: Case) -> bool:
    return compared(case) and case.data.rows < FEWEST


def many(case: Case) -> bool:
    return compared(case) and case.data.rows >= MANY


def noisy(case: Case) -> bool:
    return case.data.noise is not None and case.data.noise >= NOISY


def certain(case: Case) -> bool:
    return case.data.noise is not None and case.data.noise < 0.01


def simple(case: Case) -> bool:
    return case.data.shallow is not None and case.data.shallow >= SIMPLE


def hopeless(case: Case) -> bool:
    return case.model is not None and case.model.solved is not None and case.model.solved < HOPELESS


def unsolved(case: Case) -> bool:
    """Whether the rows' answers fail the checker as the model's own do, so that imitating them would not help."""
    return hopeless(case) and case.data.passing is not None and case.data.passing < HOPELESS


def long_wins(case: Case) -> bool:
    return case.data.longer is not None and case.data.longer > LONG


def tight(method: str) -> Callable[[Case], bool]:
    return lambda case: case.room is not None and case.memory.get(method, 0) > 0.9 * case.room


ALWAYS: Callable[[Case], bool] = lambda case: True  # noqa: E731  a name for a row of the table

OBJECTIVES, ONLINE = "experiments/objectives/offline.md", "experiments/objectives/online.md"
ADVICE = "experiments/advise/README.md"

RULES: tuple[Rule, ...] = (
    # -- what each method is worth where nothing else is known
    Rule(
        ("grpo",),
        lambda case: case.check is not None,
        100,
        lambda case: (
            f"`{case.check}` can say of every new answer whether it is right, and that is worth more than any "
            "set of answers"
        ),
        "published",
        "arXiv:2402.03300, arXiv:2501.12948",
    ),
    Rule(
        ("rloo",),
        lambda case: case.check is not None,
        99,
        "the plain gradient of the reward, each answer against the others of its prompt",
        "measured here",
        ONLINE,
    ),
    Rule(
        ("dpo",),
        compared,
        70,
        "of the methods on pairs, DPO and its near relatives got most out of a distance: 0.84 of the best possible",
        "measured here",
        OBJECTIVES,
    ),
    Rule(
        ("ipo",),
        compared,
        68,
        "finds the same direction as DPO and stops at a set margin",
        "measured here",
        OBJECTIVES,
    ),
    Rule(
        ("kto",),
        lambda case: case.data.kind == "labels",
        70,
        "made for single answers marked good or bad",
        "published",
        "arXiv:2402.01306",
    ),
    Rule(
        ("kto",),
        compared,
        58,
        "each pair becomes two labels: 0.81 of the best possible where DPO had 0.84",
        "measured here",
        OBJECTIVES,
    ),
    Rule(LEARNT, compared, 55, "new answers are scored by what the pairs teach", "published", "arXiv:2404.10719"),
    Rule(("reward_rloo",), compared, 2, "needs no critic, and no scaling of rewards", "published", "arXiv:2402.14740"),
    Rule(("simpo",), compared, 45, "0.73 of the best possible: no reference holds it", "measured here", OBJECTIVES),
    Rule(("orpo",), compared, 43, "0.71 of the best possible: no reference holds it", "measured here", OBJECTIVES),
    Rule(
        ("sft",),
        lambda case: case.data.kind == "demonstrations",
        70,
        "answers to imitate, and nothing to compare them with",
        "convention",
        "",
    ),
    Rule(
        ("sft",),
        lambda case: case.data.kind in ("labels", *COMPARED),
        30,
        "learns from the good answers alone, and nothing from the others",
        "convention",
        "",
    ),
    # -- the data
    Rule(
        LEARNT,
        few,
        -20,
        lambda case: f"{case.data.rows:,} comparisons: a reward model of so few is easily fooled",
        "published",
        "arXiv:2210.10760",
    ),
    Rule(LEARNT, many, 8, "enough comparisons for a reward model", "published", "arXiv:2210.10760"),
    Rule(
        LEARNT,
        lambda case: simple(case) and not few(case),
        10,
        lambda case: (
            f"token counts alone name the better of {case.data.shallow:.0%} of unseen pairs: a reward so simple "
            "to learn serves better than the policy's own log-ratio"
        ),
        "published",
        "arXiv:2503.01067",
    ),
    Rule(
        ("ipo",),
        certain,
        4,
        "labels that never contradict each other: DPO's optimum on them has no end",
        "published",
        "arXiv:2310.12036",
    ),
    Rule(
        ("ipo",),
        fewest,
        4,
        lambda case: f"stops at a set margin, where DPO learns {case.data.rows:,} pairs by heart",
        "measured here",
        ADVICE,
    ),
    Rule(("ipo", "simpo", "orpo"), noisy, -6, "wrong labels pull as hard as right ones", "convention", ""),
    Rule(
        ("dpo",),
        noisy,
        6,
        lambda case: (
            f"about {case.data.noise:.0%} of labels are wrong, more than people's differences explain, and its loss "
            "can allow for that (loss_type=robust): twice what label_smoothing alone earned"
        ),
        "measured here",
        f"{ADVICE}, arXiv:2403.00409",
    ),
    Rule(
        ("kto",),
        lambda case: compared(case) and noisy(case),
        4,
        "bears wrong labels well",
        "published",
        "arXiv:2402.01306",
    ),
    Rule(
        ("simpo",),
        long_wins,
        6,
        lambda case: (
            f"the better answer is the longer one in {case.data.longer:.0%} of pairs, and its log-probs are per token"
        ),
        "published",
        "arXiv:2405.14734",
    ),
    # -- the model
    Rule(
        ("orpo",),
        lambda case: case.base is True and not few(case),
        10,
        "learns form and preference in one pass",
        "published",
        "arXiv:2403.07691",
    ),
    Rule(
        ("orpo",),
        lambda case: case.base is True and few(case),
        -10,
        "few pairs, and no SFT before: it loses the task",
        "convention",
        "",
    ),
    Rule(
        LEARNT,
        lambda case: case.foreign is True,
        4,
        "the rows are far from what the model writes: its own answers, scored, are not",
        "published",
        "arXiv:2404.10719",
    ),
    Rule(
        REFERRED,
        lambda case: case.foreign is True,
        -6,
        "the rows are far from what the model writes: SFT on the better answers comes first",
        "published",
        "arXiv:2404.10719",
    ),
    Rule(
        ("grpo", "rloo"),
        lambda case: hopeless(case) and case.data.kind != "prompts" and not unsolved(case),
        -60,
        "the model solves next to none of the prompts, so groups are all failures and nothing is learnt",
        "published",
        "arXiv:2510.03971",
    ),
    Rule(
        ("grpo", "rloo"),
        unsolved,
        -20,
        "the model solves next to none of the prompts, and neither do the rows' own answers: little can be learnt",
        "measured here",
        ADVICE,
    ),
    Rule(
        ("sft",),
        unsolved,
        -30,
        lambda case: f"of the rows' own answers {case.data.passing:.1%} pass `{case.check}`: they teach something else",
        "measured here",
        ADVICE,
    ),
    # -- the machine
    *(
        Rule(
            (method,),
            tight(method),
            -40,
            "does not fit into the memory here as it is",
            "measured here",
            "benchmarks/results/memory.json",
        )
        for method in METHODS
    ),
    Rule(
        ("ppo",),
        ALWAYS,
        -3,
        "two more models in memory than SFT: a critic that is trained, and the reward model",
        "published",
        "arXiv:2309.00754",
    ),
)


class Change(NamedTuple):
    """What would change the answer. when: it is worth saying."""

    when: Callable[[Case], bool]
    words: Callable[[Case], str]


CHANGES: tuple[Change, ...] = (
    Change(
        lambda case: case.data.checkable > 0 and case.check is None,
        lambda case: (
            f"with a checker for these {case.data.checkable:,} of {case.data.rows:,} rows (`{case.data.checker}` "
            "reads their columns): GRPO on them"
        ),
    ),
    Change(
        lambda case: case.data.checkable == 0 and case.check is None,
        lambda case: "with a column `answer` that a program can compare, or tests: GRPO with that checker",
    ),
    Change(
        lambda case: case.data.kind == "demonstrations" and case.check is None,
        lambda case: "with a worse answer beside each: DPO; with marks good and bad: KTO",
    ),
    Change(lambda case: case.data.kind == "labels", lambda case: "with two answers to each prompt, one better: DPO"),
    Change(
        lambda case: case.data.kind == "prompts" and case.check is None,
        lambda case: (
            "with a reward for new answers (--reward NAME, a function, a judge or a reward model): GRPO or RLOO"
        ),
    ),
    Change(few, lambda case: f"with some {FEW:,} pairs: a reward model and RLOO come into question"),
    Change(
        noisy,
        lambda case: f"with the {case.data.noise:.0%} of wrong labels taken out: DPO's plain loss, and a reward model",
    ),
    Change(
        lambda case: case.base is True and case.data.kind != "demonstrations",
        lambda case: "with a model that was fine-tuned to answer before: no SFT first",
    ),
    Change(
        lambda case: case.model is None,
        lambda case: (
            "with --model: whether it answers in the form of the rows, and how far they are from what it writes"
        ),
    ),
    Change(
        hopeless,
        lambda case: "with easier prompts mixed in (easier_data), or after SFT on solutions: GRPO with the checker",
    ),
)
