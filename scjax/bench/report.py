"""Who wins, ties and loses against what, from the tables of the cells; and the report of all of them as Markdown."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scjax.metrics.perturbation_report import PerturbationTable
from scjax.metrics.report import ARROWS, ResultTable, finite_or_none, losses, number, outcome, spread

__all__ = ["comparisons", "render"]

_METRIC = "W1"  # of time series, by which the ratio is told
_SHOWN = (
    "pearson_delta",
    "pearson_delta_hat",
    "l2",
    "r2",
    "energy_distance",
    "discrimination_score_cosine",
    "variance_ratio",
)


def comparisons(table: ResultTable | PerturbationTable, model: str) -> list[dict[str, Any]]:
    """The model's row against each baseline, in each metric that has a better and a worse.

    win: better by the standard deviation over seeds (over draws of cells for a time series and one seed, 0 for
    perturbations and one seed) or more; lose: worse by it; tie: else; failed: the model has no value; None: the
    baseline has none. With perturbations both are means over the populations that the baseline predicts; a metric of
    which 1 is best is compared by its |log|.
    """
    found = []
    for metric in table.metrics:
        for other in table.of_kind("baseline") if ARROWS[metric.direction] else ():
            ours, theirs, noise = _sides(table, table.row(model), other, metric)
            lost, (limit,) = (losses(metric.direction, side) for side in (ours, np.array([theirs])))
            if noise is None:
                noise = float(np.std(lost, ddof=1)) if len(lost) > 1 else 0.0
            found.append(
                {
                    "metric": metric.name,
                    "baseline": other.name,
                    "model": finite_or_none(float(np.mean(ours))),
                    "by_seed": [finite_or_none(float(value)) for value in ours],
                    "spread": finite_or_none(noise),
                    "value": finite_or_none(float(theirs)),
                    "outcome": _outcome(float(np.mean(lost)), float(limit), noise),
                }
            )
    return found


def _sides(table: Any, row: Any, other: Any, metric: Any) -> tuple[np.ndarray, float, float | None]:
    """Values of the model by seed, of the baseline, and the spread where it is not that over seeds."""
    name = metric.name
    if isinstance(table, ResultTable):
        ours = np.array([c.scores[name].mean for c in row.comparisons])
        return ours, other.mean(name), spread(row, metric)[0] if len(ours) == 1 else None
    common = row.has_value(name) & other.has_value(name)
    if not common.any():
        return np.array([math.nan]), math.nan, None
    ours, theirs = (r.by_population(name)[:, common].mean(axis=1) for r in (row, other))
    return ours, float(theirs[0]), None


def _outcome(ours: float, theirs: float, spread: float) -> str | None:
    if not math.isfinite(theirs):
        return None
    if not math.isfinite(ours):
        return "failed"
    return outcome(ours, theirs, spread=spread)


def render(records: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: time series by held-out time, perturbations by split, wins and losses, what failed."""
    done = [record for record in records if record["status"] == "done"]
    series, others = ([r for r in done if bool(r["n_times"]) == wanted] for wanted in (True, False))
    parts = ["# Benchmark", _head(done) if done else "No cell is done."]
    if series:
        parts += ["## Time series: W1 to the held-out cells", _series(series)]
    if others:
        parts += ["## Perturbations", _perturbations(others)]
    if done:
        parts += ["## Against each training-free baseline", _score(done)]
    bad = [f"- {r['name']}: {r['error'].splitlines()[0]}" for r in records if r["status"] != "done"]
    bad += [f"- {r['name']}, seed {seed}: {why}" for r in done for seed, why in r["failed_seeds"].items()]
    if bad:
        parts += ["## Failed", "\n".join(bad)]
    return "\n\n".join(parts) + "\n"


def _head(done: Sequence[Mapping[str, Any]]) -> str:
    told = sorted({f"- {r['system']} {r['variant']}: {r['about']}." for r in done})
    seeds = sorted({r["settings"]["n_seeds"] for r in done})
    told.append(f"- {' or '.join(map(str, seeds))} seeds; ± is the standard deviation over them.")
    if len({r["source"] for r in done}) > 1:
        told.append("- Not all cells were made by the same source of scjax: see `source` in the results.")
    return "\n".join(told)


