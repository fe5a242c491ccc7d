"""A checkpoint and cells of the first time make predictions, in gene space, without the truth."""

import json
from dataclasses import replace
from pathlib import Path

import anndata
import jax
import numpy as np
import pandas as pd
import pytest
from tiny_series import EXPERIMENT, GENES, SIZES, make_adata

from scjax import checkpoint, convert
from scjax.data.preprocess import preprocess_for
from scjax.data.spec import DataSpec
from scjax.data.splits import HoldOutNone
from scjax.experiment import train
from scjax.models import scimf
from scjax.predict import (
    TrainedTimeSeries,
    interaction_score_blocks,
    interaction_scores,
    load,
    predict,
    project,
    simulate_cells,
    velocity,
)
from scjax.predict.record import predicting_params

TIMES = (1.0, 2.5, 6.0)  # observed, between, after the last


def same_anndata(a, b):
    np.testing.assert_array_equal(a.X, b.X)
    np.testing.assert_array_equal(a.obsm["X_latent"], b.obsm["X_latent"])
    pd.testing.assert_frame_equal(a.obs, b.obs)
    assert a.uns["scjax"] == b.uns["scjax"]
    return True


@pytest.fixture(scope="module")
def predicted(trained):
    return predict(trained, make_adata(), TIMES, seed=3)


@pytest.fixture(scope="module")
def moving(trained):
    return velocity(trained, make_adata())


def test_loaded_is_what_was_trained(tiny_run, trained):
    """The moving average predicts; without one the last parameters do."""
    jax.tree.map(np.testing.assert_array_equal, trained.params, tiny_run.state.ema)
    assert any(map(np.any, jax.tree.leaves(jax.tree.map(lambda a, b: a != b, trained.params, tiny_run.state.params))))
    assert (trained.config, trained.spec, trained.step) == (EXPERIMENT.model, EXPERIMENT.spec, 20)
    assert trained.times == tuple(SIZES)
    np.testing.assert_array_equal(project(trained, make_adata()), tiny_run.data.latent)
    assert load(tiny_run.workdir / "checkpoints", 10).step == 10


def test_without_an_average_the_last_parameters_predict(tmp_path):
    experiment = replace(EXPERIMENT, ema_decay=None, n_steps=5, model=replace(EXPERIMENT.model, n_blocks=0))
    run = train(experiment, make_adata(), tmp_path / "run")
    found = load(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, found.params, run.state.params)
    with pytest.raises(ValueError, match="block must be one of"):
        interaction_scores(found, make_adata(), 0.0)


def test_predicted_anndata(trained, predicted, tmp_path):
    n = SIZES[0.0]
    assert predicted.shape == (len(TIMES) * n, len(GENES))
    assert tuple(predicted.var_names) == GENES
    assert predicted.obs_names.is_unique
    start = make_adata().obs_names[make_adata().obs["day"] == 0.0]
    for t in TIMES:
        assert list(predicted.obs.loc[predicted.obs["day"] == t, "start_cell"]) == list(start)
    assert set(predicted.obs["seed"]) == {3}
    energy = predicted.obs["kinetic_energy"].to_numpy().reshape(len(TIMES), n)
    assert (energy[0] > 0).all()
    assert (np.diff(energy, axis=0) > 0).all()
    np.testing.assert_array_equal(predicted.X, trained.transform.inverse(predicted.obsm["X_latent"]))
    record = predicted.uns["scjax"]
    assert json.loads(record["experiment"]) == trained.about["experiment"]
    assert json.loads(record["split"])["held_out"] == [2.0]
    assert (record["run"], record["step"], record["n_cells"]) == (trained.about["run"], 20, n)
    predicted.write_h5ad(tmp_path / "predicted.h5ad")
    assert same_anndata(anndata.read_h5ad(tmp_path / "predicted.h5ad"), predicted)


def test_same_seed_same_bytes(trained, predicted):
    assert same_anndata(predict(trained, make_adata(), TIMES, seed=3), predicted)
    assert not np.array_equal(predict(trained, make_adata(), TIMES, seed=4).X, predicted.X)


