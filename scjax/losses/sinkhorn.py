r"""Entropic optimal transport between populations: converged on ott-jax, and annealed as geomloss runs it.

One convention throughout, geomloss's: the cost of moving a cell is |x - y|^2 / 2, the temperature is blur^2, and
OT(a, b) = min_pi <pi, cost> + blur^2 KL(pi | a x b). The divergence is OT(a, b) - OT(a, a)/2 - OT(b, b)/2; it tends to
W2^2 / 2 as blur goes to 0. ott-jax's cost has no 1/2, so its epsilon is 2 blur^2 and its values are halved.

Weights default to uniform. A cell of weight 0 is padding: it must repeat a real cell, and then changes nothing.

Up to `DENSE_PAIRS` pairs of cells the matrix of costs is held; beyond, every sum over cells makes it again in tiles, so
that memory is linear in the cells, gradient included, and an update takes about three times as long. The values are the
same but for rounding. Only `sinkhorn_plan`, which is such a matrix, always holds it.

Of cells that `jit` finds spread over devices each device has its part of the costs, or of every tile.

In float32 values are good to about 1e-7 of the squared spread of the clouds and of blur^2, whichever is larger: a blur
of a hundred spreads, or a few cells a thousand spreads away from all others, leaves no digits of a small divergence.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from scjax.check import at_least, positive, probability
from scjax.kernels import squared_distances

DENSE_PAIRS = (
    2**24
)  # cells of one population times cells of the other: 64 MiB of float32, with gradients 500 MiB in all
ROWS, COLUMNS = 2**9, 2**11  # of a tile beyond it: 4 MiB

Softmin = Callable[[Any, Array], Array]  # (eps, h) -> -eps log sum exp(h - cost / eps), over one of two populations


class SinkhornSolution(NamedTuple):
    """A converged divergence and how it was reached."""

    divergence: Float[Array, ""]
    converged: Bool[Array, ""]  # all of its transport problems met the threshold
    n_iterations: Int[Array, ""]  # of the slowest of them


def sinkhorn_divergence(
    x: Float[Array, "n dims"],
    y: Float[Array, "m dims"],
    *,
    blur: float,
    a: Float[Array, " n"] | None = None,
    b: Float[Array, " m"] | None = None,
    threshold: float = 1e-3,
    max_iterations: int = 20_000,
) -> Float[Array, ""]:
    """Converged Sinkhorn divergence (see the head of this module for its unit), by ott-jax.

    Args:
        x, y: cells of the two populations, in one unit.
        blur: root of the temperature, in the unit of x. A small blur on wide clouds takes many iterations.
        a, b: masses of the cells, each summing to 1.
        threshold: the largest total error of a marginal at which the iteration stops.
        max_iterations: the iteration ends here; `solve_sinkhorn` tells whether that was too early.

    Raises:
        ValueError: blur, threshold or max_iterations not positive.
    """
    return solve_sinkhorn(x, y, blur=blur, a=a, b=b, threshold=threshold, max_iterations=max_iterations).divergence


def solve_sinkhorn(
    x: Float[Array, "n dims"],
    y: Float[Array, "m dims"],
    *,
    blur: float,
    a: Float[Array, " n"] | None = None,
    b: Float[Array, " m"] | None = None,
    threshold: float = 1e-3,
    max_iterations: int = 20_000,
) -> SinkhornSolution:
    """`sinkhorn_divergence` with its convergence; the arguments are the same."""
    _check(blur, threshold, max_iterations)
    # The plan does not feel a shift of a whole cloud, and the cost feels it exactly: so far clouds are solved as near
    # ones, where float32 still sees the temperature beside the squared distances.
    x, y = _centred(x, y)
    mean_x, mean_y = _mass(x, a) @ x, _mass(y, b) @ y
    x, y = x - mean_x[None], y - mean_y[None]
    problems = ((x, y, a, b), (x, x, a, a), (y, y, b, b))
    solved = [_transport(*problem, blur, threshold, max_iterations) for problem in problems]
    costs, converged, n_iterations = (jnp.stack(part) for part in zip(*solved, strict=True))
    return SinkhornSolution(
        divergence=costs[0] - (costs[1] + costs[2]) / 2 + jnp.sum((mean_x - mean_y) ** 2) / 2,
        converged=jnp.all(converged),
        n_iterations=jnp.max(n_iterations),
    )


def _transport(
    x: Float[Array, "n dims"],
    y: Float[Array, "m dims"],
    a: Float[Array, " n"] | None,
    b: Float[Array, " m"] | None,
    blur: float,
    threshold: float,
    max_iterations: int,
) -> tuple[Float[Array, ""], Bool[Array, ""], Int[Array, ""]]:
    """OT(a, b), whether it converged, and after how many iterations.

    ott-jax finds the duals; value and gradient come from one more update of them, as in the annealed scheme. So no
    gradient passes through ott: its own is exactly zero, without a word, when a solve ends before its temperature has
    come down.
    """
    frozen_x, frozen_y, frozen_a, frozen_b = jax.lax.stop_gradient((x, y, a, b))
    solve = _solve_in_tiles if _is_large(x, y) else _solve
    out = solve(frozen_x, frozen_y, frozen_a, frozen_b, blur, threshold, max_iterations, symmetric=y is x)
    # ott's duals hold the log weights and belong to the doubled cost, so that divided by its epsilon they are the
    # shifted duals that _softmin takes.
    eps = blur**2
    f = _softmins(x, frozen_y)[0](eps, out.g / (2 * eps))
    g = _softmins(frozen_x, y)[1](eps, out.f / (2 * eps))
    cost = _mass(x, a) @ f + _mass(y, b) @ g
    # ott calls an infinite error converged.
    return cost, jnp.asarray(out.converged) & jnp.isfinite(cost), jnp.asarray(out.n_iters)


def _solve(
    x: Float[Array, "n dims"],
    y: Float[Array, "m dims"],
    a: Float[Array, " n"] | None,
    b: Float[Array, " m"] | None,
    blur: float,
    threshold: float,
    max_iterations: int,
    symmetric: bool = False,
) -> Any:
    """ott-jax's solution, begun from slowly annealed duals and over-relaxed.

    From duals of zero it takes up to ten times the iterations, and over-relaxation may then diverge; near the solution
    any factor below 2 converges (Lehmann et al., Optim. Lett. 16, 2022), and 1.8 saves another factor of five to ten.
    """
    from ott.geometry import costs, pointcloud
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import acceleration, sinkhorn

    log_a, log_b = _log_weights(x, a), _log_weights(y, b)
    diameter = _diameter(jnp.concatenate([x, y]))
    eps = blur**2
    # A cloud onto itself: averaged simultaneous updates converge in a few iterations (Feydy et al., AISTATS 2019).
    momentum = acceleration.Momentum(value=0.5 if symmetric else 1.8)
    # ott's kernel mode underflows silently and its batch_size is broken on new JAX: dense, in log space.
    with jax.numpy_rank_promotion("allow"), jax.default_matmul_precision("highest"):
        geometry = pointcloud.PointCloud(x, y, cost_fn=costs.SqEuclidean(), epsilon=2 * eps)
        problem = linear_problem.LinearProblem(geometry, a=_mass(x, a), b=_mass(y, b))
        solver = sinkhorn.Sinkhorn(
            threshold=threshold,
            max_iterations=max_iterations,
            parallel_dual_updates=symmetric,
            momentum=momentum,
        )
        f, g = _annealed_duals(_softmins(x, y, dense=True), log_a, log_b, diameter, blur, scaling=0.98)
        return solver(problem, init=(2 * (f + eps * log_a), 2 * (g + eps * log_b)))


class _Duals(NamedTuple):
    """What is used of ott-jax's solution, in its unit."""

    f: Float[Array, " n"]
    g: Float[Array, " m"]
    converged: Bool[Array, ""]
    n_iters: Int[Array, ""]


