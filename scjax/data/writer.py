"""An AnnData file that grows by some cells at a time, .h5ad or .zarr; it has its name when it is whole."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from scjax.data.disk import stacked_arrays
from scjax.data.spec import AnnData
from scjax.whole import made_whole

__all__ = ["check_new_file", "write_cells", "writing_cells"]

_CELLS = 1024  # that a chunk of .zarr holds, and that are written together
_SUFFIXES = (".h5ad", ".zarr")


def check_new_file(path: str | Path) -> None:
    """Whether cells can be written there.

    Raises:
        ValueError: another suffix, something that is there already, or a folder that is not.
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"out {path} exists already and is not overwritten; choose another name.")
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"out must end in {' or '.join(_SUFFIXES)}; got {str(path)!r}.")
    if not path.parent.is_dir():
        raise ValueError(f"out {path} would lie in a folder that does not exist; make {path.parent} first.")


@contextmanager
def writing_cells(
    path: str | Path,
    n_cells: int,
    var_names: Sequence[str],
    *,
    obsm: Mapping[str, int] = {},
    layers: Sequence[str] = (),
):  # noqa: B006 (only read)
    """A `_Cells` to which so many cells are added; afterwards the file is there, or, after an error, nothing is.

    Args:
        obsm: widths by name; float32, like X and the layers.

    Raises:
        ValueError: as `check_new_file`.
        FileExistsError: something has come there meanwhile.
    """
    with _whole(Path(path), f"{n_cells} cells x {len(var_names)} genes") as beside:
        cells = _Cells(beside, beside.suffix == ".zarr", n_cells, list(var_names), dict(obsm), list(layers))
        try:
            yield cells
            cells.finish()
        finally:
            cells.close()


def write_cells(path: str | Path, adata: AnnData) -> None:
    """An AnnData that is in memory, to .h5ad or .zarr; after an error nothing is left.

    Raises:
        ValueError: as `check_new_file`.
        FileExistsError: something has come there meanwhile.
    """
    with _whole(Path(path), f"{adata.n_obs} rows x {adata.n_vars} genes") as beside:
        (adata.write_zarr if beside.suffix == ".zarr" else adata.write_h5ad)(beside)


@contextmanager
def _whole(path: Path, what: str) -> Iterator[Path]:
    """Where to write what is then found at `path`."""
    check_new_file(path)
    try:
        with made_whole(path) as beside:
            yield beside
    except OSError as err:
        err.add_note(f"While writing {what} to {path}; nothing of it was left there.")
        raise


class _Cells:
    """The file while it is written."""

    def __init__(self, path: Path, is_zarr: bool, n_cells: int, var_names: list[str], obsm: dict, layers: list[str]):
        import h5py
        import pandas as pd
        import zarr
        from anndata.io import write_elem

        self.uns: dict[str, Any] = {}  # written at the end, like these
        self.tables: dict[str, Any] = {}  # of obsm, that are held in memory
        self.graphs: dict[str, Any] = {}  # of obsp
        self._n, self._obs, self._is_zarr = n_cells, [], is_zarr
        self._group: Any = zarr.open_group(path, mode="w", zarr_format=3) if is_zarr else h5py.File(path, "w")
        self._group.attrs["encoding-type"], self._group.attrs["encoding-version"] = "anndata", "0.1.0"
        for kind in ("layers", "obsm", "obsp", "varm", "varp"):
            write_elem(self._group, kind, {})
        write_elem(self._group, "var", pd.DataFrame(index=var_names))
        widths = {"X": len(var_names)}
        widths |= {f"layers/{name}": len(var_names) for name in layers} | {f"obsm/{k}": n for k, n in obsm.items()}
        self._arrays = {name: self._array(name, width) for name, width in widths.items()}
        self._waiting: dict[str, list[Any]] = {name: [] for name in widths}
        self._n_waiting = self._done = 0

    def _array(self, name: str, width: int) -> Any:
        shape = self._n, width
        if self._is_zarr:
            *parents, last = name.split("/")
            group = self._group[parents[0]] if parents else self._group
            array = group.create_array(last, shape=shape, dtype="float32", chunks=(min(_CELLS, self._n), max(1, width)))
        else:
            array = self._group.create_dataset(name, shape=shape, dtype=np.float32)
        array.attrs["encoding-type"], array.attrs["encoding-version"] = "array", "0.2.0"
        return array

    def add(self, x: Any, obs: Any, *, obsm: Mapping[str, Any] = {}, layers: Mapping[str, Any] = {}) -> None:  # noqa: B006
        """The next cells, with their rows of obs."""
        given = {"X": x} | {f"layers/{k}": v for k, v in layers.items()} | {f"obsm/{k}": v for k, v in obsm.items()}
        if given.keys() != self._arrays.keys() or any(len(part) != len(obs) for part in given.values()):
            raise ValueError(f"{len(obs)} cells must come with as many rows of {', '.join(self._arrays)}.")
        self._obs.append(obs)
        for name, part in given.items():
            self._waiting[name].append(part)
        self._n_waiting += len(obs)
        self._write(self._n_waiting - self._n_waiting % _CELLS)

    def _write(self, n: int) -> None:
        if not n:
            return
        for name, parts in self._waiting.items():
            together = stacked_arrays(parts)
            self._arrays[name][self._done : self._done + n] = np.asarray(together[:n], np.float32)
            self._waiting[name] = [together[n:]]
        self._done, self._n_waiting = self._done + n, self._n_waiting - n

    def finish(self) -> None:
        import pandas as pd
        from anndata.io import write_elem

        self._write(self._n_waiting)
        if self._done != self._n:
            raise ValueError(f"{self._n} cells were to be written; {self._done} came.")
        write_elem(self._group, "obs", as_written(pd.concat(self._obs)))
        for name, table in self.tables.items():
            write_elem(self._group["obsm"], name, table)
        for name, graph in self.graphs.items():
            write_elem(self._group["obsp"], name, graph)
        write_elem(self._group, "uns", self.uns)

    def close(self) -> None:
        if not self._is_zarr:
            self._group.close()


def as_written(obs: Any) -> Any:
    """Words as categories, as anndata writes them."""
    import pandas as pd

    for name in obs:
        # Beside missing ones, as where tables are put together, words are a column of objects, which cannot be written.
        words = not isinstance(obs[name].dtype, pd.CategoricalDtype) and pd.api.types.infer_dtype(obs[name]) == "string"
        if words:
            obs[name] = pd.Categorical(obs[name])
    return obs
