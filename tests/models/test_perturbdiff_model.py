"""What diffusion over sets of cells promises: sets without order, filler that is not there, nothing cheap but exact.

Where two computations are the same mathematics in another order, they agree to 1e-5 of values of size 1: float32
rounds at 6e-8, and a hundred roundings of two layers and a loss add up to less.
"""

import inspect
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scjax.batches import CellSetBatch
from scjax.kernels import median_bandwidths
from scjax.losses import energy_distance, mmd2
from scjax.models import perturbdiff
from scjax.models.perturbdiff import Coins, Config, Constants
from scjax.processes.diffusion import ddim_step, diffuse, make_schedule, set_noise, spaced

# Compiling is nearly all the time these tests take; without LLVM's optimisations it is half of that.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

N_SETS, N_CELLS, N_GENES = 3, 5, 7
TINY = Config(
    n_genes=N_GENES,
    n_perturbations=4,
    n_cell_types=3,
    n_batches=2,
    d_model=8,
    n_layers=2,
    n_heads=2,
    d_covariate=4,
    divisor=2.0,
)
TOKENS = replace(TINY, attention="tokens", block="sequential")
KINDS = pytest.mark.parametrize("config", [TINY, TOKENS], ids=["features", "tokens"])
VECTORS = Constants(*(jnp.asarray(np.random.default_rng(i).normal(size=(4, 3)), jnp.float32) for i in range(2)))
COVARIATES = {
    "perturbation": jnp.array([1, 3, 2], jnp.int32),
    "cell_type": jnp.array([0, 2, 2], jnp.int32),
    "batch": jnp.array([1, 0, 1], jnp.int32),
}
T = jnp.array([3, 420, 990], jnp.int32)
NEVER = Coins(*(jnp.zeros(N_SETS, bool) for _ in range(3)))


def cells(seed=0, shape=(N_SETS, N_CELLS, N_GENES)):
    """Expression: zeros, and values around 1."""
    x = np.random.default_rng(seed).normal(size=shape) + 0.5
    return jnp.asarray(np.maximum(x, 0), jnp.float32)


def noise(seed=1, shape=(N_SETS, N_CELLS, N_GENES)):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@cache
def params_of(config):
    """Random parameters of the tree that `init` gives, none of them zero, so that no gate is shut."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        values = rng.normal(size=leaf.shape)
        if path[-1].key == "scale":
            return jnp.asarray(1 + 0.2 * values, jnp.float32)
        return jnp.asarray(0.8 * values / (leaf.shape[-2] ** 0.5 if leaf.ndim > 1 else 2), jnp.float32)

    tree = jax.eval_shape(partial(perturbdiff.init, config=config), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, tree)


def a_batch(mask=None, **changes):
    whole = jnp.ones((N_SETS, N_CELLS), bool)
    batch = CellSetBatch(cells=cells(2), control=cells(3), covariates=COVARIATES, mask=whole if mask is None else mask)
    return replace(batch, **changes)


def per_cell(covariates):
    return {role: jnp.tile(ids[:, None], (1, N_CELLS)) for role, ids in covariates.items()}


def coins(condition=(0, 0, 0), control=(0, 0, 0), shown=(0, 0, 0)):
    return Coins(*(jnp.array(c, bool) for c in (condition, control, shown)))


denoise = jit(partial(perturbdiff.denoise, constants=VECTORS), static_argnames="config")
loss = jit(partial(perturbdiff.loss, constants=VECTORS), static_argnames="config")
loss_at = jit(partial(perturbdiff.loss_at, constants=VECTORS), static_argnames="config")
grad_at = jit(
    jax.value_and_grad(partial(perturbdiff.loss_at, constants=VECTORS), has_aux=True), static_argnames="config"
)  # the loss, its terms, and the gradient
sample = jit(
    partial(perturbdiff.sample, constants=VECTORS),
    static_argnames=("config", "n_steps", "sampler", "spacing", "guidance", "eta", "cutoff", "trajectory"),
)


def prediction(config, *, x=None, control=None, covariates=COVARIATES, x0_prev=None, t=T, **options):
    """Of the usual sets, but for what is given."""
    x, control = noise() if x is None else x, cells() if control is None else control
    params = params_of(options.pop("of", config))
    return denoise(params, x, t, control, covariates, x0_prev, config=config, **options)


def assert_same(got, want, atol=1e-5):
    """To atol times the largest value, or atol itself where values are small."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol * max(1, np.abs(b).max(initial=0))), got, want
    )


def assert_differ(a, b):
    assert np.abs(np.asarray(a) - np.asarray(b)).max() > 1e-3


# -- symmetries


