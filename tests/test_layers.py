"""Imports point one way: DESIGN's table of who may import whom, and one home for every heavy library."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "scjax"
WORDS = {"types", "check", "config", "batches", "mesh", "hosts", "whole"}
MATHEMATICS = {"nn", "kernels", "losses", "processes"}
SERVICES = {"checkpoint", "metrics"}
THIRD = {"train", "convert", "predict"}

# What a part may import besides itself. A part is a module or a package directly under scjax.
MAY_IMPORT = {
    **{part: WORDS for part in WORDS},
    "nn": WORDS,
    "kernels": WORDS,
    "losses": WORDS | {"kernels"},
    "processes": WORDS,
    "data": WORDS,
    "models": WORDS | MATHEMATICS,
    "checkpoint": WORDS,
    "metrics": WORDS | {"kernels", "losses"},
    "train": WORDS | {"checkpoint"},
    "convert": WORDS | {"models", "checkpoint"},
    "predict": WORDS | {"processes", "data", "models", "checkpoint"},
    "plot": WORDS,
    "experiment": WORDS | MATHEMATICS | SERVICES | THIRD | {"data", "models"},
    "presets": WORDS | MATHEMATICS | SERVICES | THIRD | {"data", "models", "experiment"},
}
TOP = {"bench", "cli", "demo", "info", "page", "__main__"}  # may import all

# Where a library may be imported; jax, jaxtyping and numpy may be everywhere.
HOMES = {
    "flax": {"nn", "models"},
    "ott": {"kernels", "losses"},
    "diffrax": {"processes"},
    "anndata": {"data", "predict"},  # predict builds what it gives back
    "pandas": {"data", "predict"},
    "h5py": {"data"},
    "zarr": {"data"},
    "sklearn": {"data"},
    "igraph": {"metrics"},
    "scipy": {"data", "metrics", "experiment", "predict"},  # predict: sparse graphs
    "ot": {"metrics"},
    "orbax": {"checkpoint"},
    "optax": {"train"},
    "tqdm": {"train"},
    "tensorboardX": {"train"},  # not installed everywhere
    "matplotlib": {"plot"},
    "tyro": {"cli"},
    "torch": {"convert"},
    "pyarrow": {"experiment"},  # not installed everywhere
    "rdkit": {"data"},
}
EVERYWHERE = {"jax", "jaxtyping", "numpy"}
# Costly to load, or not installed everywhere: inside the function that needs it, so that importing scjax stays free.
LAZY = {
    "torch",
    "rdkit",
    "ot",
    "ott",
    "orbax",
    "anndata",
    "pandas",
    "h5py",
    "zarr",
    "sklearn",
    "igraph",
    "matplotlib",
    "pyarrow",
    "tensorboardX",
}

MODULES = sorted(PACKAGE.rglob("*.py"))
name_of = lambda path: path.relative_to(PACKAGE.parent).as_posix()  # noqa: E731


def part_of(path):
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(path):
    """(dotted name, whether it is loaded when the module is) of every import statement, relative ones resolved."""
    package = ".".join(path.relative_to(PACKAGE.parent).parts[:-1])

    def walk(node, at_top):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, at_top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) - (child.level - 1)] if child.level else []
                base = ".".join([*above, *([child.module] if child.module else [])])
                # `from scjax import check` names the part; `from scjax.check import at_least` has it in the base
                names = [f"{base}.{a.name}" for a in child.names] if base == "scjax" else [base]
                yield from ((name, at_top) for name in names)
            else:
                deeper = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from walk(child, at_top and not deeper)

    return list(walk(ast.parse(path.read_text()), True))


def own(path):
    """Parts of scjax that a module imports, itself and the version excepted."""
    parts = {name.split(".")[1] for name, _ in imports(path) if name.startswith("scjax.")}
    return parts - {part_of(path), "__version__"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path):
    part = part_of(path)
    if part in TOP:
        return
    allowed = MAY_IMPORT.get(part, set())  # a part that the table lacks may import nothing, and is to be entered
    assert own(path) <= allowed, f"{name_of(path)} ({part}) must not import {sorted(own(path) - allowed)}"


def test_nothing_below_imports_the_top():
    for path in MODULES:
        if part_of(path) not in TOP:
            assert not own(path) & TOP, name_of(path)


def test_every_part_is_in_the_table():
    parts = {part_of(path) for path in MODULES} - {"__init__"}
    assert parts == (set(MAY_IMPORT) | TOP) & parts, f"enter {sorted(parts - set(MAY_IMPORT) - TOP)}"


def test_the_table_has_no_cycle():
    done = set()
    while remaining := set(MAY_IMPORT) - done:
        ready = {part for part in remaining if MAY_IMPORT[part] - WORDS <= done | {part}}
        assert ready, f"these import each other: {sorted(remaining)}"
        done |= ready


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_library_has_one_home(path):
    part = part_of(path)
    for name, _ in imports(path):
        library = name.split(".")[0]
        if library == "scjax" or library in sys.stdlib_module_names or library in EVERYWHERE:
            continue
        assert library in HOMES, f"{name_of(path)} imports {library}, which has no home"
        assert part in HOMES[library], f"{name_of(path)} imports {library}, whose home is {sorted(HOMES[library])}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_heavy_libraries_are_imported_where_they_are_used(path):
    eager = {name.split(".")[0] for name, at_top in imports(path) if at_top}
    assert not eager & LAZY, f"{name_of(path)} loads {sorted(eager & LAZY)} when it is imported"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_annotations_stay_values(path):
    """`from __future__ import annotations` would blind the checker of shapes."""
    assert "__future__" not in {name for name, _ in imports(path)}


def test_the_reader_of_imports_sees_them_all(tmp_path, monkeypatch):
    """Nested, relative, aliased and lazy imports."""
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "scjax")
    folder = tmp_path / "scjax" / "models"
    folder.mkdir(parents=True)
    module = folder / "new.py"
    module.write_text(
        "import jax.numpy as jnp, optax\nfrom scjax import check, data\n"
        "from .scimf import Config\nfrom ..train import x\n"
        "if True:\n    import flax\ndef f():\n    import torch\n    from scjax.plot.palette import y\n"
    )
    assert own(module) == {"check", "data", "train", "plot"}
    assert dict(imports(module)) == {
        "jax.numpy": True,
        "optax": True,
        "scjax.check": True,
        "scjax.data": True,
        "scjax.models.scimf": True,
        "scjax.train": True,
        "flax": True,
        "torch": False,
        "scjax.plot.palette": False,
    }
