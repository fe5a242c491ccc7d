"""Distances and kernels between cells: gram matrices on ott-jax geometries, bandwidths from the data, and what a
population is once a kernel has embedded it.

A kernel k maps a population P to its mean embedding mu_P = E k(X, .), a point of the kernel's Hilbert space of
functions. It is linear in P, its inner products are <mu_P, mu_Q> = E k(X, Y), and so |mu_P - mu_Q|^2 is the squared
maximum mean discrepancy. Functions that work on it take the kernel of one pair of cells, such as `gaussian` with its
bandwidth bound by `functools.partial`; they are written to be read and are not made for thousands of cells.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scjax.check import at_least

__all__ = [
    "Kernel",
    "distances",
    "embedding_inner_product",
    "gaussian",
    "gaussian_kernel",
    "mean_embedding",
    "median_bandwidths",
    "negative_distance",
    "noise_covariance",
    "noise_covariance_trace",
    "product_distances",
    "squared_distances",
]

Kernel: TypeAlias = Callable[[Float[Array, " dims"], Float[Array, " dims"]], Float[Array, ""]]


def squared_distances(x: Float[Array, "n dims"], y: Float[Array, "m dims"]) -> Float[Array, "n m"]:
    r"""|x_i - y_j|^2, squared units of x; never negative.

    Computed as |x|^2 + |y|^2 - 2 x.y, one matrix product, after moving the joint mean to the origin: in float32 the
    absolute error is about 1e-7 times the squared *spread* of the clouds, not their squared distance from zero. Pairs
    much nearer than that (1e-3 of the spread) need `distances`.
    """
    from ott.geometry import costs, pointcloud

    centre = jax.lax.stop_gradient((x.mean(0, keepdims=True) + y.mean(0, keepdims=True)) / 2)
    # Accelerators would multiply in bfloat16 or TF32 by default, which costs three digits of every distance.
    with jax.numpy_rank_promotion("allow"), jax.default_matmul_precision("highest"):
        geometry = pointcloud.PointCloud(x - centre, y - centre, cost_fn=costs.SqEuclidean())
        return jnp.maximum(geometry.cost_matrix, 0)  # pyright: ignore[reportArgumentType]


def distances(x: Float[Array, "n dims"], y: Float[Array, "m dims"]) -> Float[Array, "n m"]:
    """|x_i - y_j| from the differences themselves; where two cells coincide the value and its gradient are zero."""
    # Not ott's Euclidean cost: whenever it is differentiated, its *value* for coinciding points is sqrt(dims), not 0.
    squared = jnp.sum((x[:, None] - y[None]) ** 2, axis=-1)
    coincide = squared == 0
    return jnp.where(coincide, 0, jnp.sqrt(jnp.where(coincide, 1, squared)))


def product_distances(
    x: Float[Array, "n dims"],
    y: Float[Array, "m dims"] | None = None,
    *,
    weights_x: Float[Array, " n"] | None = None,
    weights_y: Float[Array, " m"] | None = None,
) -> Float[Array, "n m"]:
    """|x_i - y_j| by one matrix product: no array of n x m x dims, ten to a hundred times faster than `distances`.

    The product leaves an error of about 1e-7 (|x_i|^2 + |y_j|^2), measured from the common mean, in each squared
    distance. So the nearest y of each x is taken from the differences themselves: a prediction beside its target has
    the distance and the gradient that it should. A pair that is not, and is nearer than 0.004 of these norms in
    float32, counts as coinciding: distance and gradient zero, as where cells do coincide.

    Args:
        x, y: cells in one unit; y = None is x itself, with a diagonal of zeros.
        weights_x, weights_y: masses. A cell of mass zero moves no mean and is nobody's nearest; its own distances are
            some finite number, if its values are.
    """
    within = y is None
    if within:
        y, weights_y = x, weights_x
    centre = jax.lax.stop_gradient((_mean(x, weights_x) + _mean(y, weights_y)) / 2)
    x, y = x - centre, y - centre
    norms = jnp.sum(x**2, axis=1)[:, None] + jnp.sum(y**2, axis=1)[None]
    # Accelerators would multiply in bfloat16 or TF32 by default, which costs three digits of every distance.
    squared = norms - 2 * jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)

    diagonal = jnp.eye(x.shape[0], dtype=bool) if within else None
    far = jax.lax.stop_gradient(squared)
    if within:
        far = jnp.where(diagonal, jnp.inf, far)  # pyright: ignore[reportArgumentType]
    if weights_y is not None:
        far = jnp.where(weights_y[None] > 0, far, jnp.inf)
    nearest = jnp.argmin(far, axis=1)
    exact = jnp.sum((x - y[nearest]) ** 2, axis=1)
    is_nearest = nearest[:, None] == jnp.arange(y.shape[0])[None]
    squared = jnp.where(is_nearest, exact[:, None], squared)
    coincide = squared <= jnp.where(is_nearest, 0, 64 * jnp.finfo(x.dtype).eps * jax.lax.stop_gradient(norms))
    if within:
        coincide |= diagonal  # pyright: ignore[reportOperatorIssue]
    return jnp.where(coincide, 0, jnp.sqrt(jnp.where(coincide, 1, squared)))


def _mean(x: Float[Array, "n dims"], weights: Float[Array, " n"] | None) -> Float[Array, "1 dims"]:
    return x.mean(0, keepdims=True) if weights is None else weights[None] @ x


def gaussian_kernel(
    x: Float[Array, "n dims"], y: Float[Array, "m dims"], bandwidths: Float[Array, " k"]
) -> Float[Array, "n m"]:
    """Mean over the bandwidths s of exp(-|x_i - y_j|^2 / 2 s^2); dimensionless, in [0, 1]."""
    squared = squared_distances(x, y)
    return jnp.mean(jnp.exp(-squared[None] / (2 * bandwidths[:, None, None] ** 2)), axis=0)


def median_bandwidths(
    x: Float[Array, "n dims"], scales: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
) -> Float[Array, " k"]:
    """Bandwidths sqrt(scale * m), m the lower median of the squared distances between different cells of x.

    In units of x; no gradient flows through them. m is kept above 1e-12, so that equal cells do not divide by zero.

    Raises:
        ValueError: fewer than two cells.
    """
    at_least("the number of cells of x", x.shape[0], 2)
    above = jnp.triu_indices(x.shape[0], k=1)
    squared = jnp.sort(squared_distances(x, x)[above])
    median = jnp.maximum(squared[(squared.size - 1) // 2], 1e-12)
    return jax.lax.stop_gradient(jnp.sqrt(jnp.asarray(scales, x.dtype) * median))


def gaussian(a: Float[Array, " dims"], b: Float[Array, " dims"], *, bandwidth: float) -> Float[Array, ""]:
    """exp(-|a - b|^2 / 2 bandwidth^2) of one pair of cells: `gaussian_kernel` without its grid."""
    return jnp.exp(-jnp.sum((a - b) ** 2) / (2 * bandwidth**2))


def negative_distance(a: Float[Array, " dims"], b: Float[Array, " dims"]) -> Float[Array, ""]:
    """-|a - b|, the kernel of the energy distance; zero, with gradient zero, where the cells coincide.

    It is positive definite on differences of populations only (masses that sum to zero): there it is the same as
    |a - o| + |b - o| - |a - b|, a true kernel, whatever the point o. |mu_P - mu_Q|^2 has a meaning, |mu_P|^2 has none.

    Reference: Sejdinovic et al., Ann. Statist. 41 (2013).
    """
    return -distances(a[None], b[None])[0, 0]


def mean_embedding(
    kernel: Kernel,
    x: Float[Array, "cells dims"],
    at: Float[Array, "points dims"],
    weights: Float[Array, " cells"] | None = None,
) -> Float[Array, " points"]:
    """mu_P at some points: sum_j w_j k(x_j, at), P having the masses w (None: uniform) at the cells x."""
    return _masses(x, weights) @ _gram(kernel, x, at)


def embedding_inner_product(
    kernel: Kernel,
    x: Float[Array, "n dims"],
    y: Float[Array, "m dims"],
    weights_x: Float[Array, " n"] | None = None,
    weights_y: Float[Array, " m"] | None = None,
) -> Float[Array, ""]:
    """<mu_P, mu_Q> = sum_ij w_i v_j k(x_i, y_j), a cell's kernel with itself included where P is Q."""
    return _masses(x, weights_x) @ _gram(kernel, x, y) @ _masses(y, weights_y)


