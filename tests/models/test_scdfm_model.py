"""What the flow over genes promises: genes and cells without order, and that nothing cheap is anything else.

Where two computations are the same mathematics in another order, they agree to 1e-5 of values of size 1: float32
rounds at 6e-8, and a hundred roundings of two layers and a loss add up to less.
"""

import inspect
import math
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scjax.batches import PairedBatch
from scjax.kernels import median_bandwidths
from scjax.losses import mmd2
from scjax.models import scdfm

# Compiling is nearly all the time these tests take; without LLVM's optimisations it is half of that.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

CONTROL = 3
GRAPH = np.full((14, 3), -1, np.int32)  # four special tokens, ten genes
for token, neighbours in enumerate(
    [[0], [1], [2], [3], [4, 5], [5, 9, 4], [6], [7, 13], [8, 4, 10], [9, 5], [10, 8, 6], [11], [12, 7, 4], [13, 7]]
):
    GRAPH[token, : len(neighbours)] = neighbours
CONSTANTS = scdfm.Constants(jnp.asarray(GRAPH), jnp.asarray(np.random.default_rng(5).normal(size=(4, 3)), jnp.float32))
TINY = scdfm.Config(
    n_tokens=16,  # more than the graph has, as in the reference
    n_perturbations=4,
    n_vector=3,
    d_model=16,
    n_layers=1,
    n_heads=2,
    graph_heads=4,
    dropout=0.0,
    gamma=0.7,
)
DEEP = replace(TINY, n_layers=2)
FUSIONS = ("differential_perceiver", "differential_transformer", "perceiver")
GENES = jnp.array([7, 4, 9, 5, 12], jnp.int32)
PERTURBATION = jnp.array([[5, 8], [CONTROL, 10], [7, CONTROL], [12, 4]], jnp.int32)
N = len(PERTURBATION)


def cells(*shape, seed=0):
    """Log-normalised expression: zeros, and values around 1."""
    x = np.random.default_rng(seed).normal(size=shape or (N, len(GENES))) + 0.5
    return jnp.asarray(np.maximum(x, 0), jnp.float32)


def states(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape or (N, len(GENES))), jnp.float32)


def times(n=N, seed=2):
    return jnp.asarray(np.random.default_rng(seed).uniform(size=n), jnp.float32)


@cache
def params_of(config):
    """Initial parameters with noise on all of them, so that no bias is zero and no scale one; always with a mask."""
    rng = np.random.default_rng(0)
    params = jit(scdfm.init, static_argnames="config")(jax.random.key(0), config=config)
    params.setdefault("mask", jnp.ones(config.d_model))
    return jax.tree.map(lambda p: p + 0.1 * jnp.asarray(rng.normal(size=p.shape), p.dtype), params)


def a_batch(n_populations=2, n_cells=N, seed=3):
    shape = (n_populations, n_cells, len(GENES))
    return PairedBatch(
        source=cells(*shape, seed=seed),
        target=cells(*shape, seed=seed + 1),
        perturbation=PERTURBATION[:n_populations],
        genes=GENES,
    )


def start_of(batch, seed=6):
    """x0 and t for `loss_at`."""
    return states(*batch.target.shape, seed=seed), times(batch.target.shape[:2], seed + 1)


def part(batch, populations):
    """Some populations of a batch, in this order."""
    i = jnp.asarray(populations)
    return replace(batch, source=batch.source[i], target=batch.target[i], perturbation=batch.perturbation[i])


velocity = jit(partial(scdfm.velocity, constants=CONSTANTS), static_argnames="config")
loss = jit(partial(scdfm.loss, constants=CONSTANTS), static_argnames="config")
loss_at = jit(partial(scdfm.loss_at, constants=CONSTANTS), static_argnames="config")
sample = jit(
    partial(scdfm.sample, constants=CONSTANTS),
    static_argnames=("config", "solver", "n_steps", "tolerance", "guidance", "weights", "trajectory"),
)


def v_of(params, config, *, x=None, t=None, source=None, perturbation=PERTURBATION, genes=GENES, key=None):
    """The velocity of the usual cells, but for what is given."""
    x, t, source = states() if x is None else x, times() if t is None else t, cells() if source is None else source
    return velocity(params, x, t, source, perturbation, genes, key=key, config=config)


