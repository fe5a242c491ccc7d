"""Figures of an evaluation: ranking with intervals, volcano plots, overlays on principal components, calibration."""

import base64
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from jaxtyping import Float

from scjax import check
from scjax.plot.palette import OBSERVED, PREDICTED
from scjax.plot.perturbation import predictor_lines

__all__ = ["as_svg_uri", "calibration", "distributions", "overlay", "ranking", "reproducible", "volcano"]

CONTROL = "#999999"
RULE = "0.45"  # grey of baselines
MANY = 300  # dots, from which on they are drawn as pixels within an SVG
FDR = 0.05  # the line in a volcano


@contextmanager
def reproducible() -> Iterator[None]:
    """Figures made within it are the same bytes for the same data, and names may hold any sign, `$` too."""
    import matplotlib as mpl

    settings = {
        "svg.hashsalt": "scjax",
        "svg.fonttype": "path",
        "text.parse_math": False,
        "text.usetex": False,
        "axes.formatter.use_mathtext": False,
        "font.family": ["DejaVu Sans"],  # comes with matplotlib
        "font.size": 9.5,
        "axes.unicode_minus": True,
        "figure.facecolor": "white",
        "axes.facecolor": "white",
        "savefig.facecolor": "white",
    }
    with mpl.rc_context(settings):  # pyright: ignore[reportArgumentType]  # names known to matplotlib
        yield


def as_svg_uri(ax: Any) -> str:
    """The figure of `ax` as a data URI of an SVG, without a date; lets go of it. Call it within `reproducible`."""
    import matplotlib.pyplot as plt

    for one in ax.figure.axes:
        for dots in one.collections:
            if hasattr(dots, "get_offsets") and len(dots.get_offsets()) > MANY:
                dots.set_rasterized(True)
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the page writes the names, too
        ax.figure.savefig(out, format="svg", dpi=160, metadata={"Date": None, "Creator": None})
    plt.close(ax.figure)
    return f"data:image/svg+xml;base64,{base64.b64encode(out.getvalue()).decode()}"


