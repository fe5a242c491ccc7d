"""Cells whose matrices stay on disk: .h5ad files and zarr stores, one or many, of which some rows are read at a time.

cells = read_anndata("big.zarr", backed=True)       source: obs, var and uns in memory, X, layers and obsm on disk
spec.check(cells); cells[rows].X[:100]              what an AnnData is for, but for its matrices
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Int

__all__ = [
    "CellsOnDisk",
    "Columns",
    "Derived",
    "DiskMatrix",
    "Stack",
    "Subset",
    "as_sliceable",
    "cells_at_once",
    "is_on_disk",
    "open_cells",
    "stacked",
]

Rows: TypeAlias = Any  # a slice with step 1, or int[n], or bool[cells]

_GAP = 4  # rows from one wanted one to the next, up to which those between are read along
_FEW = 4  # wanted rows of a request, below which their numbers are handed to the reader instead
_SPAN = 8192  # rows that are read in one request at most
_CELLS, _VALUES = 4096, 2**22  # that are in memory at once; as float64 these take 32 MiB


class DiskMatrix(ABC):
    """Cells x features of which rows are read when they are asked for.

    `matrix[rows]`, of a slice or of row numbers in any order that may repeat, is a NumPy array, or a SciPy CSR matrix
    where `is_sparse`, in `dtype`. A subclass gives `_read(start, stop)`. The rest is here: near rows are read together,
    far ones are not.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, is_sparse: bool):
        self.shape, self.dtype, self.is_sparse, self.ndim = shape, np.dtype(dtype), is_sparse, 2

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Rows) -> Any:
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step != 1:
                raise ValueError(f"rows on disk are read in slices of step 1; got {rows}.")
            return self._read(start, max(start, stop))
        rows = np.asarray(rows)
        if rows.dtype == bool:
            rows = np.flatnonzero(rows)
        return self._picked(rows)

    @abstractmethod
    def _read(self, start: int, stop: int) -> Any:
        """Rows start, ..., stop - 1 in memory."""

    def _picked(self, rows: np.ndarray) -> Any:
        if not len(rows):
            return self._read(0, 0)
        if rows.min() < -len(self) or rows.max() >= len(self):
            raise IndexError(f"rows must lie below {len(self)}; got {rows.min()} to {rows.max()}.")
        wanted, place = np.unique(np.where(rows < 0, rows + len(self), rows), return_inverse=True)
        runs = list(_runs(wanted))
        if len(runs) * _FEW > len(wanted):
            return self._take(wanted)[place]
        return stacked_arrays([self._read(int(run[0]), int(run[-1]) + 1)[run - run[0]] for run in runs])[place]

    def _take(self, wanted: np.ndarray) -> Any:
        """Increasing rows, each for itself."""
        return stacked_arrays([self._read(int(row), int(row) + 1) for row in wanted])


