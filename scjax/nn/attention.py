"""Attention between the members of a set: no positions, no order, optionally no attention to oneself."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

__all__ = ["attend", "attention_logits", "attention_weights", "dropout", "merge_heads", "split_heads"]


def split_heads(x: Float[Array, "n features"], n_heads: int) -> Float[Array, "heads n head_features"]:
    """Heads are contiguous slices of the features."""
    return jnp.swapaxes(x.reshape(x.shape[0], n_heads, -1), 0, 1)


def merge_heads(x: Float[Array, "heads n head_features"]) -> Float[Array, "n features"]:
    return jnp.swapaxes(x, 0, 1).reshape(x.shape[1], -1)


def attention_logits(
    q: Float[Array, "heads n d"], k: Float[Array, "heads m d"], *, exclude_self: bool = False
) -> Float[Array, "heads n m"]:
    """q_i . k_j / sqrt(d) for receiver i and sender j; -inf where a member would attend to itself."""
    logits = jnp.einsum("hid,hjd->hij", q * q.shape[-1] ** -0.5, k)
    if exclude_self:
        logits = jnp.where(jnp.eye(q.shape[1], k.shape[1], dtype=bool)[None], -jnp.inf, logits)
    return logits


def attention_weights(logits: Float[Array, "heads n m"]) -> Float[Array, "heads n m"]:
    """Softmax over senders; a receiver without any sender gets weights of zero, not NaN."""
    highest = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    unnormalised = jnp.exp(logits - jnp.where(jnp.isfinite(highest), highest, 0))
    total = unnormalised.sum(axis=-1, keepdims=True)
    return unnormalised / jnp.where(total > 0, total, 1)


def dropout(weights: Float[Array, "heads n m"], rate: float, key: PRNGKeyArray) -> Float[Array, "heads n m"]:
    """Weights set to zero with chance `rate`, the others divided by 1 - rate.

    The chance is rounded to a multiple of 2^-16: sixteen random bits a weight cost half of what a uniform number does,
    and over cells x cells weights at every solver step they would otherwise be most of the work.
    """
    keep = jax.random.bits(key, weights.shape, jnp.uint16) >= round(rate * 2**16)
    return jnp.where(keep, weights / (1 - rate), 0)


def attend(
    q: Float[Array, "heads n d"],
    k: Float[Array, "heads m d"],
    v: Float[Array, "heads m d"],
    *,
    exclude_self: bool = False,
    dropout_rate: float = 0.0,
    key: PRNGKeyArray | None = None,
) -> Float[Array, "heads n d"]:
    """Each receiver's weighted mean of the senders' values; without a key there is no dropout.

    Reference: Vaswani et al., NeurIPS 2017, eq. 1.
    """
    weights = attention_weights(attention_logits(q, k, exclude_self=exclude_self))
    if key is not None and dropout_rate > 0:
        weights = dropout(weights, dropout_rate, key)
    return jnp.einsum("hij,hjd->hid", weights, v)
