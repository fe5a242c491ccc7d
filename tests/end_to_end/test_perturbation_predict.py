"""A checkpoint and control cells make predictions under conditions seen or not, without the truth."""

import json
from dataclasses import replace

import anndata
import jax
import numpy as np
import pandas as pd
import pytest
from tiny_perturbation import EXPERIMENT, GENES, LINES, make_adata

from scjax.experiment import train
from scjax.models import scdfm
from scjax.predict import load, observed_cells, perturbation, predict
from scjax.predict.perturbation import generate, read_sources
from scjax.types import Population

ASKED = ["g1+g0", "z+ctrl", "g1"]  # held out, seen, seen; spelled as a user likes


def same_anndata(a, b):
    np.testing.assert_array_equal(a.X, b.X)
    pd.testing.assert_frame_equal(a.obs, b.obs)
    assert a.uns["scjax"] == b.uns["scjax"]
    return True


def rows(predicted, condition, context):
    return predicted[(predicted.obs["condition"] == condition) & (predicted.obs["context"] == context)]


@pytest.fixture(scope="module")
def predicted(perturbation_trained):
    return predict(perturbation_trained, make_adata(), ASKED, seed=3)


def test_loaded_is_what_was_trained(perturbation_run, perturbation_trained):
    trained, data = perturbation_trained, perturbation_run.data
    jax.tree.map(np.testing.assert_array_equal, trained.params, perturbation_run.state.ema)
    assert (trained.spec, trained.generation, trained.step) == (EXPERIMENT.spec, EXPERIMENT.generation, 20)
    assert (trained.split, trained.vocabulary, trained.n_slots) == (data.split, data.vocabulary, 2)
    assert trained.config.n_tokens == data.vocabulary.n_tokens
    np.testing.assert_array_equal(trained.constants.graph, data.graph)
    assert load(perturbation_run.workdir, 10).step == 10
    for population, cells in observed_cells(trained, make_adata(), data.populations).items():
        np.testing.assert_array_equal(cells, data.cells(population))


def test_predicted_anndata(perturbation_trained, predicted, tmp_path):
    n = EXPERIMENT.generation.n_cells
    assert predicted.shape == (len(ASKED) * len(LINES) * n, len(GENES))
    assert tuple(predicted.var_names) == GENES
    assert predicted.obs_names.is_unique
    assert predicted.X.dtype == np.float32
    assert np.isfinite(predicted.X).all()
    assert (predicted.X >= 0).all()
    assert list(dict.fromkeys(predicted.obs["condition"])) == ["g0+g1", "z", "g1"]
    assert set(predicted.obs["seed"]) == {3}
    adata = make_adata()
    for line in LINES:
        controls = adata.obs_names[(adata.obs["condition"] == "ctrl") & (adata.obs["line"] == line)]
        part = predicted[predicted.obs["line"] == line]
        assert set(part.obs["context"]) == {line}
        assert set(part.obs["source_cell"]) <= set(controls)
        assert part[part.obs["condition"] == "z"].obs["source_cell"].is_unique
    record = predicted.uns["scjax"]
    assert json.loads(record["experiment"]) == perturbation_trained.about["experiment"]
    assert (record["run"], record["step"]) == (perturbation_trained.about["run"], 20)
    assert (record["solver"], record["n_steps"], record["guidance"], record["n_cells"]) == ("rk4_38", 3, 1.0, n)
    assert json.loads(record["replaced"]) == {}
    predicted.write_h5ad(tmp_path / "predicted.h5ad")
    assert same_anndata(anndata.read_h5ad(tmp_path / "predicted.h5ad"), predicted)


def test_a_condition_does_not_depend_on_what_else_is_asked_for(perturbation_trained, predicted):
    alone = predict(perturbation_trained, make_adata(), ["ctrl+z"], contexts=["B2"], seed=3)
    np.testing.assert_array_equal(alone.X, rows(predicted, "z", "B2").X)
    assert not np.array_equal(alone.X, rows(predicted, "g1", "B2").X)
    other = predict(perturbation_trained, make_adata(), ["ctrl+z"], contexts=["B2"], seed=4)
    assert not np.array_equal(alone.X, other.X)


