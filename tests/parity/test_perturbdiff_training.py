"""PerturbDiff's optimisation against the recorded numbers of the PyTorch reference, at the tolerances of their README.

Every recorded step has its batch, time, noise and coins; the schedule, AdamW, clipping and the moving average are ours.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import absence, cases, load, under

from scjax.batches import CellSetBatch
from scjax.models import perturbdiff
from scjax.train.optimizers import OptimizerConfig, learning_rate, make_optimizer
from scjax.train.state import init_state
from scjax.train.step import make_scanned_update

CASES = cases("perturbdiff", ("trainsteps_",))["trainsteps_"]
ABSENT = pytest.mark.skip(reason=absence("perturbdiff") or "the recordings hold no file of the kind trainsteps_*")
each = pytest.mark.parametrize("case", CASES or [pytest.param(None, marks=ABSENT, id="none")])


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
        decayed="all_but_biases",
        clip_norm=float(golden["clip"]),
        **settings,
    )


def params_of(state, depth):
    """The reference's arrays in our tree, without what no loss depends on."""
    d = state["model.x_embedder.bias"].shape[0]
    n_genes = state["model.x_embedder.weight"].shape[1] // 2

    def dense(name, rows=None):
        return {"kernel": state[f"{name}.weight"][:rows].T, "bias": state[f"{name}.bias"][:rows]}

    def mlp(first, second):
        return {"Dense_0": dense(first), "Dense_1": dense(second)}

    def layer(i):
        at, last = f"model.blocks.{i}.block", i == depth - 1
        found = {
            "modulation": dense(f"{at}.adaLN_modulation.1"),
            "control_modulation": dense(f"{at}.control_adaLN_modulation.1", 2 * d if last else None),
            "attention": {
                "joined": dense(f"{at}.attn.qkv"),
                "query_norm": {"scale": state[f"{at}.attn.q_norm.weight"]},
                "key_norm": {"scale": state[f"{at}.attn.k_norm.weight"]},
                "output": dense(f"{at}.attn.proj", d if last else None),
            },
            "feedforward": mlp(f"{at}.mlp.fc1", f"{at}.mlp.fc2"),
        }
        return found if last else found | {"control_feedforward": mlp(f"{at}.control_mlp.fc1", f"{at}.control_mlp.fc2")}

    covariates = {"perturbation": "pert", "cell_type": "celltype", "batch": "batch"}
    params = {
        "time": {"mlp": mlp("model.t_embedder.mlp.0", "model.t_embedder.mlp.2")},
        "covariates": {
            **{k: {"embedding": state[f"cov_encoder.{v}_encoder.weight"]} for k, v in covariates.items()},
            "joined": dense("cov_encoder.transform"),
        },
        "condition": {
            "project": dense("model.class_embedding.emb"),
            "null": state["model.class_embedding.null_emb.weight"][0],
        },
        "inputs": {
            "state": state["model.x_embedder.weight"][:, :n_genes].T[None],
            "previous": state["model.x_embedder.weight"][:, n_genes:].T[None],
            "control": state["model.x_control_embedder.weight"][:, :n_genes].T[None],
            "bias": state["model.x_embedder.bias"][None],
            "control_bias": state["model.x_control_embedder.bias"][None],
            "gene": state["model.gene_embedding.null_emb.weight"][0],
        },
        **{f"layer_{i}": layer(i) for i in range(depth)},
        "head": {
            "modulation": dense("model.final_layer.adaLN_modulation.1"),
            "output": dense("model.final_layer.linear"),
        },
    }
    return jax.tree.map(jnp.asarray, params)


def config_of(golden) -> perturbdiff.Config:
    shape = lambda name: golden[f"w0/cov_encoder.{name}_encoder.weight"].shape  # noqa: E731
    n_hidden = len(golden["w0/model.blocks.0.block.mlp.fc1.bias"])
    return perturbdiff.Config(
        n_genes=int(golden["genes"]),
        n_perturbations=shape("pert")[0],
        n_cell_types=shape("celltype")[0],
        n_batches=shape("batch")[0],
        d_covariate=shape("pert")[1],
        d_model=int(golden["hidden"]),
        n_layers=int(golden["depth"]),
        n_heads=int(golden["heads"]),
        mlp_ratio=n_hidden / int(golden["hidden"]),
        mask_filler=False,
        divisor=1.0,
    )


def batches_of(golden):
    """All steps, stacked: cells, controls and ids, and what the reference drew."""

    def step(n):
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
        return batch, at["t"].astype(np.int32), at["noise"].astype(np.float32), coins

    return jax.tree.map(lambda *x: np.stack(x), *map(step, range(int(golden["nsteps"]))))


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


@each
@pytest.mark.parametrize("skip_unused", [False, True])
def test_training_steps(case, skip_unused):
    """With gradients of zero for what a step does not use, and with PyTorch's skipping of it."""
    golden = load("perturbdiff", case)
    recorded = golden if skip_unused else under(golden, "zerograd/")
    config, n_steps = config_of(golden), int(golden["nsteps"])
    constants = perturbdiff.Constants()

    def loss(params, drawn, key):
        del key  # the draws are recorded
        return perturbdiff.loss_at(params, *drawn, constants=constants, config=config)

    tx = make_optimizer(optimizer_of(golden, skip_unused=skip_unused), int(golden["total"]))
    ema = {
        "ema_decay": float(golden["ema_decay"]),
        "ema_every": int(golden["ema_every"]),
        "ema_start": "first_step",
    }
    steps = jax.jit(make_scanned_update(loss, tx, **ema))
    start = params_of(under(golden, "w0/"), config.n_layers)
    shapes = jax.eval_shape(lambda: perturbdiff.init(jax.random.key(0), config))
    assert jax.tree.map(jnp.shape, start) == jax.tree.map(lambda s: s.shape, shapes)
    state = init_state(start, tx, jax.random.key(0), ema=True)
    with jax.default_matmul_precision("highest"):
        state, metrics = steps(state, batches_of(golden), jnp.int32(0), jnp.int32(n_steps))
    assert int(state.step) == n_steps
    np.testing.assert_allclose(metrics["loss"], recorded["losses"], rtol=2e-4)
    np.testing.assert_allclose(metrics["grad_norm"], recorded["grad_norms"], rtol=1e-4)
    for found, at, atol in ((state.params, "w1/", 1e-4), (state.ema, "ema/", 1e-5)):
        wanted = params_of(under(recorded, at), config.n_layers)
        close_trees(found, wanted, atol)


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
    params = params_of(under(golden, "w0/"), int(golden["depth"]))
    config = replace(optimizer_of(golden), n_warmup=0, warmup_from_zero=False)
    tx = make_optimizer(config, int(golden["total"]))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    shares = params_of(
        {name: np.full_like(w, 0.0 if name in spared else 1.0) for name, w in under(golden, "w0/").items()},
        int(golden["depth"]),
    )
    factor = -config.learning_rate * config.weight_decay
    close_trees(updates, jax.tree.map(lambda p, share: factor * p * share, params, shares), 1e-9)
