"""Distances between two clouds of cells, and their comparison at equal cell numbers.

Exact optimal transport is POT's network simplex in double precision; Sinkhorn, energy distance and MMD are those of
`scjax.losses`. Distances are zero (or scatter around zero: unbiased estimates) for equal populations, and lower is
better; of the variance ratio 1 is best. `POPULATION_METRICS` are the columns of a table unless others are asked for,
`ALL_POPULATION_METRICS` everything that has a name here.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scjax import check

__all__ = [
    "ALL_POPULATION_METRICS",
    "ENERGY_METRICS",
    "POPULATION_METRICS",
    "Comparison",
    "EntropicTransport",
    "Metric",
    "Plan",
    "Score",
    "compare_populations",
    "draw_cells",
    "energy_distance",
    "energy_distance_matrix",
    "energy_statistic",
    "entropic_wasserstein",
    "hausdorff",
    "mmd2",
    "mmd2_metric",
    "sinkhorn",
    "sinkhorn_metric",
    "spread",
    "transport_plan",
    "variance_ratio",
    "wasserstein1",
    "wasserstein2",
    "wasserstein_metric",
]

Cells: TypeAlias = Float[
    np.ndarray | Array, "_cells _dims"
]  # any two sizes: the guards below say more than a type error

MAX_EXACT = 5000  # cells of one population: 25 M costs, 200 MB, about 10 s
RELATIVE_BLUR = 0.05
MAX_SIMPLEX_STEPS = 100_000_000  # POT's own default of 100 000 stops early beyond about 500 cells
RELATIVE_EPSILON = 0.005  # of the mean cost: the temperature of `entropic_wasserstein`
RELAXATION = 1.7
TILE = 512  # cells: the distances of one tile of `energy_distance_matrix` take 2 MB


class EntropicTransport(NamedTuple):
    """What a solved entropic problem says about the exact one, both numbers in the unit of the cells.

    Attributes:
        value: cost of a plan that moves all mass; the exact distance is at most this.
        lower: value of feasible duals; the exact distance is at least this.
        converged: the marginals were met.
        n_iterations: at the last temperature.
    """

    value: float
    lower: float
    converged: bool
    n_iterations: int


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


def entropic_wasserstein(
    x: Cells,
    y: Cells,
    *,
    power: int,
    relative_epsilon: float = RELATIVE_EPSILON,
    threshold: float = 1e-3,
    max_iterations: int = 5000,
) -> EntropicTransport:
    """The `power`-Wasserstein distance (1 or 2) by converged Sinkhorn: for more cells than the exact solver takes.

    The entropic plan for the cost |x_i - y_j|^power at the temperature `relative_epsilon` times the mean cost, mended
    to move exactly all mass (Altschuler et al., NeurIPS 2017, algorithm 2), has the cost that is `value`; it is not
    debiased. The duals, made feasible, give `lower`, so that the two enclose the exact distance. Single precision.

    Args:
        power: of the Euclidean norm in the cost; the root is taken.
        relative_epsilon: a smaller one brings the two numbers together and takes more iterations.
        threshold: total error of a marginal at which the iteration stops.
        max_iterations: at the last temperature; `converged` is False where they do not do.

    Raises:
        ValueError: as `wasserstein1`, apart from the number of cells.
    """
    check.one_of("power", power, (1, 2))
    check.positive("relative_epsilon", relative_epsilon)
    check.positive("threshold", threshold)
    check.at_least("max_iterations", max_iterations, 1)
    x, y = _pair(x, y)
    scale = spread(np.concatenate([x, y]))
    if scale == 0:
        return EntropicTransport(0.0, 0.0, True, 0)
    found = _entropic(power)(*_centred(x / scale, y / scale), relative_epsilon, threshold, max_iterations)
    upper, lower, converged, n_iterations = (value.item() for value in found)
    finite = bool(converged) and np.isfinite(upper)
    return EntropicTransport(
        scale * max(upper, 0.0) ** (1 / power), scale * max(lower, 0.0) ** (1 / power), finite, n_iterations
    )


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


def energy_statistic(x: Cells, y: Cells, *, norm: str, statistic: str) -> float:
    """2 E d(x, y) - E d(x, x') - E d(y, y'), Székely's form, twice `energy_distance`, by its two choices.

    Args:
        norm: "euclidean", d = |x - y|; or "squared", d = |x - y|^2. The squared one sees nothing but the means: it is
            2 |mean x - mean y|^2, and unbiased that minus 2 (total variance / number of cells) of each population.
        statistic: "V", means over all pairs, a cell with itself included: never negative, biased upwards by finite
            numbers of cells; or "U", over pairs of different cells: unbiased, scatters around zero.

    Returns:
        The value, in the unit of `x`, or in its square.

    Raises:
        ValueError: fewer than two cells for "U"; as `wasserstein1`.
    """
    x, y = _pair(x, y)
    return float(_energies([x, y], norm, statistic)[0, 1])


def energy_distance_matrix(
    populations: Sequence[Cells] | Mapping[Any, Cells], metric: str = "Energy"
) -> Float[np.ndarray, "n n"]:
    """Energy distances between all pairs of populations, in their order; symmetric, zero on the diagonal.

    `metric` is the name of one of `ENERGY_METRICS`, "Energy" being `energy_distance`. Euclidean norms come from matrix
    products in double precision, tile after tile in one compiled program: beside the cells themselves it holds
    some megabytes, whatever their number. A tile ignores where one population ends and the next begins, so their sizes
    may differ widely.

    A squared distance loses what is 1e-16 of the squared spread of all cells. So a cell that is in two populations is
    at distance 1e-8 spreads from itself, not 0.

    Raises:
        ValueError: no population, unequal dimensions, values that are not finite, fewer cells than the metric needs.
    """
    cells = [np.asarray(x) for x in (populations.values() if isinstance(populations, Mapping) else populations)]
    if not cells:
        raise ValueError("populations must hold the cells of at least one population; it is empty.")
    for i, x in enumerate(cells):
        _check_dims(x, cells[0])
        check.at_least(f"the number of cells of population {i}", len(x), 1)
        check.finite(f"population {i}", x)
    check.one_of("metric", metric, ENERGY_VARIANTS)
    norm, statistic, factor = ENERGY_VARIANTS[metric]
    return factor * _energies(cells, norm, statistic)


def hausdorff(x: Cells, y: Cells) -> float:
    """The largest distance of a cell, of either population, from the nearest cell of the other; in the unit of `x`.

    One stray cell decides it.
    """
    from scipy.spatial.distance import cdist

    x, y = _pair(x, y)
    rows = max(1, 4_000_000 // len(y))  # 32 MB of distances at a time
    from_x, to_y = 0.0, np.full(len(y), np.inf)
    for start in range(0, len(x), rows):
        distances = cdist(x[start : start + rows], y)
        from_x = max(from_x, float(distances.min(axis=1).max()))
        np.minimum(to_y, distances.min(axis=0), out=to_y)
    return max(from_x, float(to_y.max()))


def variance_ratio(x: Cells, y: Cells) -> float:
    """Total variance (summed over dimensions) of the predicted cells `x` over that of the real ones `y`; 1 is best.

    Below 1 a prediction is too narrow, as means repeated for every cell are. NaN where the real cells all coincide.
    """
    x, y = _pair(x, y)
    real = spread(y)
    return (spread(x) / real) ** 2 if real > 0 else float("nan")


def mmd2(x: Cells, y: Cells, *, bandwidths: Sequence[float] | None = None) -> float:
    """Unbiased squared MMD (`losses.mmd2`), its Gaussian kernels as wide as the cells of `y`, the real ones, lie apart.

    Around zero it scatters to both sides. The prediction has no part in the bandwidths (`kernels.median_bandwidths`):
    predictions of one population are measured by one kernel. `bandwidths`, in the unit of `x`, fixes them instead.
    """
    x, y = _pair(x, y)
    check.at_least("the number of cells of each population", min(len(x), len(y)), 2)
    scale = spread(y) or 1.0  # of no effect but on the smallest bandwidth that there is
    # In double precision: one predicted cell far from all others would spend float32's digits on its own distances.
    with jax.enable_x64(True):
        scaled = jnp.asarray(x / scale), jnp.asarray(y / scale)
        if bandwidths is None:
            return float(_mmd2()(*scaled))
        for bandwidth in bandwidths:
            check.positive("a bandwidth", bandwidth)
        return float(_mmd2_of_bandwidths()(*scaled, jnp.asarray(bandwidths, jnp.float64) / scale))


class Metric(NamedTuple):
    """A named number that compares predicted with real cells.

    Attributes:
        definition: in words, for the foot of a table; values under two definitions are not comparable.
        unit: of the value, where the unit of the cells' coordinates is "x".
        direction: "lower is better", "higher is better" or "1 is best".
        fn: (predicted, real) -> value.
        exact_up_to: cells of one population up to which the value is what the definition says; None: any number.
        beyond: what the value is for more cells.
    """

    name: str
    definition: str
    unit: str
    direction: str
    fn: Callable[[Any, Any], float]
    exact_up_to: int | None = None
    beyond: str = ""

    def approximation(self, n_cells: int) -> str:
        """`beyond` where a population of so many cells has that value, else nothing."""
        return self.beyond if self.exact_up_to is not None and n_cells > self.exact_up_to else ""


def wasserstein_metric(power: int, *, max_exact: int = MAX_EXACT) -> Metric:
    """W1 or W2: exact up to `max_exact` cells of a population, and beyond it by `entropic_wasserstein`.

    The value by Sinkhorn is the cost of its plan; NaN, a failed value, where the iteration did not converge.
    """
    check.one_of("power", power, (1, 2))
    exact = {1: wasserstein1, 2: wasserstein2}[power]

    def distance(pred: Cells, real: Cells) -> float:
        if max(len(pred), len(real)) <= max_exact:
            return exact(pred, real, max_exact=max_exact)
        found = entropic_wasserstein(pred, real, power=power)
        return found.value if found.converged else float("nan")

    what = {
        1: "exact 1-Wasserstein distance, Euclidean cost",
        2: "exact 2-Wasserstein distance, root of the optimal squared Euclidean cost",
    }
    beyond = f"cost of a converged Sinkhorn plan, temperature {RELATIVE_EPSILON:g} of the mean cost, an upper bound"
    return Metric(f"W{power}", what[power], "x", "lower is better", distance, max_exact, beyond)


def mmd2_metric(*, bandwidths: Sequence[float]) -> Metric:
    """Unbiased squared MMD under kernels of fixed widths, so that values of different tables are comparable."""
    widths = ", ".join(f"{b:g}" for b in bandwidths)
    return Metric(
        "MMD2",
        f"unbiased squared MMD, mean of kernels exp(-|a-b|^2 / 2 s^2), s = {widths} x",
        "1",
        "lower is better",
        functools.partial(mmd2, bandwidths=tuple(bandwidths)),
    )


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


ENERGY = Metric(
    "Energy",
    "energy distance E|x-y| - E|x-x'|/2 - E|y-y'|/2, Euclidean norm not squared, all pairs",
    "x",
    "lower is better",
    energy_distance,
)
# The arguments of `energy_statistic` and a factor, by the name of the metric.
ENERGY_VARIANTS: Mapping[str, tuple[str, str, float]] = MappingProxyType(
    {
        "Energy": ("euclidean", "V", 0.5),
        "energy_euclidean_v": ("euclidean", "V", 1.0),
        "energy_euclidean_u": ("euclidean", "U", 1.0),
        "energy_squared_v": ("squared", "V", 1.0),
        "energy_squared_u": ("squared", "U", 1.0),
    }
)


def _energy_metric(name: str) -> Metric:
    norm, statistic, _ = ENERGY_VARIANTS[name]
    distance = {"euclidean": "|x-y|", "squared": "|x-y|^2"}[norm]
    pairs = {"V": "all pairs, a cell with itself included", "U": "pairs of different cells, unbiased"}[statistic]
    means = "; sees nothing but means" if norm == "squared" else ""
    return Metric(
        name,
        f"energy distance 2 E d(x,y) - E d(x,x') - E d(y,y'), d = {distance}, {pairs}{means}",
        {"euclidean": "x", "squared": "x^2"}[norm],
        "lower is better",
        functools.partial(energy_statistic, norm=norm, statistic=statistic),
    )


ENERGY_METRICS: Mapping[str, Metric] = MappingProxyType(
    {name: ENERGY if name == "Energy" else _energy_metric(name) for name in ENERGY_VARIANTS}
)

POPULATION_METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        metric.name: metric
        for metric in (
            wasserstein_metric(1),
            wasserstein_metric(2),
            sinkhorn_metric(),
            ENERGY,
            Metric(
                "MMD2",
                "unbiased squared MMD, mean of kernels exp(-|a-b|^2 / 2 s^2), s^2 = 1/2, 1, 2, 4 times the median "
                "squared distance between real cells",
                "1",
                "lower is better",
                mmd2,
            ),
            Metric(
                "variance_ratio",
                "total variance of the predicted cells over that of the real ones; distances between few cells in many "
                "dimensions flatter a population that is too narrow",
                "1",
                "1 is best",
                variance_ratio,
            ),
        )
    }
)


ALL_POPULATION_METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        **POPULATION_METRICS,
        **ENERGY_METRICS,
        "Hausdorff": Metric(
            "Hausdorff",
            "largest distance of a cell, of either population, from the nearest cell of the other",
            "x",
            "lower is better",
            hausdorff,
        ),
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


def _energies(cells: Sequence[np.ndarray], norm: str, statistic: str) -> np.ndarray:
    """2 E d(x, y) - E d(x, x') - E d(y, y') of all pairs of populations."""
    check.one_of("norm", norm, ("euclidean", "squared"))
    check.one_of("statistic", statistic, ("U", "V"))
    n = np.array([len(x) for x in cells])
    if statistic == "U":
        check.at_least("the number of cells of each population", int(n.min()), 2)
    centre = np.concatenate(cells).mean(axis=0, dtype=np.float64)
    if norm == "squared":
        means = np.stack([x.mean(axis=0, dtype=np.float64) - centre for x in cells])
        variances = np.array([spread(x) ** 2 for x in cells])
        between = ((means[:, None] - means[None]) ** 2).sum(axis=2) + variances[:, None] + variances[None]
        within = 2 * variances
    else:
        sums = _summed_distances(cells, n, centre)
        between = sums / (n[:, None] * n[None])
        within = np.diag(between)
    if statistic == "U":
        within = within * n / (n - 1)
    energies = 2 * between - (within[:, None] + within[None])
    np.fill_diagonal(energies, 0)
    return energies


def _summed_distances(cells: Sequence[np.ndarray], n: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """The sum of |x - y| over all cells x of one population and y of another, [populations, populations]."""
    n_cells = int(n.sum())
    tile = min(TILE, n_cells)
    n_tiles = -(-n_cells // tile)
    x = np.concatenate([*cells, np.zeros((n_tiles * tile - n_cells, len(centre)), cells[0].dtype)])
    owner = np.concatenate([np.repeat(np.arange(len(n)), n), np.full(len(x) - n_cells, -1)]).reshape(n_tiles, tile)
    first = owner[:, 0]  # populations follow each other, so a tile holds this one and some after it; filler at the end
    width = int((owner.max(axis=1) - first).max()) + 1
    local = np.where(owner < 0, -1, owner - first[:, None])
    pairs = np.stack(np.triu_indices(n_tiles), axis=1)
    with jax.enable_x64(True):
        blocks = np.asarray(_tiles()(x.reshape(n_tiles, tile, -1), centre, local, pairs, width))
    sums = np.zeros((len(n) + width, len(n) + width))
    for (i, j), block in zip(pairs, blocks, strict=True):
        sums[first[i] : first[i] + width, first[j] : first[j] + width] += block
        if i != j:
            sums[first[j] : first[j] + width, first[i] : first[i] + width] += block.T
    sums = sums[: len(n), : len(n)]
    return (sums + sums.T) / 2  # of populations that meet within one tile the two sums may differ in their last digit


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

    costs = cdist(x, y, cost)  # pyright: ignore[reportArgumentType, reportCallIssue]  # the names are literals there
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


@functools.cache
def _mmd2_of_bandwidths() -> Callable[[Array, Array, Array], Array]:
    from scjax import losses

    return jax.jit(losses.mmd2)


@functools.cache
def _tiles() -> Callable[..., Array]:
    def summed(x: Array, centre: Array, local: Array, pair: Array, width: int) -> Array:
        """Distances between two tiles of cells, summed by the populations of either."""
        (a, b), (of_a, of_b) = (x[pair].astype(jnp.float64) - centre[None, None], local[pair])
        norms = jnp.sum(a**2, axis=1)[:, None] + jnp.sum(b**2, axis=1)[None]
        squared = norms - 2 * jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
        itself = (pair[0] == pair[1]) & jnp.eye(len(a), dtype=bool)
        distances = jnp.sqrt(jnp.where(itself, 0, jnp.maximum(squared, 0)))
        members = [(of[:, None] == jnp.arange(width)[None]).astype(jnp.float64) for of in (of_a, of_b)]
        return members[0].T @ (distances @ members[1])

    @functools.partial(jax.jit, static_argnames="width")
    def all_pairs(x: Array, centre: Array, local: Array, pairs: Array, width: int) -> Array:
        return jax.lax.map(lambda pair: summed(x, centre, local, pair, width), pairs)

    return all_pairs


@functools.cache
def _entropic(power: int) -> Callable[..., tuple[Array, Array, Array, Array]]:
    def solve(
        x: Array, y: Array, relative_epsilon: Array, threshold: Array, max_iterations: Array
    ) -> tuple[Array, Array, Array, Array]:
        from scjax.kernels import product_distances

        costs = product_distances(x, y) ** power
        n, m = costs.shape
        epsilon = relative_epsilon * costs.mean()

        def half(duals: Array, axis: int, temperature: Array) -> Array:
            """The soft c-transform of one side's duals."""
            other = jnp.expand_dims(duals, 1 - axis)
            mean = jax.nn.logsumexp((other - costs) / temperature, axis=axis) - jnp.log(costs.shape[axis])
            return -temperature * mean

        # From the largest cost down, a few updates a temperature: duals near the solution for the loop below.
        n_falling = jnp.ceil(jnp.log(jnp.maximum(costs.max() / epsilon, 1)) / jnp.log(1 / 0.8)).astype(jnp.int32)

        def cool(i: Array, g: Array) -> Array:
            temperature = jnp.maximum(epsilon, costs.max() * 0.8 ** i.astype(costs.dtype))
            return half(half(g, 1, temperature), 0, temperature)

        g = jax.lax.fori_loop(0, n_falling + 1, cool, jnp.zeros(m, costs.dtype))

        def going_on(state: tuple[Array, ...]) -> Array:
            return (state[2] > threshold) & (state[1] < max_iterations)

        def update(state: tuple[Array, ...]) -> tuple[Array, ...]:
            g, i, _ = state
            full = half(half(g, 1, epsilon), 0, epsilon)
            # Rows hold their mass with the duals (half(g), g), whatever g: the error is that of the columns.
            error = jnp.mean(jnp.abs(jnp.expm1((g - full) / epsilon)))
            # Over-relaxed on the one side (Lehmann et al., Optim. Lett. 16, 2022), as the converged divergence is.
            return (1 - RELAXATION) * g + RELAXATION * full, i + 1, error

        start = (g, jnp.zeros((), jnp.int32), jnp.asarray(jnp.inf, costs.dtype))
        g, n_iterations, error = jax.lax.while_loop(going_on, update, start)
        f = half(g, 1, epsilon)

        # A plan with the right marginals: rows and columns cut to their mass, the rest put back as a product.
        plan = jnp.exp((f[:, None] + g[None] - costs) / epsilon) / (n * m)
        plan = plan * jnp.minimum(1, (1 / n) / jnp.sum(plan, axis=1))[:, None]
        plan = plan * jnp.minimum(1, (1 / m) / jnp.sum(plan, axis=0))[None]
        short_rows, short_columns = 1 / n - plan.sum(axis=1), 1 / m - plan.sum(axis=0)
        missing = jnp.maximum(short_rows.sum(), jnp.finfo(costs.dtype).tiny)
        upper = jnp.sum(plan * costs) + short_rows @ costs @ short_columns / missing
        # Feasible duals: each as large as the other allows.
        g = jnp.min(costs - f[:, None], axis=0)
        lower = jnp.mean(jnp.min(costs - g[None], axis=1)) + jnp.mean(g)
        return upper, lower, error <= threshold, n_iterations

    return jax.jit(solve)
