"""What the keys of an AnnData mean to a model, and the check that finds everything wrong with them at once."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from jaxtyping import Float, Int

from scjax.check import column, listed, one_of, positive, suggestion
from scjax.data.conditions import (
    CONTROL,
    CellKinds,
    Pooling,
    VectorDose,
    as_columns,
    canonical,
    canonical_parts,
    dose_of,
    dosed_vector,
    read_kinds,
    undosed_vector,
    with_dose,
)
from scjax.data.disk import DiskMatrix, as_sliceable, cells_at_once
from scjax.types import Population

__all__ = ["LARGEST_LOG", "AnnData", "DataSpec", "Space", "expression_matrix", "feature_names"]

AnnData: TypeAlias = Any  # anndata.AnnData: imported only where a file is read, it costs half a second
Space: TypeAlias = Literal["counts", "lognormalised", "latent"]

LARGEST_LOG = 20.0  # log1p of five hundred million: no log-normalised value is above


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """The roles of the parts of an AnnData. A time series names `time`, perturbation data name `perturbation`; data of
    neither kind, whose cells are only known by their type and donor, name `cell_type` or `batch`.

    Attributes:
        expression: where the numbers are: "X", "layers/<name>" or "obsm/<name>".
        space: what they are: "counts" (integers), "lognormalised" (log1p of normalised counts, so not negative) or
            "latent" (any real coordinates). It is never guessed.
        time: the obs column of sampling times: numbers in one unit, equal for cells that were sampled together.
        cell_type: the obs column of cell types, where there is one.
        batch: the obs column of what was measured together, a technical batch or a donor, where there is one.
        perturbation: the obs column of what was done, several names joined by `separator` (`A+B`, `A+ctrl`, `ctrl`); or
            several columns with one name each. The order of names does not matter.
        control: the names that mean that nothing was done.
        separator: between names in one column.
        dose: the obs column of doses, positive numbers, one a cell or one a name joined like the names; as many columns
            as `perturbation` has. A perturbation is then `name@dose`. Controls have none, whatever is there.
        covariates: the obs columns (cell type, line, batch) within whose combinations controls are matched, and whose
            values make the contexts of populations.
        vectors: the key of adata.uns that holds an external vector for each perturbation: a DataFrame with a row a
            name, or a dict; `data.embeddings` reads them from files.
        vector_dose: what a dose is to these vectors: "name", a part of the name, so that each dose has a vector of its
            own; "append" or "product", a number: the table is of drugs without doses, and the drug's vector v becomes
            [v, s] or [s v, s] with s = log(1 + dose / dose_unit). Then any dose can be asked for.
        dose_unit: the dose, in the unit of the column, below which s is about proportional to it.
        pooling: of the vectors of a combination's parts, where it has none of its own: "mean", "sum". It is what cell
            sets (PerturbDiff) are given; scDFM embeds each part, and takes the mean of these in its slots.
        cell_type_vectors: the key of adata.uns that holds an external vector for each cell type, of the same form.
    """

    expression: str = "X"
    space: Space
    time: str | None = None
    cell_type: str | None = None
    batch: str | None = None
    perturbation: str | tuple[str, ...] | None = None
    control: str | tuple[str, ...] = (CONTROL, "ctrl")
    separator: str = "+"
    dose: str | tuple[str, ...] | None = None
    covariates: tuple[str, ...] = ()
    vectors: str | None = None
    vector_dose: VectorDose = "name"
    dose_unit: float = 1.0
    pooling: Pooling = "mean"
    cell_type_vectors: str | None = None

    def __post_init__(self):
        one_of("space", self.space, ("counts", "lognormalised", "latent"))
        place, _, name = self.expression.partition("/")
        if not (self.expression == "X" or (place in ("layers", "obsm") and name)):
            raise ValueError(f"expression must be 'X', 'layers/<name>' or 'obsm/<name>'; got {self.expression!r}.")
        if self.time is None and not self.perturbation and self.cell_type is None and self.batch is None:
            raise ValueError(
                "A DataSpec must name the obs column of time (a time series) or of perturbation; both are missing. "
                "Cells without either need cell_type or batch."
            )
        if self.cell_type_vectors is not None and self.cell_type is None:
            raise ValueError("cell_type_vectors belong to cell types, but cell_type=None names no column.")
        if self.perturbation is None:
            roles = ("dose", "vectors") if self.is_unperturbed else ("dose", "covariates", "vectors")
            given = [role for role in roles if getattr(self, role)]
            if given:
                raise ValueError(f"{', '.join(given)} belong to perturbations, but perturbation=None names no column.")
        one_of("vector_dose", self.vector_dose, get_args(VectorDose))
        one_of("pooling", self.pooling, get_args(Pooling))
        positive("dose_unit", self.dose_unit)
        if self.vector_dose != "name" and (self.dose is None or self.vectors is None):
            raise ValueError(
                f"vector_dose={self.vector_dose!r} joins doses to vectors: name the obs column of dose and the key of "
                f"vectors; got dose={self.dose!r}, vectors={self.vectors!r}."
            )
        if not self.separator.strip():
            raise ValueError(f"separator must be a visible sign between names; got {self.separator!r}.")
        if not self.control_names or any(not c.strip() or self.separator in c or "+" in c for c in self.control_names):
            raise ValueError(
                f"control must hold at least one name, without {self.separator!r} and '+'; got {self.control!r}."
            )
        if self.dose is not None and (
            isinstance(self.dose, str) != isinstance(self.perturbation, str)
            or len(as_columns(self.dose)) != len(as_columns(self.perturbation))
        ):
            raise ValueError(
                f"dose must name as many columns as perturbation; got dose={self.dose!r}, "
                f"perturbation={self.perturbation!r}."
            )

    @property
    def control_names(self) -> tuple[str, ...]:
        return (self.control,) if isinstance(self.control, str) else self.control

    @property
    def is_unperturbed(self) -> bool:
        """Neither times nor perturbations: all that is known of a cell is its type, its batch, its covariates."""
        return self.time is None and self.perturbation is None

    def check(
        self,
        adata: AnnData,
        *,
        min_times: int = 2,
        min_cells: int = 2,
        every_context: bool = True,
        every_role: bool = False,
    ) -> None:
        """Nothing, or one ValueError that lists every problem of `adata` under this spec, each with its mend.

        `min_times`: training needs two times, a prediction starts from one (whose cells may then be single).
        `min_cells`: training needs two cells of each population; a prediction, 0, looks for control cells only.
        `every_context`: each context needs control cells; without it some may lack them, and all cells may be controls.
        `every_role`: the batch and the vectors of cell types are needed too; else nobody looks at them.
        """
        if not all(hasattr(adata, part) for part in ("obs", "obs_names", "uns", "var_names")):
            raise ValueError(f"adata must be an AnnData; it is {type(adata).__name__}. Read a file by read_anndata.")
        problems = [
            *(() if len(adata.obs_names) else ("cells: adata holds none.",)),
            *(_time_problems(self, adata, min_times) if self.time is not None else ()),
            *_role_problems("cell_type", self.cell_type, adata),
            *(_role_problems("batch", self.batch, adata) if every_role else ()),
            *(_cell_type_vector_problems(self, adata) if every_role else ()),
            *(_perturbation_problems(self, adata, min_cells, every_context) if self.perturbation is not None else ()),
            *(_covariate_problems(self, adata) if self.is_unperturbed else ()),
            *_expression_problems(self, adata),
        ]
        if problems:
            listed = "\n".join(f"  {i}. {problem}" for i, problem in enumerate(problems, 1))
            count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
            raise ValueError(f"adata does not fit its DataSpec; {count}:\n{listed}")

    def read_times(self, adata: AnnData) -> Float[np.ndarray, " cells"]:
        """The time of each cell; NaN where the column holds no number. Raises ValueError for a missing column."""
        import pandas as pd

        if self.time is None:
            raise ValueError("time=None: this DataSpec names no obs column of times. Set it for a time series.")
        column("time", self.time, adata.obs)
        values = adata.obs[self.time]
        if isinstance(values.dtype, pd.CategoricalDtype):  # a cell without a category has the code -1
            return np.append(_numbers(pd.Series(values.cat.categories)), np.nan)[values.cat.codes.to_numpy()]
        return _numbers(values)

    def read_spellings(self, adata: AnnData) -> tuple[tuple[str, ...], ...]:
        """The conditions as the data write them, for splits that depend on it: names in the order of the data.

        A control is "control" whatever the data call it, and a single that stands alone counts as `A+control`.
        """
        cells = _read_cells(self, adata)
        return tuple(sorted({spelling for i, spelling in enumerate(cells.spellings) if cells.is_sound(i)}))

    def read_populations(self, adata: AnnData) -> tuple[tuple[Population, ...], Int[np.ndarray, " cells"]]:
        """The populations, sorted (controls first), and the index among them of each cell. Cells of an unperturbed
        spec are all of the perturbation (), in their contexts.

        Raises:
            ValueError: what `check` lists, the first of it.
        """
        cells = _read_cells(self, adata)
        if cells.incomplete:
            raise ValueError("Some cells have no value in a column of the perturbation or of the covariates.")
        for problem in (*cells.problems.values(), *cells.dose_problems.values()):
            raise ValueError(problem)
        of_kind = cells.populations
        populations = tuple(sorted(set(of_kind)))
        place = {population: i for i, population in enumerate(populations)}
        return populations, np.array([place[p] for p in of_kind], np.int64)[cells.kind]

    def read_controls(self, adata: AnnData) -> dict[str, Int[np.ndarray, " _"]]:
        """The rows of the control cells of each context, contexts sorted: all that a prediction needs of `adata`."""
        cells = _read_cells(self, adata, doses=False)
        found: dict[str, list[np.ndarray]] = {}
        for i, population in enumerate(cells.populations):
            if population.is_control and cells.is_sound(i):
                found.setdefault(population.context, []).append(np.flatnonzero(cells.kind == i))
        return {context: np.sort(np.concatenate(found[context])) for context in sorted(found)}

    def read_vectors(self, adata: AnnData) -> dict[str, Float[np.ndarray, " features"]]:
        """The external vectors by name, also of names that do not occur; {} where the spec names none. They are as
        they stand in the table: `vectors_of` gives what a model is told.

        Raises:
            ValueError: no such key, no table of numbers, unequal lengths, NaN.
        """
        if self.vectors is None:
            return {}
        return _vectors(self.vectors, _uns("vectors", self.vectors, adata), "perturbation")

    def read_cell_type_vectors(self, adata: AnnData) -> dict[str, Float[np.ndarray, " features"]]:
        """The external vectors of cell types by name; {} where the spec names none. Raises as `read_vectors`."""
        if self.cell_type_vectors is None:
            return {}
        return _vectors(self.cell_type_vectors, _uns("cell_type_vectors", self.cell_type_vectors, adata), "cell_type")

    def without_vectors(self) -> "DataSpec":
        """The same for cells of which nobody asks the vectors, as those of a run travel with its checkpoint."""
        return replace(self, vectors=None, vector_dose="name")

    def vectors_of(self, names: Iterable[str], table: Mapping[str, Any]) -> dict[str, Float[np.ndarray, " features"]]:
        """What a model is told of each of these names (parts of conditions, doses in them) of which `table` has the
        vector; the others are left out.
        """
        if self.vector_dose == "name":
            return {name: np.asarray(table[name]) for name in names if name in table}
        found = {}
        for name in names:
            drug, dose = dose_of(name)
            if dose is not None and drug in table:
                found[name] = dosed_vector(np.asarray(table[drug]), dose, self.vector_dose, self.dose_unit)
        return found

    def table_of(self, vectors: Mapping[str, Any]) -> dict[str, Float[np.ndarray, " features"]]:
        """The table that `vectors_of` made these from: of a drug at several doses the first counts."""
        if self.vector_dose == "name":
            return {name: np.asarray(vector) for name, vector in vectors.items()}
        found = {}
        for name, vector in vectors.items():
            drug, dose = dose_of(name)
            if dose is not None and "+" not in name and drug not in found:
                found[drug] = undosed_vector(np.asarray(vector), self.vector_dose)
        return found

    def control_vector(self, table: Mapping[str, Any]) -> Float[np.ndarray, " features"] | None:
        """The control's own in the table, if it has one; at a dose of zero, where doses are numbers."""
        given = next((np.asarray(table[name]) for name in self.control_names if name in table), None)
        return None if given is None else self.at_no_dose(given)

    def at_no_dose(self, vector: Float[np.ndarray, " features"]) -> Float[np.ndarray, " features1"]:
        """A vector of the table at a dose of zero, where doses are numbers; else as it is."""
        return vector if self.vector_dose == "name" else dosed_vector(vector, 0.0, self.vector_dose, self.dose_unit)

    def pooled(self, vectors: Iterable[Any]) -> Float[np.ndarray, " features"]:
        """The vector of a combination from those of its parts, in any order."""
        stacked = np.stack([np.asarray(vector) for vector in vectors])
        return stacked.mean(axis=0) if self.pooling == "mean" else stacked.sum(axis=0)

    def parse_condition(self, name: str) -> tuple[str, ...]:
        """The parts of a condition as a user writes it (`B+A`, `ctrl+A`, `JQ1@0.50`), as `Population` has them.

        "control" is the control here, whatever the data call it.

        Raises:
            ValueError: an empty part, a part twice; with doses, a part without one (`JQ1` is no condition then).
        """
        parts = canonical(name, self.separator, (*self.control_names, CONTROL))
        if self.dose is None:
            return parts
        dosed = []
        for part in parts:
            drug, dose = dose_of(part)
            if dose is None or dose <= 0:
                raise ValueError(f"{name!r}: {part!r} has no dose; write 'name@dose' with a positive number.")
            dosed.append(with_dose(drug, dose))
        return canonical_parts(dosed, self.control_names)


