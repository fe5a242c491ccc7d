"""The commands as a user types them; a mistake ends with its message and status 2, without a traceback."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import anndata
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
from scipy import sparse
from tiny_series import EXPERIMENT, SIZES, damaged_copy, make_adata

from scjax import __version__, presets
from scjax.checkpoint import list_steps
from scjax.cli import _as_options, _share_of_start, main
from scjax.config import from_json, to_dict, to_json
from scjax.data import writer
from scjax.data.splits import HoldOutLast
from scjax.experiment import TimeSeriesExperiment, read_experiment
from scjax.predict import load
from scjax.train.state import init_state
from scjax.train.step import make_update


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with data in both formats under names of their own, and the settings as JSON."""
    folder = tmp_path_factory.mktemp("cli")
    adata = make_adata()
    adata.write_h5ad(folder / "cells.h5ad")
    adata.write_zarr(folder / "cells.zarr")
    (folder / "tiny.json").write_text(to_json(EXPERIMENT))
    return folder


@pytest.fixture(autouse=True)
def stand_in(here, monkeypatch):
    monkeypatch.chdir(here)


def refused(capsys, *arguments) -> str:
    """What is told on stderr, on one line."""
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert "Traceback" not in told.err
    return " ".join(told.err.replace("│", " ").split())


TRAIN = ("train", "--config", "tiny.json", "--data", "cells.h5ad")


@pytest.fixture(scope="module")
def run(here, tmp_path_factory):
    """Trained by the command, from zarr, with settings from all three places."""
    os.chdir(here)
    main(
        ["train", "--config", "tiny.json", "--data", "cells.zarr", "--out", "run", "--n-steps", "5"]
        + ["--set", "split.kind=HoldOutLast", "--set", "split.n_times=1", "--set", "model.sigma=0.2"]
        + ["--model.n-blocks", "0", "--model.intrinsic-widths", "4", "4"]
    )
    return here / "run"


def test_settings_come_from_file_then_set_then_options(run):
    model = replace(EXPERIMENT.model, sigma=0.2, n_blocks=0, intrinsic_widths=(4, 4))
    assert read_experiment(run) == replace(EXPERIMENT, model=model, split=HoldOutLast(n_times=1), n_steps=5)


def test_train_says_where_its_settings_are_and_what_comes_next(run, capsys):
    """A finished run, resumed without its settings: they are read from the folder, and nothing is left to do."""
    resume = ["train", "--resume", "--data", "cells.h5ad", "--out", str(run)]
    main(resume)
    first, *_ = capsys.readouterr().out.splitlines()
    assert first == f"scjax train scIMF: settings go to {run}/experiment.json (--verbose prints all settings)"
    main([*resume, "--verbose"])
    told = capsys.readouterr().out
    settings, end = json.JSONDecoder().raw_decode(told)
    assert settings["experiment"] == to_dict(read_experiment(run))
    assert settings["train"]["out"] == str(run)
    assert f"scjax evaluate --runs {run} --data cells.h5ad" in told[end:]
    assert f"scjax predict --run {run} --data cells.h5ad --times 4 --out" in told[end:]


def test_predict(run, capsys, tmp_path):
    out = tmp_path / "predicted.h5ad"
    asked = ["predict", "--run", str(run), "--data", "cells.h5ad", "--times", "2", "4.5"]
    main([*asked, "--out", str(tmp_path / "quiet.h5ad")])
    assert len(capsys.readouterr().out.splitlines()) == 2
    main([*asked, "--out", str(out), "--verbose"])
    settings, end = json.JSONDecoder().raw_decode(told := capsys.readouterr().out)
    assert settings["predict"]["times"] == [2.0, 4.5]
    assert settings["experiment"] == to_dict(read_experiment(run))
    assert "28 cells x 12 genes from step 5 written to" in told[end:]
    assert sorted(set(anndata.read_h5ad(out).obs["day"])) == [2.0, 4.5]
    before = out.read_bytes()
    again = refused(capsys, "predict", "--run", run, "--data", "cells.h5ad", "--times", "2", "--out", out)
    assert f"out {out} exists already and is not overwritten" in again
    assert out.read_bytes() == before


