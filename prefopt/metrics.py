"""Every number prefopt logs: what it is, its unit, and what healthy looks like. A name that is not here cannot be
logged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """definition in words, unit, and the shape a healthy run shows.

    sign: the direction that is better; "neither" where none is by itself. more: the long answer of `prefopt explain`.
    """

    definition: str
    unit: str
    healthy: str
    sign: Literal["higher", "lower", "neither"] = "neither"
    more: str = ""


# The measurements quoted below: a small transformer whose every answer (4 tokens of 6, 16 prompts) is scored by a known
# reward, so that quality is exact. Synthetic, one to three seeds: they say what can happen, not how often it does.
LOSS = """\
Near 0, is that good? Not by itself. A preference loss says how well the two answers are told apart, not how good the \
model's answers are. On small models with a known reward (DPO, beta 0.1, one run each), pairs that differ in one \
token that says nothing of quality took the loss to 0.11 in 200 updates while the true reward fell by 3.1 standard \
deviations; pairs of a best and a worst answer took it to 0.115, and the reward rose by 2.0. The same curve, so no \
threshold on the loss tells them apart. A loss near 0 early in the first epoch is a reason to look at the pairs (does \
a phrase, the length or the author give the chosen one away?) and at samples.

Never moving, is that bad? Labels near chance keep the loss near its start: where the answers were of almost equal \
quality it stayed above 0.65. So does a learning rate that is too low.

eval/loss: when it turns up, the run memorises its rows. With DPO that sign is only as good as beta: on 300 pairs \
(one seed) it served as a stopping rule at beta 0.1, never rose at 0.01 while quality fell, and rose from the first \
check at 1.0 while quality nearly doubled. Far from 0.1, judge by samples.

Where it starts is known for losses that compare with a reference, ln 2 = 0.6931 for DPO, and is checked before the \
first update. Values of different objectives, and of different beta, cannot be compared."""

FALLING = """\
Chosen and rejected both fall: is that fine? Usually yes. The loss asks only for a difference, and the two answers \
share most of their words, so pushing the rejected one down takes the chosen one along. The probability goes to \
answers that are in no pair. Whether that is good depends on which ones, and this number cannot say.

Measured on small models with a known reward (DPO, beta 0.1, 100 updates on 1,500 pairs, answers of 4 tokens; \
synthetic, 7 sets of pairs on each of 2 seeds): in 14 of 14 runs that improved the true reward by more than one \
standard deviation the chosen log-probability fell, by 3.4 to 7.5 nats an answer. In 14 runs on pairs that differ \
only in a token that says nothing of quality it moved by +1.7 to -9.2, most of them less than in the good runs. As an \
alarm the fall was worse than chance: AUC 0.20.

Look at this instead. Accuracy on pairs of answers that the model sampled before training, labelled by a judge you \
trust (`prefopt.evaluate.preference.preference_accuracy`): 0.71 to 0.76 in the good runs, 0.38 to 0.60 in the others, \
no overlap. The negative log-likelihood of held-out good answers: a rise of a little is normal, a steep one means \
that the policy leaves what it could do. And samples.

When it is bad. Where the two answers are almost the same text, DPO can lower the chosen one for nothing (Pal et al. \
2024, arXiv:2402.13228, who add a penalty on the fall: `drop_penalty`). And the probability may go to the opposite: \
training on refusals of unsafe prompts took one model's refusal rate from 74.4 % to 33.4 %, where the two answers of \
a pair look alike to the model (Razin et al. 2024, arXiv:2410.08847). Then: drop pairs whose answers are nearly \
equal, add `sft_weight` or `drop_penalty`, raise `beta`, lower `learning_rate`."""

REJECTED = """\
It should fall more than the chosen one; `prefopt explain logps/chosen` says what it means when both fall. If it \
rises together with the chosen one, the likelihood of the chosen answers is what is being learnt, as with ORPO or a \
large `sft_weight`: fine as long as the difference grows."""

