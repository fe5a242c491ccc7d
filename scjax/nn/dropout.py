"""Dropout as a function of a key."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped, UInt32

__all__ = ["drop", "keep_mask", "keep_mask_at"]


def keep_mask(key: PRNGKeyArray, shape: tuple[int, ...], rate: float) -> tuple[Shaped[Array, "..."], float]:
    """Which entries stay, and the chance to stay: 1 - rate with the rate rounded to a multiple of 2^-16.

    Sixteen random bits an entry cost half of what a uniform number does; over the weights of attention at every step of
    a solver, a uniform number each would be most of the work.
    """
    dropped = min(round(rate * 2**16), 2**16 - 1)
    return jax.random.bits(key, shape, jnp.uint16) >= dropped, 1 - dropped / 2**16


def keep_mask_at(
    seed: UInt32[Array, ""], rows: Int[Array, " n"], columns: Int[Array, " m"], rate: float
) -> tuple[Bool[Array, "n m"], float]:
    """`keep_mask` of entries by their place: any part of a large matrix can be drawn alone, and again.

    The bits of an entry are a mix of those of its row and of its column. They cost about as much as four arithmetic
    operations and are good enough to leave weights out at random, not for more.
    """
    dropped = min(round(rate * 2**16), 2**16 - 1)
    of_rows = _mixed(rows.astype(jnp.uint32) + seed)
    of_columns = _mixed(columns.astype(jnp.uint32) ^ ~seed)
    bits = _mixed(of_rows[:, None] + of_columns[None])
    return bits >> 16 >= dropped, 1 - dropped / 2**16


def _mixed(bits: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A permutation of the 32-bit numbers in which every bit of the result depends on every bit of the argument.

    Constants: C. Wellons, "Prospecting for hash functions" (2018).
    """
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    return bits ^ (bits >> 16)


def drop(x: Float[Array, "..."], rate: float, key: PRNGKeyArray | None) -> Float[Array, "..."]:
    """Each entry zero with chance `rate`, the others divided by the chance to stay; x itself without a key."""
    if key is None or rate == 0:
        return x
    keep, chance = keep_mask(key, x.shape, rate)
    return jnp.where(keep, x / chance, 0)
