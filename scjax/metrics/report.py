"""Tables of a comparison: model rows beside training-free baselines and the real-vs-real floor, and what they say.

One table is one held-out time; `aggregate` says what several of them say together, with intervals.
"""

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from scjax import __version__, check
from scjax.metrics.baselines import Baseline, replicate_floor
from scjax.metrics.intervals import LEAST_UNITS, N_RESAMPLES, Interval, interval, ratio_interval
from scjax.metrics.population import POPULATION_METRICS, Cells, Comparison, Metric, compare_populations

__all__ = [
    "Aggregate",
    "ResultTable",
    "Row",
    "Table",
    "Verdict",
    "WORDS",
    "aggregate",
    "aggregate_to_json_dict",
    "aligned",
    "bounds",
    "decimals_of",
    "environment",
    "finite_or_none",
    "judge",
    "losses",
    "normalised_score",
    "number",
    "outcome",
    "render",
    "render_aggregates",
    "result_table",
    "spread",
    "to_json_dict",
    "verdict",
]

KINDS = ("model", "baseline", "floor")
ARROWS = {"lower is better": " ↓", "higher is better": " ↑", "1 is best": " →1", "no direction": ""}
WORDS = {"win": "BEATS", "tie": "TIES WITH", "lose": "LOSES TO"}


class Table:
    """What every table can be asked: a row or a metric by its name, the rows of a kind. Row names are different."""

    rows: tuple[Any, ...]
    metrics: tuple[Any, ...]

    def __post_init__(self):
        names = [row.name for row in self.rows]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"the rows of a table must have different names; {name!r} comes twice.")

    def row(self, name: str) -> Any:
        return self._named("row", name, self.rows)

    def metric(self, name: str) -> Any:
        return self._named("metric", name, self.metrics)

    def of_kind(self, kind: str) -> tuple[Any, ...]:
        check.one_of("kind", kind, KINDS)
        return tuple(row for row in self.rows if row.kind == kind)

    def _named(self, what: str, name: str, among: Sequence[Any]) -> Any:
        for one in among:
            if one.name == name:
                return one
        names = [one.name for one in among]
        raise ValueError(f"no {what} is called {name!r}.{check.suggestion(name, names)} There are: {', '.join(names)}.")


@dataclass(frozen=True)
class Row:
    """One predictor's line.

    Attributes:
        kind: "model", "baseline" (fitted on training data without training) or "floor" (real against real).
        comparisons: one for each training seed of a model, one for a baseline; none where the rule is not defined.
        note: what the rule did, or why it is not defined here.
        matched: the same at the floor's number of cells, where that is smaller; else empty.
    """

    name: str
    kind: str
    comparisons: tuple[Comparison, ...]
    note: str = ""
    matched: tuple[Comparison, ...] = ()

    def __post_init__(self):
        check.one_of("kind", self.kind, KINDS)

    def mean(self, metric: str) -> float:
        """Mean over seeds and draws; NaN with any failed value, or for a row that is not defined."""
        return float(np.mean(self._means(metric))) if self.comparisons else math.nan

    def sd_draws(self, metric: str) -> float:
        """Standard deviation over draws of cells (root mean square over seeds)."""
        sds = [c.scores[metric].sd for c in self.comparisons]
        return float(np.sqrt(np.mean(np.square(sds)))) if sds else math.nan

    def sd_seeds(self, metric: str) -> float | None:
        """Standard deviation over training seeds; None with fewer than two."""
        means = self._means(metric)
        return float(np.std(means, ddof=1)) if len(means) > 1 else None

    def at_floor(self) -> "Row":
        """The row at the floor's number of cells: what may be compared with the floor."""
        return Row(self.name, self.kind, self.matched, self.note) if self.matched else self

    def n_failed(self, metric: str) -> int:
        return sum(c.scores[metric].n_failed for c in self.comparisons)

    @property
    def n_nonfinite(self) -> int:
        """Predicted cells with a NaN or infinite coordinate, over all seeds."""
        return sum(c.n_nonfinite for c in self.comparisons)

    def _means(self, metric: str) -> list[float]:
        return [c.scores[metric].mean for c in self.comparisons]


