"""Conformal intervals: their rank, coverage where the law of the errors is known, and what they do not promise."""

import math

import numpy as np
import pytest
from scipy.stats import beta, betabinom

from scjax.metrics.conformal import calibrate, conformal_quantile, coverage, least_conditions


def errors(rng, *shape):
    """Of a poor model: heavy tails, another size in each gene, a part that all genes of a condition share."""
    n, n_genes = shape[-2:]
    size = np.geomspace(0.05, 2, n_genes)
    return size * (rng.standard_t(3, shape) + rng.normal(size=(*shape[:-1], 1)))


def worlds(rng, n, n_worlds, n_genes=4):
    """(residuals of n calibration conditions, of one further condition), many times."""
    drawn = errors(rng, n_worlds, n + 1, n_genes)
    return drawn[:, :n], drawn[:, n:]


def held(residuals, further, **options):
    """Whether each gene of the further condition lies within; [worlds, genes]."""
    found = []
    for calibration, test in zip(residuals, further, strict=True):
        scale = options.get("scale")
        low, high = calibrate(np.zeros_like(calibration), calibration, **options).around(np.zeros_like(test), scale)
        found.append(((low <= test) & (test <= high))[0])
    return np.array(found)


@pytest.mark.parametrize(
    ("n", "level", "rank"), [(9, 0.9, 9), (10, 0.9, 10), (19, 0.9, 18), (99, 0.55, 55), (19, 0.95, 19)]
)
def test_rank_of_the_quantile(n, level, rank):
    """The ceil((n + 1) level)-th smallest, and products of decimals that rounding lifts do not count as more."""
    scores = np.random.default_rng(0).permutation(np.arange(1.0, n + 1))
    assert conformal_quantile(scores, level) == rank
    both = conformal_quantile(np.stack([scores, 10 * scores], axis=1), level)
    np.testing.assert_array_equal(both, [rank, 10 * rank])


@pytest.mark.parametrize(("level", "least"), [(0.9, 9), (0.95, 19), (0.5, 1), (0.8, 4), (0.99, 99)])
def test_too_few_conditions_have_infinite_intervals_and_say_so(level, least):
    assert least_conditions(level) == least
    x = np.random.default_rng(1).normal(size=(least, 3))
    assert np.isfinite(calibrate(x, x + 1, level).radius).all()
    assert calibrate(x, x + 1, level).note == ""
    for simultaneous in (False, True):
        few = calibrate(x[:-1], x[:-1] + 1, level, simultaneous=simultaneous)
        assert np.isinf(few.radius).all()
        assert few.note == f"{least - 1} conditions, fewer than the {least} that level {level} takes"
        low, high = few.around(x[:1])
        assert (low == -math.inf).all()
        assert (high == math.inf).all()


@pytest.mark.parametrize("n", [9, 20, 39])
def test_each_gene_is_covered_as_often_as_promised(n):
    """Over calibration sets and further conditions: k / (n + 1) of continuous scores, k = ceil((n + 1) level)."""
    n_worlds = 2000
    expected = math.ceil((n + 1) * 0.9) / (n + 1)
    found = held(*worlds(np.random.default_rng(2), n, n_worlds), level=0.9).mean(axis=0)
    error = math.sqrt(expected * (1 - expected) / n_worlds)
    assert expected >= 0.9
    assert np.abs(found - expected).max() < 4 * error


def test_a_wrong_quantile_is_caught():
    """What the test above would say of the plain 0.9 quantile of the scores, and of radii from seen conditions."""
    n, n_worlds = 9, 2000
    residuals, further = worlds(np.random.default_rng(3), n, n_worlds)
    bound = 0.9 - 4 * math.sqrt(0.09 / n_worlds)
    plain = np.quantile(np.abs(residuals), 0.9, axis=1)
    assert (np.abs(further[:, 0]) <= plain).mean(axis=0).max() < bound
    assert held(residuals / 2, further, level=0.9).mean(axis=0).max() < bound
    assert held(residuals, further, level=0.9).mean(axis=0).min() > bound


def test_all_genes_at_once():
    """The simultaneous radius holds whole conditions as often; radii of single genes do not. A scale shares it out."""
    n, n_worlds = 19, 1500
    residuals, further = worlds(np.random.default_rng(4), n, n_worlds)
    scale = np.geomspace(0.05, 2, 4)[None]
    error = math.sqrt(0.09 / n_worlds)
    for options in ({}, {"scale": scale}):  # not of the calibration conditions
        whole = held(residuals, further, level=0.9, simultaneous=True, **options).all(axis=1).mean()
        assert abs(whole - 0.9) < 4 * error, options
    assert held(residuals, further, level=0.9).all(axis=1).mean() < 0.9 - 4 * error
    plain, scaled = (
        calibrate(np.zeros_like(residuals[0]), residuals[0], 0.9, simultaneous=True, **options).around(
            np.zeros((1, 4)), options.get("scale")
        )[1][0]
        for options in ({}, {"scale": scale})
    )
    np.testing.assert_allclose(plain, plain[0])
    np.testing.assert_allclose(scaled / scaled[0], scale[0] / scale[0, 0])
    assert scaled[0] < plain[0] / 5  # a quiet gene no longer pays for the loud one


