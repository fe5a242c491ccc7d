"""Sets of cells from a trained run: who they depend on, stand-ins for names and for controls, bad input."""

import json
from dataclasses import fields, replace

import anndata
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from tiny_cellsets import EXPERIMENT, GENES, make_adata

from scjax.data.splits import HoldOutCrossed
from scjax.experiment import train
from scjax.models import perturbdiff
from scjax.predict import SetGenerationConfig, cellsets, load, predict
from scjax.predict.cellsets import generate, observed_cells, read_sources
from scjax.types import Population

ASKED = ["A", "B"]
WHERE = ["NK | d3", "T | d1"]


@pytest.fixture(scope="module")
def predicted(cellset_trained):
    return predict(cellset_trained, make_adata(), ASKED, contexts=WHERE, seed=3)


def rows(found, condition, context):
    return found[(found.obs["condition"] == condition) & (found.obs["context"] == context)]


def assert_near(a, b):
    """Another place among the sets that are computed together rounds differently."""
    pd.testing.assert_frame_equal(a.obs.astype(str), b.obs.astype(str))
    np.testing.assert_allclose(a.X, b.X, atol=1e-4)


def with_experiment(trained, **changed):
    return trained._replace(about={**trained.about, "experiment": {**trained.about["experiment"], **changed}})


def test_what_comes_back(cellset_trained, predicted):
    assert predicted.shape == (4 * 10, 8)
    assert tuple(predicted.var_names) == GENES
    assert predicted.X.dtype == np.float32
    assert (predicted.X >= 0).all()
    obs = predicted.obs
    assert obs.index.is_unique
    assert set(obs["kind"].astype(str) + " | " + obs["donor"].astype(str)) == set(WHERE)
    adata = make_adata()
    given = adata.obs.loc[obs["source_cell"].astype(str)]
    assert (given["drug"] == "ctrl").all()
    np.testing.assert_array_equal(given["donor"], obs["donor"].astype(str))
    np.testing.assert_array_equal(given["kind"], obs["kind"].astype(str))
    for _, cells in obs.groupby(["condition", "context"], observed=True):  # 10 cells in sets of 6 at most
        np.testing.assert_array_equal(cells["set"].value_counts().sort_index(), [5, 5])
    record = predicted.uns["scjax"]
    told = {f.name: record[f.name] for f in fields(SetGenerationConfig)}
    assert SetGenerationConfig(**told) == replace(EXPERIMENT.generation, set_size=6)
    assert (record["run"], record["step"], record["seed"]) == (cellset_trained.about["run"], 20, 3)
    assert (record["replaced"], record["unmatched"]) == ("{}", "{}")


def test_can_be_written_and_read(predicted, tmp_path):
    predicted.write_h5ad(tmp_path / "p.h5ad")
    again = anndata.read_h5ad(tmp_path / "p.h5ad")
    np.testing.assert_array_equal(again.X, predicted.X)
    assert again.uns["scjax"]["sampler"] == "ddim"


def test_a_condition_does_not_depend_on_what_else_is_asked_for(cellset_trained, predicted):
    alone = predict(cellset_trained, make_adata(), ["B"], contexts=["T | d1"], seed=3)
    assert_near(alone, rows(predicted, "B", "T | d1"))
    other = predict(cellset_trained, make_adata(), ["B"], contexts=["T | d1"], seed=4)
    assert not np.allclose(alone.X, other.X, atol=1e-2)
    assert not np.allclose(rows(predicted, "A", "T | d1").X, alone.X, atol=1e-2)


def test_the_truth_is_not_needed(cellset_trained, predicted):
    """Controls alone give the same, in whatever order of genes; other cells may be anything."""
    adata = make_adata()
    control = (adata.obs["drug"] == "ctrl").to_numpy()
    assert_near(predict(cellset_trained, adata[control].copy(), ASKED, contexts=WHERE, seed=3), predicted)
    adata.X = adata.X.astype(np.float32)
    adata.X[~control] = np.nan
    backwards = adata[:, list(reversed(GENES))].copy()
    assert_near(predict(cellset_trained, backwards, ASKED, contexts=WHERE, seed=3), predicted)


def test_filler_changes_nothing(cellset_trained):
    """What stands in the places of filler does not reach the cells of the set."""
    config, rng = cellset_trained.config, np.random.default_rng(0)
    control = rng.random((8, 6, 8)).astype(np.float32)
    mask = np.arange(6) < rng.integers(1, 6, 8)[:, None]
    embedding = rng.normal(size=(8, 1, config.width_of_covariates)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 8)
    generation = replace(EXPERIMENT.generation, set_size=6, n_cells=1)

    def sampled(control):
        return cellsets._sample(
            cellset_trained.params, jnp.asarray(control), jnp.asarray(embedding), jnp.asarray(mask), None, None, keys,
            cellset_trained.constants, config=config, generation=generation,
        )  # fmt: skip

    other = np.where(mask[..., None], control, 9.0).astype(np.float32)
    one, two = np.asarray(sampled(control)), np.asarray(sampled(other))
    np.testing.assert_allclose(one[mask], two[mask], atol=1e-5)
    assert not np.allclose(one[~mask], two[~mask], atol=1e-2)


