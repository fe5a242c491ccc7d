"""Cells in a model's space on disk, for training beyond memory: written once, then read row by row in any order.

A folder of NumPy files, which `numpy.load` reads as well:

    store.json      shape, dtype, layout, bytes of each file; written last
    values.npy      float32: cells x dims one after the other, or, where most are 0, those that are not
    columns.npy     of the latter, the column of each value
    ends.npy        of the latter, int64: where each cell's values end

Compressed chunks, as a .zarr or .h5ad of the raw data has, must be read whole for one row of them: arbitrary rows then
cost hundreds of times what rows in order cost. Here a row is a read of its own, at its place, so the order of training
does not matter and need not be that of the file. Reads go around the process's memory (no memory map), so that what is
resident does not grow with what was read.
"""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from scjax.data.disk import DiskMatrix
from scjax.whole import made_whole

__all__ = ["StoredCells", "store_cells"]

_FORMAT = 1
_DENSE = 0.5  # share of values that are not 0 above which all are kept


class StoredCells(DiskMatrix):
    """float32[cells, dims] of a folder that `store_cells` wrote; `x[rows]` with rows of any shape reads these alone.

    Safe in several threads. The files are held open: what is deleted meanwhile stays readable to this process.

    Raises:
        ValueError: no such folder, another format, files of another size than was written.
        OSError: a read that comes back short, with the file and the row.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        about = _read_about(self.folder)
        super().__init__(tuple(about["shape"]), np.float32, False)
        self._layout = about["layout"]
        self._files = {name: _File(self.folder / name) for name in about["files"]}
        for name, size in about["files"].items():
            if self._files[name].size != size:
                raise ValueError(
                    f"{self.folder / name} has {self._files[name].size} bytes, {size} were written: it was changed or "
                    "cut short. Delete the folder; it is made again from the data."
                )
        if self._layout == "sparse":
            self._ends = np.concatenate([[0], np.load(self.folder / "ends.npy", allow_pickle=False)])

    def __getitem__(self, rows: Any) -> np.ndarray:
        if isinstance(rows, slice):
            return super().__getitem__(rows)
        rows = np.asarray(rows)
        if rows.dtype == bool:
            rows = np.flatnonzero(rows)
        return self._picked(rows.ravel()).reshape(*rows.shape, self.shape[1])

    def _read(self, start: int, stop: int) -> np.ndarray:
        return self._gathered(np.array([start]), np.array([stop]))

    def _picked(self, rows: np.ndarray) -> np.ndarray:
        if not len(rows):
            return np.zeros((0, self.shape[1]), np.float32)
        if rows.min() < 0 or rows.max() >= len(self):
            raise IndexError(f"rows must lie in [0, {len(self)}); got {rows.min()} to {rows.max()}.")
        wanted, place = np.unique(rows, return_inverse=True)
        first = np.flatnonzero(np.diff(wanted, prepend=-2) > 1)  # neighbours in one read
        read = self._gathered(wanted[first], wanted[np.append(first[1:], len(wanted)) - 1] + 1)
        return read[place]

    def _gathered(self, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """The rows of these ranges, one after the other."""
        n = int((stops - starts).sum())
        if self._layout == "dense":
            out = np.empty((n, self.shape[1]), np.float32)
            self._files["values.npy"].read(starts * self.shape[1], stops * self.shape[1], out.reshape(-1))
            return out
        begin, end = self._ends[starts], self._ends[stops]
        values = np.empty(int((end - begin).sum()), np.float32)
        columns = np.empty(len(values), self._files["columns.npy"].dtype)
        self._files["values.npy"].read(begin, end, values)
        self._files["columns.npy"].read(begin, end, columns)
        rows = np.concatenate([np.arange(a, b) for a, b in zip(starts, stops, strict=True)]) if n else starts[:0]
        counts = self._ends[rows + 1] - self._ends[rows]
        out = np.zeros((n, self.shape[1]), np.float32)
        at = np.repeat(np.arange(n) * self.shape[1], counts) + columns
        if len(at) and not 0 <= at.min() <= at.max() < out.size:
            raise OSError(f"{self.folder}: columns.npy holds columns beyond {self.shape[1]}: it is damaged. Delete it.")
        out.reshape(-1)[at] = values
        return out


class _File:
    """One array of one axis in a .npy file, read at places."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY)
        except OSError as err:
            raise ValueError(
                f"{path} cannot be opened ({err.strerror}). Delete its folder; it is made again from the data."
            ) from err
        self.size = os.fstat(self._fd).st_size
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            if version != (1, 0):
                raise ValueError(f"{path} is a .npy file of version {version}, not (1, 0): no array of this package.")
            _, _, self.dtype = np.lib.format.read_array_header_1_0(file)
            self._offset = file.tell()

    def read(self, starts: np.ndarray, stops: np.ndarray, out: np.ndarray) -> None:
        """The values of these ranges, one after the other, into `out`."""
        width = self.dtype.itemsize
        into = memoryview(out.view(np.uint8))
        ranges = [
            (self._offset + a * width, (b - a) * width)
            for a, b in zip(starts.tolist(), stops.tolist(), strict=True)
            if b > a
        ]
        if len(ranges) > 1 and hasattr(os, "posix_fadvise"):  # the disk may then look for all of them at once
            for offset, n in ranges:
                os.posix_fadvise(self._fd, offset, n, os.POSIX_FADV_WILLNEED)
        done = 0
        for offset, n in ranges:
            while n:
                read = os.pread(self._fd, n, offset)
                if not read:
                    raise OSError(
                        f"{self.path} ends at byte {os.fstat(self._fd).st_size}, before byte {offset + n}; it had "
                        f"{self.size} when it was opened: it was cut short meanwhile."
                    )
                into[done : done + len(read)] = read
                done, offset, n = done + len(read), offset + len(read), n - len(read)

    def __del__(self):
        if hasattr(self, "_fd"):
            os.close(self._fd)


