"""The straight path, starts drawn by their law, and solvers that converge as fast as their order says."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scjax.processes.flow import ERK38, endpoint, integrate, poisson_rates, poisson_start, straight_path

WAVES = np.array([[1.0, 2.0, 3.0], [1.5, 0.5, 2.5]])  # a rate for each entry, so that no two are alike


def cells(n=2, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(n, 3)), dtype)


def swinging(t, x):
    """dx/dt = cos(w t) x, solved by x0 exp(sin(w t) / w)."""
    return jnp.cos(jnp.asarray(WAVES, x.dtype) * t) * x


def swung(x0, t):
    return np.asarray(x0) * np.exp(np.sin(WAVES * t) / WAVES)


# -- the path


@pytest.mark.usefixtures("x64")
def test_the_path_leads_from_start_to_data_with_its_velocity():
    x0, x1 = cells(4, dtype=jnp.float64), cells(4, 1, jnp.float64)
    path = lambda t: straight_path(x0, x1, jnp.full(4, t))[0]  # noqa: E731
    np.testing.assert_array_equal(path(0.0), x0)
    np.testing.assert_array_equal(path(1.0), x1)
    _, dx_dt = jax.jvp(path, (0.3,), (1.0,))
    np.testing.assert_allclose(straight_path(x0, x1, jnp.full(4, 0.3))[1], dx_dt, rtol=1e-14)


@pytest.mark.usefixtures("x64")
def test_the_endpoint_of_the_true_velocity_is_the_data_whatever_the_time():
    x0, x1, t = cells(4, dtype=jnp.float64), cells(4, 1, jnp.float64), jnp.array([0.0, 0.2, 0.9, 1.0])
    x_t, u_t = straight_path(x0, x1, t)
    np.testing.assert_allclose(endpoint(x_t, u_t, t), x1, rtol=1e-14)
    # A wrong velocity is wrong by what is left of the way: nothing for the last cell.
    np.testing.assert_allclose(endpoint(x_t, u_t + 1, t) - x1, np.tile(1 - t[:, None], (1, 3)), atol=1e-14)


# -- Poisson starts


def test_rates_follow_the_formula():
    counts = np.array([[3.0, 0.0, 1.0], [0.0, 0.0, 8.0]])
    source = jnp.asarray(np.log1p(counts), jnp.float32)
    # float32 logarithms: 1e-6 of a count
    np.testing.assert_allclose(poisson_rates(source, alpha=0.5), np.maximum(0.5 * counts, 1e-8), rtol=3e-6)
    scaled = poisson_rates(source, target_sum=20.0, alpha=0.5)
    np.testing.assert_allclose(scaled, np.maximum([[15, 0, 5], [0, 0, 20]], 1e-8), rtol=3e-6)


def test_a_cell_without_counts_gets_a_start_without_counts():
    """Nothing to scale, so no target sum can be reached; and no NaN."""
    start = poisson_start(jax.random.key(0), jnp.zeros((5, 3)), target_sum=100.0)
    np.testing.assert_array_equal(start, 0)


@pytest.mark.parametrize("target_sum", [None, 30.0])
def test_starts_have_poisson_s_mean_and_variance(target_sum):
    """Of counts, both are the rate; 4 standard errors: sqrt(rate / n), and sqrt((rate + 2 rate^2) / n)."""
    source = jnp.log1p(jnp.array([0.0, 0.4, 3.0, 12.0]))
    n = 4000
    counts = np.expm1(poisson_start(jax.random.key(1), jnp.tile(source, (n, 1)), target_sum=target_sum, alpha=0.8))
    np.testing.assert_allclose(counts, np.round(counts), atol=1e-4)  # log1p of whole numbers, in float32
    rates = np.array([0, 0.4, 3, 12]) * (0.8 if target_sum is None else target_sum / 15.4)
    assert (np.abs(counts.mean(0) - rates) <= 4 * np.sqrt(rates / n) + 1e-4).all()
    assert (np.abs(counts.var(0) - rates) <= 4 * np.sqrt((rates + 2 * rates**2) / n) + 1e-4).all()
    if target_sum is not None:
        assert abs(counts.sum(1).mean() - target_sum) < 4 * math.sqrt(target_sum / n)


# -- solvers


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("rk4_38", 4)])
def test_the_error_falls_with_the_order_of_the_solver(solver, order):
    """Half the step, 2^-order of the error; at these steps what the next order adds changes that by a tenth."""
    x0 = cells(dtype=jnp.float64)
    errors = [np.abs(integrate(swinging, x0, solver=solver, n_steps=n) - swung(x0, 1)).max() for n in (32, 64)]
    assert abs(np.log2(errors[0] / errors[1]) - order) < 0.15, errors


@pytest.mark.usefixtures("x64")
def test_the_fourth_order_rule_is_the_three_eighths_one():
    """On a field that tells it from the classical rule: one step, written out."""
    x, h = cells(dtype=jnp.float64), 1.0
    field = lambda t, x: jnp.sin(3 * t + x**2)  # noqa: E731
    k1 = field(0, x)
    k2 = field(h / 3, x + h * k1 / 3)
    k3 = field(2 * h / 3, x + h * (k2 - k1 / 3))
    k4 = field(h, x + h * (k1 - k2 + k3))
    got = integrate(field, x, solver="rk4_38", n_steps=1)
    np.testing.assert_allclose(got, x + h * (k1 + 3 * k2 + 3 * k3 + k4) / 8, rtol=1e-14)
    assert ERK38().order(None) == 4


@pytest.mark.usefixtures("x64")
def test_adaptive_steps_keep_their_tolerance():
    """The estimate is of one step and not of the way: the sum of some ten steps may be ten times the tolerance."""
    x0 = cells(dtype=jnp.float64)
    errors = [
        np.abs(integrate(swinging, x0, solver="tsit5", tolerance=tol) - swung(x0, 1)).max() for tol in (1e-3, 1e-8)
    ]
    assert errors[0] < 1e-2
    assert errors[1] < 1e-7
    assert errors[1] < errors[0] / 100


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("solver", ["heun", "tsit5"])
def test_a_trajectory_has_both_ends_and_equal_steps(solver):
    x0 = cells(dtype=jnp.float64)
    path = integrate(swinging, x0, solver=solver, n_steps=40, tolerance=1e-7, trajectory=True)
    assert path.shape == (41, 2, 3)
    np.testing.assert_array_equal(path[0], x0)
    last = integrate(swinging, x0, solver=solver, n_steps=40, tolerance=1e-7)
    # a given number of steps are the same ones; tsit5 begins anew at each time
    np.testing.assert_allclose(path[-1], last, rtol=1e-12 if solver == "heun" else 1e-5)
    # Heun's error at 1/40 is (3/40)^2
    atol = 3e-3 if solver == "heun" else 1e-5
    np.testing.assert_allclose(path, np.stack([swung(x0, t) for t in np.linspace(0, 1, 41)]), atol=atol)


def test_adaptive_steps_that_do_not_arrive_give_nan():
    """A pole halfway: cells that never came to t = 1 must not pass for cells."""
    x0 = cells()
    run = jax.jit(lambda c: integrate(lambda t, x: x**2 * c, x0, solver="tsit5"))
    assert np.isfinite(run(0.1)).all()
    assert np.isnan(run(100.0)).all()


def test_states_keep_their_dtype():
    """Float32 states stay so where float64 is to be had."""
    with jax.enable_x64(True):
        state = jax.ShapeDtypeStruct((2, 3), jnp.float32)
        assert jax.eval_shape(lambda x: integrate(swinging, x, n_steps=2), state).dtype == jnp.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "rk4"}, "solver.*rk4"),
        ({"n_steps": 0}, "n_steps must be at least 1; got 0"),
        ({"tolerance": 0.0}, "tolerance must be a positive number; got 0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    # beartype sees an unknown solver before the function does
    with pytest.raises(Exception, match=message):
        integrate(swinging, cells(), **settings)
