"""What the interacting SDE promises: cells without order, no cell acting on itself, a loss by its formula."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scjax.batches import TimeSeriesBatch
from scjax.losses import annealed_sinkhorn_divergence
from scjax.models import scimf
from scjax.processes.sde import brownian_increments, time_grid

TINY = scimf.Config(n_dims=4, intrinsic_widths=(5,), dt=0.5, blur=0.5)
TWO_BLOCKS = replace(TINY, n_blocks=2)
RESIDUAL = replace(TINY, n_blocks=2, residual=True)
PLAIN = replace(TINY, dropout=0.0, sinkhorn_weight=0.7, energy_weight=0.3)
TS = (0.0, 1.0, 2.5)  # five steps
N = 6


def cells(n=N, seed=0, d=4):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(n, d)), jnp.float32)


def params_of(config, seed=0):
    """Parameters with sharper attention than the initial ones, so that senders differ."""
    params = jax.jit(lambda key: scimf.init(key, config))(jax.random.key(seed))
    for name, block in params["drift"].items():
        if name.startswith("interaction"):
            block["query"]["kernel"] = 3 * block["query"]["kernel"]
    return params


drift = jax.jit(scimf.drift, static_argnames="config")
simulate = jax.jit(scimf.simulate, static_argnames=("ts", "config"))
loss = jax.jit(scimf.loss, static_argnames="config")


def interaction(params, x, config):
    """The part of the drift that the others give."""
    alone = replace(config, n_blocks=0)
    return drift(params, x, config=config) - drift(params, x, config=alone)


def a_batch(n_targets=5, seed=3):
    rng = np.random.default_rng(seed)
    targets = jnp.asarray(rng.normal(size=(2, n_targets, 4)) + 0.5, jnp.float32)
    return TimeSeriesBatch(x0=cells(), targets=targets, weights=jnp.full((2, n_targets), 1 / n_targets), ts=TS)


# -- drift


@pytest.mark.parametrize("config", [TINY, RESIDUAL, replace(TWO_BLOCKS, n_heads=4)])
def test_cells_have_no_order(config):
    """Relabelling the cells relabels their velocities, and does nothing else."""
    params, x = params_of(config), cells()
    perm = np.random.default_rng(1).permutation(N)
    v = drift(params, x, config=config)
    np.testing.assert_allclose(drift(params, x[perm], config=config), v[perm], atol=1e-5)
    assert np.abs(np.diff(v, axis=0)).max() > 0.01


def test_a_population_moves_the_same_in_any_order():
    """With the noise relabelled too, `simulate` relabels cells and energies."""
    params, x = params_of(TINY), cells()
    dW = brownian_increments(jax.random.key(0), time_grid(TS, TINY.dt).dts, x.shape)
    perm = np.random.default_rng(2).permutation(N)
    path = simulate(params, x, TS, None, config=TINY, dW=dW)
    shuffled = simulate(params, x[perm], TS, None, config=TINY, dW=dW[:, perm])
    np.testing.assert_allclose(shuffled.x, path.x[:, perm], atol=1e-5)
    np.testing.assert_allclose(shuffled.kinetic_energy, path.kinetic_energy[:, perm], atol=1e-5)


@pytest.mark.parametrize("config", [TINY, TWO_BLOCKS, RESIDUAL])
def test_a_cell_alone_does_not_interact(config):
    """Not even through the bias of the feed-forward layer; its velocity is the intrinsic one."""
    params, x = params_of(config), cells(1)
    np.testing.assert_array_equal(interaction(params, x, config), 0)
    assert np.isfinite(jax.grad(lambda x: scimf.drift(params, x, config=config).sum())(x)).all()


def test_a_cell_hears_the_others_and_not_itself():
    """Where queries do not depend on states, moving a cell changes what the others feel and not what it feels."""
    params, x = params_of(TINY), cells()
    params["drift"]["interaction_0"]["query"]["kernel"] = jnp.zeros((4, 4))  # every query is 0
    before = interaction(params, x, TINY)
    after = interaction(params, x.at[2].add(1.5 * cells(1, seed=9)[0]), TINY)
    np.testing.assert_allclose(after[2], before[2], atol=2e-6)  # a difference of two drifts
    others = [0, 1, 3, 4, 5]
    assert np.abs(after - before)[others].max(-1).min() > 1e-3


def test_a_cell_s_state_enters_its_interaction_through_the_query_alone():
    """All others alike: whatever the query, their common value is what is received."""
    params = params_of(TINY)
    x = jnp.broadcast_to(cells(1)[:1], (N, 4))
    before = interaction(params, x, TINY)
    after = interaction(params, x.at[0].set(cells(1, seed=5)[0]), TINY)
    np.testing.assert_allclose(after[0], before[0], atol=2e-6)


def test_two_cells_receive_each_other_s_value():
    """One sender gets the whole weight, whatever the logits: the second cell's own query does not matter."""
    params, x = params_of(TINY), cells(2)
    before = interaction(params, x, TINY)
    after = interaction(params, x.at[0].set(cells(1, seed=5)[0]), TINY)
    np.testing.assert_allclose(after[0], before[0], atol=2e-6)
    assert np.abs(after[1] - before[1]).max() > 1e-3


