"""What is shipped: the wheel and the source distribution, built here and looked into."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import scjax

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def build(root: Path, out: Path, kind: str) -> Path:
    """By the build backend itself, as pip and build call it; nothing is fetched."""
    pytest.importorskip("hatchling", reason="hatchling builds the distributions; it comes with the extra `test`")
    program = f"from hatchling.build import build_{kind}; print(build_{kind}({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    return build(ROOT, tmp_path_factory.mktemp("sdist"), "sdist")


@pytest.fixture(scope="module")
def unpacked(sdist) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent, filter="data")
    return sdist.parent / sdist.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(unpacked, tmp_path_factory) -> Path:
    """From the source distribution, so that both are known to be whole."""
    return build(unpacked, tmp_path_factory.mktemp("wheel"), "wheel")


def files(folder: Path, inside: str) -> set[str]:
    found = (p for p in (folder / inside).rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return {p.relative_to(folder).as_posix() for p in found}


def test_the_wheel_is_the_package(wheel):
    """All of it with data and the mark of types, licences beside; no tests; within 2 MB."""
    names = set(zipfile.ZipFile(wheel).namelist())
    info = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert names - info == files(ROOT, "scjax")
    assert {"scjax/py.typed", "scjax/data/files/klein2015.h5ad"} <= names
    assert {"LICENSE", "NOTICE"} <= {name.rpartition("/")[2] for name in info}
    assert wheel.stat().st_size < 2e6


def test_the_source_distribution_can_be_tested(sdist, unpacked):
    """Tests and what they look into (notebooks, benchmarks, make's files), without results of benchmarks."""
    for folder in ("scjax", "tests", "notebooks"):
        assert files(unpacked, folder) == {f for f in files(ROOT, folder) if ".ipynb_checkpoints" not in f}
    for name in (
        "Makefile",
        "constraints.txt",
        ".ci/setup",
        ".ci/run",
        "CITATION.cff",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
    ):
        assert (unpacked / name).read_bytes() == (ROOT / name).read_bytes()
    assert (unpacked / "benchmarks" / "harness.py").exists()
    assert not (unpacked / "benchmarks" / "results").exists()
    assert sdist.stat().st_size < 3e6


def test_it_runs_from_the_wheel(wheel, tmp_path):
    """Elsewhere, from the installed files alone: the command, and the data that ship with it."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    program = "import scjax; from scjax.data import datasets; print(scjax.__file__, datasets.klein2015().n_obs)"
    for command in (["-c", program], ["-m", "scjax", "show", "scimf/klein"]):
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        told = done.stdout.split()
        assert told[:2] == [str(tmp_path / "site" / "scjax" / "__init__.py"), "1000"] or told[0] == "scimf/klein"


def test_metadata_of_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("METADATA")]
        told = archive.read(name).decode()
        entry = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
    for line in (f"Version: {scjax.__version__}", "License-Expression: Apache-2.0", "Requires-Python: >=3.11"):
        assert line in told.splitlines()
    for extra in PROJECT["optional-dependencies"]:
        assert f"Provides-Extra: {extra}" in told.splitlines()
    assert "scjax = scjax.cli:main" in entry


def test_extras():
    """Those of DESIGN, and one for developers."""
    extras = PROJECT["optional-dependencies"]
    assert {"torch", "logging", "chem", "eval", "cuda12", "cuda13", "tpu", "test", "dev"} <= set(extras)
    assert all(">=" in one or "[" in one for wanted in extras.values() for one in wanted)
    assert not any("<" in one or "==" in one for one in PROJECT["dependencies"])


def test_one_version_everywhere():
    citation = (ROOT / "CITATION.cff").read_text()
    assert PROJECT["version"] == scjax.__version__
    assert f"\nversion: {scjax.__version__}\n" in citation


def test_citation_names_the_papers():
    yaml = pytest.importorskip("yaml", reason="PyYAML comes with flax; without it the file is not parsed")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["authors"] == [{"name": "The scjax authors"}]
    papers = {reference["notes"]: reference["identifiers"][0]["value"] for reference in citation["references"]}
    readme = (ROOT / "README.md").read_text()
    assert set(papers) == {"scIMF", "scDFM", "PerturbDiff"}
    for number in papers.values():
        assert number.removeprefix("arXiv:") in readme


def test_licences_of_what_is_shipped():
    """The package's own, and a part of NOTICE for each data file."""
    assert (ROOT / "LICENSE").read_text().split()[:3] == ["Apache", "License", "Version"]
    named = set(re.findall(r"^scjax/data/files/\S+", (ROOT / "NOTICE").read_text(), flags=re.M))
    assert named == files(ROOT, "scjax/data/files")
