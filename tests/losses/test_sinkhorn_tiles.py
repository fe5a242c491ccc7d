"""Transport in tiles is transport: the same values, gradients and iterations, and no matrix of costs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scjax.losses import annealed_sinkhorn_divergence, self_transport, sinkhorn, solve_sinkhorn

BLUR = 0.5


@pytest.fixture
def tiles(monkeypatch):
    """Tiles of at most 4 x 3 cells, however few there are."""
    monkeypatch.setattr(sinkhorn, "DENSE_PAIRS", 0)
    monkeypatch.setattr(sinkhorn, "ROWS", 4)
    monkeypatch.setattr(sinkhorn, "COLUMNS", 3)


def clouds(n=11, m=7, d=3, seed=0):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, d)), rng.normal(size=(m, d)) + 1.0
    x[-2:], y[-1] = x[0], y[0]  # padding, and cells that coincide
    a, b = np.r_[rng.random(n - 2), 0, 0], np.r_[rng.random(m - 1), 0]
    return jnp.asarray(x), jnp.asarray(y), jnp.asarray(a / a.sum()), jnp.asarray(b / b.sum())


def evaluate(f):
    """Value and gradients by both clouds and both masses, in a program of its own; those by masses less the first.

    Masses sum to 1, so that a number added to all entries of their gradient changes nothing.
    """
    value, (*of_cells, of_a, of_b) = jax.jit(jax.value_and_grad(lambda *a: f(*a), argnums=(0, 1, 2, 3)))(*clouds())
    return value, of_cells, of_a - of_a[:1], of_b - of_b[:1]


def assert_same(got, want, rtol):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(np.abs(b).max()))


def annealed(x, y, a, b):
    return annealed_sinkhorn_divergence(x, y, a=a, b=b, blur=BLUR) + self_transport(x, blur=BLUR, a=a)


def converged(x, y, a, b):
    return solve_sinkhorn(x, y, a=a, b=b, blur=BLUR, threshold=1e-9).divergence


@pytest.mark.parametrize("f", [annealed, converged])
def test_values_and_gradients_are_those_of_the_matrix(f, x64, request):
    want = evaluate(f)
    request.getfixturevalue("tiles")
    assert_same(evaluate(f), want, 1e-10 if f is annealed else 1e-7)


def test_single_precision(request):
    """Rounding of costs of about 10 and temperatures of 0.25: a few eps of 40."""
    of = lambda: jax.jit(jax.value_and_grad(annealed, argnums=(0, 1)))(*clouds())  # noqa: E731
    want = of()
    request.getfixturevalue("tiles")
    assert_same(of(), want, 1e-5)


def test_convergence_is_told(tiles):
    x, y, a, b = clouds()
    solve = jax.jit(partial(solve_sinkhorn, blur=0.2), static_argnames=("max_iterations", "threshold"))
    late = solve(x, y, a=a, b=b, threshold=1e-4)
    assert late.converged
    assert 1 < late.n_iterations < 1000
    early = solve(x, y, a=a, b=b, max_iterations=1, threshold=1e-9)
    assert not early.converged
    assert early.n_iterations == 1


def test_large_populations_hold_no_matrix_by_themselves():
    """9000 x 8500 cells are beyond the stated size: temporaries of the gradient below a tenth of the costs, 306 MB."""
    x, y = (jax.ShapeDtypeStruct((n, 5), jnp.float32) for n in (9000, 8500))
    assert 8500**2 > sinkhorn.DENSE_PAIRS
    for f in (annealed_sinkhorn_divergence, lambda x, y, blur: solve_sinkhorn(x, y, blur=blur).divergence):
        compiled = jax.jit(jax.grad(partial(f, blur=BLUR), argnums=(0, 1))).lower(x, y).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * 4 * 9000 * 8500
