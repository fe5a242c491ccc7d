"""Real cells in the form of a prediction, for tools that compare two files (cell-eval)."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

from scjax.check import suggestion
from scjax.data.disk import cells_at_once
from scjax.data.source import join, open_source
from scjax.data.spec import AnnData
from scjax.predict.cellsets import TrainedCellSets
from scjax.predict.parts import Part, Prediction
from scjax.predict.perturbation import TrainedPerturbation
from scjax.predict.populations import asked_conditions
from scjax.predict.record import covariate_columns, record
from scjax.types import Population

__all__ = ["observing"]

Data: TypeAlias = AnnData | Sequence[tuple[str, AnnData]]


def observing(
    trained: TrainedPerturbation | TrainedCellSets,
    adata: Data,
    conditions: Iterable[str] = (),
    *,
    contexts: Sequence[str] | None = None,
    genes: Sequence[str] | None = None,
) -> Prediction:
    """The observed cells of these conditions and all control cells, as `predicting` gives predicted ones.

    X: log-normalised expression, float32[rows, genes]; obs, under the names that the cells have in `adata`: the columns
    of the covariates, condition (the canonical name; "control" for controls), context, and source_cell, itself.

    Args:
        conditions: in any spelling; none of them leaves the controls alone.
        contexts: all that have control cells unless given.
        genes: any of the kept genes, in any order; all of them unless given.

    Raises:
        ValueError: a condition without cells in these contexts, a context without control cells, an unknown gene, what
            `DataSpec.check` finds.
    """
    if isinstance(adata, Sequence):
        cells: AnnData = join(adata, trained.spec, absent=trained.about["experiment"]["absent"]).adata
    else:
        cells = adata
    trained.spec.without_vectors().check(cells, min_cells=1, every_context=False)
    conditions = list(conditions)
    wanted: list[tuple[str, ...]] = asked_conditions(trained.spec, conditions) if conditions else []
    known, population_of = trained.spec.read_populations(cells)
    with_controls = [p.context for p in known if p.is_control]
    for context in contexts or ():
        if context not in with_controls:
            raise ValueError(
                f"contexts must have control cells in adata; {context!r} has none.{suggestion(context, with_controls)} "
                f"There are: {', '.join(map(repr, with_controls))}."
            )
    kept = [p for p in known if p.context in (with_controls if contexts is None else contexts)]
    for names in wanted:
        if not any(p.perturbation == names for p in kept):
            condition = Population(names).condition
            there = {p.condition for p in kept}
            raise ValueError(f"adata has no cells of {condition} in these contexts.{suggestion(condition, there)}")
    chosen = [p for p in kept if p.is_control or p.perturbation in wanted]
    place = {name: i for i, name in enumerate(trained.genes)}
    genes = trained.genes if genes is None else tuple(genes)
    for name in genes:
        if name not in place:
            raise ValueError(f"genes must be among the {len(place)} that training kept; {name!r} is not.")
    columns = np.array([place[name] for name in genes])
    source, cell_names = open_source(cells, trained.spec), cells.obs_names.to_numpy()
    rows_of = {p: np.flatnonzero(population_of == known.index(p)) for p in chosen}
    step = cells_at_once(len(source.feature_names))

    def parts() -> Iterator[Part]:
        for population, rows in rows_of.items():
            for start in range(0, len(rows), step):
                some = rows[start : start + step]
                x = trained.transform.apply(source.rows(some), source.feature_names)[:, columns]
                yield Part(np.asarray(x, np.float32), _obs(trained, population, cell_names[some]))

    n_cells = sum(map(len, rows_of.values()))
    told = record(trained, space="log-normalised expression of observed cells in X")
    return Prediction(n_cells=n_cells, genes=genes, parts=parts, uns={"scjax": told}, categories=True)


def _obs(trained: Any, population: Population, names: np.ndarray) -> Any:
    import pandas as pd

    covariates = covariate_columns(trained.spec.covariates, population.context)
    told = {**covariates, "condition": population.condition, "context": population.context, "source_cell": names}
    return pd.DataFrame(told, index=names)
