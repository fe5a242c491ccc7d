"""Where cells come from: files, and row access that does not tell how the rows are kept."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, get_args, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int

from scjax.check import at_least, column, one_of, suggestion
from scjax.data.conditions import as_columns
from scjax.data.disk import CellsOnDisk, Columns, as_sliceable, is_on_disk, open_cells, stacked
from scjax.data.spec import AnnData, DataSpec, expression_matrix, feature_names

__all__ = ["Absent", "CellSource", "Joined", "MatrixSource", "as_joined", "join", "open_source", "read_anndata"]

Absent: TypeAlias = Literal["error", "zero", "intersection"]

SOURCE = "source"  # the obs column of a joined AnnData


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


class MatrixSource:
    """Rows of a NumPy array, of a SciPy sparse matrix, or of a `disk.DiskMatrix`, which reads them when asked."""

    def __init__(self, matrix: Any, feature_names: Sequence[str]):
        self._matrix = as_sliceable(matrix)
        self._feature_names = tuple(feature_names)

    @property
    def n_cells(self) -> int:
        return int(self._matrix.shape[0])

    @property
    def feature_names(self) -> tuple[str, ...]:
        return self._feature_names

    def rows(self, indices: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n features"]:
        picked = self._matrix[indices]
        return np.asarray(picked.toarray() if hasattr(picked, "toarray") else picked, dtype=np.float32)


def open_source(adata: AnnData, spec: DataSpec) -> CellSource:
    """The cells of `adata` in the space that `spec` names. `spec.check(adata)` is the caller's."""
    return MatrixSource(expression_matrix(adata, spec), feature_names(adata, spec))


class Joined(NamedTuple):
    """Several AnnData as one.

    Attributes:
        adata: the cells of the first, then those of the next; the matrix lies where the DataSpec looks for it.
            obs["source"] says which each cell is from, and obs_names begin with it.
        sources: their names, in the order given, each once.
        measured: which genes each of the sources measured, in all of its files; the others are 0 in its cells.
    """

    adata: AnnData
    sources: tuple[str, ...]
    measured: Bool[np.ndarray, "sources genes"]


def join(named: Sequence[tuple[str, AnnData]], spec: DataSpec, *, absent: Absent = "error") -> Joined:
    """Several files, or studies, as one AnnData under one spec; genes are matched by name, their order does not matter.

    Files that are given the same name are one source: plates of a study. Where there is more than one source, the
    values of `spec.batch` get its name in front (`pbmc_Donor1`), as batches of different studies are not the same;
    spec.batch="source" makes each source a batch. Of obs the columns of `spec` are kept. Where one of them is on disk
    the joined cells are, too (`disk.CellsOnDisk`).

    Args:
        absent: what to do about genes that not all of them have. "error" refuses; "zero" keeps the genes of all, those
            of the first in its order, then the new ones of the next, and fills in zeros, as the PerturbDiff code does;
            `measured` tells them from true zeros. "intersection" keeps the genes that all have: the totals that
            normalise counts are then over these genes.

    Raises:
        ValueError: no data, a gene that some lack under "error", no gene that all have, a missing column or matrix,
            repeated genes, an obs column "source" that is there already, vectors that contradict each other.
    """
    one_of("absent", absent, get_args(Absent))
    at_least("the number of AnnData to join", len(named), 1)
    names_of = [_feature_names(name, adata, spec) for name, adata in named]
    genes = _joint_genes(named, names_of, absent)
    sources = tuple(dict.fromkeys(name for name, _ in named))
    measured = np.ones((len(sources), len(genes)), bool)
    for (name, _), own in zip(named, names_of, strict=True):
        measured[sources.index(name)] &= np.isin(genes, own)
    uns = {
        key: _merged_vectors(role, key, named)
        for role, key in (("vectors", spec.vectors), ("cell_type_vectors", spec.cell_type_vectors))
        if key is not None
    }
    return Joined(_one(named, spec, genes, len(sources) > 1, uns), sources, measured)


def as_joined(name: str, adata: AnnData, spec: DataSpec, genes: Sequence[str], *, prefix: bool) -> AnnData:
    """`adata` as `join` would have it beside others: these genes, 0 where it has none, and obs as there.

    Args:
        prefix: put the name in front of the batches, as where there are several sources.

    Raises:
        ValueError: as `join`.
    """
    _feature_names(name, adata, spec)
    return _one([(name, adata)], spec, tuple(genes), prefix, {})


