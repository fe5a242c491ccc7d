"""Rows to batches of static shape."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from scjax.batches import TimeSeriesBatch
from scjax.data.sampling import TimeSeriesSampling, time_series_rows
from scjax.data.timeseries import TimeSeriesData

__all__ = ["make_batches", "pad_populations"]


def pad_populations(
    latent: Float[np.ndarray, "cells dims"], populations: tuple[Int[np.ndarray, " _"], ...]
) -> tuple[Float[np.ndarray, "times target_cells dims"], Float[np.ndarray, "times target_cells"]]:
    """Populations of unequal size as one array, and the mass of each cell.

    A population of n cells has masses 1 / n; its padding repeats its first cell with mass 0.
    """
    widest = max(map(len, populations))
    rows = np.stack([np.concatenate([p, np.full(widest - len(p), p[0])]) for p in populations])
    weights = np.stack([np.where(np.arange(widest) < len(p), 1.0 / len(p), 0.0) for p in populations])
    return latent[rows], weights.astype(np.float32)


def make_batches(
    data: TimeSeriesData,
    sampling: TimeSeriesSampling,
    seed: int,
    self_transport: Any = None,
) -> Callable[[int], TimeSeriesBatch]:
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

    def batch_at(step: int) -> TimeSeriesBatch:
        rows = time_series_rows(populations, sampling, seed=seed, step=step)
        targets, weights = full or pad_populations(data.latent, rows.targets)
        return TimeSeriesBatch(
            x0=data.latent[rows.start], targets=targets, weights=weights, self_transport=self_transport, ts=ts
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
