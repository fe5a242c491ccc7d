"""An evaluation as a folder: tidy tables, JSON, and one HTML page that needs nothing but a browser.

The page loads nothing: style, figures and numbers are in it. The same tables give the same bytes.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from scjax.experiment import report_of
from scjax.experiment.evidence import Evidence, PerturbationEvidence, SeriesEvidence, Side
from scjax.experiment.tidy import check_formats, results, write_tidy
from scjax.metrics.expression import FDR
from scjax.metrics.intervals import Interval, interval
from scjax.metrics.perturbation_report import PerturbationTable
from scjax.metrics.report import ARROWS, bounds, decimals_of, finite_or_none, losses, number
from scjax.types import Population
from scjax.whole import made_whole

__all__ = ["check_folder", "render", "write"]

BOLD = (
    "Bold: the best of models and baselines. ± is over training seeds, or over draws of cells in a time series; "
    "[low, high] the 95 % bootstrap interval over populations and seeds, or over draws of cells, from five of them on."
)
GROUPS = {"predicted": ("predicted",), "background": "control"}
SEVERITIES = ("error", "warning", "note")  # the worst first; another word comes last


def write(
    folder: str | Path,
    tables: Sequence[Any],
    evidence: Sequence[Evidence] = (),
    *,
    formats: Sequence[str] = ("csv",),
    about: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Makes `folder` and writes what an evaluation found:

        report.html    the page               scores.csv    one row a table, row, seed, population and metric
        results.json   all of it, with        metrics.csv   definition, unit and direction of each metric
                       versions and hashes    tables.csv    what the numbers of tables stand for

    Args:
        tables: of `experiment.evaluate` or `evaluate_files`.
        evidence: what these kept, one a table, for the figures of cells; without it the page has the ranking alone.
        formats: of the tidy tables: "csv", "parquet" (needs pyarrow).
        about: more for results.json, such as the options of the command.

    Raises:
        ValueError: a folder that is there, or whose parent is not; formats without their library; no table.
        FileExistsError: something has come there meanwhile.
    """
    folder = Path(folder)
    check_folder(folder)
    check_formats(formats)
    page = render(tables, evidence)
    numbers = json.dumps({**(about or {}), **results(tables)}, indent=1, default=str) + "\n"
    with made_whole(folder) as beside:
        beside.mkdir()
        written = write_tidy(beside, tables, formats)
        for name, text in (("results.json", numbers), ("report.html", page)):
            path = beside / name
            path.write_text(text, encoding="utf-8")
            written.append(path)
    return [folder / path.name for path in written]


def check_folder(folder: Path) -> None:
    if folder.exists():
        raise ValueError(f"out {folder} exists already and is not overwritten; choose another name.")
    if not folder.parent.is_dir():
        raise ValueError(f"out {folder} would lie in a folder that does not exist; make {folder.parent} first.")


def render(
    tables: Sequence[Any],
    evidence: Sequence[Evidence] = (),
    *,
    title: str = "Evaluation",
) -> str:
    """The page, as text.

    Args:
        title: of the page.

    Raises:
        ValueError: no table; evidence of another number of tables.
    """
    if not tables:
        raise ValueError("tables must hold at least one table; it is empty.")
    if evidence and len(evidence) != len(tables):
        raise ValueError(f"evidence must be one for each of {len(tables)} tables; got {len(evidence)}.")
    from scjax.plot.evaluation import reproducible

    kept = list(evidence) or [None] * len(tables)
    with reproducible():
        sections = [
            "".join(_section(i, table, found)) for i, (table, found) in enumerate(zip(tables, kept, strict=True), 1)
        ]
    models = list(dict.fromkeys(row.name for table in tables for row in table.of_kind("model")))
    head = f"{escape(title)}: {escape(', '.join(models))}" if models else escape(title)
    return "".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
            f"<title>{head}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{head}</h1>\n",
            *_summary(tables),
            *_findings(tables),
            *sections,
            *_provenance(tables),
            "</main>\n</body>\n</html>\n",
        ]
    )