def _feature_names(source: str, adata: AnnData, spec: DataSpec) -> tuple[str, ...]:
    genes = feature_names(adata, spec)
    if len(set(genes)) < len(genes):
        repeated = next(gene for gene in genes if genes.count(gene) > 1)
        raise ValueError(
            f"{source}: the gene {repeated!r} is repeated. Call adata.var_names_make_unique() or sum the duplicates."
        )
    if SOURCE in adata.obs:
        raise ValueError(f"{source}: obs has a column {SOURCE!r} already, which joining needs. Rename it.")
    return genes


def _one(
    named: Sequence[tuple[str, AnnData]], spec: DataSpec, genes: tuple[str, ...], prefix: bool, uns: dict[str, Any]
) -> AnnData:
    import anndata
    import pandas as pd

    obs = pd.concat([_obs_table(name, adata, spec, prefix) for name, adata in named])
    if not obs.index.is_unique:
        raise ValueError("obs_names must be unique within a source; files of one name share some. Make them unique.")
    matrix = stacked([_aligned(expression_matrix(a, spec), feature_names(a, spec), genes) for _, a in named])
    place, _, key = spec.expression.partition("/")
    var = pd.DataFrame(index=list(genes))
    if is_on_disk(matrix) and place != "obsm":
        held = {"layers": {key: matrix}} if place == "layers" else {"X": matrix}
        return CellsOnDisk(obs, var, uns=uns, **held)
    if place == "obsm":
        dense = matrix[:]
        dense = dense.toarray() if hasattr(dense, "toarray") else dense
        table = pd.DataFrame(dense, index=obs.index, columns=list(genes))
        return anndata.AnnData(obs=obs, obsm={key: table}, uns=uns)  # pyright: ignore[reportArgumentType]
    if place == "layers":
        return anndata.AnnData(obs=obs, var=var, layers={key: matrix}, uns=uns)
    return anndata.AnnData(X=matrix, obs=obs, var=var, uns=uns)


def _joint_genes(
    named: Sequence[tuple[str, AnnData]], names_of: Sequence[tuple[str, ...]], absent: Absent
) -> tuple[str, ...]:
    union = tuple(dict.fromkeys(gene for genes in names_of for gene in genes))
    if absent == "zero":
        return union
    everywhere = set(names_of[0]).intersection(*names_of[1:])
    if absent == "intersection":
        if not everywhere:
            raise ValueError("absent='intersection': no gene is in all of the data. Are the names of one kind?")
        return tuple(gene for gene in names_of[0] if gene in everywhere)
    for (name, _), genes in zip(named, names_of, strict=True):
        lacking = [gene for gene in union if gene not in set(genes)]
        if lacking:
            raise ValueError(
                f"{name!r} lacks {len(lacking)} of {len(union)} genes that others have ({', '.join(lacking[:5])}"
                f"{', ...' if len(lacking) > 5 else ''}). Choose absent='intersection' ({len(everywhere)} genes are in "
                f"all) or absent='zero'."
            )
    return union


def _obs_table(name: str, adata: AnnData, spec: DataSpec, prefix: bool) -> Any:
    import pandas as pd

    roles = {
        "time": spec.time,
        "cell_type": spec.cell_type,
        "batch": spec.batch,
        "perturbation": spec.perturbation,
        "dose": spec.dose,
        "covariates": spec.covariates,
    }
    table = pd.DataFrame(index=[f"{name}_{cell}" for cell in adata.obs_names])
    for role, keys in roles.items():
        for key in as_columns(keys):
            if key == SOURCE:
                continue
            try:
                column(role, key, adata.obs)
            except ValueError as err:
                err.add_note(f"While joining {name!r}.")
                raise
            # Objects, whatever categories the sources have; times stay numbers, as which they are read.
            values = adata.obs[key].to_numpy(dtype=None if role == "time" else object)
            if key == spec.batch and prefix:
                gone = adata.obs[key].isna().to_numpy()
                values = [None if no else f"{name}_{value}" for value, no in zip(values, gone, strict=True)]
            table[key] = values
    table[SOURCE] = name
    return table


