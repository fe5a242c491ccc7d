"""The table of models: a model joins the battery of `test_conformance.py` by a row here.

A row is a tiny config, a builder of tiny batches, the loss's documented weights, and for each field of the config
another value. Two rows of one model cover options that have parameters of their own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np

from scjax.batches import TimeSeriesBatch
from scjax.models import scimf


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
    """

    module: ModuleType
    config: Any
    batch_at: Callable[[Any, int], Any]
    total: Callable[[Any, Mapping[str, Any]], Any]
    alternatives: Mapping[str, Any]


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

MODELS: dict[str, Row] = {
    "scimf": SCIMF,
    "scimf-options": replace(
        SCIMF,
        config=replace(SCIMF.config, n_blocks=2, residual=True, diffusion="mlp", diffusion_widths=(3,), dropout=0.0),
        alternatives={},
    ),
}
