"""Exact attention that never holds a whole matrix of weights: a tile of it at a time, forward and backward.

Both directions go through blocks of receivers and, where there are many senders, through blocks of senders. A tile of
logits (receivers x senders of a block) is made, used and forgotten; tiles of one receiver are joined by their
log-sum-exps. The backward pass makes each tile again from queries, keys and each receiver's log-sum-exp. Memory grows
with n + m and the tile, not with n x m, and on a CPU the tile stays in cache, which is where the time goes.

Receivers may lie on several devices: each device then keeps its receivers, and holds the keys and values of all
senders, which are exchanged before (m x d numbers, as many as the states themselves), and the sum of their gradients
after. No other array is as long as all receivers.

Reference: Dao et al., FlashAttention, NeurIPS 2022, section 3.1 and algorithm 4 (backward).
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray

from scjax import check
from scjax.nn.dropout import keep_mask_at

__all__ = ["CELLS", "RESIDUALS", "attend_blockwise", "devices_along_cells", "merge", "mix_blockwise"]

RESIDUALS = "attended"
"""Name, for a policy of `jax.checkpoint`, of all that the backward pass keeps besides its inputs."""

CELLS = "cells"
"""Name of the mesh axis that receivers are spread over."""

TILE = 2**19  # logits of one map in a tile: 2 MiB of float32
LEAST_ROWS = 128  # below, the gradients of the senders (d x m, added to once a tile) outgrow the tile
MANY_SENDERS = 2**14  # beyond, a tile has not all of them: with LEAST_ROWS it would leave the cache
COLUMNS = 2**11  # senders of a tile, where it has not all of them
ROWS = 2**9  # and its receivers
LARGER = 8  # times, both, on accelerators, which have no use for a small tile and pay for every one; not measured


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
    dtype = jnp.promote_types(v.dtype, jnp.float32)
    n, m = queries[0].shape[1], v.shape[1]
    if not n * m:
        return jnp.zeros((len(v), n, v.shape[2]), v.dtype)
    mixed, _ = _mix(
        _tiling(queries[0].shape, m, block, None),  # pyright: ignore[reportArgumentType]
        tuple(q.astype(dtype) * q.shape[-1] ** -0.5 for q in queries),
        tuple(k.astype(dtype) for k in keys),
        v.astype(dtype),
        tuple(jnp.asarray(c, dtype) for c in coefficients),
        _Rules(),
    )
    return mixed.astype(v.dtype)


def attend_blockwise(
    q: Float[Array, "heads n d"],
    k: Float[Array, "heads m d"],
    v: Float[Array, "heads m d"],
    *,
    excluded: Int[Array, " n"] | None = None,
    log_masses: Float[Array, " m"] | None = None,
    dropout_rate: float = 0.0,
    key: PRNGKeyArray | None = None,
    block: int | None = None,
    sender_block: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "heads n d"], Float[Array, "heads n 1"]]:
    """What softmax(q k^T / sqrt(d)) v gives each receiver, and the logarithm of its sum of exponentials.

    Exact, with gradients for q, k and v (reverse mode only); `vmap` and precision as `mix_blockwise`. A receiver
    without any sender receives zero, and its logarithm is -inf.

    Args:
        excluded: number of the sender that each receiver does not hear; itself, where the cells of one population are
            both. A number that is no sender's excludes nobody.
        log_masses: added to the logits of each sender, which then counts as so many; -inf makes it absent. It has no
            gradient.
        dropout_rate, key: with a key, weights are set to zero at this rate and the others divided by the chance to
            stay, by `dropout.keep_mask_at`: neither blocks nor devices change what is drawn.
        block, sender_block: receivers and senders in a tile; None takes tiles that are fast on a CPU.
        mesh: of the devices whose axis "cells" the receivers are spread over; their number must be a multiple of it.

    Raises:
        ValueError: a block below one, a mesh without an axis "cells", receivers that it does not divide.
    """
    n_devices = devices_along_cells(mesh, q.shape[1])
    dtype = jnp.promote_types(v.dtype, jnp.float32)
    heads, n, d = q.shape
    if not n * k.shape[1]:
        return jnp.zeros((heads, n, v.shape[2]), v.dtype), jnp.full((heads, n, 1), -jnp.inf, dtype)
    rules = _Rules(excluded=None if excluded is None else excluded[:, None].astype(jnp.int32))
    if log_masses is not None:
        rules = rules._replace(log_masses=jax.lax.stop_gradient(log_masses.astype(dtype))[:, None])
    if key is not None and dropout_rate > 0:
        seeds = jax.random.bits(key, (heads, 1), jnp.uint32)
        rules = rules._replace(row=jnp.arange(n, dtype=jnp.int32)[:, None], seeds=seeds)
    tiling = _tiling((heads, n // n_devices, d), k.shape[1], block, sender_block)
    tiling = tiling._replace(dropout_rate=dropout_rate if rules.seeds is not None else 0.0, mesh=mesh)
    q, k, v_wide = q.astype(dtype) * d**-0.5, k.astype(dtype), v.astype(dtype)
    attended, (log_totals,) = _mix(tiling, (q,), (k,), v_wide, (jnp.ones((), dtype),), rules)
    return attended.astype(v.dtype), log_totals


def merge(
    some: tuple[Float[Array, "... n d"], Float[Array, "... n 1"]],
    others: tuple[Float[Array, "... n d"], Float[Array, "... n 1"]],
) -> tuple[Float[Array, "... n d"], Float[Array, "... n 1"]]:
    """What receivers get from two groups of senders together, each as `attend_blockwise` gives it."""
    (attended_some, log_some), (attended_others, log_others) = some, others
    highest = jax.lax.stop_gradient(jnp.maximum(log_some, log_others))
    highest = jnp.where(jnp.isfinite(highest), highest, 0)
    of_some, of_others = jnp.exp(log_some - highest), jnp.exp(log_others - highest)
    total = of_some + of_others
    nobody = total == 0
    attended = (of_some * attended_some + of_others * attended_others) / jnp.where(nobody, 1, total)
    return attended, jnp.where(nobody, -jnp.inf, highest + jnp.log(jnp.where(nobody, 1, total)))


class _Tiling(NamedTuple):
    n_blocks: int  # that the receivers (of one device) are cut into
    heads: int  # done together; more than one only where all their receivers fit into one tile
    n_sender_blocks: int
    dropout_rate: float = 0.0
    mesh: Mesh | None = None


class _Rules(NamedTuple):
    """Who hears whom; nothing of it has a gradient. All parts may be absent."""

    excluded: Int[Array, "n 1"] | None = None  # number of a sender
    row: Int[Array, "n 1"] | None = None  # number of the receiver, for dropout
    log_masses: Float[Array, "m 1"] | None = None
    seeds: Array | None = None  # uint32[heads, 1], of the dropout


def _tiling(shape: tuple[int, int, int], m: int, block: int | None, sender_block: int | None) -> _Tiling:
    for name, size in (("block", block), ("sender_block", sender_block)):
        if size is not None:
            check.at_least(name, size, 1)
    heads, n, _ = shape
    larger = 1 if jax.default_backend() == "cpu" else LARGER
    columns = min(sender_block or (m if m <= MANY_SENDERS else larger * COLUMNS), m)
    rows = min(block or (max(LEAST_ROWS, TILE // m) if columns == m else larger * ROWS), n)
    tile = rows * columns
    group = max(size for size in range(1, heads + 1) if heads % size == 0 and (size == 1 or size * tile <= TILE))
    return _Tiling(n_blocks=math.ceil(n / rows), heads=group, n_sender_blocks=math.ceil(m / columns))


def devices_along_cells(mesh: Mesh | None, n_cells: int) -> int:
    """Number of devices that the cells are spread over; 1 without a mesh."""
    if mesh is None:
        return 1
    if CELLS not in mesh.shape:
        raise ValueError(
            f"mesh must have an axis {CELLS!r}, over which cells are spread; its axes are {', '.join(mesh.axis_names)}."
        )
    n_devices = mesh.shape[CELLS]
    if n_cells % n_devices:
        raise ValueError(
            f"the number of cells must be a multiple of the {n_devices} devices along {CELLS!r}; got {n_cells}. "
            f"Leave {n_cells % n_devices} of them out, or take another number of devices."
        )
    return n_devices


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mix(tiling, queries, keys, v, coefficients, rules):
    return _mix_forward(tiling, queries, keys, v, coefficients, rules)[0]


def _mix_forward(tiling, queries, keys, v, coefficients, rules):
    f = _one_at_a_time(_over_devices(_attend_heads, tiling, gathers=False))
    attended, log_totals = checkpoint_name(f(queries, keys, v, rules), RESIDUALS)
    mixed = sum(c * o for c, o in zip(coefficients, attended, strict=True))
    return (mixed, log_totals), (queries, keys, v, coefficients, rules, attended, log_totals)


def _mix_backward(tiling, residuals, cotangents):
    queries, keys, v, coefficients, rules, attended, log_totals = residuals
    d_mixed, d_log_totals = cotangents
    # The softmax's gradient needs sum_j p_ij dp_ij of a whole row; it is the product of O_i and dO_i.
    means = tuple(jnp.sum(d_mixed * o, axis=-1, keepdims=True) for o in attended)
    shifts = tuple(c * mean - d for c, mean, d in zip(coefficients, means, d_log_totals, strict=True))
    # Whoever hears nobody has a logarithm of -inf, and weights of exp(-inf - 0) = 0.
    finite = tuple(jnp.where(jnp.isfinite(log_total), log_total, 0) for log_total in log_totals)
    f = _one_at_a_time(_over_devices(_differentiate_heads, tiling, gathers=True))
    d_queries, d_keys, d_v = f(queries, keys, v, rules, coefficients, finite, shifts, d_mixed)
    return d_queries, d_keys, d_v, tuple(jnp.sum(mean) for mean in means), _no_gradient(rules)


def _no_gradient(rules):
    """None where a part is of integers; nothing else may stand for their gradients."""
    zero = None if rules.log_masses is None else jnp.zeros_like(rules.log_masses)
    return rules._replace(excluded=None, row=None, log_masses=zero, seeds=None)


_mix.defvjp(_mix_forward, _mix_backward)


def _one_at_a_time(f):
    """`f` whose `vmap` is a loop: a batch of tiles would leave the cache."""
    return jax.custom_batching.sequential_vmap(f)


def _over_devices(f, tiling, *, gathers):
    """`f(tiling, queries, keys, v, rules, ...)` where every device has some receivers and all senders.

    `gathers`: it gives gradients of queries, keys and values; those of the senders are summed over the devices.
    """
    here = functools.partial(f, tiling)
    if tiling.mesh is None:
        return here
    receivers, senders = PartitionSpec(None, CELLS), PartitionSpec()
    specs: Any = _Rules  # of the same fields as the arrays that they lay out
    of_rules = specs(excluded=PartitionSpec(CELLS), row=PartitionSpec(CELLS), log_masses=senders, seeds=senders)

    def summed(*args):
        d_queries, d_keys, d_v = here(*args)
        return d_queries, *jax.lax.psum((d_keys, d_v), CELLS)

    def call(queries, keys, v, rules, *rest):
        given = jax.tree.map(lambda part, spec: None if part is None else spec, rules, of_rules, is_leaf=_is_none)
        specs = receivers, senders, senders, given
        if gathers:
            specs, out = (*specs, senders, receivers, receivers, receivers), (receivers, senders, senders)
        else:
            out = receivers
        # No gradient passes through, so that nothing needs to be known of what is the same on all devices.
        g = jax.shard_map(summed if gathers else here, mesh=tiling.mesh, in_specs=specs, out_specs=out, check_vma=False)
        return g(queries, keys, v, rules, *rest)

    return call


def _is_none(part):
    return part is None


def _attend_heads(tiling, queries, keys, v, rules):
    """Per map what the receivers get, and the logarithm of each one's sum of exponentials."""
    of_senders = _cut_senders((keys, v), rules, tiling.n_sender_blocks)
    per_cell = rules._replace(log_masses=None, seeds=None)

    def one_head(args):
        queries, senders, seed = args
        blocks = _cut((queries, per_cell), tiling.n_blocks)

        def attend(block):
            return _attend_block(block, senders, of_senders.log_masses, seed, tiling)

        return _join(jax.lax.map(attend, blocks), queries[0].shape[0])

    return jax.lax.map(one_head, (queries, of_senders.blocks, rules.seeds), batch_size=tiling.heads)