@KINDS
def test_cells_have_no_order(config):
    """Relabelled together with their controls, cells and nothing else are relabelled; and all inputs matter."""
    out, previous = prediction(config, x0_prev=cells(4)), cells(4)
    assert (np.asarray(out) > 0).any()
    perm = np.array([3, 0, 4, 1, 2])
    moved = prediction(config, x=noise()[:, perm], control=cells()[:, perm], x0_prev=previous[:, perm])
    assert_same(moved, out[:, perm])
    for other in (
        dict(x=noise(9)),
        dict(control=cells(9)),
        dict(x0_prev=None),
        dict(t=T[::-1]),
        dict(covariates=None),
        *(dict(covariates=COVARIATES | {role: COVARIATES[role] * 0 + 1}) for role in COVARIATES),
    ):
        assert_differ(prediction(config, **{"x0_prev": previous, **other}), out)


def test_controls_have_no_order_among_themselves_where_all_see_all():
    perm = np.array([3, 0, 4, 1, 2])
    assert_same(prediction(TOKENS, control=cells()[:, perm]), prediction(TOKENS))
    assert_differ(prediction(TINY, control=cells()[:, perm]), prediction(TINY))


def test_sets_do_not_see_each_other():
    """What stands in the other sets is without influence, bit for bit."""
    out = prediction(TINY)
    x, control = noise().at[1:].set(3), cells().at[1:].set(2)
    covariates = {role: ids.at[1:].set(0) for role, ids in COVARIATES.items()}
    others = prediction(TINY, x=x, control=control, covariates=covariates, t=T.at[1:].set(5))
    np.testing.assert_array_equal(others[0], out[0])
    assert_differ(others[1:], out[1:])


# -- filler


@pytest.mark.parametrize("config", [TINY, replace(TOKENS, distance="gaussian")], ids=["features", "tokens"])
def test_filler_is_as_good_as_absent(config):
    """Loss, terms and gradient of a set with two fillers are those of its three cells alone."""
    params = params_of(config)
    keep = jnp.array([0, 2, 3])
    mask = jnp.zeros((1, N_CELLS), bool).at[:, keep].set(True)
    one = lambda a: a[:1]  # noqa: E731
    first = jax.tree.map(one, a_batch(mask=jnp.tile(mask, (N_SETS, 1))))
    part = replace(first, cells=first.cells[:, keep], control=first.control[:, keep], mask=first.mask[:, keep])
    z, shown = noise()[:1], jax.tree.map(one, coins(shown=(1, 1, 1)))
    whole, alone = ((first, T[1:2], z, shown), (part, T[1:2], z[:, keep], shown))
    got = grad_at(params, *whole, config=config)
    assert_same(got, grad_at(params, *alone, config=config))
    seen = loss_at(params, *whole, config=replace(config, mask_filler=False))
    assert_differ(seen[0], got[0][0])
    full = replace(first, mask=jnp.ones_like(mask))
    assert_same(seen, grad_at(params, full, *whole[1:], config=config)[0])


def test_filler_is_not_attended_to_while_denoising():
    mask = jnp.ones((N_SETS, N_CELLS), bool).at[1, 3:].set(False)
    out = prediction(TINY, mask=mask)
    changed = prediction(TINY, mask=mask, x=noise().at[1, 3:].set(7), control=cells().at[1, 3:].set(5))
    np.testing.assert_array_equal(changed[1, :3], out[1, :3])
    assert_same(prediction(TINY, mask=jnp.ones_like(mask)), prediction(TINY))


# -- covariates


@KINDS
def test_what_a_set_shares_is_computed_once(config):
    """Covariates, and with them all modulations, once a set, are those of each of its cells."""
    assert_same(prediction(config, covariates=per_cell(COVARIATES)), prediction(config))
    mixed = COVARIATES | {"batch": per_cell(COVARIATES)["batch"]}
    assert_same(prediction(config, covariates=mixed), prediction(config))
    args, params = (T, noise(), coins(condition=(1, 0, 0), shown=(1, 1, 0))), params_of(config)
    of_cells = a_batch(covariates=per_cell(COVARIATES))
    assert_same(grad_at(params, of_cells, *args, config=config), grad_at(params, a_batch(), *args, config=config))


def test_a_covariate_of_one_cell_moves_that_cell_most():
    """Cells of several batches in one set: with equal values they differ by their covariate alone."""
    same = jnp.ones((N_SETS, N_CELLS, N_GENES))
    ids = per_cell(COVARIATES) | {"batch": jnp.zeros((N_SETS, N_CELLS), jnp.int32).at[:, 2].set(1)}
    out = np.asarray(prediction(TINY, x=same, control=same, covariates=ids))
    others = np.delete(out, 2, axis=1)
    assert_same(others, np.broadcast_to(others[:, :1], others.shape))
    assert_differ(out[:, 2], out[:, 0])


