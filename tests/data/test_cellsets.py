"""Cell sets: who is in a set, who may be whose control, and which sources and genes a cell has."""

from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest

from scjax.config import from_dict, to_dict
from scjax.data.cellsets import CovariateNames, prepare_cell_sets, read_control_cells
from scjax.data.collate import make_cell_set_batches
from scjax.data.preprocess import Preprocess
from scjax.data.sampling import CellSetSampling, cell_set_rows, sets_in_order
from scjax.data.spec import DataSpec
from scjax.data.splits import HoldOutConditions, HoldOutContexts, HoldOutCrossed, HoldOutNone, LeaveOut
from scjax.types import Population

STEPS = Preprocess(library_size=None, log1p=False, scale=False, n_components=None)
SPEC = DataSpec(
    space="lognormalised", perturbation="drug", cell_type="type", batch="donor", covariates=("type", "donor")
)
UNPERTURBED = DataSpec(space="lognormalised", cell_type="type", batch="donor", covariates=("type", "donor"))


def make(n=240, seed=0, genes=("g0", "g1", "g2", "g3"), donors=("d1", "d2")):
    """Cell i has the value i / n in its first gene, so that rows are told from batches."""
    rng = np.random.default_rng(seed)
    obs = {
        "drug": rng.choice(["ctrl", "A", "B"], n),
        "type": rng.choice(["B cell", "T cell"], n),
        "donor": rng.choice(donors, n),
    }
    x = rng.random((n, len(genes)), np.float32)
    x[:, 0] = np.arange(n) / n
    return anndata.AnnData(
        X=x, obs=pd.DataFrame(obs, index=[f"c{i}" for i in range(n)]), var=pd.DataFrame(index=list(genes))
    )


@pytest.fixture(scope="module")
def data():
    return prepare_cell_sets(make(), SPEC, HoldOutNone(), STEPS)


def rows_in(x, n=240):
    return np.rint(x[..., 0] * n).astype(int)


def test_ids_are_sorted_names_and_the_control_is_zero(data):
    adata = make()
    assert data.names.perturbation == ("control", "A", "B")
    assert data.names.cell_type == ("B cell", "T cell")
    assert data.names.batch == ("d1", "d2")
    written = np.array(data.names.perturbation)[data.covariates["perturbation"]]
    np.testing.assert_array_equal(np.where(written == "control", "ctrl", written), adata.obs["drug"])
    np.testing.assert_array_equal(np.array(data.names.cell_type)[data.covariates["cell_type"]], adata.obs["type"])
    np.testing.assert_array_equal(np.array(data.names.batch)[data.covariates["batch"]], adata.obs["donor"])
    np.testing.assert_array_equal(data.x, adata.X)
    assert data.sizes == {
        "n_genes": 4,
        "n_perturbations": 3,
        "n_cell_types": 2,
        "n_batches": 2,
        "n_doses": None,
        "n_spaces": 1,
        "n_perturbation_features": None,
        "n_cell_type_features": None,
    }


def test_ids_of_a_population_and_unknown_names(data):
    assert data.ids_of(Population(("B",), "T cell | d1")) == {"perturbation": 2, "cell_type": 1, "batch": 0}
    assert data.ids_of(Population((), "B cell | d2")) == {"perturbation": 0, "cell_type": 0, "batch": 1}
    for population, message in (
        (Population(("C",), "T cell | d1"), "perturbation 'C' is not among the 3 of the data"),
        (Population(("A",), "T cells | d1"), "cell_type 'T cells' is not among .* Did you mean 'T cell'"),
        (Population(("A",), "T cell | d9"), "batch 'd9' is not among the 2"),
        (Population(("A",), "T cell"), "must hold a value for each of 2 covariates"),
    ):
        with pytest.raises(ValueError, match=message):
            data.ids_of(population)


def test_names_survive_json(data):
    assert from_dict(CovariateNames, to_dict(data.names)) == data.names