def _attend_block(block: Any, senders: Any, log_masses, seed, tiling):
    if tiling.n_sender_blocks == 1:
        part: Any = _first((senders, log_masses))
        return _attend_tile(*block, *part, 0, seed, tiling)  # pyright: ignore[reportCallIssue]

    def step(received, part: Any):
        tile = _attend_tile(*block, *part, seed, tiling)  # pyright: ignore[reportCallIssue]
        return tuple(zip(*map(merge, zip(*received, strict=True), zip(*tile, strict=True)), strict=True)), None

    queries, _ = block
    v = senders[1]
    nothing = tuple((jnp.zeros((len(q), v.shape[-1]), q.dtype), jnp.full((len(q), 1), -jnp.inf)) for q in queries)
    nothing = jax.tree.map(lambda x: x.astype(v.dtype), tuple(zip(*nothing, strict=True)))
    received, _ = jax.lax.scan(step, nothing, (senders, log_masses, jnp.arange(tiling.n_sender_blocks)))
    return received


def _attend_tile(queries, rules, senders, log_masses, number, seed, tiling):
    keys, v = senders
    attended, log_totals = [], []
    may_be_alone = rules.excluded is not None or log_masses is not None
    for q, k in zip(queries, keys, strict=True):
        logits = _logits(q, k, rules, log_masses, number)
        highest = logits.max(axis=-1, keepdims=True)
        if may_be_alone:
            highest = jnp.where(jnp.isfinite(highest), highest, 0)
        weights = jnp.exp(logits - highest)
        total = weights.sum(axis=-1, keepdims=True)
        log_totals.append(highest + jnp.log(total))
        if tiling.dropout_rate:
            keep, chance = _keep(rules, weights.shape, number, seed, tiling)
            weights, total = jnp.where(keep, weights, 0), total * chance
        attended.append(weights @ v / (jnp.where(total > 0, total, 1) if may_be_alone else total))
    return tuple(attended), tuple(log_totals)


