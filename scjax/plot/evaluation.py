"""Figures of an evaluation: ranking with intervals, volcano plots, overlays on principal components, calibration."""

import base64
import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from jaxtyping import Float

from scjax import check
from scjax.plot.palette import OBSERVED, PREDICTED
from scjax.plot.perturbation import predictor_lines, write_names

__all__ = ["as_svg_uri", "calibration", "coverage", "distributions", "overlay", "ranking", "reproducible", "volcano"]

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
            zero on one side) is a triangle at the edge; below each panel stands how many there are.
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

        axes = plt.subplots(1, 2, figsize=(4.6, 3.1), sharex=True, sharey=True, layout="constrained")[1]
    finite = np.concatenate([fold[np.isfinite(fold)] for fold, _ in sides])
    widest = max(float(np.abs(finite).max(initial=0.0)), 0.5)
    any_infinite = any(np.isinf(fold).any() for fold, _ in sides)
    edge = 1.2 * widest
    least = min((float(fdr[fdr > 0].min()) for _, fdr in sides if (fdr > 0).any()), default=1.0)
    heights = [-np.log10(np.maximum(fdr, min(least, 1e-300))) for _, fdr in sides]
    top = 1.12 * max(2.0, *(float(np.nanmax(h, initial=0.0)) for h in heights))
    truly = sides[0][1] < FDR
    named = np.lexsort((-np.abs(np.nan_to_num(sides[0][0], posinf=edge, neginf=-edge)), -heights[0]))[:n_named]
    named = named[truly[named]]
    names = ("real cells", _short(predicted_name, 22))
    labels = []
    for ax, name, (fold, fdr), height in zip(axes, names, sides, heights, strict=True):  # pyright: ignore[reportArgumentType]
        x = np.nan_to_num(fold, posinf=edge, neginf=-edge)
        alone = (fdr < FDR) & ~truly
        for which, colour, z in ((~truly & ~alone, "0.75", 1), (alone, PREDICTED, 2), (truly, OBSERVED, 3)):
            for infinite, marker, size in (
                (fold == -np.inf, "<", 20),
                (~np.isinf(fold), "o", 9),
                (fold == np.inf, ">", 20),
            ):
                if marker == "o" or (which & infinite).any():
                    ax.scatter(
                        x[which & infinite], height[which & infinite], s=size, color=colour, marker=marker, alpha=0.75,
                        linewidths=0, zorder=z,
                    )  # fmt: skip
        ax.axhline(-np.log10(FDR), color="0.6", linewidth=0.7, linestyle=(0, (4, 3)), zorder=0)
        ax.set_xlim(-1.08 * edge, 1.08 * edge)
        ax.set_ylim(-0.03 * top, top)
        ax.set_title(f"{name}: {int((fdr < FDR).sum())} genes", size=9.5, loc="left")
        ax.set_xlabel("log2 fold change", size=9)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
        if any_infinite:
            _mark_infinite(ax, edge, widest)
            ax.set_xlabel(f"log2 fold change\n±∞ (zero on one side): {int(np.isinf(fold).sum())}", size=8.5)
        dots = np.stack([x, np.nan_to_num(height)], axis=1)
        labels.append((ax, [(_short(str(gene_names[g]), 14), tuple(dots[g])) for g in named], dots))
    axes[0].set_ylabel("−log10 false discovery rate", size=9)  # pyright: ignore[reportOptionalSubscript]
    if title:
        axes[0].figure.suptitle(_short(title, 60), size=10.5, x=0.01, ha="left")  # pyright: ignore[reportOptionalSubscript]
    axes[0].figure.draw_without_rendering()  # pyright: ignore[reportOptionalSubscript]  # the layout decides where the dots lie
    for of_panel in labels:
        write_names(*of_panel)
    return list(axes)  # pyright: ignore[reportArgumentType]


def _mark_infinite(ax: Any, edge: float, widest: float) -> None:
    """Ticks at both edges that say infinite, and a line between them and the finite changes."""
    from matplotlib.ticker import MaxNLocator

    finite = [
        t for t in MaxNLocator(nbins=4, steps=[1, 2, 5, 10]).tick_values(-widest, widest) if abs(t) <= 0.8 * widest
    ]
    ax.set_xticks([-edge, *finite, edge], ["−∞", *(f"{t:g}".replace("-", "\N{MINUS SIGN}") for t in finite), "∞"])
    for x in (-1, 1):
        ax.axvline(x * (widest + edge) / 2, color="0.85", linewidth=0.7, linestyle=(0, (1, 2)), zorder=0)


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
    value that is not zero. A log scale holds the bulk of the genes; those outside, zeros too, are hollow dots at the
    edge, and counted.

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
        low, high = _bulk(real[real > 0], predicted[predicted > 0])
        whole = (np.minimum(real, predicted) >= low) & (np.maximum(real, predicted) <= high)
        inside = (low * (high / low) ** 0.02, high / (high / low) ** 0.02)  # hollow dots are seen whole
        x, y = (np.where(whole, v, np.clip(v, *inside)) for v in (real, predicted))
        ratio = np.median(predicted[real > 0] / real[real > 0]) if (real > 0).any() else np.nan
        line = f"median predicted / real: {ratio:.2f}"
        if not whole.all():
            line += f"\nhollow, zero or outside: {int((~whole).sum())} of {len(whole)}"
        ticks = _log_ticks(low, high)
        for axis, name in ((ax.xaxis, "x"), (ax.yaxis, "y")):
            getattr(ax, f"set_{name}scale")("log")
            axis.set_ticks(ticks, [f"{t:g}" for t in ticks])  # the usual formatter speaks TeX
            axis.set_ticks([], minor=True)
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
    ax.set_title(_short(title, 40), size=10.5, loc="left", pad=18 + 11 * line.count("\n"))
    ax.annotate(line, (0, 1), (0, 4), "axes fraction", "offset points", size=8.5, color=PREDICTED, va="bottom")
    return ax


