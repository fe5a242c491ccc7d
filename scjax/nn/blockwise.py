"""Exact attention that never holds a whole matrix of weights: some receivers at a time, forward and backward.

Both directions go through blocks of receivers. A block's tile of logits (receivers x all senders) is made, used and
forgotten; the backward pass makes it again from queries, keys and each receiver's log-sum-exp. Memory grows with
n + m and the tile, not with n x m, and on a CPU the tile stays in cache, which is where the time goes.

Reference: Dao et al., FlashAttention, NeurIPS 2022, section 3.1 and algorithm 4 (backward); here the senders need no
blocks of their own.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from scjax import check

__all__ = ["RESIDUALS", "mix_blockwise"]

RESIDUALS = "attended"
"""Name, for a policy of `jax.checkpoint`, of all that the backward pass keeps besides its inputs."""

TILE = 2**19  # logits of one map in a tile: 2 MiB of float32
LEAST_ROWS = 128  # below, the gradients of the senders (d x m, added to once a tile) outgrow the tile


def mix_blockwise(
    queries: Sequence[Float[Array, "heads n d"]],
    keys: Sequence[Float[Array, "heads m d"]],
    v: Float[Array, "heads m d"],
    coefficients: Sequence[Float[Array, ""]],
    *,
    block: int | None = None,
) -> Float[Array, "heads n d"]:
    """sum_j c_j softmax(q_j k_j^T / sqrt(d)) v: attention maps on the same values, added up.

    Exact, with gradients for all arguments (reverse mode only). Arithmetic is in float32 or more, the result in
    the dtype of `v`. `vmap` goes through the batch one member at a time, so the memory of a tile is needed once.
    What of the backward pass is the same for all maps is done once.

    Under `jax.checkpoint` a policy can keep what each map gave (heads x n x (d + 1) numbers a map), which saves the
    second forward pass, a quarter of all time:
    `jax.checkpoint(layer, policy=jax.checkpoint_policies.save_only_these_names(RESIDUALS))`.

    Args:
        queries, keys: one each for every map.
        coefficients: weight of each map, of any sign.
        block: receivers in a tile; None makes tiles of about half a million logits, 128 receivers at least.

    Raises:
        ValueError: numbers of queries, keys and coefficients that differ, or a block below one.
    """
    if not len(queries) == len(keys) == len(coefficients) > 0:
        raise ValueError(
            "each map needs a query, a key and a coefficient; "
            f"got {len(queries)} queries, {len(keys)} keys, {len(coefficients)} coefficients."
        )
    if block is not None:
        check.at_least("block", block, 1)
    heads, n, d = queries[0].shape
    m = v.shape[1]
    rows = min(block or max(LEAST_ROWS, TILE // m), n)
    group = max(size for size in range(1, heads + 1) if heads % size == 0 and (size == 1 or size * rows * m <= TILE))
    dtype = jnp.promote_types(v.dtype, jnp.float32)
    mixed = _mix(
        _Tiling(n_blocks=math.ceil(n / rows), heads=group),
        tuple(q.astype(dtype) * d**-0.5 for q in queries),
        tuple(k.astype(dtype) for k in keys),
        v.astype(dtype),
        tuple(jnp.asarray(c, dtype) for c in coefficients),
    )
    return mixed.astype(v.dtype)


class _Tiling(NamedTuple):
    n_blocks: int  # that the receivers are cut into
    heads: int  # done together; more than one only where all their receivers fit into one tile


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mix(tiling, queries, keys, v, coefficients):
    return _mix_forward(tiling, queries, keys, v, coefficients)[0]


def _mix_forward(tiling, queries, keys, v, coefficients):
    attended, log_totals = checkpoint_name(_one_at_a_time(_attend_heads, tiling)(queries, keys, v), RESIDUALS)
    mixed = sum(c * o for c, o in zip(coefficients, attended, strict=True))
    return mixed, (queries, keys, v, coefficients, attended, log_totals)


def _mix_backward(tiling, residuals, d_mixed):
    queries, keys, v, coefficients, attended, log_totals = residuals
    # The softmax's gradient needs sum_j p_ij dp_ij of a whole row; it is the product of O_i and dO_i.
    means = tuple(jnp.sum(d_mixed * o, axis=-1, keepdims=True) for o in attended)
    d_queries, d_keys, d_v = _one_at_a_time(_differentiate_heads, tiling)(
        queries, keys, v, coefficients, log_totals, means, d_mixed
    )
    return d_queries, d_keys, d_v, tuple(jnp.sum(mean) for mean in means)


_mix.defvjp(_mix_forward, _mix_backward)


def _one_at_a_time(f, tiling):
    """`f` whose `vmap` is a loop: a batch of tiles would leave the cache."""
    return jax.custom_batching.sequential_vmap(functools.partial(f, tiling))


def _attend_heads(tiling, queries, keys, v):
    """Per map what the receivers get, and the logarithm of each one's sum of exponentials."""

    def one_head(args):
        queries, keys, v = args
        out = jax.lax.map(lambda block: _attend_tile(block, keys, v), _cut(queries, tiling.n_blocks))
        return _join(out, queries[0].shape[0])

    return jax.lax.map(one_head, (queries, keys, v), batch_size=tiling.heads)


