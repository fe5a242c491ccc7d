"""Effects of perturbations: predicted over observed changes, the genes that change most, how sets vary, metrics."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Array, Float

from scjax import check
from scjax.plot.palette import OBSERVED, PREDICTED

__all__ = [
    "NOISE_LEVEL",
    "delta_scatter",
    "metric_dots",
    "noise_level",
    "predictor_lines",
    "set_means",
    "top_gene_distributions",
    "write_names",
]

Cells: TypeAlias = Float[np.ndarray | Array, "_cells _genes"]

CONTROL = "#999999"
NOISE_LEVEL = (
    "Real vs real is a noise level, no ceiling, where another row is better: each half of the real cells has half as "
    "many cells, and its mean scatters more."
)
# Where a name may stand, in directions from its point; the first that is free is taken, outwards in three steps.
AROUND = [(np.cos(a), np.sin(a)) for a in np.deg2rad([20, 160, -20, -160, 50, 130, -50, -130, 80, -80, 110, -110])]
STEPS = (11.0, 20.0, 32.0)  # points


def delta_scatter(
    observed: Mapping[Any, Any],
    predicted: Mapping[Any, Any],
    gene_names: Sequence[str],
    *,
    baseline: Mapping[Any, Any] | None = None,
    baseline_name: str = "baseline",
    predicted_name: str = "predicted",
    n_named: int = 6,
    axes: Sequence[Any] | None = None,
    unit: str = "log expression",
) -> list[Any]:
    """One panel for each condition: predicted over observed change of each gene's mean, and the line where they agree.

    The genes that really change most are named. The correlation over all genes stands above the panel, as does that of
    the baseline, whose genes are the open grey points behind. Each panel has one scale for both of its axes.

    Args:
        observed: change of the mean against control, [genes], of each condition; the keys are the titles.
        predicted: the same conditions.
        gene_names: of the genes.
        baseline: the same conditions, of a rule to compare with; a condition that it lacks has none.
        baseline_name: of that rule.
        predicted_name: of the model.
        n_named: genes that are named in each panel.
        axes: one for each condition; a new figure unless given.
        unit: of the changes.

    Raises:
        ValueError: no condition, one without prediction, arrays of other lengths than `gene_names`, values that are
            not finite, another number of axes than of conditions.
    """
    if not observed:
        raise ValueError("observed must hold the change of at least one condition; it is empty.")
    for condition in observed:
        if condition not in predicted:
            raise ValueError(f"predicted has no {condition}.{check.suggestion(condition, predicted)}")
    check.at_least("n_named", n_named, 0)
    ours = axes is None
    axes = _panels(len(observed), 3.1) if ours else list(axes)
    if len(axes) != len(observed):
        raise ValueError(f"axes must hold one for each of {len(observed)} conditions; got {len(axes)}.")
    behind = {} if baseline is None else baseline
    named = []
    for position, (ax, (condition, real)) in enumerate(zip(axes, observed.items(), strict=True)):
        real = _change(f"observed[{condition}]", real, gene_names)
        pred = _change(f"predicted[{condition}]", predicted[condition], gene_names)
        lines = [(f"{predicted_name}  r = {_correlation(pred, real)}", PREDICTED)]
        sides = [real, pred]
        size = 14 if real.size <= 300 else 8
        if condition in behind:
            base = _change(f"baseline[{condition}]", behind[condition], gene_names)
            grey = {"facecolors": "none", "edgecolors": "0.65", "linewidths": 0.8, "s": 1.5 * size}
            ax.scatter(real, base, label=baseline_name, zorder=2, **grey)
            lines.append((f"{baseline_name}  r = {_correlation(base, real)}", "0.45"))
            sides.append(base)
        ax.scatter(real, pred, s=size, color=PREDICTED, alpha=0.75, linewidths=0, label=predicted_name, zorder=3)
        low, high = _limits(np.concatenate(sides))
        ax.plot([low, high], [low, high], color="black", linewidth=0.7, linestyle=(0, (4, 3)), zorder=1)
        ax.axhline(0, color="0.88", linewidth=0.7, zorder=0)
        ax.axvline(0, color="0.88", linewidth=0.7, zorder=0)
        ax.set_xlim(low, high)
        ax.set_ylim(low, high)
        ax.set_aspect("equal")
        ticks = [t for t in _ticks(low, high) if low < t < high]
        ax.set_xticks(ticks)
        ax.set_yticks(ticks)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_title(str(condition), size=11, loc="left", pad=8 + 11 * len(lines))
        for height, (line, colour) in enumerate(reversed(lines)):
            ax.annotate(
                line, (0, 1), (0, 4 + 11 * height), "axes fraction", "offset points", color=colour, size=8, va="bottom"
            )
        if not ours or ax.get_subplotspec().is_last_row() or position >= len(axes) - _columns(len(axes)):
            ax.set_xlabel(f"observed change ({unit})", size=9)
        if not ours or ax.get_subplotspec().is_first_col():
            ax.set_ylabel(f"predicted change ({unit})", size=9)
        ax.tick_params(labelsize=8)
        top = np.argsort(-np.abs(real), kind="stable")[:n_named]
        dots = np.concatenate([np.stack([real, side], axis=1) for side in sides[1:]])
        named.append((ax, [(str(gene_names[g]), (real[g], pred[g])) for g in top], dots))
    for figure in {id(ax.figure): ax.figure for ax in axes}.values():
        figure.draw_without_rendering()  # the layout decides where the points lie
    for ax, labels, points in named:
        write_names(ax, labels, points)
    return axes


def top_gene_distributions(
    control: Cells,
    observed: Cells,
    predicted: Cells,
    gene_names: Sequence[str],
    *,
    n_genes: int = 8,
    genes: Sequence[str] | None = None,
    ax: Any = None,
    title: str = "",
    predicted_name: str = "predicted",
    unit: str = "log expression",
) -> Any:
    """Control, observed and predicted cells side by side, for the genes whose mean really changes most.

    Each violin is as wide at its fullest as any other; the bar is the mean, and the share of cells without expression
    stands below, in percent. The genes fall from the largest rise to the largest drop.

    Args:
        control, observed, predicted: cells of one condition, [cells, genes].
        gene_names: of the columns.
        n_genes: genes that are drawn, at most all.
        genes: drawn instead, by name, in this order.
        ax: a new figure unless given.
        title: of the panel: the condition.
        predicted_name: of the model.
        unit: of expression.

    Raises:
        ValueError: unequal numbers of genes, an unknown gene, cells that are not finite.
    """
    groups = {}
    for name, cells in (("control", control), ("observed", observed), (predicted_name, predicted)):
        cells = np.asarray(cells, np.float64)
        if cells.ndim != 2 or cells.shape[1] != len(gene_names) or not len(cells):
            raise ValueError(f"{name} must be [cells, {len(gene_names)} genes] and not empty; got {cells.shape}.")
        check.finite(name, cells)
        groups[name] = cells
    names = list(map(str, gene_names))
    change = groups["observed"].mean(axis=0) - groups["control"].mean(axis=0)
    if genes is None:
        check.at_least("n_genes", n_genes, 1)
        columns = np.argsort(-np.abs(change), kind="stable")[:n_genes]
        columns = columns[np.argsort(-change[columns], kind="stable")]
    else:
        for gene in genes:
            if gene not in names:
                raise ValueError(f"genes has {gene!r}, which is not among gene_names.{check.suggestion(gene, names)}")
        columns = np.array([names.index(gene) for gene in genes])
    if ax is None:
        import matplotlib.pyplot as plt

        ax = plt.subplots(figsize=(1.6 + 1.15 * len(columns), 3.6), layout="constrained")[1]
    low = min(float(x[:, columns].min()) for x in groups.values())
    high = max(float(x[:, columns].max()) for x in groups.values())
    height = (high - low) or 1.0
    for (name, x), colour, shift in zip(groups.items(), (CONTROL, OBSERVED, PREDICTED), (-0.27, 0, 0.27), strict=True):
        at = np.arange(len(columns)) + shift
        drawn = ax.violinplot(list(x[:, columns].T), at, widths=0.25, showextrema=False, points=200)
        for body in drawn["bodies"]:
            body.set(facecolor=colour, edgecolor=colour, alpha=0.45, linewidth=0.6, zorder=2)
        ax.hlines(x[:, columns].mean(axis=0), at - 0.11, at + 0.11, color=colour, linewidth=2.4, label=name, zorder=3)
        for where, share in zip(at, np.mean(x[:, columns] <= 0, axis=0), strict=True):
            ax.text(where, low - 0.05 * height, f"{100 * share:.0f}", ha="center", va="top", size=7, color=colour)
    ax.text(-0.62, low - 0.05 * height, "% zero", ha="right", va="top", size=7, color="0.35")
    ax.set_xticks(range(len(columns)), [names[g] for g in columns], rotation=30, ha="right", rotation_mode="anchor")
    ax.set_yticks([t for t in _ticks(low, high) if low - 0.02 * height <= t <= high + 0.04 * height])
    ax.set_xlim(-0.55, len(columns) - 0.45)
    ax.set_ylim(low - 0.13 * height, high + 0.04 * height)
    for between in np.arange(len(columns) - 1) + 0.5:
        ax.axvline(between, color="0.9", linewidth=0.7, zorder=0)
    ax.set_ylabel(unit)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(title, loc="left", size=11)
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1.0), ncols=3, frameon=False, fontsize=9, handlelength=1.2)
    return ax


def set_means(
    populations: Mapping[Any, Sequence[Any]],
    *,
    predicted_name: str = "predicted",
    note: str = "",
    axes: Sequence[Any] | None = None,
) -> list[Any]:
    """How far sets of cells of one population lie apart: in each panel, a dot for the mean of each of its sets.

    The plane is that of the first two principal components of the dots; at each axis stands its share of their
    variance. The cross is the mean of a group, the ellipse two standard deviations round it. Sets of unequal size are
    not comparable: the variance of a mean falls with the number of cells. Sets that are drawn from the same few cells
    lie closer together than sets of other cells would; say so in `note`.

    Args:
        populations: by title, the means of control, observed and predicted sets, each [sets, genes] of three sets or
                more.
        predicted_name: of the model.
        note: stands above a new figure: how the sets were drawn.
        axes: one for each population; a new figure unless given.

    Raises:
        ValueError: no population, unequal numbers of genes, fewer than two genes or three sets, values that are not
            finite, another number of axes than of populations.
    """
    if not populations:
        raise ValueError("populations must hold at least one; it is empty.")
    ours = axes is None
    axes = _panels(len(populations), 3.6) if ours else list(axes)
    if len(axes) != len(populations):
        raise ValueError(f"axes must hold one for each of {len(populations)} populations; got {len(axes)}.")
    names = ("control", "observed", predicted_name)
    for ax, (title, groups) in zip(axes, populations.items(), strict=True):
        groups = [np.asarray(means, np.float64) for means in groups]
        for name, means in zip(names, groups, strict=True):
            if means.ndim != 2 or len(means) < 3 or means.shape[1] < 2 or means.shape[1] != groups[0].shape[1]:
                raise ValueError(
                    f"{title}, {name}: wanted [sets, genes] with three sets or more and as many genes as the "
                    f"control's, two at least; got {means.shape}."
                )
            check.finite(f"{title}, {name}", means)
        _draw_set_means(ax, groups, names)
        ax.set_title(str(title), loc="left", size=10)
    handles = _set_legend(names)
    if ours:
        axes[0].figure.legend(
            handles=handles, loc="outside lower center", ncols=5 if len(axes) > 2 else 2, frameon=False, fontsize=9
        )
        if note:
            axes[0].figure.suptitle(note, size=9.5, x=0.01, ha="left")
    else:
        axes[0].legend(handles=handles, loc="best", frameon=False, fontsize=8, handlelength=1.0, borderaxespad=0.2)
    return axes


def _set_legend(names: Sequence[str]) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    plain = {"linestyle": "none", "markeredgewidth": 0}
    return [
        *(
            Line2D([], [], marker="o", markersize=5, color=colour, label=f"{name}: mean of a set", **plain)
            for name, colour in zip(names, (CONTROL, OBSERVED, PREDICTED), strict=True)
        ),
        Line2D([], [], marker="X", markersize=8, color="0.25", label="mean of the sets", **plain),
        Patch(color="0.25", alpha=0.15, label="two standard deviations of the sets"),
    ]


def _draw_set_means(ax: Any, groups: Sequence[np.ndarray], names: Sequence[str]) -> None:
    from matplotlib.patches import Ellipse

    everything = np.concatenate(groups)
    centre = everything.mean(axis=0)
    _, singular, components = np.linalg.svd(everything - centre, full_matrices=False)
    plane = components[:2] * np.sign(components[[0, 1], np.abs(components[:2]).argmax(axis=1)])[:, None]
    share = singular[:2] ** 2 / max(float(np.sum(singular**2)), 1e-300)
    for name, means, colour in zip(names, groups, (CONTROL, OBSERVED, PREDICTED), strict=True):
        points = (means - centre) @ plane.T
        variances, directions = np.linalg.eigh(np.cov(points.T))  # ascending
        short, long = 4 * np.sqrt(np.maximum(variances, 0))  # two standard deviations to both sides
        angle = np.degrees(np.arctan2(*directions[::-1, 1]))
        ax.add_patch(Ellipse(points.mean(axis=0), long, short, angle=angle, color=colour, alpha=0.15, zorder=1))  # pyright: ignore[reportArgumentType]
        ax.scatter(*points.T, s=16, color=colour, alpha=0.75, linewidths=0, label=name, zorder=2)
        cross = {"marker": "X", "s": 70, "edgecolors": "white", "linewidths": 0.8}
        ax.scatter(*points.mean(axis=0), color=colour, zorder=3, **cross)
    ax.set_aspect("equal", adjustable="datalim")
    ax.set_xlabel(f"PC 1 of the means ({100 * share[0]:.0f} %)", size=9)
    ax.set_ylabel(f"PC 2 ({100 * share[1]:.0f} %)", size=9)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)


def metric_dots(
    values: Mapping[str, Any],
    *,
    highlighted: Sequence[str] = (),
    ceiling: str | None = None,
    metric: str = "",
    lower_is_better: bool | None = None,
    ax: Any = None,
) -> Any:
    """A line for each predictor: a dot for each population, a bar at their mean; the ceiling's mean runs through all.

    A ceiling that is worse than another row is called the noise level, and a note above the panel says why.

    Args:
        values: of each predictor, one value a population; NaN has no dot, and its count stands behind the name.
        highlighted: the models among them, in colour.
        ceiling: the predictor that is real cells against real cells, if there is one.
        metric: name of the axis, best with an arrow towards better.
        lower_is_better: of the metric; None calls no ceiling worse.
        ax: a new figure unless given.
    """
    if not values:
        raise ValueError("values must hold at least one predictor; it is empty.")
    for name in (*highlighted, *([] if ceiling is None else [ceiling])):
        check.one_of("highlighted and ceiling", name, list(values))
    if ax is None:
        import matplotlib.pyplot as plt

        ax = plt.subplots(figsize=(5.6, 0.9 + 0.34 * len(values)), layout="constrained")[1]
    noisy = ceiling is not None and lower_is_better is not None and _is_beaten(values, ceiling, lower_is_better)
    ticks = []
    for line, (name, each) in enumerate(values.items()):
        each = np.ravel(np.asarray(each, np.float64))
        finite = each[np.isfinite(each)]
        colour = PREDICTED if name in highlighted else OBSERVED if name == ceiling else "0.45"
        spread = 0.22 * np.sin(2.4 * np.arange(finite.size))  # apart, without chance
        ax.scatter(finite, line + spread, s=16, color=colour, alpha=0.45, linewidths=0, zorder=2)
        if finite.size:
            ax.plot([finite.mean()] * 2, [line - 0.36, line + 0.36], color=colour, linewidth=2.4, zorder=3)
            if name == ceiling:
                ax.axvline(finite.mean(), color=colour, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        lost = each.size - finite.size
        ticks.append(
            (noise_level(name) if noisy and name == ceiling else name)
            + (f" ({lost} of {each.size} without)" if 0 < lost < each.size else " (no value)" if lost else "")
        )
    predictor_lines(ax, ticks, metric)
    if noisy:
        told = textwrap.fill(NOISE_LEVEL, 92)
        ax.annotate(told, (0.01, 1), (0, 4), ("figure fraction", "axes fraction"), "offset points", size=8)
    return ax


def _is_beaten(values: Mapping[str, Any], ceiling: str, lower_is_better: bool) -> bool:
    """By any other, on the populations where both have a value."""
    real = np.ravel(np.asarray(values[ceiling], np.float64))
    for name, each in values.items():
        each = np.ravel(np.asarray(each, np.float64))
        both = np.isfinite(real) & np.isfinite(each) if each.shape == real.shape else np.zeros(0, bool)
        if name != ceiling and both.any():
            gain = each[both].mean() - real[both].mean()
            if gain < 0 if lower_is_better else gain > 0:
                return True
    return False


def noise_level(name: str) -> str:
    """The name of real against real where it is no ceiling: `NOISE_LEVEL` says why."""
    for word in ("ceiling", "floor"):
        name = name.replace(f"({word})", "(noise level)")
    return name if "noise level" in name else f"{name} (noise level)"


def predictor_lines(ax: Any, ticks: Sequence[str], metric: str) -> None:
    """Axes with a line for each predictor, the first at the top."""
    ax.set_yticks(range(len(ticks)), ticks)
    ax.set_ylim(len(ticks) - 0.4, -0.6)
    ax.set_xlabel(metric)
    ax.grid(axis="y", color="0.92", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)


def _columns(n: int) -> int:
    return n if n <= 4 else 3 if n in (5, 6, 9) else 4


def _panels(n: int, width: float) -> list[Any]:
    import matplotlib.pyplot as plt

    n_columns = _columns(n)
    n_rows = -(-n // n_columns)
    size = (width * n_columns, width * 1.12 * n_rows)
    figure, axes = plt.subplots(n_rows, n_columns, figsize=size, squeeze=False, layout="constrained")
    for ax in axes.flat[n:]:
        figure.delaxes(ax)
    return list(axes.flat[:n])


def _change(name: str, values: Any, gene_names: Sequence[str]) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.shape != (len(gene_names),):
        raise ValueError(f"{name} must hold one change for each of {len(gene_names)} genes; got {values.shape}.")
    check.finite(name, values)
    return values


def _correlation(x: np.ndarray, y: np.ndarray) -> str:
    if min(np.std(x), np.std(y)) <= 1e-12:
        return "none"
    return f"{np.corrcoef(x, y)[0, 1]:.2f}".replace("-", "\N{MINUS SIGN}")


def _limits(values: np.ndarray) -> tuple[float, float]:
    """Both axes', with room for names on all sides."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    margin = 0.14 * ((high - low) or 1.0)
    return low - margin, high + margin