def test_predict_velocity(run, tmp_path):
    out = tmp_path / "moving.h5ad"
    main(["predict", "--run", str(run), "--data", "cells.zarr", "--velocity", "--out", str(out)])
    assert anndata.read_h5ad(out).layers["velocity"].shape == make_adata().shape


def test_evaluate(run, capsys, tmp_path):
    out = tmp_path / "numbers.json"
    main(
        ["evaluate", "--runs", f"alone={run}", "--data", "cells.h5ad", "--out", str(out), "--n-draws", "2", "--verbose"]
    )
    settings, end = json.JSONDecoder().raw_decode(told := capsys.readouterr().out)
    assert settings["experiment"] == {"alone": to_dict(read_experiment(run))}
    assert "held-out time 4, trained on times 0, 1, 2" in told[end:]
    assert "W1: alone " in told[end:]
    (table,) = json.loads(out.read_text())
    assert [row["name"] for row in table["rows"]][0] == "alone"
    assert "exists already" in refused(capsys, "evaluate", "--runs", run, "--data", "cells.h5ad", "--out", out)


def test_show_of_cells_that_lie_by_columns_on_disk(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("scjax.cli._LARGE", 0)
    adata = make_adata()
    adata.X = sparse.csc_matrix(adata.X)
    adata.write_h5ad(tmp_path / "columns.h5ad")
    main(["show", str(tmp_path / "columns.h5ad")])
    shown = capsys.readouterr().out
    assert "columns.h5ad: 46 cells x 12 genes" in shown
    assert "X: not looked at" in shown


def test_show(run, capsys):
    main(["show"])
    listed = capsys.readouterr().out
    for name in presets.names():
        assert name in listed
    for name in ("scimf/klein", "tiny.json", "run"):
        main(["show", name, "--settings"])
        Path("shown.json").write_text(capsys.readouterr().out)
        wanted = presets.preset(name).experiment if "/" in name else read_experiment(name)
        assert from_json(TimeSeriesExperiment, "shown.json") == wanted
    main(["show", "scimf/klein"])
    assert "command: scjax " in capsys.readouterr().out
    for name in ("cells.h5ad", "cells.zarr"):
        main(["show", name])
        shown = capsys.readouterr().out
        assert f"{name}: 46 cells x 12 genes" in shown
        assert "obs day: 0.0 (14), 1.0 (12), 2.0 (11), 4.0 (9)" in shown
    main(["show", "run"])
    shown = capsys.readouterr().out
    assert "trained on times [0.0, 1.0, 2.0], held out [4.0]" in shown
    assert "checkpoints: steps 5" in shown


def test_show_a_run_that_is_trained(run, capsys):
    """How far it is, its size; the folder of its checkpoints, and one of them; its split."""
    main(["show", "run"])
    told = capsys.readouterr().out
    assert "  log: 2 lines, the last of step 5: loss " in told
    leaves = jax.tree.leaves(load(run).params)
    assert f"  parameters: {sum(leaf.size for leaf in leaves):,} in {len(leaves)} arrays (step 5)" in told
    for place in ("run/checkpoints", "run/checkpoints/5"):
        main(["show", place])
        of_checkpoint = capsys.readouterr().out.splitlines()
        assert of_checkpoint[0].startswith(f"{place}: scimf, run ")
        assert set(of_checkpoint[1:]) <= set(told.splitlines())
    main(["show", "run/split.json"])
    told = capsys.readouterr().out
    assert told.startswith("run/split.json: a split\n  trained on times [0.0, 1.0, 2.0], held out [4.0]\n")
    assert json.loads(told.split("\n", 2)[2]) == {"kind": "HoldOutLast", "n_times": 1}


def test_show_a_run_that_is_not(run, tmp_path, capsys):
    """Killed before its first checkpoint; failed; a folder with the name of a step."""
    early = tmp_path / "early"
    shutil.copytree(run, early, ignore=shutil.ignore_patterns("checkpoints"))
    with (early / "metrics.jsonl").open("a") as log:
        log.write('{"step": 6, "lo')
    main(["show", str(early)])
    told = capsys.readouterr().out
    assert told.startswith(f"{early}: a run without a checkpoint yet\n  log: 2 lines, the last of step 5: loss ")
    assert to_json(read_experiment(run)) in told
    (early / "failed.json").write_text(json.dumps({"message": "loss is nan after step 6"}))
    main(["show", str(early)])
    assert "  FAILED: loss is nan after step 6\n" in capsys.readouterr().out
    assert "holds no complete checkpoint" in refused(capsys, "show", tmp_path)
    shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "7").mkdir()
    assert "is damaged" in refused(capsys, "show", tmp_path / "checkpoints" / "7")


