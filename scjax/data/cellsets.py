"""Cells as sets of populations: all cells in the model's space, ids of what is known about them, controls."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from jaxtyping import Bool, Float, Int

from scjax.check import at_least, one_of, suggestion
from scjax.data.conditions import CONTROL, JOIN_CONTEXT, dose_of
from scjax.data.expression import ModelCells, check_steps, fit_expression, transformed
from scjax.data.preprocess import Preprocess, Transform
from scjax.data.sampling import CovariateRole
from scjax.data.source import SOURCE, Absent, as_joined, join
from scjax.data.spec import AnnData, DataSpec, feature_names
from scjax.data.splits import (
    HoldOutContexts,
    HoldOutCrossed,
    PerturbationSplit,
    PerturbationSplitRule,
    split_populations,
)
from scjax.types import Population

__all__ = [
    "CellSetData",
    "ControlCells",
    "ControlPools",
    "CovariateNames",
    "Part",
    "Unmatched",
    "part_of_cells",
    "prepare_cell_sets",
    "read_control_cells",
]

Part: TypeAlias = Literal["train", "validation", "test"]
Unmatched: TypeAlias = Literal["fallback", "error"]

_ROLES: tuple[CovariateRole, ...] = ("perturbation", "cell_type", "batch")
_SHARED = 3  # the part of a control cell that all parts may use


@dataclass(frozen=True, kw_only=True)
class CovariateNames:
    """What the ids of the covariates mean: the place of a name is its id. JSON through `scjax.config`.

    Attributes:
        perturbation: conditions as `Population.condition` writes them (`A+B`, `JQ1@0.5`), sorted, "control" first.
        cell_type, batch: sorted; () where the data name no column.
        dose: the distinct doses, increasing, 0 for the control first; () without doses.
        sources: of joined data, whose ids are gene spaces; ("",) for one.
        covariates: the obs columns whose values make a context, in their order.
        cell_type_column, batch_column: the obs columns of these roles.
    """

    perturbation: tuple[str, ...]
    cell_type: tuple[str, ...] = ()
    batch: tuple[str, ...] = ()
    dose: tuple[float, ...] = ()
    sources: tuple[str, ...] = ("",)
    covariates: tuple[str, ...] = ()
    cell_type_column: str | None = None
    batch_column: str | None = None

    def ids_of(self, population: Population) -> dict[str, int]:
        """The ids of a population: its perturbation and dose, and the cell type and batch where its context tells them.

        Raises:
            ValueError: a condition, a cell type or a batch that the data did not have, a context of other covariates.
        """
        ids = {"perturbation": self.id_of("perturbation", population.condition)}
        if self.dose:
            ids["dose"] = self.dose_rank(population)
        values = population.context.split(JOIN_CONTEXT) if population.context else []
        if len(values) != len(self.covariates):
            raise ValueError(
                f"The context {population.context!r} must hold a value for each of {len(self.covariates)} covariates "
                f"({', '.join(self.covariates) or 'none'}), joined by {JOIN_CONTEXT!r}."
            )
        of_column = dict(zip(self.covariates, values, strict=True))
        for role, key in (("cell_type", self.cell_type_column), ("batch", self.batch_column)):
            if key in of_column:
                ids[role] = self.id_of(role, of_column[key])
        return ids

    def id_of(self, role: str, name: str) -> int:
        """The id of a name in this role ("perturbation", "cell_type", "batch", "sources")."""
        known = getattr(self, role)
        if name not in known:
            raise ValueError(
                f"{role} {name!r} is not among the {len(known)} of the data.{suggestion(name, known)} "
                f"There are: {', '.join(map(repr, known[:8]))}{', ...' if len(known) > 8 else ''}."
            )
        return known.index(name)

    def dose_rank(self, population: Population) -> int:
        """The place of the population's dose among the doses of the data, 0 for the control."""
        doses = _doses(population) or {0.0}
        if len(doses) > 1:
            raise ValueError(f"{str(population)!r} has several doses, {sorted(doses)}; a set has one dose.")
        (dose,) = doses
        if dose not in self.dose:
            raise ValueError(f"The dose {dose:g} is not among those of the data, which are {self.dose}.")
        return self.dose.index(dose)


