import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import regression

from scjax.train.state import init_state
from scjax.train.step import make_scanned_update, make_update

TX = optax.adam(1e-2)
UPDATE = jax.jit(make_update(regression.loss, TX, ema_decay=0.9))
CHUNK = jax.jit(make_scanned_update(regression.loss, TX, ema_decay=0.9))


def fresh(ema: bool = True):
    return init_state(regression.params(), TX, regression.KEY, ema=ema)


def stacked(first: int, stop: int):
    return jax.tree.map(lambda *x: np.stack(x), *map(regression.batch_at, range(first, stop)))


def test_update_is_value_and_grad_then_the_transformation():
    state, batch = fresh(), regression.batch_at(0)
    key = jax.random.fold_in(regression.KEY, 0)
    (loss, terms), grads = jax.value_and_grad(regression.loss, has_aux=True)(state.params, batch, key)
    updates, _ = TX.update(grads, state.opt_state, state.params)
    want = optax.apply_updates(state.params, updates)

    after, metrics = UPDATE(state, batch)
    assert int(after.step) == 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), after.params, want)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
    expected = {"loss": loss, "grad_norm": norm, "finite": 1.0, **terms}
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_each_step_has_a_key_of_its_own():
    """The same batch and parameters at another step drop other inputs; at the same step, the same."""
    state, batch = fresh(), regression.batch_at(0)
    later = state._replace(step=jnp.int32(7))
    losses = [float(UPDATE(s, batch)[1]["mse"]) for s in (state, state, later)]
    assert losses[0] == losses[1] != losses[2]


def test_moving_average_follows_its_formula():
    state, ema = fresh(), regression.params()
    for n in range(3):
        state, _ = UPDATE(state, regression.batch_at(n))
        ema = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, ema, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state.ema, ema)


@pytest.mark.parametrize(("every", "start"), [(1, "initial"), (1, "first_step"), (3, "initial"), (3, "first_step")])
def test_moving_average_after_some_of_the_steps(every, start):
    """After the steps 0, 3, 6, counted from 0; "first_step": the first of these copies."""
    settings = {"ema_decay": 0.9, "ema_every": every, "ema_start": start}
    update = jax.jit(make_update(regression.loss, TX, **settings))
    state, ema = fresh(), regression.params()
    for n in range(7):
        state, _ = update(state, regression.batch_at(n))
        if n == 0 and start == "first_step":
            ema = state.params
            assert regression.bits(state.ema) == regression.bits(state.params)
        elif n % every == 0:
            ema = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, ema, state.params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state.ema, ema)
    chunk = jax.jit(make_scanned_update(regression.loss, TX, **settings))
    whole, _ = chunk(fresh(), stacked(0, 7), jnp.int32(0), jnp.int32(7))
    # Another program: the average's products and sums may be fused in another way.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), whole.ema, state.ema)
    part, _ = chunk(fresh(), stacked(0, 7), jnp.int32(0), jnp.int32(4))
    rest = jax.tree.map(lambda x: np.concatenate([x, np.full_like(x[:4], np.nan)]), stacked(4, 7))
    part, _ = chunk(part, rest, jnp.int32(4), jnp.int32(3))
    assert regression.bits(part) == regression.bits(whole)


def test_scanned_steps_equal_single_ones_bit_for_bit():
    state, seen = fresh(), []
    for n in range(7):
        state, metrics = UPDATE(state, regression.batch_at(n))
        seen.append(metrics)
    chunked, stacked_metrics = CHUNK(fresh(), stacked(0, 7), jnp.int32(0), jnp.int32(7))
    assert regression.bits(chunked) == regression.bits(state)
    for name in seen[0]:
        np.testing.assert_array_equal(stacked_metrics[name], [m[name] for m in seen])