def _aligned(matrix: Any, own: tuple[str, ...], genes: tuple[str, ...]) -> Any:
    """The columns in the order of `genes`; those of genes that are not among its `own` are 0."""
    place = {gene: i for i, gene in enumerate(own)}
    aligned = Columns(matrix, np.array([place.get(gene, -1) for gene in genes], np.int64))
    return aligned if is_on_disk(matrix) else aligned[:]


def _merged_vectors(role: str, key: str, named: Sequence[tuple[str, AnnData]]) -> dict[str, np.ndarray]:
    """The vectors of all sources that bring some; whether they are sound is the spec's to check."""
    found: dict[str, np.ndarray] = {}
    for name, adata in named:
        table = adata.uns.get(key, {})
        if hasattr(table, "columns"):
            table = dict(zip(map(str, table.index), table.to_numpy(), strict=True))
        if not isinstance(table, Mapping):
            raise ValueError(
                f"{role}: uns[{key!r}] of {name!r} must be a DataFrame or a dict; it is {type(table).__name__}."
            )
        for of, vector in table.items():
            vector = np.asarray(vector)
            if str(of) in found and not np.array_equal(found[str(of)], vector):
                raise ValueError(
                    f"{role}: {name!r} has another vector for {of!r} in uns[{key!r}] than a source before."
                )
            found[str(of)] = vector
    return found


def read_anndata(path: str | Path | Sequence[str | Path], *, backed: bool = False) -> AnnData:
    """An AnnData in memory from a .h5ad file or a .zarr folder; or, `backed`, its `disk.CellsOnDisk`.

    Several files make one AnnData where they have the same genes, in any order: the cells of the first, then those of
    the next, with the genes in the order of the first, the obs columns that all have, and the uns of all.

    Args:
        backed: leave X, layers and obsm on disk, where rows are read when they are asked for. What is neither CSR nor
            dense numbers raises a ValueError then.

    Raises:
        ValueError: several files of other genes, or with the same obs_names, or uns that contradict each other.
        FileNotFoundError: nothing at `path`; the message names the nearest file of that folder.
        ValueError: another suffix, a truncated file, or a file that is not of that format.
        Exception: what anndata raises for a broken element, with a note that names the file.
    """
    if not isinstance(path, str | Path):
        at_least("the number of files", len(path), 1)
        return _concatenated([(Path(one), read_anndata(one, backed=backed)) for one in path])
    path = Path(path)
    if path.suffix not in (".h5ad", ".zarr"):
        raise ValueError(f"path must end in .h5ad or .zarr; got {str(path)!r}.")
    if not path.exists():
        near = [p.name for p in path.parent.glob(f"*{path.suffix}")] if path.parent.is_dir() else []
        raise FileNotFoundError(f"path names no file: {str(path)!r} does not exist.{suggestion(path.name, near)}")
    _check_container(path)
    if backed:
        return open_cells(path)

    import anndata

    try:
        return anndata.read_h5ad(path) if path.suffix == ".h5ad" else anndata.read_zarr(path)
    except Exception as err:
        err.add_note(f"While reading {path}: it is damaged or was not written by anndata. Write it again.")
        raise


