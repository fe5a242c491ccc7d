"""`scjax convert` as a user types it: runs to files and back, predictions and finetuning from what came back."""

import json
import re
from dataclasses import replace

import anndata
import jax
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from test_cli import refused
from tiny_cellsets import EXPERIMENT, GENES, MODEL, make_adata

from scjax import convert
from scjax.cli import main
from scjax.experiment import Pretrained
from scjax.experiment.cellsets import prepare
from scjax.predict import load, predict

SPEC = ("spec.perturbation=drug", "spec.cell_type=kind", "spec.batch=donor", 'spec.covariates=["kind","donor"]')
SETTINGS = [word for one in (*SPEC, "n_times=30") for word in ("--set", one)]


@pytest.fixture(scope="module")
def here(tmp_path_factory, cellset_run, cellset_trained):
    """A run's average as a file of PyTorch names, and that file converted, with all names."""
    folder = tmp_path_factory.mktemp("convert")
    names = cellset_trained.names
    vocabulary = {"perturbation": names.perturbation[1:], "cell_type": names.cell_type, "batch": names.batch}
    (folder / "names.json").write_text(json.dumps(vocabulary))
    (folder / "genes.txt").write_text("\n".join(cellset_trained.genes) + "\n")
    back = ["convert", str(cellset_run.workdir), "--to-torch", str(folder / "average.npz"), "--weights", "ema"]
    main(back)
    names = ["--vocabulary", str(folder / "names.json"), "--genes", str(folder / "genes.txt")]
    main(["convert", str(folder / "average.npz"), "--out", str(folder / "converted"), *names, *SETTINGS])
    main(["convert", str(folder / "average.npz"), "--out", str(folder / "nameless"), "--set", "n_times=30"])
    return folder


@pytest.fixture(autouse=True)
def stand_in(here, monkeypatch):
    monkeypatch.chdir(here)


def logged(trained):
    """The cells as the PyTorch program takes them: log-normalised by whoever made the file."""
    adata = make_adata()
    x = trained.transform.apply(np.asarray(adata.X), GENES)
    return anndata.AnnData(x, obs=adata.obs, var=pd.DataFrame(index=list(trained.genes)))


def test_a_run_and_its_converted_twin_predict_the_same_cells(cellset_trained):
    """Through a file of PyTorch names and back; only the data's unit is another."""
    twin = load("converted")
    jax.tree.map(np.testing.assert_array_equal, twin.params, cellset_trained.params)
    assert twin.config == cellset_trained.config
    assert twin.names == cellset_trained.names
    options = {"n_cells": 6, "n_steps": 3, "set_size": 6, "contexts": ["T | d1"]}
    wanted = predict(cellset_trained, make_adata(), ["A"], **options)
    got = predict(twin, logged(cellset_trained), ["A"], **options)
    np.testing.assert_allclose(got.X, wanted.X, atol=1e-5)
    pd.testing.assert_frame_equal(got.obs, wanted.obs)


def test_predict_command(cellset_trained, tmp_path):
    logged(cellset_trained).write_h5ad(tmp_path / "cells.h5ad")
    few = ["--n-cells", "3", "--n-steps", "2", "--set-size", "3", "--contexts", "T | d1"]
    out = tmp_path / "made.h5ad"
    main(
        [
            "predict",
            "--run",
            "converted",
            "--data",
            str(tmp_path / "cells.h5ad"),
            "--conditions",
            "A",
            *few,
            "--out",
            str(out),
        ]
    )
    assert anndata.read_h5ad(out).shape == (3, 8)


def test_predictions_that_lack_something_say_what(cellset_trained, tmp_path, capsys):
    logged(cellset_trained).write_h5ad(tmp_path / "cells.h5ad")
    asked = ("--data", tmp_path / "cells.h5ad", "--conditions", "A", "--out", tmp_path / "made.h5ad")
    told = refused(capsys, "predict", "--run", "nameless", *asked)
    for what in ("lacks genes (--genes)", "the names of perturbation (--vocabulary)", "--set spec.perturbation=COLUMN"):
        assert what in told, told
    assert not (tmp_path / "made.h5ad").exists()


def finetuned(run, **fields):
    return replace(EXPERIMENT, pretrained=Pretrained(run=str(run), **fields))