@pytest.mark.parametrize("order", ["epochs", "uniform"])
def test_sets_are_of_one_group_with_controls_of_their_context(data, order):
    batch_at = make_cell_set_batches(data, CellSetSampling(n_sets=3, n_cells=8, order=order), seed=1)
    seen = set()
    for step in range(6):
        batch = batch_at(step)
        assert batch.cells.shape == batch.control.shape == (3, 8, 4)
        assert batch.space is None
        assert batch.measured is None
        rows, controls = rows_in(batch.cells), rows_in(batch.control)
        for role, ids in batch.covariates.items():
            assert ids.shape == (3,)
            np.testing.assert_array_equal(data.covariates[role][rows], np.broadcast_to(ids[:, None], rows.shape))
            wanted = np.zeros_like(ids) if role == "perturbation" else ids
            np.testing.assert_array_equal(data.covariates[role][controls], np.broadcast_to(wanted[:, None], rows.shape))
        assert (batch.covariates["perturbation"] > 0).all()
        for set_rows, mask in zip(rows, batch.mask, strict=True):
            assert len(set(set_rows[mask])) == mask.sum()  # true cells differ, filler repeats
        seen |= set(controls.ravel())
    assert len(seen) > 20


def test_an_epoch_deals_every_cell_once():
    groups = [np.arange(0, 21), np.arange(21, 25), np.arange(25, 41)]
    sampling = CellSetSampling(n_sets=1, n_cells=8)
    sets_at = cell_set_rows(groups, sampling, seed=3)
    dealt = []
    for epoch in range(2):
        sets = [sets_at(6 * epoch + i) for i in range(6)]  # 3 + 1 + 2 sets
        rows, mask = np.concatenate([s.rows for s in sets]), np.concatenate([s.mask for s in sets])
        np.testing.assert_array_equal(np.sort(rows[mask]), np.arange(41))
        group = np.concatenate([s.group for s in sets])
        assert np.bincount(group).tolist() == [3, 1, 2]
        for some, of in zip(rows, group, strict=True):
            assert set(some) <= set(groups[of])
        dealt.append((rows, group))
    assert not np.array_equal(dealt[0][0], dealt[1][0])
    again = cell_set_rows(groups, sampling, seed=3)
    np.testing.assert_array_equal(again(8).rows[0], dealt[1][0][2])  # without the steps before it


def test_the_incomplete_last_step_of_an_epoch_is_left_out():
    groups = [np.arange(40)]
    sets_at = cell_set_rows(groups, CellSetSampling(n_sets=2, n_cells=8), seed=0)  # five sets, two steps
    for epoch in range(3):
        rows = np.concatenate([sets_at(2 * epoch + i).rows for i in range(2)])
        assert len(set(rows.ravel())) == 32


def test_uniform_sampling_does_not_know_the_size_of_a_group():
    groups = [np.arange(1000), np.arange(1000, 1003)]
    sampling = CellSetSampling(n_sets=1, n_cells=5, order="uniform")
    sets_at = cell_set_rows(groups, sampling, seed=0)
    sets = [sets_at(step) for step in range(400)]
    small = np.array([s.group[0] for s in sets]) == 1
    assert abs(small.mean() - 0.5) < 4 * 0.5 / np.sqrt(400)
    for s in sets:
        if s.group[0] == 1:
            assert set(s.rows[0]) == {1000, 1001, 1002}
            assert s.mask[0].tolist() == [True, True, True, False, False]
            assert set(s.rows[0, :3]) == {1000, 1001, 1002}
        else:
            assert len(set(s.rows[0])) == 5
            assert s.mask.all()


def test_sets_in_order_hold_every_cell_once():
    groups = [np.array([5, 7, 9, 11, 13]), np.array([0, 1])]
    sets = sets_in_order(groups, 2, seed=0)
    assert sets.rows[sets.mask].tolist() == [5, 7, 9, 11, 13, 0, 1]
    assert sets.group.tolist() == [0, 0, 0, 1]
    assert sets.rows[2, 1] in groups[0]