def _summary(tables: Sequence[Any]) -> Iterator[str]:
    """The verdict of every table, model and metric in one place, before anything else."""
    yield '<section aria-labelledby="verdict">\n<h2 id="verdict">Verdict</h2>\n'
    failed = sum(row.n_failed(m.name) for t in tables for row in t.rows for m in t.metrics)
    yield (
        f"<p>Each line holds a model against the best baseline that needs no training, metric by metric. Values that "
        f"could not be computed: <strong>{failed}</strong>.</p>\n"
    )
    if len(tables) > 1:
        yield "<nav aria-label='Tables'><ol>"
        yield from (f'<li><a href="#table-{i}">{escape(t.title)}</a></li>' for i, t in enumerate(tables, 1))
        yield "</ol></nav>\n"
    for i, table in enumerate(tables, 1):
        if len(tables) > 1:
            yield f"<h3>Table {i}: {escape(table.title.split(';')[0])}</h3>\n"
        for row in table.of_kind("model"):
            found = [report_of(table).judge(table, row.name, m.name) for m in table.metrics]
            counted = _counted([one.outcome for one in found])
            yield (
                f"<details open><summary><strong>{escape(row.name)}</strong> ({_seeds(row)}) {counted}</summary>\n"
                "<ul class='verdicts'>\n"
            )
            for one in found:
                yield f'<li class="{one.outcome or "none"}">{escape(one.text)}</li>\n'
            yield "</ul></details>\n"
    yield "</section>\n"


def _counted(outcomes: Sequence[str | None]) -> str:
    """How often the model wins, ties, loses and fails, of the metrics where one of these can be said."""
    n = {outcome: outcomes.count(outcome) for outcome in ("win", "tie", "lose", "failed")}
    total = sum(n.values())
    if not total:
        return "can be compared in no metric."
    words = {"tie": "ties with the best of them", "lose": "loses", "failed": "has no value"}
    rest = "".join(f", {words[outcome]} in {n[outcome]}" for outcome in words if n[outcome])
    return f"beats every baseline in {n['win']} of {total} metrics that have a better and a worse{rest}."


def _seeds(row: Any) -> str:
    n = len(row.comparisons) if hasattr(row, "comparisons") else max(map(len, row.values.values()), default=0)
    return "one seed" if n == 1 else f"{n} seeds"


def _findings(tables: Sequence[Any]) -> Iterator[str]:
    """Leaks, where the data and the split were looked at for them: provenance["findings"].

    A list of what was found, or a dict of that ("found"), of the names of the rules and of those that the user allows.
    """
    found: dict[str, Mapping[str, Any]] = {}
    rules: set[str] = set()
    allowed: set[str] = set()
    checked = [table.provenance["findings"] for table in tables if "findings" in table.provenance]
    for one in checked:
        listed = one
        if isinstance(one, Mapping):
            listed = one["found"]
            rules |= set(one.get("rules", ()))
            allowed |= set(one.get("allowed", ()))
        found |= {json.dumps(finding, sort_keys=True, default=str): finding for finding in listed}
    by = f" by {len(rules)} rules ({', '.join(sorted(rules))})" if rules else ""
    yield '<section aria-labelledby="leaks">\n<h2 id="leaks">Leaks</h2>\n'
    if not checked:
        yield "<p>Data and split were not searched for leaks.</p>\n"
    else:
        what = "; none was found" if not found else f"; found: {len(found)}"
        yield f"<p>{escape(f'Data and split were searched for leaks{by}{what}.')}</p>\n"
    if found:
        rank = {word: i for i, word in enumerate(SEVERITIES)}
        rows = sorted(found.values(), key=lambda one: rank.get(str(one.get("severity")), len(rank)))
        columns = ("rule", "severity", "evidence", "mend")
        cells = [[_text(one.get(c, "")) for c in columns] for one in rows]
        cells = [
            [rule, f"{severity}{', allowed' if rule in allowed else ''}", *more] for rule, severity, *more in cells
        ]
        yield from _html_table("What was found", columns, cells, wraps=True)
    yield "</section>\n"