def ranking(
    rows: Mapping[str, tuple[float, float, float]],
    *,
    highlighted: Sequence[str] = (),
    ceiling: str | None = None,
    metric: str = "",
    ax: Any = None,
) -> Any:
    """A line for each predictor: its value and an interval; the ceiling's value runs through all.

    Args:
        rows: value, lower and upper end of the interval of each predictor, in the order of drawing from the top. A
            value that is not finite has no dot, which is said behind the name; an end that is not finite, no interval.
        highlighted: the models among them, in colour.
        ceiling: the predictor that is real cells against real cells, if there is one.
        metric: name of the axis, best with an arrow towards better.
        ax: a new figure unless given.

    Raises:
        ValueError: no predictor, a highlighted one or a ceiling that is not among them.
    """
    if not rows:
        raise ValueError("rows must hold at least one predictor; it is empty.")
    for name in (*highlighted, *([] if ceiling is None else [ceiling])):
        check.one_of("highlighted and ceiling", name, list(rows))
    ax = _new((4.2, 0.8 + 0.27 * len(rows))) if ax is None else ax
    for line, (name, (value, low, high)) in enumerate(rows.items()):
        colour = PREDICTED if name in highlighted else OBSERVED if name == ceiling else RULE
        if np.isfinite(value):
            if np.isfinite([low, high]).all():
                ax.plot([low, high], [line, line], color=colour, linewidth=1.8, solid_capstyle="butt", zorder=2)
            marker = "D" if name == ceiling else "o"
            ax.scatter([value], [line], s=34, color=colour, marker=marker, zorder=3)
            if name == ceiling:
                ax.axvline(value, color=colour, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    ticks = [_short(n, 30) + ("" if np.isfinite(v[0]) else " (no value)") for n, v in rows.items()]
    predictor_lines(ax, ticks, metric)
    for label, name in zip(ax.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if name in highlighted else "normal")
    ax.locator_params(axis="x", nbins=5)
    return ax


def volcano(
    real: tuple[Any, Any],
    predicted: tuple[Any, Any],
    gene_names: Sequence[str],
    *,
    n_named: int = 5,
    predicted_name: str = "predicted",
    title: str = "",
    axes: Sequence[Any] | None = None,
) -> list[Any]:
    """Significance over fold change of each gene: the real cells, and beside them the predicted ones, on one scale.

    Genes that are significant (false discovery rate below 0.05) in the real cells are blue in both panels; those that
    are so in the prediction alone are vermillion. The most significant genes of the real cells are named in both.

    Args:
        real, predicted: log2 fold change and false discovery rate of each gene. An infinite fold change (a gene that is
            zero on one side) stands at the edge.
        gene_names: of the genes.
        n_named: genes that are named.
        predicted_name: of the model.
        title: of the figure.
        axes: two; a new figure unless given.

    Raises:
        ValueError: arrays of other lengths than `gene_names`.
    """
    sides = []
    for name, side in (("real", real), ("predicted", predicted)):
        fold, fdr = (np.asarray(values, np.float64) for values in side)
        if fold.shape != (len(gene_names),) or fdr.shape != fold.shape:
            raise ValueError(f"{name} must hold two values for each of {len(gene_names)} genes; got {fold.shape}.")
        sides.append((fold, fdr))
    if axes is None:
        import matplotlib.pyplot as plt

        axes = plt.subplots(1, 2, figsize=(4.4, 2.9), sharex=True, sharey=True, layout="constrained")[1]
    finite = np.concatenate([fold[np.isfinite(fold)] for fold, _ in sides])
    edge = 1.15 * max(float(np.abs(finite).max(initial=0.0)), 0.5)
    least = min((float(fdr[fdr > 0].min()) for _, fdr in sides if (fdr > 0).any()), default=1.0)
    heights = [-np.log10(np.maximum(fdr, min(least, 1e-300))) for _, fdr in sides]
    top = 1.12 * max(2.0, *(float(np.nanmax(h, initial=0.0)) for h in heights))
    truly = sides[0][1] < FDR
    named = np.lexsort((-np.abs(np.nan_to_num(sides[0][0], posinf=edge, neginf=-edge)), -heights[0]))[:n_named]
    named = named[truly[named]]
    names = ("real cells", _short(predicted_name, 22))
    for ax, name, (fold, fdr), height in zip(axes, names, sides, heights, strict=True):  # pyright: ignore[reportArgumentType]
        x = np.clip(np.nan_to_num(fold, posinf=edge, neginf=-edge), -edge, edge)
        alone = (fdr < FDR) & ~truly
        for which, colour, z in ((~truly & ~alone, "0.75", 1), (alone, PREDICTED, 2), (truly, OBSERVED, 3)):
            ax.scatter(x[which], height[which], s=9, color=colour, alpha=0.75, linewidths=0, zorder=z)
        ax.axhline(-np.log10(FDR), color="0.6", linewidth=0.7, linestyle=(0, (4, 3)), zorder=0)
        ax.set_xlim(-1.05 * edge, 1.05 * edge)
        ax.set_ylim(-0.03 * top, top)
        ax.set_title(f"{name}: {int((fdr < FDR).sum())} genes", size=9.5, loc="left")
        ax.set_xlabel("log2 fold change", size=9)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
        at, gap = -np.inf, 0.06 * top
        for gene in sorted(named, key=lambda g, h=height: h[g]):  # from below, each name above the one before
            at = max(height[gene], at + gap, 0.5 * gap)
            left = x[gene] > 0  # towards the middle, where there is room
            ax.annotate(
                _short(str(gene_names[gene]), 14),
                (x[gene], height[gene]),
                (x[gene] + 0.06 * edge * (-1 if left else 1), at),
                size=7.5,
                ha="right" if left else "left",
                va="center",
                zorder=4,
            )
    axes[0].set_ylabel("−log10 false discovery rate", size=9)  # pyright: ignore[reportOptionalSubscript]
    if title:
        axes[0].figure.suptitle(_short(title, 60), size=10.5, x=0.01, ha="left")  # pyright: ignore[reportOptionalSubscript]
    return list(axes)  # pyright: ignore[reportArgumentType]


def overlay(
    groups: Mapping[str, Any],
    *,
    fitted_on: Sequence[Any],
    predicted: Sequence[str] = (),
    background: str | None = None,
    title: str = "",
    ax: Any = None,
) -> Any:
    """Populations as dots on the first two principal components of real cells; predicted cells only lie on them.

    The cross of a group is its mean. Limits hold the real cells, and widen for predicted ones that lie outside.

    Args:
        groups: cells [cells, genes] by name: the real ones are blue, those named in `predicted` vermillion.
        fitted_on: the real cells, arrays that are joined, whose components they are.
        predicted: names of the groups that are predictions.
        background: the group that is drawn in grey: controls, or the cells of an earlier time.
        title: of the panel.
        ax: a new figure unless given.

    Raises:
        ValueError: no group, cells that are not finite, fewer than three real cells or two columns.
    """
    if not groups:
        raise ValueError("groups must hold at least one population; it is empty.")
    for name, cells in groups.items():
        check.finite(name, np.asarray(cells))
    centre, plane, share = principal_plane(np.concatenate([np.asarray(x, np.float64) for x in fitted_on]))
    ax = _new((3.8, 3.7)) if ax is None else ax
    for name, cells in groups.items():
        x = (np.asarray(cells, np.float64) - centre) @ plane.T
        colour = CONTROL if name == background else PREDICTED if name in predicted else OBSERVED
        ax.scatter(*x.T, s=8, color=colour, alpha=0.45, linewidths=0, zorder=1 if name == background else 2)
        cross = {"marker": "X", "s": 62, "edgecolors": "white", "linewidths": 0.9}
        ax.scatter(*x.mean(axis=0), color=colour, label=_short(name, 24), zorder=4, **cross)
    ax.set_xlabel(f"PC 1 of real cells ({100 * share[0]:.0f} %)", size=9)
    ax.set_ylabel(f"PC 2 ({100 * share[1]:.0f} %)", size=9)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(_short(title, 40), size=10.5, loc="left", pad=22)
    ax.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 0.99), ncols=3, frameon=False, fontsize=8, handletextpad=0.1,
        columnspacing=0.8, borderaxespad=0,
    )  # fmt: skip
    return ax


