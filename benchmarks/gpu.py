"""How near do training, sampling and attention come to what one accelerator can do, and how far ahead of PyTorch?

    python benchmarks/gpu.py                      # all of it on one GPU, in less than eight minutes
    python benchmarks/gpu.py --parts ceilings perturbdiff
    python benchmarks/gpu.py --tiny --no-save     # every part at toy sizes, on any machine

No GPU figures have been recorded with it yet: it was written, and is tested (`--tiny`), on machines without one.

Training steps: PerturbDiff with 8 sets of 256 cells, 2000 genes, width 512, 8 layers; scDFM with 48 cells, 1000 of 5029
genes, width 512; scIMF with 512 cells, 8 times, 512 targets each. Sampling: the same networks, 8 sets, 48 cells, 2000
cells. Attention, forwards and back: the cells of scIMF (512, 8192, 16384, nobody attends to itself), the genes of
scDFM, the joint tokens of PerturbDiff's sets; of scjax also blockwise and by cuDNN, in bfloat16.

scjax runs in float32 (products in full float32, not TF32) and in bfloat16 (`compute_dtype`); the peers of `peers/` as
published (float32) and with their networks under `torch.compile` and bfloat16 autocast, the losses in float32. Beside
them stand the device's ceilings, measured with both libraries: one large matrix product in float32, TF32 and bfloat16,
and a copy of a large array.

Each part, a model or a question in one library, is a process of its own, and has the device alone. What it has
measured is written at once; a piece that fails (no memory, no torch, no such option) is recorded with its error, one
for which no time is left as not run, and neither loses the others.
"""

import argparse
import dataclasses
import functools
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import harness
import numpy as np
from harness import Job
from jobs import perturbdiff, scdfm, scimf
from jobs.sides import compiled, jax_sampling, jax_training, matrix_flops, torch_matrix_flops

FULL = SimpleNamespace(
    sets=8, cells_of_scdfm=48, targets=512, sampled={"scimf": 2000, "scdfm": 48, "perturbdiff": 2048},
    steps=4, gemm=8192, copied=1 << 28, shortest_s=2.0, calls=(3, 50), compiler="inductor",
    jobs={"scdfm": {"D_MODEL": 512}},
    attention={  # batch, heads, members, dimensions of a head
        "cells_512": (1, 2, 512, 25), "cells_8192": (1, 2, 8192, 25), "cells_16384": (1, 2, 16384, 25),
        "genes_1000": (48, 8, 1000, 64), "set_256": (8, 8, 256, 128),
    },
)  # fmt: skip
TINY = SimpleNamespace(
    sets=2, cells_of_scdfm=2, targets=5, sampled={"scimf": 4, "scdfm": 2, "perturbdiff": 12},
    steps=2, gemm=16, copied=1 << 10, shortest_s=0.0, calls=(1, 2), compiler="eager",
    jobs={
        "scimf": {"TS": (0.0, 0.5), "N_CELLS": 8, "N_DIMS": 4, "N_START": 16},
        "scdfm": {
            "N_GENES": 40, "N_SUBSET": 12, "N_TOKENS": 44, "D_MODEL": 16, "N_LAYERS": 1, "N_HEADS": 2,
            "N_NEIGHBOURS": 3, "PERTURBATION": (10, 3), "N_SOLVER_STEPS": 1,
        },
        "perturbdiff": {
            "N_CELLS": 6, "N_GENES": 20, "D_MODEL": 8, "N_LAYERS": 1, "N_HEADS": 2, "N_SOLVER_STEPS": 2,
            "N_PEER_STEPS": 1,
        },
    },
    attention={"cells_8": (1, 2, 8, 3), "genes_6": (2, 2, 6, 4)},
)  # fmt: skip
JOBS = {"scimf": scimf, "scdfm": scdfm, "perturbdiff": perturbdiff}
LIBRARIES = ("scjax", "peer")
# In the order in which they are run, with the most seconds that one library may take: what is asked first comes first.
PARTS = {"ceilings": 25, "perturbdiff": 75, "scdfm": 80, "scimf": 50, "attention": 45}
BUDGET_S = 440.0  # a part may be half a minute late
DTYPES = ("float32", "bfloat16")
MODES = ("float32", "compiled_bfloat16")  # of the peers
GEMM_DTYPES = ("float32", "tensorfloat32", "bfloat16")


class Piece(NamedTuple):
    """One measurement of a part.

    Attributes:
        name: unique in its part: what is done, and how.
        build: makes the job.
        settings: that tell it from the others.
    """

    name: str
    build: Callable[[], Job]
    settings: Mapping[str, Any] = {}