def _bulk(real: np.ndarray, predicted: np.ndarray) -> tuple[float, float]:
    """Limits with a margin that hold nearly all positive values of the real cells, and most of the predicted ones."""
    if not real.size + predicted.size:
        return 0.1, 1.0
    ends = [np.quantile(v, [q, 1 - q]) for v, q in ((real, 0.005), (predicted, 0.1)) if v.size]
    low, high = min(float(v[0]) for v in ends), max(float(v[1]) for v in ends)
    lowest, highest = (float(end(np.concatenate([real, predicted]))) for end in (np.min, np.max))
    low, high = (lowest if low / lowest < 3 else low), (highest if highest / high < 3 else high)  # no gain in a cut
    margin = max((high / low) ** 0.06, 1.15)
    return low / margin, high * margin


def _log_ticks(low: float, high: float) -> list[float]:
    """Between three and six round numbers; where none are far enough apart, of even steps."""
    from matplotlib.ticker import MaxNLocator

    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    widest = max(4, -(-len(powers) // 5))
    for step, of_decade in ((widest, (1,)), (3, (1,)), (2, (1,)), (1, (1,)), (1, (1, 3)), (1, (1, 2, 5))):
        ticks = [n * 10.0**p for p in powers if p % step == 0 for n in of_decade if low <= n * 10.0**p <= high]
        if 3 <= len(ticks) <= 6:
            return ticks
    return [float(t) for t in MaxNLocator(nbins=5).tick_values(low, high) if low <= t <= high and t > 0]


def coverage(real: Any, predicted: Any = None, *, nominal: float = 0.9, title: str = "", ax: Any = None) -> Any:
    """How many genes have which share of their real cells within a range that the prediction says holds `nominal`.

    Args:
        real: of each gene the share of real cells within the predicted range; NaN is left out.
        predicted: the share of the predicted cells themselves, an outline: above `nominal` where cells are equal.
        nominal: the share that the range is to hold, a dashed line.
        title: of the panel.
        ax: a new figure unless given.

    Raises:
        ValueError: no finite share of real cells, shares outside [0, 1].
    """
    sides = [np.ravel(np.asarray(v, np.float64)) for v in ([real] if predicted is None else [real, predicted])]
    sides = [v[np.isfinite(v)] for v in sides]
    if not sides[0].size:
        raise ValueError("real must hold the share of at least one gene; no value is finite.")
    for name, shares in zip(("real", "predicted"), sides, strict=False):
        if shares.size and not 0 <= shares.min() <= shares.max() <= 1:
            raise ValueError(f"{name} must hold shares between 0 and 1; got {shares.min():g} to {shares.max():g}.")
    ax = _new((3.8, 3.5)) if ax is None else ax
    bins = np.linspace(0, 1, 21)
    ax.hist(sides[0], bins, color=PREDICTED, alpha=0.6, label="real cells", zorder=2)
    if len(sides) > 1:
        ax.hist(sides[1], bins, histtype="step", color="0.35", linewidth=1.2, label="predicted cells", zorder=3)
    ax.axvline(nominal, color="black", linewidth=0.9, linestyle=(0, (4, 3)), label=f"nominal {nominal:g}", zorder=4)
    ax.set_xlim(0, 1)
    ax.set_xlabel(f"share of cells in the predicted {100 * nominal:g} %", size=9)
    ax.set_ylabel("genes", size=9)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(_short(title, 40), size=10.5, loc="left", pad=32)
    told = f"median share of real cells: {np.median(sides[0]):.2f}"
    ax.annotate(told, (0, 1), (0, 18), "axes fraction", "offset points", size=8.5, color=PREDICTED, va="bottom")
    ax.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 0.99), ncols=3, frameon=False, fontsize=8, handlelength=1.2,
        columnspacing=0.8, borderaxespad=0,
    )  # fmt: skip
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
