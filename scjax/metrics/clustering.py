"""Whether populations that are alike are predicted to be alike: cell-eval's clustering agreement. Needs igraph.

The means of the populations are joined in a nearest-neighbour graph with the weights of UMAP and split into clusters
by Leiden's algorithm; the clusters of the predicted and of the real means are compared. What the clusters are hangs on
a random order and on igraph's version (values here are equal to cell-eval 0.8.2 with the same igraph), and what is
reported is the best of seven resolutions: an optimistic number, which chance alone lifts above 0.
"""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from scjax.metrics.expression import ExpressionMetric, Profiles

__all__ = ["CLUSTERING_AGREEMENT", "adjusted_mutual_information", "clustering_agreement", "neighbour_graph"]

RESOLUTIONS = (0.2, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0)  # of the predicted clusters; that of the real ones is 1
N_NEIGHBOURS = 15  # a population itself included
N_ITERATIONS = 2


def clustering_agreement(pred: Profiles, real: Profiles) -> float:
    """The best adjusted mutual information of real and predicted clusters over `RESOLUTIONS`, 0 at least.

    NaN with fewer than three populations, or where one has no prediction.

    Raises:
        ImportError: igraph is not installed.
    """
    order = np.argsort([str(p) for p in real.populations], kind="stable")
    ours, theirs = pred.mean[order], real.mean[order]
    if len(order) < 3 or not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return float("nan")
    truth, graph = _leiden(neighbour_graph(theirs), 1.0), neighbour_graph(ours)
    return max(0.0, *(adjusted_mutual_information(truth, _leiden(graph, r)) for r in RESOLUTIONS))


def neighbour_graph(x: Float[np.ndarray, "points dims"]) -> Float[np.ndarray, "points points"]:
    """Symmetric weights in [0, 1] of the nearest neighbours, as UMAP has them.

    From i to its k-th neighbour w = exp(-(d - rho) / sigma), rho being the least distance above 0 and sigma such that
    the k weights sum to log2(k); then w + w' - w w' of both directions.

    Reference: McInnes, Healy, Melville, arXiv 1802.03426 (2018), section 3.
    """
    from scipy.spatial.distance import cdist

    n_neighbours = min(N_NEIGHBOURS, len(x) - 1)
    between = cdist(x, x)
    nearest = np.argsort(between, axis=1, kind="stable")[:, :n_neighbours]
    distances = np.take_along_axis(between, nearest, axis=1)
    positive = np.where(distances > 0, distances, np.inf).min(axis=1)
    rho = np.where(np.isfinite(positive), positive, 0.0)
    beyond = np.maximum(distances - rho[:, None], 0)
    low, high, sigma = np.zeros(len(x)), np.full(len(x), np.inf), np.ones(len(x))
    for _ in range(64):
        too_much = np.exp(-beyond[:, 1:] / sigma[:, None]).sum(axis=1) > np.log2(n_neighbours)
        low, high = np.where(too_much, low, sigma), np.where(too_much, sigma, high)
        sigma = np.where(np.isfinite(high), (low + np.minimum(high, np.finfo(float).max)) / 2, 2 * sigma)
    least = 1e-3 * np.where(rho > 0, distances.mean(axis=1), distances.mean())
    weights = np.exp(-beyond / np.maximum(np.maximum(sigma, least), np.finfo(float).tiny)[:, None])
    graph = np.zeros_like(between)
    np.put_along_axis(graph, nearest, np.where(nearest == np.arange(len(x))[:, None], 0, weights), axis=1)
    return graph + graph.T - graph * graph.T


def adjusted_mutual_information(x: Int[np.ndarray, " n"], y: Int[np.ndarray, " n"]) -> float:
    """(I - E I) / ((H(x) + H(y)) / 2 - E I): 1 for equal partitions, 0 on average for independent ones of these sizes.

    E I is over all permutations. Two partitions into one part each, or into single points, are equal.

    Reference: Vinh, Epps, Bailey, JMLR 11 (2010), eq. 24a.
    """
    from scipy.special import gammaln, xlogy

    n = len(x)
    table = np.zeros((len(np.unique(x)), len(np.unique(y))))
    np.add.at(table, (np.unique(x, return_inverse=True)[1], np.unique(y, return_inverse=True)[1]), 1)
    if table.shape in ((1, 1), (n, n)):
        return 1.0
    a, b = table.sum(axis=1), table.sum(axis=0)
    entropies = [-np.sum(xlogy(sizes / n, sizes / n)) for sizes in (a, b)]
    found = np.sum(xlogy(table / n, n * table / np.outer(a, b)))
    log_factorial = gammaln(np.arange(n + 1) + 1.0)
    expected = 0.0
    for a_i in a.astype(int):
        for b_j in b.astype(int):
            k = np.arange(max(1, a_i + b_j - n), min(a_i, b_j) + 1)
            log_chance = (
                log_factorial[[a_i, b_j, n - a_i, n - b_j]].sum()
                - log_factorial[n]
                - log_factorial[k]
                - log_factorial[a_i - k]
                - log_factorial[b_j - k]
                - log_factorial[n - a_i - b_j + k]
            )
            expected += np.sum(k / n * np.log(n * k / (a_i * b_j)) * np.exp(log_chance))
    scale = np.mean(entropies) - expected
    return float((found - expected) / scale) if abs(scale) > np.finfo(float).eps else 0.0


class _Numbers:
    """Random numbers for igraph of which nobody else takes any."""

    def __init__(self):
        self.state = np.random.RandomState(0)

    def getrandbits(self, k: int) -> int:
        return self.state.tomaxint() & ((1 << k) - 1)

    def randint(self, a: int, b: int) -> int:
        return self.state.randint(a, b + 1)

    def random(self) -> float:
        return self.state.random()

    def gauss(self, mean: float, sd: float) -> float:
        return self.state.normal(mean, sd)


def _leiden(graph: Float[np.ndarray, "points points"], resolution: float) -> Int[np.ndarray, " points"]:
    import random

    igraph = _igraph()
    ends = np.argwhere(graph > 0)  # each edge in both directions, as scanpy gives them
    found = igraph.Graph(n=len(graph), edges=ends.tolist())
    igraph.set_random_number_generator(_Numbers())
    try:
        parts = found.community_leiden(
            objective_function="modularity",
            weights=graph[tuple(ends.T)].tolist(),
            resolution=resolution,
            n_iterations=N_ITERATIONS,
        )
    finally:
        igraph.set_random_number_generator(random)  # igraph's own default
    return np.array(parts.membership)


def _igraph() -> Any:
    try:
        import igraph
    except ImportError as err:
        raise ImportError("clustering_agreement needs igraph: pip install igraph. Or leave this metric out.") from err
    return igraph


CLUSTERING_AGREEMENT = ExpressionMetric(
    "clustering_agreement",
    "adjusted mutual information of the Leiden clusters of the real means (resolution 1) and of the predicted ones, "
    f"the best of the resolutions {', '.join(map(str, RESOLUTIONS))} and 0 at least, so that it is optimistic; graph "
    f"of the {N_NEIGHBOURS} nearest (itself included) with UMAP's weights; igraph, modularity, {N_ITERATIONS} rounds",
    "1",
    "higher is better",
    lambda pred, real: np.full(len(real.populations), clustering_agreement(pred, real)),
)
