"""The architecture, as far as imports show it: layers, and no circle.

Imports are read from the syntax trees, so a late import and one under TYPE_CHECKING
count like any other.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "shmcache"

# From the lowest layer to the highest.  A module may import from its own folder and
# lower layers; units on one line do not know each other.
LAYERS = (
    ("errors", "_version", "_parser"),
    ("_format",),
    ("_arguments",),
    ("_segment",),
    ("_engine",),
    ("_process",),
    ("_recipes", "stats", "_views"),
    ("_member",),
    ("cache",),
    ("_handles",),
    ("handles",),
    ("_component", "_listeners"),
    ("pools", "correlations", "configs"),
    ("_observe",),
    ("prometheus", "otel"),
    ("",),  # the package itself: what ``import shmcache`` offers
    ("demo",),
    ("soak",),
    ("cli",),
    ("__main__",),
)
LEVELS = {unit: level for level, units in enumerate(LAYERS) for unit in units}
# check.py is the specification of a sound segment, which is read as a whole.
LONGER_FILES = {"shmcache/_format/check.py"}
LONGEST_FILE = 700
LONGEST_FUNCTION = 60

Module = tuple[str, ...]  # its name, in parts

if not PACKAGE.is_dir():
    pytest.skip(
        "tests were copied out of their tree: no shmcache/ beside",
        allow_module_level=True,
    )


def module_of(path: Path) -> Module:
    """The module that a file is."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def unit_of(module: Module) -> str:
    """The folder or file below the package that a module belongs to."""
    return module[1] if len(module) > 1 else ""


def imports(module: Module) -> set[Module]:
    """The modules of the package that a module imports, wherever in its text."""
    found: set[Module] = set()
    for node in ast.walk(ast.parse(FILES[module].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = tuple(name.split("."))
            while parts and parts not in FILES:
                parts = parts[:-1]
            if parts and parts != module:
                found.add(parts)
    return found


def test_every_module_has_a_layer() -> None:
    """The table names each folder and file of the package, and nothing else."""
    assert {unit_of(module) for module in FILES} == set(LEVELS)


@pytest.mark.parametrize("module", FILES, ids=".".join)
def test_module_imports_from_lower_layers_only(module: Module) -> None:
    """A module knows its own folder and what is below it."""
    own = unit_of(module)
    wrong = {
        ".".join(other)
        for other in imports(module)
        if unit_of(other) != own and LEVELS[unit_of(other)] >= LEVELS[own]
    }
    assert wrong == set()


def test_no_module_imports_itself_by_way_of_others() -> None:
    """There is no circle of imports, not even within a folder."""
    graph = {module: imports(module) for module in FILES}
    done: set[Module] = set()
    path: list[Module] = []

    def visit(module: Module) -> None:
        circle = (
            [".".join(m) for m in path[path.index(module) :]] if module in path else []
        )
        assert not circle, f"a circle: {' -> '.join([*circle, circle[0]])}"
        if module in done:
            return
        path.append(module)
        for other in sorted(graph[module]):
            visit(other)
        done.add(path.pop())

    for module in graph:
        visit(module)


def test_compiled_unit_includes_its_parts_from_low_to_high() -> None:
    """A part of the engine needs only parts that were included before it."""
    unit = (PACKAGE / "_engine/compiled.pyx").read_text("utf-8")
    included = [
        module_of((PACKAGE / "_engine" / name).resolve())
        for name in re.findall(r'^include "(.*)"$', unit, re.MULTILINE)
    ]
    for at, module in enumerate(included):
        needed = imports(module) & set(included)
        assert needed <= set(included[:at]), f"{module} is included too early"


def test_engine_calls_nothing_back_up() -> None:
    """The classes of the engine are a chain, and each calls only itself and the earlier
    ones; what the engine cannot know it asks its ``peers``.
    """
    unit = (PACKAGE / "_engine/compiled.pyx").read_text("utf-8")
    known: set[str] = set()
    for name in re.findall(r'^include "(\w+)\.py"$', unit, re.MULTILINE):
        tree = ast.parse((PACKAGE / "_engine" / f"{name}.py").read_text("utf-8"))
        called: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                known.add(node.name)
            elif (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == "self"
                and node.func.attr.startswith("_")
            ):
                called.add(node.func.attr)
        assert called <= known, f"{name}.py calls what comes later"


@pytest.mark.parametrize("module", FILES, ids=".".join)
def test_files_and_functions_are_short(module: Module) -> None:
    """A reader can hold each file, and each function, in the head."""
    path = FILES[module]
    name = path.relative_to(ROOT).as_posix()
    text = path.read_text("utf-8")
    assert len(text.splitlines()) <= LONGEST_FILE or name in LONGER_FILES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert lines_of_code(node) <= LONGEST_FUNCTION, f"{name}: {node.name}"


def lines_of_code(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The lines of a function's body, its docstring not counted."""
    assert function.end_lineno is not None
    first = function.body[0]
    start = first.lineno - 1
    if ast.get_docstring(function) is not None:
        start = first.end_lineno or start
    return function.end_lineno - start
