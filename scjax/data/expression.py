"""Expression in a model's space: the steps fitted on the cells of training, then every cell transformed."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float, Int

from scjax.data.disk import Derived, DiskMatrix, Subset, cells_at_once, is_on_disk
from scjax.data.preprocess import Preprocess, Transform, fit
from scjax.data.source import CellSource, open_source
from scjax.data.spec import AnnData, DataSpec, expression_matrix
from scjax.data.store import store_cells

__all__ = ["ModelCells", "check_steps", "fit_expression", "transform_all", "transformed"]

# In a model's space: in memory, or read (and transformed) when they are asked for.
ModelCells: TypeAlias = Float[np.ndarray, "cells dims"] | Float[DiskMatrix, "cells dims"]


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
    store: str | Path | None = None,
) -> tuple[Transform, ModelCells]:
    """The steps fitted on the cells of training, and all cells of `adata` transformed.

    Args:
        forced: genes to keep, however little they vary.
        store: see `transform_all`.
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
    return transform, transform_all(source, transform, store)


def transform_all(source: CellSource, transform: Transform, store: str | Path | None = None) -> ModelCells:
    """Every cell in the model's space, read in parts.

    Args:
        store: a folder for cells of these data, in which they are kept on disk, see `data.store`; the same transform
            finds them there again. None keeps them in memory. The numbers are the same.
    """
    shape, step = (source.n_cells, transform.n_dims), cells_at_once(len(source.feature_names))

    def parts() -> Iterator[np.ndarray]:
        for start in range(0, source.n_cells, step):
            chunk = np.arange(start, min(start + step, source.n_cells))
            yield transform.apply(source.rows(chunk), source.feature_names)

    if store is not None:
        return store_cells(store, _key(transform), shape, parts)
    x = np.empty(shape, np.float32)
    for i, part in enumerate(parts()):
        x[i * step : i * step + len(part)] = part
    return x


def transformed(cells: AnnData, spec: DataSpec, transform: Transform) -> ModelCells:
    """These cells in the model's space; those on disk are read and transformed when they are asked for."""
    source = open_source(cells, spec)
    if not is_on_disk(cells):
        return transform_all(source, transform)
    shape = source.n_cells, transform.n_dims
    return Derived(shape, lambda rows: transform.apply(source.rows(rows), source.feature_names))


def _key(transform: Transform) -> str:
    arrays, rest = transform.to_tree()
    h = hashlib.blake2b(json.dumps(rest, sort_keys=True).encode(), digest_size=8)
    for name in sorted(arrays):
        h.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
    return h.hexdigest()


def _matrix(adata: AnnData, spec: DataSpec, rows: Int[np.ndarray, " n"]) -> Any:
    """These cells as they lie in `adata`: a sparse matrix of all genes stays sparse, one on disk stays there."""
    from scipy import sparse

    matrix = expression_matrix(adata, spec)
    if is_on_disk(matrix):
        return Subset(matrix, rows, None if matrix.is_sparse else np.float32)
    return matrix.tocsr()[rows] if sparse.issparse(matrix) else open_source(adata, spec).rows(rows)
