"""The recorded numbers of the reference implementations: found by folder, read without pickles."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = Path(os.environ.get("SCJAX_GOLDENS", Path(__file__).parents[2] / "shared" / "goldens"))


def cases(model: str, kinds: tuple[str, ...]) -> dict[str, list[str]]:
    """Case names of each kind; a kind is the part of a file's name that `kinds` lists.

    A file of an unknown kind gets the kind "unknown", which a test must fail.
    """
    found: dict[str, list[str]] = {kind: [] for kind in (*kinds, "unknown")}
    folder = FOLDER / model
    names = sorted({p.name.removesuffix(".npz").removesuffix(".f64") for p in folder.glob("*.npz")})
    for name in names:
        kind = next((k for k in kinds if name.startswith(k)), "unknown")
        found[kind].append(name)
    return found


def absence(model: str) -> str:
    """Why nothing can be read; empty where it can."""
    folder = FOLDER / model
    if folder.is_dir():
        return ""
    return f"the recorded numbers of the reference are not at hand: no folder {folder} (set SCJAX_GOLDENS)"


def or_absent(model: str, kind: str, found: list[str]) -> list[Any]:
    """These cases, or one that says why there is none.

    The recordings lie beside the checkout and are no part of it: elsewhere there is nothing to compare with, and a
    folder may hold some kinds only. A file that no test knows is the business of the kind "unknown".
    """
    return found or [told_absent(absence(model) or f"the recordings hold no file of the kind {kind}*")]


def told_absent(why: str, n_arguments: int = 1) -> Any:
    """The one case of a test whose cases are recordings that are not there: of an empty list pytest says nothing that
    helps, this case says what is not compared, and why.
    """
    return pytest.param(*[None] * n_arguments, marks=pytest.mark.skip(reason=why), id="none")


def require(model: str) -> None:
    if absence(model):
        pytest.skip(absence(model))


def load(model: str, case: str, suffix: str = "") -> dict[str, np.ndarray]:
    with np.load(FOLDER / model / f"{case}{suffix}.npz", allow_pickle=False) as file:
        return dict(file)


def under(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