# -- scjax


def jax_product(n: int, dtype: str) -> Job:
    import jax
    import jax.numpy as jnp

    a = jnp.ones((n, n), jnp.bfloat16 if dtype == "bfloat16" else jnp.float32)
    product = jax.jit(
        partial(jnp.matmul, precision="highest" if dtype == "float32" else dtype if "tensor" in dtype else None)
    )
    product, compile_s = compiled(product, a, a)
    return Job(lambda: jax.block_until_ready(product(a, a)), compile_s=compile_s, flops=2.0 * n**3)


def jax_copy(n: int) -> Job:
    """Reads and writes n numbers."""
    import jax
    import jax.numpy as jnp

    a = jnp.zeros(n, jnp.float32)
    copy, compile_s = compiled(jax.jit(lambda a: a + 1), a)
    return Job(lambda: jax.block_until_ready(copy(a)), compile_s=compile_s, settings={"bytes": 8.0 * n})


def jax_attention(name: str, shape: tuple[int, ...], dtype: str, way: str | None = None) -> Job:
    """Value and gradients of all three arguments; cells of scIMF do not attend to themselves.

    `way`: "blockwise" or "cudnn"; None holds all pairs of cells, and of genes and sets takes what the models take.
    """
    import jax
    import jax.numpy as jnp

    from scjax.nn.attention import attend, attend_to_all
    from scjax.nn.blockwise import attend_blockwise

    if not name.startswith("cells"):
        one = partial(attend_to_all, implementation=way)
    elif way == "blockwise":
        one = lambda q, k, v: attend_blockwise(q, k, v, excluded=jnp.arange(q.shape[1]))[0]  # noqa: E731
    else:
        one = partial(attend, exclude_self=True)

    def total(q, k, v):
        return jnp.sum(jax.vmap(one)(q, k, v).astype(jnp.float32))

    args = tuple(jax.random.normal(jax.random.key(i), shape, jnp.dtype(dtype)) for i in range(3))
    step, compile_s = compiled(jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2))), *args)
    return Job(
        lambda: jax.block_until_ready(step(*args)),
        compile_s=compile_s,
        temp_bytes=_temporaries(step),
        **_of_attention(shape, dtype),
    )


def train_perturbdiff(dtype: str, sizes: Any) -> Job:
    import jax
    import jax.numpy as jnp

    from scjax.models.perturbdiff import Constants, build
    from scjax.train.step import make_update

    model, tx, settings = perturbdiff._training(perturbdiff.D_MODEL)
    model = build(dataclasses.replace(model.config, compute_dtype=dtype), Constants())
    make_state, update = perturbdiff._update(model, tx, model.loss)
    state = make_state()
    chunk = jax.tree.map(jnp.asarray, perturbdiff._chunk(sizes.sets, sizes.steps))
    first = jax.tree.map(lambda leaf: leaf[0], chunk)
    flops = matrix_flops(make_update(model.loss, tx), state._replace(ema=None), first)
    return jax_training(update, state, chunk, sizes.steps, settings=settings | {"dtype": dtype}, flops=flops)


def sample_perturbdiff(dtype: str, sizes: Any) -> Job:
    import jax
    import jax.numpy as jnp

    from scjax.models.perturbdiff import Constants, build

    n_sets = perturbdiff._n_sets(sizes.sampled["perturbdiff"])
    model, _, _ = perturbdiff._training(perturbdiff.D_MODEL)
    model = build(dataclasses.replace(model.config, compute_dtype=dtype), Constants())
    control = jnp.asarray(perturbdiff.cells(n_sets, perturbed=False))
    conditions = jax.tree.map(jnp.asarray, perturbdiff.covariates(n_sets))
    run = partial(model.predict, n_steps=perturbdiff.N_SOLVER_STEPS, guidance=1 + perturbdiff.GUIDANCE)
    args = model.init(jax.random.key(0)), control, conditions, jax.random.key(1)
    n_steps = perturbdiff.N_SOLVER_STEPS
    return jax_sampling(jax.jit(run), *args, n_per_call=n_steps, flops=matrix_flops(run, *args) / n_steps)