def test_show_what_was_predicted(run, tmp_path, capsys):
    """What made it, and where what lies."""
    out = tmp_path / "moving.h5ad"
    main(["predict", "--run", str(run), "--data", "cells.h5ad", "--velocity", "--out", str(out)])
    capsys.readouterr()
    main(["show", str(out)])
    told = capsys.readouterr().out
    assert f"made by scjax {__version__}, run {load(run).about['run']}, step 5: normalised expression in X" in told
    assert "\n  X: 0 to " in told
    assert "\n  layers velocity: -" in told
    assert "log-normalised, by" not in told  # the record says what it is
    assert told.endswith("\n  obsm: X_latent, velocity_latent\n  uns: scjax\n")


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        ("", ["demo", "train", "predict", "evaluate", "show", "info"]),
        ("train", ["--preset", "--config", "--set", "--resume", "--n-steps INT", "--model.n-blocks INT"]),
        ("predict", ["--run PATH", "--times", "in the unit of the data", "--velocity", "--step"]),
        ("evaluate", ["--runs", "NAME=FOLDER", "--n-draws INT"]),
        ("show", ["--settings"]),
        ("demo", ["--seeds INT", "--out"]),
    ],
)
def test_help(capsys, command, wanted):
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    for word in wanted:
        assert word in told