def test_a_run_may_be_cut_anywhere():
    """4 + 3 steps in calls of 7 slots equal one call of 7; the slots beyond n are not looked at."""
    whole, _ = CHUNK(fresh(), stacked(0, 7), jnp.int32(0), jnp.int32(7))
    part, metrics = CHUNK(fresh(), stacked(0, 7), jnp.int32(0), jnp.int32(4))
    np.testing.assert_array_equal(metrics["finite"], [1, 1, 1, 1, 0, 0, 0])
    assert int(part.step) == 4
    rest = jax.tree.map(lambda x: np.concatenate([x, np.full_like(x[:4], np.nan)]), stacked(4, 7))
    part, _ = CHUNK(part, rest, jnp.int32(4), jnp.int32(3))
    assert regression.bits(part) == regression.bits(whole)


@pytest.mark.parametrize("where", ["loss", "term", "gradient"])
def test_nothing_is_learned_from_a_step_that_is_not_finite(where):
    def loss(params, batch, key):
        value, terms = regression.loss(params, {"x": batch["x"], "y": batch["y"]}, key)
        bad = batch["bad"]
        if where == "loss":
            value = value + jnp.where(bad, jnp.nan, 0)
        elif where == "term":
            terms["extra"] = jnp.where(bad, jnp.inf, 0)
        else:  # d sqrt(u) / du is infinite at 0, the value is not
            value = value + jnp.sqrt(jnp.where(bad, 0.0, 1.0) * params["w"][0, 0] ** 2)
        return value, terms

    chunk = jax.jit(make_scanned_update(loss, TX))
    batches = {**stacked(0, 5), "bad": np.array([False, False, True, False, False])}
    after, metrics = chunk(fresh(ema=False), batches, jnp.int32(0), jnp.int32(5))
    good, _ = chunk(fresh(ema=False), batches, jnp.int32(0), jnp.int32(2))
    assert int(after.step) == 2
    assert regression.bits(after) == regression.bits(good)
    np.testing.assert_array_equal(metrics["finite"], [1, 1, 0, 0, 0])
    name = {"loss": "loss", "term": "extra", "gradient": "grad_norm"}[where]
    assert not np.isfinite(metrics[name][2])
    # A later call finds the state at step 2, not at its own first step, and leaves it there.
    batches["bad"][:] = False
    later, metrics = chunk(after, batches, jnp.int32(5), jnp.int32(5))
    assert regression.bits(later) == regression.bits(good)
    assert not metrics["finite"].any()


def test_losses_that_do_not_fit_are_refused():
    def with_terms(terms):
        return make_update(lambda p, b, k: (regression.loss(p, b, k)[0], terms), TX)

    batch = regression.batch_at(0)
    with pytest.raises(ValueError, match="must not be named 'grad_norm'"):
        with_terms({"grad_norm": jnp.ones(())})(fresh(ema=False), batch)
    with pytest.raises(ValueError, match=r"must be scalars; 'mse' has shape \(2,\)"):
        with_terms({"mse": jnp.ones(2)})(fresh(ema=False), batch)
    with pytest.raises(ValueError, match="ema_decay=0.9, and the state has no moving average"):
        UPDATE(fresh(ema=False), batch)
    with pytest.raises(ValueError, match="ema_decay=None, and the state has a moving average"):
        make_update(regression.loss, TX)(fresh(), batch)
    with pytest.raises(ValueError, match=r"ema_decay must lie in \[0, 1\); got 1.0"):
        make_update(regression.loss, TX, ema_decay=1.0)
    with pytest.raises(ValueError, match="ema_every must be at least 1; got 0"):
        make_update(regression.loss, TX, ema_decay=0.9, ema_every=0)
    for settings in ({"ema_every": 2}, {"ema_start": "first_step"}):
        with pytest.raises(ValueError, match="of a moving average; without ema_decay there is none"):
            make_update(regression.loss, TX, **settings)


def test_the_state_owns_its_arrays():
    params = regression.params()
    state = init_state(params, TX, regression.KEY, ema=True, best=True)
    mine = {id(leaf) for leaf in jax.tree.leaves(params)}
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((state.params, state.ema, state.best.params))]
    assert len(set(pointers)) == len(pointers)
    assert not mine & {id(leaf) for leaf in jax.tree.leaves(state)}
