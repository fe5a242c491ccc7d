"""Kernel distances against Gaussian integrals and one-dimensional closed forms, with Monte-Carlo errors where drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from scjax.losses import energy_distance, mmd, mmd2

BANDWIDTHS = jnp.asarray([0.7, 2.0])
value_and_grads = jax.jit(jax.value_and_grad(mmd2, argnums=(0, 1)), static_argnames="unbiased")
energy_and_grads = jax.jit(jax.value_and_grad(energy_distance, argnums=(0, 1)))


def clouds(n=6, m=5, d=3, seed=0, shift=1.0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(n, d)), jnp.float32), jnp.asarray(rng.normal(size=(m, d)) + shift, jnp.float32)


def gram(x, y):
    squared = np.sum((np.asarray(x, np.float64)[:, None] - np.asarray(y, np.float64)[None]) ** 2, -1)
    return np.mean([np.exp(-squared / (2 * s**2)) for s in np.asarray(BANDWIDTHS, np.float64)], axis=0)


@pytest.fixture(scope="module")
def estimates():
    """Both estimators on 2000 pairs of populations of 4 and 6 cells: equal laws, and laws N(0, 1), N(1, 2^2)."""
    shapes = ((2000, 4, 2), (2000, 6, 2))
    x, y = (jax.random.normal(k, s) for k, s in zip(jax.random.split(jax.random.key(0)), shapes, strict=True))

    @jax.jit
    @jax.vmap
    def all_of(x, y):
        other = 1 + 2 * y
        return {
            "same": mmd2(x, y, BANDWIDTHS),
            "other": mmd2(x, other, BANDWIDTHS),
            "biased": mmd2(x, other, BANDWIDTHS, unbiased=False),
            "energy": energy_distance(x, other),
        }

    return jax.device_get(all_of(x, y))


def expected_kernel(mean, variance, d=2):
    """E k(a, b) for a - b ~ N(mean, variance) in each of d coordinates: a Gaussian integral."""
    s2 = np.asarray(BANDWIDTHS, np.float64) ** 2
    return np.mean((s2 / (s2 + variance)) ** (d / 2) * np.exp(-d * mean**2 / (2 * (s2 + variance))))


def within_errors(draws, mean):
    assert abs(draws.mean() - mean) < 4.5 * draws.std() / np.sqrt(len(draws))


def test_unbiased_has_mean_zero_for_equal_laws(estimates):
    within_errors(estimates["same"], 0.0)
    assert (estimates["same"] < 0).mean() > 0.3  # it scatters to both sides


def test_gaussians_in_closed_form(estimates):
    """|a - b| has variance 2, 8 and 5 within x, within y and between them."""
    within_x, within_y, between = expected_kernel(0, 2), expected_kernel(0, 8), expected_kernel(1, 5)
    within_errors(estimates["other"], within_x + within_y - 2 * between)
    # The V-statistic adds each cell's kernel with itself: E k + (1 - E k) / n.
    biased = within_x + (1 - within_x) / 4 + within_y + (1 - within_y) / 6 - 2 * between
    within_errors(estimates["biased"], biased)
    assert estimates["biased"].min() >= 0


@pytest.mark.parametrize("unbiased", [True, False])
def test_mmd2_by_its_formula(unbiased):
    x, y = clouds()
    xx, yy, xy = gram(x, x), gram(y, y), gram(x, y)
    if unbiased:
        within = (xx.sum() - 6) / 30 + (yy.sum() - 5) / 20
    else:
        within = xx.mean() + yy.mean()
    value, _ = value_and_grads(x, y, BANDWIDTHS, unbiased=unbiased)
    np.testing.assert_allclose(value, within - 2 * xy.mean(), atol=1e-6)


def test_biased_mmd2_is_zero_for_equal_cells():
    x, _ = clouds()
    value, _ = value_and_grads(x, x[::-1][:5], BANDWIDTHS, unbiased=False)
    assert value > 0
    np.testing.assert_allclose(mmd2(x, x[::-1], BANDWIDTHS, unbiased=False), 0, atol=1e-6)


@pytest.mark.parametrize("f", [lambda x, y: value_and_grads(x, y, BANDWIDTHS, unbiased=True), energy_and_grads])
def test_gradients_are_finite_where_cells_coincide(f):
    x, y = clouds()
    for pair in ((x.at[1].set(x[0]), y.at[2].set(x[0])), (jnp.ones_like(x), jnp.ones_like(y))):
        value, grads = f(*pair)
        assert np.isfinite(value)
        assert all(np.isfinite(g).all() for g in grads)
    for g in grads:  # all cells in one place: no direction is better than another
        np.testing.assert_allclose(g, 0, atol=1e-6)


def test_both_are_symmetric_in_their_populations():
    x, y = clouds(5)
    for f in (lambda x, y: value_and_grads(x, y, BANDWIDTHS, unbiased=True), energy_and_grads):
        (there, (grad_x, grad_y)), (back, (back_y, back_x)) = f(x, y), f(y, x)
        np.testing.assert_allclose(back, there, rtol=1e-5)
        np.testing.assert_allclose(back_x, grad_x, atol=1e-6)
        np.testing.assert_allclose(back_y, grad_y, atol=1e-6)


def test_energy_distance_on_a_line_is_the_area_between_distributions(x64):
    """In one dimension E|x-y| - E|x-x'|/2 - E|y-y'|/2 is the integral of (F - G)^2."""
    x, y = (np.asarray(z, np.float64) for z in clouds(d=1))
    grid = np.sort(np.concatenate([x, y])[:, 0])
    f, g = ((z <= grid[:-1]).mean(0) for z in (x, y))
    area = np.sum((f - g) ** 2 * np.diff(grid))
    np.testing.assert_allclose(energy_distance(jnp.asarray(x), jnp.asarray(y)), area, rtol=1e-10)


def test_energy_distance_of_points_is_their_distance():
    value, (grad_x, grad_y) = energy_and_grads(jnp.zeros((6, 3)), jnp.tile(jnp.asarray([[3.0, 0.0, 4.0]]), (5, 1)))
    np.testing.assert_allclose(value, 5, rtol=1e-6)
    np.testing.assert_allclose(grad_y.sum(0), [0.6, 0, 0.8], atol=1e-6)
    np.testing.assert_allclose(grad_x.sum(0), [-0.6, 0, -0.8], atol=1e-6)


def test_energy_distance_is_half_an_mmd2_of_the_negative_distance():
    """E k(x, x') + E k(y, y') - 2 E k(x, y) with k = -|a - b|, means over all pairs, each cell with itself too."""
    x, y = clouds()
    k = lambda a, b: -np.linalg.norm(np.asarray(a, np.float64)[:, None] - np.asarray(b)[None], axis=-1)  # noqa: E731
    squared_mmd = k(x, x).mean() + k(y, y).mean() - 2 * k(x, y).mean()
    value, _ = energy_and_grads(x, y)
    np.testing.assert_allclose(value, squared_mmd / 2, rtol=1e-5)
    same, _ = energy_and_grads(x, x[:5])
    assert same > 0  # 6 and 5 cells are not one population
    np.testing.assert_allclose(energy_distance(x, x), 0, atol=1e-6)


def test_energy_distance_of_gaussians_in_the_plane(estimates):
    """A V-statistic: E|x - x'| counts with (1 - 1/n). |N(0, v I)| has mean sqrt(v pi / 2) in the plane."""
    within_x, within_y = np.sqrt(2 * np.pi / 2), np.sqrt(8 * np.pi / 2)
    # E|N((1, 1), 5 I)| by quadrature over the normal of each coordinate.
    nodes = norm.ppf((np.arange(2000) + 0.5) / 2000) * np.sqrt(5) + 1
    between = np.hypot(nodes[:, None], nodes[None]).mean()
    within_errors(estimates["energy"], between - within_x * 3 / 4 / 2 - within_y * 5 / 6 / 2)
    assert estimates["energy"].min() >= 0


