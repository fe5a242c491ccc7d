"""What ships with the package is whole, small, and says where it is from."""

import hashlib
from importlib import resources
from pathlib import Path

import numpy as np

from scjax.data.datasets import klein2015
from scjax.data.preprocess import Preprocess
from scjax.data.spec import DataSpec
from scjax.data.splits import HoldOutTimes
from scjax.data.timeseries import prepare_time_series


def test_klein2015_is_whole():
    adata = klein2015()
    assert adata.shape == (1000, 900)
    assert adata.X.dtype == np.int32
    assert hashlib.sha256(adata.X.astype("<i4").tobytes()).hexdigest() == (
        "96b84bf35f05e3d7264ab6fbafd0ea06b786b942886d4a676e3c73c01b2fb5ab"
    )
    times, n_cells = np.unique(adata.obs["time"], return_counts=True)
    assert dict(zip(times.tolist(), n_cells.tolist(), strict=True)) == {0.0: 359, 2.0: 101, 4.0: 248, 7.0: 292}
    assert {"Krt8", "Actg1"} <= set(adata.var_names)


def test_klein2015_is_small_and_names_its_origin():
    assert (resources.files("scjax.data") / "files" / "klein2015.h5ad").stat().st_size < 1e6
    source = klein2015().uns["source"]
    assert source["origin_license"].startswith("MIT")
    assert source["doi"] == "10.1016/j.cell.2015.04.044"
    assert source["accession"] == "GSE65525"
    notice = (Path(__file__).parents[2] / "NOTICE").read_text()
    for words in ("klein2015.h5ad", "MIT License", "Wataru Hirota", "Cell 161", "Changed here"):
        assert words in notice


def test_klein2015_equals_the_set_it_was_made_from(shared_data):
    import anndata

    origin = anndata.read_h5ad(shared_data / "ts_mesc_klein2015.h5ad")
    adata = klein2015()
    np.testing.assert_array_equal(origin.layers["counts"].toarray(), adata.X)
    np.testing.assert_array_equal(origin.obs["time"], adata.obs["time"])
    assert list(origin.var_names) == list(adata.var_names)


def test_day_2_never_seen_lies_nearest_to_day_4():
    """As its measured transport distances say: 19.2 from day 0, 13.5 from day 4."""
    spec = DataSpec(space="counts", time="time")
    steps = Preprocess(scale=False, n_components=10)
    data = prepare_time_series(klein2015(), spec, HoldOutTimes(times=(2.0,)), steps)
    mean = {t: data.population(t).mean(axis=0) for t in data.times}
    away = {t: float(np.linalg.norm(mean[t] - mean[2.0])) for t in (0.0, 4.0, 7.0)}
    assert min(away, key=away.get) == 4.0
    assert 5 < away[4.0] < away[0.0] < 25
