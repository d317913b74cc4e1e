"""A language model as a judge: scores, comparisons, rankings, and feedback in words."""

from prefopt.rewards.judge.feedback import Preferred, Revision, critique_and_revise, preference
from prefopt.rewards.judge.options import JudgeOptions
from prefopt.rewards.judge.reward import Judge

__all__ = ["Judge", "JudgeOptions", "Preferred", "Revision", "critique_and_revise", "preference"]