def assert_same(got, want, atol=1e-5):
    """To atol times the largest value, or atol itself where values are small."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol * max(1, np.abs(b).max(initial=0))), got, want
    )


def assert_differ(a, b):
    assert np.abs(np.asarray(a) - np.asarray(b)).max() > 1e-3


# -- symmetries


@pytest.mark.parametrize("fusion", FUSIONS)
def test_genes_and_cells_have_no_order(fusion):
    """Relabelling genes or cells relabels velocities; slots are a set; and all of these inputs matter."""
    config = replace(TINY, fusion=fusion)
    params, v = params_of(config), v_of(params_of(config), config)
    perm = np.array([3, 0, 4, 1, 2])
    assert_same(v_of(params, config, x=states()[:, perm], source=cells()[:, perm], genes=GENES[perm]), v[:, perm])
    perm = np.array([2, 0, 3, 1])
    moved = dict(x=states()[perm], t=times()[perm], source=cells()[perm], perturbation=PERTURBATION[perm])
    assert_same(v_of(params, config, **moved), v[perm])
    assert_same(v_of(params, config, perturbation=PERTURBATION[:, ::-1]), v)
    for other in (
        dict(x=states(seed=9)),
        dict(t=times(seed=9)),
        dict(source=cells(seed=9)),
        dict(perturbation=PERTURBATION.at[:].set(CONTROL)),
        dict(genes=GENES + 1),
    ):
        assert_differ(v_of(params, config, **other), v)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_list_of_genes_twice_over_is_the_same_field(fusion):
    """Attention and the rest are means over genes, so a clone of every gene changes nothing."""
    config = replace(TINY, fusion=fusion)
    params, twice = params_of(config), lambda x: jnp.tile(x, (1, 2))
    got = v_of(params, config, x=twice(states()), source=twice(cells()), genes=jnp.tile(GENES, 2))
    assert_same(got, twice(v_of(params, config)))


@pytest.mark.parametrize("n_genes", [1, 10])
def test_any_list_of_genes(n_genes):
    """From one to all; beside the clones above, a gene alone is what two of its kind are."""
    genes = jnp.arange(13, 3, -1, jnp.int32)[:n_genes]
    x, source = states(1, n_genes), cells(1, n_genes)
    params, twice = params_of(TINY), lambda x: jnp.tile(x, (1, 2))
    one = dict(t=times(1), perturbation=PERTURBATION[:1])
    v = v_of(params, TINY, x=x, source=source, genes=genes, **one)
    assert v.shape == (1, n_genes)
    clones = v_of(params, TINY, x=twice(x), source=twice(source), genes=jnp.tile(genes, 2), **one)
    assert_same(clones, twice(v))


def test_a_cell_does_not_see_the_others():
    """Bit for bit: other states, controls and perturbations beside it are as good as none."""
    params, x, source = params_of(TINY), states(), cells()
    v = v_of(params, TINY)
    others = v_of(
        params,
        TINY,
        x=x.at[1:].set(9),
        t=times().at[1:].set(0),
        source=source.at[1:].set(4),
        perturbation=PERTURBATION.at[1:].set(11),
    )
    np.testing.assert_array_equal(others[0], v[0])
    assert_differ(others[1:], v[1:])


# -- cheap and plain


@pytest.mark.parametrize("perturbation", ["gene", "table", "vector"])
def test_tokens_once_a_batch_are_tokens_of_each_cell(perturbation):
    """Gene tokens, their modulations and the perturbations, made anew for every cell as in the reference."""
    config = DEEP if perturbation == "gene" else replace(TINY, perturbation=perturbation)
    ids = PERTURBATION if perturbation == "gene" else jnp.array([[1, 0], [2, 0], [3, 1], [0, 0]], jnp.int32)
    params = params_of(config)

    @jit
    @jax.vmap
    def one(x, t, source, p):
        g = jax.vmap(lambda gene: scdfm.gene_tokens(params, gene[None], constants=CONSTANTS, config=config)[0])(GENES)
        of_genes = scdfm._of_genes(params, g, config)
        p = scdfm.perturbation_embedding(params, p[None], constants=CONSTANTS, config=config)
        prepared = scdfm._prepare(params, source[None], p, of_genes, None, config)
        return scdfm._field(params, prepared, x[None], t[None], None, config)[0]

    assert_same(v_of(params, config, perturbation=ids), one(states(), times(), cells(), ids))


def test_an_embedding_is_as_good_as_the_ids_it_was_made_of():
    params = params_of(TINY)
    p = scdfm.perturbation_embedding(params, PERTURBATION, constants=CONSTANTS, config=TINY)
    assert_same(v_of(params, TINY, perturbation=p), v_of(params, TINY))


def test_a_single_perturbation_shares_its_mean_with_the_control():
    params = params_of(TINY)
    embed = partial(scdfm.perturbation_embedding, params, constants=CONSTANTS, config=TINY)
    alone = embed(jnp.array([[CONTROL], [10]], jnp.int32))
    assert_same(embed(jnp.array([[CONTROL, 10]], jnp.int32))[0], alone.mean(0))


@pytest.mark.parametrize("heads", [1, 4])
def test_attention_to_neighbours_is_attention_under_a_mask(heads, monkeypatch):
    """Gathered or dense, values and gradients; and both are the masked softmax over the vocabulary, written out."""
    config = replace(TINY, graph_heads=heads)
    params = params_of(config)["tokens"]["layer"]["attention"]
    memory = states(len(GRAPH), config.d_model)
    ids = np.array([5, 2, 8, 4, 12])
    direction = states(len(ids), config.d_model, seed=8)

    def value(params, memory):
        layer = scdfm.GraphAttention(config)
        received = layer.apply({"params": params}, memory[ids], memory, CONSTANTS.graph[ids], None)
        return jnp.sum(received * direction), received

    def both(dense):
        monkeypatch.setattr(scdfm, "_DENSE", 1000 if dense else 0)
        program = str(jax.make_jaxpr(lambda p, m: value(p, m))(params, memory))
        return program, jit(jax.value_and_grad(lambda p, m: value(p, m), (0, 1), has_aux=True))(params, memory)

    (masked, ((_, of_mask), grads_of_mask)), (gathered, ((_, of_rows), grads_of_rows)) = both(True), both(False)
    assert masked != gathered
    assert_same(of_rows, of_mask)
    assert_same(grads_of_rows, grads_of_mask)

    p, m = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, memory))
    q, k, v = (
        (x @ p[n]["kernel"] + p[n]["bias"]).reshape(len(x), heads, -1)
        for n, x in (("query", m[ids]), ("key", m), ("value", m))
    )
    want = np.zeros((len(ids), heads, config.d_model // heads))
    for row, token in enumerate(ids):
        to = GRAPH[token][GRAPH[token] >= 0]
        for h in range(heads):
            weights = np.exp(k[to, h] @ q[row, h] / math.sqrt(config.d_model // heads))
            want[row, h] = weights / weights.sum() @ v[to, h]
    want = want.reshape(len(ids), -1) @ p["output"]["kernel"] + p["output"]["bias"]
    assert_same(of_mask, want)


def test_a_joined_layer_is_one_layer_of_both():
    """[x, y] W + b, with the half of y made apart."""
    layer, params = scdfm.Joined(TINY), params_of(TINY)["fusion"]["joined"]
    x, y = states(N, TINY.d_model), states(N, TINY.d_model, seed=8)
    of_second = layer.apply({"params": params}, y, method="of_second")
    got = layer.apply({"params": params}, x, of_second)
    assert_same(got, np.concatenate([x, y], axis=1) @ np.asarray(params["kernel"]) + np.asarray(params["bias"]))


@pytest.mark.parametrize(("block", "keys_from"), [("first", "stream"), ("second", "control")])
def test_differential_attention_is_the_difference_of_two_maps(block, keys_from):
    """(A1 - lambda A2) V with both maps written out in NumPy float64, normalised per head, times 1 - lambda_init."""
    d, heads, width, layer = TINY.d_model, TINY.n_heads, TINY.d_model // TINY.n_heads, 3
    module, params = scdfm.DifferentialAttention(TINY, layer, keys_from), params_of(TINY)["layer_0"][block]["attention"]
    y, u = states(7, d), states(7, d, seed=8)

    @jit
    def attend(params, y, u):
        return module.apply({"params": params}, y, module.apply({"params": params}, u, method="of_control"))

    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    split = lambda name, x: (np.asarray(x) @ p[name]["kernel"]).reshape(7, heads, width).swapaxes(0, 1)  # noqa: E731

    def softmax(q, k):
        e = np.exp(q @ k.swapaxes(1, 2) / math.sqrt(width))
        return e / e.sum(-1, keepdims=True)

    sides = ((y, u), (y, u)) if keys_from == "stream" else ((y, y), (u, u))
    a1, a2 = (softmax(split(f"query_{i}", q), split(f"key_{i}", k)) for i, (q, k) in enumerate(sides, 1))
    initial = 0.8 - 0.6 * math.exp(-0.3 * layer)
    lam = np.exp(p["lambda_q1"] @ p["lambda_k1"]) - np.exp(p["lambda_q2"] @ p["lambda_k2"]) + initial
    received = (a1 - lam * a2) @ split("value", y)
    received /= np.sqrt((received**2).mean(-1, keepdims=True) + 1e-5)
    received *= p["head_scale"] * (1 - initial)
    assert_same(attend(params, y, u), received.swapaxes(0, 1).reshape(7, d) @ p["output"]["kernel"])


def test_the_loss_is_its_formula():
    """Written out with `velocity`, each cell with ids of its own, each population's MMD alone."""
    batch, params = a_batch(), params_of(TINY)
    x0, t = start_of(batch)
    flow, discrepancies = [], []
    for i in range(2):
        at = t[i][:, None]
        x_t, u_t = (1 - at) * x0[i] + at * batch.target[i], batch.target[i] - x0[i]
        v = v_of(
            params, TINY, x=x_t, t=t[i], source=batch.source[i], perturbation=jnp.tile(batch.perturbation[i], (N, 1))
        )
        flow.append(jnp.mean((v - u_t) ** 2))
        discrepancies.append(mmd2(x_t + (1 - at) * v, batch.target[i], median_bandwidths(batch.target[i])))
    total, terms = loss_at(params, batch, x0, t, config=TINY)
    assert_same(terms, {"flow": np.mean(flow), "mmd2": np.mean(discrepancies)})
    assert_same(total, terms["flow"] + 0.7 * terms["mmd2"], 1e-6)


