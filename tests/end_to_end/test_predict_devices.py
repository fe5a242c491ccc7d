"""Predictions that several devices share are those of one."""

import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import tiny_cellsets
import tiny_perturbation
import tiny_series
from programs import finish, start

from scjax.cli import main
from scjax.mesh import make_mesh
from scjax.predict import predict

TINY = {"series": tiny_series, "perturbation": tiny_perturbation, "cellsets": tiny_cellsets}
ASKED = {
    "series": ["--times", "1", "2.5", "--n-cells", "8"],
    "perturbation": ["--conditions", "g1+g0", "--n-cells", "35"],
    "cellsets": ["--conditions", "A", "--n-cells", "11"],
}
PROGRAM = str(Path(__file__).with_name("predict_on_devices.py"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_run, perturbation_run, cellset_run):
    """Files of each system, of one device and of four."""
    folder, runs = tmp_path_factory.mktemp("devices"), (tiny_run, perturbation_run, cellset_run)
    commands = []
    for (name, tiny), run in zip(TINY.items(), runs, strict=True):
        tiny.make_adata().write_h5ad(folder / f"{name}.h5ad")
        command = ["predict", "--run", str(run.workdir), "--data", str(folder / f"{name}.h5ad"), *ASKED[name]]
        main([*command, "--out", str(folder / f"{name}_one.h5ad")])
        commands.append([*command, "--devices", "4", "--out", str(folder / f"{name}_four.h5ad")])
        commands.append([*command, "--devices", "3", "--out", str(folder / f"{name}_three.h5ad")])
    (folder / "commands.json").write_text(json.dumps(commands))
    (folder / "told").write_text(*finish(start(4, PROGRAM, str(folder / "commands.json")), patience=600))
    return folder


@pytest.mark.parametrize("name", TINY)
def test_four_devices_predict_what_one_does(folder, name):
    one, four = (anndata.read_h5ad(folder / f"{name}_{n}.h5ad") for n in ("one", "four"))
    pd.testing.assert_frame_equal(one.obs, four.obs, rtol=1e-4)
    assert np.ptp(one.X, axis=0).max() > 0.1
    np.testing.assert_allclose(four.X, one.X, atol=1e-4)


def test_what_three_devices_cannot_share_is_refused(folder):
    told = " ".join((folder / "told").read_text().split())
    assert told.count("ended with 2") == 3
    assert "the number of cells (n_cells) must be a multiple of the 3 devices that share it; got 8" in told
    assert "chunk must be a multiple of the 3 devices that share it; got 32" in told
    assert "chunk must be a multiple of the 3 devices that share it; got 8" in told
    assert not [path for path in folder.iterdir() if "three" in path.name]


@pytest.mark.parametrize(
    ("run", "tiny", "wanted", "options"),
    [
        ("trained", tiny_series, [1.0, 2.5], {"n_cells": 7}),
        ("perturbation_trained", tiny_perturbation, ["g1+g0"], {"n_cells": 35}),
        ("cellset_trained", tiny_cellsets, ["A"], {"n_cells": 11}),
    ],
)
def test_a_mesh_of_one_device_changes_nothing(request, run, tiny, wanted, options):
    trained = request.getfixturevalue(run)
    alone = predict(trained, tiny.make_adata(), wanted, **options)
    shared = predict(trained, tiny.make_adata(), wanted, **options, mesh=make_mesh(1))
    np.testing.assert_allclose(shared.X, alone.X, atol=1e-5)
    pd.testing.assert_frame_equal(shared.obs, alone.obs, rtol=1e-5)
