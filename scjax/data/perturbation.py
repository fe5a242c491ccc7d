"""Perturbation data ready for a model: every cell in the model's space, by population, under a split."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from scjax.check import suggestion
from scjax.data.conditions import CONTROL, trained_names
from scjax.data.disk import Subset, is_on_disk
from scjax.data.expression import ModelCells, check_steps, fit_expression
from scjax.data.graph import GraphRule, coexpression, neighbour_table
from scjax.data.preprocess import Preprocess, Transform
from scjax.data.spec import AnnData, DataSpec, feature_names
from scjax.data.splits import PerturbationSplit, PerturbationSplitRule, split_populations
from scjax.data.vocabulary import Vocabulary
from scjax.types import Population

__all__ = ["PerturbationData", "prepare_perturbation", "unseen_axis"]


@dataclass(frozen=True, kw_only=True, eq=False)
class PerturbationData:
    """Populations of cells, held-out ones included.

    Attributes:
        x: float32[cells, genes], the kept genes, log-normalised (or what the data are, without normalisation); row i is
            cell i of the AnnData. In memory, or read from disk as they are indexed.
        populations: sorted, controls first.
        rows: for each of `populations`, the rows of its cells, increasing.
        split: which of `populations` training sees; all controls are among them.
        transform: fitted on the cells of the training populations; its `feature_names` are the columns of `x`.
        vocabulary: ids of genes and perturbations.
        graph: int32[tokens, neighbours], which tokens a token attends to, padded with -1; of the training cells.
        vectors: float32[perturbations, features] external vectors in the order of `vocabulary.perturbations`, where the
            DataSpec names them; the control's is 0 unless given.
    """

    x: ModelCells
    populations: tuple[Population, ...]
    rows: tuple[Int[np.ndarray, " _"], ...]
    split: PerturbationSplit
    transform: Transform
    vocabulary: Vocabulary
    graph: Int[np.ndarray, "tokens neighbours"]
    vectors: Float[np.ndarray, "perturbations features"] | None = None

    @property
    def n_genes(self) -> int:
        return self.x.shape[1]

    @property
    def n_slots(self) -> int:
        """The most perturbations that occur at once."""
        return max(1, *(len(p.perturbation) for p in self.populations))

    def rows_of(self, population: Population) -> Int[np.ndarray, " n"]:
        if population not in self.populations:
            raise ValueError(
                f"population must be one of the data; {str(population)!r} is not."
                f"{suggestion(population, self.populations)}"
            )
        return self.rows[self.populations.index(population)]

    def cells(self, population: Population) -> Float[np.ndarray, "n genes"]:
        """All cells of this population."""
        return self.x[self.rows_of(population)]

    def controls(self, context: str = "") -> Float[np.ndarray, "n genes"]:
        """All control cells of this context."""
        return self.cells(Population((), context))


def prepare_perturbation(
    adata: AnnData,
    spec: DataSpec,
    rule: PerturbationSplitRule,
    preprocess: Preprocess,
    graph: GraphRule | None = None,
    *,
    force_perturbed: bool = True,
    store: str | Path | None = None,
) -> PerturbationData:
    """Check, split by `rule`, fit `preprocess` and the gene graph on the training populations, transform every cell.

    Args:
        preprocess: without scaling and PCA: the models work on expression itself.
        graph: None takes the defaults of GraphRule.
        force_perturbed: keep the measured perturbed genes, held-out ones too, however little they vary.
        store: a folder of these data's own that keeps the transformed cells on disk, see `data.store`; None: memory.

    Raises:
        ValueError: all that `spec.check`, `split_populations` and `preprocess.fit` find; a scaling or a PCA.
    """
    check_steps(preprocess, "perturbation models")
    spec.check(adata)
    populations, population_of = spec.read_populations(adata)
    split = split_populations(rule, populations, spec.covariates, written=spec.read_spellings(adata))
    rows = tuple(np.flatnonzero(population_of == i) for i in range(len(populations)))
    train_rows = np.flatnonzero(np.isin(population_of, [populations.index(p) for p in split.train]))

    measured = set(feature_names(adata, spec))
    names = trained_names(populations)  # of all populations: a name tells nothing about its cells
    forced = tuple(name for name in names if name in measured) if force_perturbed else ()
    transform, x = fit_expression(adata, spec, preprocess, train_rows, forced=forced, store=store)
    vocabulary = Vocabulary.of(transform.feature_names, names)
    x_train = Subset(x, train_rows) if is_on_disk(x) else x[train_rows]
    allowed = coexpression(x_train, graph or GraphRule())
    return PerturbationData(
        x=x,
        populations=populations,
        rows=rows,
        split=split,
        transform=transform,
        vocabulary=vocabulary,
        graph=neighbour_table(allowed, transform.feature_names, vocabulary),
        vectors=_vector_table(spec, adata, vocabulary),
    )


def unseen_axis(population: Population, split: PerturbationSplit) -> str:
    """What is new in a population for a model trained under `split`.

    "nothing": a training population. "perturbation": a name that no training population has. "combination": all names
    were seen, never together (or never alone). "context": a context of which training saw controls at most. Two of them
    are joined by " and ". "pair": the condition was seen elsewhere, and other conditions were seen here.
    """
    if population in split.train:
        return "nothing"
    perturbed = [p for p in split.train if not p.is_control]
    new = []
    if set(population.perturbation) - set(trained_names(perturbed)):
        new.append("perturbation")
    elif population.perturbation not in {p.perturbation for p in perturbed}:
        new.append("combination")
    if population.context not in {p.context for p in perturbed}:
        new.append("context")
    return " and ".join(new) or "pair"


def _vector_table(spec: DataSpec, adata: AnnData, vocabulary: Vocabulary) -> np.ndarray | None:
    table = spec.read_vectors(adata)
    if not table:
        return None
    names = [name for name in vocabulary.perturbations if name != CONTROL]
    vectors, control = spec.vectors_of(names, table), spec.control_vector(table)
    vectors[CONTROL] = np.zeros_like(next(iter(vectors.values()))) if control is None else control
    return np.stack([vectors[name] for name in vocabulary.perturbations]).astype(np.float32)
