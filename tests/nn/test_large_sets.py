"""Attention in tiles with rules of who hears whom, over devices, and to landmarks in place of senders."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scjax.nn.attention import attend
from scjax.nn.blockwise import attend_blockwise, merge, mix_blockwise
from scjax.nn.dropout import keep_mask_at
from scjax.nn.landmarks import attend_to_landmarks, group

HEADS, N, D = 2, 11, 3


def qkv(n=N, seed=0, scale=1.0, dtype=jnp.float64):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(scale * rng.normal(size=(HEADS, n, D)), dtype) for _ in range(3))


def by_hand(q, k, v, absent=None, masses=None, keep=None, chance=1.0):
    """(received, log of the sum of exponentials), differentiable; `absent` is receivers x senders."""
    logits = jnp.einsum("hid,hjd->hij", q, k) / np.sqrt(q.shape[-1])
    if masses is not None:
        logits = logits + jnp.log(masses)[None, None]
    if absent is not None:
        logits = jnp.where(absent[None], -jnp.inf, logits)
    weights = jax.nn.softmax(logits, axis=-1)
    if keep is not None:
        weights = jnp.where(keep, weights / chance, 0)
    return jnp.einsum("hij,hjd->hid", weights, v), jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def value_and_grads(f, args):
    """Of a sum in which each number of both outputs has its own sign and size."""

    def total(*args):
        return sum(
            jnp.sum(jnp.sin(1 + i + jnp.arange(out.size, dtype=out.dtype)) * out.ravel())
            for i, out in enumerate(f(*args))
        )

    return jax.jit(f)(*args), jax.jit(jax.grad(total, argnums=(0, 1, 2)))(*args)


def assert_same(got, want, tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * float(np.abs(b).max()))


BLOCKS = [(None, None), (4, 3), (3, 11), (5, 4), (1, 1)]


@pytest.mark.parametrize(("block", "sender_block"), BLOCKS)
def test_self_excluded_in_tiles(block, sender_block, x64):
    """Values, log-sums and the gradients through both are those of the masked softmax, whatever the tiles."""
    f = functools.partial(attend_blockwise, excluded=jnp.arange(N), block=block, sender_block=sender_block)
    want = value_and_grads(functools.partial(by_hand, absent=jnp.eye(N, dtype=bool)), qkv())
    assert_same(value_and_grads(f, qkv()), want, 1e-12)


@pytest.mark.parametrize(("block", "sender_block"), BLOCKS[:3])
def test_any_sender_excluded_and_masses(block, sender_block, x64):
    """Receiver i does not hear sender 3 i mod 7, and -1 or 7 excludes nobody; a sender of mass 2 is two, of 0 none."""
    q = qkv()[0]
    k, v = (x[:, :7] for x in qkv(seed=1)[1:])
    excluded = jnp.asarray([3 * i % 7 for i in range(N - 2)] + [-1, 7])
    masses = jnp.asarray([1.0, 2, 0.5, 0, 3, 1, 1])
    f = functools.partial(
        attend_blockwise, excluded=excluded, log_masses=jnp.log(masses), block=block, sender_block=sender_block
    )
    want = functools.partial(by_hand, absent=excluded[:, None] == jnp.arange(7)[None], masses=masses)
    assert_same(value_and_grads(f, (q, k, v)), value_and_grads(want, (q, k, v)), 1e-12)
    twice = [0, 1, 1, 4, 4, 4, 5, 6]
    whole = jnp.log(jnp.asarray([1.0, 2, 0, 0, 3, 1, 1]))
    got = attend_blockwise(q, k, v, log_masses=whole, sender_block=sender_block)
    assert_same(got, by_hand(q, k[:, jnp.asarray(twice)], v[:, jnp.asarray(twice)]), 1e-12)


@pytest.mark.parametrize(("block", "sender_block"), BLOCKS[:3])
def test_dropout_in_tiles_is_dropout_of_the_whole(block, sender_block, x64, key):
    """The mask is a function of key, head, receiver and sender, so forward and backward pass agree on it."""
    rate = 0.3
    seeds = jax.random.bits(key, (HEADS, 1), jnp.uint32)
    masks = [keep_mask_at(seed[0], jnp.arange(N), jnp.arange(N), rate) for seed in seeds]
    keep, chance = jnp.stack([mask for mask, _ in masks]), masks[0][1]
    f = functools.partial(
        attend_blockwise, excluded=jnp.arange(N), dropout_rate=rate, key=key, block=block, sender_block=sender_block
    )
    want = functools.partial(by_hand, absent=jnp.eye(N, dtype=bool), keep=keep, chance=chance)
    assert_same(value_and_grads(f, qkv()), value_and_grads(want, qkv()), 1e-12)


def test_dropped_places_look_random():
    """Share, and correlations between rows, columns, neighbours and seeds, within 4.5 standard errors of none."""
    rate, n = 0.3, 400
    a, b = (np.asarray(keep_mask_at(jnp.uint32(s), jnp.arange(n), jnp.arange(n), rate)[0]) for s in (5, 6))
    assert abs(a.mean() - 0.7) < 4.5 * np.sqrt(0.21 / n**2)
    for p in (a.mean(0), a.mean(1)):  # of a column, of a row
        assert np.abs(p - 0.7).max() < 4.5 * np.sqrt(0.21 / n)
        np.testing.assert_allclose(p.var(), 0.21 / n, rtol=4.5 * np.sqrt(2 / n))
    for other in (b, a.T, np.roll(a, 1, 0), np.roll(a, 1, 1), np.roll(a, 64, 1), np.roll(np.roll(a, 1, 0), 1, 1)):
        assert abs(np.corrcoef(a.ravel(), other.ravel())[0, 1]) < 4.5 / n
    part = keep_mask_at(jnp.uint32(5), jnp.arange(7, 9), jnp.arange(100, 120), rate)[0]
    np.testing.assert_array_equal(part, a[7:9, 100:120])


@pytest.mark.parametrize("sender_block", [None, 1])
def test_who_hears_nobody_receives_zero(sender_block):
    one = qkv(1, dtype=jnp.float32)
    f = functools.partial(attend_blockwise, excluded=jnp.arange(1), sender_block=sender_block)
    received, log_total = f(*one)
    np.testing.assert_array_equal(received, 0)
    np.testing.assert_array_equal(log_total, -np.inf)
    grads = jax.grad(lambda *args: jnp.sum(f(*args)[0]), argnums=(0, 1, 2))(*one)
    np.testing.assert_array_equal(jnp.stack(grads), 0)
    many = qkv(5, dtype=jnp.float32)
    for excluded in (jnp.arange(5), None):
        received, _ = attend_blockwise(*many, log_masses=jnp.full(5, -jnp.inf), excluded=excluded, block=2)
        np.testing.assert_array_equal(received, 0)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 0), (0, 0)])
def test_empty_sets(n, m):
    """Nobody hears, or nobody is heard: zero, as of the softmax over nothing; nothing is to be learned from it."""
    q, (_, k, v) = jnp.ones((HEADS, n, D)), (jnp.ones((HEADS, m, D)) for _ in range(3))
    (attended, log_totals), grads = value_and_grads(attend_blockwise, (q, k, v))
    assert attended.shape == (HEADS, n, D)
    assert not attended.any()
    assert log_totals.shape == (HEADS, n, 1)
    assert (log_totals == -jnp.inf).all()
    mixed = mix_blockwise((q,), (k,), v, (jnp.ones(()),))
    assert mixed.shape == (HEADS, n, D)
    assert not mixed.any()
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]
    assert not any(g.any() for g in grads)


def test_large_logits_stay_finite():
    q, k, v = qkv(20, dtype=jnp.float32)
    f = functools.partial(attend_blockwise, excluded=jnp.arange(20), block=7, sender_block=6)
    out, grads = value_and_grads(lambda *a: f(*a)[:1], (1e3 * q, k, v))
    assert all(np.isfinite(g).all() for g in grads)
    np.testing.assert_allclose(out[0], attend(1e3 * q, k, v, exclude_self=True), atol=1e-3)


def test_a_batch_and_a_checkpoint_change_nothing(x64):
    batch = jax.tree.map(lambda *a: jnp.stack(a), *(qkv(seed=s) for s in range(3)))
    f = functools.partial(attend_blockwise, excluded=jnp.arange(N), block=4, sender_block=3)
    want = value_and_grads(jax.vmap(functools.partial(by_hand, absent=jnp.eye(N, dtype=bool))), batch)
    assert_same(value_and_grads(jax.checkpoint(jax.vmap(f)), batch), want, 1e-12)
    assert_same(value_and_grads(jax.vmap(jax.checkpoint(f)), batch), want, 1e-12)


def test_memory_is_linear_in_cells():
    """Temporaries of the compiled gradient, self excluded and with dropout: twice the cells, twice the bytes."""

    def temporaries(n):
        args = jax.eval_shape(lambda: qkv(n, dtype=jnp.float32))

        def total(*args):
            out, _ = attend_blockwise(
                *args, excluded=jnp.arange(n), dropout_rate=0.1, key=jax.random.key(0), block=64, sender_block=64
            )
            return jnp.sum(out**2)

        compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = temporaries(20_000), temporaries(40_000)
    assert many < 2.2 * few
    assert many < 0.01 * 4 * HEADS * 40_000**2


def test_merged_groups_of_senders_are_all_of_them(x64):
    q, k, v = qkv()
    some, others, nobody = (attend_blockwise(q, k[:, s], v[:, s]) for s in (slice(4), slice(4, N), slice(1)))
    nobody = jnp.zeros_like(nobody[0]), jnp.full_like(nobody[1], -jnp.inf)
    want = by_hand(q, k, v)
    assert_same(merge(some, others), want, 1e-12)
    assert_same(merge(merge(nobody, others), some), want, 1e-12)
    received, log_total = merge(nobody, nobody)
    assert not received.any()
    assert np.all(log_total == -np.inf)


# -- landmarks


def test_as_many_landmarks_as_cells_are_exact(x64):
    groups = group(qkv()[1][0], N)
    f = lambda *a: (attend_to_landmarks(*a, groups, N),)  # noqa: E731
    want = value_and_grads(lambda *a: (attend(*a, exclude_self=True),), qkv())
    assert_same(value_and_grads(f, qkv()), want, 1e-12)


def test_cells_alike_lose_nothing(x64):
    """Groups whose members have one key and one value each: exact, the receiver's own group counted without it."""
    q, k, v = qkv()
    groups = jnp.asarray([0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 0])  # a group of one, and number 4 has none
    k, v = k[:, groups], v[:, groups]
    got = attend_to_landmarks(q, k, v, groups, 5)
    np.testing.assert_allclose(got, attend(q, k, v, exclude_self=True), rtol=1e-12)


