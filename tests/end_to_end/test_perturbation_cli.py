"""The commands on perturbation data as a user types them; options of the other kind of run are refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import anndata
import pytest
import tiny_series
from test_cli import refused
from tiny_perturbation import EXPERIMENT, make_adata
from tiny_series import damaged_copy

from scjax import presets
from scjax.cli import main
from scjax.config import from_json, to_dict, to_json
from scjax.experiment import PerturbationExperiment, read_experiment


@pytest.fixture(scope="module")
def here(tmp_path_factory, perturbation_run):
    folder = tmp_path_factory.mktemp("cli")
    make_adata().write_h5ad(folder / "cells.h5ad")
    tiny_series.make_adata().write_h5ad(folder / "series.h5ad")
    (folder / "tiny.json").write_text(to_json(EXPERIMENT))
    shutil.copytree(perturbation_run.workdir, folder / "run")
    return folder


@pytest.fixture(autouse=True)
def stand_in(here, monkeypatch):
    monkeypatch.chdir(here)


def test_train(here, capsys):
    """To the end of a run that was begun elsewhere: nothing is left to do, and the next commands are told."""
    main(["train", "--resume", "--data", "cells.h5ad", "--out", "run"])
    told = capsys.readouterr().out
    assert told.startswith("scjax train scDFM: settings go to run/experiment.json")
    assert "scjax evaluate --runs run --data cells.h5ad" in told
    assert "scjax predict --run run --data cells.h5ad --conditions g0+g1 g0+z --out" in told


def test_predict(capsys, tmp_path):
    out = tmp_path / "predicted.h5ad"
    main(
        ["predict", "--run", "run", "--data", "cells.h5ad", "--conditions", "g1+g0", "new", "--out", str(out)]
        + ["--contexts", "B2", "--n-cells", "3", "--genes", "g3", "g1", "--on-unknown", "mean"]
        + ["--solver", "euler", "--n-steps", "2", "--seed", "4"]
    )
    told = capsys.readouterr().out
    assert "new was in no training population; in its place: mean of 3 trained perturbations" in told
    assert "6 cells x 2 genes from step 20 written to" in told
    found = anndata.read_h5ad(out)
    assert list(found.var_names) == ["g3", "g1"]
    assert list(found.obs["condition"]) == ["g0+g1"] * 3 + ["new"] * 3
    record = found.uns["scjax"]
    assert (record["solver"], record["n_steps"], record["seed"]) == ("euler", 2, 4)
    again = refused(capsys, "predict", "--run", "run", "--data", "cells.h5ad", "--conditions", "g0", "--out", out)
    assert "exists already and is not overwritten" in again


def test_evaluate(capsys, tmp_path):
    out = tmp_path / "numbers.json"
    main(["evaluate", "--runs", "run", "--data", "cells.h5ad", "--out", str(out), "--n-draws", "2"])
    told = capsys.readouterr().out
    assert "all 4 held-out populations, unseen: combination (4)" in told
    assert "l2: scDFM " in told
    (table,) = json.loads(out.read_text())
    assert [row["name"] for row in table["rows"]][0] == "scDFM"


def test_show(capsys):
    main(["show", "run"])
    told = capsys.readouterr().out
    assert "run: scdfm, run " in told
    assert "held out 4 populations: g0+g1 (A1), g0+g1 (B2), g0+z (A1), g0+z (B2)" in told
    main(["show", "run/split.json"])
    told = capsys.readouterr().out
    assert "held out 4 populations: g0+g1 (A1), g0+g1 (B2), g0+z (A1), g0+z (B2)" in told
    assert '"kind": "HoldOutSeenDoubles"' in told
    main(["show", "run", "--settings"])
    Path("shown.json").write_text(capsys.readouterr().out)
    assert from_json(PerturbationExperiment, "shown.json") == read_experiment("shown.json") == EXPERIMENT
    main(["show", "scdfm/norman_additive"])
    told = capsys.readouterr().out
    assert "expected: second-hand" in told
    assert "scjax train --preset scdfm/norman_additive" in told


def test_show_of_many_conditions(capsys):
    """The most frequent of many words; the number alone of identifiers and of many numbers."""
    adata = make_adata()
    adata.obs["condition"] = [f"p{i % 40 if i < 120 else 7}" for i in range(adata.n_obs)]
    adata.obs["barcode"] = adata.obs_names
    adata.obs["depth"] = range(adata.n_obs)
    adata.write_h5ad("many.h5ad")
    main(["show", "many.h5ad"])
    told = capsys.readouterr().out
    assert "obs condition: 40 values, the most frequent: p7 (22), p" in told
    assert told.count(" (3)") == 29
    assert f"obs barcode: {adata.n_obs} values\n" in told
    assert f"obs depth: {adata.n_obs} values\n" in told


@pytest.mark.parametrize("kind", ["perturbation", "series"])
def test_show_of_a_damaged_checkpoint(perturbation_run, tiny_run, capsys, tmp_path, kind):
    run = perturbation_run if kind == "perturbation" else tiny_run
    main(["show", str(damaged_copy(run.workdir, tmp_path / "run", "truncated"))])
    told = capsys.readouterr().out
    assert "checkpoints: steps 10, 20" in told
    assert "DAMAGED, step 20: the checkpoint" in told
    assert "DAMAGED, step 10" not in told


def test_damaged_checkpoint(perturbation_run, capsys, tmp_path):
    folder = damaged_copy(perturbation_run.workdir, tmp_path / "run", "flipped")
    offered = "The previous complete one is step 10: pass step=10. In the command line: step=... is --step."
    predict = ("predict", "--run", folder, "--data", "cells.h5ad", "--conditions", "g0", "--out", tmp_path / "p.h5ad")
    assert offered in refused(capsys, *predict)
    assert offered in refused(capsys, "evaluate", "--runs", folder, "--data", "cells.h5ad")
    assert offered in refused(capsys, "train", "--resume", "--data", "cells.h5ad", "--out", folder)


PREDICT = ("predict", "--run", "run", "--data", "cells.h5ad", "--out", "p.h5ad")
TRAIN = ("train", "--config", "tiny.json", "--data", "cells.h5ad", "--out", "new")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (PREDICT, "give --conditions for a prediction, such as A or A+B"),
        ((*PREDICT, "--times", "1"), "--times is not of this run: run was trained on perturbations, which takes --con"),
        ((*PREDICT, "--velocity"), "--velocity is not of this run"),
        ((*PREDICT, "--conditions", "g0", "--contexts", "C3"), "contexts must have control cells in adata; 'C3' has"),
        ((*PREDICT, "--conditions", "G0"), "'G0' is not known to the model: it was in no training population."),
        ((*PREDICT, "--conditions", "G0"), "on_unknown=... is --on-unknown"),
        ((*PREDICT, "--conditions", "g0", "--chunk", "0"), "chunk must be at least 1; got 0"),
        ((*PREDICT, "--conditions", "g0", "--devices", "999"), "n_devices must be at most"),
        ((*PREDICT, "--conditions", "g0", "--genes", "g77"), "'g77' is not among the"),
        ((*PREDICT, "--conditions", "g0", "--guidance", "2"), "guidance=2.0 needs a model that was trained with"),
        ((*PREDICT, "--conditions", "g0", "--solver", "eulr"), "--solver"),
        ((*TRAIN, "--spec.perturbation", "condtion"), "'condtion' is not one. Did you mean 'condition'?"),
        ((*TRAIN, "--spec.space", "lognormalised"), "In the command line: space=... is --spec.space, library_size"),
        ((*TRAIN, "--set", "split.kind=HoldOutLast"), "split must be an object whose kind is one of 'HoldOutNone'"),
        ((*TRAIN, "--sampling.n-genes", "11"), "n_genes must be at most the 10 genes of the data; got 11"),
        ((*TRAIN, "--optimizer.n-warmup", "90"), "In the command line: n_warmup is --optimizer.n-warmup."),
        (("show", "nothing.h5ad"), "scjax: there is no file nothing.h5ad."),
        ((*TRAIN, "--model.n-tokens", "3"), "model.n_tokens must be the data's 15, or None"),
        (("train", "--config", "tiny.json", "--data", "series.h5ad", "--out", "new"), "'condition' is not one."),
        (("demo", "scdmf"), "scdfm"),
    ],
)
def test_mistakes(capsys, arguments, message):
    assert message in refused(capsys, *arguments)
    assert not Path("p.h5ad").exists()
    assert not Path("new").exists()


def test_options_of_the_other_kind(tiny_run, capsys):
    predict = ("predict", "--run", tiny_run.workdir, "--data", "series.h5ad", "--out", "p.h5ad")
    assert "--conditions is not of this run" in refused(capsys, *predict, "--conditions", "g0")
    assert "--n-steps is not of this run" in refused(capsys, *predict, "--times", "1", "--n-steps", "3")
    assert "--chunk is not of this run" in refused(capsys, *predict, "--times", "1", "--chunk", "3")
    evaluate = ("evaluate", "--runs", tiny_run.workdir, "--data", "series.h5ad", "--on-unknown", "mean")
    assert "--on-unknown is of runs on perturbations" in refused(capsys, *evaluate)
    mixed = ("evaluate", "--runs", tiny_run.workdir, "run", "--data", "series.h5ad")
    assert "are of kinds 'scdfm' and 'scimf'; they cannot share a table" in refused(capsys, *mixed)


@pytest.mark.parametrize("name", [n for n in presets.names() if n.startswith("scdfm/")])
def test_presets_name_what_a_user_wants_to_know(name):
    found = presets.preset(name)
    assert f"--preset {name} " in found.command
    assert from_dict_round_trip(found.experiment) == found.experiment
    paper = name.endswith("_paper")
    if name not in ("scdfm/norman_subset", "scdfm/kang"):  # ours; the others are the paper's
        assert found.experiment.model.d_model == 512
        assert found.experiment.n_steps == (100_000 if paper else 200_000)
        assert found.experiment.sampling.n_cells == (96 if paper else 48)
        assert (found.experiment.generation.solver, found.experiment.generation.n_steps) == (
            ("euler", 100) if paper else ("rk4_38", 19)
        )
        assert "second-hand" in found.expected
    assert replace(found.experiment, seed=1) != found.experiment


def from_dict_round_trip(experiment):
    Path("round.json").write_text(json.dumps(to_dict(experiment)))
    return read_experiment("round.json")
