"""Batches of controls and perturbed cells: training populations only, one context each, a function of (seed, n)."""

from dataclasses import replace

import anndata
import jax
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scjax.data.collate import make_paired_batches, optimal_pairs
from scjax.data.device import prefetch
from scjax.data.graph import GraphRule
from scjax.data.perturbation import prepare_perturbation
from scjax.data.preprocess import Preprocess
from scjax.data.sampling import PairedSampling, paired_rows
from scjax.data.spec import DataSpec
from scjax.data.splits import HoldOutConditions
from scjax.types import Population

SPEC = DataSpec(space="lognormalised", perturbation="condition", covariates=("line",), vectors="vectors")
STEPS = Preprocess(library_size=None, log1p=False, scale=False, n_components=None)
RULE = HoldOutConditions(conditions=("A+B",), validation_fraction=0.4)
SIZES = {"ctrl": 9, "A": 7, "B": 3, "A+B": 5, "g1": 6, "g2": 4}
SMALL = PairedSampling(n_populations=2, n_cells=5, n_genes=4)


@pytest.fixture(scope="module")
def data():
    """Each value tells its cell and gene: row i of x is i + gene / 100."""
    condition = np.tile(np.repeat(list(SIZES), list(SIZES.values())), 2)
    n = len(condition)
    line = np.repeat(["x", "y"], n // 2)
    order = np.random.default_rng(3).permutation(n)
    x = (0.1 + np.arange(n)[:, None] * 0.2 + np.arange(6) / 100).astype(np.float32)
    obs = pd.DataFrame({"condition": condition[order], "line": line[order]}, index=[f"c{i}" for i in range(n)])
    vectors = {name: np.ones(3) for name in ("A", "B", "g1", "g2")}
    var = pd.DataFrame(index=[f"g{5 - i}" for i in range(6)])
    adata = anndata.AnnData(x, obs=obs, var=var, uns={"vectors": vectors})
    return prepare_perturbation(adata, SPEC, RULE, STEPS, GraphRule(n_neighbours=2))


def cells_and_genes(values):
    """Which row and which column of `data.x` each value is."""
    hundredths = np.rint(np.asarray(values, np.float64) * 100).astype(int) - 10
    return hundredths // 20, hundredths % 20


def populations_of(data, ids):
    of_ids = {}
    for p in data.populations:
        of_ids.setdefault(tuple(data.vocabulary.encode([p.perturbation], "table", data.n_slots)[0]), set()).add(p)
    return of_ids[tuple(ids)]


@pytest.mark.parametrize("coupling", ["independent", "ot"])
@pytest.mark.parametrize("n_populations", [1, 3])
def test_cells_are_of_training_populations_and_controls_of_their_context(data, coupling, n_populations):
    assert len(data.split.validation) > 0
    sampling = replace(SMALL, coupling=coupling, n_populations=n_populations)
    batch_at = make_paired_batches(data, sampling, seed=0, kind="table")
    tokens = data.vocabulary.gene_tokens(data.transform.feature_names)
    kept_out = np.concatenate([data.rows_of(p) for p in (*data.split.validation, *data.split.test)])
    drawn = set()
    for step in range(60):
        batch = batch_at(step)
        assert batch.source.shape == batch.target.shape == (n_populations, 5, 4)
        assert batch.source.dtype == batch.target.dtype == np.float32
        for source, target, ids in zip(batch.source, batch.target, batch.perturbation, strict=True):
            (x0, genes), (x1, same_genes) = cells_and_genes(source), cells_and_genes(target)
            assert (tokens[genes] == batch.genes).all()
            assert (genes == same_genes).all()
            assert (x0 == x0[:, :1]).all()  # whole cells
            found = [p for p in populations_of(data, ids) if set(x1[:, 0]) <= set(data.rows_of(p))]
            assert len(found) == 1
            assert found[0] in data.split.train
            assert not found[0].is_control
            assert set(x0[:, 0]) <= set(data.rows_of(Population((), found[0].context)))
            assert not set(kept_out) & {*x0[:, 0], *x1[:, 0]}
            drawn.add(found[0])
    assert drawn == {p for p in data.split.train if not p.is_control}


def test_validation_populations_can_be_asked_for(data):
    batch = make_paired_batches(data, SMALL, seed=0, populations=data.split.validation)(0)
    rows = np.concatenate([data.rows_of(p) for p in data.split.validation])
    assert set(cells_and_genes(batch.target)[0].ravel()) <= set(rows)


def test_controls_are_targets_only_if_asked_for(data):
    sampling = replace(SMALL, include_control=True, n_cells=20)
    batch_at = make_paired_batches(data, sampling, seed=0, kind="table")
    control = data.vocabulary.perturbations.index("control")
    found = [(batch_at(step), i) for step in range(20) for i in range(2)]
    found = [(b.source[i], b.target[i]) for b, i in found if (b.perturbation[i] == control).all()]
    assert found
    for source, target in found:
        rows = {line: set(data.rows_of(Population((), line))) for line in "xy"}
        x0, x1 = (set(cells_and_genes(x)[0].ravel()) for x in (source, target))
        assert any({*x0, *x1} <= rows[line] for line in "xy")
        assert not np.array_equal(source, target)  # drawn independently


@pytest.mark.parametrize("sampling", [SMALL, replace(SMALL, coupling="ot", include_control=True, n_genes=None)])
def test_a_batch_does_not_depend_on_what_was_asked_before(data, sampling):
    one, other = (make_paired_batches(data, sampling, seed=7) for _ in range(2))
    later = [other(step) for step in (5, 0, 3)]
    for step, batch in zip((5, 0, 3), later, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one(step), batch)
    assert not np.array_equal(one(5).target, make_paired_batches(data, sampling, seed=8)(5).target)
    stacked = next(prefetch(one, 3, 6, chunk=3))
    jax.tree.map(lambda s, x: np.testing.assert_array_equal(s[2], x), stacked, other(5))


def test_gene_subsets_are_fresh_and_uniform(data):
    rows, n_steps = (np.arange(3),), 3000
    drawn = [paired_rows(rows, rows, 6, replace(SMALL, n_genes=2), seed=0, step=n).genes for n in range(n_steps)]
    assert all(len(set(genes)) == 2 for genes in drawn)
    first = np.bincount([genes[0] for genes in drawn], minlength=6) / n_steps
    assert np.abs(first - 1 / 6).max() < 4.5 * np.sqrt(5 / 36 / n_steps)  # binomial standard errors
    batch = make_paired_batches(data, replace(SMALL, n_genes=None), seed=0)(0)
    assert batch.genes.tolist() == data.vocabulary.gene_tokens(data.transform.feature_names).tolist()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 1000))
