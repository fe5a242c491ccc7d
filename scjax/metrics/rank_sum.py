"""Mann-Whitney tests of all genes, of many populations against shared controls: compiled, in chunks of genes, exact.

In each gene the controls are sorted once. The cells of a population are sorted and looked up among them; statistic and
tie term are sums of integers, 64 bits wide, on the device. z and p follow on the host, in double precision.

Columns are genes, so that a step of the sort or of the search is one pass over contiguous genes: on a CPU a sorting
network and a bisection written so take a small part of the time of XLA's own sort and search.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from scjax import check

__all__ = ["Ordered", "RankSum", "ordered", "rank_sum", "rank_sums"]

Cells: TypeAlias = Any  # Float[np.ndarray | Array, "_cells genes"], or such a SciPy sparse array or matrix
Columns: TypeAlias = Float[Array, "cells genes"]

WIDTH = 64  # genes of a chunk: what a step touches stays near the core
ROWS = 2048  # cells of the populations that are tested in one call
MOST_CELLS = 2_000_000  # of both sides: the cube of a number of ties fits 64 bits


class RankSum(NamedTuple):
    """Of each gene, and of each population where there are several: Mann-Whitney U, its z, the two-sided p-value.

    Attributes:
        statistic: pairs in which the population's cell is above the control's, ties counted half.
        z: (U - n m / 2) / its standard deviation, half a unit nearer to 0; positive where the population is higher.
        p_value: of |z|.
    """

    statistic: np.ndarray
    z: np.ndarray
    p_value: np.ndarray


class Ordered(NamedTuple):
    """Cells sorted gene by gene, on the device, for any number of tests against them.

    Attributes:
        values: [chunks, rows, width], rising along the rows; after the cells comes at least one row of +inf.
        places: which of its equals each value is, from 1.
        ties: of each gene, the sum over its values of t^3 - t, t being how many cells have that value.
        n_cells: without the rows of +inf.
    """

    values: Array
    places: Array
    ties: np.ndarray
    n_cells: int


def ordered(cells: Cells) -> Ordered:
    """Raises ValueError: no cell, or a value that is not finite."""
    cells = _dense("control", cells)
    n_cells, n_genes = cells.shape
    with jax.enable_x64(True):
        values, places, ties = _order(_padded([cells], 1, _size(n_cells + 1), -(-n_genes // WIDTH) * WIDTH)[0])
    return Ordered(values, places, np.asarray(ties).reshape(-1)[:n_genes], n_cells)


def rank_sum(x: Cells, y: Cells | Ordered) -> RankSum:
    """`rank_sums` of one population: [genes]."""
    return RankSum(*(values[0] for values in rank_sums([x], y)))


def rank_sums(populations: Sequence[Cells], control: Cells | Ordered) -> RankSum:
    """Two-sided Mann-Whitney test of each gene, normal approximation with corrections for ties and continuity.

    Equal to `scipy.stats.mannwhitneyu(x, control, method="asymptotic")` of each population x; a gene in which no cell
    differs from another has z = 0 and p = 1. Single and double precision are compared as they are. A population of n
    cells costs n log^2 n steps of a sort and n log m of a search, in all genes at once.

    Args:
        populations: [cells, genes] each; any numbers of cells, dense or sparse.
        control: the cells that all are tested against; `ordered` once where there are several calls.

    Returns:
        [populations, genes] each.

    Raises:
        ValueError: no population, one without cells or with other genes, values that are not finite, or more than
            2,000,000 cells with the control.
    """
    check.at_least("the number of populations", len(populations), 1)
    control = control if isinstance(control, Ordered) else ordered(control)
    populations = [_dense(f"populations[{i}]", x) for i, x in enumerate(populations)]
    n_genes, m = len(control.ties), control.n_cells
    for i, x in enumerate(populations):
        if x.shape[1] != n_genes:
            raise ValueError(f"populations[{i}] must have the {n_genes} genes of the control; got {x.shape[1]}.")
        if len(x) + m > MOST_CELLS:
            raise ValueError(
                f"populations[{i}] and the control must have {MOST_CELLS} cells at most, so that ties are counted "
                f"exactly; got {len(x) + m}. Draw fewer."
            )
    sizes = np.array([len(x) for x in populations])
    twice_u, ties = (np.empty((len(populations), n_genes), np.int64) for _ in range(2))
    n_columns = control.values.shape[0] * control.values.shape[2]
    for rows, n_stacked in _blocks(sizes):
        stacked = _padded([populations[row] for row in rows], n_stacked, _size(int(sizes[rows].max())), n_columns)
        with jax.enable_x64(True):
            found = _against(control.values, control.places, stacked, np.resize(sizes[rows], n_stacked))
        for table, values in zip((twice_u, ties), found, strict=True):
            by_population = np.moveaxis(np.asarray(values), 0, 1).reshape(n_stacked, n_columns)
            table[rows] = by_population[: len(rows), :n_genes]
    return _tested(twice_u, ties + control.ties, sizes[:, None], control.n_cells)


def _tested(twice_u: np.ndarray, ties: np.ndarray, n: np.ndarray, m: int) -> RankSum:
    from scipy.stats import norm

    statistic = twice_u / 2
    spread = np.sqrt(n * m / 12 * np.maximum(n + m + 1 - ties / ((n + m) * (n + m - 1)), 0))
    off = statistic - n * m / 2
    beyond = np.abs(off) - 0.5
    z = np.divide(beyond, spread, out=np.full(off.shape, -np.inf), where=spread > 0)
    return RankSum(statistic, np.sign(off) * np.maximum(z, 0), np.minimum(2 * norm.sf(z), 1.0))


def _dense(name: str, cells: Cells) -> np.ndarray:
    cells = np.asarray(cells.toarray() if hasattr(cells, "toarray") else cells)
    if cells.ndim != 2:
        raise ValueError(f"{name} must be [cells, genes]; got the shape {cells.shape}.")
    check.at_least(f"the number of cells of {name}", len(cells), 1)
    check.finite(name, cells)
    return cells if cells.dtype in (np.float32, np.float64) else cells.astype(np.float64)


def _size(n: int) -> int:
    """The next of four sizes an octave, 64 at least: few shapes to compile for, and little that is padding."""
    step = 1 << max(4, (n - 1).bit_length() - 3)
    return max(64, -(-n // step) * step)


def _blocks(sizes: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """Populations (of similar sizes) that are stacked for one call, and how many places the stack has."""
    blocks = []
    padded = np.array([_size(int(n)) for n in sizes])
    for size in np.unique(padded).tolist():
        alike = np.flatnonzero(padded == size)
        n_calls = -(-len(alike) // max(1, ROWS // size))
        n_stacked = -(-len(alike) // n_calls)
        blocks += [(alike[i : i + n_stacked], n_stacked) for i in range(0, len(alike), n_stacked)]
    return blocks


def _padded(populations: Sequence[np.ndarray], n_stacked: int, n_rows: int, n_columns: int) -> np.ndarray:
    """[stacked, rows, columns]; +inf below the cells, so that it stays there in a rising order."""
    stacked = np.empty((n_stacked, n_rows, n_columns), np.result_type(*populations))
    for place, x in zip(stacked, populations, strict=False):
        n_cells, n_genes = x.shape
        place[:n_cells, :n_genes] = x
        place[n_cells:] = np.inf
        place[:n_cells, n_genes:] = 0
    stacked[len(populations) :] = np.inf
    return stacked


@jax.jit
def _order(cells: Columns) -> tuple[Array, Array, Array]:
    def of_chunk(chunk: Array) -> tuple[Array, Array, Array]:
        values = _sorted(jax.lax.dynamic_slice_in_dim(cells, chunk * WIDTH, WIDTH, axis=1))
        places = _places(values)
        return values, places, _sum_of_ties(places, values < jnp.inf)

    return jax.lax.map(of_chunk, jnp.arange(cells.shape[1] // WIDTH, dtype=jnp.int32))


@jax.jit
def _against(
    values: Float[Array, "chunks rows width"],
    places: Int[Array, "chunks rows width"],
    cells: Float[Array, "populations cells genes"],
    sizes: Int[Array, " populations"],
) -> tuple[Int[Array, "chunks populations width"], Int[Array, "chunks populations width"]]:
    def of_chunk(chunk: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        index, *controls = chunk
        x = jax.lax.dynamic_slice_in_dim(cells, index * WIDTH, WIDTH, axis=2)
        return jax.vmap(_counts, (None, None, 0, 0))(*controls, x, sizes)  # pyright: ignore[reportCallIssue]

    return jax.lax.map(of_chunk, (jnp.arange(len(values), dtype=jnp.int32), values, places))


def _counts(
    values: Float[Array, "rows genes"], places: Int[Array, "rows genes"], x: Columns, size: Int[Array, ""]
) -> tuple[Int[Array, " genes"], Int[Array, " genes"]]:
    """Twice U, and what the population adds to the sum of t^3 - t of the controls.

    The k-th of its equals in the population, with a equals among the controls, brings t from a + k - 1 to a + k.
    """
    x = _sorted(x)
    up_to = _up_to(values, x)
    last = jnp.maximum(up_to, 1) - 1
    equal = jnp.where((up_to > 0) & (_at(values, last) == x), _at(places, last), 0)
    is_cell = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None] < size
    twice_u = jnp.sum(jnp.where(is_cell, 2 * up_to - equal, 0), axis=0, dtype=jnp.int64)
    return twice_u, _sum_of_ties(equal + _places(x), is_cell)


def _sum_of_ties(t: Int[Array, "cells genes"], counted: Bool[Array, "cells _genes"]) -> Int[Array, " genes"]:
    """Over the cells, of (t^3 - t) - ((t - 1)^3 - (t - 1))."""
    t = t.astype(jnp.int64)
    return jnp.sum(jnp.where(counted, 3 * t * (t - 1), 0), axis=0)


def _sorted(x: Columns) -> Columns:
    """Each column rising: the bitonic network in which the smaller value always goes up.

    So +inf below the last row may be thought away with its comparisons, and the number of rows need be no power of two.

    Reference: Batcher, Sorting networks and their applications, AFIPS 32 (1968).
    """
    rows, partners, block = np.arange(len(x)), [], 2
    while block < 2 * len(x):
        for flip in (block - 1, *(block >> s for s in range(2, block.bit_length()))):
            partners.append(np.where(rows ^ flip < len(x), rows ^ flip, rows))
        block *= 2
    table, own = jnp.asarray(np.stack(partners), jnp.int32), jnp.asarray(rows, jnp.int32)

    def compare(stage: Array, x: Columns) -> Columns:
        other = x[table[stage]]
        return jnp.where((own < table[stage])[:, None], jnp.minimum(x, other), jnp.maximum(x, other))

    return jax.lax.fori_loop(0, len(partners), compare, x)


def _places(x: Columns) -> Int[Array, "cells genes"]:
    """Which of its equals each value of a rising column is, from 1."""
    rows = jnp.arange(len(x), dtype=jnp.int32)
    is_first = jnp.concatenate([jnp.ones((1, x.shape[1]), bool), x[1:] != x[:-1]])

    def look_back(step: Array, first: Array) -> Array:
        return jnp.maximum(first, first[jnp.maximum(rows - (jnp.int32(1) << step), 0)])

    first = jnp.where(is_first, rows[:, None], 0)
    first = jax.lax.fori_loop(jnp.int32(0), jnp.int32(len(x).bit_length()), look_back, first)
    return rows[:, None] - first + 1


def _up_to(values: Float[Array, "rows genes"], x: Columns) -> Int[Array, "cells genes"]:
    """How many of the rising `values` are at most x, by bisection; what +inf gets is of no meaning."""
    most = 1 << (len(values).bit_length() - 1)

    def halve(step: Array, found: Array) -> Array:
        ahead = found + (jnp.int32(most) >> step)
        return jnp.where(_at(values, jnp.minimum(ahead, len(values)) - 1) <= x, ahead, found)

    steps = jnp.int32(most.bit_length())
    return jnp.minimum(jax.lax.fori_loop(jnp.int32(0), steps, halve, jnp.zeros(x.shape, jnp.int32)), len(values))


def _at(table: Shaped[Array, "rows genes"], rows: Int[Array, "cells genes"]) -> Shaped[Array, "cells genes"]:
    """Row by row in each column; of the flat table, which a CPU reads faster than by two indices."""
    n_genes = table.shape[1]
    flat = rows * n_genes + jnp.arange(n_genes, dtype=jnp.int32)[None]
    return table.reshape(-1).at[flat].get(mode="promise_in_bounds")
