"""Figures of an evaluation: what is drawn, where, in which colour, and that the bytes are the same each time."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from scjax.plot import palette
from scjax.plot.evaluation import (
    as_svg_uri,
    calibration,
    coverage,
    distributions,
    overlay,
    principal_plane,
    ranking,
    reproducible,
    volcano,
)

rgb = plt.matplotlib.colors.to_rgb
GENES = [f"g{i}" for i in range(6)]


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def test_ranking():
    rows = {"real": (0.9, 0.8, 1.0), "model": (0.7, 0.6, np.nan), "rule": (np.nan, np.nan, np.nan)}
    ax = ranking(rows, highlighted=["model"], ceiling="real", metric="r ↑")
    assert [t.get_text() for t in ax.get_yticklabels()] == ["real", "model", "rule (no value)"]
    assert ax.get_xlabel() == "r ↑"
    dots = [(tuple(c.get_offsets()[0]), tuple(c.get_facecolor()[0][:3])) for c in ax.collections]
    assert dots == [((0.9, 0), rgb(palette.OBSERVED)), ((0.7, 1), rgb(palette.PREDICTED))]
    bars = [line.get_xdata() for line in ax.lines if list(line.get_ydata()) == [0, 0]]
    assert [list(b) for b in bars] == [[0.8, 1.0]]
    assert not [line for line in ax.lines if list(line.get_ydata()) == [1, 1]]  # no interval without both ends
    with pytest.raises(ValueError, match="must be one of 'real', 'model', 'rule'; got 'other'"):
        ranking(rows, highlighted=["other"])
    with pytest.raises(ValueError, match="at least one predictor"):
        ranking({})


def test_volcano():
    """Colours by what the real cells say, in both panels."""
    real = (np.array([2.0, -1.0, 0.1, 0.0, 0.0, 1.5]), np.array([1e-6, 0.01, 0.5, 1, 1, 1e-3]))
    predicted = (np.array([1.0, -0.5, 3.0, 0.0, 0.0, 0.2]), np.array([0.2, 1e-3, 1e-8, 1, 1, 0.04]))
    left, right = volcano(real, predicted, GENES, n_named=2, title="A")
    assert left.get_title(loc="left") == "real cells: 3 genes"
    assert right.get_title(loc="left") == "predicted: 3 genes"
    _, alone, truly = right.collections
    assert tuple(truly.get_facecolor()[0][:3]) == rgb(palette.OBSERVED)
    np.testing.assert_allclose(truly.get_offsets()[:, 0], [1.0, -0.5, 0.2])
    assert tuple(alone.get_facecolor()[0][:3]) == rgb(palette.PREDICTED)
    np.testing.assert_allclose(alone.get_offsets(), [[3.0, 8.0]])
    assert {t.get_text() for t in left.texts} == {t.get_text() for t in right.texts} == {"g0", "g5"}
    assert left.get_xlabel() == "log2 fold change", "nothing is infinite, and nothing is said of it"
    with pytest.raises(ValueError, match="predicted must hold two values for each of 6 genes"):
        volcano(real, (np.zeros(5), np.zeros(5)), GENES)


def test_infinite_changes_are_triangles_at_a_tick_that_says_so():
    real = (np.array([2.0, -1.0, 0.1, 0.0, -np.inf, np.inf]), np.array([1e-6, 0.01, 0.5, 1, 1, 1e-3]))
    predicted = (np.zeros(6), np.ones(6))
    left, right = volcano(real, predicted, GENES)
    assert left.get_xlabel() == "log2 fold change\n±∞ (zero on one side): 2"
    assert right.get_xlabel().endswith(": 0")
    ticks = dict(zip([t.get_text() for t in left.get_xticklabels()], left.get_xticks(), strict=True))
    assert list(ticks)[0] == "−∞"
    assert list(ticks)[-1] == "∞"
    assert ticks["∞"] > 2.0 > ticks["1"] > 0
    marked = {len(c.get_paths()[0].vertices): c.get_offsets() for c in left.collections if len(c.get_offsets()) == 1}
    assert {float(offsets[0, 0]) for offsets in marked.values()} >= {ticks["∞"]}
    at_edge = [c for c in left.collections for x, _ in c.get_offsets() if abs(x) == ticks["∞"]]
    assert [len(c.get_offsets()) for c in at_edge] == [1, 1]
    (round_dot,) = {len(c.get_paths()[0].vertices) for c in right.collections}
    assert all(len(c.get_paths()[0].vertices) < round_dot for c in at_edge), "another marker"


def test_names_in_a_volcano_stand_beside_their_dots():
    rng = np.random.default_rng(0)
    names = [f"gene{i}" for i in range(60)]
    fold, fdr = rng.normal(size=60), 10.0 ** -rng.uniform(0, 30, size=60)
    for ax in volcano((fold, fdr), (fold[::-1], fdr[::-1]), names, n_named=5):
        ax.figure.draw_without_rendering()
        assert len(ax.texts) == 5
        for text in ax.texts:
            dot, box = ax.transData.transform(text.xy), plt.Text.get_window_extent(text)
            away = np.maximum(np.maximum([box.x0, box.y0] - dot, dot - [box.x1, box.y1]), 0)
            assert np.hypot(*away) < 40 * ax.figure.dpi / 72, "points"


def test_overlay_is_of_real_cells():
    """Predicted cells, however far away, do not turn the plane; the shares are of the real cells' variance."""
    rng = np.random.default_rng(0)
    real = rng.normal(size=(40, 3)) * np.array([5.0, 1.0, 0.1])
    far = rng.normal(size=(10, 3)) * np.array([0.1, 1.0, 50.0])
    ax = overlay({"control": real[:20], "real": real[20:], "made": far}, fitted_on=[real], predicted=["made"])
    centre, plane, share = principal_plane(real)
    np.testing.assert_allclose(np.abs(plane @ [[1, 0], [0, 1], [0, 0]]), np.eye(2), atol=0.1)
    assert f"({100 * share[0]:.0f} %)" in ax.get_xlabel()
    made = [c for c in ax.collections if tuple(c.get_facecolor()[0][:3]) == rgb(palette.PREDICTED)]
    np.testing.assert_allclose(made[0].get_offsets(), (far - centre) @ plane.T)
    np.testing.assert_allclose(made[1].get_offsets(), ((far - centre) @ plane.T).mean(axis=0)[None])
    assert made[1].get_label() == "made"
    with pytest.raises(ValueError, match="a plane takes three cells"):
        overlay({"real": real}, fitted_on=[real[:2]])
    with pytest.raises(ValueError, match="made must hold finite numbers"):
        overlay({"made": np.full((3, 3), np.nan)}, fitted_on=[real])


