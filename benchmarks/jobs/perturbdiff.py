"""PerturbDiff's work for the benchmarks, once with scjax and once with PyTorch: same sizes, settings, cells and coins.

The sizes are the published ones but for the number of sets, which is the argument: sets of 256 cells, 2000 genes, width
512, 8 layers of 8 heads, covariates from tables (90 perturbations and the control, 18 cell types, 12 batches), one of
each for a set. Coins fall in equal numbers: the published program tosses them for a whole batch, so a call of its four
steps has each pair of outcomes once; scjax tosses them for each set, so that half of the sets of a step get a first
guess. Both so make 1.5 passes forwards and one back for each set, on average.
"""

import statistics
from functools import partial

import numpy as np
from harness import Job, Memory
from jobs.sides import (
    jax_gemm,
    jax_memory,
    jax_sampling,
    jax_training,
    matrix_flops,
    prepare_torch,
    torch_gemm,
    torch_matrix_flops,
)

N_CELLS, N_GENES = 256, 2000
D_MODEL, N_LAYERS, N_HEADS = 512, 8, 8
N_PERTURBATIONS, N_CELL_TYPES, N_BATCHES = 91, 18, 12  # the control among the perturbations
DIVISOR = 10.0
COINS = ((False, False), (True, False), (False, True), (True, True))  # first guess, hidden covariates: a step each
MEMORY_BATCH, BATCH_UNIT = 8, "sets"
N_SAMPLED = 512
SAMPLING_UNIT = "a solver step"
N_SOLVER_STEPS, N_PEER_STEPS = 10, 2
GUIDANCE = 1.0  # the published strength w: 2 conditional - unconditional
BYTES = 4
SHAPES = {
    "n_cells_of_a_set": N_CELLS, "n_genes": N_GENES, "d_model": D_MODEL, "n_layers": N_LAYERS, "n_heads": N_HEADS
}  # fmt: skip
SAMPLING_SHAPES = SHAPES


def cells(n_sets: int, *, perturbed: bool, seed: int = 0) -> np.ndarray:
    """[sets, cells, genes]: log1p of counts, sparse and uneven as real ones; a perturbed set has other means."""
    rng = np.random.default_rng([seed, perturbed])
    means = np.random.default_rng(1).gamma(0.2, 0.5, size=N_GENES)
    if perturbed:
        means = means * rng.lognormal(0.0, 0.3, size=(n_sets, 1, N_GENES))
    return np.log1p(rng.poisson(means, size=(n_sets, N_CELLS, N_GENES))).astype(np.float32)


def covariates(n_sets: int) -> dict[str, np.ndarray]:
    """int[sets] by role; no set is of the control."""
    rng = np.random.default_rng(2)
    of = {"perturbation": (1, N_PERTURBATIONS), "cell_type": (0, N_CELL_TYPES), "batch": (0, N_BATCHES)}
    return {role: rng.integers(*between, size=n_sets).astype(np.int32) for role, between in of.items()}


def train_scjax(n_sets: int, *, remat: str = "none", batch_coins: bool = False) -> Job:
    import jax
    import jax.numpy as jnp

    from scjax.train.step import make_update

    model, tx, settings = _training(D_MODEL, remat=remat)
    loss = _with_given_coins(model.config) if batch_coins else model.loss
    chunk = _chunk(n_sets, len(COINS))
    if batch_coins:
        tossed = [np.repeat(np.asarray(row)[:, None], n_sets, axis=1) for row in zip(*COINS, strict=True)]
        chunk = (chunk, *tossed)
    make_state, update = _update(model, tx, loss)
    state, chunk = make_state(), jax.tree.map(jnp.asarray, chunk)
    first = jax.tree.map(lambda leaf: leaf[0], chunk)
    # Coins of a set leave a fixed number of sets to the first guess, which is then always made.
    flops = matrix_flops(
        make_update(loss, tx), state._replace(ema=None), first, of_branches=statistics.mean if batch_coins else max
    )
    return jax_training(
        update,
        state,
        chunk,
        len(COINS),
        settings=settings | {"coins": "of a batch" if batch_coins else "of a set"},
        flops=flops,
        state_bytes=5 * BYTES * _n_entries(state.params),
        gemm=jax_gemm(),
    )


def train_scjax_remat(n_sets: int) -> Job:
    return train_scjax(n_sets, remat="layers")


def train_scjax_batch_coins(n_sets: int) -> Job:
    return train_scjax(n_sets, batch_coins=True)