def test_only_the_cells_of_the_first_time_are_looked_at(trained, predicted):
    adata = make_adata()
    assert same_anndata(predict(trained, adata[adata.obs["day"] == 0.0].copy(), TIMES, seed=3), predicted)
    adata.X = adata.X.astype(np.float32)
    adata.X[np.flatnonzero(adata.obs["day"] > 0)] = np.nan
    assert same_anndata(predict(trained, adata, TIMES, seed=3), predicted)


def test_genes_are_matched_by_name(trained, predicted):
    adata = make_adata()
    adata = adata[:, list(reversed(GENES))].copy()
    more = anndata.AnnData(
        np.concatenate([adata.X, np.full((adata.n_obs, 1), 1000, np.int32)], axis=1),
        obs=adata.obs,
        var=pd.DataFrame(index=[*adata.var_names, "foreign"]),
    )
    assert same_anndata(predict(trained, more, TIMES, seed=3), predicted)
    with pytest.raises(ValueError, match=r"2 of the 12 genes of the fit are missing: g4, g7\. Give data with"):
        predict(trained, adata[:, [g for g in GENES if g not in ("g4", "g7")]].copy(), TIMES)


def test_prediction_at_the_first_time_is_the_projection(trained):
    adata = make_adata()
    first = adata[adata.obs["day"] == 0.0].copy()
    found = predict(trained, adata, [0.0, 1.0])
    np.testing.assert_array_equal(found.obsm["X_latent"][: SIZES[0.0]], project(trained, first))
    assert (found.obs["kinetic_energy"].to_numpy()[: SIZES[0.0]] == 0).all()
    # A path is one path: to see it at the start too changes nothing later.
    later = predict(trained, adata, [1.0])
    np.testing.assert_array_equal(found.obsm["X_latent"][SIZES[0.0] :], later.obsm["X_latent"])


def test_population_of_another_size(trained):
    few, many = (predict(trained, make_adata(), [1.0], n_cells=n) for n in (5, 30))
    assert few.obs["start_cell"].is_unique
    assert (few.n_obs, many.n_obs) == (5, 30)
    assert many.obs["start_cell"].nunique() <= SIZES[0.0]
    assert few.uns["scjax"]["n_cells"] == 5


@pytest.mark.parametrize(
    ("times", "options", "message"),
    [
        ([2.0, 1.0], {}, "times must increase strictly; 1.0 after 2.0 is unsorted"),
        ([1.0, 1.0], {}, "times must increase strictly; 1.0 after 1.0 is repeated"),
        ([-1.0, 1.0], {}, r"times must name at least one time, none before the first of training, 0.0; got \(-1.0, 1"),
        ([], {}, "times must name at least one time"),
        ([np.nan], {}, r"times must be finite; got \(nan,\)"),
        ([1.0], {"n_cells": 0}, "n_cells must be at least 1; got 0"),
        ([1.0], {"seed": -1}, "seed must be at least 0; got -1"),
    ],
)
def test_bad_arguments(trained, times, options, message):
    with pytest.raises(ValueError, match=message):
        predict(trained, make_adata(), times, **options)


def test_bad_data(trained):
    adata = make_adata()
    with pytest.raises(ValueError, match=r"must hold cells of the first training time, 0.0, .* has 1.0, 2.0, 4.0"):
        predict(trained, adata[adata.obs["day"] > 0].copy(), [1.0])
    with pytest.raises(ValueError, match=r"time names a column of adata.obs; 'day' is not one. Did you mean 'days'"):
        predict(trained, anndata.AnnData(adata.X, obs=adata.obs.rename(columns={"day": "days"})), [1.0])
    adata.X = adata.X.astype(np.float32)
    adata.X[np.flatnonzero(adata.obs["day"] == 0.0)[0], 0] = -1.0
    for call in (lambda: predict(trained, adata, [1.0]), lambda: velocity(trained, adata)):
        with pytest.raises(ValueError, match="holds 1 negative values, the least is -1"):
            call()