def test_hidden_covariates_are_the_null_condition():
    """In the loss, set by set; and an embedding is as good as the ids it was made of."""
    params = params_of(TINY)
    embedding = perturbdiff.covariate_embedding(params, COVARIATES, constants=VECTORS, config=TINY)
    assert embedding.shape == (N_SETS, 1, N_GENES)
    assert_same(prediction(TINY, covariates=embedding), prediction(TINY))
    x0 = a_batch().cells / TINY.divisor
    x_t = diffuse(make_schedule("linear"), x0, T, noise())
    out = [prediction(TINY, x=x_t, control=a_batch().control / TINY.divisor, covariates=c) for c in (COVARIATES, None)]
    want = [np.mean((np.asarray(out[h][i]) - x0[i]) ** 2) for i, h in enumerate((0, 1, 0))]
    _, terms = loss_at(params, a_batch(), T, noise(), coins(condition=(0, 1, 0)), config=TINY)
    assert_same(terms["denoising"], np.mean(want))


@pytest.mark.parametrize(
    "changes",
    [
        dict(perturbation="vector", n_perturbation_features=3, cell_type="vector", n_cell_type_features=3),
        dict(perturbation="none", cell_type="none", batch="none"),
        dict(n_doses=4, batch="none", covariate_width="model"),
        dict(covariate_width=5),
    ],
    ids=["vectors", "none", "dose", "width"],
)
def test_covariates_in_other_forms(changes):
    """Written out: entries and projected vectors side by side, through one linear layer."""
    config = replace(TINY, **changes)
    params, covariates = params_of(config), COVARIATES | {"dose": jnp.array([3, 0, 1], jnp.int32)}
    p, parts = jax.tree.map(np.asarray, params["covariates"]), []
    for role in ("perturbation", "dose", "cell_type", "batch"):
        kind = getattr(config, role, "table" if config.n_doses else "none")
        if kind == "vector":
            table = VECTORS[("perturbation", "cell_type").index(role)]
            parts.append(np.asarray(table)[covariates[role]] @ p[role]["kernel"] + p[role]["bias"])
        elif kind == "table":
            parts.append(p[role]["embedding"][covariates[role]])
        elif role == "perturbation":
            parts.append(np.tile(p[role]["embedding"], (N_SETS, 1)))
    want = np.concatenate(parts, axis=1) @ p["joined"]["kernel"] + p["joined"]["bias"]
    got = perturbdiff.covariate_embedding(params, covariates, constants=VECTORS, config=config)
    assert got.shape[-1] == {"genes": N_GENES, "model": 8}.get(config.covariate_width, config.covariate_width)
    assert_same(jnp.broadcast_to(got[:, 0], want.shape), want)
    out = prediction(config, covariates=covariates)
    assert out.shape == (N_SETS, N_CELLS, N_GENES)
    assert_differ(out, prediction(config, covariates=None))


def test_an_unknown_id_is_no_number():
    beyond = COVARIATES | {"perturbation": jnp.array([1, 4, 2], jnp.int32)}
    out = prediction(TINY, covariates=beyond)
    assert np.isnan(out[1]).all()
    assert np.isfinite(out[::2]).all()


# -- layers


def split(x, heads):
    return x.reshape(len(x), heads, -1).swapaxes(0, 1)


