"""Kernel distances between populations: maximum mean discrepancy and energy distance."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from scjax.check import at_least
from scjax.kernels import distances, gaussian_kernel


def mmd2(
    x: Float[Array, "n dims"],
    y: Float[Array, "m dims"],
    bandwidths: Float[Array, " k"],
    *,
    unbiased: bool = True,
) -> Float[Array, ""]:
    r"""Squared maximum mean discrepancy under the mean of k Gaussian kernels.

    E k(x, x') + E k(y, y') - 2 E k(x, y),  k(a, b) = mean_s exp(-|a - b|^2 / 2 s^2).

    Args:
        x, y: cells of the two populations, in one unit; n and m may differ.
        bandwidths: the kernels' s, in the unit of x; `kernels.median_bandwidths` takes them from data.
        unbiased: leave a cell's kernel with itself out of its mean. Around zero that estimate scatters to both
            sides. With False the means hold the diagonal, and the estimate is never negative and biased upwards.

    Returns:
        The estimate, dimensionless. In float32 a cell ten thousand bandwidths from all others spoils its third digit.

    Raises:
        ValueError: fewer than two cells in a population, where `unbiased`.

    Reference: Gretton et al., JMLR 13 (2012), eq. 3 and 5.
    """
    if unbiased:
        at_least("the number of cells of x", x.shape[0], 2)
        at_least("the number of cells of y", y.shape[0], 2)
    within = _within(x, bandwidths, unbiased) + _within(y, bandwidths, unbiased)
    return within - 2 * jnp.mean(gaussian_kernel(x, y, bandwidths))


def _within(x: Float[Array, "n dims"], bandwidths: Float[Array, " k"], unbiased: bool) -> Float[Array, ""]:
    n = x.shape[0]
    between = jnp.where(jnp.eye(n, dtype=bool), 0, gaussian_kernel(x, x, bandwidths)).sum()
    return between / (n * (n - 1)) if unbiased else (between + n) / n**2


def energy_distance(x: Float[Array, "n dims"], y: Float[Array, "m dims"]) -> Float[Array, ""]:
    r"""E|x - y| - E|x - x'|/2 - E|y - y'|/2, in the unit of x; zero for equal populations and else positive.

    The means hold each cell's zero distance to itself (V-statistic). This is half of Székely's 2E|x-y| - ..., as in
    geomloss's "energy" kernel: the squared MMD of the kernel -|a - b|, halved. Coinciding cells have gradient zero.

    Reference: Székely and Rizzo, J. Stat. Plan. Inference 143 (2013).
    """
    return distances(x, y).mean() - distances(x, x).mean() / 2 - distances(y, y).mean() / 2
