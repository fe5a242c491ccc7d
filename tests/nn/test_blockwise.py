"""Attention in blocks is attention: the same numbers and gradients, whatever the blocks, and no large array."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scjax.nn import blockwise
from scjax.nn.attention import attend, attend_to_all, differential_attend
from scjax.nn.blockwise import mix_blockwise

HEADS, D = 2, 4


def plainly(q, k, v):
    logits = jnp.einsum("hid,hjd->hij", q, k) / np.sqrt(q.shape[-1])
    return jnp.einsum("hij,hjd->hid", jax.nn.softmax(logits), v)


def differentially(q1, k1, q2, k2, v, lam):
    return plainly(q1, k1, v) - lam * plainly(q2, k2, v)


def inputs(n, m=None, heads=HEADS, dtype=jnp.float32, batch=()):
    keys = jax.random.split(jax.random.key(n), 5)
    sizes = (n, m or n, n, m or n, m or n)
    return *(jax.random.normal(k, (*batch, heads, s, D), dtype) for k, s in zip(keys, sizes, strict=True)), jnp.asarray(
        0.6, dtype
    )


def blocks_of(block):
    def f(q1, k1, q2, k2, v, lam):
        return mix_blockwise((q1, q2), (k1, k2), v, (jnp.ones_like(lam), -lam), block=block)

    return f


def value_and_grads(f, args):
    """Of a sum in which every number of the output has its own sign and size, by all arguments."""

    def total(*args):
        out = f(*args)
        return jnp.sum(jnp.sin(jnp.arange(out.size, dtype=out.dtype)) * out.ravel())

    return jax.jit(f)(*args), jax.jit(jax.grad(total, argnums=tuple(range(len(args)))))(*args)


def assert_same(ours, want, rtol):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(np.abs(b).max()))


@pytest.mark.parametrize(
    ("n", "m", "block"), [(12, 12, 4), (17, 17, 4), (17, 9, 5), (3, 30, 8), (5, 5, 1), (17, 17, None)]
)
def test_values_and_gradients_are_those_of_the_softmax(n, m, block, x64):
    args = inputs(n, m, dtype=jnp.float64)
    assert_same(value_and_grads(blocks_of(block), args), value_and_grads(differentially, args), rtol=1e-12)


@pytest.mark.parametrize("implementation", ["blockwise", "dot_product"])
def test_single_precision(implementation):
    args = inputs(200)
    ours = functools.partial(differential_attend, implementation=implementation)
    assert_same(value_and_grads(ours, args), value_and_grads(differentially, args), rtol=1e-5)
    one = functools.partial(attend_to_all, implementation=implementation)
    for want in (plainly, attend):
        assert_same(value_and_grads(one, args[2:5]), value_and_grads(want, args[2:5]), rtol=1e-5)


def test_any_number_of_maps(x64):
    q1, k1, q2, k2, v, lam = inputs(6, dtype=jnp.float64)

    def three(*coefficients):
        return mix_blockwise((q1, q2, k1), (k1, k2, v), v, coefficients, block=4)

    def want(a, b, c):
        return a * plainly(q1, k1, v) + b * plainly(q2, k2, v) + c * plainly(k1, v, v)

    coefficients = (lam, -2 * lam, 0 * lam)
    assert_same(value_and_grads(three, coefficients), value_and_grads(want, coefficients), rtol=1e-12)


def test_vmap_and_checkpoint_change_nothing(x64):
    """Batched over cells, with lam and the senders shared, recomputed in the backward pass, or both ways round."""
    separate = q1, k1, q2, k2, v, lam = inputs(7, dtype=jnp.float64, batch=(3,))
    shared = (q1, k1[0], q2, k2[0], v[0], lam)
    for args, axes in ((separate, (0, 0, 0, 0, 0, None)), (shared, (0, None, 0, None, None, None))):
        want = value_and_grads(jax.vmap(differentially, in_axes=axes), args)
        assert_same(value_and_grads(jax.vmap(jax.checkpoint(blocks_of(3)), in_axes=axes), args), want, rtol=1e-12)
        assert_same(value_and_grads(jax.checkpoint(jax.vmap(blocks_of(3), in_axes=axes)), args), want, rtol=1e-12)
    per_cell = jax.vmap(jax.grad(lambda *a: jnp.sum(blocks_of(3)(*a) ** 2), argnums=5), in_axes=axes)(*args)
    want = jax.vmap(jax.grad(lambda *a: jnp.sum(differentially(*a) ** 2), argnums=5), in_axes=axes)(*args)
    np.testing.assert_allclose(per_cell, want, rtol=1e-12)


def test_a_checkpoint_policy_can_keep_what_was_attended(x64):
    """The program of the gradient has the exponentials of the forward pass once less, and the same result."""
    args = inputs(6, dtype=jnp.float64)
    policy = jax.checkpoint_policies.save_only_these_names(blockwise.RESIDUALS)

    def layer(*args):
        return jnp.tanh(blocks_of(4)(*args))  # needs what was attended in its own gradient

    again, kept = jax.checkpoint(layer), jax.checkpoint(layer, policy=policy)

    def n_exponentials(f):
        compiled = jax.jit(jax.value_and_grad(lambda *a: jnp.sum(f(*a)))).lower(*args).compile()
        return compiled.as_text().count(" exponential(")

    assert n_exponentials(kept) == n_exponentials(layer) < n_exponentials(again)
    want = value_and_grads(layer, args)
    assert_same(value_and_grads(kept, args), want, rtol=1e-12)
    assert_same(value_and_grads(again, args), want, rtol=1e-12)


def test_large_logits_stay_finite_and_pick_the_best():
    q1, k1, q2, k2, v, lam = inputs(20)
    args = (1e3 * q1, k1, 1e3 * q2, -1e3 * k2, v, lam)
    out, grads = value_and_grads(blocks_of(8), args)
    assert all(np.isfinite(g).all() for g in grads)
    np.testing.assert_allclose(out, differentially(*args), atol=1e-3)


def test_half_precision_is_rounded_once():
    """bfloat16 in and out, float32 in between: within half a step of 2^-8 of the exact result of the rounded inputs."""
    half = inputs(50, dtype=jnp.bfloat16)
    exact = tuple(a.astype(jnp.float32) for a in half)
    ours = value_and_grads(blocks_of(16), half)
    out, want = ours[0].astype(jnp.float32), differentially(*exact)
    assert all(a.dtype == jnp.bfloat16 for a in jax.tree.leaves(ours))
    np.testing.assert_allclose(out, want, rtol=2**-8, atol=1e-5)


def test_memory_grows_with_the_block_not_with_the_square():
    """Temporary memory of the compiled gradient at 4000 genes, less than one tenth of one map of weights."""
    n = 4000
    args = jax.eval_shape(lambda: inputs(n))
    f = blocks_of(50)
    compiled = jax.jit(jax.grad(lambda *a: jnp.sum(f(*a)), argnums=(0, 1, 2, 3, 4, 5))).lower(*args).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * 4 * HEADS * n * n


def test_the_backend_decides_unless_asked(monkeypatch):
    q, k, v = inputs(5)[:3]

    def program(backend, implementation=None):
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        return str(jax.make_jaxpr(functools.partial(attend_to_all, implementation=implementation))(q, k, v))

    assert program("cpu") == program("gpu", "blockwise") != program("cpu", "dot_product")
    assert program("gpu") == program("tpu") == program("cpu", "dot_product")


def test_cudnn_is_asked_for_the_same(monkeypatch):
    """What this machine cannot run: the function is called with the arguments that XLA's way gets, and this is told."""
    called = []

    def recorded(q, k, v, *, implementation, of=jax.nn.dot_product_attention):
        called.append(implementation)
        return of(q, k, v, implementation="xla")

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", recorded)
    half = tuple(x.astype(jnp.bfloat16) for x in inputs(20))
    for f, args, calls in ((attend_to_all, half[2:5], 1), (differential_attend, half, 2)):
        by_cudnn, by_xla = f(*args, implementation="cudnn"), f(*args)
        np.testing.assert_array_equal(by_cudnn.astype(jnp.float32), by_xla.astype(jnp.float32))
        assert called == ["cudnn"] * calls + ["xla"] * calls
        called.clear()