@dataclass(frozen=True)
class ResultTable(Table):
    """Rows are predictors, columns are metrics; all but the floor at the same cell numbers.

    Where the floor has fewer cells than the others, every row is there at the floor's number too (`Row.matched`).

    Attributes:
        title: what was predicted: data set, held-out time, space.
        unit: of the cells' coordinates, which the metrics' definitions call x.
        provenance: whatever identifies the run (hashes of data and split, checkpoint), for the JSON.
    """

    title: str
    metrics: tuple[Metric, ...]
    rows: tuple[Row, ...]
    n_cells: int
    n_draws: int
    seed: int
    unit: str = "unit of the latent space"
    provenance: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


def result_table(
    title: str,
    models: Mapping[str, Sequence[Cells]],
    baselines: Mapping[str, Baseline],
    real: Cells,
    metrics: Mapping[str, Metric] = POPULATION_METRICS,
    *,
    n_cells: int | None = None,
    n_draws: int = 5,
    seed: int,
    unit: str = "unit of the latent space",
    provenance: Mapping[str, Any] = MappingProxyType({}),
) -> ResultTable:
    """All predictors against the same draws of real cells, at the same cell numbers, with the floor as the last row.

    Disjoint parts of the real cells hold half of them at most. With more cells in a draw the predictors are
    compared once more at the floor's number, in repeated draws: distances shrink with the number of cells, so only
    equal numbers tell how far above the floor a prediction lies (`normalised_score`).

    Args:
        title: what was predicted.
        models: predicted cells of each model, one array for each of its training seeds.
        baselines: as `baselines.training_free` gives them.
        real: the held-out cells.
        metrics: the columns, by name.
        n_cells: of each population in each draw; the smallest population of all unless given.
        n_draws: repeated draws of cells.
        seed: of the draws.
        unit: of the cells' coordinates.
        provenance: kept in the table, for the JSON.

    Raises:
        ValueError: as `compare_populations`; a model without predictions.
    """
    for name, seeds in models.items():
        check.at_least(f"the number of predictions of model {name!r}", len(seeds), 1)
    populations = [real, *(p for seeds in models.values() for p in seeds)]
    populations += [b.cells for b in baselines.values() if b.cells is not None]
    n = min(len(p) for p in populations) if n_cells is None else n_cells

    floor = replicate_floor(real, metrics, n_cells=n, n_draws=n_draws, seed=seed)

    def compared(predictions: Sequence[Cells], n_cells: int) -> tuple[Comparison, ...]:
        settings = {"n_cells": n_cells, "n_draws": n_draws, "seed": seed}
        return tuple(compare_populations(pred, real, metrics, **settings) for pred in predictions)

    def row(name: str, kind: str, predictions: Sequence[Cells], note: str = "") -> Row:
        matched = compared(predictions, floor.n_cells) if floor.n_cells < n else ()
        return Row(name, kind, compared(predictions, n), note, matched)

    rows = [row(name, "model", seeds) for name, seeds in models.items()]
    rows += [row(name, "baseline", () if b.cells is None else (b.cells,), b.note) for name, b in baselines.items()]
    fewer = f", {floor.n_cells} cells each: pessimistic" if floor.n_cells < n else f", {floor.n_cells} cells each"
    rows.append(Row("real vs real (floor)", "floor", (floor,), "random disjoint parts of the real cells" + fewer))
    return ResultTable(title, tuple(metrics.values()), tuple(rows), n, n_draws, seed, unit, provenance)


