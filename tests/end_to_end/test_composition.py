"""The pieces put together as a user would: models in models, losses in loops and networks that are not ours, gradients
of what a whole population becomes, many models in one program.
"""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scjax.batches import PairedBatch
from scjax.data.preprocess import Preprocess, fit
from scjax.kernels import median_bandwidths
from scjax.losses import annealed_sinkhorn_divergence, energy_distance, mmd2, sinkhorn_divergence
from scjax.models import perturbdiff, scdfm, scimf
from scjax.processes.flow import integrate, straight_path

# ---------------------------------------------------------------- tiny models, untrained

N_CELLS, N_GENES, N_DIMS = 6, 5, 4
SCIMF = scimf.Config(n_dims=N_DIMS, intrinsic_widths=(8,), dt=0.25, sigma=0.1)
SCDFM = scdfm.Config(n_tokens=9, d_model=8, n_layers=1, n_heads=2, graph_heads=2, dropout=0.0)
GRAPH = scdfm.Constants(jnp.arange(9, dtype=jnp.int32)[:, None])  # every gene is its own neighbour alone
GENES = jnp.arange(4, 9, dtype=jnp.int32)
PERTURBDIFF = perturbdiff.Config(
    n_genes=N_GENES, n_perturbations=3, cell_type="none", batch="none", d_model=8, n_layers=1, n_heads=2, d_covariate=4
)
NOTHING = perturbdiff.Constants()
TS = (0.0, 0.5, 1.0)


