"""State dicts of PyTorch programs: what may come in, and one description of a network read in both directions.

A converter is a program that asks a `Reader` for tensors by name and shape. What it is given, whole, transposed or in
part, it puts into the tree of parameters. The way back is the same program, run over the empty tensors of a `Blank`. It
is then given views of them; writing parameters into the tree that it makes therefore fills the tensors (`fill`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from scjax.types import Params

__all__ = ["Blank", "Reader", "Stack", "checked", "fill", "remainder", "shape_of"]

Shape = tuple[int | None, ...]


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


class Blank(dict):
    """Empty tensors of whatever name and shape a `Reader` asks for; filled ones where `originals` have them.

    Attributes:
        originals: a state dict whose tensors are the start, in place of zeros; None for none.
        dtype_of: of each tensor by its name; float32 of those that it does not have.
        as_marks: all tensors are False, to mark what has a place in the parameters.
    """

    def __init__(
        self,
        originals: Mapping[str, np.ndarray] | None = None,
        dtype_of: Mapping[str, Any] | None = None,
        *,
        as_marks: bool = False,
    ):
        super().__init__()
        self.originals, self.dtype_of, self.as_marks = originals, dtype_of or {}, as_marks

    def make(self, name: str, shape: Shape, unknown: int | None, value: float | None) -> np.ndarray:
        """The tensor, full of `value` where no original has it; `unknown` is its size along an axis of no known one.

        Raises:
            ValueError: an original of another shape, or a size or a value that is known of an original alone.
        """
        given = None if self.originals is None else self.originals.get(name)
        if given is not None and not _fits(np.shape(given), shape):
            raise ValueError(f"originals: {name} has the shape {np.shape(given)}; wanted {shape}.")
        wanted = (unknown if n is None else n for n in shape) if given is None else np.shape(given)
        sizes = tuple(n for n in wanted if n is not None)
        if len(sizes) < len(shape) or (value is None and given is None):
            raise ValueError(
                f"{name} is no parameter of ours, and the parameters do not tell it: hand in originals, the state dict "
                "of the PyTorch model that it is for."
            )
        if self.as_marks:
            self[name] = np.zeros(sizes, bool)
        elif given is not None:
            self[name] = np.array(given, self.dtype_of.get(name))
        else:
            self[name] = np.zeros(sizes, self.dtype_of.get(name, np.float32))
            if value:
                self[name][...] = value
        return self[name]


class Stack:
    """Views that the parameters hold as one array, along a new first axis."""

    def __init__(self, parts: Sequence[np.ndarray]):
        self.parts = list(parts)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.parts), *self.parts[0].shape)


class Reader:
    """Takes tensors by name, and remembers what did not fit.

    Attributes:
        left: what nobody has taken yet; or a `Blank`, which gives whatever is asked for.
        misfits: a line for each.
    """

    def __init__(self, state: dict[str, np.ndarray]):
        self.left, self.misfits = state, []

    def take(self, name: str, shape: Shape, unknown: int | None = None) -> np.ndarray:
        """The tensor. None in the shape stands for any size, `unknown` in empty tensors."""
        if isinstance(self.left, Blank):
            return self.left.make(name, shape, unknown, 0.0)
        if name not in self.left:
            self.misfits.append(f"{name} is missing; wanted the shape {shape}")
            return np.zeros([size or 1 for size in shape], np.float32)
        value = np.asarray(self.left.pop(name))
        if not _fits(value.shape, shape):
            self.misfits.append(f"{name} has the shape {value.shape}; wanted {shape}")
            # So that the reading goes on, and lists what else is wrong.
            return np.zeros([size or 1 for size in shape], value.dtype)
        return value

    def leave(self, name: str, shape: Shape, unknown: int | None = None, value: float | None = 0.0) -> None:
        """A tensor that has no place in the parameters; a state dict may have it or not.

        `value`: of all its entries in a state dict that is made without originals; None where those must tell them.
        """
        if isinstance(self.left, Blank):
            if self.left.originals is None or name in self.left.originals:
                self.left.make(name, shape, unknown, value)
        elif name in self.left:
            self.take(name, shape)

    def linear(
        self, name: str, n_in: int | None, n_out: int | None, *, bias: bool = True, keep: int | None = None
    ) -> Params:
        """A layer, or its first `keep` outputs."""
        kernel = {"kernel": self.take(f"{name}.weight", (n_out, n_in)).T[:, :keep]}
        return kernel | ({"bias": self.take(f"{name}.bias", (n_out,))[:keep]} if bias else {})

    def affine(self, name: str, width: int) -> Params:
        """Scale and offset of a layer norm."""
        return {"scale": self.take(f"{name}.weight", (width,)), "bias": self.take(f"{name}.bias", (width,))}

    def stack(self, parts: Sequence[np.ndarray]) -> Any:
        return Stack(parts) if isinstance(self.left, Blank) else np.stack(parts)

    def finish(self) -> None:
        """Nothing, where everything was taken and did fit.

        Raises:
            ValueError: tensors that were missing, misshapen or left over; all of them are listed.
        """
        over = [f"{name} {np.shape(value)} has no place in this config" for name, value in self.left.items()]
        if misfits := [*self.misfits, *over]:
            raise ValueError("the state dict does not fit the config:\n  " + "\n  ".join(misfits))


def fill(
    read: Callable[[Blank], Params], params: Params, originals: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """The state dict that `read` would make these parameters of; a tensor has the dtype of what is written into it.

    Args:
        read: the description of the network: a tree of views of the tensors that it asks for.
        originals: what stands where the parameters say nothing, see `Blank`.

    Raises:
        ValueError: parameters missing, left over or of another shape than the config asks for; all of them are listed.
    """
    marks = Blank(originals, as_marks=True)
    places = _leaves(read(marks))
    given = {path: np.asarray(leaf) for path, leaf in _leaves(params).items()}
    misfits = [
        *(f"{path} is missing; wanted the shape {place.shape}" for path, place in places.items() if path not in given),
        *(f"{path} {given[path].shape} has no place in this config" for path in given if path not in places),
        *(
            f"{path} has the shape {given[path].shape}; wanted {place.shape}"
            for path, place in places.items()
            if path in given and given[path].shape != place.shape
        ),
    ]
    if misfits:
        raise ValueError("the parameters do not fit the config:\n  " + "\n  ".join(misfits))
    name_of = {id(tensor): name for name, tensor in marks.items()}
    dtypes: dict[str, list[Any]] = {}
    for path, place in places.items():
        for part in _parts(place):
            dtypes.setdefault(name_of[id(_root(part))], []).append(given[path].dtype)
    state = Blank(originals, {name: np.result_type(*some) for name, some in dtypes.items()})
    for path, place in _leaves(read(state)).items():
        whole = given[path] if isinstance(place, Stack) else [given[path]]
        for part, value in zip(_parts(place), whole, strict=True):
            part[...] = value
    return dict(state)


def remainder(read: Callable[[Blank], Params], state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What of a state dict has no place in the parameters: `originals` that make it whole again.

    Tensors of which a part has its place have zeros there.
    """
    marks = Blank(state, as_marks=True)
    for place in _leaves(read(marks)).values():
        for part in _parts(place):
            part[...] = True
    partly = [name for name, mark in marks.items() if name in state and not mark.all()]
    return {name: np.where(marks[name], np.zeros((), state[name].dtype), state[name]) for name in partly}


def _parts(place: Any) -> list[np.ndarray]:
    return place.parts if isinstance(place, Stack) else [place]


def _root(view: np.ndarray) -> np.ndarray:
    while view.base is not None:
        view = view.base
    return view


def _leaves(tree: Params) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _fits(shape: tuple[int, ...], wanted: Shape) -> bool:
    return len(shape) == len(wanted) and all(n in (None, got) for n, got in zip(wanted, shape, strict=True))


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