def test_index_time(trained):
    """Time 4 is the fourth of the data: three stages after the first. Only observed times have a place."""
    about = {**trained.about, "experiment": {**trained.about["experiment"], "time_scale": "index"}}
    by_index = trained._replace(about=about)
    x0, key = project(trained, make_adata())[:6], jax.random.key(0)
    there = simulate_cells(by_index, x0, [2.0, 4.0], key)
    stages = scimf.simulate(trained.params, jax.numpy.asarray(x0), (0.0, 2.0, 3.0), key, config=trained.config)
    np.testing.assert_allclose(there.x, stages.x[1:], atol=1e-5)
    with pytest.raises(ValueError, match=r"times must be observed ones where time_scale='index'; got \[2.5\]"):
        predict(by_index, make_adata(), [2.5])


def test_time_stored_in_single_precision(trained):
    """0.1 means the observed time 0.1, also where a float32 column made that 0.10000000149."""
    shifted = trained._replace(times=(float(np.float32(0.1)), *trained.times[1:]))
    x0 = project(trained, make_adata())[:6]
    found = simulate_cells(shifted, x0, [0.1, 1.0], jax.random.key(0))
    np.testing.assert_array_equal(found.x[0], x0)


# -- velocity, interaction


def test_velocity_of_observed_cells(trained, moving):
    adata = make_adata()
    assert moving.shape == adata.shape
    pd.testing.assert_frame_equal(moving.obs, adata.obs)
    np.testing.assert_array_equal(moving.obsm["X_latent"], project(trained, adata))
    for t in SIZES:
        rows = np.flatnonzero(adata.obs["day"] == t)
        x = jax.numpy.asarray(moving.obsm["X_latent"][rows])
        wanted = scimf.drift(trained.params, x, config=trained.config)
        np.testing.assert_allclose(moving.obsm["velocity_latent"][rows], wanted, atol=1e-5)


def test_gene_velocity_is_the_linear_map_of_latent_velocity(trained, moving):
    """X moved along layers["velocity"] is the inverse of the latent moved along its velocity; X itself is exact."""
    latent, v = moving.obsm["X_latent"], moving.obsm["velocity_latent"]
    difference = trained.transform.inverse(latent + 0.25 * v, np.float64) - trained.transform.inverse(
        latent, np.float64
    )
    np.testing.assert_allclose(0.25 * moving.layers["velocity"], difference, atol=1e-5)
    counts = make_adata().X
    np.testing.assert_allclose(moving.X, np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True)), rtol=1e-6)


def test_velocity_is_written_and_read(moving, tmp_path):
    moving.write_h5ad(tmp_path / "moving.h5ad")
    read = anndata.read_h5ad(tmp_path / "moving.h5ad")
    np.testing.assert_array_equal(read.layers["velocity"], moving.layers["velocity"])
    assert read.uns["scjax"] == moving.uns["scjax"]


def test_interaction_scores(trained):
    adata = make_adata()
    weights = np.asarray(interaction_scores(trained, adata, 1.0, scale_by_value=False))
    n = SIZES[1.0]
    assert weights.shape == (1, n, n)
    np.testing.assert_allclose(weights.sum(axis=-1), 1.0, atol=1e-5)
    assert (np.diagonal(weights, axis1=1, axis2=2) == 0).all()
    scaled = np.asarray(interaction_scores(trained, adata, 1.0))
    assert not np.allclose(scaled, weights)
    for scores in (interaction_scores, interaction_score_blocks):
        with pytest.raises(ValueError, match="time must be one of the observed times 0.0, 1.0, 2.0, 4.0; got 3.0"):
            scores(trained, adata, 3.0)


