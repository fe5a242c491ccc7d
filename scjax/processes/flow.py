"""Flows: the straight path between two samples, where a path may start, and the ODE that carries cells along.

x_t = (1 - t) x0 + t x1 with velocity u_t = x1 - x0: t = 0 is the start (noise, or control cells), t = 1 the data.

Reference: Lipman et al., "Flow matching for generative modeling", ICLR 2023 (the conditional optimal transport path).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from scjax.check import at_least, one_of, positive

from .steps import GivenSteps

__all__ = ["ERK38", "Solver", "endpoint", "integrate", "poisson_rates", "poisson_start", "straight_path"]

Solver: TypeAlias = Literal["rk4_38", "euler", "heun", "tsit5"]
Cells: TypeAlias = Float[Array, "cells genes"]


def straight_path(x0: Cells, x1: Cells, t: Float[Array, " cells"]) -> tuple[Cells, Cells]:
    """(x_t, u_t): the state of each cell at its time, and the velocity that carries it."""
    t = t[:, None]
    return (1 - t) * x0 + t * x1, x1 - x0


def endpoint(x_t: Cells, v_t: Cells, t: Float[Array, " cells"]) -> Cells:
    """Where each cell arrives at t = 1 if it keeps its velocity: exact on a straight path, poor for t near 0."""
    return x_t + (1 - t[:, None]) * v_t


def poisson_rates(
    source: Float[Array, "*cells genes"], *, target_sum: float | None = None, alpha: float = 0.8
) -> Float[Array, "*cells genes"]:
    """Rates of the counts that a Poisson start draws, from log-normalised cells; never below 1e-8.

    alpha expm1(source), or, with a `target_sum`, expm1(source) scaled so that the genes given here sum to it (alpha is
    then not used).
    """
    counts = jnp.expm1(source)
    if target_sum is None:
        rates = alpha * counts
    else:
        rates = counts * target_sum / (counts.sum(axis=-1, keepdims=True) + 1e-8)
    return jnp.maximum(rates, 1e-8)


def poisson_start(
    key: PRNGKeyArray, source: Float[Array, "*cells genes"], *, target_sum: float | None = None, alpha: float = 0.8
) -> Float[Array, "*cells genes"]:
    """log1p of counts drawn with `poisson_rates`: control cells seen once more through the sequencer."""
    rates = poisson_rates(source, target_sum=target_sum, alpha=alpha)
    return jnp.log1p(jax.random.poisson(key, rates).astype(source.dtype))


class ERK38(diffrax.AbstractERK):
    """The 3/8 rule: four stages, order 4. It is what "rk4" means in torchdiffeq, and not the classical tableau.

    Reference: Kutta 1901; Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, table 1.2.
    """

    tableau: ClassVar[diffrax.ButcherTableau] = diffrax.ButcherTableau(
        a_lower=(np.array([1 / 3]), np.array([-1 / 3, 1.0]), np.array([1.0, -1.0, 1.0])),
        b_sol=np.array([1 / 8, 3 / 8, 3 / 8, 1 / 8]),
        b_error=np.zeros(4),  # steps are given, so no error is asked for
        c=np.array([1 / 3, 2 / 3, 1.0]),
    )
    interpolation_cls: ClassVar[Callable] = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

    def order(self, terms):
        return 4


_MOST_STEPS = 4096  # of "tsit5", between two times
_SOLVERS = {"rk4_38": ERK38, "euler": diffrax.Euler, "heun": diffrax.Heun, "tsit5": diffrax.Tsit5}


def integrate(
    velocity: Callable[[Float[Array, ""], Cells], Cells],
    x0: Cells,
    *,
    solver: Solver = "rk4_38",
    n_steps: int = 19,
    tolerance: float = 1e-3,
    trajectory: bool = False,
) -> Cells | Float[Array, "times cells genes"]:
    """The cells at t = 1 of dx/dt = velocity(t, x), from x0 at t = 0.

    Args:
        velocity: of all cells at one time.
        solver: "rk4_38", "euler" and "heun" take `n_steps` equal steps (4, 1 and 2 evaluations each); "tsit5" chooses
            its own, the same for all cells of x0, so that the estimated error stays below `tolerance`; for a trajectory
            it begins anew at each of its times.
        n_steps: of the fixed steps; not used by "tsit5".
        tolerance: relative and absolute, in units of x; of "tsit5" alone.
        trajectory: the states at n_steps + 1 equally spaced times, ends included, instead of the last one.

    Returns:
        The cells; NaN, all of them, where "tsit5" does not arrive within 4096 steps. (An exception would have to come
        from within the compiled program, by way of the host.)

    Raises:
        ValueError: an unknown solver, no steps, a tolerance that is not positive.
    """
    one_of("solver", solver, get_args(Solver))
    at_least("n_steps", n_steps, 1)
    positive("tolerance", tolerance)
    # float64 only where jax has it, as for x0
    ts = jnp.linspace(0, 1, n_steps + 1, dtype=x0.dtype)
    solve: Any = partial(
        diffrax.diffeqsolve,
        diffrax.ODETerm(lambda t, x, _: velocity(t, x)),  # pyright: ignore[reportArgumentType]  # t is an Array
        _SOLVERS[solver](),
        dt0=None,
        throw=False,
    )
    if solver != "tsit5":
        saveat = diffrax.SaveAt(t0=True, steps=1) if trajectory else diffrax.SaveAt(t1=True)
        given = {"stepsize_controller": GivenSteps(ts), "max_steps": n_steps, "saveat": saveat}
        path = solve(t0=ts[0], t1=ts[-1], y0=x0, **given).ys
        return path if trajectory else path[0]

    def advance(x: Cells, span: tuple[Array, Array]) -> tuple[Cells, Cells]:
        controller = diffrax.PIDController(rtol=tolerance, atol=tolerance)
        solution = solve(t0=span[0], t1=span[1], y0=x, stepsize_controller=controller, max_steps=_MOST_STEPS)
        x = jnp.where(solution.result == diffrax.RESULTS.successful, solution.ys[0], jnp.nan)
        return x, x

    if not trajectory:
        return advance(x0, (ts[0], ts[-1]))[0]
    return jnp.concatenate([x0[None], jax.lax.scan(advance, x0, (ts[:-1], ts[1:]))[1]])
