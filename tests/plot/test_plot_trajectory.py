"""Trajectory figures: what is drawn, where, and how many."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.quiver import Quiver

from scjax.plot import palette
from scjax.plot.trajectory import grid_sample, predicted_over_observed, trajectories, velocities


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def cells():
    rng = np.random.default_rng(0)
    return {float(t): rng.normal(size=(20 + t, 3)) + 3 * t for t in range(4)}


def offsets(ax, colour):
    (found,) = [
        c for c in ax.collections if np.allclose(c.get_facecolor()[0, :3], plt.matplotlib.colors.to_rgb(colour))
    ]
    return found.get_offsets()


def test_one_panel_a_held_out_time(cells):
    predicted = {2.0: cells[2.0][:5] + 0.1, 1.0: cells[1.0][:7] + 0.1}
    axes = predicted_over_observed(cells, predicted, time_unit="d", dims=(0, 2))
    assert [ax.get_title() for ax in axes] == ["held-out time 1 d", "held-out time 2 d"]
    for ax, t in zip(axes, (1.0, 2.0), strict=True):
        assert len(offsets(ax, palette.BACKGROUND)) == sum(map(len, cells.values()))
        np.testing.assert_allclose(offsets(ax, palette.OBSERVED), cells[t][:, [0, 2]])
        np.testing.assert_allclose(offsets(ax, palette.PREDICTED), predicted[t][:, [0, 2]])
        assert [text.get_text() for text in ax.get_legend().get_texts()][-1] == "predicted"
        assert ax.get_xlabel() == "PC 1"
    assert axes[0].get_xlim() == axes[1].get_xlim()


def test_cells_that_cannot_be_drawn_are_counted(cells):
    predicted = {1.0: np.where(np.arange(7)[:, None] < 2, np.nan, cells[1.0][:7])}
    (ax,) = predicted_over_observed(cells, predicted)
    assert "2 of 7 points not finite" in ax.get_title()
    assert len(offsets(ax, palette.PREDICTED)) == 5


def test_given_axes_are_used(cells):
    figure, ax = plt.subplots()
    assert predicted_over_observed(cells, {1.0: cells[1.0]}, axes=[ax]) == [ax]
    with pytest.raises(ValueError, match="one for each of 2 predicted times; got 1"):
        predicted_over_observed(cells, {1.0: cells[1.0], 2.0: cells[2.0]}, axes=[ax])
    with pytest.raises(ValueError, match="predicted has time 9, which is not among"):
        predicted_over_observed(cells, {9.0: cells[1.0]}, axes=[ax])
    with pytest.raises(ValueError, match=r"observed\[0\] must be .*dims=\(0, 3\)"):
        predicted_over_observed(cells, {1.0: cells[1.0]}, dims=(0, 3))


def test_paths_are_coloured_by_their_own_time():
    ts = np.array([0.0, 1.0, 4.0])
    paths = np.stack([np.array([[0.0, 0.0], [1.0, 0.0]]) + t for t in ts])
    ax = trajectories(paths, ts, n_paths=5, time_unit="d")
    assert isinstance(ax, Axes)
    (lines,) = [c for c in ax.collections if isinstance(c, LineCollection)]
    assert len(lines.get_segments()) == 2 * 2
    np.testing.assert_allclose(np.sort(lines.get_array()), [0.5, 0.5, 2.5, 2.5])
    for segment, t in zip(lines.get_segments(), lines.get_array(), strict=True):
        assert segment[:, 1].mean() == pytest.approx(t)  # y is the time here
    assert ax.figure.axes[-1].get_ylabel() == "time (d)"


def test_sample_of_paths_follows_the_seed():
    paths = np.random.default_rng(0).normal(size=(2, 50, 2))

    def drawn(seed):
        return np.stack(trajectories(paths, [0, 1], n_paths=4, seed=seed).collections[0].get_segments())

    assert drawn(0).shape == (4, 2, 2)
    assert np.array_equal(drawn(0), drawn(0))
    assert not np.array_equal(drawn(0), drawn(1))


@pytest.mark.parametrize(("arrow_length", "time_step"), [(None, 1.0), (None, 0.5), (0.3, 1.0)])
def test_arrows_are_velocities_of_cells(arrow_length, time_step):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 3))
    ax = velocities(x, 2 * x, arrow_length=arrow_length, time_step=time_step, dims=(1, 2), grid_size=0.5)
    (arrows,) = [c for c in ax.collections if isinstance(c, Quiver)]
    at, uv = np.stack([arrows.X, arrows.Y], 1), np.stack([arrows.U, arrows.V], 1)
    assert {tuple(p) for p in at} <= {tuple(p) for p in x[:, [1, 2]]}
    expected = 2 * at * time_step
    if arrow_length is not None:
        expected = arrow_length * at / np.linalg.norm(at, axis=1, keepdims=True)
    np.testing.assert_allclose(uv, expected, rtol=1e-6)
    assert (arrows.angles, arrows.scale_units, arrows.scale) == ("xy", "xy", 1)  # in units of the data


def test_grid_gives_one_cell_for_each_full_square():
    points = np.array(
        [[0.1, 0.1], [0.2, 0.3], [0.9, 0.9], [-0.1, 0.1], [-0.2, 0.2], [5.1, 5.1], [5.2, 5.2], [5.3, 5.3]]
    )
    chosen = {tuple(grid_sample(points, 1.0, min_cells=3, seed=seed)) for seed in range(30)}
    assert {len(rows) for rows in chosen} == {2}
    assert {row for rows in chosen for row in rows} == {0, 1, 2, 5, 6, 7}
    assert len(grid_sample(points, 1.0, min_cells=4)) == 0


def test_no_style_is_left_behind(cells):
    before = dict(plt.rcParams)
    predicted_over_observed(cells, {1.0: cells[1.0]})
    velocities(cells[0.0], cells[0.0])
    assert dict(plt.rcParams) == before
