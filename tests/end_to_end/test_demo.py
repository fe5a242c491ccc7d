"""The main job: what it writes and prints, and that it wins where it says so."""

import contextlib
import io
import json
from dataclasses import replace

import anndata
import numpy as np
import pytest

from scjax.data import datasets
from scjax.demo import demo
from scjax.metrics.population import wasserstein1
from scjax.predict import load, project
from scjax.presets import preset
from scjax.train.optimizers import OptimizerConfig

ROWS = {
    "scIMF",
    "scIMF without interactions",
    "nearest earlier time",
    "nearest later time",
    "linear interpolation",
    "OT interpolation",
    "real vs real (floor)",
}


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The demo with few and cheap steps: everything but the quality of the fit."""
    experiment = preset("scimf/klein").experiment
    experiment = replace(
        experiment,
        model=replace(experiment.model, intrinsic_widths=(8,), dt=1.0),
        sampling=replace(experiment.sampling, n_cells=32, n_targets=32),
        n_steps=20,
        checkpoint_every=20,
    )
    out = tmp_path_factory.mktemp("demo") / "out"
    return demo(n_seeds=2, out=out, experiment=experiment)


def test_the_demo_writes_what_it_says(short):
    assert {p.name for p in short.iterdir()} == {
        "metrics.json",
        "predictions.h5ad",
        "predicted_over_observed.png",
        "trajectories.png",
        "runs",
    }
    assert all((short / name).stat().st_size > 10_000 for name in ("predicted_over_observed.png", "trajectories.png"))
    (table,) = json.loads((short / "metrics.json").read_text())
    assert {row["name"] for row in table["rows"]} == ROWS
    assert {"W1", "W2", "Sinkhorn", "Energy"} <= set(table["metrics"])
    assert all(m["definition"] for m in table["metrics"].values())
    assert {row["name"]: row["n_seeds"] for row in table["rows"]}["scIMF"] == 2


def test_its_predictions_are_of_the_held_out_day_from_cells_of_the_first(short):
    adata, predicted = datasets.klein2015(), anndata.read_h5ad(short / "predictions.h5ad")
    assert set(predicted.obs["time"]) == {2.0}
    assert set(predicted.obs["start_cell"]) == set(adata.obs_names[adata.obs["time"] == 0])
    assert predicted.n_vars == adata.n_vars
    np.testing.assert_array_equal(predicted.var_names, adata.var_names)


def test_the_demo_overwrites_nothing(short):
    before = {p: p.stat().st_mtime_ns for p in short.rglob("*")}
    with pytest.raises(ValueError, match="not overwritten"):
        demo(out=short)
    assert before == {p: p.stat().st_mtime_ns for p in short.rglob("*")}


# -- perturbations


@pytest.fixture(scope="module")
def short_scdfm(tmp_path_factory):
    """The demo of scDFM with few and cheap steps on a third of the genes."""
    experiment = preset("scdfm/norman_subset").experiment
    experiment = replace(
        experiment,
        model=replace(experiment.model, d_model=8, n_layers=1, n_heads=2, graph_heads=2, gamma=0.0),
        preprocess=replace(experiment.preprocess, n_top_genes=80),
        sampling=replace(experiment.sampling, n_populations=2, n_cells=8, n_genes=20),
        generation=replace(experiment.generation, n_cells=16, n_steps=2),
        optimizer=OptimizerConfig(),
        n_steps=10,
        ema_decay=None,
        checkpoint_every=10,
    )
    return demo("scdfm", out=tmp_path_factory.mktemp("demo") / "out", experiment=experiment)


def test_the_demo_of_perturbations_writes_what_it_says(short_scdfm):
    figures = {"deltas.png", "top_genes.png", "l2.png"}
    assert {p.name for p in short_scdfm.iterdir()} == {"metrics.json", "predictions.h5ad", "runs", *figures}
    assert all((short_scdfm / name).stat().st_size > 10_000 for name in figures)
    (table,) = json.loads((short_scdfm / "metrics.json").read_text())
    assert {"scDFM", "control", "mean of perturbations", "additive", "nearest", "ridge", "real vs real (ceiling)"} <= {
        row["name"] for row in table["rows"]
    }
    pairs = {"KLF1+MAP2K6", "KLF1+TGFBR2", "MAP2K3+MAP2K6", "MAP2K3+SLC38A2", "MAPK1+TGFBR2"}
    assert {p["condition"] for p in table["populations"]} == pairs
    predicted = anndata.read_h5ad(short_scdfm / "predictions.h5ad")
    assert predicted.obs["condition"].value_counts().to_dict() == dict.fromkeys(pairs, 16)


def test_the_number_in_the_table_is_that_of_the_predicted_cells(short_scdfm):
    """L2 of the means, from the .h5ad and the data, by hand."""
    (table,) = json.loads((short_scdfm / "metrics.json").read_text())
    predicted, adata = anndata.read_h5ad(short_scdfm / "predictions.h5ad"), datasets.norman2019()
    row = next(row for row in table["rows"] if row["name"] == "scDFM")
    for i, condition in enumerate(p["condition"] for p in table["populations"]):
        real = adata[adata.obs["perturbation"] == condition, predicted.var_names].X.toarray().mean(axis=0)
        made = predicted[predicted.obs["condition"] == condition].X.mean(axis=0)
        assert row["scores"]["l2"]["by_population"][0][i] == pytest.approx(np.linalg.norm(made - real), rel=1e-4)


# -- cell sets


@pytest.fixture(scope="module")
def short_sets(tmp_path_factory):
    """The demo of PerturbDiff with few and cheap steps on a tenth of the genes."""
    experiment = preset("perturbdiff/mcfaline").experiment
    experiment = replace(
        experiment,
        model=replace(experiment.model, d_model=8, n_layers=1, n_heads=2, d_covariate=4, n_times=30),
        preprocess=replace(experiment.preprocess, n_top_genes=50),
        sampling=replace(experiment.sampling, n_sets=2, n_cells=8),
        generation=replace(experiment.generation, n_cells=24, n_steps=2),
        optimizer=OptimizerConfig(),
        n_steps=10,
        ema_decay=None,
        checkpoint_every=10,
    )
    out = tmp_path_factory.mktemp("demo") / "out"
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        demo("perturbdiff", out=out, experiment=experiment)
    return out, told.getvalue()


def test_the_demo_of_cell_sets_writes_what_it_says(short_sets):
    out, _ = short_sets
    figures = {"deltas.png", "top_genes.png", "l2.png", "sets.png"}
    assert {p.name for p in out.iterdir()} == {"metrics.json", "predictions.h5ad", "runs", *figures}
    assert all((out / name).stat().st_size > 10_000 for name in figures)
    (table,) = json.loads((out / "metrics.json").read_text())
    assert {"PerturbDiff", "control", "shift", "real vs real (ceiling)"} <= {row["name"] for row in table["rows"]}
    held_out = set(preset("perturbdiff/mcfaline").experiment.split.populations)
    assert {(p["condition"], p["context"]) for p in table["populations"]} == held_out
    predicted = anndata.read_h5ad(out / "predictions.h5ad")
    sizes = predicted.obs.groupby(["condition", "context", "set"], observed=True).size()
    assert sizes.to_dict() == {(*p, n): 8 for p in held_out for n in range(3)}, "what training saw is not in the file"


def test_the_numbers_of_cell_sets_are_those_of_the_predicted_cells(short_sets):
    """L2 of the means, from the .h5ad and the data, by hand; and what the demo says of it."""
    out, told = short_sets
    (table,) = json.loads((out / "metrics.json").read_text())
    predicted, adata = anndata.read_h5ad(out / "predictions.h5ad"), datasets.mcfaline2023()
    scores = {row["name"]: row["scores"]["l2"] for row in table["rows"]}
    for i, p in enumerate(table["populations"]):
        of_line = adata[adata.obs["cell_type"] == p["context"], predicted.var_names]
        real, control = (
            of_line[of_line.obs["perturbation"] == name].X.toarray().mean(axis=0)
            for name in (p["condition"], "control")
        )
        here = (predicted.obs["condition"] == p["condition"]) & (predicted.obs["context"] == p["context"])
        for row, mean in (("PerturbDiff", predicted[here].X.mean(axis=0)), ("control", control)):
            assert scores[row]["by_population"][0][i] == pytest.approx(np.linalg.norm(mean - real), rel=1e-4)
    assert f"cells is {scores['control']['mean']:.2f} away" in told
    assert f"PerturbDiff comes to {scores['PerturbDiff']['mean']:.2f}, no nearer than doing nothing." in told
    assert "the effects are weak" in told
    assert "Means of sets of equal size vary by " in told


def test_no_seed():
    with pytest.raises(ValueError, match="seeds must be at least 1; got 0"):
        demo("scdfm", n_seeds=0)


@pytest.mark.slow
def test_over_three_seeds_the_model_beats_the_best_training_free_baseline(tmp_path):
    out = demo(n_seeds=3, out=tmp_path / "demo")
    (table,) = json.loads((out / "metrics.json").read_text())
    w1 = {row["name"]: row["scores"]["W1"] for row in table["rows"]}
    best = min(w1[row["name"]]["mean"] for row in table["rows"] if row["kind"] == "baseline")
    assert w1["scIMF"]["mean"] < best
    assert all(np.mean(draws) < best for draws in w1["scIMF"]["values"]), "each of the three seeds"
    # And the number in the file is that of the predicted cells.
    trained = load(out / "runs" / "with-interactions-seed0")
    adata, predicted = datasets.klein2015(), anndata.read_h5ad(out / "predictions.h5ad")
    real = project(trained, adata)[adata.obs["time"] == 2.0]
    assert wasserstein1(predicted.obsm["X_latent"], real) == pytest.approx(w1["scIMF"]["values"][0][0], rel=0.1)
