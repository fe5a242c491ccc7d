"""Attention over a set: a mean of the others' values, whatever their order and number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scjax.nn.attention import attend, attention_logits, attention_weights, merge_heads, split_heads
from scjax.nn.linear import Linear

HEADS, N, D = 2, 7, 3


@pytest.fixture(scope="module")
def qkv():
    return tuple(jax.random.normal(k, (HEADS, N, D)) for k in jax.random.split(jax.random.key(3), 3))


def weights_of(q, k, exclude_self=True):
    return np.asarray(attention_weights(attention_logits(q, k, exclude_self=exclude_self)))


@pytest.mark.parametrize("exclude_self", [False, True])
def test_weights_are_a_softmax(qkv, exclude_self):
    q, k, _ = (np.asarray(a, np.float64) for a in qkv)
    exponentials = np.exp(np.einsum("hid,hjd->hij", q, k) / np.sqrt(D)) * (1 - exclude_self * np.eye(N))
    weights = weights_of(*qkv[:2], exclude_self)
    np.testing.assert_allclose(weights, exponentials / exponentials.sum(-1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    assert (np.diagonal(weights, axis1=1, axis2=2) == 0).all() == exclude_self


@pytest.mark.parametrize("exclude_self", [False, True])
def test_attend_is_the_weighted_mean_of_values(qkv, exclude_self):
    q, k, v = qkv
    mean = np.einsum("hij,hjd->hid", weights_of(q, k, exclude_self), v)
    np.testing.assert_allclose(attend(q, k, v, exclude_self=exclude_self), mean, atol=1e-6)


def test_constant_values_are_received_as_they_are(qkv):
    q, k, v = qkv
    np.testing.assert_allclose(attend(q, k, jnp.ones_like(v), exclude_self=True), 1, rtol=1e-6)


def test_logits_far_from_zero_neither_overflow_nor_vanish(qkv):
    """Weights see differences of logits only; exp(1000) is infinite."""
    q, k, v = qkv
    logits = attention_logits(q, k, exclude_self=True)
    for shift in (-1e3, 1e3):
        np.testing.assert_allclose(attention_weights(logits + shift), attention_weights(logits), atol=1e-4)
    sharp = attend(300 * q, k, v, exclude_self=True)
    best = np.argmax(attention_logits(q, k, exclude_self=True), axis=-1)
    assert np.isfinite(sharp).all()
    np.testing.assert_allclose(sharp, np.take_along_axis(np.asarray(v), best[..., None], 1), atol=0.1)


def test_the_only_member_receives_zero_and_a_finite_gradient():
    q = jnp.ones((HEADS, 1, D))
    np.testing.assert_array_equal(weights_of(q, q), 0)
    np.testing.assert_array_equal(attend(q, q, q, exclude_self=True), 0)
    np.testing.assert_array_equal(attend(q, q, q, exclude_self=True, dropout_rate=0.5, key=jax.random.key(0)), 0)
    grads = jax.grad(lambda q, k, v: attend(q, k, v, exclude_self=True).sum(), argnums=(0, 1, 2))(q, q, q)
    np.testing.assert_array_equal(grads, 0)


def test_members_have_no_order(qkv):
    perm = np.random.default_rng(0).permutation(N)
    shuffled = attend(*(a[:, perm] for a in qkv), exclude_self=True)
    np.testing.assert_allclose(shuffled, attend(*qkv, exclude_self=True)[:, perm], atol=1e-6)


def test_who_does_not_send_is_absent(qkv):
    """Values and gradients are those without the members left out; where nobody sends, zeros."""
    q, k, v = qkv
    senders, r = jnp.array([True, False, True, True, False, True, True]), jax.random.normal(jax.random.key(7), q.shape)
    total = lambda q, k, v, **options: jnp.sum(r * attend(q, k, v, **options))  # noqa: E731
    grad = jax.value_and_grad(total, argnums=(0, 1, 2))
    value, (of_q, of_k, of_v) = grad(q, k, v, senders=senders)
    alone, (q_alone, k_alone, v_alone) = grad(q, k[:, senders], v[:, senders])
    np.testing.assert_allclose(value, alone, rtol=1e-5)
    np.testing.assert_allclose(of_q, q_alone, atol=1e-5)
    for got, want in ((of_k, k_alone), (of_v, v_alone)):
        np.testing.assert_allclose(got[:, senders], want, atol=1e-5)
        assert not np.any(got[:, ~senders])
    np.testing.assert_array_equal(attend(q, k, v, senders=jnp.zeros(N, bool)), 0)


def test_own_key_and_value_do_not_matter(qkv):
    q, k, v = qkv
    before = attend(q, k, v, exclude_self=True)
    after = attend(q, k.at[:, 2].add(3.0), v.at[:, 2].add(5.0), exclude_self=True)
    np.testing.assert_array_equal(after[:, 2], before[:, 2])
    assert np.abs(after - before)[:, [0, 1, 3, 4, 5, 6]].min() > 1e-3  # everybody else hears of it


def test_gradient_is_that_of_the_softmax(qkv, x64):
    """`attend` divides late; its gradient must not know."""
    qkv = tuple(jnp.asarray(a, jnp.float64) for a in qkv)

    def plainly(q, k, v):
        logits = jnp.where(jnp.eye(N, dtype=bool)[None], -jnp.inf, jnp.einsum("hid,hjd->hij", q, k) / np.sqrt(D))
        return jnp.einsum("hij,hjd->hid", jax.nn.softmax(logits), v)

    def squares(f):
        return jax.grad(lambda qkv: jnp.sum(f(*qkv) ** 2))(qkv)

    for ours, want in zip(squares(lambda *a: attend(*a, exclude_self=True)), squares(plainly), strict=True):
        np.testing.assert_allclose(ours, want, rtol=1e-10, atol=1e-12)


def test_dropout_keeps_the_mean_and_has_its_variance(qkv):
    """Each weight is w B / (1 - p): mean w, so received values keep theirs; variance sum_j w_j^2 v_j^2 p / (1 - p).

    Tolerances: 4.5 standard errors of a mean; of a variance, whose relative error is about sqrt(kurtosis / draws).
    """
    q, k, v = qkv
    p, n_draws = 0.25, 20_000
    draws = jax.jit(jax.vmap(lambda key: attend(q, k, v, exclude_self=True, dropout_rate=p, key=key)))(
        jax.random.split(jax.random.key(1), n_draws)
    )
    draws, weights = np.asarray(draws, np.float64), weights_of(q, k)
    mean = np.einsum("hij,hjd->hid", weights, v)
    variance = np.einsum("hij,hjd->hid", weights**2, np.asarray(v) ** 2) * p / (1 - p)
    np.testing.assert_array_less(np.abs(draws.mean(0) - mean), 4.5 * np.sqrt(variance / n_draws))
    np.testing.assert_allclose(draws.var(0), variance, rtol=4.5 * np.sqrt(3 / n_draws))


def test_dropout_sets_whole_weights_to_zero():
    """With equal logits and one-hot values the weights can be read off: 0 or 1 / ((n - 1) (1 - p)), p of them 0."""
    n, p = 100, 0.3
    zeros, one_hot = jnp.zeros((1, n, n)), jnp.eye(n)[None]
    read = np.asarray(attend(zeros, zeros, one_hot, exclude_self=True, dropout_rate=p, key=jax.random.key(2)))[0]
    others = read[~np.eye(n, dtype=bool)]
    np.testing.assert_array_equal(np.diag(read), 0)
    np.testing.assert_allclose(others[others > 0], 1 / ((n - 1) * (1 - p)), rtol=1e-5)
    share = np.mean(others == 0)
    assert abs(share - p) < 4.5 * np.sqrt(p * (1 - p) / others.size)


def test_randomness_is_the_key_s_alone(qkv):
    def drop(seed):
        return np.asarray(attend(*qkv, dropout_rate=0.5, key=jax.random.key(seed)))

    np.testing.assert_array_equal(drop(0), drop(0))
    assert np.abs(drop(0) - drop(1)).max() > 1e-3
    np.testing.assert_array_equal(attend(*qkv, dropout_rate=0.5), attend(*qkv))  # no key, no dropout
    np.testing.assert_array_equal(attend(*qkv, key=jax.random.key(0)), attend(*qkv))


def test_heads_are_contiguous_slices():
    x = jnp.arange(12.0).reshape(2, 6)
    heads = split_heads(x, 3)
    np.testing.assert_array_equal(heads[1], x[:, 2:4])
    np.testing.assert_array_equal(merge_heads(heads), x)


def test_linear_starts_as_torch_does():
    """Kernel and bias uniform within 1 / sqrt(inputs): the largest of n lies within a fraction 7 / n of the bound, but
    for a chance of e^-7; the variance is bound^2 / 3 within 4.5 standard errors.
    """
    n_in, n_out = 25, 400
    params = Linear(n_out).init(jax.random.key(0), jnp.ones((1, n_in)))["params"]
    bound = n_in**-0.5
    for leaf in (params["kernel"], params["bias"]):
        assert leaf.dtype == jnp.float32
        largest = float(jnp.abs(leaf).max())
        assert bound * (1 - 7 / leaf.size) < largest <= bound
        np.testing.assert_allclose(np.mean(np.square(leaf)), bound**2 / 3, rtol=4.5 * np.sqrt(0.8 / leaf.size))
    y = Linear(n_out).apply({"params": params}, 2 * jnp.ones((3, n_in)))
    np.testing.assert_allclose(y, np.tile(2 * params["kernel"].sum(0) + params["bias"], (3, 1)), rtol=1e-4, atol=1e-5)
    assert set(Linear(2, use_bias=False).init(jax.random.key(0), jnp.ones((1, 2)))["params"]) == {"kernel"}


def test_dropout_of_almost_everything_stays_in_scale(key):
    q = jax.random.normal(key, (1, 40, 4))
    ones = jnp.ones((1, 40, 4))
    assert attend(q, q, ones, dropout_rate=1 - 2**-20, key=key).max() <= 2**16
