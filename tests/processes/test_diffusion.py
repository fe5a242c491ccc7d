"""Diffusion as linear algebra: what is Gaussian conditioning, and what DDIM and DDPM must keep.

For Gaussian data the optimal denoiser is known, so that a sampler's error is its own.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scjax.kernels import gaussian, mean_embedding, noise_covariance
from scjax.processes import diffusion
from scjax.processes.diffusion import (
    ddim_step,
    ddpm_step,
    diffuse,
    guide,
    make_schedule,
    marginal,
    noise_from_x0,
    posterior,
    respaced,
    set_noise,
    spaced,
    truncated,
    x0_from_noise,
)

NAMES = ("linear", "cosine", "power_cosine")
SCHEDULES = {name: make_schedule(name, 60) for name in NAMES}
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=NAMES)
TIMES = (0, 1, 7, 30, 58, 59)


def at(t):
    return jnp.asarray(t, jnp.int32)


@pytest.mark.parametrize("name", NAMES)
def test_a_schedule_takes_the_signal_away(name):
    schedule = make_schedule(name)
    assert schedule.n_times == 1000
    np.testing.assert_allclose(schedule.alphas_cumprod, np.cumprod(1 - schedule.betas), rtol=1e-14)
    assert (np.diff(schedule.alphas_cumprod) < 0).all()
    assert schedule.alphas_cumprod[0] > 0.999
    assert schedule.alphas_cumprod[-1] < 1e-2
    assert all(table.dtype == np.float64 and table.shape == (1000,) for table in schedule)


def test_schedules_by_their_definition():
    """The linear one ends at beta 0.02 of 1000 times; the cosines differ by a power until betas are cut off."""
    linear = make_schedule("linear")
    np.testing.assert_allclose(linear.betas[[0, -1]], [1e-4, 0.02])
    np.testing.assert_allclose(linear.alphas_cumprod[[99, 499, 999]], [0.897, 0.0786, 4.0e-5], rtol=1e-2)
    # Other lengths are the same process in other steps, to O(beta).
    np.testing.assert_allclose(make_schedule("linear", 2000).alphas_cumprod[999], linear.alphas_cumprod[499], rtol=0.02)
    cosine, power = make_schedule("cosine", 50), make_schedule("power_cosine", 50, power=0.3)
    np.testing.assert_allclose(power.alphas_cumprod[:-1], cosine.alphas_cumprod[:-1] ** 0.3, rtol=1e-12)
    assert cosine.betas[-1] == power.betas[-1] == 0.999
    np.testing.assert_allclose(make_schedule("power_cosine", 50, power=1.0).betas, cosine.betas)


@each_schedule
@pytest.mark.parametrize("t", TIMES)
def test_posterior_is_conditioning(schedule, t, x64):
    """In the coordinates (x_0, z, z'): x_{t-1} = sqrt(a) x_0 + sqrt(1 - a) z, and x_t one step further with z'.

    What the posterior's mean misses of x_{t-1} holds no x_0, does not correlate with x_t and has the posterior's
    variance. z and z' may be vectors or random elements of a Hilbert space: nothing else is used.
    """
    x0, z, z_step = jnp.eye(3)
    before = schedule.alphas_cumprod_prev[t]
    previous = np.sqrt(before) * x0 + np.sqrt(1 - before) * z
    x_t = np.sqrt(1 - schedule.betas[t]) * previous + np.sqrt(schedule.betas[t]) * z_step
    law = posterior(schedule, x0, x_t, at(t))
    missed = previous - law.mean
    np.testing.assert_allclose(missed[0], 0, atol=1e-12)
    np.testing.assert_allclose(missed[1:] @ x_t[1:], 0, atol=1e-12)
    np.testing.assert_allclose(missed[1:] @ missed[1:], law.variance, atol=1e-12)
    if t > 0:
        np.testing.assert_allclose(law.log_variance, np.log(law.variance), rtol=1e-12)
    else:  # the second time's, where the logarithm of zero stood
        np.testing.assert_allclose(law.log_variance, posterior(schedule, x0, x_t, at(1)).log_variance)
    # x_t has the marginal law: its share of x_0, and the variance of the rest.
    law = marginal(schedule, x0, at(t))
    np.testing.assert_allclose(x_t[0] * x0, law.mean, atol=1e-12)
    np.testing.assert_allclose([x_t[1:] @ x_t[1:], np.exp(law.log_variance)], law.variance, rtol=1e-12)


@each_schedule
def test_x0_noise_and_state_tell_each_other(schedule, x64):
    rng = np.random.default_rng(0)
    x0, noise = (jnp.asarray(rng.normal(size=(6, 4, 3))) for _ in range(2))
    t = at(TIMES)  # one for each of 6 sets
    x_t = diffuse(schedule, x0, t, noise)
    np.testing.assert_allclose(noise_from_x0(schedule, x0, x_t, t), noise, atol=1e-9)
    np.testing.assert_allclose(x0_from_noise(schedule, noise, x_t, t), x0, atol=1e-9)
    for i, one in enumerate(TIMES):  # one time for all is the same as one for each set
        np.testing.assert_array_equal(diffuse(schedule, x0[i], at(one), noise[i]), x_t[i])


@each_schedule
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_keeps_the_marginals(schedule, eta, x64):
    """With the true x_0, a step from x_t ~ q(x_t | x_0) arrives at q(x_{t-1} | x_0), whatever eta."""
    x0, z, fresh = jnp.eye(3)
    for t in TIMES:
        previous = ddim_step(schedule, x0, diffuse(schedule, x0, at(t), z), at(t), fresh, eta=eta)
        before = schedule.alphas_cumprod_prev[t]
        np.testing.assert_allclose(previous[0], np.sqrt(before), atol=1e-12)
        np.testing.assert_allclose(previous[1:] @ previous[1:], 1 - before, atol=1e-12)
        assert (np.abs(previous[2]) > 1e-6) == (eta > 0 and t > 0)


@each_schedule
def test_ddim_at_eta_one_is_ddpm_with_the_small_variance(schedule, x64):
    rng = np.random.default_rng(1)
    x0, x_t, noise = (jnp.asarray(rng.normal(size=(6, 4, 3))) for _ in range(3))
    t = at(TIMES)
    ours = ddim_step(schedule, x0, x_t, t, noise, eta=1.0)
    np.testing.assert_allclose(ours, ddpm_step(schedule, x0, x_t, t, noise, variance="small"), atol=1e-10)
    np.testing.assert_allclose(ours[0], x0[0], atol=1e-12)  # t = 0


def test_ddpm_noise(x64):
    """Large: beta; small: the posterior's variance; both to the power noise_weight, and none at t = 0."""
    schedule = SCHEDULES["linear"]
    x0, x_t = jnp.zeros((2, 3))
    draw = lambda t, **kw: ddpm_step(schedule, x0, x_t, at(t), jnp.ones(3), **kw)[0]  # noqa: E731
    for weight in (0.5, 0.8):
        for t in (1, 30):
            np.testing.assert_allclose(draw(t, noise_weight=weight), schedule.betas[t] ** weight)
            small = schedule.posterior_variance[t] ** weight
            np.testing.assert_allclose(draw(t, noise_weight=weight, variance="small"), small)
    assert draw(0) == draw(0, variance="small") == 0


def test_respaced_keeps_what_the_network_was_told(x64):
    schedule = make_schedule("linear")
    times, chain = respaced(schedule, 100)
    assert (times[0], times[-1], len(times)) == (0, 999, 100)
    assert (np.diff(times) >= 10).all()
    np.testing.assert_array_equal(chain.alphas_cumprod, schedule.alphas_cumprod[times])
    # The step between two kept times is all the steps between them.
    np.testing.assert_allclose(1 - chain.betas[1], np.prod(1 - schedule.betas[times[0] + 1 : times[1] + 1]))
    for ours, whole in zip(respaced(schedule, 1000).schedule, schedule, strict=True):
        np.testing.assert_allclose(ours, whole, rtol=1e-9, atol=1e-15)
    assert respaced(schedule, 1).times.tolist() == [999]  # one step, from noise to x_0
    assert all(np.isfinite(table).all() for table in respaced(schedule, 1).schedule)


def test_truncated_is_the_beginning():
    schedule = make_schedule("cosine", 100)
    times, chain = truncated(schedule, 10)
    assert times.tolist() == list(range(10))
    for ours, whole in zip(chain, schedule, strict=True):
        np.testing.assert_array_equal(ours, whole[:10])
    for spacing, function in (("truncated", truncated), ("respaced", respaced)):
        for ours, theirs in zip(spaced(schedule, 7, spacing), function(schedule, 7), strict=True):
            np.testing.assert_array_equal(ours, theirs)


MEAN, STD = 0.7, 0.4


def optimal_denoiser(schedule, x_t, t):
    """E[x_0 | x_t] for x_0 ~ N(MEAN, STD^2)."""
    a = schedule.alphas_cumprod[t]
    return MEAN + np.sqrt(a) * STD**2 / (a * STD**2 + 1 - a) * (x_t - np.sqrt(a) * MEAN)


def sampled_law(n_steps, step, spacing="respaced"):
    """Mean and standard deviation of samples, exactly: every step is affine, so three points tell the map."""
    _, schedule = spaced(make_schedule("linear"), n_steps, spacing)
    points, variance = jnp.asarray([0.0, 1.0]), 0.0
    advance = jax.jit(lambda x, x0, t, noise: step(schedule, x0, x, t, noise))
    for t in reversed(range(n_steps)):
        denoised = optimal_denoiser(schedule, points, t)
        still, moved = advance(points, denoised, at(t), jnp.zeros(2)), advance(points, denoised, at(t), jnp.ones(2))
        slope = (still[1] - still[0]) / (points[1] - points[0])
        variance = slope**2 * variance + (moved - still)[0] ** 2
        points = still
    return float(points[0]), float(jnp.hypot(points[1] - points[0], jnp.sqrt(variance)))


def test_ddim_converges_to_gaussian_data_at_first_order(x64):
    """Halving the steps' length halves the error of the spread; the mean starts from zero, as alpha_bar = 4e-5."""
    ddim = lambda schedule, x0, x, t, noise: ddim_step(schedule, x0, x, t)  # noqa: E731
    laws = {n: sampled_law(n, ddim) for n in (10, 20, 40, 80)}
    errors = np.array([abs(std - STD) for _, std in laws.values()])
    assert (errors[1:] < 0.7 * errors[:-1]).all()
    assert errors[-1] < 0.05 * STD
    for mean, _ in laws.values():
        np.testing.assert_allclose(mean, MEAN, atol=0.01)


@pytest.mark.parametrize("variance", ["large", "small"])
def test_ddpm_samples_gaussian_data(variance, x64):
    """The true reverse variance lies between the two, which meet as steps get short."""
    errors = []
    for n in (25, 100):
        mean, std = sampled_law(n, partial(ddpm_step, variance=variance))
        np.testing.assert_allclose(mean, MEAN, atol=0.01)
        errors.append((std - STD) / STD)
    assert abs(errors[1]) < 0.5 * abs(errors[0]) < 0.2
    assert (errors[1] > 0) == (variance == "large")


def test_a_truncated_chain_started_from_noise_ends_elsewhere(x64):
    """100 first times of 1000 begin where the signal counts 0.947: a start without it moves the mean and widens."""
    ddim = lambda schedule, x0, x, t, noise: ddim_step(schedule, x0, x, t)  # noqa: E731
    (mean, std), (mean_cut, std_cut) = (sampled_law(100, ddim, spacing) for spacing in ("respaced", "truncated"))
    np.testing.assert_allclose([mean, std], [MEAN, STD], atol=0.02)
    assert abs(mean_cut - MEAN) > 0.2
    assert std_cut > 1.3 * STD


def test_guidance_one_is_the_conditional_prediction():
    conditional, unconditional = jnp.asarray([1.0, 3.0]), jnp.asarray([2.0, 0.1])
    np.testing.assert_array_equal(guide(conditional, unconditional, 1.0), conditional)
    np.testing.assert_array_equal(guide(conditional, unconditional, 0.0), unconditional)
    # strength w = 1 of the publication: 2 conditional - unconditional
    np.testing.assert_allclose(guide(conditional, unconditional, 2.0), 2 * conditional - unconditional)
    np.testing.assert_allclose(guide(conditional, unconditional, jnp.asarray(3.5)), [-1.5, 10.25])


@pytest.mark.parametrize("shared", [0.0, 0.3, 1.0])
def test_cells_of_a_set_share_noise(shared, key):
    """Every entry is N(0, 1); two cells of one set correlate by `shared`, of two sets and of two genes not at all."""
    n = 20_000
    noise = np.asarray(set_noise(key, (n, 2, 2), shared), np.float64).reshape(n, 4)  # c0g0 c0g1 c1g0 c1g1
    expected = np.eye(4) + shared * np.eye(4)[[2, 3, 0, 1]]
    np.testing.assert_allclose(np.cov(noise.T), expected, atol=4.5 * np.sqrt(2 / n))
    np.testing.assert_allclose(noise.mean(0), 0, atol=4.5 / np.sqrt(n))
    np.testing.assert_allclose(noise[:-1].T @ noise[1:] / n, 0, atol=4.5 / np.sqrt(n))
    np.testing.assert_array_equal(set_noise(key, (n, 2, 2), shared).reshape(n, 4), noise.astype(np.float32))
    assert (set_noise(key, (3, 2), 0.5) != set_noise(jax.random.key(1), (3, 2), 0.5)).all()


def test_forward_process_of_an_embedding(key, x64):
    """mu_t = sqrt(1 - beta) mu_{t-1} + sqrt(beta) Xi, step by step, has the marginal N(sqrt(a) mu_0, (1 - a) C).

    mu is a function, seen at six points; Xi is what noise on two cells does to their embedding, of rank four at most.
    `diffuse` gives the same law in one step.
    """
    schedule, n = make_schedule("linear", 25), 20_000
    kernel = partial(gaussian, bandwidth=0.8)
    x = jax.random.normal(key, (2, 2))
    points = jax.random.normal(jax.random.key(1), (6, 2))
    mu0 = mean_embedding(kernel, x, points)
    covariance = noise_covariance(kernel, x, points, points)
    values, vectors = jnp.linalg.eigh(covariance)
    assert (values[:2] < 1e-12).all()
    assert values[2] > 1e-6
    root = vectors[:, 2:] * jnp.sqrt(values[2:])[None]

    def draw(key):
        """Xi at the points, n times."""
        return jax.random.normal(key, (n, 4)) @ root.T

    t = 14
    mu = jnp.broadcast_to(mu0, (n, 6))
    for step, beta in enumerate(schedule.betas[: t + 1]):
        mu = np.sqrt(1 - beta) * mu + np.sqrt(beta) * draw(jax.random.fold_in(key, step))
    law = marginal(schedule, mu0, at(t))
    at_once = diffuse(schedule, jnp.broadcast_to(mu0, (n, 6)), at(t), draw(jax.random.fold_in(key, t + 1)))
    spread = np.sqrt(law.variance * np.diag(covariance))
    for draws in (mu, at_once):
        np.testing.assert_array_less(np.abs(draws.mean(0) - law.mean), 4.5 * spread / np.sqrt(n))
        error = np.abs(np.cov(draws.T) - law.variance * covariance)
        np.testing.assert_array_less(error, 4.5 * np.outer(spread, spread) * np.sqrt(2 / n))


def test_steps_trace_with_a_traced_time():
    """A sampler scans over times: one compilation for all of them."""
    schedule, x = SCHEDULES["linear"], jnp.ones((2, 3, 4))
    steps = jax.jit(
        lambda t: (ddim_step(schedule, x, x, t), ddpm_step(schedule, x, x, t, x), posterior(schedule, x, x, t))
    )
    for t in (at(3), at([3, 3])):
        out = steps(t)
        assert out[0].shape == out[1].shape == (2, 3, 4)
        assert out[2].variance.shape == t.shape
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(out))
    assert steps._cache_size() == 2