def test_covariates_left_out_of_the_groups_are_given_for_each_cell(data):
    sampling = CellSetSampling(n_sets=2, n_cells=16, group_by=("perturbation",))
    batch = make_cell_set_batches(data, sampling, seed=0)(0)
    rows, controls = rows_in(batch.cells), rows_in(batch.control)
    assert batch.covariates["perturbation"].shape == (2,)
    for role in ("cell_type", "batch"):
        ids = batch.covariates[role]
        assert ids.shape == (2, 16)
        np.testing.assert_array_equal(ids, data.covariates[role][rows])
        np.testing.assert_array_equal(ids, data.covariates[role][controls])
        assert len(np.unique(ids)) == 2


def test_control_cells_as_sets_are_not_their_own_controls(data):
    sampling = CellSetSampling(n_sets=4, n_cells=8, include_control=True)
    batch_at = make_cell_set_batches(data, sampling, seed=0)
    n_control = 0
    for step in range(12):
        batch = batch_at(step)
        rows, controls = rows_in(batch.cells), rows_in(batch.control)
        for i in np.flatnonzero(batch.covariates["perturbation"] == 0):
            n_control += 1
            assert data.is_control[rows[i]].all()
            assert (rows[i] != controls[i]).all()
            for role in ("cell_type", "batch"):
                assert (data.covariates[role][rows[i]] == batch.covariates[role][i]).all()
                assert (data.covariates[role][controls[i]] == batch.covariates[role][i]).all()
    assert n_control > 5


def test_all_other_controls_are_drawn_alike(data):
    cell = int(np.flatnonzero(data.is_control)[0])
    (pool,) = data.pools.pool(cell)
    assert cell in pool
    n = 4000
    drawn = data.pools.draw(np.random.default_rng(0), np.full(n, cell))
    others, counts = np.unique(drawn, return_counts=True)
    assert set(others) == set(pool) - {cell}
    expected = n / (len(pool) - 1)
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


def test_a_lone_control_is_its_own():
    adata = make(60)
    keep = (adata.obs["drug"] != "ctrl").to_numpy()
    lone = np.flatnonzero(~keep)[:1]
    spec = DataSpec(space="lognormalised", perturbation="drug")
    one = prepare_cell_sets(adata[np.sort(np.r_[np.flatnonzero(keep), lone])].copy(), spec, HoldOutNone(), STEPS)
    cell = np.flatnonzero(one.is_control)
    np.testing.assert_array_equal(one.pools.draw(np.random.default_rng(0), np.repeat(cell, 3)), np.repeat(cell, 3))


def without_controls(adata, **values):
    gone = adata.obs["drug"] == "ctrl"
    for key, value in values.items():
        gone &= adata.obs[key] == value
    return adata[~gone.to_numpy()].copy()


def test_controls_of_the_same_batch_stand_in_and_are_counted():
    adata = without_controls(make(), type="T cell", donor="d1")
    n = int(((adata.obs["type"] == "T cell") & (adata.obs["donor"] == "d1")).sum())
    with pytest.warns(UserWarning, match=f"{n} of .* no control of their own type and donor .*'T cell | d1'.* for {n}"):
        data = prepare_cell_sets(adata, SPEC, HoldOutNone(), STEPS)
    assert data.unmatched == {"same batch": n}
    cell = int(data.rows_of(Population(("A",), "T cell | d1"))[0])
    (pool,) = data.pools.pool(cell)
    np.testing.assert_array_equal(pool, data.rows_of(Population((), "B cell | d1")))