def test_help_of_nested_settings(capsys):
    """Meaning, unit and the preset's own default of every setting come from the dataclasses."""
    with pytest.raises(SystemExit):
        main(["train", "--preset", "scimf/mef", "--help"])
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--model.dt FLOAT longest solver step, time units (default: 0.1)" in told
    assert "--model.n-blocks INT interaction blocks; 0 removes the interaction (default: 1)" in told
    assert "--checkpoint-every INT steps between two checkpoints" in told
    assert "the obs column of sampling times: numbers in one unit" in told
    assert "(default: day)" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--data", "cells.h5ad", "--out", "new"), "train needs --preset NAME or --config FILE.json"),
        (("train", "--preset", "scimf/klien"), "got 'scimf/klien'. Did you mean 'scimf/klein'?"),
        (("train", "--preset", "scimf/klein", "--config", "tiny.json"), "exclude each other; give one"),
        (("train", "--config", "tiny.jsn"), "there is no run and no settings file tiny.jsn"),
        (("train", "--config", "broken.json"), "broken.json is no valid JSON: Expecting"),
        (
            ("train", "--config", "typo.json"),
            "typo.json: model.n_head is not a field of Config. Did you mean 'n_heads'?",
        ),
        (("train", "--config", "list.json"), "list.json: TimeSeriesExperiment must be an object of fields"),
        (("train", "--config", "cells.h5ad"), "cells.h5ad: 'utf-8' codec"),
        ((*TRAIN, "--out", "new", "--set", "model.n_heads"), "--set takes KEY=VALUE, such as model.n_heads=1"),
        ((*TRAIN, "--out", "new", "--set", "modl.n_heads=1"), "modl is no object with fields. Did you mean 'model'?"),
        ((*TRAIN, "--out", "new", "--set", "split.kind=HoldOutLats"), "got kind 'HoldOutLats'. Did you mean"),
        ((*TRAIN, "--out", "new", "--set", "split.times=[3]"), "HoldOutTimes: 3.0 is not a time of the data"),
        ((*TRAIN, "--out", "new", "--set", "split.times=[0]"), "The first time, 0.0, cannot be held out"),
        ((*TRAIN, "--out", "new", "--model.n-heads", "2"), "n_heads must divide n_dims; got n_heads=2, n_dims=3"),
        ((*TRAIN, "--out", "new", "--n-steps", "many"), "--n-steps"),
        ((*TRAIN, "--out", "new", "--n-stesp", "5"), "Perhaps you meant: --n-steps"),
        ((*TRAIN, "--out", "new", "--spec.time", "dya"), "'dya' is not one. Did you mean 'day'?"),
        ((*TRAIN, "--out", "new", "--step", "10"), "step=10 says where to resume from; it needs resume=True"),
        ((*TRAIN, "--out", "new", "--resume"), "new holds no run. Start it in a new folder"),
        (TRAIN, "--out PATH"),
        (("train", "--config", "tiny.json", "--data", "cell.h5ad", "--out", "new"), "Did you mean 'cells.h5ad'?"),
        (("train", "--config", "tiny.json", "--data", ".", "--out", "new"), "path must end in .h5ad or .zarr; got '.'"),
        (("train", "--config", "tiny.json", "--data", "folder.h5ad", "--out", "new"), "is no whole HDF5 file"),
        (
            ("train", "--config", "tiny.json", "--data", "short.h5ad", "--out", "new"),
            "is no whole HDF5 file: truncated",
        ),
        (("train", "--config", "tiny.json", "--data", "empty.zarr", "--out", "new"), "is no zarr group"),
        (
            ("train", "--config", "tiny.json", "--data", "cells.zarr", "--out", "run"),
            "run holds another run; nothing is",
        ),
        (("show", "scimf/klien"), "neither a file or folder nor a preset. Did you mean 'scimf/klein'?"),
        (("show", "folder.h5ad"), "is no whole HDF5 file"),
        (("show", "."), "holds no complete checkpoint"),
        (("show", "notes.txt"), "notes.txt cannot be shown: give a preset, the folder of a run or a checkpoint"),
        (("show", "list.json"), "list.json: TimeSeriesExperiment must be an object of fields"),
        (("show", "split.json"), "split.json: 1.0 occurs more than once"),
        (("show", "--settings"), "--settings needs a preset, the folder of a run, or a .json; got ''"),
        (("trian",), "Available subcommands: demo, train, predict, evaluate, bench, convert, show, info"),
    ],
)
def test_mistakes(run, capsys, arguments, message):
    Path("broken.json").write_text(to_json(EXPERIMENT)[:-20])
    Path("typo.json").write_text(to_json(EXPERIMENT).replace('"n_heads"', '"n_head"'))
    Path("list.json").write_text("[1, 2]")
    Path("notes.txt").write_text("[1, 2]")
    Path("split.json").write_text('{"rule": {"kind": "HoldOutNone"}, "train": [0, 1], "held_out": [1]}')
    Path("folder.h5ad").mkdir(exist_ok=True)
    Path("empty.zarr").mkdir(exist_ok=True)
    Path("short.h5ad").write_bytes(Path("cells.h5ad").read_bytes()[:3000])
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    assert message in refused(capsys, *arguments)
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before
    assert not Path("new").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--out", "p.h5ad"), "give --times for a prediction, or --velocity"),
        (("--out", "p.h5ad", "--times", "1", "--velocity"), "give --times for a prediction, or --velocity"),
        (("--out", "p.h5ad", "--velocity", "--n-cells", "5"), "--n-cells, --seed and --devices are of a prediction"),
        (("--out", "p.csv", "--times", "1"), "out must end in .h5ad or .zarr; got 'p.csv'"),
        (("--out", "no/p.h5ad", "--times", "1"), "would lie in a folder that does not exist; make no first"),
        (("--out", "p.h5ad", "--times", "2", "1"), "times must increase strictly; 1.0 after 2.0 is unsorted"),
        (("--out", "p.h5ad", "--times", "1", "1"), "times must increase strictly; 1.0 after 1.0 is repeated"),
        (("--out", "p.h5ad", "--times", "-1"), "none before the first of training, 0.0"),
        (("--out", "p.h5ad", "--times", "1", "--step", "4"), "step must be one of 5 in"),
    ],
)
def test_mistakes_in_predictions(run, capsys, options, message):
    assert message in refused(capsys, "predict", "--run", run, "--data", "cells.h5ad", *options)
    assert not Path("p.h5ad").exists()