def _section(i: int, table: Any, found: Evidence | None) -> Iterator[str]:
    yield f'<section aria-labelledby="table-{i}">\n<h2 id="table-{i}">{escape(table.title)}</h2>\n'
    yield "<h3>Scores</h3>\n"
    yield from _scores(table)
    yield f"<p>{escape(_said(table))}</p>\n"
    yield from _ranking(table)
    if isinstance(found, PerturbationEvidence):
        yield from _population_figures(table, found)
    elif isinstance(found, SeriesEvidence):
        yield from _series_figures(table, found)
    yield "<h3>What the numbers are</h3>\n"
    columns = ("metric", "definition", "unit", "better")
    rows = [[m.name, m.definition, m.unit, m.direction] for m in table.metrics]
    yield from _html_table("Definitions of the metrics", columns, rows, wraps=True)
    notes = [[row.name, note] for row in table.rows if (note := _note(row))]
    if notes:
        yield from _html_table("What the rows are", ("row", "what it is"), notes, wraps=True)
    yield from _failures(table)
    yield "</section>\n"


def _scores(table: Any) -> Iterator[str]:
    """Of the rows and metrics that have any value; the notes say why the others have none."""
    metrics = [m for m in table.metrics if any(_is_defined(row, m.name) for row in table.rows)]
    best = {m.name: _best(table, m) for m in metrics}
    columns = ("", *(m.name + ARROWS[m.direction] for m in metrics))
    yield '<div class="scroll" role="region" aria-label="Scores" tabindex="0"><table>\n<caption><span>'
    yield f"{escape(BOLD)}</span></caption>\n<thead><tr>"
    yield "".join(f'<th scope="col">{escape(c)}</th>' for c in columns)
    yield "</tr></thead>\n<tbody>\n"
    for row in table.rows:
        if not any(_is_defined(row, m.name) for m in metrics):
            continue
        kind = {"floor": "real"}.get(row.kind, row.kind)
        yield f'<tr class="{kind}"><th scope="row">{escape(row.name)} <span class="kind">{kind}</span></th>'
        for m in metrics:
            text = escape(_cell(row, m.name))
            text = f"<strong>{text}</strong>" if row.name in best[m.name] else text
            found = _interval(row, m.name)
            below = f'<span class="ends">{bounds(found)}</span>' if found.exists and _is_defined(row, m.name) else ""
            yield f"<td>{text}{below}</td>"
        yield "</tr>\n"
    yield "</tbody></table></div>\n"


def _said(table: Any) -> str:
    if isinstance(table, PerturbationTable):
        drawn = _range(table.n_cells)
        return (
            f"Means over {len(table.populations)} populations of {_range(table.n_real)} real cells, {table.n_genes} "
            f"genes; {table.n_training} training perturbations. x is {table.unit}; real controls on both sides. Tests "
            f"and distances compare {drawn} cells of either side, mean of {table.n_draws} draws."
        )
    return f"{table.n_cells} cells of each population, mean of {table.n_draws} draws. x is the {table.unit}."


def _range(numbers: Sequence[int]) -> str:
    return str(min(numbers)) if min(numbers) == max(numbers) else f"{min(numbers)} to {max(numbers)}"


def _cell(row: Any, metric: str) -> str:
    if not _is_defined(row, metric):
        return "–"
    value = row.mean(metric)
    if not math.isfinite(value):
        return f"{'failed' if row.n_nonfinite else 'no value'} ({row.n_failed(metric)})"
    spread = row.sd_seeds(metric)
    if spread is None and hasattr(row, "comparisons"):
        spread = row.sd_draws(metric)
    if spread is None:
        return number(value)
    decimals = decimals_of(max(abs(value), spread))
    return f"{value:.3e} ± {spread:.0e}" if decimals is None else f"{value:.{decimals}f} ± {spread:.{decimals}f}"


def _is_defined(row: Any, metric: str) -> bool:
    return bool(row.comparisons) if hasattr(row, "comparisons") else bool(row.has_value(metric).any())


def _best(table: Any, metric: Any) -> set[str]:
    """The rows whose text is that of the best value."""
    rows = [r for r in table.rows if r.kind != "floor" and finite_or_none(r.mean(metric.name)) is not None]
    if not rows or metric.direction == "no direction":
        return set()
    best = min(rows, key=lambda r: _loss(metric, r.mean(metric.name)))
    return {r.name for r in rows if number(r.mean(metric.name)) == number(best.mean(metric.name))}


def _loss(metric: Any, value: float) -> float:
    """Smaller is better; NaN stays so."""
    return float(losses(metric.direction, np.array([value]))[0])


