"""A figure to a file."""

from pathlib import Path
from typing import Any

__all__ = ["save"]


def save(ax: Any, path: str | Path, dpi: int = 150) -> None:
    """Writes the figure that `ax` belongs to, and lets go of it."""
    import matplotlib.pyplot as plt

    ax.figure.savefig(path, dpi=dpi)
    plt.close(ax.figure)
