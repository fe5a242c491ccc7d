"""The commands on cell sets as a user types them; several files; options of the other kinds are refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import anndata
import pytest
from test_cli import refused
from tiny_cellsets import EXPERIMENT, MODEL, make_adata

from scjax.cli import main
from scjax.config import from_json, to_json
from scjax.experiment import CellSetExperiment, read_experiment
from scjax.predict import load


@pytest.fixture(scope="module")
def here(tmp_path_factory, cellset_run):
    folder = tmp_path_factory.mktemp("cli")
    make_adata().write_h5ad(folder / "cells.h5ad")
    make_adata(donors=("d3", "d4")).write_h5ad(folder / "more.h5ad")
    (folder / "tiny.json").write_text(to_json(EXPERIMENT))
    short = replace(EXPERIMENT, model=replace(MODEL, n_spaces=2), n_steps=5, checkpoint_every=5)
    short = replace(short, split=replace(EXPERIMENT.split, values=(("cells_d3",),)))
    (folder / "short.json").write_text(to_json(short))
    shutil.copytree(cellset_run.workdir, folder / "run")
    return folder


@pytest.fixture(autouse=True)
def stand_in(here, monkeypatch):
    monkeypatch.chdir(here)


def test_train(capsys):
    """To the end of a run that was begun elsewhere: nothing is left to do, and the next commands are told."""
    main(["train", "--resume", "--data", "cells.h5ad", "--out", "run"])
    told = capsys.readouterr().out
    assert told.startswith("scjax train PerturbDiff: settings go to run/experiment.json")
    assert "predictions use a moving average of the parameters, 12% of which is still what training began" in told
    assert "scjax evaluate --runs run --data cells.h5ad" in told
    assert "scjax predict --run run --data cells.h5ad --conditions A --out" in told


def test_what_a_run_without_perturbations_can_be_asked(capsys):
    marginal = ["--model.perturbation", "none", "--sampling.controls", "zeros"]
    marginal = ["train", "--config", "short.json", *marginal, "--data", "cells.h5ad", "--data", "more.h5ad"]
    main([*marginal, "--out", "nothing"])
    assert capsys.readouterr().out.endswith("the run is in nothing.\n")
    main([*marginal, "--sampling.include-control", "--out", "m"])
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.split() == "scjax predict --run m --data cells.h5ad --conditions control --out predicted.h5ad".split()
    main(told.split()[1:] + ["--contexts", "T | cells_d1", "--n-cells", "2"])
    assert anndata.read_h5ad("predicted.h5ad").shape == (2, 8)


def test_predict(capsys, tmp_path):
    out = tmp_path / "predicted.h5ad"
    main(
        ["predict", "--run", "run", "--data", "cells.h5ad", "--conditions", "B", "new", "--out", str(out)]
        + ["--contexts", "T | d1", "--n-cells", "3", "--on-unknown", "mean", "--set-size", "2", "--n-steps", "2"]
        + ["--sampler", "ddpm", "--spacing", "truncated", "--guidance", "1.5", "--seed", "4"]
    )
    told = capsys.readouterr().out
    assert "new was in no training population; in its place: mean of 2 trained perturbations" in told
    assert "6 cells x 8 genes from step 20 written to" in told
    found = anndata.read_h5ad(out)
    assert list(found.obs["condition"]) == ["B"] * 3 + ["new"] * 3
    record = found.uns["scjax"]
    named = ("sampler", "spacing", "n_steps", "guidance", "set_size", "seed")
    assert tuple(record[name] for name in named) == ("ddpm", "truncated", 2, 1.5, 2, 4)


def test_several_files(capsys, tmp_path):
    """Sources by the names of the files, in training and in prediction."""
    files = ["--data", "cells.h5ad", "--data", "other=more.h5ad"]
    main(["train", "--config", "short.json", *files, "--out", "both"])
    assert "--data cells.h5ad --data other=more.h5ad" in capsys.readouterr().out
    assert load("both").names.sources == ("cells", "other")
    predict = ["predict", "--run", "both", "--conditions", "B", "--n-cells", "2", "--out", str(tmp_path / "p.h5ad")]
    main([*predict, "--data", "other=more.h5ad", "--contexts", "T | other_d4"])
    found = anndata.read_h5ad(tmp_path / "p.h5ad")
    assert set(found.obs["source"]) == {"other"}
    assert set(found.obs["donor"]) == {"other_d4"}
    predict[-1] = str(tmp_path / "q.h5ad")
    assert "sources 'more' is not among the 2 of the data" in refused(capsys, *predict, "--data", "more.h5ad")


def test_evaluate(capsys, tmp_path):
    out = tmp_path / "numbers.json"
    main(["evaluate", "--runs", "run", "--data", "cells.h5ad", "--out", str(out), "--n-draws", "2"])
    told = capsys.readouterr().out
    assert "all 2 held-out populations, unseen: pair (2)" in told
    assert "l2: PerturbDiff " in told
    (table,) = json.loads(out.read_text())
    assert table["rows"][0]["name"] == "PerturbDiff"


def test_show(capsys):
    main(["show", "run"])
    told = capsys.readouterr().out
    assert "run: perturbdiff, run " in told
    assert "held out 2 populations: A (NK | d3), A (T | d3)" in told
    main(["show", "run", "--settings"])
    Path("shown.json").write_text(capsys.readouterr().out)
    assert from_json(CellSetExperiment, "shown.json") == read_experiment("shown.json") == EXPERIMENT


PREDICT = ("predict", "--run", "run", "--data", "cells.h5ad", "--out", "p.h5ad")
TRAIN = ("train", "--config", "tiny.json", "--data", "cells.h5ad", "--out", "new")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (PREDICT, "give --conditions for a prediction, such as A or A+B"),
        ((*PREDICT, "--times", "1"), "--times is not of this run: run was trained on cell sets, which takes --cond"),
        ((*PREDICT, "--conditions", "A", "--solver", "heun"), "--solver is not of this run"),
        ((*PREDICT, "--conditions", "A", "--genes", "g0"), "--genes is not of this run"),
        ((*PREDICT, "--conditions", "a"), "on_unknown=... is --on-unknown"),
        (("predict", "--run", "run", "--out", "p.h5ad", "--conditions", "A"), "give --data, the .h5ad or .zarr"),
        ((*TRAIN, "--spec.batch", "doner"), "'doner' is not one. Did you mean 'donor'?"),
        ((*TRAIN, "--model.n-genes", "3"), "model.n_genes must be the data's 8, or None"),
        ((*TRAIN, "--set", 'pretrained={"run": "nowhere"}'), "pretrained.run='nowhere'"),
        ((*TRAIN, "--set", 'pretrained={"run": "run"}', "--pretrained.step", "7"), "step must be one of 10, 20"),
    ],
)
def test_mistakes(capsys, arguments, message):
    assert message in refused(capsys, *arguments)
    assert not Path("p.h5ad").exists()
    assert not Path("new").exists()


def test_options_and_files_of_this_kind_alone(tiny_run, capsys):
    command = ("predict", "--run", tiny_run.workdir, "--out", "p.h5ad", "--times", "1", "--data", "cells.h5ad")
    assert "--sampler is not of this run" in refused(capsys, *command, "--sampler", "ddim")
    named = refused(capsys, *command, "--data", "two=more.h5ad")
    assert "named files are for cell sets only" in named
