r"""Discrete-time Gaussian diffusion: noise schedules, q(x_t | x_0), its posterior, and DDPM and DDIM steps back.

    x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise,      t = 0, ..., n - 1,      x_{-1} = x_0
    x_t | x_0 ~ N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) C)

with alpha_bar the running product of 1 - beta and C the covariance of the noise: the identity for cells, a covariance
operator for an element of a Hilbert space. No step asks what C is. All are linear in (x_0, x_t, noise), so they hold
for cells and for a mean embedding in any coordinates alike.

t counts from 0, the least noise. It is one number, or one for each of the leading axes of x: int[sets] goes with
float[sets, cells, genes]. Times outside of the schedule are not noticed: JAX takes the nearest.

References: Ho, Jain and Abbeel, "Denoising diffusion probabilistic models", NeurIPS 2020 (DDPM); Song, Meng and Ermon,
"Denoising diffusion implicit models", ICLR 2021 (DDIM); Ho and Salimans, "Classifier-free diffusion guidance" (2022).
"""

from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from scjax.check import at_least, non_negative, one_of, positive

__all__ = [
    "Chain",
    "Normal",
    "Schedule",
    "ScheduleName",
    "Spacing",
    "Variance",
    "ddim_step",
    "ddpm_step",
    "diffuse",
    "guide",
    "make_schedule",
    "marginal",
    "noise_from_x0",
    "posterior",
    "respaced",
    "set_noise",
    "spaced",
    "truncated",
    "x0_from_noise",
]

ScheduleName: TypeAlias = Literal["linear", "cosine", "power_cosine"]
Spacing: TypeAlias = Literal["respaced", "truncated"]
Variance: TypeAlias = Literal["large", "small"]
Times: TypeAlias = Int[Array, "*sets"]
State: TypeAlias = Float[Array, "*state"]
Table: TypeAlias = Float[np.ndarray, " times"]


class Schedule(NamedTuple):
    """What each time index of a chain needs, float64[times]: kept in double precision, cast when looked up.

    `alphas_cumprod` is alpha_bar. Its neighbours `_prev` and `_next` are 1 before the first time and 0 after the last.
    Posterior tables are of q(x_{t-1} | x_t, x_0), whose mean is coef1 x_0 + coef2 x_t; its variance at t = 0 is 0, and
    the logarithm takes that of t = 1 there.
    """

    betas: Table
    alphas_cumprod: Table
    alphas_cumprod_prev: Table
    alphas_cumprod_next: Table
    sqrt_alphas_cumprod: Table
    sqrt_one_minus_alphas_cumprod: Table
    log_one_minus_alphas_cumprod: Table
    sqrt_recip_alphas_cumprod: Table
    sqrt_recipm1_alphas_cumprod: Table
    posterior_variance: Table
    posterior_log_variance_clipped: Table
    posterior_mean_coef1: Table
    posterior_mean_coef2: Table

    @property
    def n_times(self) -> int:
        return len(self.betas)


class Chain(NamedTuple):
    """The times that a sampler visits, and the schedule of the chain over just these.

    Attributes:
        times: int[steps], increasing: the time that the network is told at each index.
        schedule: as long as `times`; steps look it up by *index*, not by time.
    """

    times: Int[np.ndarray, " steps"]
    schedule: Schedule


class Normal(NamedTuple):
    """A Gaussian with mean of the state's shape, and a variance for each time asked for."""

    mean: State
    variance: Float[Array, "*sets"]
    log_variance: Float[Array, "*sets"]


def make_schedule(name: ScheduleName, n_times: int = 1000, power: float = 0.3) -> Schedule:
    """One of three schedules.

    "linear": beta rises evenly from 0.1 / n_times to 20 / n_times (1e-4 to 0.02 at 1000 times).
    "cosine": alpha_bar(u) = cos^2(pi/2 (u + 0.008) / 1.008) at u = (t + 1) / n_times, no beta above 0.999.
    "power_cosine": the same alpha_bar to the power `power`, which keeps more of the signal for longer when below 1.

    Raises:
        ValueError: an unknown name, fewer than two times, a power that is not positive, or so few times that a linear
            beta would reach 1 (20 or fewer).

    Reference: Ho et al. 2020; Nichol and Dhariwal, "Improved DDPM", ICML 2021, eq. 17.
    """
    one_of("name", name, get_args(ScheduleName))
    at_least("n_times", n_times, 2)
    positive("power", power)
    if name == "linear":
        at_least("n_times of a linear schedule", n_times, 21)
        betas = np.linspace(0.1 / n_times, 20 / n_times, n_times)
    else:
        u = np.arange(n_times + 1) / n_times
        alpha_bar = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** (2 * (power if name == "power_cosine" else 1.0))
        betas = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    return _tables(betas, np.cumprod(1 - betas))


