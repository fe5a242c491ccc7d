"""What ships with the package is whole, small, and says where it is from."""

import hashlib
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from scjax.data.cellsets import prepare_cell_sets
from scjax.data.datasets import klein2015, mcfaline2023, norman2019
from scjax.data.graph import GraphRule
from scjax.data.perturbation import prepare_perturbation, unseen_axis
from scjax.data.preprocess import Preprocess
from scjax.data.spec import DataSpec
from scjax.data.splits import HoldOutSeenDoubles, HoldOutTimes, LeaveOut
from scjax.data.timeseries import prepare_time_series
from scjax.types import Population


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


def test_norman2019_is_whole():
    adata = norman2019()
    assert adata.shape == (3375, 500)
    assert adata.X.dtype == np.float32
    counts = adata.layers["counts"]
    assert counts.dtype == np.int32
    assert hashlib.sha256(counts.toarray().astype("<i4").tobytes()).hexdigest() == (
        "60729d5e60c3a37652dc50b74be5af88658c7e6a125b79cd28b3886e8e48cdf3"
    )
    n_cells = adata.obs["perturbation"].value_counts()
    assert len(n_cells) == 34
    assert n_cells["control"] == 100
    assert n_cells.min() == n_cells["FOXL2+HOXB9"] == 80
    np.testing.assert_array_equal(adata.var["n_cells"], (counts > 0).sum(axis=0).A1)


def test_norman2019_is_normalised_by_the_totals_of_all_genes():
    adata = norman2019()
    counts, totals = adata.layers["counts"].toarray(), adata.obs["total_counts"].to_numpy()
    np.testing.assert_array_equal(adata.X.toarray(), np.log1p(counts / totals[:, None] * 1e4).astype(np.float32))
    assert (counts.sum(axis=1) < 0.5 * totals).all()


def test_norman2019_is_small_and_names_its_origin():
    assert (resources.files("scjax.data") / "files" / "norman2019.h5ad").stat().st_size < 4e5
    source = norman2019().uns["source"]
    assert source["origin_license"].startswith("BSD-3")
    assert source["doi"] == "10.1126/science.aax4438"
    assert source["accession"] == "GSE133344"
    notice = (Path(__file__).parents[2] / "NOTICE").read_text()
    for words in ("norman2019.h5ad", "BSD 3-Clause License", "Altos Labs", "365, 786-793", source["origin_commit"]):
        assert words in notice


def test_norman2019_equals_the_set_it_was_made_from(shared_data):
    import anndata

    origin = anndata.read_h5ad(shared_data / "pert_norman2019_subset.h5ad")
    adata = norman2019()
    np.testing.assert_array_equal(origin.X.toarray(), adata.X.toarray())
    np.testing.assert_array_equal(origin.layers["counts"].toarray(), adata.layers["counts"].toarray())
    np.testing.assert_array_equal(origin.obs["perturbation"], adata.obs["perturbation"])
    assert list(origin.var_names) == list(adata.var_names)


def test_effects_of_norman2019_add_up_on_held_out_pairs():
    """Pearson of deltas of the additive baseline on the genes of ten or more cells, as measured on the origin."""
    adata = norman2019()
    spec = DataSpec(space="lognormalised", perturbation="perturbation")
    steps = Preprocess(library_size=None, log1p=False, scale=False, n_components=None)
    data = prepare_perturbation(adata, spec, HoldOutSeenDoubles(), steps, GraphRule(n_neighbours=5))
    assert {unseen_axis(p, data.split) for p in data.split.test} == {"combination"}
    often = (adata.var["n_cells"] >= 10).to_numpy()
    control = data.controls().mean(axis=0)[often]
    delta = {p.perturbation: data.cells(p).mean(axis=0)[often] - control for p in data.populations}
    pearson = {
        p.condition: np.corrcoef(delta[p.perturbation], sum(delta[name,] for name in p.perturbation))[0, 1]
        for p in data.split.test
    }
    measured = {
        "KLF1+MAP2K6": 0.981,
        "KLF1+TGFBR2": 0.987,
        "MAP2K3+MAP2K6": 0.729,
        "MAP2K3+SLC38A2": 0.709,
        "MAPK1+TGFBR2": 0.946,
    }
    assert pearson == pytest.approx(measured, abs=6e-4)


