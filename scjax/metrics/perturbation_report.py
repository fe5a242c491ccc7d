"""Tables of perturbation predictions: models beside training-free baselines and a real-vs-real ceiling, many targets.

The rules of the comparison: the controls of both sides are the real ones; a number that depends on how many cells it is
computed from (tests, energy distance) is computed from equal numbers, drawn repeatedly; each population weighs the
same; a value that cannot be computed is counted and makes its mean fail, unless not even the real cells have it.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from scjax import check
from scjax.metrics.expression import (
    ENERGY_DISTANCE,
    EXPRESSION_METRICS,
    Control,
    DifferentialExpression,
    ExpressionMetric,
    Profiles,
    profiles,
)
from scjax.metrics.intervals import LEAST_UNITS, N_RESAMPLES, Interval, interval
from scjax.metrics.perturbation_baselines import RULES, FittedBaselines, fit_baselines
from scjax.metrics.population import Metric, draw_cells
from scjax.metrics.report import (
    ARROWS,
    KINDS,
    WORDS,
    Table,
    Verdict,
    aligned,
    bounds,
    decimals_of,
    environment,
    finite_or_none,
    losses,
    number,
    outcome,
)
from scjax.types import Population

__all__ = [
    "DEFAULT_METRICS",
    "PerturbationRow",
    "PerturbationTable",
    "judge",
    "normalised_score",
    "perturbation_table",
    "render",
    "to_json_dict",
    "verdict",
]

DEFAULT_METRICS: Mapping[str, ExpressionMetric | Metric] = MappingProxyType(
    {name: EXPRESSION_METRICS[name] for name in ("pearson_delta", "pearson_delta_hat", "l2", "r2", "mse", "mae")}
    | {"energy_distance": ENERGY_DISTANCE}
    | {
        name: EXPRESSION_METRICS[name]
        for name in ("discrimination_score_cosine", "overlap_at_N", "de_direction_match", "variance_ratio")
    }
)
CEILING = "real vs real (ceiling)"
MOST_CELLS = 256  # of one population in one draw, unless the caller says how many: tests and distances cost more
ON_CELLS = (
    "the context's control cells, each moved by the predicted delta, zeros too and not clipped; their means say what "
    "the rule says, their tests call nearly every gene differentially expressed"
)
MOST_SCORE = 10  # in size; what a normalised score beyond it is, hangs on the last digit of its scale
WIDTH = 118  # of a block of columns, in characters


@dataclass(frozen=True)
class PerturbationRow:
    """One predictor's line.

    Attributes:
        kind: "model", "baseline" (fitted on training populations without training) or "floor" (real against real).
        values: of each metric, [seeds, draws, populations]; one draw where all cells are used.
        counted: of each metric, [draws, populations]: false where the real cells have no such value themselves, or
            where the rule predicts nothing for the population. What counts and is NaN has failed.
        n_nonfinite: predicted cells with a NaN or infinite value, over all seeds and populations.
        note: what the rule does, and where it is not defined.
    """

    name: str
    kind: str
    values: Mapping[str, Float[np.ndarray, "_seeds _draws _populations"]]
    counted: Mapping[str, Bool[np.ndarray, "_draws _populations"]]
    n_nonfinite: int = 0
    note: str = ""

    def __post_init__(self):
        check.one_of("kind", self.kind, KINDS)

    def by_population(self, metric: str) -> Float[np.ndarray, "_seeds _populations"]:
        """Mean over the draws that count; NaN where one of these failed, or none counts (`has_value` tells)."""
        counted = self.counted[metric]
        total = np.where(counted, self.values[metric], 0.0).sum(axis=1)
        with np.errstate(invalid="ignore"):
            return total / counted.sum(axis=0)

    def has_value(self, metric: str) -> Bool[np.ndarray, " _populations"]:
        """Whether the population counts in any draw."""
        return self.counted[metric].any(axis=0)

    def mean(self, metric: str) -> float:
        """Over seeds and populations; NaN with any failed value, or where no population counts."""
        values = self.by_population(metric)[:, self.has_value(metric)]
        return float(np.mean(values)) if values.size else math.nan

    def median(self, metric: str) -> float:
        """Over populations, of the mean over seeds; NaN as `mean`."""
        values = self.by_population(metric)[:, self.has_value(metric)]
        return float(np.median(values.mean(axis=0))) if values.size else math.nan

    def sd_seeds(self, metric: str) -> float | None:
        """Standard deviation over training seeds of the mean over populations; None with fewer than two seeds."""
        values = self.by_population(metric)[:, self.has_value(metric)]
        return float(np.std(values.mean(axis=1), ddof=1)) if len(values) > 1 and values.size else None

    def interval(
        self,
        metric: str,
        level: float = 0.95,
        *,
        statistic: str = "mean",
        n_resamples: int = N_RESAMPLES,
        seed: int = 0,
    ) -> Interval:
        """Bootstrap interval of `mean` (or `median`) over the populations that count and over seeds.

        As `intervals.interval`: none with fewer than five populations, or with a failed value.
        """
        values = self.by_population(metric)[:, self.has_value(metric)]
        return interval(values, level, statistic=statistic, n_resamples=n_resamples, seed=seed)

    def n_failed(self, metric: str) -> int:
        """Populations (of any seed) that count and have no value."""
        return int(np.isnan(self.by_population(metric)[:, self.has_value(metric)]).sum())

    def n_undefined(self, metric: str) -> int:
        """Populations that do not count."""
        return int((~self.has_value(metric)).sum())


@dataclass(frozen=True)
class PerturbationTable(Table):
    """Rows are predictors, columns are metrics, a cell is the mean over the populations to be predicted.

    Attributes:
        populations: that were predicted.
        n_real: cells of each that were observed.
        n_cells: cells of each that a draw holds on either side, for the metrics at equal numbers.
        n_training: training perturbations, each weighing the same in the baselines and in the reference of "hat".
        provenance: whatever identifies the run (hashes of data and split, checkpoint), for the JSON.
    """

    title: str
    metrics: tuple[ExpressionMetric | Metric, ...]
    rows: tuple[PerturbationRow, ...]
    populations: tuple[Population, ...]
    n_real: tuple[int, ...]
    n_cells: tuple[int, ...]
    n_draws: int
    n_genes: int
    n_training: int
    seed: int
    unit: str = "log-normalised expression, log(1 + normalised count)"
    provenance: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


def perturbation_table(
    title: str,
    models: Mapping[str, Sequence[Mapping[Population, Any]]],
    training: Mapping[Population, Any],
    real: Mapping[Population, Any],
    metrics: Mapping[str, ExpressionMetric | Metric] = DEFAULT_METRICS,
    *,
    n_cells: int | None = None,
    n_draws: int = 5,
    seed: int,
    vectors: Mapping[str, Any] | None = None,
    gene_names: Sequence[str],
    provenance: Mapping[str, Any] = MappingProxyType({}),
) -> PerturbationTable:
    """All models and the training-free baselines on the same populations, with the real-vs-real ceiling as last row.

    Metrics of means use all the cells that there are. Those marked `equal_cells`, and any `population.Metric`, compare
    equal numbers of predicted and real cells, in `n_draws` draws: as many as the smallest prediction of the population,
    half of its real cells (so that the ceiling has as many) and `n_cells` (256 unless given) allow.

    Args:
        title: what was predicted.
        models: for each training seed of a model, its predicted cells [cells, genes] of every population of `real`.
        training: the cells that models and baselines may know, the control cells of every context among them.
        real: the observed cells of the populations to be predicted.
        metrics: the columns, by name.
        n_cells: the most cells of a population in a draw.
        n_draws: repeated draws of cells.
        seed: of the draws.
        vectors: of the parts of perturbations, for the baselines "nearest" and "ridge".
        gene_names: of the columns of all cells.
        provenance: kept in the table, for the JSON.

    Raises:
        ValueError: as `fit_baselines` and `profiles`; a model without seeds, or that lacks a population of `real` or
            has others; a population to be predicted that is in training, or has fewer than four real cells or two
            predicted ones.
    """
    metrics = {metric.name: metric for metric in metrics.values()}
    real = {p: np.asarray(x) for p, x in real.items()}
    _check(models, real, n_draws, n_cells)
    fitted = fit_baselines(training, vectors=vectors)
    predicted = {p: fitted.predict(p) for p in real}
    controls = {context: Control(cells) for context, cells in fitted.controls.items()}
    equal = {
        p: min(
            MOST_CELLS if n_cells is None else n_cells,
            len(x) // 2,
            len(fitted.controls[p.context]),
            *(len(cells[p]) for seeds in models.values() for cells in seeds),
        )
        for p, x in real.items()
    }
    settings = {"genes": tuple(gene_names), "reference": fitted.mean_delta}
    truth = _Truth(real, controls, metrics, equal, n_draws, seed, settings)
    rows = []
    for name, seeds in models.items():
        made = [truth.score(lambda p, cells=cells: np.asarray(cells[p])) for cells in seeds]
        values = {m: np.stack([scored[m] for scored, _ in made]) for m in metrics}
        rows.append(PerturbationRow(name, "model", values, truth.counted, sum(n for _, n in made)))
    rows += [_baseline_row(name, {p: predicted[p][name] for p in real}, fitted, truth) for name in RULES]
    rows.append(truth.ceiling())
    return PerturbationTable(
        title=title,
        metrics=tuple(metrics.values()),
        rows=tuple(rows),
        populations=tuple(real),
        n_real=tuple(len(x) for x in real.values()),
        n_cells=tuple(equal.values()),
        n_draws=n_draws,
        n_genes=truth.whole.mean.shape[1],
        n_training=len(fitted.by_perturbation),
        seed=seed,
        provenance=provenance,
    )


def normalised_score(table: PerturbationTable, row: str, baseline: str, metric: str) -> float:
    """(row - baseline) / (ceiling - baseline): 0 as good as the baseline, 1 as good as real cells, not clipped.

    Of means over the populations for which both rows and the ceiling are defined; a metric of which 1 is best enters as
    its |log|. NaN where one of the three is, or where the ceiling is not better than the baseline and spans no scale.
    """
    chosen = table.metric(metric)
    floors = table.of_kind("floor")
    if not floors:
        raise ValueError("the table has no ceiling to normalise by.")
    three = [table.row(row), table.row(baseline), floors[0]]
    common = np.logical_and.reduce([r.has_value(metric) for r in three])
    if not common.any():
        return math.nan
    ours, base, ceiling = (float(np.mean(_losses(chosen, r)[:, common])) for r in three)
    return (ours - base) / (ceiling - base) if ceiling < base else math.nan


def verdict(table: PerturbationTable, model_row: str, metric: str, baseline_rows: Sequence[str] | None = None) -> str:
    """One line: does the model beat the best training-free baseline in this metric, and on how many populations?

    A baseline is compared on the populations for which it is defined; the best one is that which the model beats by
    least. `baseline_rows` are all rows of kind "baseline" unless given. The sign test takes populations, not cells, as
    the independent cases. The difference, model - baseline (of a metric of which 1 is best, of its |log|), has a
    bootstrap interval over populations and seeds, paired: both rows in the same resample. Fewer than five populations
    have neither test nor interval. What is a tie says `report.outcome`: with an interval that holds 0, or a difference
    below the spread over seeds.
    """
    return judge(table, model_row, metric, baseline_rows).text


def judge(table: PerturbationTable, model_row: str, metric: str, baseline_rows: Sequence[str] | None = None) -> Verdict:
    """`verdict` with its outcome as a word to count."""
    from scipy.stats import binomtest

    chosen = table.metric(metric)
    if chosen.direction not in ARROWS or not ARROWS[chosen.direction]:
        return Verdict(None, f"{metric}: a number without a better or worse; see the table.")
    row = table.row(model_row)
    names = [r.name for r in table.of_kind("baseline")] if baseline_rows is None else list(baseline_rows)
    if not row.has_value(metric).any():
        return Verdict(None, f"{metric}: not even the real cells have a value here; nothing to compare.")
    if n_failed := row.n_failed(metric):
        return Verdict(
            "failed",
            f"{metric}: {model_row} FAILED ({n_failed} values could not be computed, {row.n_nonfinite} predicted "
            "cells are not finite).",
        )
    ours_lost = _losses(chosen, row)
    gains: dict[str, np.ndarray] = {}  # [seeds of the model, populations]
    for name in names:
        other = table.row(name)
        common = row.has_value(metric) & other.has_value(metric)
        if common.any() and np.isfinite(theirs := _losses(chosen, other).mean(axis=0)[common]).all():
            gains[name] = theirs[None] - ours_lost[:, common]
    if not gains:
        return Verdict(
            None, f"{metric}: no training-free baseline has a value here; nothing to compare {model_row} with."
        )
    best = min(gains, key=lambda name: float(np.mean(gains[name])))
    gain, common = gains[best].mean(axis=0), row.has_value(metric) & table.row(best).has_value(metric)
    ours, theirs = (float(np.mean(r.by_population(metric)[:, common])) for r in (row, table.row(best)))
    n_common = int(common.sum())
    some = (
        ""
        if n_common == row.has_value(metric).sum()
        else f" (on the {_plural(n_common, 'population')} that it predicts)"
    )
    better = ""
    if n_common > 1:
        wins, beaten = int(np.sum(gain > 0)), int(np.sum(gain < 0))
        p = binomtest(wins, wins + beaten).pvalue if wins + beaten else 1.0
        test = f" (sign test p = {p:.2g})" if n_common >= LEAST_UNITS else ""
        better = f"; better on {wins} of {n_common} populations{test}"
    scale = _scale(normalised_score(table, model_row, best, metric)) if table.of_kind("floor") else ""
    with np.errstate(invalid="ignore"):  # a ratio of 0 loses infinitely, and no difference is below NaN
        seeds = float(np.std(gains[best].mean(axis=1), ddof=1)) if len(gains[best]) > 1 else 0.0
    lost = (float(np.mean(_losses(chosen, r)[:, common])) for r in (row, table.row(best)))
    found = "tie"
    if number(ours) != number(theirs):
        found = outcome(*lost, spread=seeds, difference=interval(gains[best]))
    unclear = abs(float(np.mean(gain))) < seeds
    spread = f"; the difference is smaller than the spread over seeds, {number(seeds)}" if unclear else ""
    tested = isinstance(chosen, ExpressionMetric) and "de" in chosen.needs
    between = _difference(chosen, gains[best])
    unfair = "; the tests do not suit the cells of the baselines (see the table's foot)" if tested else ""
    return Verdict(
        found,
        f"{metric}: {model_row} {WORDS[found]} the best training-free baseline, {best}{some}: {number(ours)} against "
        f"{number(theirs)}{between}{better}{scale}{spread}{unfair}.",
    )


def _scale(score: float) -> str:
    if not math.isfinite(score):
        return "; that baseline is as good as real vs real already"
    if abs(score) > MOST_SCORE:
        told = f"below -{MOST_SCORE}" if score < 0 else f"above {MOST_SCORE}"
        return f"; normalised score {told} (0 that baseline, 1 real vs real)"
    return f"; normalised score {round(score, 2) + 0.0:.2f} (0 that baseline, 1 real vs real)"  # no -0.00


def _difference(metric: ExpressionMetric | Metric, gains: Float[np.ndarray, "_seeds _populations"]) -> str:
    """Of what is better by `gains`, minus the other, in the metric's own sense; with its interval."""
    sign = 1 if metric.direction == "higher is better" else -1
    found = interval(sign * gains)
    what = "difference of |log|" if metric.direction == "1 is best" else "difference"
    return f"; {what} {number(float(np.mean(sign * gains)))} " + (
        f"{bounds(found)}{'' if found.clear_of_zero else ', which holds 0'}"
        if found.exists
        else f"(no interval: fewer than {LEAST_UNITS} populations)"
    )


