"""Whatever a state is made of comes back as it was: values, types, shapes and bits."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefopt.checkpoint.tree import Tree, read, restore_random, state_of_random

DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)


def tensors() -> Any:
    """Of every kind and shape, empty ones too, whole or a view of something larger."""

    @st.composite
    def tensor(draw: Any) -> torch.Tensor:
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        dtype = draw(st.sampled_from(DTYPES))
        own = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        made = torch.randint(0, 2, shape, generator=own) * 3.7 - 1
        made = (made != -1) if dtype == torch.bool else made.abs().to(dtype)
        if made.is_floating_point() and made.numel():
            made.view(-1)[0] = draw(st.sampled_from([0.0, -0.0, math.nan, math.inf, -math.inf, 1e-3]))
        view = draw(st.sampled_from(["whole", "transposed", "part", "stretched"]))
        if view == "transposed":
            return made.mT if made.ndim >= 2 else made
        if view == "part":
            return torch.stack([made, made])[1]
        return made.unsqueeze(0).expand(3, *made.shape) if view == "stretched" else made

    return tensor()


PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.text()
    | st.sampled_from(["$tensor", "\ud800", "/", "0"])
)
KEYS = st.text().filter(lambda key: not key.startswith("$")) | st.sampled_from(
    ["", "a", "a/b", "b", "0", "__metadata__"]
)
TREES = st.recursive(
    PLAIN | tensors(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=4)
        | inner.map(lambda one: [one, one])  # the same twice
    ),
    max_leaves=12,
)


def same(found: Any, wanted: Any) -> None:
    if isinstance(wanted, torch.Tensor):
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        bits = [one.contiguous().reshape(-1).view(torch.uint8) for one in (found, wanted)] if wanted.numel() else []
        assert not bits or torch.equal(*bits)
        return
    assert type(found) is type(wanted)
    if isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for key, value in wanted.items():
            same(found[key], value)
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted)
        for mine, its in zip(found, wanted, strict=True):
            same(mine, its)
    elif isinstance(wanted, float):
        assert (
            math.isnan(found)
            if math.isnan(wanted)
            else (found, math.copysign(1, found))
            == (
                wanted,
                math.copysign(1, wanted),
            )
        )
    else:
        assert found == wanted


@given(state=TREES, copy=st.booleans())
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_what_is_written_is_read_back_to_the_bit(state, copy, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    assert Tree(state, copy).write(folder, "rank-0") == ["rank-0.json", "rank-0.safetensors"]
    same(read(folder, "rank-0"), state)


def test_keys_that_spell_the_same_place_keep_their_own_tensors(tmp_path):
    state = {
        "a/b": torch.tensor(1.0),
        "a": {"b": torch.tensor(2.0)},
        "": {"": torch.tensor(3.0)},
        "/": torch.tensor(4.0),
    }
    Tree(state, False).write(tmp_path, "state")
    same(read(tmp_path, "state"), state)


@pytest.mark.parametrize("copy", [False, True])
def test_one_tensor_in_two_places_can_be_written(copy, tmp_path):
    """A buffer and its targets may hold the same; safetensors refuses memory that it has seen."""
    shared = torch.arange(4.0)
    state = {"batch": shared, "targets": (shared, shared.view(2, 2)), "part": shared[1:3]}
    Tree(state, copy).write(tmp_path, "state")
    same(read(tmp_path, "state"), state)


def test_a_copy_is_of_the_state_as_it_was(tmp_path):
    weight, seen = torch.ones(3), [1]
    tree = Tree({"weight": weight, "seen": seen}, copy=True)
    weight.fill_(7)
    seen.append(2)
    tree.write(tmp_path, "state")
    same(read(tmp_path, "state"), {"weight": torch.ones(3), "seen": [1]})


def test_what_is_read_is_aligned_like_memory_of_its_own(tmp_path):
    """In the file a tensor stands behind others; kernels choose their way by alignment."""
    Tree({"odd": torch.ones(3, dtype=torch.uint8), "weight": torch.ones(5)}, False).write(tmp_path, "state")
    assert read(tmp_path, "state")["weight"].data_ptr() % 64 == 0


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": {1: 2}}, "/a: 1 cannot be a key"),
        ({"$tensor": 1}, r"the state: '\$tensor' cannot be a key"),
        ({"a": [{1, 2}]}, "/a/0: a set cannot be part of a state"),
        ({"a": numpy.int64(1)}, "/a: a int64 cannot be part of a state"),
        ({"a": object()}, "/a: a object cannot be part of a state"),
    ],
)
def test_what_cannot_be_kept_is_named_with_its_place(state, message):
    with pytest.raises(TypeError, match=message):
        Tree(state, False)


def test_a_full_disk_is_reported_with_its_number(tmp_path):
    with pytest.raises(OSError) as error:
        Tree({"a": torch.ones(3)}, False).write(tmp_path / "not there", "state")
    assert error.value.errno == 2
    (tmp_path / "state.safetensors").mkdir()
    with pytest.raises(OSError) as error:
        Tree({"a": torch.ones(3)}, False).write(tmp_path, "state")
    assert error.value.errno == 21  # that it is a directory, as safetensors was told


def test_a_cut_tensor_file_is_a_value_error(tmp_path):
    Tree({"a": torch.ones(3)}, False).write(tmp_path, "state")
    path: Path = tmp_path / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"state\.safetensors"):
        read(tmp_path, "state")


def draws() -> list[Any]:
    return [random.random(), random.gauss(0, 1), numpy.random.normal(), torch.rand(3).tolist(), torch.randn(3).tolist()]


def test_every_generator_goes_on_where_it_was(tmp_path):
    random.gauss(0, 1)  # of two that are made at once the second is kept
    numpy.random.normal()
    Tree(state_of_random(), False).write(tmp_path, "random")
    wanted = draws()
    assert draws() != wanted
    restore_random(read(tmp_path, "random"))
    assert draws() == wanted


def test_values_are_plain_json_and_hold_no_code(tmp_path):
    Tree({"a": (1, math.nan), "b": torch.ones(1)}, False).write(tmp_path, "state")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    assert json.loads((tmp_path / "state.json").read_text(), parse_constant=refuse)["a"]


@pytest.mark.parametrize("copy", [True, False])
def test_one_number_with_the_stride_of_what_it_was_cut_from_comes_back(copy, tmp_path):
    one = torch.arange(6.0).view(1, 6)[:, 3]
    assert one.stride() == (6,)
    Tree([one], copy=copy).write(tmp_path, "own")
    assert torch.equal(read(tmp_path, "own")[0], one)
