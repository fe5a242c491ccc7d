"""Transforms, against formulas, scanpy's choice of genes and their own inverse; the order of genes does not matter."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from scjax.data.preprocess import Preprocess, Transform, fit, most_variable, preprocess_for

GENES = tuple(f"g{i}" for i in range(12))
ON_ALL = Preprocess(n_top_genes=3, n_components=2, select_on="all")
PLAIN = Preprocess(library_size=None, log1p=False, scale=False, n_components=None)


def counts(n=30, genes=12, seed=0):
    rng = np.random.default_rng(seed)
    return rng.poisson(rng.gamma(2.0, np.geomspace(0.5, 20, genes) / 2, (n, genes))).astype(np.float32) + np.eye(
        n, genes, dtype=np.float32
    )


def test_each_step_is_its_formula():
    x = counts()
    transform = fit(Preprocess(target_sum=100.0, n_components=4), x, GENES, "counts")
    x = x.astype(np.float64)
    logged = np.log1p(100 * x / x.sum(1, keepdims=True))
    scaled = (logged - logged.mean(0)) / logged.std(0)  # population standard deviation
    np.testing.assert_allclose(transform.normalise(counts(), GENES), logged, rtol=1e-12)
    np.testing.assert_allclose(transform.mean, logged.mean(0))
    np.testing.assert_allclose(transform.std, logged.std(0))
    variances, vectors = np.linalg.eigh(np.cov(scaled.T))
    np.testing.assert_allclose(transform.explained_variance, variances[::-1][:4])
    np.testing.assert_allclose(np.abs(transform.components), np.abs(vectors[:, ::-1][:, :4].T), atol=1e-9)
    z = transform.apply(counts(), GENES, np.float64)
    np.testing.assert_allclose(z, scaled @ transform.components.T, atol=1e-12)
    assert transform.apply(counts(), GENES).dtype == np.float32
    assert (transform.n_dims, transform.feature_names) == (4, GENES)


def test_signs_of_components_are_fixed():
    components = fit(Preprocess(n_components=5), counts(), GENES, "counts").components
    assert (components[np.arange(5), np.abs(components).argmax(1)] > 0).all()


def test_totals_over_all_genes_or_over_the_kept_ones():
    x = counts(60)
    all_genes = fit(Preprocess(n_top_genes=5, n_components=None, scale=False), x, GENES, "counts")
    selected = fit(
        Preprocess(library_size="selected_genes", n_top_genes=5, n_components=None, scale=False), x, GENES, "counts"
    )
    assert all_genes.feature_names == selected.feature_names
    kept = [GENES.index(name) for name in selected.feature_names]
    np.testing.assert_allclose(np.expm1(selected.normalise(x, GENES)).sum(1), 1e4)
    np.testing.assert_allclose(np.expm1(all_genes.normalise(x, GENES)).sum(1), 1e4 * x[:, kept].sum(1) / x.sum(1))
    assert all_genes.input_names == GENES
    np.testing.assert_array_equal(selected.apply(x[:, kept], selected.feature_names), selected.apply(x, GENES))


def test_the_variable_genes_are_those_of_scanpy():
    """Expected: scanpy 1.12.4, normalize_total(1e4), log1p, highly_variable_genes(n_top_genes=11), on these counts."""
    rng = np.random.default_rng(7)
    x = rng.poisson(rng.gamma(2.0, np.geomspace(0.2, 30, 60) / 2, size=(80, 60))).astype(float)
    x[:, 5] = 0
    assert x.sum() == 28890
    names = [f"g{i}" for i in range(60)]
    expected = tuple(f"g{i}" for i in (1, 8, 12, 19, 21, 26, 39, 48, 51, 55, 58))
    steps = Preprocess(n_top_genes=11, n_components=None)
    assert fit(steps, x, names, "counts").feature_names == expected
    assert fit(steps, sparse.csr_matrix(x), names, "counts").feature_names == expected
    logged = np.log1p(1e4 * x / x.sum(1, keepdims=True))
    steps = Preprocess(library_size=None, log1p=False, n_top_genes=11, n_components=None)
    assert fit(steps, logged, names, "lognormalised").feature_names == expected


def test_variable_genes_by_hand():
    """Three genes of one level: the log dispersions 0, 1, 5 have mean 2; a gene alone in its bin scores 1."""
    mean = np.array([10.0, 10.0, 10.0, 1000.0, 0.0])
    variance = mean * np.exp([5.0, 0.0, 1.0, 7.0, 0.0])
    assert most_variable(mean, variance, 1).tolist() == [0]  # (5 - 2) / 2.65 = 1.13
    assert most_variable(mean, variance, 2).tolist() == [0, 3]
    assert most_variable(mean, variance, 4).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix])
def test_sparse_and_dense_agree(form):
    steps = Preprocess(n_top_genes=8, n_components=3)
    dense = fit(steps, counts(), GENES, "counts")
    other = fit(steps, form(counts()), GENES, "counts")
    np.testing.assert_array_equal(other.apply(form(counts()), GENES), dense.apply(counts(), GENES))


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(12)), st.permutations(range(30)))
def test_the_order_of_genes_and_of_cells_does_not_matter(genes, cells):
    transform = fit(Preprocess(n_top_genes=6, n_components=3), counts(), GENES, "counts")
    genes, cells = list(genes), list(cells)
    z = transform.apply(counts()[cells][:, genes], [GENES[i] for i in genes])
    np.testing.assert_allclose(z, transform.apply(counts(), GENES)[cells], rtol=1e-5, atol=1e-5)


def test_the_median_total_is_that_of_the_fitted_cells():
    x = counts(31)
    x[3] = 0  # an empty cell has no say
    steps = Preprocess(target_sum="median", n_top_genes=5, n_components=None, scale=False)
    totals = x.sum(1, dtype=np.float64)
    median = np.median(totals[totals > 0])
    transform = fit(steps, x, GENES, "counts")
    assert transform.target_sum == median
    fixed = fit(replace(steps, target_sum=float(median)), x, GENES, "counts")
    assert fixed.feature_names == transform.feature_names
    other = 3 * counts(20, seed=1)  # other cells are brought to the same total
    np.testing.assert_array_equal(transform.apply(other, GENES), fixed.apply(other, GENES))
    np.testing.assert_array_equal(
        fit(steps, sparse.csr_matrix(x), GENES, "counts").apply(other, GENES), transform.apply(other, GENES)
    )
    selected = fit(replace(steps, library_size="selected_genes"), x, GENES, "counts")
    kept = x[:, [GENES.index(name) for name in selected.feature_names]].sum(1)
    assert selected.target_sum == np.median(kept[kept > 0])
    assert fit(PLAIN, counts(), GENES, "counts").target_sum is None


def test_forced_genes_are_kept_besides_the_variable_ones():
    steps = Preprocess(n_top_genes=4, n_components=None)
    chosen = set(fit(steps, counts(), GENES, "counts").feature_names)
    others = [g for g in GENES if g not in chosen]
    transform = fit(steps, counts(), GENES, "counts", {others[2], *sorted(chosen)[:1], others[0]})
    assert transform.feature_names == tuple(g for g in GENES if g in {*chosen, others[0], others[2]})
    everything = replace(steps, n_top_genes=None)
    assert fit(everything, counts(), GENES, "counts", GENES[:2]).feature_names == GENES
    selected = fit(replace(steps, library_size="selected_genes"), counts(), GENES, "counts", others)
    np.testing.assert_allclose(np.expm1(selected.normalise(counts(), GENES)).sum(1), 1e4)  # forced ones count


def test_genes_chosen_on_all_cells_but_scaled_on_training_cells():
    train, everything = counts(40), np.concatenate([counts(40), 30 * counts(40, seed=5)[:, ::-1]])
    steps = Preprocess(target_sum="median", n_top_genes=4, n_components=None, select_on="all")
    transform = fit(steps, train, GENES, "counts", x_all=everything)
    on_all = fit(replace(steps, select_on="train"), everything, GENES, "counts")
    assert (transform.feature_names, transform.target_sum) == (on_all.feature_names, on_all.target_sum)
    on_train = fit(replace(steps, select_on="train"), train, GENES, "counts")
    assert on_train.feature_names != transform.feature_names
    assert on_train.target_sum != transform.target_sum
    np.testing.assert_allclose(transform.mean, transform.normalise(train, GENES).mean(0))


def test_extra_genes_are_ignored_and_missing_ones_named():
    transform = fit(Preprocess(n_components=3), counts(), GENES, "counts")
    wide = np.concatenate([np.full((30, 1), 9, np.float32), counts()], axis=1)
    np.testing.assert_array_equal(transform.apply(wide, ("other", *GENES)), transform.apply(counts(), GENES))
    with pytest.raises(ValueError, match="1 of the 12 genes of the fit are missing: g3"):
        transform.apply(counts(), ["x" if g == "g3" else g for g in GENES])


@pytest.mark.parametrize("scale", [True, False])
def test_inverse_of_a_full_basis_is_exact_and_of_a_part_is_the_nearest(scale):
    x = counts()
    full = fit(Preprocess(n_components=12, scale=scale), x, GENES, "counts")
    logged = full.normalise(x, GENES)
    back = full.inverse(full.apply(x, GENES, np.float64), np.float64)
    np.testing.assert_allclose(back, logged, atol=1e-10)
    part = fit(Preprocess(n_components=4, scale=scale), x, GENES, "counts")
    z = part.apply(x, GENES, np.float64)
    error = (part.inverse(z, np.float64) - logged) / part.std
    np.testing.assert_allclose(error @ part.components.T, 0, atol=1e-10)  # what is lost is orthogonal to what is kept
    assert part.inverse(z).dtype == np.float32


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("n_components", [None, 4])
def test_one_number_for_all_dimensions(scale, n_components):
    """Variance 1 on average, the same shape as without, and the way back is still the way back."""
    x, steps = counts(), Preprocess(scale=scale, n_components=n_components)
    plain = fit(steps, x, GENES, "counts")
    one = fit(replace(steps, unit_variance=True), x, GENES, "counts")
    z, whole = (t.apply(x, GENES, np.float64) for t in (one, plain))
    np.testing.assert_allclose(z.var(axis=0).mean(), 1.0)
    centred = whole - whole.mean(axis=0)
    np.testing.assert_allclose(z * np.sqrt(centred.var(axis=0).mean()), centred, atol=1e-10)
    np.testing.assert_allclose(one.inverse(z, np.float64), plain.inverse(whole, np.float64), atol=1e-10)
    if n_components is not None:
        np.testing.assert_allclose(one.explained_variance, z.var(axis=0, ddof=1))
    twice = Transform.from_tree(*one.to_tree())
    np.testing.assert_array_equal(twice.apply(x, GENES, np.float64), z)


def test_a_latent_of_unit_variance():
    """Another unit, another origin: the same cells."""
    x = np.random.default_rng(0).normal(size=(20, 3)) * (1.0, 2.0, 0.5)
    steps = replace(preprocess_for("latent"), unit_variance=True)
    names = ("a", "b", "c")
    z = fit(steps, x, names, "latent").apply(x, names, np.float64)
    moved = fit(steps, 7 * x + 3, names, "latent").apply(7 * x + 3, names, np.float64)
    np.testing.assert_allclose(moved, z, atol=1e-10)
    with pytest.raises(ValueError, match="unit_variance=True needs training cells that differ"):
        fit(steps, np.ones((4, 3)), names, "latent")


def test_velocities_are_mapped_by_the_linear_part():
    transform = fit(Preprocess(n_components=4), counts(), GENES, "counts")
    rng = np.random.default_rng(0)
    z, v = rng.normal(size=(2, 5, 4))
    h = transform.inverse(z + v, np.float64) - transform.inverse(z, np.float64)
    np.testing.assert_allclose(transform.inverse_velocity(v, np.float64), h, atol=1e-12)
    np.testing.assert_allclose(transform.inverse_velocity(v[None]), h[None], atol=1e-5)  # leading axes pass through
    with pytest.raises(ValueError, match=r"4 dims; got shape \(5, 3\)"):
        transform.inverse(z[:, :3])


@pytest.mark.parametrize(
    ("space", "steps"),
    [
        ("counts", Preprocess(n_top_genes=7, n_components=3)),
        ("counts", Preprocess(target_sum="median", n_top_genes=7, n_components=3)),
        ("lognormalised", preprocess_for("lognormalised", 3)),
        ("latent", preprocess_for("latent")),
    ],
)
def test_tree_round_trip_is_exact(space, steps):
    transform = fit(steps, counts(), GENES, space)
    arrays, rest = transform.to_tree()
    again = Transform.from_tree(arrays, json.loads(json.dumps(rest)))
    np.testing.assert_array_equal(again.apply(counts(), GENES), transform.apply(counts(), GENES))
    for name in ("mean", "std", "components", "explained_variance"):
        np.testing.assert_array_equal(getattr(again, name), getattr(transform, name))
    for name in ("preprocess", "space", "input_names", "feature_names", "n_dims", "target_sum"):
        assert getattr(again, name) == getattr(transform, name)


def test_a_latent_passes_through_bit_for_bit():
    x = np.random.default_rng(3).normal(size=(9, 4)).astype(np.float32)
    transform = fit(preprocess_for("latent"), x, GENES[:4], "latent")
    np.testing.assert_array_equal(transform.apply(x, GENES[:4]), x)
    np.testing.assert_array_equal(transform.inverse(x), x)


def test_a_constant_gene_is_not_divided_by_zero():
    x = counts()
    x[:, 4] = 0
    transform = fit(Preprocess(n_components=None), x, GENES, "counts")
    assert transform.std[4] == 1
    np.testing.assert_array_equal(transform.apply(x, GENES)[:, 4], 0)


@pytest.mark.parametrize("n_components", [4, 12])
def test_solvers_for_many_genes_find_the_same_components(monkeypatch, n_components):
    few = fit(Preprocess(n_components=n_components), counts(), GENES, "counts")
    monkeypatch.setattr("scjax.data.preprocess._EIGH", 5)
    many = fit(Preprocess(n_components=n_components), counts(), GENES, "counts")
    np.testing.assert_allclose(many.components, few.components, atol=1e-9)
    np.testing.assert_allclose(many.explained_variance, few.explained_variance, rtol=1e-9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fit(Preprocess(), counts(), GENES, "counts"), "n_components must be at most 12, .* got 50"),
        (lambda: fit(Preprocess(n_top_genes=13), counts(), GENES, "counts"), "n_top_genes must be at most the 12"),
        (
            lambda: fit(Preprocess(), counts(), GENES, "lognormalised"),
            "library_size='all_genes', log1p=True, which is for counts; .* set library_size=None, log1p=False",
        ),
        (
            lambda: fit(Preprocess(library_size=None, log1p=False, n_top_genes=3), counts(), GENES, "latent"),
            "n_top_genes=3, .* set n_top_genes=None",
        ),
        (lambda: fit(PLAIN, counts(), GENES[:-1], "counts"), r"one of the 11 names a column; its shape is \(30, 12\)"),
        (lambda: fit(PLAIN, counts(), ("g0", *GENES[:-1]), "counts"), "must be unique; 'g0' occurs 2 times"),
        (lambda: fit(PLAIN, counts()[:1], GENES, "counts"), "training cells must be at least 2"),
        (lambda: fit(PLAIN, counts() * np.nan, GENES, "counts"), "x_train must hold finite numbers"),
        (lambda: Preprocess(target_sum=0.0), "target_sum must be a positive"),
        (lambda: fit(Preprocess(target_sum="median"), counts() * 0, GENES, "counts"), "all of them are empty"),
        (
            lambda: fit(Preprocess(n_components=2), counts(), GENES, "counts", ("g1", "g1l")),
            "forced must name genes of the data; 1 are not: g1l. Did you mean 'g11'|'g1'",
        ),
        (lambda: fit(ON_ALL, counts(), GENES, "counts"), "select_on='all' needs x_all"),
        (lambda: fit(ON_ALL, counts(), GENES, "counts", x_all=counts()[:, 1:]), r"its shape is \(30, 11\)"),
        (lambda: fit(ON_ALL, counts(), GENES, "counts", x_all=counts() * np.nan), "x_all must hold finite"),
        (lambda: fit(ON_ALL, counts(), GENES, "counts", x_all=-counts()), "x_all must hold counts"),
        (lambda: Preprocess(n_components=0), "n_components must be at least 1"),
        (lambda: Preprocess(n_top_genes=0), "n_top_genes must be at least 1"),
        (lambda: fit(PLAIN, counts(), GENES, "counts").apply(counts()[:0], GENES), r"shape is \(0, 12\)"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
