"""Predicted means with intervals that conditions kept back have calibrated."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from scjax.check import listed, positive
from scjax.data.spec import AnnData
from scjax.metrics.conformal import calibrate, least_conditions
from scjax.predict import Trained, predicting
from scjax.predict.ensemble import observed_means, observed_populations, populations_of, predict_means
from scjax.predict.timeseries import TrainedTimeSeries
from scjax.types import Population

__all__ = ["predict_intervals"]


def predict_intervals(
    members: Sequence[Trained],
    adata: AnnData,
    conditions: Iterable[str],
    *,
    calibration: Sequence[Population] | None = None,
    level: float = 0.9,
    simultaneous: bool = False,
    by_spread: bool = False,
    floor: float = 1e-3,
    **options: Any,
) -> AnnData:
    """`predict_means` of perturbations, with split-conformal intervals of each mean: layers["low"] and layers["high"].

    The interval is of the mean of the cells that would be observed, as many as the calibration populations have (their
    own scatter is part of the error that is measured). What it promises and when stands in `metrics.conformal`: asked
    and calibration populations must be exchangeable. Populations of one perturbation in several contexts are not
    independent, and the promise is then weaker than their number says.

    Args:
        members: one or more, of `load_members`.
        adata: with control cells, and the cells of the calibration populations.
        conditions, options: as for `predict`.
        calibration: populations that training did not see. None: those that the split kept for validation; where
            training stopped early on them, or chose its best parameters by them, their errors are a little too small.
        level: chance that an interval holds the mean.
        simultaneous: of all genes of a population at once, instead of each gene by itself.
        by_spread: errors in units of each population's own spread between members (two at least): wider where these
            disagree. False: in the unit of expression.
        floor: the least such unit, in units of expression.

    Returns:
        As `predict_means`; uns["scjax"]["conformal"] tells level, variant, the calibration populations, and why the
        intervals are infinite where they are: too few calibration populations for the level.

    Raises:
        ValueError: as `predict`; runs of a time series; calibration populations that training saw, that are asked for,
            or none; one member and by_spread.
    """
    positive("floor", floor)
    least_conditions(level)  # an error before any cell is made
    if by_spread and len(members) < 2:
        raise ValueError("by_spread=True takes the spread between members, and there is one; give more runs.")
    if isinstance(members[0], TrainedTimeSeries):
        raise ValueError("members must be of perturbations; a time series has no conditions to calibrate on.")
    split = members[0].split
    kept = list(split.validation if calibration is None else calibration)
    if not kept:
        raise ValueError(
            "calibration must name populations that training did not see, and the split kept none for validation; "
            "train with one that does (split.validation_fraction and validate_every), or name some."
        )
    conditions = conditions if isinstance(conditions, str) else list(conditions)
    theirs = _calibrating(kept, options)
    predicting(members[0], adata, conditions, **options)  # errors before any cell is made, here and below
    wanted, contexts = {members[0].spec.parse_condition(c) for c in conditions}, options.get("contexts")
    for population in kept:
        if population in split.train:
            raise ValueError(f"calibration must not hold what training saw, whose errors are too small: {population}.")
        if population.perturbation in wanted and (contexts is None or population.context in contexts):
            raise ValueError(f"calibration and conditions must differ; {population} is in both.")
    try:
        predicting(members[0], adata, **theirs)
        observed_populations(members, adata, kept)
    except ValueError as err:
        err.add_note(f"While looking at the populations that calibrate the intervals: {listed(kept)}.")
        raise
    asked = predict_means(members, adata, conditions, **options)
    made = predict_means(members, adata, **theirs)
    made = made[[p in set(kept) for p in populations_of(members, made)]].copy()
    observed = observed_means(members, adata, made)
    scales = [None, None]
    if by_spread:
        scales = [table.layers["sd"].astype(float).clip(floor) for table in (made, asked)]
    conformal = calibrate(made.X.astype(float), observed, level, simultaneous=simultaneous, scale=scales[0])
    asked.layers["low"], asked.layers["high"] = conformal.around(asked.X.astype(float), scales[1])
    asked.uns["scjax"]["conformal"] = json.dumps(
        {
            "level": level,
            "simultaneous": simultaneous,
            "by_spread": by_spread,
            "calibration": list(map(str, kept)),
            "note": conformal.note,
        }
    )
    return asked


def _calibrating(populations: Sequence[Population], options: dict[str, Any]) -> dict[str, Any]:
    """What to ask for so that these populations are predicted, and others in their contexts."""
    return options | {
        "wanted": list(dict.fromkeys(p.condition for p in populations)),
        "contexts": list(dict.fromkeys(p.context for p in populations)),
    }