def test_run_that_is_none(capsys):
    assert "no folder nowhere" in refused(
        capsys, "predict", "--run", "nowhere", "--data", "cells.h5ad", "--times", "1", "--out", "p.h5ad"
    )
    assert "nowhere" in refused(capsys, "evaluate", "--runs", "nowhere", "--data", "cells.h5ad")
    assert "at least one folder" in refused(capsys, "evaluate", "--runs", "--data", "cells.h5ad")


@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_damaged_checkpoint(tiny_run, capsys, tmp_path, how):
    folder = damaged_copy(tiny_run.workdir, tmp_path / "run", how)
    offered = "The previous complete one is step 10: pass step=10"
    predict = ("predict", "--run", folder, "--data", "cells.h5ad", "--times", "1", "--out", tmp_path / "p.h5ad")
    assert offered in refused(capsys, *predict)
    assert offered in refused(capsys, "evaluate", "--runs", folder, "--data", "cells.h5ad")
    assert offered in refused(capsys, "train", "--resume", "--data", "cells.h5ad", "--out", folder)
    main([*map(str, predict), "--step", "10"])
    assert "from step 10 written" in capsys.readouterr().out


def test_broken_element_of_a_file(capsys):
    """The reader raises what it likes about it; the file is named."""
    import h5py

    shutil.copy("cells.h5ad", "odd.h5ad")
    with h5py.File("odd.h5ad", "r+") as file:
        file["obs"].attrs["encoding-type"] = "no such thing"
    assert "While reading odd.h5ad" in refused(capsys, "show", "odd.h5ad")


def test_interrupted(monkeypatch, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("scjax.cli.read_experiment", stopped)
    with pytest.raises(SystemExit) as ended:
        main(["train", "--config", "tiny.json"])
    assert ended.value.code == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_sigterm_leaves_no_half_of_a_prediction(run, tmp_path, monkeypatch, suffix):
    """It ends as by the signal, and the next command of this process hears it as before."""
    add, before = writer._Cells.add, signal.getsignal(signal.SIGTERM)

    def add_and_be_stopped(self, *args, **more):
        add(self, *args, **more)
        assert [p for p in tmp_path.iterdir() if p.name.startswith(".")]
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(writer._Cells, "add", add_and_be_stopped)
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "predict",
                "--run",
                str(run),
                "--data",
                "cells.h5ad",
                "--times",
                "2",
                "--out",
                str(tmp_path / f"cells{suffix}"),
            ]
        )
    assert ended.value.code == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == before


