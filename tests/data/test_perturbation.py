"""Perturbation data under a split: nothing of a held-out population reaches what is fitted, and every cell is found."""

from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scjax.data.graph import GraphRule
from scjax.data.perturbation import prepare_perturbation, unseen_axis
from scjax.data.preprocess import Preprocess
from scjax.data.spec import DataSpec
from scjax.data.splits import HoldOutConditions, HoldOutGenes, HoldOutNone, HoldOutPopulations, PerturbationSplit
from scjax.types import Population

SPEC = DataSpec(space="counts", perturbation="condition", covariates=("line",))
STEPS = Preprocess(scale=False, n_components=None, n_top_genes=8)
GRAPH = GraphRule(n_neighbours=3)
HELD_OUT = HoldOutConditions(conditions=("g1+g0",))
CONDITIONS = ("ctrl", "g0+ctrl", "ctrl+g1", "g1+g0", "drug")
N_GENES = 14


def make_adata(seed=0):
    """Counts of 14 genes of which g0 and g1 hardly vary, in two lines; cells in random order."""
    rng = np.random.default_rng(seed)
    both = rng.permutation(80)
    condition, line = np.repeat(CONDITIONS, 16)[both], np.tile(np.repeat(["x", "y"], 8), 5)[both]
    x = rng.poisson(rng.gamma(1.0, 6.0, (80, N_GENES)))
    x[:, :2] = 20
    obs = pd.DataFrame({"condition": condition, "line": line}, index=[f"c{i}" for i in range(80)])
    return anndata.AnnData(x.astype(np.int32), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(N_GENES)]))


@pytest.fixture(scope="module")
def adata():
    return make_adata()


@pytest.fixture(scope="module")
def data(adata):
    return prepare_perturbation(adata, SPEC, HELD_OUT, STEPS, GRAPH)


def rows_of(adata, condition, line):
    return np.flatnonzero((adata.obs["condition"] == condition) & (adata.obs["line"] == line))


def test_every_cell_is_in_its_population(adata, data):
    assert len(data.populations) == 10
    np.testing.assert_array_equal(np.sort(np.concatenate(data.rows)), np.arange(80))
    for condition, parts in zip(CONDITIONS, ((), ("g0",), ("g1",), ("g0", "g1"), ("drug",)), strict=True):
        for line in "xy":
            np.testing.assert_array_equal(data.rows_of(Population(parts, line)), rows_of(adata, condition, line))
    np.testing.assert_array_equal(data.controls("y"), data.x[rows_of(adata, "ctrl", "y")])
    np.testing.assert_array_equal(data.x, data.transform.apply(adata.X, adata.var_names))
    assert data.n_slots == 2
    assert data.split.test == (Population(("g0", "g1"), "x"), Population(("g0", "g1"), "y"))
    with pytest.raises(ValueError, match=r"population must be one of the data; 'g0 \(z\)' is not. Did you mean 'g0 "):
        data.rows_of(Population(("g0",), "z"))


def test_perturbed_genes_are_kept_though_they_do_not_vary(adata, data):
    assert {"g0", "g1"} <= set(data.transform.feature_names)
    chosen = prepare_perturbation(adata, SPEC, HELD_OUT, STEPS, GRAPH, force_perturbed=False)
    assert chosen.n_genes == 8
    assert {"g0", "g1"}.isdisjoint(chosen.transform.feature_names)
    assert data.n_genes == 10


def test_names_have_ids_and_unmeasured_ones_only_themselves_for_a_neighbour(data):
    assert data.vocabulary.perturbations == ("control", "drug", "g0", "g1")
    token = data.vocabulary.tokens.index("drug")
    assert data.graph.shape[0] == data.vocabulary.n_tokens == 4 + 10 + 1
    assert set(data.graph[token]) <= {token, -1}
    assert all(token in row for token, row in enumerate(data.graph))