def train_scdfm(dtype: str, sizes: Any) -> Job:
    import jax
    import jax.numpy as jnp

    from scjax.train.state import init_state
    from scjax.train.step import make_update

    config = dataclasses.replace(scdfm._config(scdfm.D_MODEL, remat="layers"), compute_dtype=dtype)
    model, tx, update = scdfm._training(config, _neighbours())
    state = init_state(model.init(jax.random.key(0)), tx, jax.random.key(1))
    chunk = jax.tree.map(jnp.asarray, scdfm._chunk(sizes.cells_of_scdfm, sizes.steps))
    first = jax.tree.map(lambda leaf: leaf[0], chunk)
    flops = matrix_flops(make_update(model.loss, tx), state, first)
    return jax_training(update, state, chunk, sizes.steps, settings=scdfm._settings(config), flops=flops)


def sample_scdfm(dtype: str, sizes: Any) -> Job:
    """A whole run, divided by its evaluations."""
    import jax
    import jax.numpy as jnp

    from scjax.models.scdfm import Constants, build, velocity

    n_cells, columns = sizes.sampled["scdfm"], scdfm.subsets(1)[0]
    config = dataclasses.replace(scdfm._config(scdfm.D_MODEL), compute_dtype=dtype)
    constants = Constants(jnp.asarray(_neighbours()))
    model = build(config, constants)
    source = jnp.asarray(scdfm.cells(n_cells, perturbed=False)[:, columns])
    perturbation = jnp.tile(jnp.asarray([scdfm.PERTURBATION], jnp.int32), (n_cells, 1))
    genes = jnp.asarray(columns + scdfm.N_SPECIAL, jnp.int32)
    args = model.init(jax.random.key(0)), source, perturbation, genes, jax.random.key(1)
    once = partial(velocity, constants=constants, config=config)
    return jax_sampling(
        jax.jit(partial(model.predict, solver="rk4_38", n_steps=scdfm.N_SOLVER_STEPS)),
        *args,
        n_per_call=scdfm.N_SOLVER_STEPS * scdfm.N_STAGES,
        flops=matrix_flops(once, args[0], source, jnp.zeros(n_cells), source, perturbation, genes),
        settings=scdfm._settings(config) | {"flops": "of one evaluation with all that a run does once"},
    )


def train_scimf(dtype: str, sizes: Any) -> Job:
    import jax
    import jax.numpy as jnp

    from scjax.batches import TimeSeriesBatch
    from scjax.models.scimf import build, target_self_transport
    from scjax.train.optimizers import OptimizerConfig, make_optimizer
    from scjax.train.state import init_state
    from scjax.train.step import make_scanned_update

    model = build(_scimf_config(dtype))
    tx = make_optimizer(OptimizerConfig(), n_steps=3000)
    state = init_state(model.init(jax.random.key(0)), tx, jax.random.key(1))
    flops = 4 * _n_solver_steps() * _drift_flops(state.params, model.config, scimf.N_CELLS)  # with the recomputed ones
    targets = jnp.asarray(scimf.populations(sizes.targets)[1:])
    x0s = jnp.asarray(scimf.starts(sizes.steps, scimf.N_CELLS))
    weights = jnp.full(targets.shape[:2], 1 / sizes.targets)
    batch = TimeSeriesBatch(x0=x0s[0], targets=targets, weights=weights, ts=scimf.TS)
    own = jax.jit(partial(target_self_transport, config=model.config))(batch)
    batches = [dataclasses.replace(batch, x0=x0, self_transport=own) for x0 in x0s]
    chunk = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
    update = jax.jit(make_scanned_update(model.loss, tx), donate_argnums=0)
    settings = {"dtype": dtype, "flops": "of the drift; transport is not counted"}
    return jax_training(update, state, chunk, sizes.steps, settings=settings, flops=flops)


def sample_scimf(dtype: str, sizes: Any) -> Job:
    import jax
    import jax.numpy as jnp

    from scjax.models.scimf import build

    model, n_cells = build(_scimf_config(dtype)), sizes.sampled["scimf"]
    params = model.init(jax.random.key(0))
    (x0,) = jnp.asarray(scimf.starts(1, n_cells))
    run = jax.jit(lambda params, x0, key: model.predict(params, x0, scimf.TS, key))
    flops = _n_solver_steps() * _drift_flops(params, model.config, n_cells)
    return jax_sampling(run, params, x0, jax.random.key(1), settings={"dtype": dtype}, flops=flops)


def _scimf_config(dtype: str):
    from scjax.models.scimf import Config

    return Config(n_dims=scimf.N_DIMS, **({"compute_dtype": dtype} if dtype != "float32" else {}))


def _n_solver_steps() -> int:
    return round((scimf.TS[-1] - scimf.TS[0]) / 0.1)