def test_then_controls_of_the_same_type_each_batch_as_likely():
    adata = make(600, donors=("d1", "d2", "d3"))
    adata = without_controls(adata, donor="d1")
    few = np.flatnonzero((adata.obs["drug"] == "ctrl") & (adata.obs["donor"] == "d2") & (adata.obs["type"] == "T cell"))
    adata = adata[np.setdiff1d(np.arange(adata.n_obs), few[2:])].copy()  # two cells in d2, many in d3
    with pytest.warns(UserWarning, match="the same cell type in other batches"):
        data = prepare_cell_sets(adata, SPEC, HoldOutNone(), STEPS)
    assert set(data.unmatched) == {"same cell type"}
    cell = int(data.rows_of(Population(("A",), "T cell | d1"))[0])
    drawn = data.pools.draw(np.random.default_rng(0), np.full(1000, cell))
    assert (data.covariates["cell_type"][drawn] == data.names.cell_type.index("T cell")).all()
    share = (data.covariates["batch"][drawn] == data.names.batch.index("d2")).mean()
    assert abs(share - 0.5) < 4 * 0.5 / np.sqrt(1000)


def test_strict_matching_and_cells_without_any_control():
    adata = without_controls(make(), type="T cell", donor="d1")
    with pytest.raises(ValueError, match=r"no control of their own type and donor .* unmatched='fallback'"):
        prepare_cell_sets(adata, SPEC, HoldOutNone(), STEPS, unmatched="error")
    adata = make(donors=("d1", "d2", "d3"))
    only = adata.obs["donor"].isin(["d1"]) & (adata.obs["type"] == "T cell")
    adata.obs.loc[only & (adata.obs["drug"] == "ctrl"), "drug"] = "A"
    adata.obs.loc[only, "type"] = "rare"
    adata.obs.loc[only, "donor"] = "d9"
    with pytest.raises(ValueError, match="there is none of the same batch or cell type"):
        prepare_cell_sets(adata, SPEC, HoldOutNone(), STEPS)


def test_statistics_and_training_see_training_cells_only():
    rule = HoldOutCrossed(covariates=("donor",), values=(("d1",),), conditions=("A",), validation_conditions=("B",))
    adata = make(genes=tuple(f"g{i}" for i in range(12)))
    held_out = (adata.obs["donor"] == "d1") & adata.obs["drug"].isin(["A", "B"])
    adata.X[held_out.to_numpy(), -1] = 15.0 * (np.arange(held_out.sum()) % 2)  # varies most, in held-out cells
    adata.X[~held_out.to_numpy(), -1] = 0.0
    data = prepare_cell_sets(
        adata, SPEC, rule, Preprocess(library_size=None, log1p=False, scale=False, n_components=None, n_top_genes=6)
    )
    assert "g11" not in data.transform.feature_names
    targets = data.target_rows()
    assert not held_out.to_numpy()[targets].any()
    np.testing.assert_array_equal(
        np.sort(data.target_rows(data.split.test)), np.flatnonzero(held_out & (adata.obs["drug"] == "A"))
    )
    np.testing.assert_array_equal(
        np.sort(data.target_rows(data.split.validation)), np.flatnonzero(held_out & (adata.obs["drug"] == "B"))
    )


@pytest.mark.parametrize("rule", [LeaveOut(covariate="donor", value="d1"), HoldOutConditions(conditions=("A",))])
def test_divided_controls_belong_to_one_part(rule):
    data = prepare_cell_sets(make(1200), SPEC, rule, STEPS, control_seed=0)
    parts = {part: data.part_rows(part) for part in ("train", "validation", "test")}
    together = np.concatenate(list(parts.values()))
    assert len(together) == len(set(together)) == 1200
    assert data.is_control[parts["test"]].sum() > 10
    batch_at = make_cell_set_batches(data, CellSetSampling(n_sets=2, n_cells=16), seed=0, populations=data.split.test)
    for step in range(3):
        assert set(rows_in(batch_at(step).control, 1200).ravel()) <= set(parts["test"])
    train = make_cell_set_batches(data, CellSetSampling(n_sets=2, n_cells=16, include_control=True), seed=0)
    for step in range(6):
        batch = train(step)
        assert set(rows_in(batch.control, 1200).ravel()) <= set(parts["train"])
        assert set(rows_in(batch.cells, 1200).ravel()) <= set(parts["train"])


