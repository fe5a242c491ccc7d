"""Distances to float32's accuracy wherever the clouds lie, kernels by their formulas, what a median bandwidth is.

Then the theory of embedded populations: linear in mixtures, distances that are the MMD, and the covariance that noise
on the cells gives their embedding, by its closed forms and by drawing it.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scjax.kernels import (
    distances,
    embedding_inner_product,
    gaussian,
    gaussian_kernel,
    mean_embedding,
    median_bandwidths,
    negative_distance,
    noise_covariance,
    noise_covariance_trace,
    product_distances,
    squared_distances,
)
from scjax.losses import energy_distance, mmd2
from scjax.processes.diffusion import set_noise

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


def far_clouds(shift=0.0, n=20, m=16, d=300, seed=3):
    """The first y all but coincides with the first x, and the second does."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, d)) + shift, rng.normal(size=(m, d)) + shift
    y[0] = x[0] + 1e-3 * rng.normal(size=d)
    x, y = x.astype(np.float32), y.astype(np.float32)
    y[1] = x[1]
    return jnp.asarray(x), jnp.asarray(y)


@jax.jit
def of_products(x, y, weight):
    """Distances, and the gradients of their weighted sum."""
    return product_distances(x, y), jax.grad(lambda x, y: jnp.sum(weight * product_distances(x, y)), (0, 1))(x, y)


@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_product_distances_are_distances(shift):
    """Distances are about 24, and their gradients unit vectors; both are as good for the nearest as for the others."""
    x, y = far_clouds(shift)
    difference = np.asarray(x, np.float64)[:, None] - np.asarray(y, np.float64)[None]
    exact = np.linalg.norm(difference, axis=-1)
    weight = jnp.asarray(np.random.default_rng(0).normal(size=exact.shape), jnp.float32)
    value, (grad_x, grad_y) = of_products(x, y, weight)
    rounded = EPS * (abs(shift) + 1) * 20  # of a centred coordinate, over 300 of them
    np.testing.assert_allclose(value, exact, rtol=2e-6, atol=rounded)
    np.testing.assert_allclose(value[0, 0], exact[0, 0], rtol=1e-6 + rounded / exact[0, 0])
    assert value[1, 1] == 0
    unit = difference / np.where(exact == 0, 1, exact)[..., None]
    towards = np.asarray(weight)[..., None] * unit
    limit = 1e-5 + rounded / exact[0, 0]
    np.testing.assert_allclose(grad_x, towards.sum(1), atol=limit)
    np.testing.assert_allclose(grad_y, -towards.sum(0), atol=limit)


def test_product_distances_within_a_cloud():
    """Zero with itself, also where the products say otherwise; a duplicate is the nearest and coincides."""
    x, _ = far_clouds(50.0)
    x = x.at[3].set(x[2])
    value = jax.jit(product_distances)(x)
    exact = np.linalg.norm(np.asarray(x, np.float64)[:, None] - np.asarray(x, np.float64)[None], axis=-1)
    np.testing.assert_array_equal(np.diag(value), 0)
    assert value[2, 3] == value[3, 2] == 0
    np.testing.assert_allclose(value, exact, rtol=1e-5)
    grad = jax.jit(jax.grad(lambda x: product_distances(x).sum()))(jnp.ones((4, 3)))
    np.testing.assert_array_equal(grad, 0)
    np.testing.assert_array_equal(jax.jit(product_distances)(x[:1]), [[0]])


def test_triplicates_coincide():
    """Only one of two equal cells is the nearest; the other is told from rounding by the products alone."""
    x = jnp.tile(far_clouds(3.0)[0], (3, 1))
    value, grad = jax.jit(jax.value_and_grad(lambda x: product_distances(x).mean()))(x)
    exact = np.linalg.norm(np.asarray(x, np.float64)[:, None] - np.asarray(x, np.float64)[None], axis=-1)
    np.testing.assert_allclose(value, exact.mean(), rtol=1e-6)
    by_differences = jax.jit(jax.grad(lambda x: distances(x, x).mean()))(x)
    np.testing.assert_allclose(grad, by_differences, atol=1e-5 * float(jnp.abs(by_differences).max()))