def _drift_flops(params: Any, config: Any, n_cells: int) -> float:
    import jax
    import jax.numpy as jnp

    from scjax.models.scimf import drift

    x = jax.ShapeDtypeStruct((n_cells, config.n_dims), jnp.float32)
    return matrix_flops(partial(drift, config=config), params, x)


@functools.cache
def _allowed() -> np.ndarray:
    return scdfm.allowed()


def _neighbours() -> np.ndarray:
    return scdfm.neighbours(_allowed())


def _temporaries(program: Any) -> int | None:
    memory = program.memory_analysis()
    return None if memory is None else memory.temp_size_in_bytes


SCJAX = {
    "perturbdiff": (train_perturbdiff, sample_perturbdiff),
    "scdfm": (train_scdfm, sample_scdfm),
    "scimf": (train_scimf, sample_scimf),
}


# -- PyTorch


def torch_product(n: int, dtype: str) -> Job:
    import torch

    a = torch.ones(n, n, dtype=torch.bfloat16 if dtype == "bfloat16" else torch.float32, device=_device())

    def call() -> None:
        torch.set_float32_matmul_precision("high" if dtype == "tensorfloat32" else "highest")
        a @ a
        _wait()
        torch.set_float32_matmul_precision("highest")

    return Job(call, flops=2.0 * n**3)


def torch_copy(n: int) -> Job:
    import torch

    a = torch.zeros(n, device=_device())
    b = torch.empty_like(a)

    def call() -> None:
        b.copy_(a)
        _wait()

    return Job(call, settings={"bytes": 8.0 * n})


def torch_attention(name: str, shape: tuple[int, ...], dtype: str) -> Job:
    """`scaled_dot_product_attention`, with a mask where nobody attends to itself; value and gradients."""
    import torch
    from torch.nn import functional

    of = {"dtype": getattr(torch, dtype), "device": _device()}
    q, k, v = (torch.randn(shape, **of).requires_grad_() for _ in range(3))
    n = shape[2]
    mask = ~torch.eye(n, dtype=torch.bool, device=_device()) if name.startswith("cells") else None

    def call() -> None:
        total = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).float().sum()
        torch.autograd.grad(total, (q, k, v))
        _wait()

    return Job(call, **_of_attention(shape, dtype))


def train_peer_perturbdiff(mode: str, sizes: Any) -> Job:
    import torch
    from peers import torch_perturbdiff

    model = perturbdiff._network().to(_device())
    diffusion = torch_perturbdiff.linear_diffusion()
    optimizer, scheduler = torch_perturbdiff.make_optimizer(model)
    average = torch_perturbdiff.Average(model)
    target, control = (
        torch.from_numpy(perturbdiff.cells(sizes.sets, perturbed=is_target) / perturbdiff.DIVISOR).to(_device())
        for is_target in (True, False)
    )
    ids = tuple(i.to(_device()) for i in perturbdiff._ids(sizes.sets))
    _run_as(mode, model, "forward", sizes)
    n_done = 0

    def call() -> None:
        nonlocal n_done
        for self_condition, drop_condition in perturbdiff.COINS:
            torch_perturbdiff.train_step(
                model, diffusion, optimizer, scheduler, average, n_done, target, control, ids,
                self_condition=self_condition, drop_condition=drop_condition,
            )  # fmt: skip
            n_done += 1
        _wait()

    flops = perturbdiff._peer_training_flops(sizes.sets, log_again=True)
    return Job(call, n_per_call=len(perturbdiff.COINS), flops=flops)


def sample_peer_perturbdiff(mode: str, sizes: Any) -> Job:
    import torch
    from peers import torch_perturbdiff

    n_sets, n_steps = perturbdiff._n_sets(sizes.sampled["perturbdiff"]), perturbdiff.N_PEER_STEPS
    model, diffusion = perturbdiff._network().to(_device()).eval(), torch_perturbdiff.linear_diffusion()
    control = torch.from_numpy(perturbdiff.cells(n_sets, perturbed=False) / perturbdiff.DIVISOR).to(_device())
    ids = tuple(i.to(_device()) for i in perturbdiff._ids(n_sets))
    settings = {"n_steps": n_steps, "guidance": perturbdiff.GUIDANCE}
    with torch.device("meta"):
        nowhere = perturbdiff._network()
    empty, no_ids = torch.empty_like(control, device="meta"), tuple(i.to("meta") for i in ids)
    flops = torch_matrix_flops(lambda: torch_perturbdiff.sample(nowhere, diffusion, empty, no_ids, **settings))
    _run_as(mode, model, "forward", sizes)

    def call() -> None:
        torch_perturbdiff.sample(model, diffusion, control, ids, **settings)
        _wait()

    return Job(call, n_per_call=n_steps, flops=flops / n_steps)


