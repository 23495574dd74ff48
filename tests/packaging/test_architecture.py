"""Modules import only downwards: no circles, the trainer above the projection, the benchmarks'
harness below their reports."""

import ast
import graphlib
import importlib

import pytest

import dfa_kernels
from tests import ROOT

PACKAGES = (ROOT / "dfa_kernels", ROOT / "benchmarks")

# No module imports from a floor above its own. Modules not named here are the projection, on floor
# 2. The benchmarks are on floors below 0.
FLOORS = {
    0: {"dfa_kernels", "__main__", "cli", "demo", "integrations"},
    1: {"nn"},
    3: {"stream", "layers", "version"},
}


def module_of(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(file): file for package in PACKAGES for file in package.rglob("*.py")}


def imports(source):
    """Our modules that a source imports anywhere, including in functions and for type checking.

    The parent packages of an imported module do not count.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in inner}
    return found & FILES.keys()


GRAPH = {module: imports(file.read_text()) for module, file in FILES.items()}


def floor(module):
    package, *inner = module.split(".")
    name = inner[0] if inner else package
    if package == "benchmarks":
        return {"harness": -1, "report": -2}.get(name, -3)
    return next((level for level, names in FLOORS.items() if name in names), 2)


def test_imports_are_found():
    source = """
import dfa_kernels.stream
from dfa_kernels.nn import dfa, DFA
if TYPE_CHECKING:
    from dfa_kernels import checks
def later():
    from dfa_kernels.nn.rows import to_rows
"""
    found = {"stream", "nn.dfa", "nn", "checks", "nn.rows"}
    assert imports(source) == {f"dfa_kernels.{name}" for name in found}


def test_no_circles():
    graphlib.TopologicalSorter(GRAPH).prepare()


def test_a_circle_would_be_found():
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(
            {**GRAPH, "dfa_kernels.stream": {"dfa_kernels.checks"}}
        ).prepare()


@pytest.mark.parametrize("module", sorted(FILES))
def test_nothing_imports_what_is_above(module):
    assert [name for name in GRAPH[module] if floor(name) < floor(module)] == []


def test_floors_are_of_modules_there_are():
    named = {name for names in FLOORS.values() for name in names}
    assert {f"dfa_kernels.{name}" for name in named - {"dfa_kernels"}} <= FILES.keys()


def test_the_trainers_modules_are_in_this_order():
    """Each imports only those before it."""
    order = ["rows", "functions", "sources", "state", "guards", "shards", "signals", "plan"]
    order += ["chunks", "ties", "linear_cross_entropy", "sharded", "ranks", "scripting", "layer"]
    order += ["fully_sharded", "matching", "settings", "passes", "loading", "dfa", "lazy_logits"]
    order += ["hooks", "points", "recompile", "attachment", "angles"]
    order += ["links", "agreement", "pipeline"]
    modules = [f"dfa_kernels.nn.{name}" for name in order]
    assert {*modules, "dfa_kernels.nn"} == {name for name in FILES if floor(name) == 1}
    for position, module in enumerate(modules):
        assert GRAPH[module] & {"dfa_kernels.nn", *modules[position:]} == set()


@pytest.mark.parametrize("name", dfa_kernels.__all__)
def test_no_public_name_hides_a_module(name):
    """`dfa_kernels.backends` can be called, but is the package itself."""
    module = f"dfa_kernels.{name}"
    if module in FILES:
        assert getattr(dfa_kernels, name) is importlib.import_module(module)


def test_the_benchmarks_go_by_their_full_names():
    """No sys.path edits, and no second `figures` or `report`."""
    names = [file.stem for file in (ROOT / "benchmarks").rglob("*.py") if file.stem[0] != "_"]
    assert len(names) == len({*names})
    stems = {*names, "harness"}
    for file in (ROOT / "benchmarks").rglob("*.py"):
        source = file.read_text()
        assert "sys.path" not in source
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                assert not stems & {alias.name for alias in node.names}, file
            elif isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] not in stems, file
