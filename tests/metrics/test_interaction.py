"""Interaction by type: plain sums by hand, the recorded reference, reciprocity and its null."""

import goldens
import numpy as np
import pytest

from scjax.metrics.interaction import (
    asymmetry_index,
    asymmetry_test,
    balanced_cells,
    top_partners,
    type_interactions,
)

GOLDENS = goldens.FOLDER / "scimf"
LABELS = np.array([0, 1, 0, 2, 1, 0])


def softmax_scores(rng, n, n_heads=1):
    """Rows are distributions over other cells."""
    scores = rng.random((n_heads, n, n)) * (1 - np.eye(n))[None]
    return scores / scores.sum(axis=-1, keepdims=True)


def test_blocks_are_plain_means():
    scores = softmax_scores(np.random.default_rng(0), 6, n_heads=2)
    got = type_interactions(scores, LABELS, 3)
    for a in range(3):
        for b in range(3):
            block = scores[:, LABELS == a][:, :, LABELS == b]
            np.testing.assert_allclose(got[:, a, b], block.mean(axis=(1, 2)), rtol=1e-12)


def test_rows_receive_and_columns_send():
    scores = np.zeros((1, 4, 4))
    scores[0, 0, 3] = 8.0  # cell 3, of type 1, acts on cell 0, of type 0
    got = type_interactions(scores, np.array([0, 0, 1, 1]), 2)
    np.testing.assert_array_equal(got[0], [[0, 2], [0, 0]])


def test_self_pairs_lower_the_diagonal_by_their_share():
    """Uniform attention: with the diagonal zeros a type of n cells has (n - 1) / n of what others have."""
    n = len(LABELS)
    scores = ((1 - np.eye(n)) / (n - 1))[None]
    counts = np.bincount(LABELS)
    plain = type_interactions(scores, LABELS, 3)[0]
    np.testing.assert_allclose(np.diag(plain), (counts - 1) / counts / (n - 1))
    corrected = type_interactions(scores, LABELS, 3, exclude_self=True)[0]
    np.testing.assert_allclose(corrected[~np.eye(3, dtype=bool)], 1 / (n - 1))
    np.testing.assert_allclose(np.diag(corrected)[:2], 1 / (n - 1))
    assert np.isnan(corrected[2, 2])  # one cell has no other of its type


def test_cells_have_no_order():
    rng = np.random.default_rng(1)
    scores, perm = softmax_scores(rng, 6, n_heads=2), rng.permutation(6)
    got = type_interactions(scores[:, perm][:, :, perm], LABELS[perm], 3)
    np.testing.assert_allclose(got, type_interactions(scores, LABELS, 3), rtol=1e-12)


def test_unlabelled_cells_and_empty_types():
    scores = softmax_scores(np.random.default_rng(2), 6)
    labels = np.where(LABELS == 1, -1, LABELS)
    got = type_interactions(scores, labels, 3)[0]
    full = type_interactions(scores, LABELS, 3)[0]
    np.testing.assert_allclose(got[[0, 2]][:, [0, 2]], full[[0, 2]][:, [0, 2]])
    assert np.isnan(got[1]).all()
    assert np.isnan(got[:, 1]).all()


@pytest.mark.parametrize("exclude_self", [False, True])
def test_type_matrices_of_blocks_are_those_of_the_whole(exclude_self):
    rng = np.random.default_rng(3)
    scores = softmax_scores(rng, 6, n_heads=2) + rng.random((2, 6, 6))  # with a diagonal
    want = type_interactions(scores, LABELS, 3, exclude_self=exclude_self)
    for size in (1, 4, 6):
        blocks = (scores[:, start : start + size] for start in range(0, 6, size))
        np.testing.assert_allclose(
            type_interactions(blocks, LABELS, 3, exclude_self=exclude_self), want, rtol=1e-12, equal_nan=True
        )
    for start in (slice(4), slice(1, None)):
        with pytest.raises(ValueError, match="labels must be as many as the receivers of scores, .*; got 6"):
            type_interactions(iter([scores[:, start]]), LABELS, 3)
    with pytest.raises(ValueError, match="labels must be as many as the receivers of scores, 8; got 6"):
        type_interactions([scores, scores[:, :2]], LABELS, 3)


def test_top_partners_are_the_largest_others():
    """By sorting whole rows, ties by number; blocks change nothing. A score of the diagonal is not looked at."""
    rng = np.random.default_rng(4)
    scores = np.round(4 * rng.random((2, 9, 9)))  # many ties
    others = np.where(np.eye(9, dtype=bool), -1, scores)
    order = np.argsort(-others, axis=-1, kind="stable")
    for k in (1, 3, 8):
        whole = top_partners(scores, k)
        np.testing.assert_array_equal(whole.senders, order[..., :k])
        np.testing.assert_array_equal(whole.scores, np.take_along_axis(scores, order[..., :k], -1))
        blocks = top_partners((scores[:, start : start + 4] for start in range(0, 9, 4)), k)
        np.testing.assert_array_equal(blocks.senders, whole.senders)
        np.testing.assert_array_equal(blocks.scores, whole.scores)
    with pytest.raises(ValueError, match="k must be below the number of cells, 9, .*; got 9"):
        top_partners(scores, 9)


