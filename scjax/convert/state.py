"""State dicts of PyTorch programs at the door: names, and arrays of finite numbers.

A `.pt` file is a pickle, which may run code when it is read. Read it by `torch.load(path, weights_only=True)`, which
takes tensors and nothing that acts, and pass `{name: tensor.numpy() for name, tensor in state.items()}`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["checked", "shape_of"]


def checked(state: Any) -> dict[str, np.ndarray]:
    """A copy of the mapping.

    Raises:
        ValueError: no mapping of names to arrays of numbers, or numbers among them that are not finite; all of these
            are listed.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"state must be a mapping of names to arrays; it is {type(state).__name__}.")
    wrong = [problem for name, value in state.items() if (problem := _problem(name, value))]
    if wrong:
        more = f"\n  and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise ValueError("state must map names to arrays of finite numbers:\n  " + "\n  ".join(wrong[:20]) + more)
    return dict(state)


def shape_of(state: Mapping[str, np.ndarray], name: str, n_axes: int) -> tuple[int, ...]:
    """The sizes of a tensor that tells a setting: so many of them, none of them zero."""
    shape = tuple(int(n) for n in state[name].shape) if name in state else ()
    if len(shape) != n_axes or not all(shape):
        has = f"the shape {shape}" if name in state else "no such tensor"
        raise ValueError(f"{name} must have {n_axes} axes that are not empty, to tell the config; state has {has}.")
    return shape


def _problem(name: Any, value: Any) -> str:
    if not isinstance(name, str):
        return f"{name!r:.60} is no name but {type(name).__name__}"
    if not isinstance(value, np.ndarray | np.generic) or isinstance(value, np.ma.MaskedArray):
        inner = "; pass what lies in it" if isinstance(value, Mapping) else ""
        return f"{name!r} is no NumPy array but {type(value).__name__}{inner}"
    if value.dtype.kind not in "fiub":
        # ml_dtypes' bfloat16 is of kind V, and numbers all the same
        if value.dtype.name not in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
            return f"{name!r} holds {value.dtype}, not numbers"
        value = value.astype(np.float32)
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        return f"{name!r} holds NaN or infinite values"
    return ""