@pytest.mark.parametrize("options", [{}, {"softmax": False, "scale_by_value": False}])
def test_interaction_scores_in_blocks(trained, options):
    adata, n = make_adata(), SIZES[1.0]
    blocks = list(interaction_score_blocks(trained, adata, 1.0, n_receivers=n // 2 + 1, **options))
    assert [block.shape for block in blocks] == [(1, n // 2 + 1, n), (1, n - n // 2 - 1, n)]
    whole = interaction_scores(trained, adata, 1.0, **options)
    np.testing.assert_allclose(np.concatenate(blocks, axis=1), whole, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="n_receivers must be at least 1; got 0"):
        interaction_score_blocks(trained, adata, 1.0, n_receivers=0)


# -- a latent space that the user brings


@pytest.fixture(scope="module")
def latent_trained(tmp_path_factory) -> TrainedTimeSeries:
    experiment = replace(
        EXPERIMENT,
        spec=DataSpec(expression="obsm/X_pca", space="latent", time="day"),
        preprocess=preprocess_for("latent"),
        split=HoldOutNone(),
        model=replace(EXPERIMENT.model, n_blocks=0),
        n_steps=5,
    )
    folder = tmp_path_factory.mktemp("latent") / "run"
    train(experiment, with_latent(3), folder)
    return load(folder)


def with_latent(width):
    adata = make_adata()
    adata.obsm["X_pca"] = np.random.default_rng(0).normal(size=(adata.n_obs, width)).astype(np.float32)
    return adata


def test_latent_goes_in_and_comes_out(latent_trained):
    found = predict(latent_trained, with_latent(3), [1.0])
    np.testing.assert_array_equal(found.X, found.obsm["X_latent"])
    assert list(found.var_names) == ["X_pca_0", "X_pca_1", "X_pca_2"]


@pytest.mark.parametrize("width", [2, 4])
def test_latent_of_another_width(latent_trained, width):
    with pytest.raises(ValueError, match=f"obsm/X_pca must have the 3 dimensions of training; it has {width}"):
        predict(latent_trained, with_latent(width), [1.0])


def test_checkpoints_of_something_else(tmp_path):
    with checkpoint.CheckpointWriter(tmp_path, about={"run": "mine"}) as writer:
        writer.save(1, {"state": {"w": np.ones(2)}})
    with pytest.raises(ValueError, match="holds checkpoints of kind None, not of a run of scimf"):
        load(tmp_path)
    with pytest.raises(ValueError, match="there is no folder .*nowhere"):
        load(tmp_path / "nowhere")


def test_before_the_first_validation_nothing_is_the_best():
    """What the state keeps in its place are the parameters that training began with."""
    last, average, first = ({"w": name} for name in ("last", "average", "first"))
    state = {"params": last, "ema": average, "best": {"score": np.float32(np.inf), "step": 0, "params": first}}
    assert predicting_params(state) == average
    assert predicting_params({"params": last, "best": state["best"]}) == last
    best = {"score": np.float32(0.5), "step": 3, "params": {"w": "best"}}
    assert predicting_params({**state, "best": best}) == {"w": "best"}


def test_a_converter_knows_no_best_before_the_first_validation(tiny_run, monkeypatch):
    found = checkpoint.read(Path(tiny_run.workdir) / "checkpoints")
    params = found.arrays["state"]["params"]
    for score, known in ((np.inf, False), (0.5, True)):
        state = {"params": params, "best": {"score": np.float32(score), "step": 0, "params": params}}
        changed = found._replace(arrays={**found.arrays, "state": state})
        monkeypatch.setattr(checkpoint, "read", lambda *args, changed=changed, **options: changed)
        if known:
            assert convert.load(tiny_run.workdir, weights="best").step == found.step
        else:
            with pytest.raises(ValueError, match="weights must be one of last, which .* has; got 'best'"):
                convert.load(tiny_run.workdir, weights="best")


def test_velocity_keeps_what_the_user_had(trained, adata):
    adata = adata.copy()
    adata.obsm["X_umap"] = np.zeros((adata.n_obs, 2))
    adata.obsm["X_latent"] = np.ones((adata.n_obs, 3))
    adata.uns["palette"] = ["red"]
    found = velocity(trained, adata)
    np.testing.assert_array_equal(found.obsm["X_umap"], adata.obsm["X_umap"])
    np.testing.assert_array_equal(found.obsm["X_latent_before"], adata.obsm["X_latent"])
    with pytest.raises(ValueError, match="holds 'X_latent' and 'X_latent_before', as which .* kept: rename one"):
        velocity(trained, found)
    assert found.uns["palette"] == ["red"]