@pytest.mark.parametrize("path", sorted(GOLDENS.glob("attn_types_*.npz")), ids=lambda p: p.name)
def test_recorded_type_matrices(path):
    """The reference's type matrices from its recorded attention."""
    of = np.load(path)
    settings = np.load(path.with_name(path.name.replace(".f64", "")))
    names, counts = np.unique(settings["in/labels"], return_counts=True)
    order = list(settings["out/type_order"])
    assert set(order) == set(names[counts > settings["cfg/min_count"]])
    labels = np.array([order.index(x) if x in order else -1 for x in settings["in/labels"]])
    kept = balanced_cells(labels, 5, int(settings["cfg/min_count"]), np.random.default_rng(0))
    assert list(kept.types) == list(range(len(order)))
    np.testing.assert_allclose(kept.proportions, np.ravel(settings["out/type_ratio"]), rtol=1e-6)
    tolerance = 1e-11 if ".f64" in path.name else 5e-6
    for kind, scaled in (("softmax", "out/attn_softmax_scaled"), ("exp", "out/attn_exp_scaled")):
        got = type_interactions(of[scaled], labels, len(order))
        np.testing.assert_allclose(got, of[f"out/type_{kind}_heads"], rtol=0, atol=tolerance)
        mean = of[f"out/type_{kind}_mean"]
        np.testing.assert_allclose(got.mean(axis=0, keepdims=True), mean, rtol=0, atol=tolerance)


def test_balanced_cells_hold_equal_numbers_of_common_types():
    labels = np.repeat([3, 0, 1, -1], [40, 10, 5, 100])
    got = balanced_cells(labels, 20, 5, np.random.default_rng(0))
    assert list(got.types) == [0, 3]  # more than 5, not 5
    np.testing.assert_allclose(got.proportions, [0.2, 0.8])
    np.testing.assert_array_equal(labels[got.rows], np.repeat([0, 3], 20))
    assert len(set(got.rows[20:])) == 20  # enough cells: none twice
    with pytest.raises(ValueError, match="no type has more than min_count=40 cells; the most common one has 40"):
        balanced_cells(labels, 20, 40, np.random.default_rng(0))


def test_asymmetry_of_known_matrices():
    rng = np.random.default_rng(0)
    a = rng.random((5, 5))
    assert asymmetry_index(a + a.T) == 0
    assert asymmetry_index(np.triu(a, 1)) == pytest.approx(1)
    assert asymmetry_index(a) == pytest.approx(asymmetry_index(a.T))
    assert asymmetry_index(7 * a) == pytest.approx(asymmetry_index(a))
    assert asymmetry_index(np.array([[0.0, 3.0], [1.0, 0.0]])) == pytest.approx(0.5)


def test_p_values_are_valid_under_the_null():
    """Labels that mean nothing: P(p <= u) is at most about u. 60 worlds; three standard errors of room."""
    rng = np.random.default_rng(0)
    p = [
        asymmetry_test(softmax_scores(rng, 24), rng.permutation(np.repeat([0, 1, 2], 8)), 3, 39, rng).p_value
        for _ in range(60)
    ]
    for u in (0.1, 0.5, 0.9):
        assert abs(np.mean(np.array(p) <= u) - u) < 3 * (u * (1 - u) / 60) ** 0.5 + 0.025


def test_planted_direction_is_found():
    """Type 0 listens to type 1, not the other way round."""
    rng = np.random.default_rng(1)
    labels = np.repeat([0, 1], 15)
    scores = rng.random((2, 30, 30))
    scores[:, :15, 15:] *= 3
    got = asymmetry_test(scores, labels, 2, 99, rng)
    assert got.p_value == pytest.approx(1 / 100)
    assert got.index > got.null.max()
    assert got.index == pytest.approx(asymmetry_index(type_interactions(scores, labels, 2).mean(axis=0)))


def test_reciprocal_scores_have_no_asymmetry():
    rng = np.random.default_rng(2)
    scores = rng.random((1, 12, 12))
    got = asymmetry_test(scores + scores.transpose(0, 2, 1), np.repeat([0, 2], 6), 3, 19, rng)
    assert got.index == pytest.approx(0, abs=1e-12)
    assert got.p_value == 1  # rounding does not break the ties


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: type_interactions(s, LABELS, 2), "labels must lie in -1 .. 1 .*got 2 at cell 3"),
        (
            lambda s: asymmetry_test(s, LABELS * 0, 3, 9, np.random.default_rng(0)),
            "types with cells must be at least 2",
        ),
        (lambda s: asymmetry_index(np.full((2, 2), np.nan)), "matrix must hold finite"),
        (lambda s: asymmetry_index(np.zeros((2, 2))), "matrix is all zero"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(softmax_scores(np.random.default_rng(0), 6))