def test_cells_are_what_the_model_samples(perturbation_trained, predicted, monkeypatch):
    """Each cell alone, by ids in the slots of training, from its own control cell: the program only packs them."""
    trained = perturbation_trained
    adata = make_adata()
    part = rows(predicted, "g0+g1", "A1")
    source = observed_cells(trained, adata, [Population((), "A1")])[Population((), "A1")]
    names = adata.obs_names[(adata.obs["condition"] == "ctrl") & (adata.obs["line"] == "A1")]
    x = source[[names.get_loc(name) for name in part.obs["source_cell"]]]
    ids = trained.vocabulary.encode([("g0", "g1")] * len(x), "gene", 2)
    tokens = trained.vocabulary.gene_tokens(GENES)
    # Without noise at the start both sides begin at the same place; another alpha, so that no program is at hand.
    monkeypatch.setattr(scdfm, "_start", lambda key, cells, config: cells)
    config = replace(trained.config, poisson_alpha=0.123)
    x, ids, tokens = map(jax.numpy.asarray, (x, ids, tokens))
    bound = {"constants": trained.constants, "config": config, "n_steps": 3}
    wanted = scdfm.sample(trained.params, x, ids, tokens, jax.random.key(0), **bound)
    found = predict(trained._replace(config=config), adata, ["g0+g1"], contexts=["A1"], seed=3)
    np.testing.assert_allclose(found.X, wanted, atol=1e-4)


def test_a_start_at_control_cells_shows_the_network_others(perturbation_trained):
    """Paths begin at the named cell; of the two controls of a context the network sees the other one."""
    trained = perturbation_trained
    config = replace(trained.config, start="control", start_noise=0.0)
    adata = make_adata()
    controls = np.flatnonzero((adata.obs["condition"] == "ctrl") & (adata.obs["line"] == "A1"))[:2]
    sources = read_sources(trained, adata[controls])
    pair = Population(("g0", "g1"), "A1")
    cells = generate(trained._replace(config=config), sources, [pair], seed=3)[0][pair]
    x = sources["A1"].x
    ids = jax.numpy.asarray(trained.vocabulary.encode([("g0", "g1")] * len(cells.x), "gene", 2))
    begin, shown, tokens = map(
        jax.numpy.asarray, (x[cells.start], x[1 - cells.start], trained.vocabulary.gene_tokens(GENES))
    )
    bound = {"x0": begin, "constants": trained.constants, "config": config, "n_steps": 3}
    wanted = scdfm.sample(trained.params, shown, ids, tokens, None, **bound)
    np.testing.assert_allclose(cells.x, wanted, atol=1e-4)
    lone = {"A1": sources["A1"]._replace(x=x[:1])}
    with pytest.raises(ValueError, match="control cells of context 'A1' must be at least 2"):
        generate(trained._replace(config=config), lone, [Population(("g0",), "A1")])


def test_composed_combinations_add_up_what_their_parts_do(perturbation_trained, predicted):
    """A single is what it was; a pair is asked for by its parts; a run that never saw controls as targets refuses."""
    trained = perturbation_trained
    settings = {**trained.about["experiment"]}
    settings["sampling"] = {**settings["sampling"], "include_control": True}
    knows = trained._replace(about={**trained.about, "experiment": settings})
    composed = predict(knows, make_adata(), ASKED, seed=3, composition="additive")
    assert composed.uns["scjax"]["composition"] == "additive"
    for single in ("z", "g1"):
        assert np.abs(rows(composed, single, "A1").X - rows(predicted, single, "A1").X).max() < 1e-4
    assert np.abs(rows(composed, "g0+g1", "A1").X - rows(predicted, "g0+g1", "A1").X).max() > 1e-3
    without = {**settings, "sampling": {**settings["sampling"], "include_control": False}}
    blind = trained._replace(about={**trained.about, "experiment": without})
    with pytest.raises(ValueError, match="never saw as a target"):
        predict(blind, make_adata(), ASKED, composition="additive")


def test_small_values_become_zeros_on_request(perturbation_trained, predicted):
    floor = float(np.median(predicted.X[predicted.X > 0]))
    found = predict(perturbation_trained, make_adata(), ASKED, seed=3, zero_below=floor)
    np.testing.assert_array_equal(found.X, np.where(predicted.X < floor, 0, predicted.X))
    assert found.uns["scjax"]["zero_below"] == floor
    with pytest.raises(ValueError, match="zero_below"):
        predict(perturbation_trained, make_adata(), ASKED, zero_below=-1.0)


