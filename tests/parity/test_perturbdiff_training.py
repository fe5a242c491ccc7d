"""PerturbDiff's optimisation against the recorded numbers of the PyTorch reference, at the tolerances of their README.

Every recorded step has its batch, time, noise and coins; the schedule, AdamW, clipping and the moving average are ours.
"""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import cases, load, or_absent, under

from scjax.batches import CellSetBatch
from scjax.convert.perturbdiff import config_from_torch, params_from_torch
from scjax.models import perturbdiff
from scjax.train.optimizers import OptimizerConfig, learning_rate, make_optimizer
from scjax.train.state import init_state
from scjax.train.step import make_update

CASES = cases("perturbdiff", ("trainsteps_",))["trainsteps_"]
each = pytest.mark.parametrize("case", or_absent("perturbdiff", "trainsteps_", CASES))


def optimizer_of(golden, **settings) -> OptimizerConfig:
    n_warmup = int(golden["warmup"])
    return OptimizerConfig(
        learning_rate=float(golden["lr"]),
        schedule="plateau",
        plateau_fraction=float(golden["plateau_ratio"]),
        floor_fraction=float(golden["min_ratio"]),
        n_warmup=n_warmup,
        warmup_from_zero=n_warmup > 0,
        b2=0.98,
        weight_decay=float(golden["weight_decay"]),
        decayed="all_but_biases" if golden["weight_decay"] > 0 else "matrices",
        clip_norm=float(golden["clip"]),
        **settings,
    )


def config_of(golden) -> perturbdiff.Config:
    settings = {"n_heads": int(golden["heads"]), "mask_filler": False, "divisor": 1.0}
    return config_from_torch(under(golden, "w0/"), **settings)


def drawn_at(golden, n):
    """The batch of step n, its times, noise and coins."""
    at = under(golden, f"step{n}/")
    n_sets, n_cells, _ = at["pert_emb"].shape
    ids = {"perturbation": at["cov_pert"] + 1, "cell_type": at["cov_celltype"], "batch": at["cov_batch"]}
    batch = CellSetBatch(
        cells=at["pert_emb"],
        control=at["cont_emb"],
        covariates={role: i.astype(np.int32) for role, i in ids.items()},  # row 0 of perturbations is "none"
        mask=np.ones((n_sets, n_cells), bool),
    )
    coins = (at["drop_cond"], False, at["selfcond"])
    coins = perturbdiff.Coins(*(np.broadcast_to(np.asarray(coin, bool), n_sets) for coin in coins))
    return jax.tree.map(jnp.asarray, (batch, at["t"].astype(np.int32), at["noise"].astype(np.float32), coins))


@each
def test_learning_rates(case):
    golden = load("perturbdiff", case)
    n_steps = int(golden["nsteps"])
    rate = learning_rate(optimizer_of(golden), int(golden["total"]))
    np.testing.assert_allclose([rate(n) for n in range(n_steps)], golden["lrs"], rtol=1e-6, atol=1e-12)


@each
def test_learning_rates_of_the_published_runs(case):
    golden = load("perturbdiff", case)
    config = OptimizerConfig(learning_rate=1.0, schedule="plateau", n_warmup=200, warmup_from_zero=True)
    rate = learning_rate(config, 200_000)
    found = [rate(int(n)) for n in golden["readme_lr_steps"]]
    np.testing.assert_allclose(found, golden["readme_lr_multiplier"], rtol=0, atol=1e-6)


@cache
def gradient(config: perturbdiff.Config):
    """Compiled once for all runs of a file; the update is compiled apart from it, and in no time."""
    loss = partial(perturbdiff.loss_at, constants=perturbdiff.Constants(), config=config)
    return jax.jit(jax.value_and_grad(lambda params, drawn: loss(params, *drawn)[0]))


def as_recorded(params, value_and_grad, key):
    """A loss with this value and gradient at these parameters."""
    value, grads = value_and_grad
    still = jax.lax.stop_gradient(params)
    parts = jax.tree.map(lambda g, p, p0: jnp.sum(g * (p - p0)), grads, params, still)
    return value + sum(jax.tree.leaves(parts)), {}


@each
@pytest.mark.parametrize("skip_unused", [False, True])
def test_training_steps(case, skip_unused):
    """With gradients of zero for what a step does not use, and with PyTorch's skipping of it."""
    golden = load("perturbdiff", case)
    recorded = golden if skip_unused else under(golden, "zerograd/")
    config = config_of(golden)
    tx = make_optimizer(optimizer_of(golden, skip_unused=skip_unused), int(golden["total"]))
    ema = {"ema_decay": float(golden["ema_decay"]), "ema_every": int(golden["ema_every"]), "ema_start": "first_step"}
    update = jax.jit(make_update(as_recorded, tx, **ema))
    start = params_from_torch(under(golden, "w0/"), config)
    state = init_state(start, tx, jax.random.key(0), ema=True)
    for n in range(int(golden["nsteps"])):
        with jax.default_matmul_precision("highest"):
            found = gradient(config)(state.params, drawn_at(golden, n))
        state, metrics = update(state, found)
        np.testing.assert_allclose(metrics["loss"], recorded["losses"][n], rtol=2e-4, err_msg=f"step {n}")
        np.testing.assert_allclose(metrics["grad_norm"], recorded["grad_norms"][n], rtol=1e-4, err_msg=f"step {n}")
    close_trees(state.params, params_from_torch(under(recorded, "w1/"), config), 1e-4)
    close_trees(state.ema, params_from_torch(under(recorded, "ema/"), config), 1e-5)


def close_trees(found, wanted, atol):
    for (path, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))


@each
def test_decay_spares_what_the_reference_s_does(case):
    """Names with "bias" in them, and a norm of genes that no loss depends on and that we do not have."""
    golden = load("perturbdiff", case)
    spared = set(map(str, golden["nodecay_names"]))
    ours = {name for name in under(golden, "w0/") if "bias" in name or "gene_embedding.layer_norm" in name}
    assert ours == spared & set(under(golden, "w0/"))
    params = params_from_torch(under(golden, "w0/"), config_of(golden))
    config = replace(optimizer_of(golden), n_warmup=0, warmup_from_zero=False)
    tx = make_optimizer(config, int(golden["total"]))
    updates, _ = jax.jit(tx.update)(jax.tree.map(np.zeros_like, params), jax.jit(tx.init)(params), params)
    decays = {name: np.full_like(w, name not in spared) for name, w in under(golden, "w0/").items()}
    shares = params_from_torch(decays, config_of(golden))
    factor = -config.learning_rate * config.weight_decay
    close_trees(updates, jax.tree.map(lambda p, share: factor * p * share, params, shares), 1e-9)
