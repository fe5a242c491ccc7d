"""What others read of what we write: scanpy's and scVelo's names of places, cell-eval's pair of files."""

import subprocess
import sys

import anndata
import numpy as np
import pandas as pd
import pytest
import tiny_cellsets
import tiny_perturbation
from scipy import sparse
from test_cli import refused
from tiny_series import SIZES, make_adata

from scjax.cli import main
from scjax.data.writer import writing_cells
from scjax.predict import interaction_scores, observed_cells, observing, predict, predicting, velocity
from scjax.predict.graphs import embedded_velocity
from scjax.types import Population


@pytest.fixture(scope="module")
def series():
    """The tiny series with an embedding, as a user's file has one."""
    adata = make_adata()
    adata.obsm["X_umap"] = np.random.default_rng(0).normal(size=(adata.n_obs, 2))
    adata.obsm["velocity_umap"] = np.zeros((adata.n_obs, 2), np.float32)  # of another tool
    return adata


# -- velocities


@pytest.fixture(scope="module")
def moving(trained, series):
    return velocity(trained, series, bases=("umap",), n_partners=5)


def test_places_and_shapes(moving, series, trained):
    """Layers in gene space, embeddings and arrows by name, all float32 and of all cells."""
    assert set(moving.layers) - {None} == {"velocity", "Ms"}
    np.testing.assert_array_equal(moving.layers["Ms"], moving.X)
    for layer in moving.layers.values():
        assert (layer.shape, layer.dtype) == (moving.shape, np.float32)
    assert set(moving.obsm) == {"X_latent", "velocity_latent", "X_umap", "velocity_umap", "velocity_umap_before"}
    for name in ("velocity_latent", "velocity_umap"):
        assert moving.obsm[name].shape == moving.obsm[name.replace("velocity", "X")].shape
        assert moving.obsm[name].dtype == np.float32
    np.testing.assert_array_equal(moving.obsm["X_umap"], series.obsm["X_umap"])
    np.testing.assert_array_equal(moving.obsm["velocity_umap_before"], series.obsm["velocity_umap"])
    wanted = embedded_velocity(
        moving.obsm["X_latent"], moving.obsm["velocity_latent"], series.obsm["X_umap"].astype(np.float32)
    )
    np.testing.assert_array_equal(moving.obsm["velocity_umap"], wanted)
    assert list(moving.var_names) == list(trained.transform.feature_names)


def test_interaction_graph(moving, series, trained):
    """CSR; the strongest of what each cell attends to, within its time; rows sum to at most 1."""
    graph = moving.obsp["interaction"]
    assert isinstance(graph, sparse.csr_matrix)
    assert (graph.shape, graph.dtype) == ((series.n_obs, series.n_obs), np.float32)
    day = series.obs["day"].to_numpy()
    for t in SIZES:
        rows = np.flatnonzero(day == t)
        weights = np.asarray(interaction_scores(trained, series, t, scale_by_value=False)).mean(axis=0)
        np.fill_diagonal(weights, -1)
        here = graph[rows].toarray()
        assert not here[:, day != t].any()
        for mine, all_of_them in zip(here[:, rows], weights, strict=True):
            best = np.argsort(-all_of_them)[:5]
            np.testing.assert_allclose(mine[best], all_of_them[best], rtol=1e-5)
            assert np.count_nonzero(mine) == 5
    assert (graph.diagonal() == 0).all()
    sums = np.asarray(graph.sum(axis=1)).ravel()
    assert ((sums > 0) & (sums < 1)).all()
    whole = velocity(trained, series, n_partners=100).obsp["interaction"]
    np.testing.assert_allclose(np.asarray(whole.sum(axis=1)).ravel(), 1.0, atol=1e-5)


def test_a_lone_cell_interacts_with_none(trained, series):
    day = series.obs["day"].to_numpy()
    few = series[np.r_[np.flatnonzero(day == 0.0), np.flatnonzero(day == 1.0)[:1]]].copy()
    graph = velocity(trained, few, n_partners=3).obsp["interaction"]
    assert graph[-1].nnz == 0
    assert graph.nnz == 3 * SIZES[0.0]


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_the_command_writes_the_same(tiny_run, moving, series, tmp_path, monkeypatch, suffix):
    monkeypatch.chdir(tmp_path)
    series.write_h5ad("cells.h5ad")
    run = ["--run", str(tiny_run.workdir), "--data", "cells.h5ad", "--out", f"v{suffix}"]
    main(["predict", *run, "--velocity", "--bases", "umap", "--partners", "5"])
    found = (anndata.read_h5ad if suffix == ".h5ad" else anndata.read_zarr)(f"v{suffix}")
    for name in moving.layers:
        np.testing.assert_array_equal(found.layers[name], moving.layers[name])
    for name in moving.obsm:
        np.testing.assert_array_equal(found.obsm[name], moving.obsm[name])
    assert (found.obsp["interaction"] != moving.obsp["interaction"]).nnz == 0


