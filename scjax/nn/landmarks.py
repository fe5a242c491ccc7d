"""Attention to groups of alike senders instead of each of them: linear in the number of cells, and approximate.

The cells are put into groups around landmarks. A group stands for its members by its mean key, its mean value and its
number; of how they vary within groups only the covariance is kept, one for all groups:

    sum_j exp(q k_j) v_j ~ sum_g n_g exp(q k_g + q C_kk q / 2) (v_g + C_vk q)

That is what Gaussian groups of one covariance give (C_kk cancels in the softmax), so one group is already right for a
Gaussian population; with as many landmarks as cells the result is exact for any. A receiver is left out of its own
group's means, of the number and of the covariance: it does not hear itself.

Reference: Vyas et al., Fast Transformers with Clustered Attention, NeurIPS 2020, who cluster queries; here senders are.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from scjax import check
from scjax.nn.blockwise import attend_blockwise, merge

__all__ = ["attend_to_landmarks", "group"]

ROUNDS = 2  # of moving the landmarks into the middle of their groups; more gain little


def group(z: Float[Array, "cells features"], n_landmarks: int) -> Int[Array, " cells"]:
    """Number of the group of each cell, 0 .. n_landmarks - 1: k-means, begun from random cells and soon stopped.

    The random cells are the same in every call with as many cells, so that a drift is a function of the cells. The
    groups carry no gradient. With as many landmarks as cells each cell is a group of its own.

    Raises:
        ValueError: fewer than one landmark.
    """
    check.at_least("n_landmarks", n_landmarks, 1)
    n = z.shape[0]
    if n_landmarks >= n:
        return jnp.arange(n)
    z = jax.lax.stop_gradient(z.astype(jnp.promote_types(z.dtype, jnp.float32)))
    z = z - z.mean(axis=0, keepdims=True)
    centres = z[jax.random.choice(jax.random.key(0), n, (n_landmarks,), replace=False)]
    for _ in range(ROUNDS):
        groups = _nearest(z, centres)
        sums, sizes = _sums(z, groups, n_landmarks), _sizes(groups, n_landmarks, z.dtype)
        centres = jnp.where(sizes[:, None] > 0, sums / jnp.maximum(sizes, 1)[:, None], centres)
    return _nearest(z, centres)


def attend_to_landmarks(
    q: Float[Array, "heads n d"],
    k: Float[Array, "heads n d"],
    v: Float[Array, "heads n d"],
    groups: Int[Array, " n"],
    n_landmarks: int,
    *,
    mesh: Mesh | None = None,
) -> Float[Array, "heads n d"]:
    """`attention.attend(q, k, v, exclude_self=True)` with the senders taken together in `groups`.

    Gradients are those of the approximation, with the groups held fixed.

    Args:
        groups: of each cell, a number below n_landmarks.
        mesh: as in `blockwise.attend_blockwise`; the landmarks are on all devices.
    """
    dtype = jnp.promote_types(v.dtype, jnp.float32)
    q, k, v_wide = (x.astype(dtype) for x in (q, k, v))
    sizes = _sizes(groups, n_landmarks, dtype)
    mean_k, mean_v = (
        jax.vmap(lambda x: _sums(x, groups, n_landmarks))(x) / jnp.maximum(sizes, 1)[None, :, None] for x in (k, v_wide)
    )
    elsewhere = attend_blockwise(q, mean_k, mean_v, excluded=groups, log_masses=jnp.log(sizes), mesh=mesh)

    # The own group without the receiver: the mean moves away from it by its deviation over the number of the rest.
    q = q * q.shape[-1] ** -0.5
    rest = sizes[groups][None, :, None] - 1
    off_k, off_v = k - mean_k[:, groups], v_wide - mean_v[:, groups]
    own_k, own_v = (mean[:, groups] - off / jnp.maximum(rest, 1) for mean, off in ((mean_k, off_k), (mean_v, off_v)))
    logit = jnp.sum(q * own_k, axis=-1, keepdims=True) + jnp.log(rest)
    received, _ = merge(elsewhere, (own_v, logit))

    # And the scatter without it, by the same rule.
    scatter = jnp.einsum("hnd,hne->hde", off_k, off_v)
    own = jnp.sum(q * off_k, axis=-1, keepdims=True) * off_v * (rest + 1) / jnp.maximum(rest, 1)
    received = received + (q @ scatter - own) / max(q.shape[1] - 1, 1)
    return received.astype(v.dtype)


def _nearest(z: Float[Array, "n features"], centres: Float[Array, "k features"]) -> Int[Array, " n"]:
    return jnp.argmin(jnp.sum(centres**2, axis=1)[None] - 2 * z @ centres.T, axis=1)


def _sums(x: Float[Array, "n features"], groups: Int[Array, " n"], n_landmarks: int) -> Float[Array, "k features"]:
    return jax.ops.segment_sum(x, groups, n_landmarks)


def _sizes(groups: Int[Array, " n"], n_landmarks: int, dtype: jnp.dtype) -> Float[Array, " k"]:
    return jax.ops.segment_sum(jnp.ones(groups.shape, dtype), groups, n_landmarks)