def test_calibration():
    real, predicted = np.array([1.0, 2.0, 4.0, 0.0, np.nan]), np.array([2.0, 4.0, 8.0, 1.0, 1.0])
    ax = calibration(real, predicted)
    assert "median predicted / real: 2.00" in ax.texts[0].get_text()
    full, hollow = ax.collections
    assert len(full.get_offsets()) == 3
    assert len(hollow.get_offsets()) == 1
    assert ax.get_xlim() == ax.get_ylim()
    assert any("hollow, zero or outside: 1 of 4" in t.get_text() for t in ax.texts)
    ax = calibration([0.25, 0.5], [0.5, 0.5], log=False, what="share of zeros")
    assert "median predicted − real: +0.125" in {t.get_text() for t in ax.texts}
    assert ax.get_xlabel() == "real share of zeros"
    with pytest.raises(ValueError, match="they share none"):
        calibration([np.nan], [1.0])
    with pytest.raises(ValueError, match="got 1 and 2"):
        calibration([1.0], [1.0, 2.0])


@pytest.mark.parametrize("span", [0.2, 0.6, 1.5, 4.0, 9.0])
def test_calibration_has_readable_ticks(span):
    values = 0.3 * 10.0 ** np.linspace(0, span, 40)
    ax = calibration(values, values)
    low, high = ax.get_xlim()
    for axis in (ax.xaxis, ax.yaxis):
        ticks = axis.get_ticklocs()
        assert 3 <= len(ticks) <= 7
        assert low <= min(ticks) < max(ticks) <= high
        np.testing.assert_allclose([float(t.get_text()) for t in axis.get_ticklabels()], ticks, rtol=1e-5)
    (dots,) = [c for c in ax.collections if len(c.get_offsets())]
    assert len(dots.get_offsets()) == 40, "all of them are seen where there is no tail"


