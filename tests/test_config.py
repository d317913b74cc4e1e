"""Options: what is accepted, what is refused and in which words, and that what is written reads back."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import string
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import prefopt
from prefopt import config
from prefopt.records import InputError
from prefopt.rewards.options import BUILT_IN


@dataclass(frozen=True)
class Speed:
    """How fast.

    momentum: how much of the last step
      is kept.
    """

    # Peak step size,
    # reached after warm-up.
    learning_rate: float = 1e-3
    momentum: float | None = None
    # Updates in all.
    steps: int = 10
    # Shape of the decay.
    schedule: Literal["linear", "cosine"] = "linear"
    not_an_option: ClassVar[int] = 3

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")


@dataclass(frozen=True)
class Place:
    # Where the run is written.
    out: Path = Path("runs/here")
    # A free word.
    tag: str = "x"
    # Whether to go on after a bad row.
    skip: bool = False
    # Column names.
    map: dict[str, str] = field(default_factory=dict)
    # Layers that get an adapter.
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Needed:
    # The model's directory.
    model: str


SECTIONS = {"speed": Speed, "place": Place}


def resolved(*words: str) -> dict[str, Any]:
    return config.flat(config.resolve(SECTIONS, config.parse_overrides(words)))


def refusal(*layers: Any, sections: Any = SECTIONS) -> str:
    with pytest.raises(InputError) as caught:
        config.resolve(sections, *layers)
    return str(caught.value)


def recipe(folder: Path, text: str | bytes) -> Path:
    path = folder / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("learning_rate=1e-6", 1e-6),
        ("learning_rate=1", 1.0),
        ("learning_rate=.5", 0.5),
        ("learning_rate=-.inf", -math.inf),
        ("momentum=null", None),
        ("momentum=", None),
        ("steps=1e3", 1000),
        ("steps=010", 10),
        ("steps=1_000", 1000),
        ("skip=yes", True),
        ("skip=off", False),
        ("skip=true", True),
        ("out=2024", Path("2024")),
        ("out=a/b c", Path("a/b c")),
        ("tag=1e5", "1e5"),
        ("tag=off", "off"),
        ("tag=null", "null"),
        ("tag=2024-01-01", "2024-01-01"),
        ("tag=12:30", "12:30"),
        ("tag=a: b: c", "a: b: c"),
        ("tag=@x", "@x"),
        ("tag=", ""),
        ("tag=k=v", "k=v"),
        ("targets=[q, k]", ("q", "k")),
        ("map={a: b}", {"a": "b"}),
        ("map.chosen=good", {"chosen": "good"}),
        ("map.chosen=7", {"chosen": "7"}),
    ],
)
def test_a_word_on_the_command_line_means(word: str, value: Any) -> None:
    found = resolved(word)[word.partition("=")[0].partition(".")[0]]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("learning_rate=fast", "learning_rate: expected a number, got 'fast'"),
        ("learning_rate=true", "learning_rate: expected a number, got true"),
        ("learning_rate=.nan", "learning_rate: expected a number, got nan"),
        ("learning_rate.x=1", "learning_rate: expected a number, got a mapping"),
        ("momentum=[1]", "momentum: expected a number or null, got [1]"),
        ("steps=1.5", "steps: expected a whole number, got 1.5"),
        ("steps=true", "steps: expected a whole number, got true"),
        ("skip=1", "skip: expected true or false, got 1"),
        ("schedule=cosin", "schedule: expected one of linear, cosine, got 'cosin'"),
        ("map=chosen", "map: expected a mapping of name to value, got 'chosen'"),
        ("targets=q", "targets: expected a list (each text), got 'q'"),
        ("lerning_rate=1", "lerning_rate: unknown option; did you mean learning_rate?"),
        ("learning-rate=1", "learning-rate: unknown option; did you mean learning_rate?"),
        ("zzz=1", "zzz: unknown option; `prefopt train OBJECTIVE --help` lists them all"),
        ("odds_weight=0.1", "odds_weight: not an option here; it belongs to orpo"),
        ("steps=0", "steps must be at least 1, got 0"),
    ],
)
def test_a_wrong_word_is_refused_with(word: str, message: str) -> None:
    assert refusal(config.parse_overrides([word])) == message


@pytest.mark.parametrize("word", ["beta", "=1", "--beta=1", "", "a b=1"])
def test_what_is_not_key_equals_value_is_refused(word: str) -> None:
    with pytest.raises(InputError, match="expected key=value"):
        config.parse_overrides([word])


def test_setting_a_mapping_whole_and_by_entry_is_refused() -> None:
    with pytest.raises(InputError, match="map is already set to 'x'"):
        config.parse_overrides(["map=x", "map.chosen=good"])


def test_text_in_a_recipe_is_never_guessed_from_a_number(tmp_path: Path) -> None:
    layer = config.read_recipe(recipe(tmp_path, "tag: 2024"))
    assert refusal(layer) == f"{tmp_path}/recipe.yaml:1: tag: expected text, got 2024"


def test_python_values_are_held_to_the_same_types() -> None:
    assert config.resolve(SECTIONS, {"out": "here", "targets": ["q"]})["place"] == Place(Path("here"), targets=("q",))
    assert refusal({"learning_rate": "1e-3"}) == "learning_rate: expected a number, got '1e-3'"
    assert refusal({"skip": "maybe"}) == "skip: expected true or false, got 'maybe'"


def test_later_layers_win_and_mappings_are_merged_entry_by_entry() -> None:
    first = {"steps": 5, "tag": "a", "map": {"prompt": "q", "chosen": "a"}}
    both = config.flat(config.resolve(SECTIONS, first, config.parse_overrides(["steps=7", "map.chosen=good"])))
    assert (both["steps"], both["tag"], both["map"]) == (7, "a", {"prompt": "q", "chosen": "good"})
    assert first["map"] == {"prompt": "q", "chosen": "a"}, "the layer given must be left as it was"


def test_a_required_option_left_out_is_named_with_what_it_is() -> None:
    assert refusal(sections={"needed": Needed}) == "model: missing; set it with model=VALUE (The model's directory.)"


def test_one_name_in_two_sections_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match="'learning_rate' is declared by both a and b"):
        config.resolve({"a": Speed, "b": Speed})


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 3\nlearning_rate: fast\n", ":2: learning_rate: expected a number, got 'fast'"),
        ("steps: 3\n\nstep: 4\n", ":3: step: unknown option; did you mean steps?"),
        ("# why\nsteps: 0\n", ":2: steps must be at least 1, got 0"),
        ("map:\n  a: 1\n", ":1: map: expected a mapping of name to value, got a mapping"),
    ],
)
def test_a_wrong_recipe_names_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    path = recipe(tmp_path, text)
    assert refusal(config.read_recipe(path)).startswith(f"{path}{message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", ":3: 'a' is set twice (first on line 1); keep one"),
        ("map:\n  x: 1\n  x: 2\n", ":3: 'x' is set twice (first on line 2); keep one"),
        ("a: [1\nb: 2\n", ":2: "),
        ("- a\n- b\n", ":1: expected lines of `option: value`, got ['a', 'b']"),
        ("just words\n", ":1: expected lines of `option: value`, got 'just words'"),
        ("1: 2\n", ":1: 1 is not an option's name"),
        ("[a]: 2\n", ":1: "),
        (b"a: \xff\n", ": not UTF-8 text (byte 3); a recipe is a YAML file"),
        (b"a: 1\nb: \x00\n", ":2: a character that YAML does not allow: "),
        ("a: !!int x\n", ": not a recipe in YAML"),
        ("a: !!timestamp x\n", ": not a recipe in YAML"),
        ("a: !!python/object:os.system x\n", ":1: could not determine a constructor"),
        ("a: " + "9" * 5000, ": not a recipe in YAML"),
        ("a: " + "[" * 100_000, ": not a recipe in YAML"),
        ("a: 1\n---\nb: 2\n", ":2: but found another document"),
    ],
)
def test_what_is_no_recipe_is_refused_with_file_and_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = recipe(tmp_path, text)
    with pytest.raises(InputError) as caught:
        config.read_recipe(path)
    assert str(caught.value).startswith(f"{path}{message}")


def test_a_missing_recipe_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(InputError, match=r"cannot read this recipe: (No such file|Is a directory)"):
            config.read_recipe(path)


def test_a_recipe_may_be_empty_start_with_a_byte_order_mark_and_use_dotted_keys(tmp_path: Path) -> None:
    assert config.read_recipe(recipe(tmp_path, "# nothing\n")) == {}
    layer = config.read_recipe(recipe(tmp_path, b"\xef\xbb\xbfsteps: 3\nmap.chosen: good\n"))
    assert layer == {"steps": 3, "map": {"chosen": "good"}}


# ---------------------------------------------------------------- writing


def read_back(folder: Path, sections: Any, written: dict[str, Any]) -> dict[str, Any]:
    layer = config.read_recipe(recipe(folder, config.to_yaml(written)))
    layer.pop("objective", None)
    return config.resolve(sections, layer)


LOOKS_LIKE_MORE = [
    "1e-6",
    "off",
    "null",
    "~",
    "",
    "010",
    "1_0",
    ".nan",
    "true",
    "2024-01-01",
    "1:30",
    "<<",
    "a: b",
    "#",
]
WORDS = st.one_of(st.sampled_from(LOOKS_LIKE_MORE), st.text(max_size=8), st.text(string.printable, max_size=8))
NUMBERS = st.floats(allow_nan=False)


@given(
    speed=st.builds(Speed, NUMBERS, st.none() | NUMBERS, st.integers(1, 10**20), st.sampled_from(["linear", "cosine"])),
    place=st.builds(
        Place, WORDS.map(Path), WORDS, st.booleans(), st.dictionaries(WORDS, WORDS), st.lists(WORDS).map(tuple)
    ),
)
@example(speed=Speed(), place=Place(Path("\x85"), "\x85", map={"\u2028": "\ufeff"}))
def test_what_is_written_reads_back_unchanged(tmp_path_factory: Any, speed: Speed, place: Place) -> None:
    written: dict[str, Any] = {"speed": speed, "place": place}
    try:
        config.to_yaml(written).encode()
    except UnicodeEncodeError:  # half of a surrogate pair is no text that a file can hold
        return
    assert read_back(tmp_path_factory.getbasetemp(), SECTIONS, written) == written


# ---------------------------------------------------------------- help


def test_describe_reads_types_defaults_and_comments_from_the_source() -> None:
    rows = {row.key: row for row in config.describe(SECTIONS)}
    assert list(rows) == [option.name for cls in SECTIONS.values() for option in dataclasses.fields(cls)]
    rate = config.Option("learning_rate", "speed", "float", "0.001", "Peak step size, reached after warm-up.")
    assert rows["learning_rate"] == rate
    assert rows["momentum"].comment == "how much of the last step is kept."
    assert (rows["map"].default, rows["targets"].default, rows["tag"].default) == ("{}", "()", "'x'")
    assert config.describe({"needed": Needed})[0].default == ""


def test_describe_follows_a_package_that_only_re_exports() -> None:
    assert config.describe({"o": "prefopt.objectives:DPO"})[0].key == "beta"


def test_help_shows_the_words_and_the_values_that_a_default_is_made_of() -> None:
    rows = {row.key: row for row in config.describe({"reward": "prefopt.rewards:RewardOptions"})}
    assert rows["math_answer"].type == "list[Literal['boxed', 'hashes', 'line', 'number', 'all']]"
    assert rows["math_answer"].default == "['boxed']"


# ---------------------------------------------------------------- the real options


def test_the_objectives_found_in_the_source_are_those_of_the_table() -> None:
    from prefopt.objectives import EVERY

    found = config.objectives()
    assert {name: config.load(source.section) for name, source in found.items()} == EVERY
    for name, source in found.items():
        assert source.facts == dataclasses.asdict(EVERY[name].facts)  # type: ignore[attr-defined]
        assert source.formula == inspect.getdoc(EVERY[name])


def test_an_unknown_objective_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"'dop' is not one; did you mean dpo\?"):
        config.sections("dop")
    with pytest.raises(InputError, match=r"'zebra' is not one; choose one of .*dpo, "):
        config.sections("zebra")


@pytest.mark.parametrize("objective", config.objectives())
def test_every_option_is_explained_once(objective: str) -> None:
    sections = config.sections(objective)
    rows = config.describe(sections)
    classes = {name: config.load(section) for name, section in sections.items()}
    assert [row.key for row in rows] == list(config.owners(classes)), "help must list what the classes declare"
    assert [row.key for row in rows if not row.comment] == [], "options without a comment above them"


POOL: list[Any] = [
    *(True, False, 1, 2, 7, 0.25, 0.5, 3.5, "word", "NAME", "off", "1e-6", Path("a/b"), None, {"a": "b"}, {"a": 1}),
    *(["a", "b"], ("a", "b"), [1, 2], (0.8, 0.9)),
]


def choices(kind: Any) -> list[Any]:
    """The values that a type's Literals list, at any depth."""
    if typing.get_origin(kind) is Literal:
        return list(typing.get_args(kind))
    return [value for inner in typing.get_args(kind) for value in choices(inner)]


