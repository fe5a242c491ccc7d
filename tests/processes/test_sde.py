"""The solver against Ornstein-Uhlenbeck processes, a plain scan, and its own promises about noise and time."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scjax.processes.sde import brownian_increments, simulate, time_grid

RATE, SIGMA = 1.3, 0.7


def decay(x, step):
    """An Ornstein-Uhlenbeck population whose cells are also drawn to their mean."""
    return -RATE * x + 0.5 * (x.mean(0, keepdims=True) - x)


def noise(x):
    return jnp.full((1, 1), SIGMA, x.dtype)


def coupled(x, step):
    """Not linear, and every cell feels every other."""
    return jnp.tanh(x) @ jnp.asarray([[0.3, -1.0], [0.8, -0.2]], x.dtype) - jnp.sin(x.mean(0, keepdims=True) + x)


def uneven(x):
    """Multiplicative noise."""
    return 0.3 + 0.1 * jnp.cos(x)


def initial(n=6, d=2, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(n, d)), dtype)


# -- the mathematics


def test_strong_order_is_one_for_additive_noise(x64):
    """Euler-Maruyama on one Brownian path, coarse against fine: halving dt halves the error (Milstein's order).

    The fine path has 1/16 of the finest step measured, so it blurs the slope by less than 2^-4; 300 cells leave less.
    """
    x0, end, n_fine = initial(300, 1, dtype=jnp.float64), 1.0, 1024
    fine = brownian_increments(jax.random.key(0), np.full(n_fine, end / n_fine), x0.shape, jnp.float64)

    def at_the_end(n_steps):
        dW = fine.reshape(n_steps, -1, *x0.shape).sum(1)
        return simulate(decay, noise, x0, (0.0, end), None, dt=end / n_steps, dW=dW).x[-1]

    reference = at_the_end(n_fine)
    n_steps = np.array([8, 16, 32, 64])
    errors = [float(jnp.sqrt(jnp.mean((at_the_end(n) - reference) ** 2))) for n in n_steps]
    slope = -np.polyfit(np.log(n_steps), np.log(errors), 1)[0]
    assert abs(slope - 1) < 0.1, f"strong order {slope:.3f}, errors {errors}"


def test_mean_and_covariance_of_ornstein_uhlenbeck():
    """The moments of the Euler chain itself are known: x_n = a^n x_0 + sigma sum_k a^k dW, a = 1 - rate dt.

    Held to 4.5 standard errors; they tend to the process's own, which differ by O(dt), here 2 %.
    """
    n, dt, ts = 4000, 0.02, (0.0, 0.5, 2.0)
    x0 = jnp.tile(jnp.asarray([[2.0, -1.0]]), (n, 1))
    run = jax.jit(lambda key: simulate(lambda x, _: -RATE * x, noise, x0, ts, key, dt=dt).x)
    x = np.asarray(run(jax.random.key(1)), np.float64)
    a = 1 - RATE * dt
    for t, cells in zip(ts[1:], x[1:], strict=True):
        n_steps = round(t / dt)
        mean = a**n_steps * np.array([2.0, -1.0])
        variance = SIGMA**2 * dt * (1 - a ** (2 * n_steps)) / (1 - a**2)
        np.testing.assert_allclose(cells.mean(0), mean, atol=4.5 * np.sqrt(variance / n))
        np.testing.assert_allclose(np.cov(cells.T), variance * np.eye(2), atol=4.5 * variance * np.sqrt(2 / n))
        assert mean == pytest.approx(np.exp(-RATE * t) * np.array([2.0, -1.0]), rel=0.05)
        assert variance == pytest.approx(SIGMA**2 * (1 - np.exp(-2 * RATE * t)) / (2 * RATE), rel=0.03)


def test_a_constant_drift_is_exact():
    """Cells move on lines and spend |v|^2 a time unit, whatever the step."""
    v, x0 = jnp.asarray([[3.0, -4.0]]), initial()
    path = simulate(lambda x, _: jnp.broadcast_to(v, x.shape), None, x0, (1.0, 1.3, 3.0), None, dt=0.4)
    for i, t in enumerate((0.0, 0.3, 2.0)):
        np.testing.assert_allclose(path.x[i], x0 + t * v, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(path.kinetic_energy[i], 25 * t, rtol=1e-6)


def test_energy_of_a_linear_drift(x64):
    """With dx = -r x dt it is r |x0|^2 (1 - exp(-2 r t)) / 2; the left-endpoint rule errs by about r dt, relatively."""
    x0, t = initial(dtype=jnp.float64), 0.8
    exact = RATE * np.sum(np.square(x0), -1) * (1 - np.exp(-2 * RATE * t)) / 2
    errors = []
    for dt in (0.01, 0.005):
        path = simulate(lambda x, _: -RATE * x, None, x0, (0.0, t), None, dt=dt)
        errors.append(np.abs(path.kinetic_energy[-1] / exact - 1).max())
        np.testing.assert_allclose(path.x[-1], np.exp(-RATE * t) * x0, rtol=RATE**2 * t * dt)
    assert errors[0] < RATE * 0.01
    np.testing.assert_allclose(errors[1] / errors[0], 0.5, rtol=0.05)  # first order


# -- the same as plainly written


def test_equal_to_a_rematerialised_scan_in_value_and_gradient(x64):
    """Diffrax's path is the loop that one would write, to rounding, with respect to the start and a parameter."""
    x0, ts, dt = initial(dtype=jnp.float64), (0.0, 0.25, 1.0, 1.37), 0.1
    grid = time_grid(ts, dt)
    key = jax.random.key(4)

    def plainly(x0, scale):
        dW = brownian_increments(key, grid.dts, x0.shape, jnp.float64)

        @jax.checkpoint
        def step(state, now):
            x, energy = state
            h, dW = now
            f = scale * coupled(x, None)
            state = x + f * h + uneven(x) * dW, energy + jnp.sum(f**2, -1) * h
            return state, state

        start = (x0, jnp.zeros(len(x0)))
        _, states = jax.lax.scan(step, start, (jnp.asarray(grid.dts), dW))
        return tuple(jnp.concatenate([s[None], path])[grid.observed] for s, path in zip(start, states, strict=True))

    def ours(x0, scale):
        return tuple(simulate(lambda x, i: scale * coupled(x, i), uneven, x0, ts, key, dt=dt))

    def value_and_grad(f):
        def weighed(x0, scale):
            x, energy = f(x0, scale)
            return jnp.sum(jnp.cos(x)) + jnp.sum(energy**2), (x, energy)

        return jax.jit(jax.value_and_grad(weighed, argnums=(0, 1), has_aux=True))(x0, 0.9)

    for a, b in zip(*(jax.tree.leaves(value_and_grad(f)) for f in (ours, plainly)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


# -- noise


@pytest.fixture(scope="module")
def whole():
    """A path of 14 steps, each observed, by the key alone."""
    ts = np.linspace(0.5, 1.9, 15)
    return ts, jax.jit(lambda x0, key: simulate(coupled, uneven, x0, ts, key, dt=0.1))(initial(), jax.random.key(7))


@pytest.mark.parametrize("cuts", [(5,), (1, 2, 9), (13,)])
def test_a_path_cut_in_pieces_is_the_whole_path(whole, cuts):
    """Each piece starts where the last ended and counts its steps on; energies add up. Programs differ in rounding."""
    ts, path = whole
    x, energy = initial(), np.zeros(6, np.float32)
    edges = (0, *cuts, len(ts) - 1)
    for start, stop in zip(edges, edges[1:], strict=False):
        piece = simulate(coupled, uneven, x, ts[start : stop + 1], jax.random.key(7), dt=0.1, first_step=start)
        np.testing.assert_allclose(piece.x, path.x[start : stop + 1], rtol=2e-6, atol=2e-6)
        energy = energy + piece.kinetic_energy[-1]
        x = piece.x[-1]
    np.testing.assert_allclose(energy, path.kinetic_energy[-1], rtol=1e-5)


def test_recorded_noise_replays_the_key(whole):
    ts, path = whole
    grid = time_grid(ts, 0.1)
    dW = brownian_increments(jax.random.key(7), grid.dts, (6, 2))
    replayed = simulate(coupled, uneven, initial(), ts, None, dt=0.1, dW=dW)
    np.testing.assert_allclose(replayed.x, path.x, rtol=2e-6, atol=2e-6)
    # and increments themselves do not depend on how they are drawn
    for first in (3, 11):
        later = brownian_increments(jax.random.key(7), grid.dts[first:], (6, 2), first_step=first)
        np.testing.assert_array_equal(later, dW[first:])


def test_dW_wins_over_the_key_and_zero_dW_is_no_noise():
    x0, zero = initial(), jnp.zeros((3, 6, 2))
    quiet = simulate(coupled, None, x0, (0.0, 0.3), None, dt=0.1)
    for key in (None, jax.random.key(0)):
        path = simulate(coupled, uneven, x0, (0.0, 0.3), key, dt=0.1, dW=zero)
        np.testing.assert_allclose(path.x, quiet.x, rtol=1e-6, atol=1e-6)


def test_increments_are_brownian():
    """Variance dt, step by step and uneven; independent of each other."""
    dts = np.array([0.1, 0.4, 0.025])
    dW = np.asarray(brownian_increments(jax.random.key(3), dts, (200, 50)), np.float64).reshape(3, -1)
    n = dW.shape[1]
    np.testing.assert_allclose(dW.mean(1), 0, atol=4.5 * np.sqrt(dts.max() / n))
    np.testing.assert_allclose(dW.var(1), dts, rtol=4.5 * np.sqrt(2 / n))
    np.testing.assert_allclose(np.corrcoef(dW)[~np.eye(3, dtype=bool)], 0, atol=4.5 / np.sqrt(n))
    assert brownian_increments(jax.random.key(3), dts, (2, 2), jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize("n_steps", [25, 100, 333])
def test_every_step_has_its_own_noise_and_number(n_steps):
    """No step is made twice or left out, whatever their number: 5 (1 / 25) is not 0.2 in binary.

    With a drift of k at step k and noise alone besides, the path is a cumulated sum of integers.
    """
    dW = jnp.asarray(np.random.default_rng(0).integers(-9, 10, (n_steps, 2, 1)), jnp.float32)
    ts = np.arange(n_steps + 1.0)

    def number(x, step):
        return jnp.full_like(x, step)

    @jax.jit
    def at(dW):
        run = partial(simulate, number, jnp.ones_like, jnp.zeros((2, 1)), key=None, dt=1.0, dW=dW, first_step=3)
        return run(ts).x, run(ts[[0, -1]]).x

    every, last = at(dW)
    exact = np.cumsum(np.asarray(dW) + (3.0 + np.arange(n_steps))[:, None, None], axis=0)
    np.testing.assert_array_equal(every[1:], exact)
    np.testing.assert_array_equal(last[1], exact[-1])


# -- times


@pytest.mark.parametrize(
    ("ts", "dt"),
    [((0.0, 1.0, 3.0), 0.1), ((3.3, 4.7, 12.0), 0.1), ((0.0, 0.01, 0.5), 0.1), ((-2.5, 0.0, math.pi), 0.07)],
)
def test_grid_meets_every_time_in_equal_steps(ts, dt):
    grid = time_grid(ts, dt)
    at = np.concatenate([[0], np.cumsum(grid.dts)])
    np.testing.assert_allclose(at[grid.observed], np.array(ts) - ts[0], atol=1e-12)
    assert grid.dts.max() <= dt * (1 + 1e-6)
    for i, gap in enumerate(np.diff(ts)):
        dts = grid.dts[grid.observed[i] : grid.observed[i + 1]]
        assert np.ptp(dts) == 0
        assert gap / (len(dts) - 1 or math.nan) > dt or len(dts) == 1  # one fewer would be too long


def test_decimal_steps_are_not_one_too_many():
    """0.3 / 0.1 is 2.9999999999999996 and 0.7 / 0.1 6.999999999999999, but 0.6 / 0.2 and its like may round up."""
    for n in range(1, 200):
        assert len(time_grid((0.0, n * 0.1), 0.1).dts) == n
        assert len(time_grid((3.3, 3.3 + n * 0.1), 0.1).dts) == n


def test_observations_are_taken_at_grid_points():
    """At uneven times the path is that of the finest list of times, read where asked."""
    x0, ts = initial(), (0.0, 0.25, 0.95, 1.0)
    grid = time_grid(ts, 0.1)
    every = tuple(np.concatenate([[0], np.cumsum(grid.dts)]))
    run = lambda ts: simulate(coupled, uneven, x0, ts, jax.random.key(2), dt=0.1)  # noqa: E731
    some, all_ = run(ts), run(every)
    np.testing.assert_allclose(some.x, all_.x[grid.observed], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(some.kinetic_energy, all_.kinetic_energy[grid.observed], rtol=1e-5)


def test_one_time_is_the_start():
    path = simulate(coupled, None, initial(), (2.0,), None, dt=0.1)
    np.testing.assert_array_equal(path.x, initial()[None])
    np.testing.assert_array_equal(path.kinetic_energy, jnp.zeros((1, 6)))


# -- bad input

run = partial(simulate, coupled, noise, jnp.zeros((6, 2)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: time_grid((0.0, 2.0, 1.0), 0.1), "ts must increase strictly; 1.0 after 2.0 is unsorted"),
        (lambda: time_grid((0.0, 1.0, 1.0), 0.1), "1.0 after 1.0 is repeated"),
        (lambda: time_grid((), 0.1), "ts must hold at least the time of the first state"),
        (lambda: time_grid((0.0, float("inf")), 0.1), "ts must be finite"),
        (lambda: time_grid((0.0, 1.0), 0.0), "dt must be a positive number; got 0.0"),
        (lambda: run((1.0, 0.0), jax.random.key(0), dt=0.1), "unsorted"),
        (lambda: run((0.0, 0.3), None, dt=0.1), "pass a key, or recorded increments dW"),
        (
            lambda: run((0.0, 0.3), None, dt=0.1, dW=jnp.zeros((2, 6, 2))),
            r"dW must have the shape \(steps, cells, dims\) = \(3, 6, 2\); got \(2, 6, 2\)",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_traced_times_are_refused():
    with pytest.raises(TypeError, match="ts"):
        jax.jit(lambda ts: run(ts, jax.random.key(0), dt=0.1).x)(jnp.arange(3.0))