def losses(direction: str, values: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """The values so that smaller is better: negated, or their |log| where 1 is best."""
    if direction == "1 is best":
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.abs(np.log(values))
    return -values if direction == "higher is better" else values


def normalised_score(table: ResultTable, row: str, baseline: str, metric: str) -> float:
    """(row - baseline) / (floor - baseline): 0 as good as the baseline, 1 as good as real cells, not clipped.

    All three at the floor's number of cells; a metric of which 1 is best enters as its |log|. Below 0 is worse than the
    baseline. NaN where one of the three is, or where the floor is not better than the baseline and spans no scale.
    """
    chosen = table.metric(metric)
    floors = table.of_kind("floor")
    if not floors:
        raise ValueError("the table has no floor row to normalise by.")
    three = np.array([r.at_floor().mean(metric) for r in (table.row(row), table.row(baseline), floors[0])])
    ours, base, floor = (float(loss) for loss in losses(chosen.direction, three))
    return (ours - base) / (floor - base) if floor < base else math.nan


class Verdict(NamedTuple):
    """A model beside the best training-free baseline, in one metric.

    Attributes:
        outcome: "win", "tie" or "lose"; "failed" where the model has no value, None where nothing can be compared.
        text: the same in one line, with the numbers.
    """

    outcome: str | None
    text: str


def outcome(ours: float, theirs: float, *, spread: float = 0.0, difference: Interval | None = None) -> str:
    """Win, tie or lose, as a word: of two values of which the smaller is better.

    It is a tie where the values are equal but for rounding, where they differ by less than `spread`, and where the
    interval of their difference holds 0.
    """
    unclear = difference is not None and difference.exists and not difference.clear_of_zero
    if unclear or math.isclose(ours, theirs, rel_tol=1e-4, abs_tol=1e-12) or abs(ours - theirs) < spread:
        return "tie"
    return "win" if ours < theirs else "lose"


def verdict(table: ResultTable, model_row: str, metric: str, baseline_rows: Sequence[str] | None = None) -> str:
    """One line: does the model beat the best training-free baseline in this metric, and by which ratio?

    `baseline_rows` are all rows of kind "baseline" unless given. The spread is that over seeds where there are
    several, else over draws of cells; a difference smaller than it is a tie (`outcome`).
    """
    return judge(table, model_row, metric, baseline_rows).text


def judge(table: ResultTable, model_row: str, metric: str, baseline_rows: Sequence[str] | None = None) -> Verdict:
    """`verdict` with its outcome as a word to count."""
    chosen = table.metric(metric)
    best = _best_baseline(table, metric, baseline_rows)
    if best is None:
        return Verdict(
            None, f"{metric}: no training-free baseline is defined here; nothing to compare {model_row} with."
        )
    row = table.row(model_row)
    ours, theirs = row.mean(metric), table.row(best).mean(metric)
    if not math.isfinite(ours):
        return Verdict(
            "failed",
            f"{metric}: {model_row} FAILED ({row.n_failed(metric)} values could not be computed, "
            f"{row.n_nonfinite} predicted cells are not finite); the best training-free baseline, {best}, has "
            f"{number(theirs)}.",
        )
    ours_lost, theirs_lost = map(float, losses(chosen.direction, np.array([ours, theirs])))
    noise, over = spread(row, chosen)
    found = outcome(ours_lost, theirs_lost, spread=noise) if number(ours) != number(theirs) else "tie"
    ratio = f", ratio {ours / theirs:.3f}" if theirs > 0 and chosen.direction != "1 is best" else ""
    what = "difference of |log|" if chosen.direction == "1 is best" else "difference"
    unclear = f"; the {what} is smaller than the spread over {over}, {number(noise)}"
    return Verdict(
        found,
        f"{metric}: {model_row} {WORDS[found]} the best training-free baseline, {best}: {number(ours)} against "
        f"{number(theirs)}{ratio}{unclear if abs(ours_lost - theirs_lost) < noise else ''}.",
    )


def spread(row: Row, metric: Metric) -> tuple[float, str]:
    """Standard deviation over the row's seeds, or over the draws of its only one; where 1 is best, of the logarithm."""
    over, values = "seeds", [c.scores[metric.name].mean for c in row.comparisons]
    if len(values) == 1:
        over, values = "draws", row.comparisons[0].scores[metric.name].values
    with np.errstate(divide="ignore", invalid="ignore"):  # the logarithm of 0; no difference is below NaN
        values = np.log(values) if metric.direction == "1 is best" else np.asarray(values)
        return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0, over


def _best_baseline(table: ResultTable, metric: str, names: Sequence[str] | None = None) -> str | None:
    """The one with the best mean of those that have one; None where none has."""
    names = [row.name for row in table.of_kind("baseline")] if names is None else list(names)
    values = np.array([table.row(name).mean(metric) for name in names])
    lost = losses(table.metric(metric).direction, values)
    return names[int(np.nanargmin(lost))] if np.isfinite(lost).any() else None


def render(table: ResultTable) -> str:
    """The table as text of aligned columns: mean +- spread, an arrow towards better, definitions and notes below.

    Where the floor has fewer cells, a second block has all rows at the floor's number. A rule that is not defined here
    has no row; its note says why.
    """
    several = any(len(row.comparisons) > 1 for row in table.rows)
    head = ["", *(m.name + ARROWS[m.direction] for m in table.metrics)]
    floors = table.of_kind("floor")
    rest = [row for row in table.rows if row not in floors]

    def block(rows: Sequence[Row]) -> list[list[str]]:
        return [[row.name, *(_cell(row, m) for m in table.metrics)] for row in rows if row.comparisons]

    lines = [table.title, *aligned(head, block(rest), block(floors))]
    if matched := [row.at_floor() for row in rest if row.matched]:
        lines.append(f"The same with {matched[0].comparisons[0].n_cells} cells of each population, as the floor has:")
        lines += aligned(head, block(matched), block(floors))
    whole = any(c.n_draws < table.n_draws for row in table.rows for c in row.comparisons)
    drawn = f"{table.n_cells} cells of each population, mean of {table.n_draws} draws"
    drawn += " (of one, where both populations are used whole); " if whole else "; "
    lines.append(drawn + "± is the standard deviation over " + ("seeds" if several else "draws of cells"))
    if several:
        lines[-1] += " (rows with one seed: over draws)"
    lines.append(f"x is the {table.unit}.")
    lines += [f"{m.name} [{m.unit}]: {m.definition}." for m in table.metrics]
    if approximate := [m for m in table.metrics if any(_approximation(row, m) for row in table.rows)]:
        how = "; ".join(f"{m.name} of more than {m.exact_up_to} cells is the {m.beyond}" for m in approximate)
        lines.append(f"≈: not by the definition: {how}.")
    lines += [f"{row.name}: {_notes(row)}." for row in table.rows if _notes(row)]
    failed = sum(row.n_failed(m.name) for row in table.rows for m in table.metrics)
    lines.append(f"Values that could not be computed: {failed}.")
    return "\n".join(lines)


def to_json_dict(table: ResultTable) -> dict[str, Any]:
    """Everything of the table as plain values for `json`, with definitions, versions and platform; NaN becomes None.

    No time stamp: the same computation on the same machine gives the same bytes.
    """
    return {
        "title": table.title,
        "n_cells": table.n_cells,
        "n_draws": table.n_draws,
        "seed": table.seed,
        "unit": table.unit,
        "metrics": {
            m.name: {"definition": m.definition, "unit": m.unit, "direction": m.direction} for m in table.metrics
        },
        "rows": [
            {
                "name": row.name,
                "kind": row.kind,
                "note": row.note,
                "n_seeds": len(row.comparisons),
                "n_cells": [c.n_cells for c in row.comparisons],
                "n_draws": [c.n_draws for c in row.comparisons],
                "repeated": [c.repeated for c in row.comparisons],
                "n_nonfinite_cells": row.n_nonfinite,
                "scores": {m.name: _scores(row, m) for m in table.metrics},
                "at_floor": None
                if not row.matched
                else {
                    "n_cells": row.matched[0].n_cells,
                    "n_draws": row.matched[0].n_draws,
                    "scores": {m.name: _scores(row.at_floor(), m) for m in table.metrics},
                },
            }
            for row in table.rows
        ],
        "environment": environment(),
        "provenance": dict(table.provenance),
    }


@dataclass(frozen=True)
class Aggregate:
    """A model beside the best training-free baseline of each held-out time.

    Attributes:
        model: name of the row.
        metric: of which lower is better, by its name.
        definition: of the metric.
        unit_names: titles of the tables, one a held-out time.
        best: name of the best baseline of each time, chosen with the truth at hand: a hard opponent.
        ratio: metric of the model over that of this baseline, [seeds, times]; NaN where the model failed, or where
            there is no baseline with a positive value.
        matched: the same ratio at the floor's number of cells.
        floor: the floor over that baseline at that number, [times]; at 1 or above nothing is left to gain there.
    """

    model: str
    metric: str
    definition: str
    unit_names: tuple[str, ...]
    best: tuple[str | None, ...]
    ratio: Float[np.ndarray, "_seeds _times"]
    matched: Float[np.ndarray, "_seeds _times"]
    floor: Float[np.ndarray, " _times"]

    @property
    def mean_ratio(self) -> float:
        """Over times, of the mean over seeds; NaN with any failed value."""
        return float(self.ratio.mean())

    @property
    def score(self) -> Float[np.ndarray, "_seeds _times"]:
        """`normalised_score` beside the best baseline, not clipped; NaN where that is as good as the floor."""
        gap = np.where(self.floor < 1, 1 - self.floor, np.nan)
        return (1 - self.matched) / gap[None]

    @property
    def mean_score(self) -> float:
        """(model - baseline) / (floor - baseline) of the means over times of each in units of the baseline.

        Not the mean of `score`, which a time with next to nothing to gain would decide. NaN with a failed value, or
        where the floor is not below the baseline on average.
        """
        gap = 1 - self.floor.mean()
        return float((1 - self.matched).mean() / gap) if gap > 0 else math.nan

    @property
    def n_failed(self) -> int:
        """Ratios, of all seeds and times, that could not be computed."""
        return int((~np.isfinite(self.ratio)).sum())

    @property
    def share_at_most_one(self) -> float:
        """Of the times: where the ratio, mean over seeds, is at most 1. A failed time counts as one where it is not."""
        return float(np.mean(self.ratio.mean(axis=0) <= 1))

    def ratio_interval(self, level: float = 0.95, *, n_resamples: int = N_RESAMPLES, seed: int = 0) -> Interval:
        """Of `mean_ratio`, over times and seeds (`intervals.interval`)."""
        return interval(self.ratio, level, n_resamples=n_resamples, seed=seed)

    def score_interval(self, level: float = 0.95, *, n_resamples: int = N_RESAMPLES, seed: int = 0) -> Interval:
        """Of `mean_score`, over times and seeds (`intervals.ratio_interval`)."""
        return ratio_interval(1 - self.matched, 1 - self.floor, level, n_resamples=n_resamples, seed=seed)


def aggregate(
    tables: Sequence[ResultTable],
    metric: str = "W1",
    *,
    models: Sequence[str] | None = None,
    baseline_rows: Sequence[str] | None = None,
) -> dict[str, Aggregate]:
    """What several tables say together: all held-out times of a data set, or of several, each weighing the same.

    Args:
        tables: one a held-out time, with the same models of the same number of seeds.
        metric: lower is better, and positive: a ratio has no other sense.
        models: rows; all of kind "model" unless given.
        baseline_rows: as in `verdict`.

    Raises:
        ValueError: no tables; another direction, or tables with different definitions of the metric; a model that is
            not in every table, or with another number of seeds.
    """
    if not tables:
        raise ValueError("tables must hold at least one table; it is empty.")
    chosen = tables[0].metric(metric)
    if chosen.direction != "lower is better":
        raise ValueError(f"aggregate takes a metric of which lower is better; {metric} says {chosen.direction!r}.")
    for table in tables:
        if table.metric(metric).definition != chosen.definition:
            raise ValueError(
                f"{metric} has two definitions, {chosen.definition!r} and {table.metric(metric).definition!r}: values "
                "under them are not comparable."
            )
    names = [row.name for row in tables[0].of_kind("model")] if models is None else list(models)
    best = tuple(_best_baseline(table, metric, baseline_rows) for table in tables)
    made = {}
    for name in names:
        seeds = [len(table.row(name).comparisons) for table in tables]
        if len(set(seeds)) > 1 or not seeds[0]:
            raise ValueError(f"model {name!r} must have as many seeds in every table, one at least; got {seeds}.")
        ratio, matched = np.full((2, seeds[0], len(tables)), math.nan)
        floor = np.full(len(tables), math.nan)
        for i, (table, baseline) in enumerate(zip(tables, best, strict=True)):
            if baseline is None:
                continue
            row, other = table.row(name), table.row(baseline)
            ratio[:, i] = _over(row, other, metric)
            matched[:, i] = _over(row.at_floor(), other.at_floor(), metric)
            if floors := table.of_kind("floor"):
                floor[i] = _over(floors[0], other.at_floor(), metric)[0]
        titles = tuple(table.title for table in tables)
        made[name] = Aggregate(name, metric, chosen.definition, titles, best, ratio, matched, floor)
    return made


def _over(row: Row, baseline: Row, metric: str) -> np.ndarray:
    """The row's metric of each seed over the baseline's; NaN where that is not positive."""
    theirs = baseline.mean(metric)
    return np.array([c.scores[metric].mean for c in row.comparisons]) / (theirs if theirs > 0 else math.nan)


def render_aggregates(aggregates: Mapping[str, Aggregate], title: str = "") -> str:
    """One line a model: mean ratio, share of times, normalised score, intervals; then the ratio of each time."""
    head = ["", "mean ratio ↓", "95 %", "times at most 1", "score ↑", "95 %", "failed"]
    body = []
    for name, one in aggregates.items():
        ratio, score = one.ratio_interval(), one.score_interval()
        n_times = len(one.unit_names)
        body.append(
            [
                name,
                number(one.mean_ratio) if math.isfinite(one.mean_ratio) else "-",
                bounds(ratio) if ratio.exists else "-",
                f"{round(one.share_at_most_one * n_times)} of {n_times}",
                number(one.mean_score) if math.isfinite(one.mean_score) else "-",
                bounds(score) if score.exists else "-",
                str(one.n_failed),
            ]
        )
    first = next(iter(aggregates.values()))
    lines = [title] if title else []
    lines += aligned(head, body)
    each = ["ratio of each time", *aggregates, "best training-free baseline"]
    rows = [
        [unit, *(_ratio_cell(one.ratio[:, i]) for one in aggregates.values()), first.best[i] or "none"]
        for i, unit in enumerate(first.unit_names)
    ]
    lines += aligned(each, rows)
    lines += [
        f"ratio: {first.metric} of the model over that of the time's best training-free baseline, mean over seeds"
        " (± standard deviation over seeds).",
        f"{first.metric}: {first.definition}.",
        "score: (model - baseline) / (floor - baseline) of the means over times, in units of the baseline, at equal "
        "numbers of cells, not clipped: 0 that baseline, 1 real vs real.",
        f"95 %: bootstrap interval over times and seeds, {N_RESAMPLES} resamples; none from fewer than {LEAST_UNITS} "
        "times.",
    ]
    return "\n".join(lines)


def _ratio_cell(ratios: np.ndarray) -> str:
    if not np.isfinite(ratios).all():
        return f"failed ({int((~np.isfinite(ratios)).sum())})"
    return f"{ratios.mean():.3f}" + (f" ± {ratios.std(ddof=1):.3f}" if len(ratios) > 1 else "")


def aggregate_to_json_dict(aggregates: Mapping[str, Aggregate]) -> dict[str, Any]:
    """Everything of the aggregates as plain values for `json`; NaN becomes None."""
    return {
        name: {
            "metric": one.metric,
            "definition": one.definition,
            "times": list(one.unit_names),
            "best_baseline": list(one.best),
            "mean_ratio": finite_or_none(one.mean_ratio),
            "ratio_interval": one.ratio_interval().to_json_dict(),
            "share_at_most_one": one.share_at_most_one,
            "mean_score": finite_or_none(one.mean_score),
            "score_interval": one.score_interval().to_json_dict(),
            "n_failed": one.n_failed,
            "ratio": [[finite_or_none(v) for v in seed] for seed in one.ratio.tolist()],
            "score": [[finite_or_none(v) for v in seed] for seed in one.score.tolist()],
            "floor": [finite_or_none(v) for v in one.floor.tolist()],
        }
        for name, one in aggregates.items()
    }


def environment() -> dict[str, str]:
    """Versions of what computed the numbers, and the platform."""
    packages = ("jax", "jaxlib", "numpy", "scipy", "ott-jax", "POT")
    return {
        "scjax": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: metadata.version(name) for name in packages},
    }