def test_held_out_cells_touch_nothing_that_is_fitted(adata, data):
    changed = adata.copy()
    held_out = (adata.obs["condition"] == "g1+g0").to_numpy()
    changed.X[held_out] = changed.X[held_out][:, ::-1] * 7 + 1
    other = prepare_perturbation(changed, SPEC, HELD_OUT, STEPS, GRAPH)
    assert other.transform.feature_names == data.transform.feature_names
    np.testing.assert_array_equal(other.graph, data.graph)
    np.testing.assert_array_equal(other.x[~held_out], data.x[~held_out])
    assert np.abs(other.x[held_out] - data.x[held_out]).max() > 0.1
    seen = prepare_perturbation(changed, SPEC, HoldOutNone(), STEPS, GRAPH)
    assert seen.transform.feature_names != data.transform.feature_names
    assert not np.array_equal(seen.graph, data.graph)


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix])
@pytest.mark.parametrize("select_on", ["train", "all"])
def test_sparse_data_are_the_same(adata, form, select_on):
    steps = replace(STEPS, select_on=select_on)
    dense = prepare_perturbation(adata, SPEC, HELD_OUT, steps, GRAPH)
    other = adata.copy()
    other.X = form(adata.X)
    thin = prepare_perturbation(other, SPEC, HELD_OUT, steps, GRAPH)
    np.testing.assert_array_equal(thin.x, dense.x)
    np.testing.assert_array_equal(thin.graph, dense.graph)


def test_splits_see_the_spelling_of_the_data(adata):
    """The scDFM code finds singles written `X+control`, and not those written `control+X`."""
    rule = HoldOutGenes(n_doubles=1, follow="code", test_fraction=0.5)
    other = adata.copy()
    other.obs["condition"] = other.obs["condition"].replace({"drug": "drug+g9"})  # two doubles, one is drawn
    split = prepare_perturbation(other, SPEC, rule, STEPS, GRAPH).split
    assert {p.perturbation for p in split.test} == {("g0", "g1"), ("g0",)}
    other.obs["condition"] = other.obs["condition"].replace({"ctrl+g1": "g1+ctrl"})
    split = prepare_perturbation(other, SPEC, rule, STEPS, GRAPH).split
    assert {p.perturbation for p in split.test} == {("g0", "g1"), ("g0",), ("g1",)}


def test_vectors_lie_in_the_order_of_the_vocabulary(adata):
    other = adata.copy()
    other.uns["v"] = {"g1": [1.0, 2.0], "g0": [3.0, 4.0], "drug": [5.0, 6.0], "more": [7.0, 8.0]}
    spec = replace(SPEC, vectors="v")
    table = prepare_perturbation(other, spec, HELD_OUT, STEPS, GRAPH).vectors
    np.testing.assert_array_equal(table, np.array([[0, 0], [5, 6], [3, 4], [1, 2]], np.float32))
    assert table.dtype == np.float32
    other.uns["v"]["ctrl"] = [9.0, 9.0]
    table = prepare_perturbation(other, spec, HELD_OUT, STEPS, GRAPH).vectors
    np.testing.assert_array_equal(table[0], [9, 9])


def test_a_latent_needs_no_genes(adata):
    other = adata.copy()
    other.obsm["z"] = np.random.default_rng(0).normal(size=(80, 3)).astype(np.float32)
    spec = replace(SPEC, expression="obsm/z", space="latent")
    steps = Preprocess(library_size=None, log1p=False, scale=False, n_components=None)
    data = prepare_perturbation(other, spec, HELD_OUT, steps, GRAPH)
    np.testing.assert_array_equal(data.x, other.obsm["z"])
    assert data.vectors is None


def test_bad_input(adata):
    with pytest.raises(ValueError, match="scale=True, n_components=50, but .* set scale=False, n_components=None"):
        prepare_perturbation(adata, SPEC, HELD_OUT, Preprocess(), GRAPH)
    with pytest.raises(ValueError, match="Did you mean 'condition'"):
        prepare_perturbation(adata, replace(SPEC, perturbation="conditions"), HELD_OUT, STEPS, GRAPH)


@pytest.mark.parametrize(
    ("population", "axis"),
    [
        (Population(("A",), "x"), "nothing"),
        (Population((), "z"), "nothing"),
        (Population(("A",), "y"), "pair"),
        (Population(("A", "B"), "x"), "combination"),
        (Population(("C",), "x"), "combination"),  # never alone
        (Population(("D",), "x"), "perturbation"),
        (Population(("A", "D"), "y"), "perturbation"),
        (Population(("A",), "z"), "context"),
        (Population(("A", "B"), "z"), "combination and context"),
        (Population(("D",), "z"), "perturbation and context"),
    ],
)
def test_what_is_new_in_a_population(population, axis):
    perturbed = ((("A",), "x"), (("B",), "x"), (("B", "C"), "y"))
    train = tuple(Population(*p) for p in (*(((), line) for line in "xyz"), *perturbed))
    rule = HoldOutPopulations(populations=(("A", "y"),))
    split = PerturbationSplit(rule=rule, train=train, validation=(), test=(Population(("A",), "y"),))
    assert unseen_axis(population, split) == axis
