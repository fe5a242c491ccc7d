"""Which rows make batch n: a function of (seed, n), so that neither threads nor a restart change a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from scjax.check import at_least

__all__ = ["TimeSeriesRows", "TimeSeriesSampling", "time_series_rows"]


@dataclass(frozen=True, kw_only=True)
class TimeSeriesSampling:
    """How many cells a step sees.

    Attributes:
        n_cells: of the first time, drawn at each step; together they are the interacting population. 512 in the paper.
        n_targets: of each later time, drawn at each step; None takes all observed cells, as the paper does.
    """

    n_cells: int = 512
    n_targets: int | None = None

    def __post_init__(self):
        at_least("n_cells", self.n_cells, 1)
        if self.n_targets is not None:
            at_least("n_targets", self.n_targets, 1)


class TimeSeriesRows(NamedTuple):
    """Row numbers of one batch: cells of the first time, and for each later time its target cells."""

    start: Int[np.ndarray, " n_cells"]
    targets: tuple[Int[np.ndarray, " _"], ...]


def time_series_rows(
    populations: Sequence[Int[np.ndarray, " _"]], sampling: TimeSeriesSampling, *, seed: int, step: int
) -> TimeSeriesRows:
    """Batch `step` of a run with this seed. `populations`: the rows of each training time, the first time first.

    A draw is uniform without replacement where the population is large enough, else with replacement (so a small first
    stage gives exact duplicates, as in the scIMF code).
    """
    at_least("seed", seed, 0)
    at_least("step", step, 0)
    rng = np.random.default_rng([seed, step])
    start = _draw(rng, populations[0], sampling.n_cells)
    if sampling.n_targets is None:
        return TimeSeriesRows(start, tuple(populations[1:]))
    return TimeSeriesRows(start, tuple(_draw(rng, rows, sampling.n_targets) for rows in populations[1:]))


def _draw(rng: np.random.Generator, rows: np.ndarray, n: int) -> np.ndarray:
    return rng.choice(rows, n, replace=len(rows) < n)
