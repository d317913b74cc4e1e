"""The quickstart's task: one-line stories with five exact rules, so that a person can check the gold reward by eye.

An instruction reads `Write a cheerful line about a fox by the sea in 9 words.` An answer earns up to five stars, one
for each rule: who, where, mood, length, form. Demonstrations come from writers who forget each rule now and then.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from random import Random
from typing import NamedTuple

WHO = (
    "fox owl whale baker robot pirate dragon kitten wizard sailor penguin knight spider gardener turtle rabbit "
    "queen postman monkey goat poet clown bear hedgehog"
).split()

WHERE = {
    "sea": "by",
    "forest": "in",
    "moon": "on",
    "kitchen": "in",
    "bridge": "under",
    "hill": "on",
    "market": "at",
    "library": "in",
    "train": "on",
    "garden": "in",
    "river": "by",
    "castle": "at",
    "beach": "on",
    "attic": "in",
    "island": "on",
    "school": "at",
}

WHEN = "dawn noon dusk midnight".split()


class Words(NamedTuple):
    """What one mood may say."""

    adjectives: tuple[str, ...]
    verbs: tuple[str, ...]
    adverbs: tuple[str, ...]


MOODS = {
    "cheerful": Words(
        ("merry", "jolly", "sunny", "giggling", "bright"),
        ("dances", "sings", "laughs", "skips", "whistles"),
        ("happily", "gladly", "joyfully", "proudly"),
    ),
    "gloomy": Words(
        ("weary", "tearful", "lonely", "grey", "bitter"),
        ("weeps", "sighs", "mopes", "sulks", "frowns"),
        ("sadly", "mournfully", "heavily", "hopelessly"),
    ),
    "spooky": Words(
        ("eerie", "haunted", "shadowy", "pale", "ghostly"),
        ("howls", "creeps", "lurks", "cackles", "shivers"),
        ("silently", "darkly", "strangely", "wickedly"),
    ),
    "sleepy": Words(
        ("drowsy", "dreamy", "yawning", "cosy", "snug"),
        ("naps", "snores", "dozes", "rests", "slumbers"),
        ("softly", "lazily", "slowly", "peacefully"),
    ),
}

LENGTHS = range(6, 13)

MOOD_OF = {word: mood for mood, words in MOODS.items() for word in itertools.chain(*words)}


def _any(words: Sequence[str]) -> str:
    return f"(?:{'|'.join(words)})"


_ADJECTIVE, _VERB, _ADVERB = (_any([word for words in MOODS.values() for word in words[part]]) for part in range(3))
FORM = re.compile(
    rf"The (?:{_ADJECTIVE} (?:and {_ADJECTIVE} )?)?{_any(WHO)} {_VERB}(?: {_ADVERB})?"
    rf" (?:{'|'.join(f'{preposition} the (?:{_ADJECTIVE} )?{place}' for place, preposition in WHERE.items())})"
    rf"(?: at {_any(WHEN)})?(?: and {_VERB}(?: {_ADVERB})?)?\."
)


@dataclass(frozen=True)
class Instruction:
    """What a line must be: `who` in `where`, in a `mood`, with `length` words."""

    who: str
    where: str
    mood: str
    length: int

    @property
    def text(self) -> str:
        article = "an" if self.who[0] in "aeiou" else "a"
        place = f"{WHERE[self.where]} the {self.where}"
        return f"Write a {self.mood} line about {article} {self.who} {place} in {self.length} words."


@dataclass(frozen=True)
class Stars:
    """One line's score on each rule, 0 to 1."""

    who: float
    where: float
    mood: float
    length: float
    form: float

    @property
    def total(self) -> float:
        """0 to 5 stars: the gold reward."""
        return sum(astuple(self))


def stars(instruction: Instruction, line: str) -> Stars:
    """The gold reward of a line, rule by rule.

    who, where: 1 if the asked one is named and no other, 0.5 if others are named too, else 0.
    mood: (words of the asked mood - words of other moods) / words of any mood, at least 0; 0 without any.
    length: 1 at the asked number of words, a third less for each word too many or too few, at least 0.
    form: 1 for a sentence of the grammar, 0.5 if it says a word of mood twice, 0 for anything else.
    """
    words = re.findall(r"[a-z]+", line.lower())
    moods = [MOOD_OF[word] for word in words if word in MOOD_OF]
    asked = moods.count(instruction.mood)
    repeats = len(moods) > len({word for word in words if word in MOOD_OF})
    return Stars(
        who=_named(instruction.who, WHO, words),
        where=_named(instruction.where, WHERE, words),
        mood=max(0.0, (2 * asked - len(moods)) / len(moods)) if moods else 0.0,
        length=max(0.0, 1 - abs(len(words) - instruction.length) / 3),
        form=(0.5 if repeats else 1.0) if FORM.fullmatch(line) else 0.0,
    )


def _named(asked: str, every: Sequence[str] | dict[str, str], words: Sequence[str]) -> float:
    if asked not in words:
        return 0.0
    return 1.0 if {word for word in words if word in every} == {asked} else 0.5


def write(instruction: Instruction, random: Random) -> str:
    """A line that obeys every rule of `instruction`, one of many."""
    mood = MOODS[instruction.mood]
    adjectives = random.sample(mood.adjectives, 3)
    verbs, adverbs = random.sample(mood.verbs, 2), random.sample(mood.adverbs, 2)
    shape = random.choice(_SHAPES[instruction.length])
    subject = " ".join([*(" and ".join(adjectives[: shape.adjectives]).split()), instruction.who])
    words = ["The", subject, verbs[0], *adverbs[: shape.adverb], WHERE[instruction.where], "the"]
    words += [*adjectives[2 : 2 + shape.scene], instruction.where]
    words += ["at", random.choice(WHEN)] if shape.when else []
    words += ["and", verbs[1], *adverbs[1 : shape.coda]] if shape.coda else []
    return " ".join(words) + "."


class Shape(NamedTuple):
    """How many of each optional part a line has; a coda of 2 has an adverb."""

    adjectives: int
    adverb: int
    scene: int
    when: int
    coda: int

    @property
    def length(self) -> int:
        """Words of such a line. `The fox dances by the sea` has 6; a second adjective or a coda brings its `and`."""
        second, coda = max(0, self.adjectives - 1), self.coda + 1 if self.coda else 0
        return 6 + self.adjectives + second + self.adverb + self.scene + 2 * self.when + coda


_SHAPES: dict[int, list[Shape]] = {length: [] for length in LENGTHS}
for _shape in itertools.starmap(Shape, itertools.product(range(3), range(2), range(2), range(2), range(3))):
    _SHAPES.get(_shape.length, []).append(_shape)


def write_carelessly(instruction: Instruction, random: Random, care: float = 0.6) -> str:
    """A line by a writer who remembers each of who, where, mood and length with probability `care`."""
    remembered = Instruction(
        who=instruction.who if random.random() < care else random.choice(WHO),
        where=instruction.where if random.random() < care else random.choice(list(WHERE)),
        mood=instruction.mood if random.random() < care else random.choice(list(MOODS)),
        length=instruction.length if random.random() < care else random.choice(LENGTHS),
    )
    return write(remembered, random)


def instructions(random: Random) -> list[Instruction]:
    """Every instruction there is, 10,752 of them, shuffled: cut it, and no two parts share one."""
    every = list(itertools.starmap(Instruction, itertools.product(WHO, WHERE, MOODS, LENGTHS)))
    random.shuffle(every)
    return every