def _logits(q, k, rules, log_masses, number):
    logits = q @ k.T
    if log_masses is not None:
        logits = logits + log_masses.T
    if rules.excluded is not None:
        # Written where it belongs: a mask of the whole tile costs a tenth of all attention on a CPU.
        column = rules.excluded[:, 0] - number * len(k)
        column = jnp.where(column < 0, len(k), column)  # a negative one would count from the end
        row = jnp.arange(len(q))
        logits = logits.at[row, column].set(-jnp.inf, mode="drop", indices_are_sorted=True, unique_indices=True)
    return logits


def _keep(rules, shape, number, seed, tiling):
    columns = number * shape[1] + jnp.arange(shape[1], dtype=jnp.int32)
    return keep_mask_at(seed[0], rules.row[:, 0], columns, tiling.dropout_rate)


def _differentiate_heads(tiling, queries, keys, v, rules, coefficients, log_totals, shifts, d_mixed):
    """Gradients by queries, keys and values."""
    of_senders = _cut_senders((keys, v), rules, tiling.n_sender_blocks)
    per_cell = rules._replace(log_masses=None, seeds=None)

    def one_head(args):
        of_receivers, senders, seed = args

        def step(sums, block):
            return _differentiate_block(sums, block, senders, of_senders.log_masses, coefficients, seed, tiling)

        zeros = jax.tree.map(lambda x: jnp.zeros_like(jnp.swapaxes(x, 1, 2)), senders)
        blocks = _cut((of_receivers, per_cell), tiling.n_blocks)
        sums, d_queries = jax.lax.scan(step, zeros, blocks)
        whole = lambda x, like: jnp.swapaxes(x, 1, 2).reshape(-1, x.shape[1])[: like.shape[1]]  # noqa: E731
        return _join(d_queries, d_mixed.shape[-2]), *jax.tree.map(whole, sums, (keys, v))

    of_receivers = queries, log_totals, shifts, d_mixed
    return jax.lax.map(one_head, (of_receivers, of_senders.blocks, rules.seeds), batch_size=tiling.heads)