def test_a_scale_of_each_condition_follows_hard_conditions():
    """As an ensemble's spread may: the intervals of hard conditions widen, and the promise holds all the same."""
    rng, n, n_worlds = np.random.default_rng(5), 19, 1500
    hard = rng.choice([0.1, 1.0], (n_worlds, n + 1, 1))
    residuals = hard * errors(rng, n_worlds, n + 1, 2)
    inside, blind = [], []
    for r, h in zip(residuals, hard, strict=True):
        scale = np.broadcast_to(h, r.shape)
        zero = np.zeros_like(r)
        low, high = calibrate(zero[:n], r[:n], scale=scale[:n]).around(zero[n:], scale[n:])
        inside.append((low <= r[n:]) & (r[n:] <= high))
        low, high = calibrate(zero[:n], r[:n]).around(zero[n:])
        blind.append((low <= r[n:]) & (r[n:] <= high))
    inside, blind, is_hard = np.array(inside)[:, 0, 0], np.array(blind)[:, 0, 0], hard[:, n, 0] == 1
    error = math.sqrt(0.09 / is_hard.sum())
    assert abs(inside[is_hard].mean() - 0.9) < 4 * error
    assert blind[is_hard].mean() < 0.9 - 2 * error  # one radius for all: right on average, short where it matters


def test_coverage_of_one_calibration_is_a_draw_from_its_beta_law():
    """As the module's docstring says: the share of 400 further conditions, over 500 calibration sets of 20."""
    rng, n, n_test = np.random.default_rng(6), 20, 400
    found = []
    for _ in range(500):
        residuals = rng.standard_cauchy((n + n_test, 1))
        zero = np.zeros_like(residuals)
        made = calibrate(zero[:n], residuals[:n])
        found.append(coverage(*made.around(zero[n:]), residuals[n:]).by_gene[0] * n_test)
    law = betabinom(n_test, 19, n + 1 - 19)
    assert np.mean(found) == pytest.approx(law.mean(), abs=4 * law.std() / math.sqrt(500))
    assert np.std(found) == pytest.approx(law.std(), rel=0.2)
    assert tuple(beta.ppf([0.05, 0.95], 19, 2)) == pytest.approx((0.784, 0.982), abs=1e-3)


def test_coverage_counts_ends_and_whole_conditions():
    low, high = np.zeros((4, 2)), np.array([[1.0, 2.0]] * 4)
    observed = np.array([[0.0, 2.0], [1.0, 3.0], [0.5, 1.0], [2.0, -1.0]])
    found = coverage(low, high, observed)
    np.testing.assert_array_equal(found.by_gene, [0.75, 0.5])
    assert (found.all_genes, found.n_conditions) == (0.5, 4)
    np.testing.assert_array_equal(found.width, [1, 2])


def test_a_shift_between_calibration_and_test_breaks_the_promise():
    """Exchangeability is an assumption, not a result: doubles after singles, say, have other errors."""
    residuals, further = worlds(np.random.default_rng(7), 19, 500)
    assert held(residuals, 3 * further, level=0.9).mean() < 0.7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"level": 1.0}, r"level must lie in \[0, 1\)"),
        ({"level": 0.0}, "level must be a positive"),
        ({"observed": np.ones((3, 3))}, "must be means of the same conditions and genes; got"),
        ({"observed": np.full((4, 3), np.nan)}, "observed must hold finite numbers; 12 of 12"),
        ({"scale": np.ones((2, 3))}, "scale must have one row, or one a condition, of 3 genes"),
        ({"scale": np.zeros((1, 3))}, "scale must hold positive numbers; 3 of 3 are not"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        calibrate(**{"predicted": np.ones((4, 3)), "observed": np.ones((4, 3)), **change})


def test_radii_are_used_as_they_were_made():
    x = np.ones((10, 3))
    with pytest.raises(ValueError, match="calibrated without one; leave it out"):
        calibrate(x, x).around(x, x)
    with pytest.raises(ValueError, match="calibrated with one; pass that of these conditions"):
        calibrate(x, x, scale=x).around(x)
    with pytest.raises(ValueError, match="predicted must have the 3 genes of the calibration; got 2"):
        calibrate(x, x).around(x[:, :2])
    with pytest.raises(ValueError, match="scores must be numbers; 1 of 2"):
        conformal_quantile(np.array([1.0, np.nan]), 0.5)
    with pytest.raises(ValueError, match="one at least"):
        coverage(x[:0], x[:0], x[:0])