def test_the_loss_is_loss_at_its_draws():
    """Starts, times and dropout from a key in three; whatever the start is."""
    batch, key, config = a_batch(), jax.random.key(4), replace(TINY, dropout=0.3)
    params = params_of(config)
    key_start, key_t, key_net = jax.random.split(key, 3)
    x0 = jax.random.normal(key_start, batch.target.shape)
    t = jax.random.uniform(key_t, batch.target.shape[:2])
    got, want = loss(params, batch, key, config=config), loss_at(params, batch, x0, t, key_net, config=config)
    assert_same(got, want, 1e-6)
    assert_differ(loss_at(params, batch, x0, t, config=config)[0], want[0])  # without a key nothing drops


def test_a_start_at_control_cells_shows_the_network_the_next_one():
    """Paths begin near the source, with noise of the given size; what the network sees is the source rolled by one."""
    config = replace(TINY, start="control", start_noise=0.2, dropout=0.0)
    params, batch, key = params_of(config), a_batch(), jax.random.key(9)
    key_start, key_t, key_net = jax.random.split(key, 3)
    x0 = batch.source + 0.2 * jax.random.normal(key_start, batch.source.shape)
    t = jax.random.uniform(key_t, batch.source.shape[:2])
    shown = replace(batch, source=jnp.roll(batch.source, 1, axis=1))
    got, want = loss(params, batch, key, config=config), loss_at(params, shown, x0, t, key_net, config=config)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    assert_differ(loss_at(params, batch, x0, t, key_net, config=config)[0], want[0])
    with pytest.raises(ValueError, match="number of cells of a population, where start='control' must be at least 2"):
        scdfm.loss(params, a_batch(n_cells=1), key, constants=CONSTANTS, config=replace(config, gamma=0.0))


