"""Tables as plain rows: one for each number that was computed, for pandas, R or a spreadsheet."""

import csv
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from scjax.check import one_of
from scjax.metrics import perturbation_report, report
from scjax.metrics.perturbation_report import PerturbationTable
from scjax.metrics.report import environment

__all__ = [
    "TableFormat",
    "check_formats",
    "digest_of",
    "metric_rows",
    "results",
    "score_rows",
    "table_rows",
    "write_tidy",
]

TableFormat = Literal["csv", "parquet"]


def score_rows(tables: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """One a table, row, seed, population and metric.

    `table` counts from 1; `population` is what is predicted, in a time series the title of the table; `value` is the
    mean over draws of cells, None where there is none, and `status` says why: "failed", or "undefined" where not even
    the real cells have such a value or the rule predicts nothing here.
    """
    for number, table in enumerate(tables, 1):
        of_table = _of_populations if isinstance(table, PerturbationTable) else _of_time
        for row in table.rows:
            for metric in table.metrics:
                for seed, population, condition, context, value, counted in of_table(table, row, metric.name):
                    finite = math.isfinite(value)
                    yield {
                        "table": number,
                        "row": row.name,
                        "kind": {"floor": "ceiling"}.get(row.kind, row.kind),
                        "seed": seed,
                        "population": population,
                        "condition": condition,
                        "context": context,
                        "metric": metric.name,
                        "value": float(value) if finite else None,
                        "status": "ok" if finite else "failed" if counted else "undefined",
                    }


def metric_rows(tables: Sequence[Any]) -> list[dict[str, Any]]:
    """Each metric once: how to read its values."""
    found = {m.name: m for table in tables for m in table.metrics}
    return [
        {"metric": m.name, "unit": m.unit, "direction": m.direction, "definition": m.definition} for m in found.values()
    ]


def table_rows(tables: Sequence[Any]) -> list[dict[str, Any]]:
    """What each number of a table in `score_rows` stands for."""
    return [
        {
            "table": number,
            "title": table.title,
            "unit": table.unit,
            "n_draws": table.n_draws,
            "seed_of_draws": table.seed,
        }
        for number, table in enumerate(tables, 1)
    ]


def results(tables: Sequence[Any]) -> dict[str, Any]:
    """All tables as plain values for `json`, with versions, platform, and hashes of data and split."""
    plain = [(perturbation_report if isinstance(t, PerturbationTable) else report).to_json_dict(t) for t in tables]  # pyright: ignore[reportArgumentType]
    provenance = dict(tables[0].provenance) if tables else {}
    hashes = {"data": digest_of(provenance.get("data")), "split": digest_of(provenance.get("split"))}
    return {"environment": environment(), "hashes": hashes, "tables": plain}


def digest_of(part: Any) -> str | None:
    """The digest that a part of a provenance has, or that of its JSON; None of nothing."""
    if part is None:
        return None
    if isinstance(part, Mapping) and "digest" in part:
        return str(part["digest"])
    return hashlib.blake2b(json.dumps(part, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def check_formats(formats: Sequence[str]) -> None:
    """Raises ValueError for no format, an unknown one, or Parquet without pyarrow."""
    if not formats:
        raise ValueError("formats must name csv, parquet, or both; it is empty.")
    for one in formats:
        one_of("formats", one, get_args(TableFormat))
    if "parquet" in formats:
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as err:
            raise ValueError("formats has 'parquet', which needs pyarrow: pip install pyarrow, or take csv.") from err


def write_tidy(folder: Path, tables: Sequence[Any], formats: Sequence[str] = ("csv",)) -> list[Path]:
    """`scores`, `metrics` and `tables` in each format. Nothing that exists is overwritten: FileExistsError."""
    check_formats(formats)
    written = []
    parts = {"scores": list(score_rows(tables)), "metrics": metric_rows(tables), "tables": table_rows(tables)}
    for name, rows in parts.items():
        for one in formats:
            path = folder / f"{name}.{one}"
            (_write_csv if one == "csv" else _write_parquet)(path, rows)
            written.append(path)
    return written


def _of_populations(table: PerturbationTable, row: Any, metric: str) -> Iterator[tuple[Any, ...]]:
    counted = row.has_value(metric)
    for seed, values in enumerate(row.by_population(metric)):
        for p, value, is_counted in zip(table.populations, values, counted, strict=True):
            yield seed, str(p), p.condition, p.context, float(value), bool(is_counted)


def _of_time(table: Any, row: Any, metric: str) -> Iterator[tuple[Any, ...]]:
    for seed, comparison in enumerate(row.comparisons):
        yield seed, table.title, "", "", comparison.scores[metric].mean, True
    if not row.comparisons:
        yield 0, table.title, "", "", math.nan, False


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with open(path, "x", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: repr(v) if isinstance(v, float) else "" if v is None else v for k, v in row.items()})


def _write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    if path.exists():
        raise FileExistsError(f"{path} exists already and is not overwritten.")
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