def test_a_cell_of_no_mass_is_nobodys_nearest():
    """Else the nearest of the others would come from the products, and lose its digits."""
    x, y = far_clouds(d=40)
    y = y.at[2].set(x[0])  # nearer to x[0] than y[0] is, but without mass
    weights = jnp.full(y.shape[0], 1 / (y.shape[0] - 1)).at[2].set(0.0)
    exact = np.linalg.norm(np.asarray(x[0], np.float64) - np.asarray(y[0], np.float64))
    assert 0 < exact < 0.01
    measured = jax.jit(product_distances)
    np.testing.assert_allclose(measured(x, y, weights_y=weights)[0, 0], exact, rtol=1e-3)
    assert measured(x, y)[0, 0] == 0


def test_no_array_of_all_differences():
    """The largest array of 256 x 256 pairs of 2000 genes is that of the cells, also for several sets at once."""
    cells = jax.ShapeDtypeStruct((3, 256, 2000), jnp.float32)
    program = jax.make_jaxpr(jax.value_and_grad(lambda x, y: jax.vmap(energy_distance)(x, y).sum()))(cells, cells)

    def largest(jaxpr):
        for equation in jaxpr.eqns:
            yield from (v.aval.size for v in equation.outvars if hasattr(v.aval, "size"))
            for sub in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
                inner = getattr(sub, "jaxpr", sub)
                if hasattr(inner, "eqns"):
                    yield from largest(inner)

    assert max(largest(program.jaxpr)) == 3 * 256 * 2000


KERNEL = partial(gaussian, bandwidth=0.8)
# jitted: op by op they would be hundreds of small programs
embedding, product = (jax.jit(f, static_argnums=0) for f in (mean_embedding, embedding_inner_product))
covariance, trace = (
    jax.jit(f, static_argnums=0, static_argnames="shared") for f in (noise_covariance, noise_covariance_trace)
)


@pytest.fixture(scope="module")
def population():
    """Five cells in the plane with masses, six others, and seven points to look at."""
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(5), 5)
        x, y, at = (jax.random.normal(k, (n, 2), jnp.float64) for k, n in zip(keys, (5, 6, 7), strict=False))
        masses = [jax.random.dirichlet(k, jnp.ones(n, jnp.float64)) for k, n in zip(keys[3:], (5, 6), strict=True)]
        return x, y, at, *masses


def test_pair_kernels_are_the_entries_of_the_grids():
    x, y, _ = clouds()
    each = lambda kernel: jax.vmap(lambda a: jax.vmap(lambda b: kernel(a, b))(y))(x)  # noqa: E731
    np.testing.assert_allclose(each(KERNEL), gaussian_kernel(x, y, jnp.asarray([0.8])), atol=1e-5)
    np.testing.assert_allclose(each(negative_distance), -distances(x, y), rtol=1e-6)
    np.testing.assert_array_equal(jax.grad(negative_distance)(x[0], x[0]), 0)


def test_embedding_is_linear_in_mixtures(population, x64):
    x, y, at, w, v = population
    for share in (0.0, 0.3, 1.0):
        mixture = jnp.concatenate([share * w, (1 - share) * v])
        mixed = embedding(KERNEL, jnp.concatenate([x, y]), at, mixture)
        apart = share * embedding(KERNEL, x, at, w) + (1 - share) * embedding(KERNEL, y, at, v)
        np.testing.assert_allclose(mixed, apart, atol=1e-12)
    np.testing.assert_allclose(embedding(KERNEL, x, at), embedding(KERNEL, x, at, jnp.full(5, 0.2)))


def test_a_point_of_the_embedding_is_an_inner_product(population, x64):
    """The reproducing property: mu_P(z) = <mu_P, k(z, .)>, and |mu_P(z)| <= |mu_P| sqrt(k(z, z))."""
    x, _, at, w, _ = population
    value = embedding(KERNEL, x, at, w)
    one_by_one = [product(KERNEL, x, z[None], w) for z in at]
    np.testing.assert_allclose(value, one_by_one, atol=1e-12)
    assert (value**2 <= product(KERNEL, x, x, w, w)).all()


