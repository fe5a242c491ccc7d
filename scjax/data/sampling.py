"""Which rows make batch n: a function of (seed, n), so that neither threads nor a restart change a run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Bool, Int

from scjax.check import at_least, one_of

__all__ = [
    "CellSetRows",
    "CellSetSampling",
    "CovariateRole",
    "PairedRows",
    "PairedSampling",
    "TimeSeriesRows",
    "TimeSeriesSampling",
    "cell_set_rows",
    "paired_rows",
    "sets_in_order",
    "time_series_rows",
]


@dataclass(frozen=True, kw_only=True)
class TimeSeriesSampling:
    """How many cells a step sees.

    Attributes:
        n_cells: of the first time, drawn at each step; together they are the interacting population. 512 in the paper.
        n_targets: of each later time, drawn at each step; None takes all observed cells, as the paper does.
    """

    n_cells: int = 512
    n_targets: int | None = None

    def __post_init__(self):
        at_least("n_cells", self.n_cells, 1)
        if self.n_targets is not None:
            at_least("n_targets", self.n_targets, 1)


class TimeSeriesRows(NamedTuple):
    """Row numbers of one batch: cells of the first time, and for each later time its target cells."""

    start: Int[np.ndarray, " n_cells"]
    targets: tuple[Int[np.ndarray, " _"], ...]


def time_series_rows(
    populations: Sequence[Int[np.ndarray, " _"]], sampling: TimeSeriesSampling, *, seed: int, step: int
) -> TimeSeriesRows:
    """Batch `step` of a run with this seed. `populations`: the rows of each training time, the first time first.

    A draw is uniform without replacement where the population is large enough, else with replacement (so a small first
    stage gives exact duplicates, as in the scIMF code).
    """
    at_least("seed", seed, 0)
    at_least("step", step, 0)
    rng = np.random.default_rng([seed, step])
    start = _draw(rng, populations[0], sampling.n_cells)
    if sampling.n_targets is None:
        return TimeSeriesRows(start, tuple(populations[1:]))
    return TimeSeriesRows(start, tuple(_draw(rng, rows, sampling.n_targets) for rows in populations[1:]))


def _draw(rng: np.random.Generator, rows: np.ndarray, n: int) -> np.ndarray:
    return rng.choice(rows, n, replace=len(rows) < n)


@dataclass(frozen=True, kw_only=True)
class PairedSampling:
    """What a step sees of perturbation data. The defaults are those of the scDFM code.

    Attributes:
        n_populations: perturbations of a step, each in one context; uniform over the training populations, not over
            their cells, and without repeats within a step where there are enough.
        n_cells: perturbed cells of each, drawn with replacement, and as many controls of its context. 48 in the code of
            scDFM, 96 in its paper. The MMD takes at least 2.
        n_genes: of a uniform choice, another at each step, in random order; None takes all, in their order.
        coupling: "independent" leaves controls and perturbed cells as they were drawn; "ot" pairs them within each
            population by exact optimal transport (squared distance on the genes of the step).
        include_control: let control populations be targets too, so that "nothing was done" is learned; the scDFM code
            never does.
    """

    n_populations: int = 1
    n_cells: int = 48
    n_genes: int | None = 1000
    coupling: Literal["independent", "ot"] = "independent"
    include_control: bool = False

    def __post_init__(self):
        at_least("n_populations", self.n_populations, 1)
        at_least("n_cells", self.n_cells, 2)
        if self.n_genes is not None:
            at_least("n_genes", self.n_genes, 1)
        one_of("coupling", self.coupling, ("independent", "ot"))


class PairedRows(NamedTuple):
    """One batch in numbers: which populations, the rows of their controls and of their cells, which genes."""

    populations: Int[np.ndarray, " populations"]
    source: Int[np.ndarray, "populations cells"]
    target: Int[np.ndarray, "populations cells"]
    genes: Int[np.ndarray, " genes"]


def paired_rows(
    targets: Sequence[Int[np.ndarray, " _"]],
    sources: Sequence[Int[np.ndarray, " _"]],
    n_genes: int,
    sampling: PairedSampling,
    *,
    seed: int,
    step: int,
) -> PairedRows:
    """Batch `step` of a run with this seed, before any coupling.

    `targets`: the rows of each population that may be drawn; `sources`: for each of them, the rows of its controls;
    `n_genes`: of the data.

    Raises:
        ValueError: no population, or `sampling.n_genes` above `n_genes`.
    """
    at_least("seed", seed, 0)
    at_least("step", step, 0)
    at_least("the number of populations to draw from", len(targets), 1)
    if sampling.n_genes is not None and sampling.n_genes > n_genes:
        raise ValueError(
            f"n_genes must be at most the {n_genes} genes of the data; got {sampling.n_genes}. None takes all."
        )
    rng = np.random.default_rng([seed, step])
    populations = rng.choice(len(targets), sampling.n_populations, replace=len(targets) < sampling.n_populations)
    drawn = [[rng.choice(rows[p], sampling.n_cells) for p in populations] for rows in (targets, sources)]
    genes = np.arange(n_genes) if sampling.n_genes is None else rng.permutation(n_genes)[: sampling.n_genes]
    return PairedRows(populations, source=np.stack(drawn[1]), target=np.stack(drawn[0]), genes=genes)


CovariateRole: TypeAlias = Literal["perturbation", "cell_type", "batch"]


@dataclass(frozen=True, kw_only=True)
class CellSetSampling:
    """What a step sees of cell sets. The defaults are those of the PerturbDiff code for one of its four devices.

    Attributes:
        n_sets: of a step.
        n_cells: of a set. 256 in the code, 32 for Replogle.
        group_by: cells of a set agree in these; None takes all of "perturbation", "cell_type" and "batch" that the data
            have, as the code does. Fewer make larger groups where a batch holds few cells of a perturbation (two, in
            Replogle), and the covariates left out then change from cell to cell.
        order: "epochs" deals every cell once an epoch: each group in random order, cut into sets, the last of a group
            filled up with cells of the group; the sets in random order, those of the last incomplete step left out.
            "uniform" draws a group for each set, each as likely whatever its size, and its cells without replacement; a
            group of fewer than `n_cells` comes whole and is filled up.
        include_control: let control cells be sets too, so that "nothing was done" is learned. Their control cells are
            others of the same pool.
        controls: "matched", a control cell of the same context for each cell; "zeros", none: for data without controls,
            and marginal pretraining. The code takes a copy of the cell itself there, which gives the answer away unless
            the model drops it.
    """

    n_sets: int = 8
    n_cells: int = 256
    group_by: tuple[CovariateRole, ...] | None = None
    order: Literal["epochs", "uniform"] = "epochs"
    include_control: bool = False
    controls: Literal["matched", "zeros"] = "matched"

    def __post_init__(self):
        at_least("n_sets", self.n_sets, 1)
        at_least("n_cells", self.n_cells, 1)
        if self.group_by is not None:
            if len(set(self.group_by)) < len(self.group_by):
                raise ValueError(f"group_by must name each covariate once; got {self.group_by}.")
            for role in self.group_by:
                one_of("group_by", role, ("perturbation", "cell_type", "batch"))
        one_of("order", self.order, ("epochs", "uniform"))
        one_of("controls", self.controls, ("matched", "zeros"))


class CellSetRows(NamedTuple):
    """Sets in numbers: the rows of their cells, which of them are no filler, and the group that each set is of."""

    rows: Int[np.ndarray, "sets cells"]
    mask: Bool[np.ndarray, "sets cells"]
    group: Int[np.ndarray, " sets"]


def cell_set_rows(
    groups: Sequence[Int[np.ndarray, " _"]], sampling: CellSetSampling, *, seed: int
) -> Callable[[int], CellSetRows]:
    """The sets of step n of a run with this seed, for any n; `groups`: the rows of each, none of them empty.

    An epoch is dealt when one of its steps is asked for, and kept until two others are.

    Raises:
        ValueError: no group, or an epoch of fewer sets than a step takes.
    """
    at_least("seed", seed, 0)
    at_least("the number of groups to draw from", len(groups), 1)
    sizes = np.array([len(rows) for rows in groups])
    at_least("the number of cells of a group", int(sizes.min()), 1)
    if sampling.order == "uniform":
        return lambda step: _uniform_sets(groups, sampling, seed, step)

    n_sets = int((-(-sizes // sampling.n_cells)).sum())
    steps = n_sets // sampling.n_sets
    if steps == 0:
        raise ValueError(
            f"n_sets must be at most {n_sets}, the sets of {sampling.n_cells} cells that an epoch has; got "
            f"{sampling.n_sets}. Take smaller sets, or order='uniform'."
        )
    rows, of_group = np.concatenate(groups), np.repeat(np.arange(len(groups)), sizes)
    epoch_sets = lru_cache(maxsize=2)(lambda epoch: _epoch_sets(rows, of_group, sizes, sampling.n_cells, seed, epoch))

    def sets_at(step: int) -> CellSetRows:
        at_least("step", step, 0)
        epoch, place = divmod(step, steps)
        part = slice(place * sampling.n_sets, (place + 1) * sampling.n_sets)
        return CellSetRows(*(a[part] for a in epoch_sets(epoch)))

    return sets_at


def sets_in_order(groups: Sequence[Int[np.ndarray, " _"]], n_cells: int, *, seed: int) -> CellSetRows:
    """All cells once, for evaluation: group after group, cut into sets in the order of the rows, the last one of a
    group filled up with cells of the group. With seed 42 it is the evaluation of the PerturbDiff code, filler included.
    """
    at_least("n_cells", n_cells, 1)
    rng = np.random.default_rng(seed)
    sets, masks, of_group = [], [], []
    for i, rows in enumerate(groups):
        short = -len(rows) % n_cells
        if short:  # a generator for each filled group, as in the code
            fill = np.random.default_rng(rng.integers(np.iinfo(np.uint32).max, dtype=np.uint32)).choice(rows, short)
            rows = np.concatenate([rows, fill])
        sets.append(rows.reshape(-1, n_cells))
        masks.append(np.arange(len(rows)).reshape(-1, n_cells) < len(rows) - short)
        of_group.append(np.full(len(sets[-1]), i))
    return CellSetRows(np.concatenate(sets), np.concatenate(masks), np.concatenate(of_group))


def _uniform_sets(groups: Sequence[np.ndarray], sampling: CellSetSampling, seed: int, step: int) -> CellSetRows:
    at_least("step", step, 0)
    rng = np.random.default_rng([seed, step])
    chosen = rng.choice(len(groups), sampling.n_sets, replace=len(groups) < sampling.n_sets)
    sets = []
    for group in chosen:
        rows = groups[group]
        if len(rows) < sampling.n_cells:
            sets.append(np.concatenate([rng.permutation(rows), rng.choice(rows, sampling.n_cells - len(rows))]))
        else:
            sets.append(rng.choice(rows, sampling.n_cells, replace=False))
    sizes = np.array([len(groups[group]) for group in chosen])
    return CellSetRows(np.stack(sets), np.arange(sampling.n_cells) < sizes[:, None], chosen)


def _epoch_sets(
    rows: np.ndarray, of_group: np.ndarray, sizes: np.ndarray, n_cells: int, seed: int, epoch: int
) -> CellSetRows:
    """`rows` and `of_group`: the cells, group after group."""
    rng = np.random.default_rng([seed, epoch])
    rows = rows[np.lexsort((rng.random(len(rows)), of_group))]  # random within each group
    n_sets = -(-sizes // n_cells)
    group = np.repeat(np.arange(len(sizes)), n_sets)
    place = np.concatenate([np.arange(n) for n in n_sets])[:, None] * n_cells + np.arange(n_cells)
    mask = place < sizes[group][:, None]
    place = np.where(mask, place, np.floor(rng.random(place.shape) * sizes[group][:, None]).astype(np.int64))
    first = np.cumsum(sizes) - sizes
    order = rng.permutation(len(group))
    return CellSetRows(rows[first[group][:, None] + place][order], mask[order], group[order])