def _solve_in_tiles(
    x: Float[Array, "n dims"],
    y: Float[Array, "m dims"],
    a: Float[Array, " n"] | None,
    b: Float[Array, " m"] | None,
    blur: float,
    threshold: float,
    max_iterations: int,
    symmetric: bool = False,
) -> _Duals:
    """`_solve` without ott-jax, whose own way with large populations (`batch_size`) is broken on new JAX.

    The same start and the same factors. The marginals of the plan of two duals are a exp((f - f') / eps) with the
    duals f' that an exact update would give, so that the error costs nothing.
    """
    log_a, log_b, eps = _log_weights(x, a), _log_weights(y, b), blur**2
    over_y, over_x = _softmins(x, y)

    def error(masses: Array, dual: Array, exact: Array) -> Array:
        return masses @ jnp.abs(jnp.expm1((dual - exact) / eps))

    def together(state: tuple[Array, ...]) -> tuple[Array, ...]:
        n, f, _, _ = state
        exact = over_y(eps, log_b + f / eps)
        f, off = (f + exact) / 2, error(_mass(x, a), f, exact)
        return n + 1, f, f, off

    def in_turn(state: tuple[Array, ...]) -> tuple[Array, ...]:
        n, f, g, _ = state
        exact_f = over_y(eps, log_b + g / eps)
        off, f = error(_mass(x, a), f, exact_f), f + 1.8 * (exact_f - f)
        exact_g = over_x(eps, log_a + f / eps)
        off, g = jnp.maximum(off, error(_mass(y, b), g, exact_g)), g + 1.8 * (exact_g - g)
        return n + 1, f, g, off

    def unfinished(state: tuple[Array, ...]) -> Array:
        return (state[0] < max_iterations) & ~(state[-1] <= threshold)

    diameter = _diameter(jnp.concatenate([x, y]))
    f, g = _annealed_duals((over_y, over_x), log_a, log_b, diameter, blur, scaling=0.98)
    start = jnp.zeros((), jnp.int32), f, g, jnp.full((), jnp.inf, x.dtype)
    n, f, g, off = jax.lax.while_loop(unfinished, together if symmetric else in_turn, start)
    return _Duals(2 * (f + eps * log_a), 2 * (g + eps * log_b), off <= threshold, n)


