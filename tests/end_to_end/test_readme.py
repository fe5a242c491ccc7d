"""Commands and examples of README and guide run as printed, and their links lead somewhere."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_cellsets

from scjax.data import datasets

ROOT = Path(__file__).parents[2]
README, GUIDE = ((ROOT / name).read_text() for name in ("README.md", "GUIDE.md"))


def blocks(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


def test_library_examples():
    series, perturbation, cell_sets = blocks("python")
    names = {}
    exec(series, names)  # the reader's own paste
    assert names["path"].x.shape == (3, *names["x0"].shape)
    assert names["v"].shape == names["x0"].shape
    exec(perturbation, names := {})
    assert names["cells"].shape == names["controls"].shape
    assert (names["cells"] >= 0).all()
    exec(cell_sets, names := {})
    assert names["sets"].shape == names["x_0"].shape == names["controls"].shape
    assert (names["sets"] >= 0).all()


def commands_of(file):
    """The commands of the block that trains on this file, as words."""
    (script,) = (b for b in blocks("") if f"--data {file}" in b)
    lines = script.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("scjax")]


def run_all(commands, shorter, folder):
    assert {c[1] for c in commands} == {"show", "train", "predict", "evaluate"}
    for _, name, *words in commands:
        more = shorter if name == "train" else ()
        command = [sys.executable, "-m", "scjax", name, *words, *more]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{name} {words}\n{done.stdout}\n{done.stderr}"


def test_commands_on_a_users_file(tmp_path):
    """In the order of the README, on a file with a column of another name; only the training is cut."""
    adata = datasets.klein2015()
    adata.obs["day"] = adata.obs.pop("time")
    adata.write_h5ad(tmp_path / "cells.h5ad")
    shorter = ("--n-steps", "20", "--sampling.n-cells", "32", "--sampling.n-targets", "32")
    run_all(commands_of("cells.h5ad"), shorter, tmp_path)
    assert (tmp_path / "predicted.h5ad").exists()
    assert (tmp_path / "evaluation.json").exists()


def test_commands_on_a_users_screen(tmp_path):
    adata = datasets.norman2019()
    adata.obs["condition"] = adata.obs.pop("perturbation")
    adata.write_h5ad(tmp_path / "perturbed.h5ad")
    cut = {"n-steps": 10, "checkpoint-every": 10, "optimizer.n-warmup": 0, "model.d-model": 8, "model.n-layers": 1}
    cut |= {"model.n-heads": 2, "model.graph-heads": 2, "model.gamma": 0.0, "preprocess.n-top-genes": 40}
    cut |= {"sampling.n-genes": 16, "sampling.n-populations": 2, "generation.n-cells": 8, "generation.n-steps": 2}
    run_all(commands_of("perturbed.h5ad"), [w for k, v in cut.items() for w in (f"--{k}", str(v))], tmp_path)
    assert (tmp_path / "generated.h5ad").exists()
    assert (tmp_path / "screen.json").exists()


def test_commands_on_a_users_sets(tmp_path):
    """Training, prediction, table; then the same from a run that was pretrained on two files."""
    cells = tiny_cellsets.make_adata()
    other = tiny_cellsets.make_adata((*tiny_cellsets.GENES[2:], "extra"), donors=("e1", "e2"))
    for adata, file in ((cells, "donors.h5ad"), (other, "atlas.h5ad")):
        adata.X = np.log1p(adata.X).astype(np.float32)
        adata.write_h5ad(tmp_path / file)
    first, second = (b for b in blocks("", GUIDE) if "donors.h5ad" in b)
    cut = {"n-steps": 4, "scan-steps": 2, "checkpoint-every": 4, "optimizer.n-warmup": 0, "sampling.n-cells": 6}
    cut |= {"model.d-model": 8, "model.n-layers": 1, "model.n-heads": 2, "generation.n-steps": 2}
    lines = (first + second).replace("\\\n", " ").splitlines()
    for _, *words in (shlex.split(line) for line in lines):
        words, to = (words[:-2], words[-1]) if ">" in words else (words, None)
        if words[0] == "train":
            words += [w for k, v in cut.items() for w in (f"--{k}", str(v))]
        done = subprocess.run(
            [sys.executable, "-m", "scjax", *words], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        if to:
            (tmp_path / to).write_text(done.stdout)
    assert all((tmp_path / name).exists() for name in ("sets.h5ad", "donors.json", "both.json"))


def test_the_two_commands_come_first():
    first = blocks("")[0]
    assert [line.split("#")[0].strip() for line in first.splitlines() if line] == ["make demo", "make test"]
    assert "make test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("text", [README, GUIDE], ids=["README", "GUIDE"])
def test_links_lead_somewhere(text):
    places = re.findall(r"\]\((?!https?:)([^)]+)\)", text) + re.findall(
        r"`((?:scjax|notebooks|benchmarks)/[^\s`*]*)`", text
    )
    assert places
    headings = {re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-") for line in text.splitlines()}
    no_results = not (ROOT / "benchmarks" / "results").is_dir()  # they are not part of the source distribution
    for place in places:
        if no_results and place.startswith("benchmarks/results/"):
            continue
        if place.startswith("#"):
            assert place[1:] in headings
        else:
            assert (ROOT / place).exists(), place
