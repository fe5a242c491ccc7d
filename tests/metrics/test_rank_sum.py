"""Rank sums: equal to scipy's, exact in their counts, whatever the sizes, the ties and the batches."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse, stats

from scjax.metrics import rank_sum as module
from scjax.metrics.rank_sum import ordered, rank_sum, rank_sums


def scipy_of(x, y):
    with np.errstate(all="ignore"):
        found = stats.mannwhitneyu(x, y, method="asymptotic", axis=0)
    # scipy divides zero by zero where no cell differs from another: no evidence at all, p = 1
    return found.statistic, np.nan_to_num(found.pvalue, nan=1.0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 60), m=st.integers(1, 60), levels=st.integers(1, 6))
def test_equals_scipy(seed, n, m, levels):
    """With ties, with genes that do not vary, with no ties at all, with values below zero."""
    rng = np.random.default_rng(seed)
    x, y = (rng.integers(-1, levels, (k, 5)).astype(np.float64) for k in (n, m))
    x[:, 0], y[:, 0] = rng.normal(size=n), rng.normal(size=m)
    ours = rank_sum(x, y)
    statistic, p_value = scipy_of(x, y)
    np.testing.assert_array_equal(ours.statistic, statistic)
    np.testing.assert_allclose(ours.p_value, p_value, rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_many_populations_of_many_sizes(dtype, monkeypatch):
    """Several calls, stacks with empty places, several chunks of genes: the same as one by one, in their order."""
    monkeypatch.setattr(module, "ROWS", 200)
    rng = np.random.default_rng(0)
    sizes = [64, 1, 65, 3, 80, 64, 50, 64]
    rate = np.linspace(0.01, 3, 70)
    populations = [np.log1p(rng.poisson(rate, (n, 70))).astype(dtype) for n in sizes]
    control = np.log1p(rng.poisson(rate, (100, 70))).astype(dtype)
    found = rank_sums(populations, control)
    for row, x in enumerate(populations):
        statistic, p_value = scipy_of(x.astype(np.float64), control.astype(np.float64))
        np.testing.assert_array_equal(found.statistic[row], statistic)
        np.testing.assert_allclose(found.p_value[row], p_value, rtol=1e-12)
    off = found.statistic - np.array(sizes)[:, None] * 50
    np.testing.assert_array_equal(np.sign(found.z), np.where(np.abs(off) > 0.5, np.sign(off), 0))
    np.testing.assert_allclose(np.minimum(2 * stats.norm.sf(np.abs(found.z)), 1), found.p_value, rtol=1e-12)


def test_counts_beyond_32_bits_and_single_precision():
    """All cells tied but a few: t^3 - t needs 40 bits, and a tie fewer must be seen; p-values down to 1e-300."""
    x, y = np.zeros((300, 3), np.float32), np.zeros((9_000, 3), np.float32)
    x[:7, 1], y[:11, 1] = 1, 1
    x[:, 2], y[:, 2] = 2 + np.arange(300) % 7, np.arange(9_000) / 9_000
    ours = rank_sum(x, y)
    statistic, p_value = scipy_of(x.astype(np.float64), y.astype(np.float64))
    np.testing.assert_array_equal(ours.statistic, statistic)
    np.testing.assert_allclose(ours.p_value, p_value, rtol=1e-9)
    assert ours.p_value[0] == 1
    assert ours.p_value[2] < 1e-180
    assert ordered(y).ties[0] == 9_000**3 - 9_000


def test_z_does_not_end_where_p_does():
    """Beyond |z| = 38 the p-value is 0 in double precision, and z still grows."""
    y = np.arange(3_000, dtype=np.float32)[:, None]
    found = rank_sums([y + 2_500, y + 3_000], y)
    assert (found.p_value == 0).all()
    assert 38 < found.z[0, 0] < found.z[1, 0]


def test_sparse_cells_are_the_same():
    rng = np.random.default_rng(0)
    x, y = (rng.poisson(0.3, (n, 5)).astype(np.float32) for n in (20, 30))
    for form in (sparse.csr_array, sparse.csc_matrix):
        for ours, theirs in zip(rank_sum(form(x), form(y)), rank_sum(x, y), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_cells_and_genes_have_no_order():
    """Also with -0.0, which is 0."""
    rng = np.random.default_rng(0)
    x, y = (np.where((v := rng.integers(-2, 3, (n, 6)).astype(np.float32)) == 0, -0.0, v) for n in (40, 50))
    genes = rng.permutation(6)
    moved = rank_sum(np.abs(rng.permutation(x))[:, genes], np.abs(rng.permutation(y))[:, genes])
    for ours, theirs in zip(moved, rank_sum(np.abs(x), np.abs(y)), strict=True):
        np.testing.assert_array_equal(ours, theirs[genes])
    swapped = rank_sum(y, x)
    np.testing.assert_allclose(swapped.z, -rank_sum(x, y).z)
    np.testing.assert_array_equal(rank_sum(x, np.where(y == 0, 0.0, y)).p_value, rank_sum(x, y).p_value)


def test_one_program_for_sizes_that_are_alike():
    """Nothing global is changed, and populations of other numbers of cells need no other program."""
    rng = np.random.default_rng(0)
    control = ordered(rng.normal(size=(90, 4)).astype(np.float32))
    rank_sum(rng.normal(size=(30, 4)).astype(np.float32), control)
    before = module._against._cache_size()
    for n in (1, 17, 64):
        rank_sum(rng.normal(size=(n, 4)).astype(np.float32), control)
    assert module._against._cache_size() == before
    assert not jax.config.jax_enable_x64


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: rank_sums([], x), "the number of populations must be at least 1"),
        (lambda x: rank_sums([x, x[:0]], x), r"cells of populations\[1\] must be at least 1"),
        (lambda x: rank_sum(x, x[:0]), "cells of control must be at least 1"),
        (lambda x: rank_sum(x[:, :2], x), r"populations\[0\] must have the 3 genes of the control; got 2"),
        (lambda x: rank_sum(x[0], x), r"must be \[cells, genes\]; got the shape \(3,\)"),
        (lambda x: rank_sum(x * np.nan, x), r"populations\[0\] must hold finite numbers"),
        (lambda x: rank_sum(x, x * np.inf), "control must hold finite numbers"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message), np.errstate(invalid="ignore"):
        call(np.ones((4, 3)))


def test_too_many_cells_for_exact_ties(monkeypatch):
    monkeypatch.setattr(module, "MOST_CELLS", 7)
    with pytest.raises(ValueError, match=r"must have 7 cells at most.* got 8\. Draw fewer"):
        rank_sum(np.ones((4, 3)), np.ones((4, 3)))