def test_interaction_is_mean_field():
    """Every cell twice is the same field, up to the clone that a cell now hears: O(1) in the number of cells."""
    params, x = params_of(TINY), cells(200, seed=4)
    v, doubled = drift(params, x, config=TINY), drift(params, jnp.concatenate([x, x]), config=TINY)
    np.testing.assert_allclose(doubled[:200], doubled[200:], atol=1e-5)
    assert np.abs(doubled[:200] - v).max() < 0.1 * np.abs(v).max()


def by_hand(params, x, config):
    """The drift written out in NumPy, float64."""

    def linear(p, x):
        return x @ p["kernel"] + p.get("bias", 0)

    def mlp(p, x):
        for name in sorted(k for k in p if k != "output"):
            u = linear(p[name], x)
            x = np.where(u > 0, u, 0.01 * u)
        return linear(p["output"], x)

    def norm(p, x):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]

    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params["drift"])
    x = np.asarray(x, np.float64)
    z, d_head = x, x.shape[1] // config.n_heads
    for i in range(config.n_blocks):
        block = p[f"interaction_{i}"]
        a, b = norm(block["norm_query_key"], z), norm(block["norm_value"], z)
        q, k, v = linear(block["query"], a), linear(block["key"], a), linear(block["value"], b)
        received = np.zeros_like(z)
        for h in range(config.n_heads):
            part = slice(h * d_head, (h + 1) * d_head)
            weights = np.exp(q[:, part] @ k[:, part].T / np.sqrt(d_head)) * (1 - np.eye(len(x)))
            received[:, part] = weights / weights.sum(1, keepdims=True) @ v[:, part]
        if config.residual:
            z = z + received
            z = z + mlp(block["feedforward"], norm(block["norm_feedforward"], z))
        else:
            z = mlp(block["feedforward"], norm(block["norm_feedforward"], received))
    pulled = z - x if config.residual else z
    return mlp(p["intrinsic"], x) + (pulled if config.n_blocks else 0)


@pytest.mark.parametrize(
    "config",
    [replace(TINY, n_blocks=0), TINY, replace(TWO_BLOCKS, n_heads=4), RESIDUAL, replace(TINY, intrinsic_widths=())],
)
def test_drift_by_its_formula(config):
    params, x = params_of(config), cells()
    params = jax.tree.map(lambda a: a + 0.1, params)  # norms away from identity
    np.testing.assert_allclose(drift(params, x, config=config), by_hand(params, x, config), rtol=1e-4, atol=1e-5)


def test_residual_is_another_model():
    params, x = params_of(RESIDUAL), cells()
    assert np.abs(drift(params, x, config=RESIDUAL) - drift(params, x, config=TWO_BLOCKS)).max() > 0.01


