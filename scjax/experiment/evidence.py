"""The cells behind a table, reduced to what its figures show; they are gone when the table is made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from scjax.metrics.expression import Control, DifferentialExpression, differential_expression
from scjax.metrics.perturbation_baselines import fit_baselines
from scjax.metrics.perturbation_report import MOST_CELLS, PerturbationTable
from scjax.metrics.population import draw_cells
from scjax.types import Population

__all__ = [
    "Evidence",
    "PerturbationEvidence",
    "SeriesEvidence",
    "Side",
    "pseudobulks",
    "perturbation_evidence",
    "series_evidence",
]

N_SHOWN = 6  # populations of which figures are drawn
N_SAMPLE = 300  # cells of each that are drawn as dots and violins
N_CONTROLS = 5000  # control cells of a context that the tests of the figures see


class Side(NamedTuple):
    """One population on one side: statistics of each gene over all of its cells, and a few of the cells.

    Attributes:
        n: cells that there are.
        variance: with n - 1 in the denominator; NaN of a single cell.
        zeros: share of the cells that are not above zero.
        cells: at most 300 of them, drawn without replacement.
    """

    n: int
    mean: Float[np.ndarray, " genes"]
    variance: Float[np.ndarray, " genes"]
    zeros: Float[np.ndarray, " genes"]
    cells: Float[np.ndarray, "_ genes"]


@dataclass(frozen=True, eq=False)
class PerturbationEvidence:
    """Of one perturbation table.

    Attributes:
        genes: names of the columns.
        shown: the populations of the figures, from the best to the worst prediction.
        chosen: how they were chosen, in words.
        controls: by context.
        real: the observed cells of each of `shown`.
        predicted: likewise, of the first seed of each model; a population with cells that are not finite is left out.
        deltas: of each rule, the change of the mean that it predicts; a population it does not predict is left out.
        tests: differential expression of each of `shown`: of the real cells, then by name of each model, at equal
            numbers of cells.
        n_tested: that number.
    """

    genes: tuple[str, ...]
    shown: tuple[Population, ...]
    chosen: str
    controls: Mapping[str, Side]
    real: Mapping[Population, Side]
    predicted: Mapping[str, Mapping[Population, Side]]
    deltas: Mapping[str, Mapping[Population, np.ndarray]]
    tests: Mapping[Population, tuple[DifferentialExpression, Mapping[str, DifferentialExpression]]]
    n_tested: Mapping[Population, int]


@dataclass(frozen=True, eq=False)
class SeriesEvidence:
    """Of one table of a held-out time.

    Attributes:
        features: names of the columns, genes or coordinates.
        are_genes: whether the columns are expression, which has zeros, and not coordinates.
        time: that was predicted.
        earlier: the nearest training time before it, and its cells.
        real: the observed cells.
        predicted: of the first seed of each model, if they are finite.
        baselines: of the rules that are defined here.
    """

    features: tuple[str, ...]
    are_genes: bool
    time: float
    earlier: tuple[float, Side] | None
    real: Side
    predicted: Mapping[str, Side]
    baselines: Mapping[str, Side]


Evidence = PerturbationEvidence | SeriesEvidence


def pseudobulks(training: Mapping[Population, Any]) -> dict[Population, np.ndarray]:
    """The control cells as they are, and one row, the mean, of every other population.

    It is all that the baselines read of training populations, so that their cells need not be in memory at once.
    """
    return {
        p: np.asarray(x) if p.is_control else np.mean(x, axis=0, dtype=np.float64)[None]
        for p in training
        for x in [training[p]]
    }


def perturbation_evidence(
    table: PerturbationTable,
    predicted: Mapping[str, Mapping[Population, Any]],
    training: Mapping[Population, Any],
    real: Mapping[Population, Any],
    genes: Sequence[str],
    *,
    vectors: Mapping[str, Any] | None = None,
) -> PerturbationEvidence:
    """What `table` was made of.

    Args:
        predicted: cells [cells, genes] of the first seed of each model, by the names of the table's rows.
        training: cells of the training populations, or their `pseudobulks`.
        real: the observed cells of the table's populations.
        genes: names of the columns.
        vectors: as the table had them.
    """
    shown, chosen = _chosen(table, next(iter(predicted), None))
    fitted = fit_baselines(pseudobulks(training), vectors=vectors)
    contexts = sorted({p.context for p in shown})
    rng = np.random.default_rng([table.seed, 3])
    # The metrics' rows are drawn by seed and draw; these streams are others.
    tested = {c: Control(draw_cells(x, min(len(x), N_CONTROLS), rng)) for c, x in fitted.controls.items()}
    sides: dict[str, dict[Population, Side]] = {name: {} for name in predicted}
    observed: dict[Population, Side] = {}
    tests, n_tested = {}, {}
    for p in shown:
        cells = np.asarray(real[p])
        observed[p] = _side(cells, rng)
        made = {name: np.asarray(of_model[p]) for name, of_model in predicted.items()}
        made = {name: x for name, x in made.items() if np.isfinite(x).all()}
        for name, x in made.items():
            sides[name][p] = _side(x, rng)
        n = min([MOST_CELLS, len(cells), *map(len, made.values())])
        n_tested[p] = n
        of_real, *of_models = (
            differential_expression(draw_cells(x, n, rng), tested[p.context]) for x in (cells, *made.values())
        )
        tests[p] = (of_real, dict(zip(made, of_models, strict=True)))
    deltas: dict[str, dict[Population, np.ndarray]] = {}
    for p in shown:
        for name, found in fitted.predict(p).items():
            if found.delta is not None:
                deltas.setdefault(name, {})[p] = found.delta
    return PerturbationEvidence(
        genes=tuple(genes),
        shown=shown,
        chosen=chosen,
        controls={c: _side(fitted.controls[c], rng) for c in contexts},
        real=observed,
        predicted=sides,
        deltas=deltas,
        tests=tests,
        n_tested=n_tested,
    )


def series_evidence(
    t: float,
    predicted: Mapping[str, Any],
    snapshots: Mapping[float, Any],
    baselines: Mapping[str, Any],
    real: Any,
    features: Sequence[str],
    *,
    are_genes: bool,
    seed: int,
) -> SeriesEvidence:
    """Of the held-out time `t`; arguments as for `metrics.report.result_table`, `predicted` of the first seed."""
    rng = np.random.default_rng([seed, 3])
    before = [time for time in snapshots if time < t]
    finite = {name: np.asarray(x) for name, x in predicted.items()}
    return SeriesEvidence(
        features=tuple(features),
        are_genes=are_genes,
        time=float(t),
        earlier=(float(max(before)), _side(np.asarray(snapshots[max(before)]), rng)) if before else None,
        real=_side(np.asarray(real), rng),
        predicted={name: _side(x, rng) for name, x in finite.items() if np.isfinite(x).all()},
        baselines={name: _side(np.asarray(b.cells), rng) for name, b in baselines.items() if b.cells is not None},
    )


def _chosen(table: PerturbationTable, model: str | None) -> tuple[tuple[Population, ...], str]:
    """Evenly over the ranks of the first model's scores, so that the figures are no selection of the best."""
    names = [m.name for m in table.metrics]
    metric = next((name for name in ("pearson_delta", "l2") if name in names), names[0])
    scores = np.full(len(table.populations), np.nan)
    if model is not None:
        scores = table.row(model).by_population(metric).mean(axis=0)
        scores = scores if table.metric(metric).direction == "lower is better" else -scores
    order = np.argsort(scores, kind="stable")  # NaN last
    if len(order) <= N_SHOWN:
        return tuple(table.populations[i] for i in order), "all populations, the best predicted first"
    at = np.round(np.linspace(0, len(order) - 1, N_SHOWN)).astype(int)
    told = f"{N_SHOWN} of {len(order)} populations, evenly spaced between the best and the worst by {metric} of {model}"
    return tuple(table.populations[order[i]] for i in at), told


def _side(cells: np.ndarray, rng: np.random.Generator) -> Side:
    n = len(cells)
    mean = np.mean(cells, axis=0, dtype=np.float64)
    variance = np.var(cells, axis=0, ddof=1, dtype=np.float64) if n > 1 else np.full(mean.shape, np.nan)
    return Side(
        n=n,
        mean=mean,
        variance=variance,
        zeros=np.mean(cells <= 0, axis=0),
        cells=np.asarray(draw_cells(cells, min(n, N_SAMPLE), rng), np.float32),
    )