def _gradients(config):
    """Of the loss without a key, beside its value: a function of the parameters."""
    batch = a_batch()
    x0, t = start_of(batch)
    bind = {"constants": CONSTANTS, "config": config}
    return jax.value_and_grad(lambda params: scdfm.loss_at(params, batch, x0, t, **bind), has_aux=True)


@pytest.fixture(scope="module")
def plain_gradients():
    return jit(_gradients(TINY))(params_of(TINY))


@pytest.mark.parametrize("remat", ["layers", "cells"])
def test_saving_memory_changes_nothing(remat, plain_gradients):
    """The loss, its terms and all gradients."""
    thrifty = _gradients(replace(TINY, remat=remat))
    assert_same(jit(thrifty)(params_of(TINY)), plain_gradients)


# -- loss


def test_populations_have_no_order_and_do_not_meet():
    """MMD^2 of a batch is the mean of those of its populations alone, whatever stands beside them."""
    batch, params = a_batch(), params_of(TINY)
    x0, t = start_of(batch)
    alone = [loss_at(params, part(batch, [i]), x0[i : i + 1], t[i : i + 1], config=TINY)[1] for i in range(2)]
    terms = loss_at(params, batch, x0, t, config=TINY)[1]
    for name in ("flow", "mmd2"):
        assert_same(terms[name], (alone[0][name] + alone[1][name]) / 2)
    swapped = loss_at(params, part(batch, [1, 0]), x0[::-1], t[::-1], config=TINY)[1]
    assert_same(swapped, terms)

    other = replace(batch, target=batch.target.at[0].set(cells(N, len(GENES), seed=20)))
    changed = loss_at(params, other, x0, t, config=TINY)[1]
    first = loss_at(params, part(other, [0]), x0[:1], t[:1], config=TINY)[1]
    assert_same(changed["mmd2"] - terms["mmd2"], (first["mmd2"] - alone[0]["mmd2"]) / 2)
    assert_differ(changed["mmd2"], terms["mmd2"])


def test_gamma_zero_has_no_discrepancy_and_asks_for_no_second_cell():
    params, batch = params_of(TINY), a_batch()
    x0, t = start_of(batch)
    without = replace(TINY, gamma=0.0)
    total, terms = loss_at(params, batch, x0, t, config=without)
    assert set(terms) == {"flow"}
    assert_same(total, loss_at(params, batch, x0, t, config=TINY)[1]["flow"])
    single = a_batch(n_cells=1)
    of_loss = partial(scdfm.loss, constants=CONSTANTS)
    assert jax.eval_shape(partial(of_loss, config=without), params, single, jax.random.key(0))[0].shape == ()
    with pytest.raises(ValueError, match="the number of cells of x must be at least 2; got 1"):
        of_loss(params, single, jax.random.key(0), config=TINY)


def test_a_hidden_population_is_told_nothing_and_left_out_of_the_discrepancy():
    """Each draw hides one of four sets of populations, and each is seen; its terms are those sets' own."""
    config = replace(TINY, condition_dropout=0.5)
    params, batch = params_of(config), a_batch()
    x0, t = start_of(batch)
    told, hidden = batch.perturbation, jnp.tile(params["mask"], (2, 1))
    alone = lambda i, p: loss_at(  # noqa: E731
        params, replace(part(batch, [i]), perturbation=p[i][None]), x0[i][None], t[i][None], config=TINY
    )[1]
    as_told, as_hidden = ([alone(i, p) for i in range(2)] for p in (told, hidden))

    def expected(tells):
        flow = np.mean([(as_told if tell else as_hidden)[i]["flow"] for i, tell in enumerate(tells)])
        seen = [as_told[i]["mmd2"] for i, tell in enumerate(tells) if tell]
        return [flow, np.mean(seen) if seen else 0.0]

    table = np.array([expected(tells) for tells in ((0, 0), (0, 1), (1, 0), (1, 1))])
    terms = [loss_at(params, batch, x0, t, jax.random.key(k), config=config)[1] for k in range(32)]
    rows = np.array([[terms_["flow"], terms_["mmd2"]] for terms_ in terms])
    distance = np.abs(rows[:, None] - table[None]).max(-1)
    assert distance.min(axis=1).max() < 1e-5
    # 32 draws miss one of four sets in 4 (3/4)^32 = 4e-4 of all keys; these keys are fixed.
    assert set(distance.argmin(axis=1)) == {0, 1, 2, 3}
    without_key = loss_at(params, batch, x0, t, config=config)[1]
    assert_same([without_key["flow"], without_key["mmd2"]], list(table[3]))