def test_a_solver_that_does_not_arrive_is_an_error(perturbation_trained, monkeypatch):
    """tsit5 gives NaN where it ran out of steps; that is told, and not written."""
    nowhere = lambda params, source, *more, **options: np.full(source.shape, np.nan, np.float32)  # noqa: E731
    monkeypatch.setattr(perturbation, "_sample", nowhere)
    with pytest.raises(ArithmeticError, match=r"did not arrive for g0\+g1 \(A1\)"):
        predict(perturbation_trained, make_adata(), ["g0+g1"], contexts=["A1"], solver="tsit5")


def test_one_program_serves_every_condition_and_number_of_cells(perturbation_trained, predicted):
    before = perturbation._sample._cache_size()
    few = predict(perturbation_trained, make_adata(), ["g0", "g0+z", "g1+z"], n_cells=1, seed=3)
    many = predict(perturbation_trained, make_adata(), ["z"], n_cells=40, contexts=["A1"], seed=3)
    assert perturbation._sample._cache_size() == before
    assert few.n_obs == 3 * len(LINES)
    controls = observed_cells(perturbation_trained, make_adata(), [Population((), "A1")])[Population((), "A1")]
    assert many.obs["source_cell"].nunique() == len(controls) < 40  # some twice, none left out
    np.testing.assert_array_equal(many.X[:10], rows(predicted, "z", "A1").X)


def test_any_genes_in_any_order(perturbation_trained, predicted):
    genes = ["g7", "g0", "g3"]
    found = predict(perturbation_trained, make_adata(), ["z"], genes=genes, seed=3)
    assert list(found.var_names) == genes
    assert found.shape == (20, 3)


def test_only_control_cells_are_looked_at_and_genes_are_matched_by_name(perturbation_trained, predicted):
    adata = make_adata()
    control = (adata.obs["condition"] == "ctrl").to_numpy()
    assert same_anndata(predict(perturbation_trained, adata[control].copy(), ASKED, seed=3), predicted)
    adata.X = adata.X.astype(np.float32)
    adata.X[~control] = np.nan
    assert same_anndata(predict(perturbation_trained, adata, ASKED, seed=3), predicted)
    backwards = make_adata()[:, list(reversed(GENES))].copy()
    assert same_anndata(predict(perturbation_trained, backwards, ASKED, seed=3), predicted)
    lacking = backwards[:, [g for g in GENES if g not in ("g4", "g7")]].copy()
    with pytest.raises(ValueError, match=r"2 of the 10 genes of the fit are missing: g4, g7"):
        predict(perturbation_trained, lacking, ASKED)


def test_stand_ins_for_an_unknown_perturbation(perturbation_trained):
    found = predict(perturbation_trained, make_adata(), ["new+g0", "z"], on_unknown="mean", contexts=["A1"])
    assert json.loads(found.uns["scjax"]["replaced"]) == {"new": "mean of 3 trained perturbations"}
    assert list(dict.fromkeys(found.obs["condition"])) == ["g0+new", "z"]
    # A measured gene is known as a gene, whether it was perturbed or not.
    known = predict(perturbation_trained, make_adata(), ["g5"], contexts=["A1"])
    assert json.loads(known.uns["scjax"]["replaced"]) == {}