def principal_plane(
    cells: Float[np.ndarray, "_cells _genes"],
) -> tuple[Float[np.ndarray, " _genes"], Float[np.ndarray, "2 _genes"], Float[np.ndarray, "2"]]:
    """Mean, first two components with a sign that does not hang on the solver, and their shares of the variance."""
    if cells.ndim != 2 or len(cells) < 3 or cells.shape[1] < 2:
        raise ValueError(f"a plane takes three cells and two columns at least; got the shape {cells.shape}.")
    check.finite("cells", cells)
    centre = cells.mean(axis=0)
    _, singular, components = np.linalg.svd(cells - centre, full_matrices=False)
    plane = components[:2] * np.sign(components[[0, 1], np.abs(components[:2]).argmax(axis=1)])[:, None]
    return centre, plane, singular[:2] ** 2 / max(float(np.sum(singular**2)), 1e-300)


def calibration(
    real: Any, predicted: Any, *, what: str = "variance of each gene", log: bool = True, title: str = "", ax: Any = None
) -> Any:
    """A statistic of each gene, predicted over real: on the line a prediction is as spread as the truth.

    Above the panel stands the median ratio (log scale) or the median difference, over the genes where real cells have a
    value that is not zero. On a log scale genes with a zero on either side stand at the edge, hollow.

    Args:
        real, predicted: one value a gene, or several populations' joined; NaN is left out.
        what: the statistic, for the axes.
        log: logarithmic axes; else from 0 to 1, for shares.
        title: of the panel.
        ax: a new figure unless given.

    Raises:
        ValueError: unequal lengths, no finite value.
    """
    real, predicted = (np.ravel(np.asarray(v, np.float64)) for v in (real, predicted))
    if real.shape != predicted.shape:
        raise ValueError(f"real and predicted must have one value a gene each; got {real.size} and {predicted.size}.")
    both = np.isfinite(real) & np.isfinite(predicted)
    real, predicted = real[both], predicted[both]
    if not real.size:
        raise ValueError("real and predicted must share a gene with finite values; they share none.")
    ax = _new((3.8, 3.8)) if ax is None else ax
    if log:
        positive = np.concatenate([v[v > 0] for v in (real, predicted)])
        low, high = (float(positive.min()), float(positive.max())) if positive.size else (0.1, 1.0)
        low, high = low / 1.6, high * 1.6
        x, y = np.maximum(real, low * 1.12), np.maximum(predicted, low * 1.12)
        whole = (real > 0) & (predicted > 0)
        ratio = np.median(predicted[real > 0] / real[real > 0]) if (real > 0).any() else np.nan
        line = f"median predicted / real: {ratio:.2f}"
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        ax.set_xscale("log")
        ax.set_yscale("log")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(LogLocator(numticks=6))
            axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))  # the usual one speaks TeX
            axis.set_minor_formatter(NullFormatter())
    else:
        low, high, x, y = -0.03, 1.03, real, predicted
        whole = np.ones(len(real), bool)
        line = f"median predicted − real: {np.median(predicted - real):+.3f}".replace("-", "\N{MINUS SIGN}")
    size = 26 if len(x) < 100 else 8
    ax.scatter(x[whole], y[whole], s=size, color=PREDICTED, alpha=0.5, linewidths=0, zorder=2)
    ax.scatter(x[~whole], y[~whole], s=size, facecolors="none", edgecolors=PREDICTED, linewidths=0.6, zorder=2)
    ax.plot([low, high], [low, high], color="black", linewidth=0.8, linestyle=(0, (4, 3)), zorder=3)
    ax.set_xlim(low, high)
    ax.set_ylim(low, high)
    ax.set_aspect("equal")
    ax.set_xlabel(f"real {what}", size=9)
    ax.set_ylabel(f"predicted {what}", size=9)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(_short(title, 40), size=10.5, loc="left", pad=18)
    ax.annotate(line, (0, 1), (0, 4), "axes fraction", "offset points", size=8.5, color=PREDICTED, va="bottom")
    return ax


