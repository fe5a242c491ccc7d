"""Matrices on disk: rows as in memory, whatever the file's kind; statistics from parts; what is broken says so."""

import anndata
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from scjax.data import disk
from scjax.data.disk import CellsOnDisk, Columns, Stack, Subset, is_on_disk, stacked
from scjax.data.expression import transform_all
from scjax.data.graph import GraphRule, coexpression
from scjax.data.leaks import check_split
from scjax.data.preprocess import Preprocess, fit
from scjax.data.source import open_source, read_anndata
from scjax.data.spec import DataSpec
from scjax.data.splits import HoldOutTimes, split_times

N_CELLS, N_GENES = 60, 7
GENES = [f"g{i}" for i in range(N_GENES)]
SPEC = DataSpec(space="counts", time="t")


def make_adata(dtype=np.float32):
    rng = np.random.default_rng(0)
    x = rng.poisson(1.0, (N_CELLS, N_GENES)).astype(dtype)
    x[:, 3] = x[:, 3] * 20
    x[:, 0] += 1  # no cell is empty
    obs = pd.DataFrame(
        {"t": np.repeat([0.0, 1.0, 2.0], N_CELLS // 3), "kind": pd.Categorical(["a", "b"] * (N_CELLS // 2))},
        index=[f"cell{i}" for i in range(N_CELLS)],
    )
    adata = anndata.AnnData(sparse.csr_matrix(x), obs=obs, var=pd.DataFrame(index=GENES))
    adata.layers["dense"] = x
    adata.obsm["z"] = rng.normal(size=(N_CELLS, 3))
    adata.obsm["table"] = pd.DataFrame(rng.normal(size=(N_CELLS, 2)), index=obs.index, columns=["u", "v"])
    adata.uns["vectors"] = {"a": np.ones(2)}
    return adata


@pytest.fixture(scope="module", params=[".h5ad", ".h5ad gzip", ".zarr"])
def cells(request, tmp_path_factory):
    suffix, *options = request.param.split()
    path = tmp_path_factory.mktemp("disk") / f"cells{suffix}"
    if suffix == ".zarr":
        make_adata().write_zarr(path)
    else:
        make_adata().write_h5ad(path, compression=options[0] if options else None)
    return read_anndata(path, backed=True)


def test_what_is_read_and_what_is_not(cells):
    wanted = make_adata()
    assert isinstance(cells, CellsOnDisk)
    assert is_on_disk(cells)
    assert not is_on_disk(wanted)
    assert cells.shape == wanted.shape
    assert cells.obs.equals(wanted.obs)
    assert list(cells.var_names) == GENES
    np.testing.assert_array_equal(cells.uns["vectors"]["a"], np.ones(2))
    assert all(map(is_on_disk, (cells.X, cells.layers["dense"], cells.obsm["z"])))
    assert cells.obsm["table"].equals(wanted.obsm["table"])


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.integers(-N_CELLS, N_CELLS - 1), max_size=40))
def test_rows_in_any_order(cells, rows):
    rows, wanted = np.array(rows, np.int64), make_adata()
    for found, matrix in ((cells.X, wanted.X.toarray()), (cells.layers["dense"], wanted.layers["dense"])):
        picked = found[rows]
        picked = picked.toarray() if sparse.issparse(picked) else picked
        assert picked.dtype == matrix.dtype
        np.testing.assert_array_equal(picked, matrix[rows])


def test_slices_masks_and_views(cells):
    wanted = make_adata()
    x = wanted.X.toarray()
    np.testing.assert_array_equal(cells.X[3:9].toarray(), x[3:9])
    np.testing.assert_array_equal(cells.X[:].toarray(), x)
    assert cells.X[5:5].shape == (0, N_GENES)
    mask = np.asarray(wanted.obs["kind"] == "b")
    np.testing.assert_array_equal(cells.X[mask].toarray(), x[mask])
    view = cells[mask][np.array([4, 2])]
    np.testing.assert_array_equal(view.X[:].toarray(), x[mask][[4, 2]])
    assert list(view.obs_names) == list(wanted[mask][[4, 2]].obs_names)
    assert view.obsm["table"].equals(wanted[mask][[4, 2]].obsm["table"])
    np.testing.assert_array_equal(view.obsm["z"][1:], wanted.obsm["z"][mask][[4, 2]][1:])
    with pytest.raises(IndexError, match="must lie below 60; got 0 to 60"):
        cells.X[np.array([0, 60])]
    with pytest.raises(ValueError, match="slices of step 1"):
        cells.X[::2]


