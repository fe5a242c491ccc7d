"""Perturbation figures: what is drawn, where, what is written, and that names lie over nothing."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest

from scjax.plot import palette
from scjax.plot.perturbation import (
    NOISE_LEVEL,
    delta_scatter,
    metric_dots,
    noise_level,
    set_means,
    top_gene_distributions,
)

GENES = [f"gene{i}" for i in range(40)]
rgb = plt.matplotlib.colors.to_rgb


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def deltas():
    rng = np.random.default_rng(0)
    observed = {name: rng.normal(size=40) * size for name, size in (("A+B", 1.0), ("A", 0.1), ("C", 5.0))}
    predicted = {name: 0.7 * d + 0.1 * rng.normal(size=40) for name, d in observed.items()}
    return observed, predicted


def scatter(ax, label):
    (found,) = [c for c in ax.collections if c.get_label() == label]
    return np.asarray(found.get_offsets())


def written(ax):
    return [text.get_text() for text in ax.texts]


def test_one_panel_a_condition(deltas):
    observed, predicted = deltas
    baseline = {"A": observed["A"][::-1]}
    axes = delta_scatter(observed, predicted, GENES, baseline=baseline, baseline_name="additive", n_named=4)
    assert [ax.get_title(loc="left") for ax in axes] == list(observed)
    for ax, (name, real) in zip(axes, observed.items(), strict=True):
        np.testing.assert_allclose(scatter(ax, "predicted"), np.stack([real, predicted[name]], axis=1))
        r = np.corrcoef(real, predicted[name])[0, 1]
        assert f"predicted  r = {r:.2f}" in written(ax)
        assert ax.get_xlim() == ax.get_ylim()
        low, high = ax.get_xlim()
        assert low < min(real.min(), predicted[name].min()) < max(real.max(), predicted[name].max()) < high
        assert high - low < 2 * np.ptp([*real, *predicted[name]])
        (line,) = [line for line in ax.lines if len(set(line.get_xdata())) == 2 and len(set(line.get_ydata())) == 2]
        np.testing.assert_array_equal(line.get_xdata(), line.get_ydata())
        largest = {GENES[g] for g in np.argsort(-np.abs(real))[:4]}
        assert set(written(ax)) & set(GENES) == largest
    np.testing.assert_allclose(scatter(axes[1], "additive"), np.stack([observed["A"], baseline["A"]], axis=1))
    r = np.corrcoef(observed["A"], baseline["A"])[0, 1]
    assert f"additive  r = {r:.2f}".replace("-", "\N{MINUS SIGN}") in written(axes[1])
    assert not any("additive" in text for text in written(axes[0]))


def test_names_lie_apart_and_inside(deltas):
    """Also where many genes change alike: what finds no place is left out, and nothing is written over anything."""
    rng = np.random.default_rng(1)
    crowded = {"D": 1 + 0.01 * rng.normal(size=40)}
    for observed, predicted in (deltas, (crowded, crowded)):
        axes = delta_scatter(observed, predicted, GENES, n_named=12)
        axes[0].figure.canvas.draw()
        for ax in axes:
            frame = ax.get_window_extent()
            boxes = [plt.Text.get_window_extent(text) for text in ax.texts if text.get_text() in GENES]
            assert len(boxes) >= 3
            for box in boxes:
                assert frame.x0 <= box.x0 < box.x1 <= frame.x1
                assert frame.y0 <= box.y0 < box.y1 <= frame.y1
            for one, other in itertools.combinations(boxes, 2):
                assert not one.overlaps(other)


def test_a_prediction_without_change_has_no_correlation(deltas):
    observed, _ = deltas
    (ax,) = delta_scatter({"A": observed["A"]}, {"A": np.zeros(40)}, GENES, n_named=0)
    assert written(ax) == ["predicted  r = none"]


@pytest.mark.parametrize("n", [1, 4, 5, 7, 9])
def test_labels_of_axes_on_the_rim(n):
    axes = delta_scatter({i: np.arange(3.0) for i in range(n)}, {i: np.arange(3.0) for i in range(n)}, GENES[:3])
    assert len(axes) == n
    columns = len({round(ax.get_position().x0, 3) for ax in axes})
    assert [bool(ax.get_ylabel()) for ax in axes] == [i % columns == 0 for i in range(n)]
    assert [bool(ax.get_xlabel()) for ax in axes] == [i + columns >= n for i in range(n)]
    assert [t.get_text() for t in axes[0].get_xticklabels()]


def test_given_axes_are_used(deltas):
    observed, predicted = deltas
    figure, ax = plt.subplots()
    one = {"A": observed["A"]}
    assert delta_scatter(one, predicted, GENES, axes=[ax]) == [ax]
    assert ax.get_ylabel()


@pytest.fixture(scope="module")
def cells():
    rng = np.random.default_rng(0)
    control = np.maximum(rng.normal(size=(30, 40)), 0)
    observed = np.maximum(rng.normal(size=(25, 40)), 0)
    observed[:, [3, 30]] += [[2, 1]]
    control[:, 7] += 3
    return control, observed, np.maximum(rng.normal(size=(20, 40)), 0)


def test_the_genes_that_change_most(cells):
    """From rise to drop; a mean and a share of zeros for each of the three groups."""
    control, observed, predicted = cells
    ax = top_gene_distributions(*cells, GENES, n_genes=3, title="A+B", predicted_name="model")
    assert [t.get_text() for t in ax.get_xticklabels()] == ["gene3", "gene30", "gene7"]
    assert ax.get_title(loc="left") == "A+B"
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["control", "observed", "model"]
    for name, x in zip(("control", "observed", "model"), cells, strict=True):
        (bars,) = [c for c in ax.collections if c.get_label() == name]
        heights = [path.vertices[0, 1] for path in bars.get_paths()]
        np.testing.assert_allclose(heights, x[:, [3, 30, 7]].mean(axis=0))
    shares = [f"{100 * np.mean(x[:, g] <= 0):.0f}" for x in cells for g in (3, 30, 7)]
    assert written(ax)[:-1] == shares
    assert {rgb(palette.OBSERVED), rgb(palette.PREDICTED)} <= {
        tuple(c.get_facecolor()[0, :3]) for c in ax.collections if len(c.get_facecolor())
    }


def test_genes_by_name_and_without_variation(cells):
    """A gene that nobody expresses is a flat violin, not an error."""
    control, observed, predicted = (np.concatenate([x, np.zeros((len(x), 1))], axis=1) for x in cells)
    figure, axis = plt.subplots()
    ax = top_gene_distributions(control, observed, predicted, [*GENES, "silent"], genes=["silent", "gene3"], ax=axis)
    assert ax is axis
    assert [t.get_text() for t in ax.get_xticklabels()] == ["silent", "gene3"]
    assert written(ax)[0] == "100"


def test_dots_of_a_metric():
    values = {"model": np.array([0.5, 0.7]), "base": [0.1, np.nan], "none": [np.nan], "real": [0.8, 1.0]}
    ax = metric_dots(values, highlighted=["model"], ceiling="real", metric="r2 ↑")
    names = ["model", "base (1 of 2 without)", "none (no value)", "real"]
    assert [t.get_text() for t in ax.get_yticklabels()] == names
    assert [len(c.get_offsets()) for c in ax.collections] == [2, 1, 0, 2]
    assert ax.get_xlabel() == "r2 ↑"
    means = [line.get_xdata()[0] for line in ax.lines]
    np.testing.assert_allclose(means, [0.6, 0.1, 0.9, 0.9])
    assert rgb(ax.lines[0].get_color()) == rgb(palette.PREDICTED)
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first on top


@pytest.mark.parametrize(
    ("lower", "real", "name"),
    [
        (True, [2.0, 3.0], "real vs real (noise level)"),
        (True, [0.1, 0.2], "real vs real (ceiling)"),
        (False, [0.1, 0.2], "real vs real (noise level)"),
        (False, [2.0, 3.0], "real vs real (ceiling)"),
        (None, [2.0, 3.0], "real vs real (ceiling)"),
    ],
)
def test_a_ceiling_below_another_row_is_a_noise_level(lower, real, name):
    ceiling = "real vs real (ceiling)"
    values = {"model": [1.0, 1.0], "none": [np.nan, np.nan], ceiling: real}
    ax = metric_dots(values, ceiling=ceiling, lower_is_better=lower)
    assert ax.get_yticklabels()[-1].get_text() == name
    told = " ".join(" ".join(written(ax)).split())
    assert told == (NOISE_LEVEL if "noise" in name else "")


def test_noise_level_is_called_so():
    assert noise_level("real vs real (floor)") == "real vs real (noise level)"
    assert noise_level("halves") == "halves (noise level)"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: delta_scatter({}, {}, []), "observed must hold"),
        (lambda: delta_scatter({"A": [1.0]}, {"a+": [1.0]}, ["g"]), "predicted has no A"),
        (lambda: delta_scatter({"A": [1.0]}, {"A": [1.0, 2.0]}, ["g"]), r"predicted\[A\] must hold .* 1 genes"),
        (lambda: delta_scatter({"A": [1.0]}, {"A": [np.nan]}, ["g"]), r"predicted\[A\] must hold finite"),
        (lambda: delta_scatter({"A": [1.0]}, {"A": [1.0]}, ["g"], axes=[]), "one for each of 1 conditions; got 0"),
        (lambda: top_gene_distributions(*[np.ones((2, 1))] * 3, ["a", "b"]), r"control must be \[cells, 2 genes\]"),
        (lambda: top_gene_distributions(*[np.ones((2, 1))] * 3, ["ab"], genes=["abc"]), "Did you mean 'ab'"),
        (lambda: top_gene_distributions(*[np.full((2, 1), np.nan)] * 3, ["ab"]), "control must hold finite"),
        (lambda: metric_dots({}), "values must hold"),
        (lambda: metric_dots({"model": [1.0]}, ceiling="mode"), "Did you mean 'model'"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.fixture(scope="module")
def sets():
    """Means that vary along two directions of forty, of which the second is the shorter."""
    rng = np.random.default_rng(1)
    plane = np.linalg.qr(rng.normal(size=(40, 2)))[0].T
    return plane, [rng.normal(size=(n, 2)) * [3.0, 0.5] @ plane + n for n in (30, 20, 8)]


def test_means_of_sets_keep_their_distances(sets):
    _, groups = sets
    (ax,) = set_means({"A (T)": groups}, predicted_name="model")
    assert ax.get_title(loc="left") == "A (T)"
    drawn = [scatter(ax, name) for name in ("control", "observed", "model")]
    assert [len(points) for points in drawn] == [30, 20, 8]
    for points, means in zip(drawn, groups, strict=True):  # within a group, all variance lies in the plane or across it
        assert np.linalg.norm(points[0] - points[1]) <= np.linalg.norm(means[0] - means[1]) + 1e-9
    everything = np.concatenate(groups) - np.concatenate(groups).mean(axis=0)
    share = np.concatenate(drawn).var(axis=0) / everything.var(axis=0).sum()
    assert ax.get_xlabel().endswith(f"({100 * share[0]:.0f} %)")
    assert ax.get_ylabel().endswith(f"({100 * share[1]:.0f} %)")
    assert share[0] > share[1]


def test_legend_of_sets_explains_every_sign(sets):
    _, groups = sets
    told = ["control", "observed", "model"]
    told = [f"{name}: mean of a set" for name in told] + ["mean of the sets", "two standard deviations of the sets"]
    (ax,) = set_means({"A": groups}, predicted_name="model", note="drawn again and again")
    (legend,) = ax.figure.legends
    assert [t.get_text() for t in legend.get_texts()] == told
    assert ax.figure.get_suptitle() == "drawn again and again"
    figure, given = plt.subplots()
    set_means({"A": groups}, predicted_name="model", axes=[given])
    assert [t.get_text() for t in given.get_legend().get_texts()] == told
    assert not figure.legends


def test_the_ellipse_is_two_standard_deviations(sets):
    plane, _ = sets
    corners = np.array([[3.0, 0], [-3.0, 0], [0, 1.0], [0, -1.0]]) @ plane
    (ax,) = set_means({"A": [corners, corners, corners]})
    (first, *_) = ax.patches
    sd = np.std([3.0, -3.0, 0, 0], ddof=1), np.std([0, 0, 1.0, -1.0], ddof=1)
    assert (first.width, first.height) == pytest.approx((4 * sd[0], 4 * sd[1]))
    assert abs(np.sin(np.deg2rad(first.angle))) < 1e-6, "the long axis is PC 1"


def test_set_means_refuse(sets):
    _, groups = sets
    with pytest.raises(ValueError, match="populations must hold at least one"):
        set_means({})
    with pytest.raises(ValueError, match=r"A, observed: wanted \[sets, genes\].*got \(2, 40\)"):
        set_means({"A": [groups[0], groups[1][:2], groups[2]]})
    with pytest.raises(ValueError, match="got 2"):
        set_means({"A": groups}, axes=list(plt.subplots(1, 2)[1]))
    with pytest.raises(ValueError, match="A, predicted"):
        set_means({"A": [groups[0], groups[1], groups[2] * np.nan]})