def awake(params, key):
    """With noise on every leaf: layers that begin at zero let nothing of the covariates through."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    noisy = [leaf + 0.2 * jax.random.normal(k, leaf.shape, leaf.dtype) for leaf, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, noisy)


def control(dtype=jnp.float32, n_genes=N_GENES):
    return jax.random.exponential(jax.random.key(5), (N_CELLS, n_genes), dtype)


def of_scimf(params, x, key):
    return scimf.simulate(params, x[:, :N_DIMS], TS, key, config=SCIMF).x


def of_scdfm(params, x, key):
    ids = jnp.full((N_CELLS, 1), 5, jnp.int32)
    return scdfm.sample(params, x, ids, GENES, key, constants=GRAPH, config=SCDFM, n_steps=2, solver="heun")


def of_perturbdiff(params, x, key):
    ids = {"perturbation": jnp.array([1])}
    return perturbdiff.sample(params, x[None], ids, key, constants=NOTHING, config=PERTURBDIFF, n_steps=3)[0]


def of_denoising(params, x, key):
    noise, ids = jax.random.normal(key, x.shape), {"perturbation": jnp.array([1])}
    t = jnp.array([400])
    return perturbdiff.denoise(params, noise[None], t, x[None], ids, constants=NOTHING, config=PERTURBDIFF)[0]


SYSTEMS = {
    "scimf.simulate": (scimf.init, SCIMF, of_scimf),
    "scdfm.sample": (scdfm.init, SCDFM, of_scdfm),
    "perturbdiff.sample": (perturbdiff.init, PERTURBDIFF, of_perturbdiff),
    "perturbdiff.denoise": (perturbdiff.init, PERTURBDIFF, of_denoising),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_models_over_a_leading_axis_of_parameters(name):
    """`vmap` over the parameters of three seeds is the loop over them, in one program that other parameters share."""
    init, config, predict = SYSTEMS[name]
    init_all = jax.jit(jax.vmap(lambda key: awake(init(key, config), jax.random.fold_in(key, 1))))
    ensemble = jax.jit(jax.vmap(predict, in_axes=(0, None, None)))
    alone = jax.jit(predict)
    for seed in (0, 1):
        many = init_all(jax.random.split(jax.random.key(seed), 3))
        together = ensemble(many, control(), jax.random.key(7))
        for i, made in enumerate(together):
            one = jax.tree.map(lambda leaf, i=i: leaf[i], many)
            np.testing.assert_allclose(made, alone(one, control(), jax.random.key(7)), rtol=2e-4, atol=2e-5)
        assert np.ptp(np.asarray(together), axis=0).max() > 1e-2  # the members differ
    assert (ensemble._cache_size(), alone._cache_size()) == (1, 1)


# ---------------------------------------------------------------- an interaction as the velocity of a flow


def interacting_velocity(params, t, x):
    """The drift of scIMF, of cells in eight learned coordinates, the time riding along as one more."""
    told = jnp.concatenate([x, jnp.broadcast_to(jnp.asarray(t, x.dtype).reshape(-1, 1), (len(x), 1))], axis=1)
    return scimf.drift(params["cells"], told @ params["lift"], config=params_config(params)) @ params["out"]


def params_config(params):
    n_dims = params["lift"].shape[1]
    return scimf.Config(n_dims=n_dims, n_heads=2, intrinsic_widths=(16,), residual=True, dropout=0.0)


def gathering(key, n_cells=16):
    """A population anywhere, and the same cells drawn together about its own mean: no cell knows where that is."""
    key_mean, key_cells = jax.random.split(key)
    mean = 2 * jax.random.normal(key_mean, (1, 2))
    x0 = mean + jax.random.normal(key_cells, (n_cells, 2))
    return x0, x0.mean(axis=0, keepdims=True) + 0.2 * (x0 - x0.mean(axis=0, keepdims=True))


def test_an_interaction_drift_as_the_velocity_of_a_flow():
    key_cells, key_lift, key_out, key_train = jax.random.split(jax.random.key(0), 4)
    params = {
        "lift": jax.random.normal(key_lift, (3, 8)),
        "out": jax.random.normal(key_out, (8, 2)) / 3,
    }
    params["cells"] = scimf.init(key_cells, params_config(params))

    def loss(params, key):
        def of_population(key):
            key_cells, key_t = jax.random.split(key)
            x0, x1 = gathering(key_cells)
            t = jax.random.uniform(key_t)  # one for the whole population: its cells are seen at one time
            x_t, u_t = straight_path(x0, x1, jnp.full(len(x0), t))
            return jnp.mean((interacting_velocity(params, t, x_t) - u_t) ** 2)

        return jnp.mean(jax.vmap(of_population)(jax.random.split(key, 8)))

    tx = optax.adam(1e-2)

    @jax.jit
    def train(params, key):
        def step(state, key):
            params, opt_state = state
            value, grads = jax.value_and_grad(loss)(params, key)
            updates, opt_state = tx.update(grads, opt_state)
            return (optax.apply_updates(params, updates), opt_state), (value, optax.tree.norm(grads))

        (params, _), told = jax.lax.scan(step, (params, tx.init(params)), jax.random.split(key, 150))
        return params, told

    params, (losses, norms) = train(params, key_train)
    assert np.isfinite(norms).all()
    assert np.mean(losses[-20:]) < 0.7 * np.mean(losses[:10])

    @jax.jit
    def spread(params, key):
        x0, x1 = gathering(key)
        made = integrate(partial(interacting_velocity, params), x0, solver="heun", n_steps=8)
        return x0, x1, made

    x0, x1, made = map(np.asarray, spread(params, jax.random.key(9)))
    assert np.isfinite(made).all()
    assert ((made - x1) ** 2).mean() < 0.8 * ((x0 - x1) ** 2).mean()


# ---------------------------------------------------------------- perturb, then develop


@pytest.mark.parametrize("name", ["scdfm", "perturbdiff"])
def test_a_perturbed_population_develops(name):
    """Cells in genes, perturbed by one model, go through the PCA of another, which simulates them: one program."""
    perturb = {"scdfm": of_scdfm, "perturbdiff": of_perturbdiff}[name]
    init, config = {"scdfm": (scdfm.init, SCDFM), "perturbdiff": (perturbdiff.init, PERTURBDIFF)}[name]
    names = tuple(f"g{i}" for i in range(N_GENES))
    cells = np.random.default_rng(0).exponential(size=(30, N_GENES)).astype(np.float32)
    to_latent = fit(Preprocess(n_components=N_DIMS, library_size=None, log1p=False), cells, names, "lognormalised")
    mean, std, components = (jnp.asarray(a, jnp.float32) for a in (to_latent.mean, to_latent.std, to_latent.components))
    params = {
        "perturb": awake(init(jax.random.key(1), config), jax.random.key(2)),
        "develop": scimf.init(jax.random.key(3), SCIMF),
    }
    if name == "scdfm":  # with so much noise an untrained velocity ends below zero, where all is cut off
        params["perturb"] = init(jax.random.key(1), config)
        params["perturb"]["velocity_head"]["output"]["bias"] += 3.0

    @jax.jit
    def both(params, x, key):
        key_perturb, key_develop = jax.random.split(key)
        perturbed = perturb(params["perturb"], x, key_perturb)
        x0 = ((perturbed - mean[None]) / std[None]) @ components.T
        return perturbed, scimf.simulate(params["develop"], x0, TS, key_develop, config=SCIMF).x

    key = jax.random.key(4)
    perturbed, path = both(params, control(), key)
    assert path.shape == (len(TS), N_CELLS, N_DIMS)
    assert np.isfinite(path).all()
    np.testing.assert_allclose(path[0], to_latent.apply(np.asarray(perturbed), names), atol=1e-4)
    assert np.abs(perturbed - control()).max() > 1e-2
    key_perturb, key_develop = jax.random.split(key)
    x0 = jnp.asarray(to_latent.apply(np.asarray(perturb(params["perturb"], control(), key_perturb)), names))
    apart = scimf.simulate(params["develop"], x0, TS, key_develop, config=SCIMF).x
    np.testing.assert_allclose(path, apart, rtol=1e-3, atol=1e-4)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(both(p, control(), key)[1][-1] ** 2)))(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    of_first = jax.tree.leaves(grads["perturb"])
    assert max(np.abs(g).max() for g in of_first) > 0  # the end of the path tells the first model


# ---------------------------------------------------------------- gradients of what a population becomes


def to_x64(params):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)


OBJECTIVES = {
    "energy_distance": energy_distance,
    "mmd2": lambda x, y: mmd2(x, y, median_bandwidths(y)),
    "sinkhorn_divergence": partial(sinkhorn_divergence, blur=0.5, threshold=1e-7),
}


def assert_gradients(population_of, at, target):
    """Of every distance between what comes out and the target, along a random direction: central differences in
    float64, whose error is about h^2. One program gives all of it.
    """

    def objectives(at):
        made = population_of(at)
        return jnp.stack([distance(made, target) for distance in OBJECTIVES.values()])

    program = jax.jit(lambda at: (objectives(at), jax.jacrev(objectives)(at)))
    direction = jax.random.normal(jax.random.key(11), at.shape, at.dtype)
    h = 1e-5
    values, gradients = program(at)
    measured = (program(at + h * direction)[0] - program(at - h * direction)[0]) / (2 * h)
    along = jnp.sum(gradients * direction[None], axis=tuple(range(1, gradients.ndim)))
    assert np.isfinite(values).all()
    assert np.abs(along).min() > 1e-4  # of gradients that are there
    np.testing.assert_allclose(along, measured, rtol=1e-3)


def test_gradient_through_simulate_to_the_first_cells(x64):
    params = to_x64(scimf.init(jax.random.key(0), SCIMF))
    target = jax.random.normal(jax.random.key(1), (7, N_DIMS), jnp.float64) + 1.0
    x0 = jax.random.normal(jax.random.key(3), (N_CELLS, N_DIMS), jnp.float64)
    end = lambda x0: scimf.simulate(params, x0, TS, jax.random.key(2), config=SCIMF).x[-1]  # noqa: E731
    assert_gradients(end, x0, target)


def test_gradient_through_a_flow_to_the_perturbation(x64):
    params = to_x64(awake(scdfm.init(jax.random.key(0), SCDFM), jax.random.key(1)))
    x = control(jnp.float64)
    start = jax.random.normal(jax.random.key(2), x.shape, jnp.float64)
    bound = {"constants": GRAPH, "config": SCDFM, "x0": start, "n_steps": 2, "solver": "heun"}

    def end(embedding):
        told = jnp.broadcast_to(embedding[None], (N_CELLS, SCDFM.d_model))
        # before the cut at zero, where a difference quotient would see the corner
        return scdfm.sample(params, x, told, GENES, None, **bound, trajectory=True)[-1]

    ids = jnp.array([[5]], jnp.int32)
    assert_gradients(end, scdfm.perturbation_embedding(params, ids, constants=GRAPH, config=SCDFM)[0], x + 0.5)


def test_gradient_through_a_diffusion_to_the_covariates(x64):
    params = to_x64(awake(perturbdiff.init(jax.random.key(0), PERTURBDIFF), jax.random.key(1)))
    x, bound = control(jnp.float64), {"constants": NOTHING, "config": PERTURBDIFF}
    start = jax.random.normal(jax.random.key(2), (1, *x.shape), jnp.float64)

    def end(embedding):
        return perturbdiff.sample(params, x[None], embedding, jax.random.key(4), **bound, start=start, n_steps=3)[0]

    ids = {"perturbation": jnp.array([1])}
    assert_gradients(end, perturbdiff.covariate_embedding(params, ids, **bound), x + 0.5)


# ---------------------------------------------------------------- which perturbation was it?

# A perturbation has a vector (a, b), told as (a, b, 1), and moves all cells by a linear map of it.
MAP = 2 * np.linalg.qr(np.random.default_rng(0).normal(size=(3, 2)))[0].T
ANGLES = np.pi / 3 * np.arange(6)
CANDIDATES = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1)  # training sees none of them
OF_VECTORS = scdfm.Config(
    n_tokens=3,
    n_vector=3,
    perturbation="vector",
    d_model=16,
    n_layers=1,
    n_heads=2,
    graph_heads=2,
    dropout=0.0,
    gamma=0.0,
    fusion="differential_transformer",
)
TOKENS = jnp.arange(3, dtype=jnp.int32)


def cells_of(vectors, rng):
    """One cell of each perturbation, three genes."""
    return jnp.asarray(5 + vectors @ MAP + 0.4 * rng.normal(size=(len(vectors), 3)), jnp.float32)


def told(vectors):
    return jnp.concatenate([jnp.asarray(vectors, jnp.float32), jnp.ones((len(vectors), 1))], axis=1)


@pytest.fixture(scope="module")
def trained_on_vectors():
    """The loss of scDFM in a plain optax loop: parameters, what is bound to them, and the loss of every step."""
    rng = np.random.default_rng(1)
    vectors = rng.uniform(-1.2, 1.2, size=(30, 2))
    n_cells, n_steps = 8, 400
    constants = scdfm.Constants(TOKENS[:, None], told(vectors))
    ids = rng.integers(30, size=(n_steps, 8, 1))
    targets = cells_of(np.repeat(vectors[ids.ravel()], n_cells, axis=0), rng).reshape(n_steps, 8, n_cells, 3)
    sources = cells_of(np.zeros((n_steps * 8 * n_cells, 2)), rng).reshape(targets.shape)
    tx = optax.adam(optax.cosine_decay_schedule(6e-3, n_steps))

    @jax.jit
    def train(params, key):
        def step(state, at):
            params, opt_state = state
            source, target, perturbation, key = at
            batch = PairedBatch(source=source, target=target, perturbation=perturbation, genes=TOKENS)
            loss = partial(scdfm.loss, constants=constants, config=OF_VECTORS)
            (value, _), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, key)
            updates, opt_state = tx.update(grads, opt_state)
            return (optax.apply_updates(params, updates), opt_state), value

        batches = (sources, targets, jnp.asarray(ids, jnp.int32), jax.random.split(key, n_steps))
        (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), batches)
        return params, losses

    params, losses = train(scdfm.init(jax.random.key(0), OF_VECTORS), jax.random.key(1))
    return params, constants, losses


def test_a_loss_of_ours_in_a_plain_optax_loop(trained_on_vectors):
    losses = trained_on_vectors[2]
    assert np.isfinite(losses).all()
    assert np.mean(losses[-20:]) < 0.3 * np.mean(losses[:20])


@pytest.fixture(scope="module")
def rankers(trained_on_vectors):
    """(energy distance of each candidate's cells to a target, the vector whose cells gradients bring nearest)."""
    params, constants, _ = trained_on_vectors
    source = cells_of(np.zeros((32, 2)), np.random.default_rng(2))
    bound = {"constants": constants, "config": OF_VECTORS, "n_steps": 4, "solver": "heun"}

    def distance(vector, target):
        embedding = scdfm.embed_vectors(params, jnp.append(vector, 1.0)[None], config=OF_VECTORS)
        of_cells = jnp.broadcast_to(embedding, (len(source), OF_VECTORS.d_model))
        made = scdfm.sample(params, source, of_cells, TOKENS, jax.random.key(4), **bound)
        return energy_distance(made, target)

    @jax.jit
    def brute_force(target):
        return jax.lax.map(lambda vector: distance(vector, target), jnp.asarray(CANDIDATES, jnp.float32))

    @jax.jit
    def by_gradient(target):
        tx = optax.adam(optax.cosine_decay_schedule(0.15, 25))

        def step(state, _):
            vector, opt_state = state
            value, grads = jax.value_and_grad(distance)(vector, target)
            updates, opt_state = tx.update(grads, opt_state)
            return (optax.apply_updates(vector, updates), opt_state), value

        start = jnp.zeros(2)
        (vector, _), values = jax.lax.scan(step, (start, tx.init(start)), None, length=25)
        return vector, values

    return brute_force, by_gradient


@pytest.mark.parametrize("truth", range(len(CANDIDATES)))
def test_which_perturbation_brings_this_population_nearest_to_that_one(rankers, truth):
    """Cells of a perturbation that training never saw: descent on its vector through the sampler ranks the candidates
    by their distance to where it ends, and the first is the one that trying all of them finds.
    """
    brute_force, by_gradient = rankers
    target = cells_of(np.repeat(CANDIDATES[[truth]], 64, axis=0), np.random.default_rng([3, truth]))
    distances = np.asarray(brute_force(target))
    vector, values = map(np.asarray, by_gradient(target))
    from_end = np.linalg.norm(CANDIDATES - vector[None], axis=1)
    assert distances.argmin() == truth
    assert from_end.argmin() == truth
    assert np.delete(from_end, truth).min() > from_end[truth] + 0.2  # candidates lie 1 apart
    assert values[-1] < 0.3 * values[0]


# ---------------------------------------------------------------- a network that is not ours


@pytest.mark.parametrize(
    "loss",
    [
        energy_distance,
        partial(annealed_sinkhorn_divergence, blur=0.1),
        lambda x, y: mmd2(x, y, jnp.array([0.5, 2.0])),
    ],
    ids=["energy_distance", "annealed_sinkhorn_divergence", "mmd2"],
)
def test_our_losses_train_an_equinox_model(loss):
    """A map of noise onto a population, its distance as the loss of an ordinary equinox and optax step."""
    target = jax.random.normal(jax.random.key(0), (48, 2)) * jnp.array([[0.3, 1.0]]) + jnp.array([[1.5, -1.0]])
    model = eqx.nn.MLP(2, 2, 16, 1, key=jax.random.key(1))
    tx = optax.adam(2e-2)

    @eqx.filter_jit
    def train(model, key):
        arrays, static = eqx.partition(model, eqx.is_array)

        def step(state, key):
            arrays, opt_state = state
            noise = jax.random.normal(key, (48, 2))
            of = lambda arrays: loss(jax.vmap(eqx.combine(arrays, static))(noise), target)  # noqa: E731
            value, grads = jax.value_and_grad(of)(arrays)
            updates, opt_state = tx.update(grads, opt_state)
            return (eqx.apply_updates(arrays, updates), opt_state), value

        keys = jax.random.split(key, 150)
        (arrays, _), values = jax.lax.scan(step, (arrays, tx.init(arrays)), keys)
        return eqx.combine(arrays, static), values

    trained, values = train(model, jax.random.key(2))
    assert np.isfinite(values).all()
    assert np.mean(values[-10:]) < 0.3 * np.mean(values[:5])
    made = jax.vmap(trained)(jax.random.normal(jax.random.key(3), (500, 2)))
    np.testing.assert_allclose(made.mean(axis=0), target.mean(axis=0), atol=0.4)