def test_far_rows_are_not_read_along(monkeypatch):
    """Near rows share a request, far ones do not, and no request is longer than the span."""
    asked = []

    class Told(disk.DiskMatrix):
        def _read(self, start, stop):
            asked.append((start, stop))
            return np.arange(start, stop)[:, None]

    monkeypatch.setattr(disk, "_SPAN", 50)
    rows = np.array([500, 3, 6, 1, 3, *range(600, 656, 3)])
    np.testing.assert_array_equal(Told((1000, 1), np.int64, False)[rows][:, 0], rows)
    assert asked == [(1, 7), (500, 501), (600, 649), (651, 655)]


def test_far_rows_of_several_files_are_one_request_each(cells, monkeypatch):
    asked, take = [], type(cells.X)._take

    def told(self, wanted):
        asked.append(len(wanted))
        return take(self, wanted)

    monkeypatch.setattr(type(cells.X), "_take", told)
    monkeypatch.setattr(disk, "_GAP", 1)
    rows = np.array([175, 3, 9, 121, 66, 0, 150, 3])
    x = make_adata().X.toarray()
    three = stacked([cells.X, cells.X, cells.X])
    np.testing.assert_array_equal(three[rows].toarray(), np.concatenate([x, x, x])[rows])
    assert asked == [3, 1, 3]


def test_stacked_and_aligned_matrices(cells):
    x = make_adata().X.toarray()
    both = stacked([cells.X, x])
    assert isinstance(both, Stack)
    np.testing.assert_array_equal(both[50:70], np.concatenate([x, x])[50:70])
    np.testing.assert_array_equal(both[np.array([70, 3, 59])], np.concatenate([x, x])[[70, 3, 59]])
    for of_the_sparse_one_alone in (slice(3, 5), np.array([3, 4]), np.array([4, 44, 3])):
        assert isinstance(both[of_the_sparse_one_alone], np.ndarray)
    twice = stacked([cells.X, Subset(cells.X, np.array([5, 1]))])
    np.testing.assert_array_equal(twice[58:].toarray(), x[[58, 59, 5, 1]])
    other = Columns(cells.X, np.array([2, -1, 0]))
    np.testing.assert_array_equal(other[4:8].toarray(), np.stack([x[4:8, 2], 0 * x[4:8, 0], x[4:8, 0]], axis=1))
    np.testing.assert_array_equal(Columns(cells.layers["dense"], np.array([1, -1]))[[9]], [[x[9, 1], 0]])


@pytest.mark.parametrize(
    "steps",
    [
        Preprocess(n_components=3),
        Preprocess(n_top_genes=4, n_components=2, target_sum="median"),
        Preprocess(n_top_genes=4, n_components=None, library_size="selected_genes"),
        Preprocess(scale=False, n_components=None),
    ],
)
def test_statistics_from_parts_are_those_in_memory(cells, steps, monkeypatch):
    """Bit for bit, for parts of seven cells; and, to rounding, those of all cells at once."""
    adata = make_adata()
    rows = np.flatnonzero(adata.obs["t"] != 1.0)
    whole = fit(steps, adata.X[rows], GENES, "counts")
    monkeypatch.setattr(disk, "_CELLS", 7)
    in_memory = fit(steps, adata.X[rows], GENES, "counts")
    found = fit(steps, Subset(cells.X, rows), GENES, "counts")
    for name, array in found.to_tree()[0].items():
        np.testing.assert_array_equal(array, in_memory.to_tree()[0][name], err_msg=name)
        np.testing.assert_allclose(array, whole.to_tree()[0][name], rtol=1e-10, atol=1e-12, err_msg=name)
    assert found.to_tree()[1] == in_memory.to_tree()[1] == whole.to_tree()[1]
    np.testing.assert_array_equal(
        transform_all(open_source(cells, SPEC), found), transform_all(open_source(adata, SPEC), in_memory)
    )


def test_graph_of_cells_on_disk(cells):
    x = np.log1p(make_adata().X.toarray())
    matrix = Subset(cells.X, np.arange(40))
    of_counts = coexpression(make_adata().X[:40], GraphRule(n_neighbours=2))
    np.testing.assert_array_equal(coexpression(matrix, GraphRule(n_neighbours=2)), of_counts)
    assert (coexpression(x[:40], GraphRule(n_neighbours=2)) != np.eye(N_GENES, dtype=bool)).any()


