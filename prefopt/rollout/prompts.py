"""Which prompts are sampled next: a stream without end, the same on every process."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefopt.records import Message

FLOOR = 0.05  # weight of a prompt that is never or always solved, beside 1 for one that is solved half the time
MEMORY = 0.5  # of a prompt's earlier success, kept when it is measured again


@dataclass(frozen=True)
class Prompt:
    """A prompt as tokens, as it was given, and the other columns of its row, which rewards read."""

    tokens: Sequence[int]
    asked: str | Sequence[Message]
    columns: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""


@dataclass(frozen=True)
class Draw:
    """A prompt of the stream. number: its place in the list it is from. easier: that list is the easier one. seed: of
    its completions, another one each time it is drawn.
    """

    prompt: Prompt
    number: int
    easier: bool
    seed: int


class Shuffled:
    """Every prompt once an epoch, in an order that is a function of (seed, epoch)."""

    def __init__(self, size: int, seed: str) -> None:
        self.size, self.seed, self.taken = size, seed, 0
        self.epoch, self.order = -1, list(range(size))

    def next(self) -> int:
        epoch, place = divmod(self.taken, self.size)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, list(range(self.size))
            random.Random(f"{self.seed}/{epoch}").shuffle(self.order)
        self.taken += 1
        return self.order[place]

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken, self.epoch = state["taken"], -1
        if self.taken % self.size:  # in the middle of an epoch, whose order is to be made again
            self.taken -= 1
            self.next()


class Success:
    """Prompts by how often they are solved: p (1 - p), most for those solved half the time.

    Those not yet seen come first, each once; then a prompt is drawn with a weight of at least FLOOR, so that what was
    hopeless is tried again. success: measured share of solved completions, 0 to 1, by number.
    """

    def __init__(self, size: int, seed: str) -> None:
        self.unseen, self.size = Shuffled(size, seed), size
        self.random = random.Random(f"{seed}/success")
        self.success: dict[int, float] = {}

    def next(self) -> int:
        if self.unseen.taken < self.size:
            return self.unseen.next()
        weights = [self.weight(number) for number in range(self.size)]
        return self.random.choices(range(self.size), weights)[0]

    def weight(self, number: int) -> float:
        """1 at a success of one half, FLOOR at 0 and 1."""
        p = self.success.get(number, 0.5)
        return FLOOR + (1 - FLOOR) * 4 * p * (1 - p)

    def learn(self, number: int, success: float) -> None:
        """Take in what was measured of a prompt."""
        before = self.success.get(number, success)
        self.success[number] = MEMORY * before + (1 - MEMORY) * success

    def state_dict(self) -> dict[str, Any]:
        version, words, gauss = self.random.getstate()
        return {
            "unseen": self.unseen.state_dict(),
            "random": [version, list(words), gauss],
            "success": [list(entry) for entry in self.success.items()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        version, words, gauss = state["random"]
        self.unseen.load_state_dict(state["unseen"])
        self.random.setstate((version, tuple(words), gauss))
        self.success = dict(state["success"])


class Stream:
    """Draws without end. easier: prompts of which each rollout has the share `easier_share`.

    curriculum: none or success, see `Shuffled` and `Success`. A pure function of (prompts, seed, what was learnt), so
    that every process has the same one.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        seed: int,
        *,
        curriculum: str = "none",
        easier: Sequence[Prompt] = (),
        easier_share: float = 0.0,
    ) -> None:
        self.prompts, self.easier, self.seed, self.easier_share = prompts, easier, seed, easier_share
        self.order = Success(len(prompts), str(seed)) if curriculum == "success" else Shuffled(len(prompts), str(seed))
        self.easy_order = Shuffled(len(easier), f"{seed}/easier") if easier else None
        self.drawn = 0  # of the main list
        self.total = 0

    @property
    def main_share(self) -> float:
        """Share of the draws that comes from the main list."""
        return 1 - self.easier_share if self.easy_order is not None else 1.0

    def state_dict(self) -> dict[str, Any]:
        easy = self.easy_order.state_dict() if self.easy_order is not None else None
        return {"order": self.order.state_dict(), "easy": easy, "drawn": self.drawn, "total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order.load_state_dict(state["order"])
        if self.easy_order is not None:
            self.easy_order.load_state_dict(state["easy"])
        self.drawn, self.total = state["drawn"], state["total"]

    def take(self, count: int) -> list[Draw]:
        """The next `count` draws, the easier ones spread among the others."""
        return [self._next() for _ in range(count)]

    def _next(self) -> Draw:
        # the running share never strays from the wanted one by more than one prompt
        due = self.easy_order is not None and int((self.total + 1) * self.easier_share) > self.total - self.drawn
        self.total += 1
        seed = random.Random(f"{self.seed}/draw/{self.total}").getrandbits(62)
        if due and self.easy_order is not None:
            number = self.easy_order.next()
            return Draw(self.easier[number], number, True, seed)
        self.drawn += 1
        number = self.order.next()
        return Draw(self.prompts[number], number, False, seed)

    def learn(self, measured: Iterable[tuple[int, float]]) -> None:
        """Share of solved completions of the main prompts, by number, from all processes."""
        if isinstance(self.order, Success):
            for number, success in measured:
                self.order.learn(number, success)