def _ranking(table: Any) -> Iterator[str]:
    from scjax.plot.evaluation import as_svg_uri, ranking
    from scjax.plot.perturbation import NOISE_LEVEL, noise_level

    over = "populations" if isinstance(table, PerturbationTable) else "draws of cells, which say nothing of other times"
    figures, noisy = [], False
    for m in table.metrics:
        rows = {row.name: (row.mean(m.name), *_interval(row, m.name)[:2]) for row in table.rows}
        rows = {name: v for name, v in rows.items() if _is_defined(table.row(name), m.name)}
        if not rows:
            continue
        ordered = dict(sorted(rows.items(), key=lambda item: _order(m, item[1][0])))
        models = [row.name for row in table.of_kind("model") if row.name in rows]
        floor = next((row.name for row in table.of_kind("floor") if row.name in rows), None)
        others = [table.row(name) for name in rows if name != floor]
        if floor is not None and any(_is_nearer(m, row, table.row(floor)) for row in others):
            noisy, ordered = True, {noise_level(k) if k == floor else k: v for k, v in ordered.items()}
            floor = noise_level(floor)
        axis = m.name + ARROWS[m.direction]
        ax = ranking(ordered, highlighted=models, ceiling=floor, metric=axis)
        told = "; ".join(f"{name} {number(v[0]) if math.isfinite(v[0]) else 'no value'}" for name, v in ordered.items())
        figures.append((as_svg_uri(ax), f"{m.name} of each predictor, in order: {told}", m.name))
    note = (
        f"Best at the top; models in bold, baselines grey, real against real a diamond with a dashed line. The bar is "
        f"the 95 % interval over {over}." + (f" {NOISE_LEVEL}" if noisy else "")
    )
    yield from _figures("Ranking", note, figures)


def _is_nearer(metric: Any, row: Any, floor: Any) -> bool:
    """Whether a row is better than real against real, on the populations of both."""
    if metric.direction == "no direction":
        return False
    name = metric.name
    if hasattr(row, "comparisons"):  # of one time
        return _order(metric, row.mean(name)) < _order(metric, floor.mean(name))
    common = row.has_value(name) & floor.has_value(name)
    if not common.any():
        return False
    ours, real = (_order(metric, float(one.by_population(name)[:, common].mean())) for one in (row, floor))
    return ours < real


def _order(metric: Any, value: float) -> tuple[bool, float]:
    loss = value if metric.direction == "no direction" else _loss(metric, value)
    return (not math.isfinite(loss), loss if math.isfinite(loss) else 0.0)


def _interval(row: Any, metric: str) -> Interval:
    """Of the mean over populations and seeds; of a held-out time, which is one case, over draws of cells and seeds."""
    if not hasattr(row, "comparisons"):
        return row.interval(metric)
    values = [c.scores[metric].values for c in row.comparisons]
    n_draws = min(map(len, values), default=0)
    return interval(np.array([v[:n_draws] for v in values], np.float64).reshape(max(len(values), 1), n_draws))


def _population_figures(table: PerturbationTable, found: PerturbationEvidence) -> Iterator[str]:
    rule = _shown_rule(found)
    for name, sides in found.predicted.items():
        shown = [p for p in found.shown if p in sides]
        yield f"<h3>Figures of {escape(name)}</h3>\n"
        if not shown:
            yield "<p>None: its cells are not finite.</p>\n"
            continue
        lost = len(found.shown) - len(shown)
        without = f" {lost} of them are left out: they hold cells that are not finite." if lost else ""
        yield f"<p>{escape(f'Cells of its first seed. {_sentence(found.chosen)}{without}')}</p>\n"
        tested = _range([found.n_tested[p] for p in shown])
        yield from _figures(
            "Change of each gene",
            "Dots are genes; on the dashed line prediction and truth agree."
            + (f" Open grey: {rule}, the rule without training that is nearest to the truth here." if rule else ""),
            [_delta_figure(found, name, p, rule) for p in shown],
            4,
        )
        yield from _figures(
            "The genes that change most", "Bars are means.", [_violin_figure(found, name, p) for p in shown], 4
        )
        yield from _figures(
            "Differential expression",
            f"Rank-sum tests of {tested} cells of each side against real controls, Benjamini-Hochberg over the genes. "
            "Blue genes are significant in the real cells, vermillion ones in the prediction alone. Triangles at ±∞: "
            "genes that are zero in all cells of one side.",
            [_volcano_figure(found, name, p) for p in shown],
            4,
        )
        yield from _figures(
            "Cells on principal components",
            "Components of real cells alone: controls and the perturbed cells that are shown. Crosses are means.",
            [_overlay_figure(found, name, p) for p in shown],
            4,
        )
        pairs = ([found.real[p] for p in shown], [sides[p] for p in shown])
        yield from _figures(
            "Calibration",
            "Is the prediction as spread as the truth, and in the same place? Each gene of each population shown is a "
            "dot; hollow ones at the edge lie outside, or are zero on one side. Coverage: how many genes have which "
            "share of their real cells between the 5 % and the 95 % quantile of the predicted cells. Left of the line "
            "the prediction is too sure of itself, or in the wrong place; the grey outline is of the predicted cells "
            "themselves (more than 90 % where many cells are equal, zeros say).",
            [*(_calibration_figure(*pairs, of) for of in ("variance", "zeros")), _coverage_figure(*pairs)],
            4,
        )


