"""What the keys of an AnnData mean to a model, and the check that finds everything wrong with them at once."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Float

from scjax.check import column, one_of, suggestion

__all__ = ["AnnData", "DataSpec", "Space", "expression_matrix", "feature_names"]

AnnData: TypeAlias = Any  # anndata.AnnData: imported only where a file is read, it costs half a second
Space: TypeAlias = Literal["counts", "lognormalised", "latent"]

_CHUNK = 4096  # cells looked at together, so that a check needs little memory besides the data
_LARGEST_LOG = 20.0  # log1p of five hundred million: no log-normalised value is above


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """The roles of the parts of an AnnData.

    Attributes:
        expression: where the numbers are: "X", "layers/<name>" or "obsm/<name>".
        space: what they are: "counts" (integers), "lognormalised" (log1p of normalised counts, so not negative) or
            "latent" (any real coordinates). It is never guessed.
        time: the obs column of sampling times: numbers in one unit, equal for cells that were sampled together.
        cell_type: the obs column of cell types, where there is one.
    """

    expression: str = "X"
    space: Space
    time: str
    cell_type: str | None = None

    def __post_init__(self):
        one_of("space", self.space, ("counts", "lognormalised", "latent"))
        place, _, name = self.expression.partition("/")
        if not (self.expression == "X" or (place in ("layers", "obsm") and name)):
            raise ValueError(f"expression must be 'X', 'layers/<name>' or 'obsm/<name>'; got {self.expression!r}.")

    def check(self, adata: AnnData, *, min_times: int = 2) -> None:
        """Nothing, or one ValueError that lists every problem of `adata` under this spec, each with its mend.

        `min_times`: training needs two times, a prediction starts from one (whose cells may then be single).
        """
        problems = [
            *_time_problems(self, adata, min_times),
            *_cell_type_problems(self, adata),
            *_expression_problems(self, adata),
        ]
        if problems:
            listed = "\n".join(f"  {i}. {problem}" for i, problem in enumerate(problems, 1))
            count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
            raise ValueError(f"adata does not fit its DataSpec; {count}:\n{listed}")

    def read_times(self, adata: AnnData) -> Float[np.ndarray, " cells"]:
        """The time of each cell; NaN where the column holds no number. Raises ValueError for a missing column."""
        import pandas as pd

        column("time", self.time, adata.obs)
        values = adata.obs[self.time]
        if isinstance(values.dtype, pd.CategoricalDtype):
            values = values.astype(values.cat.categories.dtype)
        if not (pd.api.types.is_numeric_dtype(values) or pd.api.types.is_string_dtype(values)):
            return np.full(len(values), np.nan)  # dates and spans would turn into nanoseconds
        return pd.to_numeric(values, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)


def expression_matrix(adata: AnnData, spec: DataSpec) -> Any:
    """The matrix, cells x features, as it lies in `adata`: a NumPy array, a SciPy sparse matrix, or a DataFrame.

    Raises:
        ValueError: no such layer or obsm key, or X is None.
    """
    if spec.expression == "X":
        if adata.X is None:
            raise ValueError("expression='X', but adata.X is None; name a layer or an obsm key.")
        return adata.X
    place, _, name = spec.expression.partition("/")
    table = getattr(adata, place)
    known = [str(k) for k in table if k is not None]  # newer anndata lists X among the layers, under None
    if name not in known:
        raise ValueError(
            f"expression={spec.expression!r} names a key of adata.{place}; {name!r} is not one."
            f"{suggestion(name, known)} It has: {', '.join(known) or 'none'}."
        )
    return table[name]


def feature_names(adata: AnnData, spec: DataSpec) -> tuple[str, ...]:
    """The genes, or the coordinates of a latent: the columns of a DataFrame, else `<name>_0`, `<name>_1`, ..."""
    place, _, name = spec.expression.partition("/")
    if place != "obsm":
        return tuple(map(str, adata.var_names))
    matrix = expression_matrix(adata, spec)
    if hasattr(matrix, "columns"):
        return tuple(map(str, matrix.columns))
    return tuple(f"{name}_{i}" for i in range(matrix.shape[1]))


def _time_problems(spec: DataSpec, adata: AnnData, min_times: int) -> Iterator[str]:
    try:
        times = spec.read_times(adata)
    except ValueError as err:
        yield str(err)
        return
    raw = adata.obs[spec.time]
    missing, infinite = raw.isna().to_numpy(), np.isinf(times)
    words = np.isnan(times) & ~missing
    if missing.any():
        yield (
            f"time: {int(missing.sum())} of {len(times)} cells have no value in obs[{spec.time!r}], the first is "
            f"{str(adata.obs_names[int(np.argmax(missing))])!r}. Remove these cells or fill in their times."
        )
    if words.any():
        seen = list(dict.fromkeys(str(v) for v in raw[words]))
        yield (
            f"time: obs[{spec.time!r}] holds values that are not numbers ({_some(seen)}), which have no order and no "
            f"distance. Provide numbers in one unit, for instance "
            f'adata.obs["time"] = adata.obs[{spec.time!r}].astype(str).map({{{seen[0]!r}: 0.0, ...}}).astype(float).'
        )
    if infinite.any():
        yield f"time: {int(infinite.sum())} cells have an infinite time in obs[{spec.time!r}]. Correct or remove them."
    counted = Counter(times[np.isfinite(times)].tolist())
    if len(counted) < min_times and not words.any():
        only = f"all at {next(iter(counted))}" if counted else "none"
        needed = "two times are" if min_times == 2 else "one time is"
        yield f"time: at least {needed} needed; obs[{spec.time!r}] has {len(counted)} ({only})."
    few = sorted(t for t, n in counted.items() if n < 2)
    if few and min_times > 1:
        yield (
            f"time: each time needs at least 2 cells; {_some([repr(t) for t in few])} of obs[{spec.time!r}] "
            f"{'has' if len(few) == 1 else 'have'} one. Remove such cells or merge the time with its neighbour."
        )


def _cell_type_problems(spec: DataSpec, adata: AnnData) -> Iterator[str]:
    if spec.cell_type is None:
        return
    try:
        column("cell_type", spec.cell_type, adata.obs)
    except ValueError as err:
        yield str(err)
        return
    missing = int(adata.obs[spec.cell_type].isna().sum())
    if missing:
        yield (
            f"cell_type: {missing} cells have no value in obs[{spec.cell_type!r}]. Remove them or give them a name, "
            f"such as 'unknown'."
        )


def _expression_problems(spec: DataSpec, adata: AnnData) -> Iterator[str]:
    try:
        matrix = expression_matrix(adata, spec)
    except ValueError as err:
        yield str(err)
        return
    names = feature_names(adata, spec)
    repeated = [name for name, n in Counter(names).items() if n > 1]
    if repeated:
        yield (
            f"features: {len(repeated)} names occur more than once ({_some(repeated)}). "
            f"Call adata.var_names_make_unique() or sum the duplicates."
        )
    if not names:
        yield f"expression: {spec.expression!r} has no features."
        return
    try:
        chunks = _value_chunks(matrix)
    except ValueError as err:
        yield f"expression: {spec.expression!r} {err}"
        return
    found = _Values()
    for start, values, cells in chunks:
        found.see(start, values, cells)
    yield from found.problems(spec, adata)


class _Values:
    """What one pass over the values has found."""

    def __init__(self):
        self.n_bad = self.n_negative = self.n_fractions = 0
        self.least, self.largest = np.inf, 0.0
        self.first_bad = self.first_fraction = None
        self.empty: list[int] = []

    def see(self, start: int, values: np.ndarray, totals: np.ndarray) -> None:
        bad = ~np.isfinite(values)
        self.n_bad += int(bad.sum())
        if bad.any() and self.first_bad is None:
            self.first_bad = values[bad][0]
        values = values[~bad]
        if values.size:
            self.n_negative += int((values < 0).sum())
            self.least, self.largest = min(self.least, values.min()), max(self.largest, values.max())
            fractions = values != np.round(values)
            self.n_fractions += int(fractions.sum())
            if fractions.any() and self.first_fraction is None:
                self.first_fraction = values[fractions][0]
        self.empty += (start + np.flatnonzero(totals == 0)).tolist()

    def problems(self, spec: DataSpec, adata: AnnData) -> Iterator[str]:
        place = f"expression: {spec.expression!r}"
        if self.n_bad:
            yield (
                f"{place} holds {self.n_bad} values that are NaN or infinite, the first is {self.first_bad}. "
                f"Remove these cells or fill the values."
            )
        if spec.space == "latent":
            return
        if self.n_negative:
            what = "counts are" if spec.space == "counts" else "log-normalised values are"
            yield (
                f"{place} holds {self.n_negative} negative values, the least is {self.least:g}; {what} not negative. "
                f"Take the data before scaling, or set space='latent' for coordinates of any sign."
            )
        if spec.space == "counts" and self.n_fractions:
            mend = (
                "They look log-normalised: set space='lognormalised', or name the layer that holds counts."
                if self.largest <= _LARGEST_LOG
                else "Name the layer that holds counts, or round estimated counts to integers."
            )
            yield (
                f"{place} holds {self.n_fractions} values that are not integers, such as {self.first_fraction:g} "
                f"(largest {self.largest:g}), but space='counts'. {mend}"
            )
        if spec.space == "lognormalised" and not self.n_bad and self.largest > _LARGEST_LOG:
            kind = "counts: set space='counts'" if not self.n_fractions else "normalised without log: apply log1p"
            yield f"{place} goes up to {self.largest:g}, too much for log-normalised values. They look like {kind}."
        if self.empty:
            cells = [repr(str(adata.obs_names[i])) for i in self.empty[:3]]
            yield (
                f"{place} is zero in every gene for {len(self.empty)} cells ({', '.join(cells)}"
                f"{', ...' if len(self.empty) > 3 else ''}). Remove these empty cells."
            )


def _value_chunks(matrix: Any) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(first cell, stored values, nonzero values of each cell) of the next cells.

    Raises:
        ValueError: neither an array in memory nor a sparse matrix, or not numbers. The message follows a name.
    """
    from scipy import sparse

    if hasattr(matrix, "columns"):  # a DataFrame in obsm
        matrix = matrix.to_numpy()
    if sparse.issparse(matrix):
        matrix = matrix.tocsr()
    elif not isinstance(matrix, np.ndarray):
        raise ValueError(f"is no array in memory but {type(matrix).__name__}. Call adata.to_memory() first.")
    if matrix.ndim != 2 or matrix.dtype.kind not in "buif":
        raise ValueError(f"must be a matrix of numbers; it has shape {matrix.shape} and dtype {matrix.dtype}.")

    def chunks() -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        for start in range(0, matrix.shape[0], _CHUNK):
            part = matrix[start : start + _CHUNK]
            if sparse.issparse(part):
                yield start, part.data, np.asarray((part != 0).sum(axis=1)).ravel()
            else:
                yield start, part.ravel(), np.count_nonzero(part, axis=1)

    return chunks()


def _some(words: list[str], most: int = 5) -> str:
    return ", ".join(words[:most]) + (", ..." if len(words) > most else "")