def render(table: PerturbationTable, *, median: bool = False) -> str:
    """The table as text: mean (or median) over populations, +- over seeds, definitions, notes and failures below.

    The line below a row holds the 95 % bootstrap intervals over populations and seeds. Columns that do
    not fit beside each other follow in further blocks. A row or a column without any value is left out; the notes say
    why.
    """
    shown = [row for row in table.rows if any(row.has_value(m.name).any() for m in table.metrics)]
    floors, rest = ([row for row in shown if (row.kind == "floor") == wanted] for wanted in (True, False))
    lines = [table.title]
    for block in _blocks(table, shown, median):
        head = ["", *(m.name + ARROWS[m.direction] for m in block)]
        cells = [[line for row in rows for line in _lines(row, block, median)] for rows in (rest, floors)]
        lines += aligned(head, *cells)
    several = any(len(values) > 1 for row in table.rows for values in row.values.values())
    numbers = _range(table.n_cells)
    lines.append(
        f"{'Median' if median else 'Mean'} over {_plural(len(table.populations), 'population')} of "
        f"{_range(table.n_real)} real cells, {table.n_genes} genes; "
        f"{_plural(table.n_training, 'training perturbation')}."
        + (" ± is the standard deviation over seeds, of the mean." if several else "")
    )
    if any(row.interval(m.name).exists for row in table.rows for m in table.metrics):
        lines.append(
            f"[low, high]: 95 % bootstrap interval of the {'median' if median else 'mean'} over populations"
            f"{' and seeds' if several else ''}, {N_RESAMPLES} resamples; none from fewer than {LEAST_UNITS} "
            "populations."
        )
    else:
        lines.append(f"No bootstrap intervals: fewer than {LEAST_UNITS} populations with a value.")
    equal = [m.name for m in table.metrics if _equal(m)]
    if equal:
        lines.append(f"{numbers} cells of either side, mean of {table.n_draws} draws: {', '.join(equal)}.")
    lines.append(f"x is {table.unit}; real controls on both sides.")
    lines += [f"{m.name} [{m.unit}]: {m.definition}." for m in table.metrics]
    for m in table.metrics:
        beyond = [n for n in table.n_cells if isinstance(m, Metric) and m.approximation(n)]
        if beyond:
            of_all = _plural(len(table.populations), "population")
            lines.append(f"{m.name}: for {len(beyond)} of {of_all} (more than {m.exact_up_to} cells) the {m.beyond}.")  # pyright: ignore[reportAttributeAccessIssue]
    lines += [f"{row.name}: {_notes(row)}." for row in table.rows if _notes(row)]
    if table.of_kind("baseline"):
        lines.append(f"Cells of the baselines: {ON_CELLS}.")
    predictors = [row for row in table.rows if row.kind != "floor"] or table.rows
    for m in table.metrics:
        without = ~np.logical_or.reduce([row.has_value(m.name) for row in predictors])
        if n := int(without.sum()):
            of_all = _plural(len(table.populations), "population")
            lines.append(f"{m.name}: not even the real cells have a value for {n} of {of_all}.")
    failed = {(row.name, m.name): row.n_failed(m.name) for row in table.rows for m in table.metrics}
    total = sum(failed.values())
    where = ", ".join(f"{name} in {metric} {n}" for (name, metric), n in failed.items() if n)
    lines.append(f"Values that could not be computed: {total}" + (f" ({where})." if total else "."))
    return "\n".join(lines)


