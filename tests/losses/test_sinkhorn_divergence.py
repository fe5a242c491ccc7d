"""Sinkhorn divergences against optimal transport that is known in closed form, and the promises of their arguments."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from scjax.losses import (
    annealed_sinkhorn_divergence,
    self_transport,
    sinkhorn_divergence,
    sinkhorn_plan,
    solve_sinkhorn,
)

EPS = np.finfo(np.float32).eps
BLUR = 0.5
SCHEMES = {
    "annealed": partial(annealed_sinkhorn_divergence, blur=BLUR, scaling=0.7),
    "converged": partial(sinkhorn_divergence, blur=BLUR, threshold=1e-5),
}
both = pytest.mark.parametrize("scheme", SCHEMES)

# One compilation a scheme and shape; every test of 6 against 5 cells shares it.
VALUE_AND_GRADS = {
    name: jax.jit(jax.value_and_grad(lambda x, y, a, b, f=f: f(x, y, a=a, b=b), argnums=(0, 1)))
    for name, f in SCHEMES.items()
}


def clouds(n=6, m=5, d=3, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(n, d)), dtype), jnp.asarray(rng.normal(size=(m, d)) + 1.0, dtype)


def uniform(x):
    return jnp.full(len(x), 1 / len(x), x.dtype)


def evaluate(scheme, x, y, a=None, b=None):
    return VALUE_AND_GRADS[scheme](x, y, uniform(x) if a is None else a, uniform(y) if b is None else b)


@both
def test_translation_costs_half_its_square(scheme):
    """S(x, x + v) = |v|^2 / 2 at any blur: up to functions of one side the cost is that of moving x onto itself.

    Both schemes attain the value: their duals are those of x onto itself, and what is left cancels. The annealed
    gradient sees that its last duals are not quite converged.
    """
    x, _ = clouds(5)
    v = jnp.asarray([[1.0, -2.0, 0.5]])
    value, (grad_x, grad_y) = evaluate(
        scheme, jnp.concatenate([x, x[:1]]), x + v, a=jnp.asarray([1, 1, 1, 1, 1, 0]) / 5
    )
    np.testing.assert_allclose(value, 0.5 * jnp.sum(v**2), rtol=8 * EPS)
    # Moving all of y along v changes |v|^2 / 2 by v.
    tolerance = 1e-5 if scheme == "converged" else 1e-3
    np.testing.assert_allclose(grad_y.sum(0), v[0], rtol=tolerance)
    np.testing.assert_allclose(grad_x.sum(0), -v[0], rtol=tolerance)


def test_gaussians_approach_their_closed_form():
    """Entropic transport between N(0, s^2) and N(m, t^2) on a line, known for every blur (Janati et al., NeurIPS 2020):

        OT = m^2/2 + (s^2 + t^2 - root)/2 + e/2 (log(e + root) - log 2e),  root = sqrt(4 s^2 t^2 + e^2), e = blur^2

    up to a constant that the divergence does not see. As e goes to 0 the divergence is W2^2/2 = (m^2 + (s - t)^2)/2.
    Quantiles stand for the Gaussians; the tails that they lack have 1 % of the variance.
    """

    def transport(s, t, m, e):
        root = np.sqrt(4 * s**2 * t**2 + e**2)
        return m**2 / 2 + (s**2 + t**2 - root + e * (np.log(e + root) - np.log(2 * e))) / 2

    def exact(s, t, m, e):
        return transport(s, t, m, e) - (transport(s, s, 0, e) + transport(t, t, 0, e)) / 2

    s, t, m, blur = 1.0, 2.0, 1.5, 0.4
    quantiles = jnp.asarray(norm.ppf((np.arange(100) + 0.5) / 100), jnp.float32)[:, None]
    solution = jax.jit(partial(solve_sinkhorn, blur=blur, threshold=1e-4))(s * quantiles, m + t * quantiles)
    assert solution.converged
    np.testing.assert_allclose(solution.divergence, exact(s, t, m, blur**2), rtol=0.01)
    half_w2_squared = (m**2 + (s - t) ** 2) / 2
    np.testing.assert_allclose(exact(s, t, m, 1e-6), half_w2_squared, rtol=1e-5)
    np.testing.assert_allclose(solution.divergence, half_w2_squared, rtol=0.02)


def test_large_blur_compares_means():
    """With blur much wider than the clouds every plan is the product: S tends to |mean x - mean y|^2 / 2.

    The cost's own size, 10, is rounded; spread^4 / blur^2 is the next term.
    """
    x, y = clouds()
    exact = 0.5 * jnp.sum((x.mean(0) - y.mean(0)) ** 2)
    value = jax.jit(partial(annealed_sinkhorn_divergence, blur=30.0))(x, y)
    np.testing.assert_allclose(value, exact, rtol=1e-2)


@both
def test_padding_changes_nothing(scheme):
    """Cells of mass zero that repeat a real one: the same value and gradients, and none for the padding itself."""
    x, y = clouds()
    x, y = x.at[4:].set(x[0]), y.at[3:].set(y[0])
    padded, (pad_x, pad_y) = evaluate(
        scheme, x, y, jnp.asarray([1, 1, 1, 1, 0, 0]) / 4, jnp.asarray([1, 1, 1, 0, 0]) / 3
    )
    value, (grad_x, grad_y) = jax.jit(jax.value_and_grad(SCHEMES[scheme], argnums=(0, 1)))(x[:4], y[:3])
    # The joint mean, hence the rounding of every cost, moves with the padding: a few eps of the cost's size. The
    # converged scheme may stop an iteration earlier or later, which its threshold of 1e-5 bounds.
    np.testing.assert_allclose(padded, value, rtol=1e-5)
    for ours, want in ((pad_x, grad_x), (pad_y, grad_y)):
        np.testing.assert_allclose(ours[: len(want)], want, atol=1e-5)
        np.testing.assert_array_equal(ours[len(want) :], 0)


@both
def test_a_cell_of_double_mass_is_two_cells(scheme):
    x, y = clouds()
    x = x.at[1].set(x[0])
    value, (grad_x, _) = evaluate(scheme, x, y)
    merged, (grad_merged, _) = evaluate(scheme, x, y, a=jnp.asarray([2, 0, 1, 1, 1, 1]) / 6)
    np.testing.assert_allclose(merged, value, rtol=1e-5)
    np.testing.assert_allclose(grad_merged[0], grad_x[0] + grad_x[1], atol=1e-5)
    np.testing.assert_array_equal(grad_merged[1], 0)


@both
def test_symmetric_positive_and_zero_at_equality(scheme):
    x, y = clouds(5)
    pad = lambda z: jnp.concatenate([z, z[:1]])  # noqa: E731  (the compiled shapes are 6 and 5 cells)
    mass = jnp.asarray([0.2] * 5 + [0.0])
    there, (grad_x, grad_y) = evaluate(scheme, pad(x), y, mass)
    back, (back_y, back_x) = evaluate(scheme, pad(y), x, mass)
    np.testing.assert_allclose(back, there, rtol=1e-5)
    np.testing.assert_allclose(back_x, grad_x[:5], atol=1e-5)
    np.testing.assert_allclose(back_y[:5], grad_y, atol=1e-5)
    assert there > 0
    # Problems that cancel exactly: what is left is the rounding of costs of about 10.
    value, (grad_x, grad_y) = evaluate(scheme, pad(x), x, mass)
    np.testing.assert_allclose(value, 0, atol=1e-5)
    np.testing.assert_allclose(grad_x, 0, atol=1e-5)
    np.testing.assert_allclose(grad_y, 0, atol=1e-5)


@both
def test_order_of_cells_does_not_matter(scheme):
    x, y = clouds()
    perm = np.random.default_rng(0).permutation(len(x))
    value, (grad_x, _) = evaluate(scheme, x, y)
    shuffled, (grad_shuffled, _) = evaluate(scheme, x[perm], y)
    np.testing.assert_allclose(shuffled, value, rtol=1e-5)
    np.testing.assert_allclose(grad_shuffled, grad_x[perm], atol=1e-5)


@both
@pytest.mark.parametrize("where", ["one pair", "all of y", "all of both"])
def test_gradients_are_finite_where_cells_coincide(scheme, where):
    x, y = clouds()
    if where == "one pair":
        y = y.at[0].set(x[0])
    if where in ("all of y", "all of both"):
        y = jnp.broadcast_to(y[:1], y.shape)
    if where == "all of both":
        x = jnp.broadcast_to(y[:1], x.shape)
    value, grads = evaluate(scheme, x, y)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in grads)


def test_gradient_is_that_of_the_value_at_convergence(x64):
    """Finite differences of the converged divergence. It is smooth, so central differences err by step^2 = 1e-8."""
    x, y = clouds(dtype=jnp.float64)
    rng = np.random.default_rng(2)
    dx, dy = (jnp.asarray(rng.normal(size=z.shape)) for z in (x, y))
    value = jax.jit(partial(sinkhorn_divergence, blur=BLUR, threshold=1e-11))
    h = 1e-4
    slope = (value(x + h * dx, y + h * dy) - value(x - h * dx, y - h * dy)) / (2 * h)
    grad_x, grad_y = jax.jit(jax.grad(value, argnums=(0, 1)))(x, y)
    np.testing.assert_allclose(jnp.vdot(grad_x, dx) + jnp.vdot(grad_y, dy), slope, rtol=1e-6)
    # The annealed scheme tends to the same as its temperatures fall slower.
    slow = jax.jit(jax.grad(partial(annealed_sinkhorn_divergence, blur=BLUR, scaling=0.999), argnums=(0, 1)))(x, y)
    for ours, want in zip(slow, (grad_x, grad_y), strict=True):
        assert np.linalg.norm(ours - want) < 1e-2 * np.linalg.norm(want)


@both
def test_float32_is_accurate_far_from_the_origin(scheme):
    """Clouds of spread 1 around 1e4: |x|^2 is 3e8, and its rounding alone would be 16.

    Float32 places a cell at 1e4 within 5e-4, so both are held against the same rounded cells moved back.
    """
    x, y = (z + 1e4 for z in clouds())
    near = evaluate(scheme, x - 1e4, y - 1e4)
    far = evaluate(scheme, x, y)
    # The mean of six numbers of 1e4 is rounded to 1e-3 as well: all cells move by that, together.
    np.testing.assert_allclose(far[0], near[0], rtol=1e-4)
    for ours, want in zip(far[1], near[1], strict=True):
        np.testing.assert_allclose(ours, want, atol=1e-3 * np.abs(want).max())


def test_stopping_early_is_told():
    x, y = clouds()
    early = jax.jit(partial(solve_sinkhorn, blur=0.02, threshold=1e-4, max_iterations=1))(x, y)
    assert not early.converged


def test_plan_has_the_marginals_and_moves_mass_downhill():
    x, y = clouds()
    a, b = jnp.asarray([1, 2, 3, 4, 5, 0]) / 15, jnp.asarray([5, 4, 3, 2, 1]) / 15
    plan = jax.jit(partial(sinkhorn_plan, blur=BLUR, threshold=1e-5))(x, y, a=a, b=b)
    assert float(plan.min()) >= 0
    np.testing.assert_allclose(plan.sum(1), a, atol=1e-5)
    np.testing.assert_allclose(plan.sum(0), b, atol=1e-5)
    cost = np.sum((np.asarray(x)[:, None] - np.asarray(y)[None]) ** 2, -1) / 2
    assert np.sum(plan * cost) < np.sum(np.outer(a, b) * cost)
    # KL optimality: pi = a b exp((f + g - cost) / eps), so double ratios of the plan know the cost alone.
    scaled = np.log(np.asarray(plan)[:5] / np.outer(a, b)[:5]) + cost[:5] / BLUR**2
    double = scaled - scaled[:1] - scaled[:, :1] + scaled[:1, :1]
    np.testing.assert_allclose(double, 0, atol=1e-3)


def test_given_self_transport_leaves_the_gradient_and_moves_the_value_little():
    """It has no gradient in y; the value's fourth digit moves, for its temperatures start at the diameter of x."""
    x, y = clouds(40, 30)
    blur = 0.1

    @jax.jit
    def both_ways(y):
        own = self_transport(x, blur=blur)
        divergence = partial(annealed_sinkhorn_divergence, blur=blur)
        without = jax.value_and_grad(lambda y: divergence(x, y))(y)
        return without, jax.value_and_grad(lambda y, own: divergence(x, y, self_transport_x=own), argnums=(0, 1))(
            y, own
        )

    (without, grad), (given, (grad_given, by_own)) = both_ways(y)
    np.testing.assert_array_equal(grad_given, grad)
    np.testing.assert_allclose(given, without, rtol=1e-3)
    assert by_own == -1  # a unit more of it is a unit less


