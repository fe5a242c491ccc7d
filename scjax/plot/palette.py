"""Colours that readers with colour-vision deficiencies tell apart."""

import itertools
from collections.abc import Sequence

__all__ = ["BACKGROUND", "OBSERVED", "PREDICTED", "TIME_MAP", "TYPES", "VALUE_MAP", "type_colours"]

OBSERVED = "#0072B2"  # blue and vermillion of Okabe and Ito, the pair that differs most under all three deficiencies
PREDICTED = "#D55E00"
BACKGROUND = "#C8C8C8"
TIME_MAP = "viridis"  # rises in lightness all along
VALUE_MAP = "Blues"

# Okabe and Ito's seven, then five of Tol's "muted" that are not near them.
TYPES = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#F0E442",
    "#332288",
    "#882255",
    "#999933",
    "#44AA99",
    "#661100",
)


def type_colours(n: int, colours: Sequence[str] | None = None) -> list[str]:
    """`n` colours, from the start again beyond the palette's end: plots also write the names.

    Raises:
        ValueError: `colours` are given and are not `n`.
    """
    if colours is None:
        return list(itertools.islice(itertools.cycle(TYPES), n))
    if len(colours) != n:
        raise ValueError(f"colours must hold one colour for each of {n} types; got {len(colours)}.")
    return list(colours)