def test_dropout_needs_a_key_and_keeps_off_the_intrinsic_part():
    config = replace(TINY, dropout=0.5)
    params, x = params_of(config), cells()
    plain = drift(params, x, config=config)
    np.testing.assert_array_equal(plain, drift(params, x, config=replace(config, dropout=0.0)))
    dropped = [drift(params, x, key=jax.random.key(s), config=config) for s in (0, 0, 1)]
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert np.abs(dropped[0] - dropped[2]).max() > 1e-3
    assert np.abs(dropped[0] - plain).max() > 1e-3
    alone = replace(config, n_blocks=0)
    np.testing.assert_array_equal(drift(params, x, key=jax.random.key(0), config=alone), drift(params, x, config=alone))


# -- diffusion


def test_three_forms_of_diffusion():
    x = cells()
    constant = scimf.diffusion(params_of(TINY), x, config=replace(TINY, sigma=0.3))
    np.testing.assert_array_equal(constant, np.full((N, 4), 0.3, np.float32))
    assert "diffusion" not in params_of(TINY)

    learned = replace(TINY, diffusion="learned")
    params = params_of(learned)
    g = scimf.diffusion(params, x, config=learned)
    np.testing.assert_array_equal(g, np.broadcast_to(params["diffusion"]["sigma"], (N, 4)))

    mlp = replace(TINY, diffusion="mlp", diffusion_widths=(3,))
    params = params_of(mlp)
    p = params["diffusion"]["mlp"]
    u = np.asarray(x @ p["hidden_0"]["kernel"] + p["hidden_0"]["bias"][None], np.float64)
    hidden = 0.909 * u / (1 + np.exp(-u))  # LipSwish
    g = np.tanh(hidden @ np.asarray(p["output"]["kernel"]) + np.asarray(p["output"]["bias"]))
    np.testing.assert_allclose(scimf.diffusion(params, x, config=mlp), g, atol=1e-6)


def test_learned_diffusion_starts_normal_of_scale_sigma():
    """4.5 standard errors of a variance of 4000 draws."""
    config = replace(TINY, n_dims=4000, n_heads=1, intrinsic_widths=(), n_blocks=0, diffusion="learned", sigma=0.1)
    sigma = np.asarray(jax.jit(lambda key: scimf.init(key, config)["diffusion"]["sigma"])(jax.random.key(0)))
    np.testing.assert_allclose(np.mean(sigma**2), 0.01, rtol=4.5 * np.sqrt(2 / 4000))


# -- simulate


def test_simulate_knows_no_time():
    """The same path an hour later, and from real-valued times on."""
    params, x, key = params_of(TINY), cells(), jax.random.key(0)
    path = simulate(params, x, TS, key, config=TINY)
    later = simulate(params, x, tuple(t + 3.25 for t in TS), key, config=TINY)
    np.testing.assert_array_equal(later.x, path.x)
    np.testing.assert_array_equal(path.x[0], x)
    np.testing.assert_array_equal(path.kinetic_energy[0], 0)
    assert (np.diff(path.kinetic_energy, axis=0) > 0).all()


def test_no_noise_needs_no_key():
    params, x, still = params_of(TINY), cells(), replace(TINY, sigma=0.0)
    path = simulate(params, x, TS, None, config=still)
    np.testing.assert_array_equal(simulate(params, x, TS, jax.random.key(0), config=still).x, path.x)
    step = x + 0.5 * drift(params, x, config=still)
    first = simulate(params, x, (0.0, 0.5), None, config=still)
    np.testing.assert_allclose(first.x[1], step, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="pass a key"):
        scimf.simulate(params, x, TS, None, config=TINY)


def test_an_ensemble_is_a_vmap():
    params, x = [params_of(TINY, seed) for seed in range(3)], cells()
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *params)
    keys = jax.random.split(jax.random.key(0), 3)
    together = jax.jit(jax.vmap(lambda p, key: scimf.simulate(p, x, TS, key, config=TINY)))(stacked, keys)
    for i, (p, key) in enumerate(zip(params, keys, strict=True)):
        alone = simulate(p, x, TS, key, config=TINY)
        np.testing.assert_allclose(together.x[i], alone.x, atol=1e-5)
        np.testing.assert_allclose(together.kinetic_energy[i], alone.kinetic_energy, rtol=1e-4)