def test_attention_over_tokens_and_a_sequential_block_written_out():
    """Both streams side by side, in NumPy; the last layer gives the cells' stream what a full layer gives it."""
    config, d, n = TOKENS, TOKENS.d_model, 4
    rng = np.random.default_rng(3)
    x, control, c = (rng.normal(size=(rows, d)) for rows in (n, n, 1))
    full = perturbdiff.Layer(config, False)
    whole = lambda m, x, y, c: m(x, y, m.of_condition(c), None)  # noqa: E731
    float32 = [jnp.asarray(a, jnp.float32) for a in (x, control, c)]
    shapes = full.init(jax.random.key(0), *float32, method=whole)["params"]
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) * 0.4, jnp.float32), shapes)
    p = jax.tree.map(np.asarray, params)
    dense = lambda at, x: x @ at["kernel"] + at["bias"]  # noqa: E731
    norm = lambda x: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)  # noqa: E731
    rms = lambda at, x: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * at["scale"]  # noqa: E731
    gelu = lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))  # noqa: E731
    mods = [np.split(dense(p[m], c / (1 + np.exp(-c))), 6, axis=-1) for m in ("modulation", "control_modulation")]
    q, k, v = [], [], []
    for name, stream, (shift, scale, *_) in zip(("", "control_"), (x, control), mods, strict=True):
        a = p["attention"]
        parts = np.split(dense(a[f"{name}joined"], norm(stream) * (1 + scale) + shift), 3, axis=-1)
        heads = [split(part, config.n_heads) for part in parts]
        q.append(rms(a[f"{name}query_norm"], heads[0]))
        k.append(rms(a[f"{name}key_norm"], heads[1]))
        v.append(heads[2])
    q, k, v = (np.concatenate(part, axis=1) for part in (q, k, v))
    logits = q @ k.swapaxes(1, 2) / np.sqrt(d // config.n_heads)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    received = (weights @ v).swapaxes(0, 1).reshape(2 * n, d)
    want = []
    for name, stream, part, (_, _, gate1, shift, scale, gate2) in zip(
        ("", "control_"), (x, control), np.split(received, 2), mods, strict=True
    ):
        stream = stream + gate1 * dense(p["attention"][f"{name}output"], part)
        z, at = norm(stream) * (1 + scale) + shift, p[f"{name}feedforward"]
        want.append(stream + gate2 * dense(at["Dense_1"], gelu(dense(at["Dense_0"], z))))
    assert_same(full.apply({"params": params}, *float32, method=whole), tuple(want))
    names = ("control_joined", "control_modulation")
    last = {name: value for name, value in params.items() if name != "control_feedforward"}
    last["attention"] = {
        k: v for k, v in last["attention"].items() if k not in ("control_output", "control_query_norm")
    }
    last["attention"]["control_joined"] = jax.tree.map(lambda a: a[..., d:], last["attention"]["control_joined"])
    last["control_modulation"] = jax.tree.map(lambda a: a[..., : 2 * d], last["control_modulation"])
    assert all(name in (*last, *last["attention"]) for name in names)
    got, nothing = perturbdiff.Layer(config, True).apply({"params": last}, *float32, method=whole)
    assert nothing is None
    assert_same(got, want[0])


def test_block_and_attention_are_choices():
    for change in (dict(block="sequential"), dict(class_silu=True)):
        assert_differ(prediction(replace(TINY, **change), of=TINY), prediction(TINY))


def test_a_gene_space_has_its_own_projections():
    """Sets of space 1 among sets of space 0 are what a model with that projection alone makes of them."""
    config = replace(TINY, n_spaces=2)
    params, space = params_of(config), jnp.array([0, 1, 0])
    out = prediction(config, space=space)
    for own in (0, 1):
        inputs = {k: v if k == "gene" else v[own : own + 1] for k, v in params["inputs"].items()}
        alone = denoise(params | {"inputs": inputs}, noise(), T, cells(), COVARIATES, config=TINY)
        at = np.asarray(space) == own
        assert_same(out[at], alone[at])
    assert_differ(alone[0], out[0])


def test_genes_that_were_not_measured_are_neither_read_nor_compared():
    measured = jnp.ones((N_SETS, N_GENES), bool).at[1, 2:4].set(False)
    batch = a_batch(measured=measured)
    other = replace(batch, cells=batch.cells.at[1, :, 2:4].set(9), control=batch.control.at[1, :, 2:4].set(4))
    args = T, noise(), coins(shown=(0, 1, 0))
    params = params_of(TINY)
    got = loss_at(params, batch, *args, config=TINY)
    assert_same(loss_at(params, other, *args, config=TINY), got)
    # The error is a mean over the genes that count: prediction and truth without the others, set by set.
    x0 = batch.cells / TINY.divisor * measured[:, None]
    x_t = diffuse(make_schedule("linear"), x0, T, noise())
    see = partial(prediction, TINY, x=x_t, control=batch.control / TINY.divisor, measured=measured)
    out = see(x0_prev=jnp.where(jnp.arange(N_SETS)[:, None, None] == 1, see(), 0))
    kept = [np.flatnonzero(m) for m in np.asarray(measured)]
    squared = [np.mean((np.asarray(out[i]) - x0[i])[:, genes] ** 2) for i, genes in enumerate(kept)]
    distances = [energy_distance(out[i][:, genes], x0[i][:, genes]) for i, genes in enumerate(kept)]
    assert_same(got[1], {"denoising": np.mean(squared), "energy_distance": np.mean(distances)})


def test_the_start_is_as_published():
    """Modulations of zero: a prediction that neither time nor covariates move; matrices within Xavier's bounds."""
    config = replace(TINY, d_model=64, n_heads=4)
    params = jit(perturbdiff.init, static_argnames="config")(jax.random.key(1), config=config)
    out = denoise(params, noise(), T, cells(), COVARIATES, config=config)
    again = denoise(params, noise(), T[::-1], cells(9), None, config=config)
    np.testing.assert_array_equal(out, again)
    d, g = 64, N_GENES
    last = params["layer_1"]
    for kernel, (n_in, n_out) in (
        (params["inputs"]["state"], (2 * g, d)),
        (params["inputs"]["control"], (2 * g, d)),
        (last["attention"]["joined"]["kernel"], (2 * d, 6 * d)),
        (last["attention"]["output"]["kernel"], (2 * d, 2 * d)),  # of which it is the half
        (params["head"]["output"]["kernel"], (d, g)),
    ):
        bound = np.sqrt(6 / (n_in + n_out))
        assert 0.95 * bound < np.abs(kernel).max() <= bound
    assert last["attention"]["output"]["kernel"].shape == (2 * d, d)
    assert last["control_modulation"]["kernel"].shape == (d, 2 * d)
    assert "control_feedforward" not in last
    for zeros in (
        last["modulation"]["kernel"],
        params["head"]["modulation"]["kernel"],
        last["attention"]["joined"]["bias"],
    ):
        assert not np.any(zeros)
    time = params["time"]["mlp"]["Dense_0"]["kernel"]
    assert abs(np.std(time) - 0.02) < 5 * 0.02 / np.sqrt(2 * time.size)


# -- the loss


@pytest.mark.parametrize("distance", ["energy", "gaussian"])
def test_the_loss_is_its_formula(distance):
    """Written out with `denoise`: each set's coins, first guess and terms."""
    config = replace(TINY, distance=distance, denoising_weight=0.5, energy_weight=0.3)
    batch, params = a_batch(), params_of(TINY)
    thrown = coins(condition=(1, 0, 0), control=(0, 1, 0), shown=(1, 0, 1))
    x0, control = batch.cells / config.divisor, batch.control / config.divisor
    x_t = diffuse(make_schedule("linear"), x0, T, noise())
    control = control.at[1].set(0)
    embedding = perturbdiff.covariate_embedding(params, COVARIATES, constants=VECTORS, config=config)
    squared, distances = [], []
    for i in range(N_SETS):
        covariates = None if i == 0 else embedding[i : i + 1]
        one = (x_t[i : i + 1], T[i : i + 1], control[i : i + 1], covariates)
        first = denoise(params, *one, config=config)
        out = denoise(params, *one, first if i != 1 else None, config=config)[0]
        squared.append(np.mean((np.asarray(out) - x0[i]) ** 2))
        if distance == "energy":
            distances.append(energy_distance(x0[i], out))
        else:
            distances.append(mmd2(x0[i], out, median_bandwidths(x0[i]), unbiased=False) / 2)
    total, terms = loss_at(params, batch, T, noise(), thrown, config=config)
    assert_same(terms, {"denoising": np.mean(squared), f"{distance}_distance": np.mean(distances)})
    assert_same(total, 0.5 * np.mean(squared) + 0.3 * np.mean(distances))


def test_a_term_of_weight_zero_is_left_out():
    args = params_of(TINY), a_batch(), T, noise(), NEVER
    whole, terms = loss_at(*args, config=TINY)
    assert_same(whole, sum(terms.values()))
    for name, other in (("denoising", "energy_distance"), ("energy", "denoising")):
        total, left = loss_at(*args, config=replace(TINY, **{f"{name}_weight": 0.0}))
        assert set(left) == {other}
        assert_same(total, terms[other])


def test_the_first_guess_has_no_gradient():
    """The gradient is that of the second pass with its guess as a number."""
    batch, params = a_batch(), params_of(TINY)
    x_t = diffuse(make_schedule("linear"), batch.cells / TINY.divisor, T, noise())

    def second_pass(params, guess):
        out = perturbdiff.denoise(
            params, x_t, T, batch.control / TINY.divisor, COVARIATES, guess, constants=VECTORS, config=TINY
        )
        x0 = batch.cells / TINY.divisor
        return jnp.mean((out - x0) ** 2) + jnp.mean(jax.vmap(energy_distance)(x0, out))

    guess = prediction(TINY, x=x_t, control=batch.control / TINY.divisor)
    _, got = grad_at(params, batch, T, noise(), coins(shown=(1, 1, 1)), config=TINY)
    assert_same(got, jit(jax.grad(second_pass))(params, guess))


@pytest.mark.parametrize("changes", [{}, {"drop_per": "batch"}, {"shared_noise": 0.6, "self_conditioning": 0.3}])
def test_the_loss_is_loss_at_its_draws(changes):
    """Times, noise and coins from a key in three; whichever sets the first pass was made for."""
    config, params, batch = replace(TINY, **changes), params_of(TINY), a_batch()
    for seed in range(4):
        key = jax.random.key(seed)
        key_t, key_noise, key_coins = jax.random.split(key, 3)
        t = jax.random.randint(key_t, (N_SETS,), 0, 1000)
        z = set_noise(key_noise, batch.cells.shape, config.shared_noise)
        thrown, _ = perturbdiff._toss(key_coins, N_SETS, config)
        assert_same(loss(params, batch, key, config=config), loss_at(params, batch, t, z, thrown, config=config))


@pytest.mark.parametrize("per", ["set", "batch"])
@pytest.mark.parametrize("chance", [0.0, 0.3, 0.5, 1.0])
def test_coins_fall_as_often_as_they_should(per, chance):
    """Each set's share over many keys, within five standard errors; per set, a first pass for just so many sets."""
    config = replace(TINY, drop_per=per, condition_dropout=chance, control_dropout=chance / 2, self_conditioning=chance)
    n_sets, n_keys = 5, 2000
    toss = jax.jit(jax.vmap(lambda key: perturbdiff._toss(key, n_sets, config)[0]))
    sets = jax.jit(jax.vmap(lambda key: perturbdiff._toss(key, n_sets, config)[1].sets))
    keys = jax.random.split(jax.random.key(3), n_keys)
    thrown, chosen = toss(keys), sets(keys)
    is_certain = perturbdiff._toss(keys[0], n_sets, config)[1].is_certain
    for fallen, expected in zip(thrown, (chance, chance / 2, chance), strict=True):
        error = 5 * np.sqrt(expected * (1 - expected) / n_keys)
        np.testing.assert_allclose(np.mean(fallen, axis=0), expected, atol=error + 1e-9)
    agree = np.asarray(thrown.hide_condition[:, :1] == thrown.hide_condition)
    assert agree.all() == (per == "batch" or chance in (0.0, 1.0))
    shown = np.asarray(thrown.self_condition)
    assert not is_certain or shown.any(axis=1).all()
    if per == "set":
        assert set(np.unique(shown.sum(1))) <= {int(np.floor(chance * n_sets)), int(np.ceil(chance * n_sets))}
        assert chosen.shape == (n_keys, int(np.ceil(chance * n_sets)))
    passed = np.zeros_like(shown)
    np.put_along_axis(passed, np.asarray(chosen), True, axis=1)
    assert (passed | ~shown).all()


def test_less_memory_is_the_same_loss():
    args = params_of(TINY), a_batch(), T, noise(), coins(shown=(1, 0, 0))
    assert_same(grad_at(*args, config=replace(TINY, remat="layers")), grad_at(*args, config=TINY))


def test_bfloat16_is_the_same_to_two_digits():
    half = replace(TINY, compute_dtype="bfloat16")
    out = prediction(half, of=TINY, x0_prev=cells(4))
    assert out.dtype == jnp.float32
    scale = float(np.abs(prediction(TINY, x0_prev=cells(4))).max())
    np.testing.assert_allclose(out, prediction(TINY, x0_prev=cells(4)), atol=0.05 * scale)
    assert_differ(out, prediction(TINY, x0_prev=cells(4)))
    total, _ = loss_at(params_of(TINY), a_batch(), T, noise(), NEVER, config=half)
    np.testing.assert_allclose(total, loss_at(params_of(TINY), a_batch(), T, noise(), NEVER, config=TINY)[0], rtol=0.05)


# -- sampling


def draw(config=TINY, *, control=None, covariates=COVARIATES, seed=0, **options):
    control = cells(3) if control is None else control
    options = {"n_steps": 3, **options}
    return sample(params_of(TINY), control, covariates, jax.random.key(seed), config=config, **options)


@pytest.mark.parametrize("spacing", ["respaced", "truncated"])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_sampling_written_out(spacing, guidance):
    """Steps one by one with `denoise`: both branches apart, thresholds, the previous prediction in view."""
    params, control, start = params_of(TINY), cells(3) / TINY.divisor, noise(5)
    chain = spaced(make_schedule("linear"), 3, spacing)
    x, x0, want = start, jnp.zeros_like(start), []
    for index in (2, 1, 0):
        t = jnp.full(N_SETS, int(chain.times[index]), jnp.int32)
        conditional, without = (denoise(params, x, t, control, c, x0, config=TINY) for c in (COVARIATES, None))
        x0 = without + guidance * (conditional - without)
        x0 = jnp.where(x0 < 0.05, 0, x0)
        x = ddim_step(chain.schedule, x0, x, jnp.asarray(index))
        want.append((x, x0))
    got = draw(spacing=spacing, guidance=guidance, start=start, cutoff=0.05, trajectory=True)
    for i, (x, x0) in enumerate(want):
        assert_same(got.x[i], TINY.divisor * x, 3e-5)
        assert_same(got.x0[i], TINY.divisor * x0, 3e-5)
    assert_same(draw(spacing=spacing, guidance=guidance, start=start, cutoff=0.05), got.x[-1])


def test_randomness_of_a_run_is_the_key_s_or_the_given():
    """DDIM draws its start alone; with eta, and in DDPM, each step draws too, unless its noise is given."""
    assert_same(draw(), draw(), 0)
    assert_differ(draw(), draw(seed=1))
    fixed = dict(start=noise(5))
    assert_same(draw(**fixed), draw(**fixed, seed=1), 0)
    for noisy in (dict(eta=0.7), dict(sampler="ddpm")):
        assert_differ(draw(**fixed, **noisy), draw(**fixed, **noisy, seed=1))
        given = fixed | noisy | {"noise": noise(6, (3, N_SETS, N_CELLS, N_GENES))}
        assert_same(draw(**given), draw(**given, seed=1), 0)
    assert_differ(draw(**fixed), draw(**fixed, eta=0.7))


def test_a_guess_that_training_never_showed_is_not_read():
    blind = replace(TINY, self_conditioning=0.0)
    other = {**params_of(TINY), "inputs": {**params_of(TINY)["inputs"], "previous": jnp.zeros((1, N_GENES, 8))}}

    def sampled(params, config):
        options = {"constants": Constants(), "config": config, "n_steps": 3}
        return perturbdiff.sample(params, cells(3), COVARIATES, jax.random.key(0), **options)

    np.testing.assert_array_equal(sampled(params_of(TINY), blind), sampled(other, blind))
    assert_differ(sampled(params_of(TINY), TINY), sampled(other, TINY))


def test_guidance_has_nothing_to_add_without_covariates():
    assert_same(draw(covariates=None, guidance=3.0), draw(covariates=None, guidance=1.0), 0)
    assert_differ(draw(guidance=3.0), draw(guidance=1.0))


def test_samples_are_in_the_unit_of_the_controls():
    """A model with another divisor sees the same numbers where controls are scaled alike."""
    other = replace(TINY, divisor=4.0)
    assert_same(draw(other, control=2 * cells(3)), 2 * draw())


def test_filler_is_not_attended_to_while_sampling():
    mask = jnp.ones((N_SETS, N_CELLS), bool).at[1, 3:].set(False)
    fixed = dict(mask=mask, start=noise(5))
    changed = draw(**fixed | {"start": noise(5).at[1, 3:].set(4)}, control=cells(3).at[1, 3:].set(3))
    np.testing.assert_array_equal(changed[1, :3], draw(**fixed)[1, :3])


def test_gradients_go_through_a_run():
    total = lambda control: perturbdiff.sample(  # noqa: E731
        params_of(TINY), control, COVARIATES, jax.random.key(0), n_steps=2, constants=VECTORS, config=TINY
    ).sum()
    assert np.any(jit(jax.grad(total))(cells(3)))


# -- pretraining and finetuning

PRETRAINED = replace(TINY, perturbation="none", n_perturbations=None, n_spaces=3, control_dropout=1.0)


def actions(table):
    return {row.name: row.action for row in table}


def test_what_finetuning_keeps_and_draws_afresh():
    """Every array has a row; what is kept is the pretrained array, what is fresh is what `init` gives."""
    pretrained, key = params_of(PRETRAINED), jax.random.key(4)
    params, table = perturbdiff.transfer(key, pretrained, PRETRAINED, TINY, space=2)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, params_of(TINY))
    fresh, found = perturbdiff.init(key, TINY), actions(table)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    names = {".".join(k.key for k in path): leaf for path, leaf in leaves}
    assert set(names) == set(found)
    for name, leaf in names.items():
        first, *rest = name.split(".")
        old, new = pretrained, fresh
        for part in (first, *rest):
            old, new = old[part], new[part]
        if first == "head" or name.startswith("covariates.perturbation"):
            assert found[name].startswith("fresh"), name
            np.testing.assert_array_equal(leaf, new)
        elif first == "inputs" and name != "inputs.gene":
            assert found[name] == "kept (of space 2)"
            np.testing.assert_array_equal(leaf, old[2:])
        else:
            assert found[name] == "kept"
            np.testing.assert_array_equal(leaf, old)


