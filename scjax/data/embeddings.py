"""Tables of external vectors of perturbations (ESM2, GenePT, fingerprints, ...): a name and its numbers, from files.

table = read_table("genept.csv")                             name -> float32[features]
table = morgan({"JQ1": "CC1=C(SC2=C1...", ...})               fingerprints of molecules, with the extra `chem`
attach(adata, table, spec)                                   checked against the data, put where spec.vectors looks

Weights of networks are not read here: bring the vectors that they made.
"""

import difflib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from scjax.check import at_least, listed, suggestion
from scjax.data.conditions import CONTROL, as_number, canonical, dose_of, with_dose
from scjax.data.spec import AnnData, DataSpec

__all__ = ["attach", "check_table", "morgan", "read_table"]

_MOST = 10  # names that a message lists


def read_table(
    path: str | Path, *, at: str = "X", separator: str = "+", control: Collection[str] = (CONTROL, "ctrl")
) -> dict[str, Float[np.ndarray, " features"]]:
    """The vectors of a file by name, checked as `check_table` does.

    .csv, .tsv, .parquet: the first column names, all others are numbers; of two columns, the second called `smiles`,
    the fingerprints of its molecules (`morgan` with its defaults). .npz: an array a name, or `names` and `vectors` (a
    row a name). .h5ad: a row a cell, from `at`. Parquet needs pyarrow (the extra `eval`), SMILES rdkit (`chem`).

    Args:
        at: of an .h5ad: "X" or "obsm/NAME", whose rows the obs_names name.
        separator, control: as in `DataSpec`, to read names of combinations and of the control.

    Raises:
        ValueError: an unknown kind of file, no table of numbers, or what `check_table` finds; the file is named.
        FileNotFoundError: nothing there.
        ImportError: the extra is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no table of vectors {path}.")
    readers = {".csv": _of_text, ".tsv": _of_text, ".parquet": _of_text, ".npz": _of_npz, ".h5ad": _of_h5ad}
    if path.suffix not in readers:
        raise ValueError(f"{path}: a table of vectors must be one of {', '.join(readers)}; got {path.suffix!r}.")
    if at != "X" and path.suffix != ".h5ad":
        raise ValueError(f"at={at!r} is a place in an .h5ad; {path} is none. Leave it out.")
    try:
        names, vectors = readers[path.suffix](path, at)
        return check_table(zip(names, vectors, strict=True), separator=separator, control=control)
    except ValueError as err:
        raise ValueError(f"{path}: {err}") from err


def check_table(
    rows: Mapping[str, Any] | Iterable[tuple[str, Any]],
    *,
    separator: str = "+",
    control: Collection[str] = (CONTROL, "ctrl"),
) -> dict[str, Float[np.ndarray, " features"]]:
    """The table with its names in canonical form (`B+A` is `A+B`, `JQ1@0.50` is `JQ1@0.5`), float32.

    Raises:
        ValueError: no rows; a name that cannot be read; two names of one perturbation; unequal lengths; NaN or infinite
            values; vectors of zeros, which would pass for the control (but the control's own may be zero). Each lists
            all the names that it is about.
    """
    pairs = list(rows.items()) if isinstance(rows, Mapping) else list(rows)
    if not pairs:
        raise ValueError("the table must hold at least one vector; it is empty.")
    spelled: dict[str, list[str]] = {}
    unread, found = [], {}
    for given, values in pairs:
        try:
            name = _canonical(str(given), separator, control)
        except ValueError as err:
            unread.append(str(err))
            continue
        spelled.setdefault(name, []).append(str(given))
        try:
            found[name] = np.asarray(values, np.float32)
        except (TypeError, ValueError):
            unread.append(f"{given!r} has values that are not numbers.")
    if unread:
        raise ValueError(f"names must be names of perturbations, and values numbers: {listed(unread, join=' ')}")
    repeated = [" = ".join(map(repr, names)) for names in spelled.values() if len(names) > 1]
    if repeated:
        raise ValueError(
            f"names must name a perturbation once; {len(repeated)} have several rows: {listed(repeated, join='; ')}. "
            "Keep one of each."
        )
    lengths = {vector.shape for vector in found.values()}
    if len(lengths) > 1 or any(len(shape) != 1 or not shape[0] for shape in lengths):
        by_shape = {shape: [name for name, v in found.items() if v.shape == shape] for shape in lengths}
        told = "; ".join(f"{shape} of {listed(map(repr, of))}" for shape, of in sorted(by_shape.items()))
        raise ValueError(f"vectors must be of one length, one row of numbers each; got {told}.")
    bad = [repr(name) for name, vector in found.items() if not np.isfinite(vector).all()]
    if bad:
        raise ValueError(
            f"vectors must hold finite numbers; those of {len(bad)} names have NaN or infinite ones: {listed(bad)}. "
            "Fill them or leave these names out."
        )
    zero = [repr(name) for name, vector in found.items() if not vector.any() and name not in {CONTROL, *control}]
    if zero:
        raise ValueError(
            f"vectors of zeros say that nothing was done; {len(zero)} names have one: {listed(zero)}. Leave them out, "
            "and let on_unknown say what stands for them."
        )
    return found


def attach(adata: AnnData, table: Mapping[str, Any], spec: DataSpec, *, every: bool = True) -> None:
    """Puts the table into `adata.uns[spec.vectors]`, where training, prediction and evaluation look for it.

    Args:
        table: as `read_table` gives it, or any mapping of names to vectors; of drugs alone where `spec.vector_dose`
            makes doses numbers. It may have names that do not occur in the data.
        every: every perturbation of the data must have a vector, as training and evaluation need it; False for a
            prediction, which looks at control cells only.

    Raises:
        ValueError: spec.vectors or the perturbation is not named, the key is taken, what `check_table` finds, or
            perturbations without a vector: all of them, the first with the nearest names of the table.
    """
    if spec.vectors is None or spec.perturbation is None:
        raise ValueError(
            f"spec must name the obs column of perturbation and the key of vectors in adata.uns; got perturbation="
            f"{spec.perturbation!r}, vectors={spec.vectors!r}."
        )
    if spec.vectors in adata.uns:
        raise ValueError(
            f"adata.uns[{spec.vectors!r}] is there already, and is not overwritten. Name another key in spec.vectors, "
            "or remove it."
        )
    table = check_table(table, separator=spec.separator, control=spec.control_names)
    if every:
        populations, _ = spec.read_populations(adata)
        conditions = {population.perturbation for population in populations if not population.is_control}
        parts = {part for names in conditions for part in names}
        parts -= set(spec.vectors_of(parts, table))
        _check_lacking(sorted({part if spec.vector_dose == "name" else dose_of(part)[0] for part in parts}), table)
    import pandas as pd

    # A DataFrame can be written to .h5ad whatever the names hold.
    values = np.stack(list(table.values()))
    adata.uns[spec.vectors] = pd.DataFrame(values, index=list(table), columns=[f"v{i}" for i in range(values.shape[1])])


def morgan(
    smiles: Mapping[str, str], *, radius: int = 2, n_bits: int = 1024, counts: bool = False
) -> dict[str, Float[np.ndarray, " n_bits"]]:
    """Morgan fingerprints of molecules by name, float32: which neighbourhoods of atoms occur, folded to `n_bits`.

    They depend on the molecule and the arguments alone, not on how the SMILES is written; without chirality. A test
    holds known ones against a new rdkit, and a run keeps those that it was trained with.

    Args:
        smiles: of each name; salts and mixtures as they are written.
        radius: bonds from the central atom; 2 is called ECFP4.
        n_bits: of the fingerprint; fewer let more neighbourhoods fall on one.
        counts: log(1 + how often) instead of whether.

    Raises:
        ImportError: rdkit is not installed.
        ValueError: no molecule, SMILES that rdkit cannot read (all of them are named), molecules without atoms.

    Reference: Rogers and Hahn, J. Chem. Inf. Model. 50 (2010).
    """
    at_least("radius", radius, 0)
    at_least("n_bits", n_bits, 1)
    try:
        from rdkit import Chem, rdBase
        from rdkit.Chem import rdFingerprintGenerator
    except ImportError as err:
        raise ImportError('fingerprints need rdkit: pip install "scjax[chem]".') from err

    if not smiles:
        raise ValueError("smiles must hold at least one molecule; it is empty.")
    with rdBase.BlockLogs():  # what is wrong is told below, all at once
        molecules = {name: Chem.MolFromSmiles(text) for name, text in smiles.items()}
    bad = [f"{name!r} ({smiles[name]!r})" for name, m in molecules.items() if m is None or not m.GetNumAtoms()]
    if bad:
        raise ValueError(f"smiles must be valid; rdkit cannot read those of {len(bad)} names: {', '.join(bad)}.")
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=radius, fpSize=n_bits)
    made = generator.GetCountFingerprintAsNumPy if counts else generator.GetFingerprintAsNumPy
    found = {str(name): made(molecule).astype(np.float32) for name, molecule in molecules.items()}
    return {name: np.log1p(bits) for name, bits in found.items()} if counts else found


def _canonical(name: str, separator: str, control: Collection[str]) -> str:
    if name.strip() in {CONTROL, *control}:
        return name.strip()
    parts = []
    for part in canonical(name, separator, control):
        drug, dose = dose_of(part)
        parts.append(part if dose is None else with_dose(drug, dose))
    return "+".join(sorted(parts))


def _check_lacking(lacking: list[str], table: Mapping[str, Any]) -> None:
    if not lacking:
        return
    folded = {name.casefold(): name for name in table}
    told = []
    for name in lacking[:_MOST]:
        near = difflib.get_close_matches(name.casefold(), folded, n=1)
        told.append(f"{name!r} (nearest: {folded[near[0]]!r})" if near else repr(name))
    told += list(map(repr, lacking[_MOST:]))
    raise ValueError(
        f"the table has no vector for {len(lacking)} of the data's perturbations: {', '.join(told)}. Add them, rename "
        "them as the data do, or remove their cells."
    )


def _of_text(path: Path, at: str) -> tuple[list[str], Any]:
    import pandas as pd

    if path.suffix == ".parquet":
        try:
            frame = pd.read_parquet(path, engine="pyarrow")
        except ImportError as err:
            raise ImportError(f'{path}: Parquet needs pyarrow: pip install "scjax[eval]".') from err
        if not isinstance(frame.index, pd.RangeIndex):
            frame = frame.reset_index()
    else:
        how = {"sep": "\t" if path.suffix == ".tsv" else ",", "index_col": False}
        columns = list(pd.read_csv(path, nrows=0, **how).columns)
        missing = {name: ["", "NA", "N/A", "NaN", "nan", "NULL"] for name in columns[1:]}  # a gene may be called NA
        frame = pd.read_csv(path, dtype={columns[0]: str}, keep_default_na=False, na_values=missing, **how)
    if frame.shape[1] < 2:
        raise ValueError(f"a column of names and at least one of numbers are needed; it has {frame.shape[1]} columns.")
    names = list(map(str, frame.iloc[:, 0]))
    if frame.shape[1] == 2 and str(frame.columns[1]).strip().casefold() == "smiles":
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"names must name a molecule once; {listed(map(repr, repeated))} are repeated.")
        found = morgan(dict(zip(names, map(str, frame.iloc[:, 1]), strict=True)))
        return list(found), list(found.values())
    if frame.empty:
        return names, []
    words = [str(name) for name in frame.columns[1:] if not pd.api.types.is_numeric_dtype(frame[name])]
    if words:
        first = next(str(v) for v in frame[words[0]] if as_number(v) is None)
        raise ValueError(
            f"all columns but the first must hold numbers; {len(words)} do not ({listed(map(repr, words))}), the "
            f"first such value is {first!r}."
        )
    return names, frame.iloc[:, 1:].to_numpy(np.float32)


def _of_npz(path: Path, at: str) -> tuple[list[str], Any]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = dict(stored)
    except Exception as err:  # whatever numpy and zipfile say about a file that they cannot read
        raise ValueError(f"is no .npz of plain arrays ({err}).") from err
    if set(arrays) == {"names", "vectors"}:
        names, vectors = arrays["names"], arrays["vectors"]
        if names.ndim != 1 or vectors.ndim != 2 or len(names) != len(vectors):
            raise ValueError(
                f"names must be [rows] and vectors [rows, features]; got the shapes {names.shape} and {vectors.shape}."
            )
        return list(map(str, names)), vectors
    return list(arrays), list(arrays.values())


def _of_h5ad(path: Path, at: str) -> tuple[list[str], Any]:
    from scjax.data.source import read_anndata

    adata = read_anndata(path)
    place, _, name = at.partition("/")
    if place not in ("X", "obsm") or (place == "obsm") != bool(name):
        raise ValueError(f"at must be 'X' or 'obsm/NAME'; got {at!r}.")
    if place == "obsm" and name not in adata.obsm:
        known = list(map(str, adata.obsm))
        raise ValueError(
            f"at={at!r}: there is no obsm key {name!r}.{suggestion(name, known)} It has: {', '.join(known) or 'none'}."
        )
    matrix = adata.X if place == "X" else adata.obsm[name]
    if matrix is None:
        raise ValueError("at='X', but X is None; name a key of obsm.")
    matrix = matrix.toarray() if hasattr(matrix, "toarray") else np.asarray(matrix)
    return list(map(str, adata.obs_names)), matrix
