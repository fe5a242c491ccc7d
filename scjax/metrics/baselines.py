"""Predictions of a held-out time without training: what a model has to beat.

All take `snapshots`, the cells of the *training* times by time, and the held-out time `t`; none sees the truth.
A "forecast" is a `t` after the last training time.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float

from scjax import check
from scjax.metrics.population import (
    MAX_EXACT,
    POPULATION_METRICS,
    Cells,
    Comparison,
    Metric,
    Score,
    transport_plan,
)

__all__ = [
    "Baseline",
    "linear_interpolation",
    "nearest_earlier",
    "nearest_later",
    "ot_displacement",
    "ot_interpolation",
    "replicate_floor",
    "training_free",
]

Time: TypeAlias = float | int  # in the unit of the data set


class Baseline(NamedTuple):
    """The cells that a rule predicts, or None with the reason why it predicts none here."""

    cells: np.ndarray | None
    note: str


def nearest_earlier(snapshots: Mapping[Time, Cells], t: Time) -> Float[np.ndarray, "_ dims"]:
    """The cells of the last training time before `t`, unchanged."""
    times, cells = _checked(snapshots, t)
    return cells[_earlier(times, t)]


def nearest_later(snapshots: Mapping[Time, Cells], t: Time) -> Float[np.ndarray, "_ dims"]:
    """The cells of the first training time after `t`, unchanged.

    Raises:
        ValueError: `t` is a forecast.
    """
    times, cells = _checked(snapshots, t)
    return cells[_later(times, t)]


def linear_interpolation(snapshots: Mapping[Time, Cells], t: Time) -> Float[np.ndarray, "_ dims"]:
    """The nearest earlier cells, shifted as one so that their mean lies on a straight line through two means.

    The line goes through the means of the neighbouring training times; for a forecast through those of the last two,
    so that the means are extrapolated.

    Raises:
        ValueError: a forecast from a single training time, or `t` before the first one.
    """
    times, cells = _checked(snapshots, t)
    start = _earlier(times, t)
    if times[-1] > t:
        t0, t1 = start, _later(times, t)
    elif len(times) > 1:
        t0, t1 = times[-2], times[-1]
    else:
        raise ValueError(f"a mean is extrapolated from two training times; snapshots has one, {times[0]:g}.")  # pyright: ignore[reportGeneralTypeIssues]
    slope = (cells[t1].mean(axis=0) - cells[t0].mean(axis=0)) / (t1 - t0)
    return cells[start] + (slope * (t - start))[None]


def ot_displacement(
    snapshots: Mapping[Time, Cells], t: float, *, max_exact: int = MAX_EXACT
) -> tuple[Float[np.ndarray, "points dims"], Float[np.ndarray, " points"]]:
    """McCann's displacement interpolation between the neighbouring training times, as points with mass.

    With the exact plan P of the squared cost and s = (t - t0) / (t1 - t0): mass P_ij at (1 - s) x_i + s y_j.

    Raises:
        ValueError: a forecast (there is nothing to interpolate), or too many cells for the exact plan.

    Reference: McCann, Advances in Mathematics 128 (1997).
    """
    times, cells = _checked(snapshots, t)
    t0, t1 = _earlier(times, t), _later(times, t)
    plan = transport_plan(cells[t0], cells[t1], max_exact=max_exact)
    s = (t - t0) / (t1 - t0)
    return (1 - s) * cells[t0][plan.source] + s * cells[t1][plan.target], plan.mass


def ot_interpolation(
    snapshots: Mapping[Time, Cells], t: float, *, n_cells: int | None = None, seed: int, max_exact: int = MAX_EXACT
) -> Float[np.ndarray, "_ dims"]:
    """`n_cells` cells drawn from the displacement interpolation (`ot_displacement`), in random order.

    Drawn systematically (one random offset along the cumulative mass): each point's expected count is its mass times
    `n_cells`, and no point comes twice as long as `n_cells` is at most the number of cells of the larger neighbour,
    which is also the default.
    """
    points, mass = ot_displacement(snapshots, t, max_exact=max_exact)
    if n_cells is None:
        times, cells = _checked(snapshots, t)
        n_cells = max(len(cells[_earlier(times, t)]), len(cells[_later(times, t)]))
    check.at_least("n_cells", n_cells, 1)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(points))
    at = (rng.random() + np.arange(n_cells)) / n_cells
    rows = np.searchsorted(np.cumsum(mass[order]), at).clip(max=len(points) - 1)
    return points[rng.permutation(order[rows])]


def training_free(
    snapshots: Mapping[Time, Cells], t: float, *, n_cells: int | None = None, seed: int, max_exact: int = MAX_EXACT
) -> dict[str, Baseline]:
    """All baselines for a table, by name; one that is not defined for this `t` has no cells and says why."""
    times, _ = _checked(snapshots, t)
    start = _earlier(times, t)
    rows = {"nearest earlier time": Baseline(nearest_earlier(snapshots, t), f"the cells of time {start:g}")}
    line = "linear interpolation"
    if times[-1] > t:
        end = _later(times, t)
        rows["nearest later time"] = Baseline(nearest_later(snapshots, t), f"the cells of time {end:g}")
        rows[line] = Baseline(
            linear_interpolation(snapshots, t), f"cells of time {start:g}, mean moved towards time {end:g}"
        )
        cells = ot_interpolation(snapshots, t, n_cells=n_cells, seed=seed, max_exact=max_exact)
        rows["OT interpolation"] = Baseline(cells, f"exact optimal transport between times {start:g} and {end:g}")
        return rows
    if len(times) > 1:
        rows["linear extrapolation"] = Baseline(
            linear_interpolation(snapshots, t), f"cells of time {start:g}, mean moved on from time {times[-2]:g}"
        )
    else:
        rows["linear extrapolation"] = Baseline(None, "not defined: needs two training times")
    rows["OT interpolation"] = Baseline(None, f"not defined: no training time after {t:g}")
    return rows


def replicate_floor(
    real: Cells,
    metrics: Mapping[str, Metric] = POPULATION_METRICS,
    *,
    n_cells: int | None = None,
    n_draws: int = 5,
    seed: int,
) -> Comparison:
    """Real against real: two disjoint random parts of one snapshot, the noise floor of each metric.

    The parts are halves (`n_cells` each, where that is less). They hold fewer cells than the comparisons above the
    floor, which makes distances larger: the floor is pessimistic, and a very good model can lie below it.

    Raises:
        ValueError: fewer than four cells.
    """
    real = np.asarray(real, np.float64)
    check.finite("real", real)
    check.at_least("the number of real cells", len(real), 4)
    check.at_least("n_draws", n_draws, 1)
    half = len(real) // 2
    n = half if n_cells is None else min(n_cells, half)
    check.at_least("n_cells", n, 2)
    values: dict[str, list[float]] = {name: [] for name in metrics}
    for draw in range(n_draws):
        rows = np.random.default_rng([seed, draw]).permutation(len(real))
        for name, metric in metrics.items():
            values[name].append(float(metric.fn(real[rows[:n]], real[rows[n : 2 * n]])))
    return Comparison(
        scores={name: Score(tuple(v)) for name, v in values.items()},
        n_cells=n,
        n_draws=n_draws,
        seed=seed,
        repeated="",
        n_nonfinite=0,
    )


def _checked(snapshots: Mapping[float, Any], t: float) -> tuple[tuple[float, ...], dict[float, np.ndarray]]:
    if not snapshots:
        raise ValueError("snapshots must hold the cells of at least one training time; it is empty.")
    cells = {float(time): np.asarray(snapshots[time], np.float64) for time in snapshots}
    times = check.increasing("the times of snapshots", sorted(cells))
    if float(t) in cells:
        raise ValueError(f"t={t:g} is to be predicted, but is among the training times of snapshots. Leave it out.")
    for time, x in cells.items():
        check.at_least(f"the number of cells of time {time:g}", len(x), 1)
        check.finite(f"snapshots[{time:g}]", x)
    if len({x.shape[1:] for x in cells.values()}) > 1:
        shapes = {time: x.shape for time, x in cells.items()}
        raise ValueError(f"snapshots must be arrays [cells, dims] of equal dims; got {shapes}.")
    return times, cells


def _earlier(times: tuple[float, ...], t: float) -> float:
    if t < times[0]:
        raise ValueError(f"t={t:g} lies before the first training time, {times[0]:g}: there is no earlier population.")
    return max(time for time in times if time < t)


def _later(times: tuple[float, ...], t: float) -> float:
    if t > times[-1]:
        raise ValueError(f"t={t:g} lies after the last training time, {times[-1]:g}: there is nothing to go towards.")
    return min(time for time in times if time > t)
