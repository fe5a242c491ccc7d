"""Distances between two clouds of cells, and their comparison at equal cell numbers.

Exact optimal transport is POT's network simplex in double precision; Sinkhorn, energy distance and MMD are those of
`scjax.losses`. All metrics are zero (or scatter around zero: MMD) for equal populations, and lower is better.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scjax import check

__all__ = [
    "POPULATION_METRICS",
    "Comparison",
    "Metric",
    "Plan",
    "Score",
    "compare_populations",
    "draw_cells",
    "energy_distance",
    "mmd2",
    "sinkhorn",
    "sinkhorn_metric",
    "spread",
    "transport_plan",
    "wasserstein1",
    "wasserstein2",
]

Cells: TypeAlias = Float[
    np.ndarray | Array, "_cells _dims"
]  # any two sizes: the guards below say more than a type error

MAX_EXACT = 5000  # cells of one population: 25 M costs, 200 MB, about 10 s
RELATIVE_BLUR = 0.05
MAX_SIMPLEX_STEPS = 100_000_000  # POT's own default of 100 000 stops early beyond about 500 cells


class Plan(NamedTuple):
    """A transport plan by its non-zero entries: `mass[k]` goes from cell `source[k]` to cell `target[k]`."""

    source: np.ndarray
    target: np.ndarray
    mass: np.ndarray  # sums to 1


def wasserstein1(
    x: Cells,
    y: Cells,
    *,
    x_weights: Float[np.ndarray, " _"] | None = None,
    y_weights: Float[np.ndarray, " _"] | None = None,
    max_exact: int = MAX_EXACT,
) -> float:
    """Exact 1-Wasserstein distance with the Euclidean norm, in the unit of `x`.

    min over plans of sum_ij P_ij |x_i - y_j|, by network simplex. Finite samples of one population are not at distance
    zero: compare at equal cell numbers, and beside a real-vs-real floor.

    The cells weigh the same unless `x_weights` or `y_weights` give each a mass (made to sum to 1). `max_exact` is the
    largest number of cells of one population that is still solved.

    Raises:
        ValueError: too many cells (subsample them: nothing is approximated silently), unequal dimensions, or
            values that are not finite.
        RuntimeError: the simplex stopped before its optimum.
    """
    return _exact_cost("euclidean", x, y, x_weights, y_weights, max_exact)


def wasserstein2(
    x: Cells,
    y: Cells,
    *,
    x_weights: Float[np.ndarray, " _"] | None = None,
    y_weights: Float[np.ndarray, " _"] | None = None,
    max_exact: int = MAX_EXACT,
) -> float:
    """Exact 2-Wasserstein distance, in the unit of `x`: the root of min over plans of sum_ij P_ij |x_i - y_j|^2.

    Arguments and errors as in `wasserstein1`.
    """
    return _exact_cost("sqeuclidean", x, y, x_weights, y_weights, max_exact) ** 0.5


def transport_plan(x: Cells, y: Cells, *, max_exact: int = MAX_EXACT) -> Plan:
    """Exact optimal plan between two uniform populations under the squared Euclidean cost.

    At most n + m - 1 of its entries are not zero. Errors as in `wasserstein1`.
    """
    import ot

    x, y = _pair(x, y, max_exact)
    matrix, log = ot.emd([], [], _costs("sqeuclidean", x, y)[0], numItermax=MAX_SIMPLEX_STEPS, log=True)
    _check_solved(log)
    source, target = np.nonzero(matrix)
    mass = matrix[source, target]
    return Plan(source, target, mass / mass.sum())


def sinkhorn(x: Cells, y: Cells, *, blur: float) -> float:
    """Converged, debiased Sinkhorn divergence (`losses.sinkhorn_divergence`); tends to W2^2 / 2 as blur tends to 0.

    In the squared unit of `x`; `blur` is in the unit of `x`. NaN where the iteration did not converge, which a table
    counts as a failed value: a blur far below the distance between neighbouring cells is the usual reason.
    """
    check.positive("blur", blur)
    x, y = _pair(x, y)
    solution = _sinkhorn(float(blur))(*_centred(x, y))
    return float(solution.divergence) if solution.converged else float("nan")


def energy_distance(x: Cells, y: Cells) -> float:
    """E|x - y| - E|x - x'| / 2 - E|y - y'| / 2, Euclidean and not squared, in the unit of `x`.

    Half of what is elsewhere called the (squared) energy distance; means over all pairs, a cell with itself included.
    """
    x, y = _pair(x, y)
    return float(_energy_distance()(*_centred(x, y)))


def mmd2(x: Cells, y: Cells) -> float:
    """Unbiased squared MMD (`losses.mmd2`), its Gaussian kernels as wide as the cells of `y`, the real ones, lie apart.

    Around zero it scatters to both sides. The prediction has no part in the bandwidths (`kernels.median_bandwidths`):
    predictions of one population are measured by one kernel.
    """
    x, y = _pair(x, y)
    check.at_least("the number of cells of each population", min(len(x), len(y)), 2)
    scale = spread(y) or 1.0  # of no effect but on the smallest bandwidth that there is
    # In double precision: one predicted cell far from all others would spend float32's digits on its own distances.
    with jax.enable_x64(True):
        return float(_mmd2()(jnp.asarray(x / scale), jnp.asarray(y / scale)))


class Metric(NamedTuple):
    """A named number that compares predicted with real cells.

    Attributes:
        definition: in words, for the foot of a table; values under two definitions are not comparable.
        unit: of the value, where the unit of the cells' coordinates is "x".
        direction: "lower is better" or "higher is better".
        fn: (predicted, real) -> value.
    """

    name: str
    definition: str
    unit: str
    direction: str
    fn: Callable[[Any, Any], float]


def sinkhorn_metric(*, blur: float | None = None) -> Metric:
    """The Sinkhorn divergence as a metric: at a fixed blur, in the unit of the cells, or relative to the real cells.

    Without `blur` it is 0.05 times the spread of the real cells (root of their total variance), so that one setting
    serves latents of any scale.
    """
    if blur is not None:
        check.positive("blur", blur)
        return Metric(
            "Sinkhorn",
            f"converged debiased Sinkhorn divergence, cost |x-y|^2/2, blur {blur:g} x, epsilon blur^2 (near W2^2/2)",
            "x^2",
            "lower is better",
            functools.partial(sinkhorn, blur=blur),
        )

    def relative(pred: Cells, real: Cells) -> float:
        # In units of the spread the blur is a constant of the compiled program, whatever the draw of cells.
        scale = spread(real)
        if scale == 0:
            raise ValueError("the real cells all coincide: they have no spread to set the blur by. Give blur.")
        return sinkhorn(np.asarray(pred) / scale, np.asarray(real) / scale, blur=RELATIVE_BLUR) * scale**2

    return Metric(
        "Sinkhorn",
        f"converged debiased Sinkhorn divergence, cost |x-y|^2/2, blur {RELATIVE_BLUR} of the real cells' spread "
        "(root of their total variance), epsilon blur^2 (near W2^2/2)",
        "x^2",
        "lower is better",
        relative,
    )


def spread(cells: Cells) -> float:
    """Root of the total variance: the root mean square distance of a cell from the mean, in the unit of the cells."""
    return float(np.sqrt(np.var(np.asarray(cells, np.float64), axis=0).sum()))


POPULATION_METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        metric.name: metric
        for metric in (
            Metric("W1", "exact 1-Wasserstein distance, Euclidean cost", "x", "lower is better", wasserstein1),
            Metric(
                "W2",
                "exact 2-Wasserstein distance, root of the optimal squared Euclidean cost",
                "x",
                "lower is better",
                wasserstein2,
            ),
            sinkhorn_metric(),
            Metric(
                "Energy",
                "energy distance E|x-y| - E|x-x'|/2 - E|y-y'|/2, Euclidean norm not squared, all pairs",
                "x",
                "lower is better",
                energy_distance,
            ),
            Metric(
                "MMD2",
                "unbiased squared MMD, mean of kernels exp(-|a-b|^2 / 2 s^2), s^2 = 1/2, 1, 2, 4 times the median "
                "squared distance between real cells",
                "1",
                "lower is better",
                mmd2,
            ),
        )
    }
)


@dataclass(frozen=True)
class Score:
    """One metric of one prediction: its values over the draws of cells; NaN where it could not be computed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """NaN as soon as one draw failed: a failure is not averaged away."""
        return float(np.mean(self.values))

    @property
    def sd(self) -> float:
        """Standard deviation over the draws, of one draw; 0 for a single draw, which leaves no choice of cells."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else 0.0

    @property
    def n_failed(self) -> int:
        return int(np.sum(~np.isfinite(self.values)))


@dataclass(frozen=True)
class Comparison:
    """How a prediction compares with the real cells.

    Attributes:
        scores: by the metrics' names.
        n_cells: cells of either population in each draw.
        repeated: which population was smaller than that and had to be drawn with replacement: "", "pred", "real" or
            "pred and real".
        n_nonfinite: predicted cells with a NaN or infinite coordinate. With one or more of them all scores are NaN: the
            prediction failed, and is not scored on its remaining cells.
    """

    scores: Mapping[str, Score]
    n_cells: int
    n_draws: int
    seed: int
    repeated: str
    n_nonfinite: int


def compare_populations(
    pred: Cells,
    real: Cells,
    metrics: Mapping[str, Metric] = POPULATION_METRICS,
    *,
    n_cells: int | None = None,
    n_draws: int = 5,
    seed: int,
) -> Comparison:
    """Metrics between equal numbers of predicted and real cells, over repeated draws.

    Distances between finite samples shrink with the number of cells, so both populations are cut to `n_cells`, the
    smaller of the two unless given; the cells are drawn anew without replacement each time (with replacement from a
    population that is too small: `Comparison.repeated` says so). Where both populations are used whole there is nothing
    to draw, and one draw is made. The real cells of a draw depend on the seed and on `n_cells` alone: different
    predictions meet the same ones.

    Raises:
        ValueError: non-finite real cells, unequal dimensions, fewer than two cells.
    """
    pred, real = np.asarray(pred, np.float64), np.asarray(real, np.float64)
    _check_dims(pred, real)
    check.finite("real", real)
    check.at_least("n_draws", n_draws, 1)
    check.at_least("the number of predicted cells", len(pred), 2)
    check.at_least("the number of real cells", len(real), 2)
    n = min(len(pred), len(real)) if n_cells is None else n_cells
    check.at_least("n_cells", n, 2)
    n_nonfinite = int((~np.isfinite(pred)).any(axis=1).sum())
    if n == len(pred) == len(real):
        n_draws = 1
    values: dict[str, list[float]] = {name: [] for name in metrics}
    for draw in range(n_draws):
        real_draw = draw_cells(real, n, np.random.default_rng([seed, draw, 0]))
        pred_draw = draw_cells(pred, n, np.random.default_rng([seed, draw, 1]))
        for name, metric in metrics.items():
            values[name].append(float("nan") if n_nonfinite else float(metric.fn(pred_draw, real_draw)))
    short = [name for name, cells in (("pred", pred), ("real", real)) if len(cells) < n]
    return Comparison(
        scores={name: Score(tuple(v)) for name, v in values.items()},
        n_cells=n,
        n_draws=n_draws,
        seed=seed,
        repeated=" and ".join(short),
        n_nonfinite=n_nonfinite,
    )


def draw_cells(cells: Float[np.ndarray, "_ dims"], n: int, rng: np.random.Generator) -> Float[np.ndarray, "_ dims"]:
    """`n` random cells: without replacement, and with it where there are fewer than `n`; all of them as they are."""
    if n == len(cells):
        return cells
    return cells[rng.choice(len(cells), n, replace=n > len(cells))]


def _exact_cost(cost: str, x: Any, y: Any, x_weights: Any, y_weights: Any, max_exact: int) -> float:
    import ot

    x, y = _pair(x, y, max_exact)
    a, b = _mass("x_weights", x_weights, len(x)), _mass("y_weights", y_weights, len(y))
    costs, scale = _costs(cost, x, y)
    value, log = ot.emd2(a, b, costs, numItermax=MAX_SIMPLEX_STEPS, log=True)
    _check_solved(log)
    return max(float(value), 0.0) * scale


def _check_solved(log: dict[str, Any]) -> None:
    if log["warning"] is not None:
        raise RuntimeError(f"exact optimal transport did not reach its optimum: {log['warning']}")


def _costs(cost: str, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
    """Costs in units of the largest, and that: the simplex has an absolute tolerance."""
    from scipy.spatial.distance import cdist

    costs = cdist(x, y, cost)
    scale = float(costs.max()) or 1.0
    return costs / scale, scale


def _mass(name: str, weights: np.ndarray | None, n: int) -> np.ndarray:
    if weights is None:
        return np.full(n, 1 / n)
    weights = np.asarray(weights, np.float64)
    if weights.shape != (n,) or not np.isfinite(weights).all() or (weights < 0).any() or weights.sum() <= 0:
        raise ValueError(f"{name} must hold {n} finite masses that are not negative and not all zero; got {weights}.")
    return weights / weights.sum()


def _pair(x: Any, y: Any, max_cells: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    _check_dims(x, y)
    for name, cells in (("x", x), ("y", y)):
        check.at_least(f"the number of cells in {name}", len(cells), 1)
        if max_cells is not None and len(cells) > max_cells:
            raise ValueError(
                f"{name} has {len(cells)} cells; exact optimal transport takes up to max_exact={max_cells}. Subsample "
                "the cells (compare_populations with n_cells does), or raise max_exact and wait."
            )
        check.finite(name, cells)
    return x, y


def _check_dims(x: np.ndarray, y: np.ndarray) -> None:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"both populations must be arrays [cells, dims] of equal dims; got {x.shape} and {y.shape}.")


def _centred(x: np.ndarray, y: np.ndarray) -> tuple[Array, Array]:
    """In single precision, about the mean of `y`: distances do not move, their rounding error does."""
    centre = y.mean(axis=0, keepdims=True)
    return jnp.asarray(x - centre, jnp.float32), jnp.asarray(y - centre, jnp.float32)


@functools.cache
def _sinkhorn(blur: float) -> Callable[[Array, Array], Any]:
    from scjax.losses import solve_sinkhorn

    return jax.jit(functools.partial(solve_sinkhorn, blur=blur))


@functools.cache
def _energy_distance() -> Callable[[Array, Array], Array]:
    from scjax import losses

    return jax.jit(losses.energy_distance)


@functools.cache
def _mmd2() -> Callable[[Array, Array], Array]:
    from scjax import kernels, losses

    return jax.jit(lambda x, y: losses.mmd2(x, y, kernels.median_bandwidths(y)))