def _runs(wanted: np.ndarray) -> Iterator[np.ndarray]:
    """Increasing rows in pieces that are worth one request each."""
    for near in np.split(wanted, np.flatnonzero(np.diff(wanted) > _GAP) + 1):
        yield from np.split(near, np.flatnonzero(np.diff((near - near[0]) // _SPAN)) + 1)


def stacked_arrays(parts: Sequence[Any]) -> Any:
    """Matrices in memory below each other: CSR where all are."""
    from scipy import sparse

    if len(parts) == 1:
        return parts[0]
    if all(sparse.issparse(part) for part in parts):
        return sparse.vstack(parts, format="csr")
    return np.concatenate([part.toarray() if sparse.issparse(part) else part for part in parts])


def _opened_matrix(element: Any, place: str, n_cells: int) -> DiskMatrix:
    """A matrix of an AnnData file; what is none, or cannot be read by rows, says so when it is asked for rows."""
    from anndata.io import sparse_dataset

    kind = element.attrs.get("encoding-type", "array")
    is_sparse = kind in ("csr_matrix", "csc_matrix")
    if not is_sparse and "encoding-type" in element.attrs and not hasattr(element, "shape"):
        # anndata has checked the number of its rows when it was written; here nothing tells it.
        return _Refused((n_cells, 1), f"{place} must be a matrix of numbers; it is of the kind {kind!r}.")
    whole = _no_missing_chunks if is_sparse and hasattr(element, "store") else nullcontext
    with whole():  # zarr looks at this when it opens the arrays, which anndata does at first use
        data = sparse_dataset(element) if is_sparse else element
        shape, dtype = tuple(map(int, data.shape)), np.dtype(data.dtype)
    if kind == "csc_matrix":
        return _Refused(
            shape,
            f"{place} is stored by columns (CSC), of which no row can be read without reading all. Write it again "
            "by rows (adata.X = adata.X.tocsr()), or read it into memory.",
        )
    if len(shape) != 2 or dtype.kind not in "buif":
        return _Refused(shape, f"{place} must be a matrix of numbers; its shape is {shape}, its dtype {dtype}.")
    return _Element(data, place, is_sparse, whole)


class _Refused(DiskMatrix):
    """What lies beside the matrices that are read, and need not trouble who reads those."""

    def __init__(self, shape: tuple[int, ...], why: str):
        # A column and a dtype, as there are matrices that are made of others, unread, by their widths and dtypes.
        super().__init__(shape if len(shape) > 1 else (*shape, 1), np.float32, False)
        self._why = why

    def _read(self, start: int, stop: int) -> Any:
        raise ValueError(self._why)


class _Element(DiskMatrix):
    """A matrix of an AnnData file: a CSR group, or a dense array."""

    def __init__(self, data: Any, place: str, is_sparse: bool, whole: Any):
        n, width = map(int, data.shape)
        super().__init__((n, width), data.dtype, is_sparse)
        self._data, self._place, self._whole = data, place, whole

    def _read(self, start: int, stop: int) -> Any:
        from scipy import sparse

        if start == stop:
            return sparse.csr_matrix((0, self.shape[1]), dtype=self.dtype) if self.is_sparse else self._empty()
        return self._asked(slice(start, stop), start, stop - 1)

    def _take(self, wanted: np.ndarray) -> Any:
        return self._asked(wanted, int(wanted[0]), int(wanted[-1]))

    def _empty(self) -> np.ndarray:
        return np.zeros((0, self.shape[1]), self.dtype)

    def _asked(self, rows: Any, first: int, last: int) -> Any:
        from scipy import sparse

        try:
            if not self.is_sparse:
                data: Any = self._data
                by_number = hasattr(data, "oindex") and not isinstance(rows, slice)  # of zarr
                return np.asarray(data.oindex[rows] if by_number else data[rows])
            with self._whole():
                part = sparse.csr_matrix(self._data[rows])
            part.check_format(full_check=True)  # else a column beyond the last is a value of the next cell
            if not part.has_canonical_format:  # a value in two pieces
                part.sum_duplicates()
            return part
        except Exception as err:
            raise OSError(
                f"{self._place}: cells {first} to {last} could not be read ({type(err).__name__}: {err}). Was the "
                "file moved, cut short or overwritten while it was in use?"
            ) from err


def _no_missing_chunks() -> Any:
    """For zarr, where a chunk that is gone is read as zeros; only a dense matrix may leave out chunks of zeros."""
    import zarr

    return zarr.config.set({"array.read_missing_chunks": False})


class Subset(DiskMatrix):
    """Some rows of a matrix, in this order, and in another dtype where one is given."""

    def __init__(self, matrix: Any, rows: Int[np.ndarray, " n"], dtype: Any = None):
        super().__init__(
            (len(rows), int(matrix.shape[1])), matrix.dtype if dtype is None else dtype, _is_sparse(matrix)
        )
        self._matrix, self._rows = matrix, rows

    def _read(self, start: int, stop: int) -> Any:
        return self._matrix[self._rows[start:stop]].astype(self.dtype, copy=False)

    def _picked(self, rows: np.ndarray) -> Any:
        return self._matrix[self._rows[rows]].astype(self.dtype, copy=False)


class Stack(DiskMatrix):
    """Matrices of the same columns below each other."""

    def __init__(self, parts: Sequence[Any]):
        self._parts = [as_sliceable(part) for part in parts]
        self._ends = np.cumsum([part.shape[0] for part in self._parts])
        dtype = np.result_type(*(part.dtype for part in self._parts))
        shape = int(self._ends[-1]), int(self._parts[0].shape[1])
        super().__init__(shape, dtype, all(map(_is_sparse, self._parts)))

    def _read(self, start: int, stop: int) -> Any:
        read = []
        for part, end in zip(self._parts, self._ends, strict=True):
            first = end - part.shape[0]
            if start < end and stop > first or not read and start == stop:
                read.append(part[max(start - first, 0) : max(stop - first, 0)].astype(self.dtype, copy=False))
        return self._stacked(read)

    def _take(self, wanted: np.ndarray) -> Any:
        of_parts = zip(self._parts, self._ends, np.split(wanted, np.searchsorted(wanted, self._ends[:-1])), strict=True)
        taken = [part[rows - (end - part.shape[0])] for part, end, rows in of_parts if len(rows)]
        return self._stacked([part.astype(self.dtype, copy=False) for part in taken])

    def _stacked(self, read: Sequence[Any]) -> Any:
        """Sparse only where all parts are, also where a dense one has no cell among those that were asked for."""
        rows = stacked_arrays(read)
        return rows if self.is_sparse or isinstance(rows, np.ndarray) else rows.toarray()


class Columns(DiskMatrix):
    """The rows of a matrix with other columns: column i is its column `columns[i]`, or 0 where that is -1."""

    def __init__(self, matrix: Any, columns: Int[np.ndarray, " genes"]):
        matrix = as_sliceable(matrix)
        super().__init__((int(matrix.shape[0]), len(columns)), matrix.dtype, _is_sparse(matrix))
        self._matrix, self._columns = matrix, columns

    def _read(self, start: int, stop: int) -> Any:
        return self._of(self._matrix[start:stop])

    def _picked(self, rows: np.ndarray) -> Any:
        return self._of(self._matrix[rows])

    def _of(self, part: Any) -> Any:
        from scipy import sparse

        here = np.flatnonzero(self._columns >= 0)
        if sparse.issparse(part):
            # A product with a selection matrix: it never becomes dense.
            ones = np.ones(len(here), part.dtype)
            shape = part.shape[1], self.shape[1]
            return part.tocsr() @ sparse.csr_matrix((ones, (self._columns[here], here)), shape=shape)
        out = np.zeros((len(part), self.shape[1]), part.dtype)
        out[:, here] = part[:, self._columns[here]]
        return out


class Derived(DiskMatrix):
    """float32 rows that a function makes of row numbers, when they are asked for."""

    def __init__(self, shape: tuple[int, int], rows_of: Any):
        super().__init__(shape, np.float32, False)
        self._rows_of = rows_of

    def _read(self, start: int, stop: int) -> np.ndarray:
        return self._picked(np.arange(start, stop))

    def _picked(self, rows: np.ndarray) -> np.ndarray:
        if not len(rows):
            return np.zeros((0, self.shape[1]), np.float32)
        return self._rows_of(rows)


def cells_at_once(n_features: int) -> int:
    """How many cells are read, normalised and added up together: fewer where they are wide, whatever their number."""
    return max(1, min(_CELLS, _VALUES // max(1, n_features)))


def is_on_disk(matrix: Any) -> bool:
    """Whether a matrix, or the matrices of an AnnData (or of several with their names), are read when asked for."""
    if isinstance(matrix, list | tuple):
        return any(is_on_disk(one) for _, one in matrix)
    return isinstance(matrix, DiskMatrix | CellsOnDisk)


def as_sliceable(matrix: Any) -> Any:
    """What `[start:stop]` can be asked of: as it is on disk, by rows where it is sparse, else a NumPy array."""
    from scipy import sparse

    if isinstance(matrix, DiskMatrix):
        return matrix
    return matrix.tocsr() if sparse.issparse(matrix) else np.asarray(matrix)


def stacked(parts: Sequence[Any]) -> Any:
    """Matrices below each other, on disk where one of them is."""
    if len(parts) == 1:
        return parts[0]
    return Stack(parts) if any(map(is_on_disk, parts)) else stacked_arrays(parts)


def _is_sparse(matrix: Any) -> bool:
    from scipy import sparse

    return matrix.is_sparse if isinstance(matrix, DiskMatrix) else sparse.issparse(matrix)


class CellsOnDisk:
    """The parts of an AnnData that this package looks at, under their names there; the matrices stay on disk.

    Attributes:
        obs, var: tables in memory.
        X, layers, obsm: `DiskMatrix`; a table in obsm is in memory. X may be None.
        uns: in memory.
    """

    def __init__(
        self,
        obs: Any,
        var: Any,
        X: Any = None,  # noqa: N803 (as in an AnnData)
        *,
        layers: Mapping[str, Any] | None = None,
        obsm: Mapping[str, Any] | None = None,
        uns: Mapping[str, Any] | None = None,
    ):
        self.obs, self.var, self.X = obs, var, X
        self.layers, self.obsm, self.uns = dict(layers or {}), dict(obsm or {}), dict(uns or {})

    @property
    def n_obs(self) -> int:
        return len(self.obs)

    @property
    def n_vars(self) -> int:
        return len(self.var)

    @property
    def shape(self) -> tuple[int, int]:
        return self.n_obs, self.n_vars

    @property
    def obs_names(self) -> Any:
        return self.obs.index

    @property
    def var_names(self) -> Any:
        return self.var.index

    def __getitem__(self, rows: Rows) -> "CellsOnDisk":
        """Some cells; nothing is read."""
        rows = np.arange(self.n_obs)[rows]

        def of(matrix: Any) -> Any:
            return matrix.iloc[rows] if hasattr(matrix, "iloc") else Subset(matrix, rows)

        return CellsOnDisk(
            self.obs.iloc[rows],
            self.var,
            None if self.X is None else of(self.X),
            layers={name: of(matrix) for name, matrix in self.layers.items()},
            obsm={name: of(matrix) for name, matrix in self.obsm.items()},
            uns=self.uns,
        )

    @cached_property
    def n_bytes(self) -> int:
        """Of X as a dense float32 matrix."""
        return 4 * self.n_obs * self.n_vars


def open_cells(path: Path) -> CellsOnDisk:
    """A .h5ad file or a .zarr folder; `source.read_anndata` has looked whether it is one. The file stays open.

    Raises:
        ValueError: a matrix of other cells or genes than obs and var. One by columns, or of something else than
            numbers, raises when rows of it are asked for.
        Exception: what anndata raises for a broken element, with a note that names the file.
    """
    from anndata.io import read_elem

    try:
        group = _opened(path)
        obs: Any = read_elem(group["obs"])
        var: Any = read_elem(group["var"])
        uns = read_elem(group["uns"]) if "uns" in group else {}
        found: dict[str, dict[str, Any]] = {"layers": {}, "obsm": {}}
        for kind, matrices in found.items():
            for name in group[kind] if kind in group else ():
                element = group[kind][name]
                is_table = element.attrs.get("encoding-type") == "dataframe"
                place = f"{path}, {kind}/{name}"
                matrices[str(name)] = read_elem(element) if is_table else _opened_matrix(element, place, len(obs))
        x = _opened_matrix(group["X"], f"{path}, X", len(obs)) if "X" in group else None
        _check_shapes(path, (len(obs), len(var)), {"X": {"": x}, **found})
    except ValueError:
        raise
    except Exception as err:
        err.add_note(f"While reading {path}: it is damaged or was not written by anndata. Write it again.")
        raise
    return CellsOnDisk(obs, var, x, **found, uns=uns)  # pyright: ignore[reportArgumentType]


def _check_shapes(path: Path, shape: tuple[int, int], found: Mapping[str, Mapping[str, Any]]) -> None:
    for kind, matrices in found.items():
        for name, matrix in matrices.items():
            n_axes = 1 if kind == "obsm" else 2
            if matrix is not None and tuple(matrix.shape[:n_axes]) != shape[:n_axes]:
                place = f"{kind}/{name}" if name else kind
                raise ValueError(
                    f"{path}, {place} must have as many rows as obs"
                    + (" and columns as var" if n_axes == 2 else "")
                    + f", {' x '.join(map(str, shape[:n_axes]))}; its shape is {tuple(matrix.shape)}. The file is "
                    "damaged, or was changed by hand: write it again."
                )


def _opened(path: Path) -> Any:
    if path.suffix == ".zarr":
        import zarr

        return zarr.open_group(path, mode="r")
    import h5py

    return h5py.File(path, "r")
