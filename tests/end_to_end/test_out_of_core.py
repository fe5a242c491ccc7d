"""Data on disk: the same runs and the same predictions as in memory, errors with their place, no half files."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tiny_cellsets
import tiny_perturbation
import tiny_series
from scipy import sparse
from test_experiment import assert_same_state

from scjax import predict
from scjax.cli import main
from scjax.data.disk import CellsOnDisk
from scjax.data.source import read_anndata
from scjax.data.store import StoredCells
from scjax.experiment import digest_of, evaluate, report_of, train, train_seeds
from scjax.experiment import run as experiment_run
from scjax.metrics.perturbation_report import DEFAULT_METRICS
from scjax.train.hooks import Hook

KINDS = {
    "series": (tiny_series, "tiny_run", [1.0, 2.5]),
    "perturbation": (tiny_perturbation, "perturbation_run", ["g1+g0", "g0"]),
    "cellsets": (tiny_cellsets, "cellset_run", ["A", "B"]),
}
OPTIONS = {"series": "--times 1 2.5", "perturbation": "--conditions g1+g0 g0", "cellsets": "--conditions A B"}


def on_disk(adata, path, layout="csr"):
    """The file as a user has it, opened without reading its matrix."""
    adata = adata.copy()
    if layout == "csr" and adata.X is not None:
        adata.X = sparse.csr_matrix(adata.X)
    adata.strings_to_categoricals()
    if path.suffix == ".zarr":
        adata.write_zarr(path)
    else:
        adata.write_h5ad(path)
    cells = read_anndata(path, backed=True)
    assert isinstance(cells, CellsOnDisk)
    return cells


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("layout", "suffix"), [("csr", ".h5ad"), ("dense", ".zarr")])
def test_training_from_disk_is_training_from_memory(name, layout, suffix, tmp_path, request, capsys):
    """Every parameter, moment and logged number, bit for bit; also where it is resumed."""
    module, fixture, _ = KINDS[name]
    wanted = request.getfixturevalue(fixture)
    cells = on_disk(module.make_adata(), tmp_path / f"cells{suffix}", layout)
    assert digest_of(module.EXPERIMENT, cells) == digest_of(module.EXPERIMENT, module.make_adata())
    run = train(module.EXPERIMENT, cells, tmp_path / "run")
    assert "the data stay on disk" in capsys.readouterr().err
    assert_same_state(run.state, wanted.state)
    assert lines_of(tmp_path / "run") == lines_of(wanted.workdir)
    x = run.data.latent if name == "series" else run.data.x
    assert isinstance(x, StoredCells)
    assert x.folder.parent.parent == tmp_path / "run" / experiment_run.CELLS
    np.testing.assert_array_equal(x[:], wanted.data.latent if name == "series" else wanted.data.x)

    if layout == "dense":
        return
    written = (x.folder / "values.npy").stat().st_mtime_ns
    resumed = train(module.EXPERIMENT, cells, tmp_path / "run", resume=True, step=10)
    assert_same_state(resumed.state, wanted.state)
    assert (x.folder / "values.npy").stat().st_mtime_ns == written  # it was found, not made again


def lines_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("seconds", "waited")} for line in lines]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_written_predictions_are_those_in_memory(name, suffix, tmp_path, request):
    """From cells on disk to a file on disk; nothing of it is missing or different."""
    module, fixture, wanted = KINDS[name]
    trained = predict.load(request.getfixturevalue(fixture).workdir)
    cells = on_disk(module.make_adata(), tmp_path / "cells.h5ad")
    in_memory = predict.predict(trained, module.make_adata(), wanted, seed=3)
    done = predict.predicting(trained, cells, wanted, seed=3).write(tmp_path / f"p{suffix}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cells.h5ad", f"p{suffix}"]
    found = read_anndata(tmp_path / f"p{suffix}")
    assert (done.n_obs, done.n_vars) == found.shape
    assert_same_cells(found, in_memory)
    backed = read_anndata(tmp_path / f"p{suffix}", backed=True)
    np.testing.assert_array_equal(backed.X[:], in_memory.X)


def assert_same_cells(found, wanted):
    np.testing.assert_array_equal(found.X, wanted.X)
    assert list(found.var_names) == list(wanted.var_names)
    assert list(found.obs_names) == list(wanted.obs_names)
    assert list(found.obs) == list(wanted.obs)
    for column in wanted.obs:
        assert list(found.obs[column]) == list(wanted.obs[column])
        assert (found.obs[column].dtype.kind == wanted.obs[column].dtype.kind) or found.obs[column].dtype == "category"
    assert set(found.obsm) == set(wanted.obsm)
    for key in wanted.obsm:
        np.testing.assert_array_equal(found.obsm[key], wanted.obsm[key])
    for key in wanted.layers:
        np.testing.assert_array_equal(found.layers[key], wanted.layers[key])
    assert {k: np.asarray(v).item() for k, v in found.uns["scjax"].items()} == dict(wanted.uns["scjax"])


def test_an_embedding_that_cannot_be_kept_ends_velocities_before_they_are_computed(trained, tmp_path, monkeypatch):
    adata = tiny_series.make_adata()
    adata.obsm["deep"] = np.zeros((adata.n_obs, 2, 2))
    cells = on_disk(adata, tmp_path / "cells.h5ad")
    monkeypatch.delattr("scjax.predict.timeseries.project")
    with pytest.raises(ValueError, match="obsm/deep must be a matrix of numbers"):
        predict.timeseries.predicting_velocity(trained, cells)


def test_velocities_are_written_as_they_are_made(trained, tmp_path):
    cells = on_disk(tiny_series.make_adata(), tmp_path / "cells.zarr")
    predict.timeseries.predicting_velocity(trained, cells).write(tmp_path / "v.h5ad")
    wanted = predict.velocity(trained, tiny_series.make_adata())
    assert_same_cells(read_anndata(tmp_path / "v.h5ad"), wanted)


@pytest.mark.parametrize("name", KINDS)
def test_predicting_from_the_command_line(name, tmp_path, request, capsys):
    """--on-disk, and a file of either kind."""
    module, fixture, wanted = KINDS[name]
    run = request.getfixturevalue(fixture).workdir
    on_disk(module.make_adata(), tmp_path / "cells.zarr")
    options = ["predict", "--run", str(run), "--data", str(tmp_path / "cells.zarr"), "--on-disk", "--seed", "3"]
    options += OPTIONS[name].split()
    main([*options, "--out", str(tmp_path / "p.zarr")])
    assert "cells x" in capsys.readouterr().out
    trained = predict.load(run)
    found, wanted = read_anndata(tmp_path / "p.zarr"), predict.predict(trained, module.make_adata(), wanted, seed=3)
    np.testing.assert_array_equal(found.X, wanted.X)
    with pytest.raises(SystemExit):
        main([*options, "--out", str(tmp_path / "q.h5ad"), "--in-memory"])
    assert "--on-disk and --in-memory exclude each other" in capsys.readouterr().err
    assert not (tmp_path / "q.h5ad").exists()


def test_large_files_stay_on_disk_and_it_is_told(tmp_path, monkeypatch, capsys, tiny_run):
    """From the command line; the run is that of the library."""
    monkeypatch.setattr("scjax.cli._LARGE", 1)
    on_disk(tiny_series.make_adata(), tmp_path / "cells.h5ad")
    config = str(tiny_run.workdir / "experiment.json")
    main(["train", "--config", config, "--data", str(tmp_path / "cells.h5ad"), "--out", str(tmp_path / "run")])
    told = capsys.readouterr()
    assert "of data stay on disk" in told.out
    assert "s for batches (" in told.err
    assert (tmp_path / "run" / "cells").is_dir()
    assert lines_of(tmp_path / "run") == lines_of(tiny_run.workdir)


def test_several_files_are_read_as_one(tmp_path, perturbation_run):
    """The run of the whole: cells in the order of the files, genes by name."""
    adata = tiny_perturbation.make_adata()
    on_disk(adata[:60], tmp_path / "a.h5ad")
    on_disk(adata[60:, adata.var_names[::-1]], tmp_path / "b.zarr")
    files = [tmp_path / "a.h5ad", tmp_path / "b.zarr"]
    run = train(tiny_perturbation.EXPERIMENT, read_anndata(files, backed=True), tmp_path / "run")
    assert_same_state(run.state, perturbation_run.state)
    in_memory = read_anndata(files)
    np.testing.assert_array_equal(in_memory.X.toarray(), adata.X)
    with pytest.raises(ValueError, match="must have different obs_names"):
        read_anndata([files[0], files[0]], backed=True)
    on_disk(adata[:60, 1:], tmp_path / "c.h5ad")
    with pytest.raises(ValueError, match="must have the same genes; 1 are only in .*: g0"):
        read_anndata([files[0], tmp_path / "c.h5ad"], backed=True)


def test_sources_on_disk_are_joined_as_in_memory(tmp_path):
    """Other genes and other types; one of the two stays in memory."""
    one = tiny_cellsets.make_adata()
    other = tiny_cellsets.make_adata(genes=(*tiny_cellsets.GENES[:1:-1], "new"), types=("T", "B"))
    split = replace(tiny_cellsets.EXPERIMENT.split, values=(("one_d3",),))
    experiment = replace(tiny_cellsets.EXPERIMENT, split=split, absent="zero", n_steps=5, checkpoint_every=5)
    wanted = train(experiment, [("one", one), ("other", other)], tmp_path / "memory")
    cells = on_disk(one, tmp_path / "one.h5ad")
    found = train(experiment, [("one", cells), ("other", other)], tmp_path / "disk")
    assert_same_state(found.state, wanted.state)
    np.testing.assert_array_equal(found.data.measured, wanted.data.measured)
    trained = predict.load(tmp_path / "memory")
    options = {"n_cells": 6, "seed": 1}
    np.testing.assert_array_equal(
        predict.predict(trained, [("one", cells), ("other", other)], ["A"], **options).X,
        predict.predict(trained, [("one", one), ("other", other)], ["A"], **options).X,
    )


def test_evaluation_of_cells_on_disk(tmp_path, perturbation_run):
    """It reads the populations that it compares; the numbers are those in memory."""
    cells = on_disk(tiny_perturbation.make_adata(), tmp_path / "cells.h5ad")
    metrics = {"l2": DEFAULT_METRICS["l2"]}
    found, wanted = (
        evaluate([perturbation_run.workdir], adata, metrics=metrics, n_draws=1)[0]
        for adata in (cells, tiny_perturbation.make_adata())
    )
    assert report_of(found).render(found) == report_of(wanted).render(wanted)


def test_seeds_share_the_prepared_cells(tmp_path):
    cells = on_disk(tiny_cellsets.make_adata(), tmp_path / "cells.h5ad")
    experiment = replace(tiny_cellsets.EXPERIMENT, n_steps=5, checkpoint_every=5)
    done = train_seeds(experiment, cells, [tmp_path / "a", tmp_path / "b"], [0, 1])
    assert not done.failed
    folders = {run.data.x.folder for run in done.runs}
    assert len(folders) == 1
    assert not (tmp_path / "b" / "cells").exists()


# -- faults


def test_truncated_cells_end_training_with_file_and_step(tmp_path):
    """Cut short while the run reads them; what was saved before is there."""
    cells = on_disk(tiny_cellsets.make_adata(), tmp_path / "cells.h5ad")
    experiment = replace(tiny_cellsets.EXPERIMENT, n_steps=60)  # more than is made ahead

    class Cut(Hook):
        def on_checkpoint(self, state):
            (file,) = (tmp_path / "run" / "cells").rglob("values.npy")
            with file.open("r+b") as opened:
                opened.truncate(200)

    with pytest.raises(OSError, match=r"values.npy ends at byte 200.*cut short") as caught:
        train(experiment, cells, tmp_path / "run", hooks=[Cut()])
    assert any("While making the batch of step " in note for note in caught.value.__notes__)
    with pytest.raises(ValueError, match="cut short. Delete the folder; it is made again"):
        train(experiment, cells, tmp_path / "run", resume=True)
    shutil.rmtree(tmp_path / "run" / "cells")
    resumed = train(experiment, cells, tmp_path / "run", resume=True)
    assert int(resumed.state.step) == 60


def test_a_refused_run_leaves_a_folder_that_can_be_used(tmp_path, monkeypatch):
    """The prepared cells were there first; they are no run, and the next attempt finds them."""
    cells = on_disk(tiny_cellsets.make_adata(), tmp_path / "cells.h5ad")
    monkeypatch.setattr("scjax.experiment.run.Findings.stop", lambda self: (_ for _ in ()).throw(ValueError("refused")))
    with pytest.raises(ValueError, match="refused"):
        train(tiny_cellsets.EXPERIMENT, cells, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["cells"]
    monkeypatch.undo()
    run = train(replace(tiny_cellsets.EXPERIMENT, n_steps=5, checkpoint_every=5), cells, tmp_path / "run")
    assert int(run.state.step) == 5


def test_prediction_that_fails_leaves_no_file(tmp_path, perturbation_trained, monkeypatch):
    made = predict.predicting(perturbation_trained, tiny_perturbation.make_adata(), ["g0", "g1"])
    n_made = []

    def full(self, n):
        n_made.append(n)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("scjax.data.writer._Cells._write", full)
    with pytest.raises(OSError, match="No space left") as caught:
        made.write(tmp_path / "p.zarr")
    assert n_made
    assert any("nothing of it was left" in note for note in caught.value.__notes__)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "p.zarr").mkdir()
    with pytest.raises(ValueError, match="exists already and is not overwritten"):
        made.write(tmp_path / "p.zarr")
    with pytest.raises(ValueError, match="must end in .h5ad or .zarr"):
        made.write(tmp_path / "p.csv")