@pytest.mark.parametrize("head_input", ["masked", "leaking"])
def test_the_inverse_objective_trains_the_head_and_the_mask_alone(head_input):
    """1 - cos(guess, embedding); the mask is trained where the network sees it."""
    config = replace(TINY, objective="perturbation", head_input=head_input)
    params, batch = params_of(config), a_batch()
    of_loss = partial(scdfm.loss, constants=CONSTANTS, config=config)
    (total, terms), grads = jit(jax.value_and_grad(of_loss, has_aux=True))(params, batch, jax.random.key(0))
    reached = {name for name, g in grads.items() if any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(g))}
    assert reached == {"perturbation_head"} | ({"mask"} if head_input == "masked" else set())

    flat = lambda x: x.reshape(-1, len(GENES))  # noqa: E731
    ids = jnp.repeat(batch.perturbation, N, axis=0)
    leak = {"perturbation": ids} if head_input == "leaking" else {}
    predict = jit(partial(scdfm.predict_perturbation, constants=CONSTANTS, config=config))
    guess = np.asarray(predict(params, flat(batch.target), flat(batch.source), GENES, **leak))
    answer = np.asarray(scdfm.perturbation_embedding(params, ids, constants=CONSTANTS, config=config))
    cosine = (guess * answer).sum(1) / np.linalg.norm(guess, axis=1) / np.linalg.norm(answer, axis=1)
    assert_same(terms, {"cosine": cosine.mean()})
    assert_same(total, 1 - cosine.mean())
    if head_input == "leaking":  # it is told, so another answer makes another guess
        other = predict(params, flat(batch.target), flat(batch.source), GENES, perturbation=ids[::-1])
        assert_differ(other, guess)


# -- dropout