def test_a_new_list_of_genes():
    """Input projections and head are new; covariates stay as wide as the old list."""
    config = replace(TINY, n_genes=4, covariate_width=N_GENES, cell_type="vector", n_cell_type_features=3)
    pretrained = params_of(PRETRAINED)
    params, table = perturbdiff.transfer(jax.random.key(4), pretrained, PRETRAINED, config, new_genes=True)
    found = actions(table)
    assert found["inputs.state"] == "fresh: new genes"
    assert found["inputs.gene"] == "kept"
    assert found["covariates.joined.kernel"] == "kept"
    assert found["covariates.cell_type.kernel"] == "fresh: cell types of another kind"
    assert found["covariates.cell_type.embedding"].startswith("left behind")
    out = denoise(params, noise()[..., :4], T, cells()[..., :4], COVARIATES, config=config)
    assert np.isfinite(out).all()


def test_a_transfer_that_does_not_fit_lists_all_of_it():
    config = replace(TINY, n_batches=5, n_genes=4)
    with pytest.raises(ValueError, match="do not fit the new model") as caught:
        perturbdiff.transfer(jax.random.key(0), params_of(TINY), TINY, config)
    for name in ("covariates.batch.embedding", "covariates.joined.kernel", "inputs.state", "condition.project.kernel"):
        assert name in str(caught.value)
    fresh = ("batch", "joined", "condition")
    _, table = perturbdiff.transfer(jax.random.key(0), params_of(TINY), TINY, config, new_genes=True, fresh=fresh)
    assert actions(table)["covariates.batch.embedding"] == "fresh: asked for"
    with pytest.raises(ValueError, match="fresh must be one of"):
        perturbdiff.transfer(jax.random.key(0), params_of(TINY), TINY, config, fresh=("heads",))
    for space in (None, 3):
        with pytest.raises(ValueError, match="space must say which of the 3 input projections"):
            perturbdiff.transfer(jax.random.key(0), params_of(PRETRAINED), PRETRAINED, TINY, space=space)