def train_peer(n_sets: int, *, log_again: bool = True) -> Job:
    import torch
    from peers import torch_perturbdiff

    model, diffusion = _peer(), torch_perturbdiff.linear_diffusion()
    optimizer, scheduler = torch_perturbdiff.make_optimizer(model)
    average = torch_perturbdiff.Average(model)
    target, control = (torch.from_numpy(cells(n_sets, perturbed=is_target) / DIVISOR) for is_target in (True, False))
    ids = _ids(n_sets)
    n_done = 0

    def call() -> None:
        nonlocal n_done
        for self_condition, drop_condition in COINS:
            torch_perturbdiff.train_step(
                model, diffusion, optimizer, scheduler, average, n_done, target, control, ids,
                log_again=log_again, self_condition=self_condition, drop_condition=drop_condition,
            )  # fmt: skip
            n_done += 1

    return Job(
        call,
        n_per_call=len(COINS),
        settings={"distance": "evaluated twice" if log_again else "evaluated once"},
        flops=_peer_training_flops(n_sets, log_again),
        state_bytes=5 * BYTES * sum(p.numel() for p in model.parameters()),
        gemm=torch_gemm(),
    )


def train_peer_log_once(n_sets: int) -> Job:
    return train_peer(n_sets, log_again=False)


def sample_scjax(n_cells: int) -> Job:
    """A whole run, all that is done once in a run included, divided by its steps."""
    import jax
    import jax.numpy as jnp

    n_sets = _n_sets(n_cells)
    model, _, _ = _training(D_MODEL)
    params = model.init(jax.random.key(0))
    control = jnp.asarray(cells(n_sets, perturbed=False))
    conditions = jax.tree.map(jnp.asarray, covariates(n_sets))
    run = partial(model.predict, n_steps=N_SOLVER_STEPS, guidance=1 + GUIDANCE)
    args = params, control, conditions, jax.random.key(1)
    return jax_sampling(
        jax.jit(run),
        *args,
        n_per_call=N_SOLVER_STEPS,
        settings={"timed": f"a run of {N_SOLVER_STEPS} steps", "guidance": "both branches in one call"},
        flops=matrix_flops(run, *args) / N_SOLVER_STEPS,
        state_bytes=BYTES * _n_entries(params),
        gemm=jax_gemm(),
    )


def sample_peer(n_cells: int) -> Job:
    """The first steps of a run; each costs the same."""
    import torch
    from peers import torch_perturbdiff

    n_sets = _n_sets(n_cells)
    model, diffusion = _peer().eval(), torch_perturbdiff.linear_diffusion()
    control, ids = torch.from_numpy(cells(n_sets, perturbed=False) / DIVISOR), _ids(n_sets)
    settings = {"n_steps": N_PEER_STEPS, "guidance": GUIDANCE}
    with torch.device("meta"):
        nowhere = _network()
    empty, no_ids = torch.empty_like(control, device="meta"), tuple(i.to("meta") for i in ids)
    flops = torch_matrix_flops(lambda: torch_perturbdiff.sample(nowhere, diffusion, empty, no_ids, **settings))
    return Job(
        lambda: torch_perturbdiff.sample(model, diffusion, control, ids, **settings),
        n_per_call=N_PEER_STEPS,
        settings={"timed": f"{N_PEER_STEPS} of 100 steps", "guidance": "one branch after the other"},
        flops=flops / N_PEER_STEPS,
        state_bytes=BYTES * sum(p.numel() for p in model.parameters()),
        gemm=torch_gemm(),
    )


def memory(n_sets: int, d_model: int, *, remat: bool) -> Memory:
    """A training step of scjax at any size, compiled for shapes alone; layers rematerialised, or not."""
    model, tx, settings = _training(d_model, remat="layers" if remat else "none")
    make_state, update = _update(model, tx, model.loss)
    return jax_memory(update, make_state, lambda: _chunk(n_sets, 1), settings)


def _training(d_model: int, *, remat: str = "none"):
    """The model, its optimiser as published, and what a reader needs to repeat it."""
    from scjax.models import perturbdiff
    from scjax.train.optimizers import OptimizerConfig, make_optimizer

    config = perturbdiff.Config(
        n_genes=N_GENES,
        n_perturbations=N_PERTURBATIONS,
        n_cell_types=N_CELL_TYPES,
        n_batches=N_BATCHES,
        d_model=d_model,
        n_layers=N_LAYERS,
        n_heads=N_HEADS,
        divisor=DIVISOR,
        remat=remat,
    )
    optimizer = OptimizerConfig(
        learning_rate=2e-4,
        schedule="plateau",
        n_warmup=200,
        warmup_from_zero=True,
        b2=0.98,
        weight_decay=0.01,
        decayed="all_but_biases",
        clip_norm=1.0,
    )
    settings = {"remat": remat, "dtype": config.compute_dtype, "ema_every": 10}
    return perturbdiff.build(config, perturbdiff.Constants()), make_optimizer(optimizer, n_steps=200_000), settings


