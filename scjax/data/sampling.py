"""Which rows make batch n: a function of (seed, n), so that neither threads nor a restart change a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from scjax.check import at_least, one_of

__all__ = [
    "PairedRows",
    "PairedSampling",
    "TimeSeriesRows",
    "TimeSeriesSampling",
    "paired_rows",
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