def aligned(head: Sequence[str], body: Sequence[Sequence[str]], last: Sequence[Sequence[str]] = ()) -> list[str]:
    """Lines of a table with rules: the first column to the left, the others to the right; `last` stands apart."""
    widths = [max(len(line[i]) for line in [head, *body, *last]) for i in range(len(head))]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))

    def one(line: Sequence[str]) -> str:
        return "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])

    return [rule, one(head).rstrip(), rule, *map(one, body), *([rule, *map(one, last)] if last else []), rule]


def _scores(row: Row, metric: Metric) -> dict[str, Any]:
    return {
        "mean": finite_or_none(row.mean(metric.name)),
        "sd_draws": finite_or_none(row.sd_draws(metric.name)),
        "sd_seeds": finite_or_none(row.sd_seeds(metric.name)),
        "n_failed": row.n_failed(metric.name),
        "approximation": _approximation(row, metric),
        "values": [[finite_or_none(v) for v in c.scores[metric.name].values] for c in row.comparisons],
    }


def _approximation(row: Row, metric: Metric) -> str:
    return metric.approximation(max((c.n_cells for c in row.comparisons), default=0))


def _cell(row: Row, metric: Metric) -> str:
    mean = row.mean(metric.name)
    if not math.isfinite(mean):
        return f"failed ({row.n_failed(metric.name)})"
    seeds = row.sd_seeds(metric.name)
    spread = row.sd_draws(metric.name) if seeds is None else seeds
    decimals = decimals_of(max(abs(mean), spread))
    mark = "≈" if _approximation(row, metric) else ""
    if decimals is None:
        return f"{mark}{mean:.3e} ± {spread:.0e}"
    return f"{mark}{mean:.{decimals}f} ± {spread:.{decimals}f}"


