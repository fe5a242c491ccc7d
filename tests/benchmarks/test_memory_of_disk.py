"""The benchmark of data on disk: its files hold what each system needs, and memory does not grow with the cells."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from scjax.data.source import read_anndata
from scjax.experiment import digest_of

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("out_of_core")


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_one_file_serves_all_systems(script, tmp_path, suffix):
    path = tmp_path / f"cells{suffix}"
    script.make(path, 3000, 40, 0.2)
    cells = read_anndata(path, backed=True)
    for system in script.SYSTEMS:
        for experiment in (script.small(system), script.published(system, 2)):
            assert digest_of(experiment, cells)
    rows = np.array([5, 2999, 5, 1700])
    np.testing.assert_array_equal(script._anndata_rows(path)(rows), cells.X[rows].toarray())


@pytest.mark.slow
@pytest.mark.parametrize("system", ["scimf", "scdfm", "perturbdiff"])
def test_memory_is_bounded(script, tmp_path, system):
    """Ten times the cells, at most 1.2 times the peak of the process, training and predicting."""
    peaks = {}
    for times in (1, 10):
        script.make(tmp_path / f"{times}.h5ad", times * 6000, 500, 0.1)
        for what in ("train", "predict"):
            peak = script._peak(what, system, tmp_path / f"{times}.h5ad", tmp_path / f"run{times}", "--on-disk")
            peaks[what, times] = peak["peak_rss_bytes"]
    for what in ("train", "predict"):
        assert peaks[what, 10] <= script.LIMIT * peaks[what, 1], peaks
