"""Attention between the members of a set: no positions, no order, optionally no attention to oneself."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from scjax import check
from scjax.nn.blockwise import mix_blockwise
from scjax.nn.dropout import keep_mask

__all__ = [
    "attend",
    "attend_to_all",
    "attention_logits",
    "attention_weights",
    "differential_attend",
    "merge_heads",
    "split_heads",
    "unnormalised_weights",
]

IMPLEMENTATIONS = ("blockwise", "dot_product", "cudnn")


def split_heads(x: Float[Array, "n features"], n_heads: int) -> Float[Array, "heads n head_features"]:
    """Heads are contiguous slices of the features."""
    return jnp.swapaxes(x.reshape(x.shape[0], n_heads, -1), 0, 1)


def merge_heads(x: Float[Array, "heads n head_features"]) -> Float[Array, "n features"]:
    return jnp.swapaxes(x, 0, 1).reshape(x.shape[1], -1)


def attention_logits(
    q: Float[Array, "heads n d"], k: Float[Array, "heads m d"], *, exclude_self: bool = False
) -> Float[Array, "heads n m"]:
    """q_i . k_j / sqrt(d) for receiver i and sender j, in float32 or more; -inf where one would attend to itself."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("hid,hjd->hij", q * q.shape[-1] ** -0.5, k, preferred_element_type=wide)
    if exclude_self:
        # Written into the diagonal: a mask of the whole matrix costs a tenth of all attention on a CPU.
        i = jnp.arange(min(q.shape[1], k.shape[1]))
        logits = logits.at[:, i, i].set(-jnp.inf, indices_are_sorted=True, unique_indices=True)
    return logits


def attention_weights(logits: Float[Array, "heads n m"]) -> Float[Array, "heads n m"]:
    """Softmax over senders; a receiver without any sender gets weights of zero, not NaN."""
    unnormalised = unnormalised_weights(logits)
    return unnormalised / _or_one(unnormalised.sum(axis=-1, keepdims=True))


def attend(
    q: Float[Array, "heads n d"],
    k: Float[Array, "heads m d"],
    v: Float[Array, "heads m d"],
    *,
    exclude_self: bool = False,
    senders: Bool[Array, " m"] | None = None,
    dropout_rate: float = 0.0,
    key: PRNGKeyArray | None = None,
) -> Float[Array, "heads n d"]:
    """Each receiver's weighted mean of the senders' values, under `attention_weights`.

    Exponentials and sums are float32 or more, whatever the dtype of the arguments; the result has that of `v`. With a
    key, weights are set to zero with chance `dropout_rate`, rounded as `dropout.keep_mask` does, and the others divided
    by the chance to stay. Whoever is not among `senders` is to all others as if it were absent.

    Reference: Vaswani et al., NeurIPS 2017, eq. 1.
    """
    logits = attention_logits(q, k, exclude_self=exclude_self)
    if senders is not None:
        logits = jnp.where(senders[None, None], logits, -jnp.inf)
    weights = unnormalised_weights(logits)
    # Dividing n x d results instead of n x m weights saves two passes over the largest array there is.
    if key is None or dropout_rate == 0:
        with_total = jnp.einsum("hij,hjd->hid", weights, jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1))
        return (with_total[..., :-1] / _or_one(with_total[..., -1:])).astype(v.dtype)
    total = weights.sum(axis=-1, keepdims=True)
    keep, chance = keep_mask(key, weights.shape, dropout_rate)
    received = jnp.einsum("hij,hjd->hid", jnp.where(keep, weights, 0), v)
    return (received / _or_one(total * chance)).astype(v.dtype)


def unnormalised_weights(logits: Float[Array, "heads n m"]) -> Float[Array, "heads n m"]:
    """exp(logit - largest logit of the receiver); zeros for a receiver without any sender."""
    highest = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    return jnp.exp(logits - jnp.where(jnp.isfinite(highest), highest, 0))


def _or_one(total: Float[Array, "heads n 1"]) -> Float[Array, "heads n 1"]:
    return jnp.where(total > 0, total, 1)


def attend_to_all(
    q: Float[Array, "heads n d"],
    k: Float[Array, "heads m d"],
    v: Float[Array, "heads m d"],
    *,
    implementation: str | None = None,
) -> Float[Array, "heads n d"]:
    """`attend` to large sets: the same values without anybody excluded or dropped.

    Args:
        implementation: "blockwise" (`scjax.nn.blockwise`), of which no n x m array is kept; "dot_product"
            (`jax.nn.dot_product_attention` as XLA compiles it), which keeps one; "cudnn" (the same function by cuDNN's
            fused kernel), for bfloat16 or float16 on NVIDIA GPUs, which keeps none; or None: blockwise on a CPU,
            "dot_product" on accelerators. `benchmarks/gpu.py` measures all of them there.

    Raises:
        ValueError: "cudnn" on another backend, or for arguments of another dtype.
    """
    implementation = _implementation(implementation, v)
    if implementation == "blockwise":
        return mix_blockwise((q,), (k,), v, (jnp.ones((), v.dtype),))
    return _dot_product(q, k, v, implementation)


def differential_attend(
    q1: Float[Array, "heads n d"],
    k1: Float[Array, "heads m d"],
    q2: Float[Array, "heads n d"],
    k2: Float[Array, "heads m d"],
    v: Float[Array, "heads m d"],
    lam: Float[Array, ""],
    *,
    implementation: str | None = None,
) -> Float[Array, "heads n d"]:
    """What the first map of attention receives less lam times what the second does, of the same values.

    softmax(q1 k1^T / sqrt(d)) v - lam softmax(q2 k2^T / sqrt(d)) v. `implementation` as for `attend_to_all`.

    Reference: Ye et al., Differential Transformer, ICLR 2025, eq. 1.
    """
    implementation = _implementation(implementation, v)
    if implementation == "blockwise":
        return mix_blockwise((q1, q2), (k1, k2), v, (jnp.ones_like(lam), -lam))
    some, others = _dot_product(q1, k1, v, implementation), _dot_product(q2, k2, v, implementation)
    return some - lam.astype(v.dtype) * others


def _implementation(asked: str | None, v: Float[Array, "heads m d"]) -> str:
    backend = jax.default_backend()
    if asked is None:
        return "blockwise" if backend == "cpu" else "dot_product"
    check.one_of("implementation", asked, IMPLEMENTATIONS)
    if asked == "cudnn" and (backend != "gpu" or v.dtype not in (jnp.bfloat16, jnp.float16)):
        raise ValueError(
            f"implementation='cudnn' is for bfloat16 or float16 on an NVIDIA GPU; got {v.dtype} on the backend "
            f"{backend!r}. Take None."
        )
    return asked


def _dot_product(q, k, v, implementation):
    q, k, v = (jnp.swapaxes(x, 0, 1) for x in (q, k, v))
    by = "cudnn" if implementation == "cudnn" else "xla"
    return jnp.swapaxes(jax.nn.dot_product_attention(q, k, v, implementation=by), 0, 1)
