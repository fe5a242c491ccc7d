"""scIMF against the recorded numbers of the PyTorch reference; each kind of file has its test.

Errors are relative to 1 + the largest reference value unless a test says otherwise; tolerances are those of the
recordings' README. The float64 recordings come from the same float32 weights and inputs, upcast.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import absence, cases, load, or_absent, require, told_absent, under

from scjax.batches import TimeSeriesBatch
from scjax.convert.scimf import config_from_torch, params_from_torch
from scjax.data.preprocess import Preprocess
from scjax.data.preprocess import fit as fit_transform
from scjax.losses import annealed_sinkhorn_divergence, sinkhorn_divergence, solve_sinkhorn
from scjax.metrics.interaction import type_interactions
from scjax.metrics.population import wasserstein1, wasserstein2
from scjax.models import scimf
from scjax.train.optimizers import OptimizerConfig, make_optimizer

KINDS = ("mod_", "traj_", "sinkhorn_", "grad_", "attn_types_", "pipeline_")
CASES = cases("scimf", KINDS)
PRECISIONS = ("float64", "float32")


def each(kind):
    return pytest.mark.parametrize("case", or_absent("scimf", kind, CASES[kind]))


@pytest.fixture(autouse=True)
def _at_hand():
    require("scimf")


@pytest.fixture(params=PRECISIONS)
def precision(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


def test_every_file_is_of_a_known_kind():
    assert not CASES["unknown"], f"no test reads {CASES['unknown']}"
    assert any(CASES.values()), "the folder of recordings is empty"


def close(actual, reference, tolerance, what):
    actual, reference = np.asarray(actual, np.float64), np.asarray(reference, np.float64)
    assert actual.shape == reference.shape, what
    assert np.all(np.isfinite(actual) == np.isfinite(reference)), what
    error = np.abs(actual - reference)[np.isfinite(reference)].max(initial=0)
    assert error <= tolerance * (1 + np.abs(reference).max(initial=0)), f"{what}: off by {error:.3g}"


def close_relative(actual, reference, tolerance, what):
    """Relative l2, the measure for gradients; a tensor whose exact gradient is zero is held against the whole."""
    error = np.linalg.norm(np.ravel(np.asarray(actual, np.float64) - reference))
    assert error <= tolerance * np.linalg.norm(np.ravel(reference)), f"{what}: off by {error:.3g}"


def model_of(golden, dtype, **settings):
    """Config and parameters of a recording; weights in `dtype`."""
    state = under(golden, "w/")
    kinds = {"const": "constant", "const_param": "learned", "Mlp": "mlp"}
    diffusion = kinds[str(golden.get("cfg/sigma_type", "const"))]
    if golden.get("cfg/sigma_zero", False):
        state = {name: w for name, w in state.items() if not name.startswith("diffusion")}
        diffusion, settings = "constant", {"sigma": 0.0, **settings}
    elif diffusion == "constant" and "diffusion.sigma" not in state:
        settings = {"sigma": float(golden.get("cfg/sigma", 0.1)), **settings}
    config = config_from_torch(state, n_heads=int(golden["cfg/heads"]), diffusion=diffusion, **settings)
    assert config.n_dims == golden["cfg/d"]
    assert config.n_blocks == golden["cfg/layers"]
    assert config.intrinsic_widths == tuple(golden["cfg/intra"])
    params = params_from_torch(state, config)
    return config, jax.tree.map(lambda w: jnp.asarray(w, dtype), params)


@each("mod_")
def test_modules(case, precision):
    golden, reference = load("scimf", case), load("scimf", case, ".f64")
    tolerance = {"float64": 1e-11, "float32": 5e-6}[precision]
    config, params = model_of(golden, precision)
    x = jnp.asarray(golden["in/x"], precision)

    @jax.jit
    def evaluate(params, x):
        drift, inner = scimf.Drift(config).apply({"params": params["drift"]}, x, capture_intermediates=True)
        read = scimf.attention(params, x, config=config)
        return drift, inner["intermediates"], read, scimf.diffusion(params, x, config=config)

    drift, inner, read, diffusion = evaluate(params, x)
    heads = lambda a: np.moveaxis(np.asarray(a).reshape(len(a), config.n_heads, -1), 1, 0)  # noqa: E731
    close(inner["intrinsic"]["__call__"][0], reference["out/intra"], tolerance, "intrinsic drift")
    block_input = x
    for i in range(config.n_blocks):
        block = inner[f"interaction_{i}"]
        want = under(reference, f"out/block{i}/")
        close(block_input, want["in"], tolerance, "block input")
        for ours, theirs in (("norm_query_key", "norm1"), ("norm_value", "vnorm")):
            close(block[ours]["__call__"][0], want[theirs], tolerance, f"block {i} {theirs}")
        for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v")):
            close(heads(block[ours]["__call__"][0]), want[theirs], tolerance, f"block {i} {theirs}")
        close(read[i].weights, want["attn"], tolerance, f"block {i} attention")
        assert np.all(np.diagonal(read[i].weights, axis1=1, axis2=2) == 0)
        close(read[i].value_norms, np.linalg.norm(want["v"], axis=-1), tolerance, f"block {i} value norms")
        received = np.einsum("hij,hjd->ihd", np.asarray(read[i].weights), want["v"]).reshape(x.shape)
        close(received, want["attn_out"], tolerance, f"block {i} attention output")
        block_input = block["__call__"][0]
        close(block_input, want["y"], tolerance, f"block {i} output")
    close(block_input, reference["out/inter"], tolerance, "interaction")
    close(drift, reference["out/drift"], tolerance, "drift")
    close(drift, reference["out/f"][:, :-1], tolerance, "augmented drift")
    close(jnp.sum(drift**2, -1), reference["out/f"][:, -1], tolerance, "energy rate")
    close(diffusion, reference["out/g"][:, :-1], tolerance, "diffusion")
    assert np.all(reference["out/g"][:, -1] == 0)
    close(x + drift, reference["out/endes"], tolerance, "end of the velocity arrow")


@each("traj_")
def test_trajectories_replay_the_recorded_noise(case, precision):
    golden, reference = load("scimf", case), load("scimf", case, ".f64")
    tolerance = {"float64": 1e-10, "float32": 2e-5}[precision]
    config, params = model_of(golden, precision, dt=float(golden["cfg/dt"]))
    x0 = jnp.asarray(golden["in/x0"], precision)
    dW = jnp.asarray(golden["in/dW"], precision) if "in/dW" in golden else None
    grid = scimf.sde.time_grid(golden["in/ts"], config.dt)
    assert len(grid.dts) == golden["cfg/n_steps"]
    np.testing.assert_array_equal(grid.observed, golden["in/obs_index"])
    np.testing.assert_allclose(np.cumsum([0, *grid.dts]), golden["in/t_grid_f64"], atol=1e-12)

    path = jax.jit(lambda p, x, dW: scimf.simulate(p, x, golden["in/ts"], None, config=config, dW=dW))(params, x0, dW)
    close(path.x, reference["out/x_obs"], tolerance, "cells at the observation times")
    close(path.kinetic_energy, reference["out/e_obs"], tolerance, "energy at the observation times")

    # The same steps, each of them an observation time.
    ts = golden["in/t_grid_f64"]
    path = jax.jit(lambda p, x, dW: scimf.simulate(p, x, ts, None, config=config, dW=dW))(params, x0, dW)
    close(path.x, reference["out/x_steps"], tolerance, "cells at every step")
    close(path.kinetic_energy, reference["out/e_steps"], tolerance, "energy at every step")


def sinkhorn_pairs(case):
    golden, reference = load("scimf", case), load("scimf", case, ".f64")
    for k in range(int(golden["cfg/n_pairs"])):
        yield float(golden["cfg/blur"]), under(golden, f"pair{k}/"), under(reference, f"pair{k}/")


@each("sinkhorn_")
def test_annealed_sinkhorn(case, precision):
    value_tolerance = {"float64": 1e-10, "float32": 2e-5}[precision]
    for blur, golden, reference in sinkhorn_pairs(case):
        x, y = (jnp.asarray(golden[name], precision) for name in "xy")
        scalings = [float(name.removeprefix("S_scal")) for name in reference if name.startswith("S_scal")]
        assert scalings
        for scaling in scalings:
            divergence = lambda y: annealed_sinkhorn_divergence(x, y, blur=blur, scaling=scaling)  # noqa: B023, E731
            value, grad = jax.jit(jax.value_and_grad(divergence))(y)
            close(value, reference[f"S_scal{scaling}"], value_tolerance, f"{golden['desc']}, scaling {scaling}")
            if f"grad_y_scal{scaling}" in reference:
                want = reference[f"grad_y_scal{scaling}"]
                tolerance = 1e-8 if precision == "float64" else (1e-3 if x.shape[1] > 10 else 1e-4)
                error = np.abs(np.asarray(grad) - want).max()
                # Equal clouds have no gradient: there only rounding is left, held against the cells' own scale.
                scale = np.abs(want).max() or 1e-3
                assert error <= tolerance * scale, f"{golden['desc']}, scaling {scaling}: gradient off by {error:.3g}"


@each("sinkhorn_")
def test_converged_sinkhorn_matches_converged_values(case, x64):
    for blur, golden, reference in sinkhorn_pairs(case):
        x, y = (jnp.asarray(golden[name], jnp.float64) for name in "xy")
        want = reference["grad_y_converged"]
        for n_iterations in (100_000, 2_000_000):  # a few clouds take the millions

            def divergence(y, x=x, blur=blur, n_iterations=n_iterations):
                return sinkhorn_divergence(x, y, blur=blur, threshold=1e-9, max_iterations=n_iterations)

            value, grad = jax.jit(jax.value_and_grad(divergence))(y)
            error = np.linalg.norm(grad - want)
            if error <= 1e-5 * np.linalg.norm(want) + 1e-6:
                break
        close(value, reference["S_converged"], 1e-6, golden["desc"])
        # Equal clouds have no gradient to be relative to.
        assert error <= 1e-5 * np.linalg.norm(want) + 1e-6, f"gradient, {golden['desc']}: off by {error:.3g}"


@each("sinkhorn_")
def test_converged_sinkhorn_at_its_default_threshold(case):
    """Float32: within 1 % of geomloss at scaling 0.99, and of exact transport plus the bias that the blur brings."""
    for blur, golden, reference in sinkhorn_pairs(case):
        x, y = (jnp.asarray(golden[name]) for name in "xy")

        def divergence(y, x=x, blur=blur):
            solution = solve_sinkhorn(x, y, blur=blur, max_iterations=200_000)
            return solution.divergence, solution

        (value, solution), grad = jax.jit(jax.value_and_grad(divergence, has_aux=True))(y)
        assert solution.converged, golden["desc"]
        close(value, reference["S_converged"], 1e-4, golden["desc"])
        assert abs(value - reference["S_scal0.99"]) <= 0.01 * abs(reference["S_scal0.99"]) + 1e-6
        own = (reference["OTeps_xx_converged"] + reference["OTeps_yy_converged"]) / 2
        bias = reference["OTeps_xy_converged"] - golden["W2_sq"] / 2 - own
        assert abs(value - (golden["W2_sq"] / 2 + bias)) <= 0.01 * golden["W2_sq"] / 2 + 1e-6
        want = reference["grad_y_converged"]
        assert np.linalg.norm(grad - want) <= 0.01 * np.linalg.norm(want) + 1e-6, golden["desc"]


@each("sinkhorn_")
def test_exact_wasserstein(case):
    for _, golden, reference in sinkhorn_pairs(case):
        for wasserstein, name in ((wasserstein1, "W1"), (wasserstein2, "W2")):
            want = float(reference.get(name, golden[name]))
            # Equal clouds: the square root of rounding in the squared distances.
            assert wasserstein(golden["x"], golden["y"]) == pytest.approx(want, rel=1e-5, abs=1e-5)


def batch_of(golden, dtype):
    """The targets padded to one size, which must change nothing."""
    targets = [golden[f"in/target{k}"] for k in range(1, len(golden["in/ts"]))]
    size = max(map(len, targets)) + 3
    padded = np.stack([np.concatenate([t, np.repeat(t[:1], size - len(t), 0)]) for t in targets])
    weights = np.stack([np.where(np.arange(size) < len(t), 1 / len(t), 0) for t in targets])
    return TimeSeriesBatch(
        x0=jnp.asarray(golden["in/x0"], dtype),
        targets=jnp.asarray(padded, dtype),
        weights=jnp.asarray(weights, dtype),
        ts=tuple(map(float, golden["in/ts"])),
    )


def objective_of(name, golden, dtype):
    """(loss of params, config) for the recorded objectives; all without noise and dropout."""
    settings = {"dt": float(golden["cfg/dt"]), "dropout": 0.0, "sigma": 0.0}
    if name == "sinkconv":
        settings |= {"sinkhorn": "converged", "sinkhorn_threshold": 1e-9, "sinkhorn_iterations": 200_000}
    elif name != "quad":
        settings["scaling"] = float("0." + name.removeprefix("sink").lstrip("0"))  # sink07: 0.7
    golden = {k: v for k, v in golden.items() if not k.startswith(("w/diffusion", "cfg/sigma"))}
    config, params = model_of(golden, dtype, **settings)
    batch = batch_of(golden, dtype)
    if name != "quad":
        return (lambda p: scimf.loss(p, batch, jax.random.key(0), config=config)), params, config

    def quadratic(p):
        path = scimf.simulate(p, batch.x0, batch.ts, None, config=config)
        want = jnp.stack([jnp.asarray(golden[f"in/quad_target{k}"], dtype) for k in range(1, len(batch.ts))])
        marginal = jnp.mean(jnp.sum((path.x[1:] - want) ** 2, -1))
        energy = jnp.mean(path.kinetic_energy[-1]) / batch.ts[-1]
        return marginal + energy, {"sinkhorn": marginal, "kinetic_energy": energy}

    return quadratic, params, config


def objectives():
    for case in CASES["grad_"]:
        for suffix, dtype in ((".f64", "float64"), ("", "float32")):
            recorded = load("scimf", case, suffix)
            for name in sorted({k.split("/")[0].removeprefix("loss_") for k in recorded if k.startswith("loss_")}):
                yield pytest.param(case, name, dtype, id=f"{case}-{name}-{dtype}")


WITHOUT_GRADIENTS = absence("scimf") or "the recordings hold no file of the kind grad_*"


@pytest.mark.parametrize(("case", "name", "dtype"), list(objectives()) or [told_absent(WITHOUT_GRADIENTS, 3)])
def test_gradients_of_the_full_loss(case, name, dtype):
    golden, reference = load("scimf", case), load("scimf", case, ".f64")
    with jax.enable_x64(dtype == "float64"):
        loss, params, config = objective_of(name, golden, dtype)
        (total, terms), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    value_tolerance = {"float64": 1e-6 if name == "sinkconv" else 1e-9, "float32": 2e-5}[dtype]
    close(total, reference[f"loss_{name}/total"], value_tolerance, "total")
    close(terms["sinkhorn"], np.mean(reference[f"loss_{name}/marginal"]), value_tolerance, "mean over times")
    close(terms["kinetic_energy"], reference[f"loss_{name}/energy"], value_tolerance, "energy")
    recorded = under(reference, f"grad_{name}/")
    want = params_from_torch(recorded, config)
    flat, want = (np.concatenate([np.ravel(g) for g in jax.tree.leaves(t)]) for t in (grads["drift"], want["drift"]))
    assert np.linalg.norm(want) == pytest.approx(float(reference[f"loss_{name}/grad_norm"]), rel=1e-9)
    if name == "sinkconv":
        close_relative(flat, want, {"float64": 1e-5, "float32": 1e-2}[dtype], "whole gradient")
        return
    tolerance = {"quad": (1e-9, 1e-5)}.get(name, (1e-7, 1e-3))[dtype == "float32"]
    ours = dict(jax.tree_util.tree_leaves_with_path(grads))
    for path, tensor in jax.tree_util.tree_leaves_with_path(params_from_torch(recorded, config)):
        attention_of_default = config.n_dims == 50 and any(n in jax.tree_util.keystr(path) for n in ("query", "'key'"))
        wider = 5 if dtype == "float32" and attention_of_default else 1  # stated for these projections
        close_relative(ours[path], tensor, tolerance * wider, jax.tree_util.keystr(path))


@each("grad_")
def test_optimizer_steps(case, x64):
    golden, reference = load("scimf", case), load("scimf", case, ".f64")
    recorded = sorted(k.split("/")[0] for k in reference if k.startswith("adam_after") and k.count("/") == 1)
    steps = sorted({int(k.removeprefix("adam_after")) for k in recorded})
    if not steps:
        return  # not every recording holds the optimiser
    loss, params, config = objective_of("sink07", golden, "float64")
    lr, b1, b2, eps, clip = map(float, reference["adam/hyper"])
    tx = make_optimizer(
        OptimizerConfig(learning_rate=lr, b1=b1, b2=b2, eps=eps, clip_norm=clip, schedule="constant"),
        n_steps=max(steps),
    )
    state, step = tx.init(params), jax.jit(jax.value_and_grad(loss, has_aux=True))
    for n in range(1, max(steps) + 1):
        (value, _), grads = step(params)
        close(value, reference["adam/losses"][n - 1], 1e-9 if n == 1 else 1e-7, f"loss before step {n}")
        updates, state = tx.update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        if n in steps:
            want = params_from_torch(under(reference, f"adam_after{n}/"), config)
            for path, tensor in jax.tree_util.tree_leaves_with_path(want):
                ours = dict(jax.tree_util.tree_leaves_with_path(params))[path]
                close(ours, tensor, 1e-9 if n == 1 else 1e-7, f"after step {n}: {jax.tree_util.keystr(path)}")


@each("attn_types_")
def test_attention_between_cell_types(case, precision):
    golden, reference = load("scimf", case), load("scimf", case, ".f64")
    tolerance = {"float64": 1e-11, "float32": 5e-6}[precision]
    config, params = model_of(golden, precision)
    x = jnp.asarray(golden["in/x"], precision)
    weights = scimf.interaction_scores(params, x, config=config, scale_by_value=False)
    scaled = scimf.interaction_scores(params, x, config=config)
    before = scimf.interaction_scores(params, x, config=config, softmax=False)
    close(weights, reference["out/attn_softmax"], tolerance, "after the softmax")
    close(scaled, reference["out/attn_softmax_scaled"], tolerance, "times value norms")
    close(scaled.mean(0, keepdims=True), reference["out/attn_softmax_scaled_mean"], tolerance, "mean of heads")
    close(before, reference["out/attn_exp_scaled"], tolerance, "before the softmax")

    types = [str(t) for t in golden["out/type_order"]]
    labels = np.array([types.index(t) if t in types else -1 for t in map(str, golden["in/labels"])])
    counts = {t: int(np.sum(golden["in/labels"] == t)) for t in np.unique(golden["in/labels"])}
    assert {t for t, n in counts.items() if n > golden["cfg/min_count"]} == set(types)
    close([counts[t] / sum(counts[t] for t in types) for t in types], reference["out/type_ratio"], 1e-6, "proportions")
    for scores, name in ((scaled, "softmax"), (before, "exp")):
        matrix = type_interactions(scores, labels, len(types))
        close(matrix, reference[f"out/type_{name}_heads"], tolerance, f"type matrix, {name}")
        close(np.mean(matrix, 0, keepdims=True), reference[f"out/type_{name}_mean"], tolerance, f"its mean, {name}")


@each("pipeline_")
def test_preprocessing(case):
    golden, reference = load("scimf", case), load("scimf", case, ".f64")
    counts, times = golden["in/counts"], golden["in/tp"]
    train = ~np.isin(times, golden["cfg/test_tps"])
    genes = tuple(f"gene{i}" for i in range(counts.shape[1]))
    config = Preprocess(
        library_size="selected_genes",
        target_sum=float(golden["cfg/target_sum"]),
        log1p=True,
        n_top_genes=None,
        scale=True,
        n_components=int(golden["cfg/n_components"]),
    )
    transform = fit_transform(config, counts[train], genes, "counts")
    close(transform.normalise(counts, genes), reference["out/lognorm"], 1e-5, "log-normalised expression")
    close(transform.mean, reference["out/scaler_mean"], 1e-5, "means")
    close(transform.std, reference["out/scaler_std"], 1e-5, "standard deviations")
    close(transform.explained_variance, reference["out/explained_variance"], 1e-5, "explained variance")
    latent = np.asarray(transform.apply(counts, genes), np.float64)
    signs = np.sign(np.sum(latent * reference["out/pca"], axis=0))
    close(latent * signs, reference["out/pca"], 1e-5, "projection")
    # Back in gene space the components' signs cancel: what five components keep of the standardised genes.
    kept = reference["out/pca"] @ reference["out/components"]
    restored = kept * reference["out/scaler_std"] + reference["out/scaler_mean"]
    close(transform.inverse(transform.apply(counts, genes)), restored, 1e-5, "inverse to log-normalised expression")
