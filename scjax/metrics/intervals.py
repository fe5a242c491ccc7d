"""Bootstrap intervals of a mean over units (perturbations, held-out times) and training seeds.

The unit that is drawn again is what a claim is to hold for: another perturbation, another time, another seed; never a
cell, since cells of one population are no independent cases.
"""

import functools
import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from scjax import check

__all__ = ["LEAST_UNITS", "Interval", "N_RESAMPLES", "interval", "percentiles", "ratio_interval", "resampled_weights"]

N_RESAMPLES = 2000
LEAST_UNITS = 5  # with four units a bootstrap has 35 different means, and percentiles far too close together
STATISTICS = ("mean", "median")


class Interval(NamedTuple):
    """Where a mean may lie, or why that cannot be said.

    Attributes:
        low, high: NaN where there is no interval.
        level: share of intervals that hold the true value, so far as the bootstrap is right.
        n_units: that were drawn from.
        n_seeds: that were drawn from.
        note: why there is no interval; "" where there is one.
    """

    low: float
    high: float
    level: float
    n_units: int
    n_seeds: int
    note: str = ""

    @property
    def exists(self) -> bool:
        return not self.note

    @property
    def clear_of_zero(self) -> bool:
        """Zero lies outside; of a difference: it has a sign."""
        return self.exists and (self.low > 0 or self.high < 0)

    def __str__(self) -> str:
        return f"[{self.low:.4g}, {self.high:.4g}]" if self.exists else f"no interval ({self.note})"

    def to_json_dict(self) -> dict[str, Any]:
        return {**self._asdict(), "low": self.low if self.exists else None, "high": self.high if self.exists else None}


def interval(
    values: Float[np.ndarray, "_seeds _units"],
    level: float = 0.95,
    *,
    statistic: str = "mean",
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
    least_units: int = LEAST_UNITS,
) -> Interval:
    """Percentile bootstrap interval of the mean over all values, units and seeds drawn again at once.

    Each resample takes as many units as there are, with replacement, and as many seeds, and every pair of a taken unit
    and a taken seed (Owen, Ann. Appl. Stat. 1 (2007)): a unit is hard for all seeds, a seed may be bad for all units.
    One seed stands as it is, and the interval then says nothing of other seeds. For the difference of two predictors
    give the differences of their values: what a unit has in common then cancels.

    Args:
        values: of a metric, or differences of two predictors' values.
        level: of confidence.
        statistic: "mean" over seeds and units, or "median" over units of the mean over seeds.
        n_resamples: of the bootstrap.
        seed: of the bootstrap. The same values and seed give the same interval.
        least_units: with fewer units there is no interval, and its note says so.

    Raises:
        ValueError: values without seeds, a level outside (0, 1), fewer than 100 resamples.
    """
    values = np.asarray(values, np.float64)
    check.at_least("the number of seeds of values", len(values), 1)
    check.one_of("statistic", statistic, STATISTICS)
    check.at_least("least_units", least_units, 2)
    _check_resampling(level, n_resamples)
    n_seeds, n_units = values.shape
    none = Interval(math.nan, math.nan, level, n_units, n_seeds)
    if n_units < least_units:
        return none._replace(note=f"{n_units} units, fewer than {least_units}")
    if n_bad := int((~np.isfinite(values)).sum()):
        return none._replace(note=f"{n_bad} values could not be computed")
    of_seeds, of_units = _shares(n_seeds, n_units, n_resamples, seed)
    if statistic == "mean":
        drawn = ((of_seeds @ values) * of_units).sum(axis=1)
    else:
        taken = np.random.default_rng(seed).integers(n_units, size=(n_resamples, n_units))
        drawn = np.median(np.take_along_axis(of_seeds @ values, taken, axis=1), axis=1)
    return none._replace(**dict(zip(("low", "high"), percentiles(drawn, level), strict=True)))


def ratio_interval(
    values: Float[np.ndarray, "_seeds _units"],
    scales: Float[np.ndarray, " _units"],
    level: float = 0.95,
    *,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
    least_units: int = LEAST_UNITS,
) -> Interval:
    """Of (mean of the values) / (mean of the scales), both means over the same resample; the scales' mean is positive.

    As `interval`. There is none where more than a hundredth of the resamples has scales whose mean is not positive.
    """
    values, scales = np.asarray(values, np.float64), np.asarray(scales, np.float64)
    plain = interval(values - scales[None], level, n_resamples=n_resamples, seed=seed, least_units=least_units)
    if not plain.exists:
        return plain
    n_seeds, n_units = values.shape
    of_seeds, of_units = _shares(n_seeds, n_units, n_resamples, seed)
    below = of_units @ scales
    if np.mean(below <= 0) > 0.01 or scales.mean() <= 0:
        return plain._replace(low=math.nan, high=math.nan, note="the scale is not clear of zero")
    drawn = np.divide(
        ((of_seeds @ values) * of_units).sum(axis=1), below, out=np.full(n_resamples, np.nan), where=below > 0
    )
    return plain._replace(**dict(zip(("low", "high"), percentiles(drawn, level), strict=True)))


def resampled_weights(n: int, n_resamples: int, rng: np.random.Generator) -> Float[np.ndarray, "_resamples _n"]:
    """How often each of `n` is taken in a resample of `n` with replacement."""
    return rng.multinomial(n, np.full(n, 1 / n), size=n_resamples).astype(np.float64)


@functools.lru_cache(maxsize=4)
def _shares(n_seeds: int, n_units: int, n_resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Shares of seeds and of units in each resample; a table asks for the same ones hundreds of times."""
    rng = np.random.default_rng(seed)
    made = tuple(resampled_weights(n, n_resamples, rng) / n for n in (n_seeds, n_units))
    for shares in made:
        shares.flags.writeable = False
    return made  # pyright: ignore[reportReturnType]


def percentiles(drawn: Float[np.ndarray, " _resamples"], level: float) -> tuple[float, float]:
    """The middle `level` of the resampled values, those that are NaN left out."""
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _check_resampling(level: float, n_resamples: int) -> None:
    check.probability("level", level)
    check.positive("level", level)
    check.at_least("n_resamples", n_resamples, 100)