def noise_covariance(
    kernel: Kernel,
    x: Float[Array, "cells dims"],
    at: Float[Array, "n dims"],
    also_at: Float[Array, "m dims"],
    *,
    weights: Float[Array, " cells"] | None = None,
    shared: float = 0.0,
) -> Float[Array, "n m"]:
    r"""<C k(a, .), k(b, .)>: covariance, between points a and b, of what noise on the cells does to their embedding.

    Cells x_j + s eps_j, with eps_j a standard normal vector, have the embedding mu + s Xi + O(s^2) with

        Xi = sum_j w_j T_j eps_j,       T_j v = sum_r v_r d_r k(x_j, .),       C = sum_j w_j^2 T_j T_j^*

    (w = 1 / cells unless given). C is self-adjoint and positive, of rank cells x dims at most, and so of finite trace;
    it depends on x, and with uniform masses it falls as 1 / cells.

    Args:
        at, also_at: the points a and b.
        shared: correlation of two cells' noise (`processes.diffusion.set_noise`). The part in common adds up to
            sum_j w_j T_j, one derivative of the whole embedding, which does not fall with the number of cells:
            C = (1 - shared) sum_j w_j^2 T_j T_j^* + shared (sum_j w_j T_j)(sum_j w_j T_j)^*.
    """
    # dims of each cell's noise, in turn: [cells, points, dims]
    slopes = lambda points: _masses(x, weights)[:, None, None] * _slopes(kernel, x, points)  # noqa: E731
    here, there = slopes(at), slopes(also_at)
    own = jnp.einsum("jad,jbd->ab", here, there)
    return (1 - shared) * own + shared * here.sum(0) @ there.sum(0).T