def _update(model, tx, loss):
    """What makes the state before the first step, and the jitted update with its moving average."""
    import jax

    from scjax.train.state import init_state
    from scjax.train.step import make_scanned_update

    update = make_scanned_update(loss, tx, 0.99, ema_every=10, ema_start="first_step")

    def make_state():
        return init_state(model.init(jax.random.key(0)), tx, jax.random.key(1), ema=True)

    return make_state, jax.jit(update, donate_argnums=0)


def _with_given_coins(config):
    """The loss for a batch that brings its coins."""
    import jax
    import jax.numpy as jnp

    from scjax.models import perturbdiff

    def loss(params, batch_and_coins, key):
        batch, self_condition, hide_condition = batch_and_coins
        key_t, key_noise = jax.random.split(key)
        t = jax.random.randint(key_t, (len(batch.cells),), 0, config.n_times)
        noise = jax.random.normal(key_noise, batch.cells.shape)
        coins = perturbdiff.Coins(hide_condition, jnp.zeros_like(hide_condition), self_condition)
        return perturbdiff.loss_at(params, batch, t, noise, coins, constants=perturbdiff.Constants(), config=config)

    return loss


def _chunk(n_sets: int, n_steps: int):
    """Batches of so many steps, stacked as the training loop stacks them."""
    import jax

    from scjax.batches import CellSetBatch

    each = [
        CellSetBatch(
            cells=cells(n_sets, perturbed=True, seed=step),
            control=cells(n_sets, perturbed=False, seed=step),
            covariates=covariates(n_sets),
            mask=np.ones((n_sets, N_CELLS), bool),
        )
        for step in range(n_steps)
    ]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *each)


def _n_entries(params) -> int:
    import jax

    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _n_sets(n_cells: int) -> int:
    if n_cells % N_CELLS:
        raise ValueError(f"cells must be whole sets of {N_CELLS}; got {n_cells}.")
    return n_cells // N_CELLS


def _network():
    from peers import torch_perturbdiff

    return torch_perturbdiff.PerturbDiff(
        N_GENES,
        n_perturbations=N_PERTURBATIONS,
        n_cell_types=N_CELL_TYPES,
        n_batches=N_BATCHES,
        d_model=D_MODEL,
        n_layers=N_LAYERS,
        n_heads=N_HEADS,
    )


def _peer():
    prepare_torch()
    return _network()


def _ids(n_sets: int):
    """The covariates of every cell; the peer's table counts perturbations from -1."""
    import torch

    found = covariates(n_sets)
    columns = found["perturbation"] - 1, found["cell_type"], found["batch"]
    return tuple(torch.from_numpy(column).long()[:, None].repeat(1, N_CELLS) for column in columns)


def _peer_training_flops(n_sets: int, log_again: bool) -> float:
    import torch
    from peers import torch_perturbdiff

    with torch.device("meta"):
        model = _network()
        cell = torch.zeros(n_sets, N_CELLS, N_GENES)
        t = torch.zeros(n_sets, dtype=torch.int64)
    noise, ids = cell.double(), tuple(i.to("meta") for i in _ids(n_sets))

    def step(self_condition: bool, drop_condition: bool) -> float:
        fixed = {"t": t, "noise": noise, "self_condition": self_condition, "drop_condition": drop_condition}
        diffusion = torch_perturbdiff.linear_diffusion()
        return torch_matrix_flops(
            lambda: torch_perturbdiff.loss(
                model, diffusion, cell, cell, ids, log_again=log_again, **fixed
            ).total.backward()
        )

    return sum(step(*coins) for coins in COINS) / len(COINS)


TRAIN = {
    "scjax": train_scjax,
    "peer": train_peer,
    "peer_log_once": train_peer_log_once,
    "scjax_remat": train_scjax_remat,
    "scjax_batch_coins": train_scjax_batch_coins,
}
SAMPLE = {"scjax": sample_scjax, "peer": sample_peer}