def test_a_context_that_is_held_out_takes_its_controls_along():
    data = prepare_cell_sets(make(), SPEC, HoldOutContexts(covariates=("donor",), values=(("d1",),)), STEPS)
    d1 = np.flatnonzero(data.covariates["batch"] == 0)
    np.testing.assert_array_equal(np.sort(data.part_rows("test")), d1)
    np.testing.assert_array_equal(
        np.sort(np.concatenate([data.part_rows("train"), data.part_rows("test")])), np.arange(240)
    )
    controls = rows_in(
        make_cell_set_batches(data, CellSetSampling(n_sets=2, n_cells=8), 0, populations=data.split.test)(0).control
    )
    assert set(controls.ravel()) <= set(d1[data.is_control[d1]])


def test_cells_without_perturbations():
    adata = make()
    data = prepare_cell_sets(adata, UNPERTURBED, HoldOutContexts(covariates=("donor",), values=(("d2",),)), STEPS)
    assert data.pools is None
    assert not data.is_control.any()
    assert (data.covariates["perturbation"] == 0).all()
    with pytest.raises(ValueError, match=r"controls='matched', but .* Set controls='zeros', .*control_dropout=1"):
        make_cell_set_batches(data, CellSetSampling(n_sets=1, n_cells=4), 0)
    sampling = CellSetSampling(n_sets=2, n_cells=8, controls="zeros", group_by=("cell_type",))
    batch = make_cell_set_batches(data, sampling, 0)(0)
    assert not batch.control.any()
    rows = rows_in(batch.cells)
    assert (data.covariates["batch"][rows] == 0).all()
    assert batch.covariates["cell_type"].shape == (2,)
    assert batch.covariates["batch"].shape == (2,)  # one donor is left: constant in every group


def test_doses_have_ranks_and_the_control_none():
    adata = make()
    adata.obs["dose"] = np.where(adata.obs["drug"] == "A", 10.0, np.where(np.arange(240) % 2, 0.5, 2.0))
    spec = DataSpec(space="lognormalised", perturbation="drug", dose="dose")
    data = prepare_cell_sets(adata, spec, HoldOutNone(), STEPS)
    assert data.names.dose == (0.0, 0.5, 2.0, 10.0)
    assert data.names.perturbation == ("control", "A@10", "B@0.5", "B@2")
    want = np.where(adata.obs["drug"] == "ctrl", 0.0, adata.obs["dose"])
    np.testing.assert_array_equal(np.array(data.names.dose)[data.covariates["dose"]], want)
    assert data.ids_of(Population(("B@2",))) == {"perturbation": 3, "dose": 2}
    batch = make_cell_set_batches(data, CellSetSampling(n_sets=2, n_cells=4), 0)(0)
    assert batch.covariates["dose"].shape == (2,)
    with pytest.raises(ValueError, match="several doses"):
        data.names.dose_rank(Population(("A@10", "B@2")))


