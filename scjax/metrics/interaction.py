"""Who acts on whom: cell-by-cell scores summed up by cell type, and whether the result is reciprocal.

Everywhere rows are receivers and columns are senders: `scores[h, i, j]` is what cell j exerts on cell i in head h, and
entry (a, b) of a type matrix what type b exerts on type a. A label of -1 leaves a cell out of the means; it may still
have taken part in the attention.

Where scores are too many to be held, `type_interactions` and `top_partners` take them as blocks of receivers, in order
(`predict.interaction_score_blocks`), and hold one block at a time.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Array, Float, Int

from scjax import check

__all__ = [
    "AsymmetryTest",
    "BalancedCells",
    "Partners",
    "asymmetry_index",
    "asymmetry_test",
    "balanced_cells",
    "top_partners",
    "type_interactions",
]

ScoreBlocks: TypeAlias = Iterable[Float[Array | np.ndarray, "heads receivers cells"]]


class BalancedCells(NamedTuple):
    """Equally many cells of each common type.

    Attributes:
        rows: row of each drawn cell, type after type.
        types: the kept types, ascending; `rows[k * n_per_type : (k + 1) * n_per_type]` are of `types[k]`.
        proportions: share of each kept type among the cells of all kept types.
    """

    rows: np.ndarray
    types: np.ndarray
    proportions: np.ndarray


class AsymmetryTest(NamedTuple):
    """The asymmetry of a type matrix and what it is when the labels mean nothing.

    Attributes:
        index: `asymmetry_index` of the mean over heads.
        null: float[n_permutations], the index after shuffling the labels among the cells.
        p_value: (1 + number of null values >= index) / (1 + n_permutations).
    """

    index: float
    null: np.ndarray
    p_value: float


class Partners(NamedTuple):
    """The strongest senders of each receiver, the strongest first.

    Attributes:
        senders: number of the cell.
        scores: how strongly it acts, in the unit of the scores.
    """

    senders: Int[np.ndarray, "heads cells k"]
    scores: Float[np.ndarray, "heads cells k"]


def top_partners(scores: Float[Array | np.ndarray, "heads cells cells"] | ScoreBlocks, k: int) -> Partners:
    """The k cells that act most strongly on each cell, itself left out; among equals the first.

    Args:
        scores: of all pairs, or blocks of receivers in order.

    Raises:
        ValueError: k below 1, or not below the number of cells.
    """
    check.at_least("k", k, 1)
    found, start = [], 0
    for block in _blocks(scores):
        n = block.shape[2]
        if k >= n:
            raise ValueError(f"k must be below the number of cells, {n}, for no cell is its own partner; got {k}.")
        own = np.arange(block.shape[1])
        block = np.array(block)
        block[:, own, start + own] = -np.inf
        # All that reach the k-th score, then the first k of them by score and number: ties have one order.
        least = np.partition(block, n - k, axis=-1)[..., n - k, None]
        senders = np.empty((*block.shape[:2], k), np.int64)
        for place in np.ndindex(block.shape[:2]):
            near = np.flatnonzero(block[place] >= least[place])
            senders[place] = near[np.argsort(-block[place][near], kind="stable")[:k]]
        found.append(Partners(senders, np.take_along_axis(block, senders, axis=-1)))
        start += len(own)
    return Partners(*(np.concatenate(part, axis=1) for part in zip(*found, strict=True)))


def type_interactions(
    scores: Float[Array | np.ndarray, "heads cells cells"] | ScoreBlocks,
    labels: Int[Array | np.ndarray, " cells"],
    n_types: int,
    *,
    exclude_self: bool = False,
) -> Float[np.ndarray, "heads types types"]:
    """Plain mean of the scores over each block (receiver type, sender type), in the unit of the scores.

    The zeros of the diagonal (no cell acts on itself) are counted, as in the reference, so that entries within a type
    of n cells are low by the factor (n - 1) / n; `exclude_self` takes the mean over pairs of different cells instead.
    After a softmax over N senders entries are of the order 1 / N: multiply by N to compare populations of different
    sizes. A type without cells (with `exclude_self`: without pairs) has NaN.

    Args:
        scores: of all pairs, or blocks of receivers in order.

    Raises:
        ValueError: labels outside -1 .. n_types - 1, or another number of them than of receivers.
    """
    _check_labels(np.asarray(labels), n_types)
    sums, start = 0, 0
    for block in _blocks(scores):
        block = np.asarray(block, np.result_type(np.asarray(block).dtype, np.float32))
        members = _members(labels, n_types, block.dtype)
        stop = start + block.shape[1]
        rows = members[start:stop]
        if len(rows) == block.shape[1]:
            sums = sums + np.einsum("ia,hij,jb->hab", rows, block, members, optimize=True)
            if exclude_self:
                own = np.einsum("ia,hi->ha", rows, block[:, np.arange(len(rows)), np.arange(start, stop)])
                sums = sums - own[:, :, None] * np.eye(n_types, dtype=block.dtype)[None]
        start = stop
    if start != len(labels):
        raise ValueError(f"labels must be as many as the receivers of scores, {start}; got {len(labels)}.")
    n = members.sum(axis=0)
    pairs = n[:, None] * n[None]
    if exclude_self:
        pairs = pairs - np.diag(n)
    return np.divide(sums, pairs[None], out=np.full_like(sums, np.nan), where=np.broadcast_to(pairs > 0, sums.shape))  # pyright: ignore[reportAttributeAccessIssue]


def balanced_cells(
    labels: Int[Array | np.ndarray, " cells"], n_per_type: int, min_count: int, rng: np.random.Generator
) -> BalancedCells:
    """`n_per_type` random cells of each type with *more than* `min_count`: no type weighs more by its number.

    Drawn without replacement, and with it from a type of fewer than `n_per_type` cells. (The reference: 200 of each
    type with more than 300.)

    Raises:
        ValueError: no type is that common.
    """
    check.at_least("n_per_type", n_per_type, 1)
    labels = np.asarray(labels)
    values, counts = np.unique(labels[labels >= 0], return_counts=True)
    kept = counts > min_count
    if not kept.any():
        raise ValueError(
            f"no type has more than min_count={min_count} cells; the most common one has {max(counts, default=0)}."
        )
    rows = [
        rng.choice(np.flatnonzero(labels == value), n_per_type, replace=count < n_per_type)
        for value, count in zip(values[kept], counts[kept], strict=True)
    ]
    return BalancedCells(np.concatenate(rows), values[kept], counts[kept] / counts[kept].sum())


def asymmetry_index(matrix: Float[Array | np.ndarray, "types types"]) -> float:
    """|A - A'|_F / |A + A'|_F: 0 for a reciprocal matrix, 1 where every pair acts in one direction only.

    Entries are meant to be non-negative. The diagonal counts in the denominator alone.

    Raises:
        ValueError: entries that are not finite (leave out types without cells), or all zero.
    """
    matrix = np.asarray(matrix, np.float64)
    check.finite("matrix", matrix)
    if not matrix.any():
        raise ValueError("matrix is all zero: without interactions there is no asymmetry to measure.")
    return float(np.linalg.norm(matrix - matrix.T) / np.linalg.norm(matrix + matrix.T))


def asymmetry_test(
    scores: Float[Array | np.ndarray, "heads cells cells"],
    labels: Int[Array | np.ndarray, " cells"],
    n_types: int,
    n_permutations: int,
    rng: np.random.Generator,
) -> AsymmetryTest:
    """Is the type matrix more asymmetric than with the labels shuffled among the same cells?

    Heads are averaged; types without cells are left out. The null keeps the cell-by-cell scores, their asymmetry
    included, and the numbers of the types: a small p-value says that the asymmetry goes with the types.

    Raises:
        ValueError: fewer than two types with cells, or labels outside -1 .. n_types - 1.
    """
    check.at_least("n_permutations", n_permutations, 1)
    labels = np.asarray(labels)
    _check_labels(labels, n_types)
    inside = np.flatnonzero(labels >= 0)
    present, compact = np.unique(labels[inside], return_inverse=True)
    check.at_least("the number of types with cells", len(present), 2)
    mean = np.asarray(scores, np.float64).mean(axis=0)[np.ix_(inside, inside)][None]

    def index(of: np.ndarray) -> float:
        return asymmetry_index(type_interactions(mean, of, len(present))[0])

    observed = index(compact)
    null = np.array([index(rng.permutation(compact)) for _ in range(n_permutations)])
    # >= with room for rounding: relabellings that give the same matrix must count as ties.
    n_as_large = int(np.sum(null >= observed - 1e-12))
    return AsymmetryTest(observed, null, (1 + n_as_large) / (1 + n_permutations))


def _blocks(scores: Any) -> Iterable[Any]:
    """A whole matrix is one block."""
    return [scores] if isinstance(scores, np.ndarray | Array) else scores


def _members(labels: Any, n_types: int, dtype: np.dtype) -> np.ndarray:
    """One column a type, one where the cell is of it."""
    labels = np.asarray(labels)
    _check_labels(labels, n_types)
    return (labels[:, None] == np.arange(n_types)[None]).astype(dtype)


def _check_labels(labels: np.ndarray, n_types: int) -> None:
    check.at_least("n_types", n_types, 1)
    wrong = (labels < -1) | (labels >= n_types)
    if wrong.any():
        raise ValueError(
            f"labels must lie in -1 .. {n_types - 1} (n_types={n_types}; -1 leaves a cell out); "
            f"got {labels[wrong][0]} at cell {np.flatnonzero(wrong)[0]}."
        )
