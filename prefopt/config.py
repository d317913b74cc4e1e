"""Options from recipes, the command line and Python, checked and merged into the dataclasses that declare them.

Keys are flat: every option's name is unique over its sections. Options live beside the code that reads them; this
module knows only where, by name, so that `--help` reads their source and imports nothing heavy.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib
import importlib.util
import inspect
import math
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from prefopt.records import InputError, without_secrets

PACKAGE = Path(__file__).parent

# Names, not imports: most of these modules import torch. The objective's own section comes first, see `sections`.
SECTIONS: dict[str, str] = {
    "run": "prefopt.recipes.train:RunOptions",
    "loop": "prefopt.loop:LoopOptions",
    "data": "prefopt.data:DataOptions",
    "model": "prefopt.models.load:ModelOptions",
    "lora": "prefopt.models.adapters:LoraOptions",
    "reference": "prefopt.models.reference:ReferenceOptions",
    "checkpoint": "prefopt.checkpoint:CheckpointOptions",
    "watch": "prefopt.detectors:WatchOptions",
}

# What objectives on pairs and labels have besides: answers of the start model that are asked again.
OFFLINE: dict[str, str] = {"probe": "prefopt.recipes.watching:ProbeOptions"}

# What objectives on prompts have besides, which sample their own completions and have them scored.
ONLINE: dict[str, str] = {
    "rollout": "prefopt.rollout:RolloutOptions",
    "reward": "prefopt.rewards:RewardOptions",
    "judge": "prefopt.rewards.judge:JudgeOptions",
    "reward_model": "prefopt.rollout.reward_model:RewardModelOptions",
    "vllm": "prefopt.models.vllm:VllmOptions",
}

# What an objective with a critic has besides.
CRITIC: dict[str, str] = {"critic": "prefopt.models.critic:CriticOptions"}

Section = type | str  # a dataclass, or "module:Class"

TEXT = "tag:yaml.org,2002:str"

# Booleans people write besides YAML's true and false; only read so where a bool is expected, so `mode: off` stays text.
BOOLEAN_WORDS = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}


class Layer(dict[str, Any]):
    """Options from one place. where: key -> `file:line`; text: key -> what was typed, before YAML read it."""

    def __init__(self, values: Mapping[str, Any] = types.MappingProxyType({})) -> None:
        super().__init__(values)
        self.where: dict[str, str] = {}
        self.text: dict[str, Any] = {}


class Option(NamedTuple):
    """One option as help and docs show it: `default` is its Python source, "" when it is required."""

    key: str
    section: str
    type: str
    default: str
    comment: str


class ObjectiveSource(NamedTuple):
    """What help says of an objective, read from its source.

    section: "module:Class". formula: the class's docstring. facts: the arguments of its `Facts`, with their defaults.
    """

    section: str
    formula: str
    facts: Mapping[str, Any]


# ---------------------------------------------------------------- reading values


class Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: `1e-6` is a number, `off` and `2024-01-01` are text. A repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            name = str(key.value)
            if name in seen and key.tag != "tag:yaml.org,2002:merge":
                problem = f"{name!r} is set twice (first on line {seen[name]}); keep one"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen[name] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


def _scalar(tag: str, pattern: str, first: str) -> None:
    expression = re.compile(f"^(?:{pattern})$")
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", expression, list(first))
    # The writer quotes text that this reader would take for something else.
    Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", expression, list(first))


class Dumper(yaml.SafeDumper):
    """Writes what `Loader`, and any YAML 1.1 reader, reads back unchanged."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def style_of(text: str) -> str | None:
    """Quoted where PyYAML would leave U+0085 and its like bare, and then read them as line ends."""
    return None if text.isprintable() else '"'


Loader.yaml_implicit_resolvers = {}
_scalar("null", "~|null|Null|NULL|", "~nN")
Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("^$"), [""])
_scalar("bool", "true|True|TRUE|false|False|FALSE", "tTfF")
_scalar("int", "[-+]?[0-9]+(?:_[0-9]+)*", "-+0123456789")
_scalar("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", "-+.0123456789")
_scalar("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+.")
Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile("^<<$"), ["<"])
Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
Dumper.add_representer(str, lambda dumper, text: dumper.represent_scalar(TEXT, text, style_of(text)))
Dumper.add_multi_representer(Path, lambda dumper, path: dumper.represent_data(str(path)))
Dumper.add_representer(tuple, lambda dumper, value: dumper.represent_list(list(value)))


