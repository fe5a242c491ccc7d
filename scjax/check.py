"""Guards at the door: what was wanted, what came, what to do. All raise ValueError in one voice."""

import difflib
import math
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np

__all__ = [
    "at_least",
    "column",
    "finite",
    "increasing",
    "listed",
    "non_negative",
    "one_of",
    "positive",
    "probability",
    "suggestion",
]


def suggestion(word: Any, known: Iterable[Any]) -> str:
    """` Did you mean 'x'?`, or nothing where no known word is near."""
    near = difflib.get_close_matches(str(word), [str(k) for k in known], n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def listed(words: Iterable[Any], most: int = 5, join: str = ", ") -> str:
    """The first of them, for a message."""
    words = [f"{word:g}" if isinstance(word, float) else str(word) for word in words]
    return join.join(words[:most]) + (f"{join}..." if len(words) > most else "")


def one_of(name: str, value: Any, options: Collection[Any]) -> None:
    if value not in options:
        known = ", ".join(repr(o) for o in options)
        raise ValueError(f"{name} must be one of {known}; got {value!r}.{suggestion(value, options)}")


def positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive number; got {value!r}.")


def non_negative(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be zero or a positive number; got {value!r}.")


def at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value!r}.")


def probability(name: str, value: float) -> None:
    """A chance that may be 0 and may not be 1."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} must lie in [0, 1); got {value!r}.")


def finite(name: str, values: np.ndarray) -> None:
    bad = ~np.isfinite(values)
    if bad.any():
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{name} must hold finite numbers; {int(bad.sum())} of {bad.size} are NaN or infinite, "
            f"the first at {first}: {values[first]}. Remove these cells or fill the values."
        )


def increasing(name: str, values: Iterable[Any]) -> tuple[float, ...]:
    """The values as floats: finite numbers, strictly increasing."""
    values = tuple(values)
    try:
        values = tuple(float(v) for v in values)
    except (TypeError, ValueError) as err:
        raise ValueError(f"{name} must be numbers; got {values}.") from err
    if not all(map(math.isfinite, values)):
        raise ValueError(f"{name} must be finite; got {values}.")
    for before, after in zip(values, values[1:], strict=False):
        if not after > before:
            what = "repeated" if after == before else "unsorted"
            raise ValueError(f"{name} must increase strictly; {after} after {before} is {what}. Got {values}.")
    return values


def column(role: str, key: str, columns: Iterable[Any], table: str = "adata.obs") -> None:
    """`key` is a column of `table`; the message lists the columns and the nearest one."""
    columns = [str(c) for c in columns]
    if key not in columns:
        raise ValueError(
            f"{role} names a column of {table}; {key!r} is not one.{suggestion(key, columns)} "
            f"It has: {', '.join(columns) or 'none'}."
        )
