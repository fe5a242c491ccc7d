"""scDFM's work for the benchmarks, once with scjax and once with PyTorch: same sizes, settings, cells and gene graph.

The sizes are those of the published run script: 5029 genes, of which each training step sees 1000, width 128, 4 layers
of 8 heads, dropout 0.1 while training, MMD on, Adam. The batch is the argument: the published 48 needs 74 GiB in
PyTorch. What the published program builds whatever its script says, and so the question of memory, is width 512.
"""

from functools import partial

import numpy as np
from harness import Job, Memory
from jobs.sides import jax_memory, jax_sampling, jax_training, prepare_torch

N_GENES, N_SPECIAL, N_SUBSET = 5029, 4, 1000
N_TOKENS = N_GENES + N_SPECIAL
D_MODEL, N_LAYERS, N_HEADS = 128, 4, 8
N_NEIGHBOURS = 30  # that each gene lists; an edge is one that either lists
PERTURBATION = (N_SPECIAL + 100, 3)  # a single gene and the control
STEPS_PER_CALL = 2  # of the scanned training loop
N_SAMPLED = 8
MEMORY_BATCH, BATCH_UNIT = 48, "cells"
SAMPLING_UNIT = "an evaluation of the velocity field"
N_SOLVER_STEPS, N_STAGES = 19, 4
N_PEER_STEPS = 1
SHAPES = {
    "n_genes": N_GENES, "n_subset": N_SUBSET, "d_model": D_MODEL, "n_layers": N_LAYERS, "n_heads": N_HEADS
}  # fmt: skip


def cells(n_cells: int, *, perturbed: bool) -> np.ndarray:
    """[cells, genes]: log1p of counts, sparse and uneven as real ones; a perturbed cell has other means."""
    rng = np.random.default_rng([0, perturbed])
    means = np.random.default_rng(1).gamma(0.3, 2.0, size=N_GENES)
    if perturbed:
        means = means * rng.lognormal(0.0, 0.3, size=N_GENES)
    return np.log1p(rng.poisson(means, size=(n_cells, N_GENES))).astype(np.float32)


def subsets(n: int) -> np.ndarray:
    """[n, genes of a step]: columns, each choice a permutation's start."""
    rng = np.random.default_rng(2)
    return np.stack([rng.permutation(N_GENES)[:N_SUBSET] for _ in range(n)])


def allowed() -> np.ndarray:
    """bool[tokens, tokens]: who may attend to whom, with the degrees of real data.

    The strongest correlations among 400 synthetic cells of 60 gene modules. Its degrees (mean 50, median 39, 99th
    percentile 200, largest 400) are those of the graphs of five real data sets (37-57, 34-39, 150-430, 290-710): a few
    hubs have many times the typical number of neighbours.
    """
    rng = np.random.default_rng(0)
    n_cells, n_modules, block = 400, 60, 512
    module = rng.choice(n_modules, size=N_GENES, p=rng.dirichlet(np.ones(n_modules)))
    x = rng.normal(size=(n_cells, n_modules))[:, module] * rng.lognormal(-1.0, 0.7, size=N_GENES)
    x = x + rng.normal(size=x.shape)
    z = ((x - x.mean(0)) / x.std(0)).astype(np.float32)
    listed = np.zeros((N_GENES, N_GENES), bool)
    for start in range(0, N_GENES, block):  # a block at a time: this must not show in the peak memory
        strength = np.abs(z[:, start : start + block].T @ z)
        strength[np.arange(len(strength)), start + np.arange(len(strength))] = 0
        nearest = np.argpartition(strength, -N_NEIGHBOURS, axis=1)[:, -N_NEIGHBOURS:]
        np.put_along_axis(listed[start : start + block], nearest, True, axis=1)
    pattern = np.eye(N_TOKENS, dtype=bool)
    pattern[N_SPECIAL:, N_SPECIAL:] |= listed | listed.T
    return pattern


def neighbours(pattern: np.ndarray) -> np.ndarray:
    """int32[tokens, widest]: the same pattern as a table, -1 where a row has ended."""
    table = np.full((len(pattern), pattern.sum(1).max()), -1, np.int32)
    for row, allows in zip(table, pattern, strict=True):
        (at,) = np.nonzero(allows)
        row[: len(at)] = at
    return table


def train_scjax(batch_size: int, *, remat: str = "layers") -> Job:
    import jax
    import jax.numpy as jnp

    from scjax.train.state import init_state

    model, tx, update = _training(_config(D_MODEL, remat=remat), neighbours(allowed()))
    state = init_state(model.init(jax.random.key(0)), tx, jax.random.key(1))
    chunk = jax.tree.map(jnp.asarray, _chunk(batch_size, STEPS_PER_CALL))
    return jax_training(update, state, chunk, STEPS_PER_CALL, settings=_settings(model.config))


def train_scjax_remat(batch_size: int) -> Job:
    return train_scjax(batch_size, remat="cells")