@pytest.mark.parametrize(
    ("conditions", "options", "message"),
    [
        ([], {}, "conditions must name at least one condition; got none"),
        ("g0", {}, r"conditions must be a list of names; got the one text 'g0'. Write \['g0'\]"),
        (["g0+g1", "g1+g0"], {}, r"conditions must differ; 'g1\+g0' and 'g0\+g1' are the same"),
        (["ctrl"], {}, "the control is no perturbation, and this run never saw it as a target"),
        (["g0+g0"], {}, "names 'g0' twice"),
        (["g0+"], {}, "has an empty part"),
        (["G0"], {}, "perturbation 'G0' is not known to the model: it was in no training population"),
        (["new"], {"on_unknown": "nearest"}, "nothing tells what is near 'new'"),
        (["g0+g1+z"], {}, "n_slots=2 is too few for 3 perturbations at once"),
        (["g0"], {"contexts": []}, "the number of contexts must be at least 1; got 0"),
        (["g0"], {"contexts": ["A11"]}, "contexts must have control cells in adata; 'A11' has none. Did you mean 'A1'"),
        (["g0"], {"genes": ["g0", "g77"]}, "'g77' is not among the .* genes that the model was fitted"),
        (["g0"], {"genes": ["z"]}, "genes must be among the 10 that training kept; 'z' was not measured"),
        (["g0"], {"genes": []}, "the number of genes must be at least 1; got 0"),
        (["g0"], {"genes": ["g1", "g1"]}, "genes must differ; 'g1' is repeated"),
        (["g0"], {"n_cells": 0}, "n_cells must be at least 1; got 0"),
        (["g0"], {"n_steps": 0}, "n_steps must be at least 1; got 0"),
        (["g0"], {"guidance": 2.0}, "guidance=2.0 needs a model that was trained with condition_dropout"),
        (["g0"], {"seed": -1}, "seed must be at least 0; got -1"),
        (["g0"], {"chunk": 0}, "chunk must be at least 1; got 0"),
    ],
)
def test_bad_arguments(perturbation_trained, conditions, options, message):
    with pytest.raises(ValueError, match=message):
        predict(perturbation_trained, make_adata(), conditions, **options)


def test_bad_data(perturbation_trained):
    adata = make_adata()
    with pytest.raises(
        ValueError, match=r"adata must hold control cells, .* none has 'control' or 'ctrl' in obs\['con"
    ):
        predict(perturbation_trained, adata[adata.obs["condition"] != "ctrl"].copy(), ["g0"])
    renamed = anndata.AnnData(adata.X, obs=adata.obs.rename(columns={"line": "lines"}), var=adata.var)
    with pytest.raises(ValueError, match=r"'line' is not one. Did you mean 'lines'"):
        predict(perturbation_trained, renamed, ["g0"])
    adata.X = adata.X.astype(np.float32)
    adata.X[np.flatnonzero(adata.obs["condition"] == "ctrl")[0], 0] = -1.0
    with pytest.raises(ValueError, match="holds 1 negative values, the least is -1"):
        predict(perturbation_trained, adata, ["g0"])
    with pytest.raises(ValueError, match=r"adata has no cells of g5 \(A1\)"):
        observed_cells(perturbation_trained, make_adata(), [Population(("g5",), "A1")])


# -- perturbations that the user brings vectors of


def with_vectors(*names):
    adata = make_adata()
    rng = np.random.default_rng(0)
    vectors = {name: rng.normal(size=3).astype(np.float32) for name in ("g0", "g1", "z", "new")}
    vectors["near"] = vectors["g1"] + np.float32(0.01)
    adata.uns["embedding"] = {name: vectors[name] for name in names}
    return adata


@pytest.fixture(scope="module")
def by_vectors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vectors") / "run"
    experiment = replace(
        EXPERIMENT,
        model=replace(EXPERIMENT.model, perturbation="vector", fusion="differential_transformer", gamma=0.0),
        spec=replace(EXPERIMENT.spec, vectors="embedding"),
        n_steps=5,
    )
    train(experiment, with_vectors("g0", "g1", "z"), folder)
    return load(folder)


def test_a_vector_is_all_that_a_new_perturbation_needs(by_vectors):
    """Those of training travel with the checkpoint; others come with the data of the prediction."""
    assert by_vectors.config.n_vector == 3
    everything = with_vectors("g0", "g1", "z", "new", "near")
    settings = {"contexts": ["A1"], "n_cells": 4}
    found = predict(by_vectors, everything, ["g0+new", "g1+g0", "g0+near"], **settings)
    assert json.loads(found.uns["scjax"]["replaced"]) == {}
    stored = predict(by_vectors, make_adata(), ["g0+g1"], **settings)
    np.testing.assert_array_equal(rows(found, "g0+g1", "A1").X, stored.X)
    with pytest.raises(ValueError, match="perturbation 'new' is not known"):
        predict(by_vectors, make_adata(), ["g0+new"], **settings)
    wide = make_adata()
    wide.uns["embedding"] = {"new": np.zeros(2, np.float32)}
    with pytest.raises(ValueError, match="the vector of 'new' must have the 3 features of training; got"):
        predict(by_vectors, wide, ["new"], **settings)
