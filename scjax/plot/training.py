"""Curves of a training run from the rows that the training loop logs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scjax import check
from scjax.plot.palette import type_colours

__all__ = ["loss_terms", "read_metrics"]


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file of metrics, one object a line.

    Raises:
        ValueError: a line that is no JSON object; its number is named.
    """
    rows = []
    for number, line in enumerate(Path(path).read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as err:
            raise ValueError(f"{path}, line {number}, is no JSON: {err}.") from err
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}, must be an object of metrics; got {line[:60]}.")
        rows.append(row)
    return rows


def loss_terms(
    rows: Sequence[Mapping[str, Any]] | str | Path,
    terms: Sequence[str] = ("loss",),
    *,
    ax: Any = None,
    log: bool = True,
    unit: str = "",
) -> Any:
    """The chosen terms over the training steps, on a logarithmic axis unless `log` is False.

    `rows` are the logged rows (or the JSONL file of them), each with a "step"; rows without a term, as those that log a
    validation only, leave it out. Values that are not finite leave a gap in the line.

    Raises:
        ValueError: a row without a step, a term that no row has, or, on a logarithmic axis, one that is never positive.
    """
    if isinstance(rows, str | Path):
        rows = read_metrics(rows)
    for number, row in enumerate(rows, start=1):
        if "step" not in row:
            raise ValueError(f'every row must have a "step"; row {number} has {", ".join(row) or "nothing"}.')
    known = sorted({name for row in rows for name in row if name != "step"})
    curves = {}
    for term in terms:
        check.one_of("terms", term, known)
        points = [(row["step"], _value(row[term])) for row in rows if term in row]
        if log and not any(value > 0 for _, value in points):
            raise ValueError(f"{term!r} is never positive and has no place on a logarithmic axis; give log=False.")
        curves[term] = sorted(points, key=lambda p: p[0])
    if ax is None:
        import matplotlib.pyplot as plt

        ax = plt.subplots(figsize=(6.0, 3.6), layout="constrained")[1]
    for (term, points), colour in zip(curves.items(), type_colours(len(curves)), strict=True):
        steps, values = zip(*points, strict=True)
        ax.plot(steps, values, color=colour, linewidth=1.4, label=term, marker="o" if len(points) == 1 else None)
    if log:
        ax.set_yscale("log")
    ax.set_xlabel("training step")
    ax.set_ylabel(f"value ({unit})" if unit else "value")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    return ax


def _value(value: float | None) -> float:
    """JSON writes what is not a number as null."""
    return float("nan") if value is None else float(value)
