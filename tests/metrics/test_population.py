"""Distances between populations: closed forms, independent solvers, symmetries, and equal cell numbers."""

import functools
import math

import goldens
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from scjax.metrics.population import (
    ALL_POPULATION_METRICS,
    ENERGY_METRICS,
    POPULATION_METRICS,
    Metric,
    compare_populations,
    draw_cells,
    energy_distance,
    energy_distance_matrix,
    entropic_wasserstein,
    hausdorff,
    mmd2,
    mmd2_metric,
    sinkhorn,
    sinkhorn_metric,
    spread,
    transport_plan,
    variance_ratio,
    wasserstein1,
    wasserstein2,
    wasserstein_metric,
)

DISTANCES = {
    "W1": wasserstein1,
    "W2": wasserstein2,
    "sinkhorn": functools.partial(sinkhorn, blur=0.5),
    "energy_distance": energy_distance,
    "mmd2": mmd2,
}
GOLDENS = goldens.FOLDER / "scimf"
SHIFT = np.array([3.0, -4.0, 0.0])  # of length 5


@pytest.fixture(scope="module")
def clouds():
    rng = np.random.default_rng(0)
    return rng.normal(size=(40, 3)), rng.normal(size=(40, 3)) * 1.5 + 1


@pytest.mark.parametrize("distance", [wasserstein1, wasserstein2])
def test_translation_costs_its_length(distance, clouds):
    """No plan between a cloud and its translate is cheaper than the translation (Jensen)."""
    x, _ = clouds
    assert distance(x, x + SHIFT[None]) == pytest.approx(5, rel=1e-12)


def test_w2_of_gaussian_quantiles():
    """N(0, 1) to N(m, s^2) on the line: W2^2 = m^2 + (s - 1)^2, the plan being monotone."""
    from scipy.stats import norm

    q = norm.ppf((np.arange(300) + 0.5) / 300)[:, None]
    assert wasserstein2(q, 3 + 2 * q) == pytest.approx(math.sqrt(9 + 1), rel=2e-3)


@pytest.mark.parametrize(("distance", "power"), [(wasserstein1, 1), (wasserstein2, 2)])
def test_equal_numbers_are_an_assignment(distance, power, clouds):
    costs = cdist(*clouds) ** power
    best = costs[linear_sum_assignment(costs)].mean() ** (1 / power)
    assert distance(*clouds) == pytest.approx(best, rel=1e-10)


def test_unequal_numbers_are_equal_numbers_of_copies(clouds):
    """12 against 8 cells of uniform mass are 24 against 24 copies."""
    x, y = clouds[0][:12], clouds[1][:8]
    costs = cdist(np.repeat(x, 2, axis=0), np.repeat(y, 3, axis=0))
    assert wasserstein1(x, y) == pytest.approx(costs[linear_sum_assignment(costs)].mean(), rel=1e-10)


@pytest.mark.parametrize("path", sorted(GOLDENS.glob("sinkhorn_*.f64.npz")), ids=lambda p: p.name)
def test_recorded_distances(path):
    """W1 and W2 of the golden clouds, of unequal numbers and up to 50 dimensions."""
    inputs, recorded = np.load(path.with_name(path.name.replace(".f64", ""))), np.load(path)
    pairs = sorted({key.rsplit("/", 1)[0] for key in recorded.files if key.endswith("/W1")})
    assert len(pairs) == int(inputs["cfg/n_pairs"])
    for pair in pairs:
        x, y = inputs[f"{pair}/x"].astype(np.float64), inputs[f"{pair}/y"].astype(np.float64)
        assert wasserstein1(x, y) == pytest.approx(float(recorded[f"{pair}/W1"]), rel=1e-9, abs=1e-12)
        assert wasserstein2(x, y) ** 2 == pytest.approx(float(recorded[f"{pair}/W2_sq"]), rel=1e-9, abs=1e-12)


def test_weights_are_mass(clouds):
    """Whole weights are copies; weight zero is absence."""
    x, y = clouds[0][:10], clouds[1][:7]
    copies = np.array([2, 0, 1, 1, 3, 0, 1])
    assert wasserstein2(x, y, y_weights=copies.astype(float)) == pytest.approx(
        wasserstein2(x, np.repeat(y, copies, axis=0)), rel=1e-10
    )