def expression_matrix(adata: AnnData, spec: DataSpec) -> Any:
    """The matrix, cells x features, as it lies in `adata`: a NumPy array, a SciPy sparse matrix, a DataFrame, or a
    `disk.DiskMatrix`.

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


def _numbers(values: Any) -> Float[np.ndarray, " n"]:
    """Of a Series; NaN where there is none."""
    import pandas as pd

    if not (pd.api.types.is_numeric_dtype(values) or pd.api.types.is_string_dtype(values)):
        return np.full(len(values), np.nan)  # dates and spans would turn into nanoseconds
    numbers: Any = pd.to_numeric(values, errors="coerce")
    return numbers.to_numpy(dtype=np.float64, na_value=np.nan)


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
            f"time: obs[{spec.time!r}] holds values that are not numbers ({listed(seen)}), which have no order and no "
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
            f"time: each time needs at least 2 cells; {listed([repr(t) for t in few])} of obs[{spec.time!r}] "
            f"{'has' if len(few) == 1 else 'have'} one. Remove such cells or merge the time with its neighbour."
        )


def _role_problems(role: str, key: str | None, adata: AnnData) -> Iterator[str]:
    if key is None:
        return
    try:
        column(role, key, adata.obs)
    except ValueError as err:
        yield str(err)
        return
    missing = int(adata.obs[key].isna().sum())
    if missing:
        yield (
            f"{role}: {missing} cells have no value in obs[{key!r}]. Remove them or give them a name, "
            f"such as 'unknown'."
        )


def _covariate_problems(spec: DataSpec, adata: AnnData) -> Iterator[str]:
    for key in spec.covariates:
        if key not in (spec.cell_type, spec.batch):
            yield from _role_problems("covariates", key, adata)


def _cell_type_vector_problems(spec: DataSpec, adata: AnnData) -> Iterator[str]:
    try:
        vectors = spec.read_cell_type_vectors(adata)
    except ValueError as err:
        yield str(err)
        return
    if spec.cell_type_vectors is None or spec.cell_type not in adata.obs:
        return
    lacking = sorted(set(map(str, adata.obs[spec.cell_type].dropna())) - set(vectors))
    if lacking:
        yield (
            f"cell_type_vectors: adata.uns[{spec.cell_type_vectors!r}] has none for {len(lacking)} cell types "
            f"({listed([repr(name) for name in lacking])}).{suggestion(lacking[0], vectors)} Add them or remove "
            f"these cells."
        )


def _read_cells(spec: DataSpec, adata: AnnData, *, doses: bool = True) -> CellKinds:
    """Raises ValueError for a missing column."""
    if spec.perturbation is None and not spec.is_unperturbed:
        raise ValueError("perturbation=None: this DataSpec names no obs column of perturbations.")
    if spec.perturbation is None and not spec.covariates:
        return CellKinds(np.zeros(len(adata.obs), np.int64), [Population(())], [(CONTROL,)], set(), {}, {})
    return read_kinds(
        adata.obs,
        () if spec.perturbation is None else spec.perturbation,
        spec.dose if doses else None,
        spec.covariates,
        separator=spec.separator,
        control=spec.control_names,
    )


def _perturbation_problems(spec: DataSpec, adata: AnnData, min_cells: int, every_context: bool) -> Iterator[str]:
    roles = {"perturbation": as_columns(spec.perturbation), "covariates": spec.covariates}
    if min_cells > 0:
        roles["dose"] = as_columns(spec.dose)
    missing = [problem for role, keys in roles.items() for key in keys for problem in _missing_column(role, key, adata)]
    if missing:
        yield from missing
        return
    for role in ("perturbation", "covariates"):
        for key in roles[role]:
            gone = adata.obs[key].isna().to_numpy()
            if gone.any():
                yield (
                    f"{role}: {int(gone.sum())} of {len(gone)} cells have no value in obs[{key!r}], the first is "
                    f"{str(adata.obs_names[int(np.argmax(gone))])!r}. Remove these cells or give them a name"
                    f"{f', the control its own ({spec.control_names[0]!r})' if role == 'perturbation' else ''}."
                )
    cells = _read_cells(spec, adata, doses=min_cells > 0)
    n_cells = np.bincount(cells.kind, minlength=len(cells.populations))
    for found in (cells.problems, cells.dose_problems):
        told: Counter[str] = Counter()
        for i, problem in found.items():
            told[problem] += int(n_cells[i])
        most = 5  # a separator that is not the data's makes one message a name
        for problem, n in told.most_common(most):
            yield f"{problem} ({n} cells.)"
        if len(told) > most:
            yield f"{next(iter(told)).partition(':')[0]}: {len(told) - most} more such names."
    counted: Counter[Population] = Counter()
    for i, population in enumerate(cells.populations):
        if cells.is_sound(i):
            counted[population] += int(n_cells[i])
    yield from _population_problems(spec, counted, min_cells, every_context)
    if min_cells > 0:
        yield from _vector_problems(spec, adata, {part for p in counted for part in p.perturbation})


def _missing_column(role: str, key: str, adata: AnnData) -> Iterator[str]:
    try:
        column(role, key, adata.obs)
    except ValueError as err:
        yield str(err)


def _population_problems(
    spec: DataSpec, counted: Counter[Population], min_cells: int, every_context: bool
) -> Iterator[str]:
    place = f"obs[{as_columns(spec.perturbation)[0]!r}]"
    control = ", ".join(map(repr, spec.control_names))
    controlled = {p.context for p in counted if p.is_control}
    if counted and not controlled:
        names: Counter[str] = Counter()
        for population, n in counted.items():
            names.update(dict.fromkeys(population.perturbation, n))
        yield (
            f"control: no cell of {place} is a control ({control}). Set control to the name of yours; the commonest "
            f"names are {listed([repr(name) for name, _ in names.most_common(5)])}."
        )
    if min_cells == 0:
        return
    if every_context and counted and all(p.is_control for p in counted):
        yield f"perturbation: every cell of {place} is a control ({control}); there is no perturbation to learn."
    if controlled and every_context:
        alone = sorted({p.context for p in counted} - controlled)
        if alone:
            yield (
                f"covariates: {len(alone)} of the combinations of {', '.join(spec.covariates)} have perturbed cells "
                f"and no controls ({listed([repr(context) for context in alone])}). Remove these cells, or match "
                f"controls within fewer covariates."
            )
    few = sorted(p for p, n in counted.items() if n < min_cells)
    if few:
        yield (
            f"perturbation: each population needs at least {min_cells} cells; {len(few)} have fewer "
            f"({listed(list(map(str, few)))}). Remove these cells"
            f"{', or match controls within fewer covariates' if spec.covariates else ''}."
        )


def _vector_problems(spec: DataSpec, adata: AnnData, names: Iterable[str]) -> Iterator[str]:
    try:
        vectors = spec.read_vectors(adata)
    except ValueError as err:
        yield str(err)
        return
    lacking = set(names) - set(spec.vectors_of(names, vectors))
    if spec.vector_dose != "name":
        lacking = {dose_of(name)[0] for name in lacking}
    lacking = sorted(lacking)
    if spec.vectors is not None and lacking:
        yield (
            f"vectors: adata.uns[{spec.vectors!r}] has none for {len(lacking)} perturbations "
            f"({listed([repr(name) for name in lacking])}).{suggestion(lacking[0], vectors)} Add them or remove "
            f"these cells."
        )


def _uns(role: str, key: str, adata: AnnData) -> Any:
    if key not in adata.uns:
        known = [str(k) for k in adata.uns]
        raise ValueError(
            f"{role} names a key of adata.uns; {key!r} is not one.{suggestion(key, known)} "
            f"It has: {', '.join(known) or 'none'}."
        )
    return adata.uns[key]


def _vectors(key: str, table: Any, of: str) -> dict[str, np.ndarray]:
    role = "vectors" if of == "perturbation" else "cell_type_vectors"
    if hasattr(table, "columns"):
        table = dict(zip(map(str, table.index), table.to_numpy(), strict=True))
    if not isinstance(table, Mapping):
        raise ValueError(
            f"{role}: adata.uns[{key!r}] must be a DataFrame with a row a {of} or a dict of vectors; it is "
            f"{type(table).__name__}."
        )
    vectors = {}
    for name, values in table.items():
        try:
            vectors[str(name)] = np.asarray(values, np.float64)
        except (TypeError, ValueError) as err:
            raise ValueError(f"{role}: adata.uns[{key!r}] has no numbers for {name!r}.") from err
    widths = Counter(v.shape for v in vectors.values())
    usual = widths.most_common(1)[0][0] if widths else ()
    for name, vector in vectors.items():
        if len(usual) != 1 or usual[0] == 0 or vector.shape != usual:
            raise ValueError(
                f"{role}: adata.uns[{key!r}] must hold vectors of one length; that of {name!r} has shape "
                f"{vector.shape}, most have {usual}."
            )
        if not np.isfinite(vector).all():
            raise ValueError(f"{role}: adata.uns[{key!r}] holds NaN or infinite values for {name!r}. Fill them.")
    return vectors


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
            f"features: {len(repeated)} names occur more than once ({listed(repeated)}). "
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
                if self.largest <= LARGEST_LOG
                else "Name the layer that holds counts, or round estimated counts to integers."
            )
            yield (
                f"{place} holds {self.n_fractions} values that are not integers, such as {self.first_fraction:g} "
                f"(largest {self.largest:g}), but space='counts'. {mend}"
            )
        if spec.space == "lognormalised" and not self.n_bad and self.largest > LARGEST_LOG:
            kind = "normalised without log: apply log1p"
            if not self.n_fractions:
                kind = "counts: log-normalise them, or set space='counts', library_size='all_genes' and log1p=True"
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
        ValueError: no array, sparse matrix or `disk.DiskMatrix`, or not numbers. The message follows a name.
    """
    from scipy import sparse

    if hasattr(matrix, "columns"):  # a DataFrame in obsm
        matrix = matrix.to_numpy()
    if not (sparse.issparse(matrix) or isinstance(matrix, np.ndarray | DiskMatrix)):
        raise ValueError(
            f"is no array in memory but {type(matrix).__name__}. Call adata.to_memory(), or read the file with "
            "read_anndata(path, backed=True)."
        )
    # Of sparse matrices in memory; what lies on disk is looked at when it is read.
    look: Any = getattr(matrix, "check_format", None)
    if look is not None:
        try:
            look(full_check=True)
        except ValueError as err:
            raise ValueError(f"is no sound sparse matrix ({err}). Make it anew.") from err
    matrix = as_sliceable(matrix)
    if matrix.ndim != 2 or matrix.dtype.kind not in "buif":
        raise ValueError(f"must be a matrix of numbers; it has shape {matrix.shape} and dtype {matrix.dtype}.")

    def chunks() -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        step = cells_at_once(matrix.shape[1])
        for start in range(0, matrix.shape[0], step):
            part = matrix[start : start + step]
            if sparse.issparse(part):
                yield start, part.data, np.asarray((part != 0).sum(axis=1)).ravel()
            else:
                yield start, part.ravel(), np.count_nonzero(part, axis=1)

    return chunks()