def test_mcfaline2023_is_whole():
    adata = mcfaline2023()
    assert adata.shape == (2586, 500)
    assert adata.X.dtype == np.float32
    counts = adata.layers["counts"]
    assert counts.dtype == np.int32
    assert hashlib.sha256(counts.toarray().astype("<i4").tobytes()).hexdigest() == (
        "36b25269c4b57ad3465f17070c3df23aace26df14b7c1a1aab9fc289a47ec0c2"
    )
    n_cells = adata.obs.groupby(["cell_type", "perturbation"], observed=True).size()
    assert len(n_cells) == 3 * 10
    assert (n_cells.min(), n_cells.max()) == (46, 100)
    np.testing.assert_array_equal(adata.var["n_cells"], (counts > 0).sum(axis=0).A1)


def test_mcfaline2023_is_normalised_by_the_totals_of_all_genes():
    adata = mcfaline2023()
    counts, totals = adata.layers["counts"].toarray(), adata.obs["total_counts"].to_numpy()
    np.testing.assert_array_equal(adata.X.toarray(), np.log1p(counts / totals[:, None] * 1e4).astype(np.float32))


def test_mcfaline2023_is_small_and_names_its_origin():
    assert (resources.files("scjax.data") / "files" / "mcfaline2023.h5ad").stat().st_size < 4.5e5
    source = mcfaline2023().uns["source"]
    assert source["origin_license"].startswith("BSD-3")
    assert source["doi"] == "10.1016/j.xgen.2023.100487"
    assert source["accession"] == "GSE225775"
    notice = (Path(__file__).parents[2] / "NOTICE").read_text()
    for words in (
        "mcfaline2023.h5ad",
        "BSD 3-Clause License, Copyright (c) 2024, Altos Labs",
        "Cell Genomics 4, 100487",
    ):
        assert words in notice


def test_mcfaline2023_equals_the_set_it_was_made_from(shared_data):
    import anndata

    origin = anndata.read_h5ad(shared_data / "pert_mcfaline2023_subset.h5ad")
    adata = mcfaline2023()
    np.testing.assert_array_equal(origin.X.toarray(), adata.X.toarray())
    np.testing.assert_array_equal(origin.layers["counts"].toarray(), adata.layers["counts"].toarray())
    for column in ("perturbation", "cell_type"):
        np.testing.assert_array_equal(origin.obs[column], adata.obs[column])
    assert list(origin.obs_names) == list(adata.obs_names)
    assert list(origin.var_names) == list(adata.var_names)


@pytest.mark.parametrize(("line", "measured"), [("A172", 0.050), ("T98G", 0.083), ("U87MG", 0.045)])
def test_effects_of_mcfaline2023_hardly_carry_over_to_a_held_out_line(line, measured):
    """Pearson of the deltas of a line with the mean delta of the others, averaged over perturbations, as measured."""
    spec = DataSpec(
        space="lognormalised", perturbation="perturbation", cell_type="cell_type", covariates=("cell_type",)
    )
    steps = Preprocess(library_size=None, log1p=False, scale=False, n_components=None)
    data = prepare_cell_sets(mcfaline2023(), spec, LeaveOut(covariate="cell_type", value=line), steps)
    mean = {p: data.cells(p).mean(axis=0, dtype=np.float64) for p in data.populations}
    delta = {p: mean[p] - mean[Population((), p.context)] for p in data.populations if not p.is_control}
    pearson = []
    for p in data.split.test:
        others = [delta[q] for q in data.split.train if q.perturbation == p.perturbation]
        assert len(others) == 2
        pearson.append(np.corrcoef(delta[p], np.mean(others, axis=0))[0, 1])
    assert np.mean(pearson) == pytest.approx(measured, abs=6e-4)