def test_one_landmark_is_right_for_gaussians(x64):
    """Keys and values jointly Gaussian: E exp(q k) v / E exp(q k) = mean v + C_vk q, whatever the query.

    Half of each value is its key. The sums over 20,000 cells scatter around their expectations by about
    exp(|q|^2 / 2) / sqrt(20,000), and so do theirs around the moments'.
    """
    q, k, v = qkv(20_000, scale=0.7)
    v = 0.5 * k + v + 1
    q = q[:, :50]
    expected = v.mean(1, keepdims=True) + 0.5 * 0.49 * q / np.sqrt(D)
    everyone = attend(q, k, v)
    padded = jnp.concatenate([q, jnp.zeros((HEADS, 20_000 - 50, D))], axis=1)
    got = attend_to_landmarks(padded, k, v, jnp.zeros(20_000, int), 1)[:, :50]
    np.testing.assert_allclose(got, expected, atol=0.03)
    np.testing.assert_allclose(got, everyone, atol=0.05)
    assert np.abs(expected - v.mean(1, keepdims=True)).max() > 0.2


def test_nobody_hears_itself_through_its_group(x64):
    """What is received does not move with the own key and value, does with those of all others, and sums to means."""
    q, k, v = qkv()
    groups = jnp.asarray([0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 0])
    of_values = jax.jacobian(lambda v: attend_to_landmarks(q, k, v, groups, 3)[0, :, 0])(v)[:, 0, :, 0]
    np.testing.assert_allclose(np.diag(of_values), 0, atol=1e-15)
    assert np.all(of_values[~np.eye(N, dtype=bool)] != 0)
    np.testing.assert_allclose(of_values.sum(1), 1)
    keys_of_own = jax.jacobian(lambda k: attend_to_landmarks(q, k, v, groups, 3)[0])(k)[:, :, 0]
    np.testing.assert_allclose(np.einsum("idie->ide", keys_of_own), 0, atol=1e-15)


