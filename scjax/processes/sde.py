"""Interacting Itô SDEs: a whole population solved as one state, by Euler-Maruyama through diffrax.

    dx_i = F(x)_i dt + g(x)_i dW_i,      de_i = |F(x)_i|^2 dt,      e_i(0) = 0

x holds all cells, so F may couple them; e is the kinetic energy that each cell has spent.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from scjax.check import increasing, positive

from .steps import GivenSteps

__all__ = ["Drift", "Grid", "Trajectory", "brownian_increments", "simulate", "time_grid"]

Drift: TypeAlias = Callable[[Float[Array, "cells dims"], Int[Array, ""]], Float[Array, "cells dims"]]
Diffusion: TypeAlias = Callable[[Float[Array, "cells dims"]], Float[Array, "*broadcastable"]]


class Trajectory(NamedTuple):
    """A population at the times asked for.

    Attributes:
        x: the cells; cell i is the same one at every time.
        kinetic_energy: integral of |drift|^2 from the first time on, in (state unit)^2 per time unit.
    """

    x: Float[Array, "times cells dims"]
    kinetic_energy: Float[Array, "times cells"]


class Grid(NamedTuple):
    """A fixed grid of solver steps on which every observation time is a grid point.

    Attributes:
        dts: length of each step, in time units.
        observed: number of steps before each observation time; the first is 0.
    """

    dts: np.ndarray
    observed: np.ndarray


def time_grid(ts: Sequence[float] | np.ndarray, dt: float) -> Grid:
    """The interval between two times in equal steps, as few as keep each no longer than dt.

    Raises:
        ValueError: ts unsorted, repeated or fewer than one; dt not positive.
        TypeError: ts is traced. Times decide how many steps are compiled: pass numbers, not arrays under `jit`.
    """
    if isinstance(ts, jax.core.Tracer):  # pyright: ignore[reportAttributeAccessIssue]
        raise TypeError(
            "ts must be known when the solver is compiled, for it decides the number of steps; got a traced array. "
            "Pass a tuple of numbers, and under jit mark it static (static_argnames='ts') or close over it."
        )
    positive("dt", dt)
    ts = increasing("ts", ts)
    if not ts:
        raise ValueError("ts must hold at least the time of the first state; got none.")
    gaps = np.diff(np.asarray(ts, np.float64))
    n_steps = np.array([max(1, math.ceil(gap / dt - 1e-6)) for gap in gaps], int)  # 3 steps for 0.3 / 0.1
    return Grid(
        dts=np.repeat(gaps / np.maximum(n_steps, 1), n_steps), observed=np.concatenate([[0], np.cumsum(n_steps)])
    )


def brownian_increments(
    key: PRNGKeyArray,
    dts: Float[np.ndarray, " steps"],
    shape: tuple[int, int],
    dtype: Any = jnp.float32,
    first_step: int = 0,
) -> Float[Array, "steps cells dims"]:
    """The noise that `simulate` draws with this key: dW_k ~ N(0, dts_k), a function of (key, k) alone."""
    steps = first_step + jnp.arange(len(dts))
    return jax.lax.map(
        lambda step: _increment(key, step, jnp.asarray(dts, dtype)[step - first_step], shape, dtype), steps
    )


def _increment(key: PRNGKeyArray, step: Int[Array, ""], dt: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    return jnp.sqrt(dt) * jax.random.normal(jax.random.fold_in(key, step), shape, dtype)


class _ItoTerm(diffrax.AbstractTerm):
    """Drift, diffusion and energy in one term, so that a step evaluates the drift once.

    Its time is the number of the step: integers are exact in float32 where 0.1 + 0.1 + ... is not, and the step's
    length and noise are looked up or drawn by that number.
    """

    drift: Drift
    diffusion: Diffusion | None
    dts: Array
    increment: Callable[[Array], Array] | None

    def vf(self, t, y, args):
        x, _ = y
        drift = self.drift(x, jnp.asarray(t, jnp.int32))
        return (drift, None) if self.increment is None else (drift, self.diffusion(x))  # pyright: ignore[reportOptionalCall]

    def contr(self, t0, t1, **kwargs):
        step = jnp.asarray(t0, jnp.int32)
        return self.dts[step], (None if self.increment is None else self.increment(step))

    def prod(self, vf, control):
        (drift, diffusion), (dt, dW) = vf, control
        dx = drift * dt
        if dW is not None:
            dx = dx + jnp.broadcast_to(diffusion, dW.shape) * dW
        return dx, jnp.sum(drift**2, axis=-1) * dt


def simulate(
    drift: Drift,
    diffusion: Diffusion | None,
    x0: Float[Array, "cells dims"],
    ts: Sequence[float] | np.ndarray,
    key: PRNGKeyArray | None,
    *,
    dt: float,
    dW: Float[Array, "steps cells dims"] | None = None,
    first_step: int = 0,
) -> Trajectory:
    """The population at each of `ts`, starting as x0 at ts[0]; Euler-Maruyama on `time_grid(ts, dt)`.

    Reverse-mode gradients recompute each step from its state: memory grows by one state a step, whatever the drift
    keeps inside. Without gradients it holds a state a time where these lie evenly, and at most one a step.

    Args:
        drift: (x, number of the step) -> velocity of each cell, state units per time unit. The number serves drifts
            that are random or change with time.
        diffusion: x -> g, of the shape of x or one that broadcasts to it; None for a deterministic path.
        x0: cells at ts[0].
        ts: increasing times, concrete numbers.
        key: of the noise; may be None where dW is given or there is no diffusion.
        dt: longest step, in the unit of ts.
        dW: recorded noise, already of variance dt; replaces the key's.
        first_step: number of the first step. A path cut in pieces is the whole path again when each piece counts on.

    Raises:
        ValueError: unsorted times, dW of another shape, neither key nor dW.
        TypeError: traced times.
    """
    grid = time_grid(ts, dt)
    n_steps = len(grid.dts)
    if dW is not None and dW.shape != (n_steps, *x0.shape):
        raise ValueError(f"dW must have the shape (steps, cells, dims) = {(n_steps, *x0.shape)}; got {dW.shape}.")
    if diffusion is not None and dW is None and key is None:
        raise ValueError("a diffusion needs noise: pass a key, or recorded increments dW.")
    energy = jnp.zeros(x0.shape[0], x0.dtype)
    if n_steps == 0:
        return Trajectory(x0[None], energy[None])
    dts = jnp.asarray(grid.dts, x0.dtype)

    def increment(step: Int[Array, ""]) -> Float[Array, "cells dims"]:
        if dW is not None:
            return dW[step]
        return _increment(key, first_step + step, dts[step], x0.shape, x0.dtype)  # pyright: ignore[reportArgumentType]

    term = _ItoTerm(
        drift=lambda x, step: drift(x, first_step + step),
        diffusion=diffusion,
        dts=dts,
        increment=None if diffusion is None else increment,
    )
    # Step times are listed, for diffrax's constant steps end at n (i / n), which may lie just below the integer i.
    # One checkpoint a step: fewer would recompute more, and more cannot be used. Every `stride` steps a state is kept.
    stride = math.gcd(*grid.observed.tolist())
    solution = diffrax.diffeqsolve(
        term,
        diffrax.Euler(),
        t0=0.0,
        t1=float(n_steps),
        dt0=None,
        y0=(x0, energy),
        stepsize_controller=GivenSteps(jnp.arange(n_steps + 1, dtype=jnp.result_type(float))),
        saveat=diffrax.SaveAt(t0=True, steps=stride),
        adjoint=diffrax.RecursiveCheckpointAdjoint(checkpoints=n_steps),
        max_steps=n_steps,
        throw=False,
    )
    kept = grid.observed // stride
    every = len(kept) == n_steps // stride + 1
    return Trajectory(*(solution.ys if every else (states[kept] for states in solution.ys)))  # pyright: ignore[reportOptionalIterable]