def _differentiate_block(sums, block, senders, log_masses, coefficients, seed, tiling):
    """Gradients by queries of a block, and the sums over blocks of those by keys and values with this one's share."""
    of_receivers, rules = block
    if tiling.n_sender_blocks == 1:
        part: Any = _first((senders, log_masses))
        d_queries, terms = _differentiate_tile(of_receivers, rules, *part, 0, coefficients, seed, tiling)  # pyright: ignore[reportCallIssue]
        return jax.tree.map(lambda total, term: total + term[None], sums, terms), d_queries

    def step(carry, part: Any):
        sums, d_queries = carry
        more, terms = _differentiate_tile(of_receivers, rules, *part, coefficients, seed, tiling)  # pyright: ignore[reportCallIssue]
        sums = jax.tree.map(lambda total, term: total.at[part[-1]].add(term), sums, terms)
        return (sums, jax.tree.map(jnp.add, d_queries, more)), None

    zeros = jax.tree.map(jnp.zeros_like, of_receivers[0])
    parts = (senders, log_masses, jnp.arange(tiling.n_sender_blocks))
    (sums, d_queries), _ = jax.lax.scan(step, (sums, zeros), parts)
    return sums, d_queries


def _differentiate_tile(of_receivers, rules, senders, log_masses, number, coefficients, seed, tiling):
    """Gradients by queries, and this tile's share, transposed, of those by keys and values.

    Summed over receivers from the left, as d x rows times rows x senders: the other way round is a third as fast.
    """
    (queries, log_totals, shifts, d_mixed), (keys, v) = of_receivers, senders
    d_queries, d_keys = [], []
    d_weights = d_mixed @ v.T  # of each map, but for its coefficient
    if tiling.dropout_rate:
        keep, chance = _keep(rules, d_weights.shape, number, seed, tiling)
        d_weights = jnp.where(keep, d_weights / chance, 0)
    mixed_weights = 0
    for q, k, log_total, shift, c in zip(queries, keys, log_totals, shifts, coefficients, strict=True):
        weights = jnp.exp(_logits(q, k, rules, log_masses, number) - log_total)
        d_logits = weights * (c * d_weights - shift)
        d_queries.append(d_logits @ k)
        d_keys.append(q.T @ d_logits)
        mixed_weights += c * weights
    if tiling.dropout_rate:
        mixed_weights = jnp.where(keep, mixed_weights / chance, 0)
    return tuple(d_queries), (tuple(d_keys), d_mixed.T @ mixed_weights)