def noise_covariance_trace(
    kernel: Kernel,
    x: Float[Array, "cells dims"],
    *,
    weights: Float[Array, " cells"] | None = None,
    shared: float = 0.0,
) -> Float[Array, ""]:
    """E |Xi|^2, the trace of the operator of `noise_covariance`: by how much noise moves the embedding in its space.

    tr T_i T_j^* = sum_r d_r d'_r k(x_i, x_j), derivatives by the first and by the second cell. For a Gaussian kernel
    and uniform masses the independent part is dims / (cells bandwidth^2), wherever the cells lie.
    """
    slope_by_slope = lambda a, b: jnp.trace(jax.jacfwd(jax.grad(kernel), argnums=1)(a, b))  # noqa: E731
    masses = _masses(x, weights)
    own = jnp.sum(masses**2 * jax.vmap(slope_by_slope)(x, x))
    if shared == 0:
        return own
    return (1 - shared) * own + shared * masses @ _gram(slope_by_slope, x, x) @ masses


def _masses(x: Float[Array, "cells dims"], weights: Float[Array, " cells"] | None) -> Float[Array, " cells"]:
    return jnp.full(x.shape[0], 1 / x.shape[0], x.dtype) if weights is None else weights


def _gram(kernel: Kernel, x: Float[Array, "n dims"], y: Float[Array, "m dims"]) -> Float[Array, "n m"]:
    return jax.vmap(lambda a: jax.vmap(lambda b: kernel(a, b))(y))(x)


def _slopes(
    kernel: Kernel, x: Float[Array, "cells dims"], at: Float[Array, "points dims"]
) -> Float[Array, "cells points dims"]:
    """d_r k(x_j, at), by the components r of x_j."""
    return jax.vmap(lambda a: jax.vmap(lambda b: jax.grad(kernel)(a, b))(at))(x)
