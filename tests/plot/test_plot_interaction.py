"""Interaction figures: arrows go from sender to receiver and are as wide as they say; columns stay as they are."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Circle, FancyArrowPatch

from scjax.plot.interaction import cell_heatmap, interaction_circle, interaction_heatmap
from scjax.plot.palette import TYPES, type_colours

NAMES = ["alpha", "beta", "exo"]
MATRIX = np.array([[0.5, 0.0, 2.0], [3.0, 0.0, 0.0], [0.0, 0.25, 0.0]])  # rows receive


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def edges(ax):
    return {p.get_gid(): p for p in ax.patches if isinstance(p, FancyArrowPatch)}


def test_edges_go_from_sender_to_receiver_with_their_width():
    ax = interaction_circle(MATRIX, NAMES, width_per_unit=2.0)
    drawn = edges(ax)
    assert set(drawn) == {"alpha -> alpha", "exo -> alpha", "alpha -> beta", "beta -> exo"}
    assert {name: e.get_linewidth() for name, e in drawn.items()} == {
        "alpha -> alpha": 1.0, "exo -> alpha": 4.0, "alpha -> beta": 6.0, "beta -> exo": 0.5
    }  # fmt: skip
    nodes = {p.get_gid(): np.array(p.center) for p in ax.patches if isinstance(p, Circle)}
    ax.figure.canvas.draw()
    for name, edge in drawn.items():
        sender, receiver = name.split(" -> ")
        assert to_hex(edge.get_edgecolor()).upper() == TYPES[NAMES.index(sender)]
        if sender != receiver:  # the curve starts at the sender; the head comes last: wing, tip, wing, close
            vertices = edge.get_path().vertices
            assert np.linalg.norm(vertices[0] - nodes[sender]) == pytest.approx(0.09, abs=0.01)
            assert np.linalg.norm(vertices[-3] - nodes[receiver]) < 0.2


def test_absent_types_keep_their_place():
    matrix = MATRIX.copy()
    matrix[1], matrix[:, 1] = np.nan, np.nan
    ax = interaction_circle(matrix, NAMES, width_per_unit=1.0)
    assert set(edges(ax)) == {"alpha -> alpha", "exo -> alpha"}
    full = interaction_circle(MATRIX, NAMES, width_per_unit=1.0)
    centres = [[p.center for p in a.patches if isinstance(p, Circle)] for a in (ax, full)]
    assert centres[0] == centres[1]
    assert {t.get_text() for t in ax.texts} >= set(NAMES)


def test_given_axes_are_used():
    _, axes = plt.subplots(1, 3)
    assert interaction_circle(MATRIX, NAMES, width_per_unit=1.0, ax=axes[0], title="t = 1") is axes[0]
    assert axes[0].get_title() == "t = 1"
    assert interaction_heatmap(MATRIX, NAMES, ax=axes[1]) is axes[1]
    assert cell_heatmap(MATRIX, np.array([0, 1, 2]), NAMES, ax=axes[2]) is axes[2]


def test_heatmap_shows_the_matrix_receivers_down():
    ax = interaction_heatmap(MATRIX, NAMES, value_range=(0.0, 6.0))
    np.testing.assert_array_equal(ax.images[0].get_array(), MATRIX)
    assert ax.images[0].get_clim() == (0, 6)
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("receiver", "sender")
    assert [t.get_text() for t in ax.get_yticklabels()] == NAMES
    at = {(t.get_position()[1], t.get_position()[0]): t.get_text() for t in ax.texts}
    assert at[1, 0] == "3"


def test_cells_are_sorted_and_columns_left_as_they_are():
    rng = np.random.default_rng(0)
    labels = np.array([2, 0, -1, 2, 0])
    scores = rng.random((5, 5))
    order = [1, 4, 0, 3]
    plain = cell_heatmap(scores, labels, NAMES).images[0].get_array()
    np.testing.assert_array_equal(plain, scores[np.ix_(order, order)])
    scaled = cell_heatmap(scores, labels, NAMES, scale_columns=True)
    values = scaled.images[0].get_array()
    np.testing.assert_allclose(values.min(axis=0), 0)
    np.testing.assert_allclose(values.max(axis=0), 1)
    assert "each column scaled" in scaled.figure.axes[-1].get_ylabel()
    assert [t.get_text() for t in scaled.get_legend().get_texts()] == ["alpha (2)", "exo (2)"]
    bar = scaled.child_axes[0].images[0]
    np.testing.assert_array_equal(bar.get_array(), [[0], [0], [2], [2]])


def test_palette_goes_round_and_takes_the_users_own():
    assert len(set(TYPES)) == 12
    assert type_colours(14)[12:] == list(TYPES[:2])
    assert type_colours(2, ["red", "blue"]) == ["red", "blue"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: interaction_circle(-MATRIX, NAMES, width_per_unit=1.0), "must not be negative"),
        (lambda: interaction_circle(MATRIX, NAMES, width_per_unit=0.0), "width_per_unit must be a positive"),
        (lambda: interaction_circle(MATRIX, NAMES[:2], width_per_unit=1.0), "for 2 names"),
        (lambda: interaction_circle(MATRIX, NAMES, width_per_unit=1.0, colours=["red"]), "each of 3 types; got 1"),
        (lambda: cell_heatmap(MATRIX, np.array([0, 1, 3]), NAMES), r"labels must lie in -1 \.\. 2"),
        (lambda: cell_heatmap(MATRIX, np.array([-1, -1, -1]), NAMES), "leave no cell"),
        (lambda: cell_heatmap(MATRIX, np.array([0, 1]), NAMES), "for 2 labels"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