ACCURACIES = """\
On the rows that are trained on it goes to 1 by memory alone; read `eval/rewards/accuracies`. People disagree about \
the better answer, so 0.6 to 0.8 is a good result on their preferences, and near 1 says that something easy gives the \
chosen answer away. In the small runs of `prefopt explain loss` useless pairs reached a held-out accuracy of 1.00.

Before the first update it is 0 where rewards compare with a reference: every margin is 0, and only one above 0 \
counts.

With a reference it is an accuracy of log-ratios: whether the model became more inclined to the chosen answer than it \
was, not whether it finds it likelier. The latter is rare: most tuned models rank below 60 % of common pairs rightly, \
and that ranking goes with the win rate only near the reference (Chen et al. 2024, arXiv:2405.19534)."""

MARGINS = """\
In units of the reward, beta times nats with a reference: divide by beta before comparing runs. On pairs that can be \
told apart it grows without end, because DPO's loss is never satisfied; that alone says nothing about quality. \
Held-out margins that grow while held-out accuracy stands still mean that the policy only becomes more extreme: stop, \
or raise `beta`."""

NLL = """\
exp(nll) is the perplexity. What is low depends on the text: 0.5 to 2.5 nats a token is usual for a pretrained model \
on ordinary answers. Far above 3 at the start is nearly always a wrong chat template or a wrong column.

Two means share the name. sft counts each token once, so a long answer weighs more; objectives on pairs (simpo, cpo, \
orpo, and dpo with `sft_weight`) count each chosen answer once. On answers of unequal length the two differ, even on \
the same rows: compare like with like.

It is the measure of memorising: when `eval/nll` turns up while `nll` falls, take fewer epochs. In preference \
training it is that of the chosen answer; a rise of its held-out value shows how far the policy has gone, whatever \
beta is. In small runs on 300 pairs (one seed) the true reward peaked at nearly the same KL from the reference, 4.0 \
to 4.7 nats, for beta 0.01, 0.1 and 1.0, so distance is a better guide to when to stop than the loss."""

GRAD_NORM = """\
Before clipping. Single peaks are clipped (`max_grad_norm`) and harmless. Growing over tens of updates: lower \
`learning_rate` or raise `warmup`. Far above `max_grad_norm` all the time: every update is clipped, and the learning \
rate no longer means what it says. Near 0 with DPO: the pairs are told apart and nothing is left to learn. A gradient \
that is not finite skips its update, and `max_bad_steps` of them in a row stop the run."""

DISTANCE = """\
Not the KL of the model's own samples: the mean log-ratio of answers that belong to other prompts of the update, and \
0 where that mean is below 0. KTO counts a reward above beta times it as a gain and below it as a loss, so it decides \
which rows still teach. It is an average over few rows and jumps with a small `batch_size`.

Staying at 0 is common and no fault: answers to other prompts may become less likely. Growing without end means that \
the policy leaves the reference: raise `beta` or lower `learning_rate`. No value is too large in general, because it \
grows with the length of answers; compare runs on the same data. The true distance takes samples: \
`prefopt.evaluate.kl.sequence_kl`."""

REWARD = """\
The number that is maximised, so it is the last to say whether the task is done: a reward can be fooled. Read samples \
(completions.jsonl), and `eval/reward` on held-out prompts with its interval in summary.json.

It jumps between updates because each sees other prompts: look at tens of updates. Of a mixture it is the weighted \
sum, and `reward/NAME` its parts. A completion that could not be scored is in none of these means (`unscored`). It is \
what the reward gave: a penalty for cut completions (`unfinished`) and the pull to the reference are not in it."""

STALL = """\
A group in which no completion is rewarded has no better and no worse one, so its advantage is 0. With a chance p of \
success and G completions of a prompt that happens with (1 - p)^G: at p = 0.01 and 8 completions, 92 % of the groups.

When it stays above 0.9 over `stall_window` rollouts and the reward does not rise, the run says that it has stalled, \
with the largest p that the completions seen so far allow (after n without a success, 3 / n at 95 %), and summary.json \
keeps it under `stalled`. What helps: easier prompts mixed in (`easier_data`), a model that solves some to start from, \
a larger `num_completions`, partial credit. At truly zero success only the first two do."""

