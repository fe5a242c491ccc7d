"""The three systems on several devices and processes are what they are on one, and so are runs resumed there."""

from dataclasses import replace
from pathlib import Path

import anndata
import jax
import numpy as np
import pytest
import tiny_series
from programs import finish, free_port, start

from scjax.batches import TimeSeriesBatch
from scjax.checkpoint import list_steps
from scjax.cli import main
from scjax.config import to_json
from scjax.experiment import timeseries, train
from scjax.mesh import make_mesh

PATIENCE = 1200  # seconds; compiling is slow where cores are few
SYSTEMS = ("scimf", "tiles", "scdfm", "perturbdiff")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("systems")
    program, port = str(Path(__file__).with_name("shared_systems.py")), free_port()
    finish(start(8, program, "devices", str(folder)), patience=PATIENCE)
    finish(*(start(2, program, "processes", str(folder), port, str(number)) for number in range(2)), patience=PATIENCE)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("case", ["replicated", "spread", "processes", "resumed"])
def test_a_system_is_what_it_is_on_one_device(folder, name, case):
    """Populations and their losses whole, wherever the cells lie: MMD, Sinkhorn, energy distance."""
    with np.load(folder / f"{name}-one.npz") as one, np.load(folder / f"{name}-{case}.npz") as other:
        for key in one.files:
            if not key.endswith("part"):
                np.testing.assert_allclose(other[key], one[key], rtol=1e-4, atol=1e-5)
        wanted = {"replicated": 1.0, "spread": 1 / 8}.get(case, 1 / 4)
        assert other["smallest_part"] == wanted
    assert list_steps(folder / f"{name}-{case}" / "checkpoints") == (5, 10)


@pytest.mark.slow
def test_the_command_on_two_processes_goes_on_on_one_device(tmp_path):
    """The first process alone prints and writes."""
    experiment = tiny_series.EXPERIMENT
    (tmp_path / "tiny.json").write_text(to_json(experiment))
    tiny_series.make_adata().write_h5ad(tmp_path / "cells.h5ad")
    out = tmp_path / "run"
    command = ["-m", "scjax", "train", "--config", str(tmp_path / "tiny.json"), "--data", str(tmp_path / "cells.h5ad")]
    command += ["--out", str(out), "--set", "sampling.n_cells=8", "--n-steps", "10"]
    command += ["--coordinator", f"localhost:{free_port()}", "--n-processes", "2", "--process-id"]
    first, second = finish(start(2, *command, "0"), start(2, *command, "1"), patience=PATIENCE)
    assert "trained on 4 devices of 2 processes (cpu): 4 batch x 1 cells" in first
    assert "10 steps; the run is in" in first
    assert not [line for line in second.splitlines() if "Gloo" not in line and "spmd" not in line]
    main(["train", "--resume", "--data", str(tmp_path / "cells.h5ad"), "--out", str(out), "--step", "10"])
    main(["predict", "--run", str(out), "--data", str(tmp_path / "cells.h5ad"), "--times", "2"]
         + ["--out", str(tmp_path / "predicted.h5ad")])  # fmt: skip
    assert np.isfinite(anndata.read_h5ad(tmp_path / "predicted.h5ad").X).all()


def test_a_mesh_of_one_device_changes_no_bit(tiny_run, tmp_path):
    done = train(
        tiny_series.EXPERIMENT, tiny_series.make_adata(), tmp_path / "run", mesh=make_mesh(1), shard_above=1, keep=1
    )
    for one, other in zip(jax.tree.leaves(tiny_run.state.params), jax.tree.leaves(done.state.params), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    assert list_steps(tmp_path / "run" / "checkpoints") == (20,)
    assert list_steps(tiny_run.workdir / "checkpoints") == (10, 20)


def test_tiles_of_attention_are_shared_and_few_cells_left_alone():
    batch = TimeSeriesBatch(
        x0=np.zeros((6, 3), np.float32), targets=np.zeros((1, 6, 3), np.float32),
        weights=np.full((1, 6), 1 / 6, np.float32), ts=(0.0, 1.0),
    )  # fmt: skip
    for attention, shared in {"auto": False, "dense": False, "blockwise": True, "landmarks": True}.items():
        model = replace(tiny_series.EXPERIMENT.model, attention=attention, dropout=0.0)
        task = timeseries.prepare(replace(tiny_series.EXPERIMENT, model=model), tiny_series.make_adata())
        params, key = jax.eval_shape(task.model.init, jax.random.key(0)), jax.random.key(0)
        program = str(jax.make_jaxpr(task.loss_on(make_mesh(1)))(params, batch, key))
        assert ("shard_map" in program) == shared
        assert "shard_map" not in str(jax.make_jaxpr(task.model.loss)(params, batch, key))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--devices", "10000"], "n_devices must be at most the"),
        (["--shard-above", "100"], "shard_above=100 needs a mesh"),
        (["--devices", "1", "--shard-above", "0"], "shard_above must be at least 1"),
        (["--keep", "0"], "keep must be at least 1"),
        (["--process-id", "0"], "several processes need all of coordinator, n_processes, process_id"),
        (["--coordinator", "here", "--n-processes", "2", "--process-id", "0"], "coordinator must be HOST:PORT"),
    ],
)
def test_options_that_do_not_fit_leave_no_folder(options, message, tmp_path, capsys):
    (tmp_path / "tiny.json").write_text(to_json(tiny_series.EXPERIMENT))
    tiny_series.make_adata().write_h5ad(tmp_path / "cells.h5ad")
    command = ["train", "--config", str(tmp_path / "tiny.json"), "--data", str(tmp_path / "cells.h5ad")]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--out", str(tmp_path / "run"), *options])
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