# -- external vectors


def test_a_table_of_vectors():
    vectors = np.arange(12, dtype=np.float32).reshape(4, 3) ** 2
    table = partial(perturbdiff.vector_table, ["ctrl", "b", "a", "b"], ["a", "b", "c", "d"], vectors)
    got = table(control="ctrl")
    np.testing.assert_array_equal(got[1:], vectors[[1, 0, 1]])
    np.testing.assert_allclose(got[0], vectors[[1, 0, 1]].mean(0))
    scalar = table(control="ctrl", control_vector="scalar_mean")
    np.testing.assert_allclose(scalar[0], vectors[[1, 0, 1]].sum() / 12)
    assert got.dtype == np.float32
    with pytest.raises(ValueError, match="1 names have no vector: 'ctrl'"):
        table(control="ctrl", control_vector="own")
    zeros = table(on_missing="zeros")
    np.testing.assert_array_equal(zeros[0], 0)
    with pytest.raises(ValueError, match="control must be one of the names; got 'ctlr'. Did you mean 'ctrl'"):
        table(control="ctlr")
    with pytest.raises(ValueError, match="known must name each of the 4 rows"):
        perturbdiff.vector_table(["a"], ["a", "a", "c", "d"], vectors)


# -- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(n_heads=3), "n_heads must divide 2 d_model"),
        (dict(n_heads=16, attention="tokens"), "n_heads must divide d_model"),
        (dict(condition_dropout=1.5), r"condition_dropout must lie in \[0, 1\]"),
        (dict(denoising_weight=0.0, energy_weight=0.0), "no loss"),
        (dict(covariate_width=0), "covariate_width must be at least 1"),
        (dict(n_times=10), "n_times of a linear schedule must be at least"),
        (dict(divisor=0.0), "divisor must be a positive number"),
        (dict(mlp_ratio=0.01), "mlp_ratio [*] d_model must be at least 1"),
    ],
)
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