def test_problems_are_those_of_memory(cells):
    """`spec.check` and the rules on leaks read in parts and say the same."""
    adata = make_adata()
    SPEC.check(cells)
    for spec in (DataSpec(space="lognormalised", time="t"), DataSpec(space="counts", time="t", expression="obsm/z")):
        with pytest.raises(ValueError, match="does not fit") as wanted:
            spec.check(adata)
        with pytest.raises(ValueError, match="does not fit") as found:
            spec.check(cells)
        assert str(found.value) == str(wanted.value)
    split = split_times(HoldOutTimes(times=(1.0,)), (0.0, 1.0, 2.0))
    train = np.flatnonzero(adata.obs["t"] != 1.0)
    every = fit(Preprocess(n_top_genes=4, n_components=None), adata.X, GENES, "counts")
    own = fit(Preprocess(n_top_genes=4, n_components=2), adata.X[train], GENES, "counts")
    for transform in (every, own):
        assert check_split(cells, split, transform, spec=SPEC) == check_split(adata, split, transform, spec=SPEC)


def test_bad_values_on_disk_are_refused(tmp_path):
    adata = make_adata()
    adata.X = adata.X.toarray()
    adata.X[41, 2] = np.nan
    adata.write_h5ad(tmp_path / "nan.h5ad")
    cells = read_anndata(tmp_path / "nan.h5ad", backed=True)
    with pytest.raises(ValueError, match="1 values that are NaN or infinite"):
        SPEC.check(cells)
    with pytest.raises(ValueError, match=r"x_train\[0:60\] must hold finite numbers; 1 of 420"):
        fit(Preprocess(n_components=2), cells.X, GENES, "counts")


def test_files_that_cannot_be_read_by_rows(tmp_path):
    adata = make_adata()
    adata.X = sparse.csc_matrix(adata.X)
    adata.write_h5ad(tmp_path / "columns.h5ad")
    cells = read_anndata(tmp_path / "columns.h5ad", backed=True)
    for use in (lambda: cells.X[:3], lambda: cells[[4, 2]].X[:], lambda: SPEC.check(cells)):
        with pytest.raises(ValueError, match=r"columns.h5ad, X is stored by columns \(CSC\).*tocsr"):
            use()
    adata.X = None
    adata.write_h5ad(tmp_path / "none.h5ad")
    cells = read_anndata(tmp_path / "none.h5ad", backed=True)
    assert cells.X is None
    with pytest.raises(ValueError, match="adata.X is None"):
        SPEC.check(cells)
    wide = disk.Derived((30, 10_001), lambda rows: np.ones((len(rows), 10_001), np.float32))
    with pytest.raises(ValueError, match="needs the covariance of their genes in memory, 0.8 GB"):
        fit(Preprocess(n_components=2), wide, [f"g{i}" for i in range(10_001)], "counts")


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_a_matrix_that_cannot_be_read_is_refused_where_it_is_asked_for(tmp_path, suffix):
    """And not before: who reads X need not mind what lies beside it, in one file or in several."""
    adata = make_adata()
    adata.layers["columns"] = sparse.csc_matrix(adata.X)
    adata.obsm["deep"] = np.zeros((N_CELLS, 2, 2))
    adata.obsm["words"] = np.full((N_CELLS, 1), "a", dtype=object)
    paths = [tmp_path / f"{name}{suffix}" for name in ("one", "two")]
    for path in paths:
        adata.obs_names = [f"{path.stem}_{i}" for i in range(N_CELLS)]
        (adata.write_zarr if suffix == ".zarr" else adata.write_h5ad)(path)
    for cells in (read_anndata(paths[0], backed=True), read_anndata(paths, backed=True)):
        SPEC.check(cells)
        np.testing.assert_array_equal(cells.X[:N_CELLS].toarray(), adata.X.toarray())
        for matrix, message in (
            (cells.layers["columns"], r"one.*, layers/columns is stored by columns"),
            (cells.obsm["deep"], r"one.*, obsm/deep must be a matrix of numbers; its shape is \(60, 2, 2\)"),
            (cells.obsm["words"], r"one.*, obsm/words must be a matrix of numbers; its shape is \(60, 1\), its dtype"),
        ):
            for rows in (slice(0, 3), np.array([5, 1])):
                with pytest.raises(ValueError, match=message):
                    matrix[rows]