def read_value(text: str) -> Any:
    """`text` as one YAML value; text that is no YAML at all (`a: b: c`, `@x`) is itself."""
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


def parse_overrides(words: Iterable[str]) -> Layer:
    """`key=value` words as options, later words winning; `map.chosen=good` sets one entry of a mapping.

    InputError on a word that is not key=value.
    """
    layer = Layer()
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][\w.-]*", key):
            raise InputError(f"{word!r}: expected key=value, such as beta=0.05")
        _put(layer, key, read_value(text))
        _put(layer.text, key, text)
    return layer


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set `key`, where `map.chosen` is the entry `chosen` of the mapping `map`."""
    name, dot, entry = key.partition(".")
    if not dot:
        values[name] = value
        return
    if not isinstance(values.get(name, {}), dict):
        raise InputError(f"{key}: {name} is already set to {shown(values[name])}; set one or the other")
    values[name] = {**values.get(name, {}), entry: value}


def read_recipe(path: str | Path) -> Layer:
    """The options of a YAML recipe. InputError `file:line: what, what to do` on anything but one mapping of names."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot read this recipe: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); a recipe is a YAML file") from None
    try:
        loader = Loader(text)
        try:
            node = loader.get_single_node()
            values = loader.construct_document(node) if node else {}
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise InputError(f"{path}:{mark.line + 1 if mark else 1}: {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise InputError(f"{path}:{line}: a character that YAML does not allow: {error.character!r}") from None
    except (yaml.YAMLError, RecursionError, ValueError, AttributeError) as error:
        # SafeLoader's own constructors raise the last two on a tag that lies about its value (`!!timestamp x`).
        raise InputError(f"{path}: not a recipe in YAML: {str(error).splitlines()[0]}") from None
    return _recipe_layer(path, node, values)


def _recipe_layer(path: str | Path, node: Any, values: Any) -> Layer:
    layer = Layer()
    if not isinstance(values, dict):
        raise InputError(f"{path}:1: expected lines of `option: value`, got {shown(values)}")
    lines = {str(key.value): key.start_mark.line + 1 for key, _ in node.value} if node else {}
    for key, value in values.items():
        where = f"{path}:{lines.get(str(key), 1)}"
        if not isinstance(key, str):
            raise InputError(f"{where}: {key!r} is not an option's name")
        _put(layer, key, value)
        layer.where[key.partition(".")[0]] = where
    return layer


# ---------------------------------------------------------------- checking values


def resolve(sections: Mapping[str, Section], *layers: Mapping[str, Any]) -> dict[str, Any]:
    """Every section's dataclass, filled from the layers: later ones win, entries of mappings are merged.

    InputError naming the option, what was expected and what was found; ValueError if two sections share a name.
    """
    classes = {name: load(section) for name, section in sections.items()}
    owner = owners(classes)
    merged: dict[str, Any] = {}
    where: dict[str, str] = {}
    for layer in layers:
        for key, value in layer.items():
            place = getattr(layer, "where", {}).get(key, "")
            if key not in owner:
                raise InputError(located(place, key, unknown(key, owner, sections)))
            kind = types_of(classes[owner[key]])[key]
            checked = check(kind, value, getattr(layer, "text", {}).get(key), located(place, key, ""))
            both = isinstance(checked, dict) and isinstance(merged.get(key), dict)
            merged[key] = {**merged[key], **checked} if both else checked
            where[key] = place
    return {name: _build(cls, merged, where) for name, cls in classes.items()}


def _build(cls: type, merged: dict[str, Any], where: dict[str, str]) -> Any:
    """One section's instance. InputError on a required option left out, or one that the class itself refuses."""
    for option in dataclasses.fields(cls):
        no_default = option.default is dataclasses.MISSING and option.default_factory is dataclasses.MISSING
        if no_default and option.name not in merged:
            comment = next(row.comment for row in describe({"": cls}) if row.key == option.name)
            raise InputError(
                f"{option.name}: missing; set it with {option.name}=VALUE" + f" ({comment})" * bool(comment)
            )
    given = {option.name: merged[option.name] for option in dataclasses.fields(cls) if option.name in merged}
    try:
        return cls(**given)
    except ValueError as error:
        named = [key for key in given if re.search(rf"\b{key}\b", str(error))]
        place = where.get(named[0], "") if named else ""
        raise InputError(f"{place}: {error}" if place else str(error)) from None


def flat(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Every option of every section: name -> value."""
    return {
        option.name: getattr(section, option.name)
        for section in resolved.values()
        for option in dataclasses.fields(section)
    }


def recorded(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """The objective's name and every option, without the secrets in addresses."""
    return dict(without_secrets({"objective": resolved["objective"].facts.name, **flat(resolved)}))


def owners(classes: Mapping[str, type]) -> dict[str, str]:
    """Option -> the section that declares it. ValueError if two do: a flat key would be ambiguous."""
    owner: dict[str, str] = {}
    for section, cls in classes.items():
        for option in dataclasses.fields(cls):
            if option.name in owner:
                raise ValueError(f"option {option.name!r} is declared by both {owner[option.name]} and {section}")
            owner[option.name] = section
    return owner


@functools.cache
def types_of(cls: type) -> dict[str, Any]:
    """Option -> its type, evaluated."""
    hints = typing.get_type_hints(cls)
    return {option.name: hints[option.name] for option in dataclasses.fields(cls)}


def check(kind: Any, value: Any, text: Any, place: str) -> Any:
    """`value` as a `kind`; InputError, starting with `place`, if it is not one.

    A bool is never a number, a number is never text; 1e3 is a whole number; `off` is False where a bool is expected.
    text: what was typed on the command line or None, taken where text is expected (`out=2024`).
    """
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    adapter = TypeAdapter(kind, config=ConfigDict(strict=True, arbitrary_types_allowed=True))
    for reading in _readings(value, text):
        try:
            return adapter.validate_python(reading)
        except ValidationError:
            continue
    raise InputError(f"{place}expected {expected(kind)}, got {shown(value)}")


def _readings(value: Any, text: Any) -> Iterator[Any]:
    """What `value` may mean, the plain reading first; NaN means nothing."""
    if isinstance(value, float) and math.isnan(value):
        return
    yield value
    if isinstance(value, float) and value.is_integer():
        yield int(value)
    if isinstance(value, list):
        yield tuple(value)
    if isinstance(value, str) and value.lower() in BOOLEAN_WORDS:
        yield BOOLEAN_WORDS[value.lower()]
    if isinstance(value, str):
        yield Path(value)
    if isinstance(value, Path):
        yield str(value)
    if text is not None:
        yield text
    if isinstance(text, str):
        yield Path(text)


def expected(kind: Any) -> str:
    """A type in a reader's words: `a number`, `one of linear, cosine`, `text or null`."""
    origin, members = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return ("one of " if len(members) > 1 else "") + ", ".join(map(str, members))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(expected(member) for member in members)
    if origin is typing.Annotated:
        return expected(members[0])
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        Path: "a path",
        type(None): "null",
        dict: "a mapping of name to value",
        list: "a list",
        tuple: "a list",
    }
    inner = [member for member in members if member is not Ellipsis]
    if origin in (list, tuple) and inner:
        return f"a list (each {expected(inner[0])})"
    return words.get(origin or kind, getattr(kind, "__name__", str(kind)))


def shown(value: Any) -> str:
    """`value` as an error shows it: short, and as YAML writes it."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    if isinstance(value, dict):
        return "a mapping" if value else "an empty mapping"
    return textwrap.shorten(repr(value), 80, placeholder="...")


def located(place: str, key: str, message: str) -> str:
    return f"{place}: {key}: {message}" if place else f"{key}: {message}"


def unknown(key: str, valid: Iterable[str], sections: Mapping[str, Section]) -> str:
    """Why `key` is no option: it belongs to other objectives, or is misspelt, and then the nearest valid one."""
    mine = class_name(sections["objective"]) if "objective" in sections else None
    online = [name for name, objective in objectives().items() if objective.facts["data"] == "prompts"]
    others = online if key in [row.key for row in describe(ONLINE)] else []
    others = others or [
        name
        for name, objective in objectives().items()
        if class_name(objective.section) != mine
        and key in [row.key for row in describe({"objective": objective.section})]
    ]
    if others:
        return f"not an option here; it belongs to {', '.join(others)}"
    near = nearest(key, valid)
    hint = f"did you mean {near}?" if near else "`prefopt train OBJECTIVE --help` lists them all"
    return f"unknown option; {hint}"


def nearest(word: str, valid: Iterable[str]) -> str | None:
    """The valid word most like `word`, or None if none is like it."""
    close = difflib.get_close_matches(word.lower().replace("-", "_"), list(valid), n=1, cutoff=0.6)
    return close[0] if close else None


# ---------------------------------------------------------------- writing


def to_yaml(resolved: Mapping[str, Any]) -> str:
    """The configuration as a recipe, one comment per section; `read_recipe` and `resolve` give it back unchanged, but
    for secrets in addresses, which are left out.
    """
    blocks = []
    for name, section in resolved.items():
        values = {option.name: getattr(section, option.name) for option in dataclasses.fields(section)}
        if hasattr(section, "facts"):
            values = {"objective": section.facts.name, **values}
        if values:
            body = yaml.dump(without_secrets(values), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=10**6)
            blocks.append(f"# {name}\n{body}")
    return "\n".join(blocks)


# ---------------------------------------------------------------- sections and their source


def sections(objective: str) -> dict[str, str]:
    """Section -> "module:Class" for training with this objective. InputError, with the nearest, if there is none."""
    known = objectives()
    if objective not in known:
        near = nearest(objective, known)
        hint = f"did you mean {near}?" if near else f"choose one of {', '.join(known)}"
        raise InputError(f"objective: {objective!r} is not one; {hint}")
    facts = known[objective].facts
    return {"objective": known[objective].section, **run_sections(facts["data"], bool(facts.get("critic")))}


def run_sections(data: str, critic: bool = False) -> dict[str, str]:
    """Section -> "module:Class" of a run, but for the objective's own. data, critic: as the objective's facts say."""
    own = ONLINE if data == "prompts" else OFFLINE if data in ("pairs", "labels") else {}
    return {**SECTIONS, **own, **(CRITIC if critic else {})}


def load(section: Section) -> type:
    """The dataclass that a section names."""
    if isinstance(section, type):
        return section
    module, name = section.split(":")
    loaded: type = getattr(importlib.import_module(module), name)
    return loaded


def class_name(section: Section) -> str:
    return section.__name__ if isinstance(section, type) else section.split(":")[1]


@functools.cache
def objectives() -> dict[str, ObjectiveSource]:
    """Name -> what help says of it, read from the `facts` in prefopt/objectives without importing them (torch)."""
    defaults = {
        row.key: ast.literal_eval(row.default)
        for row in describe({"": "prefopt.objectives.facts:Facts"})
        if row.default
    }
    found = {}
    for file in sorted((PACKAGE / "objectives").glob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            facts = _facts(node) if isinstance(node, ast.ClassDef) else {}
            if facts and isinstance(node, ast.ClassDef):
                section = f"prefopt.objectives.{file.stem}:{node.name}"
                found[facts["name"]] = ObjectiveSource(section, ast.get_docstring(node) or "", {**defaults, **facts})
    return found


def _facts(node: ast.ClassDef) -> dict[str, Any]:
    """The arguments of the class's `facts: ClassVar[Facts] = Facts(...)`; empty if it has none.

    ValueError on one that is no literal: help could not show it.
    """
    for statement in node.body:
        match statement:
            case ast.AnnAssign(target=ast.Name(id="facts"), value=ast.Call(keywords=words)):
                return {word.arg or "": _literal(f"{node.name}.facts.{word.arg}", word.value) for word in words}
    return {}


def _literal(name: str, value: ast.expr) -> Any:
    try:
        return ast.literal_eval(value)
    except ValueError:
        raise ValueError(f"{name} must be a literal, got {ast.unparse(value)}; help reads it unimported") from None


def describe(sections: Mapping[str, Section]) -> list[Option]:
    """Every option with its type, default and comment, in the order of declaration, read from the source.

    The comment is the lines above the field, or the class docstring's `name: ...` entry.
    """
    return [row for name, section in sections.items() for row in _fields(name, *_address(section)).values()]


def _fields(section: str, module: str, name: str) -> dict[str, Option]:
    """A dataclass's options by name, those of the classes it is made from first, as `dataclasses.fields` has them."""
    node, lines, module = _class_source(module, name)
    rows: dict[str, Option] = {}
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id not in ("Protocol", "NamedTuple"):
            rows |= _fields(section, module, base.id)
    for field in node.body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            kind = _spelt_out(module, ast.unparse(field.annotation))
            if not kind.startswith("ClassVar"):
                key = field.target.id
                comment = _comment_above(lines, field.lineno) or _docstring_entry(node, key)
                rows[key] = Option(key, section, kind, _default(field.value), comment)
    return rows


def _spelt_out(module: str, kind: str) -> str:
    """A type with names for sets of words, `Name = Literal[...]`, of this module or of one it imports, in full."""
    return re.sub(r"\b[A-Z]\w+", lambda found: _word_set(module, found[0]) or found[0], kind)


@functools.cache
def _word_set(module: str, name: str) -> str | None:
    if module.split(".")[0] != PACKAGE.name:
        return None
    for node in ast.parse(_source_file(module).read_text(encoding="utf-8")).body:
        match node:
            case ast.Assign(targets=[ast.Name(id=known)], value=ast.Subscript(value=ast.Name(id="Literal")) as words):
                if known == name:
                    return ast.unparse(words)
            case ast.ImportFrom(module=str(other), level=0):
                if name in [alias.name for alias in node.names]:
                    return _word_set(other, name)
    return None


def _address(section: Section) -> tuple[str, str]:
    if isinstance(section, type):
        return section.__module__, section.__name__
    module, name = section.split(":")
    return module, name


@functools.cache
def _class_source(module: str, name: str) -> tuple[ast.ClassDef, list[str], str]:
    """A class's syntax tree, its file's lines and its module; an import (`from prefopt.x import Name`) is followed."""
    text = _source_file(module).read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node, text.splitlines(), module
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            package = module if _source_file(module).name == "__init__.py" else module.rpartition(".")[0]
            return _class_source(importlib.util.resolve_name("." * node.level + (node.module or ""), package), name)
    raise ValueError(f"{module} does not define {name}")


def _source_file(module: str) -> Path:
    if module.split(".")[0] != PACKAGE.name:
        return Path(inspect.getsourcefile(sys.modules[module]) or "")
    base = PACKAGE.joinpath(*module.split(".")[1:])
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


def _default(value: ast.expr | None) -> str:
    """A default as help shows it: its source, a factory as the empty value it makes."""
    if value is None:
        return ""
    if isinstance(value, ast.Call) and ast.unparse(value.func).endswith("field"):
        factory = {word.arg: word.value for word in value.keywords}
        if "default" in factory:
            return ast.unparse(factory["default"])
        made = factory.get("default_factory")
        if isinstance(made, ast.Lambda):
            return ast.unparse(made.body)
        name = "" if made is None else ast.unparse(made)
        return {"dict": "{}", "list": "[]", "tuple": "()", "": ""}.get(name, f"{name}()")
    return ast.unparse(value)


def _comment_above(lines: list[str], line: int) -> str:
    """The comment lines directly above line number `line`, joined."""
    comment: list[str] = []
    for above in reversed(lines[: line - 1]):
        if not above.lstrip().startswith("#"):
            break
        comment.insert(0, above.strip().lstrip("#").strip())
    return " ".join(comment)


def _docstring_entry(node: ast.ClassDef, key: str) -> str:
    """`text` of a docstring line `key: text`, with its indented continuation lines."""
    found = re.search(rf"^{key}: (.+(?:\n[ \t]+.+)*)", ast.get_docstring(node) or "", re.MULTILINE)
    return " ".join(found[1].split()) if found else ""