def test_finetuning_starts_from_a_converted_model(cellset_trained):
    """What is kept is what it would be of the run itself; cells of other genes and donors."""
    old = cellset_trained.params
    others = make_adata(genes=(*GENES[:1:-1], "new"), types=("T", "B"), donors=("d3", "d9"))
    settings = replace(finetuned("converted"), split=replace(EXPERIMENT.split, values=(("d9",),)))
    task = prepare(settings, others)
    new = task.start(jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, new["layer_0"], old["layer_0"])
    jax.tree.map(np.testing.assert_array_equal, new["time"], old["time"])
    shared = [GENES.index(gene) for gene in GENES[:1:-1]]
    np.testing.assert_array_equal(new["inputs"]["state"][0, :6], old["inputs"]["state"][0, shared])
    for role, kept in (("cell_type", (1, 1)), ("batch", (0, 2))):
        new_rows, old_rows = (tree["covariates"][role]["embedding"] for tree in (new, old))
        np.testing.assert_array_equal(new_rows[kept[0]], old_rows[kept[1]], err_msg=role)
    assert task.about["pretrained"]["run"] == load("converted").about["run"]
    assert task.about["pretrained"]["rows"]["batch"]["kept"] == ["d3"]


def test_finetuning_from_a_model_without_names():
    """As published, where only layers matter: other genes, and tables drawn afresh; else it is said what lacks."""
    others = make_adata(genes=("n0", "n1", "n2"))
    with pytest.raises(ValueError, match=r"no cell_type of these data .NK, T. is one of the pretrained model's"):
        prepare(finetuned("nameless", new_genes=True), others)
    fresh = ("cell_type", "batch")
    with pytest.raises(ValueError, match=r"no gene of these data .*set pretrained.new_genes=True"):
        prepare(finetuned("nameless", fresh=fresh), others)
    task = prepare(finetuned("nameless", fresh=fresh, new_genes=True), others)
    new, old = task.start(jax.random.key(0)), load("nameless").params
    jax.tree.map(np.testing.assert_array_equal, new["layer_0"], old["layer_0"])
    assert new["inputs"]["state"].shape == (1, 3, 16)


def test_show(capsys):
    main(["show", "converted"])
    told = capsys.readouterr().out
    assert told.startswith("converted: PerturbDiff, converted, run ")
    assert f"sha256 {convert.digest('average.npz')}" in told
    assert "from average.npz" in told
    assert "genes: 8; names: 3 of perturbation, 2 of cell_type, 3 of batch" in told
    assert json.loads(told[told.index("{") :])["d_model"] == MODEL.d_model
    assert "class_silu=False, schedule=linear, divisor=10.0" in told
    main(["show", "nameless"])
    assert "genes: not told; names: not told" in capsys.readouterr().out