def test_a_ragged_entry_is_refused_where_it_is_asked_for(tmp_path):
    """Receptors of immune cells are kept so: a group without a shape. awkward itself is no dependency."""
    import h5py

    make_adata().write_h5ad(tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "r+") as file:
        file.create_group("obsm/airr").attrs.update({"encoding-type": "awkward-array", "encoding-version": "0.1.0"})
    cells = read_anndata(tmp_path / "cells.h5ad", backed=True)
    SPEC.check(cells)
    with pytest.raises(ValueError, match="obsm/airr must be a matrix of numbers; it is of the kind 'awkward-array'"):
        cells.obsm["airr"][:]


@pytest.mark.parametrize("column", [N_GENES, -1])
@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_a_column_beyond_the_last_is_no_value_of_the_next_cell(tmp_path, suffix, column):
    """On disk, and in memory, where SciPy does not look either."""
    import h5py
    import zarr

    path = tmp_path / f"cells{suffix}"
    adata = make_adata()
    (adata.write_zarr if suffix == ".zarr" else adata.write_h5ad)(path)
    file = zarr.open_group(path, mode="r+") if suffix == ".zarr" else h5py.File(path, "r+")
    file["X/indices"][2] = column
    if suffix == ".h5ad":
        file.close()
    cells = read_anndata(path, backed=True)
    for of in (lambda: cells.X[:], lambda: cells.X[np.array([50, 0])], lambda: SPEC.check(cells)):
        with pytest.raises(OSError, match=r"X: cells 0 to \d+ could not be read \(ValueError: .*ind"):
            of()
    np.testing.assert_array_equal(cells.X[40:].toarray(), adata.X[40:].toarray())
    adata.X.indices[2] = column
    with pytest.raises(ValueError, match="'X' is no sound sparse matrix .indices must be .*Make it anew"):
        SPEC.check(adata)


@pytest.mark.parametrize(
    ("place", "matrix", "message"),
    [
        ("X", np.ones((5, 3)), r"X must have as many rows as obs and columns as var, 6 x 3; its shape is \(5, 3\)"),
        ("layers/raw", np.ones((6, 4)), r"layers/raw must have .* 6 x 3; its shape is \(6, 4\)"),
        ("layers/raw", sparse.csc_matrix(np.ones((6, 4))), r"layers/raw must have .* 6 x 3; its shape is \(6, 4\)"),
        ("obsm/z", np.ones((7, 2, 2)), r"obsm/z must have as many rows as obs, 6; its shape is \(7, 2, 2\)"),
        ("obsm/z", np.ones((7, 2)), r"obsm/z must have as many rows as obs, 6; its shape is \(7, 2\)"),
    ],
)
def test_matrices_of_other_cells_are_refused(tmp_path, place, matrix, message):
    import h5py
    from anndata.io import write_elem

    anndata.AnnData(np.ones((6, 3))).write_h5ad(tmp_path / "cells.h5ad")
    group, _, name = place.rpartition("/")
    with h5py.File(tmp_path / "cells.h5ad", "r+") as file:
        write_elem(file[group or "/"], name, matrix)
    with pytest.raises(ValueError, match=message):
        read_anndata(tmp_path / "cells.h5ad", backed=True)


def test_a_chunk_that_vanished_is_no_zeros(tmp_path):
    """Of a zarr store, whose reader would fill it in."""
    import zarr

    # The newest zarr for Python 3.11 has no such setting and gives zeros: there is nothing to be tested.
    if "read_missing_chunks" not in zarr.config.get("array"):
        pytest.skip("this zarr fills in missing chunks and cannot be told not to")
    make_adata().write_zarr(tmp_path / "cells.zarr")
    cells = read_anndata(tmp_path / "cells.zarr", backed=True)
    for path in (tmp_path / "cells.zarr" / "X" / "data").rglob("*"):
        if path.is_file() and path.name != "zarr.json":
            path.unlink()
    with pytest.raises(OSError, match=r"(?s)cells.zarr, X: cells 0 to 59 could not be read .*moved, cut short"):
        cells.X[:]


def test_a_truncated_file_says_where(tmp_path):
    path = tmp_path / "cells.zarr"
    make_adata().write_zarr(path)
    cells = read_anndata(path, backed=True)
    for file in (path / "layers" / "dense").rglob("*"):
        if file.is_file() and file.name != "zarr.json":
            file.write_bytes(file.read_bytes()[:12])
    with pytest.raises(OSError, match="layers/dense: cells 2 to 4 could not be read"):
        cells.layers["dense"][2:5]