def test_plan_moves_all_mass_at_least_cost(clouds):
    x, y = clouds[0][:30], clouds[1]
    plan = transport_plan(x, y)
    np.testing.assert_allclose(np.bincount(plan.source, plan.mass, len(x)), 1 / len(x), rtol=1e-9)
    np.testing.assert_allclose(np.bincount(plan.target, plan.mass, len(y)), 1 / len(y), rtol=1e-9)
    assert len(plan.mass) <= len(x) + len(y) - 1
    cost = (plan.mass * ((x[plan.source] - y[plan.target]) ** 2).sum(axis=1)).sum()
    assert cost**0.5 == pytest.approx(wasserstein2(x, y), rel=1e-10)


@pytest.mark.parametrize("name", ["W1", "W2", "sinkhorn", "energy_distance"])  # mmd2: the real cells set its kernels
def test_symmetric_and_without_order(name, clouds):
    distance, (x, y) = DISTANCES[name], clouds
    rng = np.random.default_rng(1)
    there = distance(x, y)
    assert distance(y, x) == pytest.approx(there, rel=1e-4)
    assert distance(rng.permutation(x), rng.permutation(y)) == pytest.approx(there, rel=1e-4)


@pytest.mark.parametrize("name", ["W1", "W2", "sinkhorn", "energy_distance"])
def test_zero_between_equal_populations(name, clouds):
    x, _ = clouds
    assert DISTANCES[name](x, x[::-1]) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("name", DISTANCES)
def test_common_translation_changes_nothing(name, clouds):
    """1000 standard deviations away from the origin, where naive float32 would lose the distances."""
    x, y = clouds
    assert DISTANCES[name](x + 1000, y + 1000) == pytest.approx(DISTANCES[name](x, y), rel=1e-4)


def test_energy_distance_is_its_formula(clouds):
    x, y = clouds
    expected = cdist(x, y).mean() - cdist(x, x).mean() / 2 - cdist(y, y).mean() / 2
    assert energy_distance(x, y) == pytest.approx(expected, rel=1e-4)


def test_mmd2_is_its_formula(clouds):
    x, y = clouds
    squared = np.sort(cdist(y, y, "sqeuclidean")[np.triu_indices(len(y), 1)])
    scales = squared[(len(squared) - 1) // 2] * np.array([0.5, 1, 2, 4])

    def kernel(a, b):
        return np.mean([np.exp(-cdist(a, b, "sqeuclidean") / (2 * s)) for s in scales], axis=0)

    def within(a):
        return (kernel(a, a).sum() - len(a)) / (len(a) * (len(a) - 1))

    assert mmd2(x, y) == pytest.approx(within(x) + within(y) - 2 * kernel(x, y).mean(), abs=1e-5)


def test_sinkhorn_of_a_translation_is_half_its_square(clouds):
    """Debiased, every entropic term cancels for a translate: |shift|^2 / 2 at any blur."""
    x, _ = clouds
    assert sinkhorn(x, x + SHIFT[None], blur=0.5) == pytest.approx(12.5, rel=1e-3)


def test_relative_sinkhorn_scales_with_the_unit(clouds):
    """Its blur follows the spread of the real cells: cells in another unit give the same value in that unit."""
    x, y = clouds
    metric = sinkhorn_metric().fn
    assert metric(100 * x, 100 * y) == pytest.approx(1e4 * metric(x, y), rel=1e-4)
    assert metric(x, y) == pytest.approx(sinkhorn(x, y, blur=0.05 * spread(y)), rel=1e-3)


def test_sinkhorn_that_has_not_converged_is_nan(clouds):
    """A wide gap at a tiny blur takes more iterations than are allowed; the number reached so far is not reported."""
    x, y = clouds
    assert math.isnan(sinkhorn(100 * x, 100 * y, blur=0.02))


def test_too_many_cells_are_refused(clouds):
    x, y = clouds
    with pytest.raises(ValueError, match=r"x has 40 cells; .*max_exact=39.*Subsample"):
        wasserstein1(x, y, max_exact=39)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: wasserstein1(x, x[:, :2]), "equal dims"),
        (lambda x: wasserstein2(x, np.where(x > 2, np.nan, x)), "y must hold finite"),
        (lambda x: wasserstein1(x, x, x_weights=-np.ones(len(x))), "x_weights must hold 40"),
        (lambda x: sinkhorn(x, x, blur=0.0), "blur must be a positive"),
        (lambda x: mmd2(x[:1], x), "at least 2"),
        (lambda x: sinkhorn_metric().fn(x, np.ones_like(x)), "all coincide"),
        (lambda x: compare_populations(x, np.where(x > 2, np.inf, x), seed=0), "real must hold finite"),
        (lambda x: compare_populations(x, x, n_cells=1, seed=0), "n_cells must be at least 2"),
    ],
)
def test_bad_input_is_named(call, message, clouds):
    with pytest.raises(ValueError, match=message):
        call(clouds[0])