def _ticks(low: float, high: float) -> np.ndarray:
    from matplotlib.ticker import MaxNLocator

    return np.asarray(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]).tick_values(low, high))


def write_names(ax: Any, labels: Sequence[tuple[str, tuple[float, float]]], points: np.ndarray) -> None:
    """Names beside their points: inside the panel, over no other name, and over as few points as can be.

    The figure has been drawn (`draw_without_rendering`), so that its layout stands. `points` are all dots of the panel.
    Greedy, the first (largest) change first; a thin line leads from a name that had to move away. A name that finds no
    free place is left out: the plot stays readable.
    """
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    renderer = ax.figure.canvas.get_renderer()
    frame = ax.get_window_extent(renderer)
    dots = ax.transData.transform(points)
    taken = [text.get_window_extent(renderer) for text in ax.texts]
    per_point = ax.figure.dpi / 72
    radius = 1.5 * per_point  # of a dot, nearly
    for name, point in labels:
        centre = ax.transData.transform(point)
        text = ax.annotate(
            name,
            point,
            (0, 0),
            textcoords="offset points",
            size=7.5,
            ha="center",
            va="center",
            zorder=5,
            arrowprops={"arrowstyle": "-", "color": "0.45", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2},
        )
        text.set_in_layout(False)  # the names are put into the layout, not the layout round the names
        box = Text.get_window_extent(text, renderer)  # without the line that leads to it
        half = 0.52 * np.array([box.width, box.height])  # a name is not quite as wide at every resolution
        best = None
        for step in STEPS:
            for direction in AROUND:
                # to the rim of the name, so that a long name stands as near as a short one
                offset = np.array(direction) * (step * per_point * 0.6 + np.array([half[0], half[1]]))
                low, high = centre + offset - half - 2, centre + offset + half + 2
                outside = low[0] < frame.x0 or low[1] < frame.y0 or high[0] > frame.x1 or high[1] > frame.y1
                if outside or any(_overlap(low, high, other) for other in taken):
                    continue
                covered = int(np.sum((dots > low - radius).all(axis=1) & (dots < high + radius).all(axis=1)))
                cost = (covered, step)
                if best is None or cost < best[0]:
                    best = (cost, offset, low, high)
            if best is not None and best[0][0] == 0:
                break
        if best is None:
            text.remove()
            continue
        text.set_position(tuple(best[1] / per_point))
        taken.append(Bbox([best[2], best[3]]))


def _overlap(low: np.ndarray, high: np.ndarray, box: Any) -> bool:
    return bool(low[0] < box.x1 and high[0] > box.x0 and low[1] < box.y1 and high[1] > box.y0)
