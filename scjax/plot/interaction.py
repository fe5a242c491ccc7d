"""Who acts on whom: circle of types, type matrix, cell-by-cell matrix. Rows receive, columns send, everywhere."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int

from scjax import check
from scjax.plot.palette import VALUE_MAP, type_colours

__all__ = ["cell_heatmap", "interaction_circle", "interaction_heatmap"]

NODE = 0.09  # radius of a node on the unit circle
LOOP = 4.0  # how far the controls of a self-loop lie out, in radii of a node; its outermost point is at 2.6
CURVATURE = 0.2


def interaction_circle(
    matrix: Float[np.ndarray | Array, "types types"],
    names: Sequence[str],
    *,
    width_per_unit: float,
    ax: Any = None,
    colours: Sequence[str] | None = None,
    title: str = "",
) -> Any:
    """Types on a circle; an arrow from each sender to each receiver, in the sender's colour, as wide as its entry.

    Entries of zero have no arrow. A type that is absent (its row and column NaN) keeps its place, as an empty node, so
    that panels of different times look alike.

    Args:
        matrix: entry (a, b) is what type b exerts on type a.
        names: of the types.
        width_per_unit: points of line width for an entry of 1. It is explicit so that panels that are to be compared
            have one scale: `8 / largest entry of all panels` is a good start.
        ax: a new figure unless given.
        colours: one a type.
        title: of the panel.

    Raises:
        ValueError: not square, other number of names, negative entries.
    """
    from matplotlib.patches import Circle, FancyArrowPatch

    matrix = _square(matrix, names)
    check.positive("width_per_unit", width_per_unit)
    if (matrix < 0).any():
        raise ValueError(f"matrix must not be negative, widths cannot show it; its least entry is {np.nanmin(matrix)}.")
    n = len(names)
    colours = type_colours(n, colours)
    ax = _new_axes(5.6, 5.2) if ax is None else ax
    angles = np.pi / 2 - 2 * np.pi * np.arange(n) / n  # clockwise from the top
    outwards = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    radius = min(NODE, 0.7 * np.pi / n)
    reach = 1 + 3.2 * radius  # of the loops; the names stand there
    nodes = []
    for i in range(n):
        absent = np.isnan(matrix[i]).all()
        face = {"facecolor": "white", "linestyle": ":"} if absent else {"facecolor": colours[i]}
        nodes.append(
            Circle(tuple(outwards[i]), radius, edgecolor="black", linewidth=0.8, zorder=3, gid=names[i], **face)
        )
        ax.add_patch(nodes[-1])
        _name_outside(ax, names[i], outwards[i], reach)
    for receiver, sender in zip(*np.nonzero(np.nan_to_num(matrix)), strict=True):
        width = float(width_per_unit * matrix[receiver, sender])
        style = {
            "arrowstyle": "-|>",
            "mutation_scale": 6 + 2 * width,
            "linewidth": width,
            "color": colours[sender],
            "alpha": 0.8,
            "joinstyle": "miter",
            "capstyle": "butt",
            "zorder": 2,
            "gid": f"{names[sender]} -> {names[receiver]}",
            "shrinkA": 0,
            "shrinkB": 0,
        }
        if receiver == sender:
            ax.add_patch(FancyArrowPatch(path=_loop(outwards[sender], radius), **style))
        else:
            ends = (tuple(outwards[sender]), tuple(outwards[receiver]))
            bow = f"arc3,rad={CURVATURE}"
            between = {"patchA": nodes[sender], "patchB": nodes[receiver], "connectionstyle": bow}
            ax.add_patch(FancyArrowPatch(*ends, **between, **style))
    ax.text(0, -reach - 0.3, f"arrow: sender to receiver, {width_per_unit:.3g} pt per unit", ha="center", size=8)
    ax.set_xlim(-reach - 0.3, reach + 0.3)
    ax.set_ylim(-reach - 0.35, reach + 0.2)
    ax.set_aspect("equal")
    ax.set_axis_off()
    ax.set_title(title)
    return ax


def interaction_heatmap(
    matrix: Float[np.ndarray | Array, "types types"],
    names: Sequence[str],
    *,
    ax: Any = None,
    quantity: str = "mean attention score",
    value_range: tuple[float, float] | None = None,
    title: str = "",
) -> Any:
    """The type matrix: receivers down, senders across; the numbers are written into matrices of up to eight types.

    `value_range` sets the ends of the colours, so that panels that are to be compared have one scale; from 0 to the
    largest entry unless given. NaN (an absent type) stays grey.
    """
    matrix = _square(matrix, names)
    n = len(names)
    ax = _new_axes(2.6 + 0.5 * n, 2.0 + 0.5 * n) if ax is None else ax
    low, high = (0.0, float(np.nanmax(matrix))) if value_range is None else value_range
    ax.set_facecolor("0.85")
    image = ax.imshow(matrix, cmap=VALUE_MAP, vmin=low, vmax=high)
    ax.set_xticks(range(n), names, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(n), names)
    ax.set_xlabel("sender")
    ax.set_ylabel("receiver")
    ax.set_title(title)
    ax.figure.colorbar(image, ax=ax, label=quantity, shrink=0.8)
    if n <= 8:
        for a, b in zip(*np.nonzero(np.isfinite(matrix)), strict=True):
            dark = matrix[a, b] > low + 0.55 * (high - low)
            ax.text(b, a, f"{matrix[a, b]:.2g}", ha="center", va="center", color="white" if dark else "black", size=8)
    return ax


def cell_heatmap(
    scores: Float[np.ndarray | Array, "_cells _cells"],
    labels: Int[np.ndarray | Array, " _cells"],
    names: Sequence[str],
    *,
    scale_columns: bool = False,
    ax: Any = None,
    colours: Sequence[str] | None = None,
    quantity: str = "attention score",
    title: str = "",
) -> Any:
    """Cell-by-cell scores, sorted by type, with a bar of the types' colours along receivers and senders.

    Args:
        scores: entry (i, j) is what cell j exerts on cell i.
        labels: index of each cell's type in `names`; cells labelled -1 are left out.
        names: of the types.
        scale_columns: bring each column to 0..1 by its least and largest entry, as the reference does. It shows whom a
            sender reaches, and hides how strong the sender is.
        ax: a new figure unless given.
        colours: one a type.
        quantity: what the scores are.
        title: of the panel.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.shape != (len(labels), len(labels)):
        raise ValueError(f"scores must be [cells, cells] for {len(labels)} labels; got {scores.shape}.")
    if labels.max(initial=-1) >= len(names) or labels.min(initial=0) < -1:
        raise ValueError(f"labels must lie in -1 .. {len(names) - 1}; got {labels.min()} .. {labels.max()}.")
    order = np.argsort(labels, kind="stable")[int((labels == -1).sum()) :]
    if not len(order):
        raise ValueError("labels leave no cell: all are -1.")
    scores, labels = scores[np.ix_(order, order)], labels[order]
    if scale_columns:
        low, high = scores.min(axis=0, keepdims=True), scores.max(axis=0, keepdims=True)
        scores = (scores - low) / np.where(high > low, high - low, 1)
        quantity += ", each column scaled to 0..1"
    colours = type_colours(len(names), colours)
    present = np.unique(labels)
    ax = _new_axes(5.8, 4.8 + 0.12 * len(present)) if ax is None else ax
    image = ax.imshow(scores, cmap=VALUE_MAP, aspect="auto", interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])
    bars = {"cmap": ListedColormap(colours), "vmin": -0.5, "vmax": len(names) - 0.5, "aspect": "auto"}
    left, top = ax.inset_axes((-0.045, 0, 0.035, 1)), ax.inset_axes((0, 1.015, 1, 0.035))
    left.imshow(labels[:, None], interpolation="nearest", **bars)
    top.imshow(labels[None], interpolation="nearest", **bars)
    for bar in (left, top):
        bar.set_xticks([])
        bar.set_yticks([])
    left.set_ylabel("receiving cells")
    ax.set_xlabel("sending cells")
    top.set_title(title)
    ax.figure.colorbar(image, ax=ax, label=quantity)
    handles = [Patch(color=colours[k], label=f"{names[k]} ({int((labels == k).sum())})") for k in present]
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=2, frameon=False)
    return ax


def _new_axes(width: float, height: float) -> Any:
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def _square(matrix: Any, names: Sequence[str]) -> np.ndarray:
    matrix = np.asarray(matrix, np.float64)
    if matrix.shape != (len(names), len(names)):
        raise ValueError(f"matrix must be [types, types] for {len(names)} names; got {matrix.shape}.")
    return matrix


def _name_outside(ax: Any, name: str, direction: np.ndarray, distance: float) -> None:
    x, y = direction
    across = "center" if abs(x) < 0.25 else ("left" if x > 0 else "right")
    along = "center" if abs(y) < 0.85 else ("bottom" if y > 0 else "top")
    ax.text(distance * x, distance * y, name, ha=across, va=along)


def _loop(direction: np.ndarray, radius: float) -> Any:
    """A closed bow from a node's rim outwards and back to it, as one cubic curve."""
    from matplotlib.path import Path

    x, y = direction
    outwards = np.arctan2(y, x)

    def at(angle: float, distance: float) -> np.ndarray:
        return direction + distance * np.array([np.cos(outwards + angle), np.sin(outwards + angle)])

    curve = [at(0.7, radius), at(0.62, LOOP * radius), at(-0.62, LOOP * radius), at(-0.7, radius)]
    return Path(curve, [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])
