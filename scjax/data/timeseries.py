"""A time series ready for a model: every cell in the model's space, by time, under a split."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import numpy as np
from jaxtyping import Float, Int

from scjax.check import increasing, one_of
from scjax.data.disk import Subset, is_on_disk
from scjax.data.expression import ModelCells, transform_all
from scjax.data.preprocess import Preprocess, Transform, fit
from scjax.data.source import open_source
from scjax.data.spec import AnnData, DataSpec, expression_matrix
from scjax.data.splits import TimeSplit, TimeSplitRule, split_times

__all__ = ["TimeScale", "TimeSeriesData", "prepare_time_series", "solver_times"]

TimeScale: TypeAlias = Literal["real", "index", "mean_gap"]


@dataclass(frozen=True, kw_only=True, eq=False)
class TimeSeriesData:
    """Snapshots of a population, held-out ones included.

    Attributes:
        latent: float32[cells, dims]; row i is cell i of the AnnData. In memory, or read from disk as they are indexed.
        time: the observed time of each cell, in the unit of the time column.
        times: those times, increasing.
        rows: for each of `times`, the rows of its cells, increasing.
        split: which of `times` training sees.
        transform: fitted on the cells of the training times.
        time_scale: what a solver calls time: "real", the observed times; "index", the position among all `times`,
            held-out ones included, as in the scIMF code, where unequal gaps count as equal; "mean_gap", the observed
            times since the first, in units of the mean gap between training times, so that settings found on days
            suit hours and weeks.
        cell_type: an index into `cell_types` for each cell, where the DataSpec names a column.
    """

    latent: ModelCells
    time: Float[np.ndarray, " cells"]
    times: tuple[float, ...]
    rows: tuple[Int[np.ndarray, " _"], ...]
    split: TimeSplit
    transform: Transform
    time_scale: TimeScale = "real"
    cell_type: Int[np.ndarray, " cells"] | None = None
    cell_types: tuple[str, ...] = ()

    @property
    def n_dims(self) -> int:
        return self.latent.shape[1]

    def rows_at(self, time: float) -> Int[np.ndarray, " n"]:
        if time not in self.times:
            raise ValueError(f"time must be one of {', '.join(map(str, self.times))}; got {time}.")
        return self.rows[self.times.index(time)]

    def population(self, time: float) -> Float[np.ndarray, "n dims"]:
        """All cells observed at `time`."""
        return self.latent[self.rows_at(time)]

    def solver_times(self, times: Iterable[float]) -> tuple[float, ...]:
        """These observed times on the `time_scale`."""
        return solver_times(times, self.times, self.time_scale, self.split.train)


def solver_times(
    times: Iterable[float], all_times: Iterable[float], time_scale: TimeScale, train_times: Iterable[float]
) -> tuple[float, ...]:
    """Times on the scale of the solver; `all_times` are those of the data set, `train_times` those of them seen.

    Raises:
        ValueError: another scale, times that do not increase, or on the index scale a time that was not observed.
    """
    one_of("time_scale", time_scale, get_args(TimeScale))
    times = increasing("times", times)
    if time_scale == "real":
        return times
    all_times = increasing("all_times", all_times)
    if time_scale == "mean_gap":
        train_times = increasing("train_times", train_times)
        gap = (train_times[-1] - train_times[0]) / (len(train_times) - 1)
        return tuple((t - all_times[0]) / gap for t in times)
    unknown = [t for t in times if t not in all_times]
    if unknown:
        raise ValueError(
            f"times must be observed ones where time_scale='index'; got {unknown}, the data have {all_times}."
        )
    return tuple(float(all_times.index(t)) for t in times)


def prepare_time_series(
    adata: AnnData,
    spec: DataSpec,
    rule: TimeSplitRule,
    preprocess: Preprocess,
    *,
    time_scale: TimeScale = "real",
    store: str | Path | None = None,
) -> TimeSeriesData:
    """Check, split by `rule`, fit `preprocess` on the cells of the training times, project every cell.

    Args:
        store: a folder of these data's own that keeps the projected cells on disk, see `data.store`; None: memory.

    Raises:
        ValueError: all that `spec.check`, `split_times` and `preprocess.fit` find.
    """
    one_of("time_scale", time_scale, get_args(TimeScale))
    spec.check(adata)
    time = spec.read_times(adata)
    times = tuple(float(t) for t in np.unique(time))
    split = split_times(rule, times)
    source = open_source(adata, spec)
    train_rows = np.flatnonzero(np.isin(time, split.train))
    matrix = expression_matrix(adata, spec)
    x_train = Subset(matrix, train_rows, np.float32) if is_on_disk(matrix) else source.rows(train_rows)
    transform = fit(preprocess, x_train, source.feature_names, spec.space)
    latent = transform_all(source, transform, store)

    cell_type, cell_types = _cell_types(adata, spec)
    return TimeSeriesData(
        latent=latent,
        time=time,
        times=times,
        rows=tuple(np.flatnonzero(time == t) for t in times),
        split=split,
        transform=transform,
        time_scale=time_scale,
        cell_type=cell_type,
        cell_types=cell_types,
    )


def _cell_types(adata: AnnData, spec: DataSpec) -> tuple[np.ndarray | None, tuple[str, ...]]:
    if spec.cell_type is None:
        return None, ()
    names, codes = np.unique(adata.obs[spec.cell_type].astype(str).to_numpy(dtype=object), return_inverse=True)
    return codes.astype(np.int32), tuple(map(str, names))