def test_error_falls_with_landmarks():
    """Gaussian keys: the error relative to the spread of what is received; second order in the groups' size."""
    q, k, v = qkv(600, dtype=jnp.float32)
    exact = attend(q, k, v, exclude_self=True)
    spread = float(jnp.std(exact))

    def error(n):
        features = jnp.concatenate([k[0], k[1]], axis=1)
        return float(jnp.sqrt(jnp.mean((attend_to_landmarks(q, k, v, group(features, n), n) - exact) ** 2))) / spread

    errors = [error(n) for n in (1, 20, 200, 600)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.5
    assert errors[-1] < 1e-5


def test_groups_are_of_neighbours_and_the_same_each_time():
    """Three far clusters and three landmarks or more: no group has cells of two clusters."""
    rng = np.random.default_rng(0)
    clusters = np.repeat([0, 1, 2], [5, 20, 40])
    z = jnp.asarray(rng.normal(size=(65, 4)) + 100 * np.eye(4)[clusters], jnp.float32)
    groups = np.asarray(group(z, 16))
    assert all(len(set(clusters[groups == g])) == 1 for g in set(groups))
    np.testing.assert_array_equal(groups, group(z, 16))
    np.testing.assert_array_equal(group(z[:3], 7), [0, 1, 2])
    with pytest.raises(ValueError, match="n_landmarks must be at least 1; got 0"):
        group(z, 0)


def test_nonsense_is_refused():
    q, k, v = qkv(dtype=jnp.float32)
    with pytest.raises(ValueError, match="sender_block must be at least 1; got 0"):
        attend_blockwise(q, k, v, sender_block=0)
    auto = (jax.sharding.AxisType.Auto,)
    with pytest.raises(ValueError, match="mesh must have an axis 'cells', .*; its axes are batch"):
        attend_blockwise(q, k, v, mesh=jax.make_mesh((1,), ("batch",), axis_types=auto))
