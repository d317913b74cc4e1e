"""Plants classic bugs in a copy of the package, one at a time, and reports whether the tests catch each.

`python tests/plant_bugs.py` prints a table and ends with 1 if a bug is missed. A bug is a text of the source and what
stands in its place; where the text is no longer found, the script stops and this table must follow the code.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAWS, LOOP = "tests/test_laws.py", "tests/test_loop.py"
ADVANTAGES, ON_GROUPS = "tests/objectives/test_advantages.py", "tests/objectives/test_policy_gradient.py"
GAE, PPO = "tests/objectives/test_gae.py", "tests/objectives/test_ppo.py"


@dataclass(frozen=True)
class Bug:
    """found, planted: text of prefopt/`file` and its replacement. tests: the file that must catch it; words: its
    tests that are run (pytest's -k).
    """

    name: str
    file: str
    found: str
    planted: str
    tests: str = LAWS
    words: str = "dpo and not dpo-"  # not its variants


BUGS = [
    Bug(
        "DPO: mean for sum",
        "objectives/dpo.py",
        "return loss.sum(), seen",
        "return loss.mean(), seen",
    ),
    Bug(
        "SFT: mean for sum",
        "objectives/sft.py",
        "return loss.sum(), {",
        "return loss.mean(), {",
        words="sft",
    ),
    Bug(
        "DPO: sign flipped",
        "objectives/pairwise.py",
        "loss = -F.logsigmoid(chosen - rejected)",
        "loss = -F.logsigmoid(rejected - chosen)",
    ),
    Bug(
        "DPO: reference left out",
        "objectives/dpo.py",
        "self.total(batch, out.logp) - targets.logp",
        "self.total(batch, out.logp) + 0 * targets.logp",
    ),
    Bug(
        "DPO: token mean for token sum",
        "objectives/dpo.py",
        'if self.log_ratio == "mean" else batch.sum_tokens(logp)',
        'if self.log_ratio == "mean" else batch.mean_tokens(logp)',
        tests="tests/objectives/test_dpo.py",
        words="by_hand",
    ),
    Bug(
        "DPO: reference summed where the policy is averaged",
        "objectives/dpo.py",
        "reference = self.total(batch, models.reference(batch))",
        "reference = batch.sum_tokens(models.reference(batch))",
        words="dpo-mean",
    ),
    Bug(
        "DPO: drift of bco taken from a forward pass",
        "objectives/dpo.py",
        "(batch, chosen, rejected), targets.drift)",
        "(batch, chosen, rejected), torch.cat([chosen, rejected]).detach().mean())",
        words="dpo-weighted",
    ),
    Bug(
        "DPOP: the fall of the chosen completion rewarded",
        "objectives/dpo.py",
        "chosen = chosen - self.drop_penalty",
        "chosen = chosen + self.drop_penalty",
        tests="tests/objectives/test_dpo.py",
        words="by_hand",
    ),
    Bug(
        "R-DPO: length credited with the wrong sign",
        "objectives/dpo.py",
        "chosen + credit, rejected + rejected_credit",
        "chosen - credit, rejected - rejected_credit",
        tests="tests/objectives/test_dpo.py",
        words="by_hand or length",
    ),
    Bug(
        "WPO: weights of pairs carry a gradient",
        "objectives/pairwise.py",
        "(out.logp - out.collision).detach()",
        "(out.logp - out.collision)",
        tests="tests/objectives/test_dpo.py",
        words="weights_of_pairs",
    ),
    Bug(
        "rDPO: flipped labels added, not taken off",
        "objectives/pairwise.py",
        "(share * flipped - (1 - share) * clean)",
        "(-share * flipped - (1 - share) * clean)",
        tests="tests/objectives/test_pairwise.py",
        words="unbiased",
    ),
    Bug(
        "log of a sigmoid",
        "objectives/pairwise.py",
        "loss = -F.logsigmoid(chosen - rejected)",
        "loss = -torch.sigmoid(chosen - rejected).log()",
        tests="tests/objectives/test_pairwise.py",
        words="far_rewards and sigmoid",
    ),
    Bug(
        "IPO: margin on the wrong side",
        "objectives/ipo.py",
        "(chosen - rejected - 1 / (2 * self.beta))",
        "(chosen - rejected + 1 / (2 * self.beta))",
        words="ipo",
    ),
    Bug(
        "AOT: sorted within a forward pass",
        "objectives/aot.py",
        "(upper - targets.below)",
        "(upper - partners(upper.detach(), lower.detach()))",
        words="aot",
    ),
    Bug(
        "AOT: rejected completions get no gradient",
        "objectives/aot.py",
        "loss = loss + seen_from_below - seen_from_below.detach()",
        "pass",
        words="aot",
    ),
    Bug(
        "a process without a prompt of its own counts a copy",
        "objectives/update.py",
        "for filler, share in shares if not filler]",
        "for _, share in shares]",
        tests="tests/objectives/test_update.py",
        words="adds_nothing",
    ),
    Bug(
        "DFT: a token's weight carries a gradient",
        "objectives/sft.py",
        "nll * torch.exp(-nll.detach())",
        "nll * torch.exp(-nll)",
        tests="tests/objectives/test_sft.py",
        words="by_hand",
    ),
    Bug(
        "SimPO: token sum for token mean",
        "objectives/simpo.py",
        "batch.pairs(batch.mean_tokens(out.logp))",
        "batch.pairs(batch.sum_tokens(out.logp))",
        tests="tests/objectives/test_reference_free.py",
        words="by_hand",
    ),
    Bug(
        "CPO: likelihood of the rejected completion",
        "objectives/cpo.py",
        "batch.pairs(batch.mean_tokens(out.logp))[0]",
        "batch.pairs(batch.mean_tokens(out.logp))[1]",
        tests="tests/objectives/test_reference_free.py",
        words="by_hand",
    ),
    Bug(
        "ORPO: odds ratio upside down",
        "objectives/orpo.py",
        "log_odds(chosen) - log_odds(rejected)",
        "log_odds(rejected) - log_odds(chosen)",
        tests="tests/objectives/test_reference_free.py",
        words="by_hand",
    ),
    Bug(
        "ORPO: log1p near certainty",
        "objectives/orpo.py",
        "torch.log(-torch.expm1(close))",
        "torch.log1p(-torch.exp(close))",
        tests="tests/objectives/test_reference_free.py",
        words="log_odds",
    ),
    Bug(
        "KTO: drift taken from a forward pass",
        "objectives/kto.py",
        "targets.drift.nan_to_num(0.0)  #",
        "(logp - targets.logp).detach().mean().clamp(min=0)  #",
        words="kto",
    ),
    Bug(
        "KTO: drift carries a gradient",
        "objectives/kto.py",
        "targets.drift.nan_to_num(0.0)  #",
        "(logp - targets.logp).mean().clamp(min=0)  #",
        tests="tests/objectives/test_labelled.py",
        words="kto",
    ),
    Bug(
        "KTO: a prompt's own completion as its mismatch",
        "objectives/kto.py",
        "next(row for row in others if row[0] != prompt)",
        "ring[place]",
        tests="tests/objectives/test_labelled.py",
        words="completion_of_another",
    ),
    Bug(
        "KTO: partners by the order of the data",
        "objectives/kto.py",
        "sorted(set(rows), key=_name)",
        "list(dict.fromkeys(rows))",
        words="kto",
    ),
    Bug(
        "KTO: a negative drift",
        "objectives/kto.py",
        ".clamp(min=0)",
        "",
        tests="tests/objectives/test_labelled.py",
        words="never_negative",
    ),
    Bug(
        "KTO: drift of one process",
        "objectives/kto.py",
        "ranks.all_sum(ratio.double().sum() * bool(share))",
        "ratio.double().sum() * bool(share)",
        tests="tests/objectives/test_labelled.py",
        words="processes",
    ),
    Bug(
        "KTO: weights of the classes exchanged",
        "objectives/kto.py",
        "[(~good).long()]",
        "[good.long()]",
        tests="tests/objectives/test_labelled.py",
        words="by_hand or on_paper",
    ),
    Bug(
        "BCO: middle of all rewards, not of the classes",
        "objectives/bco.py",
        "for side in (good, ~good) if side.any()",
        "for side in (good | ~good,)",
        tests="tests/objectives/test_labelled.py",
        words="by_hand",
    ),
    Bug(
        "reward model: mean for sum",
        "objectives/reward.py",
        "loss = (share * F.softplus(shortfall)).sum()",
        "loss = (share * F.softplus(shortfall)).mean()",
        words="reward",
    ),
    Bug(
        "reward model: score read one token early",
        "objectives/reward.py",
        "batch.completions.lengths.cumsum(0) - 1",
        "batch.completions.lengths.cumsum(0) - 2",
        words="reward",
    ),
    Bug(
        "reward model: compared with another prompt's completion",
        "objectives/reward.py",
        "return first[g] + i, first[g] + j",
        "return first[g] + i, first[g].roll(1) + j",
        words="reward",
    ),
    Bug(
        "reward model: sign of the margin",
        "objectives/reward.py",
        "batch.score[j]) - gap",
        "batch.score[j]) * -1 - gap",
        tests="tests/objectives/test_reward.py",
        words="by_hand",
    ),
    Bug(
        "reward model: a prompt with many answers counts more",
        "objectives/reward.py",
        "share = 1 / torch.bincount(batch.group[i])[batch.group[i]].to(reward.dtype)",
        "share = torch.ones_like(reward[i])",
        tests="tests/objectives/test_reward.py",
        words="by_hand",
    ),
    Bug(
        "process reward model: unlabelled tokens are wrong steps",
        "objectives/prm.py",
        "label = labels(batch)  # [K]",
        "label = labels(batch).nan_to_num(0.0)",
        words="prm",
    ),
    Bug(
        "process reward model: wrong minus right",
        "models/heads.py",
        "row[1:] - row[:1].detach()",
        "row[:1].detach() - row[1:]",
        words="prm",
    ),
    Bug(
        "a score read where its token is predicted",
        "models/policy.py",
        "hidden[self.scorer.place(token, before, at)]",
        "hidden[before]",
        words="prm or reward",
    ),
    Bug(
        "chosen and rejected by position, not by score",
        "batch.py",
        "better = score.argmax(1, keepdim=True)",
        "better = torch.zeros_like(score[:, :1], dtype=torch.int64)",
    ),
    Bug(
        "untrained tokens counted in a completion's sum",
        "batch.py",
        ".masked_fill(~self.trained, 0)",
        "",
    ),
    Bug(
        "untrained tokens counted in SFT",
        "objectives/sft.py",
        "nll = -out.logp[batch.trained]",
        "nll = -out.logp",
        words="sft",
    ),
    Bug(
        "a token predicted from its own position (packed)",
        "models/layouts.py",
        "before += [last - 1, *range(end, end + length - 1)]",
        "before += range(end, end + length)",
    ),
    Bug(
        "a token predicted from its own position (padded)",
        "models/layouts.py",
        "at, at - 1)",
        "at, at)",
    ),
    Bug(
        "second completion predicted from the end of the first",
        "models/layouts.py",
        "before += [last - 1, *range(end, end + length - 1)]",
        "before += [end - 1, *range(end, end + length - 1)]",
    ),
    Bug(
        "completions of a prompt see each other",
        "models/layouts.py",
        "else Segment((first, last), end, end + length)",
        "else Segment((first, end), end, end + length)",
    ),
    Bug(
        "positions run on instead of restarting after the prompt",
        "models/layouts.py",
        "positions += range(size, size + length)",
        "positions += range(end - first, end - first + length)",
    ),
    Bug(
        "mean of the means of forward passes",
        "loop.py",
        "(loss * (share / total)).backward()",
        "(loss * (share / objective.count(part) / len(pieces))).backward()",
    ),
    Bug(
        "metrics averaged over forward passes, not items",
        "loop.py",
        "(total + x.detach().double().sum(), count + x.numel())",
        "(total + x.detach().double().mean(), count + 1)",
    ),
    Bug(
        "reference is the live policy",
        "models/reference.py",
        "model = copy.deepcopy(policy.model).requires_grad_(False)",
        "model = policy.model",
        tests=LOOP,
        words="reference_does_not_move",
    ),
    Bug(
        "gradient of a failed pass kept when memory runs out",
        "budget.py",
        "undo()  # outside",
        "pass  # outside",
        tests=LOOP,
        words="running_out_of_memory_in_the_middle",
    ),
    Bug(
        "an update that is not finite is taken",
        "optimizer.py",
        "if not torch.isfinite(norm):",
        "if False:",
        tests=LOOP,
        words="not_finite or skipped",
    ),
    Bug(
        "a step's label on the next step's first token",
        "data/template.py",
        "bisect_right(reached, end) - 1",
        "min(bisect_right(reached, end), len(ids) - 1)",
        tests="tests/data/test_dataset.py",
        words="step",
    ),
    Bug(
        "a tie is a preference for the first",
        "data/convert.py",
        "if kind in COMPARED and chosen == rejected else None",
        "if False else None",
        tests="tests/data/test_dataset.py",
        words="tie",
    ),
    Bug(
        "TR-DPO: the reference keeps the share it should take",
        "models/reference.py",
        "mine.lerp_(its.to(mine.dtype), mixup)",
        "mine.lerp_(its.to(mine.dtype), 1 - mixup)",
        tests="tests/models/test_reference.py",
        words="follows_is",
    ),
    Bug(
        "GRPO: a spread without Bessel's correction",
        "objectives/advantages.py",
        "(squares / (group_size(batch, reward) - 1).clamp(min=1)).sqrt()",
        "(squares / group_size(batch, reward).clamp(min=1)).sqrt()",
        tests=ADVANTAGES,
        words="by_hand or without_a_reward or exactly_nothing or moments",
    ),
    Bug(
        "RLOO: a completion's own reward in its baseline",
        "objectives/advantages.py",
        "return (centred(batch, reward) * others).to(reward.dtype)",
        "return centred(batch, reward)",
        tests=ADVANTAGES,
        words="by_hand or without_a_reward or exactly_nothing or moments",
    ),
    Bug(
        "BNPO: multiplied by the density",
        "objectives/advantages.py",
        "return (1 / density)",
        "return density",
        tests=ADVANTAGES,
        words="by_hand or without_a_reward or exactly_nothing or moments",
    ),
    Bug(
        "a missing reward is a reward of 0",
        "objectives/advantages.py",
        "return ~reward.isnan()",
        "return torch.ones_like(reward, dtype=torch.bool)",
        tests=ADVANTAGES,
        words="by_hand or without_a_reward or exactly_nothing or moments",
    ),
    Bug(
        "means of rewards in single precision",
        "objectives/advantages.py",
        '"group_sum").double()',
        '"group_sum").float()',
        tests=ADVANTAGES,
        words="by_hand or without_a_reward or exactly_nothing or moments",
    ),
    Bug(
        "the spread of the rollout is that of one process",
        "objectives/advantages.py",
        "torch.cat(ranks.gather(own.detach().double().cpu()))",
        "own.detach().double().cpu()",
        tests=ADVANTAGES,
        words="by_hand or without_a_reward or exactly_nothing or moments",
    ),
    Bug(
        "a copied prompt counts in the spread of the rollout",
        "objectives/advantages.py",
        "own = x.new_empty(0) if batch.filler else x[~x.isnan()]",
        "own = x[~x.isnan()]",
        tests=ADVANTAGES,
        words="by_hand or without_a_reward or exactly_nothing or moments",
    ),
    Bug(
        "advantages centred anew in a forward pass",
        "objectives/policy_gradient.py",
        "surrogate(batch, logp, move, targets.advantage)",
        "surrogate(batch, logp, move, targets.advantage - targets.advantage.mean())",
        words="token_budget and grpo and not grpo-",
    ),
    Bug(
        "a ratio upside down",
        "objectives/policy_gradient.py",
        "move = logp - old.masked_fill(~at, 0)",
        "move = old.masked_fill(~at, 0) - logp",
        tests=ON_GROUPS,
        words="not options",
    ),
    Bug(
        "the ratio is always 1",
        "objectives/policy_gradient.py",
        "old = out.logp.detach() if targets.old_logp is None else targets.old_logp",
        "old = out.logp.detach()",
        tests=ON_GROUPS,
        words="not options",
    ),
    Bug(
        "clipping: the larger for the smaller",
        "objectives/policy_gradient.py",
        "-torch.minimum(",
        "-torch.maximum(",
        tests=ON_GROUPS,
        words="not options",
    ),
    Bug(
        "clipping: the sides exchanged",
        "objectives/policy_gradient.py",
        "ratio.clamp(1 - low, 1 + high) * advantage)",
        "ratio.clamp(1 - high, 1 + low) * advantage)",
        tests=ON_GROUPS,
        words="not options",
    ),
    Bug(
        "GRPO: the division by length dropped",
        "objectives/policy_gradient.py",
        "SEQUENCE_MEAN = Aggregation(share_of_completion, num_scored)",
        "SEQUENCE_MEAN = Aggregation(_one, num_scored)",
        tests=ON_GROUPS,
        words="not options",
    ),
    Bug(
        "DAPO: divided by completions, not by tokens",
        "objectives/policy_gradient.py",
        "TOKEN_MEAN = Aggregation(_one, num_scored_tokens)",
        "TOKEN_MEAN = Aggregation(_one, num_scored)",
        tests=ON_GROUPS,
        words="not options",
    ),
    Bug(
        "GSPO: the product of ratios for their geometric mean",
        "objectives/policy_gradient.py",
        "batch.mean_tokens(move).exp()",
        "batch.sum_tokens(move).exp()",
        tests=ON_GROUPS,
        words="not options",
    ),
    Bug(
        "CISPO: the weight carries a gradient",
        "objectives/policy_gradient.py",
        "ratio, at = move.detach().exp(), scored_tokens(batch)",
        "ratio, at = move.exp(), scored_tokens(batch)",
        tests=ON_GROUPS,
        words="not options",
    ),
    Bug(
        "KL in the loss: policy and reference exchanged",
        "objectives/policy_gradient.py",
        "k3 = torch.expm1(-d) + d",
        "k3 = torch.expm1(d) - d",
        tests=ON_GROUPS,
        words="not options",
    ),
    Bug(
        "KL in the loss: cut where it is large",
        "objectives/policy_gradient.py",
        "d = logp - reference_logp\n",
        "d = (logp - reference_logp).clamp(-20, 20)\n",
        tests=ON_GROUPS,
        words="not options",
    ),
    Bug(
        "KL in the reward rewards distance",
        "objectives/policy_gradient.py",
        "credit = credit - self.method.kl_advantage",
        "credit = credit + self.method.kl_advantage",
        tests=ON_GROUPS,
        words="not options",
    ),
    Bug(
        "KL in the reward and in the loss",
        "objectives/policy_gradient.py",
        "None if in_reward else reference,",
        "reference,",
        tests=ON_GROUPS,
        words="not options",
    ),
    Bug(
        "REINFORCE++: the pull of the tokens before",
        "objectives/reinforce_pp.py",
        "to_come(batch, penalty.double(), 1.0)",
        "penalty.double().cumsum(0)",
        tests=ON_GROUPS,
        words="not options",
    ),
    Bug(
        "the sampler's weight upside down",
        "objectives/policy_gradient.py",
        "gap = (old_logp.detach() - batch.rollout_logp)",
        "gap = (batch.rollout_logp - old_logp.detach())",
        tests=ON_GROUPS,
        words="not options",
    ),
    Bug(
        "rewards: not a number is a number",
        "rewards/channel.py",
        "if not abs(found) <= LARGEST:\n        return",
        "if abs(found) > LARGEST:\n        return",
        tests="tests/rewards/test_function.py",
        words="what_is_no_number",
    ),
    Bug(
        "rewards: a part that failed counts 0",
        "rewards/mixture.py",
        "if failed:\n",
        "if all(score.value is None for score in row):\n",
        tests="tests/rewards/test_mixture.py",
        words="failed_part",
    ),
    Bug(
        "rewards: a batch that raised is lost as a whole",
        "rewards/function.py",
        "elif _worth_another(job, outcome) and time.monotonic() < until:",
        "elif len(job.units) > len(samples):",
        tests="tests/rewards/test_function.py",
        words="loses_its_own_sample and raises",
    ),
    Bug(
        "rewards: an equation that ends in the answer is right",
        "rewards/math.py",
        "if equals and not NAME.fullmatch(name.strip()):",
        "if equals and not name:",
        tests="tests/rewards/test_math.py",
        words="these_are_not",
    ),
    Bug(
        "rewards: a missing answer equals a missing answer",
        "rewards/answers.py",
        "return found if found and all(found) else",
        "return found if found else",
        tests="tests/rewards/test_exact.py",
        words="missing_answer",
    ),
    Bug(
        "sandbox: a subclass travels as its parent",
        "sandbox/codec.py",
        "    kind = type(value)\n",
        "    kind = int if isinstance(value, int) and value != 0 else type(value)\n",
        tests="tests/sandbox/test_codec.py",
        words="not_plain",
    ),
    Bug(
        "sandbox: a shorter list answers for a longer one",
        "sandbox/codec.py",
        "return len(one) == len(other) and all(map(same, one[1:], other[1:]))",
        "return all(map(same, one[1:], other[1:]))",
        tests="tests/sandbox/test_codec.py",
        words="equality",
    ),
    Bug(
        "code: the first block is the program",
        "rewards/code.py",
        "for block in reversed(found) if entry",
        "for block in found if not entry",
        tests="tests/rewards/test_code.py",
        words="last_block",
    ),
    Bug(
        "GAE: a completion's last value looks into the next completion",
        "objectives/gae.py",
        "after[:-1] = torch.where(own[1:] == own[:-1], x[1:], 0)",
        "after[:-1] = x[1:]",
        tests=GAE,
        words="by_hand or lambda_one",
    ),
    Bug(
        "GAE: advantages flow from one completion into the one before",
        "objectives/gae.py",
        "within := own[reach:] == own[:-reach]",
        "within := own[reach:] >= own[:-reach]",
        tests=GAE,
        words="by_hand or lambda_one",
    ),
    Bug(
        "GAE: the next value without its discount",
        "objectives/gae.py",
        "gamma * _next(now, own)",
        "_next(now, own)",
        tests=GAE,
        words="by_hand or recursion",
    ),
    Bug(
        "GAE: tool output is a step",
        "objectives/gae.py",
        "    step = batch.trained.nonzero()[:, 0]  # [S]\n    own = batch.owner[step]  # [S]\n    now",
        "    step = torch.arange(len(value))\n    own = batch.owner[step]  # [S]\n    now",
        tests=GAE,
        words="no_steps",
    ),
    Bug(
        "PPO: advantages whitened before returns are taken",
        "objectives/ppo.py",
        "            returns,\n            value,\n",
        "            advantage + value,\n            value,\n",
        tests=PPO,
        words="whitened_and_returns",
    ),
    Bug(
        "PPO: the score comes with the first token",
        "objectives/gae.py",
        "is_last[:-1] = own[1:] != own[:-1]",
        "is_last[1:] = own[1:] != own[:-1]",
        tests=PPO,
        words="last_token",
    ),
    Bug(
        "PPO: distance from the reference rewarded",
        "objectives/ppo.py",
        "reward = reward - beta * log_ratio",
        "reward = reward + beta * log_ratio",
        tests=PPO,
        words="targets_by_hand",
    ),
    Bug(
        "PPO: the critic unlearns",
        "objectives/ppo.py",
        "token = policy + self.value_weight * value",
        "token = policy - self.value_weight * value",
        tests=PPO,
        words="value_loss_by_hand",
    ),
    Bug(
        "PPO: the smaller of the two errors of a value",
        "objectives/ppo.py",
        "value = torch.maximum(plain, kept)",
        "value = torch.minimum(plain, kept)",
        tests=PPO,
        words="value_loss_by_hand",
    ),
    Bug(
        "PPO: whitened with tokens that take no part",
        "objectives/ppo.py",
        "else x[at].detach().cpu()",
        "else x.detach().cpu()",
        tests=PPO,
        words="whitened",
    ),
    Bug(
        "critic: a value is read at the token itself",
        "models/critic.py",
        "        return before\n",
        "        return at\n",
        tests="tests/models/test_critic.py",
        words="read_where and llama",
    ),
    Bug(
        "online DPO: best and worst swapped",
        "objectives/online_dpo.py",
        "return _first_highest(batch, batch.score).float() - _first_highest(batch, -batch.score)",
        "return _first_highest(batch, -batch.score).float() - _first_highest(batch, batch.score)",
        tests="tests/objectives/test_online_dpo.py",
        words="picked_by_score",
    ),
    Bug(
        "online DPO: a missing reward hides the others of its prompt",
        "objectives/online_dpo.py",
        "    known = scored(x)",
        "    known = torch.ones_like(batch.group, dtype=torch.bool)",
        tests="tests/objectives/test_online_dpo.py",
        words="picked_by_score",
    ),
    Bug(
        "sampled rows: a completion without a score is worth 0",
        "recipes/sample/grading.py",
        "            found.append(None)\n",
        "            found.append(0.0)\n",
        tests="tests/recipes/test_sample_rows.py",
        words="never_0",
    ),
    Bug(
        "sampled rows: what a killed run left half-way stays",
        "recipes/sample/ledger.py",
        "rows.truncate(self._end)",
        "pass",
        tests="tests/recipes/test_sample_rows.py",
        words="cut_off_anywhere",
    ),
]


@dataclass(eq=False)  # pytest puts its plugins into sets
class Recorder:
    """A pytest plugin: names of the tests that failed, and of what could not even be collected."""

    passed: int = 0
    failed: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid)
        self.passed += report.passed and report.when == "call"

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.broken.append(report.nodeid)


def plant(bug: Bug, package: Path) -> None:
    """Put the bug into a copy of the package. SystemExit where its text is not there exactly once."""
    path = package / bug.file
    text = path.read_text(encoding="utf-8")
    if text.count(bug.found) != 1:
        raise SystemExit(
            f"{bug.name}: {bug.found!r} is {text.count(bug.found)} times in prefopt/{bug.file}, not once; "
            "tests/plant_bugs.py must follow the code"
        )
    path.write_text(text.replace(bug.found, bug.planted), encoding="utf-8")


def copy_project(folder: Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("prefopt", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", folder)


def run_tests(folder: Path, tests: Sequence[str], words: str, first: bool, answer: Connection) -> None:
    """In a process of its own: run tests against the package in `folder` and send what failed."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    import prefopt

    assert Path(prefopt.__file__).is_relative_to(folder), "the tests would run against another copy of the package"
    recorder = Recorder()
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:hypothesispytest",
        "--assert=plain",
        "-k",
        words,
        *(["-x"] if first else []),
    ]
    pytest.main([*options, *tests], plugins=[recorder])
    answer.send(recorder)