def to_json_dict(table: PerturbationTable) -> dict[str, Any]:
    """Everything of the table as plain values for `json`, every population by itself; NaN becomes None.

    No time stamp: the same computation on the same machine gives the same bytes.
    """
    return {
        "title": table.title,
        "populations": [
            {"condition": p.condition, "context": p.context, "n_real": n, "n_cells_per_draw": drawn}
            for p, n, drawn in zip(table.populations, table.n_real, table.n_cells, strict=True)
        ],
        "n_draws": table.n_draws,
        "n_genes": table.n_genes,
        "n_training_perturbations": table.n_training,
        "seed": table.seed,
        "unit": table.unit,
        "metrics": {
            m.name: {
                "definition": m.definition,
                "unit": m.unit,
                "direction": m.direction,
                "equal_numbers_of_cells": _equal(m),
            }
            for m in table.metrics
        },
        "rows": [
            {
                "name": row.name,
                "kind": row.kind,
                "note": row.note,
                "n_seeds": max(len(v) for v in row.values.values()),
                "n_nonfinite_cells": row.n_nonfinite,
                "scores": {m.name: _scores(row, m.name) for m in table.metrics},
            }
            for row in table.rows
        ],
        "environment": environment(),
        "provenance": dict(table.provenance),
    }


@dataclass(frozen=True)
class _Truth:
    """The real side of the comparison, computed once for all rows; `settings` are the genes and reference of all."""

    real: Mapping[Population, np.ndarray]
    controls: Mapping[str, Control]
    metrics: Mapping[str, ExpressionMetric | Metric]
    n_cells: Mapping[Population, int]
    n_draws: int
    seed: int
    settings: Mapping[str, Any]

    @functools.cached_property
    def whole(self) -> Profiles:
        return self._profiles(self.real.__getitem__, self._asks(False, "real"))

    @functools.cached_property
    def draws(self) -> tuple[Profiles, ...]:
        """None where no metric asks for equal numbers."""
        asks = self._asks(True, "real")
        return tuple(
            self._profiles(lambda p, d=d: self._draw(self.real[p], p, d, 0), asks)
            for d in range(self.n_draws if any(map(_equal, self.metrics.values())) else 0)
        )

    @functools.cached_property
    def counted(self) -> dict[str, np.ndarray]:
        """[draws, populations] of each metric: whether the real cells have a value against themselves."""
        return {
            name: np.ones((self.n_draws, len(self.real)), bool)
            if isinstance(metric, Metric)
            else np.stack([np.isfinite(v) for v in self._values(metric, self.whole, self.draws)])
            for name, metric in self.metrics.items()
        }

    def score(self, cells_of: Callable[[Population], np.ndarray | None]) -> tuple[dict[str, np.ndarray], int]:
        """Values [draws, populations] of each metric, and the number of cells that are not finite.

        Population after population, so that the cells of one are in memory, whatever the number.
        """
        whole, draws = [], [[] for _ in self.draws]
        distances = {name: [] for name, m in self.metrics.items() if isinstance(m, Metric)}
        for p in self.real:
            cells = cells_of(p)
            whole.append(self._profiles(lambda _, x=cells: x, self._asks(False, "pred"), (p,)))
            drawn = [None if cells is None else self._draw(cells, p, d, 1) for d in range(len(self.draws))]
            for of_draw, x in zip(draws, drawn, strict=True):
                of_draw.append(self._profiles(lambda _, x=x: x, self._asks(True, "pred"), (p,)))
            for name, values in distances.items():
                fn = self.metrics[name].fn
                values.append(
                    [
                        math.nan
                        if x is None or not np.isfinite(x).all() or whole[-1].n_nonfinite[0]
                        else float(
                            fn(np.asarray(x, np.float64), np.asarray(self._draw(self.real[p], p, d, 0), np.float64))  # pyright: ignore[reportArgumentType]
                        )
                        for d, x in enumerate(drawn)
                    ]
                )
        pred, pred_draws = _joined(whole), [_joined(of_draw) for of_draw in draws]
        failed = np.array(pred.n_nonfinite) > 0
        for of_draw in pred_draws:  # the prediction failed, and is not scored on its remaining cells
            _fail(of_draw, failed)
        values = {
            name: np.array(distances[name]).T.reshape(len(self.draws), len(self.real))
            if name in distances
            else np.stack(self._values(metric, pred, pred_draws))  # pyright: ignore[reportArgumentType]
            for name, metric in self.metrics.items()
        }
        return values, sum(pred.n_nonfinite)

    def ceiling(self) -> PerturbationRow:
        """One random half of the real cells as the prediction of the other."""
        values: dict[str, list[np.ndarray]] = {name: [] for name in self.metrics}
        counted: dict[str, list[np.ndarray]] = {name: [] for name in self.metrics}
        for d in range(self.n_draws):
            halves = {p: np.random.default_rng([self.seed, d, 2]).permutation(len(x)) for p, x in self.real.items()}

            def part(p: Population, which: int, n: int, halves: Mapping[Population, np.ndarray] = halves) -> np.ndarray:
                half = len(self.real[p]) // 2
                return self.real[p][halves[p][which * half : which * half + n]]

            sides = {}
            for equal in (False, True):
                size = self.n_cells.__getitem__ if equal else (lambda p: len(self.real[p]) // 2)
                sides[equal] = [
                    self._profiles(lambda p, i=i, size=size: part(p, i, size(p)), self._asks(equal, role))
                    for i, role in enumerate(("pred", "real"))
                ]
            for name, metric in self.metrics.items():
                if isinstance(metric, Metric):
                    pairs = [[np.asarray(part(p, i, n), np.float64) for i in (0, 1)] for p, n in self.n_cells.items()]
                    values[name].append(np.array([float(metric.fn(*pair)) for pair in pairs]))
                    counted[name].append(np.ones(len(pairs), bool))
                else:
                    a, b = sides[metric.equal_cells]
                    values[name].append(metric.fn(a, b))
                    counted[name].append(np.isfinite(metric.fn(b, b)))
        note = (
            "one random half of the real cells as the prediction of the other half; pessimistic where all cells are "
            "used (there the rows above have the whole truth), the noise floor where numbers are equal"
        )
        return PerturbationRow(
            CEILING,
            "floor",
            {name: np.stack(v)[None] for name, v in values.items()},
            {name: np.stack(v) for name, v in counted.items()},
            note=note,
        )

    def _asks(self, equal: bool, side: str) -> dict[str, bool]:
        needs = {
            need
            for m in self.metrics.values()
            if isinstance(m, ExpressionMetric) and m.equal_cells == equal
            for need in m.needs
        }
        return {"de": "de" in needs or (side == "real" and "real de" in needs), "edistance": "edistance" in needs}

    def _draw(self, cells: np.ndarray, p: Population, draw: int, side: int) -> np.ndarray:
        return draw_cells(cells, self.n_cells[p], np.random.default_rng([self.seed, draw, side]))

    def _profiles(
        self, cells_of: Callable[[Population], Any], asks: Mapping[str, bool], populations: tuple[Population, ...] = ()
    ) -> Profiles:
        return profiles(_Made(populations or tuple(self.real), cells_of), self.controls, **asks, **self.settings)

    def _values(self, metric: ExpressionMetric, whole: Profiles, draws: Sequence[Profiles]) -> list[np.ndarray]:
        """One array a draw, against the truth of the draw."""
        if metric.equal_cells:
            return [metric.fn(side, truth) for side, truth in zip(draws, self.draws, strict=True)]
        return [metric.fn(whole, self.whole)]


class _Made(Mapping):
    """Cells that are made when they are asked for."""

    def __init__(self, populations: tuple[Population, ...], cells_of: Callable[[Population], Any]):
        self.populations, self.cells_of = populations, cells_of

    def __getitem__(self, population: Population) -> Any:
        return self.cells_of(population)

    def __iter__(self) -> Iterator[Population]:
        return iter(self.populations)

    def __len__(self) -> int:
        return len(self.populations)


def _joined(parts: Sequence[Profiles]) -> Profiles:
    def rows(field: str) -> np.ndarray | None:
        values = [getattr(part, field) for part in parts]
        return None if values[0] is None else np.concatenate(values)

    tables = [part.de for part in parts]
    return Profiles(
        populations=tuple(p for part in parts for p in part.populations),
        mean=rows("mean"),  # pyright: ignore[reportArgumentType]
        delta=rows("delta"),  # pyright: ignore[reportArgumentType]
        variance=rows("variance"),  # pyright: ignore[reportArgumentType]
        de=None
        if tables[0] is None
        else DifferentialExpression(*(np.concatenate([t[i] for t in tables]) for i in range(len(tables[0])))),  # pyright: ignore[reportOptionalSubscript]
        edistance=rows("edistance"),
        n_cells=tuple(n for part in parts for n in part.n_cells),
        n_nonfinite=tuple(n for part in parts for n in part.n_nonfinite),
        genes=parts[0].genes,
        reference=parts[0].reference,
    )


def _fail(side: Profiles, rows: np.ndarray) -> None:
    for values in (side.mean, side.delta, side.variance, side.edistance, *(side.de or ())):
        if values is not None:
            values[rows] = np.nan


def _baseline_row(
    name: str, predicted: Mapping[Population, Any], fitted: FittedBaselines, truth: _Truth
) -> PerturbationRow:
    missing = [p for p, (delta, _) in predicted.items() if delta is None]
    defined = np.array([p not in missing for p in predicted])
    values, n_nonfinite = truth.score(
        lambda p: None if predicted[p].delta is None else fitted.cells(p, predicted[p].delta)
    )
    note = RULES[name]
    if missing:
        reason = predicted[missing[0]].note
        note += f"; {len(missing)} of {_plural(len(predicted), 'population')} not predicted ({missing[0]}: {reason})"
    return PerturbationRow(
        name,
        "baseline",
        {metric: v[None] for metric, v in values.items()},
        {metric: v & defined[None] for metric, v in truth.counted.items()},
        n_nonfinite,
        note,
    )


def _check(
    models: Mapping[str, Sequence[Mapping[Population, Any]]],
    real: Mapping[Population, np.ndarray],
    n_draws: int,
    n_cells: int | None,
) -> None:
    check.at_least("n_draws", n_draws, 1)
    if n_cells is not None:
        check.at_least("n_cells", n_cells, 2)
    if not real:
        raise ValueError("real must hold the cells of at least one population; it is empty.")
    for p, x in real.items():
        check.at_least(f"the number of real cells of {p}", len(x), 4)
        check.finite(f"real[{p}]", x)
    for name, seeds in models.items():
        check.at_least(f"the number of predictions of model {name!r}", len(seeds), 1)
        for cells in seeds:
            lacking, more = [p for p in real if p not in cells], [p for p in cells if p not in real]
            if lacking or more:
                what = f"lacks {lacking[0]}" if lacking else f"has {more[0]}, which is not in real"
                raise ValueError(f"a prediction of model {name!r} must hold the populations of real; it {what}.")
            for p in real:
                check.at_least(f"the number of cells that model {name!r} predicts for {p}", len(cells[p]), 2)


def _equal(metric: ExpressionMetric | Metric) -> bool:
    return isinstance(metric, Metric) or metric.equal_cells


def _losses(metric: ExpressionMetric | Metric, row: PerturbationRow) -> Float[np.ndarray, "_seeds _populations"]:
    return losses(metric.direction, row.by_population(metric.name))


def _scores(row: PerturbationRow, metric: str) -> dict[str, Any]:
    return {
        "mean": finite_or_none(row.mean(metric)),
        "median": finite_or_none(row.median(metric)),
        "sd_seeds": finite_or_none(row.sd_seeds(metric)),
        "interval": row.interval(metric).to_json_dict(),
        "n_failed": row.n_failed(metric),
        "n_undefined": row.n_undefined(metric),
        "by_population": [[finite_or_none(float(v)) for v in seed] for seed in row.by_population(metric)],
        "sd_draws": [finite_or_none(float(v)) for v in _sd_draws(row, metric)],
    }


def _sd_draws(row: PerturbationRow, metric: str) -> np.ndarray:
    """Over the draws of cells, by population (root mean square over seeds); 0 where all cells are used."""
    values = row.values[metric]
    if values.shape[1] < 2:
        return np.zeros(values.shape[2])
    return np.sqrt(np.mean(np.var(values, axis=1, ddof=1), axis=0))


def _blocks(
    table: PerturbationTable, rows: Sequence[PerturbationRow], median: bool
) -> list[list[ExpressionMetric | Metric]]:
    """As many columns beside each other as fit the width, of those in which a row has a value."""
    first = max((len(row.name) for row in rows), default=0)
    blocks, used = [[]], first
    for m in table.metrics:
        if not any(row.has_value(m.name).any() for row in rows):
            continue
        heading = m.name + ARROWS[m.direction]
        texts = [line[1] for row in rows for line in _lines(row, [m], median)]
        width = 2 + max(len(heading), *map(len, texts))
        if blocks[-1] and used + width > WIDTH:
            blocks.append([])
            used = first
        blocks[-1].append(m)
        used += width
    return blocks


def _lines(row: PerturbationRow, block: Sequence[ExpressionMetric | Metric], median: bool) -> list[list[str]]:
    """The row's line, and the one of its intervals, where it has any."""
    statistic = "median" if median else "mean"
    intervals = [row.interval(m.name, statistic=statistic) for m in block]
    below = [bounds(found) if found.exists else "" for found in intervals]
    return [[row.name, *(_cell(row, m.name, median) for m in block)], *([["", *below]] if any(below) else [])]


def _cell(row: PerturbationRow, metric: str, median: bool) -> str:
    counted = row.has_value(metric)
    if not counted.any():
        return "-"
    value = row.median(metric) if median else row.mean(metric)
    if not math.isfinite(value):
        return f"{'failed' if row.n_nonfinite else 'no value'} ({row.n_failed(metric)})"
    some = "" if counted.all() else f" ({counted.sum()} of {counted.size})"
    seeds = row.sd_seeds(metric)
    if seeds is None or median:
        return number(value) + some
    decimals = decimals_of(max(abs(value), seeds))
    text = f"{value:.3e} ± {seeds:.0e}" if decimals is None else f"{value:.{decimals}f} ± {seeds:.{decimals}f}"
    return text + some


def _notes(row: PerturbationRow) -> str:
    notes = [row.note] if row.note else []
    if row.n_nonfinite:
        notes.append(f"{row.n_nonfinite} predicted cells are not finite")
    return "; ".join(notes)


def _plural(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"


def _range(numbers: Sequence[int]) -> str:
    return str(min(numbers)) if min(numbers) == max(numbers) else f"{min(numbers)} to {max(numbers)}"
