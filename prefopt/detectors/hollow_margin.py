"""Whether pairs are told apart by something that is not quality, so that margins grow and answers do not gain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from prefopt.detectors.finding import FINE, Check, Level, Line, State
from prefopt.detectors.series import keep, wilson_upper

LOGISTIC = ("dpo", None)  # whose loss is minus the log of the sigmoid of the margin; None: a log that does not say


@dataclass(frozen=True)
class HollowMargin:
    """Training pairs are told apart almost without exception within half an epoch, and pairs of the model's own answers
    are not.

    The first alone is a suspicion: easy and good pairs look the same. It is confirmed, or taken back, by the preference
    accuracy on pairs that the start model wrote itself and a reward labelled (`eval/probe_accuracy`). For that it is
    enough that most pairs are told apart, by however little: with a small beta margins stay small. A mark is in
    held-out rows too: where they are not told apart like the trained ones, these are learnt by heart, and `drift` says
    that.
    """

    # loss of the updates below which pairs count as told apart
    loss: float = 0.15
    # or the margin, beta times nats, above which they do
    margin: float = 1.8
    # share of the pairs of the last updates told apart that has to go with either
    accuracy: float = 0.95
    # epochs within which this is suspicious without any other sign; later it may be memory
    epochs: float = 0.5
    # updates that are taken together; in three of four of them loss or margin must be like that
    lines: int = 8
    # on-policy accuracy that even the upper end of its 95 % interval is below in a sick run
    preference: float = 0.65
    # accuracy of the updates less that of held-out rows (`eval/rewards/accuracies`), from which on it is memory
    gap: float = 0.2
    # share of the pairs of the last updates told apart that is enough where held-out rows are told apart like them
    shared: float = 0.8
    # where it is not known how held-out rows are told apart, epochs after which pairs that come to be told are memory
    memory: float = 4.0
    # what is said where nothing confirms it
    unverified: Level = "warn"
    needed: int = 1
    among: int = 1

    name: ClassVar[str] = "hollow_margin"
    title: ClassVar[str] = "pairs are told apart by something other than quality"

    def see(self, state: State, line: Line) -> Check | None:
        apart = self._told_apart(line)
        if apart is not None:
            clear = self._most(state, apart)
            right = keep(state.setdefault("right", []), line.get("rewards/accuracies") or 0.0, self.lines)
            state["sure"] = len(right) == self.lines and sum(right) / self.lines >= self.accuracy
            epoch = line.get("epoch")
            if state["sure"]:
                state.setdefault("sure_epoch", epoch)
            if clear and state["sure"] and (epoch is None or epoch <= self.epochs):
                state.setdefault("suspect", line.step)
                state.setdefault("epoch", epoch)
                state.setdefault("seen", {n: line.values[n] for n in _SHOWN if n in line.values})
        held_out, measured = line.get("eval/rewards/accuracies"), line.get("eval/probe_accuracy")
        if held_out is not None:
            state["held_out"] = held_out
        if measured is not None and line.step > 0:
            return self._confirmed(state, line, measured)
        if apart is None or "verdict" in state:
            return None
        return self._unverified(state, line) if "suspect" in state else FINE

    def _most(self, state: State, vote: bool) -> bool:
        """Whether three in four of the last updates say so."""
        votes = keep(state.setdefault("votes", []), vote, self.lines)
        return len(votes) == self.lines and 4 * sum(votes) >= 3 * self.lines

    def _told_apart(self, line: Line) -> bool | None:
        """Whether the pairs of an update are told apart clearly, by loss or margin; None: it does not say."""
        accuracy = line.get("rewards/accuracies")
        loss = line.get("loss") if line.run.objective in LOGISTIC else None
        margin = line.get("rewards/margins")
        if accuracy is None or (loss is None and margin is None):
            return None
        return (loss is not None and loss < self.loss) or (margin is not None and margin > self.margin)

    def _confirmed(self, state: State, line: Line, measured: float) -> Check | None:
        pairs = line.get("eval/probe_pairs")
        if not pairs or pairs < 0 or not 0 <= measured <= 1:
            return None
        state["verdict"] = measured
        upper = wilson_upper(measured, pairs)
        told = self._generally_apart(state)
        if not told or upper >= self.preference:
            return FINE
        return Check(
            "sick",
            measured,
            self.preference,
            f"hollow margin: {told} are told apart, and of {pairs:.0f} pairs of the start model's own answers the "
            f"policy prefers the better one in {measured:.0%} (at most {upper:.0%} at 95 %): what tells the pairs "
            "apart is not quality",
            _REMEDY,
            on_policy(line.run.options),
            since=state.get("suspect"),
            evidence={"eval/probe_pairs": pairs, "upper": upper, **state.get("seen", {})},
        )

    def _generally_apart(self, state: State) -> str:
        """Which pairs are told apart, by something that others have too and not by heart; empty where none are."""
        right, held_out = state.get("right", []), state.get("held_out")
        if "suspect" in state:  # seen once at most by then, so not by heart
            return "trained pairs almost without exception"
        if held_out is not None and len(right) == self.lines:
            share = sum(right) / self.lines
            by_heart = share - held_out >= self.gap
            return (
                "" if by_heart or share < self.shared else f"{share:.0%} of trained and {held_out:.0%} of other pairs"
            )
        late = state.get("sure_epoch") is not None and state["sure_epoch"] > self.memory
        return "trained pairs almost without exception" if state.get("sure") and not late else ""

    def _unverified(self, state: State, line: Line) -> Check:
        when = f" by epoch {state['epoch']:.2g}" if state.get("epoch") is not None else ""
        return Check(
            self.unverified,
            line.get("rewards/accuracies"),
            self.accuracy,
            f"hollow margin, unverified: pairs are told apart almost without exception{when}; something easy (a "
            "phrase, the length, the author) may give the chosen answer away, or the pairs are good and easy: the loss "
            "cannot say",
            "To find out, give probe_reward, a reward that the start model's own answers are compared by, and read "
            f"samples. {_REMEDY}",
            since=state["suspect"],
            evidence=state.get("seen", {}),
        )


_SHOWN = ("loss", "rewards/margins", "rewards/accuracies", "epoch")
_REMEDY = (
    "Look for what the chosen answers have in common and drop such pairs, or take pairs of the model's own answers, "
    "labelled by a reward or a judge"
)


def on_policy(options: Any) -> dict[str, Any]:
    """Pairs of the policy's own answers, where there is a reward to label them."""
    reward = options.get("probe_reward")
    return {"objective": "online_dpo", "reward": reward} if reward else {}
