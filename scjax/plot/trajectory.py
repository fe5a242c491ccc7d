"""Populations in two dimensions: predicted over observed cells, simulated paths, velocities."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Array, Float, Int

from scjax import check
from scjax.plot.palette import BACKGROUND, OBSERVED, PREDICTED, TIME_MAP

__all__ = ["grid_sample", "predicted_over_observed", "trajectories", "velocities"]

Cells: TypeAlias = Float[np.ndarray | Array, "_cells _dims"]
Time: TypeAlias = float | int

BELOW = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "frameon": False, "borderaxespad": 0.0}


def predicted_over_observed(
    observed: Mapping[Time, Cells],
    predicted: Mapping[Time, Cells],
    *,
    axes: Sequence[Any] | None = None,
    dims: tuple[int, int] = (0, 1),
    axis_names: tuple[str, str] = ("PC 1", "PC 2"),
    time_unit: str = "",
) -> list[Any]:
    """One panel for each predicted time: its predicted over its observed cells, all observed cells grey behind them.

    The panels share their limits, which hold all finite cells. Predicted cells that are not finite cannot be drawn;
    the panel's title counts them.

    Args:
        observed: cells of every time, those of the predicted times among them.
        predicted: cells of the held-out times.
        axes: one for each predicted time; a new figure unless given.
        dims: the two dimensions that are drawn.
        axis_names: what they are, with unit if they have one.
        time_unit: for the titles.

    Raises:
        ValueError: a predicted time that was not observed, another number of axes than of predicted times, or
            dimensions that the cells do not have.
    """
    if not predicted:
        raise ValueError("predicted must hold the cells of at least one time; it is empty.")
    for t in predicted:
        if t not in observed:
            raise ValueError(f"predicted has time {t:g}, which is not among the observed times {sorted(observed)}.")
    real = {t: _projected(f"observed[{t:g}]", x, dims) for t, x in observed.items()}
    pred = {t: _projected(f"predicted[{t:g}]", x, dims) for t, x in predicted.items()}
    axes = _panels(len(pred)) if axes is None else list(axes)
    if len(axes) != len(pred):
        raise ValueError(f"axes must hold one for each of {len(pred)} predicted times; got {len(axes)}.")
    everything = np.concatenate([*real.values(), *pred.values()])
    for ax, t in zip(axes, sorted(pred), strict=True):
        finite = np.isfinite(pred[t]).all(axis=1)
        for points, colour, size, label in (
            (np.concatenate(list(real.values())), BACKGROUND, 6, "observed, all times"),
            (real[t], OBSERVED, 12, "observed, held out"),
            (pred[t][finite], PREDICTED, 12, "predicted"),
        ):
            ax.scatter(*points.T, s=size, color=colour, alpha=0.6, linewidths=0, label=label, rasterized=True)
        _frame(ax, everything, axis_names)
        ax.set_title(f"held-out time {t:g} {time_unit}".rstrip() + _count_of_lost(finite))
        _legend(ax)
    return axes


def trajectories(
    paths: Float[np.ndarray | Array, "times cells dims"],
    ts: Sequence[Time] | Float[np.ndarray | Array, " times"],
    *,
    observed: Cells | None = None,
    n_paths: int = 60,
    seed: int = 0,
    ax: Any = None,
    dims: tuple[int, int] = (0, 1),
    axis_names: tuple[str, str] = ("PC 1", "PC 2"),
    time_unit: str = "",
) -> Any:
    """Paths of a random sample of simulated cells, coloured by time; a dot where each one starts.

    Args:
        paths: the simulated population at each time.
        ts: the times of `paths`, increasing.
        observed: cells drawn in grey behind the paths.
        n_paths: cells whose paths are drawn, at most all of them.
        seed: chooses them.
        ax: a new figure unless given.
        dims: the two dimensions that are drawn.
        axis_names: what they are, with unit if they have one.
        time_unit: for the colour bar.
    """
    from matplotlib.collections import LineCollection

    paths = np.asarray(paths)
    ts = np.asarray(check.increasing("ts", np.asarray(ts, np.float64)))
    if paths.ndim != 3 or len(paths) != len(ts) or len(ts) < 2:
        raise ValueError(
            f"paths must be [times, cells, dims] with at least two times; got {paths.shape}, {len(ts)} ts."
        )
    check.at_least("n_paths", n_paths, 1)
    rows = np.random.default_rng(seed).permutation(paths.shape[1])[:n_paths]
    flat = _projected("paths", paths[:, rows].reshape(-1, paths.shape[2]), dims)
    points = flat.reshape(len(ts), len(rows), 2)
    ax = _panels(1, width=5.6)[0] if ax is None else ax
    everything = flat
    if observed is not None:
        behind = _projected("observed", observed, dims)
        ax.scatter(*behind.T, s=6, color=BACKGROUND, alpha=0.6, linewidths=0, label="observed", rasterized=True)
        everything = np.concatenate([flat, behind])
    segments = np.stack([points[:-1], points[1:]], axis=2).reshape(-1, 2, 2)
    middle = np.repeat((ts[:-1] + ts[1:]) / 2, len(rows))
    lines = LineCollection(list(segments), cmap=TIME_MAP, array=middle, linewidths=1.0, alpha=0.85)
    lines.set_clim(ts[0], ts[-1])
    ax.add_collection(lines)
    ax.scatter(*points[0].T, s=10, c=np.full(len(rows), ts[0]), cmap=TIME_MAP, vmin=ts[0], vmax=ts[-1], zorder=3)
    ax.figure.colorbar(lines, ax=ax, label=f"time ({time_unit})" if time_unit else "time", shrink=0.85)
    _frame(ax, everything, axis_names)
    ax.set_title(f"paths of {len(rows)} of {paths.shape[1]} simulated cells" + _count_of_lost(np.isfinite(flat).all(1)))
    return ax


def velocities(
    x: Cells,
    v: Cells,
    *,
    ax: Any = None,
    dims: tuple[int, int] = (0, 1),
    grid_size: float | None = None,
    min_cells: int = 3,
    arrow_length: float | None = None,
    time_step: float = 1.0,
    seed: int = 0,
    colour: str = "black",
    axis_names: tuple[str, str] = ("PC 1", "PC 2"),
) -> Any:
    """Arrows of the cells' velocities, one cell for each sufficiently full square of a grid.

    Args:
        x, v: cells and their velocities, the latter in units of `x` per unit of time.
        ax: drawn over what is there; a new figure with the cells in grey unless given.
        dims: the two dimensions that are drawn.
        grid_size: width of the squares, in the unit of `x`; a twentieth of the wider side unless given.
        min_cells: a square with fewer cells has no arrow.
        arrow_length: every arrow that long, in the unit of `x`, so that it shows the direction alone.
        time_step: unless `arrow_length` is given an arrow is the path over so many units of time, at this velocity.
        seed: chooses the cell of each square.
        colour: of the arrows.
        axis_names: for a new figure.
    """
    points, arrows = _projected("x", x, dims), _projected("v", v, dims)
    if points.shape != arrows.shape:
        raise ValueError(f"x and v must have one shape; got {np.shape(x)} and {np.shape(v)}.")
    if arrow_length is not None:
        check.positive("arrow_length", arrow_length)
        length = np.linalg.norm(arrows, axis=1, keepdims=True)
        arrows = np.divide(arrows, length, out=np.zeros_like(arrows), where=length > 0) * arrow_length
    else:
        check.positive("time_step", time_step)
        arrows = arrows * time_step
    if ax is None:
        ax = _panels(1)[0]
        ax.scatter(*points.T, s=6, color=BACKGROUND, linewidths=0, rasterized=True)
        _frame(ax, points, axis_names)
    if grid_size is None:
        grid_size = float(np.nanmax(np.ptp(points, axis=0))) / 20
    rows = grid_sample(points, grid_size, min_cells=min_cells, seed=seed)
    ax.quiver(
        *points[rows].T, *arrows[rows].T, angles="xy", scale_units="xy", scale=1, color=colour, width=0.004, zorder=4
    )
    return ax


def grid_sample(
    points: Float[np.ndarray, "cells 2"], grid_size: float, *, min_cells: int = 3, seed: int = 0
) -> Int[np.ndarray, " rows"]:
    """Row of one random cell for each square of the grid with at least `min_cells` cells."""
    check.positive("grid_size", grid_size)
    squares = np.floor(points / grid_size).astype(np.int64)
    _, first, count = np.unique(squares, axis=0, return_index=True, return_counts=True)
    rng = np.random.default_rng(seed)
    chosen = [rng.choice(np.flatnonzero((squares == squares[row]).all(axis=1))) for row in first[count >= min_cells]]
    return np.array(chosen, np.int64)


def _panels(n: int, width: float = 4.6) -> list[Any]:
    import matplotlib.pyplot as plt

    n_columns = min(n, 4)
    n_rows = -(-n // n_columns)
    figure, axes = plt.subplots(
        n_rows, n_columns, figsize=(width * n_columns, 4.6 * n_rows), squeeze=False, layout="constrained"
    )
    for ax in axes.flat[n:]:
        figure.delaxes(ax)
    return list(axes.flat[:n])


def _projected(name: str, x: Any, dims: tuple[int, int]) -> np.ndarray:
    x = np.asarray(x)
    if x.ndim != 2 or not all(0 <= d < x.shape[1] for d in dims):
        raise ValueError(f"{name} must be [cells, dims] with the dimensions dims={dims}; got the shape {x.shape}.")
    return x[:, list(dims)]


def _frame(ax: Any, points: np.ndarray, axis_names: tuple[str, str]) -> None:
    points = points[np.isfinite(points).all(axis=1)]
    low, high = points.min(axis=0), points.max(axis=0)
    margin = 0.04 * np.where(high > low, high - low, 1.0)
    ax.set_xlim(low[0] - margin[0], high[0] + margin[0])
    ax.set_ylim(low[1] - margin[1], high[1] + margin[1])
    ax.set_xlabel(axis_names[0])
    ax.set_ylabel(axis_names[1])


def _legend(ax: Any) -> None:
    legend = ax.legend(**BELOW, markerscale=2)
    for handle in legend.legend_handles:
        handle.set_alpha(1)


def _count_of_lost(finite: np.ndarray) -> str:
    n = int((~finite).sum())
    return f"\n{n} of {len(finite)} points not finite, not drawn" if n else ""