def _delta_figure(found: PerturbationEvidence, name: str, p: Population, rule: str | None) -> tuple[str, str, str]:
    from scjax.plot.evaluation import as_svg_uri
    from scjax.plot.perturbation import delta_scatter

    start = found.controls[p.context].mean
    observed, predicted = found.real[p].mean - start, found.predicted[name][p].mean - start
    title = _cut(str(p))
    (ax,) = delta_scatter(
        {title: observed},
        {title: predicted},
        found.genes,
        baseline={title: found.deltas[rule][p]} if rule else None,
        baseline_name=_cut(rule or ""),
        predicted_name=_cut(name, 24),
        n_named=5,
    )
    told = f"correlation over {len(found.genes)} genes {_correlation(observed, predicted)}"
    return as_svg_uri(ax), f"Predicted over observed change of {p}: {told}", str(p)


def _violin_figure(found: PerturbationEvidence, name: str, p: Population) -> tuple[str, str, str]:
    from scjax.plot.evaluation import as_svg_uri, distributions

    ax = distributions(_groups(found, name, p), found.genes, **GROUPS, title=str(p))
    start = found.controls[p.context].mean
    changes = (found.real[p].mean - start, found.predicted[name][p].mean - start)
    return as_svg_uri(ax), f"Mean change of the most changed genes of {p}: {_top(*changes, found.genes)}", str(p)


def _volcano_figure(found: PerturbationEvidence, name: str, p: Population) -> tuple[str, str, str]:
    from scjax.plot.evaluation import as_svg_uri, volcano

    of_real, of_models = found.tests[p]
    real, predicted = ((test.log2_fold_change, test.fdr) for test in (of_real, of_models[name]))
    ax = volcano(real, predicted, found.genes, title=str(p))[0]
    n_real, n_predicted = (int((fdr < FDR).sum()) for _, fdr in (real, predicted))
    told = f"{n_real} genes are significant in the real cells, {n_predicted} in the predicted ones"
    return as_svg_uri(ax), f"Volcano plots of {p}: {told}", str(p)


def _overlay_figure(found: PerturbationEvidence, name: str, p: Population) -> tuple[str, str, str]:
    from scjax.plot.evaluation import as_svg_uri, overlay

    fitted_on = [side.cells for side in (*found.real.values(), *found.controls.values())]
    ax = overlay(_groups(found, name, p), fitted_on=fitted_on, **GROUPS, title=str(p))
    return as_svg_uri(ax), f"Cells of {p} on two principal components of real cells", str(p)


def _calibration_figure(real: Sequence[Side], predicted: Sequence[Side], of: str) -> tuple[str, str, str]:
    from scjax.plot.evaluation import as_svg_uri, calibration

    log = of == "variance"
    what = {"variance": "variance", "zeros": "share of zeros"}[of]
    pair = tuple(np.concatenate([getattr(side, of) for side in sides]) for sides in (real, predicted))
    if not (np.isfinite(pair[0]) & np.isfinite(pair[1])).any():
        return "", "", f"No {what}: single cells have none."
    ax = calibration(*pair, what=what, log=log, title=_sentence(what)[:-1])
    return (
        as_svg_uri(ax),
        f"Predicted over real {what} of each feature: {_median(*pair, log=log)}",
        f"Calibration: {what}",
    )