class _Senders(NamedTuple):
    blocks: tuple  # arrays [heads, blocks, columns, d]
    log_masses: Array | None  # [blocks, columns, 1]


def _cut_senders(senders, rules, n_blocks):
    """Blocks of senders, the last filled up with some that count as none."""
    m = senders[1].shape[1]
    columns = math.ceil(m / n_blocks)
    filler, log_masses = n_blocks * columns - m, rules.log_masses
    if filler and log_masses is None:
        log_masses = jnp.zeros((m, 1), senders[1].dtype)
    if log_masses is not None:
        log_masses = jnp.pad(log_masses, ((0, filler), (0, 0)), constant_values=-jnp.inf).reshape(n_blocks, columns, 1)

    def cut(x):
        return jnp.pad(x, ((0, 0), (0, filler), (0, 0))).reshape(len(x), n_blocks, columns, -1)

    return _Senders(jax.tree.map(cut, senders), log_masses)


def _first(tree):
    return jax.tree.map(lambda x: x[0], tree)


def _cut(tree, n_blocks):
    """Blocks of receivers, the last filled up with zeros: their values are finite and their gradients are zero."""

    def cut(x):
        rows = math.ceil(x.shape[0] / n_blocks)
        return jnp.pad(x, ((0, n_blocks * rows - x.shape[0]), (0, 0))).reshape(n_blocks, rows, -1)

    return jax.tree.map(cut, tree)


def _join(tree, n):
    return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1])[:n], tree)
