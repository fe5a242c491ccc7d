"""Fates: a branching world whose transitions are known, scipy's distances, and the clones of the LARRY data."""

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from scjax.metrics.lineage import (
    LINEAGE_METRICS,
    ClonalTransitions,
    clonal_floor,
    clonal_transitions,
    independent_transitions,
    jensen_shannon,
    predicted_transitions,
    proportion_errors,
    total_variation,
    transition_error,
    type_proportions,
    type_votes,
)

FATES = np.array([[0.0, 0.0, 0.8, 0.2], [0.0, 0.0, 0.1, 0.9]])  # of types 0 and 1, which are all that there is at first
CENTRES = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])


def branching_world(n_clones, seed, fates=FATES):
    """Clones of one or two early cells of one type, and four late ones of fates drawn for that type."""
    rng = np.random.default_rng(seed)
    clones, times, types = [], [], []
    for clone in range(n_clones):
        early = int(rng.random() < 0.4)
        late = rng.choice(len(CENTRES), 4, p=fates[early])
        mine = [early] * int(rng.integers(1, 3)) + list(late)
        clones += [clone] * len(mine)
        times += [0.0] * (len(mine) - 4) + [1.0] * 4
        types += mine
    types = np.array(types)
    return np.array(clones), np.array(times), types, CENTRES[types] + rng.normal(size=(len(types), 2))


@pytest.fixture(scope="module")
def world():
    return branching_world(400, 0)


@pytest.fixture(scope="module")
def truth(world):
    clones, times, types, _ = world
    return clonal_transitions(clones, times, types, 4, start=0.0, end=1.0)


def test_distances_of_shares():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(5), 7), rng.dirichlet(np.ones(5), 7)
    np.testing.assert_allclose(jensen_shannon(p, q), jensenshannon(p, q, base=2, axis=1) ** 2, rtol=1e-9)
    np.testing.assert_allclose(total_variation(p, q), np.maximum(p - q, 0).sum(axis=1), rtol=1e-9)
    apart = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    assert total_variation(*apart) == jensen_shannon(*apart) == 1
    assert total_variation(p, p).max() == jensen_shannon(p, p).max() == 0
    for name, metric in LINEAGE_METRICS.items():
        assert (metric.name, metric.direction) == (name, "lower is better")
        assert len(metric.definition) > 20


def test_votes_are_those_of_the_nearest_cells(world):
    _, _, types, cells = world
    votes = type_votes(cells[:50], cells, types, 4, n_neighbours=7)
    distances = np.linalg.norm(cells[:50, None] - cells[None], axis=2)
    expected = np.eye(4)[types[np.argsort(distances, axis=1)[:, :7]]].mean(axis=1)
    np.testing.assert_allclose(votes, expected)
    half_way = type_votes(np.array([[5.0, 0.0]]), CENTRES, np.arange(4), 4, n_neighbours=2)
    np.testing.assert_allclose(half_way, [[0.5, 0.5, 0, 0]])
    np.testing.assert_allclose(type_votes(cells[:2], CENTRES, np.arange(4), 4).sum(axis=1), 1)  # four of them vote


def test_clonal_transitions_are_those_of_the_world(world, truth):
    """1600 late cells: the shares are right within four standard errors."""
    assert truth.n_clones == 400
    assert truth.by_clone.sum() == pytest.approx(1)
    np.testing.assert_allclose(truth.matrix[:2], FATES, atol=4 * 0.5 / np.sqrt(600))
    assert np.isnan(truth.matrix[2:]).all()
    assert truth.start[0] == pytest.approx(0.6, abs=4 * 0.5 / np.sqrt(400))
    assert truth.start[2:].sum() == 0


