from __future__ import annotations

import json
import time
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt.sandbox.codec import ITEMS, Unsendable, check, decode, encode, parse, same

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.complex_numbers()
KEYS = st.recursive(SCALARS, lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3), max_leaves=4)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=3)
        | st.sets(KEYS, max_size=3)
    ),
    max_leaves=8,
)


def sent(value: Any) -> Any:
    """A value's tree after it has travelled."""
    return check(parse(json.dumps(encode(value)).encode()))


def holds_nan(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(holds_nan, [*value.keys(), *value.values()]))
    if isinstance(value, (list, tuple, set, frozenset)):
        return any(map(holds_nan, value))
    return value != value


@given(VALUES)
def test_a_value_comes_back_as_it_was(value: Any) -> None:
    back = decode(sent(value))
    assert type(back) is type(value)
    assert holds_nan(value) or back == value


@given(VALUES, VALUES)
def test_trees_are_the_same_where_python_says_that_values_are_equal(one: Any, other: Any) -> None:
    if not holds_nan(one) and not holds_nan(other):  # Python's containers take a NaN for equal to itself
        assert same(sent(one), sent(one))
        assert same(sent(one), sent(other)) == (one == other)


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        (1, True, True),
        (1, 1.0, True),
        (0.0, -0.0, True),
        (2, 2 + 0j, True),
        (2**60, float(2**60), True),
        (2**60 + 1, float(2**60), False),
        (0.1 + 0.2, 0.3, False),
        ("1", 1, False),
        (b"a", "a", False),
        ([1], (1,), False),
        ([1], [1, 2], False),
        ({1}, frozenset({1}), True),
        ({1: "a", 2: [3]}, {2.0: [3], True: "a"}, True),
        ({(1, 2): 0}, {(1.0, 2): 0}, True),
        ({1: 0}, {1: 0, 2: 0}, False),
        (float("nan"), float("nan"), False),
        ([float("nan")], [float("nan")], False),
        (float("inf"), float("inf"), True),
        (None, 0, False),
        (Counter("aab"), {"a": 2, "b": 1}, True),
        (OrderedDict(a=1), {"a": 1}, True),
        (defaultdict(int, a=1), {"a": 1}, True),
    ],
)
def test_equality_is_that_of_python_on_plain_values(one: Any, other: Any, equal: bool) -> None:
    assert same(sent(one), sent(other)) is equal
    assert same(sent(other), sent(one)) is equal


class Five(int):
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = int.__hash__


@pytest.mark.parametrize(
    "value",
    [Five(5), [Five(5)], {Five(5): 1}, object(), int, print, deque([1]), namedtuple("P", "x")(1), iter([1]), range(3)],
    ids=lambda value: type(value).__name__,
)
def test_what_is_not_plain_cannot_be_sent(value: Any) -> None:
    with pytest.raises(Unsendable, match="cannot be sent"):
        encode(value)


def test_nesting_without_end_cannot_be_sent() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(Unsendable, match="deeper"):
        encode(value)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[",
        b"[" * 200_000,
        b"9" * 100_000,
        b'{"a": 1}',
        b"1.5",
        b"NaN",
        b"-Infinity",
        b"[1e999]",
        b"\xff\xfe",
        b'["value", 5] ["value", 5]',
        b'"\x00"',
    ],
    ids=lambda text: repr(text[:12]),
)
def test_what_is_no_message_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError):
        parse(text)


@pytest.mark.parametrize(
    "tree",
    [
        [],
        [1],
        ["x", 1],
        ["f", "one"],
        ["f", 1],
        ["f", "0x1p99999"],
        ["i", "0xg"],
        ["i"],
        ["i", "1", "2"],
        ["c", "0x0p+0"],
        ["b", "0"],
        ["d", [1]],
        ["d", 1],
        ["l", ["l", ["y"]]],
        ["l", *range(ITEMS)],
    ],
    ids=lambda tree: repr(tree)[:20],
)
def test_what_is_no_tree_is_refused(tree: Any) -> None:
    with pytest.raises(ValueError):
        check(tree)


def test_a_tree_deeper_than_any_answer_is_refused() -> None:
    tree: Any = 0
    for _ in range(900):
        tree = ["l", tree]
    with pytest.raises(ValueError, match="deeper"):
        check(tree)


@pytest.mark.parametrize("kind", [tuple, lambda held: frozenset(held), lambda held: (frozenset(held), 1)])
def test_nested_members_of_a_set_cost_no_more_than_flat_ones(kind: Any) -> None:
    """Texts of texts would double with each of the 30 levels: gigabytes."""
    deep: Any = 1
    for _ in range(30):
        deep = kind((deep,))
    start = time.process_time()
    assert same(sent({deep, 2}), sent({2, deep}))
    assert not same(sent({deep, 2}), sent({kind((deep,)), 2}))
    assert same(sent({(1, frozenset({2.0, 3}))}), sent({(True, frozenset({3, 2}))}))
    assert not same(sent({(1, 2)}), sent({frozenset({1, 2})}))
    assert time.process_time() - start < 5


def test_keys_that_collide_cost_no_more_than_others() -> None:
    """As ints these 30,000 keys have one hash; a dict of them takes minutes."""
    tree = check(["d", *([["i", hex(k * (2**61 - 1))], 0] for k in range(1, 30_001))])
    start = time.process_time()
    assert same(tree, tree)
    assert time.process_time() - start < 20