def test_vectors_follow_the_names():
    adata = make()
    adata.obs["drug"] = np.where(np.arange(240) % 5 == 0, "A+B", adata.obs["drug"].astype(str))
    adata.uns["drugs"] = pd.DataFrame({"a": [1.0, 3.0], "b": [5.0, 7.0]}, index=["A", "B"])
    adata.uns["types"] = {"T cell": [1.0, 2.0, 3.0], "B cell": [4.0, 5.0, 6.0], "NK": [0.0, 0.0, 0.0]}
    spec = DataSpec(
        space="lognormalised", perturbation="drug", cell_type="type", vectors="drugs", cell_type_vectors="types"
    )
    data = prepare_cell_sets(adata, spec, HoldOutNone(), STEPS)
    assert data.names.perturbation == ("control", "A", "A+B", "B")
    np.testing.assert_array_equal(data.vectors, np.array([[2, 6], [1, 5], [2, 6], [3, 7]], np.float32))
    np.testing.assert_array_equal(data.cell_type_vectors, np.array([[4, 5, 6], [1, 2, 3]], np.float32))
    assert (data.sizes["n_perturbation_features"], data.sizes["n_cell_type_features"]) == (2, 3)
    added = prepare_cell_sets(adata, replace(spec, pooling="sum"), HoldOutNone(), STEPS)
    np.testing.assert_array_equal(added.vectors[2], [4, 12])
    del adata.uns["types"]["T cell"]
    with pytest.raises(ValueError, match=r"cell_type_vectors: adata.uns\['types'\] has none for 1 cell types"):
        prepare_cell_sets(adata, spec, HoldOutNone(), STEPS)


def two_sources():
    return [
        ("one", make(120, 1, ("g0", "g1", "g2"))),
        ("two", make(80, 2, ("g3", "g2", "g0"))),
    ]


def test_several_sources_keep_apart():
    named = two_sources()
    data = prepare_cell_sets(named, SPEC, HoldOutNone(), STEPS, absent="zero")
    assert data.transform.feature_names == ("g0", "g1", "g2", "g3")
    assert data.names.sources == ("one", "two")
    assert data.names.batch == ("one_d1", "one_d2", "two_d1", "two_d2")
    np.testing.assert_array_equal(data.source, np.repeat([0, 1], [120, 80]))
    np.testing.assert_array_equal(data.measured, [[True, True, True, False], [True, False, True, True]])
    np.testing.assert_array_equal(data.x[120:], named[1][1][:, ["g0", "g2", "g2", "g3"]].X * [1, 0, 1, 1])
    sampling = CellSetSampling(n_sets=3, n_cells=8, group_by=("perturbation",), order="uniform")
    batch_at = make_cell_set_batches(data, sampling, 0)
    seen = set()
    for step in range(5):
        batch = batch_at(step)
        seen |= set(batch.space.tolist())
        np.testing.assert_array_equal(batch.measured, data.measured[batch.space])
        for cells, control, measured in zip(batch.cells, batch.control, batch.measured, strict=True):
            assert not cells[:, ~measured].any()
            assert not control[:, ~measured].any()
            assert (control[:, measured] > 0).any(axis=0).all()
    assert seen == {0, 1}


def test_a_source_of_controls_alone():
    """An atlas beside a screen: its cells are sets too, where controls are."""
    named = two_sources()
    named[1][1].obs["drug"] = "ctrl"
    data = prepare_cell_sets(named, SPEC, HoldOutNone(), STEPS, absent="intersection")
    assert data.measured.all()
    sampling = CellSetSampling(n_sets=2, n_cells=8, include_control=True)
    batch_at = make_cell_set_batches(data, sampling, 0)
    seen = {int(s) for step in range(8) for s in batch_at(step).space}
    assert seen == {0, 1}


def test_control_cells_for_predictions_are_those_of_training():
    named = two_sources()
    data = prepare_cell_sets(named, SPEC, HoldOutNone(), STEPS, absent="zero")
    found = read_control_cells(named[1][1], SPEC, data.transform, data.names, source="two", measured=data.measured[1])
    assert set(found) == {p.context for p in data.populations if p.context.split(" | ")[1].startswith("two_")}
    for context, cells in found.items():
        np.testing.assert_array_equal(cells.x, data.controls(context))
        assert cells.covariates == {}
    lacking = named[1][1][:, ["g0", "g3"]].copy()
    with pytest.raises(ValueError, match="lacks 1 of the 3 genes that 'two' had in training: g2"):
        read_control_cells(lacking, SPEC, data.transform, data.names, source="two", measured=data.measured[1])
    with pytest.raises(ValueError, match="sources 'three' is not among the 2"):
        read_control_cells(named[0][1], SPEC, data.transform, data.names, source="three")


