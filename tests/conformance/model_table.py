"""The table of models: a model joins the battery of `test_conformance.py` by a row here.

A row is a tiny config, a builder of tiny batches, the loss's documented weights, and for each field of the config
another value. Two rows of one model cover options that have parameters of their own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scjax.batches import CellSetBatch, PairedBatch, TimeSeriesBatch
from scjax.models import perturbdiff, scdfm, scimf


@dataclass(frozen=True, kw_only=True)
class Row:
    """What the battery needs to know of a model.

    Attributes:
        module: with Config, init, loss, build.
        config: tiny, every option that costs nothing switched on.
        batch_at: (config, n) -> batch n, NumPy arrays that are a function of n.
        total: (config, terms) -> the scalar that the loss's docstring promises.
        alternatives: for every field of Config another value, or a dict of fields where the field acts only together
            with others; the config with these but for the field itself is then what it is compared with.
        constants: config -> what the module's functions take besides it.
    """

    module: ModuleType
    config: Any
    batch_at: Callable[[Any, int], Any]
    total: Callable[[Any, Mapping[str, Any]], Any]
    alternatives: Mapping[str, Any]
    constants: Callable[[Any], Mapping[str, Any]] = lambda config: {}  # noqa: E731


def time_series(config, n):
    """Six cells at time 0; five and four of them, padded, at 1 and 2.5."""
    rng = np.random.default_rng([7, n])
    targets = rng.normal(size=(2, 5, config.n_dims)).astype(np.float32) + 0.5
    targets[1, 4] = targets[1, 0]
    weights = np.array([[0.2] * 5, [0.25] * 4 + [0.0]], np.float32)
    x0 = rng.normal(size=(6, config.n_dims)).astype(np.float32)
    return TimeSeriesBatch(x0=x0, targets=targets, weights=weights, ts=(0.0, 1.0, 2.5))


SCIMF = Row(
    module=scimf,
    config=scimf.Config(n_dims=4, intrinsic_widths=(5,), dt=0.5, blur=0.5, sinkhorn_weight=0.7, energy_weight=0.3),
    batch_at=time_series,
    total=lambda c, terms: c.sinkhorn_weight * terms["sinkhorn"] + c.energy_weight * terms["kinetic_energy"],
    alternatives={
        "n_dims": 6,
        "intrinsic_widths": (5, 3),
        "n_blocks": 2,
        "n_heads": 1,
        "residual": True,
        "dropout": 0.2,
        "attention": "blockwise",
        "n_landmarks": {"attention": "landmarks", "dropout": 0.0, "n_landmarks": 3},
        "compute_dtype": "bfloat16",
        "diffusion": "learned",
        "sigma": 0.2,
        "diffusion_widths": {"diffusion": "mlp", "diffusion_widths": (3,)},
        "dt": 0.25,
        "sinkhorn": "converged",
        "blur": 0.4,
        "scaling": 0.5,
        "debiased": False,
        "sinkhorn_threshold": {"sinkhorn": "converged", "sinkhorn_threshold": 1e-2},
        "sinkhorn_iterations": {"sinkhorn": "converged", "sinkhorn_iterations": 100},
        "sinkhorn_weight": 0.5,
        "energy_weight": 0.5,
    },
)


def populations(config, n):
    """Two populations of three cells on four of the genes of a graph of nine tokens."""
    rng = np.random.default_rng([8, n])
    cells = lambda: rng.exponential(size=(2, 3, 4)).astype(np.float32)  # noqa: E731
    genes = rng.permutation(np.arange(4, 8))
    perturbation = np.array([[5, 3], [4, 6]]) if config.perturbation == "gene" else np.array([[1, 0], [2, 1]])
    return PairedBatch(
        source=cells(), target=cells(), perturbation=perturbation.astype(np.int32), genes=genes.astype(np.int32)
    )


def scdfm_total(config, terms):
    if config.objective == "perturbation":
        return 1 - terms["cosine"]
    return terms["flow"] + config.gamma * terms.get("mmd2", 0.0)


GRAPH = np.array([[i, -1, -1] for i in range(4)] + [[4, 5, 6], [4, 5, -1], [4, 6, 7], [6, 7, -1], [8, -1, -1]])
SCDFM = Row(
    module=scdfm,
    config=scdfm.Config(
        n_tokens=9,
        n_perturbations=3,
        n_vector=4,
        d_model=8,
        n_layers=2,
        n_heads=2,
        graph_heads=2,
        gamma=0.7,
        condition_dropout=0.85,  # with the battery's key one of the two populations is hidden
        start="poisson",
    ),
    batch_at=populations,
    total=scdfm_total,
    constants=lambda c: {"constants": scdfm.Constants(jnp.asarray(GRAPH, jnp.int32), jnp.eye(3, c.n_vector))},
    alternatives={
        "n_tokens": 10,
        "perturbation": "table",
        "n_perturbations": {"perturbation": "table", "n_perturbations": 4},
        "d_model": 4,
        "n_layers": 1,
        "n_heads": 4,
        "graph_heads": 4,
        "n_vector": {"perturbation": "vector", "n_vector": 5},
        "fusion": "differential_transformer",
        "graph_rows": "first",
        "dropout": 0.2,
        "start": "gaussian",
        "start_noise": {"start": "control", "start_noise": 0.1},
        "poisson_alpha": 0.5,
        "poisson_target_sum": 100.0,
        "gamma": 0.5,
        "condition_dropout": 0.2,
        "objective": "perturbation",
        "head_input": {"objective": "perturbation", "head_input": "leaking"},
        "compute_dtype": "bfloat16",
        "remat": "layers",
    },
)
SCDFM_VECTORS = replace(
    SCDFM,
    config=replace(
        SCDFM.config, perturbation="vector", fusion="perceiver", start="control", dropout=0.1, remat="cells"
    ),
    alternatives={},
)


def cell_sets(config, n):
    """Four sets of three cells, the last cell of one of them filler, from two gene spaces."""
    rng = np.random.default_rng([9, n])
    cells = rng.exponential(size=(4, 3, config.n_genes)).astype(np.float32)
    mask = np.ones((4, 3), bool)
    cells[1, 2], mask[1, 2] = cells[1, 0], False
    measured = np.ones((4, config.n_genes), bool)
    measured[3, :2] = False
    ids = lambda n: rng.permutation(np.arange(4) % n).astype(np.int32)  # noqa: E731
    return CellSetBatch(
        cells=cells,
        control=rng.exponential(size=cells.shape).astype(np.float32),
        covariates={
            "perturbation": ids(3),
            "cell_type": ids(2),
            "batch": np.stack([ids(2) for _ in range(3)], axis=1) if config.remat == "layers" else ids(2),
            "dose": ids(3),
        },
        mask=mask,
        space=ids(2),
        measured=measured,
    )


def awake(module):
    """The module with noise on its first parameters: the zeros of adaLN-Zero let no gradient into the layers."""

    def init(key, config):
        leaves, structure = jax.tree.flatten(module.init(key, config))
        keys = jax.random.split(jax.random.fold_in(key, 1), len(leaves))
        noisy = [leaf + 0.1 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)]
        return jax.tree.unflatten(structure, noisy)

    copy = ModuleType(module.__name__)
    vars(copy).update(vars(module), init=init)
    return copy


PERTURBDIFF = Row(
    module=awake(perturbdiff),
    config=perturbdiff.Config(
        n_genes=6,
        n_perturbations=3,
        n_cell_types=2,
        n_batches=2,
        n_perturbation_features=4,
        n_cell_type_features=3,
        n_doses=3,
        n_spaces=2,
        d_model=8,
        n_layers=2,
        n_heads=2,
        d_covariate=4,
        condition_dropout=0.22,  # with the battery's key two of the four sets are hidden
        control_dropout=0.3,  # and the controls of one
        denoising_weight=0.7,
        energy_weight=0.9,
        divisor=2.0,
    ),
    batch_at=cell_sets,
    total=lambda c, terms: c.denoising_weight * terms["denoising"] + c.energy_weight * terms[f"{c.distance}_distance"],
    constants=lambda c: {
        "constants": perturbdiff.Constants(jnp.eye(3, c.n_perturbation_features), jnp.eye(2, c.n_cell_type_features))
    },
    alternatives={
        "n_genes": 7,
        "n_perturbations": 4,
        "n_cell_types": 3,
        "n_batches": 3,
        "n_perturbation_features": {"perturbation": "vector", "n_perturbation_features": 5},
        "n_cell_type_features": {"cell_type": "vector", "n_cell_type_features": 5},
        "n_doses": None,
        "n_spaces": 3,
        "d_model": 4,
        "n_layers": 1,
        "n_heads": 4,
        "mlp_ratio": 2.0,
        "perturbation": "none",
        "cell_type": "none",
        "batch": "none",
        "d_covariate": 3,
        "covariate_width": "model",
        "attention": "tokens",
        "block": "sequential",
        "class_silu": True,
        "schedule": "cosine",
        "n_times": 100,
        "condition_dropout": 0.5,
        "control_dropout": 0.2,
        "self_conditioning": 0.25,
        "drop_per": "batch",
        "mask_filler": False,
        "denoising_weight": 0.5,
        "energy_weight": 0.5,
        "distance": "gaussian",
        "shared_noise": 0.3,
        "divisor": 4.0,
        "compute_dtype": "bfloat16",
        "remat": "layers",
    },
)
PERTURBDIFF_OPTIONS = replace(
    PERTURBDIFF,
    config=replace(
        PERTURBDIFF.config,
        n_doses=None,
        n_spaces=3,
        perturbation="vector",
        cell_type="vector",
        covariate_width="model",
        attention="tokens",
        block="sequential",
        class_silu=True,
        distance="gaussian",
        shared_noise=0.2,
        remat="layers",  # and covariates that change from cell to cell
    ),
    alternatives={},
)

MODELS: dict[str, Row] = {
    "scimf": SCIMF,
    "scimf-options": replace(
        SCIMF,
        config=replace(SCIMF.config, n_blocks=2, residual=True, diffusion="mlp", diffusion_widths=(3,), dropout=0.0),
        alternatives={},
    ),
    "scdfm": SCDFM,
    "scdfm-vectors": SCDFM_VECTORS,
    "perturbdiff": PERTURBDIFF,
    "perturbdiff-options": PERTURBDIFF_OPTIONS,
}