def test_simulate_is_differentiated_to_the_initial_cells(x64):
    """Central differences along one direction; their own error is about h^2 = 1e-10."""
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), params_of(TINY))
    x, along = (jnp.asarray(cells(seed=s), jnp.float64) for s in (0, 1))
    dW = brownian_increments(jax.random.key(0), time_grid(TS, TINY.dt).dts, x.shape, jnp.float64)

    @jax.jit
    def outcome(x):
        path = scimf.simulate(params, x, TS, None, config=TINY, dW=dW)
        return jnp.sum(jnp.sin(path.x[-1])) + jnp.sum(path.kinetic_energy[-1])

    h = 1e-5
    slope = (outcome(x + h * along) - outcome(x - h * along)) / (2 * h)
    np.testing.assert_allclose(jnp.vdot(jax.jit(jax.grad(outcome))(x), along), slope, rtol=1e-6)


# -- loss


def test_loss_by_its_formula():
    """Without dropout the path is that of `simulate` under the first half of the key."""
    config = PLAIN
    params, batch, key = params_of(config), a_batch(), jax.random.key(1)
    total, terms = loss(params, batch, key, config=config)
    path = simulate(params, batch.x0, TS, jax.random.split(key)[0], config=config)
    divergence = jax.jit(partial(annealed_sinkhorn_divergence, blur=config.blur, scaling=config.scaling))
    sinkhorn = np.mean([divergence(y, x) for x, y in zip(path.x[1:], batch.targets, strict=True)])
    energy = np.mean(path.kinetic_energy[-1]) / 2.5
    assert set(terms) == {"sinkhorn", "kinetic_energy"}
    np.testing.assert_allclose(terms["sinkhorn"], sinkhorn, rtol=1e-5)
    np.testing.assert_allclose(terms["kinetic_energy"], energy, rtol=1e-5)
    np.testing.assert_allclose(total, 0.7 * terms["sinkhorn"] + 0.3 * terms["kinetic_energy"], rtol=1e-6)


@pytest.fixture(scope="module")
def value_and_grad():
    return jax.jit(jax.value_and_grad(partial(scimf.loss, config=TINY), has_aux=True))


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def test_padding_of_targets_changes_nothing(value_and_grad):
    """Which cell is repeated with mass 0 does not matter, to the loss and to all of its gradient."""
    params, batch, key = params_of(TINY), a_batch(), jax.random.key(1)
    weights = jnp.pad(batch.weights[:, :5], ((0, 0), (0, 3)))
    answers = []
    for repeated in ([0, 0, 0], [1, 2, 4]):
        targets = jnp.concatenate([batch.targets, batch.targets[:, jnp.array(repeated)]], axis=1)
        answers.append(value_and_grad(params, replace(batch, targets=targets, weights=weights), key))
    ((total, _), grads), ((other, _), others) = answers
    np.testing.assert_allclose(other, total, rtol=1e-5)
    assert np.linalg.norm(flat(others) - flat(grads)) < 1e-4 * np.linalg.norm(flat(grads))


def test_given_self_transport_changes_no_gradient(value_and_grad):
    params, batch, key = params_of(TINY), a_batch(8), jax.random.key(1)
    own = jax.jit(partial(scimf.target_self_transport, config=TINY))(batch)
    assert own.shape == (2,)
    (total, _), grads = value_and_grad(params, batch, key)
    (with_own, _), grads_with_own = value_and_grad(params, replace(batch, self_transport=own), key)
    np.testing.assert_allclose(with_own, total, rtol=1e-2)
    assert np.linalg.norm(flat(grads_with_own) - flat(grads)) < 1e-5 * np.linalg.norm(flat(grads))


