"""`DataSpec` and `DataSpec.check`: odd roles, odd tables, odd numbers."""

import anndata
import numpy as np
import pandas as pd
import pytest
from hypothesis import strategies as st
from malformed import fuzz, junk, malformed_trees, words
from scipy import sparse

from scjax.config import from_dict, to_dict
from scjax.data.spec import DataSpec

SERIES = DataSpec(space="counts", time="day", cell_type="kind")
SCREEN = DataSpec(
    space="counts", perturbation="drug", dose="dose", covariates=("line",), vectors="drugs", cell_type="kind",
    cell_type_vectors="kinds",
)  # fmt: skip
LATENT = DataSpec(space="latent", expression="obsm/pca", time="day")
SPECS = (SERIES, SCREEN, LATENT)


def whole():
    """Data that fit all three."""
    n = 12
    obs = pd.DataFrame(
        {
            "day": np.repeat([0.0, 1.0], n // 2),
            "kind": ["a", "b"] * (n // 2),
            "drug": (["ctrl"] * 2 + ["A"] * 2 + ["B"] * 2) * 2,
            "dose": 1.0,
            "line": ["one"] * (n // 2) + ["two"] * (n // 2),
        },
        index=[f"c{i}" for i in range(n)],
    )
    rng = np.random.default_rng(0)
    return anndata.AnnData(
        rng.poisson(3.0, (n, 5)).astype(np.float32) + 1,
        obs=obs,
        var=pd.DataFrame(index=[f"g{i}" for i in range(5)]),
        obsm={"pca": rng.normal(size=(n, 3))},
        uns={"drugs": {"A@1": [1.0, 2.0], "B@1": [2.0, 1.0]}, "kinds": {"a": [1.0], "b": [2.0]}},
    )


def test_what_is_right_passes():
    for spec in SPECS:
        spec.check(whole(), every_role=True)


TREES = [to_dict(spec) | {"control": list(spec.control_names), "covariates": list(spec.covariates)} for spec in SPECS]


@pytest.mark.parametrize("n", [60, pytest.param(400, marks=pytest.mark.slow)])
def test_specs(n):
    fuzz(n, malformed_trees(TREES, lambda tree, at: at == ("space",)), lambda tree: from_dict(DataSpec, tree))


# Columns that each spec reads, with values that it cannot read there.
ODD_COLUMNS = {
    SERIES: {
        "day": ["day 1", None, float("nan"), float("inf"), "", [1.0], {}, (1, 2), "1.5.2", pd.NaT, b"x", 1j],
        "kind": [None, float("nan")],
    },
    SCREEN: {
        "drug": [None, float("nan"), "", "+", "A+", "+A", "A+A", " ", "A++B", "control+"],
        "dose": [-1.0, float("nan"), float("inf"), "much", "", None, "1+2", [1.0], 1j],
        "line": [None, float("nan"), "one | two"],
    },
    LATENT: {"day": ["late", None, float("inf")]},
}


def change(adata, spec, how, value, row):
    """One thing wrong with what this spec looks at."""
    n, place = adata.n_obs, "obsm" if spec is LATENT else "X"
    matrix = np.array(adata.obsm["pca"] if spec is LATENT else adata.X, np.float64)

    def with_matrix(new):
        if place == "obsm":
            adata.obsm["pca"] = new
        else:
            adata.X = new
        return adata

    match how:
        case "column":
            column, odd = value
            values = adata.obs[column].to_list()
            values[3 if column == "dose" else row] = odd  # a control has no dose
            adata.obs[column] = pd.Series(values, index=adata.obs_names, dtype=object)
        case "no column":
            del adata.obs[value]
        case "number":
            matrix[row, 1] = value
            dense = sparse.csr_matrix(matrix) if row % 2 and place == "X" else matrix
            return with_matrix(dense)
        case "kind":
            return with_matrix(matrix.astype(value))
        case "cells":
            return adata[:value].copy()
        case "genes":
            adata = adata[:, :0].copy()
            if place == "obsm":
                adata.obsm["pca"] = np.zeros((n, 0))
        case "names":
            if place == "obsm":
                adata.obsm["pca"] = pd.DataFrame(matrix, index=adata.obs_names, columns=["a", "a", "b"])
            else:
                adata.var_names = ["g"] * adata.n_vars
        case "vectors":
            adata.uns["drugs" if row % 2 else "kinds"] = value
        case "no data":
            return value
    return adata


@st.composite
def odd_data(draw):
    spec = draw(st.sampled_from(SPECS))
    ways = ["column", "column", "number", "kind", "no column", "cells", "genes", "names", "no data"]
    how = draw(st.sampled_from([*ways, *(["vectors"] if spec is SCREEN else [])]))
    columns = ODD_COLUMNS[spec]
    numbers = st.sampled_from([np.nan, np.inf, -np.inf] + ([-1.0, 0.5, -1e300, 1e-9] if spec is not LATENT else []))
    no_vectors = words | st.integers() | st.lists(junk, max_size=2) | st.dictionaries(words, junk, max_size=2)
    odd_vectors = [{"A@1": [1.0], "B@1": [1.0, 2.0], "a": [1.0], "b": [1.0, 2.0]}, {"A@1": ["x"], "a": ["x"]}, None]
    values = {
        "column": st.sampled_from(sorted(columns)).flatmap(
            lambda name: st.tuples(st.just(name), st.sampled_from(columns[name]))
        ),
        "number": numbers,
        "kind": st.sampled_from(["complex128", "U8", "M8[s]", "m8[s]", "S4"]),
        "no column": st.sampled_from(sorted(columns)),
        "cells": st.integers(0, 1),
        "vectors": no_vectors | st.sampled_from(odd_vectors),
        "no data": st.sampled_from([None, [], {}, "cells.h5ad", 3, np.zeros((3, 3)), pd.DataFrame({"day": [0, 1]})]),
    }
    return spec, how, draw(values.get(how, st.none())), draw(st.integers(0, 11))


@pytest.mark.parametrize("n", [80, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")  # of anndata and pandas, about what is put into them here
def test_data(n):
    def check(case):
        spec, *what = case
        spec.check(change(whole(), spec, *what), every_role=True)

    fuzz(n, odd_data(), check)
