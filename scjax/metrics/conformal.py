"""Split-conformal intervals of condition means: how far off a predicted mean may be, judged by conditions kept back.

The case is a condition (a perturbation in a context), never a cell. Residuals of n conditions that training did not see
give a radius; for a further condition the interval of that radius holds the true mean with a chance of at least
`level`, whatever the model and the law of its errors, if the n conditions and the further one are exchangeable: drawn
alike, in any order. That is so where calibration and test conditions were held out by one random draw. It is not so
for conditions of another kind (doubles after singles, another cell line, later times), for conditions that training
saw (their residuals are too small), nor for the genes of one condition.

The chance is over calibration and test conditions together. With one calibration set in hand, coverage itself is a draw
from Beta(k, n + 1 - k), k = ceil((n + 1) level): for level 0.9 and n = 20 it lies between 0.78 and 0.98 nine times in
ten.

Reference: Vovk, Gammerman and Shafer, Algorithmic Learning in a Random World, Springer 2005; Lei et al.,
"Distribution-free predictive inference for regression", JASA 113 (2018), section 2.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from scjax import check

__all__ = ["Conformal", "Coverage", "calibrate", "conformal_quantile", "coverage", "least_conditions"]

_ROUNDING = 1e-9  # 100 times 0.55 is 55.00000000000001, and its rank is 55


def least_conditions(level: float) -> int:
    """Conditions below which no finite radius has this level: ceil(level / (1 - level)), 9 for 0.9 and 19 for 0.95.

    Raises:
        ValueError: a level outside (0, 1).
    """
    _check_level(level)
    return math.ceil(level / (1 - level) - _ROUNDING)


def conformal_quantile(scores: Float[np.ndarray, "_conditions ..."], level: float) -> Float[np.ndarray, "..."]:
    """The ceil((n + 1) level)-th smallest of n scores, along the first axis; infinite where n is too small for that.

    Raises:
        ValueError: a level outside (0, 1), scores that are NaN.
    """
    _check_level(level)
    if np.isnan(scores).any():
        raise ValueError(f"scores must be numbers; {int(np.isnan(scores).sum())} of {scores.size} are NaN.")
    n = len(scores)
    rank = math.ceil((n + 1) * level - _ROUNDING)
    if rank > n:
        return np.full(scores.shape[1:], np.inf)
    return np.asarray(np.partition(scores, rank - 1, axis=0)[rank - 1], np.float64)


@dataclass(frozen=True, eq=False)
class Conformal:
    """Radii that were calibrated.

    Attributes:
        radius: of the interval of each gene, in units of its scale; infinite where there were too few conditions.
        level: chance that the interval holds the true mean: of each gene by itself, or, if `simultaneous`, of all
            genes of a condition at once.
        n_conditions: that it was calibrated on.
        scaled: whether the calibration had a scale.
        note: why the radii are infinite; "" where they are not.
    """

    radius: Float[np.ndarray, " _genes"]
    level: float
    simultaneous: bool
    n_conditions: int
    scaled: bool
    note: str = ""

    def around(
        self,
        predicted: Float[np.ndarray, "_conditions _genes"],
        scale: Float[np.ndarray, "_rows _genes"] | None = None,
    ) -> tuple[Float[np.ndarray, "_conditions _genes"], Float[np.ndarray, "_conditions _genes"]]:
        """(low, high) of the mean of each condition and gene; -inf and inf where the radius is infinite.

        Args:
            predicted: means, in the unit of those of the calibration.
            scale: of these genes or conditions, where the calibration had one, and only there.

        Raises:
            ValueError: another number of genes, a scale that is not positive, missing or too many.
        """
        if predicted.shape[1] != len(self.radius):
            raise ValueError(
                f"predicted must have the {len(self.radius)} genes of the calibration; got {predicted.shape[1]}."
            )
        if (scale is not None) != self.scaled:
            with_one, wants = ("with", "pass that of these conditions") if self.scaled else ("without", "leave it out")
            raise ValueError(f"scale: these radii were calibrated {with_one} one; {wants}.")
        radius = self.radius[None] * _checked_scale(scale, predicted)
        return predicted - radius, predicted + radius


def calibrate(
    predicted: Float[np.ndarray, "_conditions _genes"],
    observed: Float[np.ndarray, "_conditions _genes"],
    level: float = 0.9,
    *,
    simultaneous: bool = False,
    scale: Float[np.ndarray, "_rows _genes"] | None = None,
) -> Conformal:
    """Radii from the errors of conditions that training did not see.

    The score of a condition is |observed - predicted| / scale of each gene by itself, or its maximum over genes where
    `simultaneous`: all genes then share one radius, in units of their scale.

    Args:
        predicted, observed: means of the cells of each condition; every condition counts once.
        level: of confidence.
        simultaneous: intervals that hold all genes of a condition at once with chance `level`; wider.
        scale: unit of the error of each gene, of all conditions (one row) or of each: a standard deviation over
            training cells, or between the runs of an ensemble. It must be made without these observations (a scale
            fitted on the calibration conditions spoils the promise). None: the unit of the means for all genes.

    Raises:
        ValueError: a level outside (0, 1), means of other shapes or not finite, a scale that is not positive.
    """
    if predicted.shape != observed.shape:
        raise ValueError(
            f"predicted and observed must be means of the same conditions and genes; got {predicted.shape} and "
            f"{observed.shape}."
        )
    check.finite("predicted", predicted)
    check.finite("observed", observed)
    least, n = least_conditions(level), len(predicted)
    scores = np.abs(observed - predicted) / _checked_scale(scale, predicted)
    if simultaneous:
        radius = np.broadcast_to(conformal_quantile(scores.max(axis=1), level), predicted.shape[1:]).copy()
    else:
        radius = conformal_quantile(scores, level)
    note = "" if n >= least else f"{n} conditions, fewer than the {least} that level {level} takes"
    return Conformal(radius, level, simultaneous, n, scale is not None, note)


class Coverage(NamedTuple):
    """How often intervals held the truth, over conditions that they were not calibrated on.

    Attributes:
        by_gene: share of the conditions whose interval of this gene holds the observed mean.
        all_genes: share of the conditions of which every gene's interval does.
        width: mean width of the intervals of each gene, in the unit of the means.
        n_conditions: that were looked at.
    """

    by_gene: Float[np.ndarray, " _genes"]
    all_genes: float
    width: Float[np.ndarray, " _genes"]
    n_conditions: int


def coverage(
    low: Float[np.ndarray, "_conditions _genes"],
    high: Float[np.ndarray, "_conditions _genes"],
    observed: Float[np.ndarray, "_conditions _genes"],
) -> Coverage:
    """Of any intervals; their ends count as inside.

    Raises:
        ValueError: other shapes, no condition, observed means that are not finite.
    """
    if not low.shape == high.shape == observed.shape or not len(observed):
        raise ValueError(
            "low, high and observed must be of the same conditions, one at least, and genes; got "
            f"{low.shape}, {high.shape} and {observed.shape}."
        )
    check.finite("observed", observed)
    inside: Bool[np.ndarray, "_conditions _genes"] = (low <= observed) & (observed <= high)
    return Coverage(inside.mean(axis=0), float(inside.all(axis=1).mean()), (high - low).mean(axis=0), len(observed))


def _checked_scale(scale: np.ndarray | None, means: np.ndarray) -> np.ndarray:
    if scale is None:
        return np.ones((1, 1))
    if scale.shape[1] != means.shape[1] or len(scale) not in (1, len(means)):
        raise ValueError(
            f"scale must have one row, or one a condition, of {means.shape[1]} genes; got the shape {scale.shape}."
        )
    if not (np.isfinite(scale) & (scale > 0)).all():
        bad = int((~(np.isfinite(scale) & (scale > 0))).sum())
        raise ValueError(
            f"scale must hold positive numbers; {bad} of {scale.size} are not. Give genes without spread a floor."
        )
    return scale


def _check_level(level: float) -> None:
    check.probability("level", level)
    check.positive("level", level)
