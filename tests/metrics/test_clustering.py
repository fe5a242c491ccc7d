"""Clustering agreement: its parts against scikit-learn and formulas; with igraph the whole, with scanpy its graphs."""

import builtins

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_mutual_info_score

from scjax.metrics import clustering
from scjax.metrics.clustering import (
    CLUSTERING_AGREEMENT,
    RESOLUTIONS,
    adjusted_mutual_information,
    clustering_agreement,
    neighbour_graph,
)
from scjax.metrics.expression import Control, profiles
from scjax.types import Population


def side(means, names=None):
    """Profiles of populations with these means."""
    cells = {Population((names[i] if names else f"p{i:02d}",)): np.stack([x, x]) for i, x in enumerate(means)}
    control = {"": Control(np.zeros((2, means.shape[1])))}
    return profiles(cells, control, de=False, edistance=False)


def groups(rng, n, n_groups=3):
    return rng.normal(size=(n, 6)) + 30 * np.eye(6)[np.arange(n) % n_groups]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(3, 40), parts=st.integers(1, 6))
def test_mutual_information_equals_scikit_learn(seed, n, parts):
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, parts, n), rng.integers(0, 1 + parts // 2, n)
    assert adjusted_mutual_information(x, y) == pytest.approx(adjusted_mutual_info_score(x, y), abs=1e-9)
    assert adjusted_mutual_information(x, (x + 3) % 7) == pytest.approx(1)


@pytest.mark.parametrize("n", [5, 16, 40])
def test_graph_has_the_weights_of_its_definition(n):
    """One-sided weights, found again by a root search, sum to log2(k); both directions are joined."""
    from scipy.optimize import brentq

    x = np.random.default_rng(n).normal(size=(n, 4))
    k = min(15, n - 1)
    want = np.zeros((n, n))
    for i, d in enumerate(np.linalg.norm(x[:, None] - x[None], axis=-1)):
        near = np.argsort(d)[1:k]  # the first is the point itself
        rho = d[near[0]]
        sigma = brentq(lambda s, d=d, near=near, rho=rho: np.exp(-(d[near] - rho) / s).sum() - np.log2(k), 1e-6, 1e3)
        want[i, near] = np.exp(-(d[near] - rho) / sigma)
    np.testing.assert_allclose(neighbour_graph(x), want + want.T - want * want.T, atol=1e-5)


def test_points_that_coincide():
    graph = neighbour_graph(np.repeat(np.eye(3), 4, axis=0))
    assert np.isfinite(graph).all()
    assert (np.diag(graph) == 0).all()
    assert (graph[:4, :4] + np.eye(4) > 0.99).all()


def test_nothing_to_cluster_is_nan():
    rng = np.random.default_rng(0)
    few = side(groups(rng, 2))
    assert np.isnan(clustering_agreement(few, few))
    many = side(groups(rng, 6))
    failed = side(groups(rng, 6))
    failed.mean[2] = np.nan
    assert np.isnan(CLUSTERING_AGREEMENT.fn(failed, many)).all()


def test_without_igraph_it_says_what_to_install(monkeypatch):
    real_import = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "igraph":
            raise ImportError("no igraph")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    x = side(groups(np.random.default_rng(0), 9))
    with pytest.raises(ImportError, match="clustering_agreement needs igraph: pip install igraph"):
        clustering_agreement(x, x)


def test_the_definition_says_that_it_is_the_best_of_several():
    assert "the best of the resolutions 0.2, 0.4" in CLUSTERING_AGREEMENT.definition
    assert "optimistic" in CLUSTERING_AGREEMENT.definition


def test_clusters_that_are_there_are_found():
    """Equal groups agree fully, whatever the order of the populations; shuffled ones do not."""
    pytest.importorskip("igraph", reason="clustering_agreement is igraph's Leiden algorithm")
    rng = np.random.default_rng(0)
    real, pred = groups(rng, 48), groups(rng, 48)
    assert clustering_agreement(side(pred), side(real)) == 1
    assert clustering_agreement(side(rng.permutation(pred)), side(real)) < 0.3
    order, names = rng.permutation(48), [f"p{i:02d}" for i in range(48)]
    moved = [names[i] for i in order]
    noisy = real + rng.normal(0, 15, real.shape)
    assert clustering_agreement(side(noisy[order], moved), side(real[order], moved)) == clustering_agreement(
        side(noisy), side(real)
    )


def test_clusters_are_those_of_scanpy():
    pytest.importorskip("igraph", reason="clustering_agreement is igraph's Leiden algorithm")
    scanpy = pytest.importorskip("scanpy", reason="its graph and its clusters are what is compared with")
    import anndata

    rng = np.random.default_rng(1)
    for n in (12, 40):
        x = groups(rng, n) + rng.normal(0, 8, (n, 6))
        adata = anndata.AnnData(x)
        scanpy.pp.neighbors(adata, n_neighbors=min(15, n - 1), use_rep="X")
        graph = neighbour_graph(x)
        np.testing.assert_allclose(adata.obsp["connectivities"].toarray(), graph, atol=1e-5)
        for r in RESOLUTIONS:
            scanpy.tl.leiden(adata, resolution=r, key_added="found", flavor="igraph", n_iterations=2)
            np.testing.assert_array_equal(adata.obs["found"].astype(int), clustering._leiden(graph, r))
