"""Perturbations that training never saw, by their vectors: a world of linear effects, and the whole way of a table."""

import json
from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
import tiny_cellsets
import tiny_perturbation
from test_cli import refused

from scjax.cli import _again, main
from scjax.config import to_json
from scjax.data.conditions import dosed_vector
from scjax.data.embeddings import attach
from scjax.data.preprocess import Preprocess
from scjax.data.sampling import PairedSampling
from scjax.data.spec import DataSpec
from scjax.data.splits import HoldOutConditions
from scjax.experiment import PerturbationExperiment, evaluate, train
from scjax.models import scdfm
from scjax.predict import GenerationConfig, cellsets, load, predict
from scjax.train.optimizers import OptimizerConfig
from scjax.types import Population

# ---------------------------------------------------------------- a world of linear effects

UNIT, LEVEL, STD, DOSES = 2.0, 5.0, 0.3, (1.0, 8.0)
DRUGS = {f"d{i:02d}": v for i, v in enumerate(np.random.default_rng(1).normal(size=(24, 3)))}
UNSEEN = ("d03", "d08")  # at every dose
WEIGHTS = np.random.default_rng(2).normal(size=(3, 6)) / 2
WORLD = DataSpec(
    space="lognormalised", perturbation="drug", dose="dose", vectors="drugs", vector_dose="product", dose_unit=UNIT
)


def true_mean(drug, dose):
    return LEVEL + np.log(1 + dose / UNIT) * (DRUGS[drug] @ WEIGHTS)


def linear_world(n_cells=30):
    """Cells of every drug at every dose: N(LEVEL + s(dose) v W, STD^2)."""
    rng = np.random.default_rng(3)
    names = [("ctrl", 0.0), *((drug, dose) for drug in DRUGS for dose in DOSES), ("d05", 3.0)]
    means = [np.full(6, LEVEL) if drug == "ctrl" else true_mean(drug, dose) for drug, dose in names]
    x = np.concatenate([mean + STD * rng.normal(size=(n_cells, 6)) for mean in means]).astype(np.float32)
    obs = pd.DataFrame(np.repeat(np.array(names, object), n_cells, axis=0), columns=["drug", "dose"])
    obs.index = [f"c{i}" for i in range(len(obs))]
    obs["dose"] = obs["dose"].astype(float)
    adata = anndata.AnnData(np.maximum(x, 0), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(6)]))
    attach(adata, DRUGS, WORLD)
    return adata