LINEAR, STATE = SCHEDULES["linear"], jnp.ones((2, 3, 4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_schedule("square"), "name.*square"),
        (lambda: make_schedule("cosine", 1), "n_times must be at least 2; got 1"),
        (lambda: make_schedule("linear", 20), "n_times of a linear schedule must be at least 21; got 20"),
        (lambda: make_schedule("power_cosine", power=0.0), "power must be a positive number; got 0.0"),
        (lambda: respaced(LINEAR, 0), "n_steps must be at least 1; got 0"),
        (lambda: truncated(LINEAR, 61), "n_steps must be at most the schedule's 60 times; got 61"),
        (lambda: spaced(LINEAR, 5, "even"), "spacing.*even"),
        (lambda: ddim_step(LINEAR, STATE, STATE, at(1), eta=1.1), r"eta must lie in \[0, 1\]; got 1.1"),
        (lambda: ddim_step(LINEAR, STATE, STATE, at(1), eta=0.5), "pass noise of the shape of x_t. Got eta=0.5"),
        (lambda: ddpm_step(LINEAR, STATE, STATE, at(1), STATE, variance="big"), "variance.*big"),
        (lambda: ddpm_step(LINEAR, STATE, STATE, at(1), STATE, noise_weight=-1.0), "noise_weight must be zero or a"),
        (
            lambda: diffuse(LINEAR, STATE, at([1, 2, 3]), STATE),
            r"got the shape \(3,\) for cells of the shape \(2, 3, 4",
        ),
        (lambda: set_noise(jax.random.key(0), (2, 3), shared=-0.1), r"shared must lie in \[0, 1\]; got -0.1"),
        (lambda: set_noise(jax.random.key(0), (3,)), r"shape must end with cells and genes.* got \(3,\)"),
    ],
)
def test_bad_input(make, message):
    """A word that is not an option is refused by the hints first, where they are checked."""
    with pytest.raises((ValueError, TypeError), match=f"(?s){message}"):
        make()


def test_all_names_exist():
    assert all(hasattr(diffusion, name) for name in diffusion.__all__)
