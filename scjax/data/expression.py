"""Expression in a model's space: the steps fitted on the cells of training, then every cell transformed."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from scjax.data.preprocess import Preprocess, Transform, fit
from scjax.data.source import CellSource, open_source
from scjax.data.spec import AnnData, DataSpec, expression_matrix

__all__ = ["check_steps", "fit_expression", "transform_all"]

_CHUNK = 4096  # cells that are read together


def check_steps(preprocess: Preprocess, models: str) -> None:
    """Raises ValueError for a scaling or a PCA, where `models` ("cell set models") work on expression itself."""
    wrong = {"scale": (preprocess.scale, False), "n_components": (preprocess.n_components is not None, None)}
    given = [f"{name}={getattr(preprocess, name)!r}" for name, (bad, _) in wrong.items() if bad]
    if given:
        mend = ", ".join(f"{name}={value}" for name, (bad, value) in wrong.items() if bad)
        has = ", ".join(given)
        raise ValueError(f"Preprocess has {has}, but {models} work on the expression of genes; set {mend}.")


def fit_expression(
    adata: AnnData,
    spec: DataSpec,
    preprocess: Preprocess,
    train_rows: Int[np.ndarray, " n"],
    *,
    forced: tuple[str, ...] = (),
) -> tuple[Transform, Float[np.ndarray, "cells genes"]]:
    """The steps fitted on the cells of training, and all cells of `adata` transformed.

    Args:
        forced: genes to keep, however little they vary.
    """
    source = open_source(adata, spec)
    transform = fit(
        preprocess,
        _matrix(adata, spec, train_rows),
        source.feature_names,
        spec.space,
        forced=forced,
        x_all=_matrix(adata, spec, np.arange(source.n_cells)) if preprocess.select_on == "all" else None,
    )
    return transform, transform_all(source, transform)


def transform_all(source: CellSource, transform: Transform) -> Float[np.ndarray, "cells dims"]:
    """Every cell in the model's space, read in parts."""
    x = np.empty((source.n_cells, transform.n_dims), np.float32)
    for start in range(0, source.n_cells, _CHUNK):
        chunk = np.arange(start, min(start + _CHUNK, source.n_cells))
        x[chunk] = transform.apply(source.rows(chunk), source.feature_names)
    return x


def _matrix(adata: AnnData, spec: DataSpec, rows: Int[np.ndarray, " n"]) -> Any:
    """These cells as they lie in `adata`: a sparse matrix of all genes stays sparse."""
    from scipy import sparse

    matrix = expression_matrix(adata, spec)
    return matrix.tocsr()[rows] if sparse.issparse(matrix) else open_source(adata, spec).rows(rows)