PROBE = """\
Before training the start model answers up to 64 held-out prompts (`probe`), and every evaluation asks how likely the \
policy finds these answers. As they were its own, the first value is about the entropy of the start model, and the \
rise over it says how far the policy has left what it could say, whatever `beta` is. A rise of 0.5 nats a token is \
noted as drift. Going far is not the same as getting worse: a task may ask for another way of answering.

In small runs with a known reward (DPO on 300 pairs, one seed) the true reward peaked at a rise of 1.5 to 3.2 nats a \
token for beta 0.01, 0.1 and 1.0, and fell beyond it, while the loss on held-out pairs showed it near beta 0.1 alone.

`eval/probe_accuracy` needs a reward (`probe_reward`): of several answers of the start model to a prompt the best and \
the worst are a pair. Training pairs that are told apart by something other than quality leave it near one half: 0.38 \
to 0.60 on such pairs, 0.71 to 0.76 on good ones (14 small runs each).

`eval/probe_wins`, with the same reward, says whether answers get better: at each evaluation the policy answers the \
prompts anew, and each answer is compared with those of the held-out row, cut to `probe_tokens` like \
it. `eval/probe_reward` is their mean reward, and `eval/probe_gain` how far it is above that of the start model's own \
answers to the same prompts, in standard deviations of these, with `eval/probe_gain_error`. A gain that falls well \
below its best is what drift warns of."""