@pytest.mark.parametrize(("n", "m", "which"), [(1, 3, "x"), (3, 1, "y")])
def test_unbiased_needs_two_cells(n, m, which):
    x, y = clouds(n, m)
    with pytest.raises(ValueError, match=f"the number of cells of {which} must be at least 2; got 1"):
        mmd2(x, y, BANDWIDTHS)
    assert np.isfinite(mmd2(x, y, BANDWIDTHS, unbiased=False))


UNBIASED = lambda x, y, w, v: mmd2(x, y, BANDWIDTHS, weights_x=w, weights_y=v)  # noqa: E731
BIASED = lambda x, y, w, v: mmd2(x, y, BANDWIDTHS, unbiased=False, weights_x=w, weights_y=v)  # noqa: E731


def with_grads(f):
    """A function of its own to jit each time, so that no program is kept that finds distances another way."""
    return jax.jit(lambda x, y, w, v: jax.value_and_grad(lambda x, y: f(x, y, w, v), argnums=(0, 1))(x, y))


@pytest.mark.parametrize(
    ("loss", "few"),
    [(energy_distance, 2**18), (energy_distance, 0), (UNBIASED, 2**18), (BIASED, 2**18)],
    ids=["energy by differences", "energy by products", "unbiased", "biased"],
)
def test_a_cell_of_mass_zero_is_absent(loss, few, monkeypatch):
    """Value and gradient are those of the others alone, whatever stands in its place; its own gradient is zero."""
    monkeypatch.setattr(mmd, "_FEW", few)
    x, y = clouds(n=7, m=5, d=4)
    w, v = jnp.zeros(7).at[:4].set(1 / 4), jnp.zeros(5).at[:3].set(1 / 3)
    alone, expected = with_grads(loss)(x[:4], y[:3], None, None)
    of_padded = with_grads(loss)
    for filler in (x[0], 1e4, jnp.nan):
        padded, grads = of_padded(x.at[4:].set(filler), y.at[3:].set(filler), w, v)
        np.testing.assert_allclose(padded, alone, rtol=2e-6, atol=2e-7)
        for grad, theirs, n in zip(grads, expected, (4, 3), strict=True):
            np.testing.assert_allclose(grad[:n], theirs, atol=1e-6)
            np.testing.assert_array_equal(grad[n:], 0)