def _coverage_figure(real: Sequence[Side], predicted: Sequence[Side]) -> tuple[str, str, str]:
    from scjax.plot.evaluation import as_svg_uri, coverage

    shares = [_within_predicted(*sides) for sides in zip(real, predicted, strict=True)]
    of_real, of_predicted = (np.concatenate(of_side) for of_side in zip(*shares, strict=True))
    ax = coverage(of_real, of_predicted, nominal=0.9, title="Cells in the predicted 90 %")
    told = (
        f"Share of real cells within the middle 90 % of the predicted ones: median {np.median(of_real):.2f} of features"
    )
    return as_svg_uri(ax), told, "Calibration: cells in the predicted 90 %"


def _within_predicted(real: Side, predicted: Side) -> tuple[np.ndarray, np.ndarray]:
    """Of each gene the share of real and of predicted cells within the middle 90 % of the predicted ones."""
    low, high = np.quantile(predicted.cells, [0.05, 0.95], axis=0)
    shares = [np.mean((low <= side.cells) & (side.cells <= high), axis=0) for side in (real, predicted)]
    return shares[0], shares[1]


def _groups(found: PerturbationEvidence, name: str, p: Population) -> dict[str, np.ndarray]:
    sides = {"control": found.controls[p.context], "real": found.real[p], "predicted": found.predicted[name][p]}
    return {group: side.cells for group, side in sides.items()}


def _series_figures(table: Any, found: SeriesEvidence) -> Iterator[str]:
    from scjax.plot.evaluation import as_svg_uri, distributions, overlay
    from scjax.plot.perturbation import delta_scatter

    unit = "log expression" if found.are_genes else "coordinate"
    for name in (row.name for row in table.of_kind("model")):
        yield f"<h3>Figures of {escape(name)}</h3>\n"
        if name not in found.predicted:
            yield "<p>None: its cells are not finite.</p>\n"
            continue
        made, title = found.predicted[name], _cut(f"time {found.time:g}, {name}")
        sides = {"real": found.real, "predicted": made}
        before, earlier, figures = "the mean", None, []
        if found.earlier is not None:
            before = earlier = f"time {found.earlier[0]:g}"
            sides = {earlier: found.earlier[1]} | sides
            start = found.earlier[1].mean
            observed, predicted = found.real.mean - start, made.mean - start
            rule = min(found.baselines, key=lambda b: float(np.sum((found.baselines[b].mean - found.real.mean) ** 2)))
            (ax,) = delta_scatter(
                {title: observed},
                {title: predicted},
                found.features,
                baseline={title: found.baselines[rule].mean - start},
                baseline_name=_cut(rule, 26),
                predicted_name=_cut(name, 26),
                n_named=5,
                unit=unit,
            )
            told = f"correlation over {len(found.features)} features {_correlation(observed, predicted)}"
            caption = f"Change of the mean of each feature since {earlier}"
            figures.append((as_svg_uri(ax), f"Predicted over observed change since {earlier}: {told}", caption))
        cells = {group: side.cells for group, side in sides.items()}
        how = {"predicted": ["predicted"], "background": earlier, "title": title}
        real_cells = [x for group, x in cells.items() if group != "predicted"]
        if len(found.features) > 1 and sum(map(len, real_cells)) > 2:
            ax = overlay(cells, fitted_on=real_cells, **how)
            told = f"Cells of time {found.time:g} on two principal components of real cells"
            figures.append((as_svg_uri(ax), told, "Cells on principal components of real cells"))
        ax = distributions(cells, found.features, zeros=found.are_genes, unit=unit, **how)
        told = f"Real and predicted values of the features that differ most from {before}"
        figures.append((as_svg_uri(ax), told, f"The features that differ most from {before}"))
        figures += [
            _calibration_figure([found.real], [made], of)
            for of in ("variance", *(["zeros"] if found.are_genes else []))
        ]
        grey = f", those of {earlier} grey" if earlier else ""
        note = f"Cells of its first seed, at most 300 as dots. Real cells are blue, predicted ones vermillion{grey}."
        yield from _figures("", note, figures)


