"""Distances and kernels between cells: gram matrices on ott-jax geometries, bandwidths from the data."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scjax.check import at_least

__all__ = ["distances", "gaussian_kernel", "median_bandwidths", "squared_distances"]


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
        return jnp.maximum(geometry.cost_matrix, 0)


def distances(x: Float[Array, "n dims"], y: Float[Array, "m dims"]) -> Float[Array, "n m"]:
    """|x_i - y_j| from the differences themselves; where two cells coincide the value and its gradient are zero."""
    # Not ott's Euclidean cost: whenever it is differentiated, its *value* for coinciding points is sqrt(dims), not 0.
    squared = jnp.sum((x[:, None] - y[None]) ** 2, axis=-1)
    coincide = squared == 0
    return jnp.where(coincide, 0, jnp.sqrt(jnp.where(coincide, 1, squared)))


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