def train_peer_scdfm(mode: str, sizes: Any) -> Job:
    import torch
    from peers import torch_scdfm

    n_cells = sizes.cells_of_scdfm
    model = _scdfm_network(_device()).train()
    optimizer, scheduler = torch_scdfm.make_optimizer(model)
    genes = torch.arange(scdfm.N_SPECIAL, scdfm.N_TOKENS, device=_device())
    source, target = (
        torch.from_numpy(scdfm.cells(n_cells, perturbed=is_target)).to(_device()) for is_target in (False, True)
    )
    perturbation = torch.tensor(scdfm.PERTURBATION, device=_device()).expand(n_cells, -1)
    _run_as(mode, model, "forward", sizes)

    def call() -> None:
        torch_scdfm.train_step(
            model, optimizer, scheduler, genes, source, target, perturbation, n_subset=scdfm.N_SUBSET
        )
        _wait()

    settings = {"flops": "of the network; kernels of the MMD are not counted"}
    return Job(call, flops=_scdfm_flops(n_cells, backwards=True), settings=settings)


def sample_peer_scdfm(mode: str, sizes: Any) -> Job:
    """The first step of a run; it shares nothing between evaluations."""
    import torch
    from peers import torch_scdfm

    n_cells, n_steps = sizes.sampled["scdfm"], scdfm.N_PEER_STEPS
    model = _scdfm_network(_device()).eval()
    columns = torch.from_numpy(scdfm.subsets(1)[0])
    source = torch.from_numpy(scdfm.cells(n_cells, perturbed=False))[:, columns].to(_device())
    genes = (columns + scdfm.N_SPECIAL).to(_device())
    perturbation = torch.tensor(scdfm.PERTURBATION, device=_device()).expand(n_cells, -1)
    ts = torch.linspace(0, 1, scdfm.N_SOLVER_STEPS + 1, device=_device())[: n_steps + 1]
    _run_as(mode, model, "forward", sizes)

    def call() -> None:
        torch_scdfm.sample(model, genes, source, perturbation, ts=ts)
        _wait()

    return Job(call, n_per_call=n_steps * scdfm.N_STAGES, flops=_scdfm_flops(n_cells, backwards=False))


def train_peer_scimf(mode: str, sizes: Any) -> Job:
    import torch
    from peers import torch_scimf

    model = torch_scimf.ScIMF(scimf.N_DIMS).to(_device()).train()
    optimizer, scheduler = torch_scimf.make_optimizer(model)
    targets = list(torch.from_numpy(scimf.populations(sizes.targets)[1:]).to(_device()))
    (x0,) = torch.from_numpy(scimf.starts(1, scimf.N_CELLS)).to(_device())
    _run_as(mode, model, "drift", sizes)

    def call() -> None:
        torch_scimf.train_step(model, optimizer, scheduler, x0, targets, scimf.TS)
        _wait()

    # A backward pass for each observed time, through all steps before it, of two products for each one forwards.
    n_back = sum(round((t - scimf.TS[0]) / 0.1) for t in scimf.TS[1:])
    flops = (_n_solver_steps() + 2 * n_back) * _scimf_flops(scimf.N_CELLS)
    return Job(call, flops=flops, settings={"flops": "of the drift; transport is not counted"})


def sample_peer_scimf(mode: str, sizes: Any) -> Job:
    import torch
    from peers import torch_scimf

    n_cells = sizes.sampled["scimf"]
    model = torch_scimf.ScIMF(scimf.N_DIMS).to(_device())
    (x0,) = torch.from_numpy(scimf.starts(1, n_cells)).to(_device())
    _run_as(mode, model, "drift", sizes)

    def call() -> None:
        torch_scimf.predict(model, x0, scimf.TS)
        _wait()

    return Job(call, flops=_n_solver_steps() * _scimf_flops(n_cells))


def _scdfm_network(device: str):
    import torch
    from peers import torch_scdfm

    mask = torch.from_numpy(~_allowed()).to(device)
    sizes = {"n_tokens": scdfm.N_TOKENS, "d_model": scdfm.D_MODEL}
    with torch.device(device):
        return torch_scdfm.ScDFM(mask, n_heads=scdfm.N_HEADS, n_layers=scdfm.N_LAYERS, **sizes)