def test_without_debiasing_a_narrower_population_is_better():
    """Cells at rest: the divergence likes them as wide as the observed ones, the plain entropic cost narrower."""
    still = replace(TINY, dropout=0.0, sigma=0.0)
    params = jax.tree.map(jnp.zeros_like, params_of(still))
    x = cells(40, seed=5)
    batch = TimeSeriesBatch(x0=x, targets=jnp.stack([x, x]), weights=jnp.full((2, 40), 1 / 40), ts=TS)

    def at(width, debiased):
        config = replace(still, blur=0.8, debiased=debiased)
        return float(loss(params, replace(batch, x0=width * x), jax.random.key(0), config=config)[0])

    assert at(1.0, True) < at(0.7, True)
    assert at(0.7, False) < at(1.0, False)
    assert at(0.7, False) < at(0.0, False), "and not a single point"


def test_converged_and_annealed_are_near_on_easy_cells():
    """One cloud each: a few percent, as the annealed scheme's documentation has it."""
    params, batch, key = params_of(TINY), a_batch(), jax.random.key(1)
    _, annealed = loss(params, batch, key, config=PLAIN)
    _, converged = loss(params, batch, key, config=replace(PLAIN, sinkhorn="converged"))
    assert converged["sinkhorn_converged"] == 1
    np.testing.assert_allclose(annealed["sinkhorn"], converged["sinkhorn"], rtol=0.05)
    np.testing.assert_array_equal(annealed["kinetic_energy"], converged["kinetic_energy"])


def test_a_solver_stopped_early_is_told_in_the_terms():
    config = replace(TINY, sinkhorn="converged", sinkhorn_iterations=1, sinkhorn_threshold=1e-6, blur=0.02)
    _, terms = loss(params_of(TINY), a_batch(), jax.random.key(1), config=config)
    assert terms["sinkhorn_converged"] == 0


# -- who listens to whom


def test_attention_is_read_as_it_acts():
    """The weights and values read out, through the feed-forward layer, are the first block's interaction."""
    params, x = params_of(TWO_BLOCKS), cells()
    read = scimf.attention(params, x, config=TWO_BLOCKS)
    assert len(read) == 2
    for block in read:
        np.testing.assert_allclose(block.weights.sum(-1), 1, rtol=1e-6)
        np.testing.assert_array_equal(np.diagonal(block.weights, axis1=1, axis2=2), 0)
        assert np.isneginf(np.diagonal(block.logits, axis1=1, axis2=2)).all()
        assert block.value_norms.shape == (2, N)
        softmax = jax.nn.softmax(block.logits, axis=-1)
        np.testing.assert_allclose(block.weights, softmax, rtol=1e-5)
    assert np.abs(read[0].weights - read[1].weights).max() > 1e-3
    assert scimf.attention(params, x, config=replace(TINY, n_blocks=0)) == []


def test_options_of_interaction_scores():
    params, x = params_of(TWO_BLOCKS), cells()
    scores = partial(scimf.interaction_scores, params, x, config=TWO_BLOCKS)
    for block in (0, 1):
        read = scimf.attention(params, x, config=TWO_BLOCKS)[block]
        by_value = np.asarray(read.value_norms)[:, None]
        before = np.exp(read.logits - np.max(read.logits, -1, keepdims=True))
        np.testing.assert_array_equal(scores(block=block, scale_by_value=False), read.weights)
        np.testing.assert_allclose(scores(block=block), read.weights * by_value, rtol=1e-6)
        unscaled = scores(block=block, softmax=False, scale_by_value=False)
        np.testing.assert_allclose(unscaled, before, rtol=1e-6)
        np.testing.assert_allclose(unscaled.max(-1), 1)
        np.testing.assert_array_equal(np.diagonal(unscaled, axis1=1, axis2=2), 0)
        np.testing.assert_allclose(scores(block=block, softmax=False), before * by_value, rtol=1e-6)


# -- bad input


@pytest.mark.parametrize("call", [scimf.drift, scimf.diffusion, scimf.attention, scimf.interaction_scores])
def test_cells_of_another_width_are_refused(call):
    with pytest.raises(ValueError, match=r"x must have the shape \(cells, n_dims\) with n_dims=4 .* got \(6, 3\)"):
        call(params_of(TINY), cells(d=3), config=TINY)