def accepted(cls: type, required: dict[str, Any], name: str) -> list[Any]:
    """Instances of `cls` with one option moved off its default, through the same check as a user's value.

    An option that needs a certain value of another gets it.
    """
    kinds = config.types_of(cls)
    companions = [
        {other: choice} for other in kinds if other != name for choice in [*choices(kinds[other]), True, 0.5, "word"]
    ]
    companions += [{"reward": reward} for reward in BUILT_IN if "reward" in kinds]
    for beside in [{}, *companions]:
        found = []
        for value in [*POOL, *choices(kinds[name]), *([choice] for choice in choices(kinds[name]))]:
            try:
                found.append(config.resolve({"it": cls}, {**required, **beside, name: value})["it"])
            except InputError:
                continue
        default = config.resolve({"it": cls}, required)["it"]
        moved = [instance for instance in found if getattr(instance, name) != getattr(default, name)]
        if moved:
            return moved
    return []


@pytest.mark.parametrize(
    ("section", "address"),
    [*config.SECTIONS.items(), *config.ONLINE.items(), *config.CRITIC.items()]
    + [(f"objective {name}", source.section) for name, source in config.objectives().items()],
)
def test_every_real_option_survives_writing_and_reading(tmp_path: Path, section: str, address: str) -> None:
    cls = config.load(address)
    missing = dataclasses.MISSING
    needed = [o.name for o in dataclasses.fields(cls) if o.default is missing and o.default_factory is missing]
    required = dict.fromkeys(needed, "word")
    for option in dataclasses.fields(cls):
        moved = accepted(cls, required, option.name)
        assert moved, f"{section}: no value of the pool differs from the default of {option.name}; widen the pool"
        for instance in moved:
            assert read_back(tmp_path, {"it": cls}, {"it": instance}) == {"it": instance}


def reads(tree: ast.AST) -> set[str]:
    """Names read as attributes (`options.beta`), leaving out what a class only checks of itself in __post_init__."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef) and node.name == "__post_init__":
            continue
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            found.add(node.attr)
        found |= reads(node)
    return found


def test_every_option_is_read_by_something() -> None:
    files = Path(prefopt.__file__).parent.rglob("*.py")
    read = set().union(*(reads(ast.parse(file.read_text(encoding="utf-8"))) for file in files))
    declared = [row.key for name in config.objectives() for row in config.describe(config.sections(name))]
    assert sorted({key for key in declared if key not in read}) == []


def test_an_option_that_is_only_checked_counts_as_unread() -> None:
    source = "class A:\n beta: int\n def __post_init__(self):\n  assert self.beta\n def loss(self):\n  return self.tau"
    assert reads(ast.parse(source)) == {"tau"}