def result(bug: Bug | None, tests: Sequence[str], words: str) -> Recorder:
    """What the tests say of the package with a bug in it, or without one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        copy_project(folder)
        if bug is not None:
            plant(bug, folder / "prefopt")
        here, there = multiprocessing.Pipe(duplex=False)
        # forked: torch is imported once for all
        child = multiprocessing.get_context("fork").Process(
            target=run_tests, args=(folder, tests, words, bug is not None, there)
        )
        child.start()
        there.close()
        try:
            recorder: Recorder = here.recv()
        except EOFError:
            raise SystemExit(f"{bug.name if bug else 'the tests'}: the tests' process died") from None
        child.join()
    if recorder.broken or not (recorder.passed or recorder.failed):
        raise SystemExit(f"{bug.name if bug else 'no bug'}: no test ran ({', '.join(recorder.broken) or words})")
    return recorder


def caught(bug: Bug) -> str | None:
    """The first test that fails with the bug planted, or None."""
    failed = result(bug, [bug.tests], bug.words).failed
    return failed[0] if failed else None


def main(bugs: Sequence[Bug]) -> int:
    """Print the table; 1 if a bug was missed or the tests fail without one."""
    for slow in ("peft", "transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama"):
        importlib.import_module(slow)  # once, before the forks
    importlib.import_module("transformers.models.gpt_neox.modeling_gpt_neox")
    began = time.perf_counter()
    for tests, words in sorted({(bug.tests, bug.words) for bug in bugs}):
        if failed := result(None, [tests], words).failed:
            print(f"without any bug these fail: {', '.join(failed)}")
            return 1
    missed = 0
    for bug in bugs:
        test = caught(bug)
        missed += test is None
        print(f"{'CAUGHT' if test else 'MISSED':<7} {bug.name:<58} {(test or '').partition('::')[2]}", flush=True)
    print(f"{len(bugs) - missed} of {len(bugs)} caught in {time.perf_counter() - began:.0f} s")
    return int(missed > 0)


def part(number: int, of: int) -> list[Bug]:
    """One of `of` parts of the table; bugs that the same tests look for stay together, as each part runs them once
    without a bug.
    """
    bugs = sorted(BUGS, key=lambda bug: (bug.tests, bug.words))
    return bugs[len(bugs) * number // of : len(bugs) * (number + 1) // of]


if __name__ == "__main__":
    sys.exit(main(part(*map(int, sys.argv[1:])) if sys.argv[1:] else BUGS))