def test_nonsense_is_refused(monkeypatch):
    q, k, v = inputs(5)[:3]
    with pytest.raises(ValueError, match="'cudnn' is for bfloat16 .* GPU; got float32 on the backend 'cpu'. Take None"):
        attend_to_all(q, k, v, implementation="cudnn")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(ValueError, match="got float32 on the backend 'gpu'"):
        attend_to_all(q, k, v, implementation="cudnn")
    with pytest.raises(ValueError, match="implementation must be one of .*'blockwis'.*Did you mean 'blockwise'"):
        attend_to_all(q, k, v, implementation="blockwis")
    with pytest.raises(ValueError, match="block must be at least 1; got 0"):
        mix_blockwise((q,), (k,), v, (jnp.ones(()),), block=0)
    with pytest.raises(ValueError, match="1 queries, 1 keys, 2 coefficients"):
        mix_blockwise((q,), (k,), v, (jnp.ones(()), jnp.ones(())))


def test_small_heads_are_done_together(monkeypatch):
    """The tile holds as many heads as fit; the result does not depend on it."""
    args = inputs(10, heads=6)
    want = differentially(*args)
    for tile in (100, 250, 350, 2**19):
        monkeypatch.setattr(blockwise, "TILE", tile)
        np.testing.assert_allclose(blocks_of(None)(*args), want, atol=1e-6)