def test_clones_by_hand():
    """A clone split at the start gives to both; one seen once, and cells without a clone, give nothing."""
    clones = np.array([5, 5, 5, 5, 8, 8, 9, -1, -1])
    times = np.array([0.0, 0, 0, 1, 0, 1, 0, 0, 1])
    types = np.array([0, 0, 1, 1, 1, 0, 1, 1, 1])
    made = clonal_transitions(clones, times, types, 2, start=0, end=1)
    np.testing.assert_array_equal(made.clones, [5, 8])
    np.testing.assert_allclose(made.by_clone.sum(axis=0), [[0, 1 / 3], [1 / 2, 1 / 6]])
    np.testing.assert_allclose(made.matrix, [[0, 1], [3 / 4, 1 / 4]])
    by_cell = clonal_transitions(clones, times, types, 2, start=0, end=1, weight="start cells")
    np.testing.assert_allclose(by_cell.matrix, [[0, 1], [1 / 2, 1 / 2]])


def test_a_true_prediction_is_at_the_floor_and_independence_is_not(truth, world):
    """Cells that are sent to the fates of their type; and cells that all have the same fates."""
    rng = np.random.default_rng(1)
    _, _, types, cells = world
    start = rng.integers(2, size=600)

    def sent(fates):
        ends = np.array([rng.choice(4, p=fates[s]) for s in start])
        return predicted_transitions(start, CENTRES[ends] + rng.normal(size=(600, 2)), cells, types, 4)

    for metric in LINEAGE_METRICS:
        good = transition_error(sent(FATES), truth, metric)
        swapped = transition_error(sent(FATES[::-1]), truth, metric)
        same = transition_error(independent_transitions(truth), truth, metric)
        floor = clonal_floor(truth, metric)
        assert good.value < floor.mean() + 2 * floor.std() + 0.03
        assert good.interval.high < same.interval.low
        assert same.value < swapped.value
        assert good.missing == 0
    assert transition_error(sent(FATES[::-1]), truth).value == pytest.approx(0.7, abs=0.06)  # |.8 - .1|, either row
    expected = 0.7 * truth.start[0] * truth.start[1] * 2  # both rows are away from the mixture of the two
    assert transition_error(independent_transitions(truth), truth).value == pytest.approx(expected, abs=0.06)


def test_interval_over_clones_covers_the_true_distance():
    """Of a wrong prediction, in 60 worlds of 60 clones; and it is wider with fewer of them."""
    wrong = np.vstack([FATES[:, ::-1] * 0.3 + FATES * 0.7, np.full((2, 4), np.nan)])
    hits, widths = [], {60: [], 240: []}
    for n, found in widths.items():
        for seed in range(60 if n == 60 else 5):
            clones, times, types, _ = branching_world(n, seed + 100)
            made = clonal_transitions(clones, times, types, 4, start=0.0, end=1.0)
            error = transition_error(wrong, made, n_resamples=300)
            found.append(error.interval.high - error.interval.low)
            true = 0.6 * total_variation(wrong[0], FATES[0]) + 0.4 * total_variation(wrong[1], FATES[1])
            if n == 60:
                hits.append(error.interval.low <= true <= error.interval.high)
    assert np.mean(hits) >= 0.8  # 95 % less four standard errors of 60 worlds, and a little
    assert np.mean(widths[240]) < 0.7 * np.mean(widths[60])


def test_what_the_matrix_does_not_have_is_said(truth):
    matrix = truth.matrix.copy()
    matrix[1] = np.nan
    error = transition_error(matrix, truth)
    assert error.missing == pytest.approx(truth.start[1])
    assert error.value == 0
    nothing = transition_error(np.full((4, 4), np.nan), truth)
    assert np.isnan(nothing.value)
    assert not nothing.interval.exists
    few = ClonalTransitions(truth.matrix, truth.start, truth.by_clone[:5], truth.clones[:5])
    assert transition_error(truth.matrix, few).interval.note == "5 clones, fewer than 10"


