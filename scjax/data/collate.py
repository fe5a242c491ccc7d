"""Rows to batches of static shape."""

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float, Int

from scjax.batches import CellSetBatch, PairedBatch, TimeSeriesBatch
from scjax.check import one_of
from scjax.data.cellsets import CellSetData
from scjax.data.conditions import EmbeddingKind
from scjax.data.expression import ModelCells
from scjax.data.perturbation import PerturbationData
from scjax.data.sampling import (
    CellSetSampling,
    PairedSampling,
    TimeSeriesSampling,
    cell_set_rows,
    paired_rows,
    time_series_rows,
)
from scjax.data.timeseries import TimeSeriesData
from scjax.types import Population

__all__ = ["Share", "make_batches", "make_cell_set_batches", "make_paired_batches", "optimal_pairs", "pad_populations"]

# Of an array of cells, [cells, dims] or [groups, cells, genes], given its shape: the slices that this process needs.
# All batches take one, `batch_at(step, share)`: other cells are not read and stay 0. So each of several hosts reads its
# own cells of a batch that all of them know the rows of. Targets of a time series that are all observed cells, the same
# at every step (n_targets=None), are read once, by each host all of them.
Share: TypeAlias = Callable[[tuple[int, ...]], tuple[slice, ...]]

_CONTROL_STREAM = 1  # of random numbers, besides that of the sets


def pad_populations(
    latent: ModelCells, populations: tuple[Int[np.ndarray, " _"], ...], share: Share | None = None
) -> tuple[Float[np.ndarray, "times target_cells dims"], Float[np.ndarray, "times target_cells"]]:
    """Populations of unequal size as one array, and the mass of each cell.

    A population of n cells has masses 1 / n; its padding repeats its first cell with mass 0.
    """
    widest = max(map(len, populations))
    rows = np.stack([np.concatenate([p, np.full(widest - len(p), p[0])]) for p in populations])
    weights = np.stack([np.where(np.arange(widest) < len(p), 1.0 / len(p), 0.0) for p in populations])
    return _cells(latent, rows, share), weights.astype(np.float32)


def make_batches(
    data: TimeSeriesData,
    sampling: TimeSeriesSampling,
    seed: int,
    self_transport: Any = None,
) -> Callable[..., TimeSeriesBatch]:
    """Batch n of training, for any n: the training times only, on the time scale of `data`.

    Args:
        self_transport: float[training times - 1], see TimeSeriesBatch. It belongs to the full populations, in the shape
            of `make_batches(...)(0).targets`.

    Raises:
        ValueError: a self transport of another shape, or together with `n_targets`, where it changes at each step.
    """
    populations = tuple(data.rows_at(t) for t in data.split.train)
    ts = data.solver_times(data.split.train)
    if self_transport is not None:
        self_transport = _checked_self_transport(self_transport, sampling, len(ts) - 1)
    # All observed cells are the targets of every step: gather them once.
    full = pad_populations(data.latent, populations[1:]) if sampling.n_targets is None else None

    def batch_at(step: int, share: Share | None = None) -> TimeSeriesBatch:
        rows = time_series_rows(populations, sampling, seed=seed, step=step)
        targets, weights = full or pad_populations(data.latent, rows.targets, share)
        return TimeSeriesBatch(
            x0=_cells(data.latent, rows.start, share),
            targets=targets,
            weights=weights,
            self_transport=self_transport,
            ts=ts,
        )

    return batch_at


def _checked_self_transport(self_transport: Any, sampling: TimeSeriesSampling, n_targets: int) -> np.ndarray:
    if sampling.n_targets is not None:
        raise ValueError(
            f"self_transport belongs to the full populations, but n_targets={sampling.n_targets} draws others at each "
            f"step. Give self_transport=None, or n_targets=None."
        )
    values = np.asarray(self_transport, np.float32)
    if values.shape != (n_targets,):
        raise ValueError(f"self_transport must have shape ({n_targets},), one a later time; got {values.shape}.")
    return values