def distributions(
    groups: Mapping[str, Any],
    names: Sequence[str],
    *,
    predicted: Sequence[str] = (),
    background: str | None = None,
    n_columns: int = 5,
    zeros: bool = True,
    title: str = "",
    unit: str = "log expression",
    ax: Any = None,
) -> Any:
    """Populations side by side for the columns whose mean differs most between the background and the real cells.

    Violins of equal width; the bar is the mean; the share of cells at zero stands below, in percent.

    Args:
        groups: cells [cells, columns] by name; one that is neither `background` nor in `predicted` is real.
        names: of the columns.
        predicted: names of the groups that are predictions.
        background: the group that the real cells are held against (controls, an earlier time); None for the mean of
            all columns' spread: the columns that vary most.
        n_columns: that are drawn, at most all.
        zeros: write the shares of zeros; for expression.
        title: of the panel.
        unit: of the values.
        ax: a new figure unless given.

    Raises:
        ValueError: no real group, unequal widths, cells that are not finite.
    """
    cells = {name: np.asarray(x, np.float64) for name, x in groups.items()}
    for name, x in cells.items():
        if x.ndim != 2 or x.shape[1] != len(names) or not len(x):
            raise ValueError(f"{name} must be [cells, {len(names)} columns] and not empty; got {x.shape}.")
        check.finite(name, x)
    of_real = [x for name, x in cells.items() if name != background and name not in predicted]
    if not of_real:
        raise ValueError("groups must hold real cells besides the background and the predictions.")
    real = of_real[0]
    change = real.mean(axis=0) - cells[background].mean(axis=0) if background is not None else real.std(axis=0)
    columns = np.argsort(-np.abs(change), kind="stable")[:n_columns]
    columns = columns[np.argsort(-change[columns], kind="stable")]
    ax = _new((4.2, 3.1)) if ax is None else ax
    low = min(float(x[:, columns].min()) for x in cells.values())
    high = max(float(x[:, columns].max()) for x in cells.values())
    height = (high - low) or 1.0
    width = 0.8 / len(cells)
    for k, (name, x) in enumerate(cells.items()):
        colour = CONTROL if name == background else PREDICTED if name in predicted else OBSERVED
        at = np.arange(len(columns)) + (k - (len(cells) - 1) / 2) * width
        for place, values in zip(at, x[:, columns].T, strict=True):
            if np.ptp(values) > 1e-9 * height:  # one value alone has no density
                (body,) = ax.violinplot([values], [place], widths=0.92 * width, showextrema=False, points=100)["bodies"]
                body.set(facecolor=colour, edgecolor=colour, alpha=0.45, linewidth=0.6, zorder=2)
        means = x[:, columns].mean(axis=0)
        ax.hlines(
            means, at - 0.4 * width, at + 0.4 * width, color=colour, linewidth=2.2, label=_short(name, 22), zorder=3
        )
        if zeros:
            dark = "0.4" if name == background else colour
            for place, share in zip(at, np.mean(x[:, columns] <= 0, axis=0), strict=True):
                ax.text(place, low - 0.05 * height, f"{100 * share:.0f}", ha="center", va="top", size=6.5, color=dark)
    if zeros:
        ax.text(-0.55, low - 0.05 * height, "% zero", ha="right", va="top", size=6.5, color="0.35")
    shown = [_short(str(names[g]), 14) for g in columns]
    ax.set_xticks(range(len(columns)), shown, rotation=25, ha="right", rotation_mode="anchor")
    ax.set_xlim(-0.5, len(columns) - 0.5)
    ax.set_ylim(low - (0.14 if zeros else 0.04) * height, high + 0.04 * height)
    for between in np.arange(len(columns) - 1) + 0.5:
        ax.axvline(between, color="0.9", linewidth=0.7, zorder=0)
    ax.set_ylabel(unit, size=9)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(_short(title, 44), loc="left", size=10.5, pad=20)
    ax.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 0.99), ncols=3, frameon=False, fontsize=8, handlelength=1.1,
        columnspacing=1.0, borderaxespad=0,
    )  # fmt: skip
    return ax


def _new(size: tuple[float, float]) -> Any:
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=size, layout="constrained")[1]


def _short(text: str, most: int) -> str:
    """On one line, cut where it would not fit; the page writes it whole."""
    text = " ".join(str(text).split())
    return text if len(text) <= most else text[: most - 1] + "…"
