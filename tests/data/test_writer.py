"""Files of cells that grow by parts: whole or not there, and nobody's files are touched."""

import numpy as np
import pandas as pd
import pytest

from scjax.data.source import read_anndata
from scjax.data.writer import writing_cells

GENES = ("a", "b")


def some(n, start=0):
    x = np.arange(2 * start, 2 * (start + n), dtype=np.float32).reshape(n, 2)
    return x, pd.DataFrame({"seed": 0}, index=[f"c{i}" for i in range(start, start + n)])


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_beside_files_of_like_names(tmp_path, suffix):
    path, theirs = tmp_path / f"cells{suffix}", tmp_path / f"cells{suffix}.part"
    theirs.write_text("of somebody")
    with writing_cells(path, 5, GENES) as cells:
        assert not path.exists()
        cells.add(*some(3))
        cells.add(*some(2, start=3))
    written = read_anndata(path)
    np.testing.assert_array_equal(written.X, some(5)[0])
    assert list(written.obs_names) == [f"c{i}" for i in range(5)]
    assert theirs.read_text() == "of somebody"
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, theirs.name]


def interrupted(path, err):
    with writing_cells(path, 5, GENES) as cells:
        cells.add(*some(3))
        raise err


@pytest.mark.parametrize("err", [KeyError("no such gene"), SystemExit(143)], ids=["error", "signal"])
@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_nothing_is_left_of_what_went_wrong(tmp_path, suffix, err):
    with pytest.raises(type(err), match=str(err)):
        interrupted(tmp_path / f"cells{suffix}", err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_words_beside_missing_ones_are_written(tmp_path, suffix):
    """As where tables of which one lacks a column are put together."""
    with writing_cells(tmp_path / f"cells{suffix}", 3, GENES) as cells:
        x, obs = some(3)
        obs["batch"] = pd.Series(["p1", np.nan, "p2"], index=obs.index, dtype=object)
        cells.add(x, obs)
    batch = read_anndata(tmp_path / f"cells{suffix}").obs["batch"]
    assert list(batch.isna()) == [False, True, False]
    assert list(batch.cat.categories) == ["p1", "p2"]
