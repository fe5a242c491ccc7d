"""Dropout as a function of a key, waves of a time, the change a condition makes, first parameters of many layers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scjax.nn.adaln import modulate
from scjax.nn.attention import attend
from scjax.nn.dropout import drop, keep_mask
from scjax.nn.layers import init_alike
from scjax.nn.time import sinusoids

N = 40_000


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropping_keeps_the_mean(rate):
    """Entries are 0 or x / (1 - rate); 4 standard errors of the share that stays."""
    dropped = np.asarray(drop(jnp.full(N, 2.0), rate, jax.random.key(0)))
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], 2 / (1 - rate), rtol=2**-16 / (1 - rate))  # the rate is rounded
    share_error = 4 * math.sqrt(rate * (1 - rate) / N)
    assert abs(kept.mean() - (1 - rate)) < share_error
    assert abs(dropped.mean() - 2) < 2 * share_error / (1 - rate)


def test_nothing_drops_without_a_key_or_a_rate():
    x = jax.random.normal(jax.random.key(1), (7, 3))
    np.testing.assert_array_equal(drop(x, 0.9, None), x)
    np.testing.assert_array_equal(drop(x, 0.0, jax.random.key(0)), x)


def test_what_drops_is_a_function_of_the_key():
    x = jnp.ones((50, 3))
    one, again, other = (drop(x, 0.5, jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


@pytest.mark.parametrize(
    ("rate", "stays"),
    [
        (0.25, 0.75),
        (0.1, 1 - 6554 / 2**16),  # 0.1 * 2^16 = 6553.6
        (1e-6, 1.0),  # rounds to none
        (0.999999, 2**-16),  # at least one in 2^16 stays, so that nothing is divided by zero
    ],
)
def test_the_rate_is_rounded_and_its_own_inverse(rate, stays):
    keep, chance = keep_mask(jax.random.key(0), (N,), rate)
    assert chance == stays
    assert keep.shape == (N,)
    assert keep.dtype == bool
    assert abs(float(keep.mean()) - stays) <= 4 * math.sqrt(stays * (1 - stays) / N)


def test_gradients_pass_where_entries_stay():
    x, key = jax.random.normal(jax.random.key(2), (9,)), jax.random.key(3)
    keep, chance = keep_mask(key, x.shape, 0.4)
    grads = jax.grad(lambda x: drop(x, 0.4, key).sum())(x)
    np.testing.assert_allclose(grads, np.where(keep, 1 / chance, 0), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dropping_keeps_the_dtype(dtype):
    assert drop(jnp.ones(5, dtype), 0.3, jax.random.key(0)).dtype == dtype


def test_attention_drops_weights_by_the_same_mask():
    """(A keep / chance) V, with the softmax over all senders, dropped or not."""
    q, k, v = jax.random.normal(jax.random.key(4), (3, 2, 5, 4))
    key = jax.random.key(5)
    keep, chance = keep_mask(key, (2, 5, 5), 0.3)
    weights = jax.nn.softmax(jnp.einsum("hid,hjd->hij", q, k) / 2, axis=-1)
    want = jnp.einsum("hij,hjd->hid", weights * keep / chance, v)
    got = attend(q, k, v, dropout_rate=0.3, key=key)
    np.testing.assert_allclose(got, want, atol=2e-6)  # float32 sums of five terms of size 1


@pytest.mark.usefixtures("x64")
def test_waves_are_the_formula_s():
    t = jnp.array([0.0, 0.3, 1.0, 900.0])
    waves = np.asarray(sinusoids(t, 6, max_period=1000.0))
    angles = np.asarray(t)[:, None] * np.array([1.0, 0.1, 0.01])  # 1000^(-2k/6)
    np.testing.assert_allclose(waves, np.concatenate([np.cos(angles), np.sin(angles)], axis=1), atol=1e-12)
    assert waves.dtype == np.float64


def test_the_default_waves_span_1_to_1e4():
    """Slowest: f = 1e4^(-254/256); at small t its sine is t f, at 2 pi / f it is back."""
    slowest = 1e4 ** (-254 / 256)
    waves = np.asarray(sinusoids(jnp.array([1.0, 2 * math.pi])))
    assert waves.shape == (2, 256)
    np.testing.assert_allclose(waves[0, [127, 255]], [math.cos(slowest), math.sin(slowest)], rtol=1e-5)
    np.testing.assert_allclose(waves[1, [0, 128]], [1, 0], atol=1e-6)  # the fastest has the period 2 pi


def test_modulation():
    x = jax.random.normal(jax.random.key(0), (5, 3))
    nothing = jnp.zeros((1, 3))
    np.testing.assert_array_equal(modulate(x, nothing, nothing), x)
    shift, scale = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[-1.0, 0.0, 1.0]])
    np.testing.assert_allclose(modulate(x, shift, scale), np.asarray(x) * [0, 1, 2] + [1, 2, 3], rtol=1e-6)


def test_layers_alike_are_drawn_together():
    """Each as from its key alone, to the last bit; a program of five layers has the draws of one of two."""

    def init(key):
        return {"kernel": jax.random.truncated_normal(key, -2, 2, (3, 2)), "bias": jnp.zeros(2)}

    def n_draws(n_layers):
        keys = list(jax.random.split(jax.random.key(0), n_layers))
        return str(jax.make_jaxpr(lambda: init_alike(init, keys))()).count("random_bits")

    keys = list(jax.random.split(jax.random.key(0), 5))
    for one, alone in zip(init_alike(init, keys), map(init, keys), strict=True):
        assert jax.tree.map(np.shape, one) == jax.tree.map(np.shape, alone)
        jax.tree.map(np.testing.assert_array_equal, one, alone)
    assert n_draws(5) == n_draws(2) > 0
    assert init_alike(init, []) == []