def test_sigterm_saves_and_the_told_command_goes_on(run, capsys, tmp_path, monkeypatch):
    """The settings of `run`, so that its compiled program serves."""
    out, settings = tmp_path / "a run", tmp_path / "settings.json"
    settings.write_text(to_json(replace(read_experiment(run), n_steps=20)))

    def on_log(bar, step, metrics):
        if step == 8:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr("scjax.train.hooks.Progress.on_log", on_log)
        with pytest.raises(SystemExit) as ended:
            main(["train", "--config", str(settings), "--data", "cells.h5ad", "--out", str(out)])
    assert ended.value.code == 0
    told = capsys.readouterr().err
    (saved,) = list_steps(out / "checkpoints")
    assert f"Stopped by SIGTERM after step {saved}; step {saved} is saved in {out}/checkpoints" in told
    command = shlex.split(told.rpartition("To go on:\n  ")[2])
    assert command == ["scjax", "train", "--resume", "--out", str(out), "--data", "cells.h5ad"]
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    Path("cells.h5ad").rename("gone.h5ad")
    try:
        assert "'cells.h5ad' does not exist" in refused(capsys, *command[1:])
    finally:
        Path("gone.h5ad").rename("cells.h5ad")
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    main(command[1:])
    assert list_steps(out / "checkpoints")[-1] == 20


def test_module_runs_as_a_command():
    """Version and mistakes through the interpreter; a reader that goes away early is no mistake."""
    root = Path(__file__).parents[2]

    def scjax(*arguments, **options):
        command = [sys.executable, "-W", "error::DeprecationWarning:scjax", "-m", "scjax", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, **options)

    told = scjax("--version")
    assert (told.returncode, told.stdout) == (0, f"scjax {__version__}\n")
    told = scjax("show", "nothing")
    assert told.returncode == 2
    assert told.stderr.startswith("scjax: nothing is neither a file or folder nor a preset.")
    assert "Traceback" not in told.stderr


def test_settings_need_not_be_those_of_a_preset(capsys):
    """Cells per time are told by `show`, as the user's columns are named."""
    adata = make_adata()
    adata.obs = adata.obs.rename(columns={"day": "hours"})
    adata.obs["hours"] = adata.obs["hours"] * 24
    adata.write_h5ad("hours.h5ad")
    main(["show", "hours.h5ad"])
    assert f"obs hours: 0.0 ({SIZES[0.0]}), 24.0 ({SIZES[1.0]})" in capsys.readouterr().out
    told = refused(capsys, "train", "--config", "tiny.json", "--data", "hours.h5ad", "--out", "new")
    assert "'day' is not one." in told
    assert "It has: hours, kind, batch" in told
    assert np.isfinite(adata.X).all()


def test_tensorboard(run, tmp_path, capsys):
    """Beside the log of the run, also when it goes on."""
    pytest.importorskip("tensorboardX", reason="the extra `logging` is not installed")
    out, settings = tmp_path / "board", tmp_path / "settings.json"
    settings.write_text(to_json(read_experiment(run)))
    main(["train", "--config", str(settings), "--data", "cells.h5ad", "--out", str(out), "--tensorboard"])
    assert len(list((out / "tensorboard").iterdir())) == 1
    main(["train", "--resume", "--data", "cells.h5ad", "--out", str(out), "--tensorboard"])
    assert list_steps(out / "checkpoints") == (5,)