SIZES = {
    "sizes": Metric("sizes", "100 n + m", "1", "lower is better", lambda pred, real: 100.0 * len(pred) + len(real))
}
REAL_MEAN = {"mean": Metric("mean", "mean of the real cells", "x", "lower is better", lambda pred, real: real.mean())}


def test_populations_are_compared_at_equal_numbers(clouds):
    x, y = clouds
    assert compare_populations(x[:25], y, SIZES, seed=0).scores["sizes"].values == (2525.0,) * 5
    assert compare_populations(x, y, SIZES, n_cells=11, n_draws=2, seed=0).scores["sizes"].values == (1111.0,) * 2


def test_whole_populations_are_compared_once(clouds):
    comparison = compare_populations(*clouds, {"W1": POPULATION_METRICS["W1"]}, seed=0)
    assert (comparison.n_draws, comparison.n_cells, comparison.repeated) == (1, 40, "")
    assert comparison.scores["W1"].mean == wasserstein1(*clouds)
    assert comparison.scores["W1"].sd == 0


def test_too_few_cells_are_repeated_and_it_is_said(clouds):
    x, y = clouds
    comparison = compare_populations(x[:5], y, SIZES, n_cells=30, seed=0)
    assert comparison.repeated == "pred"
    assert comparison.scores["sizes"].values[0] == 3030


def test_draws_follow_the_seed_and_share_the_real_cells(clouds):
    x, y = clouds
    first = compare_populations(x[:20], y, REAL_MEAN, n_cells=10, seed=3)
    other = compare_populations(x[20:] + 7, y, REAL_MEAN, n_cells=10, seed=3)
    assert first.scores == other.scores
    assert len(set(first.scores["mean"].values)) == 5
    assert compare_populations(x, y, REAL_MEAN, n_cells=10, seed=4).scores != first.scores


def test_draws_hold_no_cell_twice():
    cells = np.arange(50.0)[:, None]
    assert len(np.unique(draw_cells(cells, 49, np.random.default_rng(0)))) == 49


def test_a_failed_prediction_is_not_rescued(clouds):
    """Two bad cells in forty: all scores NaN, and the count says why."""
    x, y = clouds
    x = x.copy()
    x[[3, 8], 1] = np.nan, np.inf
    comparison = compare_populations(x, y, {"W1": POPULATION_METRICS["W1"]}, n_cells=20, seed=0)
    assert comparison.n_nonfinite == 2
    assert math.isnan(comparison.scores["W1"].mean)
    assert comparison.scores["W1"].n_failed == 5


def test_one_diverged_cell_does_not_hide_in_rounding():
    """MMD saturates for a far cell; in single precision it would be off by a tenth and more."""
    rng = np.random.default_rng(3)
    real, pred = rng.normal(size=(40, 3)), rng.normal(size=(40, 3)) + 0.3
    far, farther = pred.copy(), pred.copy()
    far[0], farther[0] = 1e3, 1e5
    metric = POPULATION_METRICS["MMD2"].fn
    assert metric(farther, real) == pytest.approx(metric(far, real), rel=1e-4)
    assert metric(pred * 1e-9, real * 1e-9) == pytest.approx(metric(pred, real), rel=1e-9)


def test_exact_transport_has_no_unit():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(30, 3)), rng.normal(size=(40, 3)) + 0.3
    assert wasserstein2(x * 1e-9, y * 1e-9) == pytest.approx(1e-9 * wasserstein2(x, y), rel=1e-9)


