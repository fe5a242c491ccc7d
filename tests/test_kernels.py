"""Distances to float32's accuracy wherever the clouds lie, kernels by their formulas, what a median bandwidth is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scjax.kernels import distances, gaussian_kernel, median_bandwidths, squared_distances

EPS = np.finfo(np.float32).eps


def clouds(n=12, m=9, d=5, shift=0.0, seed=0):
    """Float32 clouds, and the squared distances of exactly these numbers in float64."""
    rng = np.random.default_rng(seed)
    x, y = (jnp.asarray(rng.normal(size=(k, d)) + shift, jnp.float32) for k in (n, m))
    difference = np.asarray(x, np.float64)[:, None] - np.asarray(y, np.float64)[None]
    return x, y, np.sum(difference**2, -1)


@pytest.mark.parametrize("shift", [0.0, 1e3])
def test_squared_distances_know_no_origin(shift):
    """A few roundings of the squared spread, about 4 d; uncentred, |x|^2 = 5e6 would leave an error of 0.5."""
    x, y, exact = clouds(shift=shift)
    # Centring 1e3 + O(1) numbers rounds each of them once more, by half an ulp of 1e3.
    rounded = 2 * np.sqrt(exact.max() * 5) * 1e3 * EPS if shift else 0.0
    np.testing.assert_allclose(squared_distances(x, y), exact, atol=16 * EPS * exact.max() + rounded, rtol=0)
    assert float(squared_distances(x, x).min()) >= 0


def test_squared_distances_are_differentiated_exactly(x64):
    rng = np.random.default_rng(1)
    x, y, weight = (jnp.asarray(rng.normal(size=shape)) for shape in ((4, 3), (5, 3), (4, 5)))
    grad = jax.grad(lambda x: jnp.sum(weight * squared_distances(x, y)))(x)
    exact = 2 * jnp.einsum("ij,ijd->id", weight, x[:, None] - y[None])
    np.testing.assert_allclose(grad, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shift", [0.0, 1e3])
def test_distances_come_from_differences(shift):
    """Relative accuracy, even for cells much nearer to each other than the clouds are wide."""
    x, y, _ = clouds(shift=shift)
    y = y.at[0].set(x[0]).at[1].set(jnp.nextafter(x[1], jnp.inf))
    exact = np.linalg.norm(np.asarray(x, np.float64)[:, None] - np.asarray(y, np.float64)[None], axis=-1)
    np.testing.assert_allclose(distances(x, y), exact, rtol=4 * EPS, atol=0)
    assert distances(x, y)[0, 0] == 0


def test_distances_have_gradient_zero_where_cells_coincide():
    x = jnp.zeros((3, 2)).at[2].set(1.0)
    np.testing.assert_array_equal(jax.grad(lambda x: distances(x, x).sum())(x[:2]), 0)
    grad = jax.grad(lambda x: distances(x, jnp.zeros((1, 2))).sum())(x)
    np.testing.assert_allclose(grad, [[0, 0], [0, 0], [0.5**0.5] * 2], rtol=1e-6)


def test_differentiating_distances_leaves_their_value():
    """Cells that coincide are at distance zero also where a gradient is asked for."""
    x, y, _ = clouds()
    for other in (x, y):
        value, _ = jax.value_and_grad(lambda x, y=other: distances(x, y).sum())(x)
        np.testing.assert_allclose(value, distances(x, other).sum(), rtol=4 * EPS)


def test_gaussian_kernel_is_the_mean_over_bandwidths():
    x, y, squared = clouds()
    s = np.array([0.5, 2.0])
    exact = np.mean([np.exp(-squared / (2 * b**2)) for b in s], axis=0)
    np.testing.assert_allclose(gaussian_kernel(x, y, jnp.asarray(s, jnp.float32)), exact, atol=1e-5)
    kernel = gaussian_kernel(x, x, jnp.asarray(s, jnp.float32))
    np.testing.assert_allclose(np.diag(kernel), 1, atol=1e-5)
    assert np.linalg.eigvalsh(np.asarray(kernel, np.float64)).min() > -1e-5  # positive definite


@pytest.mark.parametrize("n", [2, 3, 4, 7])
def test_median_bandwidth_is_the_lower_median_of_different_cells(n):
    """For 4 cells on a line there are 6 pairs: the third smallest counts, neither a mean nor the fourth."""
    x = 2.0 ** np.arange(n)[:, None]
    squared = sorted((x[i, 0] - x[j, 0]) ** 2 for i in range(n) for j in range(i))
    lower = squared[(len(squared) - 1) // 2]
    scales = (0.5, 1.0, 4.0)
    bandwidths = median_bandwidths(jnp.asarray(x, jnp.float32), scales)
    np.testing.assert_allclose(bandwidths, np.sqrt(np.array(scales) * lower), rtol=1e-5)


def test_median_bandwidths_scale_with_the_cells_and_carry_no_gradient():
    x, _, _ = clouds()
    np.testing.assert_allclose(median_bandwidths(3 * x), 3 * median_bandwidths(x), rtol=1e-5)
    np.testing.assert_array_equal(jax.grad(lambda x: median_bandwidths(x).sum())(x), 0)


def test_equal_cells_have_a_bandwidth_above_zero():
    np.testing.assert_allclose(median_bandwidths(jnp.ones((3, 2)), (1.0,)), 1e-6, rtol=1e-5)


def test_one_cell_has_no_bandwidth():
    with pytest.raises(ValueError, match="number of cells of x must be at least 2; got 1"):
        median_bandwidths(jnp.ones((1, 2)))
