"""Commands and examples of README and guide run as printed, and their links lead somewhere."""

import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import anndata
import jax
import numpy as np
import pytest
import tiny_cellsets

from scjax import presets
from scjax.cli import main
from scjax.data import datasets

ROOT = Path(__file__).parents[2]
README, GUIDE = ((ROOT / name).read_text() for name in ("README.md", "GUIDE.md"))


def blocks(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


def test_experiment_from_python(tmp_path, monkeypatch):
    """From preset to report; only the training is cut."""
    monkeypatch.chdir(tmp_path)
    experiment, _ = blocks("python")
    assert experiment.count("n_steps=1000") == 1
    exec(experiment.replace("n_steps=1000", "n_steps=10"), names := {})  # the reader's own paste
    assert set(names["predicted"].obs["time"]) == {2.0, 4.5}
    assert "real vs real" in names["report_of"](names["table"]).render(names["table"])
    assert "<img" in (tmp_path / "report" / "report.html").read_text()


def test_functions_from_python():
    _, series = blocks("python")
    exec(series, names := {})
    x0 = names["batch"][0.0]
    assert names["path"].x.shape == (3, *x0.shape)
    assert names["v"].shape == x0.shape
    assert jax.tree.structure(names["grads"]) == jax.tree.structure(names["params"])
    assert names["state"].step == 20
    key = jax.random.key(9)
    assert names["loss"](names["state"].params, names["batch"], key)[0] < names["metrics"]["energy"]
    perturbation, cell_sets = blocks("python", GUIDE)
    exec(perturbation, names := {})
    assert names["cells"].shape == names["controls"].shape
    assert (names["cells"] >= 0).all()
    exec(cell_sets, names := {})
    assert names["sets"].shape == names["x_0"].shape == names["controls"].shape
    assert (names["sets"] >= 0).all()


def commands_of(file, text=README):
    """The commands of the block that trains on this file, as words."""
    (script,) = (b for b in blocks("", text) if f"--data {file}" in b)
    lines = script.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("scjax")]


def run_all(commands, shorter, folder):
    assert {c[1] for c in commands} == {"show", "train", "predict", "evaluate"}
    for _, name, *words in commands:
        more = shorter if name == "train" else ()
        command = [sys.executable, "-m", "scjax", name, *words, *more]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{name} {words}\n{done.stdout}\n{done.stderr}"


def run_here(commands, shorter):
    """The same in this process, which spares the start of Python."""
    for _, name, *words in commands:
        main([name, *words, *(shorter if name == "train" else ())])


TINY_SERIES = ("--n-steps", "20", "--sampling.n-cells", "32", "--sampling.n-targets", "32")
TINY_PERTURBATION = {"n-steps": 10, "checkpoint-every": 10, "optimizer.n-warmup": 0, "model.d-model": 8}
TINY_PERTURBATION |= {"model.n-layers": 1, "model.n-heads": 2, "model.graph-heads": 2, "model.gamma": 0.0}
TINY_PERTURBATION |= {"preprocess.n-top-genes": 40, "sampling.n-genes": 16, "sampling.n-populations": 2}
TINY_PERTURBATION |= {"generation.n-cells": 8, "generation.n-steps": 2}
TINY_SETS = {"n-steps": 4, "scan-steps": 2, "checkpoint-every": 4, "optimizer.n-warmup": 0, "sampling.n-cells": 6}
TINY_SETS |= {"model.d-model": 8, "model.n-layers": 1, "model.n-heads": 2, "generation.n-steps": 2}


def as_words(options):
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def test_commands_on_a_users_file(tmp_path):
    """In the order of the README, on a file with a column of another name; only the training is cut."""
    adata = datasets.klein2015()
    adata.obs["day"] = adata.obs.pop("time")
    adata.write_h5ad(tmp_path / "cells.h5ad")
    run_all(commands_of("cells.h5ad"), TINY_SERIES, tmp_path)
    assert (tmp_path / "predicted.h5ad").exists()
    assert (tmp_path / "evaluation.json").exists()


def test_commands_on_a_users_screen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adata = datasets.norman2019()
    adata.obs["condition"] = adata.obs.pop("perturbation")
    adata.write_h5ad("perturbed.h5ad")
    run_here(commands_of("perturbed.h5ad"), as_words(TINY_PERTURBATION))
    assert (tmp_path / "generated.h5ad").exists()
    assert (tmp_path / "screen.json").exists()