def pairs(x, y=None, power=1):
    """Mean distance, of a population with itself over pairs of different cells, too."""
    d = cdist(x, x if y is None else y) ** power
    return (d.mean(), d.sum() / (len(d) * (len(d) - 1))) if y is None else d.mean()


@pytest.mark.parametrize(
    ("name", "power", "unbiased"),
    [
        ("energy_euclidean_v", 1, 0),
        ("energy_euclidean_u", 1, 1),
        ("energy_squared_v", 2, 0),
        ("energy_squared_u", 2, 1),
    ],
)
def test_energy_variants_are_their_formulas(name, power, unbiased, clouds):
    x, y = clouds[0][:30] + 1000, clouds[1] + 1000
    expected = 2 * pairs(x, y, power) - pairs(x, power=power)[unbiased] - pairs(y, power=power)[unbiased]
    assert ENERGY_METRICS[name].fn(x, y) == pytest.approx(expected, rel=1e-9)
    assert energy_distance_matrix([x, y], name)[1, 0] == pytest.approx(expected, rel=1e-9)


def test_energy_variants_and_each_other(clouds):
    """Twice the halved one; the squared one is twice the squared distance of the means."""
    x, y = clouds
    assert ENERGY_METRICS["energy_euclidean_v"].fn(x, y) == pytest.approx(2 * energy_distance(x, y), rel=1e-4)
    means = ((x.mean(axis=0) - y.mean(axis=0)) ** 2).sum()
    assert ENERGY_METRICS["energy_squared_v"].fn(x, y) == pytest.approx(2 * means, rel=1e-12)


def test_unbiased_energy_is_zero_on_average():
    rng = np.random.default_rng(0)
    values = {name: [] for name in ("energy_euclidean_u", "energy_squared_u", "energy_euclidean_v")}
    for _ in range(200):
        x, y = rng.normal(size=(2, 12, 3))
        for name, of_name in values.items():
            of_name.append(ENERGY_METRICS[name].fn(x, y))
    for name in ("energy_euclidean_u", "energy_squared_u"):
        assert abs(np.mean(values[name])) < 4 * np.std(values[name]) / np.sqrt(200)
    assert min(values["energy_euclidean_v"]) > 0


def test_energy_matrix_is_that_of_all_pairs():
    """Populations of 1 to 700 cells across the borders of the tiles, single precision, far from the origin."""
    rng = np.random.default_rng(1)
    cells = [(rng.normal(size=(n, 6)) + rng.normal(size=6) + 100).astype(np.float32) for n in (3, 700, 1, 40, 512, 9)]
    made = energy_distance_matrix({i: x for i, x in enumerate(cells)})
    wide = [x.astype(np.float64) for x in cells]
    expected = [[pairs(a, b) - pairs(a, a) / 2 - pairs(b, b) / 2 for b in wide] for a in wide]
    np.testing.assert_allclose(made, expected, atol=1e-12)
    np.testing.assert_array_equal(made, made.T)
    np.testing.assert_array_equal(np.diag(made), 0)
    assert made[0, 1] == pytest.approx(energy_distance(cells[0], cells[1]), rel=1e-4)


def test_energy_matrix_of_equal_populations_is_zero():
    """Each cell is there twice: a distance of zero out of products is not quite zero."""
    x = np.random.default_rng(2).normal(size=(50, 10)) * 1e3
    for name in ENERGY_METRICS:
        if not name.endswith("_u"):
            assert energy_distance_matrix([x, x[::-1]], name)[0, 1] == pytest.approx(0, abs=1e-6)


def test_hausdorff_is_that_of_scipy(clouds):
    from scipy.spatial.distance import directed_hausdorff

    x, y = clouds[0], clouds[1][:17]
    expected = max(directed_hausdorff(x, y)[0], directed_hausdorff(y, x)[0])
    assert hausdorff(x, y) == hausdorff(y, x) == pytest.approx(expected, rel=1e-12)
    assert hausdorff(x, x[::-1]) == 0
    stray = np.vstack([x, [[100.0, 0, 0]]])
    assert hausdorff(stray, x) > 90


