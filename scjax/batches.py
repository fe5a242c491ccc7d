"""The contract between data and models: what one batch of each kind holds.

Every batch is a pytree of arrays that the data layer makes with NumPy and a model's `loss` consumes under `jit`.
"""

from dataclasses import dataclass, field
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TimeSeriesBatch:
    """Cells of the first time, and the populations observed later.

    Attributes:
        x0: float[cells, dims], the cells that are simulated, all observed at `ts[0]`.
        targets: float[times - 1, target_cells, dims], the population observed at each of `ts[1:]`.
        weights: float[times - 1, target_cells], mass of each target cell; a row sums to 1, padding has mass 0 and must
            repeat a real cell of its time (so that no bounding box or mean is moved by it).
        self_transport: float[times - 1] or None, the entropic cost of moving each target population onto itself. It
            does not depend on parameters: given once, it saves the largest part of a Sinkhorn loss; None computes it.
        ts: increasing times, the first being that of `x0`. Static: the solver's grid is laid along them, so `jit`
            compiles once per choice of times.
    """

    # Any, not jaxtyping: JAX rebuilds this class around stacked arrays, tracers and specs alike.
    x0: Any
    targets: Any
    weights: Any
    self_transport: Any = None
    ts: tuple[float, ...] = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PairedBatch:
    """Control cells and perturbed cells of some populations; nothing pairs a control with a perturbed cell but a
    coupling, if one was asked for.

    Attributes:
        source: float[populations, cells, genes], control cells of the same context, log-normalised.
        target: float[populations, cells, genes], cells of the perturbation.
        perturbation: int[populations, slots], ids of what was done; free slots hold the control's.
        genes: int[genes], the token of each gene; the same for all cells, another choice at each step if asked for.
    """

    source: Any
    target: Any
    perturbation: Any
    genes: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class CellSetBatch:
    """Sets of cells, each drawn from one population, with control cells and what is known about the set.

    Attributes:
        cells: float[sets, cells, genes], log-normalised.
        control: float[sets, cells, genes], control cells of the same context; row j has no relation to row j of
            `cells`.
        covariates: ids by name ("perturbation", "cell_type", "batch", "dose"): int[sets] where it is one for the whole
            set, int[sets, cells] where it changes from cell to cell. 0 is the control's perturbation.
        mask: bool[sets, cells], True for a cell of the data, False for filler that repeats one.
        space: int[sets] or None, the gene space that a set comes from, where several share one model.
        measured: bool[sets, genes] or None, the genes that the set's data measured; None: all.
    """

    cells: Any
    control: Any
    covariates: Any
    mask: Any
    space: Any = None
    measured: Any = None
