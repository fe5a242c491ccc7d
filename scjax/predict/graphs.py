"""Cells among cells: velocities as the eye sees them in an embedding, and attention as a sparse matrix."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from scjax.check import at_least, finite, positive

__all__ = ["embedded_velocity", "sparse_attention"]

_PAIRS = 1 << 24  # distances that are held together


def embedded_velocity(
    latent: Float[np.ndarray, "cells dims"],
    velocity: Float[np.ndarray, "cells dims"],
    embedding: Float[np.ndarray, "cells axes"],
    *,
    n_neighbours: int = 30,
    temperature: float = 0.1,
) -> Float[np.ndarray, "cells axes"]:
    r"""Arrows for an embedding that is no linear map of the latent space (UMAP, t-SNE): where the neighbours ahead lie.

    sum_j (p_ij - 1/k) (e_j - e_i) / |e_j - e_i|,   p_ij = softmax_j cos(x_j - x_i, v_i) / temperature,

    over the k nearest cells j of cell i in the latent space. An arrow shows a direction, and by its length (below 2)
    how well the neighbours agree on it; it has no unit. Without a velocity it is zero.

    Args:
        n_neighbours: k; all other cells where there are fewer.
        temperature: of the softmax, in cosines.

    Raises:
        ValueError: fewer than two cells, numbers that are not finite, settings out of range.

    Reference: La Manno et al., Nature 560 (2018), methods, with cosines for correlations as in Bergen et al., Nat.
    Biotechnol. 38 (2020).
    """
    at_least("the number of cells", len(latent), 2)
    at_least("n_neighbours", n_neighbours, 1)
    positive("temperature", temperature)
    for name, values in (("latent", latent), ("velocity", velocity), ("embedding", embedding)):
        finite(f"the {name}", values)
    k = min(n_neighbours, len(latent) - 1)
    squares = np.einsum("cd,cd->c", latent, latent)
    arrows = np.empty(embedding.shape, np.float32)
    step = max(1, _PAIRS // len(latent))
    for start in range(0, len(latent), step):
        rows = np.arange(start, min(start + step, len(latent)))
        distances = squares[None] - 2 * latent[rows] @ latent.T  # and the row's own square, which orders nothing
        distances[np.arange(len(rows)), rows] = np.inf
        near = np.argpartition(distances, k - 1, axis=1)[:, :k]
        ahead = np.einsum("ckd,cd->ck", _directions(latent[near] - latent[rows, None]), _directions(velocity[rows]))
        p = np.exp((ahead - ahead.max(axis=1, keepdims=True)) / temperature)
        p = p / p.sum(axis=1, keepdims=True) - 1 / k
        arrows[rows] = np.einsum("ck,cka->ca", p, _directions(embedding[near] - embedding[rows, None]))
    return arrows


def sparse_attention(
    blocks: Iterable[Float[np.ndarray, "heads _ senders"]],
    cells: Int[np.ndarray, " senders"],
    n_partners: int,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Receivers, senders and the mean over the heads of what one attends to the other, for the strongest partners.

    Args:
        blocks: attention of one population [heads, receivers, senders] in blocks of receivers, in order.
        cells: the numbers of its cells, by which the entries are named.
        n_partners: of each receiver, itself left out; all where there are fewer.

    Raises:
        ValueError: n_partners below 1.
    """
    at_least("n_partners", n_partners, 1)
    k, start = min(n_partners, len(cells) - 1), 0
    for block in blocks:
        weights = np.asarray(block, np.float32).mean(axis=0)
        own = np.arange(len(weights))
        weights[own, start + own] = -1.0
        best = np.argpartition(-weights, k - 1, axis=1)[:, :k]
        receivers = np.repeat(cells[start + own], k)
        yield receivers, cells[best].ravel(), np.take_along_axis(weights, best, axis=1).ravel()
        start += len(own)


def _directions(x: Any) -> Any:
    """Of unit length, or zero."""
    norms = np.linalg.norm(x, axis=-1, keepdims=True)
    return np.divide(x, norms, out=np.zeros_like(x), where=norms > 0)