# -- names that training never saw


def test_the_mean_of_all_stands_for_an_unknown_perturbation(cellset_trained):
    found = predict(cellset_trained, make_adata(), ["A+B", "A"], contexts=["T | d1"], on_unknown="mean")
    assert json.loads(found.uns["scjax"]["replaced"]) == {"A+B": "mean of 2 trained perturbations"}
    speaker = cellsets._Covariates(cellset_trained, "mean", {})
    (mean,) = speaker._embed([(tuple(speaker._perturbed(Population(("A", "B"), ""))), ("cell_type", 1), ("batch", 0))])
    ids = {"perturbation": jnp.array([1, 2]), "cell_type": jnp.array([1, 1]), "batch": jnp.array([0, 0])}
    single = perturbdiff.covariate_embedding(
        cellset_trained.params, ids, constants=cellset_trained.constants, config=cellset_trained.config
    )
    np.testing.assert_allclose(mean, single[:, 0].mean(axis=0), atol=1e-5)


def test_a_cell_type_that_was_in_no_set_of_training(cellset_trained):
    about = {**cellset_trained.about, "trained": {**cellset_trained.about["trained"], "cell_type": ["NK"]}}
    trained = cellset_trained._replace(about=about)
    with pytest.raises(ValueError, match="cell_type 'T' was in no set of training.* sampling.include_control=True"):
        predict(trained, make_adata(), ["A"], contexts=["T | d1"])
    found = predict(trained, make_adata(), ["A"], contexts=["T | d1"], on_unknown="mean")
    assert json.loads(found.uns["scjax"]["replaced"]) == {"T": "mean of 1 trained values of cell_type"}


# -- controls


def without_controls(*contexts):
    adata = make_adata()
    of = adata.obs["kind"] + " | " + adata.obs["donor"]
    return adata[~(of.isin(contexts) & (adata.obs["drug"] == "ctrl"))].copy()


@pytest.mark.parametrize(
    ("lacking", "kind", "donors"),
    [
        (["NK | d3"], "same batch", {"d3"}),
        (["NK | d3", "T | d3"], "same cell type", {"d1", "d2"}),
    ],
)
def test_stand_ins_for_controls(cellset_trained, lacking, kind, donors):
    adata = without_controls(*lacking)
    with pytest.warns(UserWarning, match=r"the context 'NK \| d3' has no control cells; those of"):
        found = predict(cellset_trained, adata, ["A"], contexts=["NK | d3"])
    assert json.loads(found.uns["scjax"]["unmatched"]) == {"NK | d3": kind}
    given = adata.obs.loc[found.obs["source_cell"].astype(str)]
    assert set(given["donor"]) == donors
    assert set(given["kind"]) == ({"T"} if kind == "same batch" else {"NK"})
    assert set(found.obs["donor"]) == {"d3"}
    strict = with_experiment(cellset_trained, unmatched="error")
    with pytest.raises(ValueError, match=r"contexts must have control cells in adata; 'NK \| d3' has none"):
        predict(strict, adata, ["A"], contexts=["NK | d3"])
    everywhere = predict(cellset_trained, adata, ["A"])  # where nothing is named, contexts with controls
    assert not set(lacking) & set(everywhere.obs["context"])


@pytest.mark.parametrize("group_by", [None, ["perturbation", "cell_type"]])
def test_what_the_context_does_not_tell_comes_from_the_controls(cellset_trained, group_by):
    """Sets of one donor each where those of training were; else mixed. Donors are as frequent as among the controls."""
    sampling = {**cellset_trained.about["experiment"]["sampling"], "group_by": group_by}
    trained = with_experiment(cellset_trained, sampling=sampling)._replace(
        spec=replace(cellset_trained.spec, covariates=("kind",)),
        names=replace(cellset_trained.names, covariates=("kind",)),
    )
    adata = make_adata()
    found = predict(trained, adata, ["A"], contexts=["NK"], n_cells=12)
    np.testing.assert_array_equal(
        adata.obs.loc[found.obs["source_cell"].astype(str), "donor"], found.obs["donor"].astype(str)
    )
    per_set = found.obs.groupby("set")["donor"].nunique()
    if group_by is None:
        assert (per_set == 1).all()
        np.testing.assert_array_equal(found.obs["donor"].value_counts(), [4, 4, 4])
    else:
        assert per_set.max() > 1