def test_populations_repeat_only_where_they_must(n_known, n_drawn, step):
    rows = tuple(np.arange(10 * i, 10 * i + 3) for i in range(n_known))
    found = paired_rows(rows, rows, 6, PairedSampling(n_populations=n_drawn, n_genes=3), seed=1, step=step)
    assert len(found.populations) == n_drawn
    assert len(set(found.populations)) == n_drawn or n_drawn > n_known
    for p, x0, x1 in zip(found.populations, found.source, found.target, strict=True):
        assert {*x0, *x1} <= set(rows[p])


def test_populations_are_drawn_equally_often_whatever_their_size():
    rows, n_steps = (np.arange(100), np.arange(2), np.arange(5)), 3000
    sampling = PairedSampling(n_cells=2, n_genes=None)
    drawn = [paired_rows(rows, rows, 1, sampling, seed=0, step=n).populations[0] for n in range(n_steps)]
    share = np.bincount(drawn, minlength=3) / n_steps
    assert np.abs(share - 1 / 3).max() < 4.5 * np.sqrt(2 / 9 / n_steps)


def test_transport_finds_a_shuffled_copy():
    rng = np.random.default_rng(0)
    x1 = rng.normal(size=(12, 4)).astype(np.float32)
    x0 = x1[rng.permutation(12)]
    np.testing.assert_array_equal(x0[optimal_pairs(x0, x1)], x1)


def test_transport_is_the_best_of_all_orders():
    from itertools import permutations

    rng = np.random.default_rng(1)
    x0, x1 = rng.normal(size=(2, 5, 3)).astype(np.float32)
    costs = {order: ((x0[list(order)] - x1) ** 2).sum() for order in permutations(range(5))}
    assert tuple(optimal_pairs(x0, x1)) == min(costs, key=costs.get)


def test_transport_changes_the_order_of_the_controls_and_nothing_else(data):
    sampling = replace(SMALL, n_populations=3)
    plain = make_paired_batches(data, sampling, seed=0)(4)
    paired = make_paired_batches(data, replace(sampling, coupling="ot"), seed=0)(4)
    np.testing.assert_array_equal(plain.target, paired.target)
    np.testing.assert_array_equal(plain.genes, paired.genes)
    for before, after, target in zip(plain.source, paired.source, paired.target, strict=True):
        assert sorted(map(bytes, before)) == sorted(map(bytes, after))  # never across populations
        assert ((after - target) ** 2).sum() <= ((before - target) ** 2).sum()
    assert not np.array_equal(plain.source, paired.source)


def test_ids_are_of_the_kind_asked_for(data):
    batches = {kind: make_paired_batches(data, SMALL, seed=0, kind=kind)(0) for kind in ("gene", "table", "vector")}
    names = np.array(data.vocabulary.perturbations)[batches["table"].perturbation]
    np.testing.assert_array_equal(np.array(data.vocabulary.tokens)[batches["gene"].perturbation], names)
    np.testing.assert_array_equal(batches["vector"].perturbation, batches["table"].perturbation)
    assert len(data.vectors) == data.vocabulary.n_perturbations


def test_bad_input(data):
    with pytest.raises(ValueError, match="n_genes must be at most the 6 genes of the data; got 1000. None takes all"):
        make_paired_batches(data, PairedSampling(), seed=0)
    with pytest.raises(ValueError, match="populations must hold at least one to draw from; got control"):
        make_paired_batches(data, SMALL, seed=0, populations=(Population((), "x"),))
    with pytest.raises(ValueError, match="n_cells must be at least 2"):
        PairedSampling(n_cells=1)
    with pytest.raises(ValueError, match="n_populations must be at least 1"):
        PairedSampling(n_populations=0)
    with pytest.raises(ValueError, match="seed must be at least 0"):
        make_paired_batches(data, SMALL, seed=-1)
    with pytest.raises(ValueError, match="the data have no external vectors"):
        make_paired_batches(replace(data, vectors=None), SMALL, seed=0, kind="vector")


@pytest.mark.parametrize("coupling", ["independent", "ot"])
def test_of_a_batch_a_host_reads_its_cells_alone(data, coupling):
    """What is paired by transport is a matter of all cells."""
    batch_at = make_paired_batches(data, replace(SMALL, coupling=coupling), 0)
    whole, part = batch_at(3), batch_at(3, lambda shape: (slice(1, 2), slice(0, 3), slice(0, shape[2])))
    for one, other in ((part.source, whole.source), (part.target, whole.target)):
        wanted = other.copy()
        if coupling == "independent":
            wanted[0], wanted[:, 3:] = 0, 0
        np.testing.assert_array_equal(one, wanted)
    np.testing.assert_array_equal(part.perturbation, whole.perturbation)
    np.testing.assert_array_equal(part.genes, whole.genes)
