"""A short fuzz of every target, and every input that once crashed one. `make fuzz` goes on for longer."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from seeds import SEEDS, WORDS
from targets import TARGETS

CASES = Path(__file__).parent / "cases"
EXAMPLES = {"files": 100, "rows": 200, "recipe": 60, "messages": 300}


def inputs(target: str) -> st.SearchStrategy[bytes]:
    """Seeds with a piece put in or left out, words in any order, and any bytes."""

    def changed(seed: bytes, at: int, drop: int, piece: bytes) -> bytes:
        at = at % (len(seed) + 1)
        return seed[:at] + piece + seed[at + drop :]

    word = st.sampled_from(WORDS[target]) | st.binary(max_size=3)
    mutated = st.builds(changed, st.sampled_from(SEEDS[target]), st.integers(0, 10_000), st.integers(0, 9), word)
    words = st.lists(word, max_size=14).map(lambda parts: b"".join([b"\x01", *parts]))
    return st.one_of(mutated, words, st.binary(max_size=60))


def test_every_seed_is_taken() -> None:
    for name, target in TARGETS.items():
        for seed in SEEDS[name]:
            target(seed)


@pytest.mark.parametrize("name", TARGETS)
def test_any_input_is_taken_or_refused_in_words(name: str) -> None:
    @settings(
        max_examples=EXAMPLES[name],
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )
    @given(inputs(name))
    def fuzz(data: bytes) -> None:
        TARGETS[name](data)

    fuzz()


@pytest.mark.parametrize("case", sorted(CASES.glob("*/*")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_once_crashed_no_longer_does(case: Path) -> None:
    TARGETS[case.parent.name](case.read_bytes())