@pytest.mark.parametrize("fusion", ["differential_perceiver", "perceiver"])
def test_nothing_drops_without_a_key(fusion):
    config = replace(TINY, fusion=fusion, dropout=0.4)
    params = params_of(config)
    v = v_of(params, config)
    programs = [
        str(
            jax.make_jaxpr(partial(scdfm.velocity, constants=CONSTANTS, config=c))(
                params, states(), times(), cells(), PERTURBATION, GENES
            )
        )
        for c in (config, replace(config, dropout=0.0))
    ]
    assert programs[0] == programs[1]
    one, again, other = (v_of(params, config, key=jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert_differ(one, other)
    assert_differ(one, v)


def test_cells_drop_apart():
    """Alike in everything, four cells still differ once a key is given."""
    config = replace(TINY, dropout=0.4)
    same = {"x": states(1, 5), "t": times(1), "source": cells(1, 5), "perturbation": PERTURBATION[:1]}
    same = {name: jnp.repeat(a, N, axis=0) for name, a in same.items()}
    v = np.asarray(v_of(params_of(config), config, key=jax.random.key(0), **same))
    for i in range(1, N):
        assert_differ(v[i], v[0])


# -- sampling


def by_the_three_eighths_rule(field, x, n_steps):
    """The plain loop: `field` evaluated anew at every stage."""
    h = 1 / n_steps
    for i in range(n_steps):
        t = i * h
        k1 = field(t, x)
        k2 = field(t + h / 3, x + h * k1 / 3)
        k3 = field(t + 2 * h / 3, x + h * (k2 - k1 / 3))
        k4 = field(t + h, x + h * (k1 - k2 + k3))
        x = x + h * (k1 + 3 * k2 + 3 * k3 + k4) / 8
    return x


def plainly(params, config, x0, fields, n_steps=2):
    """dx/dt = sum of weights times velocities, of (weight, perturbation) pairs, each from scratch."""

    def field(t, x):
        return sum(w * v_of(params, config, x=x, t=jnp.full(N, t, x.dtype), perturbation=p) for w, p in fields)

    return by_the_three_eighths_rule(field, x0, n_steps)


def path_of(params, config, *, source=None, perturbation=PERTURBATION, x0=None, n_steps=2, **settings):
    """The sampler's states, from the usual cells but for what is given."""
    source, x0 = cells() if source is None else source, states() if x0 is None else x0
    settings |= {"n_steps": n_steps, "trajectory": True}
    return sample(params, source, perturbation, GENES, None, config=config, x0=x0, **settings)


@pytest.mark.parametrize("fusion", ["differential_perceiver", "perceiver"])
def test_sampling_is_integrating_the_velocity(fusion):
    """All that is hoisted out of the solver, against `velocity` at every stage."""
    config = replace(TINY, fusion=fusion)
    params, x0 = params_of(config), states()
    path = path_of(params, config)
    np.testing.assert_array_equal(path[0], x0)
    assert path.shape == (3, N, len(GENES))
    assert_same(path[-1], plainly(params, config, x0, [(1.0, PERTURBATION)]))


def test_samples_are_cut_at_zero():
    params = params_of(TINY)
    last = np.asarray(path_of(params, TINY)[-1])
    assert last.min() < 0 < last.max()
    cut = sample(params, cells(), PERTURBATION, GENES, None, config=TINY, x0=states(), n_steps=2)
    assert_same(cut, np.maximum(last, 0))


def test_a_sampled_cell_does_not_see_the_others():
    params, source, x0 = params_of(TINY), cells(), states()
    whole = path_of(params, TINY)
    others = path_of(
        params, TINY, source=source.at[1:].set(3), perturbation=PERTURBATION.at[1:].set(11), x0=x0.at[1:].set(-2)
    )
    np.testing.assert_array_equal(others[:, 0], whole[:, 0])
    assert_differ(others[-1, 1:], whole[-1, 1:])
    perm = np.array([2, 0, 3, 1])
    moved = path_of(params, TINY, source=source[perm], perturbation=PERTURBATION[perm], x0=x0[perm])
    assert_same(moved, whole[:, perm])
    assert_same(path_of(params, TINY, source=source[:1], perturbation=PERTURBATION[:1], x0=x0[:1]), whole[:, :1])


def test_adaptive_steps_arrive_where_small_ones_do():
    """tsit5 at 1e-5 and 16 steps of the 3/8 rule, of which each is wrong by less than 1e-3."""
    params = params_of(TINY)
    fine = plainly(params, TINY, states(), [(1.0, PERTURBATION)], n_steps=16)
    assert_same(path_of(params, TINY, solver="tsit5", tolerance=1e-5)[-1], fine, 1e-3)


@pytest.mark.parametrize(("start", "settings"), [("gaussian", {}), ("poisson", {"poisson_target_sum": 50.0})])
def test_where_paths_begin(start, settings):
    """The first state of a path is a start of the config's kind, drawn with the key."""
    config = replace(TINY, start=start, **settings)
    params, source = params_of(config), cells(400, 2)
    run = partial(sample, params, source, jnp.tile(PERTURBATION[:1], (400, 1)), GENES[:2], config=config)
    path = run(key=jax.random.key(0), n_steps=1, solver="euler", trajectory=True)
    x0 = np.asarray(path[0])
    other = np.asarray(run(key=jax.random.key(1), n_steps=1, solver="euler", trajectory=True)[0])
    assert_differ(x0, other)
    if start == "gaussian":
        assert abs(x0.mean()) < 4 / math.sqrt(x0.size)
        assert abs(x0.var() - 1) < 4 * math.sqrt(2 / x0.size)
    else:
        some = np.asarray(source.sum(1)) > 0
        counts = np.expm1(x0[some]).sum(1)
        assert abs(counts.mean() - 50) < 4 * math.sqrt(50 / some.sum())
        np.testing.assert_array_equal(x0[~some], 0)


def test_guidance_is_its_linear_combination():
    """v_hidden + g (v - v_hidden), integrated plainly."""
    params = params_of(TINY)
    hidden = jnp.tile(params["mask"], (N, 1))
    guided = path_of(params, TINY, guidance=2.5)[-1]
    assert_same(guided, plainly(params, TINY, states(), [(2.5, PERTURBATION), (-1.5, hidden)]))
    assert_differ(guided, path_of(params, TINY)[-1])


def test_a_combination_is_composed_of_its_parts():
    """v_0 + sum_s (v_s - v_0), integrated plainly; guided too."""
    params, x0 = params_of(TINY), states()
    control = jnp.array([CONTROL, CONTROL], jnp.int32)
    none = jnp.tile(control, (N, 1))
    fields = [(1.0, none.at[:, 0].set(PERTURBATION[:, slot])) for slot in (0, 1)] + [(-1.0, none)]
    parts, weights = scdfm.parts_of(PERTURBATION, control)
    composed = path_of(params, TINY, perturbation=parts, weights=weights)[-1]
    assert_same(composed, plainly(params, TINY, x0, fields))
    single = np.array(PERTURBATION == CONTROL).any(axis=1)
    whole = path_of(params, TINY)[-1]
    assert_same(composed[single], whole[single])  # [A, control] is A
    assert_differ(composed[~single], whole[~single])
    hidden = jnp.tile(params["mask"], (N, 1))
    guided = path_of(params, TINY, perturbation=parts, weights=weights, guidance=2.0)[-1]
    assert_same(guided, plainly(params, TINY, x0, [*((2 * w, p) for w, p in fields), (-1.0, hidden)]))


# -- numbers


def test_bfloat16_computes_near_float32_and_keeps_float32_outside():
    """Roundings of 2^-9 each, some twenty in a row: the velocity is within 5% of its root mean square."""
    half = replace(TINY, compute_dtype="bfloat16")
    params = params_of(half)
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    v, rough = v_of(params, TINY), v_of(params, half)
    assert rough.dtype == jnp.float32
    distance = float(jnp.sqrt(jnp.mean((rough - v) ** 2) / jnp.mean(v**2)))
    assert 1e-5 < distance < 0.05, distance


def test_gradients_in_bfloat16():
    config = replace(TINY, compute_dtype="bfloat16", dropout=0.1, fusion="perceiver")
    params, batch = params_of(config), a_batch()
    of_loss = partial(scdfm.loss, constants=CONSTANTS, config=config)
    grads = jit(jax.grad(lambda params: of_loss(params, batch, jax.random.key(0))[0]))(params)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("fusion", FUSIONS)
def test_float64_stays_float64(fusion):
    """No value of the traced programs is float32."""
    config = replace(TINY, fusion=fusion, dropout=0.1, condition_dropout=0.2)
    wide = lambda tree: jax.tree.map(  # noqa: E731
        lambda a: jax.ShapeDtypeStruct(a.shape, jnp.float64 if jnp.issubdtype(a.dtype, jnp.floating) else a.dtype), tree
    )
    params = wide(jax.eval_shape(partial(scdfm.init, config=config), jax.random.key(0)))
    bind = {"constants": CONSTANTS._replace(vectors=None), "config": config}
    gradient = jax.value_and_grad(partial(scdfm.loss, **bind), has_aux=True)
    program = jax.make_jaxpr(gradient)(params, wide(a_batch()), jax.random.key(0))
    draw = partial(scdfm.sample, key=jax.random.key(0), n_steps=2, guidance=2.0, **bind)
    sampling = jax.make_jaxpr(draw)(params, wide(cells()), PERTURBATION, GENES)
    for text in (str(program), str(sampling)):
        assert "f64[" in text
        assert "f32[" not in text


# -- the inverse search


def test_candidates_by_their_cosine():
    candidates = jnp.array([[0.0, 2.0], [3.0, 0.1], [-1.0, 0.0], [1.0, 1.0]])
    order, scores = scdfm.rank_singles(jnp.array([5.0, 0.0]), candidates)
    np.testing.assert_array_equal(order, [1, 3, 0, 2])
    np.testing.assert_allclose(scores, [3 / math.hypot(3, 0.1), math.sqrt(0.5), 0, -1], atol=1e-6)


def test_a_mixture_of_two_is_found_with_its_weights():
    """The ridge of 1e-6 moves weights by that over the squared norms; float32 by some 1e-6."""
    candidates = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)), jnp.float32)
    rank_pairs = jit(scdfm.rank_pairs, static_argnames="n_preselected")
    guess = 0.3 * candidates[6] + 0.7 * candidates[2]
    pairs, weights, remainders = rank_pairs(guess, candidates)
    assert pairs.shape == (28, 2)
    assert dict(zip(np.array(pairs[0]).tolist(), np.array(weights[0]).tolist(), strict=True)) == pytest.approx(
        {6: 0.3, 2: 0.7}, abs=1e-5
    )
    assert remainders[0] < 1e-5
    assert remainders[1] > 0.01
    assert (np.diff(remainders) >= 0).all()
    np.testing.assert_allclose(weights.sum(1)[weights.sum(1) > 0], 1, atol=1e-6)
    assert (np.asarray(weights) >= 0).all()
    some = rank_pairs(guess, candidates, n_preselected=3)[0]
    assert set(np.array(some).ravel()) == set(np.array(scdfm.rank_singles(guess, candidates)[0][:3]))