METRICS: dict[str, Metric] = {
    "loss": Metric("the objective, averaged over its items in the step", "nats", "falls, then flattens", "lower", LOSS),
    "nll": Metric(
        "negative log-likelihood of trained completion tokens: in sft, mean over all tokens; on pairs, mean over a "
        "chosen completion's tokens, then over pairs",
        "nats/token",
        "falls",
        "lower",
        NLL,
    ),
    "rewards/chosen": Metric(
        "reward of the chosen (good) completion; with a reference, beta x (logp - reference logp)",
        "nats",
        "near 0; may fall",
        more=FALLING,
    ),
    "rewards/rejected": Metric(
        "reward of the rejected (bad) completion; with a reference, beta x (logp - reference logp)",
        "nats",
        "falls",
        more=REJECTED,
    ),
    "rewards/margins": Metric(
        "rewards/chosen - rewards/rejected", "nats", "rises; with a reference from 0", "higher", MARGINS
    ),
    "rewards/accuracies": Metric(
        "share of pairs with a positive margin, or of labelled answers whose reward is on their label's side",
        "share",
        "rises; 0.6-0.8 on held-out pairs",
        "higher",
        ACCURACIES,
    ),
    "logps/chosen": Metric(
        "log-probability of the chosen (good) completion", "nats", "often falls in a healthy run", more=FALLING
    ),
    "logps/rejected": Metric(
        "log-probability of the rejected (bad) completion", "nats", "falls faster than chosen", more=REJECTED
    ),
    "accuracy": Metric(
        "share of comparisons whose better completion scores more; of steps whose side of one half is the label's",
        "share",
        "rises from 0.5; 0.6-0.8 on held-out human preferences",
        "higher",
    ),
    "margin": Metric(
        "score of the better minus the worse completion of a comparison", "nats", "rises slowly", "higher"
    ),
    "chosen_reward": Metric("score of the better completion of a comparison", "nats", "above rejected_reward"),
    "rejected_reward": Metric("score of the worse completion of a comparison", "nats", "below chosen_reward"),
    "mean_reward": Metric(
        "score of a completion, mean over all", "nats", "within a few units of 0; no meaning by itself"
    ),
    "right_accuracy": Metric("share of right steps called right", "share", "near 1", "higher"),
    "wrong_accuracy": Metric("share of wrong steps called wrong", "share", "rises from 0 after a while", "higher"),
    "mean_probability": Metric(
        "probability that a step is right, mean over steps", "share", "the share of right steps"
    ),
    "log_odds_chosen": Metric(
        "log-odds of the chosen completion less those of the rejected one, of their mean log-probs per token",
        "nats",
        "rises slowly, behind nll",
        "higher",
    ),
    "kl": Metric(
        "distance from the reference that KTO measures: mean log-ratio of answers to other prompts, at least 0",
        "nats",
        "rises from 0, then flattens; may stay at 0",
        more=DISTANCE,
    ),
    "delta": Metric(
        "reward half-way between good and bad answers of the update, where BCO divides them",
        "nats",
        "starts at 0; often falls slowly",
    ),
    "ratio": Metric(
        "probability under the policy over that under the policy which drew the completion: of each token, its "
        "geometric mean over a completion's tokens (gspo), or of the whole completion (rloo, maxrl)",
        "",
        "1 with one update per rollout; near 1 otherwise",
    ),
    "clip_fraction/low": Metric(
        "share of tokens whose gradient stops because their probability fell far enough; in cispo, whose weight is "
        "raised to the least",
        "share",
        "0 with one update per rollout; below 0.2 otherwise, in gspo well above",
    ),
    "clip_fraction/high": Metric(
        "share of tokens whose gradient stops because their probability rose far enough; in cispo, whose weight is cut",
        "share",
        "0 with one update per rollout; below 0.2 otherwise, in gspo well above",
    ),
    "kl_reference": Metric(
        "distance from the reference on the policy's own completions: mean log p / p_reference of a whole completion",
        "nats",
        "rises from 0, then flattens",
    ),
    "kl_old": Metric(
        "distance of the policy from what drew the completions: mean of r - 1 - log r, r the ratio of a token",
        "nats/token",
        "0 at the first update of a rollout; below 0.02 at its last",
    ),
    "policy/loss": Metric(
        "the clipped part of PPO's loss, mean over tokens", "reward", "near 0; its size says nothing", "neither"
    ),
    "value/loss": Metric(
        "half the squared error of the critic's values, no less than with value_clip, mean over tokens",
        "reward^2",
        "falls, then follows the reward",
        "lower",
    ),
    "value/returns": Metric(
        "what the critic should have said: advantage before whitening plus its value, mean over tokens",
        "reward",
        "rises with the reward",
    ),
    "value/explained_variance": Metric(
        "share of the variance of the rewards to come that the critic foresaw, before it was trained on them",
        "share",
        "climbs above 0 within a hundred updates; 1 is all, below 0 worse than a constant",
        "higher",
    ),
    "value/clip_fraction": Metric(
        "share of tokens whose value's gradient stops because it moved far enough",
        "share",
        "0 with one update per rollout; below 0.3 otherwise",
    ),
    "ties": Metric(
        "share of prompts without a best and a worst completion: equal rewards, or only one was scored",
        "share",
        "low; near 1 nothing is learnt",
        "lower",
    ),
    "entropy": Metric(
        "of the distribution that each token is drawn from, mean over tokens", "nats/token", "falls slowly"
    ),
    "sampler_gap": Metric(
        "mean distance of the sampler's log-probs from the trainer's, per token",
        "nats/token",
        "below 1e-4 in float32, below 0.01 in 16 bits",
        "lower",
    ),
    "reward": Metric(
        "what completions are worth, mean over those that have a score",
        "reward",
        "rises over tens of updates, unevenly",
        "higher",
        REWARD,
    ),
    "task_reward": Metric(
        "reward for the task alone, mean: of a mixture its first part, so that a bonus is not taken for it",
        "reward",
        "rises over tens of updates, unevenly",
        "higher",
    ),
    "success": Metric(
        "share of judged completions whose task reward is above the middle of the lowest and the highest seen so far",
        "share",
        "rises",
        "higher",
    ),
    "judged": Metric("completions of a rollout that have a task reward", "completions", "all of them", "higher"),
    "reward_std": Metric(
        "standard deviation of the rewards of a rollout", "reward", "above 0; falls when all is solved"
    ),
    "unscored": Metric(
        "share of completions without a score: abstained, failed, or past the deadline", "share", "0", "lower"
    ),
    "zero_variance/solved": Metric(
        "share of groups whose task rewards are all the same and high: nothing is left to learn there",
        "share",
        "rises as prompts are learnt",
    ),
    "zero_variance/failed": Metric(
        "share of groups whose task rewards are all the same and low: nothing can be learnt there yet",
        "share",
        "falls; above 0.9 with a flat reward is a stall",
        "lower",
        STALL,
    ),
    "effective_groups": Metric(
        "groups of a rollout whose rewards differ, so that something is learnt from them",
        "groups",
        "most of the prompts of a rollout",
        "higher",
    ),
    "completion_length": Metric("tokens of a completion, its end token included, mean", "tokens", "steady"),
    "repetition": Metric(
        "share of the runs of four tokens in a completion that stand in it before, mean over completions",
        "share",
        "steady, below 0.1 in most text",
        "lower",
    ),
    "finished": Metric(
        "share of completions that ended by themselves, not at max_tokens", "share", "above 0.9; rises", "higher"
    ),
    "probe_nll": Metric(
        "negative log-likelihood of the start model's own answers to held-out prompts, mean over all their tokens",
        "nats/token",
        "rises by a few tenths",
        "lower",
        PROBE,
    ),
    "probe_finished": Metric(
        "share of the start model's answers that ended by themselves", "share", "above 0.9", "higher"
    ),
    "probe_accuracy": Metric(
        "share of pairs of the start model's own answers whose better one, by probe_reward, the policy has come to "
        "prefer more than the start model did",
        "share",
        "rises to 0.7 and above",
        "higher",
        PROBE,
    ),
    "probe_pairs": Metric("pairs that probe_accuracy is measured on", "pairs", "100 or more", "higher"),
    "probe_wins": Metric(
        "share of the rows' answers to held-out prompts that the policy's own, drawn anew, are better than by "
        "probe_reward; as good counts half",
        "share",
        "0.5 where the start model wrote the rows; rises",
        "higher",
        PROBE,
    ),
    "probe_compared": Metric("prompts that probe_wins is measured on", "prompts", "100 or more", "higher"),
    "probe_reward": Metric(
        "mean of probe_reward over the policy's own answers to the held-out prompts, drawn anew",
        "reward",
        "rises",
        "higher",
        PROBE,
    ),
    "probe_gain": Metric(
        "how far these rewards are above those of the start model's answers to the same prompts, mean; one is the "
        "standard deviation of the start model's around their prompt's mean",
        "standard deviations",
        "0 at the start; rises",
        "higher",
        PROBE,
    ),
    "probe_gain_error": Metric(
        "standard error of probe_gain, over prompts", "standard deviations", "0.08 with 200 prompts", "lower"
    ),
    "seconds/sampling": Metric("drawing the completions of a rollout", "s", "steady", "lower"),
    "seconds/scoring": Metric("waiting for the reward of a rollout", "s", "below sampling", "lower"),
    "grad_norm": Metric("norm of the gradient before clipping", "", "steady, no jumps", more=GRAD_NORM),
    "learning_rate": Metric("step size of this update", "", "follows the schedule"),
    "tokens": Metric("tokens in this step, a shared prompt counted once", "tokens", "steady"),
    "tokens_per_second": Metric(
        "tokens trained per second, a shared prompt counted once", "tokens/s", "steady", "higher"
    ),
    "epoch": Metric("passes over the training data", "epochs", "rises"),
    "skipped": Metric(
        "updates so far that were not taken, as their gradient was not finite", "updates", "none", "lower"
    ),
}


PART = Metric(
    "part of the reward, mean over the completions that have it", "reward", "that of the task rises", "higher"
)


def find(name: str) -> Metric:
    """The definition of a metric; KeyError if it is not in the registry.

    `eval/NAME` is NAME on held-out rows, and `reward/NAME` the part of a reward that the user calls NAME.
    """
    plain = name.removeprefix("eval/")
    if plain.startswith("reward/"):
        return PART
    if plain not in METRICS:
        raise KeyError(f"metric {name!r} is not registered in prefopt/metrics.py; add its definition there first")
    return METRICS[plain]


def known(name: str) -> str:
    """`name`, or an error if `find` has no definition of it."""
    find(name)
    return name