def store_cells(
    folder: str | Path, key: str, shape: tuple[int, int], parts: Callable[[], Iterable[np.ndarray]]
) -> StoredCells:
    """The cells of `parts()`, float32 rows in order, kept in `folder`/`key`; one that is there already is opened.

    It is complete or not there (`scjax.whole`).

    Args:
        key: a name for what the cells are of: data, steps, statistics.
        parts: called where nothing is there; makes at most as many rows at a time as memory should hold.

    Raises:
        ValueError: a folder of this key that holds something else.
        OSError: no room, no permission.
    """
    whole = Path(folder) / key
    if whole.exists():
        return StoredCells(whole)
    whole.parent.mkdir(parents=True, exist_ok=True)
    try:
        with made_whole(whole) as beside:
            beside.mkdir()
            _write(beside, shape, parts())
    except FileExistsError:
        if not whole.is_dir():  # another process was first, with the same cells
            raise
    except OSError as err:
        err.add_note(f"While writing the prepared cells, {shape[0]} x {shape[1]}, to {whole}.")
        raise
    return StoredCells(whole)


def _write(folder: Path, shape: tuple[int, int], parts: Iterable[np.ndarray]) -> None:
    n_cells, n_dims = shape
    files: dict[str, _Writer] = {}
    ends, n_values, done, layout = np.empty(n_cells, np.int64), 0, 0, None
    try:
        for part in parts:
            if layout is None:  # the first cells tell how full the others are; either layout holds any
                layout = "dense" if np.count_nonzero(part) > _DENSE * part.size else "sparse"
                files["values.npy"] = _Writer(folder / "values.npy", np.float32)
                if layout == "sparse":
                    dtype = np.uint16 if n_dims <= 2**16 else np.int32
                    files["columns.npy"] = _Writer(folder / "columns.npy", dtype)
            if layout == "dense":
                files["values.npy"].add(part.reshape(-1))
            else:
                kept = part != 0
                rows, columns = np.nonzero(kept)
                counts = np.bincount(rows, minlength=len(part))
                ends[done : done + len(part)] = n_values + np.cumsum(counts)
                n_values += len(rows)
                files["values.npy"].add(part[kept])
                files["columns.npy"].add(columns)
            done += len(part)
        if done != n_cells:
            raise ValueError(f"parts must make {n_cells} cells; got {done}.")
    finally:
        for file in files.values():
            file.close()
    if layout == "sparse":
        with open(folder / "ends.npy", "xb") as file:
            np.save(file, ends, allow_pickle=False)
            _flush(file)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    about = {"format": _FORMAT, "shape": list(shape), "layout": layout, "files": sizes}
    with open(folder / "store.json", "x", encoding="utf-8") as file:
        file.write(json.dumps(about, indent=1) + "\n")
        _flush(file)


class _Writer:
    """A .npy file of one axis that grows; its header leaves room for the final length."""

    def __init__(self, path: Path, dtype: Any):
        self.dtype, self.n = np.dtype(dtype), 0
        self._file = open(path, "xb")  # noqa: SIM115 (closed by `close`)
        self._header()
        self._start = self._file.tell()

    def add(self, values: np.ndarray) -> None:
        values = np.ascontiguousarray(values, self.dtype)
        self._file.write(memoryview(values).cast("B"))
        self.n += len(values)

    def close(self) -> None:
        if not self._file.closed:
            with self._file:
                self._file.seek(0)
                self._header()
                if self._file.tell() != self._start:
                    raise OSError(f"{self._file.name}: its header did not keep its length.")
                _flush(self._file)

    def _header(self) -> None:
        descr = np.lib.format.dtype_to_descr(self.dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (self.n,)}
        np.lib.format.write_array_header_1_0(self._file, header)


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _read_about(folder: Path) -> dict[str, Any]:
    path = folder / "store.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        known = about["format"] == _FORMAT and about["layout"] in ("dense", "sparse")
        n_cells, n_dims = map(int, about["shape"])
        names = {"values.npy"} if about["layout"] == "dense" else {"values.npy", "columns.npy", "ends.npy"}
        known &= set(about["files"]) == names and n_cells >= 0 and n_dims >= 0
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise ValueError(f"{folder} holds no prepared cells ({path.name}: {err}). Delete it.") from err
    if not known:
        raise ValueError(f"{folder} holds prepared cells of another format. Delete it; it is made again from the data.")
    return about