def test_a_weight_below_zero_is_cut():
    """(2, -1) is best told by twice the first and less of the second; cut, the first alone remains, and (0, 1)."""
    pairs, weights, remainders = jit(scdfm.rank_pairs)(jnp.array([2.0, -1.0]), jnp.eye(2))
    order = np.argsort(pairs[0])
    np.testing.assert_allclose(np.asarray(weights[0])[order], [1, 0], atol=1e-6)
    np.testing.assert_allclose(remainders[0], math.sqrt(2), rtol=1e-6)
    with pytest.raises(ValueError, match="the number of candidates must be at least 2; got 1"):
        scdfm.rank_pairs(jnp.ones(2), jnp.eye(2)[:1])


# -- init


@pytest.mark.parametrize("fusion", FUSIONS)
def test_initial_parameters_are_the_reference_s(fusion):
    """Xavier bounds, reached within a tenth by a matrix of 256 entries or more; zero biases, unit scales."""
    config = replace(TINY, fusion=fusion, d_model=32, n_tokens=200)
    draw = jit(partial(scdfm.init, config=config))
    params, other = draw(jax.random.key(0)), draw(jax.random.key(1))
    stacked = [params["tokens"]["layer"]["attention"]]
    if fusion == "perceiver":
        stacked += [params["layer_0"]["perceiver"][name] for name in ("cross_attention", "self_attention")]
    stacked = {id(a[name]["kernel"]) for a in stacked for name in ("query", "key", "value")}
    for path, p in jax.tree_util.tree_leaves_with_path(params):
        name, where = path[-1].key, jax.tree_util.keystr(path)
        if name == "kernel":
            n_in, n_out = p.shape
            bound = math.sqrt(6 / (n_in + (3 * n_out if id(p) in stacked else n_out)))
            largest = float(jnp.abs(p).max())
            assert largest <= bound, where
            assert p.size < 256 or largest > 0.9 * bound, where
        elif name == "embedding":  # 4 standard errors of a standard normal's mean and variance
            assert abs(p.mean()) < 4 / math.sqrt(p.size), where
            assert abs(p.var() - 1) < 4 * math.sqrt(2 / p.size), where
        elif name.startswith("lambda_"):
            assert 0 < np.abs(p).max() < 0.5, where  # five standard deviations
        else:
            assert name in ("bias", "scale", "head_scale"), where
            np.testing.assert_array_equal(p, 0 if name == "bias" else 1, err_msg=where)
    assert_differ(params["velocity_head"]["hidden"]["kernel"], other["velocity_head"]["hidden"]["kernel"])


@pytest.mark.parametrize(
    ("perturbation", "size"), [("gene", "n_tokens"), ("table", "n_perturbations"), ("vector", "n_vector")]
)
def test_sizes_that_the_data_decide_must_be_known(perturbation, size):
    config = replace(TINY, perturbation=perturbation, **{size: None})
    with pytest.raises(ValueError, match=f"{size} is None; the data decide it"):
        scdfm.init(jax.random.key(0), config)