def test_squared_distance_of_embeddings_is_mmd2(population, x64):
    x, y, _, w, v = population

    def squared(kernel):
        return product(kernel, x, x, w, w) + product(kernel, y, y, v, v) - 2 * product(kernel, x, y, w, v)

    ours = mmd2(x, y, jnp.asarray([0.8]), unbiased=False, weights_x=w, weights_y=v)
    np.testing.assert_allclose(ours, squared(KERNEL), rtol=1e-10)
    # The energy distance is half that of -|a - b|, and of the positive definite kernel that a point o makes of it.
    centred = lambda a, b: negative_distance(a, b) + jnp.linalg.norm(a - 3) + jnp.linalg.norm(b - 3)  # noqa: E731
    for kernel in (negative_distance, centred):
        np.testing.assert_allclose(energy_distance(x, y, w, v), squared(kernel) / 2, rtol=1e-10)
    gram = jax.vmap(lambda a: jax.vmap(lambda b: centred(a, b))(x))(x)
    assert np.linalg.eigvalsh(gram).min() > 0


def features(a, n=9):
    """A feature map into R^9, whose kernel's Hilbert space can be written out."""
    directions = jnp.asarray(np.random.default_rng(8).normal(size=(n, 2)))
    return jnp.sin(directions @ a + jnp.arange(n))


@pytest.mark.parametrize("shared", [0.0, 0.4, 1.0])
def test_noise_covariance_is_its_operator(population, shared, x64):
    """With features phi, T_j is w_j times the Jacobian of phi, and C a matrix: its values, its trace and its rank."""
    x, _, at, w, _ = population
    kernel = lambda a, b: features(a) @ features(b)  # noqa: E731
    slopes = w[:2, None, None] * jax.vmap(jax.jacobian(features))(x[:2])  # two cells, 9 features, 2 dims
    own, together = np.einsum("jfr,jgr->fg", slopes, slopes), slopes.sum(0) @ slopes.sum(0).T
    operator = (1 - shared) * own + shared * together
    look = jax.vmap(features)
    ours = covariance(kernel, x[:2], at, at[:3], weights=w[:2], shared=shared)
    np.testing.assert_allclose(ours, look(at) @ operator @ look(at[:3]).T, atol=1e-12)
    ours = trace(kernel, x[:2], weights=w[:2], shared=shared)
    np.testing.assert_allclose(ours, np.trace(operator), rtol=1e-10)
    values = np.linalg.eigvalsh(covariance(kernel, x[:2], at, at, weights=w[:2], shared=shared))
    assert values.min() > -1e-12
    assert (values > 1e-9).sum() == (2 if shared == 1 else 4)  # dims, cells x dims


def test_noise_covariance_falls_with_the_number_of_cells_unless_it_is_shared(population, x64):
    """Every cell twice: the same population, half the covariance; a shared part stays."""
    x, _, at, *_ = population
    twice = jnp.tile(x, (2, 1))
    for shared, ratio in ((0.0, 0.5), (1.0, 1.0)):
        once = covariance(KERNEL, x, at, at, shared=shared)
        np.testing.assert_allclose(covariance(KERNEL, twice, at, at, shared=shared), ratio * once, atol=1e-12)
        moved = trace(KERNEL, x, shared=shared)
        np.testing.assert_allclose(trace(KERNEL, twice, shared=shared), ratio * moved, rtol=1e-10)
    np.testing.assert_allclose(trace(KERNEL, x), 2 / (5 * 0.8**2), rtol=1e-12)  # dims / (n s^2)


@pytest.mark.parametrize("shared", [0.0, 0.5])
def test_noise_covariance_is_what_noised_sets_show(population, shared, x64):
    """Sets with noise of standard deviation s, embedded: covariance s^2 C and E |mu' - mu|^2 = s^2 tr C, to O(s^4)."""
    x, _, at, *_ = population
    n, s = 10_000, 0.01
    noise = set_noise(jax.random.key(7), (n, 5, 2), shared, jnp.float64)

    @jax.jit
    @jax.vmap
    def of_noised(noise):
        noised, inner = x + s * noise, partial(embedding_inner_product, KERNEL)
        return mean_embedding(KERNEL, noised, at), inner(noised, noised) + inner(x, x) - 2 * inner(noised, x)

    seen, moved = jax.device_get(of_noised(noise))
    expected = s**2 * np.asarray(covariance(KERNEL, x, at, at, shared=shared))
    spread = np.sqrt(np.diag(expected))
    error = np.abs(np.cov(seen.T) - expected)
    np.testing.assert_array_less(error, (4.5 * np.sqrt(2 / n) + 10 * s**2) * np.outer(spread, spread))
    expected = s**2 * float(trace(KERNEL, x, shared=shared))
    np.testing.assert_allclose(moved.mean(), expected, atol=4.5 * moved.std() / np.sqrt(n) + 10 * s**2 * expected)
