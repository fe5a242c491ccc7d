"""Files: the two formats hold the same cells, and a bad file says what is wrong with it."""

import h5py
import numpy as np
import pytest

from scjax.data.datasets import klein2015
from scjax.data.source import read_anndata


@pytest.fixture(scope="module")
def adata():
    return klein2015()[:40, :30].copy()


def test_zarr_reads_as_h5ad_does(adata, tmp_path):
    adata.write_h5ad(tmp_path / "a.h5ad")
    adata.write_zarr(tmp_path / "a.zarr")
    one, other = read_anndata(tmp_path / "a.h5ad"), read_anndata(str(tmp_path / "a.zarr"))
    np.testing.assert_array_equal(one.X, other.X)
    np.testing.assert_array_equal(one.obs["time"], other.obs["time"])
    assert list(one.var_names) == list(other.var_names) == list(adata.var_names)


def test_missing_file_suggests_its_neighbour(adata, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(FileNotFoundError, match="'cells.h5ad'"):
        read_anndata(tmp_path / "cell.h5ad")


def test_other_suffix(tmp_path):
    with pytest.raises(ValueError, match=r"must end in .h5ad or .zarr; got .*cells.csv"):
        read_anndata(tmp_path / "cells.csv")


@pytest.mark.parametrize("keep", [0, 100, 4000])
def test_truncated_file(adata, tmp_path, keep):
    path = tmp_path / "a.h5ad"
    adata.write_h5ad(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="a.h5ad is no whole HDF5 file: truncated"):
        read_anndata(path)


def test_folder_that_is_no_zarr_group(tmp_path):
    (tmp_path / "a.zarr").mkdir()
    with pytest.raises(ValueError, match="is no zarr group"):
        read_anndata(tmp_path / "a.zarr")


def test_a_broken_element_is_reported_with_the_file(adata, tmp_path):
    path = tmp_path / "a.h5ad"
    adata.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        del file["obs/_index"]
    with pytest.raises(KeyError) as caught:
        read_anndata(path)
    assert any("a.h5ad: it is damaged" in note for note in caught.value.__notes__)