@pytest.mark.parametrize("has_mask", [False, True])
def test_a_head_is_added_and_nothing_else(has_mask):
    params = {"tokens": {"embedding": jnp.ones((2, 16))}} | ({"mask": jnp.ones(16)} if has_mask else {})
    more = scdfm.add_perturbation_head(jax.random.key(3), params, TINY)
    assert set(more) == {"tokens", "perturbation_head", "mask"}
    for name in params:
        assert more[name] is params[name]
    assert more["perturbation_head"]["Dense_0"]["kernel"].shape == (16, 16)
    assert more["mask"].shape == (16,)


def test_build_binds_config_and_constants():
    model, key, bind = scdfm.build(DEEP, CONSTANTS), jax.random.key(1), {"constants": CONSTANTS, "config": DEEP}
    program = lambda f, *args: str(jax.make_jaxpr(f)(*args))  # noqa: E731
    params, batch = shapes_of(DEEP), a_batch()
    assert jax.eval_shape(model.init, key) == params
    assert program(model.loss, params, batch, key) == program(partial(scdfm.loss, **bind), params, batch, key)
    inputs = params, cells(), PERTURBATION, GENES, key
    assert program(model.predict, *inputs) == program(partial(scdfm.sample, **bind), *inputs)


# -- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_heads": 3}, "n_heads must divide d_model; got n_heads=3, d_model=16"),
        ({"graph_heads": 5}, "graph_heads must divide d_model; got graph_heads=5"),
        ({"n_layers": 0}, "n_layers must be at least 1; got 0"),
        ({"n_tokens": 0}, "n_tokens must be at least 1"),
        ({"dropout": 1.0}, "dropout must lie in"),
        ({"condition_dropout": -0.1}, "condition_dropout must lie in"),
        ({"poisson_alpha": 0.0}, "poisson_alpha must be a positive"),
        ({"poisson_target_sum": -1.0}, "poisson_target_sum must be a positive"),
        ({"gamma": -0.5}, "gamma must be zero or"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


def shapes_of(config):
    return jax.eval_shape(partial(scdfm.init, config=config), jax.random.key(0))


def refused(change, message, config=TINY, constants=CONSTANTS):
    """`velocity` raises before it computes; parameters are but shapes here."""
    given = dict(x_t=states(), t=times(), source=cells(), perturbation=PERTURBATION, genes=GENES) | change
    plain = inspect.unwrap(scdfm.velocity)  # without the suite's check of types, which would see shapes first
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(partial(plain, constants=constants, config=config), shapes_of(config), **given)


def test_bad_input_is_refused():
    refused({"genes": GENES[:4]}, r"cells x genes.*states \(4, 5\), source \(4, 5\), 4 times, 4 genes")
    refused({"source": cells(3, 5)}, r"cells x genes.*source \(3, 5\)")
    refused({"t": times(3)}, "cells x genes.*3 times")
    refused({"perturbation": jnp.zeros((N, 7))}, "d_model=16 features; got 7.*embed_vectors")
    large = CONSTANTS._replace(graph=jnp.zeros((17, 1), jnp.int32))
    refused({}, "n_tokens must be at least the 17 tokens of constants.graph; got 16", constants=large)
    config = replace(TINY, perturbation="vector")
    refused({}, "needs constants.vectors of n_vector=3", config, CONSTANTS._replace(vectors=None))
    refused({}, "needs constants.vectors of n_vector=3", config, CONSTANTS._replace(vectors=jnp.zeros((4, 2))))
    with pytest.raises(ValueError, match="perturbation='gene' takes its embeddings from gene tokens"):
        scdfm.embed_vectors({}, jnp.zeros((1, 16)), config=TINY)


def test_samples_that_cannot_be_drawn_are_refused():
    def draw(config=TINY, key=None, **settings):
        settings |= {"constants": CONSTANTS, "config": config}
        return scdfm.sample(shapes_of(config), cells(), PERTURBATION, GENES, key, **settings)

    with pytest.raises(ValueError, match="start='gaussian' draws where paths begin: pass a key, or x0"):
        draw()
    with pytest.raises(ValueError, match="guidance=2.0 needs a model that was trained with condition_dropout"):
        draw(key=jax.random.key(0), guidance=2.0)
    with pytest.raises(ValueError, match="start='control' begins at control cells"):
        draw(replace(TINY, start="control"), key=jax.random.key(0))
    with pytest.raises(ValueError, match="weights has one number for each part.*got 2"):
        draw(key=jax.random.key(0), weights=(1.0, 2.0))


def test_guesses_that_cannot_be_made_are_refused():
    masked = replace(TINY, objective="perturbation")

    def guess(config, of, **leak):
        settings = {"constants": CONSTANTS, "config": config, **leak}
        return scdfm.predict_perturbation(shapes_of(of), cells(), cells(), GENES, **settings)

    with pytest.raises(ValueError, match="params have no perturbation head"):
        guess(masked, TINY)
    with pytest.raises(ValueError, match="head_input='masked' wants no answer"):
        guess(masked, masked, perturbation=PERTURBATION)
    with pytest.raises(ValueError, match="head_input='leaking' leaks the answer into the network: pass it"):
        guess(replace(masked, head_input="leaking"), masked)