def _tables(betas: Table, alphas_cumprod: Table) -> Schedule:
    before = np.append(1.0, alphas_cumprod[:-1])
    variance = betas * (1 - before) / (1 - alphas_cumprod)
    # A chain of one time has no second variance; it draws no noise either.
    clipped = np.append(variance[1] if len(betas) > 1 else betas[0], variance[1:])
    return Schedule(
        betas=betas,
        alphas_cumprod=alphas_cumprod,
        alphas_cumprod_prev=before,
        alphas_cumprod_next=np.append(alphas_cumprod[1:], 0.0),
        sqrt_alphas_cumprod=np.sqrt(alphas_cumprod),
        sqrt_one_minus_alphas_cumprod=np.sqrt(1 - alphas_cumprod),
        log_one_minus_alphas_cumprod=np.log(1 - alphas_cumprod),
        sqrt_recip_alphas_cumprod=np.sqrt(1 / alphas_cumprod),
        sqrt_recipm1_alphas_cumprod=np.sqrt(1 / alphas_cumprod - 1),
        posterior_variance=variance,
        posterior_log_variance_clipped=np.log(clipped),
        posterior_mean_coef1=betas * np.sqrt(before) / (1 - alphas_cumprod),
        posterior_mean_coef2=(1 - before) * np.sqrt(1 - betas) / (1 - alphas_cumprod),
    )


def respaced(schedule: Schedule, n_steps: int) -> Chain:
    """The chain over `n_steps` times spread evenly from the first to the last (to the last alone if it is one step).

    alpha_bar at the times kept is what it was, so a network trained on all times is right at each of them.

    Raises:
        ValueError: fewer than one step, or more than the schedule has times.

    Reference: Nichol and Dhariwal, "Improved DDPM", ICML 2021, section 4.
    """
    _check_steps(schedule, n_steps)
    last = schedule.n_times - 1
    times = np.linspace(0, last, n_steps).round().astype(np.int32) if n_steps > 1 else np.array([last], np.int32)
    alphas_cumprod = schedule.alphas_cumprod[times]
    return Chain(times, _tables(1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1]), alphas_cumprod))


def truncated(schedule: Schedule, n_steps: int) -> Chain:
    """The first `n_steps` times of the schedule as they are: what the published sampler runs over.

    A start from pure noise is not what a network has seen at time n_steps - 1 (at 100 of 1000 linear times the signal
    still counts 0.947 and the noise 0.32): `respaced` starts where the chain truly ends.

    Raises:
        ValueError: fewer than one step, or more than the schedule has times.
    """
    _check_steps(schedule, n_steps)
    return Chain(np.arange(n_steps, dtype=np.int32), Schedule(*(table[:n_steps] for table in schedule)))


def spaced(schedule: Schedule, n_steps: int, spacing: Spacing = "respaced") -> Chain:
    """`respaced` or `truncated`, by name."""
    one_of("spacing", spacing, get_args(Spacing))
    return {"respaced": respaced, "truncated": truncated}[spacing](schedule, n_steps)


def _check_steps(schedule: Schedule, n_steps: int) -> None:
    at_least("n_steps", n_steps, 1)
    if n_steps > schedule.n_times:
        raise ValueError(f"n_steps must be at most the schedule's {schedule.n_times} times; got {n_steps!r}.")


def marginal(schedule: Schedule, x0: State, t: Times) -> Normal:
    """q(x_t | x_0)."""
    return Normal(
        mean=_at(schedule.sqrt_alphas_cumprod, t, x0) * x0,
        variance=_look_up(1 - schedule.alphas_cumprod, t, x0.dtype),
        log_variance=_look_up(schedule.log_one_minus_alphas_cumprod, t, x0.dtype),
    )