def _scdfm_flops(n_cells: int, *, backwards: bool) -> float:
    import torch

    model = _scdfm_network("meta")
    with torch.device("meta"):
        genes = torch.zeros(n_cells, scdfm.N_SUBSET, dtype=torch.int64)
        x, t = torch.zeros(n_cells, scdfm.N_SUBSET), torch.zeros(n_cells)
        perturbation = torch.zeros(n_cells, 2, dtype=torch.int64)

    def call() -> None:
        v = model(genes, x, t, x, perturbation)
        if backwards:
            v.sum().backward()

    return torch_matrix_flops(call)


def _scimf_flops(n_cells: int) -> float:
    import torch
    from peers import torch_scimf

    with torch.device("meta"), torch.no_grad():
        model, x = torch_scimf.ScIMF(scimf.N_DIMS), torch.zeros(n_cells, scimf.N_DIMS)
        return torch_matrix_flops(lambda: model.drift(x))


def _run_as(mode: str, model: Any, method: str, sizes: Any) -> None:
    """The method of the module as it is, or compiled under autocast, its result in float32."""
    import torch

    if mode == "float32":
        return
    plain = getattr(model, method)

    def mixed(*args):
        with torch.autocast(_device(), torch.bfloat16):
            return plain(*args).float()

    setattr(model, method, torch.compile(mixed, backend=sizes.compiler))


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


PEERS = {
    "perturbdiff": (train_peer_perturbdiff, sample_peer_perturbdiff),
    "scdfm": (train_peer_scdfm, sample_peer_scdfm),
    "scimf": (train_peer_scimf, sample_peer_scimf),
}


# -- the pieces of a part


class _Side(NamedTuple):
    """What one library has: products, copies, attention, and steps and samplers of each system in its modes."""

    product: Callable[[int, str], Job]
    copy: Callable[[int], Job]
    attention: Callable[[str, Sequence[int], str], Job]
    systems: Mapping[str, tuple[Callable[[str, Any], Job], Callable[[str, Any], Job]]]
    mode: str
    modes: tuple[str, ...]


SIDES = {
    "scjax": _Side(jax_product, jax_copy, jax_attention, SCJAX, "dtype", DTYPES),
    "peer": _Side(torch_product, torch_copy, torch_attention, PEERS, "mode", MODES),
}


def pieces_of(library: str, part: str, sizes: Any) -> list[Piece]:
    side = SIDES[library]
    if part == "ceilings":
        products = [Piece(f"product_{d}", partial(side.product, sizes.gemm, d)) for d in GEMM_DTYPES]
        return [*products, Piece("copy", partial(side.copy, sizes.copied))]
    if part == "attention":
        return [
            Piece(f"{name}_{dtype}", partial(side.attention, name, shape, dtype), {"dtype": dtype})
            for name, shape in sizes.attention.items()
            for dtype in DTYPES
        ] + (_other_ways(sizes) if library == "scjax" else [])
    return [
        Piece(f"{what}_{mode}", partial(build, mode, sizes), {side.mode: mode})
        for what, build in zip(("train", "sample"), side.systems[part], strict=True)
        for mode in side.modes
    ]


def _other_ways(sizes: Any) -> list[Piece]:
    """Attention in bfloat16 as it could be computed beside what is the default."""
    import jax

    has_cudnn = jax.default_backend() == "gpu"
    ways = [
        (name, shape, way)
        for name, shape in sizes.attention.items()
        # cuDNN has no way to leave out oneself
        for way in (("blockwise", "cudnn") if has_cudnn and not name.startswith("cells") else ("blockwise",))
    ]
    dtype = "bfloat16"
    return [
        Piece(f"{name}_{dtype}_{way}", partial(jax_attention, name, shape, dtype, way), {"dtype": dtype, "way": way})
        for name, shape, way in ways
    ]


# -- one piece


def _of_attention(shape: tuple[int, ...], dtype: str) -> dict[str, Any]:
    """Operations: two products forwards, four back, none anew. Bytes: arguments, result, and the gradients of all."""
    batch, heads, n, d = shape
    size = {"float32": 4, "bfloat16": 2}[dtype]
    settings = {"shape": list(shape), "dtype": dtype, "bytes": 8.0 * batch * heads * n * d * size}
    return {"flops": 12.0 * batch * heads * n * n * d, "settings": settings}