def test_a_run_without_controls_needs_none(cellset_trained):
    sampling = {**cellset_trained.about["experiment"]["sampling"], "controls": "zeros"}
    trained = with_experiment(cellset_trained, sampling=sampling)
    adata = make_adata()[:0].copy()
    found = predict(trained, adata, ["A"], contexts=["T | d1"], n_cells=4)
    assert set(found.obs["source_cell"]) == {""}
    assert set(read_sources(trained, adata)) == {f"{kind} | {donor}" for kind in ("NK", "T") for donor in DONORS}
    with pytest.raises(ValueError, match="batch 'd9' is not among the 3 of the data"):
        predict(trained, adata, ["A"], contexts=["T | d9"])
    with pytest.raises(ValueError, match="the number of contexts must be at least 1; got 0"):
        predict(trained, adata, ["A"], contexts=[])


DONORS = ("d1", "d2", "d3")


def test_observed_cells(cellset_trained, cellset_run):
    population = Population(("A",), "NK | d3")
    found = observed_cells(cellset_trained, make_adata(), [population])[population]
    np.testing.assert_array_equal(found, cellset_run.data.cells(population))
    with pytest.raises(ValueError, match="adata has no cells of C"):
        observed_cells(cellset_trained, make_adata(), [Population(("C",), "NK | d3")])


# -- doses, and perturbations that the user brings vectors of


def with_doses():
    adata = make_adata()
    adata.obs["dose"] = np.where(adata.obs["drug"] == "A", np.where(np.arange(adata.n_obs) % 2, 1.0, 10.0), 2.0)
    return adata