def _figures(heading: str, note: str, figures: Sequence[tuple[str, str, str]], level: int = 3) -> Iterator[str]:
    """`figures`: data URI (or none, where there is nothing to draw), alternative text, caption."""
    if heading:
        yield f"<h{level}>{escape(heading)}</h{level}>\n"
    yield f'<p>{escape(note)}</p>\n<div class="figures">\n'
    for uri, told, caption in figures:
        image = f'<img src="{uri}" alt="{escape(told)}">' if uri else ""
        yield f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>\n"
    yield "</div>\n"


def _failures(table: Any) -> Iterator[str]:
    failed = [[row.name, m.name, str(n)] for row in table.rows for m in table.metrics if (n := row.n_failed(m.name))]
    broken = [f"{row.name}: {row.n_nonfinite} predicted cells are not finite." for row in table.rows if row.n_nonfinite]
    yield "<h3>Failures</h3>\n"
    if not failed:
        yield "<p>Every value could be computed.</p>\n"
        return
    yield from (f"<p>{escape(line)}</p>\n" for line in broken)
    yield from _html_table("Values that could not be computed", ("row", "metric", "how many"), failed)


def _provenance(tables: Sequence[Any]) -> Iterator[str]:
    found = results(tables)
    yield '<section aria-labelledby="provenance">\n<h2 id="provenance">Where the numbers come from</h2>\n'
    hashes = [[f"{name} digest", value] for name, value in found["hashes"].items() if value]
    about = tables[0].provenance
    rest = {k: v for k, v in about.items() if k not in ("findings", "split", "unseen")}
    rows = [*hashes, *([k, _text(v)] for k, v in rest.items())]
    split = about.get("split")
    if isinstance(split, Mapping):
        rows += [[f"split, {k}", _text(v)] for k, v in split.items() if k != "digest"]
    rows += [["seed of the draws", str(tables[0].seed)]]
    yield from _html_table("Data and split", ("what", "value"), rows, wraps=True)
    yield from _html_table(
        "Versions and platform", ("what", "version"), [[k, str(v)] for k, v in found["environment"].items()]
    )
    yield "</section>\n"


def _html_table(
    caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, wraps: bool = False
) -> Iterator[str]:
    kind = ' class="text wraps"' if wraps else ' class="text"'
    yield f'<div class="scroll" role="region" aria-label="{escape(caption)}" tabindex="0"><table{kind}>\n'
    yield f"<caption><span>{escape(caption)}</span></caption>\n<thead><tr>"
    yield "".join(f'<th scope="col">{escape(c)}</th>' for c in columns) + "</tr></thead>\n<tbody>\n"
    for first, *others in rows:
        yield f'<tr><th scope="row">{escape(first)}</th>' + "".join(f"<td>{escape(c)}</td>" for c in others) + "</tr>\n"
    yield "</tbody></table></div>\n"


def _note(row: Any) -> str:
    notes = [row.note] if row.note else []
    if hasattr(row, "comparisons"):
        repeated = sorted({c.repeated for c in row.comparisons if c.repeated})
        notes += [f"cells drawn with replacement ({which}: too few)" for which in repeated]
    return "; ".join(notes)


def _text(value: Any) -> str:
    """A value of the provenance in words; long lists are cut, results.json has them whole."""
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 600 else f"{text[:600]}… (whole in results.json)"


def _cut(text: str, most: int = 34) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _shown_rule(found: PerturbationEvidence) -> str | None:
    """The baseline that predicts the means best, by squared error over the populations shown."""
    errors = {}
    for name, deltas in found.deltas.items():
        if all(p in deltas for p in found.shown):
            off = [deltas[p] - (found.real[p].mean - found.controls[p.context].mean) for p in found.shown]
            errors[name] = float(np.mean(np.square(off)))
    return min(errors, key=errors.__getitem__) if errors else None


def _correlation(x: np.ndarray, y: np.ndarray) -> str:
    if min(np.std(x), np.std(y)) <= 1e-12 or len(x) < 2:
        return "none"
    return f"{np.corrcoef(x, y)[0, 1]:.2f}"