def test_back_to_a_file(tmp_path, capsys):
    main(["convert", "converted", "--to-torch", str(tmp_path / "again.npz")])
    told = capsys.readouterr().out
    first, again = convert.read_torch("average.npz"), convert.read_torch(tmp_path / "again.npz")
    assert told.startswith(
        f"{len(first)} tensors, {sum(v.size for v in first.values())} values, from step 0 written to"
    )
    assert set(first) == set(again)
    assert all(np.array_equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("run", ["tiny_run", "perturbation_run"])
def test_runs_of_the_other_systems(run, request, tmp_path, capsys):
    """A run to a .pt that its program would load, and back to weights that compute the same."""
    pytest.importorskip("torch", reason="writes and reads .pt files; of the extra 'torch'")
    run, trained = request.getfixturevalue(run), None
    trained = load(run.workdir)
    main(["convert", str(run.workdir), "--to-torch", str(tmp_path / "w.pt"), "--weights", _predicting(run.workdir)])
    known = {"graph_heads": getattr(trained.config, "graph_heads", None), "n_heads": trained.config.n_heads}
    if hasattr(trained.config, "perturbation"):
        known["perturbation"] = trained.config.perturbation
    found = convert.from_torch(
        convert.read_torch(tmp_path / "w.pt"), **{k: v for k, v in known.items() if v is not None}
    )
    jax.tree.map(np.testing.assert_array_equal, found.params, jax.tree.map(np.asarray, trained.params))
    out = tmp_path / "converted"
    given = [word for key, v in known.items() if v is not None for word in ("--set", f"{key}={v}")]
    main(["convert", str(tmp_path / "w.pt"), "--out", str(out), *given])
    assert "no predictions from cells, which need" in capsys.readouterr().out
    told = refused(capsys, "predict", "--run", out, "--out", tmp_path / "x.h5ad")
    assert "(scjax.convert.load opens them)" in told


def _predicting(workdir):
    try:
        convert.load(workdir)
    except ValueError as err:
        return "best" if "best" in str(err) else "ema"
    return "last"


def test_help(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["convert", "--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert all(option in told for option in ("--to-torch", "--vocabulary", "--genes", "--weights", "--set"))


def test_which_weights_of_a_run(cellset_run, tmp_path, capsys):
    run = cellset_run.workdir
    told = refused(capsys, "convert", run, "--to-torch", tmp_path / "w.npz")
    assert "weights must say which of last, ema are meant" in told
    told = refused(capsys, "convert", run, "--to-torch", tmp_path / "w.npz", "--weights", "best")
    assert "weights must be one of last, ema" in told
    main(["convert", str(run), "--to-torch", str(tmp_path / "w.npz"), "--weights", "last", "--step", "10"])
    at_10 = convert.load(run, 10, weights="last").weights
    wanted = convert.to_torch(at_10)["model.t_embedder.mlp.0.weight"]
    np.testing.assert_array_equal(convert.read_torch(tmp_path / "w.npz")["model.t_embedder.mlp.0.weight"], wanted)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["average.npz"], "give --out, a new folder, for a file of weights; or --to-torch"),
        (["average.npz", "--out", "a", "--to-torch", "b.npz"], "give --out, a new folder"),
        (["average.npz", "--out", "a", "--step", "3"], "--step does nothing with --out"),
        (["converted", "--to-torch", "b.npz", "--genes", "genes.txt"], "--genes does nothing with --to-torch"),
        (["converted", "--to-torch", "average.npz"], "average.npz exists already and is not overwritten"),
        (["converted", "--to-torch", "b.txt"], "the end of the file's name must be one of '.pt', '.pth', '.npz'"),
        (["average.npz", "--out", "converted"], "out converted exists already and is not overwritten"),
        (["none.npz", "--out", "a"], "there is no file none.npz"),
        (["average.npz", "--out", "a", "--weights", "ema"], "weights='ema', but average.npz holds one set"),
        (["average.npz", "--out", "a", "--weights", "best"], "--weights of a file are main, ema or last"),
        (["average.npz", "--out", "a", "--set", "n_head=2"], "n_head is not a field of Config. Did you mean"),
        (["average.npz", "--out", "a", "--set", "divisor"], "--set takes KEY=VALUE"),
        (["average.npz", "--out", "a", "--set", "system=scimf"], r"'system' is none .--model: the system"),
        (["average.npz", "--out", "a", "--set", "spec.drug=x"], "drug is not a field of DataSpec"),
        (["average.npz", "--out", "a", "--model", "scdfm"], "not one of scDFM: it lacks encoder.embedding.weight"),
        (["average.npz", "--out", "a", "--vocabulary", "genes.txt"], "genes.txt is no valid JSON"),
        (["average.npz", "--out", "a", "--genes", "names.json"], "genes must be the model's 8; got 1"),
        (["genes.txt", "--out", "a"], "the end of the file's name must be one of"),
    ],
)
def test_mistakes(arguments, message, capsys):
    told = refused(capsys, "convert", *arguments)
    assert re.search(message, told), told


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix])  # of which the names alone are read
def test_genes_of_a_file(cellset_trained, tmp_path, form):
    adata = logged(cellset_trained)
    adata.X = form(adata.X)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    main(["convert", "average.npz", "--out", str(tmp_path / "c"), "--genes", str(tmp_path / "cells.h5ad")])
    assert convert.load(tmp_path / "c").genes == cellset_trained.genes


def test_nothing_is_left_of_a_conversion_that_failed(tmp_path, capsys):
    before = {path.name for path in tmp_path.iterdir()}
    refused(capsys, "convert", "average.npz", "--out", tmp_path / "a", "--set", "n_layers=7")
    assert {path.name for path in tmp_path.iterdir()} == before