def _attend_tile(queries, keys, v):
    attended, log_totals = [], []
    for q, k in zip(queries, keys, strict=True):
        logits = q @ k.T
        highest = logits.max(axis=-1, keepdims=True)
        weights = jnp.exp(logits - highest)
        total = weights.sum(axis=-1, keepdims=True)
        attended.append(weights @ v / total)
        log_totals.append(highest + jnp.log(total))
    return tuple(attended), tuple(log_totals)


def _differentiate_heads(tiling, queries, keys, v, coefficients, log_totals, means, d_mixed):
    """Gradients by queries, keys and values."""

    def one_head(args):
        of_receivers, senders = args

        def step(sums, block):
            d_queries, terms = _differentiate_tile(*block, *senders, coefficients)
            return jax.tree.map(jnp.add, sums, terms), d_queries

        zeros = jax.tree.map(lambda x: jnp.zeros_like(x.T), senders)
        (d_keys, d_v), d_queries = jax.lax.scan(step, zeros, _cut(of_receivers, tiling.n_blocks))
        return _join(d_queries, d_mixed.shape[-2]), *jax.tree.map(jnp.transpose, (d_keys, d_v))

    of_receivers = queries, log_totals, means, d_mixed
    return jax.lax.map(one_head, (of_receivers, (keys, v)), batch_size=tiling.heads)


def _differentiate_tile(queries, log_totals, means, d_mixed, keys, v, coefficients):
    """Gradients by queries, and this block's share, transposed, of those by keys and values.

    Summed over receivers from the left, as d x rows times rows x senders: the other way round is a third as fast.
    """
    d_queries, d_keys = [], []
    d_weights = d_mixed @ v.T  # of each map, but for its coefficient
    mixed_weights = 0
    for q, k, log_total, mean, c in zip(queries, keys, log_totals, means, coefficients, strict=True):
        weights = c * jnp.exp(q @ k.T - log_total)
        d_logits = weights * (d_weights - mean)
        d_queries.append(d_logits @ k)
        d_keys.append(q.T @ d_logits)
        mixed_weights += weights
    return tuple(d_queries), (tuple(d_keys), d_mixed.T @ mixed_weights)


def _cut(tree, n_blocks):
    """Blocks of receivers, the last filled up with zeros: their values are finite and their gradients are zero."""

    def cut(x):
        rows = math.ceil(x.shape[0] / n_blocks)
        return jnp.pad(x, ((0, n_blocks * rows - x.shape[0]), (0, 0))).reshape(n_blocks, rows, -1)

    return jax.tree.map(cut, tree)


def _join(tree, n):
    return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1])[:n], tree)
