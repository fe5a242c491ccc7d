"""Tables of a comparison: model rows beside training-free baselines and the real-vs-real floor, and what they say."""

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from types import MappingProxyType
from typing import Any

import numpy as np

from scjax import __version__, check
from scjax.metrics.baselines import Baseline, replicate_floor
from scjax.metrics.population import POPULATION_METRICS, Cells, Comparison, Metric, compare_populations

__all__ = [
    "ResultTable",
    "Row",
    "Table",
    "aligned",
    "decimals_of",
    "environment",
    "finite_or_none",
    "normalised_score",
    "number",
    "render",
    "result_table",
    "to_json_dict",
    "verdict",
]

KINDS = ("model", "baseline", "floor")


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
    """

    name: str
    kind: str
    comparisons: tuple[Comparison, ...]
    note: str = ""

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

    def compared(pred: Cells) -> Comparison:
        return compare_populations(pred, real, metrics, n_cells=n, n_draws=n_draws, seed=seed)

    rows = [Row(name, "model", tuple(compared(p) for p in seeds)) for name, seeds in models.items()]
    rows += [
        Row(name, "baseline", () if b.cells is None else (compared(b.cells),), b.note) for name, b in baselines.items()
    ]
    floor = replicate_floor(real, metrics, n_cells=n, n_draws=n_draws, seed=seed)
    fewer = f", {floor.n_cells} cells each: pessimistic" if floor.n_cells < n else f", {floor.n_cells} cells each"
    rows.append(Row("real vs real (floor)", "floor", (floor,), "random disjoint parts of the real cells" + fewer))
    return ResultTable(title, tuple(metrics.values()), tuple(rows), n, n_draws, seed, unit, provenance)


def normalised_score(table: ResultTable, row: str, baseline: str, metric: str) -> float:
    """(row - baseline) / (floor - baseline): 0 as good as the baseline, 1 as good as real cells, not clipped.

    Below 0 is worse than the baseline. NaN where one of the three is, or where baseline and floor are equal.
    """
    table.metric(metric)
    floors = table.of_kind("floor")
    if not floors:
        raise ValueError("the table has no floor row to normalise by.")
    base, floor = table.row(baseline).mean(metric), floors[0].mean(metric)
    return (table.row(row).mean(metric) - base) / (floor - base) if floor != base else math.nan


def verdict(table: ResultTable, model_row: str, metric: str, baseline_rows: Sequence[str] | None = None) -> str:
    """One line: does the model beat the best training-free baseline in this metric, and by which ratio?

    `baseline_rows` are all rows of kind "baseline" unless given. The spread is that over seeds where there are
    several, else over draws of cells; a difference smaller than it is called so.
    """
    chosen = table.metric(metric)
    lower = chosen.direction == "lower is better"
    names = [row.name for row in table.of_kind("baseline")] if baseline_rows is None else list(baseline_rows)
    values = {name: table.row(name).mean(metric) for name in names}
    defined = {name: value for name, value in values.items() if math.isfinite(value)}
    if not defined:
        return f"{metric}: no training-free baseline is defined here; nothing to compare {model_row} with."
    best = min(defined, key=defined.__getitem__) if lower else max(defined, key=defined.__getitem__)
    row = table.row(model_row)
    ours, theirs = row.mean(metric), defined[best]
    if not math.isfinite(ours):
        return (
            f"{metric}: {model_row} FAILED ({row.n_failed(metric)} values could not be computed, "
            f"{row.n_nonfinite} predicted cells are not finite); the best training-free baseline, {best}, has "
            f"{number(theirs)}."
        )
    wins = ours < theirs if lower else ours > theirs
    ratio = f", ratio {ours / theirs:.3f}" if theirs > 0 else ""
    seeds = row.sd_seeds(metric)
    spread, over = (row.sd_draws(metric), "draws") if seeds is None else (seeds, "seeds")
    unclear = f"; the difference is smaller than the spread over {over}, {number(spread)}"
    return (
        f"{metric}: {model_row} {'BEATS' if wins else 'DOES NOT BEAT'} the best training-free baseline, {best}: "
        f"{number(ours)} against {number(theirs)}{ratio}{unclear if abs(ours - theirs) < spread else ''}."
    )


def render(table: ResultTable) -> str:
    """The table as text of aligned columns: mean +- spread, an arrow towards better, definitions and notes below."""
    several = any(len(row.comparisons) > 1 for row in table.rows)
    arrows = {"lower is better": "↓", "higher is better": "↑"}
    head = ["", *(f"{m.name} {arrows[m.direction]}" for m in table.metrics)]
    floors = table.of_kind("floor")
    body = [[row.name, *(_cell(row, m.name) for m in table.metrics)] for row in table.rows if row not in floors]
    last = [[row.name, *(_cell(row, m.name) for m in table.metrics)] for row in floors]
    lines = [table.title, *aligned(head, body, last)]
    whole = any(c.n_draws < table.n_draws for row in table.rows for c in row.comparisons)
    drawn = f"{table.n_cells} cells of each population, mean of {table.n_draws} draws"
    drawn += " (of one, where both populations are used whole); " if whole else "; "
    lines.append(drawn + "± is the standard deviation over " + ("seeds" if several else "draws of cells"))
    if several:
        lines[-1] += " (rows with one seed: over draws)"
    lines.append(f"x is the {table.unit}.")
    lines += [f"{m.name} [{m.unit}]: {m.definition}." for m in table.metrics]
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
                "scores": {
                    m.name: {
                        "mean": finite_or_none(row.mean(m.name)),
                        "sd_draws": finite_or_none(row.sd_draws(m.name)),
                        "sd_seeds": finite_or_none(row.sd_seeds(m.name)),
                        "n_failed": row.n_failed(m.name),
                        "values": [[finite_or_none(v) for v in c.scores[m.name].values] for c in row.comparisons],
                    }
                    for m in table.metrics
                },
            }
            for row in table.rows
        ],
        "environment": environment(),
        "provenance": dict(table.provenance),
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


def _cell(row: Row, metric: str) -> str:
    if not row.comparisons:
        return "-"
    mean = row.mean(metric)
    if not math.isfinite(mean):
        return f"failed ({row.n_failed(metric)})"
    seeds = row.sd_seeds(metric)
    spread = row.sd_draws(metric) if seeds is None else seeds
    decimals = decimals_of(max(abs(mean), spread))
    if decimals is None:
        return f"{mean:.3e} ± {spread:.0e}"
    return f"{mean:.{decimals}f} ± {spread:.{decimals}f}"


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
