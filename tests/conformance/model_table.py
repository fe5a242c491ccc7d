"""The table of models: a model joins the battery of `test_conformance.py` by a row here.

A row is a tiny config, a builder of tiny batches, the loss's documented weights, and for each field of the config
another value. Two rows of one model cover options that have parameters of their own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

from scjax.batches import PairedBatch, TimeSeriesBatch
from scjax.models import scdfm, scimf


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
        "diffusion": "learned",
        "sigma": 0.2,
        "diffusion_widths": {"diffusion": "mlp", "diffusion_widths": (3,)},
        "dt": 0.25,
        "sinkhorn": "converged",
        "blur": 0.4,
        "scaling": 0.5,
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

MODELS: dict[str, Row] = {
    "scimf": SCIMF,
    "scimf-options": replace(
        SCIMF,
        config=replace(SCIMF.config, n_blocks=2, residual=True, diffusion="mlp", diffusion_widths=(3,), dropout=0.0),
        alternatives={},
    ),
    "scdfm": SCDFM,
    "scdfm-vectors": SCDFM_VECTORS,
}