def test_variance_ratio_is_of_total_variances(clouds):
    x, _ = clouds
    assert variance_ratio(x + 5, x) == pytest.approx(1)
    assert variance_ratio(3 * x, x) == pytest.approx(9)
    assert variance_ratio(np.tile(x.mean(axis=0), (40, 1)), x) == pytest.approx(0, abs=1e-20)
    assert math.isnan(variance_ratio(x, np.ones_like(x)))


def test_mmd2_of_fixed_kernels(clouds):
    """The median heuristic written out gives what it gives by itself; other kernels give other values."""
    x, y = clouds
    squared = np.sort(cdist(y, y, "sqeuclidean")[np.triu_indices(len(y), 1)])
    widths = np.sqrt(squared[(len(squared) - 1) // 2] * np.array([0.5, 1, 2, 4]))
    metric = mmd2_metric(bandwidths=widths.tolist())
    assert metric.fn(x, y) == pytest.approx(mmd2(x, y), rel=1e-6)
    assert metric.fn(x, y) != pytest.approx(mmd2_metric(bandwidths=(0.3,)).fn(x, y), rel=0.1)
    assert f"{widths[0]:g}" in metric.definition


@pytest.mark.parametrize("power", [1, 2])
def test_sinkhorn_encloses_the_exact_distance(power, clouds):
    """Its plan is a plan, its duals are feasible: the exact value lies between, and near."""
    x, y = clouds[0][:25], clouds[1]
    exact = {1: wasserstein1, 2: wasserstein2}[power](x, y)
    found = entropic_wasserstein(100 * x + 7, 100 * y + 7, power=power)
    assert found.converged
    assert 100 * exact * (1 - 1e-5) <= found.value <= 100 * exact * 1.02
    assert 100 * exact * 0.98 <= found.lower <= 100 * exact * (1 + 1e-5)
    assert entropic_wasserstein(np.ones((3, 2)), np.ones((4, 2)), power=power).value == 0
    assert not entropic_wasserstein(100 * x + 7, 100 * y + 7, power=power, max_iterations=1).converged


def test_beyond_the_exact_size_the_metric_says_so(clouds):
    x, y = clouds
    small, large = wasserstein_metric(1, max_exact=30), wasserstein_metric(1)
    assert small.fn(x[:30], y[:30]) == wasserstein1(x[:30], y[:30])
    assert small.approximation(30) == large.approximation(31) == ""
    assert "Sinkhorn" in small.approximation(31)
    assert small.fn(x, y) == entropic_wasserstein(x, y, power=1).value
    assert small.fn(x, y) == pytest.approx(wasserstein1(x, y), rel=0.02)


def test_every_metric_explains_itself():
    assert set(POPULATION_METRICS) < set(ALL_POPULATION_METRICS)
    assert set(ENERGY_METRICS) < set(ALL_POPULATION_METRICS)
    assert len({m.definition for m in ALL_POPULATION_METRICS.values()}) == len(ALL_POPULATION_METRICS)
    for name, metric in ALL_POPULATION_METRICS.items():
        assert metric.name == name
        assert metric.direction in {"lower is better", "1 is best"}
        assert len(metric.definition) > 20
        assert metric.unit in {"x", "x^2", "1"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: energy_distance_matrix([]), "it is empty"),
        (lambda x: energy_distance_matrix([x, x[:, :2]]), "equal dims"),
        (lambda x: energy_distance_matrix([x, x[:0]]), "cells of population 1 must be at least 1"),
        (lambda x: energy_distance_matrix([x, x * np.nan]), "population 1 must hold finite"),
        (lambda x: energy_distance_matrix([x], "energy"), "metric must be one of 'Energy'"),
        (lambda x: energy_distance_matrix([x, x[:1]], "energy_squared_u"), "each population must be at least 2"),
        (lambda x: entropic_wasserstein(x, x, power=3), "power must be one of 1, 2"),
        (lambda x: mmd2(x, x, bandwidths=(0.0,)), "a bandwidth must be a positive"),
    ],
)
def test_bad_input_of_the_others_is_named(call, message, clouds):
    with pytest.raises(ValueError, match=message):
        call(clouds[0])