def diffuse(schedule: Schedule, x0: State, t: Times, noise: State) -> State:
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise: a draw of `marginal` if noise ~ N(0, C)."""
    return _at(schedule.sqrt_alphas_cumprod, t, x0) * x0 + _at(schedule.sqrt_one_minus_alphas_cumprod, t, x0) * noise


def posterior(schedule: Schedule, x0: State, x_t: State, t: Times) -> Normal:
    """q(x_{t-1} | x_t, x_0), variance in units of C. `log_variance` at t = 0 is that at t = 1 instead of -inf."""
    mean = _at(schedule.posterior_mean_coef1, t, x_t) * x0 + _at(schedule.posterior_mean_coef2, t, x_t) * x_t
    return Normal(
        mean=mean,
        variance=_look_up(schedule.posterior_variance, t, x_t.dtype),
        log_variance=_look_up(schedule.posterior_log_variance_clipped, t, x_t.dtype),
    )


def noise_from_x0(schedule: Schedule, x0: State, x_t: State, t: Times) -> State:
    """The noise that leads from x_0 to x_t; in float32 poor for the first times, which have little of it."""
    scale = _at(1 / schedule.sqrt_one_minus_alphas_cumprod, t, x_t)
    return scale * (x_t - _at(schedule.sqrt_alphas_cumprod, t, x_t) * x0)


def x0_from_noise(schedule: Schedule, noise: State, x_t: State, t: Times) -> State:
    """The x_0 from which this noise leads to x_t; in float32 poor for the last times, which keep little signal."""
    return (
        _at(schedule.sqrt_recip_alphas_cumprod, t, x_t) * x_t
        - _at(schedule.sqrt_recipm1_alphas_cumprod, t, x_t) * noise
    )


def ddim_step(
    schedule: Schedule, x0: State, x_t: State, t: Times, noise: State | None = None, *, eta: float = 0.0
) -> State:
    r"""x_{t-1} of DDIM, from a predicted x_0:

    sqrt(alpha_bar_{t-1}) x_0 + sqrt(1 - alpha_bar_{t-1} - sigma_t^2) eps(x_0, x_t) + sigma_t noise,
    sigma_t = eta sqrt((1 - alpha_bar_{t-1}) / (1 - alpha_bar_t)) sqrt(1 - alpha_bar_t / alpha_bar_{t-1}).

    At t = 0 it is x_0. eta = 0 draws nothing; eta = 1 is DDPM with the posterior's ("small") variance.

    Raises:
        ValueError: eta outside [0, 1], or above 0 without noise.
    """
    _check_share("eta", eta)
    if eta and noise is None:
        raise ValueError(f"eta above 0 adds noise in every step: pass noise of the shape of x_t. Got eta={eta!r}.")
    now, before = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    sigma = eta * np.sqrt((1 - before) / (1 - now)) * np.sqrt(1 - now / before)
    towards = np.sqrt(np.maximum(1 - before - sigma**2, 0) / (1 - now))
    # eps written out in x_0 and x_t, and the coefficients joined in float64: dividing by sqrt(alpha_bar) on the way,
    # as the formula through eps does, loses digits where alpha_bar is tiny.
    x = _at(np.sqrt(before) - towards * np.sqrt(now), t, x_t) * x0 + _at(towards, t, x_t) * x_t
    return x + _at(sigma, t, x_t) * noise if eta else x  # pyright: ignore[reportOperatorIssue]


def ddpm_step(
    schedule: Schedule,
    x0: State,
    x_t: State,
    t: Times,
    noise: State,
    *,
    variance: Variance = "large",
    noise_weight: float = 0.5,
) -> State:
    """x_{t-1} of DDPM: the posterior's mean at a predicted x_0, and exp(noise_weight log variance) noise.

    Args:
        noise: standard normal; not used at t = 0.
        variance: "large" is beta_t (but at the first time the posterior's variance of the second), "small" is the
            posterior's. They are right for data of variance one and for data that are one point.
        noise_weight: 0.5 is the standard deviation, and so the process itself; more makes it colder.

    Raises:
        ValueError: an unknown variance, a negative noise_weight.
    """
    one_of("variance", variance, get_args(Variance))
    non_negative("noise_weight", noise_weight)
    log_variance = schedule.posterior_log_variance_clipped
    if variance == "large":
        log_variance = np.append(log_variance[:1], np.log(schedule.betas[1:]))
    scale = np.exp(noise_weight * log_variance)
    scale[0] = 0.0
    return posterior(schedule, x0, x_t, t).mean + _at(scale, t, x_t) * noise


def guide(conditional: State, unconditional: State, guidance: float | Float[Array, ""]) -> State:
    """Two predictions of x_0 in one: unconditional + guidance (conditional - unconditional).

    guidance = 1 is the conditional prediction itself, 0 the unconditional. PerturbDiff's guidance strength w is
    guidance - 1. Predictions of the noise combine alike: x_0 and noise are linear in each other.
    """
    return guidance * conditional + (1 - guidance) * unconditional


def set_noise(
    key: PRNGKeyArray, shape: tuple[int, ...], shared: float = 0.0, dtype: Any = jnp.float32
) -> Float[Array, "*sets cells genes"]:
    """Standard normal noise for sets of cells, of which the cells of one set have a part in common.

    sqrt(shared) z + sqrt(1 - shared) e, with z one draw a set and e one a cell: each entry is N(0, 1), and two cells of
    a set correlate by `shared`. With independent noise (0, the published model) the mean embedding of a large set is
    noised by next to nothing; a shared part moves whole sets, however large.

    Raises:
        ValueError: shared outside [0, 1], fewer than two axes.
    """
    _check_share("shared", shared)
    if len(shape) < 2:
        raise ValueError(f"shape must end with cells and genes, (..., cells, genes); got {shape}.")
    key_set, key_cell = jax.random.split(key)
    own = jax.random.normal(key_cell, shape, dtype)
    if shared == 0:
        return own
    common = jax.random.normal(key_set, (*shape[:-2], 1, shape[-1]), dtype)
    return np.sqrt(shared).item() * common + np.sqrt(1 - shared).item() * own


def _look_up(table: Table, t: Times, dtype: Any) -> Float[Array, "*sets"]:
    return jnp.asarray(table, dtype)[t]


def _at(table: Table, t: Times, state: State) -> Float[Array, "*#state"]:
    """The table's entries at t, with an axis for each further one of the state."""
    if t.shape != state.shape[: t.ndim]:
        raise ValueError(
            f"t must be one number or have the leading axes of the cells; got the shape {t.shape} for cells of the "
            f"shape {state.shape}."
        )
    return _look_up(table, t, state.dtype).reshape(t.shape + (1,) * (state.ndim - t.ndim))


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1]; got {value!r}.")