def sinkhorn_plan(
    x: Float[Array, "n dims"],
    y: Float[Array, "m dims"],
    *,
    blur: float,
    a: Float[Array, " n"] | None = None,
    b: Float[Array, " m"] | None = None,
    threshold: float = 1e-3,
    max_iterations: int = 20_000,
) -> Float[Array, "n m"]:
    """The entropic coupling of the two populations: mass moved from x_i to y_j; rows sum to a, columns to b."""
    _check(blur, threshold, max_iterations)
    x, y = _centred(x, y)
    x, y = x - (_mass(x, a) @ x)[None], y - (_mass(y, b) @ y)[None]  # as in solve_sinkhorn
    return _solve(x, y, a, b, blur, threshold, max_iterations).matrix


def annealed_sinkhorn_divergence(
    x: Float[Array, "n dims"],
    y: Float[Array, "m dims"],
    *,
    blur: float,
    scaling: float = 0.7,
    a: Float[Array, " n"] | None = None,
    b: Float[Array, " m"] | None = None,
    self_transport_x: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    r"""Debiased Sinkhorn divergence by one averaged update per temperature, as geomloss computes it.

    The temperatures fall from the squared diameter D^2 of the joint bounding box to blur^2 by the factor scaling^2.
    It is fast and *not converged*: at scaling 0.7 ordinary clouds come out 1 to 3 % low, clouds of two clusters whose
    masses differ 10 to 50 % low. Where that matters use scaling 0.99 or `sinkhorn_divergence`.

    The gradient is geomloss's too: through the last update alone, with its duals and the points summed over held
    fixed. At convergence that is the gradient of the divergence; before it, it is not the gradient of this number.

    Args:
        x, y: cells of the two populations, in one unit.
        blur: root of the last temperature, in the unit of x.
        scaling: in (0, 1); nearer 1 means more temperatures, ceil(ln(D / blur) / -ln scaling) + 2 in all.
        a, b: masses of the cells, each summing to 1.
        self_transport_x: OT(a, a)/2 from `self_transport`, where x does not change from call to call. It has no
            gradient in y, and is most of the work when x is the larger cloud. Its temperatures then start at the
            diameter of x, not of both clouds, which moves the value in the fourth digit.

    Raises:
        ValueError: blur not positive, scaling not in (0, 1).

    Reference: Feydy, PhD thesis (2020), algorithm 3.5.
    """
    _check_annealing(blur, scaling)
    x, y = _centred(x, y)
    log_a, log_b = _log_weights(x, a), _log_weights(y, b)
    diameter = _diameter(jnp.concatenate([x, y]))
    frozen_x, frozen_y = jax.lax.stop_gradient((x, y))
    f, g = _annealed_duals(_softmins(frozen_x, frozen_y), log_a, log_b, diameter, blur, scaling)
    eps = blur**2
    f, g = _softmins(x, frozen_y)[0](eps, log_b + g / eps), _softmins(frozen_x, y)[1](eps, log_a + f / eps)
    own_x = _self_transport(x, a, diameter, blur, scaling) if self_transport_x is None else self_transport_x
    own_y = _self_transport(y, b, diameter, blur, scaling)
    return _mass(x, a) @ f + _mass(y, b) @ g - own_x - own_y


def self_transport(
    x: Float[Array, "n dims"],
    *,
    blur: float,
    scaling: float = 0.7,
    a: Float[Array, " n"] | None = None,
) -> Float[Array, ""]:
    """OT(a, a)/2 by the annealed updates, for `annealed_sinkhorn_divergence(..., self_transport_x=...)`.

    It differs from zero by the entropy of the blurred plan: it is what debiasing subtracts.

    Raises:
        ValueError: blur not positive, scaling not in (0, 1).
    """
    _check_annealing(blur, scaling)
    (x,) = _centred(x)
    return _self_transport(x, a, _diameter(x), blur, scaling)


def _annealed_duals(
    softmins: tuple[Softmin, Softmin],
    log_a: Float[Array, " n"],
    log_b: Float[Array, " m"],
    diameter: Float[Array, ""],
    blur: float,
    scaling: float,
) -> tuple[Float[Array, " n"], Float[Array, " m"]]:
    def update(eps: Array, duals: tuple[Array, Array]) -> tuple[Array, Array]:
        (f, g), (over_y, over_x) = duals, softmins
        return over_y(eps, log_b + g / eps), over_x(eps, log_a + f / eps)

    return _anneal(update, (jnp.zeros_like(log_a), jnp.zeros_like(log_b)), diameter, blur, scaling)  # pyright: ignore[reportArgumentType, reportReturnType]


def _self_transport(
    x: Float[Array, "n dims"],
    a: Float[Array, " n"] | None,
    diameter: Float[Array, ""],
    blur: float,
    scaling: float,
) -> Float[Array, ""]:
    log_a, frozen = _log_weights(x, a), jax.lax.stop_gradient(x)
    over_frozen, _ = _softmins(frozen, frozen)

    def update(eps: Array, duals: tuple[Array]) -> tuple[Array]:
        return (over_frozen(eps, log_a + duals[0] / eps),)

    (p,) = _anneal(update, (jnp.zeros_like(log_a),), diameter, blur, scaling)  # pyright: ignore[reportArgumentType]
    eps = blur**2
    return _mass(x, a) @ _softmins(x, frozen)[0](eps, log_a + p / eps)


def _is_large(x: Float[Array, "n dims"], y: Float[Array, "m dims"]) -> bool:
    return len(x) * len(y) > DENSE_PAIRS


def _softmins(x: Float[Array, "n dims"], y: Float[Array, "m dims"], *, dense: bool = False) -> tuple[Softmin, Softmin]:
    """The softmin over y for each x, and over x for each y.

    In tiles there are gradients by the cells that it is for alone: those summed over must be held fixed.
    """
    if _is_large(x, y) and not dense:
        return (lambda eps, h: _tiled_softmin(eps, x, y, h)), (lambda eps, h: _tiled_softmin(eps, y, x, h))
    cost = squared_distances(x, y) / 2
    return (lambda eps, h: _softmin(eps, cost, h, axis=1)), (lambda eps, h: _softmin(eps, cost, h, axis=0))


@jax.custom_vjp
def _tiled_softmin(
    eps: Float[Array, ""] | float, x: Float[Array, "n dims"], y: Float[Array, "m dims"], h: Float[Array, " m"]
) -> Float[Array, " n"]:
    """`_softmin` over y for each x; no array of n x m."""

    def rows(x: Array) -> Array:
        def columns(log_sum: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
            y, h = part
            tile = h[None] - squared_distances(x, y) / (2 * eps)
            return jnp.logaddexp(log_sum, jax.nn.logsumexp(tile, axis=1)), None

        log_sum, _ = jax.lax.scan(columns, jnp.full(len(x), -jnp.inf, x.dtype), _cut_columns(y, h))
        return -eps * log_sum

    return _joined_rows(jax.lax.map(rows, _cut_rows(x)), len(x))


def _tiled_softmin_forward(eps, x, y, h):
    f = _tiled_softmin(eps, x, y, h)
    return f, (eps, x, y, h, f)


def _tiled_softmin_backward(residuals, d_f):
    """By x_i it is the mean of x_i - y_j under the weights exp(h_j - (cost_ij - f_i) / eps)."""
    eps, x, y, h, f = residuals

    def rows(block):
        x, f = block

        def columns(sums, part):
            y, h = part
            weights = jnp.exp(h[None] - (squared_distances(x, y) / 2 - f) / eps)
            return (sums[0] + weights.sum(axis=1, keepdims=True), sums[1] + weights @ y), None

        zeros = jnp.zeros_like(f), jnp.zeros_like(x)
        (total, mean), _ = jax.lax.scan(columns, zeros, _cut_columns(y, h))
        return total * x - mean

    d_x = _joined_rows(jax.lax.map(rows, (_cut_rows(x), _cut_rows(f[:, None]))), len(x))
    return jnp.zeros_like(eps), d_f[:, None] * d_x, jnp.zeros_like(y), jnp.zeros_like(h)


_tiled_softmin.defvjp(_tiled_softmin_forward, _tiled_softmin_backward)


def _cut_rows(x: Float[Array, "n dims"]) -> Float[Array, "blocks rows dims"]:
    """Block b has the cells b, b + n_blocks, ...: of cells spread over devices each has its part of a block."""
    n_blocks = math.ceil(len(x) / ROWS)
    filled = jnp.pad(x, ((0, -len(x) % n_blocks), (0, 0)), mode="edge")
    return jnp.swapaxes(filled.reshape(-1, n_blocks, x.shape[1]), 0, 1)


def _joined_rows(blocks: Float[Array, "blocks rows ..."], n: int) -> Float[Array, "n ..."]:
    """What `_cut_rows` cut, of n cells."""
    rows = jnp.swapaxes(blocks, 0, 1)
    return rows.reshape(-1, *rows.shape[2:])[:n]


def _cut_columns(
    y: Float[Array, "m dims"], h: Float[Array, " m"]
) -> tuple[Float[Array, "blocks columns dims"], Float[Array, "blocks columns"]]:
    """The last block is filled up with cells that weigh nothing."""
    n_blocks = math.ceil(len(y) / COLUMNS)
    filler = -len(y) % n_blocks
    h = jnp.pad(h, (0, filler), constant_values=-jnp.inf)
    return jnp.pad(y, ((0, filler), (0, 0)), mode="edge").reshape(n_blocks, -1, y.shape[1]), h.reshape(n_blocks, -1)


def _softmin(
    eps: Float[Array, ""] | float, cost: Float[Array, "n m"], h: Float[Array, " k"], axis: int
) -> Float[Array, " l"]:
    """-eps log sum exp(h - cost / eps) over one axis of the cost, h lying along that axis."""
    return -eps * jax.nn.logsumexp(jnp.expand_dims(h, 1 - axis) - cost / eps, axis=axis)


def _anneal(
    update: Callable[[Array, tuple[Array, ...]], tuple[Array, ...]],
    zeros: tuple[Array, ...],
    diameter: Float[Array, ""],
    blur: float,
    scaling: float,
) -> tuple[Array, ...]:
    """Duals after one averaged update at each temperature; they carry no gradient.

    The temperatures are D^2, then D^2 scaling^(2k) for k = 0, 1, ... while above blur^2, then blur^2 (so D^2 stands
    twice). An update of zero duals gives the first ones.
    """
    step = 2 * math.log(scaling)
    start, stop = 2 * jnp.log(diameter), 2 * math.log(blur)
    n_falling = jnp.maximum(jnp.ceil((stop - start) / step), 0).astype(jnp.int32)

    def temperature(i: Int[Array, ""]) -> Float[Array, ""]:
        falling = jnp.exp(start + (i - 1) * step)
        return jnp.where(i == 0, diameter**2, jnp.where(i <= n_falling, falling, blur**2))

    def body(i: Int[Array, ""], duals: tuple[Array, ...]) -> tuple[Array, ...]:
        return jax.tree.map(lambda old, new: (old + new) / 2, duals, update(temperature(i), duals))

    return jax.lax.fori_loop(0, n_falling + 2, body, update(diameter**2, zeros))


def _centred(*clouds: Float[Array, "_ dims"]) -> tuple[Float[Array, "_ dims"], ...]:
    """The clouds moved together to about the origin, where float32 squares lose least."""
    centre = jax.lax.stop_gradient(sum(cloud.mean(0, keepdims=True) for cloud in clouds) / len(clouds))
    return tuple(cloud - centre for cloud in clouds)


def _diameter(x: Float[Array, "n dims"]) -> Float[Array, ""]:
    """Diagonal of the bounding box; never quite zero, so that equal cells have a temperature."""
    diagonal = jnp.linalg.norm(jax.lax.stop_gradient(x.max(0) - x.min(0)))
    return jnp.maximum(diagonal, jnp.finfo(x.dtype).tiny ** 0.25)


def _mass(x: Float[Array, "n dims"], weights: Float[Array, " n"] | None) -> Float[Array, " n"]:
    return jnp.full(x.shape[0], 1 / x.shape[0], x.dtype) if weights is None else weights


def _log_weights(x: Float[Array, "n dims"], weights: Float[Array, " n"] | None) -> Float[Array, " n"]:
    return jax.lax.stop_gradient(jnp.log(_mass(x, weights)))  # masses have their gradient by the duals, padding too


def _check(blur: float, threshold: float, max_iterations: int) -> None:
    positive("blur", blur)
    positive("threshold", threshold)
    at_least("max_iterations", max_iterations, 1)


def _check_annealing(blur: float, scaling: float) -> None:
    positive("blur", blur)
    positive("scaling", scaling)
    probability("scaling", scaling)