@pytest.fixture(scope="module")
def by_dose(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doses") / "run"
    experiment = replace(
        EXPERIMENT,
        spec=replace(EXPERIMENT.spec, dose="dose"),
        model=replace(EXPERIMENT.model, n_doses=4),
        split=HoldOutCrossed(covariates=("donor",), values=(("d3",),), conditions=("A@10",)),
    )
    train(experiment, with_doses(), folder)
    return load(folder)


def test_doses(by_dose):
    settings = {"contexts": ["T | d1"], "seed": 2}
    found = predict(by_dose, with_doses(), ["A@10", "A@1.0", "B@2"], **settings)
    of = {name: cells.X for name, cells in ((n, found[found.obs["condition"] == n]) for n in ("A@10", "A@1", "B@2"))}
    assert {len(cells) for cells in of.values()} == {10}
    near = predict(by_dose, with_doses(), ["A@8"], on_unknown="nearest", **settings)
    assert json.loads(near.uns["scjax"]["replaced"]) == {"A@8": "A@10"}
    # The rank of the dose is a covariate of its own: exchanging two rows of its table changes what comes out.
    (name,) = [name for name in by_dose.params["covariates"] if "dose" in name]
    table = by_dose.params["covariates"][name]
    swapped = jax.tree.map(lambda leaf: leaf[jnp.array([0, 3, 2, 1])] if leaf.shape[0] == 4 else leaf, table)
    other = by_dose._replace(params={**by_dose.params, "covariates": {**by_dose.params["covariates"], name: swapped}})
    changed = predict(other, with_doses(), ["A@10", "B@2"], **settings)
    assert np.abs(changed[changed.obs["condition"] == "A@10"].X - of["A@10"]).max() > 1e-4
    np.testing.assert_allclose(changed[changed.obs["condition"] == "B@2"].X, of["B@2"], atol=1e-4)
    for condition, message in [
        ("A", "'A' has no dose; write 'name@dose'"),
        ("A@-1", "'A@-1' has no dose"),
        ("A@8", "perturbation 'A@8' is not known to the model"),
    ]:
        with pytest.raises(ValueError, match=message):
            predict(by_dose, with_doses(), [condition], **settings)


def with_vectors(*names):
    adata = make_adata()
    rng = np.random.default_rng(0)
    vectors = {name: rng.normal(size=3).astype(np.float32) for name in ("A", "B", "new")}
    vectors["near"] = vectors["B"] + np.float32(0.01)
    adata.uns["embedding"] = {name: vectors[name] for name in names}
    return adata


@pytest.fixture(scope="module")
def by_vectors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vectors") / "run"
    experiment = replace(
        EXPERIMENT,
        spec=replace(EXPERIMENT.spec, vectors="embedding"),
        model=replace(EXPERIMENT.model, perturbation="vector"),
    )
    train(experiment, with_vectors("A", "B"), folder)
    return load(folder)


def test_a_vector_is_all_that_a_new_perturbation_needs(by_vectors):
    settings = {"contexts": ["T | d1"], "seed": 2}
    assert by_vectors.config.n_perturbation_features == 3
    everything = with_vectors("A", "B", "new", "near")
    found = predict(by_vectors, everything, ["new", "A+B"], **settings)
    assert json.loads(found.uns["scjax"]["replaced"]) == {}
    assert np.isfinite(found.X).all()
    # A pair without a vector of its own has the mean of its parts' vectors.
    pair = with_vectors("A", "B")
    pair.uns["embedding"] = {"A+B": (pair.uns["embedding"]["A"] + pair.uns["embedding"]["B"]) / 2}
    named = predict(by_vectors, pair, ["A+B"], **settings)
    np.testing.assert_allclose(named.X, found[found.obs["condition"] == "A+B"].X, atol=1e-4)
    with pytest.raises(ValueError, match="perturbation 'new' is not known to the model"):
        predict(by_vectors, make_adata(), ["new"], **settings)
    wide = make_adata()
    wide.uns["embedding"] = {"new": np.ones(5, np.float32)}
    with pytest.raises(ValueError, match="the vector of 'new' must have the 3 features of training"):
        predict(by_vectors, wide, ["new"], **settings)


# -- bad input


@pytest.mark.parametrize(
    ("conditions", "options", "message"),
    [
        ([], {}, "conditions must name at least one condition; got none"),
        ("A", {}, r"conditions must be a list of names; got the one text 'A'. Write \['A'\]"),
        (["A", "A+ctrl"], {}, r"conditions must differ; 'A\+ctrl' and 'A' are the same"),
        (["ctrl"], {}, "the control is no perturbation, and this run never saw it as a target"),
        (["a"], {}, "perturbation 'a' is not known to the model: it was in no training population"),
        (["A+B"], {"on_unknown": "nearest"}, "nothing tells what is near 'A.B'"),
        (["A"], {"contexts": ["T | d9"]}, "batch 'd9' is not among the 3 of the data. There are: 'd1', 'd2', 'd3'"),
        (["A"], {"source": "pbmc"}, "sources 'pbmc' is not among the 1 of the data"),
        (["A"], {"n_cells": 0}, "n_cells must be at least 1; got 0"),
        (["A"], {"set_size": 0}, "set_size must be at least 1; got 0"),
        (["A"], {"n_steps": 31}, "generation.n_steps must be at most model.n_times=30; got 31"),
        (["A"], {"sampler": "ddpm", "eta": 0.5}, "eta is of sampler='ddim' and does nothing with 'ddpm'"),
        (["A"], {"eta": 2.0}, r"eta must lie in \[0, 1\]; got 2.0"),
        (["A"], {"guidence": 1.0}, "the name of an option must be one of .*; got 'guidence'. Did you mean 'guidance'"),
        (["A"], {"seed": -1}, "seed must be at least 0; got -1"),
        (["A"], {"chunk": 0}, "chunk must be at least 1; got 0"),
    ],
)
def test_bad_arguments(cellset_trained, conditions, options, message):
    with pytest.raises(ValueError, match=message):
        predict(cellset_trained, make_adata(), conditions, **options)


def test_bad_data(cellset_trained):
    adata = make_adata()
    with pytest.raises(ValueError, match="adata must hold control cells"):
        predict(cellset_trained, adata[adata.obs["drug"] != "ctrl"].copy(), ["A"])
    with pytest.raises(ValueError, match="genes of the fit are missing: g7"):
        predict(cellset_trained, adata[:, list(GENES[:-1])].copy(), ["A"])
    renamed = anndata.AnnData(adata.X, obs=adata.obs.rename(columns={"donor": "donors"}), var=adata.var)
    with pytest.raises(ValueError, match="'donor' is not one. Did you mean 'donors'"):
        predict(cellset_trained, renamed, ["A"])


def test_guidance_needs_a_model_for_it(cellset_trained):
    trained = cellset_trained._replace(config=replace(cellset_trained.config, condition_dropout=0.0))
    sources = read_sources(trained, make_adata(), ["T | d1"])
    with pytest.raises(ValueError, match="guidance=2.0 needs model.condition_dropout above 0"):
        generate(trained, sources, [Population(("A",), "T | d1")])


def test_of_a_perturbation_that_the_model_was_not_trained_with(cellset_trained):
    trained = cellset_trained._replace(config=replace(cellset_trained.config, perturbation="none"))
    sources = read_sources(trained, make_adata(), ["T | d1"])
    with pytest.raises(ValueError, match="'A' is a perturbation, and this run was trained without"):
        generate(trained, sources, [Population(("A",), "T | d1")])