def test_calibration_shows_the_bulk():
    """A few predicted values of next to nothing do not stretch the axes; they are counted."""
    rng = np.random.default_rng(0)
    real = np.exp(0.5 * rng.normal(size=200))
    predicted = real.copy()
    predicted[:4] = 1e-9
    ax = calibration(real, predicted)
    assert 0.05 < ax.get_xlim()[0] < real.min() * 2
    full, hollow = ax.collections
    assert len(hollow.get_offsets()) == 4 + 200 - 4 - len(full.get_offsets()) < 10
    assert hollow.get_offsets().min() > ax.get_ylim()[0]
    assert f"hollow, zero or outside: {len(hollow.get_offsets())} of 200" in ax.texts[0].get_text()
    assert calibration([0.0, 0.0], [0.0, 0.0]).get_xlim() == (0.1, 1.0)


def test_coverage():
    real, predicted = np.array([0.12, 0.32, 0.33, np.nan]), np.array([0.91, 0.91, 1.0])
    ax = coverage(real, predicted, nominal=0.9)
    heights = {round(bar.get_x(), 2): bar.get_height() for bar in ax.patches[:20] if bar.get_height()}
    assert heights == {0.1: 1, 0.3: 2}
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["real cells", "predicted cells", "nominal 0.9"]
    assert list(ax.lines[0].get_xdata()) == [0.9, 0.9]
    assert ax.texts[0].get_text() == "median share of real cells: 0.32"
    assert ax.get_xlabel() == "share of cells in the predicted 90 %"
    assert len(coverage(real).get_legend().get_texts()) == 2
    with pytest.raises(ValueError, match="no value is finite"):
        coverage([np.nan])
    with pytest.raises(ValueError, match="predicted must hold shares between 0 and 1; got 0.5 to 1.5"):
        coverage([0.5], [0.5, 1.5])


def test_distributions():
    """The columns that change most, from the largest rise to the largest drop, with their shares of zeros."""
    rng = np.random.default_rng(0)
    before = rng.random((20, 6))
    real, made = before + np.array([0, 5, 0, -3, 0, 1]), before.copy()
    made[:, 1] = 0.0
    groups = {"control": before, "real": real, "made": made}
    ax = distributions(groups, GENES, predicted=["made"], background="control", n_columns=3)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["g1", "g5", "g3"]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["control", "real", "made"]
    assert [t.get_text() for t in ax.texts].count("100") == 2  # all of g1 in "made", all of g3 in the real cells
    plain = distributions(groups, GENES, predicted=["made"], background="control", zeros=False)
    assert not plain.texts
    with pytest.raises(ValueError, match=r"made must be \[cells, 6 columns\]"):
        distributions(groups | {"made": made[:, :5]}, GENES)
    with pytest.raises(ValueError, match="must hold real cells"):
        distributions({"control": before}, GENES, background="control")


def test_the_same_bytes_with_any_names():
    """Signs that matplotlib would take for mathematics, or has no letter for, and many dots, which become pixels."""
    rows = {"$x^{$": (1.0, 0.5, 2.0), "\\frac_\n{": (2.0, 1.0, 3.0), "\u7d30\u80de": (3.0, 2.0, 4.0)}
    cells = np.random.default_rng(0).normal(size=(400, 3))

    def drawn():
        with reproducible():
            yield as_svg_uri(ranking(rows, metric="$ & <b>"))
            yield as_svg_uri(overlay({"$real": cells}, fitted_on=[cells]))
            yield as_svg_uri(calibration(np.exp(cells[:, 0]), np.exp(cells[:, 1])))

    first, second = list(drawn()), list(drawn())
    assert first == second
    assert all(uri.startswith("data:image/svg+xml;base64,") for uri in first)
    assert not plt.get_fignums()
