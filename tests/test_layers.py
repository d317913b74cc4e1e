"""Imports point downwards only, and what must start fast does not import torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import prefopt

PACKAGE = Path(prefopt.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# The one statement of the layers. A module may import from the rows above its own, never from its own row:
# what stands in one row can be read, tested and replaced without the others.
LAYERS = (
    {"records", "metrics", "streams"},  # standard library only
    {"batch", "ranks", "sandbox", "endpoint"},
    {"budget", "optimizer", "checkpoint"},
    {"objectives", "data", "models", "loop", "rewards", "detectors"},
    {"evaluate", "preflight"},
    {"audit"},
    {"rollout", "advice"},
    {"bench"},
    {"config"},
    {"doctor"},
    {"recipes", "catalogue", "terminal"},
    {"commands", "integrations"},
    {"cli"},
    {"__init__", "__main__"},
)
DEPTH = {name: depth for depth, row in enumerate(LAYERS) for name in row}
STANDARD_LIBRARY_ONLY = LAYERS[0]


def unit(path: Path) -> str:
    """The layer table's name for a file: `data` for prefopt/data/read.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, text: str) -> Iterator[str]:
    """Dotted names that a file imports, anywhere in it but under `if TYPE_CHECKING:`; relative ones made absolute."""
    package = ["prefopt", *path.relative_to(PACKAGE).parts[:-1]]
    for node in running(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def running(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node that can run."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from (inner for statement in node.orelse for inner in [statement, *running(statement)])
            continue
        yield node
        yield from running(node)


def upward(path: Path, text: str) -> list[str]:
    """The imports of a file that do not point downwards."""
    here = unit(path)
    wrong = []
    for name in imports(path, text):
        top, _, rest = name.partition(".")
        there = rest.split(".")[0]
        # The version is a constant of the package itself, set before anything is imported.
        if top != "prefopt" or there in (here, "__version__"):
            continue
        if DEPTH.get(there, len(LAYERS)) >= DEPTH[here]:
            wrong.append(f"{here} imports {name}")
    return wrong


def test_every_part_of_the_package_has_a_layer() -> None:
    assert {unit(path) for path in MODULES} - DEPTH.keys() == set()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    assert upward(path, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("name", sorted(STANDARD_LIBRARY_ONLY))
def test_the_lowest_layer_imports_the_standard_library_only(name: str) -> None:
    path = PACKAGE / f"{name}.py"
    found = {module.split(".")[0] for module in imports(path, path.read_text(encoding="utf-8"))}
    assert found - sys.stdlib_module_names == set()


@pytest.mark.parametrize(
    ("file", "text", "wrong"),
    [
        ("data/x.py", "from prefopt.models import load", ["data imports prefopt.models.load"]),
        ("data/x.py", "import prefopt.loop", ["data imports prefopt.loop"]),
        ("data/x.py", "def f():\n from prefopt import config", ["data imports prefopt.config"]),
        ("data/x.py", "from ..evaluate import judge", ["data imports prefopt.evaluate.judge"]),
        ("data/x.py", "from prefopt import train", ["data imports prefopt.train"]),
        ("data/x.py", "import prefopt", ["data imports prefopt"]),
        ("data/x.py", "from . import read\nfrom prefopt.data.read import rows\nfrom .read import x", []),
        ("data/x.py", "from prefopt.records import Example\nimport torch\nfrom prefopt import __version__", []),
        ("data/x.py", "if TYPE_CHECKING:\n from prefopt.models import load", []),
        ("data/x.py", "if TYPE_CHECKING:\n pass\nelse:\n import prefopt.cli", ["data imports prefopt.cli"]),
        ("batch.py", "from prefopt.metrics import known", []),
        ("metrics.py", "from prefopt.records import plain", ["metrics imports prefopt.records.plain"]),
    ],
)
def test_the_check_sees(file: str, text: str, wrong: list[str]) -> None:
    assert upward(PACKAGE / file, text) == wrong


HEAVY = {"torch", "transformers", "datasets", "pandas", "pyarrow", "peft", "accelerate"}


@pytest.mark.parametrize(
    "module",
    [
        "prefopt",
        "prefopt.data",
        "prefopt.rewards",
        "prefopt.detectors",
        "prefopt.audit",
        "prefopt.config",
        "prefopt.catalogue",
        "prefopt.cli",
    ],
)
def test_importing_it_does_not_import(module: str) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert HEAVY & set(loaded) == set()