class ControlPools:
    """For each cell, the cells that may be its control. Drawing is uniform over the sub-pools, then over their cells.

    A cell with controls of its own context has one sub-pool; under the fall-back there is one for each cell type of the
    batch, or for each batch of the cell type.
    """

    def __init__(self, pool_of: np.ndarray, pools: Sequence[Sequence[np.ndarray]]):
        subpools = [rows for pool in pools for rows in pool]
        self.pool_of = pool_of  # int[cells]
        self._count = np.array([len(pool) for pool in pools], np.int64)
        self._first = np.cumsum(self._count) - self._count
        self._size = np.array([len(rows) for rows in subpools], np.int64)
        self._start = np.cumsum(self._size) - self._size
        self._rows = np.concatenate([*subpools, np.zeros(0, np.int64)]).astype(np.int64)
        # Where a control cell stands in its own pool, which has one sub-pool.
        self._place = np.full(len(pool_of), -1, np.int64)
        for pool, rows in enumerate(pools):
            if len(rows) == 1:
                own = pool_of[rows[0]] == pool
                self._place[rows[0][own]] = np.flatnonzero(own)

    def pool(self, cell: int) -> tuple[Int[np.ndarray, " _"], ...]:
        """The sub-pools of one cell, rows of controls."""
        pool = self.pool_of[cell]
        parts = range(self._first[pool], self._first[pool] + self._count[pool])
        return tuple(self._rows[self._start[i] : self._start[i] + self._size[i]] for i in parts)

    def draw(self, rng: np.random.Generator, rows: Int[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
        """The row of a control for each of these cells, independently, with replacement.

        A control cell is never its own control where its pool has another.
        """
        pool = self.pool_of[rows]
        which, where = rng.random((2, *rows.shape))
        sub = self._first[pool] + (which * self._count[pool]).astype(np.int64)
        own, size = self._place[rows], self._size[sub]
        excluded = (own >= 0) & (size > 1)
        place = (where * (size - excluded)).astype(np.int64)
        place += excluded & (place >= own)
        return self._rows[self._start[sub] + place]


@dataclass(frozen=True, kw_only=True, eq=False)
class CellSetData:
    """Every cell, held-out ones included, and what is known about it.

    Attributes:
        x: float32[cells, genes], the kept genes, log-normalised; row i is cell i of the AnnData, or of the joined ones.
            In memory, or read from disk as they are indexed.
        covariates: int32[cells] by role: "perturbation" (0 is the control), and "cell_type", "batch", "dose" (rank)
            where the spec names them.
        names: of these ids.
        populations, rows, split, transform: as in `PerturbationData`.
        source: int32[cells], the source that a cell is from; its gene space.
        measured: bool[sources, genes], the kept genes that each source measured.
        part: int8[cells], 0 train, 1 validation, 2 test; 3 are controls that all parts may use (none where whole
            contexts are held out, or where controls are divided).
        pools: of controls; None without perturbations.
        unmatched: how many perturbed cells have no control of their own context, by what stands in: "same batch" (of
            another cell type), "same cell type" (of another batch).
        vectors: float32[perturbations, features], external vectors in the order of `names.perturbation`: that of the
            condition, else those of its parts, pooled; the control's is the mean of all others unless given.
        cell_type_vectors: float32[cell types, features], in the order of `names.cell_type`.
    """

    x: ModelCells
    covariates: dict[str, Int[np.ndarray, " cells"]]
    names: CovariateNames
    populations: tuple[Population, ...]
    rows: tuple[Int[np.ndarray, " _"], ...]
    split: PerturbationSplit
    transform: Transform
    source: Int[np.ndarray, " cells"]
    measured: Bool[np.ndarray, "sources genes"]
    part: Int[np.ndarray, " cells"]
    pools: ControlPools | None
    unmatched: dict[str, int]
    vectors: Float[np.ndarray, "perturbations features"] | None = None
    cell_type_vectors: Float[np.ndarray, "cell_types features2"] | None = None

    @cached_property
    def _rows_of(self) -> dict[Population, np.ndarray]:  # a screen has a hundred thousand populations
        return dict(zip(self.populations, self.rows, strict=True))

    @property
    def n_cells(self) -> int:
        return self.x.shape[0]

    @property
    def n_genes(self) -> int:
        return self.x.shape[1]

    @property
    def sizes(self) -> dict[str, int | None]:
        """What the data decide about a model, by the names of its config; None where the data lack the role."""
        names, vectors, type_vectors = self.names, self.vectors, self.cell_type_vectors
        return {
            "n_genes": self.n_genes,
            "n_perturbations": len(names.perturbation),
            "n_cell_types": len(names.cell_type) or None,
            "n_batches": len(names.batch) or None,
            "n_doses": len(names.dose) or None,
            "n_spaces": len(names.sources),
            "n_perturbation_features": None if vectors is None else vectors.shape[1],
            "n_cell_type_features": None if type_vectors is None else type_vectors.shape[1],
        }

    @property
    def is_control(self) -> Bool[np.ndarray, " cells"]:
        """Of each cell. False throughout where the data have no perturbations."""
        if self.pools is None:
            return np.zeros(self.n_cells, bool)
        return self.covariates["perturbation"] == 0

    def rows_of(self, population: Population) -> Int[np.ndarray, " n"]:
        if population not in self._rows_of:
            raise ValueError(
                f"population must be one of the data; {str(population)!r} is not."
                f"{suggestion(population, self.populations)}"
            )
        return self._rows_of[population]

    def cells(self, population: Population) -> Float[np.ndarray, "n genes"]:
        """All cells of this population."""
        return self.x[self.rows_of(population)]

    def controls(self, context: str = "") -> Float[np.ndarray, "n genes"]:
        """All control cells of this context."""
        return self.cells(Population((), context))

    def ids_of(self, population: Population) -> dict[str, int]:
        """See `CovariateNames.ids_of`."""
        return self.names.ids_of(population)

    def part_rows(self, part: Part) -> Int[np.ndarray, " n"]:
        """The cells of a part: perturbed ones, then controls, each increasing; shared controls are in every part."""
        one_of("part", part, get_args(Part))
        number = get_args(Part).index(part)
        control = self.is_control
        own = np.flatnonzero((self.part == number) & ~control)
        return np.concatenate([own, np.flatnonzero(control & np.isin(self.part, (number, _SHARED)))])

    def target_rows(
        self, populations: Iterable[Population] | None = None, *, include_control: bool = False
    ) -> Int[np.ndarray, " n"]:
        """The cells of these populations, increasing; None takes those of training.

        Control cells are among them where `include_control`, and then those that the parts of the perturbed populations
        may use (those of training, where no perturbed one is given).
        """
        given = self.split.train if populations is None else tuple(populations)
        rows = np.sort(np.concatenate([np.zeros(0, np.int64), *map(self.rows_of, given)]))
        control = self.is_control[rows]
        if not include_control:
            return rows[~control]
        parts = set(self.part[rows[~control]].tolist()) or {0}
        return rows[~control | np.isin(self.part[rows], [*parts, _SHARED])]

    def groups(
        self, rows: Int[np.ndarray, " n"], by: tuple[CovariateRole, ...] | None = None
    ) -> tuple[Int[np.ndarray, " _"], ...]:
        """These cells by their covariates, the sets' groups, in the order of ids; sources are never mixed.

        Raises:
            ValueError: a role that the data lack.
        """
        roles = tuple(role for role in _ROLES if role in self.covariates) if by is None else by
        for role in roles:
            if role not in self.covariates:
                raise ValueError(f"group_by names {role!r}, but the DataSpec names no obs column for it. Leave it out.")
        return tuple(_by_key(np.sort(rows), self.source, *(self.covariates[role] for role in roles)).values())


def prepare_cell_sets(
    adata: AnnData | Sequence[tuple[str, AnnData]],
    spec: DataSpec,
    rule: PerturbationSplitRule,
    preprocess: Preprocess,
    *,
    absent: Absent = "error",
    unmatched: Unmatched = "fallback",
    control_seed: int | None = None,
    store: str | Path | None = None,
) -> CellSetData:
    """Check, split by `rule`, fit `preprocess` on the training cells, transform every cell, find every cell's controls.

    Args:
        adata: one, or several with their names, see `source.join`.
        preprocess: without scaling and PCA: the models work on expression itself.
        absent: what to do about genes that not all sources have, see `source.join`.
        unmatched: perturbed cells whose context (`spec.covariates`) has no control cell: "fallback" takes control cells
            of other cell types in the same batch, each type as likely, else of the same cell type in other batches,
            each batch as likely, as the PerturbDiff code does; it warns, with numbers. "error" refuses.
        control_seed: None lets all parts use all controls, as the code does by default: those of a held-out context are
            then seen in training. A seed divides the controls of each held-out context between the parts, in proportion
            to its cells; 42 gives the code's division.
        store: a folder of these data's own that keeps the transformed cells on disk, see `data.store`; None: memory.

    Raises:
        ValueError: all that `spec.check`, `join`, `split_populations` and `preprocess.fit` find; a scaling or a PCA;
            cells without any possible control.
    """
    check_steps(preprocess, "cell set models")
    one_of("unmatched", unmatched, get_args(Unmatched))
    if control_seed is not None:
        at_least("control_seed", control_seed, 0)
    if spec.time is not None and spec.perturbation is None:
        raise ValueError(f"time={spec.time!r} makes a time series; cell sets need perturbation, cell_type or batch.")
    sources, measured = ("",), None
    if isinstance(adata, Sequence):
        adata, sources, measured = join(adata, spec, absent=absent)
    spec.check(adata, min_cells=1, every_context=False, every_role=True)

    populations, population_of = spec.read_populations(adata)
    perturbed = spec.perturbation is not None and not all(p.is_control for p in populations)
    split = split_populations(
        rule,
        populations,
        spec.covariates,
        written=spec.read_spellings(adata) if perturbed else (),
        perturbed=perturbed,
    )
    source_of = np.zeros(adata.n_obs, np.int32)  # pyright: ignore[reportAttributeAccessIssue]
    if measured is not None:
        source_of = np.array([sources.index(name) for name in adata.obs[SOURCE]], np.int32)  # pyright: ignore[reportAttributeAccessIssue]
    names, covariates = _covariates(adata, spec, populations, population_of, sources)
    part = part_of_cells(split, populations, population_of, spec, control_seed)

    train_rows = np.flatnonzero(np.isin(part, (0, _SHARED)))
    transform, x = fit_expression(adata, spec, preprocess, train_rows, store=store)
    kept = {name: i for i, name in enumerate(feature_names(adata, spec))}
    columns = [kept[name] for name in transform.feature_names]

    pools, counts = None, {}
    if spec.perturbation is not None:
        pools, counts = _pools(covariates, population_of, populations, source_of, part, spec, unmatched)
    return CellSetData(
        x=x,
        covariates=covariates,
        names=names,
        populations=populations,
        rows=tuple(_by_key(np.arange(len(part)), population_of).values()),
        split=split,
        transform=transform,
        source=source_of,
        measured=np.ones((1, len(columns)), bool) if measured is None else measured[:, columns],
        part=part,
        pools=pools,
        unmatched=counts,
        vectors=_perturbation_vectors(spec, adata, names.perturbation),
        cell_type_vectors=_cell_type_vectors(spec, adata, names.cell_type),
    )


class ControlCells(NamedTuple):
    """The control cells of one context, for predictions.

    Attributes:
        x: in the model's space; of cells on disk, when they are asked for.
        names: of the cells.
        covariates: int32[cells] of the roles that the context does not tell, from the cells themselves: a generated
            cell is of the batch of the control cell that it is given.
    """

    x: ModelCells
    names: np.ndarray
    covariates: dict[str, Int[np.ndarray, " cells"]]


def read_control_cells(
    adata: AnnData,
    spec: DataSpec,
    transform: Transform,
    names: CovariateNames,
    contexts: Sequence[str] | None = None,
    *,
    source: str = "",
    measured: Bool[np.ndarray, " genes"] | None = None,
) -> dict[str, ControlCells]:
    """The control cells of `adata` by context, transformed as in training; no other cell is looked at.

    Args:
        contexts: all that have control cells unless given.
        source: where training joined several, the name of the one that `adata` belongs to; its name is then put in
            front of the batches, as in `source.join`.
        measured: the kept genes that this source measured in training (`CellSetData.measured`). Others may be missing
            in `adata` and are 0 then; so are genes that only add to the totals of counts. None: all genes are needed.

    Raises:
        ValueError: no control cells, a context without any, missing genes, bad values, an unknown source, batch or cell
            type.
    """
    if spec.is_unperturbed:
        raise ValueError("The DataSpec names no perturbation: its data have no controls, and no prediction needs any.")
    names.id_of("sources", source)
    if source:
        own_genes = feature_names(adata, spec)
        needed = transform.input_names
        if measured is not None:
            needed = [name for name, known in zip(transform.feature_names, measured, strict=True) if known]
        lacking = sorted(set(needed) - set(own_genes))
        if lacking:
            raise ValueError(
                f"adata lacks {len(lacking)} of the {len(needed)} genes that {source!r} had in training: "
                f"{', '.join(lacking[:5])}{', ...' if len(lacking) > 5 else ''}."
            )
        adata = as_joined(source, adata, spec, transform.input_names, prefix=len(names.sources) > 1)
    rows = spec.read_controls(adata)
    if not rows:
        raise ValueError(
            f"adata must hold control cells, for predictions are given them; none has "
            f"{' or '.join(map(repr, spec.control_names))} in obs[{spec.perturbation!r}]."
        )
    wanted = list(rows) if contexts is None else list(contexts)
    for context in wanted:
        if context not in rows:
            raise ValueError(
                f"contexts must have control cells in adata; {context!r} has none."
                f"{suggestion(context, rows)} There are: {', '.join(map(repr, rows))}."
            )
    found = {}
    for context in wanted:
        told = names.ids_of(Population((), context))
        cells = adata[rows[context]]
        spec.check(cells, min_cells=0, every_context=False)
        own = {
            role: np.array([names.id_of(role, str(value)) for value in cells.obs[key]], np.int32)
            for role, key in (("cell_type", spec.cell_type), ("batch", spec.batch))
            if key is not None and role not in told
        }
        found[context] = ControlCells(transformed(cells, spec, transform), cells.obs_names.to_numpy(), own)
    return found


def _covariates(
    adata: AnnData,
    spec: DataSpec,
    populations: tuple[Population, ...],
    population_of: np.ndarray,
    sources: tuple[str, ...],
) -> tuple[CovariateNames, dict[str, np.ndarray]]:
    conditions = (CONTROL, *sorted({p.condition for p in populations if not p.is_control}))
    place = {name: i for i, name in enumerate(conditions)}
    covariates = {"perturbation": np.array([place[p.condition] for p in populations])[population_of].astype(np.int32)}
    found: dict[str, tuple[str, ...]] = {"cell_type": (), "batch": ()}
    for role, key in (("cell_type", spec.cell_type), ("batch", spec.batch)):
        if key is not None:
            values, ids = np.unique(adata.obs[key].astype(str).to_numpy(dtype=object), return_inverse=True)
            found[role], covariates[role] = tuple(map(str, values)), ids.astype(np.int32)
    names = CovariateNames(
        perturbation=conditions,
        cell_type=found["cell_type"],
        batch=found["batch"],
        dose=() if spec.dose is None else tuple(sorted({0.0}.union(*map(_doses, populations)))),
        sources=sources,
        covariates=spec.covariates,
        cell_type_column=spec.cell_type,
        batch_column=spec.batch,
    )
    if names.dose:
        ranks = [names.dose_rank(p) for p in populations]
        covariates["dose"] = np.array(ranks, np.int32)[population_of]
    return names, covariates


def _doses(population: Population) -> set[float]:
    return {dose for _, dose in map(dose_of, population.perturbation) if dose is not None}


def part_of_cells(
    split: PerturbationSplit,
    populations: tuple[Population, ...],
    population_of: Int[np.ndarray, " cells"],
    spec: DataSpec,
    control_seed: int | None = None,
) -> Int[np.ndarray, " cells"]:
    """int8, the part of each cell as `CellSetData` has it; `control_seed` as for `prepare_cell_sets`."""
    # Nothing is left of a context that is held out.
    shared = spec.perturbation is not None and not isinstance(split.rule, HoldOutContexts)
    number = {p: i for i, part in enumerate(get_args(Part)) for p in getattr(split, part)}
    of_population = [_SHARED if shared and p.is_control else number[p] for p in populations]
    part = np.array(of_population, np.int8)[population_of]
    if control_seed is None:
        return part
    return _divided(part, split, populations, population_of, spec.covariates, control_seed)


def _divided(
    part: np.ndarray,
    split: PerturbationSplit,
    populations: tuple[Population, ...],
    population_of: np.ndarray,
    covariates: tuple[str, ...],
    seed: int,
) -> np.ndarray:
    """The shared controls dealt out. Those of a context of which nothing is held out are for training alone."""
    part = part.copy()
    shared = part == _SHARED
    rule = split.rule
    if isinstance(rule, HoldOutCrossed):  # as in the code: by donor, or by cell line
        places = [covariates.index(name) for name in rule.covariates]
        unit_of = [tuple(p.context.split(JOIN_CONTEXT)[i] for i in places) for p in populations]
    else:
        unit_of = [(p.context,) for p in populations]
    place = {unit: i for i, unit in enumerate(dict.fromkeys(unit_of))}
    of_cell = np.array([place[unit] for unit in unit_of])[population_of]
    for here in _by_key(np.arange(len(part)), of_cell).values():
        controls = here[shared[here]]
        n = {number: int((part[here] == number).sum()) for number in (1, 2)}
        np.random.default_rng(seed).shuffle(controls)
        n_validation, n_test = (len(controls) * n[number] // len(here) for number in (1, 2))
        part[controls] = 0
        part[controls[:n_validation]] = 1
        part[controls[n_validation : n_validation + n_test]] = 2
    return part


def _pools(
    covariates: dict[str, np.ndarray],
    population_of: np.ndarray,
    populations: tuple[Population, ...],
    source_of: np.ndarray,
    part: np.ndarray,
    spec: DataSpec,
    unmatched: Unmatched,
) -> tuple[ControlPools, dict[str, int]]:
    contexts = sorted({p.context for p in populations})
    place = {context: i for i, context in enumerate(contexts)}
    context_of = np.array([place[p.context] for p in populations])[population_of]
    is_control = covariates["perturbation"] == 0
    cell_type, batch = (covariates.get(role, np.zeros_like(source_of)) for role in ("cell_type", "batch"))
    pool_of, pools, n_cells = np.full(len(part), -1, np.int64), [], {"same batch": 0, "same cell type": 0}
    lone: set[int] = set()
    none: dict[int, int] = {}
    for number in range(3):
        controls = np.flatnonzero(is_control & np.isin(part, (number, _SHARED)))
        targets = np.flatnonzero(part % _SHARED == number)
        own = _by_key(controls, source_of, context_of)
        for (of_source, context), rows in _by_key(targets, source_of, context_of).items():
            if (of_source, context) in own:
                pool_of[rows] = len(pools)
                pools.append([own[of_source, context]])
                continue
            lone.add(context)
            nearby = controls[source_of[controls] == of_source]
            for (of_type, of_batch), some in _by_key(rows, cell_type, batch).items():
                stand_ins: dict[tuple[int, ...], np.ndarray] = {}
                if spec.batch is not None:
                    stand_ins, kind = _by_key(nearby[batch[nearby] == of_batch], cell_type), "same batch"
                if not stand_ins and spec.cell_type is not None:
                    stand_ins, kind = _by_key(nearby[cell_type[nearby] == of_type], batch), "same cell type"
                if not stand_ins:
                    none[context] = none.get(context, 0) + len(some)
                    continue
                pool_of[some] = len(pools)
                pools.append(list(stand_ins.values()))
                n_cells[kind] += len(some)
    _report_unmatched(n_cells, none, [contexts[i] for i in sorted(lone)], int((~is_control).sum()), spec, unmatched)
    return ControlPools(pool_of, pools), {kind: n for kind, n in n_cells.items() if n}


def _by_key(rows: np.ndarray, *keys: np.ndarray) -> dict[tuple[int, ...], np.ndarray]:
    """The rows that agree in these keys, in their order; the keys, which are not negative, in theirs."""
    if not len(rows):
        return {}
    shape = tuple(int(key[rows].max()) + 1 for key in keys)
    codes = np.ravel_multi_index([key[rows] for key in keys], shape)
    found, n = np.unique(codes, return_counts=True)
    parts = np.split(rows[np.argsort(codes, kind="stable")], np.cumsum(n)[:-1])
    values = zip(*(axis.tolist() for axis in np.unravel_index(found, shape)), strict=True)
    return dict(zip(values, parts, strict=True))


def _report_unmatched(
    n_cells: dict[str, int],
    none: dict[int, int],
    lone: list[str],
    n_perturbed: int,
    spec: DataSpec,
    unmatched: Unmatched,
) -> None:
    if not lone:
        return
    n = sum(n_cells.values()) + sum(none.values())
    listed = ", ".join(map(repr, lone[:5])) + (", ..." if len(lone) > 5 else "")
    told = (
        f"{n} of {n_perturbed} perturbed cells have no control of their own "
        f"{' and '.join(spec.covariates) or 'source'} in their part of the data ({len(lone)} contexts: {listed})"
    )
    if none:
        raise ValueError(
            f"covariates: {told}; for {sum(none.values())} of them there is none of the same batch or cell type. "
            f"Remove these cells, or match controls within fewer covariates."
        )
    if unmatched == "error":
        raise ValueError(
            f"covariates: {told}. Remove these cells, match controls within fewer covariates, or take others' controls "
            f"with unmatched='fallback'."
        )
    kinds = {
        "same batch": "other cell types of the same batch",
        "same cell type": "the same cell type in other batches",
    }
    stand_ins = " and ".join(f"those of {kinds[kind]} for {n}" for kind, n in n_cells.items() if n)
    warnings.warn(f"{told}. Controls stand in: {stand_ins}.", UserWarning, stacklevel=4)


def _perturbation_vectors(spec: DataSpec, adata: AnnData, conditions: tuple[str, ...]) -> np.ndarray | None:
    table = spec.read_vectors(adata)
    if not table:
        return None
    perturbed = [name for name in conditions if name != CONTROL]
    vectors = spec.vectors_of(perturbed, table) if spec.vector_dose == "name" else {}
    parts = spec.vectors_of({part for name in perturbed for part in name.split("+")}, table)
    vectors |= {name: spec.pooled([parts[p] for p in name.split("+")]) for name in perturbed if name not in vectors}
    control = spec.control_vector(table)
    if control is None:
        control = np.mean([*(vectors.values() or map(spec.at_no_dose, table.values()))], axis=0)
    vectors[CONTROL] = control
    return np.stack([vectors[name] for name in conditions]).astype(np.float32)


def _cell_type_vectors(spec: DataSpec, adata: AnnData, cell_types: tuple[str, ...]) -> np.ndarray | None:
    vectors = spec.read_cell_type_vectors(adata)
    return np.stack([vectors[name] for name in cell_types]).astype(np.float32) if vectors else None