def test_velocities_that_cannot_be_drawn(trained, series, tiny_run, capsys, tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match=r"bases names a column of adata.obsm; 'X_umpa' is not one. Did you mean 'X_um"
    ):
        velocity(trained, series, bases=("umpa",))
    with pytest.raises(ValueError, match="velocity_latent is always there"):
        velocity(trained, series, bases=("latent",))
    with pytest.raises(ValueError, match="n_partners must be at least 1; got 0"):
        velocity(trained, series, n_partners=0)
    alone = trained._replace(config=trained.config.__class__(**{**vars(trained.config), "n_blocks": 0}))
    with pytest.raises(ValueError, match="n_partners asks for the interaction; this model has none"):
        velocity(alone, series, n_partners=3)
    monkeypatch.chdir(tmp_path)
    series.write_h5ad("cells.h5ad")
    run = ("predict", "--run", tiny_run.workdir, "--data", "cells.h5ad", "--out", "v.h5ad")
    assert "they need --velocity" in refused(capsys, *run, "--times", "1", "--partners", "3")


@pytest.mark.filterwarnings("ignore")
def test_scvelo_draws_it(moving):
    """Its arrows where ours are, and its graph and its own projection."""
    scv = pytest.importorskip("scvelo", reason="scVelo is whose conventions are followed; it is no dependency")
    adata = moving.copy()
    ours = adata.obsm["velocity_umap"].copy()
    scv.pl.velocity_embedding(adata, basis="umap", show=False)
    np.testing.assert_array_equal(adata.obsm["velocity_umap"], ours)  # what is there is drawn
    scv.pp.neighbors(adata, n_neighbors=10, use_rep="X_latent")
    scv.tl.velocity_graph(adata)
    scv.tl.velocity_embedding(adata, basis="umap")
    assert np.isfinite(adata.obsm["velocity_umap"]).all()


# -- predictions


def written(prediction, path):
    prediction.write(path)
    return anndata.read_h5ad(path)


def test_predictions_have_names_and_categories(perturbation_trained, cellset_trained, trained, tmp_path):
    """As scanpy and pertpy want them: unique names, words as categories, no object columns, float32."""
    made = [
        written(predicting(trained, make_adata(), [1.0]), tmp_path / "a.h5ad"),
        written(predicting(perturbation_trained, tiny_perturbation.make_adata(), ["g0+g1"]), tmp_path / "b.h5ad"),
        written(predicting(cellset_trained, tiny_cellsets.make_adata(), ["A"]), tmp_path / "c.h5ad"),
    ]
    for adata in made:
        assert adata.X.dtype == np.float32
        assert adata.obs_names.is_unique
        assert adata.var_names.is_unique
        for column in adata.obs:
            kind = adata.obs[column].dtype
            assert isinstance(kind, pd.CategoricalDtype) or kind.kind in "if", column
    assert "X_latent" in made[0].obsm


@pytest.fixture(scope="module")
def pair(perturbation_run, tmp_path_factory):
    """Prediction and observed cells, as the command writes them."""
    folder = tmp_path_factory.mktemp("pair")
    tiny_perturbation.make_adata().write_h5ad(folder / "cells.h5ad")
    main(
        ["predict", "--run", str(perturbation_run.workdir), "--data", str(folder / "cells.h5ad")]
        + ["--conditions", "g1+g0", "g1", "--out", str(folder / "predicted.h5ad")]
        + ["--observed", str(folder / "real.h5ad"), "--n-cells", "40"]
    )
    return folder


def test_both_files_hold_the_same_kinds_of_cells(pair, perturbation_trained):
    predicted, real = (anndata.read_h5ad(pair / name) for name in ("predicted.h5ad", "real.h5ad"))
    assert list(predicted.var_names) == list(real.var_names)
    counts = pd.crosstab(real.obs["condition"], real.obs["context"])
    assert set(counts.index) == {"control", "g0+g1", "g1"} == set(predicted.obs["condition"])
    populations = [Population(names, line) for names in ((), ("g0", "g1"), ("g1",)) for line in ("A1", "B2")]
    observed = observed_cells(perturbation_trained, tiny_perturbation.make_adata(), populations)
    for population, x in observed.items():
        of_it = (real.obs["condition"] == population.condition) & (real.obs["context"] == population.context)
        np.testing.assert_array_equal(real[of_it.to_numpy()].X, x)
        if population.is_control:  # the same cells in both files
            of_it = (predicted.obs["condition"] == "control") & (predicted.obs["context"] == population.context)
            np.testing.assert_array_equal(predicted[of_it.to_numpy()].X, x)
    alone = predict(perturbation_trained, tiny_perturbation.make_adata(), ["g1+g0", "g1"], n_cells=40)
    np.testing.assert_array_equal(predicted[: alone.n_obs].X, alone.X)
    assert list(real.obs_names) == list(real.obs["source_cell"])