@pytest.mark.parametrize("loss", [energy_distance, BIASED], ids=["energy", "biased"])
def test_masses_count_cells(loss, monkeypatch):
    """A cell of twice the mass is two cells, at distance zero from each other."""
    monkeypatch.setattr(mmd, "_FEW", 0)
    x, y = clouds(n=3, m=4)
    twice = x[jnp.asarray([0, 0, 1, 2])]
    heavy, (grad, _) = with_grads(loss)(x, y, jnp.asarray([0.5, 0.25, 0.25]), None)
    repeated, (grad_each, _) = with_grads(loss)(twice, y, None, None)
    np.testing.assert_allclose(heavy, repeated, rtol=1e-5)
    np.testing.assert_allclose(grad[0], grad_each[0] + grad_each[1], atol=1e-6)
    np.testing.assert_allclose(grad[1:], grad_each[2:], atol=1e-6)


def test_unbiased_with_masses_by_its_formula():
    x, y = clouds()
    w, v = (np.random.default_rng(n).dirichlet(np.ones(n)) for n in (6, 5))
    within = [(m @ k @ m - np.sum(m**2)) / (1 - np.sum(m**2)) for m, k in ((w, gram(x, x)), (v, gram(y, y)))]
    value = UNBIASED(x, y, jnp.asarray(w, jnp.float32), jnp.asarray(v, jnp.float32))
    np.testing.assert_allclose(value, sum(within) - 2 * w @ gram(x, y) @ v, atol=1e-6)


def test_both_ways_to_energy_distance_agree(monkeypatch):
    """Sets of 32 cells and 200 genes, predictions near their targets: within float32 of each other and of float64."""
    rng = np.random.default_rng(2)
    y = rng.gamma(0.3, 0.3, size=(32, 200))
    x = y + 0.003 * rng.normal(size=y.shape)
    x[0] = y[0]
    x, y = x.astype(np.float32), y.astype(np.float32)
    with jax.enable_x64(True):
        truth = with_grads(energy_distance)(jnp.asarray(x, jnp.float64), jnp.asarray(y, jnp.float64), None, None)
    for few in (2**18, 0):
        monkeypatch.setattr(mmd, "_FEW", few)
        value, grads = with_grads(energy_distance)(jnp.asarray(x), jnp.asarray(y), None, None)
        np.testing.assert_allclose(value, truth[0], atol=4e-7 * 5)  # distances of about 5
        for grad, exact in zip(grads, truth[1], strict=True):
            np.testing.assert_allclose(grad, exact, atol=2e-5 * np.abs(exact).max())


def test_half_precision_is_summed_in_single():
    x, y = clouds()
    value, (grad, _) = energy_and_grads(x.astype(jnp.bfloat16), y.astype(jnp.bfloat16))
    assert value.dtype == jnp.float32
    assert grad.dtype == jnp.bfloat16
    rounded = [z.astype(jnp.bfloat16).astype(jnp.float32) for z in (x, y)]
    np.testing.assert_allclose(value, energy_and_grads(*rounded)[0], rtol=1e-6)
