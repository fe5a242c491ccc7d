"""Prepared cells on disk: the numbers that went in, from any rows, whole or not at all."""

import json
import os
import threading

import numpy as np
import pytest

from scjax.data.store import StoredCells, store_cells


def cells(full, n=50, dims=9):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, dims)).astype(np.float32)
    x[rng.random(x.shape) > (1.0 if full else 0.2)] = 0
    x[3] = 0
    return x


def parts_of(x, size=8):
    return lambda: (x[i : i + size] for i in range(0, len(x), size))


@pytest.fixture(params=[True, False], ids=["dense", "sparse"])
def stored(request, tmp_path):
    x = cells(request.param)
    return x, store_cells(tmp_path / "cells", "key", x.shape, parts_of(x))


def test_rows_of_any_shape_and_order(stored):
    x, kept = stored
    assert kept.shape == x.shape
    assert kept.dtype == x.dtype
    assert json.loads((kept.folder / "store.json").read_text())["layout"] == ("dense" if x[0].all() else "sparse")
    rng = np.random.default_rng(1)
    for rows in (rng.integers(0, 50, 30), rng.integers(0, 50, (4, 5)), np.arange(50), np.array([3]), np.zeros(0, int)):
        np.testing.assert_array_equal(kept[rows], x[rows])
    np.testing.assert_array_equal(kept[7:31], x[7:31])
    np.testing.assert_array_equal(kept[:], x)
    np.testing.assert_array_equal(kept[x[:, 0] > 0], x[x[:, 0] > 0])
    assert kept[4:4].shape == (0, 9)
    for row in (-1, 50):
        with pytest.raises(IndexError, match=r"must lie in \[0, 50\)"):
            kept[np.array([row])]


def test_other_programs_read_the_files(stored):
    x, kept = stored
    values = np.load(kept.folder / "values.npy", allow_pickle=False)
    np.testing.assert_array_equal(values, x.ravel() if x[0].all() else x[x != 0])


def test_threads_may_read_at_once(stored):
    x, kept = stored
    wrong = []

    def read(seed):
        for rows in np.random.default_rng(seed).integers(0, 50, (50, 20)):
            if not np.array_equal(kept[rows], x[rows]):
                wrong.append(rows)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_is_there_is_opened_and_not_made_again(stored):
    x, kept = stored

    def never():
        raise AssertionError("made again")

    again = store_cells(kept.folder.parent, "key", x.shape, never)
    np.testing.assert_array_equal(again[:], x)


def test_an_error_leaves_nothing(tmp_path):
    x = cells(True)

    def parts():
        yield x[:10]
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left") as caught:
        store_cells(tmp_path, "key", x.shape, parts)
    assert "While writing the prepared cells, 50 x 9" in caught.value.__notes__[0]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="parts must make 50 cells; got 10"):
        store_cells(tmp_path, "key", x.shape, lambda: [x[:10]])
    assert list(tmp_path.iterdir()) == []


def test_the_second_of_two_writers_takes_the_first_ones(tmp_path):
    x = cells(True)

    def parts():
        store_cells(tmp_path, "key", x.shape, parts_of(x)).folder.rename(tmp_path / "key")
        yield from parts_of(x)()

    os.makedirs(tmp_path / "other")
    other = store_cells(tmp_path / "other", "key", x.shape, parts_of(x))

    def while_another_finishes():
        yield x
        other.folder.rename(tmp_path / "key")

    np.testing.assert_array_equal(store_cells(tmp_path, "key", x.shape, while_another_finishes)[:], x)
    assert {p.name for p in tmp_path.iterdir()} == {"key", "other"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: (f / "values.npy").write_bytes((f / "values.npy").read_bytes()[:-4]),
            "cut short. Delete the folder",
        ),
        (lambda f: (f / "values.npy").unlink(), "cannot be opened"),
        (lambda f: (f / "store.json").write_text("{"), "holds no prepared cells"),
        (lambda f: (f / "store.json").unlink(), "holds no prepared cells"),
        (
            lambda f: (f / "store.json").write_text('{"format": 2, "layout": "dense", "shape": [1, 1], "files": {}}'),
            "of",
        ),
    ],
)
def test_damage_is_told(stored, damage, message):
    _, kept = stored
    damage(kept.folder)
    with pytest.raises(ValueError, match=message):
        StoredCells(kept.folder)


def test_a_flipped_column_is_not_silent(tmp_path):
    x = cells(False)
    kept = store_cells(tmp_path, "key", x.shape, parts_of(x))
    with (kept.folder / "columns.npy").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    with pytest.raises(OSError, match="columns.npy holds columns beyond 9: it is damaged"):
        kept[np.array([int(np.flatnonzero(x.any(axis=1))[-1])])]


def test_each_host_reads_its_own_cells_of_a_batch(tmp_path, monkeypatch):
    """The shares of two hosts together are the batch of one, and no row is read by both."""
    import anndata
    import pandas as pd

    from scjax.data.cellsets import prepare_cell_sets
    from scjax.data.collate import make_cell_set_batches, make_paired_batches
    from scjax.data.perturbation import prepare_perturbation
    from scjax.data.preprocess import Preprocess
    from scjax.data.sampling import CellSetSampling, PairedSampling
    from scjax.data.spec import DataSpec
    from scjax.data.splits import HoldOutNone

    rng = np.random.default_rng(0)
    obs = pd.DataFrame({"drug": np.resize(["ctrl", "a", "b"], 60)}, index=[f"c{i}" for i in range(60)])
    adata = anndata.AnnData(rng.poisson(2.0, (60, 12)).astype(np.float32), obs=obs)
    spec, steps = DataSpec(space="counts", perturbation="drug"), Preprocess(scale=False, n_components=None)
    sets = prepare_cell_sets(adata, spec, HoldOutNone(), steps, store=tmp_path / "sets")
    pairs = prepare_perturbation(adata, spec, HoldOutNone(), steps, store=tmp_path / "pairs")
    of_sets = make_cell_set_batches(sets, CellSetSampling(n_sets=4, n_cells=5), seed=0)
    of_pairs = make_paired_batches(pairs, PairedSampling(n_populations=2, n_cells=6, n_genes=7), seed=0)
    n_read = []
    gathered = StoredCells._picked
    monkeypatch.setattr(StoredCells, "_picked", lambda self, rows: n_read.append(len(rows)) or gathered(self, rows))
    for batch_at, names in ((of_sets, ("cells", "control")), (of_pairs, ("source", "target"))):
        whole = batch_at(3)
        n_whole, n_read[:] = sum(n_read), []
        halves = [
            batch_at(
                3, lambda shape, k=k: (slice(k * shape[0] // 2, (k + 1) * shape[0] // 2), slice(None), slice(None))
            )
            for k in range(2)
        ]
        assert sum(n_read) == n_whole > 0
        n_read[:] = []
        for name in names:
            one, other = (getattr(half, name) for half in halves)
            np.testing.assert_array_equal(one + other, getattr(whole, name))
            assert not one[len(one) // 2 :].any()
            assert not other[: len(other) // 2].any()