def train_peer(batch_size: int) -> Job:
    import torch
    from peers import torch_scdfm

    model = _peer().train()
    optimizer, scheduler = torch_scdfm.make_optimizer(model)
    genes = torch.arange(N_SPECIAL, N_TOKENS)
    source, target = (torch.from_numpy(cells(batch_size, perturbed=is_target)) for is_target in (False, True))
    perturbation = torch.tensor(PERTURBATION).expand(batch_size, -1)

    def call() -> None:
        torch_scdfm.train_step(model, optimizer, scheduler, genes, source, target, perturbation, n_subset=N_SUBSET)

    return Job(call, settings={"attention": "both maps kept", "gene_encoder": "for each cell, dense mask"})


def sample_scjax(n_cells: int) -> Job:
    """A whole run, all that is done once in a run included, divided by its evaluations."""
    import jax
    import jax.numpy as jnp

    from scjax.models import scdfm

    config = _config(D_MODEL)
    model = scdfm.build(config, scdfm.Constants(jnp.asarray(neighbours(allowed()))))
    params = model.init(jax.random.key(0))
    columns = subsets(1)[0]
    source = jnp.asarray(cells(n_cells, perturbed=False)[:, columns])
    perturbation = jnp.tile(jnp.asarray([PERTURBATION], jnp.int32), (n_cells, 1))
    genes, key = jnp.asarray(columns + N_SPECIAL, jnp.int32), jax.random.key(1)

    run = jax.jit(partial(model.predict, solver="rk4_38", n_steps=N_SOLVER_STEPS))
    settings = _settings(config) | {"timed": f"{N_SOLVER_STEPS} of {N_SOLVER_STEPS} solver steps"}
    n_evaluations = N_SOLVER_STEPS * N_STAGES
    return jax_sampling(run, params, source, perturbation, genes, key, n_per_call=n_evaluations, settings=settings)


def sample_peer(n_cells: int) -> Job:
    """The first steps of a run; it shares nothing between evaluations, so that a run costs so many times one."""
    import torch
    from peers import torch_scdfm

    model = _peer().eval()
    columns = torch.from_numpy(subsets(1)[0])
    source = torch.from_numpy(cells(n_cells, perturbed=False))[:, columns]
    perturbation = torch.tensor(PERTURBATION).expand(n_cells, -1)
    ts = torch.linspace(0, 1, N_SOLVER_STEPS + 1)[: N_PEER_STEPS + 1]
    return Job(
        lambda: torch_scdfm.sample(model, columns + N_SPECIAL, source, perturbation, ts=ts),
        n_per_call=N_PEER_STEPS * N_STAGES,
        settings={"timed": f"{N_PEER_STEPS} of {N_SOLVER_STEPS} solver steps"},
    )


def memory(batch_size: int, d_model: int, *, remat: bool) -> Memory:
    """A training step of scjax at any size, compiled for shapes alone; rematerialised cell by cell, or not at all."""
    import jax

    from scjax.train.state import init_state

    model, tx, update = _training(_config(d_model, remat="cells" if remat else "none"), neighbours(allowed()))
    return jax_memory(
        update,
        lambda: init_state(model.init(jax.random.key(0)), tx, jax.random.key(1)),
        lambda: _chunk(batch_size, 1),
        _settings(model.config),
    )


def _config(d_model: int, *, remat: str = "none"):
    from scjax.models import scdfm

    return scdfm.Config(n_tokens=N_TOKENS, d_model=d_model, n_layers=N_LAYERS, n_heads=N_HEADS, remat=remat)


def _settings(config) -> dict:
    return {"remat": config.remat, "dropout": config.dropout, "gamma": config.gamma, "dtype": config.compute_dtype}


def _training(config, graph: np.ndarray):
    """The model, its optimiser as published, and the jitted update."""
    import jax
    import jax.numpy as jnp

    from scjax.models import scdfm
    from scjax.train.optimizers import OptimizerConfig, make_optimizer
    from scjax.train.step import make_scanned_update

    model = scdfm.build(config, scdfm.Constants(jnp.asarray(graph)))
    settings = OptimizerConfig(learning_rate=5e-5, schedule="cosine", final_fraction=0.02, clip_norm=None)
    tx = make_optimizer(settings, n_steps=200_000)
    return model, tx, jax.jit(make_scanned_update(model.loss, tx), donate_argnums=0)


def _chunk(batch_size: int, n_steps: int):
    """Batches of so many steps, stacked as the training loop stacks them."""
    from scjax.batches import PairedBatch

    columns = subsets(n_steps)
    source, target = (
        np.swapaxes(cells(batch_size, perturbed=is_target)[:, columns], 0, 1)[:, None] for is_target in (False, True)
    )
    perturbation = np.broadcast_to(np.asarray(PERTURBATION, np.int32), (n_steps, 1, 2))
    return PairedBatch(
        source=source, target=target, perturbation=perturbation, genes=(columns + N_SPECIAL).astype(np.int32)
    )


def _peer():
    import torch
    from peers import torch_scdfm

    prepare_torch()
    mask = torch.from_numpy(~allowed())
    return torch_scdfm.ScDFM(mask, n_tokens=N_TOKENS, d_model=D_MODEL, n_heads=N_HEADS, n_layers=N_LAYERS)


TRAIN = {"scjax": train_scjax, "peer": train_peer, "scjax_remat": train_scjax_remat}
SAMPLE = {"scjax": sample_scjax, "peer": sample_peer}
