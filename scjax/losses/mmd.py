"""Kernel distances between populations: maximum mean discrepancy and energy distance.

Masses of the cells (`weights_x`, `weights_y`) each sum to 1, None being uniform. A cell of mass zero is filler: value
and gradient are as if it were absent, whatever stands in its place, NaN included.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scjax.check import at_least
from scjax.kernels import distances, gaussian_kernel, product_distances

_FEW = 2**18  # numbers in the differences of all pairs, up to which these cost nothing


def mmd2(
    x: Float[Array, "n dims"],
    y: Float[Array, "m dims"],
    bandwidths: Float[Array, " k"],
    *,
    unbiased: bool = True,
    weights_x: Float[Array, " n"] | None = None,
    weights_y: Float[Array, " m"] | None = None,
) -> Float[Array, ""]:
    r"""Squared maximum mean discrepancy under the mean of k Gaussian kernels.

    E k(x, x') + E k(y, y') - 2 E k(x, y),  k(a, b) = mean_s exp(-|a - b|^2 / 2 s^2).

    Args:
        x, y: cells of the two populations, in one unit; n and m may differ.
        bandwidths: the kernels' s, in the unit of x; `kernels.median_bandwidths` takes them from data.
        unbiased: leave a cell's kernel with itself out of its mean. Around zero that estimate scatters to both
            sides. With False the means hold the diagonal, and the estimate is never negative and biased upwards; half
            of it is what geomloss calls the "gaussian" kernel norm.
        weights_x, weights_y: masses; unbiased, two cells at least of each must have some.

    Returns:
        The estimate, dimensionless. In float32 a cell ten thousand bandwidths from all others spoils its third digit.

    Raises:
        ValueError: fewer than two cells in a population, where `unbiased`.

    Reference: Gretton et al., JMLR 13 (2012), eq. 3 and 5.
    """
    if unbiased:
        at_least("the number of cells of x", x.shape[0], 2)
        at_least("the number of cells of y", y.shape[0], 2)
    x, y = _present(x, weights_x), _present(y, weights_y)
    within = _within(x, bandwidths, unbiased, weights_x) + _within(y, bandwidths, unbiased, weights_y)
    return within - 2 * _expectation(gaussian_kernel(x, y, bandwidths), weights_x, weights_y)


def _within(
    x: Float[Array, "n dims"], bandwidths: Float[Array, " k"], unbiased: bool, weights: Float[Array, " n"] | None
) -> Float[Array, ""]:
    n = x.shape[0]
    others = jnp.where(jnp.eye(n, dtype=bool), 0, gaussian_kernel(x, x, bandwidths))
    if weights is None:
        return others.sum() / (n * (n - 1)) if unbiased else (others.sum() + n) / n**2
    between, same = _expectation(others, weights, weights), jnp.sum(weights**2)
    return between / (1 - same) if unbiased else between + same


def energy_distance(
    x: Float[Array, "n dims"],
    y: Float[Array, "m dims"],
    weights_x: Float[Array, " n"] | None = None,
    weights_y: Float[Array, " m"] | None = None,
) -> Float[Array, ""]:
    r"""E|x - y| - E|x - x'|/2 - E|y - y'|/2, in the unit of x; zero for equal populations and else positive.

    The means hold each cell's zero distance to itself (V-statistic). This is half of Székely's 2E|x-y| - ..., as in
    geomloss's "energy" kernel: the squared MMD of the kernel -|a - b|, halved. Coinciding cells have gradient zero.

    Few cells are compared by their differences (`kernels.distances`), many by matrix products
    (`kernels.product_distances`, whose docstring says what that costs in accuracy). geomloss holds distances above
    1e-4, which moves its value by -1e-4 / n where n = m.

    Reference: Székely and Rizzo, J. Stat. Plan. Inference 143 (2013).
    """
    x, y = _present(x, weights_x), _present(y, weights_y)
    between, within_x, within_y = (
        _expectation(_distances(*pair), pair[2], pair[3])
        for pair in ((x, y, weights_x, weights_y), (x, None, weights_x, weights_x), (y, None, weights_y, weights_y))
    )
    return between - within_x / 2 - within_y / 2


def _distances(
    x: Float[Array, "n dims"],
    y: Float[Array, "m dims"] | None,
    weights_x: Float[Array, " n"] | None,
    weights_y: Float[Array, " m"] | None,
) -> Float[Array, "n m"]:
    """Between x and y, or, where y is None, between the cells of x."""
    if x.size * (x if y is None else y).shape[0] <= _FEW:
        return distances(x, x if y is None else y)
    return product_distances(x, y, weights_x=weights_x, weights_y=weights_y)


def _present(x: Float[Array, "n dims"], weights: Float[Array, " n"] | None) -> Float[Array, "n dims"]:
    """The cells in at least float32, those of mass zero put into the middle of the others and cut off from gradient."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if weights is None:
        return x
    has_mass = (weights > 0)[:, None]
    middle = jax.lax.stop_gradient(weights[None] @ jnp.where(has_mass, x, 0))
    return jnp.where(has_mass, x, middle)


def _expectation(
    values: Float[Array, "n m"], weights_x: Float[Array, " n"] | None, weights_y: Float[Array, " m"] | None
) -> Float[Array, ""]:
    # sums, not products: those an accelerator would round
    rows = values.mean(1) if weights_y is None else jnp.sum(values * weights_y[None], axis=1)
    return rows.mean() if weights_x is None else jnp.sum(rows * weights_x)