def measure(job: Job, sizes: Any, deadline: float) -> dict[str, Any]:
    """Seconds of a step after one unmeasured call; operations and bytes per second where they are counted."""
    first_call_s = _seconds(job.call)
    seconds: list[float] = []
    least, most = sizes.calls
    while len(seconds) < most and (len(seconds) < least or sum(seconds) < sizes.shortest_s):
        seconds.append(_seconds(job.call))
        if time.monotonic() > deadline:
            break
    of_step = [s / job.n_per_call for s in seconds]
    median = statistics.median(of_step)
    n_bytes = job.settings.get("bytes")
    return {
        "wall_s": {"median": median, "min": min(of_step), "max": max(of_step), "n": len(of_step)},
        "compile_s": job.compile_s
        if job.compile_s is not None
        else max(0.0, first_call_s - statistics.median(seconds)),
        "first_call_s": first_call_s,
        "flops": job.flops,
        "flops_s": job.flops and job.flops / median,
        "bytes_s": n_bytes and n_bytes / median,
        "temp_bytes": job.temp_bytes,
        "settings": dict(job.settings),
    }


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


# -- a part in its process


def work(library: str, part: str, sizes: Any, seconds: float) -> Iterator[dict[str, Any]]:
    """The pieces of a part one after the other; what fails is told, and the next one begins."""
    deadline = time.monotonic() + seconds
    for name, job in JOBS.items():
        for constant, value in sizes.jobs.get(name, {}).items():
            setattr(job, constant, value)
    of = {"part": part, "library": library}
    try:
        device = _open(library)
    except Exception as err:  # noqa: BLE001 no library, no driver: all that is asked of the part is to say so
        yield of | {"piece": "start", "error": _said(err)}
        return
    for piece in pieces_of(library, part, sizes):
        at = of | {"piece": piece.name, "device": device}
        if time.monotonic() > deadline:
            yield at | {"error": f"not run: the {seconds:.0f} s of this part were over"}
            continue
        try:
            measured = measure(_built(library, piece), sizes, deadline)
            yield at | measured | {"settings": {**piece.settings, **measured["settings"]}} | _memory(library)
        except Exception as err:  # noqa: BLE001 it is recorded, and the other pieces go on
            yield at | {"error": _said(err)}
        _let_go(library)


def _open(library: str) -> str:
    """The device, awake."""
    if library == "scjax":
        import jax

        (device, *_) = jax.devices()
        return f"{device.platform}: {device.device_kind}"
    import torch

    torch.manual_seed(0)
    if _device() == "cpu":
        return f"cpu: {platform.processor() or platform.machine()}"
    torch.empty(1, device="cuda")
    return f"cuda: {torch.cuda.get_device_name()}"


def _built(library: str, piece: Piece) -> Job:
    if library == "peer" or piece.settings.get("dtype") != "float32":
        return piece.build()
    import jax

    with jax.default_matmul_precision("highest"):  # float32 is float32 and not TF32, as it is in PyTorch
        return piece.build()


def _memory(library: str) -> dict[str, Any]:
    """The largest that the device's memory was, where the library tells; of scjax since the part began."""
    if library == "scjax":
        import jax

        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    else:
        import torch

        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {"peak_device_bytes": peak}


def _let_go(library: str) -> None:
    gc.collect()
    if library == "scjax":
        import jax

        jax.clear_caches()
        return
    import torch

    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _said(err: BaseException) -> str:
    return f"{type(err).__name__}: {err}"[:500]


def serve(library: str, part: str, sizes: Any, seconds: float) -> None:
    """One JSON line a piece; whatever libraries print goes to stderr."""
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for told in work(library, part, sizes, seconds):
        pipe.write(json.dumps(told) + "\n")
        pipe.flush()


