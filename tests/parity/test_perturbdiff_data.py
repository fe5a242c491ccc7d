"""PerturbDiff's splits, cell sets and control pools against the recorded numbers of the PyTorch code: exactly equal.

The other kinds of files are read elsewhere.
"""

import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
from goldens import cases, load, or_absent, require

from scjax.data.cellsets import prepare_cell_sets
from scjax.data.preprocess import Preprocess
from scjax.data.sampling import sets_in_order
from scjax.data.spec import DataSpec
from scjax.data.splits import HoldOutContexts, HoldOutCrossed

CASES = cases("perturbdiff", ("datasets",))["datasets"]
STEPS = Preprocess(library_size=None, log1p=False, scale=False, n_components=None)
PARTS = ("train", "validation", "test")
SEED = 42  # of the code's generators


@pytest.fixture(autouse=True)
def _at_hand():
    require("perturbdiff")


@pytest.fixture(params=or_absent("perturbdiff", "datasets", CASES))
def golden(request):
    return load("perturbdiff", request.param)


def table(golden):
    """The toy table as an AnnData; its expression does not matter."""
    obs = {role: golden[f"{role}_categories"][golden[f"{role}_codes"]] for role in ("pert", "batch", "cell_type")}
    names = [f"c{i}" for i in range(len(obs["pert"]))]
    x = np.random.default_rng(0).random((len(names), 3), np.float32)
    return anndata.AnnData(X=x, obs=pd.DataFrame(obs, index=names).astype("category"))


def spec(golden, **roles):
    return DataSpec(
        space="lognormalised",
        cell_type="cell_type",
        batch="batch",
        covariates=("cell_type", "batch"),
        **roles,
    )


def perturbed(golden):
    return spec(golden, perturbation="pert", control=str(golden["control"]))


def strings(array):
    return tuple(map(str, array))


def crossed(golden, covariate, values):
    return HoldOutCrossed(
        covariates=(covariate,),
        values=tuple((value,) for value in strings(values)),
        conditions=strings(golden["holdout_pert_test"]),
        validation_conditions=strings(golden["holdout_pert_validation"]),
    )


def prepared(golden, rule, **options):
    with warnings.catch_warnings():  # few controls, divided, may leave a context none
        warnings.filterwarnings("ignore", "[0-9]+ of [0-9]+ perturbed cells have no control of their own")
        return prepare_cell_sets(table(golden), perturbed(golden), rule, STEPS, **options)


@pytest.mark.parametrize("split_control", [False, True])
@pytest.mark.parametrize(
    ("name", "covariate", "key"),
    [("pbmc", "batch", "holdout_batches_pbmc"), ("tahoe", "cell_type", "holdout_celltype_tahoe")],
)
def test_conditions_crossed_with_contexts(golden, name, covariate, key, split_control):
    rule = crossed(golden, covariate, golden[key])
    seed = SEED if split_control else None
    data = prepared(golden, rule, control_seed=seed)
    for part in PARTS:
        np.testing.assert_array_equal(data.part_rows(part), golden[f"{name}/split_control_{split_control}/{part}"])


def test_whole_batches_without_perturbations(golden):
    """The recording keeps one of the batches for validation and one for the test."""
    adata = table(golden)
    held_out = {part: set(adata.obs["batch"].iloc[golden[f"cellxgene/{part}"]]) for part in PARTS[1:]}
    rule = HoldOutContexts(
        covariates=("batch",),
        values=tuple((value,) for value in sorted(held_out["test"])),
        validation_values=tuple((value,) for value in sorted(held_out["validation"])),
    )
    data = prepare_cell_sets(adata, spec(golden), rule, STEPS)
    assert data.pools is None
    for part in PARTS:
        np.testing.assert_array_equal(data.part_rows(part), golden[f"cellxgene/{part}"])


def test_sets_in_order(golden):
    rule = crossed(golden, "batch", golden["holdout_batches_pbmc"])
    data = prepared(golden, rule)
    groups = data.groups(data.target_rows())
    np.testing.assert_array_equal([len(rows) for rows in groups], golden["sets/unpadded_group_sizes"])
    sets = sets_in_order(groups, int(golden["cell_set"]), seed=SEED)
    np.testing.assert_array_equal(sets.rows, golden["sets/cell_index"])
    np.testing.assert_array_equal(sets.mask, golden["sets/is_padding"] == 0)


def test_ids_and_control_pools(golden):
    rule = crossed(golden, "batch", golden["holdout_batches_pbmc"])
    data = prepared(golden, rule)
    for role in ("cell_type", "batch"):
        assert getattr(data.names, role) == strings(golden[f"{role}_categories"])
        np.testing.assert_array_equal(data.covariates[role], golden[f"{role}_codes"])
    control = strings(golden["pert_categories"]).index(str(golden["control"]))
    np.testing.assert_array_equal(data.is_control, golden["pert_codes"] == control)

    keys, sizes = golden["control_group_keys_celltype_batch"], golden["control_group_sizes"]
    pools = np.split(golden["control_cells_sorted_by_group"], np.cumsum(sizes)[:-1])
    context = np.stack([golden["cell_type_codes"], golden["batch_codes"]], axis=1)
    n_unmatched = 0
    for cell in np.flatnonzero(~data.is_control):
        group = np.flatnonzero((keys == context[cell]).all(axis=1))
        if not len(group):
            n_unmatched += 1
            continue
        (pool,) = data.pools.pool(int(cell))
        np.testing.assert_array_equal(pool, pools[int(group[0])])
    assert sum(data.unmatched.values()) == n_unmatched < (~data.is_control).sum()