def test_proportions_over_time(world):
    """A prediction with the late types swapped in half of its cells; voting itself costs next to nothing here."""
    _, times, types, cells = world
    late = times == 1.0
    shifted = np.concatenate([cells[late], np.tile(CENTRES[3], (late.sum(), 1))])
    made = proportion_errors(
        {1.0: shifted, 0.0: cells[~late]},
        {0.0: (cells[~late], types[~late]), 1.0: (cells[late], types[late])},
        cells,
        types,
        4,
    )
    assert made.times == (0.0, 1.0)
    np.testing.assert_allclose(made.observed[1], type_proportions(types[late], 4))
    expected = (1 - type_proportions(types[late], 4)[3]) / 2
    assert made.errors["total_variation"][1] == pytest.approx(expected, abs=0.01)
    assert made.errors["total_variation"][0] == made.floors["total_variation"][0] < 0.01
    assert (made.floors["jensen_shannon"] < 0.01).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: type_votes(CENTRES, CENTRES[:, :1], np.arange(4), 4), "equal dims"),
        (lambda: type_votes(CENTRES * np.nan, CENTRES, np.arange(4), 4), "cells must hold finite"),
        (lambda: type_votes(CENTRES, CENTRES, np.arange(4), 3), r"labels must lie in 0 .. 2 \(n_types=3\)"),
        (lambda: type_votes(CENTRES, CENTRES, np.arange(3), 4), "one type for each of 4 cells"),
        (lambda: type_votes(CENTRES, CENTRES, np.arange(4), 4, n_neighbours=0), "n_neighbours must be at least 1"),
        (lambda: type_proportions(np.zeros(0, int), 2), "number of cells must be at least 1"),
        (lambda: proportion_errors({}, {}, CENTRES, np.arange(4), 4), "it is empty"),
        (lambda: proportion_errors({2.0: CENTRES}, {}, CENTRES, np.arange(4), 4), "time 2, which is not in observed"),
        (
            lambda: predicted_transitions(np.zeros(3, int), CENTRES, CENTRES, np.arange(4), 4),
            "same cells in the same order; got 3 and 4",
        ),
        (
            lambda: clonal_transitions(np.arange(4), np.arange(4.0), np.arange(4), 4, start=0.0, end=1.0),
            "no clone has cells at both times 0 and 1",
        ),
        (
            lambda: clonal_transitions(np.arange(4), np.arange(4.0), np.arange(4), 4, start=1.0, end=0.0),
            "start must lie before end",
        ),
        (
            lambda: clonal_transitions(np.arange(4), np.arange(3.0), np.arange(4), 4, start=0.0, end=1.0),
            "one value a cell; got 4, 3 and 4",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_matrix_of_other_types(truth):
    with pytest.raises(ValueError, match="the clones' 4 types"):
        transition_error(np.eye(3), truth)
    with pytest.raises(ValueError, match="metric must be one of"):
        transition_error(np.eye(4), truth, "tv")


def test_clones_of_the_larry_data(shared_data):
    """Day 4 to day 6: the matrix is that of a plain loop over the clones, and fates are not independent of origin."""
    import anndata

    adata = anndata.read_h5ad(shared_data / "ts_larry_weinreb2020_clones.h5ad")
    names, types = np.unique(adata.obs["cell_type"].astype(str), return_inverse=True)
    clones, times = adata.obs["clone"].to_numpy(), adata.obs["time"].to_numpy(float)
    np.testing.assert_array_equal(adata.obsm["X_clone"].toarray().argmax(axis=1), clones)
    made = clonal_transitions(clones, times, types, len(names), start=4.0, end=6.0)
    joint = np.zeros((len(names), len(names)))
    shared = set(clones[times == 4.0]) & set(clones[times == 6.0])
    for clone in shared:
        early, late = (types[(clones == clone) & (times == t)] for t in (4.0, 6.0))
        for a in early:
            for b in late:
                joint[a, b] += 1 / (len(early) * len(late))
    assert made.n_clones == len(shared) == 113
    np.testing.assert_allclose(made.by_clone.sum(axis=0), joint / joint.sum(), atol=1e-12)
    mast = list(names).index("Mast")
    assert made.matrix[mast, mast] > 0.5
    independent = transition_error(independent_transitions(made), made)
    floor = clonal_floor(made)
    assert independent.interval.low > 0.2
    assert independent.value > np.mean(floor)  # with half the clones, fates from clones say more than no origin at all
    cells = adata.obsm["X_spring"].astype(np.float64)
    votes = type_votes(cells[times == 6.0], cells[times == 4.0], types[times == 4.0], len(names))
    assert np.mean(votes.argmax(axis=1) == types[times == 6.0]) > 0.6