def test_self_transport_is_half_the_transport_onto_itself():
    """Far cells keep their mass, so OT(a, a)/2 = blur^2 KL / 2, half the entropy of the masses."""
    x, a = jnp.asarray([[0.0], [100.0]]), jnp.asarray([0.25, 0.75])
    own = jax.jit(partial(self_transport, blur=BLUR))
    np.testing.assert_allclose(own(x, a=a), -(BLUR**2) * jnp.sum(a * jnp.log(a)) / 2, rtol=1e-5)


@both
def test_batched_as_alone(scheme):
    """Problems of different spread by vmap and by lax.map, under jit and grad."""
    pairs = [clouds(seed=s) for s in range(3)]
    xs, ys = (jnp.stack(z) * jnp.asarray([0.3, 1.0, 3.0])[:, None, None] for z in zip(*pairs, strict=True))
    alone = [evaluate(scheme, x, y) for x, y in zip(xs, ys, strict=True)]
    solve = jax.value_and_grad(SCHEMES[scheme], argnums=(0, 1))
    batched = jax.jit(lambda xs, ys: (jax.vmap(solve)(xs, ys), jax.lax.map(lambda p: solve(*p), (xs, ys))))
    for values, (grad_x, grad_y) in batched(xs, ys):
        np.testing.assert_allclose(values, [v for v, _ in alone], rtol=2e-5, atol=1e-5)
        np.testing.assert_allclose(grad_x, [g[0] for _, g in alone], atol=1e-4)
        np.testing.assert_allclose(grad_y, [g[1] for _, g in alone], atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(sinkhorn_divergence, blur=0.0), "blur must be a positive number; got 0.0"),
        (partial(solve_sinkhorn, blur=-1.0), "blur must be a positive"),
        (partial(sinkhorn_plan, blur=float("nan")), "blur must be a positive"),
        (partial(sinkhorn_divergence, blur=0.1, threshold=0.0), "threshold must be a positive"),
        (partial(sinkhorn_divergence, blur=0.1, max_iterations=0), "max_iterations must be at least 1; got 0"),
        (partial(annealed_sinkhorn_divergence, blur=0.0), "blur must be a positive"),
        (partial(annealed_sinkhorn_divergence, blur=0.1, scaling=1.0), r"scaling must lie in \[0, 1\); got 1.0"),
        (partial(annealed_sinkhorn_divergence, blur=0.1, scaling=0.0), "scaling must be a positive"),
        (lambda x, y: self_transport(x, blur=0.1, scaling=1.5), r"scaling must lie in \[0, 1\); got 1.5"),
        (lambda x, y: self_transport(x, blur=0.0), "blur must be a positive"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(*clouds())


@pytest.mark.parametrize("scheme", ["converged", "annealed"])
def test_gradient_of_the_masses_is_that_of_the_divergence(scheme, x64):
    """Moving mass from one cell to another; a padded cell, of mass 0, has a finite gradient too."""
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(6, 2))), jnp.asarray(rng.normal(size=(7, 2)) + 1)
    x = jnp.concatenate([x, x[:1]])
    a = jnp.asarray([0.2, 0.1, 0.3, 0.1, 0.1, 0.2, 0.0])

    def divergence(a):
        if scheme == "converged":
            return sinkhorn_divergence(x, y, blur=0.5, a=a, threshold=1e-10)
        return annealed_sinkhorn_divergence(x, y, blur=0.5, scaling=0.999, a=a)

    grad = jax.jit(jax.grad(divergence))(a)
    assert np.all(np.isfinite(grad))
    moved = jnp.asarray([1.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0])
    step = 1e-5
    slope = (divergence(a + step * moved) - divergence(a - step * moved)) / (2 * step)
    assert float(grad @ moved) == pytest.approx(float(slope), rel=1e-6 if scheme == "converged" else 1e-2)


def test_far_clouds_converge_as_near_ones():
    """A shift of a whole cloud by v adds |v + mean difference|^2/2 - |mean difference|^2/2, at any distance."""
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(40, 3)).astype(np.float32), rng.normal(size=(40, 3)).astype(np.float32) + 0.3
    solve = jax.jit(partial(solve_sinkhorn, blur=0.1))
    near = solve(jnp.asarray(x), jnp.asarray(y))
    for shift in (20.0, 100.0, 1000.0):
        far = solve(jnp.asarray(x + shift), jnp.asarray(y))
        assert far.converged
        gap = x.mean(0, dtype=np.float64) - y.mean(0, dtype=np.float64)
        want = float(near.divergence) + (np.sum((gap + shift) ** 2) - np.sum(gap**2)) / 2
        assert float(far.divergence) == pytest.approx(want, rel=1e-5)
