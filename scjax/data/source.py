"""Where cells come from: files, and row access that does not tell how the rows are kept."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from scjax.check import suggestion
from scjax.data.spec import AnnData, DataSpec, expression_matrix, feature_names

__all__ = ["CellSource", "InMemorySource", "open_source", "read_anndata"]


@runtime_checkable
class CellSource(Protocol):
    """Cells by row number, wherever they are kept."""

    @property
    def n_cells(self) -> int: ...

    @property
    def feature_names(self) -> tuple[str, ...]: ...

    def rows(self, indices: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n features"]:
        """float32, in the order of `indices`, which may repeat."""
        ...


class InMemorySource:
    """Rows of a NumPy array or of a SciPy sparse matrix."""

    def __init__(self, matrix: Any, feature_names: Sequence[str]):
        from scipy import sparse

        self._matrix = matrix.tocsr() if sparse.issparse(matrix) else np.asarray(matrix)
        self._is_sparse = sparse.issparse(matrix)
        self._feature_names = tuple(feature_names)

    @property
    def n_cells(self) -> int:
        return int(self._matrix.shape[0])

    @property
    def feature_names(self) -> tuple[str, ...]:
        return self._feature_names

    def rows(self, indices: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n features"]:
        picked = self._matrix[indices]
        return np.asarray(picked.toarray() if self._is_sparse else picked, dtype=np.float32)


def open_source(adata: AnnData, spec: DataSpec) -> CellSource:
    """The cells of `adata` in the space that `spec` names. `spec.check(adata)` is the caller's."""
    return InMemorySource(expression_matrix(adata, spec), feature_names(adata, spec))


def read_anndata(path: str | Path) -> AnnData:
    """An AnnData in memory from a .h5ad file or a .zarr folder.

    Raises:
        FileNotFoundError: nothing at `path`; the message names the nearest file of that folder.
        ValueError: another suffix, a truncated file, or a file that is not of that format.
        Exception: what anndata raises for a broken element, with a note that names the file.
    """
    path = Path(path)
    if path.suffix not in (".h5ad", ".zarr"):
        raise ValueError(f"path must end in .h5ad or .zarr; got {str(path)!r}.")
    if not path.exists():
        near = [p.name for p in path.parent.glob(f"*{path.suffix}")] if path.parent.is_dir() else []
        raise FileNotFoundError(f"path names no file: {str(path)!r} does not exist.{suggestion(path.name, near)}")
    _check_container(path)

    import anndata

    try:
        return anndata.read_h5ad(path) if path.suffix == ".h5ad" else anndata.read_zarr(path)
    except Exception as err:
        err.add_note(f"While reading {path}: it is damaged or was not written by anndata. Write it again.")
        raise


def _check_container(path: Path) -> None:
    if path.suffix == ".zarr":
        if not any((path / name).is_file() for name in ("zarr.json", ".zgroup", ".zmetadata")):
            raise ValueError(f"{path} is no zarr group: it holds neither zarr.json nor .zgroup. Was it copied whole?")
        return

    import h5py

    try:
        h5py.File(path).close()
    except OSError as err:
        raise ValueError(f"{path} is no whole HDF5 file: truncated, or of another format ({err}).") from err