def ask(library: str, part: str, seconds: float, *, tiny: bool) -> Iterator[dict[str, Any]]:
    """What a process for this part tells; it is ended half a minute after its time."""
    command = [sys.executable, __file__, "--worker", library, "--parts", part, "--seconds", f"{seconds:.0f}"]
    kept = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    kept["PYTHONPATH"] = os.pathsep.join([str(harness.ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    # Memory as it is needed: what is told of it is then what was used.
    kept |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "OMP_NUM_THREADS": kept.get("OMP_NUM_THREADS", "8")}
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [*command, *(["--tiny"] if tiny else [])], stdout=subprocess.PIPE, stderr=said, text=True, env=kept
        )
        late = threading.Timer(seconds + 30, process.kill)
        late.start()
        try:
            for line in process.stdout:
                yield json.loads(line)
            status = process.wait()
        finally:
            late.cancel()
            process.kill()
            process.wait()
            process.stdout.close()
        if status:
            said.seek(0)
            last = said.read()[-500:]
            yield {"part": part, "library": library, "piece": "end", "error": f"ended with status {status}: {last}"}


# -- the whole


def run(parts: Sequence[str], path: Path | None, *, budget_s: float, tiny: bool, peer: bool) -> dict[str, Any]:
    """All parts in order; the record, which is also written to `path` after each piece, as the last of its list."""
    began = time.monotonic()
    record = harness.environment() | {"question": "gpu", "tiny": tiny, "pieces": [], "ratios": {}}
    before = json.loads(path.read_text()) if path is not None and path.exists() else []
    for part in parts:
        for library in LIBRARIES if peer else LIBRARIES[:1]:
            left = budget_s - (time.monotonic() - began)
            if left < 5:
                told = iter(
                    [{"part": part, "library": library, "piece": "start", "error": "not run: no time was left"}]
                )
            else:
                told = ask(library, part, min(left, PARTS[part] if not tiny else left), tiny=tiny)
            for piece in told:
                record["pieces"].append(piece)
                print(line(piece), flush=True)
                record |= summary(record["pieces"]) | {"seconds": time.monotonic() - began}
                if path is not None:
                    _write([*before, record], path)
    return record


def summary(pieces: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The ceilings of the device, each piece's share of them, and how many times scjax's time the peers take."""
    found = {(p["part"], p["library"], p["piece"]): p for p in pieces if "error" not in p}
    ceilings = {}
    for (part, _, piece), p in found.items():
        if part == "ceilings":
            rate = p["bytes_s"] if piece == "copy" else p["flops_s"]
            ceilings[piece] = max(ceilings.get(piece, 0.0), rate)
    shares, ratios = {}, {}
    for (part, library, piece), p in found.items():
        if part == "ceilings":
            continue
        dtype = "bfloat16" if "bfloat16" in piece else "float32"
        of = {"flops": (p["flops_s"], f"product_{dtype}"), "bytes": (p["bytes_s"], "copy")}
        shares[f"{part}/{library}/{piece}"] = {
            name: rate / ceilings[ceiling] for name, (rate, ceiling) in of.items() if rate and ceiling in ceilings
        }
        if library == "peer":
            what = piece.removesuffix("_compiled_bfloat16").removesuffix("_float32").removesuffix("_bfloat16")
            for dtype in DTYPES:
                ours = found.get((part, "scjax", f"{what}_{dtype}"))
                if ours is not None:
                    times = p["wall_s"]["median"] / ours["wall_s"]["median"]
                    ratios[f"{part}: peer {piece} / scjax {what}_{dtype}"] = times
    return {"ceilings": ceilings, "shares": shares, "ratios": ratios}


def line(piece: Mapping[str, Any]) -> str:
    name = f"{piece['part']}/{piece['library']}/{piece['piece']}"
    if "error" in piece:
        return f"{name}: {piece['error']}"
    rates = [
        f"{piece[rate] / 1e12:.3g} {unit}"
        for rate, unit in (("flops_s", "TFLOP/s"), ("bytes_s", "TB/s"))
        if piece[rate]
    ]
    return f"{name}: {piece['wall_s']['median']:.3g} s, compiled in {piece['compile_s']:.1f} s, {', '.join(rates)}"


def _write(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + f".{os.getpid()}")
    beside.write_text(json.dumps(records, indent=1) + "\n")
    beside.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds of all parts together")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True, help="time PyTorch beside it")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, on any machine; says nothing of speed")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "gpu.json", help="JSON list to append to")
    parser.add_argument("--save", action=argparse.BooleanOptionalAction, default=True, help="write the results")
    parser.add_argument("--worker", choices=LIBRARIES, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        serve(args.worker, args.parts[0], TINY if args.tiny else FULL, args.seconds)
        return
    path = args.out if args.save else None
    record = run(args.parts, path, budget_s=args.budget, tiny=args.tiny, peer=args.peer)
    print("\nhow many times scjax's time the peers take:")
    for name, ratio in record["ratios"].items():
        print(f"  {ratio:6.2f}  {name}")
    print("shares of the measured ceilings:")
    for name, share in record["shares"].items():
        print(f"  {name}: " + ", ".join(f"{value:.0%} of {of}" for of, value in share.items()))


if __name__ == "__main__":
    main()
