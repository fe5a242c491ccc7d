"""Training-free baselines: exact where the truth moves as they assume, and equal to the numbers recorded elsewhere."""

import numpy as np
import pytest

from scjax.metrics.baselines import (
    linear_interpolation,
    nearest_earlier,
    nearest_later,
    ot_displacement,
    ot_interpolation,
    replicate_floor,
    training_free,
)
from scjax.metrics.population import POPULATION_METRICS, wasserstein1, wasserstein2

W1 = {"W1": POPULATION_METRICS["W1"]}
VELOCITY = np.array([[2.0, -1.0, 0.5]])


@pytest.fixture(scope="module")
def moving():
    """A cloud that moves as one, observed at times 0, 1 and 4, in another order each time."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 3))
    return x, {t: rng.permutation(x) + t * VELOCITY for t in (0.0, 4.0, 1.0)}


@pytest.mark.parametrize("rule", [linear_interpolation, lambda s, t: ot_interpolation(s, t, seed=0)])
def test_linear_motion_is_recovered_exactly(rule, moving):
    x, snapshots = moving
    assert wasserstein2(rule(snapshots, 2.5), x + 2.5 * VELOCITY) == pytest.approx(0, abs=1e-6)


def test_forecast_goes_on_along_the_means(moving):
    x, snapshots = moving
    assert wasserstein2(linear_interpolation(snapshots, 7.0), x + 7 * VELOCITY) == pytest.approx(0, abs=1e-6)


def test_neighbours_are_copied(moving):
    _, snapshots = moving
    assert np.array_equal(nearest_earlier(snapshots, 3.9), snapshots[1.0])
    assert np.array_equal(nearest_later(snapshots, 1.1), snapshots[4.0])
    assert np.array_equal(nearest_earlier(snapshots, 9.0), snapshots[4.0])


def test_displacement_is_a_geodesic():
    """W2(x0, x_s) = s W2(x0, x1) along the displacement interpolation (constant speed), here of unequal numbers."""
    rng = np.random.default_rng(1)
    x0, x1 = rng.normal(size=(20, 2)), rng.normal(size=(33, 2)) * 2 + 3
    points, mass = ot_displacement({0.0: x0, 2.0: x1}, 0.5)
    assert mass.sum() == pytest.approx(1)
    whole = wasserstein2(x0, x1)
    assert wasserstein2(x0, points, y_weights=mass) == pytest.approx(0.25 * whole, rel=1e-6)
    assert wasserstein2(points, x1, x_weights=mass) == pytest.approx(0.75 * whole, rel=1e-6)


def test_cells_are_drawn_by_their_mass():
    rng = np.random.default_rng(2)
    snapshots = {0.0: rng.normal(size=(6, 2)), 1.0: rng.normal(size=(9, 2)) + 5}
    points, mass = ot_displacement(snapshots, 0.5)
    drawn = ot_interpolation(snapshots, 0.5, n_cells=9000, seed=0)
    counts = (drawn[:, None] == points[None]).all(axis=2).sum(axis=0)
    assert np.abs(counts - 9000 * mass).max() <= 1  # systematic: floor or ceiling of the expected count
    few = ot_interpolation(snapshots, 0.5, seed=0)
    assert few.shape == np.unique(few, axis=0).shape == (9, 2)
    assert np.array_equal(few, ot_interpolation(snapshots, 0.5, seed=0))
    assert not np.array_equal(few, ot_interpolation(snapshots, 0.5, seed=1))


def test_table_of_baselines_says_what_is_not_defined(moving):
    _, snapshots = moving
    inside = training_free(snapshots, 2.5, n_cells=12, seed=0)
    assert list(inside) == ["nearest earlier time", "nearest later time", "linear interpolation", "OT interpolation"]
    assert len(inside["OT interpolation"].cells) == 12
    beyond = training_free(snapshots, 9.0, seed=0)
    assert list(beyond) == ["nearest earlier time", "linear extrapolation", "OT interpolation"]
    assert beyond["OT interpolation"] == (None, "not defined: no training time after 9")
    alone = training_free({0.0: snapshots[0.0]}, 9.0, seed=0)
    assert alone["linear extrapolation"].cells is None


def test_floor_is_that_of_independent_halves():
    """Disjoint halves: with 4 distinct cells every split is at a positive distance."""
    real = np.arange(4.0)[:, None] ** 2
    floor = replicate_floor(real, W1, seed=0)
    assert floor.n_cells == 2
    assert all(v > 0 for v in floor.scores["W1"].values)
    assert replicate_floor(np.random.default_rng(0).normal(size=(50, 2)), W1, n_cells=10, seed=0).n_cells == 10


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: nearest_earlier(s, 1.0), "t=1 is to be predicted, but is among the training times"),
        (lambda s: nearest_earlier(s, -1.0), "before the first training time, 0"),
        (lambda s: nearest_later(s, 5.0), "after the last training time, 4"),
        (lambda s: ot_interpolation(s, 5.0, seed=0), "after the last training time, 4"),
        (lambda s: linear_interpolation({0.0: s[0.0]}, 5.0), "from two training times; snapshots has one"),
        (lambda s: nearest_earlier({}, 5.0), "it is empty"),
        (lambda s: nearest_earlier({**s, 2.0: s[0.0][:, :2]}, 5.0), "equal dims"),
        (lambda s: nearest_earlier({**s, 2.0: s[0.0] * np.nan}, 5.0), r"snapshots\[2\] must hold finite"),
        (lambda s: replicate_floor(s[0.0][:3], seed=0), "at least 4"),
    ],
)
def test_bad_input_is_named(call, message, moving):
    with pytest.raises(ValueError, match=message):
        call(moving[1])


@pytest.mark.parametrize(
    ("held_out", "earlier", "later", "between", "floor"),
    [(2.0, 19.17, 13.47, 11.14, 4.60), (4.0, 13.08, 24.85, 12.91, 4.55)],
)
def test_numbers_of_the_klein_data(shared_data, held_out, earlier, later, between, floor):
    """W1 of the baselines as the data sets' README gives them: 10 PCs, centred, fitted without the held-out time."""
    import anndata

    adata = anndata.read_h5ad(shared_data / "ts_mesc_klein2015.h5ad")
    x = np.asarray(adata.X if isinstance(adata.X, np.ndarray) else adata.X.todense(), np.float64)
    time = adata.obs["time"].to_numpy(float)
    train = x[time != held_out]
    centre = train.mean(axis=0, keepdims=True)
    components = np.linalg.svd(train - centre, full_matrices=False)[2][:10]
    z = (x - centre) @ components.T
    snapshots = {float(t): z[time == t] for t in np.unique(time) if t != held_out}
    real = z[time == held_out]
    assert wasserstein1(nearest_earlier(snapshots, held_out), real) == pytest.approx(earlier, abs=0.006)
    assert wasserstein1(nearest_later(snapshots, held_out), real) == pytest.approx(later, abs=0.006)
    points, mass = ot_displacement(snapshots, held_out)
    assert wasserstein1(points, real, x_weights=mass) == pytest.approx(between, abs=0.006)
    assert wasserstein1(ot_interpolation(snapshots, held_out, seed=0), real) == pytest.approx(between, rel=0.02)
    halves = replicate_floor(real, W1, seed=0).scores["W1"]
    assert halves.mean == pytest.approx(floor, abs=4 * halves.sd * (2 / 5) ** 0.5)  # two means of five draws