def _notes(row: Row) -> str:
    notes = [row.note] if row.note else []
    repeated = sorted({c.repeated for c in row.comparisons if c.repeated})
    notes += [f"cells drawn with replacement ({which}: too few)" for which in repeated]
    if row.n_nonfinite:
        notes.append(f"{row.n_nonfinite} predicted cells are not finite")
    return "; ".join(notes)


def number(value: float) -> str:
    """With four digits, or with an exponent."""
    decimals = decimals_of(value)
    return f"{value:.3e}" if decimals is None else f"{value:.{decimals}f}"


def bounds(found: Interval) -> str:
    """`[low, high]` with as many decimals as the larger of the two asks for."""
    decimals = decimals_of(max(abs(found.low), abs(found.high)))
    if decimals is None:
        return f"[{found.low:.2e}, {found.high:.2e}]"
    return f"[{found.low:.{decimals}f}, {found.high:.{decimals}f}]"


def decimals_of(value: float) -> int | None:
    """So many that four digits are seen (12.35, 0.3682); None where only an exponent shows the value."""
    if value == 0:
        return 4
    if not 1e-3 <= abs(value) < 1e6:
        return None
    return min(max(3 - math.floor(math.log10(abs(value))), 0), 4)


def finite_or_none(value: float | None) -> float | None:
    """JSON has no word for NaN."""
    return value if value is not None and math.isfinite(value) else None