def test_commands_on_logged_values_of_a_series(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adata = datasets.klein2015()
    adata.X = np.log1p(1e4 * adata.X / adata.X.sum(axis=1, keepdims=True))
    adata.obs["hours"] = 24 * adata.obs.pop("time")
    adata.write_h5ad("logged.h5ad")
    run_here(commands_of("logged.h5ad", GUIDE), TINY_SERIES)
    made = anndata.read_h5ad("logged_predicted.h5ad")
    assert set(made.obs) == {"hours", "start_cell", "kinetic_energy", "seed"}  # as the table of columns has it
    assert set(made.obs["hours"]) == {48.0}
    assert "X_latent" in made.obsm
    assert (tmp_path / "logged_report" / "report.html").exists()


def test_commands_on_counts_of_a_screen_with_other_names(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    adata = datasets.norman2019()
    logged = adata.copy()
    adata.X = np.round(np.expm1(np.asarray(adata.X.todense()))).astype(np.float32)  # integers that look like counts
    names = adata.obs.pop("perturbation").astype(str)
    adata.obs["guide"] = [name.replace("control", "NT").replace("+", "_") for name in names]
    logged.obs = adata.obs
    adata.write_h5ad("guides.h5ad")
    logged.write_h5ad("guides_logged.h5ad")
    commands = commands_of("guides.h5ad", GUIDE)
    (train,) = (words for words in commands if words[1] == "train")
    i = train.index("--spec.space")
    cut = as_words(TINY_PERTURBATION)
    with pytest.raises(SystemExit):
        main([*train[1:i], *train[train.index("--set") :], *cut, "--out", "refused"])
    assert "space='counts'" in capsys.readouterr().err
    assert not Path("refused").exists()
    run_here(commands, cut)
    made = anndata.read_h5ad("guides_predicted.h5ad")
    assert set(made.obs) == {"condition", "context", "source_cell", "seed"}
    assert set(made.obs["condition"]) == {"KLF1+MAP2K6"}
    assert set(made.obs["context"]) == {""}
    assert made.uns["scjax"]["space"] == "log-normalised expression in X"
    (compare,) = (b for b in blocks("", GUIDE) if "guides_logged.h5ad" in b)
    main(shlex.split(compare.replace("\\\n", " "))[1:])
    assert (tmp_path / "guides_compared" / "report.html").exists()


def test_commands_of_intervals(tmp_path, monkeypatch):
    """The fraction and the seed leave enough populations for the level, all of perturbations that training knows."""
    monkeypatch.chdir(tmp_path)
    datasets.mcfaline2023().write_h5ad("lines.h5ad")
    shorter = TINY_SETS | {"validate-every": 2, "preprocess.n-top-genes": 20}
    run_here(commands_of("lines.h5ad", GUIDE), as_words(shorter))
    made = anndata.read_h5ad("intervals.h5ad")
    assert made.shape == (1, 20)
    assert np.isfinite(made.layers["low"]).all()
    assert (made.layers["low"] < made.layers["high"]).all()


def test_commands_on_a_users_sets(tmp_path, monkeypatch):
    """Training, prediction, table; then the same from a run that was pretrained on two files."""
    monkeypatch.chdir(tmp_path)
    cells = tiny_cellsets.make_adata()
    other = tiny_cellsets.make_adata((*tiny_cellsets.GENES[2:], "extra"), donors=("e1", "e2"))
    for adata, file in ((cells, "donors.h5ad"), (other, "atlas.h5ad")):
        adata.X = np.log1p(adata.X).astype(np.float32)
        adata.write_h5ad(file)
    first, second = (b for b in blocks("", GUIDE) if "donors.h5ad" in b)
    lines = (first + second).replace("\\\n", " ").splitlines()
    for words in (shlex.split(line) for line in lines):
        words, to = (words[:-2], words[-1]) if ">" in words else (words, None)
        with contextlib.redirect_stdout(io.StringIO()) as told:
            run_here([words], as_words(TINY_SETS))
        if to:
            (tmp_path / to).write_text(told.getvalue())
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
    no_results = not (ROOT / "benchmarks" / "results").is_dir()  # they are not part of the source distribution
    for place in places:
        if no_results and place.startswith("benchmarks/results/"):
            continue
        file, _, heading = place.partition("#")
        assert not file or (ROOT / file).exists(), place
        assert not heading or heading in headings((ROOT / file).read_text() if file else text), place


def headings(text):
    """As the addresses within a page have them."""
    return {
        re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    }


@pytest.fixture(scope="module")
def options():
    """Of all commands, and of training each kind."""
    found = set()
    kinds = [["train", "--preset", name] for name in ("scimf/klein", "scdfm/norman_subset", "perturbdiff/mcfaline")]
    for command in (*kinds, ["predict"], ["evaluate"], ["convert"], ["bench"], ["show"], ["demo"]):
        told = io.StringIO()
        with contextlib.redirect_stdout(told), pytest.raises(SystemExit):
            main([*command, "--help"])
        found |= set(re.findall(r"--[a-z][\w.-]*", told.getvalue()))
    return found


@pytest.mark.parametrize("text", [README, GUIDE], ids=["README", "GUIDE"])
def test_options_exist(text, options):
    """Those of scjax; other programs' are named here."""
    others = {"--pert-col", "--control-pert"}  # of cell-eval
    named = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", text)) - others
    named -= {"--help", "--split.NAME"}
    assert named
    assert named <= options, sorted(named - options)


def test_presets_exist():
    named = set(re.findall(r"`((?:scimf|scdfm|perturbdiff)/\w+)`", README + GUIDE))
    assert {"scimf/klein", "perturbdiff/mcfaline"} <= named <= set(presets.names())