@pytest.mark.parametrize("name", ["n_genes", "n_perturbations", "n_cell_types", "n_batches"])
def test_sizes_that_the_data_decide_are_asked_for(name):
    with pytest.raises(ValueError, match=f"{name} is None; the data decide it"):
        perturbdiff.init(jax.random.key(0), replace(TINY, **{name: None}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(control=cells()[:, :2]), "control must have the shape"),
        (dict(t=T[:2]), "t must have the shape"),
        (dict(mask=jnp.ones((N_SETS, 2), bool)), "mask must have the shape"),
        (dict(covariates={"perturbation": T}), "covariates must hold perturbation, cell_type, batch; got perturbation"),
        (dict(covariates=COVARIATES | {"batch": T[:2]}), r"covariates\['batch'\] must be one id a set or one a cell"),
        (dict(covariates=jnp.zeros((N_SETS, 1, 2))), "covariates given as vectors must have the shape"),
        (dict(config=replace(TINY, n_genes=5)), "cells must have n_genes=5 genes; got 7"),
        (dict(config=replace(TINY, n_spaces=2)), "space must say which of the n_spaces=2"),
        (dict(config=replace(TINY, perturbation="vector", n_perturbation_features=8)), "perturbation='vector' needs"),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    known = dict(x_t=noise(), t=T, control=cells(), covariates=COVARIATES, constants=VECTORS, config=TINY)
    plain = inspect.unwrap(perturbdiff.denoise)  # without the suite's check of types, which would see shapes first
    with pytest.raises(ValueError, match=message):
        plain(params_of(TINY), **known | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(sampler="euler"), "sampler must be one of"),
        (dict(guidance=-1.0), "guidance must be zero or a positive number"),
        (dict(n_steps=2000), "n_steps must be at most"),
        (dict(start=noise()[:1]), "start must have the shape of control"),
        (dict(noise=noise()[None]), "noise an axis of n_steps=3"),
        (dict(cutoff=-1.0), "cutoff must be zero or a positive number"),
    ],
)
def test_bad_sampling_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(perturbdiff.sample)(
            params_of(TINY),
            cells(),
            COVARIATES,
            jax.random.key(0),
            **{"n_steps": 3, "constants": VECTORS, "config": TINY, **changes},
        )
