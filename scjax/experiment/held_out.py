"""Tables of the populations that training never saw, whatever model of perturbations predicts them."""

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from scjax.config import to_dict
from scjax.data.conditions import OnUnknown, trained_names
from scjax.data.perturbation import unseen_axis
from scjax.data.spec import AnnData
from scjax.data.splits import PerturbationSplit
from scjax.experiment.evidence import Evidence, perturbation_evidence
from scjax.experiment.run import comparable_runs
from scjax.metrics.perturbation_report import PerturbationTable, perturbation_table
from scjax.predict.populations import generation_of, predicted_cells
from scjax.types import Population

__all__ = ["by_unseen_axis", "population_tables"]


def population_tables(
    trained: Mapping[str, Sequence[Any]],
    adata: Any,
    work: ModuleType,
    *,
    predicted: Mapping[str, Sequence[AnnData]] | None,
    metrics: Mapping[str, Any],
    n_cells: int | None,
    n_draws: int,
    seed: int,
    on_unknown: OnUnknown,
    vectors: Mapping[str, Any] | None,
    provenance: Mapping[str, Any],
    genes: np.ndarray | None = None,
    controls: str = "which training saw",
    keep: list[Evidence] | None = None,
) -> list[PerturbationTable]:
    """See `scjax.experiment.perturbation.tables`.

    Args:
        work: `predict.perturbation` or `predict.cellsets`: its read_sources, generate and observed_cells.
        vectors: external ones by name, for baselines and for what training never saw.
        genes: bool[genes], those that are compared; None compares all.
        controls: what the title says of the control cells.
        keep: a list that gets the evidence of each table.
    """
    first = comparable_runs(trained, ("split", "transform"))[0]
    split = first.split
    test = [p for p in split.test if not p.is_control]
    if not test:
        raise ValueError("the runs held out nothing, so there is nothing to evaluate; train with a split that does.")
    kept = np.ones(len(first.genes), bool) if genes is None else genes
    names = tuple(name for name, is_kept in zip(first.genes, kept, strict=True) if is_kept)

    predicted = {} if predicted is None else predicted
    for name in predicted.keys() & trained.keys():
        _check_makers(name, predicted[name], trained[name])
    contexts = sorted({p.context for p in test})
    replaced: dict[str, str] = {}
    made: dict[str, list[dict[Population, np.ndarray]]] = {name: [] for name in {**trained, **predicted}}
    how: dict[str, list[Any]] = {name: [] for name in made}
    for name, of_row in predicted.items():
        for given in of_row:
            made[name].append(predicted_cells(first, given, test, names))
            generation, stand_ins = generation_of(given, type(first.generation))
            how[name].append(None if generation is None else to_dict(generation))
            replaced |= stand_ins
    for name, of_row in trained.items():
        for run in () if name in predicted else of_row:
            sources = work.read_sources(run, adata, contexts)
            found, stand_ins = work.generate(run, sources, test, seed=seed, on_unknown=on_unknown, vectors=vectors)
            made[name].append({p: cells.x[:, kept] for p, cells in found.items()})
            how[name].append(to_dict(run.generation))
            replaced |= stand_ins
    training, real = (work.observed_cells(first, adata, part) for part in (split.train, test))
    # Held-out contexts keep their controls from training; contexts without any have those that stand in.
    lacking = [context for context in contexts if Population((), context) not in training]
    if lacking:
        training |= {Population((), c): s.x[:] for c, s in work.read_sources(first, adata, lacking).items()}
    if vectors is not None:  # what the models are told of the names that occur
        vectors = first.spec.vectors_of(trained_names([*training, *test]), vectors) or None
    unseen, titles = by_unseen_axis(test, split, "held-out populations")
    n_controls = sum(len(x) for p, x in training.items() if p.is_control and p.context in contexts)
    tables = [
        perturbation_table(
            f"{title}; predicted from the {n_controls} control cells of their contexts, {controls}",
            {name: [{p: cells[p] for p in wanted} for cells in of_row] for name, of_row in made.items()},
            {p: x[:, kept] for p, x in training.items()},
            {p: real[p][:, kept] for p in wanted},
            metrics,
            n_cells=n_cells,
            n_draws=n_draws,
            seed=seed,
            vectors=vectors,
            gene_names=names,
            provenance={
                **provenance,
                "unseen": unseen,
                "generation": how,
                "replaced": replaced,
            },
        )
        for title, wanted in titles.items()
    ]
    if keep is not None:
        compared = {p: x[:, kept] for p, x in training.items()}
        observed = {p: real[p][:, kept] for p in test}
        firsts = {name: cells[0] for name, cells in made.items()}
        keep += [perturbation_evidence(t, firsts, compared, observed, names, vectors=vectors) for t in tables]
    return tables


def by_unseen_axis(
    test: Sequence[Population], split: PerturbationSplit, called: str
) -> tuple[dict[str, str], dict[str, Sequence[Population]]]:
    """What is new in each population, by its name; and by their titles the populations of each table: of all, and
    where they are new in several ways, of each way.
    """
    axes: dict[str, list[Population]] = {}
    for p in test:
        axes.setdefault(unseen_axis(p, split), []).append(p)
    told = ", ".join(f"{axis} ({len(of_axis)})" for axis, of_axis in axes.items())
    titles = {f"all {len(test)} {called}, unseen: {told}": test}
    if len(axes) > 1:
        titles |= {f"{called}, unseen: {axis}": of_axis for axis, of_axis in axes.items()}
    return {str(p): axis for axis, of_axis in axes.items() for p in of_axis}, titles


def _check_makers(name: str, predicted: Sequence[AnnData], runs: Sequence[Any]) -> None:
    """That the row of these runs is not filled with what others predicted."""
    makers = [cells.uns.get("scjax", {}).get("run") for cells in predicted]
    if makers != [run.about["run"] for run in runs]:
        raise ValueError(
            f"predicted[{name!r}] must be what the runs {', '.join(run.about['run'] for run in runs)} of that row "
            f"predicted, in their order; got predictions of {', '.join(map(str, makers)) or 'none'}."
        )