def make_paired_batches(
    data: PerturbationData,
    sampling: PairedSampling,
    seed: int,
    kind: EmbeddingKind = "gene",
    populations: Iterable[Population] | None = None,
) -> Callable[..., PairedBatch]:
    """Batch n of training, for any n: cells of training populations and controls of the same context.

    Args:
        kind: what the ids of `PairedBatch.perturbation` count: tokens ("gene") or `data.vocabulary.perturbations`
            ("table", and "vector", whose rows are those of `data.vectors`).
        populations: to draw from; None takes those of training. For a validation loss: `data.split.validation`.

    Raises:
        ValueError: no population to draw from, more genes than the data have, kind="vector" without vectors.
    """
    one_of("kind", kind, ("gene", "table", "vector"))
    if kind == "vector" and data.vectors is None:
        raise ValueError("kind='vector', but the data have no external vectors; name them in DataSpec.vectors.")
    given = data.split.train if populations is None else tuple(populations)
    drawn = [p for p in given if sampling.include_control or not p.is_control]
    if not drawn:
        raise ValueError(
            f"populations must hold at least one to draw from; got {', '.join(map(str, given)) or 'none'}."
        )
    targets = [data.rows_of(p) for p in drawn]
    sources = [data.rows_of(Population((), p.context)) for p in drawn]
    ids = data.vocabulary.encode([p.perturbation for p in drawn], "gene" if kind == "gene" else "table", data.n_slots)
    tokens = data.vocabulary.gene_tokens(data.transform.feature_names)

    def batch_at(step: int, share: Share | None = None) -> PairedBatch:
        rows = paired_rows(targets, sources, data.n_genes, sampling, seed=seed, step=step)
        if sampling.coupling == "ot":
            share = None  # who is paired with whom is a matter of all cells
        source, target = (_cells(data.x, r, share, rows.genes) for r in (rows.source, rows.target))
        if sampling.coupling == "ot":
            source = np.stack([x0[optimal_pairs(x0, x1)] for x0, x1 in zip(source, target, strict=True)])
        return PairedBatch(source=source, target=target, perturbation=ids[rows.populations], genes=tokens[rows.genes])

    batch_at(0)  # what does not fit is an error here, not later in a thread
    return batch_at


def make_cell_set_batches(
    data: CellSetData,
    sampling: CellSetSampling,
    seed: int,
    populations: Iterable[Population] | None = None,
) -> Callable[..., CellSetBatch]:
    """Batch n of training, for any n: sets of cells of training populations, and a control cell for each cell.

    A covariate that is one for all cells of each group is int[sets] in the batch, another int[sets, cells].

    Args:
        populations: to draw from; None takes those of training. For a validation loss: `data.split.validation`. Their
            controls are those that their part of the data may use.

    Raises:
        ValueError: no cell to draw from, more sets than an epoch has, a covariate to group by that the data lack,
            matched controls where the data have no perturbations.
    """
    if sampling.controls == "matched" and data.pools is None:
        raise ValueError(
            "sampling.controls='matched', but the data have no perturbations and so no controls "
            "(DataSpec.perturbation=None). Set controls='zeros', and drop the control in the model (control_dropout=1)."
        )
    targets = data.target_rows(populations, include_control=sampling.include_control)
    groups = data.groups(targets, sampling.group_by)
    grouped = data.covariates if sampling.group_by is None else sampling.group_by
    if not groups:
        raise ValueError(
            "populations must hold cells to draw from; they have none"
            f"{'' if sampling.include_control else ' but controls (sampling.include_control=False)'}."
        )
    constant = {
        role: role in grouped or all((ids[rows] == ids[rows[0]]).all() for rows in groups)
        for role, ids in data.covariates.items()
    }
    several = len(data.names.sources) > 1
    all_measured = bool(data.measured.all())
    rows_at = cell_set_rows(groups, sampling, seed=seed)

    def batch_at(step: int, share: Share | None = None) -> CellSetBatch:
        rows, mask, _ = rows_at(step)
        if sampling.controls == "zeros":
            control = np.zeros((*rows.shape, data.n_genes), data.x.dtype)
        else:
            rng = np.random.default_rng([seed, step, _CONTROL_STREAM])
            control = _cells(data.x, data.pools.draw(rng, rows), share)  # pyright: ignore[reportOptionalMemberAccess]
        source = data.source[rows[:, 0]]
        return CellSetBatch(
            cells=_cells(data.x, rows, share),
            control=control,
            covariates={r: ids[rows[:, 0] if constant[r] else rows] for r, ids in data.covariates.items()},
            mask=mask,
            space=source if several else None,
            measured=None if all_measured else data.measured[source],
        )

    batch_at(0)  # what does not fit is an error here, not later in a thread
    return batch_at


def _cells(
    x: ModelCells,
    rows: Int[np.ndarray, "*cells"],
    share: Share | None,
    genes: Int[np.ndarray, " g"] | None = None,
) -> Float[np.ndarray, "*cells genes"]:
    n_genes = x.shape[1] if genes is None else len(genes)
    if share is not None:
        out = np.zeros((*rows.shape, n_genes), x.dtype)
        part = share(out.shape)[: rows.ndim]
        out[part] = _cells(x, rows[part], None, genes)
        return out
    found = x[rows]
    return found if genes is None else np.ascontiguousarray(found[..., genes])


def optimal_pairs(
    x0: Float[np.ndarray, "cells genes"], x1: Float[np.ndarray, "cells genes"]
) -> Int[np.ndarray, " cells"]:
    """The order of `x0` in which it lies nearest to `x1`, cell by cell: exact optimal transport, squared distances."""
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    rows, columns = linear_sum_assignment(cdist(x1, x0, "sqeuclidean"))
    return columns[np.argsort(rows)]