EXPERIMENT = PerturbationExperiment(
    model=scdfm.Config(
        perturbation="vector",
        d_model=32,
        n_layers=1,
        n_heads=2,
        graph_heads=2,
        fusion="differential_transformer",
        dropout=0.0,
        gamma=0.0,
        start="control",
    ),
    spec=WORLD,
    split=HoldOutConditions(conditions=(*(f"{drug}@{dose:g}" for drug in UNSEEN for dose in DOSES), "d05@3")),
    preprocess=Preprocess(library_size=None, log1p=False, scale=False, n_components=None),
    sampling=PairedSampling(n_populations=8, n_cells=8, n_genes=None, coupling="ot"),
    generation=GenerationConfig(n_cells=200, solver="heun", n_steps=6),
    optimizer=OptimizerConfig(learning_rate=4e-3, schedule="cosine", clip_norm=1.0),
    n_steps=500,
    scan_steps=50,
    ema_decay=0.98,
    log_every=250,
    checkpoint_every=500,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder, adata = tmp_path_factory.mktemp("world") / "run", linear_world()
    train(EXPERIMENT, adata, folder)
    return folder, adata


def test_linear_effects_reach_unseen_drugs_and_doses(world):
    """The mean of a held-out population is told much better than by its controls or by the mean of perturbations."""
    table = evaluate([world[0]], world[1])[0]
    rows = {row.name: row.by_population("l2").mean(axis=0) for row in table.rows if row.kind != "floor"}
    for baseline in ("control", "mean of perturbations"):
        ratio = rows["scDFM"] / rows[baseline]
        print(f"\nL2, scDFM over {baseline}: {dict(zip(map(str, table.populations), ratio.round(2), strict=True))}")  # noqa: T201
        assert rows["scDFM"].mean() < 0.5 * rows[baseline].mean()
    # The world is the ridge's: with the same vectors it is as right as the cells allow.
    assert rows["ridge"].mean() < rows["scDFM"].mean()


def test_a_new_dose_lies_between_and_beyond(world):
    """It needs no table; and the output says what was interpolated, extrapolated, or told by a vector alone."""
    adata = linear_world()
    del adata.uns["drugs"]
    found = predict(load(world[0]), adata, ["d05@1", "d05@3", "d05@20", "d03@1"], seed=1)
    told = json.loads(found.uns["scjax"]["unseen"])
    assert told == {
        "d05@3": "interpolated between the trained doses 1 and 8 of d05",
        "d05@20": "extrapolated: training saw d05 at doses from 1 to 8",
        "d03@1": "in no training population: told by its vector alone",
    }
    change = {c: found[found.obs["condition"] == c].X.mean(axis=0) - LEVEL for c in found.obs["condition"].unique()}
    along = {c: float(d @ (DRUGS["d05"] @ WEIGHTS)) for c, d in change.items()}
    assert along["d05@1"] < along["d05@3"] < along["d05@20"]
    np.testing.assert_allclose(change["d05@3"], true_mean("d05", 3.0) - LEVEL, atol=0.35)


# ---------------------------------------------------------------- sets of cells

VECTORS = {n: v for n, v in zip(("g0", "g1", "z", "A", "B"), np.random.default_rng(0).normal(size=(5, 3)), strict=True)}
NEW = {"new": np.array([1.0, -1.0, 0.5]), "other": np.array([0.2, 1.0, -2.0])}
SETS = replace(
    tiny_cellsets.EXPERIMENT,
    spec=replace(
        tiny_cellsets.EXPERIMENT.spec,
        vectors="table",
        dose="dose",
        vector_dose="append",
        dose_unit=0.5,
        pooling="sum",
    ),
    model=replace(tiny_cellsets.EXPERIMENT.model, perturbation="vector"),
    split=HoldOutConditions(conditions=("B@0.5",)),
    n_steps=5,
    checkpoint_every=5,
)


def dosed_sets():
    adata = tiny_cellsets.make_adata()
    adata.obs["dose"] = np.where(np.arange(adata.n_obs) % 2, "0.5", "4")
    return adata


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    adata, folder = dosed_sets(), tmp_path_factory.mktemp("sets") / "run"
    attach(adata, VECTORS, SETS.spec)
    train(SETS, adata, folder)
    return load(folder)


def test_any_dose_of_sets(sets):
    """A dose of a trained drug needs no table; a new drug does, and its pairs do not depend on their order."""
    settings = {"contexts": ["T | d1"], "n_cells": 4}
    adata = dosed_sets()
    doses = predict(sets, adata, ["A@4", "A@4.5", "A@9", "A@4.5+B@2"], **settings)
    assert np.isfinite(doses.X).all()
    assert json.loads(doses.uns["scjax"]["unseen"]) == {
        "A@4.5": "extrapolated: training saw A at doses from 0.5 to 4",
        "A@9": "extrapolated: training saw A at doses from 0.5 to 4",
        "B@2": "extrapolated: training saw B at doses from 4 to 4",
    }
    with pytest.raises(
        ValueError, match="'new@1' is not known .* no vector of 'new' in the checkpoint, nor .*not there"
    ):
        predict(sets, adata, ["new@1"], **settings)
    attach(adata, NEW, sets.spec, every=False)
    pair = predict(sets, adata, ["new@1+other@2"], **settings)
    np.testing.assert_array_equal(pair.X, predict(sets, adata, ["other@2+new@1"], **settings).X)
    mixed = predict(sets, adata, ["B@4+new@1"], **settings)
    assert set(json.loads(mixed.uns["scjax"]["unseen"])) == {"new@1"}


@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_a_pair_is_told_by_the_vectors_of_its_parts(sets, pooling):
    """Whether training saw both, one or none of them."""
    trained = sets._replace(spec=replace(sets.spec, pooling=pooling))
    told = lambda name, dose: dosed_vector({**VECTORS, **NEW}[name], dose, "append", 0.5)  # noqa: E731
    for first, second in (("A", "B"), ("B", "new"), ("new", "other")):
        speaker = cellsets._Covariates(trained, "error", NEW)
        ((row, _),) = speaker._perturbed(Population((f"{first}@1", f"{second}@2"), ""))
        wanted = told(first, 1.0) + told(second, 2.0)
        np.testing.assert_allclose(speaker.table[row], wanted if pooling == "sum" else wanted / 2, rtol=1e-5)


def test_numbers_of_doses_leave_no_place_for_entries():
    with pytest.raises(ValueError, match=r"model.n_doses=3 .* set model.n_doses=None"):
        replace(SETS, model=replace(SETS.model, n_doses=3))


# ---------------------------------------------------------------- from a file to a table of scores, by commands


def test_the_way_of_a_table(tmp_path, monkeypatch, capsys):
    """train, predict what training never saw, evaluate; and what each says without the table."""
    monkeypatch.chdir(tmp_path)
    tiny_perturbation.make_adata().write_h5ad("cells.h5ad")
    experiment = replace(
        tiny_perturbation.EXPERIMENT,
        model=replace(tiny_perturbation.EXPERIMENT.model, fusion="differential_transformer", gamma=0.0),
        split=HoldOutConditions(conditions=("g0", "g0+g1", "g0+z")),
        n_steps=5,
        checkpoint_every=5,
    )
    (tmp_path / "tiny.json").write_text(to_json(experiment))
    pd.DataFrame({**VECTORS, **NEW}).T.to_csv("table.csv")
    pd.DataFrame({"g0": VECTORS["g0"]}).T.to_csv("short.csv")
    settings = ["--config", "tiny.json", "--model.perturbation", "vector", "--out", "run", "--data", "cells.h5ad"]
    told = refused(capsys, "train", *settings, "--vectors", "short.csv")
    assert "the table has no vector for 2 of the data's perturbations: 'g1', 'z'. Add them" in told
    main(["train", *settings, "--vectors", "table.csv"])
    told = capsys.readouterr().out
    assert "scjax evaluate --runs run --data cells.h5ad --vectors table.csv" in told

    ask = ["predict", "--run", "run", "--data", "cells.h5ad", "--n-cells", "3", "--contexts", "A1"]
    main([*ask, "--conditions", "g0+g1", "g0", "--out", "known.h5ad"])  # its vectors are in the checkpoint
    assert "g0: in no training population: told by its vector alone" in capsys.readouterr().out
    told = refused(capsys, *ask, "--conditions", "new+other", "--out", "new.h5ad")
    assert "Bring a table that has it (data.embeddings.attach; --vectors FILE of `scjax predict`)" in told
    main([*ask, "--conditions", "new+other", "g1+new", "--out", "new.h5ad", "--vectors", "table.csv"])
    told = capsys.readouterr().out
    assert "new: in no training population: told by its vector alone" in told
    assert anndata.read_h5ad("new.h5ad").n_obs == 6

    main([*ask, "--conditions", "g1", "--out", "g1.h5ad", "--observed", "real.h5ad"])  # whose vector nobody asks for
    assert set(anndata.read_h5ad("real.h5ad").obs["condition"]) == {"g1", "control"}

    evaluation = ["evaluate", "--runs", "run", "--data", "cells.h5ad", "--n-draws", "1"]
    main([*evaluation, "--vectors", "table.csv", "--out", "scores.json"])
    told = capsys.readouterr().out
    assert "all 6 held-out populations, unseen: perturbation (6)" in told
    (table,) = json.loads((tmp_path / "scores.json").read_text())
    (ridge,) = [row for row in table["rows"] if row["name"] == "ridge"]
    assert "on the vectors of the parts" in ridge["note"]
    assert "adata.uns; 'vectors' is not one" in refused(capsys, *evaluation)


def test_an_interrupted_training_goes_on_with_its_table():
    given = ["train", "--preset", "scdfm/kang", "--vectors", "a table.csv", "--data", "x.h5ad", "--out", "run"]
    again = "scjax train --resume --out run --data x.h5ad --vectors 'a table.csv'"
    assert _again(given) == again
    ways = ["--keep", "5", "--devices", "2", "--on-disk", "--tensorboard"]  # how it runs, which no settings file tells
    assert _again([*given, "--n-steps", "9", *ways]) == f"{again} {' '.join(ways)}"
    for ways in (["--coordinator", "h:1", "--n-processes", "2", "--process-id", "0"], ["--detect-processes"]):
        assert _again([*given, *ways]) == f"{again} {' '.join(ways)}"  # else each would go on alone


def test_a_model_that_reads_no_vectors_takes_no_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.json").write_text(to_json(tiny_perturbation.EXPERIMENT))
    told = refused(capsys, "train", "--config", "tiny.json", "--data", "x.h5ad", "--out", "run", "--vectors", "t.csv")
    assert "is for --model.perturbation vector; with 'gene' nothing reads them" in told


def test_a_run_without_vectors_takes_no_table(tmp_path, monkeypatch, capsys, perturbation_run):
    monkeypatch.chdir(tmp_path)
    tiny_perturbation.make_adata().write_h5ad("cells.h5ad")
    pd.DataFrame(NEW).T.to_csv("table.csv")
    run = str(perturbation_run.workdir)
    told = refused(
        capsys,
        "predict",
        "--run",
        run,
        "--data",
        "cells.h5ad",
        "--conditions",
        "new",
        "--vectors",
        "table.csv",
        "--out",
        "new.h5ad",
    )
    assert "this run knows of no external vectors (spec.vectors=None)" in told
