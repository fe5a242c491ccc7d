"""What `DataSpec.check` finds, and that it finds all of it at once."""

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scjax.config import from_dict, to_dict
from scjax.data.source import CellSource, open_source
from scjax.data.spec import DataSpec, feature_names

COUNTS = DataSpec(space="counts", time="day")
LOGGED = DataSpec(space="lognormalised", time="day")


def cells(x=None, **obs):
    x = np.random.default_rng(0).poisson(3.0, (8, 5)).astype(np.float32) + 1 if x is None else np.asarray(x)
    obs = pd.DataFrame({"day": [0.0] * 4 + [2.0] * 4, **obs}, index=[f"c{i}" for i in range(len(x))])
    return anndata.AnnData(x, obs=obs, var=pd.DataFrame(index=[f"g{j}" for j in range(x.shape[1])]))


def with_value(value, at=(5, 2), dtype=np.float64):
    x = np.full((8, 5), 3, dtype)
    x[at] = value
    return x


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array])
def test_good_data_pass_and_read_alike_in_every_form(form):
    adata = cells()
    dense = adata.X.copy()
    adata.X = form(dense)
    COUNTS.check(adata)
    source = open_source(adata, COUNTS)
    assert isinstance(source, CellSource)
    assert (source.n_cells, source.feature_names) == (8, ("g0", "g1", "g2", "g3", "g4"))
    rows = source.rows(np.array([6, 1, 6]))
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, dense[[6, 1, 6]])


@pytest.mark.parametrize(
    ("spec", "adata", "message"),
    [
        (DataSpec(space="counts", time="dya"), cells(), r"time names a column of adata.obs; 'dya' .* mean 'day'"),
        (
            DataSpec(space="counts", time="day", cell_type="kindd"),
            cells(kind="a"),
            r"cell_type names .* 'kindd' .* Did you mean 'kind'",
        ),
        (COUNTS, cells(day=[0.0, np.nan, np.nan, 0, 2, 2, 2, 2]), r"2 of 8 cells have no value .* the first is 'c1'"),
        (COUNTS, cells(day=["day 0"] * 4 + ["day 4"] * 4), r"not numbers \(day 0, day 4\).* Provide numbers .*'day 0'"),
        (COUNTS, cells(day=pd.Categorical(["early"] * 4 + ["late"] * 4)), r"not numbers \(early, late\)"),
        (COUNTS, cells(day=pd.to_datetime(["2020-01-01"] * 8)), r"not numbers \(2020-01-01"),
        (COUNTS, cells(day=[0.0] * 4 + [np.inf] * 4), r"4 cells have an infinite time"),
        (COUNTS, cells(day=3.0), r"at least two times .* has 1 \(all at 3.0\)"),
        (COUNTS, cells(day=[0.0] * 7 + [2.0]), r"each time needs at least 2 cells; 2.0 .* has one"),
        (COUNTS, cells(with_value(np.nan)), r"1 values that are NaN or infinite, the first is nan"),
        (LOGGED, cells(with_value(np.inf)), r"1 values that are NaN or infinite, the first is inf"),
        (COUNTS, cells(with_value(-2.0)), r"1 negative values, the least is -2; counts are not negative"),
        (LOGGED, cells(with_value(-0.5)), r"1 negative values, .* space='latent'"),
        (
            COUNTS,
            cells(with_value(1.5)),
            r"not integers, such as 1.5 .* look log-normalised: set space='lognormalised'",
        ),
        (COUNTS, cells(with_value(1.5) * 99), r"not integers, .* round estimated counts"),
        (LOGGED, cells(with_value(400.0)), r"goes up to 400, .* look like counts: set space='counts'"),
        (LOGGED, cells(with_value(400.5)), r"goes up to 400.5, .* apply log1p"),
        (COUNTS, cells(with_value(0.0, at=slice(6, 7))), r"zero in every gene for 1 cells \('c6'\)"),
        (
            DataSpec(expression="layers/conuts", space="counts", time="day"),
            cells(),
            r"a key of adata.layers; 'conuts' is not one",
        ),
        (DataSpec(expression="obsm/X_pca", space="latent", time="day"), cells(), r"adata.obsm; .* It has: none"),
    ],
)
def test_each_problem_is_named_with_its_mend(spec, adata, message):
    with pytest.raises(ValueError, match=message):
        spec.check(adata)


def test_a_missing_layer_gets_a_suggestion():
    adata = cells()
    adata.layers["counts"] = adata.X
    with pytest.raises(ValueError, match="Did you mean 'counts'"):
        DataSpec(expression="layers/conuts", space="counts", time="day").check(adata)


def test_sparse_values_are_looked_at_too():
    adata = cells(with_value(-1.0))
    x = adata.X.copy()
    x[3] = 0
    adata.X = sparse.csr_matrix(x)
    with pytest.raises(ValueError, match=r"1 negative values(.|\n)*zero in every gene for 1 cells \('c3'\)"):
        COUNTS.check(adata)


def test_duplicate_gene_names():
    good, names = cells(), pd.DataFrame(index=["a", "b", "a", "c", "d"])
    with pytest.warns(UserWarning, match="not unique"):
        adata = anndata.AnnData(good.X, obs=good.obs, var=names)
    with pytest.raises(ValueError, match=r"1 names occur more than once \(a\)"):
        COUNTS.check(adata)


def test_all_problems_come_in_one_message():
    x = with_value(-1.5)
    x[0] = 0
    adata = cells(x, day=[0.0] * 7 + [2.0])
    with pytest.raises(ValueError, match="5 problems") as caught:
        DataSpec(space="counts", time="day", cell_type="kind").check(adata)
    for words in ("at least 2 cells", "cell_type names", "negative", "not integers", "zero in every gene"):
        assert words in str(caught.value)


def test_missing_x():
    adata = anndata.AnnData(obs=pd.DataFrame({"day": [0.0, 0, 1, 1]}, index=list("abcd")))
    with pytest.raises(ValueError, match="adata.X is None"):
        COUNTS.check(adata)


def test_a_latent_may_be_negative_and_its_coordinates_get_names():
    adata = cells()
    adata.obsm["X_pca"] = np.random.default_rng(1).normal(size=(8, 3))
    spec = DataSpec(expression="obsm/X_pca", space="latent", time="day")
    spec.check(adata)
    assert feature_names(adata, spec) == ("X_pca_0", "X_pca_1", "X_pca_2")
    table = pd.DataFrame(adata.obsm["X_pca"], index=adata.obs_names, columns=["a", "b", "c"])
    adata.obsm["X_pca"] = table
    spec.check(adata)
    source = open_source(adata, spec)
    assert source.feature_names == ("a", "b", "c")
    np.testing.assert_array_equal(source.rows(np.array([2])), table.to_numpy(np.float32)[[2]])


@pytest.mark.parametrize("days", [["0"] * 4 + ["2.5"] * 4, pd.Categorical([0] * 4 + [2] * 4), [0] * 4 + [2] * 4])
def test_numbers_are_read_from_any_column_of_numbers(days):
    adata = cells(day=days)
    COUNTS.check(adata)
    np.testing.assert_array_equal(COUNTS.read_times(adata)[[0, 7]], [0.0, float(days[7])])


def test_the_spec_itself_is_checked_and_survives_json():
    with pytest.raises(ValueError, match="space must be one of .* Did you mean 'counts'"):
        from_dict(DataSpec, {"space": "count", "time": "day"})
    with pytest.raises(ValueError, match="expression must be 'X'"):
        DataSpec(expression="layer/counts", space="counts", time="day")
    assert from_dict(DataSpec, to_dict(COUNTS)) == COUNTS
