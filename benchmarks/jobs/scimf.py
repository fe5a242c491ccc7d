"""scIMF's work for the benchmarks, once with scjax and once with PyTorch: same sizes, settings and cells.

The sizes are the published ones: 512 simulated cells of 50 dims, times 0 ... 7, dt 0.1, the default network (intra
[256, 256], 2 heads, 1 block, attention dropout 0.1 while training), annealed Sinkhorn at blur 0.1 and scaling 0.7.
"""

import dataclasses
import time
from functools import partial

import numpy as np
from harness import Job
from jobs.sides import jax_sampling, jax_training, prepare_torch

TS = tuple(float(t) for t in range(8))
N_CELLS, N_DIMS, N_START, N_SAMPLED = 512, 50, 2000, 2000
STEPS_PER_CALL = 4  # of the scanned training loop
SAMPLING_UNIT = "a whole run"
SHAPES = {"n_cells": N_CELLS, "n_dims": N_DIMS, "n_times": len(TS), "n_solver_steps": 70}


def populations(n_cells: int) -> np.ndarray:
    """[times, cells, dims]: unit Gaussians whose mean drifts, so that every time has something to match."""
    rng = np.random.default_rng(0)
    direction = rng.normal(size=N_DIMS)
    means = 0.3 * np.arange(len(TS))[:, None, None] * direction / np.linalg.norm(direction)
    return (means + rng.normal(size=(len(TS), n_cells, N_DIMS))).astype(np.float32)


def starts(n_draws: int, n_cells: int) -> np.ndarray:
    """[draws, cells, dims] of the first time, each draw without repetition."""
    rng = np.random.default_rng(1)
    pool = rng.normal(size=(max(N_START, n_cells), N_DIMS)).astype(np.float32)
    return np.stack([pool[rng.choice(len(pool), n_cells, replace=False)] for _ in range(n_draws)])


def train_scjax(n_targets: int) -> Job:
    import jax
    import jax.numpy as jnp

    from scjax.batches import TimeSeriesBatch
    from scjax.models import scimf
    from scjax.train.optimizers import OptimizerConfig, make_optimizer
    from scjax.train.state import init_state
    from scjax.train.step import make_scanned_update

    model = scimf.build(scimf.Config(n_dims=N_DIMS))
    tx = make_optimizer(OptimizerConfig(), n_steps=3000)
    state = init_state(model.init(jax.random.key(0)), tx, jax.random.key(1))

    targets = jnp.asarray(populations(n_targets)[1:])
    x0s = jnp.asarray(starts(STEPS_PER_CALL, N_CELLS))
    batch = TimeSeriesBatch(x0=x0s[0], targets=targets, weights=jnp.full(targets.shape[:2], 1 / n_targets), ts=TS)
    started = time.perf_counter()
    own = jax.block_until_ready(jax.jit(partial(scimf.target_self_transport, config=model.config))(batch))
    self_transport_s = time.perf_counter() - started
    batches = [dataclasses.replace(batch, x0=x0, self_transport=own) for x0 in x0s]
    chunk = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)  # as the training loop stacks them
    update = jax.jit(make_scanned_update(model.loss, tx), donate_argnums=0)
    settings = {"backward_passes": 1, "self_transport": "once", "self_transport_s": self_transport_s}
    return jax_training(update, state, chunk, STEPS_PER_CALL, settings=settings)


def train_peer(n_targets: int, *, single_backward: bool = False) -> Job:
    import torch
    from peers import torch_scimf

    prepare_torch()
    model = torch_scimf.ScIMF(N_DIMS).train()
    optimizer, scheduler = torch_scimf.make_optimizer(model)
    targets = list(torch.from_numpy(populations(n_targets)[1:]))
    (x0,) = torch.from_numpy(starts(1, N_CELLS))

    def call() -> None:
        torch_scimf.train_step(model, optimizer, scheduler, x0, targets, TS, single_backward=single_backward)

    settings = {"backward_passes": 1 if single_backward else len(targets), "self_transport": "recomputed every step"}
    return Job(call, settings=settings)


def train_peer_single_backward(n_targets: int) -> Job:
    return train_peer(n_targets, single_backward=True)


def sample_scjax(n_cells: int) -> Job:
    import jax
    import jax.numpy as jnp

    from scjax.models import scimf

    model = scimf.build(scimf.Config(n_dims=N_DIMS))
    params = model.init(jax.random.key(0))
    (x0,) = jnp.asarray(starts(1, n_cells))
    key = jax.random.key(1)
    return jax_sampling(jax.jit(lambda params, x0, key: model.predict(params, x0, TS, key)), params, x0, key)


def sample_peer(n_cells: int) -> Job:
    import torch
    from peers import torch_scimf

    prepare_torch()
    model = torch_scimf.ScIMF(N_DIMS)
    (x0,) = torch.from_numpy(starts(1, n_cells))
    return Job(lambda: torch_scimf.predict(model, x0, TS))


TRAIN = {"scjax": train_scjax, "peer": train_peer, "peer_single_backward": train_peer_single_backward}
SAMPLE = {"scjax": sample_scjax, "peer": sample_peer}
