"""Dropout as a function of a key."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

__all__ = ["drop", "keep_mask"]


def keep_mask(key: PRNGKeyArray, shape: tuple[int, ...], rate: float) -> tuple[Shaped[Array, "..."], float]:
    """Which entries stay, and the chance to stay: 1 - rate with the rate rounded to a multiple of 2^-16.

    Sixteen random bits an entry cost half of what a uniform number does; over the weights of attention at every step of
    a solver, a uniform number each would be most of the work.
    """
    dropped = min(round(rate * 2**16), 2**16 - 1)
    return jax.random.bits(key, shape, jnp.uint16) >= dropped, 1 - dropped / 2**16


def drop(x: Float[Array, "..."], rate: float, key: PRNGKeyArray | None) -> Float[Array, "..."]:
    """Each entry zero with chance `rate`, the others divided by the chance to stay; x itself without a key."""
    if key is None or rate == 0:
        return x
    keep, chance = keep_mask(key, x.shape, rate)
    return jnp.where(keep, x / chance, 0)