def _concatenated(files: Sequence[tuple[Path, AnnData]]) -> AnnData:
    import anndata
    import pandas as pd

    (first, one), *others = files
    if not others:
        return one
    uns = dict(one.uns)
    for path, adata in files:
        twice = sorted({str(name) for name in adata.var_names[adata.var_names.duplicated()]})
        if twice:
            raise ValueError(
                f"files read as one are matched by the names of their genes; {path} has {twice[0]!r} more than once "
                f"({len(twice)} such names). Make them unique in each file (adata.var_names_make_unique())."
            )
    for path, other in others:
        differ = sorted(set(map(str, one.var_names)) ^ set(map(str, other.var_names)))
        if differ:
            raise ValueError(
                f"files read as one must have the same genes; {len(differ)} are only in {first} or only in {path}: "
                f"{', '.join(differ[:5])}{', ...' if len(differ) > 5 else ''}. Cell sets can join them (absent=...)."
            )
        for key, value in other.uns.items():
            if not _same(uns.setdefault(key, value), value):
                raise ValueError(f"files read as one must agree in uns; {path} has another {key!r} than before.")
    obs = pd.concat([adata.obs for _, adata in files], join="inner")
    if not obs.index.is_unique:
        raise ValueError(f"files read as one must have different obs_names; {first} and others share some.")
    genes = tuple(map(str, one.var_names))

    def together(kind: str, name: str | None) -> Any:
        parts = [adata.X if kind == "X" else getattr(adata, kind)[name] for _, adata in files]
        if kind == "obsm":
            widths = {str(path): part.shape[1] for part, (path, _) in zip(parts, files, strict=True)}
            if len(set(widths.values())) > 1:
                raise ValueError(f"files read as one must have obsm[{name!r}] of one width; got {widths}.")
            tables = [hasattr(part, "columns") for part in parts]
            if any(tables):
                if not all(tables):
                    raise ValueError(
                        f"files read as one must have obsm[{name!r}] as a table in all of them or in none; "
                        f"{files[tables.index(True)][0]} has a table, {files[tables.index(False)][0]} an array."
                    )
                return pd.concat(parts)
            return stacked([as_sliceable(part) for part in parts])
        named = zip(parts, files, strict=True)
        return stacked([_aligned(part, tuple(map(str, a.var_names)), genes) for part, (_, a) in named])

    def of(kind: str) -> dict[str, Any]:
        own = [name for name in getattr(one, kind) if name is not None]  # newer anndata lists X among the layers
        return {name: together(kind, name) for name in own if all(name in getattr(a, kind) for _, a in others)}

    x = together("X", None) if all(adata.X is not None for _, adata in files) else None
    if is_on_disk(files):
        return CellsOnDisk(obs, one.var, x, layers=of("layers"), obsm=of("obsm"), uns=uns)
    return anndata.AnnData(X=x, obs=obs, var=one.var, layers=of("layers"), obsm=of("obsm"), uns=uns)


def _same(one: Any, other: Any) -> bool:
    from scipy import sparse

    if hasattr(one, "equals"):
        return bool(one.equals(other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if sparse.issparse(one) or sparse.issparse(other):
        alike = sparse.issparse(one) and sparse.issparse(other) and np.shape(one) == np.shape(other)
        # NaN is other than itself: what differs must be NaN in both.
        a: Any = one
        b: Any = other
        return alike and (a != b).nnz == (a != a).multiply(b != b).nnz
    one, other = np.asarray(one), np.asarray(other)
    if one.dtype.names or other.dtype.names:  # records, of which array_equal knows no NaN
        return one.dtype.names == other.dtype.names and all(_same(one[name], other[name]) for name in one.dtype.names)
    numbers = one.dtype.kind in "fc" and other.dtype.kind in "fc"
    return bool(np.array_equal(one, other, equal_nan=numbers))


def _check_container(path: Path) -> None:
    if path.suffix == ".zarr":
        if not any((path / name).is_file() for name in ("zarr.json", ".zgroup", ".zmetadata")):
            raise ValueError(f"{path} is no zarr group: it holds neither zarr.json nor .zgroup. Was it copied whole?")
        _check_codecs(path)
        return

    import h5py

    try:
        h5py.File(path).close()
    except OSError as err:
        raise ValueError(f"{path} is no whole HDF5 file: truncated, or of another format ({err}).") from err


def _check_codecs(path: Path) -> None:
    """Refuses a store with pickles in it: numcodecs reads them, which runs code. Newer zarr refuses too."""
    for document in _metadata(path):
        try:
            tree = json.loads(document.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as err:
            raise ValueError(f"{document} is no valid JSON; the store is damaged.") from err
        for name in _codecs(tree):
            if str(name).rpartition(".")[2] == "pickle":
                raise ValueError(f"{document} asks for the codec {name!r}: a pickle may run code, and is not read.")


def _metadata(path: Path) -> Iterator[Path]:
    """The documents of a store, also of what is linked into it, where zarr follows; each folder once."""
    seen = set()
    for folder, below, files in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        yield from (Path(folder) / name for name in files if name in (".zarray", ".zmetadata", "zarr.json"))


def _codecs(tree: Any) -> Iterator[Any]:
    """The names of all codecs and filters in the metadata of arrays."""
    if isinstance(tree, list):
        for inner in tree:
            yield from _codecs(inner)
    elif isinstance(tree, dict):
        for key, value in tree.items():
            if key in ("filters", "compressor", "codecs"):
                for codec in value if isinstance(value, list) else [value]:
                    if isinstance(codec, dict):
                        yield codec.get("id", codec.get("name"))
            if key != "attributes" and not key.endswith(".zattrs"):
                yield from _codecs(value)
