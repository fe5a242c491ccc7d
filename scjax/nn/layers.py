"""Layers of one form, one after another."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

__all__ = ["init_alike"]


def init_alike(init: Callable[[PRNGKeyArray], Any], keys: Sequence[PRNGKeyArray]) -> list[Any]:
    """The tree that `init` gives for each key, to the last bit, by one call of it.

    Compiling the draws of a network takes longer than drawing, on a CPU by orders of magnitude; this way many layers
    take as long as one.
    """
    if not keys:
        return []
    together = jax.vmap(init)(jnp.stack(keys))
    return [jax.tree.map(lambda leaf, i=i: leaf[i], together) for i in range(len(keys))]