def test_control_cells_bring_what_the_context_does_not_tell():
    spec = DataSpec(space="lognormalised", perturbation="drug", cell_type="type", batch="donor", covariates=("type",))
    adata = make()
    data = prepare_cell_sets(adata, spec, HoldOutNone(), STEPS)
    found = read_control_cells(adata, spec, data.transform, data.names, ["T cell"])
    (cells,) = found.values()
    rows = data.rows_of(Population((), "T cell"))
    np.testing.assert_array_equal(cells.x, data.x[rows])
    np.testing.assert_array_equal(cells.names, adata.obs_names[rows])
    np.testing.assert_array_equal(cells.covariates["batch"], data.covariates["batch"][rows])
    assert set(cells.covariates) == {"batch"}
    with pytest.raises(ValueError, match="'NK' has none"):
        read_control_cells(adata, spec, data.transform, data.names, ["NK"])
    adata.obs["donor"] = "d9"
    with pytest.raises(ValueError, match="batch 'd9' is not among"):
        read_control_cells(adata, spec, data.transform, data.names)


@pytest.mark.parametrize("controls", ["matched", "zeros"])
def test_of_a_batch_a_host_reads_its_cells_alone(data, controls):
    batch_at = make_cell_set_batches(data, CellSetSampling(n_sets=4, n_cells=6, controls=controls), seed=1)
    whole, part = batch_at(2), batch_at(2, lambda shape: (slice(1, 3), slice(0, 6), slice(0, shape[2])))
    for one, other in ((part.cells, whole.cells), (part.control, whole.control)):
        np.testing.assert_array_equal(one[1:3], other[1:3])
        assert not one[[0, 3]].any()
    for role, ids in whole.covariates.items():
        np.testing.assert_array_equal(part.covariates[role], ids)
    np.testing.assert_array_equal(part.mask, whole.mask)


def bad_sampling(**fields):
    return lambda data: CellSetSampling(**fields)


def batches(populations=None, **fields):
    return lambda data: make_cell_set_batches(data, CellSetSampling(**fields), 0, populations)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (bad_sampling(n_sets=0), "n_sets must be at least 1"),
        (bad_sampling(n_cells=0), "n_cells must be at least 1"),
        (bad_sampling(group_by=("batch", "batch")), "group_by must name each covariate once"),
        (batches(n_sets=99, n_cells=16), "n_sets must be at most .*order='uniform'"),
        (batches((Population((), "T cell | d1"),)), r"must hold cells .* but controls \(sampling.include_control"),
        (batches((Population(("A",), "T cell | d7"),)), "population must be one of the data"),
    ],
)
def test_bad_input(data, call, message):
    with pytest.raises(ValueError, match=message):
        call(data)


@pytest.mark.parametrize(
    ("spec", "steps", "options", "message"),
    [
        (SPEC, Preprocess(library_size=None, log1p=False), {}, "cell set models work on the expression"),
        (SPEC, STEPS, {"control_seed": -1}, "control_seed must be at least 0"),
        (DataSpec(space="lognormalised", time="day"), STEPS, {}, "makes a time series"),
        (DataSpec(space="lognormalised", perturbation="drug", batch="plate"), STEPS, {}, "batch names a column"),
    ],
)
def test_bad_preparation(spec, steps, options, message):
    with pytest.raises(ValueError, match=message):
        prepare_cell_sets(make(), spec, HoldOutNone(), steps, **options)


def test_a_covariate_that_the_data_lack_makes_no_groups():
    data = prepare_cell_sets(make(), DataSpec(space="lognormalised", perturbation="drug"), HoldOutNone(), STEPS)
    with pytest.raises(ValueError, match="group_by names 'batch', but the DataSpec names no obs column"):
        make_cell_set_batches(data, CellSetSampling(n_sets=1, n_cells=4, group_by=("batch",)), 0)