def _series(records: Sequence[Mapping[str, Any]]) -> str:
    variants = sorted({(r["system"], r["variant"]) for r in records})
    by_problem: dict[tuple[str, str], dict[tuple[str, str], Mapping[str, Any]]] = {}
    for r in records:
        by_problem.setdefault((r["data"], r["split"]), {})[r["system"], r["variant"]] = r
    head = ["data", "held out", "best baseline", "its W1", "real vs real"]
    head += [text for names in variants for text in (" ".join(names), "ratio")]
    lines, ratios = [], {names: [] for names in variants}
    for (data, split), found in sorted(by_problem.items()):
        first = next(iter(found.values()))
        best, limit = _best(first)
        line = [data, split, best, _number(limit), _number(_floor(first))]
        for names in variants:
            if names not in found:
                line += ["-", "-"]
                continue
            record = found[names]
            _, limit = _best(record)
            model = next(c for c in record["comparisons"] if c["metric"] == _METRIC)
            line += [_spread(model["model"], model["spread"])]
            ratio = None if model["model"] is None or not limit else model["model"] / limit
            line += ["failed" if ratio is None else f"{ratio:.3f}"]
            ratios[names].append((data, record["n_times"], ratio))
        lines.append(line)
    told = [
        _table(head, lines),
        "",
        "Ratio: W1 of the model / W1 of the best training-free baseline, below 1 is better.",
    ]
    for names, values in ratios.items():
        told.append(f"- {' '.join(names)}: {_summary(values)}")
    return "\n".join(told)


def _summary(values: Sequence[tuple[str, int, float | None]]) -> str:
    """From (data, number of its times, ratio) of each held-out time."""
    finite = [one for one in values if one[2] is not None]
    if not finite:
        return "no value."
    told = f"mean ratio {np.mean([ratio for *_, ratio in finite]):.3f} over {len(finite)} held-out times"  # pyright: ignore[reportArgumentType, reportCallIssue]
    told += f", at most 1 at {sum(ratio <= 1 for *_, ratio in finite)} of {len(values)}"  # pyright: ignore[reportOptionalOperand]
    many = [(data, ratio) for data, n, ratio in finite if n >= 4]
    if many:
        of_set: dict[str, list[float]] = {}
        for data, ratio in many:
            of_set.setdefault(data, []).append(ratio)  # pyright: ignore[reportArgumentType]
        told += (
            f"; sets with four times or more: {np.mean([ratio for _, ratio in many]):.3f} over {len(many)} times, "  # pyright: ignore[reportArgumentType, reportCallIssue]
            f"{np.mean([np.mean(ratios) for ratios in of_set.values()]):.3f} over {len(of_set)} sets, at most 1 at "
            f"{sum(ratio <= 1 for _, ratio in many)} of {len(many)}"  # pyright: ignore[reportOptionalOperand]
        )
    return told + (f"; {len(values) - len(finite)} failed." if len(finite) < len(values) else ".")


def _perturbations(records: Sequence[Mapping[str, Any]]) -> str:
    by_problem: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for r in records:
        by_problem.setdefault((r["data"], r["split"]), []).append(r)
    parts = []
    for (data, split), found in sorted(by_problem.items()):
        table = found[0]["tables"][0]
        shown = [name for name in _SHOWN if name in table["metrics"]]
        arrow = {"lower is better": " ↓", "higher is better": " ↑", "1 is best": " →1"}
        head = ["", *(name + arrow.get(table["metrics"][name]["direction"], "") for name in shown)]
        rows = [row for r in found for row in r["tables"][0]["rows"] if row["kind"] == "model"]
        rows += [row for row in table["rows"] if row["kind"] != "model"]
        body = [[row["name"], *(_score_cell(row["scores"][name]) for name in shown)] for row in rows]
        parts.append(f"### {data}, {split}\n\n{table['title']}.\n\n{_table(head, body)}")
    return "\n\n".join(parts)


def _score_cell(score: Mapping[str, Any]) -> str:
    return _spread(score["mean"], score["sd_seeds"])


def _score(done: Sequence[Mapping[str, Any]]) -> str:
    counts: dict[tuple[str, ...], dict[str, int]] = {}
    for record in done:
        for one in record["comparisons"]:
            if one["outcome"] is not None and (record["n_times"] or one["metric"] in _SHOWN):
                key = (f"{record['system']} {record['variant']}", one["metric"], one["baseline"])
                of_key = counts.setdefault(key, dict.fromkeys(("win", "tie", "lose", "failed"), 0))
                of_key[one["outcome"]] += 1
    body = [[*key, *map(str, of_key.values())] for key, of_key in sorted(counts.items())]
    return "Cells of the grid in which the model is better, equal within the spread over seeds, or worse.\n\n" + _table(
        ["system", "metric", "baseline", "win", "tie", "lose", "failed"], body
    )


def _best(record: Mapping[str, Any]) -> tuple[str, float | None]:
    values = {
        c["baseline"]: c["value"] for c in record["comparisons"] if c["metric"] == _METRIC and c["value"] is not None
    }
    name = min(values, key=values.__getitem__, default="none")
    return name, values.get(name)


def _floor(record: Mapping[str, Any]) -> float | None:
    rows = [row for row in record["tables"][0]["rows"] if row["kind"] == "floor"]
    return rows[0]["scores"][_METRIC]["mean"] if rows else None


def _number(value: float | None) -> str:
    return "-" if value is None else number(value)


def _spread(value: float | None, spread: float | None) -> str:
    return _number(value) + ("" if value is None or spread is None else f" ± {number(spread)}")


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)
