"""Values as inert trees of JSON: how arguments and answers travel between processes that do not trust each other.

A tree is None, a bool, a str, a small int, or a list of a tag and what it holds. Values of exactly these types have
one, and no others: None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict, and as dict the
standard library's Counter, OrderedDict and defaultdict. What compares equal to everything, a subclass of int say,
cannot be sent.

Answers are compared as trees and never rebuilt as Python objects where verdicts are made, so that a dictionary whose
keys collide costs no more than another. Standard library only, and Python 3.9: the sandbox runs a copy.
"""

from __future__ import annotations

import collections
import hashlib
import json
from typing import Any

DEPTH = 64  # levels of containers
ITEMS = 200_000  # values in one tree
SMALL = 1 << 53  # ints below travel as JSON numbers
TAGS = {"i", "f", "c", "b", "l", "t", "s", "z", "d"}
MAPPINGS = (dict, collections.Counter, collections.OrderedDict, collections.defaultdict)
SEQUENCES: dict[type, str] = {list: "l", tuple: "t", set: "s", frozenset: "z"}


class Unsendable(TypeError):
    """The value is of a type that has no tree, or is too deep or too large."""


def encode(value: Any, depth: int = 0) -> Any:
    """The tree of a value. Unsendable, naming the type, if it has none."""
    kind = type(value)
    if depth > DEPTH:
        raise Unsendable(f"nested deeper than {DEPTH}")
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return value if -SMALL < value < SMALL else ["i", hex(value)]
    if kind is float:
        return ["f", value.hex()]
    if kind is complex:
        return ["c", value.real.hex(), value.imag.hex()]
    if kind is bytes:
        return ["b", value.hex()]
    if kind in MAPPINGS:
        return ["d", *[[encode(k, depth + 1), encode(v, depth + 1)] for k, v in value.items()]]
    if kind in SEQUENCES:
        return [SEQUENCES[kind], *[encode(item, depth + 1) for item in value]]
    raise Unsendable(f"a value of type {kind.__name__!r} cannot be sent; answer with plain values")


def decode(tree: Any) -> Any:
    """The value of a tree. For the side that runs tests, never where verdicts are made."""
    if not isinstance(tree, list):
        return tree
    tag, held = tree[0], tree[1:]
    if tag == "d":
        return {decode(key): decode(value) for key, value in held}
    if tag in ("l", "t", "s", "z"):
        return {"l": list, "t": tuple, "s": set, "z": frozenset}[tag](map(decode, held))
    return _scalar(tag, held)


def _scalar(tag: str, held: list[Any]) -> Any:
    if tag == "i":
        return int(held[0], 16)
    if tag == "f":
        return float.fromhex(held[0])
    if tag == "c":
        return complex(float.fromhex(held[0]), float.fromhex(held[1]))
    return bytes.fromhex(held[0])


def parse(text: bytes) -> Any:
    """A message of the other side, as JSON without objects, floats and ints beyond 64 bits.

    ValueError if it is anything else, whatever it is: too deep, not UTF-8, digits without end.
    """

    def refuse(what: Any) -> Any:
        raise ValueError(f"{str(what)[:20]!r} is not part of a message")

    def whole(digits: str) -> int:
        return int(digits) if len(digits) < 20 else refuse(digits)

    try:
        return json.loads(text, parse_int=whole, parse_float=refuse, parse_constant=refuse, object_pairs_hook=refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def check(tree: Any) -> Any:
    """`tree`, if it is one; ValueError otherwise."""
    todo, seen = [(tree, 0)], 0
    while todo:
        node, depth = todo.pop()
        seen += 1
        if depth > DEPTH + 1 or seen > ITEMS:
            raise ValueError(f"a value deeper than {DEPTH} or of more than {ITEMS} items")
        if isinstance(node, list):
            todo += [(inner, depth + 1) for inner in _held(node)]
    return tree


def _held(node: list[Any]) -> list[Any]:
    """The trees that a list of tag and content holds. ValueError if it is none."""
    tag = node[0] if node else None
    if not isinstance(tag, str) or tag not in TAGS:
        raise ValueError("a value without a known tag")
    if tag == "d":
        if not all(isinstance(pair, list) and len(pair) == 2 for pair in node[1:]):
            raise ValueError("a dict whose items are not pairs")
        return [inner for pair in node[1:] for inner in pair]
    if tag in ("l", "t", "s", "z"):
        return node[1:]
    if len(node) != (3 if tag == "c" else 2) or not all(isinstance(text, str) for text in node[1:]):
        raise ValueError("a number or bytes that is not text")
    try:
        _scalar(tag, node[1:])
    except OverflowError as error:
        raise ValueError(f"a number out of range: {error}") from None
    if tag == "b" and bytes.fromhex(node[1]).hex() != node[1]:  # bytes are compared as their text
        raise ValueError("bytes that are not in small digits")
    return []


def same(one: Any, other: Any) -> bool:
    """Whether Python's == holds between the values of two checked trees: 1 == 1.0 == True, [1] != (1,), NaN != NaN.

    Exact, no tolerance.
    """
    left, right = _kind(one), _kind(other)
    if left != right:
        return False
    if left == "number":
        return bool(_number(one) == _number(other))
    if left in ("l", "t"):
        return len(one) == len(other) and all(map(same, one[1:], other[1:]))
    if left == "set":
        mine, theirs = _names(one[1:]), _names(other[1:])
        return mine is not None and mine == theirs
    if left == "d":
        return _same_dicts(one[1:], other[1:])
    return bool(one == other)


def _kind(tree: Any) -> str:
    """What a value can be equal to: numbers of any type to each other, set to frozenset, else only its own type."""
    if tree is None or isinstance(tree, str):
        return type(tree).__name__
    if not isinstance(tree, list) or tree[0] in ("i", "f", "c"):
        return "number"
    return {"s": "set", "z": "set"}.get(tree[0], str(tree[0]))


def _number(tree: Any) -> Any:
    return _scalar(tree[0], tree[1:]) if isinstance(tree, list) else tree


def _same_dicts(one: list[Any], other: list[Any]) -> bool:
    mine, theirs = _names([key for key, _ in one]), _names([key for key, _ in other])
    if mine is None or theirs is None or mine != theirs:
        return False
    values = {_name(key): value for key, value in other}
    return all(same(value, values[_name(key)]) for key, value in one)


def _names(trees: list[Any]) -> set[str] | None:
    """A text for each value, equal for equal values; None if two are equal or one equals nothing."""
    names = [_name(tree) for tree in trees]
    distinct = {name for name in names if name is not None}
    return distinct if len(distinct) == len(names) else None


def _name(tree: Any) -> str | None:
    """A text that hashable values share if they are equal: texts do not collide where the other side wants them to.

    Of a container a digest, as long at every depth: texts of texts would double with each level.
    """
    kind = _kind(tree)
    if kind == "number":
        return _number_name(_number(tree))
    if kind in ("t", "set"):
        names = [_name(inner) for inner in tree[1:]]
        known = [name for name in names if name is not None]
        held = json.dumps(sorted(known) if kind == "set" else known)
        return f"{kind} {hashlib.sha256(held.encode()).hexdigest()}" if len(known) == len(names) else None
    return None if kind in ("l", "d") else json.dumps(tree)


def _number_name(value: Any) -> str | None:
    if value != value:
        return None
    if isinstance(value, complex):
        if value.imag:
            return f"c{value.real.hex()},{value.imag.hex()}"
        value = value.real
    if isinstance(value, float) and not value.is_integer():
        return f"f{value.hex()}"
    return f"i{int(value):x}"
