"""A time or a noise level as a vector of waves."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

__all__ = ["sinusoids"]


def sinusoids(t: Float[Array, " n"], n_features: int = 256, max_period: float = 1e4) -> Float[Array, "n n_features"]:
    """cos(t f_k), then sin(t f_k), with f_k = max_period^(-2k / n_features), k = 0 ... n_features / 2 - 1.

    t is in the unit that the model chose: the slowest wave has the period 2 pi max_period, the fastest 2 pi.

    Reference: Vaswani et al., NeurIPS 2017, section 3.5; the order is that of diffusion models.
    """
    half = n_features // 2
    # Rounded from double precision: with diffusion times up to 1000 the last digit of an exponential, which backends
    # compute differently, is worth 1e-4 of an angle.
    exponents = -math.log(max_period) * np.arange(half, dtype=t.dtype) / half
    frequencies = np.exp(exponents.astype(np.float64)).astype(t.dtype)
    angles = t[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