def test_bad_calls():
    params, x, key = params_of(TINY), cells(), jax.random.key(0)
    with pytest.raises(ValueError, match="x0 must have the shape"):
        scimf.simulate(params, cells(d=3), TS, key, config=TINY)
    with pytest.raises(ValueError, match="unsorted"):
        scimf.simulate(params, x, (0.0, 2.0, 1.0), key, config=TINY)
    with pytest.raises(ValueError, match="dW must have the shape"):
        scimf.simulate(params, x, TS, None, config=TINY, dW=jnp.zeros((1, N, 4)))
    with pytest.raises(ValueError, match="x0 must have the shape"):
        scimf.loss(params, replace(a_batch(), x0=cells(d=3)), key, config=TINY)
    with pytest.raises(ValueError, match="number of times in batch.ts must be at least 2; got 1"):
        scimf.loss(params, replace(a_batch(), ts=(0.0,)), key, config=TINY)
    with pytest.raises(ValueError, match="block must be one of 0; got 1"):
        scimf.interaction_scores(params, x, config=TINY, block=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_dims": 50, "n_heads": 3}, "n_heads must divide n_dims; got n_heads=3, n_dims=50. Take one of 1, 2, 5, 10"),
        ({"n_dims": 0}, "n_dims must be at least 1; got 0"),
        ({"n_blocks": -1}, "n_blocks must be at least 0"),
        ({"sinkhorn": "converged", "debiased": False}, "debiased=False is of sinkhorn='annealed'"),
        ({"n_heads": 0}, "n_heads must be at least 1"),
        ({"intrinsic_widths": (4, 0)}, "each of intrinsic_widths must be at least 1; got 0"),
        ({"diffusion_widths": (0,)}, "each of diffusion_widths must be at least 1"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\); got 1.0"),
        ({"sigma": -0.1}, "sigma must be zero or a positive number"),
        ({"dt": 0.0}, "dt must be a positive number"),
        ({"blur": float("nan")}, "blur must be a positive number"),
        ({"scaling": 0.0}, "scaling must be a positive number"),
        ({"scaling": 1.0}, r"scaling must lie in \[0, 1\)"),
        ({"sinkhorn_threshold": 0.0}, "sinkhorn_threshold must be a positive"),
        ({"sinkhorn_iterations": 0}, "sinkhorn_iterations must be at least 1"),
        ({"sinkhorn_weight": -1.0}, "sinkhorn_weight must be zero or a positive"),
        ({"energy_weight": float("inf")}, "energy_weight must be zero or a positive"),
    ],
)
def test_configs_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        scimf.Config(**{"n_dims": 4, **settings})


@pytest.mark.parametrize(("field", "value"), [("diffusion", "learnt"), ("sinkhorn", "converge")])
def test_misspelt_options_are_told(field, value):
    """The suite's type checker would speak first; users do not have it."""
    config = replace(TINY)
    object.__setattr__(config, field, value)
    with pytest.raises(ValueError, match=f"{field} must be one of .*; got '{value}'. Did you mean '{value[:5]}"):
        config.__post_init__()


def test_defaults_are_the_paper_s():
    """92 k parameters for the cell alone and 28 k for the interaction."""
    shapes = jax.eval_shape(lambda: scimf.init(jax.random.key(0), scimf.Config(n_dims=50)))
    count = lambda tree: sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert count(shapes["drift"]["intrinsic"]) == 50 * 256 + 256 + 256 * 256 + 256 + 256 * 50 + 50
    assert count(shapes) == 119_748


def test_a_single_cell_has_scores_of_zero(key):
    config = scimf.Config(n_dims=4, intrinsic_widths=(8,))
    params = scimf.init(key, config)
    x = jnp.ones((1, 4))
    for softmax in (True, False):
        assert np.all(np.asarray(scimf.interaction_scores(params, x, config=config, softmax=softmax)) == 0)
