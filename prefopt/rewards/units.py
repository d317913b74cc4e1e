"""Units after a number: a fixed list, so that `12xy` is no 12 and `10 cm` is no `10 m`."""

from __future__ import annotations

import re
from typing import NamedTuple

# a unit and how else it is written; a plural s counts for nothing
SPELLINGS = """
dollar usd; cent penny pennie; euro eur
millimeter millimetre mm; centimeter centimetre cm; meter metre; kilometer kilometre km
inch inche in; foot feet ft; yard yd; mile mi; degree deg ^\\circ ^{\\circ} °
milligram mg; gram; kilogram kg; ounce oz; pound lb; ton tonne
milliliter millilitre ml; liter litre; gallon gal; pint; quart; cup; acre; hectare
second sec; minute min; hour hr; day; week; month; year yr; mph; kph; unit; calorie; radian
person people; child children kid; man men; woman women; box boxe; candy candie; tomato tomatoe
adult; animal; apple; bag; ball; balloon; banana; bead; bird; block; book; bottle; boy; cake; can; car; card; cat
chair; chicken; coin; cookie; cow; crayon; customer; dog; doll; egg; fish fishe; flower; friend; fruit; game; girl
goat; guest; hat; house; item; jar; leg; letter; marble; member; muffin; orange; page; pair; pen; pencil; piece
pizza; plant; player; point; question; room; rose; row; seat; seed; shirt; slice; song; stamp; step; sticker; student
teacher; ticket; time; toy; tree; wheel; word; worker
"""
NAMES = {spelling: line.split()[0] for line in SPELLINGS.replace("\n", ";").split(";") for spelling in line.split()}
# of one letter: units after a number and a space or in \text{}, and variables elsewhere
LETTERS = {"m": "meter", "g": "gram", "s": "second", "h": "hour", "l": "liter", "L": "liter"}

WORD = r"\^\\circ|\^\{\\circ\}|°|[A-Za-z]+"
UNIT = re.compile(
    rf"(?<=[\d}})])(?P<space>\s?)(?P<area>(?:square|sq|cubic|cu)\s)?(?P<unit>{WORD})"
    rf"(?:\s?\^\s?\{{?(?P<power>[23])\}}?)?(?:\s?(?:/|per\s)\s?(?P<per>[A-Za-z]+))?$"
)
POWERS = {"square": "2", "sq": "2", "cubic": "3", "cu": "3"}


class Measured(NamedTuple):
    """An answer in two: `18 square feet` is "18" and "foot^2"; without a unit that is known, all of it and ""."""

    value: str
    unit: str


def measured(text: str) -> Measured:
    match = UNIT.search(text)
    if match is None:
        return Measured(text, "")
    number = text[: match.start()]
    area, power = match["area"], match["power"]
    unit, per = _name(match["unit"]), _name(match["per"]) if match["per"] else ""
    if match["unit"] in LETTERS:
        plain = match["space"] and not power and re.fullmatch(r"[-+]?[\d.,]+", number)
        unit = LETTERS[match["unit"]] if plain or per else ""
    if not unit or (match["per"] and not per) or (area and power) or (match["unit"] == "in" and not match["space"]):
        return Measured(text, "")
    power = POWERS[area.strip()] if area else power
    return Measured(number.strip(), unit + f"^{power}" * bool(power) + f"/{per}" * bool(per))


def spelled(unit: str) -> str:
    r"""The text of `\text{}` after a number, with a unit of one letter written out, which a variable is not."""
    letter, caret, power = unit.strip().partition("^")
    return LETTERS.get(letter, letter) + caret + power


def _name(word: str) -> str:
    if word in LETTERS:
        return LETTERS[word]
    word = word.lower()
    return NAMES.get(word) or NAMES.get(word.removesuffix("s"), "")
