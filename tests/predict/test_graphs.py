"""Arrows in an embedding and sparse attention, against their definitions."""

import numpy as np
import pytest

from scjax.predict import graphs
from scjax.predict.graphs import embedded_velocity, sparse_attention


@pytest.fixture(scope="module")
def plane():
    """Cells on a plane in five dimensions, seen turned, mirrored and stretched in an embedding of two."""
    rng = np.random.default_rng(0)
    flat = rng.uniform(-1, 1, (300, 2)).astype(np.float32)
    into, _ = np.linalg.qr(rng.normal(size=(5, 2)))
    turned = 7.0 * np.array([[0.6, 0.8], [0.8, -0.6]])
    return flat, flat @ into.T.astype(np.float32), (flat @ turned.T).astype(np.float32), into, turned


def test_arrows_point_along_the_velocity(plane):
    """Through a similarity: the arrow of the interior is the image of the velocity, to the spread of 30 neighbours."""
    flat, latent, embedding, into, turned = plane
    v = np.tile(np.float32([0.3, 0.1]), (300, 1))
    arrows = embedded_velocity(latent, (v @ into.T).astype(np.float32), embedding)
    inside = np.abs(flat).max(axis=1) < 0.6
    wanted = v[0] @ turned.T
    cosines = arrows[inside] @ wanted / (np.linalg.norm(arrows[inside], axis=1) * np.linalg.norm(wanted))
    assert np.median(cosines) > 0.97
    assert (np.linalg.norm(arrows, axis=1) < 2).all()


def by_definition(latent, v, embedding, k, temperature):
    found = np.zeros(embedding.shape)
    for i in range(len(latent)):
        others = [j for j in range(len(latent)) if j != i]
        near = sorted(others, key=lambda j: np.sum((latent[j] - latent[i]) ** 2))[:k]
        dx = latent[near] - latent[i]
        cosines = dx @ v[i] / np.maximum(np.linalg.norm(dx, axis=1) * np.linalg.norm(v[i]), 1e-30)
        p = np.exp(cosines / temperature) / np.exp(cosines / temperature).sum()
        de = embedding[near] - embedding[i]
        found[i] = ((p - 1 / k)[:, None] * de / np.linalg.norm(de, axis=1, keepdims=True)).sum(axis=0)
    return found


@pytest.mark.parametrize(("k", "together"), [(5, 1 << 24), (5, 120), (100, 1 << 24)])
def test_arrows_by_their_definition(monkeypatch, k, together):
    """Also some cells at a time, and with more neighbours than there are."""
    monkeypatch.setattr(graphs, "_PAIRS", together)
    rng = np.random.default_rng(1)
    latent, v, embedding = (rng.normal(size=(40, d)).astype(np.float32) for d in (4, 4, 2))
    v[3] = 0.0
    arrows = embedded_velocity(latent, v, embedding, n_neighbours=k, temperature=0.3)
    wanted = by_definition(*(a.astype(np.float64) for a in (latent, v, embedding)), min(k, 39), 0.3)
    np.testing.assert_allclose(arrows, wanted, atol=1e-5)
    np.testing.assert_allclose(arrows[3], 0.0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_neighbours": 0}, "n_neighbours must be at least 1; got 0"),
        ({"temperature": 0.0}, "temperature must be a positive number; got 0.0"),
        ({"embedding": np.float32([[0, 1], [np.nan, 0], [1, 1]])}, "the embedding must hold finite numbers"),
        (
            {"latent": np.ones((1, 2), np.float32), "embedding": np.ones((1, 2), np.float32)},
            "the number of cells must be at least 2; got 1",
        ),
    ],
)
def test_bad_arguments(options, message):
    given = {"latent": np.eye(3, 2, dtype=np.float32), "embedding": np.eye(3, 2, dtype=np.float32), **options}
    with pytest.raises(ValueError, match=message):
        embedded_velocity(velocity=np.ones_like(given["latent"]), **given)


@pytest.mark.parametrize("n_partners", [1, 3, 5, 50])
def test_the_strongest_partners(n_partners):
    """Of the mean over heads, without the cell itself; blocks and names of the cells change nothing else."""
    rng = np.random.default_rng(2)
    attention = rng.uniform(size=(2, 6, 6)).astype(np.float32)
    cells = np.array([4, 9, 11, 12, 20, 21])
    blocks = [attention[:, :4].copy(), attention[:, 4:].copy()]
    receivers, senders, weights = map(np.concatenate, zip(*sparse_attention(blocks, cells, n_partners), strict=True))
    mean = attention.mean(axis=0)
    np.fill_diagonal(mean, -np.inf)
    k = min(n_partners, 5)
    assert len(weights) == 6 * k
    for i, cell in enumerate(cells):
        best = np.argsort(-mean[i])[:k]
        told = dict(zip(senders[receivers == cell], weights[receivers == cell], strict=True))
        assert told == pytest.approx({cells[j]: mean[i, j] for j in best})
    with pytest.raises(ValueError, match="n_partners must be at least 1; got 0"):
        list(sparse_attention(blocks, cells, 0))