@pytest.mark.parametrize(
    ("command", "message", "told"),
    [
        ("train", "n_warmup must be less than 20", "n_warmup is --optimizer.n-warmup"),
        (
            "train",
            "expression: 'X' holds; set space='counts'",
            "expression is --spec.expression, space=... is --spec.space",
        ),
        ("train", "workdir must be new", "workdir is --out"),
        ("train", "pass step=10", "step=... is --step"),
        ("train", "n_steps must be at least 1; got 0", ""),  # of training, or of generation
        ("train", "n_cells must be at least 1; got 0", ""),  # of sampling, or of generation
        ("train", "sampling.n_cells=3 is odd", "sampling.n_cells=... is --sampling.n-cells"),
        ("predict", "path names no file: 'x'", "path is --data"),
        ("predict", "directory must hold checkpoints", "directory is --run"),
        ("predict --ensemble runs/b", "directory must hold checkpoints", ""),
        ("predict", "n_devices must be at most 1", "n_devices is --devices"),
        ("evaluate --predicted a", "path names no file: 'x'", ""),  # which of its files it is, the message tells
        ("evaluate --predicted a", "Clip them, or allow='negative'", "allow=... is --allow"),
        ("evaluate --runs a", "set space='counts'", ""),  # of evaluations of files alone
        ("show", "path names no file: 'x'", ""),
    ],
)
def test_options_are_named_where_one_is_meant(command, message, told):
    assert _as_options(message, command.split()) == ([f"In the command line: {told}."] if told else [])


@pytest.mark.parametrize(
    ("every", "start", "n_steps"), [(1, "initial", 7), (3, "initial", 7), (3, "initial", 6), (3, "first_step", 7)]
)
def test_share_of_the_start_is_what_the_steps_leave_of_it(every, start, n_steps):
    """Parameters that are 1 where the average begins, and 0 after each later step."""
    preset = presets.preset("perturbdiff/kang").experiment
    experiment = replace(preset, ema_decay=0.9, ema_every=every, ema_start=start)

    def loss(params, batch, key):  # whose step of size 1 goes to the batch
        return 0.5 * jnp.sum((params["w"] - batch) ** 2), {}

    update = jax.jit(make_update(loss, optax.sgd(1.0), 0.9, ema_every=every, ema_start=start))
    state = init_state({"w": jnp.ones(1)}, optax.sgd(1.0), jax.random.key(0), ema=True)
    for n in range(n_steps):
        state, _ = update(state, jnp.full(1, float(start == "first_step" and n == 0)))
    np.testing.assert_allclose(state.ema["w"], _share_of_start(experiment, n_steps), rtol=1e-5)


def test_share_of_the_start_is_told_where_it_matters():
    start = presets.preset("scdfm/norman_subset").experiment
    assert _share_of_start(replace(start, ema_decay=0.99), 1000) == 0
    assert _share_of_start(replace(start, ema_decay=None), 10) == 0


def test_show_says_what_the_numbers_look_like(tmp_path, capsys):
    rng = np.random.default_rng(0)
    counts = rng.poisson(2.0, (2500, 3)).astype(np.float32)
    obs = pd.DataFrame(index=[f"c{i}" for i in range(2500)])
    made = anndata.AnnData(X=sparse.csr_matrix(counts), obs=obs)
    made.layers["logged"] = np.log1p(counts)
    made.layers["scaled"] = counts - 2
    made.layers["zeros"] = np.zeros_like(counts)
    made.layers["nan"] = np.where(counts > 3, np.nan, counts)
    made.layers["yes"] = counts > 1
    made.layers["large"] = counts * 100.5
    made.write_h5ad(tmp_path / "cells.h5ad")
    made.write_zarr(tmp_path / "cells.zarr")
    for name in ("cells.h5ad", "cells.zarr"):
        main(["show", str(tmp_path / name)])
        told = dict(line.strip().split(": ", 1) for line in capsys.readouterr().out.splitlines()[1:])
        first = counts[:2000]
        assert told["X"] == f"0 to {first.max():g}, whole numbers: counts (the first 2000 cells)"
        assert told["layers logged"].endswith(", log-normalised, by their size (the first 2000 cells)")
        assert told["layers scaled"].endswith(", of any sign: scaled, or a latent (the first 2000 cells)")
        assert told["layers zeros"] == "zeros"
        assert told["layers nan"] == "holds values that are not finite"
        assert told["layers yes"] == "0 to 1, 0 and 1 (the first 2000 cells)"
        assert told["layers large"].endswith(", normalised, too large for logarithms (the first 2000 cells)")