def test_observed_cells_of_cell_sets(cellset_trained):
    """Of one file, and of one that comes with the name of its source; contexts, and genes in another order."""
    adata, genes = tiny_cellsets.make_adata(), cellset_trained.genes[::-1]
    contexts = [p.context for p in cellset_trained.split.populations if p.is_control][:1]
    named = [("", adata)]
    found = [observing(cellset_trained, d, ["A"], contexts=contexts, genes=genes).in_memory() for d in (adata, named)]
    populations = [Population((), contexts[0]), Population(("A",), contexts[0])]
    x = np.concatenate(list(observed_cells_of_sets(cellset_trained, adata, populations)))
    for real in found:
        assert set(real.obs["context"]) == set(contexts)
        np.testing.assert_array_equal(np.sort(real.X[:, ::-1], axis=0), np.sort(x, axis=0))


def observed_cells_of_sets(trained, adata, populations):
    from scjax.predict import cellsets

    return cellsets.observed_cells(trained, adata, populations).values()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conditions": ["g0+z+g1"]}, r"adata has no cells of g0\+g1\+z in these contexts. Did you mean"),
        ({"contexts": ["A11"]}, "contexts must have control cells in adata; 'A11' has none. Did you mean 'A1'"),
        ({"genes": ["g1", "gx"]}, "genes must be among the 10 that training kept; 'gx' is not"),
    ],
)
def test_observed_cells_that_are_not_there(perturbation_trained, options, message):
    with pytest.raises(ValueError, match=message):
        observing(perturbation_trained, tiny_perturbation.make_adata(), **options)


def test_predictions_that_do_not_fit_together(perturbation_trained, trained, series):
    adata = tiny_perturbation.make_adata()
    few = predicting(perturbation_trained, adata, ["g1"], genes=["g1", "g0"])
    with pytest.raises(ValueError, match="joined where their genes, obsm and layers are the same"):
        few.then(observing(perturbation_trained, adata))
    moving = predicting_velocity_of(trained, series)
    with pytest.raises(ValueError, match="tables and graphs are of all cells of a prediction"):
        moving.then(moving)


def predicting_velocity_of(trained, series):
    from scjax.predict.timeseries import predicting_velocity

    return predicting_velocity(trained, series)


def test_one_file_for_two(pair, perturbation_run, capsys, tmp_path):
    run = ("predict", "--run", perturbation_run.workdir, "--data", pair / "cells.h5ad", "--conditions", "g1")
    same = tmp_path / "same.h5ad"
    assert "--out and --observed are two files" in refused(capsys, *run, "--out", same, "--observed", same)
    there = refused(capsys, *run, "--out", tmp_path / "new.h5ad", "--observed", pair / "real.h5ad")
    assert "exists already and is not overwritten" in there
    nowhere = ("--conditions", "new", "--on-unknown", "mean", "--observed", tmp_path / "real.h5ad")
    assert "adata has no cells of" in refused(capsys, *run[:-2], *nowhere, "--out", tmp_path / "new.h5ad")
    assert not list(tmp_path.iterdir())


def test_cell_eval_reads_the_pair(pair, tmp_path):
    """Its own command, on both files, all metrics."""
    pytest.importorskip("cell_eval", reason="cell-eval is whose command reads the files; extra `eval`")
    command = [sys.executable, "-m", "cell_eval", "run", "-ap", str(pair / "predicted.h5ad")]
    command += ["-ar", str(pair / "real.h5ad"), "--pert-col", "condition", "--control-pert", "control"]
    done = subprocess.run([*command, "-o", str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    scores = pd.read_csv(tmp_path / "out" / "results.csv")
    assert set(scores["perturbation"]) == {"g0+g1", "g1"}
    assert np.isfinite(scores["pearson_delta"]).all()


def test_graphs_of_a_file_are_written_whole(tmp_path):
    graph = sparse.random(3, 3, 0.5, "csr", np.float32, rng=np.random.default_rng(0))
    with writing_cells(tmp_path / "a.h5ad", 3, ["g"]) as cells:
        cells.graphs["near"] = graph
        cells.add(np.zeros((3, 1), np.float32), pd.DataFrame(index=list("abc")))
    assert (anndata.read_h5ad(tmp_path / "a.h5ad").obsp["near"] != graph).nnz == 0