def _top(observed: np.ndarray, predicted: np.ndarray, genes: Sequence[str]) -> str:
    top = np.argsort(-np.abs(observed), kind="stable")[:5]
    return ", ".join(f"{genes[g]} real {observed[g]:+.2f} predicted {predicted[g]:+.2f}" for g in top)


def _median(real: np.ndarray, predicted: np.ndarray, *, log: bool) -> str:
    both = np.isfinite(real) & np.isfinite(predicted)
    if not log:
        return f"median difference {np.median(predicted[both] - real[both]):+.3f}" if both.any() else "no value"
    both &= real > 0
    return f"median ratio {np.median(predicted[both] / real[both]):.2f}" if both.any() else "no value"


STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#57606a;--paper:#fff;--line:#d5dae0;--band:#f3f5f7;--win:#0b6b3a;
--loss:#9a3412;--link:#0a58a8}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaed;--soft:#a9b1ba;--paper:#15181c;--line:#3a414a;--band:#20252b;
--win:#6fd39b;--loss:#ffb38a;--link:#8cc4ff}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);overflow-wrap:anywhere;
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1180px;margin:0 auto;padding:1rem 1rem 4rem}
h1{font-size:1.6rem;line-height:1.25;margin:.6rem 0 1rem}
h2{font-size:1.2rem;line-height:1.35;margin:2.4rem 0 .6rem;padding-top:.8rem;border-top:2px solid var(--line)}
h3{font-size:1.08rem;margin:1.8rem 0 .3rem}
h4{font-size:1rem;margin:1.3rem 0 .2rem}
p{margin:.4rem 0 .8rem;max-width:78ch}
a{color:var(--link)}
.verdicts{padding-left:1.1rem;margin:.4rem 0 1rem;max-width:100ch}
.verdicts li{margin:.25rem 0;padding-left:.2rem}
.verdicts li.win{list-style-type:"✔ "}
.verdicts li.tie{list-style-type:"= "}
.verdicts li.lose{list-style-type:"✘ "}
.verdicts li.failed{list-style-type:"! ";font-weight:600}
.verdicts li.win::marker{color:var(--win)}
.verdicts li.lose::marker,.verdicts li.failed::marker{color:var(--loss)}
.verdicts li.none{color:var(--soft)}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:6px;margin:.6rem 0 1rem;max-width:100%}
.scroll:focus-visible{outline:3px solid var(--link)}
table{border-collapse:collapse;width:100%;font-size:.86rem;font-variant-numeric:tabular-nums}
caption{caption-side:top;text-align:left;padding:.45rem .6rem;color:var(--soft)}
caption span{display:inline-block;position:sticky;left:.6rem;max-width:min(100vw - 4rem,68rem)}
summary{cursor:pointer}
th,td{padding:.35rem .6rem;text-align:right;white-space:nowrap;border-top:1px solid var(--line);vertical-align:top}
th{font-weight:600}
tbody th,thead th:first-child,table.text th,table.text td{text-align:left}
tbody tr:nth-child(even){background:var(--band)}
tr.real th,tr.real td{border-top:2px solid var(--soft)}
tr.model th{color:var(--loss)}
tbody th{position:sticky;left:0;background:var(--paper);white-space:normal;min-width:10rem}
h2::first-letter{text-transform:uppercase}
tbody tr:nth-child(even) th{background:var(--band)}
table.wraps td{white-space:normal;min-width:14rem;max-width:60rem}
.kind,.ends{color:var(--soft);font-weight:400;font-size:.78rem}
.ends{display:block}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:1rem;
margin:.6rem 0 1.2rem}
figure{margin:0;background:#fff;color:#1b1f24;border:1px solid var(--line);border-radius:6px;padding:.5rem}
figure img{display:block;width:100%;height:auto;max-width:520px;margin:0 auto}
figcaption{font-size:.82rem;color:#4a525b;padding:.3rem .2rem 0}
@media(max-width:600px){.kind{display:block}table.wraps td{min-width:11rem}}
@media print{tbody th{position:static}
body{font-size:11px}.scroll{overflow:visible;border:0}th,td{white-space:normal;padding:.15rem .3rem}
figure{break-inside:avoid}.figures{grid-template-columns:1fr 1fr}h2,h3{break-after:avoid}}
"""
